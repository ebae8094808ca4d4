"""Finds, checks and maps the weight files of a Hugging Face checkpoint by their headers alone.

The weights are safetensors in one file, or in several with an index; other formats are not read. One message
names all errors, before anything is loaded.
"""

import contextlib
import hashlib
import itertools
import json
import math
import re
import struct
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath

from spin_jax.models import mxfp4
from spin_jax.models.architecture import ModelConfig
from spin_jax.models.families import FAMILIES, LLAMA, Tensor
from spin_jax.storage import files

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_STORED = DTYPES | {"U8": np.dtype(np.uint8)}  # mxfp4.py unpacks the last one
_PREFIX, _EMBED, _HEAD = "model.", LLAMA["embed"].name, LLAMA["head"].name  # names that all families share
_QUANTIZED = (".qweight", ".weight_scale", ".weight_scale_inv", ".weight_packed", ".absmax", ".SCB")
_BUFFERS = ("rotary_emb.inv_freq", ".masked_bias")  # old checkpoints hold them, and nobody reads them
_INDEX = "model.safetensors.index.json"
_MAX_HEADER = 100 * 2**20
_SAMPLES, _SAMPLE = 64, 2**14  # a file's digest reads this many samples, each of this many bytes


class Stored(NamedTuple):
    """The place of a tensor in a safetensors file; its data have not been read."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def map(self) -> np.ndarray:
        return np.memmap(self.path, _STORED[self.dtype], "r", self.offset, self.shape)


def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The entries of a safetensors file, the offset of its data, and its size."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(8)
            if start == b"version ":
                raise ValueError("is a git-lfs pointer, not the weights: run `git lfs pull`")
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else _MAX_HEADER + 1
            if length > min(_MAX_HEADER, size - 8):
                raise ValueError(f"({size} bytes) is truncated or not a safetensors file")
            text = file.read(length)
    except FileNotFoundError as error:
        raise ValueError("is not there") from error
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"has a damaged header: {error}") from error
    if not isinstance(header, dict):
        raise ValueError("has a damaged header: it is no JSON object")
    header.pop("__metadata__", None)
    return header, 8 + length, size


def whole(value: Any) -> bool:
    return type(value) is int and value >= 0


def read_tensors(path: Path) -> tuple[dict[str, Stored | None], list[str]]:
    """A file's tensors (None for a damaged one), and its problems; ValueError where the header is not readable."""
    header, start, size = _read_header(path)
    tensors: dict[str, Stored | None] = dict.fromkeys(header)
    problems, spans = [], []
    for name, entry in header.items():
        match entry:
            case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [first, last]} if (
                all(map(whole, (*shape, first, last))) and first <= last
            ):
                spans.append((first, last, name))
                given = last - first
                needed = math.prod(shape) * _STORED[dtype].itemsize if dtype in _STORED else given
                if needed != given:
                    problems.append(f"{name}: {shape} of {dtype} take {needed} bytes, and its data_offsets {given}")
                elif start + last <= size:
                    tensors[name] = Stored(path, dtype, tuple(shape), start + first)
            case _:
                problems.append(f"{name}: damaged header entry {str(entry)[:80]}")
    end = max((last for _, last, _ in spans), default=0)
    past = [name for _, last, name in spans if start + last > size]
    if past:
        problems.insert(0, f"is truncated: of {len(past)} tensors, {past[0]} first, the data end past its {size} bytes")
    elif start + end < size and not problems:
        problems.append(f"is damaged: {size - start - end} bytes follow its last tensor")
    spans.sort()
    for (_, last, name), (first, _, other) in itertools.pairwise(spans):
        if first < last:
            problems.append(f"{other}: overlaps {name}")
    return tensors, problems


def _read_index(path: Path) -> dict[str, str]:
    """The file of each tensor, from model.safetensors.index.json."""
    places = files.read_object(path).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{path}: weight_map should say, for each tensor, the name of its file")
    for name in sorted(set(places.values())):
        if not name or re.search(r"[/\\\0]", name) or ".." in name:
            raise ValueError(f"{path} names {name!r}: files outside of its directory are not read")
        if not name.endswith(".safetensors"):
            raise ValueError(f"{path} names {name}, and only safetensors are read: {_CONVERT}")
    return places


_CONVERT = "convert it to safetensors (transformers' save_pretrained writes them)"


def _no_weights(directory: Path) -> str:
    """A message that says, where possible, why the directory has no weights."""
    hint, names = "", sorted(path.name for path in directory.iterdir())
    if pickles := [name for name in names if name.endswith((".bin", ".pt", ".pth"))]:
        hint = f" ({pickles[0]} is a pickle, which is not read: {_CONVERT})"
    elif parts := [name for name in names if name.endswith(".safetensors")]:
        hint = f" ({parts[0]} is there, without the model.safetensors.index.json that goes with it)"
    return adapter(directory) or f"{directory} has no model.safetensors{hint}"


def adapter(directory: Path) -> str:
    """Advice for a directory with nothing but LoRA weights; "" for other directories."""
    if not (directory / "adapter_config.json").exists():
        return ""
    base = None
    with contextlib.suppress(ValueError):
        base = files.read_object(directory / "adapter_config.json").get("base_model_name_or_path")
    named = f" (its base_model_name_or_path is {base!r})" if base else ""
    return (
        f"{directory} holds an adapter (adapter_config.json) without its base model: set model.path to the base{named} "
        "and model.adapters to this directory, or merge them (peft's merge_and_unload) and give the result"
    )


class _Headers(NamedTuple):
    """What the headers of a checkpoint's files say."""

    places: dict[str, str]  # the file of each tensor
    tensors: dict[str, dict[str, Any]]  # `Stored`, `Packed` or None, of each file whose header is readable
    problems: list[str]
    notes: list[str]


def _read_headers(directory: Path) -> _Headers:
    """Reads the headers of model.safetensors if it is there, else of the files in the index, as transformers does.

    Raises:
        FileNotFoundError: there are no weights.
        ValueError: the index is damaged, or an adapter stands beside the weights.
    """
    index, whole_file = directory / _INDEX, directory / "model.safetensors"
    places, notes = {}, []
    if whole_file.exists():
        names = [whole_file.name]
        if index.exists() and f'"{whole_file.name}"' not in index.read_text(errors="replace"):
            notes = [
                f"{directory} has both {whole_file.name} and {index.name}: {whole_file.name} is read, as transformers "
                "does. Remove the one that is out of date"
            ]
    elif index.exists():
        places = _read_index(index)
        names = sorted(set(places.values()))
    else:
        raise FileNotFoundError(_no_weights(directory))
    if (directory / "adapter_config.json").exists() and (found := sorted(directory.glob("adapter_model*"))):
        raise ValueError(
            f"{directory} holds a whole model and an adapter ({found[0].name}): does the model contain it? If it does, "
            "remove the files adapter_*; if not, merge them (peft's merge_and_unload) and give the result"
        )
    tensors: dict[str, dict[str, Any]] = {}
    problems = []
    for file in names:
        try:
            tensors[file], file_problems = read_tensors(directory / file)
        except ValueError as error:
            file_problems = [str(error)]
        problems += [f"{file} {problem}" for problem in file_problems]
    if whole_file.exists():
        places = dict.fromkeys(tensors.get(whole_file.name, ()), whole_file.name)
    if mxfp4.pair(places, tensors):
        notes.append(f"{directory}: weights in MXFP4 are read as bfloat16, and exports have no quantized weights")
    return _Headers(places, tensors, problems, notes)


def _stored_names(stored: Collection[str], wanted: Collection[str]) -> tuple[str, dict[str, str]]:
    """How a checkpoint names the wanted tensors and a head.

    They may all have another prefix than "model.". It counts if only one leaves so few tensors missing.

    Returns:
        The prefix, and the checkpoint's name of each tensor.
    """
    stem = next(name for name in wanted if name.startswith(f"{_PREFIX}layers.0.")).removeprefix(_PREFIX)

    def names(prefix: str) -> dict[str, str]:
        outside = prefix.removesuffix(_PREFIX)  # the head stands beside the decoder, or outside of what holds both
        others = {name: outside + name if outside + name in stored else name for name in (*wanted, _HEAD)}
        return others | {name: prefix + name.removeprefix(_PREFIX) for name in wanted if name.startswith(_PREFIX)}

    prefixes = {_PREFIX, *(name.removesuffix(stem) for name in stored if f".{name}".endswith(f".{stem}"))}
    candidates = {prefix: names(prefix) for prefix in sorted(prefixes)}
    missing = {prefix: sum(each[name] not in stored for name in wanted) for prefix, each in candidates.items()}
    best = [prefix for prefix, count in missing.items() if count == min(missing.values())]
    chosen = best[0] if len(best) == 1 else _PREFIX
    return chosen, candidates[chosen]


def _one_reason(stored: Collection[str], wanted: Collection[str], located: int) -> str:
    """Why a checkpoint has other tensors than its config.json asks for; "" where nothing is certain."""
    if adapted := next((name for name in stored if ".base_layer." in name or ".lora_" in name), None):
        return f"{adapted} belongs to an adapter that is not merged: merge it (peft's merge_and_unload) and save again"
    if quantized := next((name for name in stored if name.endswith(_QUANTIZED)), None):
        return f"{quantized} belongs to quantized weights, which are not supported; take the full ones"
    if not located:
        theirs = ", ".join(sorted(stored)[:2]) or "no tensor"
        return (
            f"config.json asks for {next(iter(wanted))} and others, and the files have none of them: they have {theirs}"
        )
    return ""


def has_own_head(directory: Path, wanted: Collection[str]) -> bool:
    """Whether a checkpoint has an output head that differs from its embedding; False where it cannot be read.

    Args:
        wanted: the names of all tensors that a model with a head of its own has.
    """
    try:
        headers = _read_headers(directory)
    except (ValueError, FileNotFoundError):  # reading the weights will say so
        return False
    _, names = _stored_names(headers.places, wanted)
    head, embedding = (headers.tensors.get(headers.places.get(n, ""), {}).get(n) for n in (names[_HEAD], names[_EMBED]))
    if head is None or embedding is None or not {head.dtype, embedding.dtype} <= DTYPES.keys():
        return False
    if head.shape != embedding.shape:
        return True
    a, b = head.map(), embedding.map()
    return not all(np.array_equal(a[i : i + 4096], b[i : i + 4096]) for i in range(0, len(a), 4096))


def locate(directory: Path, wanted: Mapping[str, Sequence["Part"]]) -> tuple[dict[str, Any], list[str]]:
    """The place of each wanted tensor, which stacks these parts, in its file, and notes; only headers are read.

    Raises:
        ValueError: everything that is missing, damaged or misshapen, in one message.
        FileNotFoundError: there are no weights.
    """
    places, found, problems, notes = _read_headers(directory)
    prefix, names = _stored_names(places, wanted)
    if _HEAD not in wanted and names[_EMBED] not in places and names[_HEAD] in places:
        names[_EMBED] = names[_HEAD]  # a tied embedding may be stored as the head
    located, missing = {}, []
    for name, parts in wanted.items():
        name_there = names[name]
        file = places.get(name_there)
        if file is not None and file not in found:
            continue  # the problems name the file already
        if file is None or name_there not in found[file]:
            others = [other for other, tensors in found.items() if name_there in tensors]
            says = f"; {_INDEX} says {file}" if file else f", which {_INDEX} does not say"
            missing.append(f"{name_there}: in {others[0]}{says}" if others else f"{name_there}: missing")
        elif stored := found[file][name_there]:
            located[name] = stored
            shape = shape_of(parts)
            if stored.dtype not in DTYPES:
                problems.append(f"{name_there}: {stored.dtype}; only {', '.join(DTYPES)} are read")
            elif stored.shape != shape:
                problems.append(f"{name_there}: {stored.shape}, and config.json asks for {shape}")
    if missing and (found or not problems):  # else the problems name the files that have them
        reason = _one_reason(places, wanted, len(located))
        problems += [reason] if reason else missing
    if problems:
        shown = "\n  ".join(problem[:300] for problem in problems[:20])
        more = f"\n  … and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ValueError(f"{directory}: the weights cannot be loaded:\n  {shown}{more}")
    if prefix != _PREFIX:
        notes.append(f"{directory}: the tensors' names begin with {prefix!r} instead of {_PREFIX!r}, and are read so")
    if unused := sorted(name for name in places.keys() - names.values() if not name.endswith(_BUFFERS)):
        shown = ", ".join(unused[:3]) + ", …" * (len(unused) > 3)
        notes.append(f"{directory}: {len(unused)} tensors are not part of this model, and are not read: {shown}")
    return located, notes


def digest(directory: epath.PathLike) -> str:
    """A digest of the sizes and some bytes of a checkpoint's files; any training changes it."""
    sha = hashlib.sha256()
    for path in sorted(Path(directory).glob("*.safetensors")):
        size = path.stat().st_size
        sha.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            for place in range(_SAMPLES):
                file.seek(max(size - _SAMPLE, 0) * place // (_SAMPLES - 1))
                sha.update(file.read(_SAMPLE))
    return sha.hexdigest()[:16]


# --- names ---------------------------------------------------------------------------------------


class Part(NamedTuple):
    """A part of one of our leaves; a checkpoint's tensor stacks one part or several."""

    path: str
    at: tuple[int, ...]  # the numbers of the layer and of the expert; () where a leaf is one tensor
    tensor: Tensor
    shape: tuple[int, ...]  # of the part in our leaf

    @property
    def stored(self) -> tuple[int, ...]:
        """The part's shape in the checkpoint."""
        inputs = self.tensor.inputs
        if inputs is None:
            return self.shape
        out, within = math.prod(self.shape[inputs:]), math.prod(self.shape[:inputs])
        return (out, within) if inputs else (out,)


def parts_of(flat: Mapping[str, Any], config: ModelConfig) -> dict[str, list[Part]]:
    """For each tensor of a checkpoint, the parts of our leaves that it stacks."""
    found: dict[str, list[Part]] = {}
    for path, tensor in FAMILIES[config.model_type].names.items():
        if path in flat:
            shape, axes = flat[path].shape, sum(axis in tensor.name for axis in ("{layer}", "{expert}"))
            for index in np.ndindex(shape[:axes]):
                name = tensor.name.format(**dict(zip(("layer", "expert"), index, strict=False)))
                found.setdefault(name, []).append(Part(path, index, tensor, shape[axes:]))
    return found


def shape_of(parts: Sequence[Part]) -> tuple[int, ...]:
    """The shape of the checkpoint's tensor that holds these parts."""
    shapes = [part.stored for part in parts]
    if parts[0].tensor.alternate:
        return (*shapes[0][:-1], sum(shape[-1] for shape in shapes))
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def split(parts: Sequence[Part], tensor: np.ndarray) -> list[np.ndarray]:
    """Views of the parts of a checkpoint's tensor."""
    if parts[0].tensor.alternate:
        return [tensor[..., number :: len(parts)] for number in range(len(parts))]
    ends = itertools.accumulate(part.stored[0] for part in parts)
    return [tensor[end - part.stored[0] : end] for part, end in zip(parts, ends, strict=True)]


def join(parts: Sequence[Part], arrays: Sequence[np.ndarray]) -> np.ndarray:
    """The checkpoint's tensor of these parts."""
    if parts[0].tensor.alternate:
        return np.stack(arrays, axis=-1).reshape(shape_of(parts))
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def from_hf(part: Part, rows: np.ndarray) -> np.ndarray:
    """A view of a checkpoint's array in our shape; nothing is copied until it is sliced."""
    if part.tensor.inputs is None:
        return rows
    return (rows.T if part.tensor.inputs else rows).reshape(part.shape)


def to_hf(part: Part, array: np.ndarray) -> np.ndarray:
    if not part.tensor.inputs:
        return array.reshape(part.stored)
    return np.ascontiguousarray(array.reshape(part.stored[::-1]).T)
