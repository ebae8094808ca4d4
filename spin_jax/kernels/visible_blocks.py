"""Which blocks of keys and queries see each other: a kernel visits only those."""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Int

from spin_jax.kernels.layout import Layout


class Blocks(NamedTuple):
    """The block sizes of a kernel's programs, and how Triton compiles them."""

    queries: int
    keys: int
    warps: int
    stages: int


# --- who sees whom -------------------------------------------------------------------------------


def seen_until(layout: Layout, window: int | None) -> Int[Array, "B T"]:
    """The index after the last query that sees each key; 0 for padding, which none sees.

    With a window, an answer's token before it may be too far from a key of the prompt: positions say that.
    """
    segments, branches = layout.segments, layout.branches
    T = segments.shape[1]
    index = jnp.arange(T, dtype=jnp.int32)

    group_end = _end_of_run(segments)
    part_end = group_end if branches is None else _end_of_run(segments, branches)
    until = part_end if window is None else jnp.minimum(part_end, index + window)
    if branches is not None:
        by_answers = branches == 0
        if window is not None:
            # An answer's first token is the nearest one: its position follows the prompt's last.
            by_answers &= index + window > part_end
        until = jnp.where(by_answers, group_end, until)
    return jnp.where(segments == 0, 0, until)


def key_stretches(
    until: Int[Array, "B T"], segments: Int[Array, "B T"], blocks: Blocks, own: tuple[Any, Any] | None = None
) -> tuple[Int[Array, "B T"], Int[Array, "B I 4"]]:
    """(the index after each key's block, the blocks of keys that each block of queries visits).

    Groups are cut into blocks from their beginning on, so that one block begins where the last one ends.
    Queries visit those of a prompt, and those up to their own end, as (first, far, near, count): of count
    blocks the first `far` begin at key `first`, the rest at key `near`. With `own`, only blocks that have a
    query from own[0] to own[1] visit any.
    """
    end, begins, reach = _group_blocks(until, segments, blocks.keys)
    i = jnp.arange(pl.cdiv(until.shape[1], blocks.queries), dtype=jnp.int32)[:, None] * blocks.queries
    key = jnp.arange(until.shape[1], dtype=jnp.int32)
    begins = begins[:, None]
    seen = begins & (key < i + blocks.queries) & (reach[:, None] > i)  # [B, I, T], of keys that begin a block

    def last(chosen: Array) -> Array:
        return jnp.max(jnp.where(chosen, key, -1), axis=-1, keepdims=True)

    def first(chosen: Array) -> Array:
        return jnp.min(jnp.where(chosen, key, key.size), axis=-1, keepdims=True)

    gap = last(begins & ~seen & (key < last(seen)))  # the last that is not visited before the last that is
    start = first(seen)
    far = jnp.sum(begins & (key >= start) & (key <= last(seen & (key < gap))), axis=-1, keepdims=True)
    near = jnp.sum(seen & (key > gap), axis=-1, keepdims=True)
    if own is not None:
        far, near = (jnp.where((i < own[1]) & (i + blocks.queries > own[0]), n, 0) for n in (far, near))
    stretches = jnp.concatenate([start, far, first(seen & (key > gap)), far + near], axis=-1)
    return end, stretches.astype(jnp.int32)


def _group_blocks(
    until: Int[Array, "B T"], segments: Int[Array, "B T"], size: int
) -> tuple[Int[Array, "B T"], Bool[Array, "B T"], Int[Array, "B T"]]:
    """(the index after each key's block, whether a key begins one, the index after its last query).

    The last holds for keys that begin a block, and is the block's: no later query sees any of its keys.
    """
    index = jnp.arange(segments.shape[1], dtype=jnp.int32)
    changes = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    group = lax.cummax(jnp.where(changes, index, 0), axis=1)  # where each token's group begins
    group_end = _end_of_run(segments)
    end = jnp.minimum(index - (index - group) % size + size, group_end)
    # A block that its group's end cuts short reaches that end, for the last token of a group sees itself.
    reach = lax.reduce_window(until, jnp.int32(0), lax.max, (1, size), (1, 1), ((0, 0), (0, size - 1)))
    return end, (segments != 0) & ((index - group) % size == 0), jnp.minimum(reach, group_end)


def _end_of_run(*numbers: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """The index after the last of the neighbouring tokens that have the same numbers."""
    T = numbers[0].shape[1]
    last = functools.reduce(jnp.logical_or, [x[:, 1:] != x[:, :-1] for x in numbers])
    last = jnp.pad(last, ((0, 0), (0, 1)), constant_values=True)
    return lax.cummin(jnp.where(last, jnp.arange(1, T + 1, dtype=jnp.int32), T), axis=1, reverse=True)


def query_stretches(
    until: Int[Array, "B T"], blocks: Blocks, own: tuple[Any, Any] | None = None
) -> Int[Array, "B J 2"]:
    """(first, count) of the blocks of queries that look at each block of keys; `own` as for `key_stretches`."""
    begin, end = _extents(until, blocks.keys)
    if own is not None:
        begin, end = jnp.maximum(begin, own[0]), jnp.minimum(end, own[1])
    begin, end = begin // blocks.queries, pl.cdiv(end, blocks.queries)
    return jnp.stack([begin, jnp.maximum(end - begin, 0)], axis=-1)


def _extents(until: Int[Array, "B T"], size: int) -> tuple[Int[Array, "B J"], Int[Array, "B J"]]:
    """(the first query that sees a key of each block, the index after the last); (T, 0): none does."""
    B, T = until.shape
    until = jnp.pad(until, ((0, 0), (0, -T % size)))
    first = jnp.where(until > 0, jnp.arange(until.shape[1], dtype=jnp.int32), T)
    return first.reshape(B, -1, size).min(axis=2), until.reshape(B, -1, size).max(axis=2)
