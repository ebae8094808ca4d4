"""The decoder of Mistral and Llama, in Flax Linen used as functions of a plain parameter tree.

    hidden, _ = forward(Decoder(config), params, tokens, positions, segments)
    logits = project(Decoder(config), params, hidden)

Axes: B batch, T tokens (queries), S key slots, V vocabulary, D model, N query heads, K key/value heads,
G = N / K, H head dim, F mlp, L layers. Einsum letters follow it.

`positions` [B, T] are the places within each sequence, and drive RoPE, causality and the window.
`segments` [B, T] say which tokens may see each other: 0 is padding, equal positive numbers belong
together; −s belongs to s but is itself seen by none (only the `official` switch has such tokens).
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float, Int

from spin_jax import sharding

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How a checkpoint stretches RoPE beyond the length it was first trained at."""

    rope_type: str  # "linear" or "llama3"
    factor: float
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    original_max_position_embeddings: int = 0


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
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window={self.sliding_window}: at least 1, or null for none")


class Cache(NamedTuple):
    """Keys and values of the tokens so far, one pair of arrays a layer; `slot` is the next free one."""

    keys: tuple[Float[Array, "B S K H"], ...]
    values: tuple[Float[Array, "B S K H"], ...]
    positions: Int[Array, "B S"]
    segments: Int[Array, "B S"]
    slot: Int[Array, ""]


def matmul_precision(dtype: Any) -> lax.Precision | None:
    """float32 means float32, on accelerators too (whose default is a shorter format)."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None


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


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    q_positions: Int[Array, "B T"],
    k_positions: Int[Array, "B S"],
    q_segments: Int[Array, "B T"],
    k_segments: Int[Array, "B S"],
    window: int | None,
) -> Float[Array, "B T N H"]:
    """Grouped-query attention over the keys that each query may see; softmax in float32."""
    behind = q_positions[:, :, None] - k_positions[:, None, :]
    visible = (jnp.abs(q_segments)[:, :, None] == k_segments[:, None, :]) & (behind >= 0)
    if window is not None:
        visible &= behind < window
    precision = matmul_precision(q.dtype)
    q = sharding.grouped_heads(q, k.shape[2])
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, precision=precision, preferred_element_type=jnp.float32)
    scores = jnp.where(visible[:, None, None], scores * q.shape[-1] ** -0.5, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return sharding.merged_heads(jnp.einsum("BKGTS,BSKH->BTKGH", weights, v, precision=precision))


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
    @nn.compact
    def __call__(self, x, positions, segments, cache: tuple | None):
        c = self.config
        D, N, K, H = c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim
        frequencies = rope_frequencies(c)
        q = self.einsum("BTD,DNH->BTNH", x, self.weight("wq", ("embed", "heads", None), (D, N, H)))
        k = self.einsum("BTD,DKH->BTKH", x, self.weight("wk", ("embed", "kv_heads", None), (D, K, H)))
        v = self.einsum("BTD,DKH->BTKH", x, self.weight("wv", ("embed", "kv_heads", None), (D, K, H)))
        q, k = rope(q, positions, frequencies), rope(k, positions, frequencies)
        k_positions, k_segments = positions, segments
        if cache is not None:
            keys, values, k_positions, k_segments, slot = cache
            k = lax.dynamic_update_slice_in_dim(keys, k.astype(keys.dtype), slot, axis=1)
            v = lax.dynamic_update_slice_in_dim(values, v.astype(values.dtype), slot, axis=1)
        out = attend(
            q,
            k,
            v,
            q_positions=positions,
            k_positions=k_positions,
            q_segments=segments,
            k_segments=k_segments,
            window=c.sliding_window,
        )
        wo = self.weight("wo", ("heads", None, "embed"), (N, H, D))
        return self.einsum("BTNH,NHD->BTD", out, wo, out=("batch", None, None)), (k, v)


class MLP(_Projections):
    @nn.compact
    def __call__(self, x):
        D, F = self.config.hidden_size, self.config.intermediate_size
        gate = self.einsum("BTD,DF->BTF", x, self.weight("gate", ("embed", "mlp"), (D, F)))
        up = self.einsum("BTD,DF->BTF", x, self.weight("up", ("embed", "mlp"), (D, F)))
        down = self.weight("down", ("mlp", "embed"), (F, D))
        return self.einsum("BTF,FD->BTD", jax.nn.silu(gate) * up, down, out=("batch", None, None))


class Block(nn.Module):
    config: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(self, x, positions, segments, cache: tuple | None = None):
        eps = self.config.rms_norm_eps
        normed = RMSNorm(eps, name="attention_norm")(x)
        attended, kv = Attention(self.config, self.dtype, name="attention")(
            normed, positions, segments, cache
        )
        x = x + attended
        x = x + MLP(self.config, self.dtype, name="mlp")(RMSNorm(eps, name="mlp_norm")(x))
        return x, kv if cache is not None else None


class Decoder(nn.Module):
    """Tokens → final hidden states → logits. Computes in `dtype`, whatever the parameters' own."""

    config: ModelConfig
    dtype: Any = jnp.float32
    remat: bool = False  # recompute each layer in the backward pass instead of keeping its activations

    def setup(self):
        c = self.config
        init = nn.initializers.normal(c.initializer_range)
        table = nn.with_partitioning(init, ("vocab_rows", "embed_columns"))
        self.embed: Any = self.param("embed", table, (c.vocab_size, c.hidden_size))
        block = nn.remat(Block, prevent_cse=False) if self.remat else Block
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
            length=c.num_hidden_layers,
            metadata_params={nn.PARTITION_NAME: None},
        )(c, self.dtype)
        self.final_norm = RMSNorm(c.rms_norm_eps)
        if not c.tie_word_embeddings:
            head = nn.with_partitioning(init, ("embed", "vocab"))
            self.head: Any = self.param("head", head, (c.hidden_size, c.vocab_size))

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segments: Int[Array, "B T"],
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Final hidden states; with a cache, the tokens go into its next T slots, and it is returned.

        With a cache, params["layers"] is a tuple of layers (`unstacked`): a scanned cache would be
        copied at every step.
        """
        out_sharding = sharding.spec("batch", None, None)
        x = self.embed.at[tokens].get(out_sharding=out_sharding).astype(self.dtype)
        if cache is None:
            x, _ = self.layers(x, positions, segments)
        else:
            x, cache = self._decode(x, positions, segments, cache)
        return self.final_norm(x), cache

    def _decode(self, x, positions, segments, cache: Cache):
        k_positions = lax.dynamic_update_slice_in_dim(cache.positions, positions, cache.slot, axis=1)
        k_segments = lax.dynamic_update_slice_in_dim(cache.segments, segments, cache.slot, axis=1)
        block = Block(self.config, self.dtype, parent=None)
        layers = self.variables["params"]["layers"]
        keys, values = [], []
        for layer, k, v in zip(layers, cache.keys, cache.values, strict=True):
            slots = (k, v, k_positions, k_segments, cache.slot)
            x, (k, v) = block.apply({"params": layer}, x, positions, segments, slots)
            keys.append(k)
            values.append(v)
        return x, Cache(tuple(keys), tuple(values), k_positions, k_segments, cache.slot + x.shape[1])

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Next-token logits in float32."""
        head = self.embed.T if self.config.tie_word_embeddings else self.head
        head = sharding.reshard(head.astype(self.dtype), None, "vocab")
        precision = matmul_precision(self.dtype)
        return jnp.einsum(
            "BTD,DV->BTV", hidden, head, precision=precision, preferred_element_type=jnp.float32
        )


def forward(
    decoder: Decoder,
    params: Params,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    cache: Cache | None = None,
) -> tuple[Float[Array, "B T D"], Cache | None]:
    """`Decoder.__call__` as a function of the parameters."""
    return decoder.apply({"params": params}, tokens, positions, segments, cache)  # pyright: ignore[reportReturnType]


def project(decoder: Decoder, params: Params, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """`Decoder.logits` as a function of the parameters."""
    return decoder.apply({"params": params}, hidden, method="logits")  # pyright: ignore[reportReturnType]


def new_cache(config: ModelConfig, batch: int, slots: int, dtype: Any) -> Cache:
    """An empty cache for `batch` sequences of `slots` tokens, laid out over the mesh in use."""
    shape = (batch, slots, config.num_key_value_heads, config.head_dim)
    layers = range(config.num_hidden_layers)

    def empty(shape, dtype, *logical):
        return jnp.zeros(shape, dtype, out_sharding=sharding.spec(*logical))

    return Cache(
        keys=tuple(empty(shape, dtype, "batch", None, "kv_heads", None) for _ in layers),
        values=tuple(empty(shape, dtype, "batch", None, "kv_heads", None) for _ in layers),
        positions=empty((batch, slots), jnp.int32, "batch", None),
        segments=empty((batch, slots), jnp.int32, "batch", None),
        slot=jnp.zeros((), jnp.int32),
    )


def unstacked(params: Params, dtype: Any) -> Params:
    """Parameters for decoding: one tree a layer, cast to `dtype`."""
    params = jax.tree.map(lambda w: w.astype(dtype), params)
    layers = params["layers"]
    count = jax.tree.leaves(layers)[0].shape[0]
    return {**params, "layers": tuple(jax.tree.map(lambda w, i=i: w[i], layers) for i in range(count))}


def abstract_params(config: ModelConfig, dtype: Any = jnp.float32) -> Params:
    """Shapes of the parameter tree, boxed with logical axes; nothing is allocated."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    boxed = jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens, tokens, tokens)["params"]
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), boxed)


def init_params(config: ModelConfig, key: Array, mesh: jax.sharding.Mesh) -> Params:
    """Random float32 parameters (normal, the config's initializer_range), born sharded."""
    shardings = sharding.parameter_shardings(mesh, abstract_params(config))
    tokens = jnp.zeros((1, 1), jnp.int32)

    def init(key):
        return nn.unbox(Decoder(config).init(key, tokens, tokens, tokens)["params"])

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
