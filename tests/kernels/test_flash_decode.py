"""Decoding's attention kernel, interpreted, and where a ring's tokens stand."""

import jax.numpy as jnp
import numpy as np
import pytest

from spin_jax.kernels import flash_decode
from spin_jax.kernels.layout import Layout
from spin_jax.models.attention import plain
from spin_jax.models.cache import ring_layout

CASES = {
    "grouped heads": {},
    "many shares": {"programs": 64, "S": 320},
    "one share": {"programs": 1, "S": 200},
    "softcap and scale": {"softcap": 5.0, "scale": 0.3, "K": 4},
    "head dim 80, three heads a group": {"N": 6, "K": 2, "H": 80},
    "head dim 256, a window": {"H": 256, "N": 2, "window": 21},
    "a ring shorter than a block": {"S": 9, "H": 8, "window": 9},
}


@pytest.mark.parametrize("case", CASES)
def test_equals_plain_and_reads_only_what_is_filled(case, monkeypatch):
    """float32; outputs are up to 3, and both ways of summing up to 320 products are right to 1e-6 or so.

    Columns that hold nothing of a slot hold NaN: to read one would show. A slot without any gets zeros.
    """
    options = {"B": 4, "N": 8, "K": 2, "S": 130, "H": 64, "programs": 512, **CASES[case]}
    B, N, K, S, H = (options[name] for name in "BNKSH")
    how = {"scale": options.get("scale"), "softcap": options.get("softcap")}
    window = options.get("window")
    monkeypatch.setattr(flash_decode, "PROGRAMS", options["programs"])
    rng = np.random.default_rng(0)
    q = rng.normal(size=(B, N, H)).astype(np.float32)
    k, v = rng.normal(size=(2, B, K, S, H)).astype(np.float32)
    newest = np.array([0, S // 3, S - 1, 5 * S], np.int32)
    column = rng.integers(S, dtype=np.int32)
    here = Layout(newest[:, None], np.ones((B, 1), np.int32))
    ring = ring_layout(jnp.asarray(newest), column, S)
    expected = plain(q[:, None], k, v, here, ring, window, **how)[:, 0]

    lengths = np.minimum(newest + 1, min(window or S, S))
    back = (column - np.arange(S)) % S
    for cache in (k, v):
        cache[np.broadcast_to((back >= lengths[:, None])[:, None], (B, K, S))] = np.nan
    lengths = np.concatenate([lengths, [0]])
    q, k, v = (np.concatenate([x, x[:1]]) for x in (q, k, v))
    out = flash_decode.attend(q, k, v, jnp.asarray(column), jnp.asarray(lengths), **how, interpret=True)
    np.testing.assert_allclose(out[:B], expected, rtol=0, atol=2e-6)
    np.testing.assert_array_equal(out[B], 0)


def test_where_the_tokens_of_a_ring_stand():
    """Written one by one from any column on, as a prompt and its answer are: fewer than columns, and more."""
    S = 7
    for begin in range(S):
        held = np.full(S, -1)
        for position in range(2 * S + 1):
            column = (begin + position) % S
            held[column] = position
            positions, segments, *_ = ring_layout(jnp.array([position]), jnp.int32(column), S)
            np.testing.assert_array_equal(segments[0], held >= 0)
            np.testing.assert_array_equal(np.where(held >= 0, positions[0], -1), held)
