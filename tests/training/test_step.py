"""The training step: the objective on packed rows, micro-batches, meshes and master weights."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_examples import ARCHITECTURE, MICROBATCHES, RMSPROP, SHAPE, random_pairs, random_params, sft_step

from spin_jax import losses, tiny
from spin_jax.data.records import Pair
from spin_jax.models import loading, lora, saving
from spin_jax.models.decoder import Decoder
from spin_jax.models.loading import new_model
from spin_jax.models.params import abstract_params, copies, count_params, params_on
from spin_jax.runtime import sharding
from spin_jax.storage import checkpoints as checkpoint
from spin_jax.training import log_probs
from spin_jax.training.batches import ScoredPair, pair_batches, stacked
from spin_jax.training.log_probs import score_groups, score_rows
from spin_jax.training.optimizer import make_optimizer
from spin_jax.training.packing import RowShape, packed, pair_group
from spin_jax.training.step import (
    SFT,
    SPIN,
    TrainState,
    abstract_state,
    init_state,
    make_step,
    summed_gradients,
)

# Plain descent by learning_rate / 1e6: RMSProp's first step is ±lr/√0.01 whatever the gradient's size.
DESCENT = dataclasses.replace(RMSPROP, eps=1e6)


ALONE = RowShape(rows=8, length=40, groups=1)  # a row a pair, one micro-batch a step


SCORING = RowShape(rows=3, length=56, groups=4)  # the opponent's, so that its rows are others than training's


pytestmark = pytest.mark.usefixtures("several_chunks")


@pytest.fixture(scope="module")
def model(mesh):
    return new_model(ARCHITECTURE, tiny.tokenizer(), dtype="float32", mesh=mesh)


@pytest.fixture(scope="module")
def fresh(model):
    """fresh(mesh) → parameters, the same ones every time: a step takes its own away."""
    return lambda mesh: random_params(model.config, mesh)


def scored_by(decoder, params, mesh, pairs, offset=0.0):
    """Pairs whose opponent is `params` themselves; in turn, `offset` nats more and less for human answers."""
    logps = score_groups(decoder, params, [pair_group(pair) for pair in pairs], SCORING, mesh)
    logps = logps + offset * np.resize([[-1.0, 0.0], [1.0, 0.0]], logps.shape)
    return [ScoredPair(pair, tuple(values)) for pair, values in zip(pairs, logps, strict=True)]


def pair_step(scored, shape=SHAPE, count=MICROBATCHES):
    """One step's batch of pairs."""
    return stacked(pair_batches(scored, shape), count)


def used(batch):
    """How many micro-batches of a step hold something."""
    items = batch.rows.items if hasattr(batch, "rows") else batch.items
    return int((items > 0).any(axis=(1, 2)).sum())


def run_step(objective, options, params, batch, mesh, steps=1, beta=0.1, learning_rate=1e-3):
    """(parameters, each step's metrics) after steps on one batch."""
    state = init_state(params, options, mesh)
    step = make_step(objective, options)
    history = []
    with jax.set_mesh(mesh):
        for _ in range(steps):
            placed = sharding.put_batch(mesh, batch, axis=1)
            scalars = {"beta": np.float32(beta)} if isinstance(objective, SPIN) else {}
            state, metrics = step(state, placed, np.float32(learning_rate), scalars)
            history.append({k: float(v) for k, v in metrics.items()})
    return jax.device_get(state.params), history


def assert_trees_close(a, b, **tolerance):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, err_msg=jax.tree_util.keystr(path), **tolerance)


def test_step_zero_is_ln_2(model, fresh, mesh):
    """The opponent's scores are the policy's own at the start: loss ln 2, margin 0, to 1e-5 (float32).

    Though it scored them in other rows, and the micro-batches are several.
    """
    params, pairs = fresh(mesh), random_pairs(8)
    objective = SPIN(Decoder(model.config), losses.logistic)
    batch = pair_step(scored_by(objective.decoder, params, mesh, pairs))
    assert used(batch) == 2
    of_scoring = packed([pair_group(pair) for pair in pairs], SCORING)
    assert [row[row > 0].tolist() for part in of_scoring for row in part.items] != [
        row[row > 0].tolist() for part in batch.rows.items for row in part
    ]
    _, (first, second) = run_step(objective, DESCENT, params, batch, mesh, steps=2, learning_rate=1e6)
    assert abs(first["loss"] - math.log(2)) < 1e-5
    assert abs(first["margin"]) < 1e-5
    assert second["loss"] < first["loss"]  # and the first step helps
    assert second["margin"] > 0
    assert first["grad_norm"] > 0


def test_identical_pairs_change_nothing(model, fresh, mesh):
    params = fresh(mesh)
    pairs = [dataclasses.replace(p, generated=p.real) for p in random_pairs(8)]
    objective = SPIN(Decoder(model.config), losses.logistic)
    batch = pair_step(scored_by(objective.decoder, params, mesh, pairs))
    _, (metrics,) = run_step(objective, DESCENT, params, batch, mesh)
    assert metrics["identical"] == 1.0
    # the two answers of a pair are the same numbers in another order of summation
    assert metrics["grad_norm"] < 1e-5


def earlier_places(kind, scored):
    """For each pair, places in its prompt that `turns` trains on too: none in the first one, and then more."""
    return [np.arange(1, len(s.pair.prompt), 2)[: n if kind == "turns" else 0] for n, s in enumerate(scored)]


def torch_gradient(kind, model, params, scored, tmp_path, mesh):
    """(loss, gradient as our tree) of the mean over pairs or tokens, every sequence alone and unpadded."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)  # calls this small are a hundred times slower where threads wait for cores
    saving.save(dataclasses.replace(model, params=params), tmp_path / "weights")
    reference = AutoModelForCausalLM.from_pretrained(
        tmp_path / "weights", dtype=torch.float32, attn_implementation="eager"
    )

    def logp(prompt, answer, earlier=()):
        ids = torch.tensor(np.concatenate([prompt, answer])[None].astype(int))
        logps = torch.log_softmax(reference(ids).logits[0, :-1], dim=-1)
        logps = logps.gather(1, ids[0, 1:, None])
        return logps[len(prompt) - 1 :].sum() + sum(logps[place - 1, 0] for place in earlier)

    if kind != "pairs":
        earlier = earlier_places(kind, scored)
        total = sum(logp(s.pair.prompt, s.pair.real, e) for s, e in zip(scored, earlier, strict=True))
        loss = -total / sum(len(s.pair.real) + len(e) for s, e in zip(scored, earlier, strict=True))
    else:
        margins = [
            (logp(s.pair.prompt, s.pair.real) - s.opponent[0]) - (logp(s.pair.prompt, s.pair.generated) - s.opponent[1])
            for s in scored
        ]
        loss = -torch.nn.functional.logsigmoid(0.1 * torch.stack(margins)).mean()
    loss.backward()
    for weight in reference.parameters():
        weight.data = weight.grad
    reference.save_pretrained(tmp_path / "gradient")
    return loss.item(), loading.load_params(tmp_path / "gradient", model.config, mesh, jnp.float32)


@pytest.mark.parametrize("kind", ["pairs", "sft", "turns"])
def test_gradient_is_that_of_separate_sequences(kind, model, fresh, mesh, tmp_path):
    """Packed rows, several micro-batches and chunks; grouped queries and a window; against torch.

    One step of plain descent by 100 gradients; each parameter's to 1e-4 of its largest entry, for both
    sides compute in float32 and in another order.
    """
    decoder, params = Decoder(model.config), fresh(mesh)
    scored = scored_by(decoder, params, mesh, random_pairs(7, seed=1, longest=9), offset=2.0)
    loss, expected = torch_gradient(kind, model, params, scored, tmp_path, mesh)
    if kind == "pairs":
        objective, batch = SPIN(decoder, losses.logistic), pair_step(scored)
    else:
        earlier = earlier_places(kind, scored)
        objective, batch = SFT(decoder), sft_step([s.pair for s in scored], earlier=earlier)
    assert used(batch) > 1
    before = jax.device_get(params)
    after, (metrics,) = run_step(objective, DESCENT, params, batch, mesh, learning_rate=1e8)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    moved = jax.tree.map(lambda a, b: (a - b) / 100, before, after)
    for (path, want), got in zip(
        jax.tree_util.tree_leaves_with_path(jax.device_get(expected)), jax.tree.leaves(moved), strict=True
    ):
        where = jax.tree_util.keystr(path)
        assert np.abs(want).max() > 1e-5, where
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max(), err_msg=where)


@pytest.mark.parametrize("kind", ["pairs", "sft"])
def test_any_number_of_microbatches_is_the_large_batch(kind, model, fresh, mesh):
    """One pair, seven short ones, eight long ones: one program, and what a row a pair gives at once.

    Two steps; float32 sums in another order, so 1e-5 of the largest.
    """
    decoder = Decoder(model.config)
    objective = SPIN(decoder, losses.logistic) if kind == "pairs" else SFT(decoder)
    step = make_step(objective, DESCENT)
    counts, programs = [], set()
    long = random_pairs(8, seed=2, longest=13 if kind == "pairs" else 20)
    for pairs in (random_pairs(1), random_pairs(7), long):
        if kind == "pairs":
            scored = scored_by(decoder, fresh(mesh), mesh, pairs, offset=2.0)
            batch, whole = pair_step(scored), pair_step(scored, ALONE, 1)
        else:
            batch, whole = sft_step(pairs), sft_step(pairs, ALONE, 1)
        before = step._cache_size()
        params, history = run_step(objective, DESCENT, fresh(mesh), batch, mesh, 2, learning_rate=1e5)
        programs.add(step._cache_size())
        counts.append(used(batch))
        expected, at_once = run_step(objective, DESCENT, fresh(mesh), whole, mesh, 2, learning_rate=1e5)
        assert_trees_close(params, expected, rtol=1e-4, atol=1e-5)
        for ours, theirs in zip(history, at_once, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    assert len(set(counts)) == 3, counts
    # After the first batches, one program for each of the two shapes, and no other ever.
    assert step._cache_size() == before


def test_empty_microbatches_change_nothing(model, fresh, mesh):
    """Bit for bit: parameters and metrics of two micro-batches with two empty ones after them, and five.

    Nor are they run: NaN in them, which would spread over every gradient, stays where it is.
    """
    objective = SPIN(Decoder(model.config), losses.logistic)
    scored = scored_by(objective.decoder, fresh(mesh), mesh, random_pairs(8), offset=2.0)
    exact, more, poisoned = (pair_step(scored, count=count) for count in (MICROBATCHES, 7, MICROBATCHES))
    assert used(exact) == used(more) == 2
    poisoned.opponent[2:], poisoned.rows.owners[2:] = np.nan, 1
    params, history = run_step(objective, DESCENT, fresh(mesh), exact, mesh, 2, learning_rate=1e5)
    for batch in (more, poisoned):
        others, metrics = run_step(objective, DESCENT, fresh(mesh), batch, mesh, 2, learning_rate=1e5)
        jax.tree.map(np.testing.assert_array_equal, others, params)
        assert metrics == history


@pytest.mark.parametrize(
    "options",
    [
        {"devices": 8},
        {"tie_word_embeddings": True, "qkv_bias": True, "mlp_bias": True, "qk_norm": True, "norm": "rms+1"},
        {"windows": (9, None), "post_norms": True, "head_bias": True},
        {"num_experts": 4, "experts_per_token": 2},
        {"lora": True},
    ],
    ids=["eight devices", "tied", "windows", "experts", "lora"],
)
def test_gradients_summed_in_place_are_the_gradients(options, model, mesh, mesh8):
    """Those of three micro-batches, to 1e-6 of each parameter's largest (float32).

    The reference is `jax.grad` of each micro-batch by itself.
    """
    options = dict(options)
    where, adapted = (mesh8 if options.pop("devices", 1) == 8 else mesh), options.pop("lora", False)
    config = dataclasses.replace(model.config, **options)
    params, objective = (
        random_params(config, where),
        SPIN(Decoder(config, remat="attention"), losses.logistic),
    )
    scored = [ScoredPair(pair, (-20.0, -25.0)) for pair in random_pairs(32)]
    batch = pair_step(scored, RowShape(4, 40, 3), 3)
    assert used(batch) == 3
    frozen = params
    if adapted:
        params = lora.init(lora.adapters_on(params, 2, ("wq", "down")), jax.random.key(0))
        params = jax.tree.map(lambda w: w + 0.1, params)

    def loss(params, part):
        return objective(lora.joined(frozen, params, 1.0) if adapted else params, part, beta=0.1)

    with jax.set_mesh(where):
        placed = sharding.put_batch(where, batch, axis=1)
        summed = jax.jit(functools.partial(summed_gradients, loss, in_place=not adapted))
        got, metrics = summed(params, placed, jnp.int32(3))
        one = jax.jit(jax.grad(loss, has_aux=True))
        parts = [one(params, jax.tree.map(lambda x, i=i: x[i], placed)) for i in range(3)]
        want, expected = functools.reduce(functools.partial(jax.tree.map, jnp.add), parts)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        name, largest = jax.tree_util.keystr(path), float(np.abs(b).max())
        assert a.sharding == b.sharding, name
        assert largest > 1e-4, name
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * largest, err_msg=name)
    for name, value in metrics.items():
        assert float(value) == pytest.approx(float(expected[name]), rel=1e-6, abs=1e-6), name


def test_copies_of_the_weights_change_nothing(model, mesh):
    """Made once a step, they are what a layer's casts make: bfloat16, to the rounding of their products.

    Gradients keep the weights' float32. 2^-7 of the largest: a few last bits of bfloat16 (2^-9 each).
    """
    params, decoder = random_params(model.config, mesh), Decoder(model.config, jnp.bfloat16)
    objective = SPIN(decoder, losses.logistic)
    (batch, *_) = pair_batches(scored_by(decoder, params, mesh, random_pairs(4), offset=2.0), SHAPE)

    def loss(params, beside):
        return objective({**params, **beside}, batch, beta=0.1)[0]

    made = copies(params, jnp.bfloat16)
    layers = made["copies"]["layers"]
    assert layers["attention"]["wq"].dtype == jnp.bfloat16
    assert layers["mlp_norm"]["scale"].dtype == jnp.float32
    assert copies(params, jnp.float32) == copies(lora.freeze(dict(params), jnp.float32), jnp.float32) == {}
    with jax.set_mesh(mesh):
        (a, got), (b, want) = (jax.jit(jax.value_and_grad(loss))(params, beside) for beside in (made, {}))
    assert a == pytest.approx(b, rel=2**-7)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert x.dtype == jnp.float32
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(x, y, rtol=0, atol=2**-7 * float(np.abs(y).max()), err_msg=name)


def test_logits_are_never_kept(model, monkeypatch):
    """The compiled step holds no array nearly as large as the logits of a micro-batch, nor all together.

    Two rows of 512 tokens of 32,768 words: 128 MiB. Beside the chunks of 4 MiB that are asked for, the
    largest are the head with its gradients, also 4 MiB each, and the scores of a layer's attention.
    """
    monkeypatch.setattr(log_probs, "_CHUNK_LOGITS", 2**20)
    config = dataclasses.replace(model.config, vocab_size=32768, num_attention_heads=2, num_key_value_heads=1)
    objective = SPIN(Decoder(config, remat="full"), losses.logistic)
    pair = Pair(0, 0, [], [], *np.ones((3, 100), np.int32), truncated=False)
    batch = pair_step([ScoredPair(pair, (0.0, 0.0))] * 4, RowShape(2, 512, 3))
    params = sharding.unboxed(abstract_params(config))
    state = TrainState(params, jax.eval_shape(make_optimizer(RMSPROP).init, params), np.int32(0))
    step = make_step(objective, RMSPROP)
    compiled = step.lower(state, batch, np.float32(0), {"beta": np.float32(0)}).compile()
    logits = 2 * 512 * 32768
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * logits / 2
    sizes = [math.prod(map(int, dims.split(","))) for dims in re.findall(r"\w\[([\d,]+)\]", compiled.as_text())]
    assert 2**20 <= max(sizes) < logits / 8


def step_memory(model, dtype, remat, microbatches=2):
    """Temporary bytes of a compiled step, in those of its float32 weights, which dwarf the activations."""
    wide = {"hidden_size": 256, "intermediate_size": 1024, "head_dim": 64, "num_hidden_layers": 8}
    config = dataclasses.replace(model.config, **wide, rotary_dim=64)
    objective = SPIN(Decoder(config, dtype, remat), losses.logistic)
    pair = Pair(0, 0, [], [], *np.ones((3, 6), np.int32), truncated=False)
    batch = pair_step([ScoredPair(pair, (0.0, 0.0))] * 4, RowShape(2, 40, 2), microbatches)
    params = sharding.unboxed(abstract_params(config))
    state = TrainState(params, jax.eval_shape(make_optimizer(RMSPROP).init, params), np.int32(0))
    arguments = state, batch, np.float32(0), {"beta": np.float32(0)}
    compiled = make_step(objective, RMSPROP).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes / (4 * count_params(params))


@pytest.mark.parametrize("remat", ["full", "attention+mlp"])
def test_no_copy_of_the_weights_is_kept(model, remat):
    """Sums of gradients take one tree of float32, the optimizer another on its way: 2.1 and 2.3 (measured).

    A second tree of gradients, or the stacked layers kept for the backward pass, would be one more.
    """
    assert step_memory(model, jnp.float32, remat) < 2.6


@pytest.mark.parametrize("sizes", [(2, 2, 2), (8, 1, 1)])
def test_eight_devices_equal_one(model, fresh, mesh, sizes):
    """Three optimizer steps on 1 and 8 simulated devices; sums in another order, so 1e-4 relative."""
    wide = sharding.make_mesh(*sizes)
    objective = SPIN(Decoder(model.config, remat="attention+mlp"), losses.logistic)
    scored = scored_by(Decoder(model.config), fresh(mesh), mesh, random_pairs(16, longest=13), offset=2.0)
    batch = pair_step(scored, RowShape(8, 40, 3), 2)
    assert used(batch) == 2
    adam = dataclasses.replace(RMSPROP, optimizer="adamw", decay=0.999, eps=1e-4, clip_norm=0.5)
    one, history = run_step(objective, adam, fresh(mesh), batch, mesh, steps=3)
    eight, histories = run_step(objective, adam, fresh(wide), batch, wide, steps=3)
    assert_trees_close(one, eight, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(history, histories, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


def test_a_vocabulary_that_the_mesh_does_not_divide():
    """263 rows over tensor=2: embedding and head stay whole, and the numbers are one device's."""
    values = []
    (rows,) = packed([pair_group(p) for p in random_pairs(6)], RowShape(4, 40, 3))
    for sizes, devices in (((1, 1, 1), 1), ((1, 2, 2), 4)):
        mesh = sharding.make_mesh(*sizes, devices=jax.devices()[:devices])
        for tied in (False, True):
            odd = ARCHITECTURE | {"vocab_size": 263, "tie_word_embeddings": tied}
            config = new_model(odd, tiny.tokenizer(), dtype="float32", mesh=mesh).config
            params = random_params(config, mesh)
            with jax.set_mesh(mesh):
                placed = sharding.put_batch(mesh, rows)
                values.append(np.asarray(score_rows(Decoder(config), params, placed)))
    assert (values[0] < 0).sum() == 12
    np.testing.assert_allclose(values[0], values[2], rtol=1e-5)
    np.testing.assert_allclose(values[1], values[3], rtol=1e-5)


def test_optimizer_state_is_split_like_the_parameters(fresh, mesh8):
    params = fresh(mesh8)
    state = init_state(params, RMSPROP, mesh8)
    shardings = {leaf.sharding.spec for leaf in jax.tree.leaves(params)}
    assert len(shardings) > 3
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    for moment, param in zip(moments, jax.tree.leaves(params), strict=True):
        assert moment.sharding.is_equivalent_to(param.sharding, param.ndim)


def test_offloaded_state_changes_no_bit(model, fresh, mesh, mesh8, tmp_path):
    """Between steps the moments lie in the hosts' memory, through a checkpoint too."""
    scored = scored_by(Decoder(model.config), fresh(mesh), mesh, random_pairs(8), offset=2.0)
    batch = sharding.put_batch(mesh8, pair_step(scored, RowShape(8, 40, 3), 1), axis=1)
    objective, ends = SPIN(Decoder(model.config), losses.logistic), []
    for offload in (False, True):
        options = dataclasses.replace(RMSPROP, optimizer="adamw", offload=offload)
        state, step = init_state(fresh(mesh8), options, mesh8), make_step(objective, options)
        checkpoints = checkpoint.StepCheckpoints(tmp_path / str(offload), 1)
        abstract = abstract_state(params_on(mesh8, model.config), options, mesh8)
        for planned, leaf in zip(*map(jax.tree.leaves, (abstract, state)), strict=True):
            assert planned.sharding.is_equivalent_to(leaf.sharding, leaf.ndim)
            assert (planned.shape, planned.dtype) == (leaf.shape, leaf.dtype)
        for done in (1, 2):
            with jax.set_mesh(mesh8):
                state, _ = step(state, batch, np.float32(1e-3), {"beta": np.float32(0.1)})
            checkpoints.save(done, state)
            assert checkpoints.steps_done() == done
            state = checkpoints.restore(done, abstract)
        kinds = {x.sharding.memory_kind for x in jax.tree.leaves(state.opt_state) if x.ndim}
        assert kinds == {"pinned_host" if offload else "device"}
        assert step._cache_size() == 1
        ends.append(jax.device_get(state))
    jax.tree.map(np.testing.assert_array_equal, *ends)


def test_master_weights_move_at_the_papers_learning_rate(model, fresh, mesh):
    """lr 5e-7 in bfloat16 compute: the float32 masters change, their bfloat16 roundings hardly do."""
    objective = SPIN(Decoder(model.config, dtype=jnp.bfloat16), losses.logistic)
    params = fresh(mesh)
    batch = pair_step(scored_by(objective.decoder, params, mesh, random_pairs(8)))
    before = jax.device_get(params)
    after, _ = run_step(objective, RMSPROP, params, batch, mesh, learning_rate=5e-7)
    changed = jax.tree.map(lambda a, b: np.mean(a != b), before, after)
    rounded = jax.tree.map(lambda a, b: np.mean(a.astype(jnp.bfloat16) != b.astype(jnp.bfloat16)), before, after)
    assert after["layers"]["mlp"]["up"].dtype == np.float32
    assert changed["layers"]["mlp"]["up"] > 0.9
    assert rounded["layers"]["mlp"]["up"] < 0.05


def test_beta_and_learning_rate_are_arguments(model, fresh, mesh):
    """Iterations that differ in β, learning rate or epochs run one compiled program."""
    objective = SPIN(Decoder(model.config), losses.logistic)
    step = make_step(objective, DESCENT)
    assert step is make_step(objective, dataclasses.replace(DESCENT, learning_rate=1e-7, epochs=3))
    assert step is not make_step(objective, RMSPROP)
    batch = pair_step(scored_by(objective.decoder, fresh(mesh), mesh, random_pairs(8)))
    values, programs = [], set()
    for beta, learning_rate in ((0.1, 1e5), (5.0, 1e5), (5.0, 1e3)):
        params, history = run_step(objective, DESCENT, fresh(mesh), batch, mesh, 2, beta, learning_rate)
        values.append((history[1]["margin"], params["head"]))
        programs.add(step._cache_size())
    assert len(programs) == 1
    assert values[1][0] > 10 * values[0][0]  # the margin is in units of β
    assert not np.array_equal(values[1][1], values[2][1])


def test_clipping(model, fresh, mesh):
    """Clipped plain descent moves by lr · clip_norm, whatever the gradient's norm."""
    options = dataclasses.replace(RMSPROP, eps=1e8, clip_norm=0.01)
    objective, before = SFT(Decoder(model.config)), jax.device_get(fresh(mesh))
    batch = sft_step(random_pairs(8))
    after, (metrics,) = run_step(objective, options, fresh(mesh), batch, mesh, learning_rate=1e8)
    moved = math.sqrt(sum(np.sum((a - b) ** 2) for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True)))
    assert metrics["grad_norm"] > 0.1
    assert moved == pytest.approx(0.01, rel=1e-2)


def test_adafactor_learns(model, fresh, mesh):
    objective = SPIN(Decoder(model.config), losses.logistic)
    params = fresh(mesh)
    batch = pair_step(scored_by(objective.decoder, params, mesh, random_pairs(8)))
    options = dataclasses.replace(RMSPROP, optimizer="adafactor")
    _, history = run_step(objective, options, params, batch, mesh, steps=4)
    assert history[-1]["loss"] < history[0]["loss"] - 1e-3


def test_a_step_that_is_not_finite_changes_nothing(model, fresh, mesh):
    """Weights, moments and counts stay to the bit; the number of such steps in a row is kept, and ends."""
    options = dataclasses.replace(RMSPROP, optimizer="adamw", weight_decay=0.1)
    objective = SPIN(Decoder(model.config), losses.logistic)
    good = pair_step(scored_by(objective.decoder, fresh(mesh), mesh, random_pairs(8)))
    bad = good._replace(opponent=np.where(good.opponent < 0, np.nan, 0).astype(np.float32))
    huge = good._replace(opponent=np.where(good.opponent < 0, -np.inf, 0).astype(np.float32))  # inf − inf
    step, state, counts = make_step(objective, options), init_state(fresh(mesh), options, mesh), []
    with jax.set_mesh(mesh):
        for batch in (good, bad, huge, good):
            before = jax.device_get(state)
            placed = sharding.put_batch(mesh, batch, axis=1)
            state, metrics = step(state, placed, np.float32(1e-3), {"beta": np.float32(0.1)})
            counts.append(int(metrics["skipped"]))
            same = jax.tree.map(np.array_equal, before[:2], jax.device_get(state)[:2])
            assert all(jax.tree.leaves(same)) == (batch is not good)
    assert counts == [0, 1, 2, 0]
    assert step._cache_size() == 1
