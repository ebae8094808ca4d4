"""Packing: which groups share a row, what a row says of them, and the shapes that are chosen."""

from collections import Counter

import jax
import numpy as np
import pytest

from spin_jax import config
from spin_jax.data.official import OfficialChat
from spin_jax.data.records import Example, Lengths, Pair
from spin_jax.runtime import sharding
from spin_jax.selfplay import from_config
from spin_jax.training import batches, packing
from spin_jax.training.batch_shape import choose_shape
from spin_jax.training.batches import ScoredPair, filled_tokens, pair_batches, stacked
from spin_jax.training.packing import Group, RowShape, example_group, pack, packed, pair_group, sizes


def ids(*values):
    return np.array(values, np.int32)


def make_pair(number, prompt, real, generated):
    return Pair(number, 0, [], [], ids(*prompt), ids(*real), ids(*generated), truncated=False)


def random_groups(rng, count, answers=2, longest=9):
    """Groups whose tokens are all different from padding; answers can be empty, as in given token columns."""

    def some(least):
        return rng.integers(1, 1000, rng.integers(least, longest + 1)).astype(np.int32)

    return [Group(some(1), tuple(some(0) for _ in range(answers))) for _ in range(count)]


# --- what a row says -------------------------------------------------------------------------------


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


def test_groups_of_examples_and_pairs():
    example = Example(0, [], ids(1, 2), ids(3))
    assert example_group(example) == (example.prompt, (example.real,))
    pair = make_pair(0, [1], [2], [3])
    assert pair_group(pair) == (pair.prompt, (pair.real, pair.generated))  # the human answer is the first


def test_sizes():
    np.testing.assert_array_equal(sizes([3, 5], [2, 0], [4, 1]), [[9, 12, 1], [6, 11, 1]])
    np.testing.assert_array_equal(sizes([3, 5], [2, 0]), [[5, 5, 1], [5, 5, 1]])


def test_missing_microbatches_are_empty():
    parts = packed([Group(ids(1, 2), (ids(3),))] * 3, RowShape(1, 4, 1))
    batch = stacked(parts, 5)
    assert batch.tokens.shape == (5, 1, 4)
    np.testing.assert_array_equal(batch.tokens[:3, 0, :3], [[1, 2, 3]] * 3)
    for array, part in zip(jax.tree.leaves(batch), jax.tree.leaves(parts[0]), strict=True):
        assert array.dtype == part.dtype
        assert not array[3:].any()


# --- first-fit-decreasing --------------------------------------------------------------------------


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


# --- shapes ----------------------------------------------------------------------------------------

# A config's usual values; `expected` and `largest` come with each test.
USUAL = dict(batch_size=64, shards=1, tokens_per_device=8192, attention=1e-5, overhead=256, granule=16)


def realistic(rng, count, longest=1024):
    """Sizes of pairs, their lengths spread around 180, 300 and 220 tokens as texts' lengths are."""
    lengths = rng.lognormal(np.log([180, 300, 220]), 0.5, (count, 3)).astype(int).clip(1)
    prompts = lengths[:, 0].clip(max=512)
    return sizes(prompts, *np.minimum(lengths[:, 1:].T, longest - prompts))


def efficiency(wanted, shape, batch_size=64):
    """Real tokens of all that the steps compute."""
    computed = 0
    for first in range(0, len(wanted), batch_size):
        rows = pack(wanted[first : first + batch_size], shape.capacity)
        computed += -(-len(rows) // shape.rows) * shape.rows * shape.length
    return wanted[:, 0].sum() / computed


@pytest.mark.parametrize("tokens_per_device", [1, 3000, 8192, 32768])
@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("granule", [16, 128])
def test_chosen_shapes_keep_their_bounds(granule, shards, tokens_per_device):
    expected = realistic(np.random.default_rng(0), 300)
    largest = expected.max(axis=0) + np.array([100, 5000, 0])  # a prompt can be longer than those known
    options = USUAL | dict(granule=granule, shards=shards, tokens_per_device=tokens_per_device)
    for unshared in (False, True):
        shape = choose_shape(expected, largest, **options, unshared=unshared)
        assert (largest <= shape.capacity).all()
        assert shape.length % granule == 0
        assert shape.rows % shards == 0
        # One row a device is the least there is.
        assert shape.rows == shards or shape.rows * shape.length <= tokens_per_device * shards
        assert (shape.unshared > 0) == unshared
        assert shape.unshared % granule == 0
        assert shape == choose_shape(expected, largest, **options, unshared=unshared)
    if tokens_per_device == 1:
        assert shape.length == -(-largest[0] // granule) * granule


@pytest.mark.parametrize("row_length", [2000, 2048, 9000])
def test_a_row_length_that_is_asked_for(row_length):
    """Rounded up to the granule, longer than a micro-batch's tokens too."""
    expected = realistic(np.random.default_rng(0), 300)
    shape = choose_shape(expected, expected.max(axis=0), **USUAL, row_length=row_length)
    assert row_length <= shape.length < row_length + 16
    assert shape.length % 16 == 0
    assert shape.rows == 1 or shape.rows * shape.length <= 8192


def test_a_row_length_that_is_too_short():
    expected = sizes([10], [20], [20])
    assert choose_shape(expected, np.array([90, 0, 1]), **USUAL, row_length=90).length == 96
    with pytest.raises(ValueError, match="row_length=89: a group can have 90 tokens"):
        choose_shape(expected, np.array([90, 0, 1]), **USUAL, row_length=89)


@pytest.mark.parametrize("granule", [16, 128])
@pytest.mark.parametrize("shards", [1, 4])
def test_little_is_wasted_on_realistic_lengths(shards, granule):
    """Of 64 pairs a step, 85 % or more of what is computed are tokens, on data that the choice never saw.

    Rows are as long as two answers may be, 2,048 tokens, for pairs of 800.
    """
    rng = np.random.default_rng(1)
    expected = realistic(rng, 2000)
    (largest,) = sizes([0], [1024], [1024])
    shape = choose_shape(expected, largest, **USUAL | dict(shards=shards, granule=granule))
    assert efficiency(realistic(rng, 2048), shape) >= 0.85
    # A pair a row would waste more than half.
    assert efficiency(realistic(rng, 2048), RowShape(shards, 2048, 1)) < 0.5


@pytest.mark.parametrize("prompt", [20, 200])
def test_cost_grows_as_the_tokens_of_a_pair(prompt):
    """Ten times as many pairs cost each no more, and a prompt counts once, ten times its answers too."""
    rng = np.random.default_rng(2)
    lengths = rng.integers([prompt // 2, 10, 10], [prompt * 3 // 2, 31, 31], (10_000, 3))
    wanted = sizes(*lengths.T)
    shape = choose_shape(wanted[:500], wanted.max(axis=0), **USUAL)
    few, many = (efficiency(wanted[:count], shape) for count in (1_000, 10_000))
    assert few == pytest.approx(many, rel=0.05)
    assert many > 0.8  # of P + R + G; P twice would be 0.5 to 0.7


def test_expensive_attention_shortens_rows():
    expected = realistic(np.random.default_rng(0), 500)
    lengths = [
        choose_shape(expected, expected.max(axis=0), **USUAL | dict(attention=attention)).length
        for attention in (0.0, 1e-1)
    ]
    assert lengths[0] > lengths[1]


@pytest.mark.parametrize(
    ("expected", "batch_size"),
    [
        pytest.param(sizes([20], [30], [25]), 64, id="one pair"),
        pytest.param(sizes([1], [0], [0]), 1, id="one token"),
        pytest.param(sizes([20] * 5, [30] * 5, [25] * 5), 64, id="fewer than a step"),
        pytest.param(sizes([20] * 200, [30] * 200, [14] * 200), 64, id="all alike"),
        pytest.param(sizes([20] * 200, [30] * 199 + [5000], [14] * 200), 64, id="a giant"),
        pytest.param(sizes([1] * 2000, [1] * 2000, [1] * 2000), 1024, id="tiny ones"),
    ],
)
@pytest.mark.parametrize("shards", [1, 8])
def test_degenerate_data(expected, batch_size, shards):
    """A shape comes out, and everything fits it."""
    options = USUAL | dict(batch_size=batch_size, shards=shards, tokens_per_device=1024)
    for unshared in (False, True):
        shape = choose_shape(expected, expected.max(axis=0), **options, unshared=unshared)
        assert shape.rows % shards == 0
        pack(expected, shape.capacity)  # or it raises
        # Nothing is gained from more rows than pairs.
        assert shape.rows < len(expected) + shards


def test_equal_lengths_fill_their_rows():
    """Pairs of 64 tokens: rows that hold them without a gap."""
    expected = sizes([20] * 256, [30] * 256, [14] * 256)
    shape = choose_shape(expected, expected.max(axis=0), **USUAL)
    assert efficiency(expected, shape) == 1.0


@pytest.mark.parametrize("kernel", ["plain", "splash"])
@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_sampled_fits(seed, kernel, tiny_model):
    """The rows of a run hold each of its examples with the longest answer that the limits allow.

    Nothing is cut for the rows' sake, and pairs that were given from elsewhere fit too.
    """
    rng, c = np.random.default_rng(seed), config.default()
    c.model.attention, c.lengths.max_length, c.sampling.max_new_tokens = (
        kernel,
        *rng.integers(40, 90, 2).tolist(),
    )
    c.train.batch_size, c.train.tokens_per_device = 8, 1
    limit = c.lengths.max_length
    prompts = rng.integers(1, limit, 30)  # an answer has one token at least
    real = rng.integers(1, limit - prompts + 1)
    examples = [
        Example(i, [], np.ones(p), np.ones(n)) for i, (p, n) in enumerate(zip(prompts, real, strict=True))
    ]
    worst = sizes(prompts, real, np.minimum(limit - prompts, c.sampling.max_new_tokens))
    shape = from_config.pair_shape(c, tiny_model, examples, {})
    pack(worst, shape.capacity)
    assert shape.length < worst[:, 0].max() + (16 if kernel == "plain" else 128)  # and not much longer
    given = make_pair(0, [1] * 100, [1] * 120, [1] * 130)
    pack(sizes([100], [120], [130]), from_config.pair_shape(c, tiny_model, examples, {0: [given]}).capacity)


@pytest.mark.parametrize("seed", range(4))
def test_official_pairs_fit(seed, tiny_model):
    """Its answers are tokenized anew and can grow up to the limit; only then are they cut."""
    rng, c = np.random.default_rng(seed), config.default()
    c.official, c.lengths.max_prompt, c.lengths.max_length, c.sampling.max_new_tokens = True, 20, 64, 5
    chat = OfficialChat(tiny_model.tokenizer, [2], lengths=Lengths(20, 64))
    examples, pairs = [], []
    for number in range(30):
        question, answer, other = ("a" * int(n) for n in rng.integers(1, 70, 3))
        turns = [
            [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
            for text in (answer, other)
        ]
        examples.append(chat.example(number, turns[0], Counter()))
        pairs.append(chat.given_pair(number, 0, *turns, Counter()))
    shape = from_config.pair_shape(c, tiny_model, examples, {})
    assert packed([pair_group(pair) for pair in pairs], shape)


# --- steps -----------------------------------------------------------------------------------------


def test_buckets():
    found = sorted({sharding.bucket(n) for n in range(1, 1025)})
    assert found == [16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
    assert all(sharding.bucket(n) >= n for n in range(1, 5000))


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
    scored = [
        ScoredPair(make_pair(i, g.prompt, *g.answers), (float(i), -float(i))) for i, g in enumerate(groups)
    ]
    shape = RowShape(rows=2, length=48, groups=3)
    steps = list(
        batches.batches(
            scored, lambda chosen: pair_batches(chosen, shape), 8, shape, seed=0, epochs=2, start=0
        )
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
