"""The shape of the micro-batches: it keeps its bounds, wastes little, and every answer fits."""

from collections import Counter

import numpy as np
import pytest
from training_examples import make_pair

from spin_jax import config
from spin_jax.data.official import OfficialChat
from spin_jax.data.records import Lengths
from spin_jax.runtime import sharding
from spin_jax.selfplay import from_config
from spin_jax.training.batch_shape import choose_shape
from spin_jax.training.packing import RowShape, pack, packed, pair_group, sizes

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
    lengths = np.stack([prompts, real], axis=1)
    worst = sizes(prompts, real, np.minimum(limit - prompts, c.sampling.max_new_tokens))
    shape = from_config.pair_shape_of_lengths(c, tiny_model, lengths, {})
    pack(worst, shape.capacity)
    assert shape.length < worst[:, 0].max() + (16 if kernel == "plain" else 128)  # and not much longer
    given = make_pair(0, [1] * 100, [1] * 120, [1] * 130)
    with_given = from_config.pair_shape_of_lengths(c, tiny_model, lengths, {0: [given]})
    pack(sizes([100], [120], [130]), with_given.capacity)


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
            [{"role": "user", "content": question}, {"role": "assistant", "content": text}] for text in (answer, other)
        ]
        examples.append(chat.example(number, turns[0], Counter()))
        pairs.append(chat.given_pair(number, 0, *turns, Counter()))
    lengths = np.array([(len(example.prompt), len(example.real)) for example in examples])
    shape = from_config.pair_shape_of_lengths(c, tiny_model, lengths, {})
    assert packed([pair_group(pair) for pair in pairs], shape)


def test_buckets():
    found = sorted({sharding.bucket(n) for n in range(1, 1025)})
    assert found == [16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
    assert all(sharding.bucket(n) >= n for n in range(1, 5000))
