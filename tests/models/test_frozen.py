"""Frozen weights in int8 and NF4 under adapters."""

import dataclasses
import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from architectures import MISTRAL_7B, SMALL
from training_examples import RMSPROP, random_pairs

from spin_jax import config, errors, losses, tiny
from spin_jax.kernels import quantized
from spin_jax.models import lora
from spin_jax.models.decoder import Decoder
from spin_jax.models.loading import new_model
from spin_jax.models.params import init_params, params_on
from spin_jax.plan import __main__, answer, planned_run
from spin_jax.runtime import sharding
from spin_jax.training.batches import ScoredPair, pair_batches, stacked
from spin_jax.training.log_probs import score_groups
from spin_jax.training.packing import RowShape, pair_group
from spin_jax.training.step import SPIN, TrainState, abstract_state, init_state, make_step, summed_gradients

qwix = pytest.importorskip("qwix")

DTYPES = ("int8", "nf4")
SHAPE = RowShape(rows=4, length=40, groups=3)
# The values of NF4 in Appendix E of QLoRA, arXiv 2305.14314, in [-1, 1].
NF4_BELOW = [-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0]
NF4_ABOVE = [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
NF4 = np.array([*NF4_BELOW, *NF4_ABOVE], np.float32)
WIDEST = np.diff(NF4).max()


def llama(mesh, **options):
    architecture = {**SMALL, "model_type": "llama", "intermediate_size": 128, **options}
    model = new_model(architecture, tiny.tokenizer(), dtype="float32", mesh=mesh)
    return dataclasses.replace(model, params=init_params(model.config, jax.random.key(0), mesh))


def frozen_params(model, dtype):
    return lora.freeze(model.params, model.dtype, dtype, keep=True)


def as_floats(params):
    """The same numbers as plain weights."""

    def plain(leaf):
        if not quantized.is_quantized(leaf):
            return leaf
        return jax.device_put(np.asarray(qwix.dequantize(on_host(leaf))), leaf.qvalue.sharding)

    return jax.tree.map(plain, params, is_leaf=quantized.is_quantized)


def on_host(leaf):
    """A QArray without a mesh."""
    return jax.tree.map(jnp.asarray, jax.device_get(leaf))


def adapters_of(model, mesh):
    adapters = lora.init(lora.adapters_on(params_on(mesh, model.config), 2, tuple(lora.TARGETS)), jax.random.key(1))
    return jax.tree.map(lambda w: w + 0.05, adapters)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_rounded_to_the_nearest_value(dtype, mesh):
    """By NumPy: blocks of 64 along F and of a head's 16 along H; int8 has 255 steps from − to + the block's largest.

    No error is above half a step: 1/255 of the largest for int8, half the widest gap for NF4. Float32: 1e-6.
    """
    model = llama(mesh)
    weights = jax.device_get(model.params["layers"])
    stored = frozen_params(model, dtype)["layers"]
    for module, name, axis, size in (("mlp", "up", 2, 64), ("mlp", "down", 1, 64), ("attention", "wo", 2, 16)):
        w = np.moveaxis(weights[module][name], axis, -1)
        found = on_host(stored[module][name])
        blocks = w.reshape(*w.shape[:-1], -1, size)
        largest = np.abs(blocks).max(axis=-1, keepdims=True)
        got = np.moveaxis(np.asarray(qwix.dequantize(found)), axis, -1).reshape(blocks.shape)
        if dtype == "int8":  # whole steps
            steps, bound = got / (largest / 127.5), largest / 255
            np.testing.assert_allclose(steps, np.round(steps), rtol=0, atol=1e-4)
        else:
            codes, bound = np.abs(blocks[..., None] / largest[..., None] - NF4).argmin(axis=-1), largest * WIDEST / 2
            np.testing.assert_allclose(got, NF4[codes] * largest, rtol=0, atol=1e-6 * np.abs(w).max())
        assert (np.abs(got - blocks) <= bound * (1 + 1e-4)).all()  # 1e-4: float32, at step 127
        assert found.qvalue.dtype == (jnp.int8 if dtype == "int8" else jnp.uint4)
        assert found.scale.size * size == w.size
    assert stored["mlp_norm"]["scale"] is model.params["layers"]["mlp_norm"]["scale"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_are_the_same_on_every_mesh(dtype, mesh, mesh8):
    one, eight = (frozen_params(llama(m), dtype)["layers"] for m in (mesh, mesh8))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
        np.testing.assert_array_equal(a, b)
    assert ("fsdp", "context") in eight["mlp"]["up"].qvalue.sharding.spec
    assert eight["mlp"]["up"].qvalue.sharding.spec == eight["mlp"]["up"].scale.sharding.spec


@pytest.mark.parametrize(
    ("dtype", "devices", "options"),
    [
        ("int8", 1, {}),
        ("nf4", 1, {}),
        ("nf4", 8, {}),
        ("nf4", 1, {"model_type": "gemma2", "num_hidden_layers": 4, "sliding_window": 6}),
    ],
)
def test_adapters_have_the_gradients_of_plain_weights(dtype, devices, options, mesh, mesh8):
    """Margin and gradients are those of the dequantized weights given as floats: 1e-6 of the largest, float32."""
    where = mesh if devices == 1 else mesh8
    model = llama(where, **options)
    frozen, adapters = frozen_params(model, dtype), adapters_of(model, where)
    objective = SPIN(Decoder(model.config, remat="full"), losses.logistic)
    scored = [ScoredPair(pair, (-20.0, -25.0)) for pair in random_pairs(12)]
    batch = stacked(pair_batches(scored, SHAPE), 1)

    def gradients(weights):
        def loss(adapters, part):
            return objective(lora.joined(weights, adapters, 0.5), part, beta=0.1)

        placed = sharding.put_batch(where, batch, axis=1)
        return jax.jit(lambda a: summed_gradients(loss, a, placed, 1, in_place=False))(adapters)

    with jax.set_mesh(where):
        got, want, original = map(gradients, (frozen, as_floats(frozen), model.params))
    assert float(got[1]["margin"]) == pytest.approx(float(want[1]["margin"]), rel=1e-6)
    for a, b, c in zip(*(jax.tree.leaves(gradients) for gradients, _ in (got, want, original)), strict=True):
        assert a.sharding == b.sharding
        largest = float(np.abs(b).max())
        assert largest > 1e-5
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * largest)
        assert np.abs(a - c).max() > 1e-4 * largest  # those of the original weights are others


def test_step_zero_is_ln_2(mesh):
    """The opponent of training scores by the rounded weights. By the others, the first loss is another number."""
    model, pairs = llama(mesh), random_pairs(8)
    decoder = Decoder(model.config, remat="full")
    options = dataclasses.replace(RMSPROP, lora_rank=2, lora_targets=("wq", "down"), frozen_dtype="nf4")
    frozen = frozen_params(model, "nf4")
    adapters = lora.init(lora.adapters_on(model.params, 2, ("wq", "down")), jax.random.key(0))

    def first_loss(opponent):
        logps = score_groups(decoder, opponent, [pair_group(pair) for pair in pairs], SHAPE, mesh)
        scored = [ScoredPair(pair, tuple(row)) for pair, row in zip(pairs, logps, strict=True)]
        batch = sharding.put_batch(mesh, stacked(pair_batches(scored, SHAPE), 4), axis=1)
        state = init_state(jax.tree.map(jnp.copy, adapters), options, mesh)
        with jax.set_mesh(mesh):
            step = make_step(SPIN(decoder, losses.logistic), options)
            return float(step(state, batch, np.float32(0.1), {"beta": np.float32(1.0)}, frozen)[1]["loss"])

    assert first_loss(frozen) == pytest.approx(math.log(2), abs=1e-5)  # float32 log-probs of −50 nats
    assert abs(first_loss(model.params) - math.log(2)) > 0.01


def test_no_whole_copy_is_dequantized(mesh):
    """The compiled step holds less than the float32 matrices of the layers beside its arguments, which are small."""
    model = llama(mesh, hidden_size=256, intermediate_size=1024, num_hidden_layers=16)
    params = params_on(mesh, model.config)
    matrices = 16 * 256 * (3 * 1024 + 12 * 16)  # MLP; 12 heads of queries, keys, values and outputs
    options = dataclasses.replace(RMSPROP, lora_rank=2, lora_targets=("wq",), frozen_dtype="nf4")
    state = abstract_state(lora.adapters_on(params, 2, ("wq",)), options, mesh)
    frozen = lora.frozen_on(params, model.dtype, "nf4")
    batch = stacked(pair_batches([ScoredPair(pair, (0.0, 0.0)) for pair in random_pairs(4)], RowShape(2, 16, 1)), 2)
    with jax.set_mesh(mesh):
        step = make_step(SPIN(Decoder(model.config, remat="full"), losses.logistic), options)
        number = np.float32(0)
        memory = step.lower(state, batch, number, {"beta": number}, frozen).compile().memory_analysis()
    assert memory.argument_size_in_bytes < 0.25 * 4 * matrices
    assert memory.temp_size_in_bytes < 0.5 * 4 * matrices
    assert isinstance(state, TrainState)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train.frozen_dtype": "int4"}, "train.frozen_dtype='int4': one of int8, nf4"),
        ({"train.frozen_dtype": "nf4"}, "train.frozen_dtype needs train.lora_rank"),
        ({"sft.frozen_dtype": "int8"}, "sft.frozen_dtype needs sft.lora_rank"),
        (
            {"train.frozen_dtype": "nf4", "train.lora_rank": 4, "train.remat": "none"},
            "train.frozen_dtype with train.remat='none' would keep all weights as floats",
        ),
    ],
)
def test_values_that_contradict(values, message):
    c = config.default()
    c.data.path, c.model.path = "x", "y"
    with c.unlocked():
        for name, value in values.items():
            section, key = name.split(".")
            c[section][key] = value
    with pytest.raises(errors.ConfigError, match=message):
        config.resolve(c)


def test_what_cannot_be_frozen(mesh, monkeypatch):
    dense = llama(mesh).config
    lora.check(dense, ("wq",), "nf4")
    experts = dataclasses.replace(dense, num_experts=4, experts_per_token=2)
    with pytest.raises(ValueError, match="frozen_dtype='nf4': llama has experts"):
        lora.check(experts, ("wq",), "nf4")
    monkeypatch.setattr(
        lora, "importlib", types.SimpleNamespace(util=types.SimpleNamespace(find_spec=lambda name: None))
    )
    with pytest.raises(ValueError, match="needs qwix, which is not installed: pip install"):
        lora.check(dense, ("wq",), "int8")


def test_plan_says_what_they_save(mesh):
    """A 7B model; 6.98e9 of its numbers are in the layers' matrices, in 2, 1 + 1/16 or 1/2 + 1/16 bytes."""
    matrices = 32 * 4096 * (2 * (32 + 8) * 128 + 3 * 14336)
    c = config.default()
    c.data.path, c.model.architecture, c.train.lora_rank = "planned", MISTRAL_7B, 16
    for dtype, each in (("int8", 17 / 16), ("nf4", 9 / 16)):
        c.train.frozen_dtype = dtype
        run = planned_run.planned_run(config.resolve(c), "h200:1", compiles=False)
        found = answer.plan(run, 1000)
        assert found["lora"]["frozen_saved_gib"] == pytest.approx((2 - each) * matrices / 2**30, rel=1e-6)
        assert found["lora"]["saved_gib"] > found["lora"]["frozen_saved_gib"]
        weights = found["phases"]["train"]["parts_gib"]["weights"]
        shapes = lora.frozen_on(params_on(mesh, run.model.config), run.model.dtype, dtype)
        sizes = sum(
            leaf.size * (0.5 if leaf.dtype == jnp.uint4 else leaf.dtype.itemsize) for leaf in jax.tree.leaves(shapes)
        )
        assert weights == pytest.approx(sizes / 2**30, rel=1e-3)
        assert found["phases"]["score"]["parts_gib"]["weights"] == pytest.approx(4 * 7.24e9 / 2**30 + weights, rel=1e-3)
    assert "GiB of these by frozen weights in nf4, in training alone" in __main__.table(found)


RUN = (
    "--config.train.lora_rank=4",
    "--config.train.frozen_dtype=nf4",
    "--config.train.remat=full",
    "--config.train.learning_rate=0.01",
    "--config.sft.control=False",
    "--config.selfplay.iterations=1",
    "--config.checkpoint.every_steps=2",
)


@pytest.mark.long
def test_a_run_begins_at_ln_2_and_resumes_to_the_bit(tmp_path):
    """The opponent's part too: pairs of training by the rounded weights, held-out ones by the float32 weights."""
    command, whole, killed = runs.Command(), tmp_path / "whole", tmp_path / "killed"
    command(whole, *RUN)
    rows = [row for row in runs.read_metrics(whole) if (row["phase"], row["iteration"]) == ("train", 0)]
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert rows[-1]["margin"] > rows[0]["margin"] == pytest.approx(0, abs=1e-3)
    assert len(json.loads((whole / "summary.json").read_text())) == 2
    process, kept = command.start(killed, *RUN), killed / "iteration_0" / "train"
    while not (kept.exists() and any(kept.iterdir())):
        assert process.poll() is None
    process.kill()
    process.communicate()
    command(killed, *RUN)
    assert not runs.differences(whole, killed)
