"""Batches: pairs with their scores, the order of the steps, and one shape for all of them."""

import jax
import numpy as np
from training_examples import ids, make_pair, random_groups

from spin_jax.training import batches
from spin_jax.training.batches import ScoredPair, filled_tokens, pair_batches, stacked
from spin_jax.training.packing import Group, RowShape, packed


def test_pairs_bring_their_scores_along():
    """Opponent and `identical` follow their pair into its row; empty places have zeros."""
    pairs = [
        make_pair(0, [1, 2], [3], [3]),
        make_pair(1, [1, 2], [3, 4], [5, 6]),
        make_pair(2, [1], [3], [4]),
    ]
    scored = [ScoredPair(pair, (-1.0 - i, -10.0 - i)) for i, pair in enumerate(pairs)]
    parts = pair_batches(scored, RowShape(1, 8, 2))
    assert [part.rows.items.tolist() for part in parts] == [[[2, 0]], [[1, 3]]]
    np.testing.assert_array_equal(parts[0].opponent, [[[-2, -11], [0, 0]]])
    np.testing.assert_array_equal(parts[1].opponent, [[[-1, -10], [-3, -12]]])
    np.testing.assert_array_equal(parts[0].identical, [[0, 0]])
    np.testing.assert_array_equal(parts[1].identical, [[1, 0]])
    assert parts[0].opponent.dtype == parts[0].identical.dtype == np.float32
    assert [filled_tokens(part) for part in parts] == [6, 7]


def test_missing_microbatches_are_empty():
    parts = packed([Group(ids(1, 2), (ids(3),))] * 3, RowShape(1, 4, 1))
    batch = stacked(parts, 5)
    assert batch.tokens.shape == (5, 1, 4)
    np.testing.assert_array_equal(batch.tokens[:3, 0, :3], [[1, 2, 3]] * 3)
    for array, part in zip(jax.tree.leaves(batch), jax.tree.leaves(parts[0]), strict=True):
        assert array.dtype == part.dtype
        assert not array[3:].any()


def test_order_is_a_function_of_seed_and_step():
    """Resuming at any step gives the batches that would have come; every epoch has every item once."""
    items = list(range(1, 11))

    def order(start, seed=3):
        """Micro-batches of two items; zero is none."""

        def collate(chosen):
            assert len(chosen) in (2, 4)
            return [np.array(chosen[i : i + 2]) for i in range(0, len(chosen), 2)]

        steps = batches.batches(items, collate, 4, RowShape(2, 8, 1), seed=seed, epochs=3, start=start)
        return [step.tolist() for step in steps]

    def there(steps):
        return [item for step in steps for part in step for item in part if item]

    whole = order(0)
    assert batches.training_steps(10, 4, 3) == len(whole) == 9
    assert [len(there([step])) for step in whole] == [4, 4, 2] * 3
    for epoch in range(3):
        assert sorted(there(whole[3 * epoch : 3 * epoch + 3])) == items
    assert whole[:3] != whole[3:6]
    for start in range(9):
        assert order(start) == whole[start:]
    assert order(0, seed=4) != whole


def test_every_step_has_one_shape():
    """Pairs of any length, full steps and the last short one: arrays of the same shapes throughout."""
    rng = np.random.default_rng(0)
    groups = random_groups(rng, 23, longest=16)
    scored = [ScoredPair(make_pair(i, g.prompt, *g.answers), (float(i), -float(i))) for i, g in enumerate(groups)]
    shape = RowShape(rows=2, length=48, groups=3)
    steps = list(
        batches.batches(scored, lambda chosen: pair_batches(chosen, shape), 8, shape, seed=0, epochs=2, start=0)
    )
    assert len(steps) == batches.training_steps(23, 8, 2) == 6
    assert len({str(jax.tree.map(np.shape, step)) for step in steps}) == 1
    assert steps[0].rows.tokens.shape == (4, 2, 48)  # a row a pair is the worst case
    used = [int((step.rows.items > 0).any(axis=(1, 2)).sum()) for step in steps]
    assert len(set(used)) > 1, "steps that are all alike prove nothing"
    for epoch in (steps[:3], steps[3:]):
        opponents = np.concatenate([step.opponent[step.rows.items > 0] for step in epoch])
        np.testing.assert_array_equal(np.sort(opponents[:, 0]), np.arange(23))
    for step in steps:  # what is empty comes last: the step's loop ends there
        there = (step.rows.items > 0).any(axis=(1, 2))
        np.testing.assert_array_equal(there, np.sort(there)[::-1])
