"""The losses against hand-computed values, TRL's code and the paper's theorem."""

import math
from unittest.mock import MagicMock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spin_jax import losses
from spin_jax.losses import LOSSES, PairLogps

PAPERS = ("logistic", "hinge", "exponential", "correlation")
RNG = np.random.default_rng(0)
POLICY = PairLogps(*jnp.asarray(RNG.normal(-40, 8, (2, 6)), jnp.float32))
OPPONENT = PairLogps(*jnp.asarray(RNG.normal(-40, 8, (2, 6)), jnp.float32))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("logistic", [math.log1p(math.exp(-2)), math.log1p(math.exp(2)), math.log(2)]),
        ("hinge", [0.0, 3.0, 1.0]),
        ("exponential", [math.exp(-2), math.exp(2), 1.0]),
        ("correlation", [-1.0, 3.0, 1.0]),
    ],
)
def test_values_by_hand(name, expected):
    """t = 0.5 · (4 − 0), 0.5 · (0 − 4) and 0."""
    policy = PairLogps(jnp.array([-6.0, -10.0, -3.0]), jnp.array([-7.0, -3.0, -3.0]))
    opponent = PairLogps(jnp.array([-10.0, -10.0, -3.0]), jnp.array([-7.0, -7.0, -3.0]))
    values = LOSSES[name](policy, opponent, beta=0.5)
    assert values.shape == (3,)
    np.testing.assert_allclose(values, expected, rtol=1e-6)


def trl_loss(loss_type: str, beta: float, i: int) -> float:
    """TRL's own DPO loss of pair i: its trainer's method, run on a model that returns our numbers."""
    torch = pytest.importorskip("torch")
    dpo_trainer = pytest.importorskip("trl.trainer.dpo_trainer")
    trainer = MagicMock()
    trainer.accelerator = MagicMock(device="cpu", gather_for_metrics=lambda x: x, gather=lambda x: x)
    trainer.ld_alpha = None
    trainer.aux_loss_enabled = trainer.use_weighting = False
    trainer.precompute_ref_logps = True
    trainer.f_divergence_type = "reverse_kl"
    trainer.loss_types, trainer.loss_weights, trainer.beta = [loss_type], [1.0], beta

    def tensor(*values):
        return torch.tensor([float(v) for v in values])

    class Output:
        log_probs = tensor(POLICY.real[i], POLICY.generated[i])[:, None]

        def __getattr__(self, name):  # statistics that the trainer logs
            return torch.zeros(2, 1, dtype=torch.bool if name.startswith("is_") else torch.float32)

    def model(**_):
        return Output()

    inputs = {
        "input_ids": torch.ones(2, 2, dtype=torch.long),
        "attention_mask": torch.ones(2, 2, dtype=torch.long),
        "completion_mask": torch.tensor([[0, 1], [0, 1]]),
        "ref_chosen_logps": tensor(OPPONENT.real[i]),
        "ref_rejected_logps": tensor(OPPONENT.generated[i]),
    }
    return float(dpo_trainer.DPOTrainer._compute_loss(trainer, model, inputs, False))


@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
@pytest.mark.parametrize(("ours", "theirs"), [("logistic", "sigmoid"), ("hinge", "hinge")])
def test_equals_trl(ours, theirs, beta):
    """TRL's sigmoid and hinge DPO losses are SPIN's of the same four numbers; float32 rounding apart."""
    values = LOSSES[ours](POLICY, OPPONENT, beta=beta)
    expected = [trl_loss(theirs, beta, i) for i in range(6)]
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [*PAPERS, "ipo"])
def test_gradient_raises_the_human_answer(name):
    """ℓ decreases: descent raises log p(real) and lowers log p(generated), equally."""
    at_start = jax.grad(lambda p: LOSSES[name](p, OPPONENT, beta=0.3).sum())(OPPONENT)
    assert (at_start.real < 0).all()
    np.testing.assert_allclose(at_start.real, -at_start.generated)


def test_start_of_an_iteration():
    """θ = θ_t: the logistic loss is ln 2, and its gradient −β/2 a nat."""
    np.testing.assert_allclose(LOSSES["logistic"](OPPONENT, OPPONENT, beta=0.1), math.log(2), rtol=1e-6)
    gradient = jax.grad(lambda p: LOSSES["logistic"](p, OPPONENT, beta=0.1).sum())(OPPONENT)
    np.testing.assert_allclose(gradient.real, -0.05, rtol=1e-6)


@pytest.mark.parametrize("name", [*PAPERS, "ipo"])
def test_identical_answers_give_no_gradient(name):
    def loss(logits):
        logp = jax.nn.log_softmax(logits)[1][None]  # both answers are the same sequence
        return LOSSES[name](PairLogps(logp, logp), PairLogps(logp * 0 - 3, logp * 0 - 3), beta=2.0).sum()

    np.testing.assert_array_equal(jax.grad(loss)(jnp.array([0.3, -1.0, 2.0])), 0.0)


@pytest.mark.parametrize("name", ["logistic", "exponential", "correlation"])
def test_theorem_spin_reaches_the_data_distribution(name):
    """Theorem 5.2: played to the end, SPIN's opponent becomes p_data; here with exact expectations."""
    data = jnp.array([0.5, 0.3, 0.15, 0.05])
    opponent = jnp.array([0.1, 0.2, 0.3, 0.4])
    answers = jnp.arange(4)
    real, generated = (a.reshape(-1) for a in jnp.meshgrid(answers, answers, indexing="ij"))

    @jax.jit
    def iteration(opponent):
        weight = data[real] * opponent[generated]
        reference = PairLogps(jnp.log(opponent)[real], jnp.log(opponent)[generated])

        def objective(logits):
            logp = jax.nn.log_softmax(logits)
            return jnp.sum(weight * LOSSES[name](PairLogps(logp[real], logp[generated]), reference, beta=1.0))

        def descend(_, logits):
            return logits - 0.5 * jax.grad(objective)(logits)

        return jax.nn.softmax(jax.lax.fori_loop(0, 3, descend, jnp.log(opponent)))

    before = float(jnp.abs(opponent - data).sum())
    for _ in range(300):
        opponent = iteration(opponent)
    assert before > 0.8
    np.testing.assert_allclose(opponent, data, atol=1e-3)
    np.testing.assert_allclose(iteration(opponent), data, atol=1e-3)  # and stays


def test_metrics():
    values = losses.metrics(POLICY, OPPONENT, beta=0.1)
    np.testing.assert_allclose(values["real_reward"], 0.1 * (POLICY.real - OPPONENT.real), rtol=1e-5)
    np.testing.assert_allclose(values["margin"], values["real_reward"] - values["generated_reward"], rtol=1e-5)
    np.testing.assert_array_equal(values["accuracy"], values["margin"] > 0)
    np.testing.assert_array_equal(values["real_logp"], POLICY.real)


def test_nll_term():
    plain = LOSSES["hinge"](POLICY, OPPONENT, beta=0.1)
    regularized = losses.with_nll(LOSSES["hinge"], 0.25)(POLICY, OPPONENT, beta=0.1)
    np.testing.assert_allclose(regularized, plain - 0.25 * POLICY.real, rtol=1e-6)
    assert losses.with_nll(losses.hinge, 0.0) is losses.hinge
