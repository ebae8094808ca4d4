"""Groups scoring requests: by a shared context, which is then read once, and by size."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from spin_jax.training.packing import Group

MAX_SHARED = 16  # continuations that share one reading of their context


def group_by_context(
    requests: Sequence[tuple[list[int], list[int]]], longest: int
) -> tuple[list[Group], list[list[int]]]:
    """Groups of continuations that share a context, and for each group the numbers of the requests in it.

    Args:
        requests: pairs of context and continuation.
        longest: the most tokens that the model takes.
    """
    by_context: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, (context, _) in enumerate(requests):
        by_context[tuple(context)].append(number)
    groups, members = [], []
    for context, numbers in by_context.items():
        prompt = np.array(context, np.int32)
        # After a short context, sharing saves little, and attention costs the square of a row's length.
        room = min(2 * len(context), longest - len(context))
        portions, filled = [], 0  # a continuation that does not fit the room is a portion of its own
        for number in numbers:
            length = len(requests[number][1])
            if not portions or len(portions[-1]) == MAX_SHARED or filled + length > room:
                portions.append([])
                filled = 0
            portions[-1].append(number)
            filled += length
        groups += [Group(prompt, tuple(np.array(requests[i][1], np.int32) for i in portion)) for portion in portions]
        members += portions
    return groups, members


def classes_by_size(sizes: np.ndarray, min_tokens: int) -> list[list[int]]:
    """Classes of groups of similar size, the largest first, so that rows of one shape suit all of a class.

    A class spans a factor of four, or more if it would have fewer than `min_tokens` tokens: attention costs the square
    of a row's length, but short groups can fill long rows as well.
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
