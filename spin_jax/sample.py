"""Sampling: the opponent answers prompts.

One program prefills a batch of prompts and decodes until every answer has ended. A prompt's answer
depends on its own key alone, not on its batch. Axes: B prompts, P prompt slots, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from spin_jax import sharding
from spin_jax.batches import bucket
from spin_jax.chat import Chat, Ids, Message
from spin_jax.model import Decoder, Model, Params, forward, new_cache, project, unstacked

_NO_TOKEN = -1


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: temperature 0 is greedy; top-k, then top-p, as in transformers."""

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}: at least 1")
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature}: at least 0 (0 is greedy)")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k}: at least 1, or unset")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: in (0, 1], or unset")


def prompt_keys(seed: int, iteration: int, prompt_ids: Sequence[int], sample_id: int = 0) -> Array:
    """One key a prompt: fold_in(seed, iteration, prompt, sample), whatever the batch."""
    base = jax.random.fold_in(jax.random.key(seed), iteration)
    ids = np.asarray(prompt_ids, np.int64).astype(np.uint64)
    low, high = (ids & 0xFFFFFFFF).astype(np.uint32), (ids >> 32).astype(np.uint32)
    return _fold(base, low, high, np.uint32(sample_id))


@jax.jit
def _fold(base: Array, low: Array, high: Array, sample_id: Array) -> Array:
    def fold(low, high):
        key = jax.random.fold_in(base, low)
        key = jnp.where(high > 0, jax.random.fold_in(key, high), key)  # ids beyond 32 bits
        return jax.random.fold_in(key, sample_id)

    return jax.vmap(fold)(low, high)


def truncate_logits(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Sets to −inf what top-k and top-p leave out."""
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        smallest = lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if sampling.top_p is not None and sampling.top_p < 1:
        descending = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(descending, axis=-1)
        # Kept: the fewest tokens whose mass reaches top_p, that is, those with less than it before them.
        kept = jnp.cumsum(probabilities, axis=-1) - probabilities < sampling.top_p
        smallest = jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    return logits


def draw(logits: Float[Array, "B V"], keys: Array, sampling: Sampling) -> Int[Array, " B"]:
    """The next token of each row, drawn with the row's own key."""
    logits = sharding.reshard(logits, "batch", None)
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = truncate_logits(logits / sampling.temperature, sampling)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("decoder", "sampling", "stop_tokens"))
def decode(
    decoder: Decoder,
    params: Params,
    tokens: Int[Array, "B P"],
    starts: Int[Array, " B"],
    keys: Array,
    *,
    sampling: Sampling,
    stop_tokens: tuple[int, ...],
) -> Int[Array, "B max_new_tokens"]:
    """Prefill, then one token a turn until every row has met a stop token.

    Args:
        decoder: the model; `params` are `unstacked`.
        tokens: prompts, padded on the left, so that all rows write the same cache slot.
        starts: the slot of each row's first token; P for a row that is only filler.
        keys: one a row; the n-th token of a row is drawn with fold_in(key, n).

    Returns:
        the answers with their stop tokens, then −1.
    """
    B, P = tokens.shape
    stops = jnp.array(stop_tokens, jnp.int32)
    keys = sharding.reshard(keys, "batch")

    def next_token(hidden: Float[Array, "B 1 D"], n: Array, done: Bool[Array, " B"]):
        logits = project(decoder, params, hidden)[:, 0]
        token = draw(logits, jax.vmap(jax.random.fold_in, (0, None))(keys, n), sampling)
        token = jnp.where(done, _NO_TOKEN, token)
        return token, done | jnp.any(token[:, None] == stops, axis=-1)

    slots = jnp.arange(P)
    positions = jnp.maximum(slots - starts[:, None], 0)
    segments = (slots >= starts[:, None]).astype(jnp.int32)
    cache = new_cache(decoder.config, B, P + sampling.max_new_tokens, decoder.dtype)
    hidden, cache = forward(decoder, params, tokens, positions, segments, cache)
    token, done = next_token(hidden[:, -1:], jnp.int32(0), starts >= P)
    answers = jnp.full((B, sampling.max_new_tokens), _NO_TOKEN, out_sharding=sharding.spec("batch", None))
    answers = answers.at[:, 0].set(token)

    def unfinished(state):
        n, _, _, done, _ = state
        return (n < sampling.max_new_tokens) & ~jnp.all(done)

    def advance(state):
        n, token, cache, done, answers = state
        positions = (P - starts + n - 1)[:, None]
        alive = jnp.ones_like(positions)
        token = jnp.maximum(token, 0)[:, None]
        hidden, cache = forward(decoder, params, token, positions, alive, cache)
        token, done = next_token(hidden, n, done)
        answers = lax.dynamic_update_slice_in_dim(answers, token[:, None], n, axis=1)
        return n + 1, token, cache, done, answers

    return lax.while_loop(unfinished, advance, (jnp.int32(1), token, cache, done, answers))[-1]


@functools.partial(jax.jit, static_argnames=("dtype",))
def sampling_params(params: Params, dtype: Any) -> Params:
    """The opponent's weights as `decode` wants them: a tree a layer, in the compute dtype."""
    return unstacked(params, dtype)


def answer_prompts(
    decoder: Decoder,
    params: Params,
    prompts: Sequence[Ids],
    keys: Array,
    *,
    mesh: jax.sharding.Mesh,
    sampling: Sampling,
    stop_tokens: tuple[int, ...],
    batch_size: int,
    on_batch: Callable[[int, int], None] = lambda prompts, tokens: None,
) -> list[Ids]:
    """Answers prompts of any lengths, batch by batch, the similar lengths together.

    Args:
        decoder: the model; `params` come from `sampling_params`.
        keys: one a prompt, from `prompt_keys`.
        batch_size: prompts a program runs at a time; rounded up to the mesh.
        on_batch: told the prompts answered and tokens sampled by each batch; may raise to stop.

    Returns:
        the answers in the order of the prompts, each with its stop token if it met one.
    """
    shards = sharding.batch_shards(mesh)
    batch_size = -(-batch_size // shards) * shards
    order = np.argsort([len(prompt) for prompt in prompts], kind="stable")
    answers: list[Ids] = [np.zeros(0, np.int32)] * len(prompts)
    key_data = np.asarray(jax.random.key_data(keys))
    with jax.set_mesh(mesh):
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            P = bucket(max(len(prompts[i]) for i in chosen))
            tokens = np.zeros((batch_size, P), np.int32)
            starts = np.full(batch_size, P, np.int32)
            for row, i in enumerate(chosen):
                starts[row] = P - len(prompts[i])
                tokens[row, starts[row] :] = prompts[i]
            row_keys = key_data[np.resize(chosen, batch_size)]
            tokens, starts, row_keys = sharding.put_batch(mesh, (tokens, starts, row_keys))
            out = decode(
                decoder,
                params,
                tokens,
                starts,
                jax.random.wrap_key_data(row_keys),
                sampling=sampling,
                stop_tokens=stop_tokens,
            )
            sampled = 0
            for i, row in zip(chosen, np.asarray(out), strict=False):
                answers[i] = row[row != _NO_TOKEN]
                sampled += len(answers[i])
            on_batch(len(chosen), sampled)
    return answers


def generate(
    model: Model,
    conversations: Sequence[list[Message]],
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    batch_size: int = 32,
) -> list[str]:
    """Answers conversations that wait for an assistant's turn.

    Args:
        model: from `spin_jax.load`.
        conversations: lists of {"role", "content"}.
        max_new_tokens: where an answer without a stop token is cut.
        temperature: 0 is greedy.
        seed: of the draws; the answer of conversation i depends on the seed and i.
        top_k: draw from the k likeliest tokens only.
        top_p: draw from the fewest tokens that hold this probability mass.
        batch_size: prompts answered at a time.

    Returns:
        the answers' text, without special tokens.
    """
    chat = Chat(model.tokenizer, model.stop_tokens)
    prompts = [chat.encode_prompt(messages) for messages in conversations]
    if not prompts:
        return []
    with jax.set_mesh(model.mesh):
        params = sampling_params(model.params, model.dtype)
    answers = answer_prompts(
        Decoder(model.config, dtype=model.dtype),
        params,
        prompts,
        prompt_keys(seed, 0, range(len(prompts))),
        mesh=model.mesh,
        sampling=Sampling(max_new_tokens, temperature, top_k, top_p),
        stop_tokens=model.stop_tokens,
        batch_size=min(batch_size, len(prompts)),
    )
    return [chat.decode(answer) for answer in answers]
