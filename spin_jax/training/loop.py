"""The loop over training steps: reports, checkpoints, interruptions."""

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
    """What surrounds the steps of one training phase."""

    steps: int  # steps of this phase
    save_every: int  # steps between checkpoints; an interruption makes one too
    most_skipped: int  # steps in a row that may be not finite, less one
    # Told each step's metrics, in order, and the share of its time that was spent waiting for the batch.
    on_step: Callable[[int, dict[str, float], float], None]
    should_stop: Callable[[], Any]  # asked while a step runs: a signal's number or 0, or what will be one


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
        state: donated.
        batches: those of step `start` and after; arrays are [M, N, …].
        learning_rates: one a step of the schedule.
        scalars: of the objective, the same for all steps.
        frozen: the weights under the adapters, where the state is of those.

    Raises:
        Interrupted: `loop.should_stop()`; the state has been saved.
        NotFinite: nothing of the skipped steps went into the state; the last checkpoint stays.
    """
    arguments = {name: np.float32(value) for name, value in scalars.items()}
    pending: tuple[int, Metrics, Any] | None = None
    clock, waited = time.perf_counter(), 0.0  # when the last report was, and waiting since then

    def report(item: tuple[int, Metrics, Any]) -> None:
        nonlocal clock, waited
        number, metrics, batch = item
        values = {name: float(value) for name, value in metrics.items()}  # waits for the device
        before, clock = clock, time.perf_counter()
        values["learning_rate"] = float(learning_rates[number])
        values["tokens_per_s"] = filled_tokens(batch) / (clock - before)
        share, waited = waited / (clock - before), 0.0
        loop.on_step(number, values, share)
        if values["skipped"] >= loop.most_skipped:
            raise NotFinite(number, batch)

    if loop.save_every < loop.steps:
        checkpoints.check_room(state)  # now, and not when the work is done
    source, asked = iter(batches), 0
    with jax.set_mesh(mesh):
        for number in range(start, loop.steps):
            began = time.perf_counter()
            batch = next(source)
            waited += time.perf_counter() - began
            placed = sharding.put_batch(mesh, batch, axis=1)
            state, metrics = step(state, placed, learning_rates[number], arguments, frozen)
            # The device works on this step while the host reports the one before.
            if pending is not None:
                report(pending)
            pending = (number, metrics, batch)
            done = number + 1
            before, asked = asked, loop.should_stop()  # several processes come to an answer a step later
            stop = done < loop.steps and (int(before) or (asked if isinstance(asked, int) else 0))
            if stop or (done % loop.save_every == 0 and done < loop.steps):
                report(pending)
                pending = None
                checkpoints.save(done, state)
                clock = time.perf_counter()  # a step's speed is not the disk's
            if stop:
                raise Interrupted(stop)
            if pending is None:
                checkpoints.check_room(state)  # for the next one, while nothing would be lost
        if pending is not None:
            report(pending)
    return state
