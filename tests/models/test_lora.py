"""Low-rank adapters: nothing at first, trained alone, merged into what they were."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from architectures import MISTRAL_7B

import spin_jax
from spin_jax import config, tiny
from spin_jax.kernels.layout import Layout
from spin_jax.models import loading, lora
from spin_jax.models.decoder import Decoder, forward, output_head, project
from spin_jax.models.params import params_on
from spin_jax.plan import __main__, answer, planned_run
from spin_jax.storage import seals

RANK, SCALE = 3, 0.7


def tokens_of(shape, vocab_size=272):
    return np.random.default_rng(0).integers(3, vocab_size, shape, dtype=np.int32)


def run(model, params, tokens):
    """Logits in the model's own dtype."""
    decoder = Decoder(model.config, model.dtype)
    layout = Layout(np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape), np.ones_like(tokens))

    @jax.jit
    def logits(params):
        hidden, _ = forward(decoder, params, tokens, layout)
        return project(hidden, output_head(decoder, params))

    with jax.set_mesh(model.mesh):
        return np.asarray(logits(params))


def adapters_of(model, mesh, targets=tuple(lora.TARGETS), trained=True):
    shapes = lora.adapters_on(params_on(mesh, model.config), RANK, targets)
    adapters = lora.init(shapes, jax.random.key(1))
    # As if trained: B is no longer zero.
    return jax.tree.map(lambda w: w + 0.1 * jnp.ones_like(w) if trained else w, adapters)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("mistral", {}),
        ("phi", {"rope_parameters": None}),
        ("gemma2", {"num_hidden_layers": 4, "sliding_window": 6}),
        ("mixtral", {"num_local_experts": 2}),
    ],
)
def test_merged_weights_are_the_model_with_adapters(family, options, hf_model_dir, mesh, mesh8):
    """float32: 1e-4, as for logits elsewhere; on one device, and split over data, fsdp and tensor."""
    directory, _ = hf_model_dir(family, **options)
    targets = ("wq", "wk", "wv", "wo", "gate", "up", "down")
    if family != "mistral":
        targets = ("wq", "wo", "up") if family != "mixtral" else ("wk", "wo")
    tokens = tokens_of((4, 12))
    for m in (mesh, mesh8):
        model = spin_jax.load(str(directory), mesh=m)
        adapters = adapters_of(model, m, targets)
        plain = run(model, model.params, tokens)
        on = run(model, lora.joined(model.params, adapters, SCALE), tokens)
        assert np.abs(on - plain).max() > 0.01
        with jax.set_mesh(m):
            merged = lora.merged(model.params, adapters, SCALE)
        np.testing.assert_allclose(run(model, merged, tokens), on, atol=1e-4)


def test_new_adapters_change_nothing(tiny_model, mesh):
    adapters = adapters_of(tiny_model, mesh, trained=False)
    tokens = tokens_of((2, 9))
    joined = lora.joined(tiny_model.params, adapters, SCALE)
    np.testing.assert_array_equal(run(tiny_model, joined, tokens), run(tiny_model, tiny_model.params, tokens))
    bound = 32**-0.5  # of 32 inputs
    a = np.asarray(adapters["layers"]["attention"]["wq_a"])
    assert np.abs(a).max() <= bound
    assert a.std() == pytest.approx(bound / 3**0.5, rel=0.2)


def test_peft_computes_the_same(tiny_dir, tiny_model, mesh):
    """W + (α / r) B A of transformers' peft, with the same numbers in A and B."""
    adapters = adapters_of(tiny_model, mesh, ("wq", "down"))
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    reference = transformers.AutoModelForCausalLM.from_pretrained(tiny_dir, attn_implementation="eager")
    wrapped = peft.get_peft_model(
        reference, peft.LoraConfig(r=RANK, lora_alpha=SCALE * RANK, target_modules=["q_proj", "down_proj"])
    )
    for name, weight in wrapped.named_parameters():
        if "lora_" in name:
            layer = int(name.split("layers.")[1].split(".")[0])
            module, ours = ("attention", "wq") if "q_proj" in name else ("mlp", "down")
            side, shape = ("a", (-1, RANK)) if "lora_A" in name else ("b", (RANK, -1))
            part = np.array(adapters["layers"][module][f"{ours}_{side}"][layer])
            weight.data = torch.as_tensor(part.reshape(shape).T)
    tokens = tokens_of((2, 11))
    with torch.no_grad():
        theirs = wrapped(torch.as_tensor(tokens)).logits.numpy()
    ours = run(tiny_model, lora.joined(tiny_model.params, adapters, SCALE), tokens)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_weights_are_frozen_in_the_compute_dtype(tiny_dir, mesh):
    """Which changes no result: they are cast when used anyway. Norms, which are not, stay."""
    model = spin_jax.load(str(tiny_dir), mesh=mesh)
    model.dtype = jnp.dtype(jnp.bfloat16)
    tokens = tokens_of((2, 9))
    before = run(model, model.params, tokens)
    frozen = lora.freeze(model.params, jnp.bfloat16)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(frozen)}
    assert dtypes == {jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)}
    assert frozen["layers"]["mlp"]["up"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(run(model, frozen, tokens), before)
    assert model.params["embed"].is_deleted()


@pytest.mark.parametrize(
    ("targets", "architecture", "message"),
    [
        (("q_proj",), {}, "lora_targets has 'q_proj': this model has adapters for wq, wk"),
        ((), {}, "lora_targets is empty"),
        (
            ("gate",),
            {"model_type": "phi"},
            "has 'gate': this model has adapters for wq, wk, wv, wo, up, down",
        ),
        (("up",), {"model_type": "mixtral"}, "has 'up': this model has adapters for wq, wk, wv, wo$"),
    ],
)
def test_targets_that_the_model_has_not(targets, architecture, message):
    tokenizer = tiny.tokenizer()
    options = {"vocab_size": 272, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = loading.new_model(
        {"model_type": "llama", "num_hidden_layers": 1, **options, **architecture}, tokenizer, dtype="float32"
    )
    with pytest.raises(ValueError, match=message):
        lora.check(model.config, targets)


LORA = (
    "--config.train.lora_rank=4",
    "--config.train.learning_rate=0.01",
    "--config.sft.control=False",
    "--config.checkpoint.every_steps=2",
    "--config.export.adapters=True",
)


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    return runs.Command()


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    command(workdir, *LORA)
    return workdir


def test_a_run_learns_and_exports_merged_weights(whole):
    """The margin grows within each iteration; only the targets have moved."""
    for t in (0, 1):
        rows = [r for r in runs.read_metrics(whole) if (r["phase"], r["iteration"]) == ("train", t)]
        assert rows[0]["margin"] == pytest.approx(0, abs=1e-4)
        assert rows[-1]["margin"] > 0.01
    before, after = (runs.weights(whole / folder / "model") for folder in ("start", "iteration_0"))
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert moved == {name for name in before if "_proj" in name}
    assert len(json.loads((whole / "summary.json").read_text())) == 3


def test_a_run_exports_its_adapters(whole):
    """PEFT computes from the adapters of an iteration, on the model before it, what its model does (1e-4, float32).

    On the start it takes the adapters of all iterations.
    """
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    tokens = torch.as_tensor(tokens_of((4, 12)))

    def logits(model):
        with torch.no_grad():
            return model.eval()(tokens).logits.numpy()

    models = [whole / folder / "model" for folder in ("start", "iteration_0", "iteration_1")]
    plain = [logits(transformers.AutoModelForCausalLM.from_pretrained(model)) for model in models]
    assert not (models[0] / "adapters").exists()  # SFT trained all weights
    for before, model, ours, theirs in zip(models, models[1:], plain[1:], plain, strict=False):
        assert np.abs(ours - theirs).max() > 0.01
        assert json.loads((model / "adapters" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
            before
        )
        adapted = peft.AutoPeftModelForCausalLM.from_pretrained(model / "adapters")
        np.testing.assert_allclose(logits(adapted), ours, atol=1e-4)
        assert f"model that it began from (`{before.parent.name}/model`)" in (model / "README.md").read_text()
        seals.check_seal(model)
    start = transformers.AutoModelForCausalLM.from_pretrained(models[0])
    both = peft.PeftModel.from_pretrained(start, models[1], subfolder="adapters", adapter_name="0")
    both.load_adapter(models[2], subfolder="adapters", adapter_name="1")
    both.base_model.set_adapter(["0", "1"])
    np.testing.assert_allclose(logits(both), plain[2], atol=1e-4)


@pytest.mark.long
def test_a_run_that_is_interrupted_goes_on_to_the_bit(command, whole, tmp_path):
    workdir = tmp_path / "run"
    process = command.start(workdir, *LORA)
    kept = workdir / "iteration_1" / "train"
    while not (kept.exists() and any(kept.iterdir())):
        assert process.poll() is None
    process.kill()
    process.communicate()
    (checkpoint, *_) = sorted(kept.iterdir())
    size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    export = (workdir / "iteration_0" / "model" / "model.safetensors").stat().st_size
    assert size < export / 2  # adapters and their moments, not the model
    command(workdir, *LORA)
    assert not runs.differences(whole, workdir)


def test_bad_values_are_errors_before_anything_runs(command, tmp_path):
    for flag, message in (
        ("--config.train.lora_rank=0", "train.lora_rank=0"),
        ("--config.train.lora_rank=4", "lora_targets has 'q_proj'"),
    ):
        said = command(tmp_path / "run", flag, "--config.train.lora_targets=('q_proj',)", expect=2)
        assert message in said
        assert "Traceback" not in said


def test_plan_says_what_adapters_save(capsys):
    """A 7B model whose full training one H200 does not hold."""
    c = config.default()
    c.data.path, c.model.architecture = "planned", MISTRAL_7B
    c.train.lora_rank = 16
    c.export.adapters = True
    run = planned_run.planned_run(config.resolve(c), "h200:1", compiles=False)
    found = answer.plan(run, 1000)
    with_adapters = found["phases"]["train"]["parts_gib"]
    assert with_adapters["weights"] == pytest.approx(2 * 7.24e9 / 2**30, rel=0.01)  # bfloat16
    # Per layer and rank: q, k, v, o of 8192, 5120, 5120, 8192; gate, up, down of 18432 each.
    assert found["lora"]["trained"] == 32 * 16 * (8192 + 5120 + 5120 + 8192 + 3 * 18432)
    assert found["lora"]["saved_gib"] > 4 * 7.24e9 * 2 / 2**30  # gradients and RMSProp's state, at least
    assert "LoRA       rank 16: 41.9M" in __main__.table(found)
