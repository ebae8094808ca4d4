"""Sampling: the opponent answers prompts, by continuous batching.

Prompts wait in a queue, the shorter ones first; whenever enough slots are free the next ones are read into
them, and a few tokens are drawn for every slot at a time. A prompt's answer depends on its own key alone,
not on its slot or its company.
"""

import dataclasses
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from spin_jax import sharding
from spin_jax.batches import bucket, round_up
from spin_jax.chat import Chat, Ids, Message
from spin_jax.draw import KEYS, Sampling, prompt_keys
from spin_jax.model import Decoder, Model, ModelConfig, Params, sampling_params
from spin_jax.slots import NO_TOKEN, Slots, decode, new_slots, prefill, widened

DECODE_STEPS = 16  # tokens between two looks at which slots are done
_PREFILL_TOKENS = 4096


def answer_prompts(
    decoder: Decoder,
    params: Params,
    prompts: Sequence[Ids],
    keys: Array,
    *,
    mesh: jax.sharding.Mesh,
    sampling: Sampling,
    stop_tokens: tuple[int, ...],
    slots: int,
    limits: Sequence[int] | None = None,
    stopped: Callable[[int, list[int]], bool] | None = None,
    on_chunk: Callable[[int, int], None] = lambda prompts, tokens: None,
) -> list[Ids]:
    """Answers prompts of any lengths, the shorter ones first.

    Args:
        decoder: the model; `params` come from `sampling_params`.
        keys: one a prompt, from `prompt_keys`.
        slots: answers in progress at a time; rounded up to the mesh.
        limits: tokens of each answer, where they are less than `sampling.max_new_tokens`.
        stopped: asked now and then whether the answer to a prompt, by its number, can end with the tokens
            that it has; it may have some more than it needs.
        on_chunk: told the prompts answered and tokens sampled since it was called last; may raise to stop.

    Returns:
        the answers in the order of the prompts, each with its stop token if it met one.
    """
    if not len(prompts):
        return []
    shards = sharding.batch_shards(mesh)
    slots = round_up(slots, shards)
    size = prefill_rows(slots, max(map(len, prompts)), shards)
    most = np.full(len(prompts), sampling.max_new_tokens)
    most = most if limits is None else np.minimum(most, limits)
    key_data = np.asarray(jax.random.key_data(keys))
    waiting = deque(np.argsort([len(prompt) for prompt in prompts], kind="stable").tolist())
    answers: list[list[int]] = [[] for _ in prompts]
    holds = np.full(slots, -1)  # the prompt in each slot
    state: Any = None  # Slots, from the first prompts on
    # How many tokens at most is data to the programs: other limits compile nothing.
    how = {"sampling": dataclasses.replace(sampling, max_new_tokens=1), "stop_tokens": stop_tokens}

    with jax.set_mesh(mesh):
        while waiting or (holds >= 0).any():
            begun: list[tuple[list[int], np.ndarray, Array]] = []
            while waiting:
                rows, into = _places(holds < 0, size, shards)
                group = list(itertools.islice(waiting, len(rows)))
                if len(group) < min(len(waiting), 0.75 * size):
                    break
                rows = rows[: len(group)]
                P = bucket(len(prompts[group[-1]]))
                state = _with_columns(state, decoder, slots, _columns(decoder, prompts, most, group))
                places = np.full(size, slots, np.int32)
                places[rows] = into[: len(group)]
                filled = np.full(size, group[0])  # a filler row reads the first prompt
                filled[rows] = group
                arrays = (*_prompt_arrays(prompts, most, key_data, filled, P), places)
                tokens, lengths, room, data, placed = sharding.put_batch(mesh, arrays)
                state, first = prefill(
                    decoder,
                    params,
                    state,
                    tokens,
                    lengths,
                    room,
                    jax.random.wrap_key_data(data, impl=KEYS),
                    placed,
                    **how,
                )
                begun.append((group, rows, first))
                holds[rows // (size // shards) * (slots // shards) + places[rows]] = group
                for _ in group:
                    waiting.popleft()
            state, drawn = decode(decoder, params, state, steps=DECODE_STEPS, **how)
            sampled = 0
            for group, rows, first in begun:
                for i, token in zip(group, sharding.to_host(first)[rows], strict=True):
                    answers[i].append(int(token))
                sampled += len(group)
            done = sharding.to_host(state.done).copy()
            for slot, row in enumerate(sharding.to_host(drawn)):
                if (i := holds[slot]) >= 0:
                    new = row[row != NO_TOKEN].tolist()
                    answers[i] += new
                    sampled += len(new)
                    # On the device such a slot goes on, unread, until another prompt takes it.
                    done[slot] |= stopped is not None and stopped(int(i), answers[i])
            finished = (holds >= 0) & done
            holds[finished] = -1
            on_chunk(int(finished.sum()), sampled)
    return [np.asarray(answer, np.int32) for answer in answers]


def prefill_rows(slots: int, longest: int, shards: int) -> int:
    """Prompts read at a time: few, so that slots do not wait for company, but some thousand tokens' worth."""
    return round_up(max(1, min(slots // 4, _PREFILL_TOKENS // bucket(longest))), shards)


def _places(free: np.ndarray, size: int, shards: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows of a prefill, the free slot that each goes to, counted within its shard), to be filled in order.

    A row stays on its device: its cache need not travel. The shards with most free slots come first.
    """
    free = free.reshape(shards, -1)
    each = size // shards
    order = np.argsort(-free.sum(axis=1), kind="stable")
    slots = [np.flatnonzero(own)[:each] for own in free]
    chosen = [
        (s * each + turn, slots[s][turn]) for turn in range(each) for s in order if turn < len(slots[s])
    ]
    rows, into = np.array(chosen, np.int32).reshape(-1, 2).T
    return rows, into


def _prompt_arrays(prompts, most, key_data, filled: np.ndarray, P: int) -> tuple[np.ndarray, ...]:
    """(tokens [rows, P] padded on the left, lengths, limits, key data) of the prompts of those numbers."""
    tokens = np.zeros((len(filled), P), np.int32)
    for row, i in enumerate(filled):
        tokens[row, P - len(prompts[i]) :] = prompts[i]
    lengths = np.array([len(prompts[i]) for i in filled], np.int32)
    return tokens, lengths, most[filled].astype(np.int32), key_data[filled]


def _columns(decoder: Decoder, prompts, most, group: list[int]) -> int:
    """Columns that the answers of a group need."""
    longest = max(len(prompts[i]) + int(most[i]) for i in group)
    return cache_columns(decoder.config, longest)


def cache_columns(config: ModelConfig, longest: int) -> int:
    """Columns of a cache for so many tokens: never more than the model's window."""
    return min(bucket(longest), config.longest_window or bucket(longest))


def _with_columns(state: Slots | None, decoder: Decoder, slots: int, columns: int) -> Slots:
    if state is None:
        return new_slots(decoder, slots, columns)
    return state if columns <= state.cache.columns else widened(state, columns)


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
    answers = answer_prompts(
        Decoder(model.config, dtype=model.dtype),
        sampling_params(model.params, model.config, model.dtype, model.mesh),
        prompts,
        prompt_keys(seed, 0, range(len(prompts))),
        mesh=model.mesh,
        sampling=Sampling(max_new_tokens, temperature, top_k, top_p),
        stop_tokens=model.stop_tokens,
        slots=min(batch_size, len(prompts)),
    )
    return [chat.decode(answer) for answer in answers]
