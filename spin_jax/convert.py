"""Hugging Face checkpoints ↔ our parameters, by a family's table of names (families.py) read both ways.

A checkpoint is a directory (or hub id) of config.json, safetensors in one file or several with an
index, generation_config.json, tokenizer files and chat template. Weights are memory-mapped and each
device's part is copied out of the map, so the model never stands twice in host memory.
"""

import contextlib
import dataclasses
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from safetensors import numpy as safetensors_numpy

from spin_jax import weights
from spin_jax.config import nearest
from spin_jax.families import FAMILIES, TRANSFORMERS_4, Tensor, family, model_config
from spin_jax.model import Model, ModelConfig, Params, abstract_params, check_constants
from spin_jax.runtime import processes, sharding
from spin_jax.storage import files, seals

# --- configs -------------------------------------------------------------------------------------

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
        family(raw)
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


# --- names ---------------------------------------------------------------------------------------


class _Part(NamedTuple):
    """What a checkpoint's tensor holds of one of our leaves: all of it, or some of its rows."""

    path: str
    at: tuple[int, ...]  # of the layer, and of the expert; () where a leaf is one tensor
    tensor: Tensor
    shape: tuple[int, ...]  # here

    @property
    def stored(self) -> tuple[int, ...]:
        """The shape there."""
        inputs = self.tensor.inputs
        if inputs is None:
            return self.shape
        out, within = math.prod(self.shape[inputs:]), math.prod(self.shape[:inputs])
        return (out, within) if inputs else (out,)


def _parts(flat: Mapping[str, Any], config: ModelConfig) -> dict[str, list[_Part]]:
    """Every tensor of a checkpoint, and the parts of our leaves that it stacks."""
    found: dict[str, list[_Part]] = {}
    for path, tensor in FAMILIES[config.model_type].names.items():
        if path in flat:
            shape, axes = flat[path].shape, sum(axis in tensor.name for axis in ("{layer}", "{expert}"))
            for index in np.ndindex(shape[:axes]):
                name = tensor.name.format(**dict(zip(("layer", "expert"), index, strict=False)))
                found.setdefault(name, []).append(_Part(path, index, tensor, shape[axes:]))
    return found


def _shape(parts: Sequence[_Part]) -> tuple[int, ...]:
    """Of the tensor that stacks them."""
    rows, *rest = zip(*(part.stored for part in parts), strict=True)
    return (sum(rows), *(sizes[0] for sizes in rest))


def _from_hf(part: _Part, rows: np.ndarray) -> np.ndarray:
    """Our view of a checkpoint's array: nothing is copied until it is sliced."""
    if part.tensor.inputs is None:
        return rows
    return (rows.T if part.tensor.inputs else rows).reshape(part.shape)


def _to_hf(part: _Part, array: np.ndarray) -> np.ndarray:
    if not part.tensor.inputs:
        return array.reshape(part.stored)
    return np.ascontiguousarray(array.reshape(part.stored[::-1]).T)


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


# --- reading -------------------------------------------------------------------------------------


def _load_leaf(leaf: Any, views: np.ndarray, layout: Any, dtype: Any) -> jax.Array:
    """Builds one parameter; every device copies only its own part out of the memory map.

    Args:
        views: of the checkpoint's arrays: [], [layers] or [layers, experts] of them.
    """
    dtype = dtype or jnp.result_type(*(view.dtype for view in views.flat))

    def part(index: Any) -> np.ndarray:
        stacked, within = index[: views.ndim], index[views.ndim :]
        chosen = views[stacked] if stacked else views
        out = np.empty((*chosen.shape, *chosen.flat[0][within].shape), dtype)
        for number in np.ndindex(chosen.shape):
            out[number] = chosen[number][within]
        return out

    return jax.make_array_from_callback(leaf.shape, layout, part, dtype=dtype)


def _views(flat: Mapping[str, Any], stored: Mapping[str, list[_Part]], tensors: Mapping[str, np.ndarray]):
    """{path: the checkpoint's arrays behind it, as we see them}."""
    views: dict[str, np.ndarray] = {}
    for name, parts in stored.items():
        start = 0
        for part in parts:
            axes = flat[part.path].shape[: len(part.at)]
            end = start + part.stored[0]
            views.setdefault(part.path, np.empty(axes, object))[part.at] = _from_hf(
                part, tensors[name][start:end]
            )
            start = end
    return views


def check_weights(directory: epath.PathLike, config: ModelConfig) -> None:
    """Reads the headers of a checkpoint's files; raises what `load_params` would."""
    stored = _parts(_flatten(sharding.unboxed(abstract_params(config))), config)
    weights.locate(Path(directory), {name: _shape(parts) for name, parts in stored.items()})


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
    seals.check_seal_here(directory)
    abstract = abstract_params(config)
    flat = _flatten(sharding.unboxed(abstract))
    layouts = _flatten(sharding.parameter_shardings(mesh, abstract))
    stored = _parts(flat, config)
    located = weights.locate(Path(directory), {name: _shape(parts) for name, parts in stored.items()})
    views = _views(flat, stored, {name: tensor.map() for name, tensor in located.items()})
    dtype = None if dtype is None else jnp.dtype(dtype)
    return _unflatten(
        {path: _load_leaf(leaf, views[path], layouts[path], dtype) for path, leaf in flat.items()}
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
    """Loads a checkpoint of a supported family.

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
        model_type = check_architecture(options)
        options = {
            name: float(value)
            if name in ("rms_norm_eps", "layer_norm_eps", "initializer_range") and weights.whole(value)
            else value
            for name, value in options.items()
            if name != "model_type"
        }
        hf_config = AutoConfig.for_model(model_type, **options).to_dict()
        config = model_config(hf_config)
    if tokenizer is not None:
        check_vocabulary(tokenizer, config, "model.tokenizer")
    mesh = mesh or sharding.make_mesh()
    return Model(config, {}, tokenizer, jnp.dtype(dtype), mesh, hf_config, generation_config={})


def check_architecture(options: Mapping[str, Any]) -> str:
    """The model type of an architecture that a user wrote down, where transformers would take any key.

    Raises:
        ValueError: a key that the family's config class does not know, naming the nearest; a wrong value.
    """
    from transformers import CONFIG_MAPPING

    family(options)
    model_type = options["model_type"]
    fields = [field.name for field in dataclasses.fields(CONFIG_MAPPING[model_type])]
    known = [*fields, "model_type", *TRANSFORMERS_4]
    for name in options:
        # A whole config.json says which transformers wrote it, and has keys of that version.
        if name not in known and "transformers_version" not in options:
            raise ValueError(f"{model_type} has no {name!r}{nearest(str(name), known)}")
    check_constants(options)
    return model_type


# --- writing -------------------------------------------------------------------------------------

_SHARD_BYTES = 2 * 2**30


def _gathered(part: _Part, leaf: jax.Array, dtype: Any) -> Any:
    """A part of a leaf, which all processes have then."""
    for number in part.at:
        leaf = jax.lax.dynamic_index_in_dim(leaf, number, keepdims=False)
    return sharding.everywhere(leaf.astype(dtype or leaf.dtype))


def _plan_shards(stored: Mapping[str, list[_Part]], sizes: Mapping[str, int]) -> dict[str, str]:
    """Which file each tensor goes to; `sizes` are bytes of a number of each leaf."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, parts in stored.items():
        size = sum(math.prod(part.shape) * sizes[part.path] for part in parts)
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
    # No `auto_map`: it names code that is not exported, nor needed.
    config = {k: v for k, v in model.hf_config.items() if not k.startswith("_") and k != "auto_map"}
    rope = dict(config.get("rope_parameters") or {})
    if rope:
        own = ("rope_theta", "partial_rotary_factor")  # had keys of their own
        config |= {name: rope[name] for name in own if name in rope}
        kind = rope.get("rope_type", "default")
        scaling = {name: value for name, value in rope.items() if name not in own}
        if kind == "longrope":  # transformers 4 wants these three of Phi-3, and has the others beside
            scaling = {"type": kind, **{name: rope[name] for name in ("short_factor", "long_factor")}}
        config["rope_scaling"] = None if kind == "default" else scaling
    config["architectures"] = [FAMILIES[model.config.model_type].architecture]
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
    directory, flat = epath.Path(directory), _flatten(model.params)
    dtype = None if dtype is None else jnp.dtype(dtype)
    stored = _parts(flat, model.config)
    plan = _plan_shards(stored, {path: (dtype or leaf.dtype).itemsize for path, leaf in flat.items()})

    def begin() -> None:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / files.SUMS).unlink(missing_ok=True)
        (directory / "config.json").unlink(missing_ok=True)
        for stale in directory.glob("model*.safetensors*"):
            if stale.name not in plan.values():
                stale.unlink()

    size = sum(leaf.size * (dtype or leaf.dtype).itemsize for leaf in flat.values())
    files.check_room(directory, size + 2**20, f"the model {directory}")
    processes.by_first(begin)
    mine = {name for number, name in enumerate(dict.fromkeys(plan.values())) if processes.turn(number)}
    pending: dict[str, np.ndarray] = {}
    unwritten: list[Exception] = []  # told when all processes can be: here, some would wait for this one
    total = 0
    remaining = list(plan.values())
    for name, parts in stored.items():
        on_tensor()
        file = plan[name]
        arrays = [_gathered(part, flat[part.path], dtype) for part in parts]
        total += sum(array.nbytes for array in arrays)
        remaining.remove(file)
        if file in mine and not unwritten:
            rows = [_to_hf(part, np.asarray(array)) for part, array in zip(parts, arrays, strict=True)]
            pending[name] = rows[0] if len(rows) == 1 else np.concatenate(rows)
            if file not in remaining:
                try:
                    files.write_here(directory / file, safetensors_numpy.save(pending, {"format": "pt"}))
                except Exception as error:
                    unwritten.append(error)
                pending = {}
    processes.together(lambda: _raise_any(unwritten))
    if len(set(plan.values())) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(plan.items()))}
        files.write_json(directory / "model.safetensors.index.json", index)
    _save_tokenizer(model.tokenizer, directory)
    files.write_json(directory / "generation_config.json", _export_generation(model))
    files.write_json(directory / "config.json", _export_config(model, dtype or model.params["embed"].dtype))
    seals.seal(directory)
