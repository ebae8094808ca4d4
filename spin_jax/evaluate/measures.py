"""Measures of a model on held-out examples: likelihood of the human answers, and its own answers."""

import itertools
import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from spin_jax.data.chat import Chat
from spin_jax.data.records import Example, Ids
from spin_jax.evaluate import classifier
from spin_jax.models.architecture import Params
from spin_jax.models.decoder import Decoder
from spin_jax.training.log_probs import score_groups
from spin_jax.training.packing import RowShape, example_group


def real_logps(
    decoder: Decoder,
    params: Params,
    examples: Sequence[Example],
    *,
    mesh: jax.sharding.Mesh,
    shape: RowShape,
    unattended: int | None = None,
    on_batch: Callable[[int], None] = lambda groups: None,
) -> Float[np.ndarray, " prompts"]:
    """log p of the human answer to each example, in nats.

    Args:
        shape: the shape of the packed rows.
        unattended, on_batch: as in `score_groups`.
    """
    groups = [example_group(example) for example in examples]
    return score_groups(decoder, params, groups, shape, mesh, unattended=unattended, on_batch=on_batch)[:, 0]


def likelihood(logps: Float[np.ndarray, " prompts"], tokens: Int[np.ndarray, " prompts"]) -> dict[str, float]:
    """`nll`, the mean of −log p over the tokens of the human answers, in nats, with its standard error."""
    nll = -float(logps.sum(dtype=np.float64)) / sum(tokens)
    # The number of tokens is random as well, so this is the error of a ratio.
    return {"nll": nll, "nll_stderr": _stderr(-(logps + nll * tokens) / tokens.mean())}


def accuracy(name: str, verdicts: Bool[np.ndarray, "samples prompts"]) -> dict[str, float]:
    """The share of right answers under this name, with its standard error: prompts are a random choice."""
    return {name: float(verdicts.mean()), f"{name}_stderr": _stderr(verdicts.mean(axis=0))}


def _stderr(values: Float[np.ndarray, " prompts"]) -> float:
    """The standard error of the mean; NaN for one value."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def response_statistics(chat: Chat, examples: Sequence[Example], answers: Sequence[Ids]) -> dict[str, float]:
    """Statistics of a model's own answers.

    They are the mean length; the shares that equal the human answer and that were cut; and, of the first answer to each
    prompt, the share of different ones among the pairs of neighbouring tokens ("distinct-2"), and how well a classifier
    tells them from the human answers.

    Args:
        answers: the first answer to every example in order, then the second answer to every example, …
    """
    pairs = [(examples[i % len(examples)], answer) for i, answer in enumerate(answers)]
    first = answers[: len(examples)]
    neighbours = [pair for answer in first for pair in itertools.pairwise(answer.tolist())]
    return {
        "response_tokens": sum(len(answer) for _, answer in pairs) / len(pairs),
        "response_identical": sum(np.array_equal(e.real, answer) for e, answer in pairs) / len(pairs),
        "response_truncated": sum(not chat.stopped(answer) for _, answer in pairs) / len(pairs),
        "response_distinct_2": len(set(neighbours)) / len(neighbours) if neighbours else math.nan,
        **classifier.accuracy([example.real for example in examples], first),
    }


def kl(own: Float[np.ndarray, " answers"], reference: Float[np.ndarray, " answers"]) -> float:
    """An estimate of KL(model ‖ reference) in nats per answer, from log-probs of the model's own answers.

    It is the mean of log p − log p_ref over answers sampled from p at temperature 1, without top-k or top-p: `own` is
    Σ log p of each answer under the model that sampled it, `reference` the same under the other model. Answers are cut
    at max_new_tokens, so it is the divergence between distributions of cut answers. The estimate is unbiased, and 0
    for equal models; near 0 it can be negative. The estimator "k3" of Schulman, "Approximating KL divergence" (2020),
    r − 1 − log r with r = p_ref/p, is never negative but is meant for single tokens: over whole answers log r is many
    nats, and one answer that the reference finds likelier outweighs all others.
    """
    return float(np.mean(own.astype(np.float64) - reference))
