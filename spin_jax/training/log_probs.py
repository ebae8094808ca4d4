"""Log-probabilities of the answers, which the loss is computed from. Policy and opponent share this code.

Axes: N rows, T tokens, R response tokens, G groups of a row, A answers of a group, V vocabulary.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from spin_jax.data.chat import Chat
from spin_jax.data.records import Message
from spin_jax.kernels.layout import Layout
from spin_jax.models.architecture import Model, Params
from spin_jax.models.decoder import Decoder, Head, forward, output_head, project
from spin_jax.runtime import sharding
from spin_jax.runtime.sharding import round_up
from spin_jax.training.packing import Group, Rows, RowShape, packed

_CHUNK_LOGITS = 2**25  # logits of one chunk; float32: 128 MiB, or 1,024 tokens of a vocabulary of 32,768
_FEW_LOGITS = 2**21  # 8 MiB: fewer logits than these are computed in one chunk
_FEWEST_CHUNKS = 4  # of more logits than that: a chunk in which no response has a token costs nothing


def response_logps(decoder: Decoder, params: Params, rows: Rows) -> Float[Array, "N G A"]:
    """Σ log p(token | tokens before it) over the tokens of each answer, in nats and float32; 0 for no answer.

    It is differentiable in `params`. The same function scores the opponent and trains the policy.
    """
    hidden, _ = forward(decoder, params, rows.tokens, rows.layout)
    hidden = sharding.reshard(hidden, "batch", None, None)  # once in the forward pass, not for every chunk
    # The head is float32 outside of the loop, so that the gradients of the chunks are added up in float32.
    head = output_head(decoder, params).astype(jnp.float32)
    N, G, A = rows.lengths.shape

    def chunk_logps(predictors, targets, owners):
        logits, target_logits = _chunk_logits(hidden, head.astype(decoder.dtype), predictors, targets)
        token_logps = target_logits - jax.nn.logsumexp(logits, axis=-1)
        is_owner = owners[..., None] == jnp.arange(1, G * A + 1)
        return jnp.sum(jnp.where(is_owner, token_logps[..., None], 0.0), axis=1)

    def zeros(*_):
        return jnp.zeros((N, G * A), out_sharding=sharding.spec("batch", None))

    @jax.checkpoint  # the backward pass computes the logits again, so that they are never stored
    def add_chunk(total, chunk):
        has_tokens = jnp.any(chunk[-1] > 0)
        return total + jax.lax.cond(has_tokens, chunk_logps, zeros, *chunk), None

    chunks = _split_into_chunks(rows, decoder.config.vocab_size)
    total, _ = jax.lax.scan(add_chunk, zeros(), chunks)
    return total.reshape(N, G, A)


score_rows = jax.jit(response_logps, static_argnames="decoder")


def _chunk_logits(
    hidden: Float[Array, "N T D"], head: Head, predictors: Int[Array, "N C"], targets: Int[Array, "N C"]
) -> tuple[Float[Array, "N C V"], Float[Array, "N C"]]:
    """The logits at the C predictors of a chunk, and the logit of each one's target."""
    logits = project(sharding.take_tokens(hidden, predictors), head)
    # A masked sum needs no communication where the vocabulary is split over devices; a gather would.
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    return logits, jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)


def _split_into_chunks(rows: Rows, vocab_size: int) -> tuple[Array, Array, Array]:
    """Splits the response tokens: (predictors, targets, owners), each [chunks, N, columns]."""
    (N, R), shares = rows.owners.shape, sharding.context_shards()
    rows_per_shard = N // sharding.batch_shards()
    columns = max(1, min(_CHUNK_LOGITS * shares // (rows_per_shard * vocab_size), R))
    if rows_per_shard * R * vocab_size > _FEW_LOGITS * shares:
        columns = min(columns, -(-R // _FEWEST_CHUNKS))
    columns = round_up(columns, shares)
    count = -(-R // columns)

    def split(x: Int[Array, "N R"]) -> Int[Array, "chunks N columns"]:
        x = jnp.pad(x, ((0, 0), (0, count * columns - R)))
        return sharding.reshard(x.reshape(N, count, columns).swapaxes(0, 1), None, "batch", "tokens")

    return split(rows.predictors), split(rows.targets), split(rows.owners)


@functools.partial(jax.jit, static_argnames="decoder")
def score_tokens(decoder: Decoder, params: Params, rows: Rows) -> tuple[Float[Array, "N R"], Bool[Array, "N R"]]:
    """log p of each response token, and whether no other token was likelier; 0 and False where there is none.

    `lengths` and `items` of the rows are not read, and may be None.
    """
    hidden, _ = forward(decoder, params, rows.tokens, rows.layout)
    hidden, head = sharding.reshard(hidden, "batch", None, None), output_head(decoder, params)

    def chunk_scores(predictors, targets, owners):
        logits, target_logits = _chunk_logits(hidden, head, predictors, targets)
        greedy = target_logits >= jnp.max(logits, axis=-1)
        is_token = owners > 0
        logps = target_logits - jax.nn.logsumexp(logits, axis=-1)
        return jnp.where(is_token, logps, 0.0), greedy & is_token

    def zeros_and_false(predictors, *_):
        zeros = jnp.zeros(predictors.shape, out_sharding=sharding.spec("batch", "tokens"))
        return zeros, zeros > 0

    def score_chunk(chunk):
        return jax.lax.cond(jnp.any(chunk[-1] > 0), chunk_scores, zeros_and_false, *chunk)

    N, R = rows.owners.shape
    chunks = jax.lax.map(score_chunk, _split_into_chunks(rows, decoder.config.vocab_size))
    logps, greedy = (sharding.reshard(x, None, "batch", None).swapaxes(0, 1).reshape(N, -1)[:, :R] for x in chunks)
    return logps, greedy


def score_groups(
    decoder: Decoder,
    params: Params,
    groups: Sequence[Group],
    shape: RowShape,
    mesh: jax.sharding.Mesh,
    *,
    values_of: Callable[[Decoder, Params, Rows], Array] = score_rows,
    unattended: int | None = None,
    on_batch: Callable[[int], None] = lambda groups: None,
) -> Float[np.ndarray, "groups A"]:
    """Log-probabilities of the answers of any number of groups, in the order of the groups.

    Args:
        values_of: computes [N, G, A], other numbers than log-probabilities where it is not `score_rows`.
        unattended: a token id that no token attends to (only for `config.official`).
        on_batch: called after each micro-batch with the number of groups in it; it may raise to stop.

    Raises:
        ValueError: a group is longer than a row.
    """
    scores = np.zeros((len(groups), len(groups[0].answers)), np.float32)
    with jax.set_mesh(mesh):
        for rows in packed(groups, shape, unattended):
            values = sharding.to_host(values_of(decoder, params, sharding.put_batch(mesh, rows)))
            filled = rows.items > 0
            scores[rows.items[filled] - 1] = values[filled]
            on_batch(int(filled.sum()))
    return scores


@functools.partial(jax.jit, static_argnames="decoder")
def _logits(decoder: Decoder, params: Params, tokens: Int[Array, "B T"], layout: Layout) -> Float[Array, "B T V"]:
    hidden, _ = forward(decoder, params, tokens, layout)
    return project(hidden, output_head(decoder, params))


def logits(model: Model, tokens: ArrayLike) -> Float[Array, "B T V"]:
    """Next-token logits of right-padded token rows, in float32: entry [b, t] predicts token t + 1.

    Args:
        model: from `spin_jax.load`.
        tokens: int [B, T]; the padding at the right of a row does not change the logits before it.
    """
    tokens = np.asarray(tokens, np.int32)
    if tokens.ndim != 2:
        raise ValueError(f"tokens must be [B, T], not of shape {tokens.shape}")
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < model.config.vocab_size:
        raise ValueError(f"token ids must lie in [0, {model.config.vocab_size})")
    B, T = tokens.shape
    shards = sharding.batch_shards(model.mesh), sharding.context_shards(model.mesh)
    filled = np.zeros([*map(round_up, (B, T), shards)], np.int32)
    filled[:B, :T] = tokens
    layout = Layout(np.broadcast_to(np.arange(filled.shape[1], dtype=np.int32), filled.shape), np.ones_like(filled))
    with jax.set_mesh(model.mesh):
        placed = sharding.put_batch(model.mesh, (filled, layout))
        decoder = Decoder(model.config, dtype=model.dtype)
        host = sharding.to_host(_logits(decoder, model.params, *placed))[:B, :T]
    # The result is on one device and outside of the mesh, so that users can compute with it as they like.
    return jnp.asarray(host)


def score(model: Model, conversations: Sequence[list[Message]], *, batch_size: int = 8) -> Float[np.ndarray, " B"]:
    """Summed log p(last assistant turn | the conversation before it), in nats.

    Args:
        model: from `spin_jax.load`.
        conversations: lists of {"role", "content"}, each ending with an assistant's turn.
        batch_size: rows that the model runs at a time; a row has room for the longest conversation.

    Raises:
        ValueError: a conversation is malformed.
    """
    chat = Chat(model.tokenizer, model.stop_tokens)
    encoded = [chat.encode_checked(messages, number) for number, messages in enumerate(conversations)]
    if not encoded:
        return np.zeros(0, np.float32)
    groups = [Group(prompt, (response,)) for prompt, response in encoded]
    length = sharding.row_length(max(len(prompt) + len(response) for prompt, response in encoded), model.mesh)
    rows = round_up(min(batch_size, len(groups)), sharding.batch_shards(model.mesh))
    shape, decoder = RowShape(rows, length, -(-length // 8)), Decoder(model.config, dtype=model.dtype)
    return score_groups(decoder, model.params, groups, shape, model.mesh)[:, 0]
