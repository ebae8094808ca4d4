"""Packs prompts and answers into rows of a fixed shape. It uses NumPy only, and no device.

A row holds several groups. A group is a prompt, which stands there once, followed by its answers: one in SFT, two in
self-play. So only the end of a row is padding, and no prompt is computed twice. `models/attention.py` keeps the
answers apart, and `log_probs.py` adds up the log-probabilities of each answer.

Axes: N rows of a micro-batch, T tokens, R response tokens (R = T), G groups of a row, A answers of a group, U tokens
of a row in which every answer has its own prompt. The fields of `Rows` are NumPy arrays on the host and JAX arrays in
a step.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from spin_jax.data.records import Example, Ids, Pair
from spin_jax.kernels.layout import Layout
from spin_jax.losses import PAIR

_WINDOW = 1024  # groups packed at a time; the time to pack them grows with the square of their number


class RowShape(NamedTuple):
    """The shape of a micro-batch. It stays the same for a whole run, so that one program is enough."""

    rows: int  # N
    length: int  # T
    groups: int  # G, the most groups of a row
    unshared: int = 0  # U; 0 where attention does not need it

    @property
    def capacity(self) -> np.ndarray:
        """How much a row holds, in the three measures of `sizes`."""
        return np.array([self.length, self.unshared or 2**31, self.groups])


class Group(NamedTuple):
    """A prompt, of one token or more, and its answers."""

    prompt: Ids
    answers: tuple[Ids, ...]
    earlier: Ids = np.zeros(0, np.int32)  # places in the prompt, from 1, of tokens that count as the first answer's


class Rows(NamedTuple):
    """Packed rows. The responses stand side by side in `predictors`, `targets` and `owners`; 0 means none."""

    tokens: Any  # int32 [N, T]
    layout: Layout  # int32 [N, T]; its `unshared` is [N, U] or None
    predictors: Any  # int32 [N, R]: the index of the token that predicts each response token
    targets: Any  # int32 [N, R]: the response token
    owners: Any  # int32 [N, R]: the answer that the token belongs to, 1 … G · A
    lengths: Any  # int32 [N, G, A]: tokens of each answer, `earlier` ones included
    items: Any  # int32 [N, G]: the number of each group among the groups that were packed, from 1


def example_group(example: Example) -> Group:
    return Group(example.prompt, (example.real,))


def sft_group(example: Example) -> Group:
    """The group of an example with all that SFT trains on; with `sft.turns=all`, the earlier answers too."""
    group = example_group(example)
    return group if example.earlier is None else group._replace(earlier=example.earlier)


def pair_group(pair: Pair, roles: Sequence[str] = PAIR) -> Group:
    return Group(pair.prompt, tuple(getattr(pair, role) for role in roles))


def sizes(prompts: Any, *answers: Any) -> np.ndarray:
    """How much of a row each group takes: int [groups, (tokens, unshared tokens, 1)].

    Args:
        prompts: the lengths of the prompts, [groups].
        answers: for each role, the lengths of the answers, [groups].
    """
    prompts, total = np.asarray(prompts), np.sum(answers, axis=0)
    return np.stack([prompts + total, len(answers) * prompts + total, np.ones_like(prompts)], axis=1)


def group_sizes(groups: Sequence[Group]) -> np.ndarray:
    """`sizes` of the groups themselves."""
    answers = [[len(answer) for answer in group.answers] for group in groups]
    return sizes([len(group.prompt) for group in groups], *zip(*answers, strict=True))


def pack(wanted: np.ndarray, capacity: np.ndarray) -> list[list[int]]:
    """The numbers of the groups in each row, by first-fit-decreasing.

    Args:
        wanted: the sizes of the groups, from `sizes`.
        capacity: how much a row holds, in the same measures.

    Raises:
        ValueError: a group does not fit an empty row.
    """
    too_large = (wanted > capacity).any(axis=1)
    if too_large.any():
        item = np.argmax(too_large)
        raise ValueError(
            f"group {item} takes {wanted[item].tolist()} (tokens, unshared tokens, groups) "
            f"of a row that holds {capacity.tolist()}"
        )
    left = np.empty((len(wanted), len(capacity)), np.int64)  # what is left of each row opened so far
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
    """Packs groups into as many micro-batches as they need; ValueError names a group that is longer than a row.

    Args:
        unattended: a token id that no token attends to (only for `config.official`).
    """
    wanted = group_sizes(groups)
    rows: list[list[int]] = []
    for first in range(0, len(groups), _WINDOW):
        window = pack(wanted[first : first + _WINDOW], shape.capacity)
        rows += [[first + member for member in row] for row in window]
    chunks = [rows[first : first + shape.rows] for first in range(0, len(rows), shape.rows)]
    return [_microbatch(groups, chunk, shape, unattended) for chunk in chunks]


def _microbatch(groups: Sequence[Group], chosen: list[list[int]], shape: RowShape, unattended: int | None) -> Rows:
    N, T, G, U = shape
    A = len(groups[0].answers)

    def zeros(*dims: int) -> np.ndarray:
        return np.zeros((N, *dims), np.int32)

    layout = Layout(zeros(T), zeros(T), zeros(T), zeros(U) if U else None)
    rows = Rows(zeros(T), layout, zeros(T), zeros(T), zeros(T), lengths=zeros(G, A), items=zeros(G))
    for row, members in enumerate(chosen):
        _fill_row(jax.tree.map(lambda field, row=row: field[row], rows), groups, members, unattended)
    return rows


def _fill_row(row: Rows, groups: Sequence[Group], members: list[int], unattended: int | None) -> None:
    """Writes groups into a row one after the other: the prompt, then each answer."""
    end = responses = unshared = 0
    for number, item in enumerate(members):
        prompt, answers, earlier = groups[item]
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
            row.predictors[responses] = start + P - 1  # the prompt's last token predicts every answer's first
            row.targets[span] = answer
            row.owners[span] = number * len(answers) + branch + 1
            responses += n
            if row.layout.unshared is not None:
                row.layout.unshared[unshared : unshared + P] = np.arange(start + 1, start + P + 1)
                row.layout.unshared[unshared + P : unshared + P + n] = np.arange(begin + 1, end + 1)
                unshared += P + n
        span = slice(responses, responses + len(earlier))
        row.predictors[span] = start + earlier - 1
        row.targets[span] = row.tokens[start + earlier]
        row.owners[span] = number * len(answers) + 1
        row.lengths[number, 0] += len(earlier)
        responses += len(earlier)
        row.layout.segments[start:end] = number + 1
    if unattended is not None:
        row.layout.segments[row.tokens == unattended] *= -1
