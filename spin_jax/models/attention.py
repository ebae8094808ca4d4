"""Attention over packed rows, behind one function; a `Layout` says which tokens see each other.

    out = attend(q, k, v, layout, window=None, kernel="plain")

A row holds several groups, each a prompt with the answers that share it: prompt, real, generated. All
operations on single tokens use that layout. In attention an answer sees its prompt and itself, never the
other answer: `plain` computes a mask, `flash` the end of the queries that see each key, and `splash` gets the
row `unshared`, as [prompt + real | prompt + generated | …], for any causal kernel with segment ids.

Axes: B rows, T queries, S keys, U tokens of an unshared row, N query heads, K key/value heads, G = N / K, H head dim.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from spin_jax.kernels.layout import KEPT, Layout, matmul_precision, on_cpu
from spin_jax.runtime import sharding

_BLOCK = 96  # queries in a block of `plain`; a long row has larger blocks,
_MOST_BLOCKS = 8  # because each block is compiled separately


def kernel_for(platform: str, dtype: Any, sinks: bool = False) -> str:
    """The kernel for a platform. Float32 takes plain: splash is less precise, and flash is slow. So do sinks."""
    kernels = {"tpu": "splash", "gpu": "flash", "cuda": "flash"}
    return "plain" if dtype == jnp.float32 or sinks else kernels.get(platform, "plain")


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    layout: Layout,
    *,
    window: int | None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    kernel: str = "plain",
) -> Float[Array, "B T N H"]:
    """Grouped-query attention among the tokens of each row; softmax in float32.

    Args:
        layout: no token sees one that stands after it in the row.
        window: a token sees itself and the window − 1 tokens before it; None: all tokens before it.
        scale: multiplies the scores; None: H^−½.
        softcap: tanh keeps scores within ± this number; None: no limit.
        sinks: one more score for each head's softmax, of no key (arXiv 2309.17453); only plain has them.
        kernel: "plain", "splash" (TPU; `layout.unshared` has a multiple of 128 tokens) or "flash" (CUDA). The
            last two do not support segments below zero, and are interpreted on CPU.
    """
    narrow = window is not None and window < layout.positions.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if kernel == "plain":
        out = _attend_in_blocks(q, k.swapaxes(1, 2), v.swapaxes(1, 2), layout, window, scale, softcap, sinks)
        return checkpoint_name(out, KEPT)
    if sinks is not None:
        raise ValueError(f"the kernel {kernel!r} has no attention sinks, which this model has: plain has them")
    window = window if narrow else None
    options: dict[str, Any] = {"window": window, "scale": scale, "softcap": softcap, "interpret": on_cpu()}
    if kernel == "splash":
        run = functools.partial(_attend_unshared, functools.partial(splash, **options))
        return sharding.by_rows_and_heads(run, q, k, v, layout.positions, layout.unshared)
    from spin_jax.kernels import flash

    def local(q, k, v, *rows):
        return flash.attend(q, k, v, Layout(*rows), **options)

    return sharding.by_rows_and_heads(local, q, k, v, *(x for x in layout[:3] if x is not None))


def visible(queries: Layout, keys: Layout, window: int | None) -> Bool[Array, "B T S"]:
    """Which keys each query sees."""
    behind = queries.positions[:, :, None] - keys.positions[:, None, :]
    seen = (jnp.abs(queries.segments)[:, :, None] == keys.segments[:, None, :]) & (behind >= 0)
    if queries.branches is not None and keys.branches is not None:
        branch = keys.branches[:, None, :]
        seen &= (branch == 0) | (branch == queries.branches[:, :, None])
    return seen if window is None else seen & (behind < window)


def plain(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    queries: Layout,
    keys: Layout,
    window: int | None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
) -> Float[Array, "B T N H"]:
    """Computes every score under a mask: the kernels' reference. It also reads caches: heads come first."""
    seen = visible(queries, keys, window)
    precision = matmul_precision(q.dtype)
    q = sharding.grouped(q, k.shape[1])
    scores = jnp.einsum("BTKGH,BKSH->BKGTS", q, k, precision=precision, preferred_element_type=jnp.float32)
    scores *= q.shape[-1] ** -0.5 if scale is None else scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(seen[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1)
    if sinks is not None:  # the weight of all keys together
        sinks = sharding.grouped(sinks.astype(jnp.float32)[:, None], k.shape[1])[..., None]
        weights *= jax.nn.sigmoid(jax.nn.logsumexp(scores, axis=-1, keepdims=True) - sinks)
    out = jnp.einsum("BKGTS,BKSH->BKGTH", weights.astype(v.dtype), v, precision=precision)
    return sharding.merged_heads(jnp.moveaxis(out, 3, 1))


def _attend_in_blocks(q, k, v, layout: Layout, window, scale, softcap, sinks) -> Float[Array, "B T N H"]:
    """Runs `plain` on one block of queries at a time, without later keys: half the scores, in small parts."""
    T = q.shape[1]
    block = max(_BLOCK, -(-T // _MOST_BLOCKS))

    def layout_part(end: int, start: int = 0) -> Layout:
        return Layout(*(None if x is None else x[:, start:end] for x in layout[:3]))

    parts = []
    for start in range(0, T, block):
        end = start + block
        earlier, layouts = (k[:, :, :end], v[:, :, :end]), (layout_part(end, start), layout_part(end))
        parts.append(plain(q[:, start:end], *earlier, *layouts, window, scale, softcap, sinks))
    return jnp.concatenate(parts, axis=1)


def _attend_unshared(kernel, q, k, v, positions, unshared):
    """Runs a kernel on rows of plain sequences, and brings the result back to the shared layout."""
    T, U = positions.shape[1], unshared.shape[1]
    real, slots = unshared > 0, jnp.maximum(unshared - 1, 0)
    starts = jnp.take_along_axis(positions, slots, axis=1) == 0
    segments = jnp.where(real, jnp.cumsum(starts, axis=1), 0)
    take = jax.vmap(lambda x, index: x[index])
    out = kernel(*(take(x, slots) for x in (q, k, v)), segments)
    # A prompt's token occurs once for every answer, each time with the same output: the first one is taken.
    first = jax.vmap(lambda t: jnp.full(T, U - 1).at[t].min(jnp.arange(U)))(slots)
    return take(out, first)


def splash(
    q, k, v, segments, *, window: int | None, scale: float, softcap: float | None = None, interpret: bool = False
) -> Float[Array, "B U N H"]:
    """JAX's splash attention kernel for TPU."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    U, N = q.shape[1:3]
    # Small blocks cost nearly as much as large ones, so a long row is padded to a multiple of a large one.
    block = U if U <= 640 else min((512, 640, 384), key=lambda size: -U % size)
    fill = -U % block
    q, k, v = (jnp.pad(x, ((0, 0), (0, fill), (0, 0), (0, 0))) for x in (q * scale, k, v))
    segments = jnp.pad(segments, ((0, 0), (0, fill)))
    shape = (U + fill, U + fill)
    mask = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), 0)
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    sizes = kernels.BlockSizes(**dict.fromkeys(names, block))
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * N),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=sizes,
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name=KEPT,
        interpret=interpret,
    )
    heads_first = (x.swapaxes(1, 2) for x in (q, k, v))
    out: Any = jax.vmap(kernel)(*heads_first, kernels.SegmentIds(segments, segments))
    return out.swapaxes(1, 2)[:, :U]
