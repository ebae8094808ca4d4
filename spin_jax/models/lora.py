"""Low-rank adapters (LoRA, arXiv 2106.09685): W stays as it is, and W + (α / r) A B is trained.

    frozen, adapters = freeze(params, dtype), init(adapters_on(shapes, rank, targets), key)
    joined(frozen, adapters, scale)        # the parameters that `decoder.forward` takes
    merged(params, adapters, scale)        # the same model as plain weights

Without the adapters this is the model that an iteration began with, so SPIN's opponent needs no second copy.
B is zero at first, and so is A B. Axes: L layers, r rank; then the weight's inputs and its outputs.

With `frozen_dtype` the policy is Q(W) + (α / r) A B, with W rounded to a few bits (kernels/quantized.py). The opponent
scores the pairs of training by Q(W) too, so that the first loss is ln 2. All else has W: the opponent answers, and the
adapters are merged, as QLoRA's are. Merged into Q(W), most of what they learned would be lost when the next iteration
rounds again, because a change of less than half a step leaves every weight where it was.

Hugging Face's PEFT keeps A [r, in] and B [out, r] for each linear layer of transformers. `write_peft` and `read_peft`
go from the one form to the other.
"""

import functools
import hashlib
import importlib.util
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array
from safetensors import numpy as safetensors_numpy

from spin_jax.kernels import quantized
from spin_jax.models import weight_files
from spin_jax.models.architecture import ModelConfig, Params
from spin_jax.models.params import abstract_params
from spin_jax.models.weight_files import Part
from spin_jax.runtime import processes, sharding
from spin_jax.storage import files, seals

TARGETS = {"wq": 1, "wk": 1, "wv": 1, "wo": 2, "gate": 1, "up": 1, "down": 1}  # how many axes are inputs


def check(config: ModelConfig, targets: Sequence[str], frozen_dtype: str | None = None) -> None:
    """Raises ValueError for targets that the model does not have, or that take no adapters; or for `frozen_dtype`."""
    known = _known(config)
    unknown = [f"has {name!r}" for name in targets if name not in known]
    if unknown or not targets:
        what = unknown[0] if unknown else "is empty"
        raise ValueError(f"lora_targets {what}: this model has adapters for {', '.join(known)}")
    if frozen_dtype and config.num_experts:
        raise ValueError(f"frozen_dtype={frozen_dtype!r}: {config.model_type} has experts, which stay in model.dtype")
    if frozen_dtype and importlib.util.find_spec("qwix") is None:
        hint = "is not installed: pip install 'spin_jax[quantized]'"
        raise ValueError(f"frozen_dtype={frozen_dtype!r} needs qwix, which {hint}")


def _known(config: ModelConfig) -> list[str]:
    """The weights of a model that can have adapters."""
    known = [name for name in TARGETS if name != "gate" or config.gated]
    if config.num_experts:  # the weights of experts have one more axis
        known = [name for name in known if name.startswith("w")]
    return known


def count(config: ModelConfig, rank: int, targets: Sequence[str]) -> int:
    """How many numbers all adapters have."""
    D, F, H = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * H, config.num_key_value_heads * H
    axes = {"wq": D + queries, "wk": D + keys, "wv": D + keys, "wo": queries + D}
    return config.num_hidden_layers * rank * sum(axes.get(name, D + F) for name in targets)


def adapters_on(params: Params, rank: int, targets: Sequence[str]) -> Params:
    """Shapes and shardings of the float32 adapters for parameters that are given as shapes with shardings.

    {"layers": {module: {"wq_a": [L, *inputs, r], "wq_b": [L, r, *outputs], …}}}
    """

    def pair(name: str, leaf: Any) -> dict[str, jax.ShapeDtypeStruct]:
        split = 1 + TARGETS[name]
        spec = (*leaf.sharding.spec, *[None] * (len(leaf.shape) - len(leaf.sharding.spec)))

        def on_mesh(shape: tuple, spec: tuple) -> jax.ShapeDtypeStruct:
            layout = NamedSharding(leaf.sharding.mesh, PartitionSpec(*spec))
            return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=layout)

        return {
            f"{name}_a": on_mesh((*leaf.shape[:split], rank), (*spec[:split], None)),
            f"{name}_b": on_mesh((leaf.shape[0], rank, *leaf.shape[split:]), (spec[0], None, *spec[split:])),
        }

    layers: Params = {}
    for module, weights in params["layers"].items():
        for name, leaf in weights.items():
            if name in targets:
                layers.setdefault(module, {}).update(pair(name, leaf))
    return {"layers": layers}


def init(shapes: Params, key: Array) -> Params:
    """New adapters of these shapes: A is uniform within ± 1/√inputs, as in PEFT, and B is zero."""
    leaves, tree = jax.tree.flatten_with_path(shapes)

    def values(key):
        def value(number: int, path: Any, leaf: Any) -> Array:
            if path[-1].key.endswith("_b"):
                return jnp.zeros(leaf.shape, leaf.dtype)
            bound = math.prod(leaf.shape[1:-1]) ** -0.5
            return jax.random.uniform(jax.random.fold_in(key, number), leaf.shape, leaf.dtype, -bound, bound)

        return tree.unflatten([value(number, *leaf) for number, leaf in enumerate(leaves)])

    layouts = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    return jax.jit(values, out_shardings=layouts)(key)


def freeze(params: Params, dtype: Any, frozen_dtype: str | None = None, keep: bool = False) -> Params:
    """Casts the weights to the compute dtype, in which they are used anyway; norms keep their dtype.

    With `frozen_dtype` the layers' matrices become QArrays. `params` are freed leaf by leaf, so that memory never holds
    both trees; with `keep` they are not, and the trees share the leaves that do not change.
    """

    def smaller(path: Any, leaf: jax.Array) -> Any:
        frozen = _frozen(path, leaf, dtype, frozen_dtype)
        if frozen is not leaf and not keep:
            leaf.delete()
        return frozen

    with jax.set_mesh(jax.tree.leaves(params)[0].sharding.mesh):
        return jax.tree_util.tree_map_with_path(smaller, params)


def frozen_on(params: Params, dtype: Any, frozen_dtype: str | None) -> Params:
    """`freeze` for parameters that are only shapes and shardings."""
    mesh, each = jax.tree.leaves(params)[0].sharding.mesh, functools.partial(_frozen, dtype=dtype, stored=frozen_dtype)
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(functools.partial(jax.tree_util.tree_map_with_path, each), params)
    return sharding.laid_out(mesh, shapes)


def _frozen(path: Any, leaf: Any, dtype: Any, stored: str | None) -> Any:
    name = path[-1].key
    if stored and path[0].key == "layers" and name in TARGETS:
        # The axis within a head or the MLP: fsdp splits neither, and blocks are the same on every mesh.
        return _quantized(leaf, stored, TARGETS[name] if name in ("wo", "down") else leaf.ndim - 1)
    return leaf if name == "scale" or leaf.dtype == dtype else leaf.astype(dtype)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _quantized(weight: Array, dtype: str, axis: int) -> Any:
    return sharding.by_parts(functools.partial(quantized.quantize, dtype=dtype, axis=axis), weight)


def joined(frozen: Params, adapters: Params, scale: float) -> Params:
    """The parameters that `decoder.forward` takes: the weights and the adapters, with B times α / r."""

    def scaled(path: Any, leaf: Array) -> Array:
        return scale * leaf if path[-1].key.endswith("_b") else leaf

    return {**frozen, "adapters": jax.tree_util.tree_map_with_path(scaled, adapters)}


@functools.partial(jax.jit, donate_argnums=0)
def merged(params: Params, adapters: Params, scale: float) -> Params:
    """W + scale · A B for every adapter, computed in float32; `params` are donated."""
    layers = dict(params["layers"])
    for module, weights in adapters["layers"].items():
        layers[module] = dict(layers[module])
        for name in sorted({key.rpartition("_")[0] for key in weights}):
            w = layers[module][name]
            a, b = weights[f"{name}_a"], weights[f"{name}_b"]
            inputs, outputs = "abc"[: TARGETS[name]], "xyz"[: b.ndim - 2]
            equation = f"L{inputs}r,Lr{outputs}->L{inputs}{outputs}"
            highest, layout = jax.lax.Precision.HIGHEST, jax.typeof(w).sharding
            product = jnp.einsum(equation, a, b, precision=highest, out_sharding=layout)
            layers[module][name] = (w.astype(jnp.float32) + scale * product).astype(w.dtype)
    return {**params, "layers": layers}


# --- PEFT's format -------------------------------------------------------------------------------

_WEIGHTS, _SETTINGS = "adapter_model.safetensors", "adapter_config.json"
_NAME = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])\.weight")

# With these values of adapter_config.json adapters are W + scale · B A and nothing else. Some ways to begin (PiSSA,
# OLoRA) change the base's weights as well.
_VALUES = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}
# Other keys of it that are read here or change nothing. A key that is in neither list may change what the adapters
# compute: DoRA, whole modules that were trained, what later versions of PEFT invent.
_KEYS = {
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "ensure_weight_tying"),
    *("base_model_name_or_path", "revision", "task_type", "auto_mapping", "inference_mode", "peft_version"),
    *("lora_dropout", "loftq_config", "eva_config", "velora_config", "qalora_group_size", "megatron_core"),
}


def _linear_layers(config: ModelConfig) -> dict[str, list[Part]]:
    """The linear layers of transformers that can have adapters, each with the parts of our weights that it stacks."""
    flat, known = flatten_dict(sharding.unboxed(abstract_params(config)), sep="/"), _known(config)
    stored = weight_files.parts_of(flat, config).items()
    return {n.removesuffix(".weight"): parts for n, parts in stored if parts[0].path.rpartition("/")[2] in known}


def write_peft(
    directory: epath.PathLike,
    adapters: Params,
    config: ModelConfig,
    *,
    scale: float,
    base: str,
    revision: str | None = None,
    under: epath.PathLike | None = None,
) -> None:
    """Writes adapters so that PEFT opens them, in a sealed folder; every process calls this.

    Where the checkpoint has one matrix for several of our weights (Phi-3's qkv_proj), its A stacks theirs and its B is
    block-diagonal. Its rank is then as many times as large, and so is its alpha: it is the same function.

    Args:
        adapters: as `adapters_on` describes them.
        scale: α / r, by which B is multiplied when it is used.
        base: the path or hub id of the model that the adapters were trained on.
        revision: of the base, where it is on the hub.
        under: a folder that this function wrote, with the same scale. Its adapters stand on `base`, and the
            new ones were trained on both; they are written as one, with the sum of their ranks.

    Raises:
        files.NoRoom: the disk has no room for them.
    """
    directory, flat = epath.Path(directory), dict[str, Any](flatten_dict(adapters, sep="/"))
    flat = {path: sharding.to_host(leaf) for path, leaf in flat.items()}
    rank = next(leaf.shape[-1] for path, leaf in flat.items() if path.endswith("_a"))

    def write() -> None:
        tensors: dict[str, np.ndarray] = {}
        for layer, parts in _linear_layers(config).items():
            adapted = [number for number, part in enumerate(parts) if f"{part.path}_a" in flat]
            if not adapted:
                continue
            a = np.zeros((rank * len(adapted), weight_files.shape_of(parts)[1]), np.float32)
            b = np.zeros((weight_files.shape_of(parts)[0], rank * len(adapted)), np.float32)
            rows = weight_files.split(parts, b)
            for block, number in enumerate(adapted):
                within, part = slice(block * rank, (block + 1) * rank), parts[number]
                a[within] = flat[f"{part.path}_a"][part.at].reshape(-1, rank).T
                rows[number][:, within] = flat[f"{part.path}_b"][part.at].reshape(rank, -1).T
            tensors |= {f"base_model.model.{layer}.lora_{side}.weight": x for side, x in (("A", a), ("B", b))}
        if under is not None:
            earlier = safetensors_numpy.load((epath.Path(under) / _WEIGHTS).read_bytes())
            tensors = {n: np.concatenate([earlier[n], x], axis=int("lora_B" in n)) for n, x in tensors.items()}
        content = safetensors_numpy.save(tensors, {"format": "pt"})
        settings = {"base_model_name_or_path": base, "revision": revision, **_settings(tensors, scale)}
        files.remove_here(directory)
        files.check_room_here(directory, len(content) + 2**20, f"the adapters {directory}")
        files.write_here(directory / _WEIGHTS, content)
        files.write_here(directory / _SETTINGS, files.as_json(settings))

    processes.by_first(write)
    seals.seal(directory)


def _settings(tensors: Mapping[str, np.ndarray], scale: float) -> dict[str, Any]:
    """adapter_config.json of these tensors, without the base."""
    ranks = {name.split(".")[-3]: len(x) for name, x in sorted(tensors.items()) if "lora_A" in name}
    least = min(ranks.values())
    larger = {module: rank for module, rank in ranks.items() if rank > least}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": least,
        "lora_alpha": scale * least,
        "rank_pattern": larger,
        "alpha_pattern": {module: scale * rank for module, rank in larger.items()},
        "target_modules": sorted(ranks),
        "bias": "none",
        "inference_mode": True,
    }


def read_peft(directory: Path, config: ModelConfig) -> tuple[Params, str | None]:
    """The adapters that PEFT wrote, float32 on the host with B times α / r, for `merged_peft`; and the base they name.

    The tensors say which layers have adapters: PEFT writes those that `target_modules` chose, in whatever way it did.

    Raises:
        ValueError: a file is missing or damaged, the adapters do not fit, or they compute more than W + α/r · B A.
    """
    seals.check_seal_here(directory)
    settings, place = files.read_object(directory / _SETTINGS), directory / _WEIGHTS
    odd = [key for key, values in _VALUES.items() if settings.get(key) not in values]
    if odd := odd or [key for key, value in settings.items() if value and key not in _KEYS | _VALUES.keys()]:
        raise ValueError(
            f"{directory / _SETTINGS}: {odd[0]}={settings.get(odd[0])!r}: only adapters that compute W + α/r · B A are "
            "read: merge these with PEFT (merge_and_unload), and give the result as model.path"
        )
    try:
        tensors, problems = weight_files.read_tensors(place)
    except ValueError as error:
        tensors, problems = {}, [f"{error} (other files than safetensors are not read)"]
    if problems or not tensors:
        raise ValueError(f"{place} {problems[0] if problems else 'has no tensors'}")
    layers, sides = _linear_layers(config), {}
    for name, tensor in tensors.items():
        found = _NAME.fullmatch(name)
        layer = found[1].replace("language_model.", "", 1) if found else ""  # of a multimodal model
        if not (found and layer in layers and tensor and tensor.dtype in weight_files.DTYPES):
            known = ", ".join(dict.fromkeys(layer.rpartition(".")[2] for layer in layers))
            raise ValueError(f"{place}: {name}: only A and B of {known} are read for this model, as floats")
        sides.setdefault(layer, {})[found[2]] = tensor.map().astype(np.float32)
    largest = max(sum(both["A"].shape[:1]) if "A" in both else 0 for both in sides.values())  # zeros fill up the others
    flat: dict[str, np.ndarray] = {}
    for layer, both in sides.items():
        rank, scale = _rank_and_scale(directory / _SETTINGS, settings, layer)
        out, within = weight_files.shape_of(layers[layer])
        shapes = {side: x.shape for side, x in sorted(both.items())}
        if shapes != {"A": (rank, within), "B": (out, rank)}:
            raise ValueError(f"{place}: {layer}: {shapes} do not fit rank {rank} and the weight {(out, within)}")
        if not all(np.isfinite(x).all() for x in both.values()):
            raise ValueError(f"{place}: {layer}: NaN or infinite numbers in the adapter")
        for part, rows in zip(layers[layer], weight_files.split(layers[layer], both["B"]), strict=True):
            inputs, outputs = part.shape[: part.tensor.inputs], part.shape[part.tensor.inputs :]
            for side, shape in (("a", (*inputs, largest)), ("b", (largest, *outputs))):
                flat.setdefault(f"{part.path}_{side}", np.zeros((config.num_hidden_layers, *shape), np.float32))
            flat[f"{part.path}_a"][part.at][..., :rank] = both["A"].T.reshape(*inputs, rank)
            flat[f"{part.path}_b"][part.at][:rank] = scale * rows.T.reshape(rank, *outputs)
    return unflatten_dict(flat, sep="/"), settings.get("base_model_name_or_path")


def _rank_and_scale(place: Path, settings: Mapping[str, Any], layer: str) -> tuple[int, float]:
    """r and α/r of a layer, which the first pattern that fits its name may state for it, as in PEFT."""

    def stated(key: str, patterns: str) -> Any:
        fitting = (v for k, v in (settings.get(patterns) or {}).items() if re.match(rf"(.*\.)?({k})$", layer))
        return next(fitting, settings.get(key))

    try:
        rank, alpha = stated("r", "rank_pattern"), stated("lora_alpha", "alpha_pattern")
        if not (weight_files.whole(rank) and rank and math.isfinite(alpha)):
            raise ValueError(f"r={rank!r} and lora_alpha={alpha!r}")
        return rank, alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise ValueError(f"{place}: r and lora_alpha, or their patterns, are wrong for {layer}: {error}") from error


def digest(adapters: Params) -> str:
    """A digest of adapters that `read_peft` has read."""
    sha = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(adapters):
        sha.update(f"{path} {leaf.shape}".encode() + leaf.tobytes())
    return sha.hexdigest()[:16]


def merged_peft(params: Params, adapters: Params) -> Params:
    """The weights with adapters of `read_peft` merged into them, in the dtypes of `params`, which are donated."""
    names = [key for weights in adapters["layers"].values() for key in weights]
    rank = jax.tree.leaves(adapters)[0].shape[-1]
    shapes = adapters_on(params, rank, [name.removesuffix("_a") for name in names])
    placed = jax.tree.map(
        lambda leaf, x: jax.make_array_from_callback(x.shape, leaf.sharding, x.__getitem__), shapes, adapters
    )
    return merged(params, placed, 1.0)
