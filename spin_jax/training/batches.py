"""The batches of a training step: as many micro-batches of one fixed shape as its groups need."""

import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np

from spin_jax.data.records import Pair
from spin_jax.losses import PAIR
from spin_jax.models.architecture import ModelConfig
from spin_jax.models.cost import forward_flops
from spin_jax.training.packing import Rows, RowShape, packed, pair_group


class PairBatch(NamedTuple):
    """Rows of pairs; answer 0 is the human one, answer 1 the generated one, unless a loss has other roles."""

    rows: Rows
    opponent: Any  # float32 [N, G, A]: the opponent's log-probs of each role's answer
    identical: Any  # float32 [N, G]: 1 where the human and the generated answer are the same ids
    score: Any  # float32 [N, G]: what a scorer gave the generated one, 0 without


class ScoredPair(NamedTuple):
    pair: Pair
    opponent: tuple[float, ...]  # log-probs of each role's answer


def pair_batches(
    scored: Sequence[ScoredPair],
    shape: RowShape,
    unattended: int | None = None,
    roles: Sequence[str] = PAIR,
) -> list[PairBatch]:
    """As many micro-batches as the pairs need."""
    opponent = np.array([[0.0] * len(roles), *(s.opponent for s in scored)], np.float32)
    identical = np.array([0.0, *(s.pair.identical for s in scored)], np.float32)
    score = np.array([0.0, *(s.pair.score or 0.0 for s in scored)], np.float32)
    rows = packed([pair_group(s.pair, roles) for s in scored], shape, unattended)
    return [PairBatch(part, opponent[part.items], identical[part.items], score[part.items]) for part in rows]


def filled_tokens(batch: Rows | PairBatch) -> int:
    """Tokens that are no padding, a shared prompt's counted once."""
    rows = batch.rows if isinstance(batch, PairBatch) else batch
    return int(np.count_nonzero(rows.layout.segments))


def stacked(parts: Sequence[Any], count: int) -> Any:
    """Micro-batches [N, …] → one step's batch [count, N, …]; those that are missing are empty: zeros."""

    def stack(*arrays: np.ndarray) -> np.ndarray:
        return np.stack([*arrays, *[np.zeros_like(arrays[0])] * (count - len(arrays))])

    return jax.tree.map(stack, *parts)


def as_npz(batch: Any, decode: Callable[[list[list[int]]], list[str]]) -> bytes:
    """A step's batch for people and numpy.load: its arrays [M, N, …], and each row's `text`."""
    flat, _ = jax.tree_util.tree_flatten_with_path(batch)
    arrays = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in flat}
    tokens = next(array for name, array in arrays.items() if name.endswith("tokens"))
    texts = decode(tokens.reshape(-1, tokens.shape[-1]).tolist())
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, text=np.array(texts).reshape(tokens.shape[:-1]), **arrays)
    return buffer.getvalue()


# --- steps ---------------------------------------------------------------------------------------


def training_steps(examples: int, batch_size: int, epochs: int) -> int:
    """Optimizer steps of a run; the last batch of an epoch may be short."""
    return -(-examples // batch_size) * epochs


def batches(
    items: Sequence,
    collate: Callable[[Sequence], Sequence[Any]],
    batch_size: int,
    shape: RowShape,
    *,
    seed: int,
    epochs: int,
    start: int,
) -> Iterator[Any]:
    """The batches [M, N, …] of steps `start`, `start` + 1, …: a pure function of seed and step.

    Every epoch is a new permutation of all items; grain's threads collate ahead of the steps. M is the most
    micro-batches that `batch_size` groups can need; the step runs those that hold some.
    """
    most = -(-batch_size // shape.rows)
    dataset = (
        grain.MapDataset.source(range(len(items)))
        .seed(seed)
        .shuffle()
        .batch(batch_size, batch_fn=lambda chosen: stacked(collate([items[i] for i in chosen]), most))
        .repeat(epochs)
    )
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
    return iter(dataset[start:].to_iter_dataset(options))


def rows_flops(c: ModelConfig, rows: Rows) -> float:
    """`forward_flops` of packed rows: every token once, logits of responses, causal attention."""
    # A token sees its own sequence up to itself, or the window: its position, and one more.
    positions, tokens = rows.layout.positions + 1, rows.layout.segments != 0
    windows = [window or positions.size for window in c.windows]
    seen = np.mean([np.sum(np.minimum(positions, window), where=tokens) for window in windows])
    return forward_flops(c, filled_tokens(rows), int(rows.lengths.sum()), float(seen))
