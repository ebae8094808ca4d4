"""SPIN's losses: the file to edit for a new one.

A loss takes what two models think of two answers to one prompt, and returns one number a pair:

    loss(policy, opponent, *, beta, **options) -> [B]

`policy` and `opponent` are PairLogps: log p(answer | prompt), summed over the answer's tokens, under
the model that learns (θ) and the one that it plays against (θ_t, a constant here). Axes: B pairs.

The paper's objective (arXiv 2401.01335, eq. 4.7) is the mean of ℓ(t) with

    t = β · [ log p_θ(y|x)/p_θt(y|x) − log p_θ(y'|x)/p_θt(y'|x) ],    y human, y' generated,

for a convex decreasing ℓ with ℓ'(0) < 0. `margin` is t; the four losses are the paper's four ℓ.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from spin_jax.config import import_function

Beta = float | Array


class PairLogps(NamedTuple):
    """Summed log-probabilities of the two answers of each pair, in nats."""

    real: Float[Array, " B"]
    generated: Float[Array, " B"]


def rewards(policy: PairLogps, opponent: PairLogps, beta: Beta) -> PairLogps:
    """β · log p_θ/p_θt of each answer: how much more likely it became, in units of the loss."""
    return PairLogps(
        real=beta * (policy.real - opponent.real),
        generated=beta * (policy.generated - opponent.generated),
    )


def margin(policy: PairLogps, opponent: PairLogps, beta: Beta) -> Float[Array, " B"]:
    """t of the paper: the reward of the human answer less that of the generated one."""
    reward = rewards(policy, opponent, beta)
    return reward.real - reward.generated


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


Loss = Callable[..., Array]

LOSSES: dict[str, Loss] = {
    "logistic": logistic,
    "hinge": hinge,
    "exponential": exponential,
    "correlation": correlation,
}


def find(name: str) -> Loss:
    """The loss of that name, or of `module:function`.

    Raises:
        ValueError: no such loss, module or function.
    """
    if name in LOSSES:
        return LOSSES[name]
    if ":" not in name:
        raise ValueError(f"loss.name={name!r}: choose from {', '.join(LOSSES)}, or give module:function")
    return import_function(name)


def with_nll(loss: Loss, weight: float) -> Loss:
    """`loss` + weight · (−log p_θ(y|x)): keeps the human answer itself likely."""
    if not weight:
        return loss

    def regularized(policy: PairLogps, opponent: PairLogps, **options: Any) -> Array:
        return loss(policy, opponent, **options) - weight * policy.real

    return regularized


def metrics(policy: PairLogps, opponent: PairLogps, *, beta: Beta) -> dict[str, Float[Array, " B"]]:
    """What is logged of each pair; the step averages them.

    `real_logp` may fall while `margin` grows: the loss asks only for the difference.
    """
    reward = rewards(policy, opponent, beta)
    return {
        "margin": reward.real - reward.generated,
        "accuracy": (reward.real > reward.generated).astype(jnp.float32),
        "real_reward": reward.real,
        "generated_reward": reward.generated,
        "real_logp": policy.real,
        "generated_logp": policy.generated,
    }
