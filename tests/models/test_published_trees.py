"""Directories as the hub has them: the files of published models around small random weights.

Only the sizes of the matrices, the number of layers and the tokenizer are not the published ones: config.json has the
published keys in their published form, with token ids and vocabulary, and the other files have the published names.
"""

import json
import re
import warnings
from typing import Any, NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from torch_reference import torch_logits

import spin_jax
from spin_jax import tiny
from spin_jax.models import loading
from spin_jax.storage import files

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

TOKENS = np.arange(3, 43)[None]
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
# Most of the files that transformers 4 wrote; `_4` is how it wrote config.json.
TOKENIZER = "tokenizer.json tokenizer_config.json special_tokens_map.json"
CARD = ".gitattributes README.md"
BPE = "merges.txt vocab.json"
_4 = {"attention_dropout": 0.0, "initializer_range": 0.02, "torch_dtype": "bfloat16", "use_cache": True}
_4 |= {"hidden_act": "silu"}
NOT_READ = r"\d+ tensors are not part of this model, and are not read: multi_modal_projector"
PREFIX = "names begin with 'language_model.model.' instead of 'model.'"


class Published(NamedTuple):
    """A repository of the hub."""

    config: dict[str, Any]
    files: str
    tensor: str  # the name of one in the weight files
    generation: dict[str, Any] | None = None
    sharded: bool = True
    head_too: bool = False  # the tied head is stored beside the embedding
    notes: tuple[str, ...] = ()


Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
PUBLISHED = {
    "meta-llama/Llama-3.1-8B-Instruct": Published(
        _4
        | HEADS
        | {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "bos_token_id": 128000,
            "eos_token_id": [128001, 128008, 128009],
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "model_type": "llama",
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
            "transformers_version": "4.42.3",
            "vocab_size": 128256,
        },
        f"{CARD} LICENSE USE_POLICY.md {TOKENIZER} original/consolidated.00.pth original/params.json "
        "original/tokenizer.model",
        Q_PROJ,
        {
            "bos_token_id": 128000,
            "do_sample": True,
            "eos_token_id": [128001, 128008, 128009],
            "temperature": 0.6,
            "top_p": 0.9,
            "transformers_version": "4.42.3",
        },
    ),
    "HuggingFaceTB/SmolLM2-135M-Instruct": Published(
        _4
        | {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_size": 36,
            "initializer_range": 0.041666666666666664,
            "is_llama_config": True,
            "max_position_embeddings": 8192,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "pad_token_id": 2,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_interleaved": False,
            "rope_scaling": None,
            "rope_theta": 100000,
            "tie_word_embeddings": True,
            "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
            "transformers_version": "4.42.3",
            "vocab_size": 49152,
        },
        f"{CARD} {TOKENIZER} {BPE} all_results.json eval_results.json train_results.json trainer_state.json "
        "training_args.bin onnx/model.onnx",
        Q_PROJ,
        {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "transformers_version": "4.42.3"},
        sharded=False,
    ),
    "mistralai/Mistral-7B-Instruct-v0.3": Published(
        _4
        | HEADS
        | {
            "architectures": ["MistralForCausalLM"],
            "bos_token_id": 1,
            "eos_token_id": 2,
            "max_position_embeddings": 32768,
            "model_type": "mistral",
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "transformers_version": "4.42.0.dev0",
            "vocab_size": 32768,
        },
        f"{CARD} {TOKENIZER} consolidated.safetensors params.json tokenizer.model tokenizer.model.v3",
        Q_PROJ,
        {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "transformers_version": "4.42.0.dev0"},
    ),
    "mistralai/Mistral-Small-3.1-24B-Instruct-2503": Published(
        {
            "architectures": ["Mistral3ForConditionalGeneration"],
            "image_token_index": 10,
            "model_type": "mistral3",
            "multimodal_projector_bias": False,
            "projector_hidden_act": "gelu",
            "spatial_merge_size": 2,
            "text_config": {
                **HEADS,
                "attention_dropout": 0.0,
                "head_dim": 8,
                "hidden_act": "silu",
                "initializer_range": 0.02,
                "max_position_embeddings": 131072,
                "model_type": "mistral",
                "rms_norm_eps": 1e-05,
                "rope_theta": 1000000000.0,
                "sliding_window": None,
                "use_cache": True,
                "vocab_size": 131072,
            },
            "torch_dtype": "bfloat16",
            "transformers_version": "4.50.0.dev0",
            "vision_config": {
                "attention_dropout": 0.0,
                "head_dim": 8,
                "hidden_act": "silu",
                "image_size": 1540,
                "model_type": "pixtral",
                "num_attention_heads": 2,
                "num_channels": 3,
                "patch_size": 14,
                "rope_theta": 10000.0,
            },
            "vision_feature_layer": -1,
        },
        f"{CARD} {TOKENIZER} SYSTEM_PROMPT.txt chat_template.json consolidated.safetensors params.json "
        "preprocessor_config.json processor_config.json tekken.json",
        f"language_model.{Q_PROJ}",
        {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "transformers_version": "4.50.0.dev0"},
        notes=(PREFIX, NOT_READ),
    ),
    "mistralai/Mixtral-8x7B-Instruct-v0.1": Published(
        _4
        | HEADS
        | {
            "architectures": ["MixtralForCausalLM"],
            "bos_token_id": 1,
            "eos_token_id": 2,
            "max_position_embeddings": 32768,
            "model_type": "mixtral",
            "num_experts_per_tok": 2,
            "num_local_experts": 8,
            "output_router_logits": False,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.02,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "transformers_version": "4.36.0.dev0",
            "vocab_size": 32000,
        },
        f"{CARD} {TOKENIZER} consolidated.00.pt consolidated.01.pt tokenizer.model",
        "model.layers.0.block_sparse_moe.experts.7.w1.weight",
        {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "transformers_version": "4.36.0.dev0"},
    ),
    "Qwen/Qwen2.5-7B-Instruct": Published(
        _4
        | HEADS
        | {
            "architectures": ["Qwen2ForCausalLM"],
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "max_position_embeddings": 32768,
            "max_window_layers": 28,
            "model_type": "qwen2",
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "sliding_window": 131072,
            "tie_word_embeddings": False,
            "transformers_version": "4.43.1",
            "use_sliding_window": False,
            "vocab_size": 152064,
        },
        f"{CARD} LICENSE tokenizer.json tokenizer_config.json {BPE}",
        "model.layers.0.self_attn.q_proj.bias",
        {
            "bos_token_id": 151643,
            "do_sample": True,
            "eos_token_id": [151645, 151643],
            "pad_token_id": 151643,
            "repetition_penalty": 1.05,
            "temperature": 0.7,
            "top_k": 20,
            "top_p": 0.8,
            "transformers_version": "4.37.0",
        },
    ),
    "Qwen/Qwen3-0.6B": Published(
        _4
        | HEADS
        | {
            "architectures": ["Qwen3ForCausalLM"],
            "attention_bias": False,
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "head_dim": 128,
            "max_position_embeddings": 40960,
            "max_window_layers": 28,
            "model_type": "qwen3",
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "transformers_version": "4.51.0",
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
        f"{CARD} LICENSE tokenizer.json tokenizer_config.json {BPE}",
        "model.layers.0.self_attn.q_norm.weight",
        {
            "bos_token_id": 151643,
            "do_sample": True,
            "eos_token_id": [151645, 151643],
            "pad_token_id": 151643,
            "temperature": 0.6,
            "top_k": 20,
            "top_p": 0.95,
            "transformers_version": "4.51.0",
        },
        sharded=False,
        head_too=True,
    ),
    "Qwen/Qwen3-30B-A3B": Published(
        _4
        | HEADS
        | {
            "architectures": ["Qwen3MoeForCausalLM"],
            "attention_bias": False,
            "bos_token_id": 151643,
            "decoder_sparse_step": 1,
            "eos_token_id": 151645,
            "head_dim": 128,
            "max_position_embeddings": 40960,
            "max_window_layers": 48,
            "mlp_only_layers": [],
            "model_type": "qwen3_moe",
            "moe_intermediate_size": 8,
            "norm_topk_prob": True,
            "num_experts": 16,
            "num_experts_per_tok": 8,
            "output_router_logits": False,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.001,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "transformers_version": "4.51.0",
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
        f"{CARD} LICENSE tokenizer.json tokenizer_config.json {BPE}",
        "model.layers.0.mlp.experts.15.gate_proj.weight",
        {"bos_token_id": 151643, "eos_token_id": [151645, 151643], "transformers_version": "4.51.0"},
    ),
    "google/gemma-2b-it": Published(
        _4
        | {
            "architectures": ["GemmaForCausalLM"],
            "attention_bias": False,
            "bos_token_id": 2,
            "eos_token_id": 1,
            "head_dim": 256,
            "hidden_act": "gelu",  # it means the tanh formula
            "max_position_embeddings": 8192,
            "model_type": "gemma",
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "pad_token_id": 0,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "transformers_version": "4.38.0.dev0",
            "vocab_size": 256000,
        },
        f"{CARD} {TOKENIZER} tokenizer.model",
        Q_PROJ,
        {
            "_from_model_config": True,
            "bos_token_id": 2,
            "eos_token_id": 1,
            "pad_token_id": 0,
            "transformers_version": "4.38.0.dev0",
        },
    ),
    "google/gemma-2-9b-it": Published(
        _4
        | HEADS
        | {
            "architectures": ["Gemma2ForCausalLM"],
            "attention_bias": False,
            "attn_logit_softcapping": 50.0,
            "bos_token_id": 2,
            "cache_implementation": "hybrid",
            "eos_token_id": 1,
            "final_logit_softcapping": 30.0,
            "head_dim": 256,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "max_position_embeddings": 8192,
            "model_type": "gemma2",
            "pad_token_id": 0,
            "query_pre_attn_scalar": 256,
            "rms_norm_eps": 1e-06,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "sliding_window_size": 4096,
            "transformers_version": "4.42.0.dev0",
            "vocab_size": 256000,
        },
        f"{CARD} {TOKENIZER} tokenizer.model",
        "model.layers.0.pre_feedforward_layernorm.weight",
        {
            "_from_model_config": True,
            "bos_token_id": 2,
            "cache_implementation": "hybrid",
            "eos_token_id": 1,
            "pad_token_id": 0,
            "transformers_version": "4.42.0.dev0",
        },
    ),
    "google/gemma-3-4b-it": Published(
        {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "boi_token_index": 255999,
            "eoi_token_index": 256000,
            "eos_token_id": [1, 106],
            "image_token_index": 262144,
            "initializer_range": 0.02,
            "mm_tokens_per_image": 256,
            "model_type": "gemma3",
            "text_config": {  # heads and vocabulary are not in it
                "model_type": "gemma3_text",
                "num_hidden_layers": 7,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
            },
            "torch_dtype": "bfloat16",
            "transformers_version": "4.50.0.dev0",
            "vision_config": {
                "image_size": 896,
                "model_type": "siglip_vision_model",
                "num_attention_heads": 2,
                "patch_size": 14,
                "vision_use_head": False,
            },
        },
        f"{CARD} {TOKENIZER} added_tokens.json chat_template.json preprocessor_config.json processor_config.json "
        "tokenizer.model",
        f"language_model.{Q_PROJ}",
        {
            "bos_token_id": 2,
            "cache_implementation": "hybrid",
            "do_sample": True,
            "eos_token_id": [1, 106],
            "pad_token_id": 0,
            "top_k": 64,
            "top_p": 0.95,
            "transformers_version": "4.50.0.dev0",
        },
        notes=(PREFIX, NOT_READ),
    ),
    "microsoft/phi-2": Published(
        {
            "_name_or_path": "microsoft/phi-2",
            "architectures": ["PhiForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": 50256,
            "embd_pdrop": 0.0,
            "eos_token_id": 50256,
            "hidden_act": "gelu_new",
            "hidden_size": 40,
            "initializer_range": 0.02,
            "layer_norm_eps": 1e-05,
            "max_position_embeddings": 2048,
            "model_type": "phi",
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "partial_rotary_factor": 0.4,
            "qk_layernorm": False,
            "resid_pdrop": 0.1,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            "transformers_version": "4.37.0",
            "use_cache": True,
            "vocab_size": 51200,
        },
        f"{CARD} LICENSE NOTICE.md SECURITY.md CODE_OF_CONDUCT.md {TOKENIZER} {BPE} added_tokens.json",
        "model.layers.0.mlp.fc1.weight",
        {"_from_model_config": True, "bos_token_id": 50256, "eos_token_id": 50256, "transformers_version": "4.37.0"},
    ),
    "microsoft/Phi-3-mini-128k-instruct": Published(
        _4
        | {
            "_name_or_path": "Phi-3-mini-128k-instruct",
            "architectures": ["Phi3ForCausalLM"],
            "attention_bias": False,
            "auto_map": {
                "AutoConfig": "configuration_phi3.Phi3Config",
                "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
            },
            "bos_token_id": 1,
            "embd_pdrop": 0.0,
            "eos_token_id": 32000,
            "hidden_size": 32,
            "max_position_embeddings": 131072,
            "model_type": "phi3",
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "original_max_position_embeddings": 4096,
            "pad_token_id": 32000,
            "resid_pdrop": 0.0,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "long_factor": [1.07, 1.12, 4.84, 64.29],
                "short_factor": [1.1, 1.1, 1.3, 2.44],
                "type": "longrope",
            },
            "rope_theta": 10000.0,
            "sliding_window": 262144,
            "tie_word_embeddings": False,
            "transformers_version": "4.40.2",
            "vocab_size": 32064,
        },
        f"{CARD} LICENSE NOTICE.md SECURITY.md CODE_OF_CONDUCT.md {TOKENIZER} added_tokens.json configuration_phi3.py "
        "modeling_phi3.py sample_finetune.py tokenizer.model",
        "model.layers.0.self_attn.qkv_proj.weight",
        {
            "_from_model_config": True,
            "bos_token_id": 1,
            "eos_token_id": [32000, 32001, 32007],
            "pad_token_id": 32000,
            "transformers_version": "4.40.2",
        },
        notes=(r"texts of up to 4096 tokens \(original_max_position_embeddings\) are read, not of 131072",),
    ),
    "HuggingFaceTB/SmolLM3-3B": Published(
        _4
        | HEADS
        | {
            "architectures": ["SmolLM3ForCausalLM"],
            "attention_bias": False,
            "bos_token_id": 128000,
            "eos_token_id": 128012,
            "layer_types": ["full_attention"] * 4,
            "max_position_embeddings": 65536,
            "max_window_layers": 28,
            "mlp_bias": False,
            "model_type": "smollm3",
            "no_rope_layer_interval": 4,
            "no_rope_layers": [1, 1, 1, 0],
            "num_hidden_layers": 4,
            "pad_token_id": 128004,
            "pretraining_tp": 2,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 5000000.0,
            "sliding_window": None,
            "transformers_version": "4.54.0.dev0",
            "use_cache": False,
            "use_sliding_window": False,
            "vocab_size": 128256,
        },
        f"{CARD} {TOKENIZER} chat_template.jinja",
        Q_PROJ,
        {
            "bos_token_id": 128000,
            "do_sample": True,
            "eos_token_id": 128012,
            "pad_token_id": 128004,
            "temperature": 0.6,
            "top_p": 0.95,
            "transformers_version": "4.54.0.dev0",
        },
    ),
    "allenai/OLMo-2-1124-7B-Instruct": Published(
        _4
        | HEADS
        | {
            "_name_or_path": "allenai/open_instruct_dev",
            "architectures": ["Olmo2ForCausalLM"],
            "attention_bias": False,
            "eos_token_id": 100257,
            "max_position_embeddings": 4096,
            "model_type": "olmo2",
            "pad_token_id": 100277,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 500000,
            "tie_word_embeddings": False,
            "transformers_version": "4.47.0",
            "use_cache": False,
            "vocab_size": 100352,
        },
        f"{CARD} {TOKENIZER} {BPE}",
        "model.layers.0.post_feedforward_layernorm.weight",
        {"_from_model_config": True, "eos_token_id": 100257, "pad_token_id": 100277, "transformers_version": "4.47.0"},
    ),
    "ibm-granite/granite-3.1-8b-instruct": Published(
        _4
        | HEADS
        | {
            "architectures": ["GraniteForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.1,
            "attention_multiplier": 0.0078125,
            "bos_token_id": 0,
            "embedding_multiplier": 12.0,
            "eos_token_id": 0,
            "logits_scaling": 16.0,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "model_type": "granite",
            "pad_token_id": 0,
            "residual_multiplier": 0.22,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
            "rope_theta": 10000000.0,
            "tie_word_embeddings": True,
            "transformers_version": "4.47.0",
            "vocab_size": 49155,
        },
        f"{CARD} {TOKENIZER} {BPE} added_tokens.json",
        Q_PROJ,
        {
            "_from_model_config": True,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": 0,
            "transformers_version": "4.47.0",
        },
    ),
    "THUDM/GLM-4-9B-0414": Published(
        _4
        | HEADS
        | {
            "architectures": ["Glm4ForCausalLM"],
            "attention_bias": False,
            "eos_token_id": [151329, 151336, 151338],
            "head_dim": 128,
            "max_position_embeddings": 32768,
            "model_type": "glm4",
            "pad_token_id": 151329,
            "partial_rotary_factor": 0.5,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "transformers_version": "4.52.0.dev0",
            "vocab_size": 151552,
        },
        f"{CARD} LICENSE tokenizer.json tokenizer_config.json",
        "model.layers.0.post_self_attn_layernorm.weight",
        {
            "_from_model_config": True,
            "eos_token_id": [151329, 151336, 151338],
            "pad_token_id": 151329,
            "transformers_version": "4.52.0.dev0",
        },
    ),
    "ByteDance-Seed/Seed-OSS-36B-Instruct": Published(
        _4
        | HEADS
        | {
            "architectures": ["SeedOssForCausalLM"],
            "attention_bias": True,
            "attention_dropout": 0.1,
            "attention_out_bias": False,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "head_dim": 128,
            "max_position_embeddings": 524288,
            "mlp_bias": False,
            "model_type": "seed_oss",
            "pad_token_id": 1,
            "residual_dropout": 0.1,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {"rope_type": "default"},
            "rope_theta": 10000000.0,
            "tie_word_embeddings": False,
            "transformers_version": "4.55.0",
            "vocab_size": 155136,
        },
        f"{CARD} {TOKENIZER} chat_template.jinja thinking_budget.png",
        "model.layers.0.self_attn.k_proj.bias",
        {
            "_from_model_config": True,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "pad_token_id": 1,
            "temperature": 1.1,
            "top_p": 0.95,
            "transformers_version": "4.55.0",
        },
    ),
    "openai/gpt-oss-20b": Published(
        {
            "architectures": ["GptOssForCausalLM"],
            "attention_bias": True,
            "attention_dropout": 0.0,
            "eos_token_id": 200002,
            "experts_per_token": 4,
            "head_dim": 64,
            "hidden_act": "silu",
            "hidden_size": 32,
            "initial_context_length": 4096,
            "initializer_range": 0.02,
            "intermediate_size": 64,
            "layer_types": ["sliding_attention", "full_attention"],
            "max_position_embeddings": 131072,
            "model_type": "gpt_oss",
            "num_attention_heads": 4,
            "num_experts_per_tok": 4,
            "num_key_value_heads": 2,
            "num_local_experts": 32,
            "output_router_logits": False,
            "pad_token_id": 199999,
            "quantization_config": {
                "modules_to_not_convert": [
                    "model.layers.*.self_attn",
                    "model.layers.*.mlp.router",
                    "model.embed_tokens",
                    "lm_head",
                ],
                "quant_method": "mxfp4",
            },
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "factor": 32.0,
                "original_max_position_embeddings": 4096,
                "rope_type": "yarn",
                "truncate": False,
            },
            "rope_theta": 150000,
            "router_aux_loss_coef": 0.9,
            "sliding_window": 128,
            "swiglu_limit": 7.0,
            "tie_word_embeddings": False,
            "transformers_version": "4.55.0.dev0",
            "use_cache": True,
            "vocab_size": 201088,
        },
        f"{CARD} LICENSE USAGE_POLICY {TOKENIZER} chat_template.jinja metal/model.bin original/config.json "
        "original/dtypes.json original/model.safetensors",
        "model.layers.0.mlp.experts.down_proj_scales",
        {
            "bos_token_id": 199998,
            "do_sample": True,
            "eos_token_id": [200002, 199999],
            "pad_token_id": 199999,
            "transformers_version": "4.55.0.dev0",
        },
        notes=("weights in MXFP4 are read as bfloat16, and exports have no quantized weights",),
    ),
    "written again by transformers 4.57, with two chat templates": Published(
        {name: value for name, value in _4.items() if name != "torch_dtype"}
        | HEADS
        | {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "bos_token_id": 128000,
            "dtype": "bfloat16",
            "eos_token_id": 128040,
            "head_dim": 8,
            "max_position_embeddings": 8192,
            "mlp_bias": False,
            "model_type": "llama",
            "pad_token_id": 128001,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {"factor": 4.0, "type": "linear"},
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
            "transformers_version": "4.57.1",
            "vocab_size": 128256,
        },
        f"{TOKENIZER} chat_template.jinja additional_chat_templates/tool_use.jinja training_args.bin",
        Q_PROJ,
    ),
}
if transformers.GemmaConfig(hidden_act="gelu").hidden_act == "gelu":  # older transformers takes it for the exact one
    del PUBLISHED["google/gemma-2b-it"]
if not hasattr(transformers.PhiConfig(), "pad_token_id"):  # transformers 5.0 cannot build it
    del PUBLISHED["microsoft/phi-2"]


@pytest.fixture(params=PUBLISHED)
def tree(request, tmp_path):
    """(what is published, the directory with it)."""
    one, directory = PUBLISHED[request.param], tmp_path / "model"
    directory.mkdir()
    parts = ("text_config", "vision_config")
    config = {**(SIZES if "text_config" not in one.config else {}), **one.config}
    config |= {part: {**SIZES, **config[part]} for part in parts if part in config}
    files.write_json(directory / "config.json", config)
    _write_weights(one, directory)
    files.write_json(directory / "config.json", config)
    if one.generation:
        files.write_json(directory / "generation_config.json", one.generation)
    _write_tokenizer(one, directory)
    for name in one.files.split():
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        if name == "consolidated.safetensors":
            save_file({"layers.0.attention.wq.weight": np.zeros((2, 2), np.float16)}, path)
        elif not path.exists():
            path.write_text("{}" if name.endswith(".json") else "#")
    named = {*one.files.split(), "config.json", *(["generation_config.json"] if one.generation else [])}
    others = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()} - named
    shards = r"model-\d{5}-of-\d{5}.safetensors|model.safetensors.index.json" if one.sharded else "model.safetensors"
    assert others
    assert all(re.fullmatch(shards, name) for name in others)
    return one, directory


def _write_weights(one: Published, directory):
    """Random weights in the dtype and under the names of the published ones."""
    config = transformers.AutoConfig.from_pretrained(directory)
    config.__dict__.pop("quantization_config", None)
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings  # Mistral 3's two parts differ there
    torch.manual_seed(0)
    model = getattr(transformers, one.config["architectures"][0])(config)
    around_zero = ("bias", *(["weight"] if "gemma" in config.model_type else []))  # Gemma's norms add 1
    for name, weight in model.named_parameters():
        limits = (-0.5, 0.5) if name.endswith(around_zero) else (0.5, 1.5)
        _ = torch.nn.init.uniform_(weight, *limits) if weight.ndim == 1 else torch.nn.init.normal_(weight, 0, 0.3)
    model = model.to(getattr(torch, one.config.get("torch_dtype", "bfloat16")))
    model.save_pretrained(directory, max_shard_size="1MB" if one.sharded else "1GB")
    (directory / "generation_config.json").unlink(missing_ok=True)
    if one.head_too:
        path = directory / "model.safetensors"
        tensors = load_file(path)
        save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, path, {"format": "pt"})
    if "quantization_config" in one.config:
        _quantize(directory)
    names = {name for path in directory.glob("*.safetensors") for name in load_file(path)}
    assert one.tensor in names


def _quantize(directory):
    """Random MXFP4 in place of the weights of experts."""
    rng, index = np.random.default_rng(0), files.read_json(directory / "model.safetensors.index.json")
    for path in directory.glob("*.safetensors"):
        tensors = load_file(path)
        for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
            experts, inputs, outputs = tensors.pop(name).shape
            tensors[f"{name}_blocks"] = rng.integers(0, 256, (experts, outputs, inputs // 32, 16), np.uint8)
            tensors[f"{name}_scales"] = rng.integers(122, 126, (experts, outputs, inputs // 32), np.uint8)
            file = index["weight_map"].pop(name)
            index["weight_map"] |= {f"{name}_blocks": file, f"{name}_scales": file}
        save_file(tensors, path, {"format": "pt"})
    files.write_json(directory / "model.safetensors.index.json", index)


def _write_tokenizer(one: Published, directory):
    """The tiny tokenizer, with the chat templates where the published files have them."""
    tokenizer = tiny.tokenizer()
    apart = "chat_template.jinja" in one.files
    if "additional_chat_templates" in one.files:
        tokenizer.chat_template = {"default": tiny.CHAT_TEMPLATE, "tool_use": tiny.CHAT_TEMPLATE + "{{ tools }}"}
    tokenizer.save_pretrained(directory, save_jinja_files=apart)
    special = {name: {"content": token, "lstrip": False} for name, token in tokenizer.special_tokens_map.items()}
    if "special_tokens_map.json" in one.files:
        files.write_json(directory / "special_tokens_map.json", special)


def test_a_published_directory(tree, mesh, tmp_path):
    """It gives transformers' logits (float32, 1e-4), the expected notes, its stop tokens, and an export that opens."""
    one, directory = tree
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = spin_jax.load(str(directory), mesh=mesh, dtype="float32")
    said = [str(warning.message) for warning in said if warning.category is UserWarning]
    said = [note for note in said if "makes other tokens" not in note]  # the tiny tokenizer is not the published one
    assert len(said) == len(one.notes), said
    for note, pattern in zip(said, one.notes, strict=True):
        assert re.search(pattern, note)

    how = {"dtype": torch.float32, "attn_implementation": "eager"}
    reference = getattr(transformers, one.config["architectures"][0]).from_pretrained(directory, **how).float()
    expected = torch_logits(reference, TOKENS)
    np.testing.assert_allclose(np.asarray(spin_jax.logits(model, TOKENS)), expected, atol=1e-4)

    eos = (one.generation or one.config)["eos_token_id"]
    assert {*(eos if isinstance(eos, list) else [eos])} <= {*model.stop_tokens}
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    assert model.tokenizer.chat_template == theirs.chat_template

    spin_jax.save(model, tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", **how)
    np.testing.assert_allclose(torch_logits(again, TOKENS), expected, atol=1e-5)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {"auto_map", "_name_or_path", "quantization_config"} & written.keys()
    assert loading.describe(str(tmp_path / "out"))[0].config == model.config


@pytest.mark.parametrize("name", ["written again by transformers 4.57, with two chat templates", *list(PUBLISHED)[:4]])
def test_the_hub_gives_what_is_read(name, monkeypatch):
    """Weights in other layouts and other software's files stay there; all chat templates come along."""
    from huggingface_hub.utils import filter_repo_objects

    asked = []

    def snapshot_download(path, revision, allow_patterns, ignore_patterns):
        there = [*PUBLISHED[name].files.split(), "config.json", "generation_config.json", "model.safetensors"]
        asked.extend(filter_repo_objects(there, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        return f"snapshots/{path}"

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    loading.resolve("owner/model")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {*asked}
    assert {other for other in asked if "consolidated" in other or "/" in other} == {
        other for other in PUBLISHED[name].files.split() if other.startswith("additional_chat_templates/")
    }
