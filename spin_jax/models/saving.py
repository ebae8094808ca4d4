"""Writes our parameters as a Hugging Face checkpoint, which transformers, vLLM and lm-eval open."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict
from safetensors import numpy as safetensors_numpy

from spin_jax.models.architecture import Model
from spin_jax.models.families import FAMILIES
from spin_jax.models.tokenizers import save_tokenizer
from spin_jax.models.weight_files import Part, join, parts_of, to_hf
from spin_jax.runtime import processes, sharding, stopwatch
from spin_jax.storage import files, seals

_SHARD_BYTES = 2 * 2**30


def _gather(part: Part, leaf: jax.Array, dtype: Any) -> Any:
    """Gathers a part of a leaf on all processes."""
    for number in part.at:
        leaf = jax.lax.dynamic_index_in_dim(leaf, number, keepdims=False)
    return sharding.everywhere(leaf.astype(dtype or leaf.dtype))


def _plan_shards(stored: Mapping[str, list[Part]], sizes: Mapping[str, int]) -> dict[str, list[str]]:
    """The tensors of each file; `sizes` holds each leaf's bytes per number."""
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
        return {"model.safetensors": shards[0]}
    return {f"model-{n:05d}-of-{len(shards):05d}.safetensors": names for n, names in enumerate(shards, 1)}


def _export_config(model: Model, dtype: Any) -> dict[str, Any]:
    """config.json with the keys of transformers 5 and of older versions, which vLLM and others read."""
    # `auto_map` names code that is neither exported nor needed, and the exported weights are not quantized.
    absent = ("auto_map", "quantization_config")
    config = {k: v for k, v in model.hf_config.items() if not k.startswith("_") and k not in absent}
    rope = dict(config.get("rope_parameters") or {})
    if "full_attention" in rope:  # layers with a window have their own (Gemma 3)
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = dict(rope["full_attention"])
    if rope:
        separate = ("rope_theta", "partial_rotary_factor")  # transformers 4 has them beside rope_scaling
        config |= {name: rope[name] for name in separate if name in rope}
        kind = rope.get("rope_type", "default")
        scaling = {name: value for name, value in rope.items() if name not in separate}
        if kind == "longrope":  # for Phi-3, transformers 4 accepts only these three keys here
            scaling = {"type": kind, **{name: rope[name] for name in ("short_factor", "long_factor")}}
        config["rope_scaling"] = None if kind == "default" else scaling
    config["architectures"] = [FAMILIES[model.config.model_type].architecture]
    config["dtype"] = config["torch_dtype"] = jnp.dtype(dtype).name
    return config


def _export_generation(model: Model) -> dict[str, Any]:
    """generation_config.json: the checkpoint's own, or a new one with its special tokens; and all stop tokens."""
    content, stops = model.generation_config, list(model.stop_tokens)
    special = {name: model.hf_config.get(name) for name in ("bos_token_id", "pad_token_id")}
    if content.keys() <= {"eos_token_id"}:
        content = {**{name: token for name, token in special.items() if token is not None}, **content}
    eos = content.get("eos_token_id")
    complete = sorted(eos if isinstance(eos, list) else [eos], key=str) == sorted(stops, key=str)
    return {**content, "eos_token_id": eos if complete else stops}


@stopwatch.phase("export")
def save(
    model: Model, directory: epath.PathLike, *, dtype: Any = None, on_tensor: Callable[[], None] = lambda: None
) -> None:
    """Writes a Hugging Face checkpoint that transformers, vLLM and lm-eval open.

    SHA256SUMS is written last and seals the complete checkpoint. The processes share the files.

    Args:
        model: the model to write.
        directory: created if absent.
        dtype: of the weights in the files; None keeps each parameter's own (bit-equal).
        on_tensor: called before each tensor; it may raise an error to stop.

    Raises:
        files.NoRoom: the disk has no room for it.
    """
    directory = epath.Path(directory)
    flat: dict[str, Any] = flatten_dict(model.params, sep="/")
    dtype = None if dtype is None else jnp.dtype(dtype)
    stored = parts_of(flat, model.config)
    plan = _plan_shards(stored, {path: (dtype or leaf.dtype).itemsize for path, leaf in flat.items()})

    def begin() -> None:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / files.SUMS).unlink(missing_ok=True)
        (directory / "config.json").unlink(missing_ok=True)
        for stale in directory.glob("model*.safetensors*"):
            if stale.name not in plan:
                stale.unlink()

    size = sum(leaf.size * (dtype or leaf.dtype).itemsize for leaf in flat.values())
    files.check_room(directory, size + 2**20, f"the model {directory}")
    processes.by_first(begin)
    failure: Exception | None = None  # raised after the loop: others would wait for a process that left it
    for number, (file, names) in enumerate(plan.items()):
        tensors: dict[str, np.ndarray] = {}
        for name in names:
            on_tensor()
            arrays = [_gather(part, flat[part.path], dtype) for part in stored[name]]
            if processes.turn(number) and not failure:
                rows = [to_hf(part, np.asarray(array)) for part, array in zip(stored[name], arrays, strict=True)]
                tensors[name] = join(stored[name], rows)
        if tensors:
            try:
                files.write_here(directory / file, safetensors_numpy.save(tensors, {"format": "pt"}))
            except Exception as error:
                failure = error

    def finish() -> None:
        if failure:
            raise failure

    processes.together(finish)
    if len(plan) > 1:
        places = {name: file for file, names in plan.items() for name in names}
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        files.write_json(directory / "model.safetensors.index.json", index)
    save_tokenizer(model.tokenizer, directory)
    files.write_json(directory / "generation_config.json", _export_generation(model))
    files.write_json(directory / "config.json", _export_config(model, dtype or model.params["embed"].dtype))
    seals.seal(directory)
