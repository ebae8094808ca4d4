"""Hugging Face checkpoints ↔ our parameters, by one table read both ways.

A checkpoint is a directory (or hub id) of config.json, safetensors in one file or several with an
index, generation_config.json, tokenizer files and chat template. Weights are memory-mapped and each
device's part is copied out of the map, so the model never stands twice in host memory.

To add a family: a name table in `TABLES`, and a mapping of its config in `CONFIGS`.
"""

import dataclasses
import json
import os
import re
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from etils import epath
from safetensors import numpy as safetensors_numpy

from spin_jax import files, hosts, sharding
from spin_jax.model import Model, ModelConfig, Params, RopeScaling, abstract_params

# --- names ---------------------------------------------------------------------------------------


class Tensor(NamedTuple):
    """Where a parameter stands in a checkpoint.

    A linear layer is [out, in] there and [*in, *out] here; `inputs` counts our input dimensions.
    Zero inputs: stored alike.
    """

    name: str
    inputs: int = 0


LLAMA: dict[str, Tensor] = {
    "embed": Tensor("model.embed_tokens.weight"),
    "layers/attention_norm/scale": Tensor("model.layers.{layer}.input_layernorm.weight"),
    "layers/attention/wq": Tensor("model.layers.{layer}.self_attn.q_proj.weight", 1),
    "layers/attention/wk": Tensor("model.layers.{layer}.self_attn.k_proj.weight", 1),
    "layers/attention/wv": Tensor("model.layers.{layer}.self_attn.v_proj.weight", 1),
    "layers/attention/wo": Tensor("model.layers.{layer}.self_attn.o_proj.weight", 2),
    "layers/mlp_norm/scale": Tensor("model.layers.{layer}.post_attention_layernorm.weight"),
    "layers/mlp/gate": Tensor("model.layers.{layer}.mlp.gate_proj.weight", 1),
    "layers/mlp/up": Tensor("model.layers.{layer}.mlp.up_proj.weight", 1),
    "layers/mlp/down": Tensor("model.layers.{layer}.mlp.down_proj.weight", 1),
    "final_norm/scale": Tensor("model.norm.weight"),
    "head": Tensor("lm_head.weight", 1),
}
TABLES = {"mistral": LLAMA, "llama": LLAMA}


def _hf_shape(tensor: Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    if not tensor.inputs:
        return shape
    return (int(np.prod(shape[tensor.inputs :])), int(np.prod(shape[: tensor.inputs])))


def _from_hf(tensor: Tensor, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Our view of a checkpoint's array: nothing is copied until it is sliced."""
    return array.T.reshape(shape) if tensor.inputs else array


def _to_hf(tensor: Tensor, array: np.ndarray) -> np.ndarray:
    if not tensor.inputs:
        return array
    out, inputs = _hf_shape(tensor, array.shape)
    return np.ascontiguousarray(array.reshape(inputs, out).T)


def _flatten(tree: Params) -> dict[str, Any]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(str(key.key) for key in path): leaf for path, leaf in flat}


def _unflatten(flat: Mapping[str, Any]) -> Params:
    tree: Params = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


# --- configs -------------------------------------------------------------------------------------


def _rope_scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", float(rope["factor"]))
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            float(rope["factor"]),
            float(rope["low_freq_factor"]),
            float(rope["high_freq_factor"]),
            int(rope["original_max_position_embeddings"]),
        )
    raise ValueError(f"RoPE scaling {kind!r} is not supported; supported: default, linear, llama3")


def _llama_config(hf: Mapping[str, Any]) -> ModelConfig:
    """Maps config.json of Llama and Mistral, with the keys of transformers 4 or 5."""
    for key, supported in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
        if hf.get(key, supported) != supported:
            raise ValueError(f"config.json: {key}={hf[key]!r} is not supported (only {supported!r})")
    rope = hf.get("rope_parameters") or {
        "rope_theta": hf["rope_theta"],
        **(hf.get("rope_scaling") or {}),
    }
    heads = hf["num_attention_heads"]
    return ModelConfig(
        model_type=hf["model_type"],
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        intermediate_size=hf["intermediate_size"],
        num_hidden_layers=hf["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
        rms_norm_eps=hf["rms_norm_eps"],
        rope_theta=float(rope["rope_theta"]),
        rope_scaling=_rope_scaling(rope),
        sliding_window=hf.get("sliding_window") if hf["model_type"] == "mistral" else None,
        tie_word_embeddings=bool(hf["tie_word_embeddings"]),
        max_position_embeddings=hf["max_position_embeddings"],
        initializer_range=hf["initializer_range"],
    )


CONFIGS: dict[str, Callable[[Mapping[str, Any]], ModelConfig]] = {
    "mistral": _llama_config,
    "llama": _llama_config,
}


def model_config(hf: Mapping[str, Any]) -> ModelConfig:
    """The architecture in a config.json (as a dict, transformers' defaults filled in).

    Raises:
        ValueError: the family, or an option of it, is not supported.
    """
    family = hf.get("model_type")
    if family not in CONFIGS:
        raise ValueError(f"model_type {family!r} is not supported; supported: {', '.join(CONFIGS)}")
    return CONFIGS[family](hf)


def _read_hf_config(directory: Path) -> dict[str, Any]:
    """config.json, with defaults and key changes between versions left to transformers."""
    from transformers import AutoConfig

    path = directory / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: is {directory} a Hugging Face checkpoint?")
    raw = files.read_json(path)
    if raw.get("model_type") not in CONFIGS:
        model_config(raw)  # raises, naming what is supported
    full = AutoConfig.from_pretrained(directory, trust_remote_code=False).to_dict()
    # A window that is written off (`use_sliding_window: false`) and one that is absent differ.
    if "sliding_window" in raw:
        full["sliding_window"] = raw["sliding_window"]
    full["dtype"] = raw.get("dtype", raw.get("torch_dtype"))
    full["architectures"] = raw.get("architectures")
    return full


# --- reading -------------------------------------------------------------------------------------

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_MAX_HEADER = 100 * 2**20


def _map_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Memory-maps every tensor of a safetensors file; ValueError says what is wrong with the file."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        if start.startswith(b"version "):
            raise ValueError(f"{path} is a git-lfs pointer, not the weights: run `git lfs pull`")
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else _MAX_HEADER + 1
        if length > min(_MAX_HEADER, size - 8):
            raise ValueError(f"{path} ({size} bytes) is truncated or not a safetensors file")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise ValueError(f"{path} has a damaged header: {error}") from error
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        if entry["dtype"] not in _DTYPES:
            continue  # buffers of integers and the like are not parameters
        if 8 + length + last > size:
            raise ValueError(f"{path} is truncated: {name} ends past its {size} bytes")
        tensors[name] = np.memmap(
            path, _DTYPES[entry["dtype"]], "r", 8 + length + first, tuple(entry["shape"])
        )
    return tensors


def _map_checkpoint(directory: Path) -> dict[str, np.ndarray]:
    index = directory / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(files.read_json(index)["weight_map"].values()))
        if any("/" in name or name.startswith("..") for name in names):
            raise ValueError(f"{index} names files outside of its directory")
    elif (directory / "model.safetensors").exists():
        names = ["model.safetensors"]
    else:
        pickles = [p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth")]
        hint = f" ({pickles[0]} is a pickle, which is not read: convert it to safetensors)" if pickles else ""
        raise FileNotFoundError(f"{directory} has no model.safetensors{hint}")
    if missing := [name for name in names if not (directory / name).exists()]:
        raise FileNotFoundError(f"{directory}: {index.name} names {', '.join(missing)}, not there")
    tensors: dict[str, np.ndarray] = {}
    for name in names:
        tensors.update(_map_safetensors(directory / name))
    return tensors


def _check(flat: Mapping[str, Any], table: Mapping[str, Tensor], tensors: Mapping[str, np.ndarray]) -> None:
    """One error that lists everything missing or misshapen."""
    problems = []
    for path, leaf in flat.items():
        shape = leaf.shape[1:] if path.startswith("layers/") else leaf.shape
        wanted = _hf_shape(table[path], shape)
        for name in _names(path, table[path], leaf):
            if name not in tensors:
                problems.append(f"{name}: missing")
            elif tensors[name].shape != wanted:
                problems.append(f"{name}: {tensors[name].shape}, and config.json asks for {wanted}")
    if problems:
        shown = "\n  ".join(problems[:20])
        more = f"\n  … and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ValueError(f"the weights do not match config.json:\n  {shown}{more}")


def _names(path: str, tensor: Tensor, leaf: Any) -> list[str]:
    """The checkpoint's tensors behind one of our leaves: one, or one a layer."""
    if not path.startswith("layers/"):
        return [tensor.name]
    return [tensor.name.format(layer=layer) for layer in range(leaf.shape[0])]


def _load_leaf(path: str, tensor: Tensor, leaf: Any, tensors, layout, dtype) -> jax.Array:
    """Builds one parameter; every device copies only its own part out of the memory map."""
    stacked = path.startswith("layers/")
    shape = leaf.shape[1:] if stacked else leaf.shape
    views = [_from_hf(tensor, tensors[name], shape) for name in _names(path, tensor, leaf)]
    dtype = dtype or jnp.result_type(*(view.dtype for view in views))

    def part(index: Any) -> np.ndarray:
        if not stacked:
            return np.asarray(views[0][index]).astype(dtype)
        chosen = views[index[0]]
        first = chosen[0][index[1:]]
        out = np.empty((len(chosen), *first.shape), dtype)
        for row, view in zip(out, chosen, strict=True):
            row[...] = view[index[1:]]
        return out

    return jax.make_array_from_callback(leaf.shape, layout, part, dtype=dtype)


def check_weights(directory: epath.PathLike, config: ModelConfig) -> None:
    """Reads the headers of a checkpoint's files; raises what `load_params` would."""
    flat = _flatten(sharding.unboxed(abstract_params(config)))
    _check(flat, TABLES[config.model_type], _map_checkpoint(Path(directory)))


def load_params(
    directory: epath.PathLike, config: ModelConfig, mesh: jax.sharding.Mesh, dtype: Any = None
) -> Params:
    """Reads a checkpoint's weights into the mesh's layout.

    Args:
        directory: holds model.safetensors, or model.safetensors.index.json and its files.
        config: the architecture they must match.
        mesh: where they go.
        dtype: of the parameters; None keeps each as it is in the checkpoint.

    Raises:
        ValueError, FileNotFoundError: everything that is missing or misshapen, in one message.
    """
    tensors, table = _map_checkpoint(Path(directory)), TABLES[config.model_type]
    abstract = abstract_params(config)
    flat = _flatten(sharding.unboxed(abstract))
    layouts = _flatten(sharding.parameter_shardings(mesh, abstract))
    _check(flat, table, tensors)
    dtype = None if dtype is None else jnp.dtype(dtype)
    return _unflatten(
        {
            path: _load_leaf(path, table[path], leaf, tensors, layouts[path], dtype)
            for path, leaf in flat.items()
        }
    )


def resolve(path: str, revision: str | None = None) -> tuple[Path, str | None]:
    """A local directory for a path or hub id, and the commit it is pinned to (None for a directory).

    A token for private repositories comes from the environment (HF_TOKEN), as huggingface_hub reads it.
    """
    if os.path.isdir(path):
        return Path(path), None
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) or ".." in path:
        raise FileNotFoundError(f"model path {path!r}: no such directory, and not a hub id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
    twice = ["consolidated*", "*/*"]  # the same weights in another layout
    try:
        snapshot = snapshot_download(path, revision=revision, allow_patterns=wanted, ignore_patterns=twice)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        pinned = f" at revision {revision}" if revision else ""
        raise FileNotFoundError(
            f"model path {path!r} is no directory here, and the hub did not give it{pinned}: {error}"
        ) from error
    return Path(snapshot), Path(snapshot).name


def load_tokenizer(path: epath.PathLike, chat_template: str | None = None) -> Any:
    """A fast tokenizer of a checkpoint directory, with another chat template where one is given.

    Args:
        path: holds tokenizer.json.
        chat_template: Jinja text, or the path of a file of it; None keeps the tokenizer's own.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise ValueError(f"{path}: this tokenizer has no tokenizer.json (a fast tokenizer is needed)")
    return with_chat_template(tokenizer, chat_template)


def with_chat_template(tokenizer: Any, chat_template: str | None) -> Any:
    if chat_template is not None:
        is_file = "{" not in chat_template and os.path.exists(chat_template)
        tokenizer.chat_template = Path(chat_template).read_text() if is_file else chat_template
    return tokenizer


def check_vocabulary(tokenizer: Any, config: ModelConfig, path: epath.PathLike) -> None:
    """Raises ValueError when the tokenizer knows ids that the embedding has no row for."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= config.vocab_size:
        raise ValueError(
            f"{path}: the tokenizer's largest id is {largest} and the embedding has {config.vocab_size} rows"
        )


def describe(
    path: str,
    revision: str | None = None,
    *,
    dtype: Any = None,
    mesh: jax.sharding.Mesh | None = None,
    chat_template: str | None = None,
) -> tuple[Model, Path]:
    """A checkpoint's model without its weights (`params` is empty), and its local directory."""
    directory, commit = resolve(path, revision)
    hf_config = _read_hf_config(directory)
    config = model_config(hf_config)
    tokenizer = load_tokenizer(directory, chat_template)
    check_vocabulary(tokenizer, config, path)
    generation = directory / "generation_config.json"
    model = Model(
        config=config,
        params={},
        tokenizer=tokenizer,
        dtype=jnp.dtype(dtype or hf_config["dtype"] or jnp.float32),
        mesh=mesh or sharding.make_mesh(),
        hf_config=hf_config,
        generation_config=files.read_json(generation) if generation.exists() else {},
        revision=commit,
    )
    return model, directory


def load(
    path: str,
    revision: str | None = None,
    *,
    dtype: Any = None,
    mesh: jax.sharding.Mesh | None = None,
    chat_template: str | None = None,
) -> Model:
    """Loads a Mistral or Llama checkpoint.

    Args:
        path: a Hugging Face directory or hub id.
        revision: of the hub repository: a branch, tag or commit.
        dtype: of parameters and computation; None keeps the checkpoint's.
        mesh: where the parameters go; None splits them over all devices.
        chat_template: Jinja text or a file of it, in place of the tokenizer's own.

    Raises:
        ValueError, FileNotFoundError: what is wrong with the checkpoint, naming the file.
    """
    model, directory = describe(path, revision, dtype=dtype, mesh=mesh, chat_template=chat_template)
    params = load_params(directory, model.config, model.mesh, dtype)
    return dataclasses.replace(model, params=params, dtype=jnp.dtype(dtype or params["embed"].dtype))


def new_model(
    options: Mapping[str, Any], tokenizer: Any, *, dtype: Any, mesh: jax.sharding.Mesh | None = None
) -> Model:
    """A model that is still to be initialized (`params` is empty).

    Args:
        options: config.json's keys, `model_type` among them.
        tokenizer: whose special token ids the config takes over; None where no text is involved.
        dtype: to compute in.
        mesh: where the parameters will be; None splits them over all devices.
    """
    from transformers import AutoConfig

    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    if tokenizer is not None:
        options = {name: getattr(tokenizer, name) for name in names} | dict(options)
    options = dict(options)
    family = options.pop("model_type", None)
    if family not in CONFIGS:
        raise ValueError(f"model.architecture.model_type is {family!r}; supported: {', '.join(CONFIGS)}")
    hf_config = AutoConfig.for_model(family, **options).to_dict()
    config = model_config(hf_config)
    if tokenizer is not None:
        check_vocabulary(tokenizer, config, "model.tokenizer")
    mesh = mesh or sharding.make_mesh()
    return Model(config, {}, tokenizer, jnp.dtype(dtype), mesh, hf_config, generation_config={})


# --- writing -------------------------------------------------------------------------------------

_SHARD_BYTES = 2 * 2**30


def _tensors(params: Params, table: Mapping[str, Tensor], dtype: Any) -> Iterator[tuple[str, Tensor, Any]]:
    """(name, how it is stored, array) of a checkpoint's tensors, a layer at a time; all have all."""
    for path, leaf in _flatten(params).items():
        stacked = path.startswith("layers/")
        for layer, name in enumerate(_names(path, table[path], leaf)):
            part = jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False) if stacked else leaf
            yield name, table[path], sharding.everywhere(part.astype(dtype or leaf.dtype))


def _plan_shards(params: Params, table: Mapping[str, Tensor], itemsize: int | None) -> dict[str, str]:
    """Which file each tensor goes to, in the order that `_tensors` yields them."""
    shards: list[list[str]] = [[]]
    filled = 0
    for path, leaf in _flatten(params).items():
        names = _names(path, table[path], leaf)
        size = leaf.size * (itemsize or leaf.dtype.itemsize) // len(names)
        for name in names:
            if shards[-1] and filled + size > _SHARD_BYTES:
                shards.append([])
                filled = 0
            shards[-1].append(name)
            filled += size
    if len(shards) == 1:
        return dict.fromkeys(shards[0], "model.safetensors")
    return {
        name: f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for number, names in enumerate(shards, 1)
        for name in names
    }


def _export_config(model: Model, dtype: Any) -> dict[str, Any]:
    """config.json with the keys of both transformers 5 and its elders (vLLM and others read those)."""
    config = {key: value for key, value in model.hf_config.items() if not key.startswith("_")}
    rope = dict(config.get("rope_parameters") or {})
    if rope:
        config["rope_theta"] = rope["rope_theta"]
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        config["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
    name = {"mistral": "MistralForCausalLM", "llama": "LlamaForCausalLM"}[model.config.model_type]
    config["architectures"] = [name]
    config["dtype"] = config["torch_dtype"] = jnp.dtype(dtype).name
    return config


def _raise_any(errors: list[Exception]) -> None:
    for error in errors:
        raise error


def save(model: Model, directory: epath.PathLike, *, dtype: Any = None) -> None:
    """Writes a Hugging Face checkpoint that transformers, vLLM and lm-eval open.

    config.json is written last: a directory that has one is whole. Of several files each process writes some.

    Args:
        model: what to write.
        directory: where; made if absent.
        dtype: of the weights in the files; None keeps each parameter's own (bit-equal).
    """
    directory, table = epath.Path(directory), TABLES[model.config.model_type]
    dtype = None if dtype is None else jnp.dtype(dtype)
    plan = _plan_shards(model.params, table, dtype.itemsize if dtype else None)

    def begin() -> None:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").unlink(missing_ok=True)
        for stale in directory.glob("model*.safetensors*"):
            if stale.name not in plan.values():
                stale.unlink()

    hosts.by_first(begin)
    mine = {name for number, name in enumerate(dict.fromkeys(plan.values())) if hosts.turn(number)}
    pending: dict[str, np.ndarray] = {}
    unwritten: list[Exception] = []  # told when all processes can be: here, some would wait for this one
    total = 0
    remaining = list(plan.values())
    for name, tensor, array in _tensors(model.params, table, dtype):
        file = plan[name]
        total += array.nbytes
        remaining.remove(file)
        if file in mine and not unwritten:
            pending[name] = _to_hf(tensor, np.asarray(array))
            if file not in remaining:
                try:
                    files.write_here(directory / file, safetensors_numpy.save(pending, {"format": "pt"}))
                except Exception as error:
                    unwritten.append(error)
                pending = {}
    hosts.together(lambda: _raise_any(unwritten))
    if len(set(plan.values())) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(plan.items()))}
        files.write_json(directory / "model.safetensors.index.json", index)
    with tempfile.TemporaryDirectory() as scratch:
        model.tokenizer.save_pretrained(scratch)
        for path in sorted(Path(scratch).iterdir()):
            if path.is_file():
                files.write(directory / path.name, path.read_bytes())
    generation = {"eos_token_id": list(model.stop_tokens), **model.generation_config}
    files.write_json(directory / "generation_config.json", generation)
    files.write_json(directory / "config.json", _export_config(model, dtype or model.params["embed"].dtype))
