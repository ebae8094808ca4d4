"""SPIN's losses and related losses. To add a loss, edit this file.

A loss takes the log-probabilities that two models give to the answers, and returns one number for each row:

    loss(policy, opponent, *, beta, **more) -> [B]

`policy` and `opponent` are NamedTuples of log p(answer | prompt), summed over the tokens of the answer.
`policy` belongs to the model that learns (θ), and `opponent` to the model that it plays against (θ_t, which
is constant here). Their fields are the roles of the answers:

    real         the human answer y
    generated    the opponent's answer y'
    start        the answer y0 of the model that self-play began with (θ_0); only losses that need it have it

A loss gets more by the names of its parameters, and each other parameter is an option (loss.options, a number):

    beta         β of the iteration, a number
    lengths      how many tokens each answer has: int32 [B] by role, at least 1
    score        the scorer's score of the generated answer: float32 [B]

Axes: B rows; a row is one prompt with its answers, mostly a pair. A row's loss must depend on that row
alone, because other rows may be empty.

The paper's objective (arXiv 2401.01335, eq. 4.7) is the mean of ℓ(t) with

    t = β · [ log p_θ(y|x)/p_θt(y|x) − log p_θ(y'|x)/p_θt(y'|x) ],    y human, y' generated,

for a convex decreasing ℓ with ℓ'(0) < 0. `margin` is t, and the first four losses are the paper's four ℓ.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Beta = float | Array
Loss = Callable[..., Array]


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


def space(policy: PairLogps, opponent: PairLogps, *, beta: Beta, mu: float = 1.0) -> Float[Array, " B"]:
    """SPACE's −log σ_μ(r) − μ log σ_{1/μ}(−r'), σ_μ(z) = 1 / (1 + μ e^−z) (arXiv 2512.07175).

    r and r' are the rewards of the human and of the generated answer. Each is compared with 0, not with the other: the
    model learns to tell human answers from generated ones (noise contrastive estimation). β is 1 in the paper, and the
    optimum is the data distribution only then. μ is how many generated answers count for a human one.
    """
    reward, shift = rewards(policy, opponent, beta), math.log(mu)
    return jax.nn.softplus(shift - reward.real) + mu * jax.nn.softplus(reward.generated - shift)


def xpo(policy: Any, opponent: Any, *, beta: Beta, alpha: float = 1e-5) -> Float[Array, " B"]:
    """XPO's ℓ(t) + α log p_θ(y0), ℓ logistic (arXiv 2405.21046, Algorithm 1): less of what the start answered."""
    return logistic(policy, opponent, beta=beta) + alpha * policy.start


# --- losses of preference optimization: `real` is the preferred answer, `generated` the other one ----


def cdpo(policy: PairLogps, opponent: PairLogps, *, beta: Beta, label_smoothing: float = 0.1) -> Float[Array, " B"]:
    """Conservative DPO's (1 − ε) ℓ(t) + ε ℓ(−t), ℓ logistic (E. Mitchell, 2023, ericmitchell.ai/cdpo.pdf).

    ε, label_smoothing, is the share of pairs whose answers are taken to be exchanged. The loss asks for a margin of
    log((1 − ε)/ε) and not for more.
    """
    t, e = margin(policy, opponent, beta), _share(label_smoothing)
    return (1 - e) * jax.nn.softplus(-t) + e * jax.nn.softplus(t)


def robust_dpo(
    policy: PairLogps, opponent: PairLogps, *, beta: Beta, label_smoothing: float = 0.1
) -> Float[Array, " B"]:
    """Robust DPO's ((1 − ε) ℓ(t) − ε ℓ(−t)) / (1 − 2ε), ℓ logistic (arXiv 2403.00409).

    If a share ε of the pairs, label_smoothing, is exchanged, its mean is the logistic loss of the right pairs.
    """
    t, e = margin(policy, opponent, beta), _share(label_smoothing)
    return ((1 - e) * jax.nn.softplus(-t) - e * jax.nn.softplus(t)) / (1 - 2 * e)


def dpo_per_token(policy: PairLogps, opponent: PairLogps, *, beta: Beta, lengths: Any) -> Float[Array, " B"]:
    """Length-normalized DPO: ℓ(r/|y| − r'/|y'|), ℓ logistic (arXiv 2411.15124); β scales rewards per token."""
    return logistic(_per_token(policy, lengths), _per_token(opponent, lengths), beta=beta)


def simpo(policy: Any, opponent: Any, *, beta: Beta, lengths: Any, gamma: float = 0.5) -> Float[Array, " B"]:
    """SimPO's ℓ(β/|y| log p(y) − β/|y'| log p(y') − γ), ℓ logistic (arXiv 2405.14734).

    It does not use the opponent's log-probabilities. β scales log-probabilities per token (2 to 2.5 in the paper), and
    γ is the margin that the loss asks for.
    """
    del opponent
    mean = _per_token(policy, lengths)
    return jax.nn.softplus(gamma - beta * (mean.real - mean.generated))


def exo(policy: PairLogps, opponent: PairLogps, *, beta: Beta, label_smoothing: float = 1e-3) -> Float[Array, " B"]:
    """EXO of pairs: KL[(σ(t), σ(−t)) ‖ (1 − ε, ε)] (arXiv 2402.00856, eq. 16), a reverse KL divergence.

    β is its β_π, and ε, label_smoothing, must be above 0: the loss asks for a margin of log((1 − ε)/ε).
    """
    t, e = margin(policy, opponent, beta), _share(label_smoothing)
    first = jax.nn.sigmoid(t) * (jax.nn.log_sigmoid(t) - jnp.log1p(-e))
    return first + jax.nn.sigmoid(-t) * (jax.nn.log_sigmoid(-t) - jnp.log(e))


def nca(policy: PairLogps, opponent: PairLogps, *, beta: Beta) -> Float[Array, " B"]:
    """NCA of pairs: −log σ(r) − ½ log σ(−r) − ½ log σ(−r') (arXiv 2402.05369); r is aimed at, not only r − r'."""
    reward = rewards(policy, opponent, beta)
    return jax.nn.softplus(-reward.real) + 0.5 * (jax.nn.softplus(reward.real) + jax.nn.softplus(reward.generated))


def apo_zero(policy: PairLogps, opponent: PairLogps, *, beta: Beta) -> Float[Array, " B"]:
    """APO-zero's 1 − σ(r) + σ(r') (arXiv 2408.06266, eq. 7): for human answers better than the model's."""
    reward = rewards(policy, opponent, beta)
    return jax.nn.sigmoid(-reward.real) + jax.nn.sigmoid(reward.generated)


def apo_down(policy: PairLogps, opponent: PairLogps, *, beta: Beta) -> Float[Array, " B"]:
    """APO-down's σ(r) + 1 − σ(r − r') (arXiv 2408.06266, eq. 8): for human answers worse than the model's.

    It makes both answers less likely, the generated one more so.
    """
    reward = rewards(policy, opponent, beta)
    return jax.nn.sigmoid(reward.real) + jax.nn.sigmoid(reward.generated - reward.real)


def _per_token(logps: Any, lengths: Any) -> Any:
    return type(logps)(*(logp / length for logp, length in zip(logps, lengths, strict=True)))


def _share(label_smoothing: float) -> float:
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing:g}: a share of the pairs is wanted, from 0 to below 0.5")
    return label_smoothing


# --- losses by name ------------------------------------------------------------------------------

_ALL = (logistic, hinge, exponential, correlation, ipo, tspin, likelihood, sppo, space, xpo)
_ALL += (cdpo, robust_dpo, dpo_per_token, simpo, exo, nca, apo_zero, apo_down)

LOSSES: dict[str, Loss] = {loss.__name__: loss for loss in _ALL}

PAIR = ("real", "generated")

# The answers that the rows of a loss have, for losses that do not take the two answers of a pair.
ROLES: dict[str, tuple[str, ...]] = {
    "tspin": ("real", "generated", "start"),
    "likelihood": ("generated",),
    "sppo": ("generated",),
    "xpo": ("real", "generated", "start"),
}


def nll(policy: Any, opponent: Any) -> Array:
    """−log p_θ(y|x), which keeps the human answer, or the chosen one, itself likely (loss.nll_weight)."""
    del opponent
    return -policy.real


def metrics(policy: Any, opponent: Any, *, beta: Beta) -> dict[str, Float[Array, " B"]]:
    """The numbers that are logged for each row; the training step averages them.

    `real_logp` may fall while `margin` grows, because the loss only depends on the difference. Rewards and margin are
    measured against the opponent, also for losses that do not use it.
    """
    reward = rewards(policy, opponent, beta)
    values = {f"{role}_reward": value for role, value in reward._asdict().items()}
    values |= {f"{role}_logp": value for role, value in policy._asdict().items()}
    if values.keys() >= {"real_reward", "generated_reward"}:
        values["margin"] = reward.real - reward.generated
        values["accuracy"] = (reward.real > reward.generated).astype(jnp.float32)
    return values
