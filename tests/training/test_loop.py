"""The loop over steps: what it reports, saves, and stops at."""

import time

import numpy as np
import pytest
from training_examples import random_pairs, sft_step

from spin_jax.errors import NotFinite
from spin_jax.training.loop import Loop, fit
from spin_jax.training.step import (
    TrainState,
)


def test_fit_reports_tokens_and_waiting(mesh):
    """Tokens a second count a shared prompt once and no padding; waiting for a batch is seen where it was."""
    batch, reported = sft_step(random_pairs(8)), []

    def source():
        for seconds in (0.1, 0.3, 0.0, 0.0):
            time.sleep(seconds)
            yield batch

    def step(state, batch, learning_rate, scalars, frozen):
        time.sleep(0.1)  # what a device would take
        return state, {"loss": learning_rate * scalars["beta"], "skipped": 0}

    began = time.perf_counter()
    fit(
        TrainState({}, None, None),
        source(),
        step,
        start=1,
        learning_rates=np.array([9.0, 1.0, 2.0, 3.0, 4.0]),
        scalars={"beta": 0.5},
        mesh=mesh,
        checkpoints=None,
        loop=Loop(5, 10, 1, lambda *report: reported.append(report), lambda: 0),
    )
    took = time.perf_counter() - began
    tokens = sum(len(pair.prompt) + len(pair.real) for pair in random_pairs(8))
    assert [number for number, _, _ in reported] == [1, 2, 3, 4]
    assert [values["loss"] for _, values, _ in reported] == [0.5, 1.0, 1.5, 2.0]
    assert [values["learning_rate"] for _, values, _ in reported] == [1.0, 2.0, 3.0, 4.0]
    seconds = np.array([tokens / values["tokens_per_s"] for _, values, _ in reported])
    assert seconds.sum() == pytest.approx(took, rel=0.1)
    shares = np.array([share for _, _, share in reported])
    assert 0.4 <= (seconds * shares).sum() < took - 0.4  # a step's own time is no waiting
    assert shares.max() <= 1
    assert np.sort(shares)[-2] < shares.max() / 2  # both fell between two reports


def test_saving_is_no_part_of_a_steps_speed(mesh):
    class Slow:
        def check_room(self, state):
            pass

        def save(self, done, state):
            time.sleep(0.5)

    reported = []
    fit(
        TrainState({}, None, None),
        iter([sft_step(random_pairs(8))] * 2),
        lambda state, batch, learning_rate, scalars, frozen: (state, {"loss": learning_rate, "skipped": 0}),
        start=0,
        learning_rates=np.ones(2),
        scalars={},
        mesh=mesh,
        checkpoints=Slow(),
        loop=Loop(2, 1, 1, lambda *report: reported.append(report), lambda: 0),
    )
    tokens = sum(len(pair.prompt) + len(pair.real) for pair in random_pairs(8))
    assert [tokens / values["tokens_per_s"] < 0.4 for _, values, _ in reported] == [True, True]


def test_too_many_in_a_row_stop_the_run_with_the_batch(mesh):
    """And nothing is saved after them: the last good checkpoint stays."""
    saved, given = [], [sft_step(random_pairs(8))] * 9

    class Checkpoints:
        check_room = staticmethod(lambda state: None)
        save = staticmethod(lambda done, state: saved.append(done))

    def step(state, batch, learning_rate, scalars, frozen):  # step 5 is the first that is not finite
        return state + 1, {"loss": 1.0, "skipped": max(state - 4, 0)}

    with pytest.raises(NotFinite, match="the last was step 6") as caught:
        fit(
            0,
            iter(given),
            step,
            start=0,
            learning_rates=np.ones(9),
            scalars={},
            mesh=mesh,
            checkpoints=Checkpoints,
            loop=Loop(9, 2, 2, lambda *report: None, lambda: 0),
        )
    assert saved == [2, 4, 6]
    assert caught.value.batch is given[0]
