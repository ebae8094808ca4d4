"""Attention: is each kernel right, how fast is it at the recipe's shapes, and which is the one to take?

Axes as in attention_kernels.py.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from attention_kernels import Kernel, bounds, candidates, ours
from measuring import attempt, tell, timed
from tracing import traced
from workload import prepared, recipe, set_up

from spin_jax.kernels import flash, visible_blocks
from spin_jax.kernels.layout import Layout
from spin_jax.training.packing import Group, RowShape, group_sizes, packed, pair_group

# bfloat16 keeps 8 bits: what is rounded to it is off by 0.2%. Scores, weights and gradients are, on the way.
_BF16 = 0.01
_FLOAT32 = 1e-5
ThreeBlocks = tuple[
    visible_blocks.Blocks, visible_blocks.Blocks, visible_blocks.Blocks
]  # of the forward kernel, dq's, and dk and dv's

# Blocks (queries, keys, warps, stages) to try beside those that spin_jax/flash.py has for heads of 128. Each
# line is one program: its forward kernel, that of dq, that of dk and dv; a trace has the time of each.
_BLOCKS = [
    tuple(visible_blocks.Blocks(*size) for size in line)
    for line in (
        ((128, 64, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3)),
        ((128, 128, 8, 2), (128, 32, 4, 2), (32, 64, 4, 2)),
        ((64, 64, 4, 3), (64, 32, 4, 3), (64, 32, 4, 2)),
        ((128, 32, 4, 3), (128, 64, 4, 2), (64, 64, 4, 2)),
        ((64, 128, 4, 2), (128, 128, 8, 1), (128, 64, 8, 2)),
    )
]
_KERNELS = ("flash_forward", "flash_dq", "flash_dkv")  # their names in a trace


class Example(NamedTuple):
    """Rows to attend in, of random numbers; zeros where a row is not filled."""

    layout: Layout  # on the host
    qkv: tuple[jax.Array, jax.Array, jax.Array]
    gradient: jax.Array  # of the output
    filled: np.ndarray  # bool [B, T, 1, 1]
    flops: float  # of the forward pass, those of tokens that are seen

    def cast(self, dtype: Any) -> "Example":
        qkv = tuple(x.astype(dtype) for x in self.qkv)
        return self._replace(qkv=qkv, gradient=self.gradient.astype(dtype))


def run(dry: bool, short: bool) -> None:
    """Tells the rows of this step."""
    config = recipe("7b", dry, overrides={"model.attention": "flash"})
    set_up(config)
    model, pairs, shape = prepared(config)
    heads = model.config.num_attention_heads, model.config.num_key_value_heads, model.config.head_dim
    groups = [pair_group(pair) for pair in pairs]
    tell(shape=list(shape), heads=list(heads), largest=group_sizes(groups).max(axis=0).tolist())
    right = _compare(_example(groups, shape._replace(rows=1), heads), short)
    whole = _example(groups, shape, heads)
    times = _time(whole, 2 if dry else 10, short)
    _choose(right, times)
    _tune(whole, 2 if dry else 10, _BLOCKS[2:3] if dry else _BLOCKS)


def _example(groups: Sequence[Group], shape: RowShape, heads: tuple[int, int, int]) -> Example:
    layout = packed(groups, shape)[0].layout
    filled = (layout.segments != 0)[:, :, None, None]
    rng, (N, K, H) = np.random.default_rng(0), heads
    arrays = [rng.normal(size=(*layout.positions.shape, n, H)) * filled for n in (N, K, K, N)]
    q, k, v, gradient = (jnp.asarray(x, jnp.bfloat16) for x in arrays)
    seen = np.sum(layout.positions + 1, where=layout.segments != 0)
    return Example(layout, (q, k, v), gradient, filled, 4.0 * N * H * int(seen))


def forward(kernel: Kernel) -> Callable[..., jax.Array]:
    return jax.jit(lambda plan, qkv: kernel.run(plan, *qkv))


def both_ways(kernel: Kernel) -> Callable[..., Any]:
    """(plan, qkv, gradient) → (output, the gradients of q, k and v), compiled."""

    def run(plan, qkv, gradient):
        out, pull = jax.vjp(functools.partial(kernel.run, plan), *qkv)
        return out, pull(gradient.astype(out.dtype))

    return jax.jit(run)


# --- right? ----------------------------------------------------------------------------------------


def _compare(example: Example, short: bool) -> dict[str, bool]:
    """Every candidate against plain attention of the same numbers in float32; whether each is right."""
    exact = example.cast(jnp.float32)
    attempt(functools.partial(_against_float64, exact), what="right?", kernel="plain", dtype="float32")
    expected = both_ways(ours("plain"))(exact.layout, exact.qkv, exact.gradient)
    right = {}
    for name, kernel in candidates().items():
        if short and name in ("plain", "cudnn padded"):
            continue
        measure = functools.partial(_off, kernel, example, expected)
        found = attempt(measure, what="right?", kernel=name, dtype="bfloat16")
        right[name] = bool(found and found["right"])
    if not short:  # no model of the recipe asks for these, and others do
        how: dict[str, Any] = {"window": max(16, example.layout.positions.shape[1] // 8), "softcap": 20.0}
        expected = both_ways(ours("plain", **how))(exact.layout, exact.qkv, exact.gradient)
        measure = functools.partial(_off, ours("flash", **how), example, expected)
        attempt(measure, what="right?", kernel="flash", dtype="bfloat16", **how)
    return right


def _off(kernel: Kernel, example: Example, expected: Any) -> dict[str, Any]:
    """How far out, dq, dk and dv are off: the length of the difference, relative."""
    got = both_ways(kernel)(kernel.plan(example.layout), example.qkv, example.gradient)
    off = []
    for number, (a, b) in enumerate(zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)):
        mask = jnp.asarray(example.filled) if number == 0 else 1  # what stands in padding is nobody's
        off.append(float(jnp.linalg.norm((a.astype(jnp.float32) - b) * mask) / jnp.linalg.norm(b * mask)))
    return {"off": off, "order": "out, dq, dk, dv", "right": max(off) <= _BF16}


def _against_float64(example: Example) -> dict[str, Any]:
    """The reference's first head against NumPy: does it multiply in float32, and in nothing less?"""
    layout = jax.tree.map(lambda x: np.asarray(x)[0], example.layout)
    q, k, v = (np.asarray(x, np.float64)[0, :, 0] for x in example.qkv)
    seen = (layout.segments[:, None] == layout.segments) & (layout.positions[:, None] >= layout.positions)
    seen &= (layout.branches == 0) | (layout.branches == layout.branches[:, None])
    scores = np.where(seen, q @ k.T * q.shape[-1] ** -0.5, -1e30)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    mask = example.filled[0, :, 0]
    want = weights / weights.sum(axis=1, keepdims=True) @ v * mask
    got = np.asarray(forward(ours("plain"))(example.layout, example.qkv), np.float64)[0, :, 0] * mask
    off = float(np.linalg.norm(got - want) / np.linalg.norm(want))
    return {"off": off, "right": off <= _FLOAT32}


# --- fast? -----------------------------------------------------------------------------------------


def _time(example: Example, times: int, short: bool) -> dict[str, dict[str, float]]:
    """Milliseconds of every kernel, on a micro-batch of the recipe."""
    found = {}
    for name, kernel in {**candidates(), **bounds()}.items():
        if not (short and name in ("plain", "cudnn padded")):
            row = attempt(functools.partial(_speed, kernel, example, times), what="fast?", kernel=name)
            found[name] = row or {}
    return found


def _speed(kernel: Kernel, example: Example, times: int) -> dict[str, float]:
    plan = jax.device_put(kernel.plan(example.layout))
    once = forward(kernel)
    seconds = timed(lambda: once(plan, example.qkv), times)
    found = {"forward_ms": 1e3 * seconds, "forward_tflops": example.flops / seconds / 1e12}
    if not kernel.backward:
        return found
    twice = both_ways(kernel)
    seconds = timed(lambda: twice(plan, example.qkv, example.gradient), times)
    # The backward pass multiplies two and a half times as much.
    return {**found, "both_ms": 1e3 * seconds, "both_tflops": 3.5 * example.flops / seconds / 1e12}


def _choose(right: dict[str, bool], times: dict[str, dict[str, float]]) -> None:
    """The kernel to take: the fastest, forward and backward, of those that are right here."""
    both = {name: times[name]["both_ms"] for name in right if right[name] and "both_ms" in times.get(name, {})}
    tell(what="kernel chosen", kernel=min(both, key=both.__getitem__, default=None), both_ms=both)


# --- blocks ----------------------------------------------------------------------------------------


def _tune(example: Example, times: int, others: Sequence[ThreeBlocks]) -> None:
    """How fast our kernels are with other blocks than their own, and for each the best that was tried."""
    own = flash.blocks_for(example.qkv[0].shape[-1], example.qkv[0].dtype)
    found: dict[str, dict[visible_blocks.Blocks, float]] = {name: {} for name in _KERNELS}
    for blocks in (own, *others):
        described = {name: list(size) for name, size in zip(_KERNELS, blocks, strict=True)}
        row = attempt(functools.partial(_speed_with, example, times, blocks), what="blocks", **described)
        for name, size in zip(_KERNELS, blocks, strict=True):
            if row and name in row["ms"]:
                found[name][size] = min(row["ms"][name], found[name].get(size, float("inf")))
    best = {name: list(min(ms, key=ms.__getitem__)) for name, ms in found.items() if ms}
    tell(what="best blocks", order="queries, keys, warps, stages", now=[list(size) for size in own], **best)


def _speed_with(example: Example, times: int, blocks: ThreeBlocks) -> dict[str, Any]:
    """Milliseconds of forward and backward together, and by kernel as a trace has them."""
    run, layout = both_ways(ours("flash")), jax.device_put(example.layout)
    with mock.patch.object(flash, "blocks_for", return_value=blocks):  # asked when the program is traced
        seconds = timed(lambda: run(layout, example.qkv, example.gradient), times)
    top = traced(lambda: run(layout, example.qkv, example.gradient)).get("top", [])
    ms = {name: part for name in _KERNELS for kernel, part, _ in top if name in kernel}
    return {"both_ms": 1e3 * seconds, "ms": ms}
