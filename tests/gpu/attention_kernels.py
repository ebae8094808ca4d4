"""The ways to compute attention that the check compares, all of them on the same packed rows.

cuDNN knows no branches: a prompt that two answers share stands there once for each, so its rows are laid
out anew, sequence by sequence, and its output is brought back.

Axes: B rows, T tokens of a packed row, U of a row laid out anew, S sequences of a row, A answers to a prompt,
N query heads, K key/value heads, H head dim.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from measuring import Missing, need_gpu, on_gpu

from spin_jax.kernels.layout import Layout
from spin_jax.models.attention import attend
from spin_jax.runtime.sharding import round_up


class Kernel(NamedTuple):
    """run(plan, q, k, v) → out [B, T, N, H]; the plan is made of a layout on the host, beforehand."""

    run: Callable[..., jax.Array]
    plan: Callable[[Layout], Any] = lambda layout: layout
    backward: bool = True  # it has a backward pass


def candidates() -> dict[str, Kernel]:
    """Those that could serve: they compute what `attention.attend` computes."""
    return {
        "plain": ours("plain"),
        "flash": ours("flash"),
        "cudnn packed": Kernel(_cudnn_packed, _side_by_side),
        "cudnn padded": Kernel(_cudnn_padded, _one_row_each),
    }


def bounds() -> dict[str, Kernel]:
    """Those that could not, and tell what one may cost: a part of the above, and kernels without segments."""
    return {
        "gathers of cudnn packed": Kernel(_only_gathers, _side_by_side),
        "cudnn causal, no segments": Kernel(_cudnn_causal, _side_by_side),
        "mosaic causal, no segments": Kernel(_mosaic_causal, _side_by_side, backward=False),
    }


def ours(name: str, window: int | None = None, softcap: float | None = None) -> Kernel:
    """A kernel of spin_jax."""

    def run(layout, q, k, v):
        return attend(q, k, v, layout, window=window, softcap=softcap, kernel=name)

    return Kernel(run)


# --- rows laid out anew, sequence by sequence ------------------------------------------------------


class Places(NamedTuple):
    """Where tokens go, all counted from 1; 0 is nowhere."""

    tokens: Any  # int32 [B, U]: the packed row's token in each place
    firsts: Any  # int32 [B, U]: the same where it is that token's first place, else 0
    places: Any  # int32 [B, T, A]: the places of each token


class Plan(NamedTuple):
    places: Places
    lengths: Any  # int32 [B, S]: of the sequences; −1 where there is none
    offsets: Any  # int32 [B, S + 1]: where each begins, and behind the last one its end; −1 after that


def sequences(layout: Layout) -> list[list[np.ndarray]]:
    """Each row's sequences, as indices of their tokens: every answer behind its prompt."""
    rows = []
    for segments, branches in zip(np.asarray(layout.segments), np.asarray(layout.branches), strict=True):
        found = []
        for group in range(1, segments.max() + 1):
            own = segments == group
            for branch in range(1, max(1, branches[own].max()) + 1):
                found.append(np.flatnonzero(own & ((branches == 0) | (branches == branch))))
        rows.append(found)
    return rows


def _places(rows: list[list[np.ndarray]], starts: Sequence[Sequence[int]], T: int, U: int) -> Places:
    tokens = np.zeros((len(rows), U), np.int32)
    firsts = np.zeros_like(tokens)
    where = [[[] for _ in range(T)] for _ in rows]
    for b, (row, begins) in enumerate(zip(rows, starts, strict=True)):
        for sequence, begin in zip(row, begins, strict=True):
            for place, token in enumerate(sequence, start=begin):
                tokens[b, place] = token + 1
                firsts[b, place] = 0 if where[b][token] else token + 1
                where[b][token].append(place + 1)
    A = max(len(own) for row in where for own in row)
    places = [[own + [0] * (A - len(own)) for own in row] for row in where]
    return Places(tokens, firsts, np.array(places, np.int32))


def _side_by_side(layout: Layout) -> Plan:
    """A row's sequences one behind the other."""
    rows = sequences(layout)
    ends = [np.cumsum([0, *map(len, row)]) for row in rows]
    U = round_up(max(int(end[-1]) for end in ends), 128)
    S = max(map(len, rows))
    lengths, offsets = np.full((len(rows), S), -1, np.int32), np.full((len(rows), S + 1), -1, np.int32)
    for b, (row, end) in enumerate(zip(rows, ends, strict=True)):
        lengths[b, : len(row)] = [len(sequence) for sequence in row]
        offsets[b, : len(end)] = end
    starts = [end[:-1].tolist() for end in ends]
    return Plan(_places(rows, starts, layout.positions.shape[1], U), lengths, offsets)


def _one_row_each(layout: Layout) -> Plan:
    """Every sequence in a row of its own, as long as the longest: it costs memory, and no time."""
    rows = sequences(layout)
    S, longest = max(map(len, rows)), round_up(max(len(own) for row in rows for own in row), 64)
    starts = [[n * longest for n in range(len(row))] for row in rows]
    lengths = np.zeros((len(rows), S), np.int32)
    for b, row in enumerate(rows):
        lengths[b, : len(row)] = [len(sequence) for sequence in row]
    return Plan(_places(rows, starts, layout.positions.shape[1], S * longest), lengths, None)


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[b, index − 1], and zeros where the index is 0."""
    taken = jax.vmap(lambda row, at: row[at])(x, jnp.maximum(index - 1, 0))
    return jnp.where((index > 0)[..., None, None], taken, 0)


def _sum_over_places(x: jax.Array, places: jax.Array) -> jax.Array:
    return sum(_take(x, places[..., a]) for a in range(places.shape[-1]))


@jax.custom_vjp
def spread(x: jax.Array, places: Places) -> jax.Array:
    """[B, T, …] → [B, U, …]. The backward pass gathers: a scatter of JAX's would add with atomics."""
    return _take(x, places.tokens)


spread.defvjp(
    lambda x, places: (spread(x, places), places),
    lambda places, g: (_sum_over_places(g, places.places), None),
)


@jax.custom_vjp
def collected(x: jax.Array, places: Places) -> jax.Array:
    """[B, U, …] → [B, T, …]: what stands in each token's first place."""
    return _take(x, places.places[..., 0])


collected.defvjp(
    lambda x, places: (collected(x, places), places),
    lambda places, g: (_take(g, places.firsts), None),
)


def _on_new_rows(core: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """An attention of rows laid out anew → one of packed rows."""

    @functools.wraps(core)
    def run(plan: Plan, q, k, v):
        return collected(core(plan, *(spread(x, plan.places) for x in (q, k, v))), plan.places)

    return run


# --- cuDNN -----------------------------------------------------------------------------------------


@_on_new_rows
def _cudnn_packed(plan: Plan, q, k, v):
    """Lengths and offsets in place of a mask. JAX has no public function for it."""
    if not on_gpu():  # all that can be tried is whether the offsets are right
        U = q.shape[1]
        begins = jnp.where(plan.offsets < 0, U + 1, plan.offsets)
        numbers = jnp.sum(jnp.arange(U)[:, None] >= begins[:, None], axis=2)
        seen = (numbers[:, :, None] == numbers[:, None]) & jnp.tril(jnp.ones((U, U), bool))
        return jax.nn.dot_product_attention(q, k, v, mask=seen[:, None])
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    return cudnn.dot_product_attention(
        q,
        k,
        v,
        q_seqlen=plan.lengths,
        kv_seqlen=plan.lengths,
        q_offsets=plan.offsets,
        kv_offsets=plan.offsets,
        scale=q.shape[-1] ** -0.5,
        mask_type=cudnn.MaskType.PADDING_CAUSAL,
    )


@_on_new_rows
def _cudnn_padded(plan: Plan, q, k, v):
    """By its public name."""
    B, S = plan.lengths.shape
    lengths = plan.lengths.reshape(-1)
    out = jax.nn.dot_product_attention(
        *(x.reshape(B * S, -1, *x.shape[2:]) for x in (q, k, v)),
        is_causal=True,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation="cudnn" if on_gpu() else "xla",
    )
    return out.reshape(B, -1, *out.shape[2:])


# --- bounds ----------------------------------------------------------------------------------------


@_on_new_rows
def _only_gathers(plan: Plan, q, k, v):
    """Rows laid out anew, and back; k and v are added so that they are needed."""
    groups = q.shape[2] // k.shape[2]
    return q + jnp.repeat(k + v, groups, axis=2)


def _filled_up(plan: Plan, *arrays: jax.Array) -> list[jax.Array]:
    """Arrays of the new rows' length, without the gathers that make them."""
    U = plan.places.tokens.shape[1]
    return [jnp.pad(x, ((0, 0), (0, U - x.shape[1]), (0, 0), (0, 0))) for x in arrays]


def _cudnn_causal(plan: Plan, q, k, v):
    need_gpu()
    out = jax.nn.dot_product_attention(*_filled_up(plan, q, k, v), is_causal=True, implementation="cudnn")
    return out[:, : q.shape[1]]


def _mosaic_causal(plan: Plan, q, k, v):
    """JAX's own example of a kernel for Hopper cards, forward only."""
    need_gpu()
    try:
        from jax.experimental.pallas.ops.gpu import attention_mgpu as mosaic
    except ImportError as error:
        raise Missing(f"a JAX with attention_mgpu: {error}") from error
    rows = [x.astype(jnp.float16) for x in _filled_up(plan, q * q.shape[-1] ** -0.5, k, v)]  # no bfloat16
    tuning = mosaic.TuningConfig(block_q=64, block_kv=128, max_concurrent_steps=2, causal=True)
    return mosaic.attention(*rows, tuning)[:, : q.shape[1]].astype(q.dtype)
