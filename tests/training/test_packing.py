"""Packing: which groups share a row, and what a row says of them."""

import jax
import numpy as np
import pytest
from training_examples import ids, make_pair, random_groups

from spin_jax.data.records import Example
from spin_jax.training import packing
from spin_jax.training.batches import filled_tokens
from spin_jax.training.packing import Group, RowShape, example_group, pack, packed, pair_group, sft_group, sizes


def test_a_row_by_hand():
    """Two pairs side by side; the second is the longer one and comes first."""
    groups = [Group(ids(5), (ids(9), ids(8, 2))), Group(ids(5, 6), (ids(7, 2), ids(4)))]
    (rows,) = packed(groups, RowShape(rows=2, length=10, groups=3, unshared=12))
    #                                            second           first
    np.testing.assert_array_equal(rows.tokens, [[5, 6, 7, 2, 4, 5, 9, 8, 2, 0], [0] * 10])
    layout = rows.layout
    np.testing.assert_array_equal(layout.positions, [[0, 1, 2, 3, 2, 0, 1, 1, 2, 0], [0] * 10])
    np.testing.assert_array_equal(layout.segments, [[1, 1, 1, 1, 1, 2, 2, 2, 2, 0], [0] * 10])
    np.testing.assert_array_equal(layout.branches, [[0, 0, 1, 1, 2, 0, 1, 2, 2, 0], [0] * 10])
    np.testing.assert_array_equal(layout.unshared, [[1, 2, 3, 4, 1, 2, 5, 6, 7, 6, 8, 9], [0] * 12])
    # The end of a prompt predicts the beginning of each of its answers.
    np.testing.assert_array_equal(rows.predictors, [[1, 2, 1, 5, 5, 7, 0, 0, 0, 0], [0] * 10])
    np.testing.assert_array_equal(rows.targets, [[7, 2, 4, 9, 8, 2, 0, 0, 0, 0], [0] * 10])
    np.testing.assert_array_equal(rows.owners, [[1, 1, 2, 3, 4, 4, 0, 0, 0, 0], [0] * 10])
    np.testing.assert_array_equal(rows.lengths, [[[2, 1], [1, 2], [0, 0]], [[0, 0]] * 3])
    np.testing.assert_array_equal(rows.items, [[2, 1, 0], [0] * 3])
    assert {array.dtype for array in jax.tree.leaves(rows)} == {np.dtype(np.int32)}
    assert filled_tokens(rows) == 9


def test_earlier_answers_by_hand():
    """Tokens of a prompt that are trained on: only the loss has more terms, and the rows are the same."""
    groups = [Group(ids(5), (ids(9),)), Group(ids(5, 6, 2, 7, 8, 2, 4), (ids(3, 2),), earlier=ids(1, 2, 5))]
    shape = RowShape(rows=1, length=12, groups=2)
    (rows,), (plain,) = packed(groups, shape), packed([group._replace(earlier=ids()) for group in groups], shape)
    np.testing.assert_array_equal(rows.tokens, [[5, 6, 2, 7, 8, 2, 4, 3, 2, 5, 9, 0]])
    np.testing.assert_array_equal(rows.predictors, [[6, 7, 0, 1, 4, 9, 0, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(rows.targets, [[3, 2, 6, 2, 2, 9, 0, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(rows.owners, [[1, 1, 1, 1, 1, 2, 0, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(rows.lengths, [[[5], [1]]])
    np.testing.assert_array_equal(plain.lengths, [[[2], [1]]])
    for ours, theirs in zip(jax.tree.leaves((rows.tokens, rows.layout)), jax.tree.leaves(plain[:2]), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_an_unattended_token_is_of_a_negative_segment():
    groups = [Group(ids(2, 6, 2), (ids(7, 2), ids(2, 4))), Group(ids(5), (ids(2),) * 2)]
    (rows,) = packed(groups, RowShape(1, 12, 2), unattended=2)
    np.testing.assert_array_equal(rows.layout.segments, [[-1, 1, -1, 1, -1, -1, 1, 2, -2, -2, 0, 0]])
    assert rows.layout.unshared is None
    assert filled_tokens(rows) == 10


def test_a_group_longer_than_a_row_is_named():
    groups = [Group(ids(5), (ids(9), ids(8))), Group(ids(5, 6), (ids(7), ids(4)))]
    with pytest.raises(ValueError, match=r"group 1 takes \[4, 6, 1\] .*of a row that holds \[3, "):
        packed(groups, RowShape(1, 3, 1))
    with pytest.raises(ValueError, match=r"group 1 takes \[4, 6, 1\] .*of a row that holds \[4, 5, 1\]"):
        packed(groups, RowShape(1, 4, 1, unshared=5))


@pytest.mark.parametrize("answers", [1, 2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_rows_hold_every_group_once(seed, answers, monkeypatch):
    """Each group is read back from the rows, token for token, and nothing else stands in them."""
    monkeypatch.setattr(packing, "_WINDOW", 16)  # groups in up to three windows
    rng = np.random.default_rng(seed)
    groups = random_groups(rng, int(rng.integers(1, 40)), answers)
    shape = RowShape(rows=3, length=45, groups=4, unshared=60)
    parts = packed(groups, shape)
    found = {}
    for rows in parts:
        assert rows.tokens.shape == rows.owners.shape == (3, 45)
        assert rows.layout.unshared.shape == (3, 60)
        for n in range(3):
            row = jax.tree.map(lambda field, n=n: field[n], rows)
            for number, item in enumerate(row.items):
                if item == 0:
                    assert not row.lengths[number].any()
                    continue
                own = row.layout.segments == number + 1
                branches = [row.tokens[own & (row.layout.branches == b)] for b in range(answers + 1)]
                targets = [row.targets[row.owners == number * answers + a + 1] for a in range(answers)]
                assert item - 1 not in found
                found[item - 1] = branches[0], branches[1:], targets, row.lengths[number]
            # No token without a group, none unsaid, and the unshared row is the sequences one by one.
            assert row.layout.segments.max() == np.count_nonzero(row.items)
            np.testing.assert_array_equal(row.tokens > 0, row.layout.segments > 0)
            assert np.count_nonzero(row.owners) == row.lengths.sum()
            order = row.layout.unshared[row.layout.unshared > 0] - 1
            members = [groups[item - 1] for item in row.items[row.items > 0]]
            sequences = [np.concatenate([g.prompt, a]) for g in members for a in g.answers]
            np.testing.assert_array_equal(row.tokens[order], np.concatenate([[], *sequences]))
            np.testing.assert_array_equal(
                row.layout.positions[order], np.concatenate([[], *(np.arange(len(s)) for s in sequences)])
            )
    assert sorted(found) == list(range(len(groups)))
    for item, (prompt, given, targets, lengths) in found.items():
        np.testing.assert_array_equal(prompt, groups[item].prompt)
        for answer, there, target, length in zip(groups[item].answers, given, targets, lengths, strict=True):
            np.testing.assert_array_equal(there, answer)
            np.testing.assert_array_equal(target, answer)
            assert length == len(answer)
    assert sum(map(filled_tokens, parts)) == sum(len(g.prompt) + sum(map(len, g.answers)) for g in groups)


@pytest.mark.parametrize("seed", range(5))
def test_predictors_stand_before_their_targets(seed):
    """The token that predicts another is of its sequence, and one position before it."""
    groups = random_groups(np.random.default_rng(seed), 12)
    for rows in packed(groups, RowShape(2, 60, 8)):
        for n in range(2):
            row = jax.tree.map(lambda field, n=n: field[n], rows)
            for number, item in enumerate(row.items):
                for branch, answer in enumerate(groups[item - 1].answers if item else ()):
                    own = row.owners == number * 2 + branch + 1
                    before = row.predictors[own]
                    P = len(groups[item - 1].prompt)
                    expected = np.arange(P - 1, P - 1 + len(answer))
                    np.testing.assert_array_equal(row.layout.positions[before], expected)
                    np.testing.assert_array_equal(row.layout.segments[before], number + 1)
                    expected = np.where(np.arange(len(answer)) == 0, 0, branch + 1)
                    np.testing.assert_array_equal(row.layout.branches[before], expected)


def test_groups_of_examples_and_pairs():
    example = Example(0, [], ids(1, 2), ids(3))
    assert example_group(example)[:2] == sft_group(example)[:2] == (example.prompt, (example.real,))
    assert not len(sft_group(example).earlier)
    example = Example(0, [], ids(1, 2), ids(3), earlier=ids(1))
    assert sft_group(example).earlier is example.earlier
    assert not len(example_group(example).earlier)  # held-out numbers are of the last answer
    pair = make_pair(0, [1], [2], [3])
    assert pair_group(pair)[:2] == (pair.prompt, (pair.real, pair.generated))  # the human answer is the first


def test_sizes():
    np.testing.assert_array_equal(sizes([3, 5], [2, 0], [4, 1]), [[9, 12, 1], [6, 11, 1]])
    np.testing.assert_array_equal(sizes([3, 5], [2, 0]), [[5, 5, 1], [5, 5, 1]])


def three(lengths, unshared=None):
    """Sizes in all measures from lengths."""
    lengths = np.asarray(lengths)
    return np.stack([lengths, lengths if unshared is None else unshared, np.ones_like(lengths)], axis=1)


def test_first_fit_decreasing_by_hand():
    """6, 5, 5, 3, 2, 2, 1 into rows of 10: the first row that has room, the longest first."""
    wanted = three([2, 5, 6, 1, 5, 3, 2])
    assert pack(wanted, np.array([10, 99, 99])) == [[2, 5, 3], [1, 4], [0, 6]]
    # At most two a row, and then unshared tokens that bind.
    assert pack(wanted, np.array([10, 99, 2])) == [[2, 5], [1, 4], [0, 6], [3]]
    wanted = three([2, 5, 6, 1, 5, 3, 2], unshared=[9, 5, 6, 1, 5, 3, 2])
    assert pack(wanted, np.array([10, 10, 99])) == [[2, 5, 3], [1, 4], [0], [6]]


def test_equal_lengths_stay_in_order():
    assert pack(three([4] * 5), np.array([8, 8, 8])) == [[0, 1], [2, 3], [4]]


def test_a_group_that_fits_no_row_is_named():
    with pytest.raises(ValueError, match=r"group 2 takes \[9, 9, 1\] .* of a row that holds \[8, 99, 1\]"):
        pack(three([3, 8, 9, 9]), np.array([8, 99, 1]))


def slow_pack(wanted, capacity):
    """First-fit-decreasing, said plainly."""
    rows = []
    for item in sorted(range(len(wanted)), key=lambda i: (-wanted[i][0], i)):
        for row in rows:
            if all(sum(wanted[i][m] for i in [*row, item]) <= capacity[m] for m in range(3)):
                row.append(item)
                break
        else:
            rows.append([item])
    return rows


@pytest.mark.parametrize("seed", range(30))
def test_packing_random_groups(seed):
    """Every group once, no measure exceeded, the same every time, and what the plain loop gives."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 80))
    wanted = sizes(*rng.integers(1, [[40], [90], [60]], (3, count)))
    capacity = np.maximum(rng.integers([100, 150, 1], [400, 500, 6]), wanted.max(axis=0))
    rows = pack(wanted, capacity)
    assert sorted(item for row in rows for item in row) == list(range(count))
    for row in rows:
        assert (wanted[row].sum(axis=0) <= capacity).all()
    assert rows == pack(wanted, capacity) == slow_pack(wanted.tolist(), capacity.tolist())
