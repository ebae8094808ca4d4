"""The profile of some training steps: jax.profiler's own reader says which steps it has."""

import contextlib
import types

import jax
import jax.numpy as jnp

from spin_jax import config
from spin_jax.selfplay.fitting import Fitting
from spin_jax.training.trace import traced


def steps_in(folder):
    """The numbers of the steps of the trace in a folder."""
    (path,) = folder.rglob("*.xplane.pb")
    data = jax.profiler.ProfileData.from_file(str(path))
    events = [event for plane in data.planes for line in plane.lines for event in line.events]
    assert b"add_one" in path.read_bytes()  # what the step runs
    return sorted({dict(event.stats)["step_num"] for event in events if event.name == "train"})


@jax.jit
def add_one(state):
    return state + 1


def test_the_steps_that_are_wanted_are_traced(tmp_path, capsys):
    """From a resumed loop those that are left. Steps that are not wanted take no profiler."""
    for start, steps, found in ((0, range(2, 4), [2, 3]), (3, range(3, 6), [3, 4, 5])):
        state, folder = jnp.zeros(8), tmp_path / f"from_{start}"
        with traced(add_one, start, steps, folder, "iteration_0") as step:
            for _ in range(start, 6):  # the second trace ends with the loop
                state = step(state)
        assert state[0] == 6 - start
        assert steps_in(folder / "plugins" / "profile" / "iteration_0") == found
        assert f"steps {found[0]} to {found[-1]}: tensorboard --logdir={folder}" in capsys.readouterr().out
    with traced(add_one, 0, range(0), tmp_path / "none", "iteration_0") as step:
        assert step is add_one


def test_a_trace_that_is_interrupted_is_not_written(tmp_path):
    """And the profiler is free for the next one."""
    for number in range(2):
        with contextlib.suppress(KeyboardInterrupt), traced(add_one, 0, range(1, 9), tmp_path / "profile", "x") as step:
            step(step(jnp.zeros(number + 1)))
            raise KeyboardInterrupt
    assert not (tmp_path / "profile").exists()


def test_a_workdir_gets_one_trace_of_the_first_iteration_that_takes_the_steps(tmp_path):
    c = config.resolve({"model": {"path": "x"}, "data": {"path": "x"}, "logging": {"profile_steps": (10, 13)}})
    fitting = Fitting(types.SimpleNamespace(config=c, workdir=tmp_path), None, None)

    def steps(start, name="train", count=100):
        phase = types.SimpleNamespace(name=name, iteration=2, steps=count)
        first, chosen, folder, iteration = fitting._traced(phase, start)
        assert (first, folder, iteration) == (start, tmp_path / "profile", "iteration_2")
        return list(chosen)

    assert steps(0) == [10, 11, 12, 13]
    assert steps(12) == [12, 13]  # it was interrupted in the middle
    assert steps(14) == []
    assert steps(0, count=12) == [10, 11]
    assert steps(0, count=10) == []
    assert steps(0, name="control") == []
    (tmp_path / "profile").mkdir()
    assert steps(0) == []
