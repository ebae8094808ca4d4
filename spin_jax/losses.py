"""SPIN's losses and their relatives: the file to edit for a new one.

A loss takes what two models think of the answers to one prompt, and returns one number a row:

    loss(policy, opponent, *, beta, **options) -> [B]

`policy` and `opponent` are NamedTuples of log p(answer | prompt), summed over the answer's tokens, under the
model that learns (θ) and the one that it plays against (θ_t, a constant here). Their fields are roles:

    real         the human answer y
    generated    the opponent's answer y'
    start        what the model that self-play began with (θ_0) answered, y0, for losses that ask for it

Axes: B rows (pairs, mostly). A row's number depends on that row alone: rows are packed, and some are empty.

The paper's objective (arXiv 2401.01335, eq. 4.7) is the mean of ℓ(t) with

    t = β · [ log p_θ(y|x)/p_θt(y|x) − log p_θ(y'|x)/p_θt(y'|x) ],    y human, y' generated,

for a convex decreasing ℓ with ℓ'(0) < 0. `margin` is t; the first four losses are the paper's four ℓ.
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
    """β · log p_θ/p_θt of each answer: how much more likely it became, in units of the loss."""
    return type(policy)(*(beta * (p - q) for p, q in zip(policy, opponent, strict=True)))


def margin(policy: PairLogps, opponent: PairLogps, beta: Beta) -> Float[Array, " B"]:
    """t of the paper: the reward of the human answer less that of the generated one."""
    reward = rewards(policy, opponent, beta)
    return reward.real - reward.generated


# --- the paper's ---------------------------------------------------------------------------------


def logistic(policy: PairLogps, opponent: PairLogps, *, beta: Beta) -> Float[Array, " B"]:
    """ℓ(t) = log(1 + e^−t): the loss of the paper's experiments, and DPO's (arXiv 2305.18290)."""
    return jax.nn.softplus(-margin(policy, opponent, beta))


def hinge(policy: PairLogps, opponent: PairLogps, *, beta: Beta) -> Float[Array, " B"]:
    """ℓ(t) = max(0, 1 − t)."""
    return jax.nn.relu(1 - margin(policy, opponent, beta))


def exponential(policy: PairLogps, opponent: PairLogps, *, beta: Beta) -> Float[Array, " B"]:
    """ℓ(t) = e^−t."""
    return jnp.exp(-margin(policy, opponent, beta))


def correlation(policy: PairLogps, opponent: PairLogps, *, beta: Beta) -> Float[Array, " B"]:
    """ℓ(t) = 1 − t: the linear loss of an integral probability metric; unbounded, so train briefly."""
    return 1 - margin(policy, opponent, beta)


# --- their relatives -----------------------------------------------------------------------------


def ipo(policy: PairLogps, opponent: PairLogps, *, beta: Beta) -> Float[Array, " B"]:
    """(t/β − 1/2β)²: IPO's (arXiv 2310.12036, eq. 17; β is its τ), which wants a margin and no more."""
    return (margin(policy, opponent, 1.0) - 1 / (2 * beta)) ** 2


def tspin(policy: Any, opponent: Any, *, beta: Beta, alpha: float = 1.0) -> Float[Array, " B"]:
    """ℓ(α [log p(y) − log p(y')]) + β ℓ(α [log p(y') − log p(y0)]), logistic ℓ: T-SPIN's (arXiv 2601.08198).

    It knows no reference: here β weighs the second term, and α scales the differences.
    """
    del opponent
    current = jax.nn.softplus(-alpha * (policy.real - policy.generated))
    historical = jax.nn.softplus(-alpha * (policy.generated - policy.start))
    return current + beta * historical


def likelihood(policy: Any, opponent: Any, *, beta: Beta) -> Float[Array, " B"]:
    """−log p(y'): of the answers that a verifier takes, ReST-EM's M-step (arXiv 2312.06585, eq. 3)."""
    del opponent, beta
    return -policy.generated


def sppo(policy: Any, opponent: Any, *, beta: Beta, score: Array) -> Float[Array, " B"]:
    """(log p_θ/p_θt(y') − (P − 1/2)/β)²: SPPO's (arXiv 2405.00675, eq. 3.6; β is its 1/η).

    Args:
        score: P, how probably y' is better than another answer of the opponent's; what selfplay.scorer gives.
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

# The answers that a row has, where they are not the two of a pair.
ROLES: dict[str, tuple[str, ...]] = {
    "tspin": ("real", "generated", "start"),
    "likelihood": ("generated",),
    "sppo": ("generated",),
}


def with_nll(loss: Loss, weight: float) -> Loss:
    """`loss` + weight · (−log p_θ(y|x)): keeps the human answer itself likely."""
    if not weight:
        return loss

    def regularized(policy: Any, opponent: Any, **options: Any) -> Array:
        return loss(policy, opponent, **options) - weight * policy.real

    return regularized


def metrics(policy: Any, opponent: Any, *, beta: Beta) -> dict[str, Float[Array, " B"]]:
    """What is logged of each row; the step averages them.

    `real_logp` may fall while `margin` grows: the loss asks only for the difference.
    """
    reward = rewards(policy, opponent, beta)
    values = {f"{role}_reward": value for role, value in reward._asdict().items()}
    values |= {f"{role}_logp": value for role, value in policy._asdict().items()}
    if values.keys() >= {"real_reward", "generated_reward"}:
        values["margin"] = reward.real - reward.generated
        values["accuracy"] = (reward.real > reward.generated).astype(jnp.float32)
    return values
