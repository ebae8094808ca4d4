"""Log-probabilities of responses: what the loss is made of, for policy and opponent alike.

Axes: B sequences, T tokens, R response tokens, V vocabulary.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from spin_jax import sharding
from spin_jax.batches import Rows, RowShape, bucket, pad_rows
from spin_jax.chat import Chat, Message
from spin_jax.model import Decoder, Model, Params, forward, project

_CHUNK_LOGITS = 2**25  # float32: 128 MiB, or 1,024 tokens of a vocabulary of 32,768


def response_logps(decoder: Decoder, params: Params, rows: Rows) -> Float[Array, " B"]:
    """Σ log p(token | tokens before it) over each row's response tokens; float32, in nats.

    Differentiable in `params`. The same function scores the opponent and trains the policy, so that
    the two agree to the bit where their weights do.
    """
    hidden, _ = forward(decoder, params, rows.tokens, rows.positions, rows.segments)
    targets = jnp.take_along_axis(rows.tokens, rows.response, axis=1)

    @jax.checkpoint  # the backward pass projects again: logits are never kept
    def chunk_logps(_, chunk):
        places, targets = chunk
        # The state before each response token predicts it; all others are never projected.
        before = jnp.maximum(places - 1, 0)[..., None]
        logits = project(decoder, params, jnp.take_along_axis(hidden, before, axis=1))
        # A masked sum, not a gather: it needs no communication where the vocabulary is split.
        is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
        logps = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1) - jax.nn.logsumexp(logits, axis=-1)
        return None, jnp.sum(jnp.where(places > 0, logps, 0.0), axis=-1)

    B, R = rows.response.shape
    columns = _chunk_columns(B // sharding.batch_shards(), R, decoder.config.vocab_size)
    chunks = [x.reshape(B, R // columns, columns).swapaxes(0, 1) for x in (rows.response, targets)]
    return jnp.sum(jax.lax.scan(chunk_logps, None, chunks)[1], axis=0)


def _chunk_columns(B: int, R: int, V: int) -> int:
    """Response tokens projected at a time: the largest divisor of R that keeps B × it × V small."""
    return max(n for n in range(1, R + 1) if R % n == 0 and (n == 1 or B * n * V <= _CHUNK_LOGITS))


@functools.partial(jax.jit, static_argnames=("decoder",))
def score_rows(decoder: Decoder, params: Params, rows: Rows) -> Float[Array, " B"]:
    """`response_logps`, compiled."""
    return response_logps(decoder, params, rows)


@functools.partial(jax.jit, static_argnames=("decoder",))
def _logits(decoder: Decoder, params: Params, rows: Rows) -> Float[Array, "B T V"]:
    hidden, _ = forward(decoder, params, rows.tokens, rows.positions, rows.segments)
    return project(decoder, params, hidden)


def _decoder(model: Model) -> Decoder:
    return Decoder(model.config, dtype=model.dtype)


def logits(model: Model, tokens: ArrayLike) -> Float[Array, "B T V"]:
    """Next-token logits of right-padded token rows.

    Args:
        model: from `spin_jax.load`.
        tokens: int [B, T]; what stands right of a row's end does not change the logits before it.

    Returns:
        float32 logits; entry [b, t] predicts token t + 1.
    """
    tokens = np.asarray(tokens, np.int32)
    if tokens.ndim != 2:
        raise ValueError(f"tokens must be [B, T], not of shape {tokens.shape}")
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < model.config.vocab_size:
        raise ValueError(f"token ids must lie in [0, {model.config.vocab_size})")
    nothing = np.zeros(0, np.int32)
    shards = sharding.batch_shards(model.mesh)
    filler = [np.zeros(tokens.shape[1], np.int32)] * (-len(tokens) % shards)
    shape = RowShape(tokens.shape[1], 0)
    rows = pad_rows([(row, nothing) for row in [*tokens, *filler]], shape)
    with jax.set_mesh(model.mesh):
        placed = sharding.put_batch(model.mesh, rows)
        host = np.asarray(_logits(_decoder(model), model.params, placed))[: len(tokens)]
    # On one device, hence outside of the mesh: what a user does with it next is not the mesh's business.
    return jnp.asarray(host)


def score(
    model: Model, conversations: Sequence[list[Message]], *, batch_size: int = 8
) -> Float[np.ndarray, " B"]:
    """Summed log p(last assistant turn | what stands before it), in nats.

    Args:
        model: from `spin_jax.load`.
        conversations: lists of {"role", "content"}, each ending with an assistant's turn.
        batch_size: sequences a program runs at a time.

    Raises:
        ValueError: a conversation is malformed.
    """
    chat = Chat(model.tokenizer, model.stop_tokens)
    sequences = [chat.encode_checked(messages, number) for number, messages in enumerate(conversations)]
    lengths = [len(prompt) + len(response) for prompt, response in sequences]
    shards = sharding.batch_shards(model.mesh)
    batch_size = -(-min(batch_size, max(len(sequences), 1)) // shards) * shards
    scores = np.zeros(len(sequences), np.float32)
    order = np.argsort(lengths, kind="stable")
    with jax.set_mesh(model.mesh):
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            filled = [sequences[i] for i in [*chosen, *[chosen[0]] * (batch_size - len(chosen))]]
            responses = [len(response) for _, response in filled]
            shape = RowShape(bucket(max(lengths[i] for i in chosen)), bucket(max(responses)))
            rows = pad_rows(filled, shape)
            placed = sharding.put_batch(model.mesh, rows)
            scores[chosen] = np.asarray(score_rows(_decoder(model), model.params, placed))[: len(chosen)]
    return scores
