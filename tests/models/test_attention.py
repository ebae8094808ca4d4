"""Attention over packed rows: `plain` against each sequence alone, and the kernels against `plain`.

On CPU Pallas interprets the kernels, operation by operation in the dtype that each has. What else can be told
without a TPU or GPU is told as well: that they compile or lower for one, and how often a step runs them.
"""

import functools
from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec

from spin_jax import config as spin_config
from spin_jax.kernels.layout import Layout
from spin_jax.models import attention
from spin_jax.models.architecture import ModelConfig
from spin_jax.models.attention import attend, kernel_for, visible
from spin_jax.models.decoder import Decoder
from spin_jax.models.params import abstract_params, params_on
from spin_jax.runtime import sharding
from spin_jax.selfplay import from_config
from spin_jax.training import custom_loss
from spin_jax.training.batches import PairBatch
from spin_jax.training.log_probs import response_logps
from spin_jax.training.optimizer import make_optimizer
from spin_jax.training.packing import Group, Rows, RowShape, packed
from spin_jax.training.step import SPIN, TrainState, make_step

# float32 on both sides, in sums of at most some hundred terms of another order: results of up to ~10 were
# seen to differ by 3e-6.
CLOSE = {"rtol": 0, "atol": 1e-5}
SHAPE = RowShape(rows=2, length=112, groups=8, unshared=128)  # the shortest that kernels take
UNATTENDED = 2


def groups_of(seed, count, longest=16):
    """Groups of random lengths; two tokens of each are ones that `official` leaves unattended.

    Neither is a sequence's first token, and never are two side by side: every token sees one.
    """
    rng = np.random.default_rng(seed)

    def group():
        prompt, real, generated = (rng.integers(5, 64, rng.integers(2, longest + 1)) for _ in range(3))
        prompt[1] = real[-1] = UNATTENDED
        return Group(prompt, (real, generated))

    return [group() for _ in range(count)]


def full_rows(seed, shape=SHAPE, longest=16, unattended=None):
    """(groups, the first micro-batch of them): rows with hardly any padding."""
    groups = groups_of(seed, 8 * shape.rows, longest)
    first, *others = packed(groups, shape, unattended)
    assert others, "too few groups to fill the rows"
    return groups, first


def arrays_of(layout, heads=4, kv_heads=2, dim=64, dtype=np.float32):
    """(q, k, v, cotangent): random, the cotangent zero where there is only padding."""
    rng = np.random.default_rng(0)
    B, T = layout.positions.shape
    sizes = (heads, kv_heads, kv_heads, heads)
    q, k, v, cotangent = (rng.normal(size=(B, T, n, dim)).astype(dtype) for n in sizes)
    return q, k, v, cotangent * (layout.segments != 0)[:, :, None, None].astype(dtype)


@functools.partial(jax.jit, static_argnames=("kernel", "window"))
def _run(arrays, layout, kernel, window):
    def run(*inputs):
        axes = ("heads", "kv_heads", "kv_heads")
        placed = (sharding.reshard(x, "batch", None, n, None) for x, n in zip(inputs, axes, strict=True))
        out = attend(*placed, layout, window=window, kernel=kernel)
        assert out.dtype == arrays[0].dtype
        return out

    *inputs, cotangent = arrays
    out, pull_back = jax.vjp(run, *inputs)
    if not jax.sharding.get_abstract_mesh().empty:
        cotangent = jax.sharding.reshard(cotangent, jax.typeof(out).sharding)
    return out * (layout.segments != 0)[:, :, None, None].astype(out.dtype), *pull_back(cotangent)


def attended(kernel, arrays, layout, window=None):
    """{name: the output without padding, and the gradients}."""
    results = _run(arrays, layout, kernel, window)
    return {name: np.asarray(x, np.float32) for name, x in zip(("out", "dq", "dk", "dv"), results, strict=True)}


def assert_close(results, expected):
    for name, values in expected.items():
        assert np.abs(values).max() > 1  # zeros would agree as well
        np.testing.assert_allclose(results[name], values, err_msg=name, **CLOSE)


# --- plain, against each sequence alone -----------------------------------------------------------


def textbook(q, k, v, cotangent, window, seen):
    """Attention of one sequence [T, N, H] in float64 and its gradients, as the formulas have them.

    Args:
        seen: bool [T], the tokens that others may see.
    """
    T, N, H = q.shape
    K = k.shape[1]
    q, k, v, cotangent = (x.astype(np.float64) for x in (q, k, v, cotangent))
    k, v = (np.repeat(x, N // K, axis=1) for x in (k, v))
    behind = np.arange(T)[:, None] - np.arange(T)
    mask = (behind >= 0) & (behind < (window or T)) & seen
    assert mask.any(axis=1).all()
    weights = np.exp(np.einsum("tnh,snh->nts", q, k) / np.sqrt(H)) * mask
    weights /= weights.sum(axis=-1, keepdims=True)
    d_weights = np.einsum("tnh,snh->nts", cotangent, v)
    d_scores = weights * (d_weights - (d_weights * weights).sum(axis=-1, keepdims=True)) / np.sqrt(H)
    dk, dv = np.einsum("nts,tnh->snh", d_scores, q), np.einsum("nts,tnh->snh", weights, cotangent)
    return {
        "out": np.einsum("nts,snh->tnh", weights, v),
        "dq": np.einsum("nts,snh->tnh", d_scores, k),
        "dk": dk.reshape(T, K, N // K, H).sum(axis=2),
        "dv": dv.reshape(T, K, N // K, H).sum(axis=2),
    }


def one_by_one(groups, rows, arrays, window, unattended):
    """What `attended` returns, from every prompt + answer by itself."""
    q, k, v, cotangent = arrays
    results = {
        "out": np.zeros_like(q),
        "dq": np.zeros_like(q),
        "dk": np.zeros_like(k),
        "dv": np.zeros_like(k),
    }
    for row, items in enumerate(rows.items):
        end = 0
        for item in items[items > 0] - 1:
            prompt = np.arange(end, end + len(groups[item].prompt))
            end += len(prompt)
            for number, answer in enumerate(groups[item].answers):
                own = np.arange(end, end + len(answer))
                end += len(answer)
                tokens = np.concatenate([prompt, own])
                there = np.array([*groups[item].prompt, *answer]) != (-1 if unattended is None else unattended)
                given = cotangent[row, tokens].copy()
                given[: len(prompt) * (number > 0)] = 0  # the shared prompt's own counts once
                alone = textbook(*(x[row, tokens] for x in (q, k, v)), given, window, there)
                results["out"][row, tokens] = alone["out"]
                for name in ("dq", "dk", "dv"):
                    results[name][row, tokens] += alone[name]
    return results


@pytest.mark.parametrize("unattended", [None, UNATTENDED])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("seed", range(8))
def test_packed_rows_are_their_sequences_alone(seed, window, unattended):
    """Prompt + real and prompt + generated, whatever shares the row; float64 formulas, hence `CLOSE`."""
    groups, rows = full_rows(seed, unattended=unattended)
    assert (rows.layout.segments < 0).any() == (unattended is not None)
    arrays = arrays_of(rows.layout, dim=16)
    results = attended("plain", arrays, rows.layout, window)
    assert_close(results, one_by_one(groups, rows, arrays, window, unattended))


def test_who_sees_whom():
    """A prompt of two tokens, answers of two and one; then padding. By hand."""
    (rows,) = packed([Group([5, 5], ([5, 5], [5]))], RowShape(1, 6, 1))
    seen = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],  # nothing of the other answer
        [0, 0, 0, 0, 0, 1],
    ]
    np.testing.assert_array_equal(visible(rows.layout, rows.layout, None)[0], np.array(seen, bool))
    seen[3][:2] = [0, 0]
    seen[2][0] = seen[4][0] = 0
    np.testing.assert_array_equal(visible(rows.layout, rows.layout, 2)[0], np.array(seen, bool))


# --- kernels, against plain -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "window", "unshared", "dim"),
    [
        ("splash", None, 896, 64),
        ("splash", 100, 896, 128),
        ("flash", None, 0, 128),
        ("flash", 100, 0, 64),
    ],
)
def test_kernels_equal_plain(kernel, window, unshared, dim):
    """Values and gradients of grouped queries, to the rounding of float32.

    Rows are several blocks long, with sequences across them. No block of splash's that is large enough
    divides 896: it fills the last one up. Flash asks for no unshared rows.
    """
    shape = RowShape(1, 672, 8, unshared) if unshared else RowShape(1, 320, 8)
    _, rows = full_rows(1, shape, longest=shape.length * 2 // 9)
    arrays = arrays_of(rows.layout, dim=dim)
    results = attended(kernel, arrays, rows.layout, window)
    assert_close(results, attended("plain", arrays, rows.layout, window))


@pytest.mark.parametrize("kernel", ["splash", "flash"])
def test_kernels_in_bfloat16(kernel):
    """As near to float32 as plain is, within a factor of two: both round weights and results to 8 bits.

    Splash rounds the gradients of a prompt's copies before they are added up, and both the scores' gradients:
    that is what the factor is for. Root mean squares, for single numbers vary more.
    """
    _, rows = full_rows(0)
    exact = arrays_of(rows.layout, dtype=jnp.bfloat16)
    expected = attended("plain", [x.astype(np.float32) for x in exact], rows.layout)
    rounded, results = (attended(name, exact, rows.layout) for name in ("plain", kernel))
    for name, values in expected.items():
        error, other = (np.sqrt(np.mean((x[name] - values) ** 2)) for x in (results, rounded))
        assert 0 < error < 2 * other, name


@pytest.mark.parametrize("window", [None, 7])
def test_blocks_of_queries_change_nothing(window, monkeypatch):
    """Rows of several blocks, the last one short. Sums over fewer zeros round alike or nearly: 1e-5."""
    _, rows = full_rows(0)
    arrays = arrays_of(rows.layout)
    whole = attended("plain", arrays, rows.layout, window)
    monkeypatch.setattr(attention, "_BLOCK", 13)
    monkeypatch.setattr(attention, "_MOST_BLOCKS", 100)
    assert rows.tokens.shape[1] % 13
    _run.clear_cache()
    blocked = attended("plain", arrays, rows.layout, window)
    _run.clear_cache()  # of programs in these blocks
    assert_close(blocked, whole)


@pytest.mark.parametrize(("kernel", "kv_heads"), [("plain", 2), ("plain", 1), ("splash", 2), ("flash", 1)])
def test_eight_devices_attend_as_one(kernel, kv_heads, mesh8):
    """Rows and heads split, or heads whole where keys have but one; against plain on one, hence `CLOSE`."""
    _, rows = full_rows(2, SHAPE._replace(rows=4))
    arrays = arrays_of(rows.layout, kv_heads=kv_heads)
    expected = attended("plain", arrays, rows.layout)
    with jax.set_mesh(mesh8):
        placed = sharding.put_batch(mesh8, (arrays, rows.layout))
        results = attended(kernel, *placed)
    assert_close(results, expected)


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("context", [2, 4])
@pytest.mark.parametrize("kernel", ["plain", "splash", "flash"])
def test_devices_that_share_rows_attend_as_one(kernel, context, window, mesh8):
    """Two or four devices have the queries of a row, beside rows and heads that are split; hence `CLOSE`.

    A device's 28 or 56 tokens end within flash's blocks of 16, and within groups.
    """
    _, rows = full_rows(2, SHAPE._replace(rows=4))
    arrays = arrays_of(rows.layout)
    expected = attended("plain", arrays, rows.layout, window)
    mesh = sharding.make_mesh(1, 4 // context, 2, context=context)
    with jax.set_mesh(mesh):
        results = attended(kernel, *sharding.put_batch(mesh, (arrays, rows.layout)), window)
    assert_close(results, expected)


def test_which_kernel_runs_where():
    """float32 is given to no kernel by itself: splash would multiply in less, and flash slowly."""
    names = {platform: kernel_for(platform, jnp.bfloat16) for platform in ("cpu", "tpu", "gpu", "cuda")}
    assert names == {"cpu": "plain", "tpu": "splash", "gpu": "flash", "cuda": "flash"}
    assert {kernel_for(platform, jnp.float32) for platform in names} == {"plain"}


def test_sinks_have_one_kernel():
    """It is chosen by itself; another one that the user names is an error."""
    assert {kernel_for(platform, jnp.bfloat16, sinks=True) for platform in ("cpu", "tpu", "gpu")} == {"plain"}
    q, layout = jnp.zeros((1, 2, 2, 16)), Layout(jnp.arange(2)[None], jnp.ones((1, 2), jnp.int32))
    with pytest.raises(ValueError, match="the kernel 'flash' has no attention sinks"):
        attend(q, q, q, layout, window=None, sinks=jnp.zeros(2), kernel="flash")
    named = SimpleNamespace(official=False, model=SimpleNamespace(attention="splash"))
    with pytest.raises(ValueError, match=r"model.attention=splash: only plain has this model's attention sinks"):
        from_config.kernel(cast(Any, named), cast(Any, SimpleNamespace(config=SimpleNamespace(sinks=True))))


# --- kernels in a decoder -------------------------------------------------------------------------


def config_of(**options):
    """A decoder of two layers."""
    defaults = {
        "model_type": "mistral",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "norm_eps": 1e-5,
        "rope_theta": 1e4,
        "rope_scaling": None,
        "rotary_dim": 64,
        "windows": (None,),
        "activation": "silu",
        "tie_word_embeddings": False,
        "max_position_embeddings": 4096,
        "initializer_range": 0.2,
    }
    return ModelConfig(**{**defaults, **options})


def random_params(config):
    rng = np.random.default_rng(0)
    shapes = sharding.unboxed(abstract_params(config))
    return jax.tree.map(lambda x: rng.normal(0, config.initializer_range, x.shape).astype(np.float32), shapes)


@functools.partial(jax.jit, static_argnames="decoder")
def logps_and_gradients(decoder, params, rows):
    def total(params):
        logps = response_logps(decoder, params, rows)
        # Every answer with a weight of its own: an exchange would show.
        return jnp.sum(logps * jnp.arange(1, logps.size + 1).reshape(logps.shape)), logps

    gradients, logps = jax.grad(total, has_aux=True)(params)
    return logps, gradients


def decoded(kernel, remat):
    config = config_of()
    decoder = Decoder(config, remat=remat, kernel=kernel)
    _, rows = full_rows(3)
    logps, gradients = logps_and_gradients(decoder, random_params(config), rows)
    return rows, np.asarray(logps), jax.tree.map(np.asarray, gradients)


@pytest.mark.parametrize(("kernel", "remat"), [("splash", "attention"), ("flash", "full")])
def test_decoders_agree_whatever_the_kernel(kernel, remat):
    """Log-probs of whole answers, ~−70 nats, and gradients relative to the largest of their array.

    Both to 1e-5: two layers amplify the rounding of float32 a few times.
    """
    rows, expected, expected_gradients = decoded("plain", "none")
    _, logps, gradients = decoded(kernel, remat)
    assert (expected[rows.lengths > 0] < -1).all()
    np.testing.assert_allclose(logps, expected, rtol=1e-5, atol=0)

    def same(path, gradient, values):
        assert np.abs(gradient - values).max() < 1e-5 * np.abs(values).max(), jax.tree_util.keystr(path)

    jax.tree_util.tree_map_with_path(same, gradients, expected_gradients)


def abstract_rows(mesh, *leading, rows=2, length=1024, unshared=1536, groups=8, dtype=jnp.int32):
    """Rows without contents, laid out on a mesh that may have no devices."""

    def ints(*shape):
        layout = NamedSharding(mesh, PartitionSpec(*[None] * len(leading), sharding.RULES["batch"]))
        return jax.ShapeDtypeStruct((*leading, rows, *shape), dtype, sharding=layout)

    T, G = length, groups
    layout = Layout(ints(T), ints(T), ints(T), ints(unshared))
    return Rows(ints(T), layout, ints(T), ints(T), ints(T), ints(G, 2), ints(G))


def test_what_remat_keeps_of_splash(mesh):
    """With remat="attention" the forward kernel is not run again in the backward pass, with "full" it is.

    Counted in the program less what nothing depends on, which XLA leaves out as well.
    """
    arguments = params_on(mesh, config_of()), abstract_rows(mesh)
    for remat, times in {"attention": 1, "full": 2}.items():
        decoder = Decoder(config_of(), dtype=jnp.bfloat16, remat=remat, kernel="splash")
        gradient = jax.grad(lambda p, r, d=decoder: jnp.sum(response_logps(d, p, r)))
        with jax.set_mesh(mesh):
            program = jax.make_jaxpr(gradient)(*arguments).jaxpr
        live, _ = partial_eval.dce_jaxpr(program, [True] * len(program.outvars))
        counts = [str(live).count(f"name=splash_mha_{kernel}_") for kernel in ("fwd", "dq", "dkv")]
        assert counts == [times, 1, 1], remat


# --- what can be told of devices that are not here ------------------------------------------------


@pytest.mark.parametrize("dim", [80, 128, 256])
def test_training_with_flash_lowers_for_gpus(dim):
    """Pallas writes a whole step's kernels down for a GPU, forward and backward: blocks and dims suit."""
    gpu = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
    mesh = AbstractMesh((1,) * 4, sharding.AXES, axis_types=(AxisType.Explicit,) * 4, abstract_device=gpu)
    config = config_of(head_dim=dim)
    decoder = Decoder(config, dtype=jnp.bfloat16, remat="full", kernel="flash")
    rows = abstract_rows(mesh, 2)
    floats = [
        jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding) for x in (rows.lengths, rows.items, rows.items)
    ]
    number = jax.ShapeDtypeStruct((), jnp.float32)
    options = from_config.optimization(spin_config.default(), 0)
    params = params_on(mesh, config)
    with jax.sharding.use_abstract_mesh(mesh):
        opt_state = jax.eval_shape(make_optimizer(options).init, params)
        state = TrainState(params, opt_state, jax.ShapeDtypeStruct((), jnp.int32))
        step = make_step(SPIN(decoder, custom_loss.find("logistic")), options)
        traced = step.trace(state, PairBatch(rows, *floats), number, {"beta": number})
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    for kernel in ("flash_forward", "flash_dq", "flash_dkv"):
        assert f'name = "{kernel}"' in text


@pytest.mark.long
def test_splash_compiles_for_tpus(monkeypatch):
    """libtpu compiles for chips that are not there: eight of v5e, heads split in two; takes half a minute.

    The forward kernel is there once, though layers are rematerialized.
    """
    pytest.importorskip("libtpu", reason="needs jax[tpu], though no TPU")
    from jax.experimental import topologies

    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # other tests may hold it meanwhile
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # or it looks for a TPU's own server
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4")
    mesh = sharding.make_mesh(1, 4, 2, devices=topology.devices)
    config = config_of(head_dim=128, hidden_size=512, intermediate_size=1024, vocab_size=1024)
    decoder = Decoder(config, dtype=jnp.bfloat16, remat="attention", kernel="splash")
    gradient = jax.jit(jax.grad(lambda params, rows: jnp.sum(response_logps(decoder, params, rows))))
    arguments = params_on(mesh, config), abstract_rows(mesh, rows=8)
    with jax.set_mesh(mesh):
        traced = gradient.trace(*arguments)
        text = traced.lower(lowering_platforms=("tpu",)).compile().as_text()
    calls = [line.split("=")[0] for line in text.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    kernels = Counter(name for call in calls for name in ("fwd", "dq", "dkv") if f"splash_mha_{name}_" in call)
    assert kernels == {"fwd": 1, "dq": 1, "dkv": 1}
