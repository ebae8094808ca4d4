"""Rows that several devices share (`mesh.context`): log-probs, losses and gradients are those of one device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_examples import ARCHITECTURE, RMSPROP, random_pairs, random_params, sft_step

from spin_jax import losses, tiny
from spin_jax.models import lora
from spin_jax.models.decoder import Decoder
from spin_jax.models.loading import new_model
from spin_jax.runtime import sharding
from spin_jax.sampling.generate import generate
from spin_jax.training import batch_shape
from spin_jax.training.batches import ScoredPair, pair_batches, stacked
from spin_jax.training.log_probs import logits, response_logps, score_groups, score_tokens
from spin_jax.training.packing import RowShape, packed, pair_group, sizes
from spin_jax.training.step import SFT, SPIN, init_state, make_step

pytestmark = pytest.mark.usefixtures("several_chunks")
SHAPE = RowShape(rows=4, length=48, groups=4)
MESHES = {
    "context 2": {"data": 1, "fsdp": 2, "context": 2, "tensor": 2},
    "context 4": {"data": 2, "fsdp": 1, "context": 4, "tensor": 1},
    "context 8": {"data": 1, "fsdp": 1, "context": 8, "tensor": 1},
}
# Float32 sums in another order; two layers amplify the rounding a few times. Log-probs are about −6 nats a token.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def model(mesh):
    return new_model(ARCHITECTURE, tiny.tokenizer(), dtype="float32", mesh=mesh)


def after_step(objective, batch, mesh):
    """(the parameters after a step that subtracts the gradient, the metrics)."""
    # The first step of RMSProp is gradient / (|gradient| / 10 + eps).
    options = dataclasses.replace(RMSPROP, eps=1e6)
    state, step = (
        init_state(random_params(objective.decoder.config, mesh), options, mesh),
        make_step(objective, options),
    )
    with jax.set_mesh(mesh):
        scalars = {"beta": np.float32(0.1)} if isinstance(objective, SPIN) else {}
        state, metrics = step(state, sharding.put_batch(mesh, batch, axis=1), np.float32(1e6), scalars)
    return jax.device_get(state.params), {name: float(value) for name, value in metrics.items()}


def assert_trees_close(ours, expected):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, err_msg=jax.tree_util.keystr(path), **CLOSE)


@pytest.mark.parametrize("axes", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("stage", ["SPIN", "SFT"])
def test_a_step_on_shared_rows(stage, axes, model, mesh, mesh8):
    """Two micro-batches of self-play and of SFT: parameters less their gradient, loss and metrics."""
    decoder, pairs = Decoder(model.config, remat="attention"), random_pairs(24)
    if stage == "SPIN":
        objective = SPIN(decoder, losses.logistic)
        batch = stacked(pair_batches([ScoredPair(pair, (-60.0, -70.0)) for pair in pairs], SHAPE), 2)
    else:
        objective, batch = SFT(decoder), sft_step(pairs, SHAPE, 2)
    before = jax.device_get(random_params(model.config, mesh))
    expected, metrics = after_step(objective, batch, mesh)
    moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), before, expected)
    assert min(jax.tree.leaves(moved)) > 1e-3
    ours, own_metrics = after_step(objective, batch, sharding.make_mesh(**axes))
    assert_trees_close(ours, expected)
    assert own_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("axes", MESHES.values(), ids=MESHES)
def test_scores_of_shared_rows(axes, model, mesh, mesh8):
    """Of whole answers, of each token, and logits of rows whose length the devices do not divide."""
    wide, decoder = sharding.make_mesh(**axes), Decoder(model.config)
    groups = [pair_group(pair) for pair in random_pairs(24)]
    (rows, *_) = packed(groups, SHAPE)
    results = []
    for where in (mesh, wide):
        params = random_params(model.config, where)
        with jax.set_mesh(where):
            of_tokens = score_tokens(decoder, params, sharding.put_batch(where, rows))
        there = dataclasses.replace(model, params=params, mesh=where)
        whole = logits(there, rows.tokens[:3, :37])
        results.append([score_groups(decoder, params, groups, SHAPE, where), *map(sharding.to_host, of_tokens), whole])
    for ours, expected in zip(*reversed(results), strict=True):
        assert ours.shape == expected.shape
        np.testing.assert_allclose(ours, expected, **CLOSE)
    assert (results[0][0] < -1).all()


@pytest.mark.parametrize(
    "options",
    [
        {"windows": (9, None), "attention_softcap": 5.0, "query_scale": 0.2, "sinks": True},
        {"num_experts": 4, "experts_per_token": 2, "qk_norm": True, "tie_word_embeddings": True},
        {"lora": True},
    ],
    ids=["windows, soft cap and sinks", "experts", "LoRA"],
)
def test_gradients_of_other_decoders(options, model, mesh, mesh8):
    """Those of weighted log-probs, relative to the largest of each parameter (1e-5, float32)."""
    options = dict(options)
    adapted = options.pop("lora", False)
    config = dataclasses.replace(model.config, **options)
    (rows, *_) = packed([pair_group(pair) for pair in random_pairs(24)], SHAPE)
    results = []
    for where in (mesh, sharding.make_mesh(**MESHES["context 2"])):
        trained = params = random_params(config, where)
        if adapted:
            trained = lora.init(lora.adapters_on(params, 2, ("wq", "wo", "down")), jax.random.key(0))
            trained = jax.tree.map(lambda w: w + 0.1, trained)

        def weighted(trained, rows, params=params):
            joined = lora.joined(params, trained, 1.0) if adapted else trained
            logps = response_logps(Decoder(config, remat="full"), joined, rows)
            return jnp.sum(logps * jnp.arange(1, logps.size + 1).reshape(logps.shape))

        with jax.set_mesh(where):
            gradients = jax.jit(jax.grad(weighted))(trained, sharding.put_batch(where, rows))
        results.append(jax.tree.map(sharding.to_host, gradients))
    expected, ours = results
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(expected), strict=True):
        largest = np.abs(y).max()
        assert largest > 1e-2, jax.tree_util.keystr(path)
        np.testing.assert_allclose(x / largest, y / largest, rtol=0, atol=1e-5, err_msg=jax.tree_util.keystr(path))


def test_rows_have_equal_parts(model, mesh8):
    """Lengths are multiples of 16 tokens a device, and a device has the tokens that `tokens_per_device` allows."""
    there = dataclasses.replace(model, mesh=sharding.make_mesh(**MESHES["context 4"]))
    groups = sizes([40] * 64, [9] * 64, [8] * 64)
    options = {"kernel": "plain", "batch_size": 64, "tokens_per_device": 32}
    shape = batch_shape.row_shape(there, groups, groups.max(axis=0), **options)
    assert (shape.rows, shape.length) == (4, 64)  # of 57 tokens: two rows for 4 devices × 32 tokens, in 2 replicas
    stated = batch_shape.row_shape(there, groups, groups.max(axis=0), **options, row_length=70)
    assert (stated.rows, stated.length) == (2, 128)
    assert sharding.row_length(17, there.mesh) == 24
    assert sharding.row_length(57, there.mesh, 128) == 512


def test_answers_by_a_model_whose_devices_share_rows(model, mesh, mesh8):
    """Its devices have whole answers; greedy."""
    answers = []
    for where in (mesh, sharding.make_mesh(**MESHES["context 2"])):
        there = dataclasses.replace(model, params=random_params(model.config, where), mesh=where)
        answers.append(
            generate(there, [[{"role": "user", "content": "Why?"}], [{"role": "user", "content": "No."}]], 8)
        )
    assert answers[0] == answers[1]
    assert all(answers[0])
