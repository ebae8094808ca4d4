"""Flash attention over packed rows as they are: Pallas kernels that Triton compiles for CUDA GPUs.

    out = attend(q, k, v, layout, window=None)

In a packed row the queries that see a key are one stretch: from the key itself to the end of its group, if it
belongs to the prompt, else to the end of its own answer. One number for each key says where the stretch ends.
The kernels need no other input about segments, branches and padding:

    query t sees key s  where  s <= t < until[s]

This also gives the blocks of keys that a block of queries sees: those of its group's prompt, and those from
the beginning of its answer on. No other block is loaded. Scores and weights never leave a program's
registers; the backward pass computes them anew, from the log-sum-exp that the forward pass kept.

A query's blocks of keys begin where its group begins, not where the row begins, so that the same sums are
added in the same order wherever the group stands in a row. In bfloat16 an answer's log-prob would otherwise
depend on the other groups: another order changes the last bit of float32, then sometimes a rounding to
bfloat16, and some layers later the log-prob by up to a nat.

jax 0.11 runs these kernels, and warns that Pallas will lose Triton in a later version.

Axes: B rows, T tokens, N query heads, K key/value heads, G = N / K, H head dim; I blocks of queries, J blocks
of keys.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pallas_triton
from jaxtyping import Array, Float, Int

from spin_jax.kernels.layout import KEPT, Layout, matmul_precision
from spin_jax.kernels.visible_blocks import Blocks, key_stretches, query_stretches, seen_until

_LOG2E = math.log2(math.e)  # GPUs have an instruction for 2^x
_UNSEEN = -1e30  # the score of a key that a query does not see
_LEAST = -1e29  # the smallest maximum of a query's scores: 2^(unseen − least) is 0 also where it sees no key

# For each head dim, the blocks of the kernels for the forward pass, dq, and dk with dv: the largest tried
# that XLA compiles to an H200's matrix instructions with few registers spilled. None was timed on a GPU.
_BLOCKS = {
    64: (Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 2), Blocks(64, 128, 8, 2)),
    128: (Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 2), Blocks(64, 128, 8, 2)),
    256: (Blocks(128, 64, 8, 2), Blocks(128, 32, 8, 2), Blocks(32, 64, 8, 2)),
}
_SMALL = Blocks(16, 16, 4, 1)  # larger heads, and float32, which no matrix instruction multiplies exactly


def blocks_for(H: int, dtype: Any) -> tuple[Blocks, Blocks, Blocks]:
    """The blocks of the three kernels."""
    fitting = [blocks for size, blocks in _BLOCKS.items() if size >= H]
    return fitting[0] if fitting and jnp.dtype(dtype).itemsize == 2 else (_SMALL, _SMALL, _SMALL)


class Plan(NamedTuple):
    """The constants of a call, with which its kernels are compiled."""

    scale: float
    softcap: float | None
    window: int | None  # None where `until` contains it
    interpret: bool
    blocks: tuple[Blocks, Blocks, Blocks]


class Sight(NamedTuple):
    """Which keys each query sees: numbers for each token, and for the blocks of each kernel."""

    until: Int[Array, "B T"]  # from `seen_until`
    positions: Int[Array, "B T"]
    forward: tuple[Array, Array]  # from `key_stretches`
    dq: tuple[Array, Array]
    dkv: Int[Array, "B J 2"]  # from `query_stretches`


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    layout: Layout,
    *,
    first: Array | int | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Grouped-query attention among the tokens of each row; softmax in float32, zeros for padding.

    T and H may have any size; heads are padded to a power of two. Gradients are the same bits in every run:
    one program sums each of them, in a fixed order.

    Args:
        layout: as `batches.packed` lays rows out: the tokens of a group side by side, first the prompt
            (branch 0), then answer by answer. Without branches a segment is one sequence.
        first: `q` has only the queries of the tokens from this one on; None: of all tokens.
        window: a token sees itself and the window − 1 tokens before it; None: all tokens before it.
        scale: multiplies the scores; None: H^−½.
        softcap: tanh keeps scores within ± this number; None: no limit.
        interpret: runs the kernels operation by operation, on any platform.
    """
    blocks = forward, dq, dkv = blocks_for(q.shape[-1], q.dtype)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    plan = Plan(factor, softcap, None if layout.branches is None else window, interpret, blocks)
    until = seen_until(layout, window)
    own = None if first is None else (first, first + q.shape[1])
    sight = Sight(
        until,
        layout.positions,
        forward=key_stretches(until, layout.segments, forward, own),
        dq=key_stretches(until, layout.segments, dq, own),
        dkv=query_stretches(until, dkv, own),
    )
    if first is None:
        return _attention(plan, q, k, v, sight)
    # The kernels index queries and keys alike. Other queries are zeros, and their blocks visit no keys.
    places = jnp.zeros((q.shape[0], k.shape[1], *q.shape[2:]), q.dtype)
    places = lax.dynamic_update_slice_in_dim(places, q, first, axis=1)
    return lax.dynamic_slice_in_dim(_attention(plan, places, k, v, sight), first, q.shape[1], axis=1)


# --- inside a kernel -----------------------------------------------------------------------------


class _Span:
    """`size` tokens of a row, from `start` on. Beyond `end`, reads give zeros and writes are dropped."""

    def __init__(self, start: Any, size: int, end: Any, full: bool = False):
        self.slice = pl.ds(start, size)
        self.index = start + jnp.arange(size, dtype=jnp.int32)
        self.valid = None if full else self.index < end

    @classmethod
    def of_row(cls, number: Any, size: int, T: int) -> "_Span":
        """The block with this number, counted from the row's beginning."""
        return cls(number * size, size, T, full=T % size == 0)

    def vectors(self, ref: Any, *head: Any) -> Array:
        """Reads vectors from a reference [T, H], or from one head of [T, G, H]."""
        return self._load(ref.at[self.slice, *head], None if self.valid is None else self.valid[:, None])

    def numbers(self, ref: Any, *head: Any) -> Array:
        """Reads numbers from a reference [T], or from one head of [G, T]."""
        return self._load(ref.at[*head, self.slice], self.valid)

    def write(self, ref: Any, values: Array) -> None:
        """Writes to a reference [T] or [T, H]."""
        mask = self.valid if self.valid is None or values.ndim == 1 else self.valid[:, None]
        pallas_triton.store(ref.at[self.slice], values.astype(ref.dtype), mask=mask)

    def _load(self, ref: Any, mask: Array | None) -> Array:
        return pallas_triton.load(ref, mask=mask, other=None if mask is None else 0)


def _dot(a: Array, b: Array) -> Array:
    return jnp.dot(a, b, precision=matmul_precision(a.dtype), preferred_element_type=jnp.float32)


def _visible(plan: Plan, sight: Sequence[Any], queries: _Span, keys: _Span, axis: int) -> Array:
    """Whether each query sees each key; queries lie along `axis`, keys along the other one."""

    def crossed(query: Array, key: Array) -> tuple[Array, Array]:
        return jnp.expand_dims(query, 1 - axis), jnp.expand_dims(key, axis)

    query, key = crossed(queries.index, keys.index)
    _, until = crossed(queries.index, keys.numbers(sight[0]))
    seen = (key <= query) & (query < until)
    if plan.window is not None:
        query, key = crossed(queries.numbers(sight[1]), keys.numbers(sight[1]))
        seen &= query - key < plan.window
    return seen


def _logits(plan: Plan, a: Array, b: Array, seen: Array) -> tuple[Array, Array | None]:
    """(base-2 logits of all pairs of rows, the derivative of the softcap)."""
    scores, slope = _dot(a, b.T), None
    if plan.softcap is None:
        scores *= plan.scale * _LOG2E
    else:
        bent = jnp.tanh(scores * (plan.scale / plan.softcap))
        scores, slope = bent * (plan.softcap * _LOG2E), 1 - bent * bent
    return jnp.where(seen, scores, _UNSEEN), slope


def _weights(plan: Plan, scored: Any, valued: Any, seen: Array, lse: Array, delta: Array) -> Any:
    """(softmax weights, gradients of scores) from (q, k) and (d_out, v), or from (k, q) and (v, d_out)."""
    (a, b), (c, d) = scored, valued
    logits, slope = _logits(plan, a, b, seen)
    weights = jnp.exp2(logits - lse)
    d_scores = weights * (_dot(c, d.T) - delta)
    return weights, d_scores if slope is None else d_scores * slope


def _visit_keys(sight: Sequence[Any], size: int, step: Callable[[_Span, Any], Any], start: Any) -> Any:
    """Runs `step` on the blocks of `key_stretches`, one after the other."""
    end, (first, far, near, count) = sight[2], (sight[3][n] for n in range(4))

    def visit(n: Any, state: tuple[Any, Any]) -> tuple[Any, Any]:
        key, carry = state
        key = jnp.where(n == far, near, key)
        return end[key], step(_Span(key, size, end[key]), carry)

    return lax.fori_loop(0, count, visit, (first, start))[1]


# --- kernels -------------------------------------------------------------------------------------
# All arguments but the plan are references; `sight` holds until, positions, and the blocks to visit.


def _forward_kernel(plan, q_ref, k_ref, v_ref, sight, out_ref, lse_ref):
    """Computes, for a block of queries of one head, the output and log2 of the sum of 2^logits."""
    blocks, (T, H) = plan.blocks[0], q_ref.shape
    queries = _Span.of_row(pl.program_id(0), blocks.queries, T)
    q = queries.vectors(q_ref)

    def step(keys, carry):
        out, top, total = carry
        logits, _ = _logits(plan, q, keys.vectors(k_ref), _visible(plan, sight, queries, keys, 0))
        v, higher = keys.vectors(v_ref), jnp.maximum(top, jnp.max(logits, axis=1))
        weights, shrink = jnp.exp2(logits - higher[:, None]), jnp.exp2(top - higher)
        out = out * shrink[:, None] + _dot(weights.astype(v.dtype), v)
        return out, higher, total * shrink + jnp.sum(weights, axis=1)

    start = jnp.zeros((blocks.queries, H)), jnp.full(blocks.queries, _LEAST), jnp.zeros(blocks.queries)
    out, top, total = _visit_keys(sight, blocks.keys, step, start)
    total = jnp.where(total > 0, total, 1)  # 0 for padding, which sees no key
    queries.write(out_ref, out / total[:, None])
    queries.write(lse_ref, top + jnp.log2(total))


def _dq_kernel(plan, q_ref, k_ref, v_ref, sight, out_ref, d_out_ref, lse_ref, dq_ref, delta_ref):
    """Computes a query block's gradients in one head, and output · its gradient for the other kernel."""
    blocks, (T, H) = plan.blocks[1], q_ref.shape
    queries = _Span.of_row(pl.program_id(0), blocks.queries, T)
    q, d_out, lse = queries.vectors(q_ref), queries.vectors(d_out_ref), queries.numbers(lse_ref)
    out = queries.vectors(out_ref).astype(jnp.float32)
    delta = jnp.sum(out * d_out.astype(jnp.float32), axis=1)

    def step(keys, dq):
        k, v = keys.vectors(k_ref), keys.vectors(v_ref)
        seen = _visible(plan, sight, queries, keys, 0)
        _, d_scores = _weights(plan, (q, k), (d_out, v), seen, lse[:, None], delta[:, None])
        return dq + _dot(d_scores.astype(k.dtype), k)

    dq = _visit_keys(sight, blocks.keys, step, jnp.zeros((blocks.queries, H)))
    queries.write(dq_ref, dq * plan.scale)
    queries.write(delta_ref, delta)


def _dkv_kernel(plan, q_ref, k_ref, v_ref, sight, d_out_ref, lse_ref, delta_ref, dk_ref, dv_ref):
    """Computes the gradients of a block of keys and values in one head, over all query heads that read them.

    Scores are keys by queries, as the sums need them, so that no block is transposed.
    """
    blocks, (T, G, H) = plan.blocks[2], q_ref.shape
    keys = _Span.of_row(pl.program_id(0), blocks.keys, T)
    k, v = keys.vectors(k_ref), keys.vectors(v_ref)
    first, count = sight[2][0], sight[2][1]

    def step(n, carry):
        dk, dv = carry
        head, i = lax.div(n, count), first + lax.rem(n, count)
        queries = _Span.of_row(i, blocks.queries, T)
        q, d_out = queries.vectors(q_ref, head), queries.vectors(d_out_ref, head)
        lse, delta = queries.numbers(lse_ref, head), queries.numbers(delta_ref, head)
        seen = _visible(plan, sight, queries, keys, 1)
        weights, d_scores = _weights(plan, (k, q), (v, d_out), seen, lse[None], delta[None])
        dv += _dot(weights.astype(d_out.dtype), d_out)
        return dk + _dot(d_scores.astype(q.dtype), q), dv

    start = jnp.zeros((blocks.keys, H)), jnp.zeros((blocks.keys, H))
    dk, dv = lax.fori_loop(0, G * count, step, start)
    keys.write(dk_ref, dk * plan.scale)
    keys.write(dv_ref, dv)


# --- calls of kernels ----------------------------------------------------------------------------


def _call(kernel: Callable, plan: Plan, blocks: Blocks, grid: Sequence[int], G: int, reads: list, writes: list):
    """Runs a kernel for each (block, head, row); a name in `parts` says what it gets of each array."""
    T, H = reads[0][1].shape[1], reads[0][1].shape[3]
    token = pl.BlockSpec((None, T), lambda i, n, b: (b, 0))
    visited = (pl.BlockSpec((None, None, numbers), lambda i, n, b: (b, i, 0)) for numbers in (4, 2))

    parts = {  # each covers the whole row
        "head": pl.BlockSpec((None, T, None, H), lambda i, n, b: (b, 0, n, 0)),
        "shared head": pl.BlockSpec((None, T, None, H), lambda i, n, b: (b, 0, n // G, 0)),
        "sharing heads": pl.BlockSpec((None, T, G, H), lambda i, n, b: (b, 0, n, 0)),
        "head's numbers": pl.BlockSpec((None, None, T), lambda i, n, b: (b, n, 0)),
        "sharing heads' numbers": pl.BlockSpec((None, G, T), lambda i, n, b: (b, n, 0)),
        "key stretches": (token, token, token, next(visited)),
        "query stretches": (token, token, next(visited)),
    }
    call = pl.pallas_call(
        functools.partial(kernel, plan),
        grid=tuple(grid),
        in_specs=[parts[part] for part, _ in reads],
        out_specs=[parts[part] for part, _ in writes],
        out_shape=[jax.ShapeDtypeStruct(like.shape, like.dtype) for _, like in writes],
        compiler_params=pallas_triton.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=plan.interpret,
        name="flash" + kernel.__name__.removesuffix("_kernel"),
    )
    # JAX omits a jitted function whose results are unused, but never a kernel by itself.
    return jax.jit(call)(*(array for _, array in reads))


def _pad_heads(*arrays: Array) -> list[Array]:
    """Pads heads to a power of two, because Triton has no other sizes."""
    H = arrays[0].shape[-1]
    fill = max(16, 1 << (H - 1).bit_length()) - H
    return [jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, fill))) for x in arrays]


def _forward(plan: Plan, q: Array, k: Array, v: Array, sight: Sight) -> tuple[Array, Array]:
    """(the output, log2 Σ 2^logits [B, N, T])."""
    (B, T, N, H), K, blocks = q.shape, k.shape[2], plan.blocks[0]
    q, k, v = _pad_heads(q, k, v)
    reads = [
        ("head", q),
        ("shared head", k),
        ("shared head", v),
        ("key stretches", (*sight[:2], *sight.forward)),
    ]
    writes = [("head", q), ("head's numbers", jax.ShapeDtypeStruct((B, N, T), jnp.float32))]
    grid = pl.cdiv(T, blocks.queries), N, B
    out, lse = _call(_forward_kernel, plan, blocks, grid, N // K, reads, writes)
    return checkpoint_name(out[..., :H], KEPT), checkpoint_name(lse, KEPT)


def _backward(plan: Plan, kept: Any, d_out: Array) -> tuple[Array, Array, Array, None]:
    """Gradients of q, k and v."""
    q, k, v, sight, out, lse = kept
    (B, T, N, H), K, (_, for_dq, for_dkv) = q.shape, k.shape[2], plan.blocks
    q, k, v, out, d_out = _pad_heads(q, k, v, out, d_out)

    reads = [("head", q), ("shared head", k), ("shared head", v), ("key stretches", (*sight[:2], *sight.dq))]
    reads += [("head", out), ("head", d_out), ("head's numbers", lse)]
    writes = [("head", q), ("head's numbers", lse)]
    grid = pl.cdiv(T, for_dq.queries), N, B
    dq, delta = _call(_dq_kernel, plan, for_dq, grid, N // K, reads, writes)

    reads = [("sharing heads", q), ("head", k), ("head", v), ("query stretches", (*sight[:2], sight.dkv))]
    reads += [("sharing heads", d_out), *(("sharing heads' numbers", x) for x in (lse, delta))]
    grid = pl.cdiv(T, for_dkv.keys), K, B
    dk, dv = _call(_dkv_kernel, plan, for_dkv, grid, N // K, reads, [("head", k), ("head", v)])
    return dq[..., :H], dk[..., :H], dv[..., :H], None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plan: Plan, q: Array, k: Array, v: Array, sight: Sight) -> Array:
    return _forward(plan, q, k, v, sight)[0]


def _attention_forward(plan: Plan, q: Array, k: Array, v: Array, sight: Sight) -> tuple[Array, Any]:
    out, lse = _forward(plan, q, k, v, sight)
    return out, (q, k, v, sight, out, lse)


_attention.defvjp(_attention_forward, _backward)
