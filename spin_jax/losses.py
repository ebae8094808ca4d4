"""SPIN's losses and related losses. To add a loss, edit this file.

A loss takes the log-probabilities that two models give to the answers, and returns one number for each row:

    loss(policy, opponent, *, beta, **options) -> [B]

`policy` and `opponent` are NamedTuples of log p(answer | prompt), summed over the tokens of the answer.
`policy` belongs to the model that learns (θ), and `opponent` to the model that it plays against (θ_t, which
is constant here). Their fields are the roles of the answers:

    real         the human answer y
    generated    the opponent's answer y'
    start        the answer y0 of the model that self-play began with (θ_0); only losses that need it have it

Axes: B rows; a row is one prompt with its answers, mostly a pair. A row's loss must depend on that row
alone, because other rows may be empty.

The paper's objective (arXiv 2401.01335, eq. 4.7) is the mean of ℓ(t) with

    t = β · [ log p_θ(y|x)/p_θt(y|x) − log p_θ(y'|x)/p_θt(y'|x) ],    y human, y' generated,

for a convex decreasing ℓ with ℓ'(0) < 0. `margin` is t, and the first four losses are the paper's four ℓ.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Beta = float | Array


class PairLogps(NamedTuple):
    """Summed log-probabilities of the two answers of each pair, in nats."""

    real: Float[Array, " B"]
    generated: Float[Array, " B"]


def rewards(policy: Any, opponent: Any, beta: Beta) -> Any:
    """The reward of each answer: β · log p_θ/p_θt."""
    return type(policy)(*(beta * (p - q) for p, q in zip(policy, opponent, strict=True)))


def margin(policy: PairLogps, opponent: PairLogps, beta: Beta) -> Float[Array, " B"]:
    """t of the paper: the reward of the human answer minus the reward of the generated one."""
    reward = rewards(policy, opponent, beta)
    return reward.real - reward.generated


# --- the paper's losses --------------------------------------------------------------------------


def logistic(policy: PairLogps, opponent: PairLogps, *, beta: Beta) -> Float[Array, " B"]:
    """ℓ(t) = log(1 + e^−t): the loss of the paper's experiments, which is also DPO's (arXiv 2305.18290)."""
    return jax.nn.softplus(-margin(policy, opponent, beta))


def hinge(policy: PairLogps, opponent: PairLogps, *, beta: Beta) -> Float[Array, " B"]:
    """ℓ(t) = max(0, 1 − t)."""
    return jax.nn.relu(1 - margin(policy, opponent, beta))


def exponential(policy: PairLogps, opponent: PairLogps, *, beta: Beta) -> Float[Array, " B"]:
    """ℓ(t) = e^−t."""
    return jnp.exp(-margin(policy, opponent, beta))


def correlation(policy: PairLogps, opponent: PairLogps, *, beta: Beta) -> Float[Array, " B"]:
    """ℓ(t) = 1 − t: the linear loss of an integral probability metric. It has no minimum: train briefly."""
    return 1 - margin(policy, opponent, beta)


# --- related losses ------------------------------------------------------------------------------


def ipo(policy: PairLogps, opponent: PairLogps, *, beta: Beta) -> Float[Array, " B"]:
    """IPO's (t/β − 1/2β)² (arXiv 2310.12036, eq. 17; β is its τ), which aims at a margin of a given size."""
    return (margin(policy, opponent, 1.0) - 1 / (2 * beta)) ** 2


def tspin(policy: Any, opponent: Any, *, beta: Beta, alpha: float = 1.0) -> Float[Array, " B"]:
    """T-SPIN's ℓ(α [log p(y) − log p(y')]) + β ℓ(α [log p(y') − log p(y0)]), ℓ logistic (arXiv 2601.08198).

    It does not use the opponent's log-probabilities. β is the weight of the second term; α scales the differences.
    """
    del opponent
    current = jax.nn.softplus(-alpha * (policy.real - policy.generated))
    historical = jax.nn.softplus(-alpha * (policy.generated - policy.start))
    return current + beta * historical


def likelihood(policy: Any, opponent: Any, *, beta: Beta) -> Float[Array, " B"]:
    """ReST-EM's M-step, −log p(y') of answers that a verifier accepted (arXiv 2312.06585, eq. 3)."""
    del opponent, beta
    return -policy.generated


def sppo(policy: Any, opponent: Any, *, beta: Beta, score: Array) -> Float[Array, " B"]:
    """SPPO's (log p_θ/p_θt(y') − (P − 1/2)/β)² (arXiv 2405.00675, eq. 3.6; β is its 1/η).

    Args:
        score: P [B], the probability that y' is better than another answer of the opponent (selfplay.scorer).
    """
    return (policy.generated - opponent.generated - (score - 0.5) / beta) ** 2


Loss = Callable[..., Array]

LOSSES: dict[str, Loss] = {
    "logistic": logistic,
    "hinge": hinge,
    "exponential": exponential,
    "correlation": correlation,
    "ipo": ipo,
    "tspin": tspin,
    "likelihood": likelihood,
    "sppo": sppo,
}

PAIR = ("real", "generated")

# The answers that the rows of a loss have, for losses that do not take the two answers of a pair.
ROLES: dict[str, tuple[str, ...]] = {
    "tspin": ("real", "generated", "start"),
    "likelihood": ("generated",),
    "sppo": ("generated",),
}


def with_nll(loss: Loss, weight: float) -> Loss:
    """`loss` + weight · (−log p_θ(y|x)); the second term keeps the human answer itself likely."""
    if not weight:
        return loss

    def regularized(policy: Any, opponent: Any, **options: Any) -> Array:
        return loss(policy, opponent, **options) - weight * policy.real

    return regularized


def metrics(policy: Any, opponent: Any, *, beta: Beta) -> dict[str, Float[Array, " B"]]:
    """The numbers that are logged for each row; the training step averages them.

    `real_logp` may fall while `margin` grows, because the loss only depends on the difference.
    """
    reward = rewards(policy, opponent, beta)
    values = {f"{role}_reward": value for role, value in reward._asdict().items()}
    values |= {f"{role}_logp": value for role, value in policy._asdict().items()}
    if values.keys() >= {"real_reward", "generated_reward"}:
        values["margin"] = reward.real - reward.generated
        values["accuracy"] = (reward.real > reward.generated).astype(jnp.float32)
    return values
