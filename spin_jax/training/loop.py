"""The loop over training steps, with metrics, checkpoints and interruptions."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from spin_jax.errors import Interrupted, NotFinite
from spin_jax.models.architecture import Params
from spin_jax.runtime import sharding
from spin_jax.storage import checkpoints as checkpoint
from spin_jax.training.batches import filled_tokens
from spin_jax.training.step import Metrics, Step, TrainState


@dataclasses.dataclass
class Loop:
    """How the loop of one training phase runs."""

    steps: int  # steps of this phase
    save_every: int  # steps between checkpoints; an interruption saves one too
    most_skipped: int  # so many steps in a row that are not finite end the run
    # Called after each step with its number, its metrics, and the share of time spent waiting for the batch.
    on_step: Callable[[int, dict[str, float], float], None]
    # Called while a step runs. Returns a signal's number or 0, or an object that becomes this number later.
    should_stop: Callable[[], Any]


def fit(
    state: TrainState,
    batches: Iterable[Any],
    step: Step,
    *,
    start: int,
    learning_rates: np.ndarray,
    scalars: Mapping[str, float],
    frozen: Params | None = None,
    mesh: jax.sharding.Mesh,
    checkpoints: checkpoint.StepCheckpoints,
    loop: Loop,
) -> TrainState:
    """Runs the steps `start` … `loop.steps` − 1.

    Args:
        state: donated to the first step.
        batches: the batches of step `start` and after, with arrays [M, N, …].
        learning_rates: the learning rate of each step of the schedule.
        scalars: the scalars of the objective, which are the same for all steps.
        frozen: the weights under the adapters, where the state holds adapters.

    Raises:
        Interrupted: `loop.should_stop` returned a signal; the state has been saved.
        NotFinite: too many steps in a row were not finite; they did not change the state.
    """
    arguments = {name: np.float32(value) for name, value in scalars.items()}
    pending: tuple[int, Metrics, Any] | None = None  # a step that has not been reported
    last_report, waited = time.perf_counter(), 0.0  # seconds waited for batches since the last report

    def report() -> None:
        nonlocal pending, last_report, waited
        if pending is None:
            return
        (number, metrics, batch), pending = pending, None
        values = {name: float(value) for name, value in metrics.items()}  # waits for the device
        now = time.perf_counter()
        seconds, last_report = now - last_report, now
        values["learning_rate"] = float(learning_rates[number])
        values["tokens_per_s"] = filled_tokens(batch) / seconds
        share, waited = waited / seconds, 0.0
        loop.on_step(number, values, share)
        if values["skipped"] >= loop.most_skipped:
            raise NotFinite(number, batch)

    if loop.save_every < loop.steps:
        checkpoints.check_room(state)  # before any work could be lost
    source, signal = iter(batches), 0
    with jax.set_mesh(mesh):
        for number in range(start, loop.steps):
            asked_at = time.perf_counter()
            batch = next(source)
            waited += time.perf_counter() - asked_at
            placed = sharding.put_batch(mesh, batch, axis=1)
            state, metrics = step(state, placed, learning_rates[number], arguments, frozen)
            report()  # of the previous step, while the device works on this one
            pending, done = (number, metrics, batch), number + 1
            # Several processes agree on the signal one step later; a single process knows it now.
            earlier, signal = signal, loop.should_stop()
            stop = done < loop.steps and (int(earlier) or (signal if isinstance(signal, int) else 0))
            if stop or (done % loop.save_every == 0 and done < loop.steps):
                report()
                checkpoints.save(done, state)
                last_report = time.perf_counter()  # saving does not count as a step's time
            if stop:
                raise Interrupted(stop)
            if pending is None:
                checkpoints.check_room(state)  # room for the next checkpoint, while nothing would be lost
        report()
    return state
