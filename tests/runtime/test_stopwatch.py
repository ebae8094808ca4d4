"""The seconds of phases, by a clock that the test moves."""

import types
from collections import Counter

import jax
import pytest

from spin_jax.runtime import stopwatch


@pytest.fixture
def clock(monkeypatch):
    """(a function that lets so many seconds go by, the seconds of each phase)."""
    now = types.SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: now.seconds)
    monkeypatch.setattr(stopwatch, "_compilations", [])
    seconds = stopwatch.count_in(Counter())

    def wait(count):
        now.seconds += count

    yield wait, seconds
    stopwatch.count_in(Counter())


def test_phases_add_up_to_the_clock_on_the_wall(clock):
    """A checkpoint in the middle of training is no part of it; what is sampled for an evaluation belongs to that."""
    wait, seconds = clock
    saved = stopwatch.phase("checkpoint")(lambda: wait(3))
    sampled = stopwatch.phase("sample")(lambda: wait(10))
    wait(1)
    with stopwatch.phase("train"):
        wait(5)
        saved()
        wait(7)
    sampled()
    with stopwatch.phase("evaluation"):
        sampled()
        with pytest.raises(ZeroDivisionError):  # a phase that ends with an error has its seconds, too
            stopwatch.phase("load")(lambda: wait(4) or 1 / 0)()
        wait(2)
    wait(6)
    stopwatch.tick()
    assert seconds == {"other": 7, "train": 12, "checkpoint": 3, "sample": 10, "evaluation": 12, "load": 4}


def test_compiling_is_taken_out_of_the_phase_that_needs_it(clock):
    """Tracing within tracing counts once."""
    wait, seconds = clock

    def compiled(count, kind):
        jax.monitoring.record_event_duration_secs(f"/jax/core/compile/{kind}", count)

    with stopwatch.phase("train"):
        wait(1)
        wait(2)
        compiled(2, "jaxpr_trace_duration")  # of a function within the next one
        wait(3)
        compiled(5, "jaxpr_trace_duration")  # both of them
        wait(10)
        compiled(10, "backend_compile_duration")
        wait(4)
    assert seconds == {"other": 0, "train": 5, "compile": 15}
