"""The answers in progress, on the device: a fixed number of slots that share a ring cache.

`prefill` puts prompts into free slots, and `decode` draws the next tokens of all slots. At each step every
slot writes the same column of the cache, so that there is no scatter and no column is ever moved.

Axes: B slots, b prompts of a prefill, P prompt tokens, S columns of the cache, V vocabulary.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from spin_jax.kernels.layout import Layout
from spin_jax.models.architecture import Params
from spin_jax.models.cache import Cache, new_cache
from spin_jax.models.decoder import Decoder, forward, output_head, project
from spin_jax.runtime import sharding
from spin_jax.sampling.next_token import KEYS, Sampling, draw

NO_TOKEN = -1  # stands in place of a token where a slot draws none


class Slots(NamedTuple):
    """The answers in progress."""

    cache: Cache
    tokens: Int[Array, " B"]  # the last token of each answer, which the next step reads
    positions: Int[Array, " B"]  # the position of that token
    counts: Int[Array, " B"]  # tokens drawn so far
    limits: Int[Array, " B"]  # most tokens to draw
    keys: Array  # [B]; the n-th token is drawn with fold_in(key, n)
    done: Bool[Array, " B"]  # whether the slot is free: its answer has ended, or it never had one


def _next_token(head, hidden, counts, limits, keys, sampling: Sampling, stop_tokens: tuple[int, ...]):
    """Draws the next token of each row; returns (token, whether it is the answer's last token)."""
    keys = jax.vmap(jax.random.fold_in)(keys, counts)
    token = draw(project(hidden, head)[:, 0], keys, sampling)
    stops = jnp.any(token[:, None] == jnp.array(stop_tokens, jnp.int32), axis=-1)
    return token, stops | (counts + 1 >= limits)


@functools.partial(
    jax.jit, static_argnames=("decoder", "sampling", "stop_tokens", "steps", "fixed"), donate_argnames="slots"
)
def decode(
    decoder: Decoder,
    params: Params,
    slots: Slots,
    *,
    sampling: Sampling,
    stop_tokens: tuple[int, ...],
    steps: int,
    fixed: bool = False,
) -> tuple[Slots, Int[Array, "B steps"]]:
    """Draws up to `steps` tokens for every slot that is not done, and stops early when all slots are done.

    Args:
        fixed: whether to run all steps in any case. A GPU then does not wait for its host before each step.

    Returns:
        the slots, and the tokens drawn; NO_TOKEN where a slot was done.
    """
    head = output_head(decoder, params)

    def unfinished(state):
        n, slots, _ = state
        return (n < steps) & ~jnp.all(slots.done)

    def advance(state):
        n, slots, drawn = state
        layout = Layout(slots.positions[:, None], (~slots.done).astype(jnp.int32)[:, None])
        hidden, cache = forward(decoder, params, slots.tokens[:, None], layout, slots.cache)
        token, last = _next_token(head, hidden, slots.counts, slots.limits, slots.keys, sampling, stop_tokens)
        drawn = lax.dynamic_update_slice_in_dim(drawn, jnp.where(slots.done, NO_TOKEN, token)[:, None], n, axis=1)
        slots = slots._replace(
            cache=cache,
            tokens=token,
            positions=slots.positions + 1,
            counts=slots.counts + 1,
            done=slots.done | last,
        )
        return n + 1, slots, drawn

    B = slots.tokens.shape[0]
    drawn = jnp.full((B, steps), NO_TOKEN, out_sharding=sharding.spec("batch", None))
    state = jnp.int32(0), slots, drawn
    if fixed:
        state = lax.fori_loop(0, steps, lambda _, state: advance(state), state)
    else:
        state = lax.while_loop(unfinished, advance, state)
    return state[1:]


@functools.partial(jax.jit, static_argnames=("decoder", "sampling", "stop_tokens"), donate_argnames="slots")
def prefill(
    decoder: Decoder,
    params: Params,
    slots: Slots,
    tokens: Int[Array, "b P"],
    lengths: Int[Array, " b"],
    limits: Int[Array, " b"],
    keys: Array,
    into: Int[Array, " b"],
    *,
    sampling: Sampling,
    stop_tokens: tuple[int, ...],
) -> tuple[Slots, Int[Array, " b"]]:
    """Reads prompts that are padded on the left, draws the first tokens of their answers, and fills slots.

    Args:
        into: the slot of each prompt, counted among the slots of its own device; B for a row of padding.

    Returns:
        the slots, and the first token of each prompt's answer.
    """
    b, P = tokens.shape
    positions = jnp.arange(P) - (P - lengths[:, None])
    layout = Layout(jnp.maximum(positions, 0), (positions >= 0).astype(jnp.int32))
    hidden, fresh = forward(decoder, params, tokens, layout, new_cache(decoder.config, b, P, decoder.dtype))
    keys = sharding.reshard(keys, "batch")
    zeros = jnp.zeros_like(lengths)
    token, done = _next_token(output_head(decoder, params), hidden[:, -1:], zeros, limits, keys, sampling, stop_tokens)
    ring = slots.cache
    S = ring.columns

    def columns(new: Array) -> Array:
        """The prompt's last S columns, so that the ring's next column follows them; the rest is empty."""
        new = lax.slice_in_dim(new, max(P - S, 0), P, axis=2)
        return jnp.roll(jnp.pad(new, [(0, 0), (0, 0), (max(S - P, 0), 0), (0, 0)]), ring.column, axis=2)

    def put(old: Array, new: Array) -> Array:
        return sharding.put_rows(old, into, new)

    cache = ring._replace(
        keys=tuple(put(old, columns(new)) for old, new in zip(ring.keys, fresh.keys, strict=True)),
        values=tuple(put(old, columns(new)) for old, new in zip(ring.values, fresh.values, strict=True)),
    )
    # The first token comes after the prompt: its position is the prompt's length.
    new = (token, lengths, zeros + 1, limits, keys, done)
    return Slots(cache, *(put(old, value) for old, value in zip(slots[1:], new, strict=True))), token


@functools.partial(jax.jit, static_argnames=("decoder", "slots", "columns"))
def new_slots(decoder: Decoder, slots: int, columns: int) -> Slots:
    """Empty slots, with a cache of so many columns."""

    def zeros(dtype: Any) -> Array:
        return jnp.zeros(slots, dtype, out_sharding=sharding.spec("batch"))

    keys = jax.random.wrap_key_data(
        jnp.zeros((slots, 2), jnp.uint32, out_sharding=sharding.spec("batch", None)), impl=KEYS
    )
    cache = new_cache(decoder.config, slots, columns, decoder.dtype)
    done = jnp.ones(slots, bool, out_sharding=sharding.spec("batch"))
    return Slots(cache, zeros(jnp.int32), zeros(jnp.int32), zeros(jnp.int32), zeros(jnp.int32), keys, done)


def widen(slots: Slots, columns: int) -> Slots:
    """The same slots with more columns: the old columns come last, in the order in which they were written.

    The old cache is deleted layer by layer, because there may be no room for two caches.
    """
    cache = slots.cache

    def widen_layer(x: Array) -> Array:
        wider = _add_columns(x, cache.column, columns=columns)
        x.delete()
        return wider

    keys, values = tuple(map(widen_layer, cache.keys)), tuple(map(widen_layer, cache.values))
    return slots._replace(cache=Cache(keys, values, column=jnp.zeros_like(cache.column)))


@functools.partial(jax.jit, static_argnames="columns")
def _add_columns(x: Array, column: Array, *, columns: int) -> Array:
    return jnp.pad(jnp.roll(x, -column, axis=2), [(0, 0), (0, 0), (columns - x.shape[2], 0), (0, 0)])
