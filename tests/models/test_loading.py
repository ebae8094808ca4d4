"""Checkpoints: what comes in goes out, what is wrong is said."""

import dataclasses
import json
import shutil

import architectures
import hub_cache
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spin_jax
from spin_jax import tiny
from spin_jax.models import loading, saving
from spin_jax.storage import files

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

LLAMA3 = {**architectures.LLAMA3, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2+2 é"},
    {"role": "assistant", "content": "4"},
]


def copied(directory, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(directory, tmp_path / "copy")


def edited(directory, tmp_path, remove=(), **changes):
    """A copy whose config.json has other keys."""
    directory = copied(directory, tmp_path)
    config = files.read_json(directory / "config.json")
    for key in remove:
        del config[key]
    files.write_json(directory / "config.json", {**config, **changes})
    return directory


def reopened(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(directory)


def assert_same_weights(actual, expected):
    """Bit-equal, and of one dtype."""
    actual, expected = actual.state_dict(), expected.state_dict()
    assert actual.keys() == expected.keys()
    for name, weight in expected.items():
        assert actual[name].dtype == weight.dtype, name
        assert torch.equal(actual[name], weight), name


# --- round trips -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", ["one file", "several"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("family", "options"),
    [("mistral", {"sliding_window": 5}), ("llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3})],
    ids=["mistral", "tied llama"],
)
def test_round_trip_is_bit_equal(family, options, dtype, shards, hf_model_dir, mesh, tmp_path, monkeypatch):
    """transformers → load → save → transformers, in one file and in several, on both sides."""
    several = shards == "several"
    directory, original = hf_model_dir(family, dtype=dtype, max_shard_size="15KB" if several else "1GB", **options)
    assert (directory / "model.safetensors.index.json").exists() == several
    if several:
        monkeypatch.setattr(saving, "_SHARD_BYTES", 15_000)
    model = spin_jax.load(str(directory), mesh=mesh)
    assert model.dtype == dtype
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype(dtype)}
    spin_jax.save(model, tmp_path)

    again = reopened(tmp_path)
    assert again.dtype == getattr(torch, dtype)
    assert_same_weights(again, original)
    assert again.config.rope_parameters == original.config.rope_parameters
    assert spin_jax.load(str(tmp_path), mesh=mesh).config == model.config
    if several:
        index = files.read_json(tmp_path / "model.safetensors.index.json")
        written = {path.name for path in tmp_path.glob("*.safetensors")}
        assert len(written) > 2
        assert written == set(index["weight_map"].values())
        assert index["metadata"]["total_size"] == sum(p.numel() * p.itemsize for p in again.parameters())
        # A tensor is never cut, so a file may pass the limit by the largest one, and by its header.
        assert all(path.stat().st_size < 15_000 + 40_000 for path in tmp_path.glob("*.safetensors"))
    else:
        assert [path.name for path in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]


def test_saving_again_leaves_no_stale_file(tiny_model, tmp_path, monkeypatch):
    """Many files, then fewer, then one, then many again: the directory holds one checkpoint."""
    for limit in (20_000, 60_000, 2**30, 20_000):
        monkeypatch.setattr(saving, "_SHARD_BYTES", limit)
        spin_jax.save(tiny_model, tmp_path)
        index = tmp_path / "model.safetensors.index.json"
        expected = {"model.safetensors"}
        if limit < 2**30:
            expected = {index.name, *files.read_json(index)["weight_map"].values()}
        assert {path.name for path in tmp_path.glob("*.safetensors*")} == expected
    assert_same_parameters(spin_jax.load(str(tmp_path), mesh=tiny_model.mesh), tiny_model)


def test_a_broken_off_save_leaves_no_config(tiny_model, tmp_path, monkeypatch):
    """config.json says that a directory is whole: it goes first and comes last."""
    spin_jax.save(tiny_model, tmp_path)
    written = []

    def write(path, data):
        written.append(path.name)
        raise OSError("disk full")

    monkeypatch.setattr(files, "write_here", write)
    with pytest.raises(OSError, match="disk full"):
        spin_jax.save(tiny_model, tmp_path)
    assert written == ["model.safetensors"]
    assert not (tmp_path / "config.json").exists()


def assert_same_parameters(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual.params, expected.params)


def test_save_casts_where_asked(hf_model_dir, tiny_model, tmp_path):
    """float32 parameters into a bfloat16 checkpoint: rounded as torch rounds."""
    spin_jax.save(tiny_model, tmp_path, dtype="bfloat16")
    _, original = hf_model_dir("mistral")
    rounded = {name: weight.to(torch.bfloat16) for name, weight in original.state_dict().items()}
    again = reopened(tmp_path).state_dict()
    assert all(torch.equal(again[name], weight) for name, weight in rounded.items())
    assert files.read_json(tmp_path / "config.json")["dtype"] == "bfloat16"


def test_load_casts_where_asked(hf_model_dir, mesh):
    directory, original = hf_model_dir("mistral")
    model = spin_jax.load(str(directory), dtype="bfloat16", mesh=mesh)
    assert model.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype("bfloat16")}
    expected = original.model.embed_tokens.weight.to(torch.bfloat16).float().detach().numpy()
    np.testing.assert_array_equal(np.asarray(model.params["embed"], np.float32), expected)


def test_load_onto_eight_devices(hf_model_dir, mesh, mesh8, tmp_path):
    """The values of one device, each device holding its part; and it is saved whole."""
    directory, original = hf_model_dir("mistral", max_shard_size="30KB")
    one, eight = (spin_jax.load(str(directory), mesh=devices) for devices in (mesh, mesh8))
    assert_same_parameters(eight, one)
    attention, mlp = eight.params["layers"]["attention"], eight.params["layers"]["mlp"]
    # Two layers; 32 = D, 4 = N, 2 = K, 16 = H, 56 = F, 272 = V: each split in two along fsdp or tensor.
    for weight, shard in (
        (eight.params["embed"], (136, 16)),
        (eight.params["head"], (16, 136)),
        (eight.params["final_norm"]["scale"], (32,)),
        (attention["wq"], (2, 16, 2, 16)),
        (attention["wk"], (2, 16, 1, 16)),
        (attention["wo"], (2, 2, 16, 16)),
        (mlp["gate"], (2, 16, 28)),
        (mlp["down"], (2, 28, 16)),
    ):
        assert len(weight.addressable_shards) == 8
        assert {part.data.shape for part in weight.addressable_shards} == {shard}
    spin_jax.save(eight, tmp_path)
    assert_same_weights(reopened(tmp_path), original)


# --- config.json -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rope", [None, LINEAR, LLAMA3], ids=["default", "linear", "llama3"])
def test_exported_config_speaks_to_old_and_new_readers(rope, hf_model_dir, mesh, tmp_path):
    options = {"rope_parameters": rope} if rope else {}
    directory, original = hf_model_dir("llama", **options)
    spin_jax.save(spin_jax.load(str(directory), mesh=mesh), tmp_path)
    config = files.read_json(tmp_path / "config.json")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["torch_dtype"] == config["dtype"] == "float32"
    # transformers 5
    assert config["rope_parameters"] == (rope or {"rope_type": "default", "rope_theta": 500.0})
    assert transformers.AutoConfig.from_pretrained(tmp_path).rope_parameters == original.config.rope_parameters
    # transformers 4, vLLM
    assert config["rope_theta"] == 500.0
    old = {key: value for key, value in (rope or {}).items() if key != "rope_theta"}
    assert config["rope_scaling"] == (old or None)


@pytest.mark.parametrize("kind", ["type", "rope_type"])
@pytest.mark.parametrize("rope", [None, LINEAR, LLAMA3], ids=["default", "linear", "llama3"])
def test_old_configs_load_as_new_ones(rope, kind, hf_model_dir, mesh, tmp_path):
    """transformers 4 wrote rope_theta, rope_scaling with `type` or `rope_type`, and torch_dtype."""
    directory, _ = hf_model_dir("llama", **({"rope_parameters": rope} if rope else {}))
    expected = spin_jax.load(str(directory), mesh=mesh)
    assert (expected.config.rope_scaling is None) == (rope is None)
    scaling = None
    if rope:
        scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "rope_type")}
        scaling[kind] = rope["rope_type"]
    old = edited(
        directory,
        tmp_path,
        remove=["rope_parameters", "dtype"],
        rope_theta=500.0,
        rope_scaling=scaling,
        torch_dtype="float32",
        transformers_version="4.36.0",
    )
    model = spin_jax.load(str(old), mesh=mesh)
    assert model.config == expected.config
    assert model.dtype == expected.dtype


@pytest.mark.parametrize(
    ("remove", "changes", "expected"),
    [
        (["sliding_window"], {}, {"windows": (4096,)}),  # transformers' default for Mistral
        ([], {"sliding_window": None}, {"windows": (None,)}),
        ([], {"sliding_window": 7}, {"windows": (7,)}),
        (["tie_word_embeddings"], {}, {"tie_word_embeddings": False}),
        (["rms_norm_eps"], {}, {"norm_eps": 1e-6}),
        (["head_dim"], {"hidden_size": 48}, {"head_dim": 12}),
        ([], {"hidden_size": 48, "head_dim": None}, {"head_dim": 12}),
        ([], {"model_type": "llama", "num_key_value_heads": None}, {"num_key_value_heads": 4}),
        (["num_key_value_heads"], {"model_type": "llama"}, {"num_key_value_heads": 4}),
        (["sliding_window"], {"model_type": "llama"}, {"windows": (None,)}),
    ],
)
def test_absent_and_null_keys(remove, changes, expected, tiny_dir, tmp_path):
    """Defaults are transformers' own."""
    directory = edited(tiny_dir, tmp_path, remove, **changes)
    config = loading.describe(str(directory))[0].config
    reference = transformers.AutoConfig.from_pretrained(directory)
    theirs = {"windows": "sliding_window", "norm_eps": "rms_norm_eps"}
    for key, value in expected.items():
        assert getattr(config, key) == value
        value = value[0] if key == "windows" else value
        assert getattr(reference, theirs.get(key, key), None) in (value, None)


def test_llama_has_no_window(hf_model_dir, tmp_path):
    """The key in a Llama's config.json means nothing to transformers either."""
    directory = edited(hf_model_dir("llama")[0], tmp_path, sliding_window=7)
    assert loading.describe(str(directory))[0].config.windows == (None,)


def test_checkpoint_dtype_is_kept_without_a_name_for_it(hf_model_dir, mesh, tmp_path):
    """config.json says nothing: the weights do."""
    directory, _ = hf_model_dir("mistral", dtype="bfloat16")
    assert spin_jax.load(str(edited(directory, tmp_path, remove=["dtype"])), mesh=mesh).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "'gpt2' is not supported; supported: gemma, gemma2, gemma3_text"),
        ({"model_type": None}, "None is not supported; supported: gemma, gemma2, gemma3_text"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
        (
            {"rope_parameters": {"rope_type": "proportional", "rope_theta": 500.0, "factor": 2.0}},
            "'proportional' is not supported; supported: default, dynamic, linear, llama3, longrope, yarn",
        ),
        ({"quantization_config": {"bits": 4}}, "quantized weights are not supported"),
        (
            {"model_type": "gpt2", "n_embd": 8, "n_inner": 3},
            "the first key that none of them knows is 'n_embd'",
        ),
        ({"model_type": "phi", "layer_norm_eps": 1e-5, "qk_layernorm": True}, "qk_layernorm=True is not"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ({"model_type": "gemma2", "layer_types": ["full_attention"]}, "number of `?layer.types"),
        ({"model_type": "qwen3", "layer_types": ["chunked_attention"] * 2}, "layer_types"),
        ({"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 3}, "exceeds num_local"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": [1]}, r"mlp_only_layers=\[1\] is not supported"),
        (
            {"model_type": "qwen3_next", "linear_conv_kernel_dim": 4},
            r"no attention \(linear_conv_kernel_dim\): linear attention or Mamba",
        ),
        ({"model_type": "mixtral", "num_local_experts": 0}, "num_local_experts=0: a whole number"),
    ],
)
def test_unsupported_configs(changes, message, tiny_dir, mesh, tmp_path):
    with pytest.raises(ValueError, match=message):
        spin_jax.load(str(edited(tiny_dir, tmp_path, **changes)), mesh=mesh)


# --- tokenizer and generation config ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("generation", "expected"),
    [(None, (2,)), ({}, (2,)), ({"eos_token_id": 5}, (2, 5)), ({"eos_token_id": [7, 5, 2]}, (2, 5, 7))],
)
def test_stop_tokens_join_generation_config_and_tokenizer(generation, expected, tiny_dir, tmp_path):
    directory = copied(tiny_dir, tmp_path)
    (directory / "generation_config.json").unlink()
    if generation is not None:
        files.write_json(directory / "generation_config.json", generation)
    model, _ = loading.describe(str(directory))
    assert model.stop_tokens == expected


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, {"eos_token_id": 5}, (2, 5)),
        (None, {"eos_token_id": [7, 5]}, (2, 5, 7)),
        ({"temperature": 0.5}, {"eos_token_id": [5, 2]}, (2, 5)),
        ({"eos_token_id": 7}, {"eos_token_id": 5}, (2, 7)),
        (None, {"eos_token_id": None, "text_config": {"eos_token_id": [6]}}, (2, 6)),
        (None, {"eos_token_id": 32000}, (2,)),  # the default of a model's class, beyond this vocabulary
    ],
)
def test_stop_tokens_of_config_json(generation, config, expected, tiny_dir, tmp_path):
    """They count where generation_config.json names none, as in transformers; an export names all stop tokens."""
    directory = edited(tiny_dir, tmp_path, **config)
    (directory / "generation_config.json").unlink()
    if generation is not None:
        files.write_json(directory / "generation_config.json", generation)
    model, _ = loading.describe(str(directory))
    assert model.stop_tokens == expected
    exported = saving._export_generation(model)
    assert sorted({2, *np.atleast_1d(exported["eos_token_id"]).tolist()}) == list(expected)
    if generation is None and expected != (2,):
        theirs = transformers.GenerationConfig.from_model_config(files.read_json(directory / "config.json"))
        assert {2, *np.atleast_1d(theirs.eos_token_id).tolist()} == {*expected}
        assert exported["pad_token_id"] == model.hf_config["pad_token_id"]


def test_the_token_that_ends_a_turn_stops(tiny_dir, tmp_path, mesh):
    """A template that ends answers with a token that the checkpoint does not name: in sampling, scores and exports."""
    model = spin_jax.load(
        str(tiny_dir), mesh=mesh, chat_template=tiny.CHAT_TEMPLATE.replace("eos_token", "'<|system|>'")
    )
    token = model.tokenizer.convert_tokens_to_ids("<|system|>")
    assert model.stop_tokens == (2, token)
    spin_jax.save(model, tmp_path / "saved")
    assert reopened(tmp_path / "saved").generation_config.eos_token_id == [2, token]
    assert spin_jax.load(str(tmp_path / "saved"), mesh=mesh).stop_tokens == (2, token)


def test_generation_config_survives(tiny_dir, mesh, tmp_path):
    directory = copied(tiny_dir, tmp_path)
    written = {"eos_token_id": [2, 5], "temperature": 0.5, "do_sample": True}
    files.write_json(directory / "generation_config.json", written)
    spin_jax.save(spin_jax.load(str(directory), mesh=mesh), tmp_path / "saved")
    assert files.read_json(tmp_path / "saved" / "generation_config.json") == written
    assert reopened(tmp_path / "saved").generation_config.eos_token_id == [2, 5]


def assert_same_tokenizer(actual, expected):
    text = "Two ducks lay 3 eggs: é ☃ <|user|></s>"
    assert actual.get_vocab() == expected.get_vocab()
    assert actual(text).input_ids == expected(text).input_ids
    assert actual.special_tokens_map == expected.special_tokens_map
    assert actual.chat_template == expected.chat_template
    for prompt in (True, False):
        rendered = [
            tokenizer.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=prompt)
            for tokenizer in (actual, expected)
        ]
        assert rendered[0] == rendered[1]


def test_tiny_tokenizer_survives(tiny_model, tmp_path):
    spin_jax.save(tiny_model, tmp_path)
    assert_same_tokenizer(transformers.AutoTokenizer.from_pretrained(tmp_path), tiny.tokenizer())
    assert_same_tokenizer(spin_jax.load(str(tmp_path), mesh=tiny_model.mesh).tokenizer, tiny.tokenizer())


@pytest.mark.parametrize("template", [tiny.CHAT_TEMPLATE, {"default": tiny.CHAT_TEMPLATE, "tool_use": "x"}, None])
def test_tokenizer_files_speak_to_old_and_new_readers(template, tiny_model, tmp_path):
    """What transformers 4 fails on: the new class's name, a list of special tokens, templates elsewhere."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    tokenizer.chat_template = template
    spin_jax.save(dataclasses.replace(tiny_model, tokenizer=tokenizer), tmp_path)
    old = files.read_object(tmp_path / "tokenizer_config.json")
    assert old["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert old["additional_special_tokens"] == ["<|tool|>"]
    assert "extra_special_tokens" not in old
    if isinstance(template, dict):
        assert old["chat_template"] == [{"name": k, "template": v} for k, v in template.items()]
    else:
        assert old.get("chat_template") == template
    new = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert new.chat_template == template
    assert new.extra_special_tokens == ["<|tool|>"]
    text = "a<|tool|>b</s>"
    assert new(text).input_ids == tokenizer(text).input_ids
    assert not template or (tmp_path / "chat_template.jinja").read_text() == tiny.CHAT_TEMPLATE


def test_mistral_tokenizer_survives(hf_model_dir, mistral_tokenizer, mesh, tmp_path):
    directory, _ = hf_model_dir("mistral", vocab_size=32000)
    spin_jax.save(spin_jax.load(str(directory), mesh=mesh), tmp_path)
    assert_same_tokenizer(transformers.AutoTokenizer.from_pretrained(tmp_path), mistral_tokenizer)


@pytest.mark.parametrize("as_file", [False, True])
def test_a_given_chat_template_replaces_and_survives(as_file, tiny_dir, mesh, tmp_path):
    template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    given = template
    if as_file:
        given = str(tmp_path / "template.jinja")
        (tmp_path / "template.jinja").write_text(template)
    model = spin_jax.load(str(tiny_dir), mesh=mesh, chat_template=given)
    spin_jax.save(model, tmp_path / "saved")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert tokenizer.apply_chat_template(CONVERSATION[1:], tokenize=False) == "[user]2+2 é[assistant]4"


@pytest.mark.parametrize("given", [False, True])
def test_a_chat_template_in_json(given, tiny_dir, mesh, tmp_path):
    """Processors of multimodal models have their template in such a file, and the tokenizer has none."""
    directory = shutil.copytree(tiny_dir, tmp_path / "model")
    (directory / "chat_template.jinja").rename(tmp_path / "x.jinja")
    path = directory / "chat_template.json"
    files.write_json(path, {"chat_template": "{{ messages[0]['content'] }}"})
    model, _ = loading.describe(str(directory), mesh=mesh, chat_template=str(path) if given else None)
    assert model.tokenizer.chat_template == "{{ messages[0]['content'] }}"
    model, _ = loading.describe(str(directory), mesh=mesh, chat_template=str(tmp_path / "x.jinja"))
    assert model.tokenizer.chat_template == tiny.CHAT_TEMPLATE
    for content in ({"template": "x"}, {"chat_template": ["x"]}):
        files.write_json(path, content)
        with pytest.raises(ValueError, match=r"chat_template.json' is no Jinja text, nor a file of it"):
            loading.describe(str(directory), mesh=mesh)


# --- hub ids ---------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tiny_dir, tmp_path, monkeypatch):
    """A hub cache that holds org/name, without a network."""
    hub_cache.publish(tmp_path, "org/name", COMMIT, tiny_dir)
    hub_cache.use(tmp_path, monkeypatch)
    return tmp_path


def test_a_name_with_the_commit_that_it_stands_for(hub, tiny_dir):
    for name in ("org/name", "org/name@main", f"org/name@{COMMIT}"):
        assert loading.pinned(name) == f"org/name@{COMMIT}"
    for name in ("", str(tiny_dir), "module:function", "org/other", "org/name@v2", "org/name@../.."):
        assert loading.pinned(name) is None


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_hub_ids_load_and_say_their_commit(revision, hub, tiny_model):
    model = spin_jax.load("org/name", revision, mesh=tiny_model.mesh)
    assert model.revision == COMMIT
    assert tiny_model.revision is None  # a directory has none
    assert_same_parameters(model, tiny_model)


def test_the_files_that_are_asked_of_the_hub(tiny_dir, mesh, monkeypatch):
    """Templates of their own for tools stand in a folder, and so do copies of the weights, which nobody reads."""
    from huggingface_hub.utils import filter_repo_objects

    wanted = ["config.json", "model.safetensors", "chat_template.jinja", "additional_chat_templates/tool_use.jinja"]
    unread = ["original/params.json", "onnx/x.safetensors", "consolidated.safetensors", "x.bin", "a/tokenizer.model"]
    asked = []

    def download(path, allow_patterns, ignore_patterns, **_):
        asked.extend(
            filter_repo_objects(wanted + unread, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        )
        return str(tiny_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    loading.resolve("org/name")
    assert asked == wanted


@pytest.mark.parametrize(
    ("path", "revision", "message"),
    [
        ("org/other", None, "'org/other'"),
        ("org/name", "v2", "'org/name'.*at revision v2"),
        ("../org/name", None, "'../org/name': no such directory, and not a hub id"),
        ("org/..", None, r"'org/\.\.': no such directory, and not a hub id"),
        ("/nowhere/at/all", None, "'/nowhere/at/all': no such directory"),
        ("", None, "'': no such directory"),
    ],
)
def test_unknown_paths_are_named(path, revision, message, hub):
    with pytest.raises(FileNotFoundError, match=message):
        spin_jax.load(path, revision)


# --- damaged checkpoints ---------------------------------------------------------------------------


def test_missing_and_misshapen_tensors_are_listed_together(tiny_dir, mesh, tmp_path):
    from safetensors.numpy import load_file, save_file

    directory = copied(tiny_dir, tmp_path)
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    del tensors["lm_head.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((56, 31), np.float32)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="the weights cannot be loaded") as error:
        spin_jax.load(str(directory), mesh=mesh)
    message = str(error.value)
    assert "model.layers.1.self_attn.q_proj.weight: missing" in message
    assert "lm_head.weight: missing" in message
    assert "model.layers.0.mlp.up_proj.weight: (56, 31), and config.json asks for (56, 32)" in message
    assert message.count("\n") == 3


def test_a_long_list_of_problems_is_cut(hf_model_dir, mesh, tmp_path):
    """config.json asks for seven layers more than there are: 63 tensors are missing, 20 are shown."""
    directory = edited(hf_model_dir("mistral")[0], tmp_path, num_hidden_layers=9)
    with pytest.raises(ValueError, match=r"… and 43 more"):
        spin_jax.load(str(directory), mesh=mesh)


def _truncated(path):
    path.write_bytes(path.read_bytes()[:-100])


def _beheaded(path):
    path.write_bytes(path.read_bytes()[:4])


def _cut_in_the_header(path):
    path.write_bytes(path.read_bytes()[:500])


def _scrambled(path):
    data = bytearray(path.read_bytes())
    data[8:20] = b"\xff" * 12
    path.write_bytes(data)


def _pointer(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1234\n")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncated, "is truncated"),
        (_beheaded, "is truncated"),
        (_cut_in_the_header, "is truncated"),
        (_scrambled, "damaged header"),
        (_pointer, "git-lfs pointer"),
    ],
)
def test_damaged_weights_are_named(damage, message, tiny_dir, mesh, tmp_path):
    directory = copied(tiny_dir, tmp_path)
    damage(directory / "model.safetensors")
    with pytest.raises(ValueError, match=f"model.safetensors.*{message}"):
        spin_jax.load(str(directory), mesh=mesh)


def test_a_pickle_alone_is_refused_with_advice(tiny_dir, mesh, tmp_path):
    directory = copied(tiny_dir, tmp_path)
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin is a pickle.*safetensors"):
        spin_jax.load(str(directory), mesh=mesh)


def test_no_weights_at_all(tiny_dir, mesh, tmp_path):
    directory = copied(tiny_dir, tmp_path)
    (directory / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors$"):
        spin_jax.load(str(directory), mesh=mesh)


def test_index_naming_a_missing_file(hf_model_dir, mesh, tmp_path):
    directory = copied(hf_model_dir("mistral", max_shard_size="30KB")[0], tmp_path)
    lost = sorted(directory.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(ValueError, match=f"{lost.name} is not there") as error:
        spin_jax.load(str(directory), mesh=mesh)
    assert str(error.value).count("\n") == 1  # its tensors go without saying


def test_shards_with_odd_names(hf_model_dir, tiny_model, mesh, tmp_path):
    """As a browser names them that downloads a file twice."""
    directory = copied(hf_model_dir("mistral", max_shard_size="30KB")[0], tmp_path)
    index = files.read_json(directory / "model.safetensors.index.json")
    for path in list(directory.glob("model-*")):
        path.rename(path.with_stem(f"ü {path.stem} (1)"))
    index["weight_map"] = {
        k: f"ü {v.removesuffix('.safetensors')} (1).safetensors" for k, v in index["weight_map"].items()
    }
    files.write_json(directory / "model.safetensors.index.json", index)
    assert_same_parameters(spin_jax.load(str(directory), mesh=mesh), tiny_model)


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/elsewhere.safetensors", "a/b.safetensors"])
def test_index_naming_a_file_elsewhere(name, hf_model_dir, mesh, tmp_path):
    directory = copied(hf_model_dir("mistral", max_shard_size="30KB")[0], tmp_path)
    index = files.read_json(directory / "model.safetensors.index.json")
    index["weight_map"]["model.norm.weight"] = name
    files.write_json(directory / "model.safetensors.index.json", index)
    with pytest.raises(ValueError, match="files outside of its directory are not read"):
        spin_jax.load(str(directory), mesh=mesh)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [(None, FileNotFoundError, "config.json is missing"), ("{", ValueError, "config.json is not valid JSON")],
)
def test_missing_and_broken_config(content, error, message, tiny_dir, mesh, tmp_path):
    directory = copied(tiny_dir, tmp_path)
    (directory / "config.json").unlink()
    if content:
        (directory / "config.json").write_text(content)
    with pytest.raises(error, match=message):
        spin_jax.load(str(directory), mesh=mesh)


def test_a_tokenizer_larger_than_the_embedding(hf_model_dir, mesh):
    """The tiny tokenizer's ids go to 261."""
    directory, _ = hf_model_dir("mistral", vocab_size=200)
    with pytest.raises(ValueError, match="largest id is 261 and the embedding has 200 rows"):
        spin_jax.load(str(directory), mesh=mesh)


# --- new models ------------------------------------------------------------------------------------


def test_a_new_model_takes_the_tokenizers_special_tokens(mesh, tmp_path):
    """What it writes, transformers opens, with our logits' shape and its ids."""
    options = {
        "model_type": "mistral",
        "vocab_size": 272,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    model = loading.new_model(options, tiny.tokenizer(), dtype="float32", mesh=mesh)
    shapes = loading.sharding.unboxed(loading.abstract_params(model.config))
    model.params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    spin_jax.save(model, tmp_path)
    again = reopened(tmp_path)
    assert (again.config.bos_token_id, again.config.eos_token_id, again.config.pad_token_id) == (1, 2, 0)
    generation = files.read_json(tmp_path / "generation_config.json")
    assert generation == {"eos_token_id": [2], "bos_token_id": 1, "pad_token_id": 0}
    assert again.generation_config.eos_token_id == [2]
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == 272


@pytest.mark.parametrize("family", [None, "gpt2"])
def test_a_new_model_of_an_unknown_family(family, mesh):
    with pytest.raises(ValueError, match="supported: gemma, gemma2, gemma3_text"):
        loading.new_model({"model_type": family}, tiny.tokenizer(), dtype="float32", mesh=mesh)
