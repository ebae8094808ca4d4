"""Continuous batching: many prompts are answered in a fixed number of slots.

Prompts wait in a queue, the shorter ones first. Whenever enough slots are free, the next prompts are read into them;
then a few tokens are drawn for every slot. An answer depends on its prompt and its key alone, not on its slot or on
the other answers. Equal prompts, as K samples have them, are read once: the cache of such prompts is kept on the device
until each of their answers has had a slot to begin in.
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
from spin_jax.sampling.slots import NO_TOKEN, begin_answers, decode, new_slots, prefill, read_prompts, widen

DECODE_STEPS = 8  # tokens that a call of `decode` draws for each slot
_PREFILL_TOKENS = 4096  # prompt tokens that a call of `prefill` reads
_FLASH_PREFILL_TOKENS = 8192  # the same with the flash kernel, for each device
_MOST_DISTINCT = 0.75  # of the prompts; where more are distinct, reading the equal ones once is not worth two programs


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
        prompts: one for each answer. If at most three quarters of them are distinct, equal ones are read once.
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
        while queue.unfinished:
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
    """The prompts that wait, the answers in progress and the finished answers.

    An answer has the number of its prompt. Equal prompts that are read once have the number of the first.
    """

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
        equal: dict[bytes, list[int]] = {}
        for i, prompt in enumerate(self.prompts):
            equal.setdefault(np.asarray(prompt, np.int32).tobytes(), []).append(i)
        self.shares = len(equal) <= _MOST_DISTINCT * len(self.prompts)
        self.answers_to = {same[0]: same for same in equal.values()}  # the answers to each prompt that is read once
        numbers = np.array(list(self.answers_to) if self.shares else range(len(self.prompts)))
        self.waiting = deque(numbers[np.argsort(self.lengths[numbers], kind="stable")].tolist())
        self.answers: list[list[int]] = [[] for _ in self.prompts]
        self.answer_in_slot = np.full(self.slots, -1)  # −1: the slot is free
        self.state: Any = None  # Slots, once the first prompts have been read
        self.in_memory: Any = None  # the last Prompts that were read, if equal ones are read once
        # Their answers that have not begun, on each shard: (row of the prompt, counted within the shard; answer).
        self.unbegun: list[deque[tuple[int, int]]] = [deque() for _ in range(self.shards)]
        # The answers that have begun since the last call of `decode`, for each call of a program that begins some:
        # (answers, the place of each among the program's, first token at every place).
        self.begun: list[tuple[list[int], np.ndarray, Any]] = []
        # The calls of `decode` whose tokens have not been read: (answers begun before, answer in each slot, tokens).
        self.unread: deque[tuple[list, np.ndarray, Any]] = deque()

    @property
    def unfinished(self) -> bool:
        """Whether there is an answer that is in progress or has not begun."""
        return bool(self.waiting or any(self.unbegun) or (self.answer_in_slot >= 0).any())

    def fill_slots(self) -> None:
        """Begins answers, as long as there are enough of them and of free slots."""
        begin = self._begin_shared if self.shares else self._read_and_begin
        while begin():
            pass

    def _read_and_begin(self) -> bool:
        """Reads prompts into free slots, one for each; returns whether there was enough of both."""
        if not self.waiting:
            return False
        P, size = self._next_shape()
        rows, free_slots = _rows_and_free_slots(self.answer_in_slot < 0, size, self.shards)
        group = list(itertools.islice(self.waiting, len(rows)))
        if len(group) < min(len(self.waiting), 0.75 * size):
            return False
        rows = rows[: len(group)]
        self._begin(prefill, self._on_device(group, rows, P, size), group, rows, free_slots[: len(group)], size)
        for _ in group:
            self.waiting.popleft()
        return True

    def _begin_shared(self) -> bool:
        """Begins answers to the prompts in memory; returns whether there were any, and enough free slots.

        The next prompts are read when all answers to the last ones have begun, so that the caches of few are kept.
        """
        free = self.answer_in_slot < 0
        if not free.any():
            return False
        if not any(self.unbegun):
            if not self.waiting:
                return False
            self._read_next()
        size = prefill_rows(self.slots, self.in_memory.columns, self.shards, self.decoder.kernel)
        places, free_slots = _rows_and_free_slots(free, size, self.shards)
        each, left = size // self.shards, np.array([len(answers) for answers in self.unbegun])
        usable = places % each < left[places // each]  # a slot is for a prompt of its own shard
        # As many as there would be with all slots free: to ask for more would be to wait for ever.
        if usable.sum() < 0.75 * np.minimum(left, each).sum():
            return False
        places, free_slots = places[usable], free_slots[usable]
        rows, answers = zip(*(self.unbegun[shard].popleft() for shard in places // each), strict=True)
        row_at = np.zeros(size, np.int32)
        row_at[places] = rows
        read = self.in_memory, sharding.put_batch(self.mesh, row_at)
        self._begin(begin_answers, read, list(answers), places, free_slots, size)
        if not any(self.unbegun):
            self.in_memory = None  # there may be no room for the next ones beside them
        return True

    def _read_next(self) -> None:
        """Reads the next prompts, spread evenly over the shards.

        Where they are too few for all rows, the other rows read some of them again in place of padding, so that
        answers to few prompts begin on all shards.
        """
        P, size = self._next_shape()
        size = min(size, round_up(len(self.answers_to), self.shards))
        group = [self.waiting.popleft() for _ in range(min(size, len(self.waiting)))]
        rows, _ = _rows_and_free_slots(np.ones(size, bool), size, self.shards)
        arrays = self._on_device([group[n % len(group)] for n in range(size)], rows, P, size)
        self.in_memory = read_prompts(self.decoder, self.params, *arrays)
        for n, i in enumerate(group):
            for answer, row in zip(self.answers_to[i], itertools.cycle(rows[n :: len(group)])):
                shard, row_of_shard = divmod(int(row), size // self.shards)
                self.unbegun[shard].append((row_of_shard, answer))

    def _on_device(self, prompts: list[int], rows: np.ndarray, P: int, size: int) -> tuple[Any, Any]:
        """(tokens [size, P], padded on the left; lengths [size]); a row of padding has the first prompt."""
        prompt_in_row = np.full(size, prompts[0])
        prompt_in_row[rows] = prompts
        tokens = np.zeros((size, P), np.int32)
        for row, i in zip(tokens, prompt_in_row, strict=True):
            row[P - self.lengths[i] :] = self.prompts[i]
        return sharding.put_batch(self.mesh, (tokens, self.lengths[prompt_in_row]))

    def _begin(
        self, program: Any, read: tuple, answers: list[int], places: np.ndarray, free_slots: np.ndarray, size: int
    ) -> None:
        """Begins answers in free slots by `prefill` or `begin_answers`.

        Args:
            read: the program's arguments for the prompts.
            places: where the answers stand among the `size` answers of the program; the others are padding.
            free_slots: the slot of each answer, counted within its shard.
        """
        longest = int((self.lengths[answers] + self.max_tokens[answers]).max())
        self._widen(cache_columns(self.decoder.config, longest))
        into = np.full(size, self.slots, np.int32)  # past the end: padding fills no slot
        into[places] = free_slots
        answer_at = np.full(size, answers[0])
        answer_at[places] = answers
        arrays = self.max_tokens[answer_at], self.key_data[answer_at], into
        limits, key_data, into_sharded = sharding.put_batch(self.mesh, arrays)
        keys = jax.random.wrap_key_data(key_data, impl=KEYS)
        self.state, first_tokens = program(
            self.decoder, self.params, self.state, *read, limits, keys, into_sharded, **self.options
        )
        self.begun.append((answers, places, sharding.everywhere(first_tokens)))
        first_slots = places // (size // self.shards) * (self.slots // self.shards)  # of each place's shard
        self.answer_in_slot[first_slots + free_slots] = answers

    def _next_shape(self) -> tuple[int, int]:
        """The shape of the prompts that are read next: (tokens that they are padded to, rows)."""

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
        self.unread.append((self.begun, self.answer_in_slot.copy(), sharding.everywhere(tokens)))
        self.begun = []

    def read(self, stopped: Callable[[int, list[int]], bool] | None) -> tuple[int, int]:
        """Waits for the oldest call's tokens and frees slots; returns (prompts answered, tokens sampled)."""
        (begun, answer_in_slot, tokens), answered, sampled = self.unread.popleft(), 0, 0
        for numbers, places, first_tokens in begun:
            for i, token in zip(numbers, np.asarray(first_tokens)[places], strict=True):
                self.answers[i].append(int(token))
            sampled += len(numbers)
        for slot, (i, row) in enumerate(zip(answer_in_slot.tolist(), np.asarray(tokens), strict=True)):
            if i < 0 or self.answer_in_slot[slot] != i:  # the slot was freed after this call was enqueued
                continue
            answer, new = self.answers[i], row[row != NO_TOKEN].tolist()
            answer += new
            sampled += len(new)
            done = answer[-1] in self.options["stop_tokens"] or len(answer) >= self.max_tokens[i]
            # An answer that `stopped` ends goes on in its slot, unread, until another one takes the slot.
            if done or (stopped is not None and stopped(i, answer)):
                self.answer_in_slot[slot] = -1
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
