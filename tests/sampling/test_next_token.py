"""Top-k and top-p without a sort: what is kept, against the definition in float64 and the sorted form."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spin_jax.runtime import sharding
from spin_jax.sampling import next_token as drawing
from spin_jax.sampling.next_token import Sampling, draw, truncate_logits

# Both sums are float32, in blocks of 256; either side of this share of the mass a token may stay or go.
ROUNDING = 1e-6

compiled_cut = jax.jit(truncate_logits, static_argnames="sampling")
compiled_draw = jax.jit(draw, static_argnames="sampling")


def mass_above(row):
    """Of each token, the share of the mass that the tokens with larger logits have; float64."""
    values, inverse = np.unique(row, return_inverse=True)
    mass = np.exp(values.astype(np.float64) - np.max(values)) * np.bincount(inverse)
    above = np.cumsum(mass[::-1])[::-1] - mass
    return (above / mass.sum())[inverse]


def sorted_form(logits, sampling):
    """The same cuts as they are commonly written, with a sort of the vocabulary."""
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        logits = jnp.where(logits < jax.lax.top_k(logits, sampling.top_k)[0][:, -1:], -jnp.inf, logits)
    descending = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(descending, axis=-1)
    kept = jnp.cumsum(probabilities, axis=-1) - probabilities < (sampling.top_p or 2)
    smallest = jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < smallest, -jnp.inf, logits)


def rows_of(vocabulary):
    """From flat to peaked: logits that are all distinct, many equal ones, half of them −∞, huge ones."""
    rng = np.random.default_rng(vocabulary)
    rows = rng.normal(size=(4, 8, vocabulary)) * np.geomspace(0.01, 8, 8)[:, None]
    rows[1] = np.round(rows[1])
    rows[1] *= np.where(rows[1] == 0, rng.choice([-1.0, 1.0], size=rows[1].shape), 1)  # 0 and −0 are equal
    rows[2, :, 1:][rng.random((8, vocabulary - 1)) < 0.5] = -np.inf
    rows[3] *= 1e37
    return rows.reshape(-1, vocabulary).astype(np.float32)


@pytest.fixture(params=[1, 4])
def truncated_by(request, monkeypatch):
    """The search as each platform runs it: one number a pass, or fifteen."""
    search = drawing._search
    monkeypatch.setattr(drawing, "_search", lambda *args, bits: search(*args, bits=request.param))
    return jax.jit(lambda *args: truncate_logits(*args), static_argnums=1)  # new: compiled with this one


@pytest.mark.parametrize("vocabulary", [5, 3001])
def test_what_is_kept_follows_from_the_definition(vocabulary, truncated_by):
    logits = rows_of(vocabulary)
    for top_k in (1, 4, vocabulary):
        kept = np.asarray(truncated_by(logits, Sampling(1, top_k=top_k)))
        smallest = np.sort(logits, axis=1)[:, -top_k, None]
        np.testing.assert_array_equal(kept, np.where(logits < smallest, -np.inf, logits))
    above = np.stack([mass_above(row) for row in logits])
    for top_p in (1e-46, 0.05, 0.5, 0.999):  # the first is 0 in float32: the likeliest token is kept even so
        kept = np.asarray(truncated_by(logits, Sampling(1, top_p=top_p)))
        surely = (above < top_p - ROUNDING) | (above == 0)
        np.testing.assert_array_equal(kept[surely], logits[surely])
        assert (kept[above >= top_p + ROUNDING] == -np.inf).all()


@pytest.mark.parametrize("options", [{"top_p": 0.9}, {"top_k": 50, "top_p": 0.8}], ids=str)
def test_kept_and_drawn_as_with_a_sort(options):
    """At 32,000 tokens, but for the token on the edge, of which there is at most one a row."""
    sampling = Sampling(1, temperature=0.7, **options)
    logits = 2 * np.random.default_rng(0).normal(size=(8, 32_000)).astype(np.float32)
    kept = np.isfinite(compiled_cut(logits, sampling))
    expected = np.isfinite(jax.jit(sorted_form, static_argnames="sampling")(logits, sampling))
    same = (kept == expected).all(axis=1)
    assert ((kept != expected).sum(axis=1) <= 1).all()
    assert same.sum() >= 6  # an edge within 1e-6 of top_p is rare
    keys = jax.random.split(jax.random.key(1), 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "truncate_logits", sorted_form)
        by_sort = jax.jit(lambda logits, keys: draw(logits, keys, sampling))(logits, keys)
    drawn = compiled_draw(logits, keys, sampling)
    # Tempered logits have edges of their own.
    assert (np.asarray(drawn) == np.asarray(by_sort)).sum() >= 6


@pytest.mark.parametrize("options", [{"top_p": 1.0}, {"top_k": 3001}, {"top_k": 4000, "top_p": 1.0}], ids=str)
def test_cutting_nothing_off_draws_what_no_cut_draws(options):
    logits = rows_of(3001)
    keys = jax.random.split(jax.random.key(2), len(logits))
    np.testing.assert_array_equal(
        compiled_draw(logits, keys, Sampling(1, **options)), compiled_draw(logits, keys, Sampling(1))
    )


def test_draws_of_a_split_vocabulary_are_those_of_one_device(mesh8):
    """Logits come split by rows and by tokens; the sums of a row then run as on one device."""
    sampling = Sampling(1, top_k=40, top_p=0.8)
    logits = jnp.asarray(rows_of(272))
    keys = jax.random.split(jax.random.key(3), len(logits))
    alone = compiled_draw(logits, keys, sampling)
    with jax.set_mesh(mesh8):
        split = sharding.reshard(logits, "batch", "vocab")
        assert not split.sharding.is_fully_replicated
        np.testing.assert_array_equal(compiled_draw(split, keys, sampling), alone)


def test_no_sort_is_compiled():
    """Nor `top_k`, which is one. The sorted form shows that they would be found."""
    logits, keys = jnp.zeros((2, 512)), jax.random.split(jax.random.key(0), 2)
    sampling = Sampling(1, top_k=3, top_p=0.5)

    def sorts(function, *args):
        lowered = jax.jit(functools.partial(function, sampling=sampling)).lower(*args)
        texts = f"{lowered.as_text()}{lowered.compile().as_text()}"
        return set(re.findall(r"stablehlo\.sort|chlo\.top_k| sort\(", texts))

    assert sorts(draw, logits, keys) == set()
    assert sorts(sorted_form, logits) == {"stablehlo.sort", "chlo.top_k", " sort("}
