"""Finds, checks and maps the weight files of a Hugging Face checkpoint by their headers alone.

The weights are safetensors in one file, or in several with an index; other formats are not read. One message
names all errors, before anything is loaded.
"""

import hashlib
import itertools
import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath

from spin_jax.models.architecture import ModelConfig
from spin_jax.models.families import FAMILIES, Tensor
from spin_jax.storage import files

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_MAX_HEADER = 100 * 2**20
_SAMPLES, _SAMPLE = 64, 2**14  # a file's digest reads this many samples, each of this many bytes


class Stored(NamedTuple):
    """The place of a tensor in a safetensors file; its data have not been read."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def map(self) -> np.ndarray:
        return np.memmap(self.path, DTYPES[self.dtype], "r", self.offset, self.shape)


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


def _read_tensors(path: Path) -> tuple[dict[str, Stored | None], list[str]]:
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
                needed = math.prod(shape) * DTYPES[dtype].itemsize if dtype in DTYPES else given
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
        if not re.fullmatch(r"[\w.+-]+", name, re.ASCII) or ".." in name:
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
    return (
        f"{directory} holds an adapter (adapter_config.json) without its base model: "
        "merge them (peft's merge_and_unload), save the result, and give that directory"
    )


def locate(directory: Path, wanted: Mapping[str, Sequence["Part"]]) -> dict[str, Stored]:
    """The place of each wanted tensor, which stacks these parts, in its file; only headers are read.

    Raises:
        ValueError: everything that is missing, damaged or misshapen, in one message.
        FileNotFoundError: there are no weights.
    """
    index = directory / "model.safetensors.index.json"
    if index.exists():
        places = _read_index(index)
    elif (directory / "model.safetensors").exists():
        places = dict.fromkeys(wanted, "model.safetensors")
    else:
        raise FileNotFoundError(_no_weights(directory))
    found: dict[str, dict[str, Stored | None]] = {}
    problems = []
    for file in sorted(set(places.values())):
        try:
            found[file], file_problems = _read_tensors(directory / file)
        except ValueError as error:
            file_problems = [str(error)]
        problems += [f"{file} {problem}" for problem in file_problems]
    located = {}
    for name, parts in wanted.items():
        file = places.get(name)
        if file is not None and file not in found:
            continue  # the problems name the file already
        if file is None or name not in found[file]:
            others = [other for other, tensors in found.items() if name in tensors]
            says = f"; {index.name} says {file}" if file else f", which {index.name} does not say"
            problems.append(f"{name}: in {others[0]}{says}" if others else f"{name}: missing")
        elif stored := found[file][name]:
            located[name] = stored
            rows, *rest = zip(*(part.stored for part in parts), strict=True)
            shape = (sum(rows), *(sizes[0] for sizes in rest))
            if stored.dtype not in DTYPES:
                problems.append(f"{name}: {stored.dtype}; only {', '.join(DTYPES)} are read")
            elif stored.shape != shape:
                problems.append(f"{name}: {stored.shape}, and config.json asks for {shape}")
    if problems:
        shown = "\n  ".join(problem[:300] for problem in problems[:20])
        more = f"\n  … and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ValueError(f"{directory}: the weights cannot be loaded:\n  {shown}{more}")
    return located


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


def from_hf(part: Part, rows: np.ndarray) -> np.ndarray:
    """A view of a checkpoint's array in our shape; nothing is copied until it is sliced."""
    if part.tensor.inputs is None:
        return rows
    return (rows.T if part.tensor.inputs else rows).reshape(part.shape)


def to_hf(part: Part, array: np.ndarray) -> np.ndarray:
    if not part.tensor.inputs:
        return array.reshape(part.stored)
    return np.ascontiguousarray(array.reshape(part.stored[::-1]).T)
