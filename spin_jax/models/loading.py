"""Reads a Hugging Face checkpoint into our parameters, by the family's table of names (families.py).

A checkpoint is a directory (or hub id) with config.json, safetensors (one file, or several with an index),
generation_config.json, tokenizer files and a chat template. Weights are memory-mapped, and each device's
part is copied out of the map, so host memory never holds the model twice.
"""

import contextlib
import dataclasses
import functools
import inspect
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from spin_jax.config_values import nearest
from spin_jax.models import lora, weight_files
from spin_jax.models.architecture import Model, ModelConfig, Params, check_constants
from spin_jax.models.families import FAMILIES, TRANSFORMERS_4, Tensor, family, model_config, text_part
from spin_jax.models.params import abstract_params
from spin_jax.models.tokenizers import check_vocabulary, load_tokenizer
from spin_jax.models.weight_files import Part, from_hf, parts_of, split
from spin_jax.runtime import sharding, stopwatch
from spin_jax.storage import files, hub, seals

# --- configs -------------------------------------------------------------------------------------

_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@contextlib.contextmanager
def _prefix_errors(place: object) -> Iterator[None]:
    """Turns any error into a ValueError that begins with `place`, because transformers raises many kinds."""
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{place}: {kind}{' '.join(str(error).split())[:500]}") from error


def _read_hf_config(directory: Path) -> dict[str, Any]:
    """Reads config.json, of a multimodal model its text part; transformers fills in defaults and converts old keys."""
    from transformers import AutoConfig

    path = directory / "config.json"
    if not path.exists():
        missing = f"{path} is missing: is {directory} a Hugging Face checkpoint?"
        raise FileNotFoundError(weight_files.adapter(directory) or missing)
    whole = files.read_object(path)
    with _prefix_errors(path):
        raw = text_part(whole)
        family(raw)
        if raw is whole and (absent := [name for name in _SIZES if raw.get(name) is None]):
            raise ValueError(f"{', '.join(absent)}: missing")
        check_constants({name: value for name, value in raw.items() if name != "sliding_window"})
        dtype = next((each.get(key) for each in (whole, raw) for key in ("dtype", "torch_dtype") if key in each), None)
        known = [dtype.name for dtype in weight_files.DTYPES.values()]
        if dtype not in (None, *known):
            raise ValueError(f"dtype={dtype!r}: one of {', '.join(known)}")
        full = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        full = (full if raw is whole else full.get_text_config()).to_dict()
    # transformers drops a window that `use_sliding_window: false` switches off; the file's value is kept.
    if "sliding_window" in raw:
        full["sliding_window"] = raw["sliding_window"]
    outside = ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "quantization_config")
    full |= {name: whole[name] for name in outside if raw is not whole and whole.get(name) is not None}
    return full | {"dtype": dtype, "architectures": raw.get("architectures")}


# --- reading -------------------------------------------------------------------------------------


def _load_leaf(leaf: Any, views: np.ndarray, layout: Any, dtype: Any) -> jax.Array:
    """One parameter from the checkpoint's arrays, `views` of shape [], [layers] or [layers, experts]."""
    dtype = jnp.dtype(dtype or jnp.result_type(*(view.dtype for view in views.flat)))

    def part(index: Any) -> np.ndarray:  # what one device holds; nothing else is copied out of the memory map
        stacked, within = index[: views.ndim], index[views.ndim :]
        chosen = views[stacked] if stacked else views
        out = np.empty((*chosen.shape, *chosen.flat[0][within].shape), dtype)
        for number in np.ndindex(chosen.shape):
            out[number] = chosen[number][within]
        return out

    return jax.make_array_from_callback(leaf.shape, layout, part, dtype=dtype)


def _views(flat: Mapping[str, Any], stored: Mapping[str, list[Part]], tensors: Mapping[str, np.ndarray]):
    """The checkpoint's arrays for each parameter path, viewed in our shapes."""
    views: dict[str, np.ndarray] = {}
    for name, parts in stored.items():
        for part, rows in zip(parts, split(parts, tensors[name]), strict=True):
            axes = flat[part.path].shape[: len(part.at)]
            views.setdefault(part.path, np.empty(axes, object))[part.at] = from_hf(part, rows)
    return views


def _stored(config: ModelConfig) -> dict[str, list[Part]]:
    """The tensors that a checkpoint of this architecture has."""
    return parts_of(flatten_dict(sharding.unboxed(abstract_params(config)), sep="/"), config)


def check_weights(directory: epath.PathLike, config: ModelConfig) -> list[str]:
    """Reads only the headers of a checkpoint's files, raises the errors of `load_params`, and returns notes."""
    return weight_files.locate(Path(directory), _stored(config))[1]


def locate_tensor(directory: epath.PathLike, config: ModelConfig, name: str, shape: tuple[int, ...]) -> Any:
    """The place of a tensor that stands beside a decoder's, from the headers alone; `map()` gives its numbers.

    Raises:
        ValueError: the tensor or one of the decoder's is missing, damaged or misshapen.
    """
    wanted = {**_stored(config), name: [Part(name, (), Tensor(name, None), shape)]}
    return weight_files.locate(Path(directory), wanted)[0][name]


def _read_tie(directory: Path, config: ModelConfig, notes: list[str]) -> ModelConfig:
    """The config, with a head of its own where the weights have one that config.json does not speak of."""
    untied = dataclasses.replace(config, tie_word_embeddings=False)
    if not config.tie_word_embeddings or not weight_files.has_own_head(directory, _stored(untied)):
        return config
    notes.append(
        f"{directory}: config.json says tie_word_embeddings=true, and the output head in the weights differs from the "
        "embedding: both are read, as transformers does, and exports say tie_word_embeddings=false"
    )
    return untied


@jax.jit
def _finite(params: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Whether each parameter has only finite numbers; compiled once for all models of a shape."""
    return {path: jnp.isfinite(leaf).all() for path, leaf in params.items()}


@stopwatch.phase("load")
def load_params(
    directory: epath.PathLike,
    config: ModelConfig,
    mesh: jax.sharding.Mesh,
    dtype: Any = None,
    adapters: Params | None = None,
) -> Params:
    """Reads a checkpoint's weights into the mesh's layout; with dtype None each keeps its dtype in the checkpoint.

    `adapters` (of `open_adapters`) are merged into them in float32, and the weights keep their dtype. One ValueError or
    FileNotFoundError names everything that is missing, damaged or misshapen, or not finite.
    """
    seals.check_seal_here(directory)
    abstract = abstract_params(config)
    flat = flatten_dict(sharding.unboxed(abstract), sep="/")
    layouts = flatten_dict(sharding.parameter_shardings(mesh, abstract), sep="/")
    stored = parts_of(flat, config)
    located, _ = weight_files.locate(Path(directory), stored)
    views = _views(flat, stored, {name: tensor.map() for name, tensor in located.items()})
    params = {path: _load_leaf(leaf, views[path], layouts[path], dtype) for path, leaf in flat.items()}
    finite = _finite(params)
    if bad := [FAMILIES[config.model_type].names[path].name for path in flat if not finite[path]]:
        raise ValueError(f"{directory}: {', '.join(bad)}: NaN or infinite numbers in the weights")
    params = unflatten_dict(params, sep="/")
    return lora.merged_peft(params, adapters) if adapters else params


def check_base(directory: Path) -> None:
    """Raises ValueError for a checkpoint whose layers have other names in transformers than the adapters of a run."""
    whole = files.read_object(directory / "config.json")
    if text_part(whole) is not whole:
        raise ValueError(
            f"export.adapters: {directory} is a multimodal model, and adapters are for its text part, whose layers "
            "have other names: save that part, spin_jax.save(spin_jax.load(PATH), FOLDER), and give it as model.path"
        )


def open_adapters(adapters: str, path: str, model: Model) -> Params:
    """Reads PEFT's adapters for the model of `path`; a note on the model tells where they were trained on another one.

    `adapters` is a directory, a hub id, or OWNER/NAME@REVISION.

    Raises:
        ValueError, FileNotFoundError: what is wrong with them, naming the file.
    """
    found, base = lora.read_peft(resolve_name(adapters, "adapters"), model.config)
    if base and os.path.abspath(base) != os.path.abspath(path):
        model.notes.append(f"the adapters {adapters} name another base than {path}: base_model_name_or_path is {base}")
    return found


def resolve(path: str, revision: str | None = None, what: str = "model") -> tuple[Path, str | None]:
    """The local directory of a path or hub id, and the hub's commit (None for a local path); errors say `what` it is.

    A token for private repositories comes from the environment (HF_TOKEN), as huggingface_hub reads it.

    Raises:
        ValueError, FileNotFoundError: nothing has that path or revision; impossible ones are never asked for.
    """
    if revision is not None and (not re.fullmatch(r"\w[\w./-]*", revision, re.ASCII) or ".." in revision):
        raise ValueError(f"{what} revision {revision!r}: a branch, tag or commit has letters, digits and ._/- only")
    if os.path.isdir(path):
        return Path(path), None
    if not hub.is_hub_id(path):
        raise FileNotFoundError(f"{what} path {path!r}: no such directory, and not a hub id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "README.md"]
    folders = ("*/*.safetensors", "*/*.json", "*/tokenizer.model", "*/README.md")  # but additional_chat_templates/
    copies = ["consolidated*", *folders]  # the same weights in another layout
    try:
        snapshot = snapshot_download(path, revision=revision, allow_patterns=wanted, ignore_patterns=copies)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        it = f"it at revision {revision}" if revision else "it"
        message = f"{what} path {path!r} is no directory here, and the hub did not give {it}: {error}"
        raise FileNotFoundError(message) from error
    return Path(snapshot), Path(snapshot).name


def resolve_name(name: str, what: str) -> Path:
    """The local directory of a path, a hub id, or OWNER/NAME@REVISION; it raises the errors of `resolve`."""
    return resolve(*_path_and_revision(name), what)[0]


def pinned(name: str) -> str | None:
    """OWNER/NAME@COMMIT, with the commit that a hub id or OWNER/NAME@REVISION stands for now; None for other names."""
    path, revision = _path_and_revision(name)
    with contextlib.suppress(ValueError, FileNotFoundError):  # what opens the model says what is wrong
        commit = resolve(path, revision)[1]
        return commit and f"{path}@{commit}"


def _path_and_revision(name: str) -> tuple[str, str | None]:
    path, _, revision = (name, "", "") if os.path.isdir(name) else name.partition("@")
    return path, revision or None


def _read_generation_config(directory: Path, vocab_size: int) -> dict[str, Any]:
    """generation_config.json; where it names no EOS, that of config.json or of its text_config is added."""
    path, config = directory / "generation_config.json", files.read_object(directory / "config.json")
    content = files.read_object(path) if path.exists() else {}
    if content.get("eos_token_id") is None:
        return content | (_eos_of(config, vocab_size) or _eos_of(config.get("text_config") or {}, vocab_size))
    stops = content.get("eos_token_id")
    for stop in stops if isinstance(stops, list) else [] if stops is None else [stops]:
        if not weight_files.whole(stop) or stop >= vocab_size:
            raise ValueError(
                f"{path}: eos_token_id={stops!r}: an id, or a list of ids, below vocab_size={vocab_size} is "
                "wanted; without the key, that of config.json and the tokenizer's EOS count"
            )
    return content


def _eos_of(config: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """The key eos_token_id of a config.json, or {}. The default of the model's class may lie beyond the vocabulary."""
    stops = config.get("eos_token_id")
    known = [stop for stop in (stops if isinstance(stops, list) else [stops]) if weight_files.whole(stop)]
    known = [stop for stop in known if stop < vocab_size]
    return {"eos_token_id": known} if known else {}


@functools.cache
def architecture(directory: epath.PathLike) -> ModelConfig:
    """The architecture of a checkpoint, by its config.json alone."""
    return model_config(_read_hf_config(Path(directory)))


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
    notes: list[str] = []
    with _prefix_errors(directory / "config.json"):
        config = _read_tie(directory, model_config(hf_config), notes)
    hf_config["tie_word_embeddings"] = config.tie_word_embeddings
    if (first := config.max_position_embeddings) < (longest := hf_config["max_position_embeddings"]):
        notes.append(
            f"{directory}: texts of up to {first} tokens (original_max_position_embeddings) are read, not of "
            f"{longest}, because longrope rotates all tokens of a longer text by other angles"
        )
    tokenizer = load_tokenizer(directory, chat_template, notes)
    check_vocabulary(tokenizer, config, path, notes)
    generation_config = _read_generation_config(directory, config.vocab_size)
    dtype = jnp.dtype(dtype or hf_config["dtype"] or jnp.float32)
    mesh = mesh or sharding.make_mesh()
    return Model(config, {}, tokenizer, dtype, mesh, hf_config, generation_config, commit, notes), directory


def load(
    path: str,
    revision: str | None = None,
    *,
    dtype: Any = None,
    mesh: jax.sharding.Mesh | None = None,
    chat_template: str | None = None,
    adapters: str | None = None,
) -> Model:
    """Loads a checkpoint of a supported family.

    Args:
        path: a Hugging Face directory or hub id.
        revision: a branch, tag or commit of the hub repository.
        dtype: of parameters and computation; None keeps the checkpoint's.
        mesh: the devices that get the parameters; None splits them over all devices.
        chat_template: Jinja text, or the path of a file with it, that replaces the tokenizer's own.
        adapters: a directory or hub id of LoRA adapters in PEFT's format, which are merged into the weights.

    What was assumed about the files (`Model.notes`) is a warning.

    Raises:
        ValueError, FileNotFoundError: what is wrong with the checkpoint, naming the file.
    """
    model, directory = describe(path, revision, dtype=dtype, mesh=mesh, chat_template=chat_template)
    model.notes.extend(check_weights(directory, model.config))
    found = open_adapters(adapters, path, model) if adapters else None
    for note in model.notes:
        warnings.warn(note, stacklevel=2)
    params = load_params(directory, model.config, model.mesh, dtype, found)
    return dataclasses.replace(model, params=params, dtype=jnp.dtype(dtype or params["embed"].dtype))


def new_model(
    options: Mapping[str, Any], tokenizer: Any, *, dtype: Any, mesh: jax.sharding.Mesh | None = None
) -> Model:
    """A model without weights (`params` is empty): the caller initializes them.

    Args:
        options: the keys of config.json, including `model_type`.
        tokenizer: its special token ids go into the config; None where no text is involved.
        dtype: the dtype of computations.
        mesh: the devices that will get the parameters; None splits them over all devices.

    Raises:
        ValueError: a key is unknown, has a wrong type, or is impossible; the message names it.
    """
    from transformers import AutoConfig, PreTrainedTokenizerBase

    if tokenizer is not None:
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ValueError(f"model.tokenizer made a {type(tokenizer).__name__}, not a tokenizer of transformers")
        options = {name: getattr(tokenizer, name) for name in _TOKEN_IDS} | dict(options)
    with _prefix_errors("model.architecture"):
        model_type = check_architecture(options)
        options = {name: value for name, value in options.items() if name != "model_type"}
        for name in ("rms_norm_eps", "layer_norm_eps", "initializer_range"):
            if weight_files.whole(options.get(name)):
                options[name] = float(options[name])
        hf_config = AutoConfig.for_model(model_type, **options).to_dict()
        config = model_config(hf_config)
    if tokenizer is not None:
        check_vocabulary(tokenizer, config, "model.tokenizer")
    mesh = mesh or sharding.make_mesh()
    return Model(config, {}, tokenizer, jnp.dtype(dtype), mesh, hf_config, _eos_of(options, config.vocab_size))


def check_architecture(options: Mapping[str, Any]) -> str:
    """Checks an architecture that a user wrote, because transformers accepts any key; returns the model type.

    It raises ValueError for a wrong value or an unknown key, with the nearest key of the family's config class.
    """
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    family(options)
    model_type = options["model_type"]
    classes = CONFIG_MAPPING[model_type], PreTrainedConfig  # in older versions a class states only the keys of its own
    known = {"model_type", *_TOKEN_IDS, *TRANSFORMERS_4}
    known.update(*(inspect.signature(kind).parameters for kind in classes))
    for name in options:
        # A whole config.json names the transformers that wrote it, and may have other keys of that version.
        if name not in known and "transformers_version" not in options:
            raise ValueError(f"{model_type} has no {name!r}{nearest(str(name), sorted(known))}")
    check_constants(options)
    return model_type
