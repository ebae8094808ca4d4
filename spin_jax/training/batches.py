"""Makes the batches of the training steps. A batch is a number of micro-batches of one fixed shape."""

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
import pyarrow as pa

from spin_jax.data import store
from spin_jax.data.records import Pair
from spin_jax.losses import PAIR
from spin_jax.models.architecture import ModelConfig
from spin_jax.models.cost import forward_flops
from spin_jax.training.packing import Rows, RowShape, packed, pair_group


class PairBatch(NamedTuple):
    """Packed rows of pairs. Answer 0 is human and answer 1 generated, unless the loss has other roles."""

    rows: Rows
    opponent: Any  # float32 [N, G, A]: the opponent's log-probability of each answer
    identical: Any  # float32 [N, G]: 1 where the human and the generated answer have the same token ids
    score: Any  # float32 [N, G]: the scorer's score of the generated answer, or 0


class ScoredPair(NamedTuple):
    pair: Pair
    opponent: tuple[float, ...]  # the opponent's log-probability of each role's answer


_ID_FIELDS = ("prompt", "real", "generated", "start")
_FIELDS = {  # the others of a Pair that training reads: its messages are left out
    "prompt_id": pa.int64(),
    "sample_id": pa.int32(),
    "chosen_id": pa.int32(),
    "truncated": pa.bool_(),
    "score": pa.float64(),
}
_PAIRS = pa.schema(_FIELDS | dict.fromkeys(_ID_FIELDS, pa.list_(pa.int32())) | {"opponent": pa.list_(pa.float64())})


class ScoredPairs(Sequence[ScoredPair]):
    """Scored pairs in a temporary file, without their messages. Memory holds what is read."""

    def __init__(self, parts: Iterable[Sequence[ScoredPair]]):
        """`parts` are read one after the other: memory holds one of them at a time."""
        batches = (
            pa.RecordBatch.from_pylist([{**vars(s.pair), "opponent": s.opponent} for s in part], schema=_PAIRS)
            for part in parts
        )
        self._table = store.spooled(batches, _PAIRS)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: Any) -> Any:
        place = range(len(self))[index]
        fields = {name: store.ids_at(self._table, name, place) for name in _ID_FIELDS}
        fields |= {name: self._table[name][place].as_py() for name in _FIELDS}
        opponent = tuple(self._table["opponent"][place].as_py())
        return ScoredPair(Pair(real_messages=[], generated_messages=[], **fields), opponent)


def pair_batches(
    scored: Sequence[ScoredPair], shape: RowShape, unattended: int | None = None, roles: Sequence[str] = PAIR
) -> list[PairBatch]:
    """Packs pairs into as many micro-batches as they need."""
    opponent = np.array([[0.0] * len(roles), *(s.opponent for s in scored)], np.float32)
    identical = np.array([0.0, *(s.pair.identical for s in scored)], np.float32)
    score = np.array([0.0, *(s.pair.score or 0.0 for s in scored)], np.float32)
    rows = packed([pair_group(s.pair, roles) for s in scored], shape, unattended)
    return [PairBatch(part, opponent[part.items], identical[part.items], score[part.items]) for part in rows]


def filled_tokens(batch: Rows | PairBatch) -> int:
    """The number of tokens without padding; a prompt counts once for all its answers."""
    rows = batch.rows if isinstance(batch, PairBatch) else batch
    return int(np.count_nonzero(rows.layout.segments))


def stacked(parts: Sequence[Any], count: int) -> Any:
    """Stacks micro-batches [N, …] into one step's batch [count, N, …], filled up with empty ones (zeros)."""
    empty = jax.tree.map(np.zeros_like, parts[0])
    return jax.tree.map(lambda *arrays: np.stack(arrays), *parts, *[empty] * (count - len(parts)))


def as_npz(batch: Any, decode: Callable[[list[list[int]]], list[str]]) -> bytes:
    """A step's batch as a file for numpy.load: its arrays [M, N, …], and the `text` of each row to read."""
    flat, _ = jax.tree_util.tree_flatten_with_path(batch)
    arrays = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in flat}
    tokens = next(array for name, array in arrays.items() if name.endswith("tokens"))
    texts = decode(tokens.reshape(-1, tokens.shape[-1]).tolist())
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, text=np.array(texts).reshape(tokens.shape[:-1]), **arrays)
    return buffer.getvalue()


# --- the order of the batches --------------------------------------------------------------------


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
    """The batches [M, N, …] of the steps `start`, `start` + 1, …; each depends only on the seed and its step.

    Every epoch is a new permutation of all items. `collate` turns the items of a batch into its micro-batches. M is
    the most micro-batches that `batch_size` groups can need; the step runs only those that are not empty.
    """
    most = -(-batch_size // shape.rows)
    dataset = (
        grain.MapDataset.source(range(len(items)))
        .seed(seed)
        .shuffle()
        .batch(batch_size, batch_fn=lambda chosen: stacked(collate([items[i] for i in chosen]), most))
        .repeat(epochs)
    )
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)  # threads prepare batches in advance
    return iter(dataset[start:].to_iter_dataset(options))


def rows_flops(c: ModelConfig, rows: Rows) -> float:
    """`forward_flops` of packed rows: every token counts once, and only responses have logits."""
    # A token attends to its own sequence up to itself, or to the window: at position p, to p + 1 tokens.
    attended, tokens = rows.layout.positions + 1, rows.layout.segments != 0
    windows = [window or attended.size for window in c.windows]
    seen = np.mean([np.sum(np.minimum(attended, window), where=tokens) for window in windows])
    return forward_flops(c, filled_tokens(rows), int(rows.lengths.sum()), float(seen))
