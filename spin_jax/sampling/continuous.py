"""Continuous batching: many prompts are answered in a fixed number of slots.

Prompts wait in a queue, the shorter ones first. Whenever enough slots are free, the next prompts are read into them;
then a few tokens are drawn for every slot. An answer depends on its prompt and its key alone, not on its slot or on
the other answers.
"""

import dataclasses
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from spin_jax.data.records import Ids
from spin_jax.models.architecture import ModelConfig, Params
from spin_jax.models.decoder import Decoder
from spin_jax.runtime import sharding
from spin_jax.runtime.sharding import bucket, round_up
from spin_jax.sampling.next_token import KEYS, Sampling
from spin_jax.sampling.slots import NO_TOKEN, decode, new_slots, prefill, widen

DECODE_STEPS = 8  # tokens that a call of `decode` draws for each slot
_PREFILL_TOKENS = 4096  # prompt tokens that a call of `prefill` reads
_FLASH_PREFILL_TOKENS = 8192  # the same with the flash kernel, for each device


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
    """Answers prompts of any lengths, and returns the answers in their order; one that met a stop token ends with it.

    Args:
        decoder: the model; `params` come from `sampling_params`.
        keys: a random key for each prompt, from `prompt_keys`.
        slots: answers in progress at a time, rounded up to a multiple of the mesh's batch shards.
        limits: the most tokens of each answer, where this is less than `sampling.max_new_tokens`.
        stopped: called now and then with a prompt's number and the tokens of its answer so far; it returns whether
            the answer may end. The answer may have a few more tokens than it needs.
        on_chunk: called with the numbers of prompts answered and tokens sampled since the last call; it may raise to
            stop.
    """
    if not len(prompts):
        return []
    max_tokens = np.full(len(prompts), sampling.max_new_tokens)
    max_tokens = (max_tokens if limits is None else np.minimum(max_tokens, limits)).astype(np.int32)
    # The programs get the limits as arrays, so that other limits compile nothing.
    options = {"sampling": dataclasses.replace(sampling, max_new_tokens=1), "stop_tokens": stop_tokens}
    key_data = np.asarray(jax.random.key_data(keys))
    queue = _Queue(decoder, params, prompts, key_data, max_tokens, mesh, slots, options)
    with jax.set_mesh(mesh):
        while queue.waiting or (queue.prompt_in_slot >= 0).any():
            queue.fill_slots()
            queue.decode()
            if len(queue.unread) > runs_ahead(mesh):
                on_chunk(*queue.read(stopped))
    return [np.asarray(answer, np.int32) for answer in queue.answers]


def runs_ahead(mesh: jax.sharding.Mesh) -> bool:
    """Whether the next call of `decode` is enqueued before the tokens of the last one are read.

    An accelerator then never waits for its host; in return, a finished slot stays empty for one call more. A CPU is
    its own host, where the calls for finished slots would cost more than the waiting.
    """
    return mesh.devices.flat[0].platform != "cpu"


def fixed_steps(mesh: jax.sharding.Mesh) -> bool:
    """Whether a call of `decode` always runs all its steps, so that a GPU need not wait for its host."""
    return mesh.devices.flat[0].platform in ("gpu", "cuda")


@dataclasses.dataclass
class _Queue:
    """The prompts that wait, the answers in progress and the finished answers, by the prompts' numbers."""

    decoder: Decoder
    params: Params
    prompts: Sequence[Ids]
    key_data: np.ndarray
    max_tokens: np.ndarray
    mesh: jax.sharding.Mesh
    slots: int
    options: dict[str, Any]

    def __post_init__(self):
        self.shards = sharding.batch_shards(self.mesh)
        self.slots = round_up(self.slots, self.shards)
        self.lengths = np.array([len(prompt) for prompt in self.prompts], np.int32)
        self.waiting = deque(np.argsort(self.lengths, kind="stable").tolist())
        self.answers: list[list[int]] = [[] for _ in self.prompts]
        self.prompt_in_slot = np.full(self.slots, -1)  # −1: the slot is free
        self.state: Any = None  # Slots, once the first prompts have been read
        # The calls of `prefill` since the last call of `decode`: (prompts, the row of each, first token of every row).
        self.prefills: list[tuple[list[int], np.ndarray, Any]] = []
        # The calls of `decode` whose tokens have not been read: (prefills before it, prompt in each slot, tokens).
        self.unread: deque[tuple[list, np.ndarray, Any]] = deque()

    def fill_slots(self) -> None:
        """Reads prompts into free slots, as long as there are enough of both."""
        while self.waiting:
            P, size = self._next_shape()
            rows, free_slots = _rows_and_free_slots(self.prompt_in_slot < 0, size, self.shards)
            group = list(itertools.islice(self.waiting, len(rows)))
            if len(group) < min(len(self.waiting), 0.75 * size):
                break
            rows = rows[: len(group)]
            longest = int((self.lengths[group] + self.max_tokens[group]).max())
            self._widen(cache_columns(self.decoder.config, longest))
            into = np.full(size, self.slots, np.int32)  # past the end: a row of padding fills no slot
            into[rows] = free_slots[: len(group)]
            prompt_in_row = np.full(size, group[0])  # a row of padding reads the first prompt
            prompt_in_row[rows] = group
            tokens = np.zeros((size, P), np.int32)  # padded on the left
            for row, i in zip(tokens, prompt_in_row, strict=True):
                row[P - self.lengths[i] :] = self.prompts[i]
            arrays = (x[prompt_in_row] for x in (self.lengths, self.max_tokens, self.key_data))
            *arrays, key_data, into_sharded = sharding.put_batch(self.mesh, (tokens, *arrays, into))
            keys = jax.random.wrap_key_data(key_data, impl=KEYS)
            self.state, first_tokens = prefill(
                self.decoder, self.params, self.state, *arrays, keys, into_sharded, **self.options
            )
            self.prefills.append((group, rows, sharding.everywhere(first_tokens)))
            first_slots = rows // (size // self.shards) * (self.slots // self.shards)  # of each row's shard
            self.prompt_in_slot[first_slots + into[rows]] = group
            for _ in group:
                self.waiting.popleft()

    def _next_shape(self) -> tuple[int, int]:
        """The shape of the next prefill: (tokens that its prompts are padded to, rows)."""

        def shape(number: int) -> tuple[int, int]:
            """The shape if the longest prompt is the one at this place of the queue."""
            P = bucket(int(self.lengths[self.waiting[number]]))
            return P, prefill_rows(self.slots, P, self.shards, self.decoder.kernel)

        _, rows = shape(0)
        return shape(min(rows, len(self.waiting)) - 1)

    def _widen(self, columns: int) -> None:
        """Gives the cache at least so many columns."""
        if self.state is None:
            self.state = new_slots(self.decoder, self.slots, columns)
        elif columns > self.state.cache.columns:
            self.state = widen(self.state, columns)

    def decode(self) -> None:
        """Enqueues the next tokens of all slots."""
        options = {**self.options, "steps": DECODE_STEPS, "fixed": fixed_steps(self.mesh)}
        self.state, tokens = decode(self.decoder, self.params, self.state, **options)
        self.unread.append((self.prefills, self.prompt_in_slot.copy(), sharding.everywhere(tokens)))
        self.prefills = []

    def read(self, stopped: Callable[[int, list[int]], bool] | None) -> tuple[int, int]:
        """Waits for the oldest call's tokens and frees slots; returns (prompts answered, tokens sampled)."""
        (prefills, prompt_in_slot, tokens), answered, sampled = self.unread.popleft(), 0, 0
        for group, rows, first_tokens in prefills:
            for i, token in zip(group, np.asarray(first_tokens)[rows], strict=True):
                self.answers[i].append(int(token))
            sampled += len(group)
        for slot, (i, row) in enumerate(zip(prompt_in_slot.tolist(), np.asarray(tokens), strict=True)):
            if i < 0 or self.prompt_in_slot[slot] != i:  # the slot was freed after this call was enqueued
                continue
            answer, new = self.answers[i], row[row != NO_TOKEN].tolist()
            answer += new
            sampled += len(new)
            done = answer[-1] in self.options["stop_tokens"] or len(answer) >= self.max_tokens[i]
            # An answer that `stopped` ends goes on in its slot, unread, until another prompt takes the slot.
            if done or (stopped is not None and stopped(i, answer)):
                self.prompt_in_slot[slot] = -1
                answered += 1
        return answered, sampled


def prefill_rows(slots: int, longest: int, shards: int, kernel: str) -> int:
    """How many prompts a call of `prefill` reads.

    They are few, so that free slots wait only briefly, but have some thousand tokens, where the longest prompt has
    `longest`: with the kernel `flash` on each device, otherwise on all together, because plain attention stores its
    scores.
    """
    if kernel == "flash":
        return shards * max(1, min(slots // shards // 4, _FLASH_PREFILL_TOKENS // bucket(longest)))
    return round_up(max(1, min(slots // 4, _PREFILL_TOKENS // bucket(longest))), shards)


def _rows_and_free_slots(free: np.ndarray, size: int, shards: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows of a prefill in the order to fill them, and the free slot of each, counted within its shard.

    A row's slot is on the row's own device, so that its cache is not moved between devices. The shards with the most
    free slots come first.
    """
    free, each = free.reshape(shards, -1), size // shards
    order = np.argsort(-free.sum(axis=1), kind="stable")
    slots = [np.flatnonzero(of_shard)[:each] for of_shard in free]
    chosen = [(s * each + turn, slots[s][turn]) for turn in range(each) for s in order if turn < len(slots[s])]
    rows, into = np.array(chosen, np.int32).reshape(-1, 2).T
    return rows, into


def cache_columns(config: ModelConfig, longest: int) -> int:
    """The columns of a cache for sequences of up to `longest` tokens; never more than the model's window."""
    return min(bucket(longest), config.longest_window or bucket(longest))
