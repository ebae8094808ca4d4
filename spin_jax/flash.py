"""Flash attention over packed rows as they are: Pallas kernels that Triton compiles for CUDA GPUs.

    out = attend(q, k, v, layout, window=None)

In a packed row the queries that see a key are one stretch: from the key itself to the end of its group, if it
belongs to the prompt, else to the end of its own answer. Where that stretch ends is one number a key, and all
that the kernels are told of segments, branches and padding:

    query t sees key s  where  s <= t < until[s]

The numbers also say which blocks of keys any query of a block sees: those of its group's prompt, and those from
the beginning of its answer on. No other is loaded. Scores, weights and their gradients live in a block's
registers; the backward pass computes the weights anew from the log-sum-exp of each query's scores.

Axes: B rows, T tokens, N query heads, K key/value heads, G = N / K, H head dim; I blocks of queries, J blocks
of keys.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pallas_triton
from jaxtyping import Array, Float, Int

from spin_jax.attention import KEPT, Layout, matmul_precision

_LOG2E = math.log2(math.e)  # GPUs have an instruction for 2^x
_UNSEEN = -1e30  # the score of a key that a query does not see, and
_LEAST = -1e29  # what the largest score counts as at least: 2^(unseen − least) is 0, without any key seen too


class Blocks(NamedTuple):
    """How one kernel goes through a row, and what Triton makes of it."""

    queries: int
    keys: int
    warps: int
    stages: int


_BLOCKS = {  # by head dim: forward, dq, dkv
    64: (Blocks(128, 64, 4, 3), Blocks(128, 64, 8, 2), Blocks(64, 64, 4, 2)),
    128: (Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 2), Blocks(64, 64, 4, 2)),
    256: (Blocks(64, 32, 4, 2), Blocks(64, 32, 4, 2), Blocks(32, 32, 4, 2)),
}
_SMALL_BLOCKS = (Blocks(32, 32, 4, 1),) * 3  # of float32, and of larger heads


def blocks_for(H: int, dtype: Any) -> tuple[Blocks, Blocks, Blocks]:
    """What the three kernels take: the forward one, that of dq, and that of dk and dv."""
    fitting = [blocks for size, blocks in _BLOCKS.items() if size >= H]
    return fitting[0] if fitting and jnp.dtype(dtype).itemsize == 2 else _SMALL_BLOCKS


class Plan(NamedTuple):
    """What the kernels know when they are compiled."""

    scale: float
    softcap: float | None
    window: int | None  # None where `until` says it all
    interpret: bool
    forward: Blocks
    dq: Blocks
    dkv: Blocks


class Sight(NamedTuple):
    """Who sees whom, token by token, and block by block for each kernel."""

    until: Int[Array, "B T"]  # of `seen_until`
    positions: Int[Array, "B T"]
    forward: Int[Array, "B I 4"]
    dq: Int[Array, "B I 4"]
    dkv: Int[Array, "B J 2"]


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    layout: Layout,
    *,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Grouped-query attention among the tokens of each row; softmax in float32, zeros for padding.

    Any T and H will do; memory is taken for H rounded up to a power of two. Gradients are the same bits every
    time: each is added up by one program, in one order.

    Args:
        layout: as `batches.packed` lays rows out: the tokens of a group side by side, first the prompt (branch
            0), then answer by answer. Without branches a segment is a sequence, wherever its padding is.
        window: a token sees itself and the window − 1 tokens before it; None: all.
        scale: of the scores; None: H^−½.
        softcap: scores are kept within ± this by tanh; None: they are not.
        interpret: run the kernels operation by operation, on any platform.
    """
    H = q.shape[-1]
    forward, dq, dkv = blocks_for(H, q.dtype)
    until = seen_until(layout, window)
    plan = Plan(
        scale=H**-0.5 if scale is None else scale,
        softcap=softcap,
        window=None if layout.branches is None else window,
        interpret=interpret,
        forward=forward,
        dq=dq,
        dkv=dkv,
    )
    sight = Sight(
        until,
        layout.positions,
        key_stretches(until, forward),
        key_stretches(until, dq),
        query_stretches(until, dkv),
    )
    return _attention(plan, q, k, v, sight)


# --- who sees whom -------------------------------------------------------------------------------


def seen_until(layout: Layout, window: int | None) -> Int[Array, "B T"]:
    """The index after the last query that sees each key; 0 for padding, which none sees.

    With a window, queries before it may be too far from a key of a prompt: that is for positions to say.
    """
    segments, branches = layout.segments, layout.branches
    T = segments.shape[1]
    index = jnp.arange(T, dtype=jnp.int32)

    def end_of_run(*numbers: Array) -> Array:
        """The index after the last of the neighbours that have the same numbers."""
        last = functools.reduce(jnp.logical_or, [x[:, 1:] != x[:, :-1] for x in numbers])
        last = jnp.pad(last, ((0, 0), (0, 1)), constant_values=True)
        return lax.cummin(jnp.where(last, index + 1, T), axis=1, reverse=True)

    group_end = end_of_run(segments)
    part_end = group_end if branches is None else end_of_run(segments, branches)
    until = part_end if window is None else jnp.minimum(part_end, index + window)
    if branches is not None:
        by_answers = branches == 0
        if window is not None:  # the first token of an answer has the position after the prompt
            by_answers &= index + window > part_end
        until = jnp.where(by_answers, group_end, until)
    return jnp.where(segments == 0, 0, until)


def key_stretches(until: Int[Array, "B T"], blocks: Blocks) -> Int[Array, "B I 4"]:
    """The blocks of keys that each block of queries looks at: those of a prompt, and those up to its own end.

    (first block of the prompt's, how many, what to add to get from their count to the others, how many in
    all): the n-th block is n + (first if n < how many else what to add).
    """
    T = until.shape[1]
    queries = pl.cdiv(T, blocks.queries)
    begin, end = (x[:, None] for x in _extents(until, blocks.keys))  # [B, 1, J]
    i, j = jnp.arange(queries, dtype=jnp.int32)[:, None], jnp.arange(end.shape[-1], dtype=jnp.int32)
    seen = (begin < (i + 1) * blocks.queries) & (end > i * blocks.queries)

    def after(chosen: Array) -> Array:  # the last of the chosen
        return jnp.max(jnp.where(chosen, j + 1, 0), axis=-1)

    stop = after(seen)
    near = after(~seen & (j < stop[..., None]))
    first = jnp.minimum(jnp.min(jnp.where(seen, j, end.shape[-1]), axis=-1), near)
    far = jnp.maximum(after(seen & (j < near[..., None])) - first, 0)
    return jnp.stack([first, far, near - far, far + stop - near], axis=-1)


def query_stretches(until: Int[Array, "B T"], blocks: Blocks) -> Int[Array, "B J 2"]:
    """(first, how many) of the blocks of queries that look at each block of keys."""
    begin, end = _extents(until, blocks.keys)
    begin, end = begin // blocks.queries, pl.cdiv(end, blocks.queries)
    return jnp.stack([begin, jnp.maximum(end - begin, 0)], axis=-1)


def _extents(until: Int[Array, "B T"], size: int) -> tuple[Int[Array, "B J"], Int[Array, "B J"]]:
    """(the first query that sees a key of each block, the index after the last); (T or more, 0) without any."""
    B, T = until.shape
    until = jnp.pad(until, ((0, 0), (0, -T % size)))
    first = jnp.where(until > 0, jnp.arange(until.shape[1], dtype=jnp.int32), T)
    return first.reshape(B, -1, size).min(axis=2), until.reshape(B, -1, size).max(axis=2)


# --- inside a kernel -----------------------------------------------------------------------------


class _Span:
    """One block of a row's tokens. Where the row ends before it, zeros are read and nothing is written."""

    def __init__(self, number: Any, size: int, T: int):
        self.at = pl.ds(number * size, size)
        self.index = number * size + jnp.arange(size, dtype=jnp.int32)
        self.there = self.index < T if T % size else None

    def vectors(self, ref: Any, *head: Any) -> Array:
        """Of a reference [T, H], or [T, G, H] and a head."""
        there = None if self.there is None else self.there[:, None]
        return self._load(ref.at[self.at, *head], there)

    def numbers(self, ref: Any, *row: Any) -> Array:
        """Of a reference [T], or [rows, T] and a row."""
        return self._load(ref.at[*row, self.at], self.there)

    def write(self, ref: Any, values: Array) -> None:
        """Of a reference [T] or [T, H]."""
        there = self.there
        mask = there[:, None] if there is not None and values.ndim == 2 else there
        pallas_triton.store(ref.at[self.at], values.astype(ref.dtype), mask=mask)

    def _load(self, ref: Any, mask: Array | None) -> Array:
        return pallas_triton.load(ref, mask=mask, other=None if mask is None else 0)


def _dot(a: Array, b: Array) -> Array:
    return jnp.dot(a, b, precision=matmul_precision(a.dtype), preferred_element_type=jnp.float32)


def _seen(plan: Plan, until_ref: Any, positions_ref: Any, queries: _Span, keys: _Span, queries_axis: int) -> Array:
    """Whether each query sees each key; queries along one axis, keys along the other."""

    def spread(query: Array, key: Array) -> tuple[Array, Array]:
        return jnp.expand_dims(query, 1 - queries_axis), jnp.expand_dims(key, queries_axis)

    index, until = spread(queries.index, keys.numbers(until_ref))
    seen = index < until
    index, key_index = spread(queries.index, keys.index)
    seen &= key_index <= index
    if plan.window is not None:
        here, there = spread(*(x.numbers(positions_ref) for x in (queries, keys)))
        seen &= here - there < plan.window
    return seen


def _logits(plan: Plan, a: Array, b: Array, seen: Array) -> tuple[Array, Array | None]:
    """(base-2 logits of all pairs of rows, the slope that the softcap gives them)."""
    scores, slope = _dot(a, b.T), None
    if plan.softcap is None:
        scores *= plan.scale * _LOG2E
    else:
        bent = jnp.tanh(scores * (plan.scale / plan.softcap))
        scores, slope = bent * (plan.softcap * _LOG2E), 1 - bent * bent
    return jnp.where(seen, scores, _UNSEEN), slope


def _weights(
    plan: Plan, scored: tuple[Array, Array], valued: tuple[Array, Array], seen: Array, lse: Array, delta: Array
) -> tuple[Array, Array]:
    """(softmax weights, gradients of the scores), of (q, k) and (gradients of the output, v) or both reversed."""
    logits, slope = _logits(plan, *scored, seen)
    weights = jnp.exp2(logits - lse)
    a, b = valued
    d_scores = weights * (_dot(a, b.T) - delta)
    return weights, d_scores if slope is None else d_scores * slope


def _over_keys(stretches_ref: Any, step: Callable[[Any, Any], Any], start: Any) -> Any:
    """The blocks of `key_stretches`, one after the other."""
    first, far, shift = stretches_ref[0], stretches_ref[1], stretches_ref[2]

    def body(n: Any, carry: Any) -> Any:
        return step(n + jnp.where(n < far, first, shift), carry)

    return lax.fori_loop(0, stretches_ref[3], body, start)


# --- kernels -------------------------------------------------------------------------------------


def _forward_kernel(q_ref, k_ref, v_ref, until_ref, positions_ref, stretches_ref, out_ref, lse_ref, *, plan: Plan):
    """A block of queries of one head: the output, and log2 of the sum of 2^logits."""
    blocks, (T, H) = plan.forward, q_ref.shape
    queries = _Span(pl.program_id(0), blocks.queries, T)
    q = queries.vectors(q_ref)

    def step(j, carry):
        out, top, total = carry
        keys = _Span(j, blocks.keys, T)
        logits, _ = _logits(plan, q, keys.vectors(k_ref), _seen(plan, until_ref, positions_ref, queries, keys, 0))
        v, higher = keys.vectors(v_ref), jnp.maximum(top, jnp.max(logits, axis=1))
        weights, shrink = jnp.exp2(logits - higher[:, None]), jnp.exp2(top - higher)
        out = out * shrink[:, None] + _dot(weights.astype(v.dtype), v)
        return out, higher, total * shrink + jnp.sum(weights, axis=1)

    start = jnp.zeros((blocks.queries, H)), jnp.full(blocks.queries, _LEAST), jnp.zeros(blocks.queries)
    out, top, total = _over_keys(stretches_ref, step, start)
    total = jnp.where(total > 0, total, 1)  # of padding, which sees nothing
    queries.write(out_ref, out / total[:, None])
    queries.write(lse_ref, top + jnp.log2(total))


def _dq_kernel(
    q_ref, k_ref, v_ref, until_ref, positions_ref, stretches_ref, out_ref, d_out_ref, lse_ref, dq_ref, delta_ref, *, plan: Plan
):
    """A block of queries of one head: their gradients, and output · its gradient for the other kernel."""
    blocks, (T, H) = plan.dq, q_ref.shape
    queries = _Span(pl.program_id(0), blocks.queries, T)
    q, d_out, lse = queries.vectors(q_ref), queries.vectors(d_out_ref), queries.numbers(lse_ref)
    out = queries.vectors(out_ref).astype(jnp.float32)
    delta = jnp.sum(out * d_out.astype(jnp.float32), axis=1)

    def step(j, dq):
        keys = _Span(j, blocks.keys, T)
        k, v = keys.vectors(k_ref), keys.vectors(v_ref)
        seen = _seen(plan, until_ref, positions_ref, queries, keys, 0)
        _, d_scores = _weights(plan, (q, k), (d_out, v), seen, lse[:, None], delta[:, None])
        return dq + _dot(d_scores.astype(k.dtype), k)

    dq = _over_keys(stretches_ref, step, jnp.zeros((blocks.queries, H)))
    queries.write(dq_ref, dq * plan.scale)
    queries.write(delta_ref, delta)


def _dkv_kernel(
    q_ref, k_ref, v_ref, until_ref, positions_ref, stretches_ref, d_out_ref, lse_ref, delta_ref, dk_ref, dv_ref, *, plan: Plan
):
    """A block of keys of one head: gradients of keys and values, over all query heads that look at them.

    Scores are computed keys by queries, as the sums want them: no block is transposed on the way.
    """
    blocks, (T, G, H) = plan.dkv, q_ref.shape
    keys = _Span(pl.program_id(0), blocks.keys, T)
    k, v = keys.vectors(k_ref), keys.vectors(v_ref)
    first, count = stretches_ref[0], stretches_ref[1]

    def step(n, carry):
        dk, dv = carry
        head, i = lax.div(n, count), first + lax.rem(n, count)
        queries = _Span(i, blocks.queries, T)
        q, d_out = queries.vectors(q_ref, head), queries.vectors(d_out_ref, head)
        lse, delta = queries.numbers(lse_ref, head), queries.numbers(delta_ref, head)
        seen = _seen(plan, until_ref, positions_ref, queries, keys, 1)
        weights, d_scores = _weights(plan, (k, q), (v, d_out), seen, lse[None], delta[None])
        dv += _dot(weights.astype(d_out.dtype), d_out)
        return dk + _dot(d_scores.astype(q.dtype), q), dv

    start = jnp.zeros((blocks.keys, H)), jnp.zeros((blocks.keys, H))
    dk, dv = lax.fori_loop(0, G * count, step, start)
    keys.write(dk_ref, dk * plan.scale)
    keys.write(dv_ref, dv)


# --- calls of kernels ----------------------------------------------------------------------------


def _call(kernel: Callable, plan: Plan, blocks: Blocks, grid: tuple[int, ...], inputs, in_specs, outputs, out_specs):
    name = kernel.__name__.strip("_").removesuffix("_kernel")
    call = pl.pallas_call(
        functools.partial(kernel, plan=plan),
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=outputs,
        compiler_params=pallas_triton.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=plan.interpret,
        name=f"flash_{name}",
    )
    return jax.jit(call)(*inputs)  # JAX leaves out a jitted call that nobody needs, but no kernel by itself


class _Specs:
    """What of each array a program (block, head, row) is handed: a row of its own head, whole."""

    def __init__(self, T: int, G: int, H: int):
        self.query = pl.BlockSpec((None, T, None, H), lambda i, n, b: (b, 0, n, 0))
        self.key = pl.BlockSpec((None, T, None, H), lambda i, n, b: (b, 0, n // G, 0))
        self.token = pl.BlockSpec((None, T), lambda i, n, b: (b, 0))
        self.number = pl.BlockSpec((None, None, T), lambda i, n, b: (b, n, 0))
        # Of all query heads that share a key's:
        self.queries = pl.BlockSpec((None, T, G, H), lambda j, n, b: (b, 0, n, 0))
        self.numbers = pl.BlockSpec((None, G, T), lambda j, n, b: (b, n, 0))

    @staticmethod
    def stretches(numbers: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, numbers), lambda i, n, b: (b, i, 0))


def _sizes(q: Array, k: Array) -> tuple[int, int, int, int, int]:
    """(B, T, N, G, the power of two that H is filled up to): Triton has no other sizes."""
    B, T, N, H = q.shape
    return B, T, N, N // k.shape[2], max(16, 1 << (H - 1).bit_length())


def _widened(x: Array, H: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, H - x.shape[-1])))


def _forward(plan: Plan, q: Array, k: Array, v: Array, sight: Sight) -> tuple[Array, Array]:
    """(the output, log2 Σ 2^logits [B, N, T])."""
    B, T, N, G, H = _sizes(q, k)
    specs = _Specs(T, G, H)
    out, lse = _call(
        _forward_kernel,
        plan,
        plan.forward,
        (pl.cdiv(T, plan.forward.queries), N, B),
        [*(_widened(x, H) for x in (q, k, v)), sight.until, sight.positions, sight.forward],
        [specs.query, specs.key, specs.key, specs.token, specs.token, specs.stretches(4)],
        [jax.ShapeDtypeStruct((B, T, N, H), q.dtype), jax.ShapeDtypeStruct((B, N, T), jnp.float32)],
        [specs.query, specs.number],
    )
    return checkpoint_name(out[..., : q.shape[-1]], KEPT), checkpoint_name(lse, KEPT)


def _backward(plan: Plan, kept: Any, d_out: Array) -> tuple[Array, Array, Array, None]:
    """Gradients of q, k and v."""
    q, k, v, sight, out, lse = kept
    B, T, N, G, H = _sizes(q, k)
    specs = _Specs(T, G, H)
    width = q.shape[-1]
    wide_q, wide_k, wide_v, out, d_out = (_widened(x, H) for x in (q, k, v, out, d_out))
    dq, delta = _call(
        _dq_kernel,
        plan,
        plan.dq,
        (pl.cdiv(T, plan.dq.queries), N, B),
        [wide_q, wide_k, wide_v, sight.until, sight.positions, sight.dq, out, d_out, lse],
        [specs.query, specs.key, specs.key, specs.token, specs.token, specs.stretches(4), specs.query, specs.query, specs.number],
        [jax.ShapeDtypeStruct(wide_q.shape, q.dtype), jax.ShapeDtypeStruct(lse.shape, jnp.float32)],
        [specs.query, specs.number],
    )
    own = pl.BlockSpec((None, T, None, H), lambda j, n, b: (b, 0, n, 0))
    dk, dv = _call(
        _dkv_kernel,
        plan,
        plan.dkv,
        (pl.cdiv(T, plan.dkv.keys), N // G, B),
        [wide_q, wide_k, wide_v, sight.until, sight.positions, sight.dkv, d_out, lse, delta],
        [specs.queries, own, own, specs.token, specs.token, specs.stretches(2), specs.queries, specs.numbers, specs.numbers],
        [jax.ShapeDtypeStruct(wide_k.shape, k.dtype), jax.ShapeDtypeStruct(wide_v.shape, v.dtype)],
        [own, own],
    )
    return dq[..., :width], dk[..., :width], dv[..., :width], None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plan: Plan, q: Array, k: Array, v: Array, sight: Sight) -> Array:
    return _forward(plan, q, k, v, sight)[0]


def _attention_forward(plan: Plan, q: Array, k: Array, v: Array, sight: Sight) -> tuple[Array, Any]:
    out, lse = _forward(plan, q, k, v, sight)
    return out, (q, k, v, sight, out, lse)


_attention.defvjp(_attention_forward, _backward)
