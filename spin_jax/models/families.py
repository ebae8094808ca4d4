"""The supported families: how config.json becomes the decoder's options, and the names of tensors.

To add a family, add an entry to `FAMILIES` with a function for its config, a table of its names where they
differ from Llama's, and perhaps an option to `ModelConfig`. No other file depends on the family.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from spin_jax.models.architecture import ModelConfig, RopeScaling, check_constants

HF = Mapping[str, Any]  # config.json with transformers' defaults

# Keys of config.json as transformers 4 wrote them.
TRANSFORMERS_4 = ("rope_theta", "rope_scaling", "partial_rotary_factor", "torch_dtype")

# How the keys begin that only configs of recurrent layers have.
_RECURRENT = ("mamba", "ssm_", "linear_", "lru_", "rwkv", "conv_L", "time_step_", "state_size")


class Tensor(NamedTuple):
    """The name and the layout of a parameter in a checkpoint.

    A linear layer is [out, in] in the checkpoint and [*in, *out] here; `inputs` counts our input dimensions.
    With 0 inputs the checkpoint has a flat vector. Parameters with the same name (Phi-3's fused projections)
    are stacked in the checkpoint, in the table's order.
    """

    name: str
    inputs: int | None = 0  # None: the checkpoint has our layout
    alternate: bool = False  # parameters with the same name take turns along the last dimension


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
OLMO2 = LLAMA | {
    "layers/attention_post_norm/scale": Tensor("model.layers.{layer}.post_attention_layernorm.weight"),
    "layers/mlp_post_norm/scale": Tensor("model.layers.{layer}.post_feedforward_layernorm.weight"),
}
_GATE_UP = {
    "layers/mlp/gate": Tensor("model.layers.{layer}.mlp.gate_up_proj.weight", 1),
    "layers/mlp/up": Tensor("model.layers.{layer}.mlp.gate_up_proj.weight", 1),
}
GLM = LLAMA | _GATE_UP
GLM4 = GLM | {
    "layers/attention_post_norm/scale": Tensor("model.layers.{layer}.post_self_attn_layernorm.weight"),
    "layers/mlp_post_norm/scale": Tensor("model.layers.{layer}.post_mlp_layernorm.weight"),
}
PHI3 = GLM | {
    "layers/attention/wq": Tensor("model.layers.{layer}.self_attn.qkv_proj.weight", 1),
    "layers/attention/wk": Tensor("model.layers.{layer}.self_attn.qkv_proj.weight", 1),
    "layers/attention/wv": Tensor("model.layers.{layer}.self_attn.qkv_proj.weight", 1),
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
_QWEN_EXPERT = "model.layers.{layer}.mlp.experts.{expert}"
QWEN3_MOE = LLAMA | {
    "layers/mlp/router": Tensor("model.layers.{layer}.mlp.gate.weight", 1),
    "layers/mlp/gate": Tensor(f"{_QWEN_EXPERT}.gate_proj.weight", 1),
    "layers/mlp/up": Tensor(f"{_QWEN_EXPERT}.up_proj.weight", 1),
    "layers/mlp/down": Tensor(f"{_QWEN_EXPERT}.down_proj.weight", 1),
}

_GPT_OSS_EXPERTS = "model.layers.{layer}.mlp.experts"
GPT_OSS = LLAMA | {
    "layers/attention/sinks": Tensor("model.layers.{layer}.self_attn.sinks"),
    "layers/mlp/router": Tensor("model.layers.{layer}.mlp.router.weight", 1),
    "layers/mlp/router_bias": Tensor("model.layers.{layer}.mlp.router.bias"),
    "layers/mlp/gate": Tensor(f"{_GPT_OSS_EXPERTS}.gate_up_proj", None, alternate=True),
    "layers/mlp/up": Tensor(f"{_GPT_OSS_EXPERTS}.gate_up_proj", None, alternate=True),
    "layers/mlp/gate_bias": Tensor(f"{_GPT_OSS_EXPERTS}.gate_up_proj_bias", None, alternate=True),
    "layers/mlp/up_bias": Tensor(f"{_GPT_OSS_EXPERTS}.gate_up_proj_bias", None, alternate=True),
    "layers/mlp/down": Tensor(f"{_GPT_OSS_EXPERTS}.down_proj", None),
    "layers/mlp/down_bias": Tensor(f"{_GPT_OSS_EXPERTS}.down_proj_bias", None),
}


# --- configs -------------------------------------------------------------------------------------


def _check_off(hf: HF, key: str, off: Any = False) -> None:
    """Raises ValueError where an option is on that this decoder does not have."""
    if hf.get(key) not in (off, None):
        raise ValueError(f"{key}={hf[key]!r} is not supported (only {off!r})")


def _options(hf: HF, *, windows: tuple = (None,), eps: str = "rms_norm_eps", act: str = "hidden_act") -> dict[str, Any]:
    """The options that all families have, from the keys of transformers 4 or 5."""
    if hf.get("quantization_config"):
        raise ValueError("quantization_config: quantized weights are not supported; take the full ones")
    rope = hf.get("rope_parameters") or {"rope_theta": hf["rope_theta"], **(hf.get("rope_scaling") or {})}
    local = None
    if "full_attention" in rope:  # layers with a window have their own
        local, rope = rope["sliding_attention"], rope["full_attention"]
        _check_off(local, "rope_type", "default")
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
        "rope_local_theta": local and float(local["rope_theta"]),
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
    if kind in ("default", "dynamic"):  # dynamic is another only beyond max_position_embeddings, where no text is read
        return None
    names = {
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        "longrope": ("short_factor",),
        "yarn": (),
    }.get(kind if isinstance(kind, str) else "")
    if names is None:
        known = "default, dynamic, linear, llama3, longrope, yarn"
        raise ValueError(f"RoPE scaling {kind!r} is not supported; supported: {known}")
    if absent := [name for name in names if rope.get(name) is None]:
        raise ValueError(f"RoPE scaling {kind!r} has no {', '.join(absent)}")
    if kind in ("linear", "llama3"):
        return RopeScaling(kind, **{name: rope[name] for name in names})
    first = _first_length(rope, hf)
    check_constants({"original_max_position_embeddings": first})
    factor, attention = rope.get("factor"), rope.get("attention_factor")
    check_constants({"factor": factor})
    stretched = hf["max_position_embeddings"] / first if factor is None or kind == "longrope" else factor
    if kind == "longrope":
        if attention is None:
            attention = math.sqrt(1 + math.log(stretched) / math.log(first)) if stretched > 1 else 1.0
        return RopeScaling(kind, short_factor=tuple(rope["short_factor"]), attention_factor=attention)
    if attention is None:
        by, over = rope.get("mscale"), rope.get("mscale_all_dim")
        log = 0.1 * math.log(max(stretched, 1))
        attention = (by * log + 1) / (over * log + 1) if by and over else log + 1
    given = {name: rope[name] for name in ("beta_fast", "beta_slow") if rope.get(name)}
    truncate = rope.get("truncate", True)
    scaling = {"original_max_position_embeddings": first, "attention_factor": attention, "truncate": truncate}
    return RopeScaling(kind, factor=stretched, **scaling, **given)


def _first_length(rope: HF, hf: HF) -> Any:
    """The length that a longrope or yarn model was first trained at."""
    name = "original_max_position_embeddings"
    return rope.get(name) or hf.get(name) or hf["max_position_embeddings"]


def _window_of_each(hf: HF) -> list[int | None]:
    """The window of each layer; without `layer_types` all layers have one window."""
    window = hf.get("sliding_window")
    kinds = hf.get("layer_types") or ["sliding_attention"] * hf["num_hidden_layers"]
    if unknown := [kind for kind in kinds if kind not in ("sliding_attention", "full_attention")]:
        raise ValueError(f"layer_types has {unknown[0]!r}; supported: sliding_attention, full_attention")
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _pattern(each: Sequence[Any]) -> tuple[Any, ...]:
    """The shortest pattern that the layers repeat."""
    count = len(each)
    period = next(p for p in range(1, count + 1) if count % p == 0 and list(each) == [*each[:p]] * (count // p))
    return tuple(each[:period])


def _windows(hf: HF) -> tuple[int | None, ...]:
    return _pattern(_window_of_each(hf))


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


def _gemma(hf: HF, *, windows: tuple = (None,), act: str = "hidden_act", **options: Any) -> ModelConfig:
    _check_off(hf, "use_bidirectional_attention")
    options |= dict.fromkeys(("qkv_bias", "output_bias"), bool(hf.get("attention_bias")))
    options |= {"norm": "rms+1", "embedding_scale": math.sqrt(hf["hidden_size"])}
    return ModelConfig(**_options(hf, windows=windows, act=act), **options)


def _gemma2(hf: HF, **options: Any) -> ModelConfig:
    check_constants({"query_pre_attn_scalar": hf["query_pre_attn_scalar"]})
    return _gemma(
        hf,
        windows=_windows(hf),
        act="hidden_activation",
        post_norms=True,
        query_scale=hf["query_pre_attn_scalar"] ** -0.5,
        attention_softcap=hf.get("attn_logit_softcapping"),
        logit_softcap=hf.get("final_logit_softcapping"),
        **options,
    )


def _gemma3(hf: HF) -> ModelConfig:
    _check_off(hf, "attn_logit_softcapping", None)  # transformers ignores it
    return _gemma2(hf, qk_norm=True)


def _glm(hf: HF, post_norms: bool = False) -> ModelConfig:
    bias = bool(hf.get("attention_bias"))
    return ModelConfig(**_options(hf), qkv_bias=bias, rope_interleaved=True, post_norms=post_norms)


def _glm4(hf: HF) -> ModelConfig:
    return _glm(hf, post_norms=True)


def _granite(hf: HF) -> ModelConfig:
    names = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
    check_constants({name: hf[name] for name in names})
    embedding, residual, attention, logits = (float(hf[name]) for name in names)
    scales = {"embedding_scale": embedding, "residual_scale": residual, "query_scale": attention}
    return dataclasses.replace(_llama(hf), **scales, logit_scale=1 / logits)


def _ministral(hf: HF) -> ModelConfig:
    return ModelConfig(**_options(hf, windows=_windows(hf)))


def _ministral3(hf: HF) -> ModelConfig:
    rope, config = hf["rope_parameters"], _mistral(hf)
    beta, length = rope.get("llama_4_scaling_beta"), _first_length(rope, hf)
    return dataclasses.replace(config, query_growth=(float(beta), length) if beta else None)


def _olmo2(hf: HF) -> ModelConfig:
    bias = bool(hf.get("attention_bias"))
    norms: dict[str, Any] = {"pre_norms": False, "post_norms": True, "qk_norm": True, "qk_norm_whole": True}
    return ModelConfig(**_options(hf), qkv_bias=bias, output_bias=bias, **norms)


def _olmo3(hf: HF) -> ModelConfig:
    config = _olmo2(hf)
    local = config.rope_local_theta or config.rope_theta  # transformers 5.0 has one RoPE, and scales it without windows
    return dataclasses.replace(config, windows=_windows(hf), rope_local_theta=local)


def _seed_oss(hf: HF) -> ModelConfig:
    return dataclasses.replace(_llama(hf), output_bias=bool(hf.get("attention_out_bias")))


def _smollm3(hf: HF) -> ModelConfig:
    each = zip(_window_of_each(hf), map(bool, hf["no_rope_layers"]), strict=True)  # 1 is a layer with RoPE
    windows, rope_layers = zip(*_pattern(list(each)), strict=True)
    return dataclasses.replace(_llama(hf), windows=windows, rope_layers=rope_layers)


def _mixtral(hf: HF) -> ModelConfig:
    options = _options(hf, windows=(hf.get("sliding_window"),))
    return ModelConfig(**options, num_experts=hf["num_local_experts"], experts_per_token=hf["num_experts_per_tok"])


def _qwen3_moe(hf: HF) -> ModelConfig:
    _check_off(hf, "decoder_sparse_step", 1)  # a layer without experts would need another tree of parameters
    _check_off(hf, "mlp_only_layers", [])
    experts = hf.get("num_local_experts", hf.get("num_experts"))  # transformers 5.0 has the second name
    check_constants({"num_local_experts": experts, "moe_intermediate_size": hf["moe_intermediate_size"]})
    window = hf.get("sliding_window") if hf.get("use_sliding_window") else None
    return dataclasses.replace(
        _qwen3({**hf, "sliding_window": window}),
        intermediate_size=hf["moe_intermediate_size"],
        num_experts=experts,
        experts_per_token=hf["num_experts_per_tok"],
        normed_shares=bool(hf["norm_topk_prob"]),
    )


def _gpt_oss(hf: HF) -> ModelConfig:
    if (hf.get("quantization_config") or {}).get("quant_method") == "mxfp4":  # mxfp4.py reads it
        hf = {**hf, "quantization_config": None}
    alpha, limit = hf.get("swiglu_alpha", 1.702), hf.get("swiglu_limit", 7.0)  # older transformers has no such keys
    check_constants({"swiglu_alpha": alpha, "swiglu_limit": limit})
    return dataclasses.replace(
        _llama({**hf, "mlp_bias": True}),
        windows=_windows(hf),
        sinks=True,
        clamp=(float(alpha), float(limit)),
        num_experts=hf["num_local_experts"],
        experts_per_token=hf["num_experts_per_tok"],
    )


class Family(NamedTuple):
    architecture: str  # its class in transformers and vLLM
    config: Callable[[HF], ModelConfig]
    names: dict[str, Tensor]  # by our path; entries that a model does not have are ignored


FAMILIES: dict[str, Family] = {
    "gemma": Family("GemmaForCausalLM", _gemma, LLAMA),
    "gemma2": Family("Gemma2ForCausalLM", _gemma2, GEMMA2),
    "gemma3_text": Family("Gemma3ForCausalLM", _gemma3, GEMMA2),
    "glm": Family("GlmForCausalLM", _glm, GLM),
    "glm4": Family("Glm4ForCausalLM", _glm4, GLM4),
    "gpt_oss": Family("GptOssForCausalLM", _gpt_oss, GPT_OSS),
    "granite": Family("GraniteForCausalLM", _granite, LLAMA),
    "llama": Family("LlamaForCausalLM", _llama, LLAMA),
    "ministral": Family("MinistralForCausalLM", _ministral, LLAMA),
    "ministral3": Family("Ministral3ForCausalLM", _ministral3, LLAMA),
    "mistral": Family("MistralForCausalLM", _mistral, LLAMA),
    "mixtral": Family("MixtralForCausalLM", _mixtral, MIXTRAL),
    "olmo2": Family("Olmo2ForCausalLM", _olmo2, OLMO2),
    "olmo3": Family("Olmo3ForCausalLM", _olmo3, OLMO2),
    "phi": Family("PhiForCausalLM", _phi, PHI),
    "phi3": Family("Phi3ForCausalLM", _phi3, PHI3),
    "qwen2": Family("Qwen2ForCausalLM", _qwen2, LLAMA),
    "qwen3": Family("Qwen3ForCausalLM", _qwen3, LLAMA),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", _qwen3_moe, QWEN3_MOE),
    "seed_oss": Family("SeedOssForCausalLM", _seed_oss, LLAMA),
    "smollm3": Family("SmolLM3ForCausalLM", _smollm3, LLAMA),
}


def text_part(hf: HF) -> HF:
    """The config of a multimodal model's language model, if its family is supported; else `hf` itself."""
    text = hf.get("text_config")
    if isinstance(text, Mapping) and text.get("model_type") in FAMILIES and hf.get("model_type") not in FAMILIES:
        return text
    return hf


def family(hf: HF) -> Family:
    """The family of a config.json.

    Raises:
        ValueError: the family is not supported. The message names those that are, and the first key that none has.
    """
    name = hf.get("model_type")
    if isinstance(name, str) and name in FAMILIES:
        return FAMILIES[name]
    text = hf.get("text_config")
    text = text if isinstance(text, Mapping) else {}
    part = f" with the text part {text.get('model_type')!r}" if text else ""
    message = f"model_type {name!r}{part} is not supported; supported: {', '.join(FAMILIES)}"
    if recurrent := [key for key in (*hf, *text) if key.startswith(_RECURRENT)]:
        raise ValueError(f"{message}. It has layers that are no attention ({recurrent[0]}): linear attention or Mamba")
    from transformers import CONFIG_MAPPING

    known = {"model_type", *TRANSFORMERS_4}.union(
        *(CONFIG_MAPPING[each]().to_dict() for each in FAMILIES if each in CONFIG_MAPPING)
    )
    unknown = [f"; the first key that none of them knows is {key!r}" for key in text or hf if key not in known]
    raise ValueError(message + "".join(unknown[:1]))


def model_config(hf: HF) -> ModelConfig:
    """The architecture in a config.json; ValueError names the key of what is unsupported or impossible."""
    return family(hf).config(hf)
