"""The step: optimizers, accumulation, meshes, masters; and what reaches it."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from spin_jax import batches, losses, sharding, tiny
from spin_jax.batches import RowShape
from spin_jax.chat import Chat, Pair
from spin_jax.convert import new_model
from spin_jax.data import load_examples
from spin_jax.model import Decoder, init_params
from spin_jax.scoring import response_logps, score_rows
from spin_jax.train import SFT, SPIN, Optimization, evaluate, init_state, make_optimizer, make_step

RMSPROP = Optimization(
    optimizer="rmsprop",
    learning_rate=1e-3,
    schedule="constant",
    warmup_ratio=0.0,
    weight_decay=0.0,
    momentum=0.9,
    decay=0.99,
    eps=1e-8,
    clip_norm=None,
    batch_size=8,
    microbatch_size=None,
    epochs=1,
    schedule_epochs=None,
)
SHAPE = RowShape(length=16, response=8)
ARCHITECTURE = {
    "model_type": "mistral",
    "vocab_size": 272,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def model(mesh):
    return new_model(ARCHITECTURE, tiny.tokenizer(), dtype="float32", mesh=mesh)


def fresh(model, mesh):
    return init_params(model.config, jax.random.key(0), mesh)


def random_pairs(count, seed=0):
    rng = np.random.default_rng(seed)

    def ids():
        return rng.integers(6, 262, rng.integers(2, 7)).astype(np.int32)

    return [Pair(i, 0, [], [], ids(), ids(), ids(), truncated=False) for i in range(count)]


def scored_batch(decoder, params, mesh, pairs, size, offset=0.0):
    """A batch whose opponent is `params` themselves; `offset` nats off for the human answers."""
    unscored = [batches.ScoredPair(p, (0.0, 0.0)) for p in pairs]
    rows = batches.pair_batch(unscored, size, SHAPE).rows
    with jax.set_mesh(mesh):
        logps = np.asarray(score_rows(decoder, params, sharding.put_batch(mesh, rows))).reshape(-1, 2)
    logps = logps + np.where(np.arange(size) % 2, offset, -offset)[:, None] * [1.0, 0.0]
    scored = [batches.ScoredPair(p, tuple(lp)) for p, lp in zip(pairs, logps, strict=False)]
    return batches.pair_batch(scored, size, SHAPE)


def run_step(objective, options, params, batch, mesh, steps=1, beta=0.1, learning_rate=1e-3):
    state = init_state(params, options, mesh)
    step = make_step(objective, options)
    split = batches.microbatches(batch, options.accumulation)
    history = []
    with jax.set_mesh(mesh):
        for _ in range(steps):
            placed = sharding.put_batch(mesh, split, axis=1)
            scalars = {"beta": np.float32(beta)} if isinstance(objective, SPIN) else {}
            state, metrics = step(state, placed, np.float32(learning_rate), scalars)
            history.append({k: float(v) for k, v in metrics.items()})
    return jax.device_get(state.params), history


def assert_trees_close(a, b, **tolerance):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, err_msg=jax.tree_util.keystr(path), **tolerance)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_rmsprop_is_torchs(weight_decay):
    """Three steps of torch.optim.RMSprop on the same gradients; float32 rounding apart."""
    torch = pytest.importorskip("torch")
    options = dataclasses.replace(RMSPROP, weight_decay=weight_decay)
    rng = np.random.default_rng(0)
    start = rng.normal(size=(5, 3)).astype(np.float32)
    theirs = torch.nn.Parameter(torch.tensor(start))
    reference = torch.optim.RMSprop([theirs], lr=1e-2, alpha=0.99, eps=1e-8, weight_decay=weight_decay)
    optimizer, ours = make_optimizer(options), jnp.asarray(start)
    state = optimizer.init(ours)
    for _ in range(3):
        gradient = (rng.normal(size=(5, 3)) * 1e-3).astype(np.float32)
        theirs.grad = torch.tensor(gradient)
        reference.step()
        direction, state = optimizer.update(jnp.asarray(gradient), state, ours)
        ours = ours - 1e-2 * direction
        np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_adamw_is_torchs():
    torch = pytest.importorskip("torch")
    options = dataclasses.replace(RMSPROP, optimizer="adamw", decay=0.999, weight_decay=0.1)
    rng = np.random.default_rng(0)
    start = rng.normal(size=(5, 3)).astype(np.float32)
    theirs = torch.nn.Parameter(torch.tensor(start))
    reference = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1)
    optimizer, ours = make_optimizer(options), jnp.asarray(start)
    state = optimizer.init(ours)
    for _ in range(3):
        gradient = rng.normal(size=(5, 3)).astype(np.float32)
        theirs.grad = torch.tensor(gradient)
        reference.step()
        direction, state = optimizer.update(jnp.asarray(gradient), state, ours)
        ours = ours - 1e-2 * direction
        np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.1])
def test_schedules_are_transformers(schedule, warmup):
    """Every step's learning rate equals transformers' scheduler's; float32 rounding apart."""
    torch = pytest.importorskip("torch")
    from transformers import get_scheduler

    options = dataclasses.replace(RMSPROP, learning_rate=5e-7, schedule=schedule, warmup_ratio=warmup)
    total = 57
    ours = options.learning_rates(total)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=5e-7)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    scheduler = get_scheduler(name, optimizer, math.ceil(total * warmup), total)
    theirs = []
    for _ in range(total):
        theirs.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_step_zero_is_ln_2(model, mesh):
    """The opponent's scores are the policy's own at the start: loss ln 2, margin 0, to 1e-5 (float32)."""
    params = fresh(model, mesh)
    objective = SPIN(Decoder(model.config, remat=True), losses.logistic)
    batch = scored_batch(objective.decoder, params, mesh, random_pairs(8), 8)
    _, (first, second) = run_step(objective, RMSPROP, params, batch, mesh, steps=2)
    assert abs(first["loss"] - math.log(2)) < 1e-5
    assert abs(first["margin"]) < 1e-5
    assert second["loss"] < first["loss"]  # and the first step helps
    assert second["margin"] > 0
    assert first["grad_norm"] > 0


def test_identical_pairs_change_nothing(model, mesh):
    params = fresh(model, mesh)
    pairs = [dataclasses.replace(p, generated=p.real) for p in random_pairs(8)]
    objective = SPIN(Decoder(model.config), losses.logistic)
    batch = scored_batch(objective.decoder, params, mesh, pairs, 8)
    _, (metrics,) = run_step(objective, RMSPROP, params, batch, mesh)
    assert metrics["identical"] == 1.0
    # the two rows of a pair are the same numbers in another order of summation
    assert metrics["grad_norm"] < 1e-5


@pytest.mark.parametrize("kind", ["pairs", "sft"])
def test_accumulation_equals_the_large_batch(model, mesh, kind):
    """Short last batch included; float32 sums in another order, so 1e-5 of the largest."""
    decoder, pairs = Decoder(model.config), random_pairs(7)
    if kind == "pairs":
        objective = SPIN(decoder, losses.logistic)
        batch = scored_batch(decoder, fresh(model, mesh), mesh, pairs, 8, offset=2.0)
    else:
        objective = SFT(decoder)
        chat = Chat(model.tokenizer, model.stop_tokens)
        examples, _ = load_examples(tiny.problems(7), chat, path="tiny")
        batch = batches.sft_batch(examples, 8, RowShape(24, 8))
    # plain descent: RMSProp's first step is ±lr/√0.01 whatever the gradient, and would hide its size
    options = dataclasses.replace(RMSPROP, eps=1e6)
    results = [
        run_step(
            objective,
            dataclasses.replace(options, microbatch_size=size),
            fresh(model, mesh),
            batch,
            mesh,
            steps=2,
            learning_rate=1e5,
        )
        for size in (None, 4, 1)
    ]
    for params, history in results[1:]:
        assert_trees_close(params, results[0][0], rtol=1e-4, atol=1e-5)
        for ours, theirs in zip(history, results[0][1], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)


def test_filler_does_not_count(model, mesh):
    """A batch of 5 pairs padded to 8 has the metrics of those 5, and their gradient."""
    objective, params = SPIN(Decoder(model.config), losses.logistic), fresh(model, mesh)
    pairs = random_pairs(5)
    short = dataclasses.replace(RMSPROP, batch_size=5)
    exact = run_step(objective, short, params, scored_batch(objective.decoder, params, mesh, pairs, 5), mesh)
    params = fresh(model, mesh)
    padded = run_step(
        objective, RMSPROP, params, scored_batch(objective.decoder, params, mesh, pairs, 8), mesh
    )
    assert exact[1][0] == pytest.approx(padded[1][0], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (8, 1, 1)])
def test_eight_devices_equal_one(model, mesh, sizes):
    """Three optimizer steps on 1 and 8 simulated devices; sums in another order, so 1e-4 relative."""
    wide = sharding.make_mesh(*sizes)
    objective = SPIN(Decoder(model.config, remat=True), losses.logistic)
    batch = scored_batch(objective.decoder, fresh(model, mesh), mesh, random_pairs(8), 8, offset=2.0)
    adam = dataclasses.replace(RMSPROP, optimizer="adamw", decay=0.999, eps=1e-4, clip_norm=0.5)
    one, history = run_step(objective, adam, fresh(model, mesh), batch, mesh, steps=3)
    eight, histories = run_step(objective, adam, fresh(model, wide), batch, wide, steps=3)
    assert_trees_close(one, eight, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(history, histories, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


def test_a_vocabulary_that_the_mesh_does_not_divide():
    """263 rows over tensor=2: embedding and head stay whole, and the numbers are one device's."""
    values = []
    for sizes, devices in (((1, 1, 1), 1), ((1, 2, 2), 4)):
        mesh = sharding.make_mesh(*sizes, devices=jax.devices()[:devices])
        for tied in (False, True):
            odd = ARCHITECTURE | {"vocab_size": 263, "tie_word_embeddings": tied}
            model = new_model(odd, tiny.tokenizer(), dtype="float32", mesh=mesh)
            rows = batches.pad_rows([(p.prompt, p.real) for p in random_pairs(4)], SHAPE)
            params = fresh(model, mesh)
            with jax.set_mesh(mesh):
                placed = sharding.put_batch(mesh, rows)
                values.append(np.asarray(score_rows(Decoder(model.config), params, placed)))
    np.testing.assert_allclose(values[0], values[2], rtol=1e-5)
    np.testing.assert_allclose(values[1], values[3], rtol=1e-5)


def test_optimizer_state_is_split_like_the_parameters(model):
    wide = sharding.make_mesh(2, 2, 2)
    params = fresh(model, wide)
    state = init_state(params, RMSPROP, wide)
    shardings = {leaf.sharding.spec for leaf in jax.tree.leaves(params)}
    assert len(shardings) > 3
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    for moment, param in zip(moments, jax.tree.leaves(params), strict=True):
        assert moment.sharding.is_equivalent_to(param.sharding, param.ndim)


def test_master_weights_move_at_the_papers_learning_rate(model, mesh):
    """lr 5e-7 in bfloat16 compute: the float32 masters change, their bfloat16 roundings hardly do."""
    objective = SPIN(Decoder(model.config, dtype=jnp.bfloat16), losses.logistic)
    params = fresh(model, mesh)
    batch = scored_batch(objective.decoder, params, mesh, random_pairs(8), 8)
    before = jax.device_get(params)
    after, _ = run_step(objective, RMSPROP, params, batch, mesh, learning_rate=5e-7)
    changed = jax.tree.map(lambda a, b: np.mean(a != b), before, after)
    rounded = jax.tree.map(
        lambda a, b: np.mean(a.astype(jnp.bfloat16) != b.astype(jnp.bfloat16)), before, after
    )
    assert after["layers"]["mlp"]["up"].dtype == np.float32
    assert changed["layers"]["mlp"]["up"] > 0.9
    assert rounded["layers"]["mlp"]["up"] < 0.05


def test_beta_and_learning_rate_are_arguments(model, mesh):
    """Iterations that differ in β, learning rate or epochs run one compiled program."""
    objective = SPIN(Decoder(model.config), losses.exponential)
    first = make_step(objective, RMSPROP)
    second = make_step(objective, dataclasses.replace(RMSPROP, learning_rate=1e-7, epochs=3))
    assert first is second
    batch = scored_batch(objective.decoder, fresh(model, mesh), mesh, random_pairs(8), 8)
    values = []
    for beta, learning_rate in ((0.1, 1e-3), (5.0, 1e-3), (5.0, 1e-5)):
        params, history = run_step(
            objective, RMSPROP, fresh(model, mesh), batch, mesh, 2, beta, learning_rate
        )
        values.append((history[1]["margin"], params["head"]))
    assert first._cache_size() == 1
    assert values[1][0] > 10 * values[0][0]  # the margin is in units of β
    assert not np.array_equal(values[1][1], values[2][1])


def test_clipping(model, mesh):
    """Clipped plain descent moves by lr · clip_norm, whatever the gradient's norm."""
    options = dataclasses.replace(RMSPROP, eps=1e8, clip_norm=0.01)
    objective = SFT(Decoder(model.config))
    pairs = random_pairs(8)
    rows = batches.pad_rows([(p.prompt, p.real) for p in pairs], SHAPE)
    batch = batches.SFTBatch(rows, np.ones(8, np.float32))
    before = jax.device_get(fresh(model, mesh))
    after, (metrics,) = run_step(objective, options, fresh(model, mesh), batch, mesh, learning_rate=1e8)
    moved = math.sqrt(
        sum(np.sum((a - b) ** 2) for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True))
    )
    assert metrics["grad_norm"] > 0.1
    assert moved == pytest.approx(0.01, rel=1e-2)


def test_evaluation_is_the_mean_over_pairs(model, mesh):
    """Held-out batches of 4, 4 and 2 (padded): the mean of all ten."""
    decoder, pairs = Decoder(model.config), random_pairs(10)
    params = fresh(model, mesh)
    objective = SPIN(decoder, losses.hinge)
    scored = [batches.ScoredPair(p, (-20.0, -30.0)) for p in pairs]
    parts = [batches.pair_batch(scored[i : i + 4], 4, SHAPE) for i in range(0, 10, 4)]
    together = evaluate(objective, params, [batches.pair_batch(scored, 10, SHAPE)], {"beta": 0.3}, mesh)
    assert evaluate(objective, params, parts, {"beta": 0.3}, mesh) == pytest.approx(together, rel=1e-5)


def test_response_logps_by_hand(model, mesh):
    """Against log-softmax and a gather, row by row, without padding."""
    decoder, params = Decoder(model.config), fresh(model, mesh)
    pair = random_pairs(1)[0]
    ids = np.concatenate([pair.prompt, pair.real])
    n = np.arange(len(ids), dtype=np.int32)
    arguments = ids[None], n[None], np.ones_like(n)[None]
    variables = {"params": params}
    with jax.set_mesh(mesh):
        hidden, _ = decoder.apply(variables, *arguments)
        logps = nn.log_softmax(decoder.apply(variables, hidden, method="logits")[0])
        expected = sum(float(logps[i - 1, ids[i]]) for i in range(len(pair.prompt), len(ids)))
        rows = batches.pad_rows([(pair.prompt, pair.real)], SHAPE)
        found = float(response_logps(decoder, params, rows)[0])
    assert found == pytest.approx(expected, rel=1e-6)


def test_impossible_options():
    with pytest.raises(ValueError, match="rmsprop, adamw, adafactor"):
        dataclasses.replace(RMSPROP, optimizer="sgd")
    with pytest.raises(ValueError, match="linear, cosine, constant"):
        dataclasses.replace(RMSPROP, schedule="step")
    with pytest.raises(ValueError, match="schedule_epochs=1 is shorter than epochs=2"):
        dataclasses.replace(RMSPROP, epochs=2, schedule_epochs=1)


@pytest.mark.parametrize(("most", "microbatch"), [(None, 8), (8, 8), (64, 8), (5, 4), (3, 2), (1, 1)])
def test_microbatches_divide_the_batch(most, microbatch):
    options = dataclasses.replace(RMSPROP, microbatch_size=most)
    assert options.microbatch == microbatch
    assert options.accumulation * microbatch == 8


def test_adafactor_learns(model, mesh):
    objective = SPIN(Decoder(model.config), losses.logistic)
    params = fresh(model, mesh)
    batch = scored_batch(objective.decoder, params, mesh, random_pairs(8), 8)
    options = dataclasses.replace(RMSPROP, optimizer="adafactor")
    _, history = run_step(objective, options, params, batch, mesh, steps=4)
    assert history[-1]["loss"] < history[0]["loss"] - 1e-3
