"""Every family against transformers: logits, greedy answers, and the way there and back to the bit.

    SPIN_JAX_TABLES=DIR python -m pytest tests/test_families.py      # writes DIR/families.md

Each checkpoint is a small one that transformers made, with every option of its family away from the default.
"""

import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from answers import answers_of
from architectures import LLAMA3
from packaging.version import Version
from torch_reference import torch_greedy, torch_logits

from spin_jax.kernels.layout import Layout
from spin_jax.models import families, loading, saving
from spin_jax.models.decoder import Decoder, forward
from spin_jax.sampling.next_token import Sampling
from spin_jax.training.log_probs import logits

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

GREEDY = Sampling(24, temperature=0.0)
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "short_factor": [1.0, 1.1, 1.3, 1.6],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 4.0,
    "beta_slow": 0.5,
}
# What the published models have and `SMALL` has not; None takes a key out of it.
CASES = {
    "Mistral, Zephyr": ("mistral", {"sliding_window": 6}),
    "Llama 1, 2; Amber": ("llama", {"num_key_value_heads": 4}),
    "Llama 3": ("llama", {"rope_parameters": LLAMA3}),
    "TinyLlama": ("llama", {"head_dim": None}),
    "SmolLM2": (
        "llama",
        {"tie_word_embeddings": True, "num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 48},
    ),
    "Llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "Qwen2, Qwen2.5": ("qwen2", {"head_dim": None, "tie_word_embeddings": True}),
    "Qwen2 with windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1, "num_hidden_layers": 3},
    ),
    "Qwen3": ("qwen3", {}),
    "Phi-2": ("phi", {"partial_rotary_factor": 0.5, "layer_norm_eps": 1e-3, "rope_parameters": None}),
    "Phi-3": ("phi3", {"sliding_window": 6, "head_dim": None}),
    "Phi-3 128k, Phi-3.5": (
        "phi3",
        {
            "rope_parameters": LONGROPE,
            "original_max_position_embeddings": 64,  # the class's default would count, and not that of LONGROPE
            "head_dim": None,
            "hidden_size": 32,
        },
    ),
    "Phi-4-mini": (
        "phi3",
        {
            "head_dim": None,
            "hidden_size": 64,
            "rope_parameters": {**LONGROPE, "partial_rotary_factor": 0.5},
            "original_max_position_embeddings": 64,
            "tie_word_embeddings": True,
        },
    ),
    "Gemma 2": (
        "gemma2",
        {
            "num_hidden_layers": 4,
            "sliding_window": 6,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
            "hidden_activation": "gelu_pytorch_tanh",
        },
    ),
    "Mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Gemma": ("gemma", {"attention_bias": True, "initializer_range": 0.2}),
    "Gemma 3": (
        "gemma3_text",
        {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 6,
            "query_pre_attn_scalar": 24,
            "final_logit_softcapping": 3.0,
            "attention_bias": True,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            },
        },
    ),
    "Qwen2.5 with YaRN": ("qwen2", {"head_dim": None, "rope_parameters": YARN}),
    "Qwen3-MoE": (
        "qwen3_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True},
    ),
    "Qwen3-MoE, other options": (
        "qwen3_moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 6,
        },
    ),
    "OLMo 2": ("olmo2", {"head_dim": None, "attention_bias": True}),
    "OLMo 3": (
        "olmo3",
        {
            "head_dim": None,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 6,
            "rope_parameters": None,  # transformers 5.0 and 5.24 have it in different forms
            "rope_theta": 500_000.0,
            "rope_scaling": YARN | {"rope_theta": 500_000.0, "attention_factor": 1.3},
        },
    ),
    "SmolLM3": (
        "smollm3",
        {
            "head_dim": None,
            "num_hidden_layers": 4,
            "no_rope_layers": [1, 0, 1, 0],
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["full_attention", "sliding_attention"] * 2,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": False,
        },
    ),
    "Granite 3": (
        "granite",
        {
            "head_dim": None,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.2,
            "logits_scaling": 1.5,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "GLM-4-9B-chat": ("glm", {"attention_bias": False, "partial_rotary_factor": 0.25, "rope_parameters": None}),
    "GLM-4-0414": ("glm4", {"partial_rotary_factor": 0.5, "rope_parameters": None}),
    "Seed-OSS": ("seed_oss", {"attention_out_bias": True, "mlp_bias": True}),
    "gpt-oss": (
        "gpt_oss",
        {
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "swiglu_alpha": 1.3,
            "swiglu_limit": 0.9,
            "rope_parameters": YARN | {"truncate": False},
        },
    ),
    "Ministral": ("ministral", {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}),
    "Ministral 3": (
        "ministral3",
        {"rope_parameters": YARN | {"llama_4_scaling_beta": 0.3, "mscale": 1.0, "mscale_all_dim": 0.5}},
    ),
}
if not hasattr(transformers.GptOssConfig(), "swiglu_alpha"):  # older transformers has them as constants
    del CASES["gpt-oss"][1]["swiglu_alpha"], CASES["gpt-oss"][1]["swiglu_limit"]
if "full_attention" not in (transformers.Olmo3Config().rope_parameters or {}):
    del CASES["OLMo 3"]  # older transformers scale also the RoPE of layers with a window


@pytest.fixture(scope="module", params=CASES)
def case(request, hf_model_dir):
    """(the model's name, its directory, transformers' model)."""
    family, options = CASES[request.param]
    if request.param == "Phi-4-mini" and Version(transformers.__version__) < Version("5.5"):
        pytest.skip("earlier versions of transformers have too many frequencies where longrope turns a part of a head")
    directory, reference = hf_model_dir(family, **options)
    return request.param, directory, reference


@pytest.fixture(scope="module")
def loaded(case, mesh):
    return loading.load(str(case[1]), mesh=mesh)


def tokens_of(rows, columns, vocab_size=272):
    return np.random.default_rng(0).integers(3, vocab_size, (rows, columns), dtype=np.int32)


def tensors(directory):
    from safetensors.numpy import load_file

    return {name: x for path in directory.glob("*.safetensors") for name, x in load_file(path).items()}


@pytest.fixture(scope="module")
def table():
    """Rows for the README, written where SPIN_JAX_TABLES says."""
    rows: dict[str, list[str]] = {}
    yield rows
    if folder := os.environ.get("SPIN_JAX_TABLES"):
        lines = [
            "| model | model_type | logits, largest difference | greedy tokens | there and back |",
            "|---" * 5 + "|",
        ]
        lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
        (pathlib.Path(folder) / "families.md").write_text("\n".join(lines) + "\n")


def test_a_family(case, loaded, table, tmp_path):
    """fp32 on CPU: two ways of summing the same numbers; 1e-4 is a hundred times what they differ by."""
    name, directory, reference = case
    tokens = tokens_of(3, 40)
    difference = np.abs(np.asarray(logits(loaded, tokens)) - torch_logits(reference, tokens)).max()
    assert difference <= 1e-4

    prompts = [row[:length] for row, length in zip(tokens, (9, 12, 16), strict=True)]  # one program reads them
    ours = answers_of(loaded, prompts, GREEDY, slots=3, stop_tokens=())
    assert ours == [torch_greedy(reference, prompt, 24) for prompt in prompts]

    saving.save(loaded, tmp_path / "out")
    before, after = tensors(directory), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[key], after[key]) for key in before)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert type(again) is type(reference)
    np.testing.assert_array_equal(torch_logits(again, tokens), torch_logits(reference, tokens))
    table[name] = [
        CASES[name][0],
        f"{difference:.0e}",
        f"{sum(map(len, ours))} of {sum(map(len, ours))}",
        "bit-equal",
    ]


def test_an_export_speaks_to_readers_of_transformers_4(case, loaded, tmp_path):
    saving.save(loaded, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    rope = written["rope_parameters"]
    rope = rope.get("full_attention", rope)
    assert written["rope_theta"] == rope["rope_theta"]
    assert written.get("partial_rotary_factor", 1.0) == rope.get("partial_rotary_factor", 1.0)
    kind, scaling = rope.get("rope_type", "default"), written["rope_scaling"]
    if kind == "longrope":
        assert scaling.keys() == {"type", "short_factor", "long_factor"}
    else:
        assert (scaling or {"rope_type": "default"})["rope_type"] == kind
    assert "auto_map" not in written
    for key in ("rope_parameters", "dtype"):
        del written[key]
    (tmp_path / "out" / "config.json").write_text(json.dumps(written))
    assert families.model_config(loading._read_hf_config(tmp_path / "out")) == loaded.config


@pytest.mark.parametrize("name", ["Gemma 2", "Mixtral", "OLMo 2", "Phi-2", "Qwen3", "gpt-oss"])
def test_eight_devices_are_one(name, hf_model_dir, mesh, mesh8):
    """Split over data, fsdp and tensor, in float32: sums of another order, 1e-4 as above."""
    family, options = CASES[name]
    directory, _ = hf_model_dir(family, **options)
    tokens = tokens_of(4, 20)
    one, eight = (loading.load(str(directory), mesh=m) for m in (mesh, mesh8))
    np.testing.assert_allclose(logits(eight, tokens), logits(one, tokens), atol=1e-4)
    prompts = [row[:9] for row in tokens]
    answers = (answers_of(model, prompts, GREEDY, slots=4, stop_tokens=()) for model in (one, eight))
    assert next(answers) == next(answers)


@pytest.mark.parametrize("name", ["Mixtral", "Gemma 2", "gpt-oss"])
def test_gradients_of_eight_devices_are_those_of_one(name, hf_model_dir, mesh, mesh8):
    """Of all weights, experts among them; float32, 1e-4 of each one's largest."""
    family, options = CASES[name]
    directory, _ = hf_model_dir(family, **options)
    tokens = tokens_of(4, 12)
    layout = Layout(np.broadcast_to(np.arange(12, dtype=np.int32), tokens.shape), np.ones_like(tokens))
    found = []
    for m in (mesh, mesh8):
        model = loading.load(str(directory), mesh=m)
        decoder = Decoder(model.config, dtype=model.dtype)

        def loss(params, decoder=decoder):
            hidden, _ = forward(decoder, params, tokens, layout)
            return jnp.sum(jnp.square(hidden))

        with jax.set_mesh(m):
            found.append(jax.tree.map(np.asarray, jax.jit(jax.grad(loss))(model.params)))
    for one, eight in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(eight, one, atol=1e-4 * np.abs(one).max())
