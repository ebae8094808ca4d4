"""Adapters in PEFT's format: PEFT opens ours, and we open those that PEFT wrote."""

import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

import spin_jax
from spin_jax import config
from spin_jax.errors import ConfigError
from spin_jax.models import loading, lora, weight_files
from spin_jax.models.params import params_on
from spin_jax.report.numbers import START
from spin_jax.selfplay import fingerprints, inputs
from spin_jax.selfplay.exports import Exports
from spin_jax.selfplay.fitting import Fitting
from spin_jax.selfplay.prepare import Prepared
from spin_jax.storage import files, seals

torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

RANK, ALPHA = 3, 2.0
TOKENS = np.random.default_rng(0).integers(3, 272, (2, 12), dtype=np.int32)
ATTENTION = ("wq", "wk", "wv", "wo")
EVERYTHING = (*ATTENTION, "gate", "up", "down")


def torch_logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(torch.as_tensor(tokens)).logits.float().numpy()


def opened(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")


def trained(model, targets, seed=1):
    """Adapters with numbers in B, as if they were trained."""
    shapes = lora.adapters_on(params_on(model.mesh, model.config), RANK, targets)
    adapters = lora.init(shapes, jax.random.key(seed))
    return jax.tree.map(lambda w: w + 0.1 * jax.random.normal(jax.random.key(seed + w.size), w.shape), adapters)


def merged_logits(model, *adapters):
    """Logits of the model with these adapters merged, one after the other; the model loses its weights."""
    params = model.params
    for each in adapters:
        params = lora.merged(params, each, ALPHA / RANK)
    model.params = params
    return np.asarray(spin_jax.logits(model, TOKENS))


def write(directory, adapters, model, base, **options):
    lora.write_peft(directory, adapters, model.config, scale=ALPHA / RANK, base=str(base), **options)


# --- ours, opened by PEFT --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "options", "targets"),
    [
        ("mistral", {}, EVERYTHING),
        ("qwen2", {"tie_word_embeddings": True}, ("wq", "wv", "down")),
        ("phi3", {}, EVERYTHING),
        ("phi3", {}, ("wk", "up")),
        ("phi", {"rope_parameters": None}, (*ATTENTION, "up", "down")),
        ("mixtral", {"num_local_experts": 2}, ATTENTION),
    ],
    ids=["mistral", "qwen2", "phi3", "parts of phi3", "phi", "mixtral"],
)
def test_peft_opens_ours(family, options, targets, hf_model_dir, mesh, mesh8, tmp_path):
    """float32 logits to 1e-4, as for logits elsewhere, in the three ways that adapters are opened."""
    base, _ = hf_model_dir(family, **options)
    model = spin_jax.load(str(base), mesh=mesh8 if family == "phi3" else mesh)
    plain, adapters = np.asarray(spin_jax.logits(model, TOKENS)), trained(model, targets)
    write(tmp_path / "adapters", adapters, model, base)
    ours = merged_logits(model, adapters)
    assert np.abs(ours - plain).max() > 0.1
    wrapped = peft.PeftModel.from_pretrained(opened(base), tmp_path, subfolder="adapters")
    np.testing.assert_allclose(torch_logits(wrapped), ours, atol=1e-4)
    np.testing.assert_allclose(torch_logits(wrapped.merge_and_unload()), ours, atol=1e-4)
    automatic = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapters", attn_implementation="eager")
    np.testing.assert_allclose(torch_logits(automatic), ours, atol=1e-4)
    np.testing.assert_allclose(torch_logits(opened(tmp_path / "adapters")), ours, atol=1e-4)


def test_a_fused_matrix_has_one_adapter_of_a_larger_rank(hf_model_dir, mesh, tmp_path):
    """qkv_proj stacks three weights and o_proj is one: ranks 9 and 3, with one scale."""
    base, _ = hf_model_dir("phi3")
    model = spin_jax.load(str(base), mesh=mesh)
    adapters = trained(model, (*ATTENTION, "up"))
    write(tmp_path / "adapters", adapters, model, base, revision="main")
    settings = files.read_json(tmp_path / "adapters" / "adapter_config.json")
    assert settings["target_modules"] == ["gate_up_proj", "o_proj", "qkv_proj"]
    assert (settings["r"], settings["lora_alpha"]) == (3, 2)
    assert (settings["rank_pattern"], settings["alpha_pattern"]) == ({"qkv_proj": 9}, {"qkv_proj": 6})
    assert (settings["base_model_name_or_path"], settings["revision"]) == (str(base), "main")
    tensors = load_file(tmp_path / "adapters" / "adapter_model.safetensors")
    attention, mlp = (f"base_model.model.model.layers.1.{name}" for name in ("self_attn", "mlp"))
    b = tensors[f"{attention}.qkv_proj.lora_B.weight"]
    assert tensors[f"{attention}.qkv_proj.lora_A.weight"].shape == (9, 32)
    assert b.shape == (64 + 32 + 32, 9)
    key = np.asarray(adapters["layers"]["attention"]["wk_b"])[1].reshape(3, 32).T  # rows 64 to 96
    np.testing.assert_array_equal(b[64:96, 3:6], key)
    assert not b[64:96, :3].any()
    assert not b[64:96, 6:].any()
    assert not tensors[f"{mlp}.gate_up_proj.lora_B.weight"][:56].any()  # gate has no adapter
    seals.check_seal(tmp_path / "adapters")


def test_adapters_under_others_are_one(tiny_dir, mesh, tmp_path):
    """Adapters that were trained on merged ones: both together stand on the first base, with twice the rank."""
    model = spin_jax.load(str(tiny_dir), mesh=mesh)
    first, second = trained(model, EVERYTHING), trained(model, EVERYTHING, seed=2)
    write(tmp_path / "0", first, model, tiny_dir)
    write(tmp_path / "1", second, model, tiny_dir, under=tmp_path / "0")
    assert files.read_json(tmp_path / "1" / "adapter_config.json")["r"] == 2 * RANK
    ours = merged_logits(model, first, second)
    theirs = peft.PeftModel.from_pretrained(opened(tiny_dir), tmp_path / "1")
    np.testing.assert_allclose(torch_logits(theirs), ours, atol=1e-4)


# --- PEFT's, opened by us --------------------------------------------------------------------------


def of_peft(base, directory, **options):
    """Writes PEFT's adapters with random A and B, and returns PEFT's logits."""
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 3, "init_lora_weights": False, **options}
    wrapped = peft.get_peft_model(opened(base), peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    wrapped.save_pretrained(directory)
    return torch_logits(wrapped)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("mistral", {"target_modules": "all-linear"}),
        ("mistral", {"target_modules": r".*\.1\.(self_attn|mlp)\.(q|down)_proj"}),
        ("mistral", {"target_modules": ["o_proj", "up_proj"], "use_rslora": True, "layers_to_transform": [0]}),
        ("qwen2", {"target_modules": ["q_proj", "k_proj", "v_proj", "gate_proj"], "lora_dropout": 0.5}),
        (
            "qwen2",
            {
                "target_modules": "all-linear",
                "rank_pattern": {"v_proj": 7, "layers.0.mlp.down_proj": 2},
                "alpha_pattern": {"layers.1.*": 11, "q_proj": 5},
            },
        ),
        ("phi3", {"target_modules": "all-linear"}),
        ("phi3", {"target_modules": ["qkv_proj"], "init_lora_weights": "gaussian"}),
        ("phi", {"target_modules": ["dense", "fc1"]}),
    ],
    ids=["all", "pattern", "rslora", "biases", "ranks", "fused", "fused, new", "phi"],
)
def test_we_open_those_of_peft(family, options, hf_model_dir, mesh, mesh8, tmp_path):
    """float32 logits to 1e-4, as for logits elsewhere; on one device, and split over data, fsdp and tensor."""
    base, original = hf_model_dir(family, **({"rope_parameters": None} if family == "phi" else {}))
    theirs = of_peft(base, tmp_path / "adapters", **options)
    new = options.get("init_lora_weights")
    assert np.abs(theirs - torch_logits(original)).max() > 0.1 or new
    for on in (mesh, mesh8):
        model = spin_jax.load(str(base), mesh=on, adapters=str(tmp_path / "adapters"))
        np.testing.assert_allclose(spin_jax.logits(model, TOKENS), theirs, atol=1e-4)


@pytest.mark.parametrize("family", ["mistral", "phi3"])
def test_what_we_wrote_is_read_again(family, hf_model_dir, mesh, tmp_path):
    """The same weights but for rounding: B is scaled before the product, and not after it."""
    base, _ = hf_model_dir(family)
    model, adapters = spin_jax.load(str(base), mesh=mesh), None
    adapters = trained(model, EVERYTHING)
    write(tmp_path / "adapters", adapters, model, base)
    again = spin_jax.load(str(base), mesh=mesh, adapters=str(tmp_path / "adapters")).params
    ours = flatten_dict(lora.merged(model.params, adapters, ALPHA / RANK))
    for path, leaf in flatten_dict(again).items():
        np.testing.assert_allclose(leaf, ours[path], atol=1e-6)


def test_layers_of_a_multimodal_model_have_one_more_name(adapter, tiny_dir, mesh, tmp_path):
    directory = shutil.copytree(adapter, tmp_path / "copy")
    place = directory / "adapter_model.safetensors"
    renamed = {n.replace(".layers.", ".language_model.layers."): x for n, x in load_file(place).items()}
    save_file(renamed, place, {"format": "pt"})
    models = [spin_jax.load(str(tiny_dir), mesh=mesh, adapters=str(each)) for each in (directory, adapter)]
    jax.tree.map(np.testing.assert_array_equal, *(model.params for model in models))


def test_weights_keep_their_dtype_and_another_base_is_told(hf_model_dir, tiny_dir, mesh, tmp_path):
    base, _ = hf_model_dir("mistral", dtype="bfloat16")
    of_peft(tiny_dir, tmp_path / "adapters", target_modules=["q_proj"])
    with pytest.warns(UserWarning, match=f"another base than {base}: base_model_name_or_path is {tiny_dir}"):
        model = spin_jax.load(str(base), mesh=mesh, adapters=str(tmp_path / "adapters"))
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype(jnp.bfloat16)}


# --- what is refused -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(tiny_dir, tmp_path_factory):
    """Adapters that PEFT wrote for `tiny_dir`."""
    directory = tmp_path_factory.mktemp("peft") / "adapters"
    of_peft(tiny_dir, directory, target_modules=["q_proj", "down_proj"])
    return directory


def refusal(base, directory, mesh):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        spin_jax.load(str(base), mesh=mesh, adapters=str(directory))
    return str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora=True: only adapters that compute W + α/r · B A are read: merge"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=['lm_head']: only"),
        ({"bias": "all"}, "bias='all': only"),
        ({"lora_bias": True}, "lora_bias=True: only"),
        ({"peft_type": "IA3"}, "peft_type='IA3': only"),
        ({"peft_type": None}, "peft_type=None: only"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa': only"),
        ({"target_parameters": ["experts.down_proj"]}, "target_parameters=['experts.down_proj']: only"),
        ({"of_next_year": 1}, "of_next_year=1: only"),
        ({"r": 5}, "{'A': (4, 56), 'B': (32, 4)} do not fit rank 5 and the weight (32, 56)"),
        ({"r": "4"}, "model.layers.0.mlp.down_proj: r='4' and lora_alpha=3"),
        ({"lora_alpha": None}, "r and lora_alpha, or their patterns, are wrong for"),
        ({"rank_pattern": {"q_proj": 8}}, "do not fit rank 8"),
        ({"alpha_pattern": {"(": 8}}, "r and lora_alpha, or their patterns, are wrong for"),
        ({"rank_pattern": [1]}, "r and lora_alpha, or their patterns, are wrong for"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_of_another_function(changes, message, adapter, tiny_dir, mesh, tmp_path):
    directory = shutil.copytree(adapter, tmp_path / "copy")
    place = directory / "adapter_config.json"
    files.write_json(place, files.read_json(place) | changes)
    said = refusal(tiny_dir, directory, mesh)
    assert message in said
    assert str(place) in said or "adapter_model.safetensors" in said


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: {"base_model.model.lm_head.lora_A.weight": np.ones((4, 32), np.float32)},
            "lm_head.lora_A.weight: only",
        ),
        (lambda t: {Q.replace("layers.0", "layers.9") + ".lora_A.weight": t[f"{Q}.lora_A.weight"]}, "layers.9"),
        (
            lambda t: {f"{Q}.lora_magnitude_vector": np.ones(64, np.float32)},
            "only A and B of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj are read for this model",
        ),
        (lambda t: {f"{Q}.lora_B.weight": None}, "q_proj: {'A': (4, 32)} do not fit rank 4 and the weight (64, 32)"),
        (
            lambda t: {f"{Q}.lora_A.weight": np.ones((4, 56), np.float32)},
            "{'A': (4, 56), 'B': (64, 4)} do not fit rank 4",
        ),
        (lambda t: {f"{Q}.lora_A.weight": np.ones((), np.float32)}, "{'A': (), 'B': (64, 4)} do not fit rank 4"),
        (lambda t: {f"{Q}.lora_A.weight": np.ones((4, 32), np.int32)}, "q_proj.lora_A.weight: only"),
        (lambda t: {f"{Q}.lora_A.weight": np.full((4, 32), np.nan, np.float32)}, "q_proj: NaN or infinite numbers"),
        (dict.fromkeys, "adapter_model.safetensors has no tensors"),
    ],
    ids=["head", "layer", "dora", "half", "shape", "number", "integers", "nan", "nothing"],
)
def test_tensors_that_do_not_fit(change, message, adapter, tiny_dir, mesh, tmp_path):
    directory = shutil.copytree(adapter, tmp_path / "copy")
    tensors = load_file(directory / "adapter_model.safetensors")
    tensors |= change(tensors)
    kept = {name: x for name, x in tensors.items() if x is not None}
    save_file(kept, directory / "adapter_model.safetensors", {"format": "pt"})
    assert message in refusal(tiny_dir, directory, mesh)


def test_files_that_are_missing_or_damaged(adapter, tiny_dir, mesh, tmp_path):
    directory = shutil.copytree(adapter, tmp_path / "copy")
    weights = directory / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "is truncated" in refusal(tiny_dir, directory, mesh)
    weights.rename(directory / "adapter_model.bin")
    assert "adapter_model.safetensors is not there (other files than safetensors" in refusal(tiny_dir, directory, mesh)
    (directory / "adapter_config.json").unlink()
    assert "adapter_config.json cannot be read" in refusal(tiny_dir, directory, mesh)
    assert "adapters path 'no where': no such directory" in refusal(tiny_dir, "no where", mesh)


def test_adapters_as_the_model_say_what_to_do(adapter, tiny_dir, mesh):
    with pytest.raises(FileNotFoundError) as error:
        spin_jax.load(str(adapter), mesh=mesh)
    assert f"set model.path to the base (its base_model_name_or_path is '{tiny_dir}') and model.adapters" in str(
        error.value
    )


# --- in a run --------------------------------------------------------------------------------------


def resolved(**sections):
    return config.resolve({"data": {"path": "none"}, "model": {"path": "none"}} | sections)


def test_a_run_begins_with_the_adapters_merged(adapter, tiny_dir, mesh, tmp_path):
    """In float32 whatever model.dtype is; the fingerprint tells other adapters, also if only their scale differs."""

    def begun(adapters):
        model = {"path": str(tiny_dir), "adapters": adapters and str(adapters)}
        return inputs.open_model(resolved(model=model))

    _, params, digest = begun(adapter)
    whole = spin_jax.load(str(tiny_dir), mesh=mesh, dtype=jnp.float32, adapters=str(adapter))
    expected = flatten_dict(whole.params)
    for path, leaf in flatten_dict(params()).items():
        np.testing.assert_allclose(leaf, expected[path], atol=1e-6)
    other = shutil.copytree(adapter, tmp_path / "copy")
    files.write_json(other / "adapter_config.json", files.read_json(other / "adapter_config.json") | {"lora_alpha": 4})
    digests = [digest, begun(other)[2], begun(None)[2]]
    assert len(set(digests)) == 3
    assert digests[2] == weight_files.digest(tiny_dir)  # as before there was model.adapters
    assert digest.startswith(f"{digests[2]} with adapters ")


def test_old_runs_go_on():
    """A config.json from before these keys; and the name of the adapters is free, because their digest counts."""
    c = resolved()
    recorded = fingerprints.recorded(c)
    del recorded["model"]["adapters"], recorded["export"]["adapters"]
    assert not fingerprints.differences(c, {}, {"config": recorded})
    changed = resolved(model={"path": "none", "adapters": "some"})
    assert not fingerprints.differences(changed, {}, {"config": recorded})


LORA = {"lora_rank": 4}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"export": {"adapters": True}}, "export.adapters needs train.lora_rank or sft.lora_rank"),
        ({"model": {"adapters": "a", "architecture": {"model_type": "llama"}}}, "model.adapters needs model.path"),
        (
            {"model": {"path": "m", "adapters": "a"}, "export": {"adapters": True}, "train": LORA},
            "a base that PEFT can open",
        ),
        (
            {
                "model": {"architecture": {"model_type": "llama"}},
                "export": {"adapters": True},
                "sft": {"epochs": 1, **LORA},
            },
            "export.adapters with sft.lora_rank needs model.path",
        ),
    ],
)
def test_keys_that_contradict(sections, message):
    with pytest.raises(ConfigError, match=message):
        resolved(**sections)


def test_adapters_of_what_a_run_exports_are_enough():
    """An SFT stage of all weights on merged adapters exports the base of iteration 0."""
    model = {"path": "m", "adapters": "a"}
    resolved(model=model, export={"adapters": True}, train=LORA, sft={"epochs": 1})


def test_a_multimodal_base_is_refused(tmp_path):
    files.write_json(tmp_path / "config.json", {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}})
    with pytest.raises(ValueError, match="is a multimodal model, and adapters are for its text part"):
        loading.check_base(tmp_path)


@pytest.mark.parametrize(
    ("sections", "t", "base"),
    [
        ({}, 0, ("owner/m", "c0ffee")),
        ({}, 2, ("{workdir}/iteration_1/model", None)),
        ({"selfplay": {"start": 2}}, 2, ("owner/m", "c0ffee")),
        ({"sft": {"epochs": 1}}, START, ("owner/m", "c0ffee")),
        ({"sft": {"epochs": 1}}, 0, ("{workdir}/start/model", None)),
        ({"sft": {"epochs": 1}, "export": {"push_to": "me/x"}}, 0, ("me/x", "start")),
        ({"export": {"push_to": "me/x"}}, 1, ("me/x", "iteration_0")),
    ],
)
def test_the_base_of_each_iteration(sections, t, base, tmp_path):
    run = Prepared.__new__(Prepared)
    run.config, run.workdir = resolved(model={"path": "owner/m"}, **sections), tmp_path
    run.model = types.SimpleNamespace(revision="c0ffee")
    assert run.base(t) == (base[0].format(workdir=tmp_path), base[1])


@pytest.mark.parametrize("push_to", [None, "me/x"])
def test_a_local_base_has_its_whole_path_but_on_the_hub(push_to, tmp_path):
    run = Prepared.__new__(Prepared)
    run.config = resolved(model={"path": str(tmp_path)}, export={"push_to": push_to})
    run.model = types.SimpleNamespace(revision=None)
    assert run.base(0) == (tmp_path.name if push_to else str(tmp_path), None)


def test_adapters_of_the_control_stand_on_the_start(tiny_dir, mesh, tmp_path, capsys):
    """Two controls, one after the other: the export has the adapters of both as one, and PEFT opens it.

    Where those of the one before are not there, a warning says so.
    """
    run, fitting = Prepared.__new__(Prepared), Fitting.__new__(Fitting)
    run.config = resolved(model={"path": str(tiny_dir)}, sft={"control": True, **LORA}, export={"adapters": True})
    run.model, run.workdir, fitting._run = spin_jax.load(str(tiny_dir), mesh=mesh), tmp_path, run
    each = [trained(run.model, EVERYTHING, seed) for seed in (1, 2)]
    folders = [tmp_path / "control" / f"iteration_{t}" for t in (0, 1, 3)]
    for t, folder in zip((0, 1, 3), folders, strict=True):
        options = types.SimpleNamespace(lora_scale=ALPHA / RANK)
        phase = types.SimpleNamespace(name="control", iteration=t, folder=folder, options=options)
        fitting._export_adapters(phase, each[min(t, 1)])
    assert "iteration_2/adapters is not there, and the control gets no adapters" in capsys.readouterr().out
    assert [(folder / "adapters").exists() for folder in folders] == [True, True, False]
    ours = merged_logits(run.model, *each)
    run.model.dtype = jnp.dtype(jnp.float32)
    Exports(run, lambda: None).save(tmp_path / "control", run.model.params, folders[1] / "adapters")
    exported = tmp_path / "control" / "model"
    seals.check_seal(exported)
    assert "adapters/adapter_model.safetensors" in (exported / "SHA256SUMS").read_text()
    np.testing.assert_allclose(torch_logits(opened(exported)), ours, atol=1e-4)
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(exported / "adapters", attn_implementation="eager")
    np.testing.assert_allclose(torch_logits(theirs), ours, atol=1e-4)
