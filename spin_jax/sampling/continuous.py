"""Sampling: the opponent answers prompts, by continuous batching.

Prompts wait in a queue, the shorter ones first; whenever enough slots are free the next ones are read into
them, and a few tokens are drawn for every slot at a time. A prompt's answer depends on its own key alone,
not on its slot or its company.
"""

import dataclasses
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from spin_jax.data.records import Ids
from spin_jax.models.architecture import ModelConfig, Params
from spin_jax.models.decoder import Decoder
from spin_jax.runtime import sharding
from spin_jax.runtime.sharding import bucket, round_up
from spin_jax.sampling.next_token import KEYS, Sampling
from spin_jax.sampling.slots import NO_TOKEN, Slots, decode, new_slots, prefill, widened

DECODE_STEPS = 8  # tokens between two looks at which slots are done
_PREFILL_TOKENS, _FLASH_PREFILL_TOKENS = 4096, 8192  # the latter of each device


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
    most = np.full(len(prompts), sampling.max_new_tokens)
    most = most if limits is None else np.minimum(most, limits)
    # How many tokens at most is data to the programs: other limits compile nothing.
    how = {"sampling": dataclasses.replace(sampling, max_new_tokens=1), "stop_tokens": stop_tokens}
    queue = _Queue(decoder, params, prompts, np.asarray(jax.random.key_data(keys)), most, mesh, slots, how)
    with jax.set_mesh(mesh):
        while queue.waiting or (queue.holds >= 0).any():
            queue.begin()
            queue.decode()
            if len(queue.unread) > runs_ahead(mesh):
                on_chunk(*queue.read(stopped))
    return [np.asarray(answer, np.int32) for answer in queue.answers]


def runs_ahead(mesh: jax.sharding.Mesh) -> bool:
    """Whether a call of `decode` is enqueued before the last one's tokens are read.

    An accelerator then never waits for its host, and a slot for one call more until another prompt takes it.
    A CPU is its own host: the calls that are made for nothing would cost more than the waiting.
    """
    return mesh.devices.flat[0].platform != "cpu"


def fixed_steps(mesh: jax.sharding.Mesh) -> bool:
    """Whether a call of `decode` makes all its steps, so that a GPU runs them without asking its host."""
    return mesh.devices.flat[0].platform in ("gpu", "cuda")


_Begun = tuple[list[int], np.ndarray, Any]  # of a prefill: prompts, their rows, all rows' first tokens


class _Call(NamedTuple):
    """A call of `decode` whose tokens have not been read."""

    begun: list[_Begun]  # just before it
    holds: np.ndarray  # the prompt in each slot, −1 in a free one
    drawn: Any


class _Queue:
    """Prompts that wait, answers in progress, and answers."""

    def __init__(
        self,
        decoder: Decoder,
        params: Params,
        prompts: Sequence[Ids],
        key_data: np.ndarray,
        most: np.ndarray,
        mesh: jax.sharding.Mesh,
        slots: int,
        how: dict[str, Any],
    ):
        self.decoder, self.params, self.mesh, self.how = decoder, params, mesh, how
        self.prompts, self.key_data, self.most = prompts, key_data, most
        self.shards = sharding.batch_shards(mesh)
        self.waiting = deque(np.argsort([len(prompt) for prompt in prompts], kind="stable").tolist())
        self.answers: list[list[int]] = [[] for _ in prompts]
        self.holds = np.full(round_up(slots, self.shards), -1)  # the prompt in each slot
        self.state: Any = None  # Slots, from the first prompts on
        self.begun: list[_Begun] = []  # since the last call of `decode`
        self.unread: deque[_Call] = deque()

    def begin(self) -> None:
        """Reads prompts into free slots, as long as there are enough of both."""
        slots, shards = len(self.holds), self.shards
        while self.waiting:
            P, size = self._next_shape()
            rows, into = _places(self.holds < 0, size, shards)
            group = list(itertools.islice(self.waiting, len(rows)))
            if len(group) < min(len(self.waiting), 0.75 * size):
                break
            rows = rows[: len(group)]
            columns = _columns(self.decoder, self.prompts, self.most, group)
            self.state = _with_columns(self.state, self.decoder, slots, columns)
            places = np.full(size, slots, np.int32)
            places[rows] = into[: len(group)]
            filled = np.full(size, group[0])  # a filler row reads the first prompt
            filled[rows] = group
            arrays = (*_prompt_arrays(self.prompts, self.most, self.key_data, filled, P), places)
            *arrays, data, placed = sharding.put_batch(self.mesh, arrays)
            keys = jax.random.wrap_key_data(data, impl=KEYS)
            self.state, first = prefill(
                self.decoder, self.params, self.state, *arrays, keys, placed, **self.how
            )
            self.begun.append((group, rows, sharding.everywhere(first)))
            self.holds[rows // (size // shards) * (slots // shards) + places[rows]] = group
            for _ in group:
                self.waiting.popleft()

    def _next_shape(self) -> tuple[int, int]:
        """(tokens that the next prompts are padded to, rows of the program that reads them)."""

        def rows(P: int) -> int:
            return prefill_rows(len(self.holds), P, self.shards, self.decoder.kernel)

        def padded(number: int) -> int:
            return bucket(len(self.prompts[self.waiting[number]]))

        P = padded(min(rows(padded(0)), len(self.waiting)) - 1)
        return P, rows(P)

    def decode(self) -> None:
        """Enqueues the next tokens of all slots."""
        how = {**self.how, "steps": DECODE_STEPS, "fixed": fixed_steps(self.mesh)}
        self.state, drawn = decode(self.decoder, self.params, self.state, **how)
        self.unread.append(_Call(self.begun, self.holds.copy(), sharding.everywhere(drawn)))
        self.begun = []

    def read(self, stopped: Callable[[int, list[int]], bool] | None) -> tuple[int, int]:
        """Waits for the oldest call's tokens and frees slots; returns (prompts answered, tokens sampled)."""
        call, answered, sampled = self.unread.popleft(), 0, 0
        for group, rows, first in call.begun:
            for i, token in zip(group, np.asarray(first)[rows], strict=True):
                self.answers[i].append(int(token))
            sampled += len(group)
        for slot, row in enumerate(np.asarray(call.drawn)):
            i = int(call.holds[slot])
            if i < 0 or self.holds[slot] != i:  # freed since the call was made: its tokens are no one's
                continue
            answer, new = self.answers[i], row[row != NO_TOKEN].tolist()
            answer += new
            sampled += len(new)
            done = answer[-1] in self.how["stop_tokens"] or len(answer) >= self.most[i]
            # One that is only `stopped` goes on in its slot, unread, until another prompt takes it.
            if done or (stopped is not None and stopped(i, answer)):
                self.holds[slot] = -1
                answered += 1
        return answered, sampled


def prefill_rows(slots: int, longest: int, shards: int, kernel: str) -> int:
    """Prompts read at a time: few, so that slots do not wait for company, but some thousand tokens' worth.

    Args:
        longest: tokens of the longest one.
        kernel: of attention. `flash` reads as many on each device; of plain attention's scores one device
            has no room for so many.
    """
    if kernel == "flash":
        return shards * max(1, min(slots // shards // 4, _FLASH_PREFILL_TOKENS // bucket(longest)))
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
