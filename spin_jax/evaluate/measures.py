"""Measures of a model on held-out examples: likelihood of the human answers, and its own answers."""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Float

from spin_jax.data.chat import Chat
from spin_jax.data.records import Example, Ids
from spin_jax.models.architecture import Params
from spin_jax.models.decoder import Decoder
from spin_jax.training.log_probs import score_groups
from spin_jax.training.packing import RowShape, example_group


def nll(
    decoder: Decoder,
    params: Params,
    examples: Sequence[Example],
    *,
    mesh: jax.sharding.Mesh,
    shape: RowShape,
    unattended: int | None = None,
    on_batch: Callable[[int], None] = lambda groups: None,
) -> float:
    """The negative log-likelihood of the human answers: the mean of −log p over their tokens, in nats.

    Args:
        shape: the shape of the packed rows.
        unattended, on_batch: as in `score_groups`.
    """
    groups = [example_group(example) for example in examples]
    logps = score_groups(decoder, params, groups, shape, mesh, unattended=unattended, on_batch=on_batch)
    return -float(logps.sum(dtype=np.float64)) / sum(len(example.real) for example in examples)


def response_statistics(chat: Chat, examples: Sequence[Example], answers: Sequence[Ids]) -> dict[str, float]:
    """Of a model's own answers: the mean length, and the shares that equal the human answer and that were cut.

    Args:
        answers: the first answer to every example in order, then the second answer to every example, …
    """
    pairs = [(examples[i % len(examples)], answer) for i, answer in enumerate(answers)]
    return {
        "response_tokens": sum(len(answer) for _, answer in pairs) / len(pairs),
        "response_identical": sum(np.array_equal(e.real, answer) for e, answer in pairs) / len(pairs),
        "response_truncated": sum(not chat.stopped(answer) for _, answer in pairs) / len(pairs),
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
