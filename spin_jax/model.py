"""The decoder, in Flax Linen used as functions of a plain parameter tree; families are options of it.

    hidden, _ = forward(Decoder(config), params, tokens, layout)
    logits = project(hidden, output_head(Decoder(config), params))

Axes: B batch, T tokens (queries), S key slots, V vocabulary, D model, N query heads, K key/value heads,
H head dim, R rotary dim, F mlp, L layers, E experts, M matrices that are one. Einsum letters follow it.
A `Layout` (attention.py) says where in its sequence each token stands, and which tokens see each other.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from spin_jax.attention import attend, plain
from spin_jax.kernels import flash_decode
from spin_jax.kernels.layout import KEPT, Layout, matmul_precision, on_cpu
from spin_jax.runtime import sharding

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
    "num_local_experts": 2**16,
    "num_experts_per_tok": 2**16,
    "max_position_embeddings": 2**31 - 1,
    "original_max_position_embeddings": 2**31 - 1,
}
_POSITIVE = (
    "rms_norm_eps",
    "layer_norm_eps",
    "norm_eps",
    "rope_theta",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "attention_factor",
    "partial_rotary_factor",
    "query_pre_attn_scalar",
    "attention_softcap",
    "logit_softcap",
    "attn_logit_softcapping",
    "final_logit_softcapping",
)


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

    rope_type: str  # "linear", "llama3" or "longrope"
    factor: float = 1.0
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    original_max_position_embeddings: int = 0
    short_factor: tuple[float, ...] = ()  # longrope: of each frequency, within the length first trained at
    attention_factor: float = 1.0  # longrope: of sines and cosines

    def __post_init__(self):
        llama3 = self.rope_type == "llama3"
        check_constants(
            vars(self) if llama3 else {"factor": self.factor, "attention_factor": self.attention_factor}
        )
        for factor in self.short_factor:
            check_constants({"factor": factor})
        if llama3 and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor={self.high_freq_factor} must exceed low_freq_factor={self.low_freq_factor}"
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A checkpoint's architecture. Constants have no default; the default of an option is what Llama does."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    rotary_dim: int  # of a head's dimensions, the first so many are rotated
    windows: tuple[int | None, ...]  # of the layers, a pattern they repeat: a token sees itself and the
    #                                  window − 1 tokens before it; None: all
    activation: str  # "silu", or "gelu" by its tanh formula
    tie_word_embeddings: bool
    max_position_embeddings: int
    initializer_range: float
    norm: str = "rms"  # "rms+1" multiplies by 1 + scale; "layer" subtracts the mean, and has a bias
    parallel: bool = False  # attention and MLP read the same norm and are added at once
    post_norms: bool = False  # what attention and MLP give is normed before it is added
    qk_norm: bool = False  # queries and keys are normed, head by head
    qkv_bias: bool = False
    output_bias: bool = False  # of attention
    mlp_bias: bool = False
    head_bias: bool = False
    gated: bool = True  # down(act(gate) · up), or else down(act(up))
    num_experts: int = 0  # MLPs to choose from; 0: there is but one
    experts_per_token: int = 0
    scale_embedding: bool = False  # by √D
    query_scale: float | None = None  # of scores; None: H^−½
    attention_softcap: float | None = None  # scores are kept within ± this by tanh
    logit_softcap: float | None = None

    def __post_init__(self):
        check_constants(vars(self))
        for window in self.windows:
            check_constants({"sliding_window": window})
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            raise ValueError(
                f"RoPE turns pairs of dimensions: not {self.rotary_dim} of head_dim={self.head_dim}"
            )
        if self.rope_scaling and len(self.rope_scaling.short_factor) not in (0, self.rotary_dim // 2):
            raise ValueError(
                f"short_factor has {len(self.rope_scaling.short_factor)} numbers for "
                f"{self.rotary_dim // 2} frequencies"
            )
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok={self.experts_per_token} exceeds num_local_experts={self.num_experts}"
            )
        if self.num_attention_heads * self.head_dim > 2**24:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} × head_dim={self.head_dim}: too many"
            )

    @property
    def longest_window(self) -> int | None:
        """How far back any layer sees; None: to the beginning."""
        return None if None in self.windows else max(w for w in self.windows if w)


class Cache(NamedTuple):
    """Keys and values of the tokens so far, one pair of arrays a layer.

    A ring: all rows write the same column, and after the last one comes the first again. A row's tokens
    stand one after the other, the newest of every row in the same column: the newest token's position says
    where the others are.
    """

    keys: tuple[Float[Array, "B K S H"], ...]
    values: tuple[Float[Array, "B K S H"], ...]
    column: Int[Array, ""]  # the next to be written

    @property
    def columns(self) -> int:
        return self.keys[0].shape[2]


def ring_layout(newest: Int[Array, " B"], column: Int[Array, ""], columns: int) -> Layout:
    """Where the tokens in a ring's columns stand, the newest of each row at this position, in this column.

    Columns that hold none of the row's tokens are padding.
    """
    back = (column - jnp.arange(columns)) % columns
    positions = newest[:, None] - back
    return Layout(positions, (positions >= 0).astype(jnp.int32))


def rope_frequencies(config: ModelConfig) -> Float[Array, " R/2"]:
    """Radians a position of each pair of rotated dimensions.

    By arXiv 2104.09864; llama3: Llama 3.1's rule; longrope: arXiv 2402.13753, as far as its short factors go.
    """
    half = jnp.arange(0, config.rotary_dim, 2, dtype=jnp.float32) / config.rotary_dim
    frequencies = 1.0 / config.rope_theta**half
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    if scaling.rope_type == "longrope":
        return frequencies / jnp.array(scaling.short_factor, jnp.float32)
    # Llama 3.1: long waves are stretched by the factor, short ones kept, those between interpolated.
    waves_in_context = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    keep = (waves_in_context - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = jnp.clip(keep, 0.0, 1.0)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


def rope(
    x: Float[Array, "B T N H"],
    positions: Int[Array, "B T"],
    frequencies: Float[Array, " R/2"],
    factor: float = 1.0,
) -> Float[Array, "B T N H"]:
    """Rotates pairs (i, i + R/2) of the first R dimensions, Hugging Face's layout; in float32."""
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    if factor != 1:
        sin, cos = factor * sin, factor * cos
    R = 2 * frequencies.shape[0]
    first, second = jnp.split(x[..., :R].astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([rotated.astype(x.dtype), x[..., R:]], axis=-1)


class Norm(nn.Module):
    """Over the last dimension, in float32: RMSNorm (arXiv 1910.07467) or LayerNorm (arXiv 1607.06450)."""

    kind: str
    eps: float
    dtype: Any = None  # of what it returns; None: as it came

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        def vector(name: str, init: Any) -> Any:
            return self.param(name, nn.with_partitioning(init, (None,)), x.shape[-1:])

        plus_one = self.kind == "rms+1"
        scale = vector("scale", nn.initializers.zeros if plus_one else nn.initializers.ones)
        x32 = x.astype(jnp.float32)
        if self.kind == "layer":
            x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        normed = x32 * lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        scale = scale.astype(jnp.float32)
        normed *= 1.0 + scale if plus_one else scale
        if self.kind == "layer":
            normed += vector("bias", nn.initializers.zeros).astype(jnp.float32)
        return normed.astype(self.dtype or x.dtype)


_ACTIVATIONS = {"silu": jax.nn.silu, "gelu": functools.partial(jax.nn.gelu, approximate=True)}


class _Projections(nn.Module):
    """What attention and MLP share: weights by logical axes, cast and gathered when used."""

    config: ModelConfig
    dtype: Any

    def weight(self, name: str, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> Array:
        init = nn.initializers.normal(self.config.initializer_range)
        stored: Any = self.param(name, nn.with_partitioning(init, axes), shape)
        return sharding.gathered(stored.astype(self.dtype))

    def bias(self, name: str, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> Array:
        stored: Any = self.param(name, nn.with_partitioning(nn.initializers.zeros, axes), shape)
        return stored.astype(self.dtype)

    def linear(
        self,
        equation: str,
        x: Array,
        name: str,
        axes: tuple[str | None, ...],
        shape: tuple[int, ...],
        out: tuple[str | None, ...] | None = None,
    ) -> Array:
        """x W, and where the weight has an adapter (lora.py) x W + (x A) B."""
        y = self.einsum(equation, x, self.weight(name, axes, shape), out=out)
        if not self.has_variable("lora", f"{name}_a"):
            return y
        a, b = (self.get_variable("lora", f"{name}_{part}").astype(self.dtype) for part in "ab")
        read, of_weight, made = re.split(",|->", equation)
        inputs = "".join(axis for axis in of_weight if axis in read)
        outputs = of_weight.removeprefix(inputs)
        narrow = self.einsum(f"{read},{inputs}r->BTr", x, sharding.gathered(a), out=("batch", None, None))
        return y + self.einsum(f"BTr,r{outputs}->{made}", narrow, sharding.gathered(b), out=out)

    def einsum(self, equation: str, *operands: Array, out: tuple[str | None, ...] | None = None) -> Array:
        out_sharding = sharding.spec(*out) if out else None
        made = jnp.einsum(
            equation, *operands, precision=matmul_precision(self.dtype), out_sharding=out_sharding
        )
        return sharding.summed(made) if out else made


class Attention(_Projections):
    window: int | None = None
    kernel: str = "plain"

    @nn.compact
    def __call__(self, x, layout: Layout, cache: tuple | None):
        c = self.config
        D, N, K, H = c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim
        if self.has_variable("params", "wqkv"):  # as `sampling_params` has them
            M, axes = N // K + 2, ("kv_heads", None, None)
            qkv = self.linear("BTD,DKMH->BTKMH", x, "wqkv", ("embed", *axes), (D, K, M, H))
            if c.qkv_bias:
                qkv += self.bias("bqkv", axes, (K, M, H))
            q, k, v = sharding.merged_heads(qkv[..., :-2, :]), qkv[..., -2, :], qkv[..., -1, :]
        else:
            q = self.linear("BTD,DNH->BTNH", x, "wq", ("embed", "heads", None), (D, N, H))
            k = self.linear("BTD,DKH->BTKH", x, "wk", ("embed", "kv_heads", None), (D, K, H))
            v = self.linear("BTD,DKH->BTKH", x, "wv", ("embed", "kv_heads", None), (D, K, H))
            if c.qkv_bias:
                q += self.bias("bq", ("heads", None), (N, H))
                k += self.bias("bk", ("kv_heads", None), (K, H))
                v += self.bias("bv", ("kv_heads", None), (K, H))
        if c.qk_norm:
            q, k = Norm(c.norm, c.norm_eps, name="q_norm")(q), Norm(c.norm, c.norm_eps, name="k_norm")(k)
        turn = rope_frequencies(c), c.rope_scaling.attention_factor if c.rope_scaling else 1.0
        q, k = rope(q, layout.positions, *turn), rope(k, layout.positions, *turn)
        how = {"window": self.window, "scale": c.query_scale, "softcap": c.attention_softcap}
        q, k, v = checkpoint_name(q, "q"), checkpoint_name(k, "k"), checkpoint_name(v, "v")
        if cache is None:
            out = attend(q, k, v, layout, kernel=self.kernel, **how)
        elif cache[0].shape[2] == x.shape[1]:  # a prompt that fills a new cache: nothing else is to be seen
            # The other kernels want the layout `unshared`.
            out = attend(q, k, v, layout, kernel="flash" if self.kernel == "flash" else "plain", **how)
            k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        else:
            cached_k, cached_v, column = cache
            k = lax.dynamic_update_slice_in_dim(cached_k, k.swapaxes(1, 2), column, axis=2)
            v = lax.dynamic_update_slice_in_dim(cached_v, v.swapaxes(1, 2), column, axis=2)
            out = self._over_ring(q, k, v, layout, column, **how)
        axes, rows = ("heads", None, "embed"), ("batch", None, None)
        out = self.linear("BTNH,NHD->BTD", out, "wo", axes, (N, H, D), out=rows)
        return out + self.bias("bo", (None,), (D,)) if c.output_bias else out, (k, v)

    def _over_ring(self, q, k, v, layout: Layout, column, *, window, scale, softcap) -> Array:
        """New tokens' attention to a ring that holds them from this column on."""
        (T, S), newest = (q.shape[1], k.shape[2]), layout.positions[:, -1]
        if T > 1 or self.kernel != "flash":
            seen = ring_layout(newest, column + T - 1, S)
            return plain(q, k, v, layout, seen, window, scale, softcap)
        lengths = jnp.minimum(newest + 1, min(window or S, S))
        lengths = jnp.where(layout.segments[:, -1] > 0, lengths, 0)
        read = functools.partial(flash_decode.attend, scale=scale, softcap=softcap, interpret=on_cpu())
        return sharding.by_slots_and_heads(read)(q[:, 0], k, v, column, lengths)[:, None]


class MLP(_Projections):
    @nn.compact
    def __call__(self, x):
        c = self.config
        act, D, F = _ACTIVATIONS[c.activation], c.hidden_size, c.intermediate_size

        def widened(name: str) -> Array:
            wide = self.linear("BTD,DF->BTF", x, name, ("embed", "mlp"), (D, F))
            if c.mlp_bias:
                wide += self.bias(f"{name}_bias", ("mlp",), (F,))
            return checkpoint_name(wide, name).astype(jnp.float32)

        if self.has_variable("params", "gate_up"):  # as `sampling_params` has them
            wide = self.linear("BTD,DMF->BTMF", x, "gate_up", ("embed", None, "mlp"), (D, 2, F))
            if c.mlp_bias:
                wide += self.bias("gate_up_bias", (None, "mlp"), (2, F))
            wide = wide.astype(jnp.float32)
            inner = act(wide[:, :, 0]) * wide[:, :, 1]
        else:
            inner = act(widened("gate")) * widened("up") if c.gated else act(widened("up"))
        rows = ("batch", None, None)
        out = self.linear("BTF,FD->BTD", inner.astype(self.dtype), "down", ("mlp", "embed"), (F, D), out=rows)
        return out + self.bias("down_bias", (None,), (D,)) if c.mlp_bias else out


class Experts(_Projections):
    """Each token goes through the few of E gated MLPs that a router likes best (Mixtral, arXiv 2401.04088).

    None is dropped: tokens are sorted by expert, and `ragged_dot` multiplies each stretch with its own.
    """

    @nn.compact
    def __call__(self, x):
        c = self.config
        D, F, E = c.hidden_size, c.intermediate_size, c.num_experts
        scores = self.einsum("BTD,DE->BTE", x, self.weight("router", ("embed", None), (D, E)))
        probabilities = jax.nn.softmax(scores.astype(jnp.float32), axis=-1)
        wide, narrow = (None, "embed", "mlp"), (None, "mlp", "embed")
        weights = [self.weight(name, wide, (E, D, F)) for name in ("gate", "up")]
        return sharding.by_rows(self._chosen)(
            x, probabilities, *weights, self.weight("down", narrow, (E, F, D))
        )

    def _chosen(self, x, probabilities, gate, up, down):
        """Of one device's tokens, with all experts or a slice of each one's width."""
        act, chosen = _ACTIVATIONS[self.config.activation], self.config.experts_per_token
        tokens = x.reshape(-1, x.shape[-1])
        shares, experts = lax.top_k(probabilities.reshape(len(tokens), -1), chosen)
        shares = (shares / shares.sum(axis=-1, keepdims=True)).reshape(-1)
        order = jnp.argsort(experts.reshape(-1))
        sizes = jnp.bincount(experts.reshape(-1), length=len(gate))
        dot = functools.partial(lax.ragged_dot, group_sizes=sizes, precision=matmul_precision(self.dtype))
        rows = tokens[order // chosen]
        gate, up = checkpoint_name(dot(rows, gate), "gate"), checkpoint_name(dot(rows, up), "up")
        inner = act(gate.astype(jnp.float32)) * up.astype(jnp.float32)
        out = dot(inner.astype(x.dtype), down) * shares[order][:, None].astype(x.dtype)
        return jnp.zeros_like(tokens).at[order // chosen].add(out).reshape(x.shape)


class Block(nn.Module):
    config: ModelConfig
    dtype: Any
    window: int | None
    kernel: str = "plain"

    @nn.compact
    def __call__(self, x, layout: Layout, cache: tuple | None = None):
        c = self.config
        norm = functools.partial(Norm, c.norm, c.norm_eps, self.dtype)
        attention = Attention(c, self.dtype, self.window, self.kernel, name="attention")
        mlp = (Experts if c.num_experts else MLP)(c, self.dtype, name="mlp")
        normed = norm(name="attention_norm")(x)
        attended, kv = attention(normed, layout, cache)
        kv = kv if cache is not None else None
        if c.parallel:
            return x + attended + mlp(normed), kv
        if c.post_norms:
            attended = norm(name="attention_post_norm")(attended)
        x += checkpoint_name(attended, "attention_residual")
        made = mlp(norm(name="mlp_norm")(x))
        if c.post_norms:
            made = norm(name="mlp_post_norm")(made)
        return x + made, kv


_ATTENTION = ("q", "k", "v", KEPT)
# What each policy keeps of a layer for the backward pass, which computes the rest again.
REMAT: dict[str, tuple[str, ...]] = {
    "attention+mlp": (*_ATTENTION, "attention_residual", "gate", "up"),
    "attention": _ATTENTION,
    "full": (),
}


class Decoder(nn.Module):
    """Tokens → final hidden states. Computes in `dtype`, whatever the parameters' own.

    What the layers add up is float32 in any case, and so is what lies between two matmuls: rounded to
    bfloat16 as well, a token's log-prob would be a third to a half farther from its value in float32.
    """

    config: ModelConfig
    dtype: Any = jnp.float32
    remat: str = "none"  # "none" keeps all activations for the backward pass; else a key of `REMAT`
    kernel: str = "plain"  # of attention without a cache

    def setup(self):
        c = self.config
        init = nn.initializers.normal(c.initializer_range)
        table = nn.with_partitioning(init, ("vocab_rows", "embed_columns"))
        self.embed: Any = self.param("embed", table, (c.vocab_size, c.hidden_size))
        self.layers = nn.scan(  # this makes their parameters, stacked; `_scanned` runs them
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
            length=c.num_hidden_layers,
            metadata_params={nn.PARTITION_NAME: None},
        )(c, self.dtype, None)
        self.final_norm = Norm(c.norm, c.norm_eps, self.dtype)
        if not c.tie_word_embeddings:
            head = nn.with_partitioning(init, ("embed", "vocab"))
            self.head: Any = self.param("head", head, (c.hidden_size, c.vocab_size))
        if c.head_bias:
            bias = nn.with_partitioning(nn.initializers.zeros, ("vocab",))
            self.head_bias: Any = self.param("head_bias", bias, (c.vocab_size,))

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
        if self.config.scale_embedding:
            x *= jnp.asarray(math.sqrt(self.config.hidden_size), self.dtype)
        x = x.astype(jnp.float32)
        if self.is_initializing():
            x, _ = self.layers(x, layout)
        elif cache is None:
            x = self._scanned(x, layout)
        else:
            x, cache = self._decode(x, layout, cache)
        return self.final_norm(x), cache

    def _scanned(self, x, layout: Layout):
        """One layer after the other; a step of the loop is one round of the pattern of windows."""
        c = self.config

        def layer_with(window: int | None):
            block = Block(c, self.dtype, window, self.kernel, parent=None)

            def layer(number, variables, x):
                # The slice is taken in here: what a checkpointed function is given, its backward pass keeps.
                if len(c.windows) > 1:
                    variables = jax.tree.map(lambda w: w[number], variables)
                if copies := variables.pop("copies", None):
                    variables["params"] = jax.tree.map(_copy_for, variables["params"], copies)
                return block.apply(variables, x, layout)[0]

            if self.remat == "none":
                return layer
            keep = jax.checkpoint_policies.save_only_these_names(*REMAT[self.remat])
            return jax.checkpoint(layer, prevent_cse=False, policy=keep, static_argnums=0)

        each = [layer_with(window) for window in c.windows]

        def round_of(x, layers):
            for number, layer in enumerate(each):
                x = layer(number, layers, x)
            return x, None

        layers = {kind: tree["layers"] for kind, tree in self.variables.items()}
        if len(each) > 1:  # a reshaped array's gradient is not added up in place: train.py
            layers = jax.tree.map(lambda w: w.reshape(-1, len(each), *w.shape[1:]), layers)
        return lax.scan(round_of, x, layers)[0]

    def _decode(self, x, layout: Layout, cache: Cache):
        c = self.config
        blocks = [Block(c, self.dtype, window, self.kernel, parent=None) for window in c.windows]
        layers = self.variables["params"]["layers"]
        keys, values = [], []
        for number, (layer, k, v) in enumerate(zip(layers, cache.keys, cache.values, strict=True)):
            block = blocks[number % len(blocks)]
            x, (k, v) = block.apply({"params": layer}, x, layout, (k, v, cache.column))
            keys.append(k)
            values.append(v)
        return x, Cache(tuple(keys), tuple(values), (cache.column + x.shape[1]) % cache.columns)


def copies(params: Params, dtype: Any) -> Params:
    """{"copies": the layers' matrices in the compute dtype}, for `forward` beside the parameters themselves.

    Made once, they spare every later pass the casts. Gradients go to the parameters, in their own dtype.
    Matrices that have the compute dtype already need none: {}.
    """
    layers = params["layers"]
    if all(w.dtype == dtype for w in jax.tree.leaves(layers) if w.ndim > 2):
        return {}
    return {"copies": {"layers": jax.tree.map(lambda w: w.astype(dtype) if w.ndim > 2 else w, layers)}}


@jax.custom_vjp
def _copy_for(weight: Array, copy: Array) -> Array:
    """The copy, as a function of the weight."""
    del weight
    return copy


_copy_for.defvjp(
    lambda weight, copy: (copy, jnp.zeros(0, weight.dtype)),
    lambda of_weight, gradient: (gradient.astype(of_weight.dtype), None),
)

_BESIDE = {"adapters": "lora", "copies": "copies"}  # what may stand beside the weights: Linen's collections


def forward(
    decoder: Decoder,
    params: Params,
    tokens: Int[Array, "B T"],
    layout: Layout,
    cache: Cache | None = None,
) -> tuple[Float[Array, "B T D"], Any]:
    """`Decoder.__call__` as a function of the parameters.

    Beside the weights they may hold "adapters" (lora.py) and "copies" (`copies`).
    """
    variables = {"params": {name: tree for name, tree in params.items() if name not in _BESIDE}}
    variables |= {_BESIDE[name]: tree for name, tree in params.items() if name in _BESIDE}
    return decoder.apply(variables, tokens, layout, cache)  # pyright: ignore[reportReturnType]


@struct.dataclass
class Head:
    """What makes logits of hidden states."""

    weight: Float[Array, "D V"]
    bias: Float[Array, " V"] | None
    softcap: float | None = struct.field(pytree_node=False)

    def astype(self, dtype: Any) -> "Head":
        return jax.tree.map(lambda w: w.astype(dtype), self)


def output_head(decoder: Decoder, params: Params) -> Head:
    """What hidden states are projected with, gathered and in the compute dtype."""
    c = decoder.config
    head = params["embed"].T if c.tie_word_embeddings else params["head"]
    # A tied head is split the other way round: over the model's dimension by tensor.
    head = sharding.gathered(sharding.reshard(head.astype(decoder.dtype), "embed", "vocab"))
    bias = params["head_bias"].astype(decoder.dtype) if c.head_bias else None
    return Head(head, bias, c.logit_softcap)


def project(hidden: Float[Array, "B T D"], head: Head) -> Float[Array, "B T V"]:
    """Next-token logits in float32."""
    precision = matmul_precision(hidden.dtype)
    logits = jnp.einsum(
        "BTD,DV->BTV", hidden, head.weight, precision=precision, preferred_element_type=jnp.float32
    )
    if head.bias is not None:
        logits += head.bias.astype(jnp.float32)
    return logits if head.softcap is None else head.softcap * jnp.tanh(logits / head.softcap)


def new_cache(config: ModelConfig, rows: int, columns: int, dtype: Any) -> Cache:
    """An empty cache, laid out over the mesh in use."""
    shape = (rows, config.num_key_value_heads, columns, config.head_dim)
    layers = range(config.num_hidden_layers)

    def empty(shape, dtype, *logical):
        return jnp.zeros(shape, dtype, out_sharding=sharding.spec(*logical))

    return Cache(
        keys=tuple(empty(shape, dtype, "batch", "kv_heads", None, None) for _ in layers),
        values=tuple(empty(shape, dtype, "batch", "kv_heads", None, None) for _ in layers),
        column=jnp.zeros((), jnp.int32),
    )


def sampling_params(params: Params, config: ModelConfig, dtype: Any, mesh: jax.sharding.Mesh) -> Params:
    """Parameters as decoding wants them: one tree a layer, in the compute dtype, laid out on `mesh`.

    What reads the same numbers is one matrix, for a step of decoding is many small products; but on TPUs,
    whose memory holds such a matrix, with its few rows between the model's dimension and its last, in tiles
    that are half empty.
    """
    layouts = jax.tree.map(lambda leaf: leaf.sharding, sampling_params_on(mesh, config, dtype))
    with jax.set_mesh(jax.tree.leaves(params)[0].sharding.mesh):
        made = _for_sampling(params, config, dtype, _fuses(mesh))
    return jax.device_put(made, layouts)


def _fuses(mesh: jax.sharding.Mesh) -> bool:
    return mesh.devices.flat[0].platform != "tpu"


@functools.partial(jax.jit, static_argnames=("config", "dtype", "fused"))
def _for_sampling(params: Params, config: ModelConfig, dtype: Any, fused: bool) -> Params:
    params = jax.tree.map(lambda w: w.astype(dtype), params)
    layers = [jax.tree.map(lambda w, i=i: w[i], params["layers"]) for i in range(config.num_hidden_layers)]
    return {**params, "layers": tuple(_fused(layer, config) if fused else layer for layer in layers)}


def _fused(layer: Params, config: ModelConfig) -> Params:
    """One layer's weights with q, k and v as one matrix, split as kv heads are, and gate and up as one."""
    attention, mlp = dict(layer["attention"]), dict(layer["mlp"])
    for one, names in (("wqkv", ("wq", "wk", "wv")), ("bqkv", ("bq", "bk", "bv"))):
        if names[0] in attention:
            q, k, v = (attention.pop(name) for name in names)
            q = sharding.grouped_weight(q, config.num_key_value_heads)
            attention[one] = jnp.concatenate([q, k[..., None, :], v[..., None, :]], axis=-2)
    for one, names in (("gate_up", ("gate", "up")), ("gate_up_bias", ("gate_bias", "up_bias"))):
        if names[0] in mlp and not config.num_experts:
            mlp[one] = jnp.stack([mlp.pop(name) for name in names], axis=-2)
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
    return jax.tree.map(
        lambda leaf, layout: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout),
        sharding.unboxed(boxed),
        layouts,
    )


def sampling_params_on(mesh: jax.sharding.Mesh, config: ModelConfig, dtype: Any) -> Params:
    """The same of what `sampling_params` makes."""
    params = params_on(mesh, config)
    with jax.set_mesh(mesh):
        made = jax.eval_shape(lambda params: _for_sampling(params, config, dtype, _fuses(mesh)), params)
    return sharding.laid_out(mesh, made)


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
