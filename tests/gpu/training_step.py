"""The training step of the recipe: how fast, how much memory, and what the time goes to."""

import functools
import time
from typing import Any, NamedTuple

import jax
import numpy as np
from measuring import attempt, memory
from tracing import traced
from workload import prepared, recipe, set_up

from spin_jax.models.architecture import Model
from spin_jax.models.params import count_params, init_params
from spin_jax.runtime import chips, sharding
from spin_jax.selfplay import from_config
from spin_jax.training.batches import PairBatch, ScoredPair, filled_tokens, pair_batches, rows_flops, stacked
from spin_jax.training.packing import RowShape
from spin_jax.training.step import init_state, make_step

TARGET_MFU = 0.45  # of the 7B step, counting real tokens
_STEPS = 3  # that are timed
_WHOLE_7B = 118  # GiB that the step of all 32 layers wants; 12 layers have the same shapes, for an H100
_HALF = 12


class Work(NamedTuple):
    """A config's training, ready to begin."""

    config: Any
    model: Model
    shape: RowShape
    objective: Any
    options: Any
    batches: list[PairBatch]  # [M, N, …], on the host


def run(
    dry: bool,
    short: bool,
    arch: str,
    remat: list[str],
    trace: bool = False,
    attention: str | None = None,
    layers: int | None = None,
) -> None:
    """Tells the rows of this step.

    Args:
        arch, layers: see `workload.recipe`.
        remat: the policies, one after another.
        trace: the last step is traced, too.
        attention: the kernel; None: what the recipe takes.
    """
    overrides = {"model.attention": attention} if attention else {}
    set_up(recipe(arch, dry, layers, overrides))
    if arch == "7b" and not layers and 0 < memory()["limit_gib"] < _WHOLE_7B:
        layers = _HALF
    for policy in remat:
        config = recipe(arch, dry, layers, {**overrides, "train.remat": policy})
        what = {"arch": arch, "remat": policy}
        measure = functools.partial(_measure, config, trace and not short, 1 if short else _STEPS, what)
        attempt(measure, what="train", **what)


def _measure(config: Any, trace: bool, steps: int, what: dict[str, Any]) -> dict[str, Any]:
    """Steps of the recipe: the first compiles, the others are timed."""
    work = _prepare(config)
    model, mesh = work.model, work.model.mesh
    params = init_params(model.config, jax.random.key(0), mesh)
    count = count_params(params)
    state = init_state(params, work.options, mesh)
    del params  # the state is donated, and nothing else may hold it
    step = make_step(work.objective, work.options)
    rate, scalars = np.float32(config.train.learning_rate[0]), {"beta": np.float32(config.loss.beta[0])}

    def one(number: int) -> float:
        nonlocal state
        batch = sharding.put_batch(mesh, work.batches[number % len(work.batches)], axis=1)
        state, metrics = step(state, batch, rate, scalars)
        return float(jax.block_until_ready((state, metrics))[1]["loss"])

    try:
        with jax.set_mesh(mesh):
            times, losses = zip(*(_timed(one, number) for number in range(steps + 1)), strict=True)
            if trace:
                attempt(lambda: traced(lambda: one(0)), what="train trace", **what)
    finally:
        sharding.free(state)
    return {
        "parameters": count,
        "layers": model.config.num_hidden_layers,
        "kernel": work.objective.decoder.kernel,
        "shape": list(work.shape),
        "first_step_s": times[0],
        "step_s": times[1:],
        "losses": losses,
        "right": bool(np.isfinite(losses).all()),
        **_rates(work, times[1:], what["arch"]),
        **memory(),
    }


def _prepare(config: Any) -> Work:
    model, pairs, shape = prepared(config)
    objective, options = from_config.spin(config, model), from_config.optimization(config, 0)
    scored = [ScoredPair(pair, (-200.0, -150.0)) for pair in pairs]
    size = options.batch_size
    most = -(-size // shape.rows)
    batches = [
        stacked(pair_batches(scored[first : first + size], shape, roles=objective.roles), most)
        for first in range(0, len(scored) - size + 1, size)
    ]
    return Work(config, model, shape, objective, options, batches)


def _timed(one: Any, number: int) -> tuple[float, float]:
    began = time.perf_counter()
    loss = one(number)
    return time.perf_counter() - began, loss


def _rates(work: Work, times: tuple[float, ...], arch: str) -> dict[str, Any]:
    """What the timed steps come to; only tokens that are no padding count, and a shared prompt's once."""
    timed = [work.batches[number % len(work.batches)] for number in range(1, len(times) + 1)]
    used = [int((batch.rows.items > 0).any(axis=(1, 2)).sum()) for batch in timed]
    tokens = sum(filled_tokens(batch) for batch in timed)
    computed = sum(used) * work.shape.rows * work.shape.length
    flops = sum(3 * rows_flops(work.model.config, batch.rows) for batch in timed)
    rate = flops / sum(times) / work.model.mesh.size
    chip = chips.chip(jax.devices()[0].device_kind)
    mfu = rate / chip.flops if chip else None
    found = {
        "microbatches": used,
        "real_tokens_per_s": tokens / sum(times),
        "computed_tokens_per_s": computed / sum(times),
        "padding": 1 - tokens / computed,
        "tflops": rate / 1e12,
        "mfu": mfu,
    }
    if arch == "7b":
        found |= {"target_mfu": TARGET_MFU, "reached": mfu is not None and mfu >= TARGET_MFU}
    return found
