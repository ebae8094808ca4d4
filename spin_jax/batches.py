"""Batches of fixed shapes, made in NumPy: nothing here touches a device.

Axes: B sequences or pairs, T tokens, R response tokens. The fields of a batch are NumPy arrays on the
host and JAX arrays in a step.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from spin_jax.chat import Example, Ids, Pair


class RowShape(NamedTuple):
    """What every row of a run is padded to."""

    length: int  # T
    response: int  # R: only so many positions are projected to the vocabulary


class Rows(NamedTuple):
    """Sequences of one padded length; the model's arguments and which tokens are a response."""

    tokens: Any  # int32 [B, T]
    positions: Any  # int32 [B, T]
    segments: Any  # int32 [B, T]: 1, padding 0, −1 seen by no other token
    response: Any  # int32 [B, R]: where the response's tokens stand; 0 is none


class SFTBatch(NamedTuple):
    """B sequences; `weight` is 0 for those that only fill the last batch."""

    rows: Rows  # B sequences
    weight: Any  # float32 [B]


class PairBatch(NamedTuple):
    """B pairs; row 2i is the human answer of pair i, row 2i + 1 the generated one."""

    rows: Rows  # 2B sequences
    opponent: Any  # float32 [B, 2]: the opponent's log-probs of (real, generated)
    identical: Any  # float32 [B]: 1 where both answers are the same ids
    weight: Any  # float32 [B]


class ScoredPair(NamedTuple):
    pair: Pair
    opponent: tuple[float, float]


def bucket(length: int) -> int:
    """`length` rounded up to 16, 24, 32, 48, 64, 96, …: few shapes, at most half of one wasted."""
    size = 16
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def pad_rows(sequences: Sequence[tuple[Ids, Ids]], shape: RowShape, unattended: int | None = None) -> Rows:
    """(prompt, response) sequences, padded on the right.

    Raises:
        ValueError: a sequence is longer than the rows, or its response than theirs.
    """
    tokens, positions, segments = (np.zeros((len(sequences), shape.length), np.int32) for _ in range(3))
    rows = Rows(tokens, positions, segments, np.zeros((len(sequences), shape.response), np.int32))
    for i, (prompt, response) in enumerate(sequences):
        ids = np.concatenate([prompt, response])
        n = len(ids)
        if n > shape.length or len(response) > shape.response:
            raise ValueError(f"a sequence of {len(prompt)} + {len(response)} tokens does not fit {shape}")
        rows.tokens[i, :n] = ids
        rows.positions[i, :n] = np.arange(n)
        rows.segments[i, :n] = 1
        if unattended is not None:
            hidden = np.flatnonzero(ids[: n - 1] == unattended)
            rows.segments[i, hidden] = -1
        rows.response[i, : len(response)] = np.arange(len(prompt), n)
    return rows


def _fill(items: Sequence, size: int) -> tuple[list, np.ndarray]:
    """Repeats the first item up to `size`, with weight zero."""
    weight = np.zeros(size, np.float32)
    weight[: len(items)] = 1
    return [*items, *[items[0]] * (size - len(items))], weight


def sft_batch(
    examples: Sequence[Example], size: int, shape: RowShape, unattended: int | None = None
) -> SFTBatch:
    filled, weight = _fill(examples, size)
    return SFTBatch(pad_rows([(e.prompt, e.real) for e in filled], shape, unattended), weight)


def pair_batch(
    scored: Sequence[ScoredPair], size: int, shape: RowShape, unattended: int | None = None
) -> PairBatch:
    filled, weight = _fill(scored, size)
    sequences = [(s.pair.prompt, answer) for s in filled for answer in (s.pair.real, s.pair.generated)]
    return PairBatch(
        rows=pad_rows(sequences, shape, unattended),
        opponent=np.array([s.opponent for s in filled], np.float32),
        identical=np.array([s.pair.identical for s in filled], np.float32),
        weight=weight,
    )


def microbatches(batch: Any, count: int) -> Any:
    """Splits the leading axis of every array into [count, n / count]: what gradients accumulate over."""
    if isinstance(batch, np.ndarray):
        return batch.reshape(count, -1, *batch.shape[1:])
    return type(batch)(*(microbatches(part, count) for part in batch))


def real_rows(batch: SFTBatch | PairBatch) -> np.ndarray:
    """Which rows of a batch are no filler: bool, shaped as the rows are."""
    return np.repeat(batch.weight > 0, batch.rows.tokens.shape[-2] // batch.weight.shape[-1], axis=-1)


def training_steps(examples: int, batch_size: int, epochs: int) -> int:
    """Optimizer steps of a run; the last batch of an epoch may be short."""
    return -(-examples // batch_size) * epochs


def batches(
    items: Sequence,
    collate: Callable[[Sequence], Any],
    batch_size: int,
    *,
    seed: int,
    epochs: int,
    start: int,
) -> Iterator[Any]:
    """The batches of steps `start`, `start` + 1, …: a pure function of seed and step.

    Every epoch is a new permutation of all items; grain's threads collate ahead of the steps.
    """
    dataset = (
        grain.MapDataset.source(range(len(items)))
        .seed(seed)
        .shuffle()
        .batch(batch_size, batch_fn=lambda chosen: collate([items[i] for i in chosen]))
        .repeat(epochs)
    )
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
    return iter(dataset[start:].to_iter_dataset(options))
