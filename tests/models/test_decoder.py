"""The decoder against transformers, against itself in other shapes, and on eight devices.

Axes: B batch, T tokens, V vocabulary, D model.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from architectures import LLAMA3
from jax.sharding import NamedSharding, PartitionSpec
from torch_reference import torch_logits

import spin_jax
from spin_jax.kernels.layout import Layout
from spin_jax.models import loading
from spin_jax.models import params as params_lib
from spin_jax.models.architecture import Model, ModelConfig
from spin_jax.models.cache import new_cache
from spin_jax.models.decoder import Decoder, forward, output_head, project
from spin_jax.models.layers import Norm, rope_frequencies
from spin_jax.models.params import (
    abstract_params,
    count_params,
    init_params,
    params_on,
    sampling_params,
    sampling_params_on,
)
from spin_jax.runtime import sharding

# float32 on both sides, sums in other orders: logits of size ~8 are seen to differ by 4e-5 at most.
PARITY = 1e-4
# One program in two shapes: the same sums, split by the compiler in another way.
SHAPES = 2e-5

CONFIG = ModelConfig(
    model_type="mistral",
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    norm_eps=1e-5,
    rope_theta=500.0,
    rope_scaling=None,
    windows=(5,),
    rotary_dim=12,
    activation="silu",
    tie_word_embeddings=False,
    max_position_embeddings=128,
    initializer_range=0.3,
)

LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}


def tokens_of(shape, seed=0, vocab_size=CONFIG.vocab_size):
    return np.random.default_rng(seed).integers(0, vocab_size, shape, dtype=np.int32)


def whole_rows(tokens):
    """(tokens, layout) of rows without padding."""
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return tokens, Layout(positions, np.ones_like(tokens))


def _run(decoder, params, tokens, layout):
    hidden, _ = forward(decoder, params, tokens, layout)
    return hidden, project(hidden, output_head(decoder, params))


run = jax.jit(_run, static_argnums=0)


@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_split_over_the_vocabulary(mesh8, tied):
    config = dataclasses.replace(CONFIG, tie_word_embeddings=tied)
    decoder = Decoder(config)

    params, batch = params_on(mesh8, config), jax.sharding.PartitionSpec(("data", "fsdp"))

    def logits(params):
        hidden = jnp.zeros((4, 2, config.hidden_size), out_sharding=batch)
        return project(hidden, output_head(decoder, params))

    with jax.set_mesh(mesh8):
        made = jax.eval_shape(logits, params)
    assert made.sharding.spec[-1] == "tensor"


def _shapes(config):
    return sharding.unboxed(abstract_params(config))


def random_params(config):
    """NumPy parameters, the norms' scales random too: no compilation, and no layout yet."""
    rng = np.random.default_rng(0)

    def weight(path, leaf):
        around = 1.0 if path[-1].key == "scale" else 0.0
        return rng.normal(around, config.initializer_range, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(weight, _shapes(config))


def on(mesh, params, config=CONFIG):
    """`params` laid out over `mesh` as the model lays its own out."""
    return jax.device_put(params, sharding.parameter_shardings(mesh, abstract_params(config)))


@pytest.fixture(scope="module")
def params():
    """For programs outside of any mesh."""
    return jax.tree.map(jnp.asarray, random_params(CONFIG))


# --- parity with transformers ----------------------------------------------------------------------

CASES = {
    "grouped queries": ("mistral", {}),
    "one kv head": ("mistral", {"num_key_value_heads": 1}),
    "as many kv heads": ("mistral", {"num_key_value_heads": 4, "num_hidden_layers": 3}),
    "window": ("mistral", {"sliding_window": 5}),
    "window of one": ("mistral", {"sliding_window": 1}),
    "tied head": ("mistral", {"tie_word_embeddings": True}),
    "llama": ("llama", {}),
    "llama3 rope": ("llama", {"rope_parameters": LLAMA3}),
    "linear rope": ("llama", {"rope_parameters": LINEAR}),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case, hf_model_dir, mesh):
    family, options = CASES[case]
    directory, reference = hf_model_dir(family, **options)
    model = loading.load(str(directory), mesh=mesh)
    tokens = tokens_of((3, 48), vocab_size=272)  # three times the llama3 case's original length
    expected = torch_logits(reference, tokens)
    assert expected.std() > 0.5, "logits that are all alike prove nothing"
    np.testing.assert_allclose(spin_jax.logits(model, tokens), expected, rtol=0, atol=PARITY)


@pytest.mark.parametrize("rope", [LLAMA3, LINEAR], ids=["llama3", "linear"])
def test_rope_scaling_matters(rope, hf_model_dir, mesh):
    """Without the scaling, the same weights give other logits: the parity above is not vacuous."""
    directory, reference = hf_model_dir("llama", rope_parameters=rope)
    model = loading.load(str(directory), mesh=mesh)
    unscaled = dataclasses.replace(model, config=dataclasses.replace(model.config, rope_scaling=None))
    tokens = tokens_of((2, 48), vocab_size=272)
    assert np.abs(spin_jax.logits(unscaled, tokens) - torch_logits(reference, tokens)).max() > 0.1


def test_llama3_frequencies_by_hand():
    """Llama 3.1's rule on a short wave (kept), one between (interpolated) and a long one (stretched)."""
    scaling = loading.model_config(
        {
            **{f.name: getattr(CONFIG, f.name) for f in dataclasses.fields(CONFIG)},
            "model_type": "llama",
            "rms_norm_eps": CONFIG.norm_eps,
            "rope_parameters": {**LLAMA3, "original_max_position_embeddings": 64},
            "head_dim": 6,
        }
    )
    # 64 positions hold 64 f / 2π waves: 10.2, 1.28 and 0.16 of them.
    f = [1.0, 500 ** (-1 / 3), 500 ** (-2 / 3)]
    keep = (64 * f[1] / (2 * np.pi) - 1) / (4 - 1)
    expected = [f[0], keep * f[1] + (1 - keep) * f[1] / 8, f[2] / 8]
    np.testing.assert_allclose(rope_frequencies(scaling), expected, rtol=1e-6)


@pytest.mark.parametrize("options", [{}, {"sliding_window": 5}], ids=["full", "window"])
def test_right_padding_equals_transformers(options, hf_model_dir, mesh):
    """Rows of different lengths, compared where there are tokens."""
    directory, reference = hf_model_dir("mistral", **options)
    model = loading.load(str(directory), mesh=mesh)
    tokens, lengths = tokens_of((4, 20), vocab_size=272), np.array([20, 13, 6, 1])
    mask = (np.arange(20) < lengths[:, None]).astype(np.int32)
    expected = torch_logits(reference, tokens, mask)
    with jax.set_mesh(mesh):
        layout = whole_rows(tokens)[1]._replace(segments=mask)
        rows = sharding.put_batch(mesh, (tokens, layout))
        _, logits = run(Decoder(model.config), model.params, *rows)
    real = mask.astype(bool)
    np.testing.assert_allclose(np.asarray(logits)[real], expected[real], rtol=0, atol=PARITY)


def test_bfloat16_is_as_close_to_the_truth_as_transformers(hf_model_dir, mesh):
    """The truth is float32 arithmetic on the same bfloat16 weights.

    Two roundings of one computation differ by about √2 of what either is off. Allowed: an error at most
    1.3 times transformers' own, in the mean and at worst 2 times, and the same bounds between the two.
    """
    directory, reference = hf_model_dir("mistral", dtype="bfloat16", num_hidden_layers=3)
    tokens = tokens_of((4, 32), vocab_size=272)
    ours = np.asarray(spin_jax.logits(loading.load(str(directory), mesh=mesh), tokens))
    truth = np.asarray(spin_jax.logits(loading.load(str(directory), mesh=mesh, dtype="float32"), tokens))
    theirs = torch_logits(reference, tokens)
    error, allowed, apart = np.abs(ours - truth), np.abs(theirs - truth), np.abs(ours - theirs)
    assert allowed.mean() > 1e-3, "transformers did not compute in bfloat16"
    assert error.mean() > 1e-3, "spin_jax did not compute in bfloat16"
    assert error.mean() < 1.3 * allowed.mean()
    assert error.max() < 2 * allowed.max()
    assert apart.mean() < 2 * allowed.mean()


def test_norms_are_taken_in_float32():
    """Rows of very different sizes, bfloat16: rounded once, by half a step (2⁻⁸) at most.

    transformers rounds before it multiplies by the scale, too, and is up to a whole step off.
    """
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.mistral.modeling_mistral")
    rng = np.random.default_rng(0)
    x = torch.tensor(rng.normal(size=(1, 64, 96)) * np.geomspace(1e-3, 1e3, 64)[:, None], dtype=torch.bfloat16)
    scale = torch.tensor(rng.uniform(0.5, 1.5, 96), dtype=torch.bfloat16)
    reference = modeling.MistralRMSNorm(96, eps=1e-5)
    reference.weight.data = scale
    ours = Norm("rms", 1e-5).apply(
        {"params": {"scale": jnp.asarray(scale.float().numpy(), jnp.bfloat16)}},
        jnp.asarray(x.float().numpy(), jnp.bfloat16),
    )
    assert ours.dtype == jnp.bfloat16
    x64 = x.double().numpy()
    exact = x64 / np.sqrt(np.mean(x64**2, axis=-1, keepdims=True) + 1e-5) * scale.double().numpy()

    def steps(normed):
        return np.max(np.abs(normed - exact) / np.abs(exact)) / 2**-8

    assert steps(np.asarray(ours, np.float64)) < 1.001  # float32 comes before
    assert 1.001 < steps(reference(x).detach().double().numpy()) < 2.01


# --- the same sequence in other shapes -------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "prefill", "columns", "fused"),
    [(None, 7, 22, True), (5, 7, 22, True), (5, 1, 8, True), (5, 7, 22, False)],
)
def test_cached_decoding_equals_the_full_forward(window, prefill, columns, fused, mesh, monkeypatch):
    """A prefill, then single tokens; the window is shorter than the text, and so is the third case's ring.

    The weights are fused as elsewhere, or stand apart as on TPUs.
    """
    monkeypatch.setattr(params_lib, "_fuses", lambda mesh: fused)
    decoder = Decoder(dataclasses.replace(CONFIG, windows=(window,)))
    tokens, layout = whole_rows(tokens_of((3, 18)))
    step = jax.jit(forward, static_argnums=0)
    weights = on(mesh, random_params(CONFIG))
    layers = sampling_params(weights, decoder.config, jnp.float32, mesh)
    assert ("wqkv" in layers["layers"][0]["attention"]) == fused
    pieces = []
    with jax.set_mesh(mesh):
        expected, _ = run(decoder, weights, tokens, layout)
        cache = new_cache(decoder.config, rows=3, columns=columns, dtype=jnp.float32)
        for first, last in [(0, prefill), *((i, i + 1) for i in range(prefill, 18))]:
            part = jax.tree.map(lambda x, span=slice(first, last): x[:, span], (tokens, layout))
            hidden, cache = step(decoder, layers, *sharding.put_batch(mesh, part), cache)
            pieces.append(hidden)
    assert int(cache.column) == 18 % columns
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), expected, rtol=0, atol=SHAPES)


@pytest.mark.usefixtures("mesh8")
@pytest.mark.parametrize(("stored", "used"), [((2, 2, 2), (4, 1, 2)), ((1, 2, 4), (2, 1, 4))])
def test_weights_for_sampling_are_the_same_numbers_side_by_side(stored, used):
    """To the bit, laid out as announced; four parts along tensor are more than there are key/value heads."""
    config = dataclasses.replace(CONFIG, qkv_bias=True, mlp_bias=True)
    stored, used = sharding.make_mesh(*stored), sharding.make_mesh(*used)
    weights = random_params(config)
    made = sampling_params(on(stored, weights, config), config, jnp.float32, used)
    announced = sampling_params_on(used, config, jnp.float32)
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), made) == jax.tree.map(
        lambda x: (x.shape, x.dtype, x.sharding), announced
    )
    assert ("tensor" in made["layers"][0]["attention"]["wqkv"].sharding.spec) == (used.shape["tensor"] == 2)
    for number, layer in enumerate(made["layers"]):
        attention, mlp = (
            {name: w[number] for name, w in weights["layers"][part].items()} for part in ("attention", "mlp")
        )
        for one, q, k, v in (("wqkv", "wq", "wk", "wv"), ("bqkv", "bq", "bk", "bv")):
            for head in range(2):
                parts = [attention[q][..., 2 * head, :], attention[q][..., 2 * head + 1, :]]
                parts += [attention[k][..., head, :], attention[v][..., head, :]]
                fused = np.asarray(layer["attention"][one])[..., head, :, :]
                np.testing.assert_array_equal(fused, np.stack(parts, axis=-2))
        for one, gate, up in (("gate_up", "gate", "up"), ("gate_up_bias", "gate_bias", "up_bias")):
            np.testing.assert_array_equal(layer["mlp"][one], np.stack([mlp[gate], mlp[up]], axis=-2))


def test_padding_changes_nothing(params):
    """Neither how much of it stands on the right nor what it holds."""
    tokens, layout = whole_rows(tokens_of((2, 12)))
    expected, _ = run(Decoder(CONFIG), params, tokens, layout)

    def padded(filler):
        ids, (places, ones, *_) = whole_rows(np.concatenate([tokens, filler], axis=1))
        return run(Decoder(CONFIG), params, ids, Layout(places, ones * (places < 12)))[0][:, :12]

    zeros, noise = padded(np.zeros((2, 9), np.int32)), padded(tokens_of((2, 9), seed=1))
    np.testing.assert_allclose(zeros, expected, rtol=0, atol=SHAPES)
    np.testing.assert_array_equal(zeros, noise)


def test_left_padding_changes_nothing(params):
    """As the sampler pads: positions start at the first token."""
    tokens, layout = whole_rows(tokens_of((2, 12)))
    expected, _ = run(Decoder(CONFIG), params, tokens, layout)
    ids, (places, ones, *_) = whole_rows(np.concatenate([tokens_of((2, 4), seed=1), tokens], axis=1))
    hidden, _ = run(Decoder(CONFIG), params, ids, Layout(np.maximum(places - 4, 0), ones * (places >= 4)))
    np.testing.assert_allclose(hidden[:, 4:], expected, rtol=0, atol=SHAPES)


def test_segments_share_a_row_unseen_by_each_other(params):
    """Two sequences in one row, positions restarting, equal the two alone.

    The second is a prompt with two answers: each has its states with that prompt and without the other.
    """
    first, second, other = (tokens_of((1, n), seed) for seed, n in enumerate((9, 7, 4)))
    row = np.concatenate([first, second, other, np.zeros((1, 4), np.int32)], axis=1)
    layout = Layout(
        positions=np.r_[0:9, 0:7, 3:7, 0:4][None],
        segments=np.r_[[1] * 9, [2] * 11, [0] * 4][None],
        branches=np.r_[[0] * 12, [1] * 4, [2] * 4, [0] * 4][None],
    )
    hidden, _ = run(Decoder(CONFIG), params, row, layout)
    third = np.concatenate([second[:, :3], other], axis=1)
    # In one batch, padded: what padding does not change, the tests above say.
    alone, (positions, ones, *_) = whole_rows(np.zeros((3, 9), np.int32))
    for line, tokens in zip(alone, (first, second, third), strict=True):
        line[: tokens.shape[1]] = tokens[0]
    lengths = np.array([[9], [7], [7]])
    expected, _ = run(Decoder(CONFIG), params, alone, Layout(positions, ones * (positions < lengths)))
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=SHAPES)
    close(hidden[0, :9], expected[0])
    close(hidden[0, 9:16], expected[1, :7])
    close(hidden[0, 16:20], expected[2, 3:7])
    assert np.abs(expected[1, 3:7] - expected[2, 3:7]).max() > 0.1


def test_a_negative_segment_sees_and_is_not_seen(params):
    """Token 4 stands in segment −1: the others are as if it were not there, itself reads those before."""
    tokens, layout = whole_rows(tokens_of((1, 10)))
    layout.segments[:, 4] = -1
    decoder = Decoder(dataclasses.replace(CONFIG, windows=(None,)))
    hidden, _ = run(decoder, params, tokens, layout)

    others = np.delete(np.arange(10), 4)
    without = jax.tree.map(lambda x: np.delete(x, 4, axis=1), (tokens, layout))
    expected, _ = run(decoder, params, *without)
    np.testing.assert_allclose(hidden[:, others], expected, rtol=0, atol=SHAPES)

    changed = tokens.copy()
    changed[:, 2] = (changed[:, 2] + 1) % CONFIG.vocab_size
    differs = np.abs(run(decoder, params, changed, layout)[0] - hidden).max(axis=(0, 2))
    assert (differs[2:] > 1e-3).all()
    np.testing.assert_array_equal(differs[:2], 0)  # and nobody looks ahead


# --- gradients and devices -------------------------------------------------------------------------


def _loss(params, decoder, tokens, layout):
    """The mean cross-entropy of the next tokens."""
    _, logits = _run(decoder, params, tokens, layout)
    logps = jax.nn.log_softmax(logits[:, :-1])
    targets = jax.nn.one_hot(tokens[:, 1:], logits.shape[-1])
    return -jnp.mean(jnp.sum(logps * targets, axis=-1))


gradient = jax.jit(jax.value_and_grad(_loss), static_argnums=1)


def assert_gradients_close(actual, expected, tolerance):
    """Each leaf to `tolerance` of its own largest entry."""
    flat = jax.tree_util.tree_flatten_with_path(expected)[0]
    for (path, want), got in zip(flat, jax.tree.leaves(actual), strict=True):
        want, got = np.asarray(want), np.asarray(got)
        assert np.abs(want).max() > 1e-5, f"no gradient reaches {jax.tree_util.keystr(path)}"
        np.testing.assert_allclose(
            got, want, rtol=0, atol=tolerance * np.abs(want).max(), err_msg=jax.tree_util.keystr(path)
        )


BATCH = whole_rows(tokens_of((8, 12)))


@pytest.fixture(scope="module")
def on_one(params):
    """Logits, loss and gradients of BATCH on one device."""
    _, logits = run(Decoder(CONFIG), params, *BATCH)
    return logits, *gradient(params, Decoder(CONFIG), *BATCH)


@pytest.fixture(scope="module")
def on_eight(mesh8):
    """(weights, hidden, logits, loss, gradients) of BATCH, split over eight devices."""
    weights = on(mesh8, random_params(CONFIG))
    with jax.set_mesh(mesh8):
        placed = sharding.put_batch(mesh8, BATCH)
        hidden, logits = run(Decoder(CONFIG), weights, *placed)
        return weights, hidden, logits, *gradient(weights, Decoder(CONFIG), *placed)


POLICIES = ("full", "attention", "attention+mlp", "none")  # by what they keep, the least first


@pytest.fixture(scope="module")
def rematerialized():
    """policy → (bytes that the compiled gradient needs beside its results, loss, gradients)."""
    # Layers enough for what they keep to outweigh what one of them computes.
    deep, rows = dataclasses.replace(CONFIG, num_hidden_layers=8), whole_rows(tokens_of((4, 32)))
    params = jax.tree.map(jnp.asarray, random_params(deep))
    found = {}
    for policy in POLICIES:
        program = gradient.lower(params, Decoder(deep, remat=policy), *rows).compile()
        found[policy] = program.memory_analysis().temp_size_in_bytes, *program(params, *rows)
    return found


@pytest.mark.parametrize("policy", POLICIES[:-1])
def test_remat_changes_no_gradient(policy, rematerialized):
    """Recomputed activations are the same numbers; XLA may fuse them otherwise (tolerance 1e-5)."""
    _, kept_loss, kept = rematerialized["none"]
    _, loss, recomputed = rematerialized[policy]
    np.testing.assert_allclose(loss, kept_loss, rtol=1e-6)
    assert_gradients_close(recomputed, kept, 1e-5)


def test_remat_keeps_what_its_name_says(params):
    """What the forward pass leaves for the backward one, in numbers a token and layer."""
    rows = whole_rows(tokens_of((8, 12)))

    def kept(policy):
        decoder = Decoder(CONFIG, remat=policy)
        backward = jax.eval_shape(lambda p: jax.vjp(lambda p: _loss(p, decoder, *rows), p)[1], params)
        return sum(x.size for x in jax.tree.leaves(backward))

    full, attention, mlp, none = map(kept, POLICIES)
    numbers = 8 * 12 * CONFIG.num_hidden_layers
    q, kv = CONFIG.num_attention_heads * CONFIG.head_dim, CONFIG.num_key_value_heads * CONFIG.head_dim
    assert attention - full == numbers * (q + 2 * kv + q)
    assert mlp - attention == numbers * (CONFIG.hidden_size + 2 * CONFIG.intermediate_size)
    assert none > mlp + numbers * CONFIG.hidden_size


def test_remat_saves_memory(rematerialized):
    """As the compiled programs have it: each policy in turn needs a tenth less than what keeps more."""
    memory = [rematerialized[policy][0] for policy in POLICIES]
    assert all(less < 0.9 * more for less, more in itertools.pairwise(memory)), memory


def test_eight_devices_equal_one(on_one, on_eight):
    """Logits and gradients. Sums are split over the devices, in float32: 2e-5 absolute (logits of size
    ~5), and 2e-5 of a gradient's largest entry."""
    (one, one_loss, one_grads), (_, _, eight, eight_loss, eight_grads) = on_one, on_eight
    np.testing.assert_allclose(eight, one, rtol=0, atol=2e-5)
    np.testing.assert_allclose(eight_loss, one_loss, rtol=1e-6)
    assert_gradients_close(eight_grads, one_grads, 2e-5)


def test_outputs_and_gradients_are_split_as_meant(mesh8, on_eight):
    """Each device holds 2 of 8 rows, half of the vocabulary, and of a gradient what it has of the weight."""
    weights, hidden, logits, _, grads = on_eight
    batch = ("data", "fsdp")
    for array, spec, shard in (
        (hidden, PartitionSpec(batch), (2, 12, 32)),
        (logits, PartitionSpec(batch, None, "tensor"), (2, 12, 32)),
        (weights["embed"], PartitionSpec("fsdp", "tensor"), (32, 16)),
        (weights["head"], PartitionSpec("fsdp", "tensor"), (16, 32)),
        (weights["layers"]["attention"]["wq"], PartitionSpec(None, "fsdp", "tensor"), (2, 16, 2, 12)),
        (weights["layers"]["mlp"]["down"], PartitionSpec(None, "tensor", "fsdp"), (2, 24, 16)),
    ):
        assert array.sharding.is_equivalent_to(NamedSharding(mesh8, spec), array.ndim), spec
        assert {part.data.shape for part in array.addressable_shards} == {shard}
    for weight, slope in zip(jax.tree.leaves(weights), jax.tree.leaves(grads), strict=True):
        assert slope.sharding.is_equivalent_to(weight.sharding, weight.ndim)


def test_init_is_born_sharded_and_the_same_everywhere(mesh, mesh8):
    one, eight = (init_params(CONFIG, jax.random.key(3), devices) for devices in (mesh, mesh8))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(one), jax.device_get(eight))
    assert eight["head"].addressable_shards[0].data.shape == (16, 32)
    assert abs(float(one["layers"]["mlp"]["gate"].std()) - CONFIG.initializer_range) < 0.02
    np.testing.assert_array_equal(one["final_norm"]["scale"], 1)


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        pytest.param({"vocab_size": 67}, (2, 2, 2)),
        pytest.param({"intermediate_size": 49}, (2, 2, 2)),
        pytest.param({"num_attention_heads": 6, "num_key_value_heads": 2}, (1, 2, 4)),
        pytest.param({"num_attention_heads": 4, "num_key_value_heads": 2}, (1, 2, 4)),
    ],
    ids=["vocabulary", "mlp", "all heads", "kv heads"],
)
def test_sizes_that_the_mesh_does_not_divide_stay_whole(options, sizes, mesh, mesh8):
    config = dataclasses.replace(CONFIG, **options)
    weights, tokens = random_params(config), tokens_of((4, 6))

    def logits(mesh):
        return spin_jax.logits(
            Model(config, on(mesh, weights, config), None, jnp.dtype("float32"), mesh, {}, {}), tokens
        )

    split = sharding.make_mesh(*sizes, devices=mesh8.devices.flat)
    np.testing.assert_allclose(logits(split), logits(mesh), rtol=0, atol=2e-5)


# --- configurations --------------------------------------------------------------------------------


def test_tied_head_has_no_parameter_of_its_own():
    tied = dataclasses.replace(CONFIG, tie_word_embeddings=True)
    assert "head" in abstract_params(CONFIG)
    assert "head" not in abstract_params(tied)
    difference = count_params(_shapes(CONFIG)) - count_params(_shapes(tied))
    assert difference == CONFIG.hidden_size * CONFIG.vocab_size


def test_parameters_are_counted_as_transformers_counts(hf_model_dir, mesh):
    directory, reference = hf_model_dir("mistral")
    loaded = loading.load(str(directory), mesh=mesh)
    assert count_params(loaded.params) == sum(p.numel() for p in reference.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
        ({"windows": (0,)}, "sliding_window=0"),
        ({"windows": (4, -1)}, "sliding_window=-1"),
    ],
)
def test_bad_configs_raise(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **options)
