"""The supported families: how config.json becomes the decoder's options, and the names of tensors.

To add a family, add an entry to `FAMILIES` with a function for its config, a table of its names where they
differ from Llama's, and perhaps an option to `ModelConfig`. No other file depends on the family.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from spin_jax.models.architecture import ModelConfig, RopeScaling, check_constants

HF = Mapping[str, Any]  # config.json with transformers' defaults

# Keys of config.json as transformers 4 wrote them.
TRANSFORMERS_4 = ("rope_theta", "rope_scaling", "partial_rotary_factor", "torch_dtype")


class Tensor(NamedTuple):
    """The name and the layout of a parameter in a checkpoint.

    A linear layer is [out, in] in the checkpoint and [*in, *out] here; `inputs` counts our input dimensions.
    With 0 inputs the checkpoint has a flat vector. Parameters with the same name (Phi-3's fused projections)
    are stacked in the checkpoint, in the table's order.
    """

    name: str
    inputs: int | None = 0  # None: the checkpoint has our layout


LLAMA: dict[str, Tensor] = {
    "embed": Tensor("model.embed_tokens.weight", None),
    "layers/attention_norm/scale": Tensor("model.layers.{layer}.input_layernorm.weight"),
    "layers/attention/wq": Tensor("model.layers.{layer}.self_attn.q_proj.weight", 1),
    "layers/attention/wk": Tensor("model.layers.{layer}.self_attn.k_proj.weight", 1),
    "layers/attention/wv": Tensor("model.layers.{layer}.self_attn.v_proj.weight", 1),
    "layers/attention/wo": Tensor("model.layers.{layer}.self_attn.o_proj.weight", 2),
    "layers/attention/bq": Tensor("model.layers.{layer}.self_attn.q_proj.bias"),
    "layers/attention/bk": Tensor("model.layers.{layer}.self_attn.k_proj.bias"),
    "layers/attention/bv": Tensor("model.layers.{layer}.self_attn.v_proj.bias"),
    "layers/attention/bo": Tensor("model.layers.{layer}.self_attn.o_proj.bias"),
    "layers/attention/q_norm/scale": Tensor("model.layers.{layer}.self_attn.q_norm.weight"),
    "layers/attention/k_norm/scale": Tensor("model.layers.{layer}.self_attn.k_norm.weight"),
    "layers/mlp_norm/scale": Tensor("model.layers.{layer}.post_attention_layernorm.weight"),
    "layers/mlp/gate": Tensor("model.layers.{layer}.mlp.gate_proj.weight", 1),
    "layers/mlp/up": Tensor("model.layers.{layer}.mlp.up_proj.weight", 1),
    "layers/mlp/down": Tensor("model.layers.{layer}.mlp.down_proj.weight", 1),
    "layers/mlp/gate_bias": Tensor("model.layers.{layer}.mlp.gate_proj.bias"),
    "layers/mlp/up_bias": Tensor("model.layers.{layer}.mlp.up_proj.bias"),
    "layers/mlp/down_bias": Tensor("model.layers.{layer}.mlp.down_proj.bias"),
    "final_norm/scale": Tensor("model.norm.weight"),
    "head": Tensor("lm_head.weight", 1),
}
GEMMA2 = LLAMA | {
    "layers/attention_post_norm/scale": Tensor("model.layers.{layer}.post_attention_layernorm.weight"),
    "layers/mlp_norm/scale": Tensor("model.layers.{layer}.pre_feedforward_layernorm.weight"),
    "layers/mlp_post_norm/scale": Tensor("model.layers.{layer}.post_feedforward_layernorm.weight"),
}
PHI3 = LLAMA | {
    "layers/attention/wq": Tensor("model.layers.{layer}.self_attn.qkv_proj.weight", 1),
    "layers/attention/wk": Tensor("model.layers.{layer}.self_attn.qkv_proj.weight", 1),
    "layers/attention/wv": Tensor("model.layers.{layer}.self_attn.qkv_proj.weight", 1),
    "layers/mlp/gate": Tensor("model.layers.{layer}.mlp.gate_up_proj.weight", 1),
    "layers/mlp/up": Tensor("model.layers.{layer}.mlp.gate_up_proj.weight", 1),
}
PHI = LLAMA | {
    "layers/attention_norm/bias": Tensor("model.layers.{layer}.input_layernorm.bias"),
    "layers/attention/wo": Tensor("model.layers.{layer}.self_attn.dense.weight", 2),
    "layers/attention/bo": Tensor("model.layers.{layer}.self_attn.dense.bias"),
    "layers/mlp/up": Tensor("model.layers.{layer}.mlp.fc1.weight", 1),
    "layers/mlp/up_bias": Tensor("model.layers.{layer}.mlp.fc1.bias"),
    "layers/mlp/down": Tensor("model.layers.{layer}.mlp.fc2.weight", 1),
    "layers/mlp/down_bias": Tensor("model.layers.{layer}.mlp.fc2.bias"),
    "final_norm/scale": Tensor("model.final_layernorm.weight"),
    "final_norm/bias": Tensor("model.final_layernorm.bias"),
    "head_bias": Tensor("lm_head.bias"),
}
_EXPERT = "model.layers.{layer}.block_sparse_moe.experts.{expert}"
MIXTRAL = LLAMA | {
    "layers/mlp/router": Tensor("model.layers.{layer}.block_sparse_moe.gate.weight", 1),
    "layers/mlp/gate": Tensor(f"{_EXPERT}.w1.weight", 1),
    "layers/mlp/up": Tensor(f"{_EXPERT}.w3.weight", 1),
    "layers/mlp/down": Tensor(f"{_EXPERT}.w2.weight", 1),
}


# --- configs -------------------------------------------------------------------------------------


def _check_off(hf: HF, key: str) -> None:
    """Raises ValueError where an option is on that this decoder does not have."""
    if hf.get(key) not in (False, None):
        raise ValueError(f"{key}={hf[key]!r} is not supported (only False)")


def _options(hf: HF, *, windows: tuple = (None,), eps: str = "rms_norm_eps", act: str = "hidden_act") -> dict[str, Any]:
    """The options that all families have, from the keys of transformers 4 or 5."""
    if hf.get("quantization_config"):
        raise ValueError("quantization_config: quantized weights are not supported; take the full ones")
    rope = hf.get("rope_parameters") or {"rope_theta": hf["rope_theta"], **(hf.get("rope_scaling") or {})}
    if rope.get("rope_theta") is None:
        raise ValueError("rope_theta: missing")
    part = rope.get("partial_rotary_factor") or 1.0
    check_constants({"rope_theta": rope["rope_theta"], "partial_rotary_factor": part})
    heads = hf["num_attention_heads"]
    head_dim = hf.get("head_dim") or hf["hidden_size"] // heads
    activation = {"silu": "silu", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu"}.get(hf.get(act, "silu"))
    if activation is None:
        raise ValueError(f"{act}={hf[act]!r} is not supported; supported: silu, gelu_new, gelu_pytorch_tanh")
    return {
        "model_type": hf["model_type"],
        "vocab_size": hf["vocab_size"],
        "hidden_size": hf["hidden_size"],
        "intermediate_size": hf["intermediate_size"],
        "num_hidden_layers": hf["num_hidden_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": hf.get("num_key_value_heads") or heads,
        "head_dim": head_dim,
        "norm_eps": hf[eps],
        "rope_theta": float(rope["rope_theta"]),
        "rope_scaling": _rope_scaling(rope, hf),
        "rotary_dim": int(head_dim * part),
        "windows": windows,
        "activation": activation,
        "tie_word_embeddings": hf["tie_word_embeddings"],
        "max_position_embeddings": hf["max_position_embeddings"],
        "initializer_range": hf["initializer_range"],
    }


def _rope_scaling(rope: HF, hf: HF) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    kind = "longrope" if kind == "su" else kind  # its earlier name
    if kind == "default":
        return None
    names = {
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        "longrope": ("short_factor",),
    }.get(kind if isinstance(kind, str) else "")
    if names is None:
        raise ValueError(f"RoPE scaling {kind!r} is not supported; supported: default, linear, llama3, longrope")
    if absent := [name for name in names if rope.get(name) is None]:
        raise ValueError(f"RoPE scaling {kind!r} has no {', '.join(absent)}")
    if kind != "longrope":
        return RopeScaling(kind, **{name: rope[name] for name in names})
    first = _first_length(rope, hf)
    check_constants({"original_max_position_embeddings": first})
    stretched = hf["max_position_embeddings"] / first
    attention = rope.get("attention_factor")
    if attention is None:
        attention = math.sqrt(1 + math.log(stretched) / math.log(first)) if stretched > 1 else 1.0
    return RopeScaling(kind, short_factor=tuple(rope["short_factor"]), attention_factor=attention)


def _first_length(rope: HF, hf: HF) -> Any:
    """The length that a longrope model was first trained at."""
    name = "original_max_position_embeddings"
    return rope.get(name) or hf.get(name) or hf["max_position_embeddings"]


def _windows(hf: HF) -> tuple[int | None, ...]:
    """The pattern of windows that the layers repeat; without `layer_types` all layers have one window."""
    count, window = hf["num_hidden_layers"], hf.get("sliding_window")
    kinds = hf.get("layer_types") or ["sliding_attention"] * count
    if unknown := [kind for kind in kinds if kind not in ("sliding_attention", "full_attention")]:
        raise ValueError(f"layer_types has {unknown[0]!r}; supported: sliding_attention, full_attention")
    each = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    period = next(p for p in range(1, count + 1) if count % p == 0 and each == each[:p] * (count // p))
    return each[:period]


def _llama(hf: HF) -> ModelConfig:
    bias = bool(hf.get("attention_bias"))
    return ModelConfig(**_options(hf), qkv_bias=bias, output_bias=bias, mlp_bias=bool(hf.get("mlp_bias")))


def _mistral(hf: HF) -> ModelConfig:
    return ModelConfig(**_options(hf, windows=(hf.get("sliding_window"),)))


def _qwen2(hf: HF) -> ModelConfig:
    return ModelConfig(**_options(hf, windows=_windows(hf)), qkv_bias=True)


def _qwen3(hf: HF) -> ModelConfig:
    bias = bool(hf.get("attention_bias"))
    return ModelConfig(**_options(hf, windows=_windows(hf)), qk_norm=True, qkv_bias=bias, output_bias=bias)


def _phi(hf: HF) -> ModelConfig:
    _check_off(hf, "qk_layernorm")
    biases = dict.fromkeys(("qkv_bias", "output_bias", "mlp_bias", "head_bias"), True)
    return ModelConfig(**_options(hf, eps="layer_norm_eps"), **biases, norm="layer", parallel=True, gated=False)


def _phi3(hf: HF) -> ModelConfig:
    options = _options(hf, windows=(hf.get("sliding_window"),))
    if options["rope_scaling"]:
        # Beyond this length the published models change all frequencies, also those of earlier tokens.
        options["max_position_embeddings"] = _first_length(hf.get("rope_parameters") or {}, hf)
    return ModelConfig(**options)


def _gemma2(hf: HF) -> ModelConfig:
    _check_off(hf, "use_bidirectional_attention")
    bias = bool(hf.get("attention_bias"))
    check_constants({"query_pre_attn_scalar": hf["query_pre_attn_scalar"]})
    return ModelConfig(
        **_options(hf, windows=_windows(hf), act="hidden_activation"),
        norm="rms+1",
        post_norms=True,
        scale_embedding=True,
        query_scale=hf["query_pre_attn_scalar"] ** -0.5,
        attention_softcap=hf.get("attn_logit_softcapping"),
        logit_softcap=hf.get("final_logit_softcapping"),
        qkv_bias=bias,
        output_bias=bias,
    )


def _mixtral(hf: HF) -> ModelConfig:
    options = _options(hf, windows=(hf.get("sliding_window"),))
    return ModelConfig(**options, num_experts=hf["num_local_experts"], experts_per_token=hf["num_experts_per_tok"])


class Family(NamedTuple):
    architecture: str  # its class in transformers and vLLM
    config: Callable[[HF], ModelConfig]
    names: dict[str, Tensor]  # by our path; entries that a model does not have are ignored


FAMILIES: dict[str, Family] = {
    "gemma2": Family("Gemma2ForCausalLM", _gemma2, GEMMA2),
    "llama": Family("LlamaForCausalLM", _llama, LLAMA),
    "mistral": Family("MistralForCausalLM", _mistral, LLAMA),
    "mixtral": Family("MixtralForCausalLM", _mixtral, MIXTRAL),
    "phi": Family("PhiForCausalLM", _phi, PHI),
    "phi3": Family("Phi3ForCausalLM", _phi3, PHI3),
    "qwen2": Family("Qwen2ForCausalLM", _qwen2, LLAMA),
    "qwen3": Family("Qwen3ForCausalLM", _qwen3, LLAMA),
}


def family(hf: HF) -> Family:
    """The family of a config.json.

    Raises:
        ValueError: the family is not supported. The message names those that are, and the first key that none has.
    """
    name = hf.get("model_type")
    if isinstance(name, str) and name in FAMILIES:
        return FAMILIES[name]
    from transformers import CONFIG_MAPPING

    known = {"model_type", *TRANSFORMERS_4}.union(*(CONFIG_MAPPING[each]().to_dict() for each in FAMILIES))
    unknown = [f"; the first key that none of them knows is {key!r}" for key in hf if key not in known]
    message = f"model_type {name!r} is not supported; supported: {', '.join(FAMILIES)}"
    raise ValueError(message + "".join(unknown[:1]))


def model_config(hf: HF) -> ModelConfig:
    """The architecture in a config.json; ValueError names the key of what is unsupported or impossible."""
    return family(hf).config(hf)
