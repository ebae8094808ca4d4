"""How well a small classifier tells a model's answers from human ones: 0.5 where it cannot, which is what SPIN aims at.

The classifier is a logistic regression on the tokens and pairs of neighbouring tokens that an answer has.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import scipy.sparse

from spin_jax.data.records import Ids

FOLDS = 5
_L2 = 1.0  # of the weights, against the sum of the losses
_NEWTON_STEPS = 20  # about six are enough


def accuracy(human: Sequence[Ids], generated: Sequence[Ids], seed: int = 0) -> dict[str, float]:
    """`classifier_accuracy`: the share of answers assigned to the right side, by cross-validation in five folds.

    Both answers to a prompt are in the same fold, so that what a prompt is about helps with neither. With fewer than
    ten prompts there is too little to learn from, and no number.

    Args:
        human: the human answer to each prompt, as token ids.
        generated: the model's answer to each prompt.
        seed: decides which prompts are in which fold.
    """
    prompts = len(human)
    if prompts < 2 * FOLDS:
        return {}
    features = _features([*human, *generated])
    kernel = (features @ features.T).toarray()
    is_human = np.repeat([1.0, 0.0], prompts)
    fold = np.tile(np.random.default_rng(seed).permutation(prompts) % FOLDS, 2)
    logits = np.empty(2 * prompts)
    for number in range(FOLDS):
        inside = fold == number
        fitted = _fit(kernel[np.ix_(~inside, ~inside)], is_human[~inside])
        logits[inside] = kernel[np.ix_(inside, ~inside)] @ fitted
    right = np.where(is_human, logits, -logits)
    return {"classifier_accuracy": float(np.mean(right > 0) + np.mean(right == 0) / 2)}


def _features(answers: Sequence[Ids]) -> scipy.sparse.csr_matrix:
    """1 where an answer has a token, or a pair of neighbouring tokens; one column of ones for the bias."""
    columns: dict[tuple[int, ...], int] = {(): 0}
    row_ends, indices = [0], []
    for answer in answers:
        tokens = np.asarray(answer).tolist()
        grams = {(), *zip(tokens), *itertools.pairwise(tokens)}
        indices += [columns.setdefault(gram, len(columns)) for gram in sorted(grams)]
        row_ends.append(len(indices))
    ones = np.ones(len(indices))
    return scipy.sparse.csr_matrix((ones, indices, row_ends), shape=(len(answers), len(columns)))


def _fit(kernel: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Logistic regression by Newton's method in its dual form, for there are more features than answers.

    Args:
        kernel: the inner products of the answers' features, [answers, answers].
        labels: 1 for a human answer, 0 for a generated one.

    Returns:
        the factor of each answer: the weights are the sum of the features of all answers, times their factors.
    """
    factors = np.zeros(len(labels))
    for _ in range(_NEWTON_STEPS):
        logits = kernel @ factors
        p = 1 / (1 + np.exp(-np.clip(logits, -30, 30)))
        curvature = p * (1 - p)
        updated = np.linalg.solve(kernel + np.diag(_L2 / curvature), logits + (labels - p) / curvature)
        if np.allclose(updated, factors, atol=1e-6):
            break
        factors = updated
    return factors
