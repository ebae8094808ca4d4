"""Pairs and scores are written as parquet files and read back."""

import numpy as np

from spin_jax.data import parquet
from spin_jax.data.records import Pair


def make_pair(prompt_id, prompt, real, generated):
    ids = [np.array(x, np.int32) for x in (prompt, real, generated)]
    real_messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    return Pair(prompt_id, 0, real_messages, real_messages, *ids, truncated=False)


def test_pairs_round_trip():
    pairs = [make_pair(5, [1, 2], [3], [4, 5, 2]), make_pair(2**40, [1], [], [7])]
    back = parquet.pairs_from_parquet(parquet.pairs_to_parquet(pairs))
    for a, b in zip(pairs, back, strict=True):
        assert (a.prompt_id, a.real_messages, a.truncated) == (b.prompt_id, b.real_messages, b.truncated)
        for field in ("prompt", "real", "generated"):
            np.testing.assert_array_equal(getattr(a, field), getattr(b, field))
    scores = parquet.scores_from_parquet(parquet.scores_to_parquet(3, pairs, np.array([[-1, -2], [-3, -4]])))
    assert scores == {(3, 5, 0, -1): (-1.0, -2.0), (3, 2**40, 0, -1): (-3.0, -4.0)}
