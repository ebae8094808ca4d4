"""The answers in progress, on the device: a fixed number of slots that share a ring cache.

`prefill` puts prompts into free slots, and `decode` draws the next tokens of all slots. At each step every slot writes
the same column of the cache, so that there is no scatter and no column is ever moved. Where prompts have several
answers, `read_prompts` and `begin_answers` take the place of `prefill`: a prompt is read once, and its columns are
copied to the slot of each answer.

Axes: B slots, b prompts that are read at a time, n answers that begin at a time, P prompt tokens, S columns of the
cache, K kv heads, H head dim, D model, V vocabulary.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

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


class Prompts(NamedTuple):
    """Prompts that have been read, each for any number of answers."""

    cache_keys: tuple[Float[Array, "b K P H"], ...]  # of each layer
    cache_values: tuple[Float[Array, "b K P H"], ...]
    hidden: Float[Array, "b 1 D"]  # of the last token: the first token of each answer is drawn from it
    lengths: Int[Array, " b"]

    @property
    def columns(self) -> int:
        return self.cache_keys[0].shape[2]


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
    """Draws up to `steps` tokens for every slot that is not done, and NO_TOKEN for the others.

    Args:
        fixed: whether to run all steps even where all slots are done. A GPU then does not wait for its host before
            each step.
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
        positions, counts, done = slots.positions + 1, slots.counts + 1, slots.done | last
        slots = slots._replace(cache=cache, tokens=token, positions=positions, counts=counts, done=done)
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
    """Reads prompts that are padded on the left, fills slots, and returns the first token of each answer as well.

    Args:
        into: the slot of each prompt, counted among the slots of its own device; B for a row of padding.
    """
    prompts = _read(decoder, params, tokens, lengths)
    return _begin(decoder, params, slots, prompts, limits, keys, into, sampling, stop_tokens)


@functools.partial(jax.jit, static_argnames="decoder")
def read_prompts(decoder: Decoder, params: Params, tokens: Int[Array, "b P"], lengths: Int[Array, " b"]) -> Prompts:
    """Reads prompts that are padded on the left, for `begin_answers`."""
    return _read(decoder, params, tokens, lengths)


@functools.partial(jax.jit, static_argnames=("decoder", "sampling", "stop_tokens"), donate_argnames="slots")
def begin_answers(
    decoder: Decoder,
    params: Params,
    slots: Slots,
    prompts: Prompts,
    rows: Int[Array, " n"],
    limits: Int[Array, " n"],
    keys: Array,
    into: Int[Array, " n"],
    *,
    sampling: Sampling,
    stop_tokens: tuple[int, ...],
) -> tuple[Slots, Int[Array, " n"]]:
    """Begins answers to prompts that have been read, and returns the first token of each answer as well.

    Args:
        rows: the prompt of each answer, counted among the prompts of its own device.
        into: the slot of each answer, as for `prefill`.
    """
    prompts = jax.tree.map(lambda x: sharding.take_rows(x, rows), prompts)
    return _begin(decoder, params, slots, prompts, limits, keys, into, sampling, stop_tokens)


def _read(decoder: Decoder, params: Params, tokens: Array, lengths: Array) -> Prompts:
    b, P = tokens.shape
    positions = jnp.arange(P) - (P - lengths[:, None])
    layout = Layout(jnp.maximum(positions, 0), (positions >= 0).astype(jnp.int32))
    hidden, cache = forward(decoder, params, tokens, layout, new_cache(decoder.config, b, P, decoder.dtype))
    return Prompts(cache.keys, cache.values, hidden[:, -1:], lengths)


def _begin(decoder, params, slots: Slots, prompts: Prompts, limits, keys, into, sampling, stop_tokens):
    """Fills a slot for each of the prompts; returns (slots, first tokens)."""
    lengths, keys = prompts.lengths, sharding.reshard(keys, "batch")
    zeros = jnp.zeros_like(lengths)
    token, done = _next_token(output_head(decoder, params), prompts.hidden, zeros, limits, keys, sampling, stop_tokens)
    ring, S, P = slots.cache, slots.cache.columns, prompts.columns

    def put(old: Array, new: Array) -> Array:
        return sharding.put_rows(old, into, new)

    def put_columns(old: Array, new: Array) -> Array:
        """Puts the prompt's last S columns, so that the ring's next column follows them; the rest is empty."""
        new = lax.slice_in_dim(new, max(P - S, 0), P, axis=2)
        padded = jnp.pad(new, [(0, 0), (0, 0), (max(S - P, 0), 0), (0, 0)])
        return put(old, jnp.roll(padded, ring.column, axis=2))

    cache = ring._replace(
        keys=tuple(map(put_columns, ring.keys, prompts.cache_keys)),
        values=tuple(map(put_columns, ring.values, prompts.cache_values)),
    )
    # The first token comes after the prompt: its position is the prompt's length.
    new = (token, lengths, zeros + 1, limits, keys, done)
    return Slots(cache, *map(put, slots[1:], new)), token


@functools.partial(jax.jit, static_argnames=("decoder", "slots", "columns"))
def new_slots(decoder: Decoder, slots: int, columns: int) -> Slots:
    """Empty slots, with a cache of so many columns."""
    batch = sharding.spec("batch")
    tokens, positions, counts, limits = (jnp.zeros(slots, jnp.int32, out_sharding=batch) for _ in range(4))
    key_data = jnp.zeros((slots, 2), jnp.uint32, out_sharding=sharding.spec("batch", None))
    keys, done = jax.random.wrap_key_data(key_data, impl=KEYS), jnp.ones(slots, bool, out_sharding=batch)
    cache = new_cache(decoder.config, slots, columns, decoder.dtype)
    return Slots(cache, tokens, positions, counts, limits, keys, done)


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
