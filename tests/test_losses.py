"""The losses against hand-computed values, TRL's code and the paper's theorem."""

import collections
import math
from unittest.mock import MagicMock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spin_jax import config, losses
from spin_jax.config_values import loss_parts
from spin_jax.data.records import Pair
from spin_jax.losses import LOSSES, PairLogps
from spin_jax.selfplay import variants

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


# The answers' tokens in POLICY and OPPONENT.
LENGTHS = PairLogps(*jnp.asarray(RNG.integers(1, 30, (2, 6)), jnp.int32))


def inputs(name, beta, **options):
    """What a loss is called with, apart from the log-probs."""
    return {"beta": beta, **({"lengths": LENGTHS} if name in ("simpo", "dpo_per_token") else {}), **options}


# Rewards r = 0.5 · 2 of the human answer and r' = 0.5 · (−1) of the generated one, and so t = 1.5.
BY_HAND = PairLogps(jnp.array([-12.0]), jnp.array([-30.0])), PairLogps(jnp.array([-14.0]), jnp.array([-29.0]))
TOKENS = PairLogps(jnp.array([4]), jnp.array([6]))


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("space", {}, 0.78733867),  # log(1 + e^−1) + log(1 + e^−0.5)
        ("space", {"mu": 3.0}, 1.29607034),  # log(1 + 3 e^−1) + 3 log(1 + e^−0.5 / 3)
        ("cdpo", {}, 0.35141328),  # 0.9 log(1 + e^−1.5) + 0.1 log(1 + e^1.5)
        ("robust_dpo", {}, 0.01391328),  # (0.9 log(1 + e^−1.5) − 0.1 log(1 + e^1.5)) / 0.8
        ("exo", {}, 0.78591729),  # 0.81757 log(0.81757 / 0.999) + 0.18243 log(0.18243 / 0.001)
        ("nca", {}, 1.20693102),  # log(1 + e^−1) + ½ log(1 + e) + ½ log(1 + e^−0.5)
        ("apo_zero", {}, 0.64648217),  # 1 − 0.73106 + 0.37754
        ("apo_down", {}, 0.91348410),  # 0.73106 + 1 − 0.81757
        ("dpo_per_token", {"lengths": TOKENS}, 0.54030557),  # t = 0.5 · (2/4 + 1/6) = 1/3
        ("dpo_per_token", {"lengths": PairLogps(*TOKENS[::-1])}, 0.55791005),  # t = 0.5 · (2/6 + 1/4) = 7/24
        ("simpo", {"lengths": TOKENS}, 0.47407698),  # log(1 + e^(0.5 − 0.5 · (−12/4 + 30/6)))
        ("simpo", {"lengths": TOKENS, "gamma": 2.0}, 1.31326169),  # log(1 + e^(2 − 1))
    ],
)
def test_related_losses_by_hand(name, options, expected):
    np.testing.assert_allclose(LOSSES[name](*BY_HAND, beta=0.5, **options), [expected], rtol=1e-6)


def trl_loss(loss_type: str, beta: float, i: int, label_smoothing: float = 0.0) -> float:
    """TRL's own DPO loss of pair i: its trainer's method, run on a model that returns our numbers.

    A row is one token of prompt and as many of the answer as LENGTHS says; the first of these has its log-prob.
    """
    torch = pytest.importorskip("torch")
    dpo_trainer = pytest.importorskip("trl.trainer.dpo_trainer")
    trainer = MagicMock()
    trainer.accelerator = MagicMock(device="cpu", gather_for_metrics=lambda x: x, gather=lambda x: x)
    trainer.ld_alpha = None
    trainer.aux_loss_enabled = trainer.use_weighting = False
    trainer.precompute_ref_logps = True
    trainer.f_divergence_type = "reverse_kl"
    trainer.loss_types, trainer.loss_weights, trainer.beta = [loss_type], [1.0], beta
    trainer.label_smoothing = label_smoothing
    most = int(max(LENGTHS.real[i], LENGTHS.generated[i]))

    def tensor(*values):
        return torch.tensor([float(v) for v in values])

    class Output:
        log_probs = torch.nn.functional.pad(tensor(POLICY.real[i], POLICY.generated[i])[:, None], (0, most - 1))

        def __getattr__(self, name):  # statistics that the trainer logs
            return torch.zeros(2, most, dtype=torch.bool if name.startswith("is_") else torch.float32)

    def model(**_):
        return Output()

    inputs = {
        "input_ids": torch.ones(2, 1 + most, dtype=torch.long),
        "attention_mask": torch.ones(2, 1 + most, dtype=torch.long),
        "completion_mask": torch.tensor(
            [[0] + [1] * int(n) + [0] * (most - int(n)) for n in (LENGTHS.real[i], LENGTHS.generated[i])]
        ),
        "ref_chosen_logps": tensor(OPPONENT.real[i]),
        "ref_rejected_logps": tensor(OPPONENT.generated[i]),
    }
    return float(dpo_trainer.DPOTrainer._compute_loss(trainer, model, inputs, False))


# (our loss, TRL's name for it, its options)
IN_TRL = [
    ("logistic", "sigmoid", {}),
    ("hinge", "hinge", {}),
    ("robust_dpo", "robust", {"label_smoothing": 0.2}),
    ("dpo_per_token", "sigmoid_norm", {}),
    ("exo", "exo_pair", {"label_smoothing": 1e-3}),
    ("nca", "nca_pair", {}),
    ("apo_zero", "apo_zero", {}),
    ("apo_down", "apo_down", {}),
    ("space", "bco_pair", {}),  # μ = 1; TRL's BCO of pairs has no reward baseline
]


@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
@pytest.mark.parametrize(("ours", "theirs", "options"), IN_TRL)
def test_equals_trl(ours, theirs, options, beta):
    """TRL's own losses of the same four numbers and lengths; float32 rounding apart."""
    values = LOSSES[ours](POLICY, OPPONENT, **inputs(ours, beta, **options))
    expected = [trl_loss(theirs, beta, i, **options) for i in range(6)]
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beta", [0.1, 2.0])
@pytest.mark.parametrize("name", ["simpo", "cdpo"])
def test_equals_trls_cpo_trainer(name, beta, monkeypatch):
    """TRL has SimPO, and label smoothing of the logistic loss, in its CPO trainer; float32 rounding apart.

    That trainer has no reference, so cDPO's numbers there are the log-ratios.
    """
    torch = pytest.importorskip("torch")
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    cpo_trainer = pytest.importorskip("trl.experimental.cpo.cpo_trainer")
    trainer = MagicMock(alpha=0.0, beta=beta, accelerator=MagicMock(device="cpu"))
    if name == "simpo":
        trainer.loss_type, trainer.simpo_gamma, trainer.label_smoothing = "simpo", 1.2, 0.0
        numbers, options = [p / n for p, n in zip(POLICY, LENGTHS, strict=True)], {"gamma": 1.2}
    else:
        trainer.loss_type, trainer.label_smoothing = "sigmoid", 0.3
        numbers, options = [p - q for p, q in zip(POLICY, OPPONENT, strict=True)], {"label_smoothing": 0.3}
    expected, _, _ = cpo_trainer.CPOTrainer.cpo_loss(trainer, *(torch.tensor(np.asarray(x)) for x in numbers))
    values = LOSSES[name](POLICY, OPPONENT, **inputs(name, beta, **options))
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)


def test_space_of_several_generated_answers():
    """μ = 3: the probabilities of noise-contrastive estimation, p / (p + μ q), in float64."""
    r, g = (0.2 * (np.float64(p) - np.float64(q)) for p, q in zip(POLICY, OPPONENT, strict=True))
    expected = -np.log(np.exp(r) / (np.exp(r) + 3)) - 3 * np.log(3 / (np.exp(g) + 3))
    np.testing.assert_allclose(LOSSES["space"](POLICY, OPPONENT, beta=0.2, mu=3.0), expected, rtol=1e-5)


def test_xpo_by_hand():
    """ℓ(1.5) − 0.01 · 20, and its gradient: −½ σ(−1.5), ½ σ(−1.5) and α; float32 rounding apart."""
    names = collections.namedtuple("Logps", losses.ROLES["xpo"])
    policy, opponent = (names(*jnp.array(x)[:, None]) for x in ([-12.0, -30.0, -20.0], [-14.0, -29.0, -21.0]))

    def loss(policy):
        return LOSSES["xpo"](policy, opponent, beta=0.5, alpha=0.01)

    np.testing.assert_allclose(loss(policy), [0.20141328 - 0.2], rtol=1e-4)
    gradient = jax.grad(lambda policy: loss(policy).sum())(policy)
    np.testing.assert_allclose(np.ravel(gradient), [-0.09121276, 0.09121276, 0.01], rtol=1e-5)


def test_inpo_is_ipo_against_a_mixed_reference():
    """INPO's own equation (arXiv 2407.00617) in float64, with τ/η = 0.3, against `ipo` with α-SPIN's reference."""
    start, eta, share = RNG.normal(-40, 8, (2, 6)), 0.25, 0.3

    def ratio(logps):
        return np.float64(logps[0]) - np.float64(logps[1])

    h = ratio(POLICY) - share * ratio(start) - (1 - share) * ratio(OPPONENT)
    weights, pair = {3: 1 - share, 0: share}, Pair(7, 1, [], [], *np.zeros((3, 1), np.int32), False)
    mixed = variants.mixed_logps(weights, {3: {(0, 7, 1, -1): OPPONENT}, 0: {(0, 7, 1, -1): start}}, 0, pair)
    values = LOSSES["ipo"](POLICY, PairLogps(*map(jnp.float32, mixed)), beta=eta)
    np.testing.assert_allclose(values, (h - 1 / (2 * eta)) ** 2, rtol=1e-5)


@pytest.mark.parametrize(
    ("keys", "t", "weights"),
    [
        ({}, 3, {3: 1}),
        ({"reference_alpha": 0.25}, 0, {0: 1}),
        ({"reference_alpha": 0.25}, 3, {3: 0.25, 0: 0.75}),
        ({"reference_alpha": 0.0}, 3, {0: 1}),
        ({"reference_decay": 1.0}, 3, {3: 1 / 4, 2: 1 / 4, 1: 1 / 4, 0: 1 / 4}),
        ({"reference_decay": 0.5}, 2, {2: 4 / 7, 1: 2 / 7, 0: 1 / 7}),
        ({"reference_decay": 0.5, "reference_alpha": 0.7}, 2, {2: 0.4, 1: 0.2, 0: 0.4}),
    ],
)
def test_weights_of_references(keys, t, weights):
    c = config.default()
    c.loss.update(keys)
    found = variants.reference_weights(c, t)
    assert list(found) == list(weights)  # θ_t comes first, while it is in memory
    np.testing.assert_allclose(list(found.values()), list(weights.values()), rtol=1e-12)


# The gradient in the rewards r and r' where policy equals opponent, by hand: −σ'(0) = −¼, and so on.
AT_START = {
    "space": (-0.5, 0.5),
    "cdpo": (-0.4, 0.4),  # −(½ − ε)
    "robust_dpo": (-0.625, 0.625),  # −½ / (1 − 2ε)
    "exo": (-1.7266887, 1.7266887),  # −¼ log(0.999 / 0.001)
    "nca": (-0.25, 0.25),
    "apo_zero": (-0.25, 0.25),
    "apo_down": (0.0, 0.25),  # the human answer is not raised
}


@pytest.mark.parametrize("name", AT_START)
def test_gradient_at_the_start(name):
    """Descent raises the human answer and lowers the generated one, but for APO-down; float32 rounding apart."""
    gradient = jax.grad(lambda p: LOSSES[name](p, OPPONENT, beta=0.3).sum())(OPPONENT)
    for values, of_reward in zip(gradient, AT_START[name], strict=True):
        np.testing.assert_allclose(values, 0.3 * of_reward, rtol=1e-5, atol=1e-8)


def test_gradient_per_token():
    """At margin 0 the slope of ℓ is −½, and each answer's log-prob counts by β / its tokens."""
    for name, options in (("dpo_per_token", {}), ("simpo", {"gamma": 0.0})):
        equal = PairLogps(*(-2.0 * n for n in LENGTHS))  # both answers have −2 nats per token
        gradient = jax.grad(lambda p: LOSSES[name](p, equal, **inputs(name, 0.3, **options)).sum())(equal)  # noqa: B023
        np.testing.assert_allclose(gradient.real, -0.15 / LENGTHS.real, rtol=1e-5)
        np.testing.assert_allclose(gradient.generated, 0.15 / LENGTHS.generated, rtol=1e-5)


@pytest.mark.parametrize(("name", "wanted"), [("cdpo", 9.0), ("exo", 999.0)])
def test_smoothed_losses_ask_for_a_margin(name, wanted):
    """Their minimum is at t = log((1 − ε)/ε): ε is 0.1 and 0.001."""
    slope = jax.vmap(jax.grad(lambda t: LOSSES[name](PairLogps(t, 0.0), PairLogps(0.0, 0.0), beta=1.0)))
    before, at, after = slope(math.log(wanted) + jnp.array([-0.1, 0.0, 0.1]))
    assert before < -1e-6 < 0 < 1e-6 < after
    assert abs(at) < 1e-6


def test_apo_down_lowers_both():
    """r = 0 and r' = −2: σ'(0) > σ'(2), so that descent lowers the human answer too, and the generated one by σ'(2)."""
    gradient = jax.grad(lambda p: LOSSES["apo_down"](p, PairLogps(0.0, 0.0), beta=1.0))(PairLogps(0.0, -2.0))
    np.testing.assert_allclose(gradient, [0.25 - 0.10499359, 0.10499359], rtol=1e-5)


@pytest.mark.parametrize("share", [-0.1, 0.5, 0.7])
def test_label_smoothing_out_of_range(share):
    with pytest.raises(ValueError, match=f"label_smoothing={share:g}: a share of the pairs"):
        LOSSES["robust_dpo"](POLICY, OPPONENT, beta=0.1, label_smoothing=share)


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


@pytest.mark.parametrize("name", ["logistic", "exponential", "correlation", "space"])
def test_theorem_spin_reaches_the_data_distribution(name):
    """Theorem 5.2: played to the end, SPIN's opponent becomes p_data; here with exact expectations.

    SPACE's Theorems 2 and 3 say the same of its loss.
    """
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


def test_parts_of_a_name():
    assert loss_parts("hinge") == [(1.0, "hinge")]
    assert loss_parts("a.b:c") == [(1.0, "a.b:c")]
    assert loss_parts("0.8*logistic + 2e-1 * a.b:c+hinge") == [(0.8, "logistic"), (0.2, "a.b:c"), (1.0, "hinge")]
    for name, weight in (
        ("x*hinge", "x"),
        ("0*hinge", "0"),
        ("0.5*hinge+-1*ipo", "-1"),
        ("nan*ipo", "nan"),
        ("*a", ""),
        ("1e400*a", "1e400"),
    ):
        with pytest.raises(ValueError, match=rf"loss.name='.*': '{weight}' is no weight above 0"):
            loss_parts(name)
