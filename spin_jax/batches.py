"""Packed batches of fixed shapes, made in NumPy: nothing here touches a device.

A row holds several groups: a prompt, once, with each of its answers after it (one in SFT, two in
self-play), so that nothing is padded but a row's end and no prompt is computed twice. `attention.py` keeps
the answers apart, and `scoring.py` adds up each one's log-probs. First-fit-decreasing fills the rows; a
step takes as many micro-batches of one fixed shape as its groups need.

Axes: N rows of a micro-batch, T tokens, R response tokens (as many as tokens), G groups of a row, A answers
of a group. The fields of a batch are NumPy arrays on the host and JAX arrays in a step.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np

from spin_jax.data.records import Example, Ids, Pair
from spin_jax.kernels.layout import Layout
from spin_jax.losses import PAIR
from spin_jax.models.architecture import ModelConfig
from spin_jax.models.cost import forward_flops
from spin_jax.runtime.sharding import round_up

_MOST_GROUPS = 64  # of a row: it sizes arrays of single numbers
_WINDOW = 1024  # groups packed together
_TRIALS = 16, 512  # steps packed for every length tried, and groups: whichever is more


class RowShape(NamedTuple):
    """A micro-batch: the same for a whole run, whatever is sampled, so that one program serves it."""

    rows: int  # N
    length: int  # T
    groups: int  # G: at most so many of a row
    unshared: int = 0  # tokens when each answer has a prompt of its own; 0 where attention does not ask

    @property
    def capacity(self) -> np.ndarray:
        """What a row holds, in the measures of `sizes`."""
        return np.array([self.length, self.unshared or 2**31, self.groups])


class Group(NamedTuple):
    """A prompt, of one token or more, and its answers."""

    prompt: Ids
    answers: tuple[Ids, ...]


class Rows(NamedTuple):
    """Packed rows: the model's arguments, and whose log-prob each token is. 0 is none everywhere."""

    tokens: Any  # int32 [N, T]
    layout: Layout  # int32 [N, T], and [N, U] where rows are unshared
    predictors: Any  # int32 [N, R]: the token whose state predicts a response's token, responses side by side
    targets: Any  # int32 [N, R]: that response's token
    owners: Any  # int32 [N, R]: the answer it belongs to, 1 … G · A
    lengths: Any  # int32 [N, G, A]: tokens of each answer
    items: Any  # int32 [N, G]: which of the groups packed this is, from 1


class PairBatch(NamedTuple):
    """Rows of pairs; answer 0 is the human one, answer 1 the generated one, unless a loss has other roles."""

    rows: Rows
    opponent: Any  # float32 [N, G, A]: the opponent's log-probs of each role's answer
    identical: Any  # float32 [N, G]: 1 where the human and the generated answer are the same ids
    score: Any  # float32 [N, G]: what a scorer gave the generated one, 0 without


class ScoredPair(NamedTuple):
    pair: Pair
    opponent: tuple[float, ...]  # log-probs of each role's answer


# --- packing -------------------------------------------------------------------------------------


def example_group(example: Example) -> Group:
    return Group(example.prompt, (example.real,))


def pair_group(pair: Pair, roles: Sequence[str] = PAIR) -> Group:
    return Group(pair.prompt, tuple(getattr(pair, role) for role in roles))


def sizes(prompts: Any, *answers: Any) -> np.ndarray:
    """What groups take of a row: int [groups, (tokens, unshared tokens, 1)], from lengths [groups]."""
    prompts, own = np.asarray(prompts), np.sum(answers, axis=0)
    return np.stack([prompts + own, len(answers) * prompts + own, np.ones_like(prompts)], axis=1)


def group_sizes(groups: Sequence[Group]) -> np.ndarray:
    """`sizes` of groups that are there."""
    answers = [[len(answer) for answer in group.answers] for group in groups]
    return sizes([len(group.prompt) for group in groups], *zip(*answers, strict=True))


def pack(wanted: np.ndarray, capacity: np.ndarray) -> list[list[int]]:
    """First-fit-decreasing: the groups of each row, by number.

    Args:
        wanted: from `sizes`.
        capacity: of a row, in the same measures.

    Raises:
        ValueError: a group does not fit an empty row.
    """
    too_large = np.flatnonzero((wanted > capacity).any(axis=1))
    if len(too_large):
        raise ValueError(
            f"group {too_large[0]} takes {wanted[too_large[0]].tolist()} (tokens, unshared tokens, groups) "
            f"of a row that holds {capacity.tolist()}"
        )
    left = np.empty((len(wanted), len(capacity)), np.int64)  # of every row opened so far
    rows: list[list[int]] = []
    for item in np.argsort(-wanted[:, 0], kind="stable"):
        fits = (left[: len(rows)] >= wanted[item]).all(axis=1)
        row = int(np.argmax(fits)) if fits.any() else len(rows)
        if row == len(rows):
            rows.append([])
            left[row] = capacity
        left[row] -= wanted[item]
        rows[row].append(int(item))
    return rows


def packed(groups: Sequence[Group], shape: RowShape, unattended: int | None = None) -> list[Rows]:
    """As many micro-batches as the groups need.

    Args:
        unattended: a token id that no token attends to (`official`).

    Raises:
        ValueError: a group is longer than a row.
    """
    wanted = group_sizes(groups)
    rows: list[list[int]] = []
    for first in range(0, len(groups), _WINDOW):  # looking through all rows for each group would be quadratic
        window = pack(wanted[first : first + _WINDOW], shape.capacity)
        rows += [[first + member for member in row] for row in window]
    chunks = [rows[first : first + shape.rows] for first in range(0, len(rows), shape.rows)]
    return [_microbatch(groups, chunk, shape, unattended) for chunk in chunks]


def _microbatch(
    groups: Sequence[Group], chosen: list[list[int]], shape: RowShape, unattended: int | None
) -> Rows:
    N, T, G, U = shape
    A = len(groups[0].answers)

    def zeros(*dims: int) -> np.ndarray:
        return np.zeros((N, *dims), np.int32)

    rows = Rows(
        tokens=zeros(T),
        layout=Layout(zeros(T), zeros(T), zeros(T), zeros(U) if U else None),
        predictors=zeros(T),
        targets=zeros(T),
        owners=zeros(T),
        lengths=zeros(G, A),
        items=zeros(G),
    )
    for row, members in enumerate(chosen):
        _fill_row(jax.tree.map(lambda field, row=row: field[row], rows), groups, members, unattended)
    return rows


def _fill_row(row: Rows, groups: Sequence[Group], members: list[int], unattended: int | None) -> None:
    """Lays groups out side by side: prompt, answer, answer."""
    end = responses = unshared = 0
    for number, item in enumerate(members):
        prompt, answers = groups[item]
        row.items[number] = item + 1
        start, end, P = end, end + len(prompt), len(prompt)
        row.tokens[start:end] = prompt
        row.layout.positions[start:end] = np.arange(P)
        for branch, answer in enumerate(answers):
            begin, end, n = end, end + len(answer), len(answer)
            row.tokens[begin:end] = answer
            row.layout.positions[begin:end] = np.arange(P, P + n)
            row.layout.branches[begin:end] = branch + 1  # pyright: ignore[reportOptionalSubscript]
            row.lengths[number, branch] = n
            span = slice(responses, responses + n)
            row.predictors[span] = np.arange(begin - 1, end - 1)
            row.predictors[responses] = start + P - 1  # the prompt's end predicts every answer's beginning
            row.targets[span] = answer
            row.owners[span] = number * len(answers) + branch + 1
            responses += n
            if row.layout.unshared is not None:
                row.layout.unshared[unshared : unshared + P] = np.arange(start + 1, start + P + 1)
                row.layout.unshared[unshared + P : unshared + P + n] = np.arange(begin + 1, end + 1)
                unshared += P + n
        row.layout.segments[start:end] = number + 1
    if unattended is not None:
        row.layout.segments[row.tokens == unattended] *= -1


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


# --- shapes --------------------------------------------------------------------------------------


def choose_shape(
    expected: np.ndarray,
    largest: np.ndarray,
    *,
    batch_size: int,
    shards: int,
    tokens_per_device: int,
    attention: float,
    overhead: float,
    granule: int,
    row_length: int | None = None,
    unshared: bool = False,
) -> RowShape:
    """The micro-batch that wastes least, found by packing a few steps of groups as they are expected.

    Longer rows leave less at their ends and pay more for attention; larger micro-batches leave more of the
    last one empty, and read and add up the weights less often.

    Args:
        expected: `sizes` of the groups as far as they are known, int [groups, 3].
        largest: the most that any group can take, int [3].
        batch_size: groups of a step.
        shards: rows are a multiple of it.
        tokens_per_device: of one micro-batch, at most (unless one row is longer).
        attention: what a token's look at another costs, in units of the rest of a token.
        overhead: what a micro-batch costs whatever is in it, in tokens a device.
        granule: lengths are multiples of it.
        row_length: takes the place of the search over lengths.
        unshared: the shape has `unshared`, for splash attention.

    Raises:
        ValueError: row_length is shorter than a group can be.
    """
    shortest = round_up(int(largest[0]), granule)
    if row_length is not None and row_length < largest[0]:
        raise ValueError(f"row_length={row_length}: a group can have {largest[0]} tokens")
    factors = (1, 1.0625, 1.125, 1.25, 1.375, 1.5, 1.75, 2, 2.5, 3, 4)
    lengths = {round_up(int(shortest * factor), granule) for factor in factors}
    if row_length is not None:
        lengths = {round_up(row_length, granule)}
    rng, some = np.random.default_rng(0), min(batch_size, len(expected))
    trials = max(_TRIALS[0], _TRIALS[1] // some)
    steps = [expected[rng.choice(len(expected), some, replace=False)] for _ in range(trials)]
    fewest = max(int(expected[:, 0].min()), 1)
    best: tuple[float, RowShape] | None = None
    for T in sorted(lengths):
        if row_length is None and max(shortest, tokens_per_device) < T:
            continue
        shape = RowShape(1, T, max(1, min(T // fewest, _MOST_GROUPS)))
        packings = [pack(step, shape.capacity) for step in steps]
        if unshared:
            most = max(step[row, 1].sum() for step, rows in zip(steps, packings, strict=True) for row in rows)
            shape = shape._replace(unshared=round_up(max(int(most), int(largest[1])), granule))
        counts = np.array([len(rows) for rows in packings])
        for each in range(1, max(1, tokens_per_device // T) + 1):
            N = each * shards
            microbatches = -(-counts // N)
            cost = float(microbatches.mean()) * each * T * (1 + attention * T)
            cost += float(microbatches.mean()) * overhead
            if best is None or cost < best[0]:
                best = cost, shape._replace(rows=N)
    assert best is not None
    return best[1]


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
