"""Attention of one new token of each slot over a ring cache; only filled columns are read.

    out = attend(q, k, v, column, lengths)

This is a Pallas kernel (Triton) for GPUs. One program takes a slot, a key/value head with its query heads,
and a share of the slot's columns. Where there are several shares, their log-sums are the weights of a sum.

Axes: B slots, N query heads, K key/value heads, G = N / K, S columns of the ring, H head dim.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

BLOCK = 64  # columns at a time; fewer for heads wider than 128, so that shared memory suffices
WARPS, STAGES = 4, 2
PROGRAMS = 512  # columns are split where slots × heads are fewer: about four for each processor
_NONE = -1e30  # the log-sum of no columns; it is finite, so that differences are numbers


def attend(
    q: Float[Array, "B N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    column: Int[Array, ""],
    lengths: Int[Array, " B"],
    *,
    scale: float | None = None,
    softcap: float | None = None,
    interpret: bool = False,
) -> Float[Array, "B N H"]:
    """Grouped-query attention of one token for each slot; softmax in float32.

    Args:
        column: the column of the newest tokens, the same for all slots.
        lengths: how many columns each slot sees, from the newest back around the ring: at most S. A slot
            that sees none gets zeros.
        scale: multiplies the scores; None: H^−½.
        softcap: tanh keeps scores within ± this number; None: no limit.
        interpret: runs plain operations, for machines without a GPU.
    """
    B, N, H = q.shape
    K, S = k.shape[1:3]
    G = N // K
    block = min(BLOCK, max(16, BLOCK * 128 // pl.next_power_of_2(H)))
    share = pl.cdiv(pl.cdiv(S, block), max(1, PROGRAMS // (B * K))) * block
    shares = pl.cdiv(S, share)
    scale = H**-0.5 if scale is None else scale
    kernel = functools.partial(_kernel, share=share, block=block, scale=scale, softcap=softcap)
    ring = pl.BlockSpec((None, None, S, H), lambda b, h, s: (b, h, 0, 0))
    part = jnp.float32 if shares > 1 else q.dtype
    out, log_sums = pl.pallas_call(
        kernel,
        grid=(B, K, shares),
        in_specs=[
            pl.BlockSpec((None, None, G, H), lambda b, h, s: (b, h, 0, 0)),
            ring,
            ring,
            pl.BlockSpec((1,), lambda b, h, s: (0,)),
            pl.BlockSpec((1,), lambda b, h, s: (b,)),
        ],
        out_specs=[
            pl.BlockSpec((None, None, None, G, H), lambda b, h, s: (b, h, s, 0, 0)),
            pl.BlockSpec((None, None, None, G), lambda b, h, s: (b, h, s, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((B, K, shares, G, H), part),
            jax.ShapeDtypeStruct((B, K, shares, G), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        interpret=interpret,
        name="flash_decode",
    )(q.reshape(B, K, G, H), k, v, column.reshape(1), lengths)
    if shares > 1:
        weights = jnp.exp2(log_sums - jnp.max(log_sums, axis=2, keepdims=True))
        weights /= jnp.sum(weights, axis=2, keepdims=True)
        out = jnp.sum(weights[..., None] * out, axis=2)
    return out.reshape(B, N, H).astype(q.dtype)


def _kernel(q_ref, k_ref, v_ref, column_ref, length_ref, out_ref, log_sum_ref, *, share, block, scale, softcap):
    (G, H), S = q_ref.shape, k_ref.shape[0]
    # Triton's arrays have powers of two as sizes, and its products need at least 16 rows.
    rows, dims = jnp.arange(max(16, pl.next_power_of_2(G))), jnp.arange(max(16, pl.next_power_of_2(H)))
    real = (dims < H)[None, :]
    heads, of_heads = (rows[:, None], dims[None, :]), (rows < G)[:, None] & real
    q = plgpu.load(q_ref.at[heads], mask=of_heads, other=0.0)
    column = column_ref[0]
    first = pl.program_id(2) * share
    end = jnp.minimum(length_ref[0], first + share)

    def add_block(n, carry):
        out, largest, total = carry
        age = first + n * block + jnp.arange(block)  # how many columns before the newest
        filled = age < end
        cells = jnp.where(filled, lax.rem(column - age + S, S), 0)[:, None], dims[None, :]
        k, v = (plgpu.load(ref.at[cells], mask=filled[:, None] & real, other=0.0) for ref in (k_ref, v_ref))
        scores = plgpu.dot(q, k.T) * scale
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        scores = jnp.where(filled[None, :], scores * math.log2(math.e), _NONE)
        new = jnp.maximum(largest, jnp.max(scores, axis=1))
        weights, kept = jnp.exp2(scores - new[:, None]), jnp.exp2(largest - new)
        out = out * kept[:, None] + plgpu.dot(weights.astype(v.dtype), v)
        return out, new, total * kept + jnp.sum(weights, axis=1)

    start = jnp.zeros((rows.size, dims.size), jnp.float32), jnp.full(rows.size, _NONE), jnp.zeros(rows.size)
    blocks = lax.div(jnp.maximum(end - first, 0) + block - 1, block)
    out, largest, total = lax.fori_loop(0, blocks, add_block, start)
    total = jnp.where(total > 0, total, 1.0)
    out = (out / total[:, None]).astype(out_ref.dtype)
    plgpu.store(out_ref.at[heads], out, mask=of_heads)
    plgpu.store(log_sum_ref.at[rows], largest + jnp.log2(total), mask=rows < G)
