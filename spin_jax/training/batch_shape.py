"""Chooses the shape of the micro-batches that wastes least on the data at hand."""

from typing import Any

import numpy as np

from spin_jax.models import cost
from spin_jax.models.architecture import Model
from spin_jax.runtime import sharding
from spin_jax.runtime.sharding import round_up
from spin_jax.training.packing import RowShape, pack

_MOST_GROUPS = 64  # groups of a row at most; some arrays have this size
_TRIAL_STEPS, _TRIAL_GROUPS = 16, 512  # for every length so many steps are packed, or so many groups if more


def row_shape(model: Model, expected: np.ndarray, largest: np.ndarray, *, kernel: str, **options: Any) -> RowShape:
    """`choose_shape` with the costs of attention and of a micro-batch on the model's devices.

    Args:
        kernel: the attention kernel: plain, splash or flash.
        options: `batch_size`, `tokens_per_device` and `row_length` of `choose_shape`.
    """
    on_cpu = model.mesh.devices.flat[0].platform == "cpu"
    devices = sharding.context_shards(model.mesh)  # that share a row, and have room for that many times the tokens
    options["tokens_per_device"] *= devices
    return choose_shape(
        expected,
        largest,
        shards=sharding.batch_shards(model.mesh),
        # The plain kernel also computes the softmax of all scores. Splash skips the scores after a token, and
        # flash skips all scores outside of a token's own group, so that long rows cost it nothing.
        attention=cost.score_share(model.config) * {"plain": 1.5, "splash": 0.5, "flash": 0}[kernel],
        # On an accelerator, reading the weights and adding up the gradients takes as long as some hundred
        # tokens. A CPU needs about 2 ms to start (at 100 GFLOP/s), which is many tokens of a small model.
        overhead=devices * (2e8 / (3 * cost.forward_flops(model.config, 1, 1, 0)) if on_cpu else 256),
        granule=devices * (16 if kernel == "plain" else 128),
        unshared=kernel == "splash",
        **options,
    )


def choose_shape(
    expected: np.ndarray,
    largest: np.ndarray,
    *,
    batch_size: int,
    shards: int,
    tokens_per_device: int,
    attention: float,
    overhead: float,
    granule: int,
    row_length: int | None = None,
    unshared: bool = False,
) -> RowShape:
    """The shape that wastes least, found by packing the expected groups of a few steps.

    Longer rows waste less at their ends, but cost more attention. Larger micro-batches leave more of the last one
    empty, but read the weights and add up gradients less often.

    Args:
        expected: `sizes` of the groups that are known, int [groups, 3].
        largest: the largest size that a group can have, int [3].
        batch_size: groups of a step.
        shards: the number of rows is a multiple of it.
        tokens_per_device: the most tokens of a micro-batch on a device (unless a single row is longer).
        attention: the cost of one attention score, in units of the other costs of a token.
        overhead: the fixed cost of a micro-batch, in tokens per device.
        granule: lengths are multiples of it.
        row_length: the length of the rows, which must hold every group; None searches for the best one.
        unshared: whether the shape needs `unshared`, as for splash attention.
    """
    if row_length is None:
        shortest = round_up(int(largest[0]), granule)
        factors = (1, 1.0625, 1.125, 1.25, 1.375, 1.5, 1.75, 2, 2.5, 3, 4)
        lengths = {round_up(int(shortest * factor), granule) for factor in factors}
        lengths = {length for length in lengths if length <= max(shortest, tokens_per_device)}
    elif row_length < largest[0]:
        raise ValueError(f"row_length={row_length}: a group can have {largest[0]} tokens")
    else:
        lengths = {round_up(row_length, granule)}
    rng, groups = np.random.default_rng(0), min(batch_size, len(expected))
    trials = max(_TRIAL_STEPS, _TRIAL_GROUPS // groups)
    steps = [expected[rng.choice(len(expected), groups, replace=False)] for _ in range(trials)]
    fewest = max(int(expected[:, 0].min()), 1)
    costs: dict[RowShape, float] = {}
    for T in sorted(lengths):
        shape = RowShape(1, T, max(1, min(T // fewest, _MOST_GROUPS)))
        packings = [pack(step, shape.capacity) for step in steps]
        if unshared:
            most = max(step[row, 1].sum() for step, rows in zip(steps, packings, strict=True) for row in rows)
            shape = shape._replace(unshared=round_up(max(int(most), int(largest[1])), granule))
        counts = np.array([len(rows) for rows in packings])
        for each in range(1, max(1, tokens_per_device // T) + 1):
            microbatches = float((-(-counts // (each * shards))).mean())
            cost = microbatches * each * T * (1 + attention * T) + microbatches * overhead
            costs[shape._replace(rows=each * shards)] = cost
    return min(costs, key=lambda shape: costs[shape])
