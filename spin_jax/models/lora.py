"""Low-rank adapters (LoRA, arXiv 2106.09685): W stays as it is, and W + (α / r) A B is trained.

    frozen, adapters = freeze(params, dtype), init(adapters_on(shapes, rank, targets), key)
    joined(frozen, adapters, scale)        # the parameters that `decoder.forward` takes
    merged(params, adapters, scale)        # the same model as plain weights

Without the adapters this is the model that an iteration began with, so SPIN's opponent needs no second copy.
B is zero at first, and so is A B. Axes: L layers, r rank; then the weight's inputs and its outputs.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from spin_jax.models.architecture import ModelConfig, Params

TARGETS = {"wq": 1, "wk": 1, "wv": 1, "wo": 2, "gate": 1, "up": 1, "down": 1}  # how many axes are inputs


def check(config: ModelConfig, targets: Sequence[str]) -> None:
    """Raises ValueError for targets that the model does not have, or that take no adapters."""
    known = [name for name in TARGETS if name != "gate" or config.gated]
    if config.num_experts:  # the weights of experts have one more axis
        known = [name for name in known if name.startswith("w")]
    unknown = [f"has {name!r}" for name in targets if name not in known]
    if unknown or not targets:
        what = unknown[0] if unknown else "is empty"
        raise ValueError(f"lora_targets {what}: this model has adapters for {', '.join(known)}")


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


def freeze(params: Params, dtype: Any) -> Params:
    """Casts the weights to the compute dtype, in which they are used anyway; norms keep their dtype.

    `params` are freed leaf by leaf, so that memory never holds both trees.
    """

    def cast(path: Any, leaf: jax.Array) -> jax.Array:
        if path[-1].key == "scale" or leaf.dtype == dtype:
            return leaf
        smaller = leaf.astype(dtype)
        leaf.delete()
        return smaller

    return jax.tree_util.tree_map_with_path(cast, params)


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
