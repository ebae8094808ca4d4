"""Standard errors, and the variety of answers, by values computed by hand and by the jackknife."""

from types import SimpleNamespace

import numpy as np
import pytest

from spin_jax.evaluate import measures


def examples_of(lengths):
    return [SimpleNamespace(prompt=np.arange(3), real=np.arange(n)) for n in lengths]


def test_the_error_of_the_nll_is_that_of_a_ratio():
    """Against the jackknife over examples, within 2%: both are right to first order in 1/300."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 200, 300)
    logps = -lengths * rng.uniform(0.5, 1.5, 300) + rng.normal(size=300)
    found = measures.likelihood(logps, lengths)
    assert found["nll"] == pytest.approx(-logps.sum() / lengths.sum())
    without = -(logps.sum() - logps) / (lengths.sum() - lengths)
    jackknife = np.sqrt(299 / 300 * ((without - without.mean()) ** 2).sum())
    assert found["nll_stderr"] == pytest.approx(jackknife, rel=0.02)


def test_the_error_of_an_accuracy_is_that_between_prompts():
    verdicts = np.array([[True, False, True], [True, True, True]])  # shares of the prompts: 1, 0.5, 1
    found = measures.accuracy("right", verdicts)
    assert found["right"] == pytest.approx(5 / 6)
    assert found["right_stderr"] == pytest.approx(np.std([1, 0.5, 1], ddof=1) / np.sqrt(3))
    p, n = 0.25, 4  # one answer a prompt: the binomial error, with n − 1
    assert measures.accuracy("x", np.array([[True, False, False, False]]))["x_stderr"] == pytest.approx(
        np.sqrt(p * (1 - p) / (n - 1))
    )


def test_one_prompt_has_no_error():
    assert np.isnan(measures.accuracy("x", np.array([[True], [False]]))["x_stderr"])


def test_distinct_pairs_of_tokens_are_counted_in_first_answers():
    chat = SimpleNamespace(stopped=lambda answer: True)
    answers = [np.array([1, 2, 1, 2]), np.array([1, 2]), np.array([7, 8, 9]), np.array([4])]
    row = measures.response_statistics(chat, examples_of([4, 4]), answers)
    assert row["response_distinct_2"] == 2 / 4  # 12, 21, 12 and 12
    assert "classifier_accuracy" not in row  # two prompts are too few
