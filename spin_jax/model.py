"""The decoder of Mistral and Llama, in Flax Linen used as functions of a plain parameter tree.

    hidden, _ = forward(Decoder(config), params, tokens, layout)
    logits = project(hidden, output_head(Decoder(config), params))

Axes: B batch, T tokens (queries), S key slots, V vocabulary, D model, N query heads, K key/value heads,
H head dim, F mlp, L layers. Einsum letters follow it. A `Layout` (attention.py) says where in its sequence
each token stands, and which tokens see each other.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from spin_jax import sharding
from spin_jax.attention import KEPT, Layout, attend, matmul_precision, plain

Params = dict[str, Any]


# Whole numbers from 1 to these. No model comes near: beyond them it is the file that is wrong, and shapes
# and loops over layers would overflow before anything says so.
_WHOLE = {
    "vocab_size": 2**24,
    "hidden_size": 2**24,
    "intermediate_size": 2**24,
    "num_hidden_layers": 2**12,
    "num_attention_heads": 2**24,
    "num_key_value_heads": 2**24,
    "head_dim": 2**24,
    "sliding_window": 2**31 - 1,
    "max_position_embeddings": 2**31 - 1,
    "original_max_position_embeddings": 2**31 - 1,
}
_POSITIVE = ("rms_norm_eps", "rope_theta", "factor", "low_freq_factor", "high_freq_factor")


def check_constants(constants: Mapping[str, Any]) -> None:
    """Raises ValueError for the first constant of an architecture that no model can have.

    Args:
        constants: by Hugging Face's names; None and names unknown here are passed over.
    """
    for name, value in constants.items():
        if value is None:
            continue
        if name in _WHOLE and not (type(value) is int and 1 <= value <= _WHOLE[name]):
            raise ValueError(f"{name}={value!r}: a whole number from 1 to {_WHOLE[name]} is wanted")
        if name in _POSITIVE and not (_finite(value) and value > 0):
            raise ValueError(f"{name}={value!r}: a positive number is wanted")
        if name == "initializer_range" and not (_finite(value) and value >= 0):
            raise ValueError(f"{name}={value!r}: a number, at least 0, is wanted")
        if name == "tie_word_embeddings" and not isinstance(value, bool):
            raise ValueError(f"{name}={value!r}: true or false is wanted")


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e38  # float32


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How a checkpoint stretches RoPE beyond the length it was first trained at."""

    rope_type: str  # "linear" or "llama3"
    factor: float
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    original_max_position_embeddings: int = 0

    def __post_init__(self):
        llama3 = self.rope_type == "llama3"
        check_constants(vars(self) if llama3 else {"factor": self.factor})
        if llama3 and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor={self.high_freq_factor} must exceed low_freq_factor={self.low_freq_factor}"
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A checkpoint's architecture, under Hugging Face's names; nothing here has a default."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    sliding_window: int | None  # a token sees itself and the window − 1 tokens before it
    tie_word_embeddings: bool
    max_position_embeddings: int
    initializer_range: float

    def __post_init__(self):
        check_constants(vars(self))
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd, and RoPE turns pairs of dimensions")
        if self.num_attention_heads * self.head_dim > 2**24:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} × head_dim={self.head_dim}: too many"
            )


class Cache(NamedTuple):
    """Keys and values of the tokens so far, one pair of arrays a layer.

    A ring: all rows write the same column, and after the last one comes the first again. Where a token
    stands in its sequence is the layout's business, not the column's.
    """

    keys: tuple[Float[Array, "B K S H"], ...]
    values: tuple[Float[Array, "B K S H"], ...]
    layout: Layout  # [B, S]
    column: Int[Array, ""]  # the next to be written


def rope_frequencies(config: ModelConfig) -> Float[Array, " H/2"]:
    """Radians a position of each pair of head dimensions (arXiv 2104.09864; llama3: Llama 3.1's rule)."""
    half = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**half
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    # Llama 3.1: long waves are stretched by the factor, short ones kept, those between interpolated.
    waves_in_context = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    keep = (waves_in_context - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = jnp.clip(keep, 0.0, 1.0)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


def rope(
    x: Float[Array, "B T N H"], positions: Int[Array, "B T"], frequencies: Float[Array, " H/2"]
) -> Float[Array, "B T N H"]:
    """Rotates pairs (i, i + H/2), Hugging Face's layout; in float32."""
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


class RMSNorm(nn.Module):
    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        scale: Any = self.param("scale", nn.with_partitioning(nn.initializers.ones, (None,)), x.shape[-1:])
        x32 = x.astype(jnp.float32)
        normed = x32 * lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return normed.astype(x.dtype) * scale.astype(x.dtype)


class _Projections(nn.Module):
    """What attention and MLP share: weights by logical axes, cast and gathered when used."""

    config: ModelConfig
    dtype: Any

    def weight(self, name: str, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> Array:
        init = nn.initializers.normal(self.config.initializer_range)
        stored: Any = self.param(name, nn.with_partitioning(init, axes), shape)
        return sharding.gathered(stored.astype(self.dtype))

    def einsum(self, equation: str, *operands: Array, out: tuple[str | None, ...] | None = None) -> Array:
        out_sharding = sharding.spec(*out) if out else None
        return jnp.einsum(
            equation, *operands, precision=matmul_precision(self.dtype), out_sharding=out_sharding
        )


class Attention(_Projections):
    kernel: str = "plain"

    @nn.compact
    def __call__(self, x, layout: Layout, cache: tuple | None):
        c = self.config
        D, N, K, H = c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim
        frequencies = rope_frequencies(c)
        q = self.einsum("BTD,DNH->BTNH", x, self.weight("wq", ("embed", "heads", None), (D, N, H)))
        k = self.einsum("BTD,DKH->BTKH", x, self.weight("wk", ("embed", "kv_heads", None), (D, K, H)))
        v = self.einsum("BTD,DKH->BTKH", x, self.weight("wv", ("embed", "kv_heads", None), (D, K, H)))
        q, k = rope(q, layout.positions, frequencies), rope(k, layout.positions, frequencies)
        q, k, v = checkpoint_name(q, "q"), checkpoint_name(k, "k"), checkpoint_name(v, "v")
        if cache is None:
            out = attend(q, k, v, layout, window=c.sliding_window, kernel=self.kernel)
        elif cache[0].shape[2] == x.shape[1]:  # a prompt that fills a new cache: nothing else is to be seen
            out = attend(q, k, v, layout, window=c.sliding_window)
            k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        else:
            cached_k, cached_v, keys, column = cache
            k = lax.dynamic_update_slice_in_dim(cached_k, k.swapaxes(1, 2), column, axis=2)
            v = lax.dynamic_update_slice_in_dim(cached_v, v.swapaxes(1, 2), column, axis=2)
            out = plain(q, k, v, layout, keys, c.sliding_window)
        wo = self.weight("wo", ("heads", None, "embed"), (N, H, D))
        return self.einsum("BTNH,NHD->BTD", out, wo, out=("batch", None, None)), (k, v)


class MLP(_Projections):
    @nn.compact
    def __call__(self, x):
        D, F = self.config.hidden_size, self.config.intermediate_size
        gate = self.einsum("BTD,DF->BTF", x, self.weight("gate", ("embed", "mlp"), (D, F)))
        up = self.einsum("BTD,DF->BTF", x, self.weight("up", ("embed", "mlp"), (D, F)))
        gate, up = checkpoint_name(gate, "gate"), checkpoint_name(up, "up")
        down = self.weight("down", ("mlp", "embed"), (F, D))
        return self.einsum("BTF,FD->BTD", jax.nn.silu(gate) * up, down, out=("batch", None, None))


class Block(nn.Module):
    config: ModelConfig
    dtype: Any
    kernel: str = "plain"

    @nn.compact
    def __call__(self, x, layout: Layout, cache: tuple | None = None):
        eps = self.config.rms_norm_eps
        normed = RMSNorm(eps, name="attention_norm")(x)
        attended, kv = Attention(self.config, self.dtype, self.kernel, name="attention")(
            normed, layout, cache
        )
        x = checkpoint_name(x + attended, "attention_residual")
        x = x + MLP(self.config, self.dtype, name="mlp")(RMSNorm(eps, name="mlp_norm")(x))
        return x, kv if cache is not None else None


_ATTENTION = ("q", "k", "v", KEPT)
# What each policy keeps of a layer for the backward pass, which computes the rest again.
REMAT: dict[str, tuple[str, ...]] = {
    "attention+mlp": (*_ATTENTION, "attention_residual", "gate", "up"),
    "attention": _ATTENTION,
    "full": (),
}


class Decoder(nn.Module):
    """Tokens → final hidden states. Computes in `dtype`, whatever the parameters' own."""

    config: ModelConfig
    dtype: Any = jnp.float32
    remat: str = "none"  # "none" keeps all activations for the backward pass; else a key of `REMAT`
    kernel: str = "plain"  # of attention without a cache

    def setup(self):
        c = self.config
        init = nn.initializers.normal(c.initializer_range)
        table = nn.with_partitioning(init, ("vocab_rows", "embed_columns"))
        self.embed: Any = self.param("embed", table, (c.vocab_size, c.hidden_size))
        block = Block
        if self.remat != "none":
            keep = jax.checkpoint_policies.save_only_these_names(*REMAT[self.remat])
            block = nn.remat(Block, prevent_cse=False, policy=keep)
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
            length=c.num_hidden_layers,
            metadata_params={nn.PARTITION_NAME: None},
        )(c, self.dtype, self.kernel)
        self.final_norm = RMSNorm(c.rms_norm_eps)
        if not c.tie_word_embeddings:
            head = nn.with_partitioning(init, ("embed", "vocab"))
            self.head: Any = self.param("head", head, (c.hidden_size, c.vocab_size))

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        layout: Layout,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Final hidden states; with a cache, the tokens go into its next T columns, and it is returned.

        With a cache, params["layers"] is a tuple of layers (`sampling_params`): a scanned cache would be
        copied at every step.
        """
        out_sharding = sharding.spec("batch", None, None)
        x = sharding.gathered(self.embed).at[tokens].get(out_sharding=out_sharding).astype(self.dtype)
        if cache is None:
            x, _ = self.layers(x, layout)
        else:
            x, cache = self._decode(x, layout, cache)
        return self.final_norm(x), cache

    def _decode(self, x, layout: Layout, cache: Cache):
        def write(cached, new):
            return lax.dynamic_update_slice_in_dim(cached, new, cache.column, axis=1)

        seen = Layout(
            write(cache.layout.positions, layout.positions), write(cache.layout.segments, layout.segments)
        )
        block = Block(self.config, self.dtype, parent=None)
        layers = self.variables["params"]["layers"]
        keys, values = [], []
        for layer, k, v in zip(layers, cache.keys, cache.values, strict=True):
            x, (k, v) = block.apply({"params": layer}, x, layout, (k, v, seen, cache.column))
            keys.append(k)
            values.append(v)
        return x, Cache(
            tuple(keys), tuple(values), seen, (cache.column + x.shape[1]) % seen.positions.shape[1]
        )


def forward(
    decoder: Decoder,
    params: Params,
    tokens: Int[Array, "B T"],
    layout: Layout,
    cache: Cache | None = None,
) -> tuple[Float[Array, "B T D"], Any]:
    """`Decoder.__call__` as a function of the parameters."""
    return decoder.apply({"params": params}, tokens, layout, cache)  # pyright: ignore[reportReturnType]


def output_head(decoder: Decoder, params: Params) -> Float[Array, "D V"]:
    """What hidden states are projected with, gathered and in the compute dtype."""
    head = params["embed"].T if decoder.config.tie_word_embeddings else params["head"]
    # A tied head is split the other way round: over the model's dimension by tensor.
    return sharding.gathered(sharding.reshard(head.astype(decoder.dtype), "embed", "vocab"))


def project(hidden: Float[Array, "B T D"], head: Float[Array, "D V"]) -> Float[Array, "B T V"]:
    """Next-token logits in float32."""
    precision = matmul_precision(hidden.dtype)
    return jnp.einsum("BTD,DV->BTV", hidden, head, precision=precision, preferred_element_type=jnp.float32)


def new_cache(config: ModelConfig, rows: int, columns: int, dtype: Any) -> Cache:
    """An empty cache, laid out over the mesh in use."""
    shape = (rows, config.num_key_value_heads, columns, config.head_dim)
    layers = range(config.num_hidden_layers)

    def empty(shape, dtype, *logical):
        return jnp.zeros(shape, dtype, out_sharding=sharding.spec(*logical))

    return Cache(
        keys=tuple(empty(shape, dtype, "batch", "kv_heads", None, None) for _ in layers),
        values=tuple(empty(shape, dtype, "batch", "kv_heads", None, None) for _ in layers),
        layout=Layout(*(empty((rows, columns), jnp.int32, "batch", None) for _ in range(2))),
        column=jnp.zeros((), jnp.int32),
    )


def sampling_params(params: Params, config: ModelConfig, dtype: Any, mesh: jax.sharding.Mesh) -> Params:
    """Parameters as decoding wants them: one tree a layer, in the compute dtype, laid out on `mesh`."""
    layouts = jax.tree.map(lambda leaf: leaf.sharding, sampling_params_on(mesh, config, dtype))
    with jax.set_mesh(jax.tree.leaves(params)[0].sharding.mesh):
        cast = _unstacked(params, dtype)
    return jax.device_put(cast, layouts)


@functools.partial(jax.jit, static_argnames="dtype")
def _unstacked(params: Params, dtype: Any) -> Params:
    params = jax.tree.map(lambda w: w.astype(dtype), params)
    layers = params["layers"]
    count = jax.tree.leaves(layers)[0].shape[0]
    return {**params, "layers": tuple(jax.tree.map(lambda w, i=i: w[i], layers) for i in range(count))}


def abstract_params(config: ModelConfig, dtype: Any = jnp.float32) -> Params:
    """Shapes of the parameter tree, boxed with logical axes; nothing is allocated."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    boxed = jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens, Layout(tokens, tokens))["params"]
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), boxed)


def params_on(mesh: jax.sharding.Mesh, config: ModelConfig, dtype: Any = jnp.float32) -> Params:
    """Shapes, dtypes and shardings of the parameters on a mesh; nothing is allocated."""
    boxed = abstract_params(config, dtype)
    layouts = sharding.parameter_shardings(mesh, boxed)
    return jax.tree.map(
        lambda leaf, layout: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout),
        sharding.unboxed(boxed),
        layouts,
    )


def sampling_params_on(mesh: jax.sharding.Mesh, config: ModelConfig, dtype: Any) -> Params:
    """The same of what `sampling_params` makes."""

    def of_one(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        layout = sharding.without_first(leaf.sharding)
        return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=layout)

    stacked = params_on(mesh, config, dtype)
    layer = jax.tree.map(of_one, stacked["layers"])
    return {**stacked, "layers": (layer,) * config.num_hidden_layers}


def init_params(config: ModelConfig, key: Array, mesh: jax.sharding.Mesh) -> Params:
    """Random float32 parameters (normal, the config's initializer_range), born sharded."""
    shardings = sharding.parameter_shardings(mesh, abstract_params(config))
    tokens = jnp.zeros((1, 1), jnp.int32)

    def init(key):
        return nn.unbox(Decoder(config).init(key, tokens, Layout(tokens, tokens))["params"])

    return jax.jit(init, out_shardings=shardings)(key)


def count_params(params: Params) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


@dataclasses.dataclass
class Model:
    """A model as users hold it: architecture, parameters, tokenizer, and what an export needs."""

    config: ModelConfig
    params: Params
    tokenizer: Any  # a transformers fast tokenizer
    dtype: Any  # what it computes in
    mesh: jax.sharding.Mesh
    hf_config: dict[str, Any]  # config.json with transformers' defaults filled in
    generation_config: dict[str, Any]
    revision: str | None = None  # the commit, where it came from the hub

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """Generation config's EOS ids and the tokenizer's EOS, together."""
        ids = self.generation_config.get("eos_token_id")
        ids = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
        if self.tokenizer.eos_token_id is not None:
            ids.append(self.tokenizer.eos_token_id)
        return tuple(sorted(set(ids)))
