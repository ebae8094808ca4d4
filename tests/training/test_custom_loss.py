"""One's own loss: found by name, run without touching the package, explained where it cannot be trained."""

import json
import runpy
import sys
from unittest.mock import MagicMock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from runs import ROOT

from spin_jax import config, losses
from spin_jax.data.records import Pair
from spin_jax.losses import PairLogps
from spin_jax.runtime import sharding, user_code
from spin_jax.selfplay import algorithm, held_out
from spin_jax.training import custom_loss, step
from spin_jax.training.batches import ScoredPair, pair_batches
from spin_jax.training.packing import RowShape


def section(**keys):
    """The section `loss` of a config."""
    c = config.default().loss
    for key, value in keys.items():
        c[key] = value
    return c


@pytest.fixture
def written(tmp_path, monkeypatch):
    """written(text) → the name of a loss in a module that has this text."""

    def write(text, name="my_losses", keep=False):
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        if not keep:
            monkeypatch.delitem(sys.modules, name, raising=False)
            monkeypatch.setattr(user_code, "_SOURCES", {})
        return f"{name}:loss"

    return write


def test_find():
    assert custom_loss.find("hinge") is losses.hinge
    assert custom_loss.find("spin_jax.losses:exponential") is losses.exponential
    with pytest.raises(ValueError, match="logistic, hinge"):
        custom_loss.find("logistik")
    with pytest.raises(ValueError, match="cannot be imported"):
        custom_loss.find("no_such_module:loss")


def test_equal_configs_share_a_loss():
    """And so the programs that are compiled with it."""
    assert custom_loss.make(section(name="hinge")) is losses.hinge
    for keys in ({"options": "alpha=0.5", "name": "tspin"}, {"nll_weight": 0.5}):
        assert custom_loss.make(section(**keys)) is custom_loss.make(section(**keys))
    assert custom_loss.make(section(nll_weight=0.5)) is not custom_loss.make(section(nll_weight=0.25))


def test_options_reach_the_loss():
    c = section(name="tspin", options="alpha=0.5")
    logps = custom_loss.logps_type(custom_loss.roles(c))
    policy = logps(*jnp.array([[-3.0], [-5.0], [-9.0]]))
    found = custom_loss.make(c)(policy, policy, beta=0.1)
    expected = np.log1p(np.exp(-0.5 * 2)) + 0.1 * np.log1p(np.exp(-0.5 * 4))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_nll_term():
    policy, opponent = PairLogps(jnp.array([-3.0]), jnp.array([-5.0])), PairLogps(jnp.array([-4.0]), jnp.array([-4.0]))
    found = custom_loss.make(section(name="hinge", nll_weight=0.25))(policy, opponent, beta=0.1)
    np.testing.assert_allclose(found, [1 - 0.2 + 0.25 * 3], rtol=1e-6)


# --- several losses ------------------------------------------------------------------------------


def test_weighted_sum():
    """0.8 log(1 + e^−1.5) + 0.2 max(0, 1 − 1.5) at t = 1.5, and with the NLL of the human answer, 12 nats."""
    policy, opponent = (PairLogps(*jnp.array(x)) for x in ([[-12.0], [-30.0]], [[-14.0], [-29.0]]))
    c = section(name="0.8*logistic+0.2*hinge")
    assert custom_loss.make(c) is custom_loss.make(section(name="0.8*logistic+0.2*hinge"))
    np.testing.assert_allclose(custom_loss.make(c)(policy, opponent, beta=0.5), [0.16113062], rtol=1e-6)
    c.nll_weight = 0.25
    np.testing.assert_allclose(custom_loss.make(c)(policy, opponent, beta=0.5), [3.16113062], rtol=1e-6)
    custom_loss.check(c)


def test_each_loss_of_a_sum_gets_what_it_asks_for(written, mesh8):
    """Answers, options, lengths and scores: SimPO's γ, T-SPIN's α and third answer, SPPO's score."""
    mine = written("def loss(policy, opponent, lengths, tau): return tau * lengths.start + policy.start")
    c = section(name=f"tspin+0.5*simpo+0.25*sppo+2*{mine}", options="gamma=1,alpha=0.5,tau=3")
    assert custom_loss.roles(c) == ("real", "generated", "start")
    assert custom_loss.takes_score(c)
    logps = custom_loss.logps_type(custom_loss.roles(c))
    policy, opponent = logps(*jnp.array([[-3.0], [-6.0], [-9.0]])), logps(*jnp.array([[-4.0], [-4.0], [-4.0]]))
    lengths = logps(*jnp.array([[2], [3], [5]]))
    found = custom_loss.make(c)(policy, opponent, beta=2.0, lengths=lengths, score=jnp.array([0.75]))
    tspin = np.log1p(np.exp(-1.5)) + 2 * np.log1p(np.exp(-1.5))
    simpo = np.log1p(np.exp(1 - 2 * (-3 / 2 + 6 / 3)))
    sppo = (-2 - 0.25 / 2) ** 2
    np.testing.assert_allclose(found, [tspin + 0.5 * simpo + 0.25 * sppo + 2 * (3 * 5 - 9)], rtol=1e-6)
    for mesh in (None, mesh8):
        custom_loss.check(c, mesh)
    assert custom_loss.roles(section(name="likelihood+sppo")) == ("generated",)
    assert custom_loss.roles(section(name="likelihood+0.5*hinge")) == ("real", "generated")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"name": "0.5*hinge+0.5*logistik"}, "loss.name has 'logistik': choose from logistic, hinge"),
        ({"name": "0.5*hinge+x*logistic"}, "'x' is no weight above 0"),
        (
            {"name": "hinge+tspin", "answers": "real,generated"},
            r"'hinge\+tspin': tspin: it wants real, generated, start",
        ),
        ({"name": "hinge+tspin", "options": "tau=1"}, "it has no option tau .*; there are alpha"),
        ({"name": "hinge+cdpo", "options": "label_smoothing=0.5"}, "cdpo: .*ValueError: label_smoothing=0.5: a share"),
        ({"name": "space", "options": "mu=0"}, "'space': .*ValueError"),
        ({"name": "exo", "options": "label_smoothing=0"}, "'exo': its value is inf"),
        ({"name": "likelihood+sppo", "nll_weight": 0.5}, "loss.nll_weight=0.5 is for rows with a human answer"),
    ],
)
def test_what_is_wrong_with_one_of_several(keys, message):
    with pytest.raises(ValueError, match=message):
        custom_loss.check(section(**keys))


def test_a_broken_loss_of_a_sum_is_named(written):
    mine = written("def loss(policy, opponent, *, beta): return policy.real.mean()")
    with pytest.raises(ValueError, match=rf"{mine}: of 8 rows it returns an array \[\]"):
        custom_loss.check(section(name=f"hinge+0.5*{mine}"))


# --- lengths -------------------------------------------------------------------------------------


def pairs_of_lengths():
    """Two pairs of 3 and 1, and of 2 and 5 tokens."""
    ids = np.arange(5, dtype=np.int32)
    pairs = [Pair(n, 0, [], [], ids, ids[:real], ids[:own], False) for n, (real, own) in enumerate([(3, 1), (2, 5)])]
    return [ScoredPair(pair, (-6.0, -6.0)) for pair in pairs]


def counts(policy, opponent, lengths):
    return 100.0 * lengths.real + lengths.generated + 0 * policy.real


@pytest.mark.parametrize("devices", ["mesh", "mesh8"])
def test_lengths_in_training(devices, monkeypatch, request):
    """Each answer's tokens; the empty places of a row add nothing, and no NaN to the gradient."""
    mesh = request.getfixturevalue(devices)
    (batch,) = pair_batches(pairs_of_lengths(), RowShape(rows=8, length=40, groups=4))
    with jax.set_mesh(mesh):
        batch = sharding.put_batch(mesh, batch)
        monkeypatch.setattr(step, "response_logps", lambda decoder, params, rows: params)
        logps = jnp.full(batch.rows.lengths.shape, -6.0, out_sharding=sharding.spec("batch", None, None))
        total, _ = step.SPIN(MagicMock(), counts)(logps, batch, beta=jnp.float32(0.1))
        simpo = step.SPIN(MagicMock(), losses.simpo)
        gradient = jax.grad(lambda logps: simpo(logps, batch, beta=jnp.float32(2.0))[0])(logps)
    assert total == 301 + 205
    gradient, filled = np.asarray(gradient), np.asarray(batch.rows.lengths) > 0
    assert (gradient[filled] != 0).all()
    assert (gradient[~filled] == 0).all()


def test_lengths_on_held_out_pairs(tmp_path):
    """The mean of 301 and 205."""
    run = MagicMock(roles=("real", "generated"), folder=lambda t: epath.Path(tmp_path))
    engine = MagicMock(score=lambda params, groups: np.full((2, 2), -6.0, np.float32))
    opponent = MagicMock(scored_pairs=lambda t, split: (pairs_of_lengths(), {}))
    evaluation = held_out.Evaluation(run, engine, opponent, step.SPIN(MagicMock(), counts))
    assert evaluation.measure_pairs(0, None, 0.1)["loss"] == 253


# What is wrong, a loss, and what is said of it.
BROKEN = {
    "a mean": (
        "return (policy.real - opponent.real).mean()",
        r"array \[\]: \[8\] is wanted, a number a row; the step",
    ),
    "a column": ("return policy.real[:, None]", r"an array \[8, 1\]: \[8\] is wanted"),
    "a tuple": ("return policy.real, 1.0", "it returns tuple: an array"),
    "nothing": ("pass", "it returns NoneType"),
    "truth": ("return policy.real > opponent.real", "it returns bool: floating"),
    "no policy": ("return opponent.real", "it does not depend on policy"),
    "a kink at 0": (
        "return jnp.sqrt(abs(policy.real - opponent.real))",
        "its gradient is .*, where policy equals opponent, as it does when an iteration begins",
    ),
    "a log of less than 0": ("return jnp.log(policy.real)", "its value is nan, where policy equals opponent"),
    "nan elsewhere": ("return jnp.sqrt(0.1 - (policy.real - opponent.real))", "its value is nan$"),
    "a branch": (
        "return policy.real if policy.real[0] > 0 else -policy.real",
        r"TracerBoolConversionError: .*my_losses.py:5\)\. JAX traces it: jnp.where in place of if",
    ),
    "numpy": (
        "return np.exp(-policy.real)",
        r"TracerArrayConversionError: .*my_losses.py:5\)\. JAX traces it",
    ),
    "a typo": ("return -policy.reel", "AttributeError.*Rows have the answers real, generated"),
    "another role": ("return -policy.start", "--config.loss.answers=real,generated,start adds others"),
    "a branch on β": ("return -policy.real if beta > 1 else -2 * policy.real", "TracerBoolConversionError"),
    "noise": ("return -policy.real * np.random.rand()", "the same log-probs give another loss each time"),
    "a baseline": ("return -(policy.real - policy.real.mean())", "depends on the other rows"),
    "an error": ("raise RuntimeError('no')", r"RuntimeError: no \(.*my_losses.py:5\)"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_losses_are_explained(name, written):
    body, message = BROKEN[name]
    head = "import jax.numpy as jnp\nimport numpy as np\n\ndef loss(policy, opponent, *, beta):\n"
    loss = written(f"{head}    {body}")
    with pytest.raises(ValueError, match=rf"loss.name='{loss}': .*{message}"):
        custom_loss.check(section(name=loss))


@pytest.mark.parametrize(
    ("signature", "message"),
    [
        ("policy", "takes 1 positional argument but 2 were given"),
        ("policy, opponent, *, beta, tau", "it wants tau: --config.loss.options=tau=NUMBER"),
    ],
)
def test_signatures_are_explained(signature, message, written):
    loss = written(f"def loss({signature}): return -policy.real")
    with pytest.raises(ValueError, match=message):
        custom_loss.check(section(name=loss))


@pytest.mark.parametrize(
    "text",
    [
        "import jax\nfrom spin_jax.losses import margin\ndef loss(policy, opponent, *, beta):\n"
        "  return jax.nn.relu(1 - margin(policy, opponent, beta)) ** 2",
        "def loss(policy, opponent, beta, **options): return -(policy.real - policy.generated)",
        "def loss(policy, opponent): return -policy.real",
        "def loss(policy, opponent, **options): return -policy.real * options.pop('beta') + len(options)",
        "def loss(policy, opponent, *, beta, score): return (score - policy.real) ** 2",
        "def loss(policy, opponent, lengths): return policy.generated / lengths.generated - policy.real",
        "class Loss:\n  def __call__(self, policy, opponent, *, beta): return -policy.real\nloss = Loss()",
        "def loss(policy, opponent, *, beta, tau=2.0): return (policy.real - opponent.real - tau) ** 2",
        "def loss(policy, opponent, *, beta): return -policy.real.at[:].add(opponent.real)",
        "import jax\ndef loss(policy, opponent, *, beta):\n"
        "  own = beta * policy.real - beta * opponent.real\n"
        "  return jax.nn.softplus(-(own - (beta * policy.generated - beta * opponent.generated)))",
    ],
)
@pytest.mark.parametrize("beta", [1e-3, 0.1, 200.0])
def test_sound_losses_are_taken(text, beta, written, mesh8):
    c = section(name=written(text), beta=(beta,))
    custom_loss.check(c)
    custom_loss.check(c, mesh8)


def test_what_only_a_mesh_refuses(written, mesh8):
    """What cannot be split over devices is known before training."""
    body = "return -policy.real[jnp.arange(len(policy.real))]"
    text = f"import jax.numpy as jnp\n\ndef loss(policy, opponent, *, beta):\n    {body}"
    c = section(name=written(text))
    custom_loss.check(c)
    with pytest.raises(ValueError, match=r"loss.name=.*it fails: ShardingTypeError"):
        custom_loss.check(c, mesh8)


@pytest.mark.parametrize("name", losses.LOSSES)
def test_our_own_would_pass(name):
    c = section(name=f"spin_jax.losses:{name}", answers=",".join(losses.ROLES.get(name, losses.PAIR)))
    custom_loss.check(c)


@pytest.mark.parametrize("name", losses.LOSSES)
def test_more_answers_in_a_row_change_nothing(name):
    """As when two losses are added up that need other answers, or loss.answers names them in another order."""
    roles = losses.ROLES.get(name, losses.PAIR)
    assert custom_loss.roles(section(name=name, answers=",".join(roles[::-1]))) == roles
    rng = np.random.default_rng(0)
    every = {role: rng.uniform(-9, -1, (2, 5)) for role in custom_loss.KNOWN_ROLES}
    tokens = {role: rng.integers(1, 9, 5) for role in every}
    score = np.linspace(0, 1, 5)

    def value(names):
        kind = custom_loss.logps_type(names)
        policy, opponent = (kind(*(every[role][n] for role in names)) for n in (0, 1))
        inputs = {"beta": 0.5, "lengths": kind(*(tokens[role] for role in names)), "score": score}
        return custom_loss.call(losses.LOSSES[name], policy, opponent, inputs)

    np.testing.assert_array_equal(value(roles), value(custom_loss.KNOWN_ROLES))


def test_named_algorithms_are_sound():
    """Every algorithm of configs/algorithms.py: its loss exists, and takes its options and β."""
    algorithms = runpy.run_path(str(ROOT / "configs" / "algorithms.py"))
    for name in algorithms["ALGORITHMS"]:
        custom_loss.check(config.resolve(algorithms["get_config"](f"{name}/tiny:smoke")).loss)


def test_a_run_ends_before_anything_is_made(written, tmp_path):
    name = written("def loss(policy, opponent, *, beta): return (policy.real - policy.generated).mean()")
    with pytest.raises(ValueError, match="the step takes the mean"):
        algorithm.run(
            {"loss": {"name": name}, "model": {"path": "nowhere"}, "data": {"path": "x"}},
            str(tmp_path / "run"),
        )
    assert not (tmp_path / "run").exists()


def test_an_edited_module_is_imported_anew(written):
    """In a live kernel: or the old loss would be trained under the new one's fingerprint."""
    body = "def loss(policy, opponent, *, beta): return -beta * policy.real * {}"
    values = []
    for factor in (1, 2.5, 2.5):
        name = written(body.format(factor), keep=bool(values))
        values.append(float(custom_loss.find(name)(PairLogps(-1.0, -1.0), None, beta=1.0)))
    assert values == [1.0, 2.5, 2.5]


def test_a_notebooks_function(monkeypatch):
    """What stands in a cell is `__main__:name`; its text is its fingerprint."""
    from spin_jax.selfplay import fingerprints

    main = sys.modules["__main__"]
    monkeypatch.setattr(main, "in_a_cell", losses.hinge, raising=False)
    monkeypatch.delattr(main, "__file__", raising=False)
    assert custom_loss.find("__main__:in_a_cell") is losses.hinge
    digest = fingerprints._source_digest("__main__:in_a_cell")
    monkeypatch.setattr(main, "in_a_cell", losses.logistic)
    assert len(digest) == 16
    assert digest != fingerprints._source_digest("__main__:in_a_cell")


def test_pair_logps_are_pairs():
    assert custom_loss.logps_type(("real", "generated")) is PairLogps
    assert custom_loss.logps_type(("real", "generated", "start"))._fields == ("real", "generated", "start")
    assert json.dumps(custom_loss.options(section(options=" a=1, b=-2.5e-1 "))) == '{"a": 1.0, "b": -0.25}'
