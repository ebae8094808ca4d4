"""Groups scoring requests: by a shared context, which is then read once, and by size."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from spin_jax.training.packing import Group

MAX_SHARED = 16  # continuations that share one reading of their context


def group_by_context(
    requests: Sequence[tuple[list[int], list[int]]], longest: int
) -> tuple[list[Group], list[list[int]]]:
    """Groups of continuations that share a context.

    Args:
        requests: pairs of context and continuation.
        longest: the most tokens that the model takes.

    Returns:
        the groups, and for each group the numbers of the requests that its answers belong to.
    """
    by_context: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, (context, _) in enumerate(requests):
        by_context[tuple(context)].append(number)
    groups, members = [], []
    for context, numbers in by_context.items():
        prompt = np.array(context, np.int32)
        # After a short context, sharing saves little, and attention costs the square of a row's length.
        room = min(2 * len(context), longest - len(context))
        for portion in _split_to_fit(numbers, [len(requests[i][1]) for i in numbers], room):
            answers = tuple(np.array(requests[i][1], np.int32) for i in portion)
            groups.append(Group(prompt, answers))
            members.append(portion)
    return groups, members


def _split_to_fit(numbers: list[int], lengths: list[int], room: int) -> Iterator[list[int]]:
    """Splits `numbers` into portions of at most `MAX_SHARED`, whose lengths together fit into `room`.

    A number whose length does not fit is a portion of its own.
    """
    portion, filled = [], 0
    for number, length in zip(numbers, lengths, strict=True):
        if portion and (len(portion) == MAX_SHARED or filled + length > room):
            yield portion
            portion, filled = [], 0
        portion.append(number)
        filled += length
    yield portion


def classes_by_size(sizes: np.ndarray, min_tokens: int) -> list[list[int]]:
    """Classes of groups of similar size, the largest first, so that rows of one shape suit all of a class.

    A class spans a factor of four, or more if it would have fewer than `min_tokens` tokens: attention
    costs the square of a row's length, but short groups can fill long rows as well.
    """
    scales = np.ceil(np.log2(sizes) / 2)
    classes: list[list[int]] = []
    waiting: list[int] = []
    for scale in np.unique(scales):
        waiting += np.flatnonzero(scales == scale).tolist()
        if sizes[waiting].sum() >= min_tokens or scale == scales.max():
            classes.append(sorted(waiting, key=lambda i: -sizes[i]))
            waiting = []
    return classes[::-1]
