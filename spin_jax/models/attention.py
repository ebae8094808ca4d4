"""Attention over packed rows, behind one function; a `Layout` says which tokens see each other.

    out = attend(q, k, v, layout, window=None, kernel="plain")

A row holds several groups, each a prompt with the answers that share it: prompt, real, generated. All
operations on single tokens use that layout. In attention an answer sees its prompt and itself, never the
other answer: `plain` computes a mask, `flash` the end of the queries that see each key, and `splash` gets the
row `unshared`, as [prompt + real | prompt + generated | …], for any causal kernel with segment ids.

Where the mesh splits the tokens of a row (`mesh.context`), a device has the queries of its own tokens and gathers
the keys and values of the whole row. Few heads have any, so they are small: at 32k tokens, those of one layer of a
7B Mistral take 128 MiB in bfloat16. Splash also gathers queries and results, because its rows have another order.

Axes: B rows, T queries, S keys, U tokens of an unshared row, N query heads, K key/value heads, G = N / K, H head dim.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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
    rows = [x for x in layout[:3] if x is not None]
    if kernel == "plain" and sharding.context_shards() == 1:
        out = _attend_in_blocks(q, k.swapaxes(1, 2), v.swapaxes(1, 2), layout, window, scale, softcap, sinks)
        return checkpoint_name(out, KEPT)
    if kernel == "plain":

        def own(q, k, v, *others):
            return _attend_own(q, k, v, Layout(*others[: len(rows)]), window, scale, softcap, *others[len(rows) :])

        others = rows if sinks is None else [*rows, sinks]
        return checkpoint_name(sharding.by_rows_and_heads(own, q, k, v, *others), KEPT)
    if sinks is not None:
        raise ValueError(f"the kernel {kernel!r} has no attention sinks, which this model has: plain has them")
    window = window if narrow else None
    options: dict[str, Any] = {"window": window, "scale": scale, "softcap": softcap, "interpret": on_cpu()}
    if kernel == "splash":
        run = functools.partial(_attend_unshared, functools.partial(splash, **options))
        return sharding.by_rows_and_heads(run, q, k, v, layout.positions, layout.unshared)
    from spin_jax.kernels import flash

    def local(q, k, v, *rows):
        first = None if sharding.context_shards() == 1 else sharding.first_token(q.shape[1])
        return flash.attend(q, k, v, Layout(*rows), first=first, **options)

    return sharding.by_rows_and_heads(local, q, k, v, *rows)


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


def _attend_own(q, k, v, layout: Layout, window, scale, softcap, sinks=None) -> Float[Array, "B T N H"]:
    """Runs `plain` on one block of a device's own queries after another, so that few scores exist at a time."""
    B, T = q.shape[:2]
    count = next(n for n in range(-(-T // _BLOCK), T + 1) if T % n == 0)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)

    @jax.checkpoint
    def attend_block(block):
        q, queries = block
        return plain(q, k, v, queries, layout, window, scale, softcap, sinks)

    own = q, jax.tree.map(sharding.own_tokens, layout)
    blocks = jax.tree.map(lambda x: x.reshape(B, count, -1, *x.shape[2:]).swapaxes(0, 1), own)
    return jax.lax.map(attend_block, blocks).swapaxes(0, 1).reshape(q.shape)


def _attend_unshared(kernel, q, k, v, positions, unshared):
    """Runs a kernel on rows of plain sequences, and brings the result back to the shared layout.

    Where C devices share a row, each has the queries of two of its 2 C stretches: the first and the last, the second
    and the last but one, …. So all devices have the same number of scores to compute.
    """
    T, devices = positions.shape[1], sharding.context_shards()
    own = sharding.round_up(-(-unshared.shape[1] // devices), 128)  # queries of a device
    # Small blocks cost nearly as much as large ones, so a long row is padded to a multiple of a large one.
    block = own if own <= 640 else min((512, 640, 384), key=lambda size: -own % size)
    U = devices * sharding.round_up(own, block)
    unshared = jnp.pad(unshared, ((0, 0), (0, U - unshared.shape[1])))
    stretches = np.arange(U, dtype=np.int32).reshape(2 * devices, -1)
    order = np.concatenate([stretches[:devices], stretches[: devices - 1 : -1]], axis=1).reshape(-1)

    real, slots = unshared > 0, jnp.maximum(unshared - 1, 0)
    starts = jnp.take_along_axis(positions, slots, axis=1) == 0
    segments = jnp.where(real, jnp.cumsum(starts, axis=1), 0)
    take = jax.vmap(lambda x, index: x[index])
    ordered = slots, segments
    if devices > 1:  # one device has them in order, and needs no gather
        ordered = slots[:, order], segments[:, order]
    queries = take(sharding.all_tokens(q), sharding.own_tokens(ordered[0]))
    both = sharding.own_tokens(ordered[1]), segments
    out = kernel(queries, take(k, slots), take(v, slots), both, order, block)
    # A prompt's token occurs once for every answer, each time with the same output: the first one is taken.
    first = jax.vmap(lambda t: jnp.full(T, U - 1).at[t].min(jnp.arange(U)))(slots)
    first = first if devices == 1 else jnp.asarray(np.argsort(order))[first]
    return take(sharding.all_tokens(out), sharding.own_tokens(first))


def splash(
    q,
    k,
    v,
    segments,
    order: np.ndarray,
    block: int,
    *,
    window: int | None,
    scale: float,
    softcap: float | None = None,
    interpret: bool = False,
) -> Float[Array, "B U/C N H"]:
    """JAX's splash attention kernel for TPU, with one device's queries [B, U / C, N, H] of a row of U tokens.

    Args:
        segments: int32, of the queries [B, U / C] and of the keys [B, U].
        order: [U], where the queries of all C devices, one device after the other, stand in the row.
        block: the size of the kernel's blocks; it divides U / C.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape = (len(order), len(order))
    mask = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), 0)
    mask.q_sequence = order
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    sizes = kernels.BlockSizes(**dict.fromkeys(names, block))
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * q.shape[2]),
        head_shards=1,
        q_seq_shards=sharding.context_shards(),
        block_sizes=sizes,
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name=KEPT,
        interpret=interpret,
    )
    # What the kernel knows of the mask: numbers of the queries, [U], and of their blocks, [1, blocks, …].
    kernel = jax.tree.map(lambda x: sharding.own_tokens(x, min(x.ndim - 1, 1)), kernel)
    heads_first = (x.swapaxes(1, 2) for x in (q * scale, k, v))
    out: Any = jax.vmap(kernel)(*heads_first, kernels.SegmentIds(*segments))
    return out.swapaxes(1, 2)
