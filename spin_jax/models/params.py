"""Makes, counts and lays out parameter trees, and converts them for sampling and training."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array

from spin_jax.kernels.layout import Layout
from spin_jax.models.architecture import ModelConfig, Params
from spin_jax.models.decoder import Decoder
from spin_jax.runtime import sharding


def copies(params: Params, dtype: Any) -> Params:
    """{"copies": the layers' matrices in the compute dtype}, for `forward` beside the parameters; {} if they have it.

    With them, later passes need no casts. Gradients go to the parameters, in the parameters' dtype.
    """
    layers = params["layers"]
    if all(w.dtype == dtype for w in jax.tree.leaves(layers) if w.ndim > 2):
        return {}
    return {"copies": {"layers": jax.tree.map(lambda w: w.astype(dtype) if w.ndim > 2 else w, layers)}}


def sampling_params(params: Params, config: ModelConfig, dtype: Any, mesh: jax.sharding.Mesh) -> Params:
    """Parameters for decoding: one tree for each layer, in the compute dtype, laid out on `mesh`.

    Matrices that read the same input are fused, because a decode step consists of many small products. On
    TPUs they stay separate: the fused matrix has few rows between its first and its last dimension, and TPU
    memory would hold it in tiles that are half empty.
    """
    layouts = jax.tree.map(lambda leaf: leaf.sharding, sampling_params_on(mesh, config, dtype))
    with jax.set_mesh(jax.tree.leaves(params)[0].sharding.mesh):
        converted = _for_sampling(params, config, dtype, _fuses(mesh))
    return jax.device_put(converted, layouts)


def _fuses(mesh: jax.sharding.Mesh) -> bool:
    return mesh.devices.flat[0].platform != "tpu"


@functools.partial(jax.jit, static_argnames=("config", "dtype", "fused"))
def _for_sampling(params: Params, config: ModelConfig, dtype: Any, fused: bool) -> Params:
    params = jax.tree.map(lambda w: w.astype(dtype), params)
    layers = [jax.tree.map(lambda w, i=i: w[i], params["layers"]) for i in range(config.num_hidden_layers)]
    return {**params, "layers": tuple(_fuse_layer(layer, config) if fused else layer for layer in layers)}


def _fuse_layer(layer: Params, config: ModelConfig) -> Params:
    """Fuses one layer's q, k and v, which are split as kv heads are, and its gate and up."""
    attention, mlp = dict(layer["attention"]), dict(layer["mlp"])
    for fused, names in (("wqkv", ("wq", "wk", "wv")), ("bqkv", ("bq", "bk", "bv"))):
        if names[0] in attention:
            q, k, v = (attention.pop(name) for name in names)
            q = sharding.grouped(q, config.num_key_value_heads)
            attention[fused] = jnp.concatenate([q, k[..., None, :], v[..., None, :]], axis=-2)
    for fused, names in (("gate_up", ("gate", "up")), ("gate_up_bias", ("gate_bias", "up_bias"))):
        if names[0] in mlp and not config.num_experts:
            mlp[fused] = jnp.stack([mlp.pop(name) for name in names], axis=-2)
    return {**layer, "attention": attention, "mlp": mlp}


@functools.cache
def abstract_params(config: ModelConfig, dtype: Any = jnp.float32) -> Params:
    """Shapes of the parameter tree, boxed with logical axes; nothing is allocated."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    boxed = jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens, Layout(tokens, tokens))["params"]
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), boxed)


def params_on(mesh: jax.sharding.Mesh, config: ModelConfig, dtype: Any = jnp.float32) -> Params:
    """Shapes, dtypes and shardings of the parameters on a mesh; nothing is allocated."""
    boxed = abstract_params(config, dtype)
    layouts = sharding.parameter_shardings(mesh, boxed)
    return jax.tree.map(lambda leaf, layout: leaf.update(sharding=layout), sharding.unboxed(boxed), layouts)


def sampling_params_on(mesh: jax.sharding.Mesh, config: ModelConfig, dtype: Any) -> Params:
    """Shapes, dtypes and shardings of the result of `sampling_params`; nothing is allocated."""
    params = params_on(mesh, config)
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(lambda params: _for_sampling(params, config, dtype, _fuses(mesh)), params)
    return sharding.laid_out(mesh, shapes)


def init_params(config: ModelConfig, key: Array, mesh: jax.sharding.Mesh) -> Params:
    """Random float32 parameters (normal, with the config's initializer_range), created in their shards."""
    shardings = sharding.parameter_shardings(mesh, abstract_params(config))
    tokens = jnp.zeros((1, 1), jnp.int32)

    def init(key):
        return nn.unbox(Decoder(config).init(key, tokens, Layout(tokens, tokens))["params"])

    return jax.jit(init, out_shardings=shardings)(key)


@functools.partial(jax.jit, donate_argnums=0)
def mixed(first: Params, second: Params, share: float) -> Params:
    """share · first + (1 − share) · second, of the float32 weights of two models; `first` are donated."""
    return jax.tree.map(lambda a, b: share * a + (1 - share) * b, first, second)


def count_params(params: Params) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
