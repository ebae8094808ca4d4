"""The classifier that tells human answers from generated ones: scikit-learn's weights, and known shares."""

import numpy as np
import pytest

from spin_jax.evaluate import classifier


def accuracy(human, generated):
    return classifier.accuracy(human, generated)["classifier_accuracy"]


def answers(count, probabilities, rng):
    return [rng.choice(len(probabilities), p=probabilities, size=rng.integers(20, 60)) for _ in range(count)]


def distribution(raised=1.0):
    """Zipf's law over 300 tokens, with the first 20 more frequent by a factor."""
    p = 1 / np.arange(1, 301)
    p[:20] *= raised
    return p / p.sum()


def test_weights_are_those_of_scikit_learn():
    """1e-6 of weights up to 1: both solve one convex problem, to the end."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(0)
    features = classifier._features(answers(60, distribution(), rng) + answers(60, distribution(2.0), rng))
    labels = np.repeat([1.0, 0.0], 60)
    factors = classifier._fit((features @ features.T).toarray(), labels)
    theirs = linear_model.LogisticRegression(C=1.0, fit_intercept=False, tol=1e-10, max_iter=10_000)
    np.testing.assert_allclose(features.T @ factors, theirs.fit(features, labels).coef_[0], atol=1e-6)


def test_it_is_half_where_nothing_differs_and_one_where_everything_does():
    rng = np.random.default_rng(0)
    human = answers(150, distribution(), rng)
    assert accuracy(human, human) == 0.5
    assert abs(accuracy(human, answers(150, distribution(), rng)) - 0.5) < 0.09  # 3 standard errors
    assert 0.65 < accuracy(human, answers(150, distribution(2.0), rng)) < 0.95
    assert accuracy(human, [answer + 300 for answer in human]) == 1.0


def test_what_a_prompt_is_about_does_not_help():
    """Every prompt has tokens of its own, which are in both of its answers and in no other's."""
    human = [np.array([1000 + i] * 5) for i in range(40)]
    generated = [np.array([1000 + i] * 5) for i in range(40)]
    assert accuracy(human, generated) == 0.5


def test_too_few_prompts_are_no_number():
    assert classifier.accuracy([np.arange(3)] * 9, [np.arange(3)] * 9) == {}
