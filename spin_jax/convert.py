"""Hugging Face checkpoints ↔ our parameters, by one table read both ways.

A checkpoint is a directory (or hub id) of config.json, safetensors in one file or several with an
index, generation_config.json, tokenizer files and chat template. Weights are memory-mapped and each
device's part is copied out of the map, so the model never stands twice in host memory.

To add a family: a name table in `TABLES`, and a mapping of its config in `CONFIGS`.
"""

import contextlib
import dataclasses
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from safetensors import numpy as safetensors_numpy

from spin_jax import files, hosts, sharding, weights
from spin_jax.config import nearest
from spin_jax.model import Model, ModelConfig, Params, RopeScaling, abstract_params, check_constants

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
    return (math.prod(shape[tensor.inputs :]), math.prod(shape[: tensor.inputs]))


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
    names = {
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }.get(kind if isinstance(kind, str) else "")
    if names is None:
        raise ValueError(f"RoPE scaling {kind!r} is not supported; supported: default, linear, llama3")
    if absent := [name for name in names if rope.get(name) is None]:
        raise ValueError(f"RoPE scaling {kind!r} has no {', '.join(absent)}")
    return RopeScaling(kind, **{name: rope[name] for name in names})


def _llama_config(hf: Mapping[str, Any]) -> ModelConfig:
    """Maps config.json of Llama and Mistral, with the keys of transformers 4 or 5."""
    for key, supported in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
        if hf.get(key, supported) != supported:
            raise ValueError(f"{key}={hf[key]!r} is not supported (only {supported!r})")
    rope = hf.get("rope_parameters") or {
        "rope_theta": hf["rope_theta"],
        **(hf.get("rope_scaling") or {}),
    }
    if rope.get("rope_theta") is None:
        raise ValueError("rope_theta: missing")
    check_constants({"rope_theta": rope["rope_theta"]})
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
        tie_word_embeddings=hf["tie_word_embeddings"],
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
        ValueError: the family, or an option of it, is not supported or impossible; names the key.
    """
    return CONFIGS[_family(hf)](hf)


def _family(hf: Mapping[str, Any]) -> str:
    family = hf.get("model_type")
    if not isinstance(family, str) or family not in CONFIGS:
        raise ValueError(f"model_type {family!r} is not supported; supported: {', '.join(CONFIGS)}")
    return family


_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@contextlib.contextmanager
def _at(place: object) -> Iterator[None]:
    """Errors come out as a ValueError that begins with `place`: transformers raises all kinds of them."""
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{place}: {kind}{' '.join(str(error).split())[:500]}") from error


def _read_hf_config(directory: Path) -> dict[str, Any]:
    """config.json, with defaults and key changes between versions left to transformers."""
    from transformers import AutoConfig

    path = directory / "config.json"
    if not path.exists():
        raise FileNotFoundError(
            weights.adapter(directory) or f"{path} is missing: is {directory} a Hugging Face checkpoint?"
        )
    raw = files.read_object(path)
    with _at(path):
        _family(raw)
        if absent := [name for name in _SIZES if raw.get(name) is None]:
            raise ValueError(f"{', '.join(absent)}: missing")
        check_constants({name: value for name, value in raw.items() if name != "sliding_window"})
        dtype = raw.get("dtype", raw.get("torch_dtype"))
        known = [dtype.name for dtype in weights.DTYPES.values()]
        if dtype not in (None, *known):
            raise ValueError(f"dtype={dtype!r}: one of {', '.join(known)}")
        full = AutoConfig.from_pretrained(directory, trust_remote_code=False).to_dict()
    # A window that is written off (`use_sliding_window: false`) and one that is absent differ.
    if "sliding_window" in raw:
        full["sliding_window"] = raw["sliding_window"]
    full["dtype"] = dtype
    full["architectures"] = raw.get("architectures")
    return full


# --- reading -------------------------------------------------------------------------------------


def _wanted(flat: Mapping[str, Any], table: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The checkpoint's tensors behind our parameters, and their shapes there."""
    wanted = {}
    for path, leaf in flat.items():
        shape = _hf_shape(table[path], leaf.shape[1:] if path.startswith("layers/") else leaf.shape)
        wanted |= dict.fromkeys(_names(path, table[path], leaf), shape)
    return wanted


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
    weights.locate(Path(directory), _wanted(flat, TABLES[config.model_type]))


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
        ValueError, FileNotFoundError: everything that is missing, damaged or misshapen, in one message.
    """
    files.check_seal_here(directory)
    table = TABLES[config.model_type]
    abstract = abstract_params(config)
    flat = _flatten(sharding.unboxed(abstract))
    layouts = _flatten(sharding.parameter_shardings(mesh, abstract))
    located = weights.locate(Path(directory), _wanted(flat, table))
    tensors = {name: stored.map() for name, stored in located.items()}
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

    Raises:
        ValueError, FileNotFoundError: a path or revision that is none, before anything is downloaded.
    """
    if revision is not None and (not re.fullmatch(r"\w[\w./-]*", revision, re.ASCII) or ".." in revision):
        raise ValueError(
            f"model revision {revision!r}: a branch, tag or commit has letters, digits and ._/- only"
        )
    if os.path.isdir(path):
        return Path(path), None
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path, re.ASCII) or ".." in path:
        raise FileNotFoundError(f"model path {path!r}: no such directory, and not a hub id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "README.md"]
    twice = ["consolidated*", "*/*"]  # the same weights in another layout
    try:
        snapshot = snapshot_download(path, revision=revision, allow_patterns=wanted, ignore_patterns=twice)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
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

    Raises:
        ValueError, FileNotFoundError: names the directory, or the file in it that is damaged.
    """
    from transformers import AutoTokenizer

    directory = Path(path)
    if not directory.is_dir():
        raise FileNotFoundError(f"tokenizer {str(path)!r}: no such directory")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # of any kind: JSON's, tokenizers' own, what follows from an odd value
        for file in sorted(directory.glob("*.json")):
            files.read_object(file)  # where one is damaged, that is why
        absent = "" if (directory / "tokenizer.json").exists() else "no tokenizer.json, and "
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ValueError(
            f"{path}: {absent}transformers cannot load the tokenizer ({reason}). Take tokenizer.json and "
            "tokenizer_config.json as the model's authors published them"
        ) from error
    if not tokenizer.is_fast:
        raise ValueError(f"{path}: this tokenizer has no tokenizer.json (a fast tokenizer is needed)")
    if not isinstance(tokenizer.chat_template, str | dict | None):
        raise ValueError(f"{path}: chat_template is {tokenizer.chat_template!r}, and should be Jinja text")
    return with_chat_template(tokenizer, chat_template)


def with_chat_template(tokenizer: Any, chat_template: str | None) -> Any:
    """The tokenizer with that template: Jinja text, or the path of a file of it; None keeps its own."""
    if chat_template is None:
        return tokenizer
    if "{" not in chat_template:  # no Jinja, then
        try:
            chat_template = Path(chat_template).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ValueError(
                f"chat_template {chat_template!r} is no Jinja text, nor a file of it: {error}"
            ) from error
    tokenizer.chat_template = chat_template
    return tokenizer


def check_vocabulary(tokenizer: Any, config: ModelConfig, path: epath.PathLike) -> None:
    """Raises ValueError when the tokenizer knows ids that the embedding has no row for."""
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest < 0:
        raise ValueError(f"{path}: the tokenizer's vocabulary is empty")
    if largest >= config.vocab_size:
        raise ValueError(
            f"{path}: the tokenizer's largest id is {largest} and the embedding has {config.vocab_size} rows "
            "(vocab_size)"
        )


def _read_generation_config(path: Path, vocab_size: int) -> dict[str, Any]:
    if not path.exists():
        return {}
    content = files.read_object(path)
    stops = content.get("eos_token_id")
    for stop in stops if isinstance(stops, list) else [] if stops is None else [stops]:
        if not weights.whole(stop) or stop >= vocab_size:
            raise ValueError(
                f"{path}: eos_token_id={stops!r}: an id, or a list of ids, below vocab_size={vocab_size} is "
                "wanted; without the key, the tokenizer's EOS counts"
            )
    return content


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
    with _at(directory / "config.json"):
        config = model_config(hf_config)
    tokenizer = load_tokenizer(directory, chat_template)
    check_vocabulary(tokenizer, config, path)
    model = Model(
        config=config,
        params={},
        tokenizer=tokenizer,
        dtype=jnp.dtype(dtype or hf_config["dtype"] or jnp.float32),
        mesh=mesh or sharding.make_mesh(),
        hf_config=hf_config,
        generation_config=_read_generation_config(directory / "generation_config.json", config.vocab_size),
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

    Raises:
        ValueError: names the key that is unknown, of a wrong type, or impossible.
    """
    from transformers import AutoConfig, PreTrainedTokenizerBase

    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    if tokenizer is not None:
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ValueError(
                f"model.tokenizer made a {type(tokenizer).__name__}, not a tokenizer of transformers"
            )
        options = {name: getattr(tokenizer, name) for name in names} | dict(options)
    with _at("model.architecture"):
        family = check_architecture(options)
        options = {
            name: float(value)
            if name in ("rms_norm_eps", "initializer_range") and weights.whole(value)
            else value
            for name, value in options.items()
            if name != "model_type"
        }
        hf_config = AutoConfig.for_model(family, **options).to_dict()
        config = model_config(hf_config)
    if tokenizer is not None:
        check_vocabulary(tokenizer, config, "model.tokenizer")
    mesh = mesh or sharding.make_mesh()
    return Model(config, {}, tokenizer, jnp.dtype(dtype), mesh, hf_config, generation_config={})


def check_architecture(options: Mapping[str, Any]) -> str:
    """The family of an architecture that a user wrote down, where transformers would take any key.

    Raises:
        ValueError: a key that the family's config class does not know, naming the nearest; a wrong value.
    """
    from transformers import CONFIG_MAPPING

    family = _family(options)
    fields = [field.name for field in dataclasses.fields(CONFIG_MAPPING[family])]
    known = [*fields, "model_type", "rope_theta", "rope_scaling", "torch_dtype"]  # the last: transformers 4
    for name in options:
        # A whole config.json says which transformers wrote it, and has keys of that version.
        if name not in known and "transformers_version" not in options:
            raise ValueError(f"{family} has no {name!r}{nearest(str(name), known)}")
    check_constants(options)
    return family


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


def _export_generation(model: Model) -> dict[str, Any]:
    """generation_config.json: the checkpoint's own; where it had none, its special tokens."""
    special = {name: model.hf_config.get(name) for name in ("bos_token_id", "pad_token_id")}
    made = {name: token for name, token in special.items() if token is not None}
    return {"eos_token_id": list(model.stop_tokens), **(model.generation_config or made)}


def _save_tokenizer(tokenizer: Any, directory: epath.Path) -> None:
    """Writes a tokenizer's files, such that readers of before transformers 5 (vLLM's, say) open them too.

    Those know another name of the class and of the further special tokens, and look for chat templates in
    tokenizer_config.json; transformers 5 takes either.
    """
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        path = Path(scratch) / "tokenizer_config.json"
        config = files.read_object(path)
        if config.get("tokenizer_class") == "TokenizersBackend":
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
        if isinstance(config.get("extra_special_tokens"), list):
            config["additional_special_tokens"] = config.pop("extra_special_tokens")
        template = tokenizer.chat_template
        if isinstance(template, dict):
            template = [{"name": name, "template": text} for name, text in template.items()]
        if template:
            config["chat_template"] = template
        path.write_bytes(files.as_json(config))
        for path in sorted(path for path in Path(scratch).rglob("*") if path.is_file()):
            files.write(directory / path.relative_to(scratch), path.read_bytes())


def _raise_any(errors: list[Exception]) -> None:
    for error in errors:
        raise error


def save(
    model: Model,
    directory: epath.PathLike,
    *,
    dtype: Any = None,
    on_tensor: Callable[[], None] = lambda: None,
) -> None:
    """Writes a Hugging Face checkpoint that transformers, vLLM and lm-eval open.

    Sealed when it is whole: SHA256SUMS is written last. Of several files each process writes some.

    Args:
        model: what to write.
        directory: where; made if absent.
        dtype: of the weights in the files; None keeps each parameter's own (bit-equal).
        on_tensor: comes after each tensor; may raise to stop.

    Raises:
        files.NoRoom: the disk has no room for it.
    """
    directory, table = epath.Path(directory), TABLES[model.config.model_type]
    dtype = None if dtype is None else jnp.dtype(dtype)
    plan = _plan_shards(model.params, table, dtype.itemsize if dtype else None)

    def begin() -> None:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / files.SUMS).unlink(missing_ok=True)
        (directory / "config.json").unlink(missing_ok=True)
        for stale in directory.glob("model*.safetensors*"):
            if stale.name not in plan.values():
                stale.unlink()

    leaves = jax.tree.leaves(model.params)
    size = sum(leaf.size * (dtype or leaf.dtype).itemsize for leaf in leaves)
    files.check_room(directory, size + 2**20, f"the model {directory}")
    hosts.by_first(begin)
    mine = {name for number, name in enumerate(dict.fromkeys(plan.values())) if hosts.turn(number)}
    pending: dict[str, np.ndarray] = {}
    unwritten: list[Exception] = []  # told when all processes can be: here, some would wait for this one
    total = 0
    remaining = list(plan.values())
    for name, tensor, array in _tensors(model.params, table, dtype):
        on_tensor()
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
    _save_tokenizer(model.tokenizer, directory)
    files.write_json(directory / "generation_config.json", _export_generation(model))
    files.write_json(directory / "config.json", _export_config(model, dtype or model.params["embed"].dtype))
    files.seal(directory)
