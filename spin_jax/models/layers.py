"""The layers of the decoder, in Flax Linen: attention, MLP, mixture of experts, norms, rotary positions."""

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from spin_jax.kernels import flash_decode
from spin_jax.kernels.layout import KEPT, Layout, matmul_precision, on_cpu
from spin_jax.models.architecture import ModelConfig
from spin_jax.models.attention import attend, plain
from spin_jax.models.cache import ring_layout
from spin_jax.runtime import sharding

Axes = tuple[str | None, ...]  # the logical axes of an array, as in sharding.py


def rope_frequencies(config: ModelConfig, window: int | None = None) -> Float[Array, " R/2"]:
    """The angle in radians by which each pair of rotated dimensions turns from one position to the next.

    RoPE: arXiv 2104.09864; llama3: Llama 3.1's rule; longrope: arXiv 2402.13753, with the short factors only;
    yarn: arXiv 2309.00071. `window` is the layer's.
    """
    local = window is not None and config.rope_local_theta
    R, theta, scaling = config.rotary_dim, local or config.rope_theta, None if local else config.rope_scaling
    frequencies = 1.0 / theta ** (jnp.arange(0, R, 2, dtype=jnp.float32) / R)
    if scaling is None:
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    if scaling.rope_type == "longrope":
        return frequencies / jnp.array(scaling.short_factor, jnp.float32)
    # The other two stretch long waves by the factor, keep short ones, and interpolate between the two.
    length = scaling.original_max_position_embeddings
    if scaling.rope_type == "yarn":  # it interpolates by the numbers of the frequencies
        low, high = (
            R * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))
            for turns in (scaling.beta_fast, scaling.beta_slow)
        )
        low, high = (math.floor(low), math.ceil(high)) if scaling.truncate else (low, high)
        low, high = max(low, 0), min(high, R - 1)
        keep = 1 - (jnp.arange(R // 2, dtype=jnp.float32) - low) / (high - low if high != low else 0.001)
    else:
        waves_in_context = length * frequencies / (2 * math.pi)
        keep = (waves_in_context - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = jnp.clip(keep, 0.0, 1.0)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


def rope(
    x: Float[Array, "B T N H"],
    positions: Int[Array, "B T"],
    frequencies: Float[Array, " R/2"],
    factor: float = 1.0,
    interleaved: bool = False,
) -> Float[Array, "B T N H"]:
    """Rotates the pairs (i, i + R/2), or if interleaved (2i, 2i + 1), of the first R dimensions, in float32."""
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    if factor != 1:
        sin, cos = factor * sin, factor * cos
    R = 2 * frequencies.shape[0]
    x32 = x[..., :R].astype(jnp.float32)
    first, second = (x32[..., ::2], x32[..., 1::2]) if interleaved else jnp.split(x32, 2, axis=-1)
    pairs = first * cos - second * sin, second * cos + first * sin
    rotated = jnp.stack(pairs, -1).reshape(x32.shape) if interleaved else jnp.concatenate(pairs, axis=-1)
    return jnp.concatenate([rotated.astype(x.dtype), x[..., R:]], axis=-1)


class Norm(nn.Module):
    """RMSNorm (arXiv 1910.07467) or LayerNorm (arXiv 1607.06450) of the last dimensions, in float32."""

    kind: str
    eps: float
    dtype: Any = None  # of the result; None: the input's
    dimensions: int = 1  # how many are normed together

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        normed_shape, axes = x.shape[-self.dimensions :], tuple(range(-self.dimensions, 0))

        def vector(name: str, init: Any) -> Any:
            flat: Any = self.param(name, nn.with_partitioning(init, (None,)), (math.prod(normed_shape),))
            return flat.reshape(normed_shape)

        plus_one = self.kind == "rms+1"
        scale = vector("scale", nn.initializers.zeros if plus_one else nn.initializers.ones)
        x32 = x.astype(jnp.float32)
        if self.kind == "layer":
            x32 = x32 - jnp.mean(x32, axis=axes, keepdims=True)
        normed = x32 * lax.rsqrt(jnp.mean(jnp.square(x32), axis=axes, keepdims=True) + self.eps)
        scale = scale.astype(jnp.float32)
        normed *= 1.0 + scale if plus_one else scale
        if self.kind == "layer":
            normed += vector("bias", nn.initializers.zeros).astype(jnp.float32)
        return normed.astype(self.dtype or x.dtype)


_ACTIVATIONS = {"silu": jax.nn.silu, "gelu": functools.partial(jax.nn.gelu, approximate=True)}


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=0)
def _gated(config: ModelConfig, gate: Array, up: Array) -> Array:
    """What the gate lets through, in float32."""
    gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
    if config.clamp is None:
        return _ACTIVATIONS[config.activation](gate) * up
    alpha, limit = config.clamp
    gate = jnp.minimum(gate, limit)
    return gate * jax.nn.sigmoid(alpha * gate) * (jnp.clip(up, -limit, limit) + 1)


class _Projections(nn.Module):
    """Weights with logical axes for attention and MLP; they are cast and gathered when they are used."""

    config: ModelConfig
    dtype: Any

    def weight(self, name: str, axes: Axes, shape: tuple[int, ...]) -> Array:
        init = nn.initializers.normal(self.config.initializer_range)
        stored: Any = self.param(name, nn.with_partitioning(init, axes), shape)
        return sharding.gathered(stored.astype(self.dtype))

    def bias(self, name: str, axes: Axes, shape: tuple[int, ...]) -> Array:
        stored: Any = self.param(name, nn.with_partitioning(nn.initializers.zeros, axes), shape)
        return stored.astype(self.dtype)

    def linear(
        self, equation: str, x: Array, name: str, axes: Axes, shape: tuple[int, ...], out: Axes | None = None
    ) -> Array:
        """Computes x W, or x W + (x A) B where the weight has an adapter (lora.py)."""
        y = self.einsum(equation, x, self.weight(name, axes, shape), out=out)
        if not self.has_variable("lora", f"{name}_a"):
            return y
        a, b = (self.get_variable("lora", f"{name}_{part}").astype(self.dtype) for part in "ab")
        x_axes, w_axes, y_axes = re.split(",|->", equation)
        inputs = "".join(axis for axis in w_axes if axis in x_axes)
        outputs = w_axes.removeprefix(inputs)
        narrow = self.einsum(f"{x_axes},{inputs}r->BTr", x, sharding.gathered(a), out=("batch", "tokens", None))
        return y + self.einsum(f"BTr,r{outputs}->{y_axes}", narrow, sharding.gathered(b), out=out)

    def einsum(self, equation: str, x: Array, weight: Array, out: Axes | None = None) -> Array:
        rows = x.shape[:2]
        if merged := sharding.one_device():
            # With one axis of tokens, the gradient of a weight sums over one axis. Where it sums over two, XLA
            # for CPUs transposes copies of the operands, and training an MLP takes a third longer.
            equation, x, out = equation.replace("BT", "T"), sharding.merged_tokens(x), out and (out[0], *out[2:])
        out_sharding = sharding.spec(*out) if out else None
        product = jnp.einsum(equation, x, weight, precision=matmul_precision(self.dtype), out_sharding=out_sharding)
        product = sharding.split_tokens(product, rows) if merged else product
        return sharding.summed(product) if out else product


class Attention(_Projections):
    window: int | None = None
    kernel: str = "plain"
    rotates: bool = True

    @nn.compact
    def __call__(self, x, layout: Layout, cache: tuple | None):
        c = self.config
        D, N, K, H = c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim
        if self.has_variable("params", "wqkv"):  # `sampling_params` fused them
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
            norm = functools.partial(Norm, c.norm, c.norm_eps, dimensions=2 if c.qk_norm_whole else 1)
            q, k = norm(name="q_norm")(q), norm(name="k_norm")(k)
        q, k = self._positioned(q, k, layout.positions)
        sinks = self.bias("sinks", ("heads",), (N,)) if c.sinks else None
        options = {"window": self.window, "scale": c.query_scale, "softcap": c.attention_softcap, "sinks": sinks}
        q, k, v = checkpoint_name(q, "q"), checkpoint_name(k, "k"), checkpoint_name(v, "v")
        if cache is None:
            out = attend(q, k, v, layout, kernel=self.kernel, **options)
        elif cache[0].shape[2] == x.shape[1]:  # a prompt fills a new cache, which holds nothing else
            # Splash needs a layout with `unshared`.
            out = attend(q, k, v, layout, kernel="flash" if self.kernel == "flash" else "plain", **options)
            k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        else:
            cached_k, cached_v, column = cache
            k = lax.dynamic_update_slice_in_dim(cached_k, k.swapaxes(1, 2), column, axis=2)
            v = lax.dynamic_update_slice_in_dim(cached_v, v.swapaxes(1, 2), column, axis=2)
            out = self._attend_ring(q, k, v, layout, column, **options)
        axes, rows = ("heads", None, "embed"), ("batch", "tokens", None)
        out = self.linear("BTNH,NHD->BTD", out, "wo", axes, (N, H, D), out=rows)
        return out + self.bias("bo", (None,), (D,)) if c.output_bias else out, (k, v)

    def _positioned(self, q, k, positions) -> tuple[Array, Array]:
        """Queries and keys that carry their positions."""
        c = self.config
        if self.rotates:
            local = self.window is not None and c.rope_local_theta
            factor = c.rope_scaling.attention_factor if c.rope_scaling and not local else 1.0
            turn = functools.partial(
                rope,
                positions=positions,
                frequencies=rope_frequencies(c, self.window),
                factor=factor,
                interleaved=c.rope_interleaved,
            )
            q, k = turn(q), turn(k)
        if c.query_growth:
            beta, length = c.query_growth
            growth = 1 + beta * jnp.log1p(jnp.maximum(positions, 0) // length)
            q = (q * growth[:, :, None, None]).astype(q.dtype)
        return q, k

    def _attend_ring(self, q, k, v, layout: Layout, column, *, window, scale, softcap, sinks) -> Array:
        """Attention of the new tokens to the ring cache, where they start at `column`."""
        (T, S), newest = (q.shape[1], k.shape[2]), layout.positions[:, -1]
        if T > 1 or self.kernel != "flash" or sinks is not None:
            seen = ring_layout(newest, column + T - 1, S)
            return plain(q, k, v, layout, seen, window, scale, softcap, sinks)
        lengths = jnp.minimum(newest + 1, min(window or S, S))
        lengths = jnp.where(layout.segments[:, -1] > 0, lengths, 0)
        read = functools.partial(flash_decode.attend, scale=scale, softcap=softcap, interpret=on_cpu())
        return sharding.by_slots_and_heads(read, q[:, 0], k, v, column, lengths)[:, None]


class MLP(_Projections):
    @nn.compact
    def __call__(self, x):
        c = self.config
        D, F = c.hidden_size, c.intermediate_size

        def widened(name: str) -> Array:
            wide = self.linear("BTD,DF->BTF", x, name, ("embed", "mlp"), (D, F))
            if c.mlp_bias:
                wide += self.bias(f"{name}_bias", ("mlp",), (F,))
            return checkpoint_name(wide, name).astype(jnp.float32)

        if self.has_variable("params", "gate_up"):  # `sampling_params` fused them
            wide = self.linear("BTD,DMF->BTMF", x, "gate_up", ("embed", None, "mlp"), (D, 2, F))
            if c.mlp_bias:
                wide += self.bias("gate_up_bias", (None, "mlp"), (2, F))
            inner = _gated(c, wide[:, :, 0], wide[:, :, 1])
        elif c.gated:
            inner = _gated(c, widened("gate"), widened("up"))
        else:
            inner = _ACTIVATIONS[c.activation](widened("up"))
        rows = ("batch", "tokens", None)
        out = self.linear("BTF,FD->BTD", inner.astype(self.dtype), "down", ("mlp", "embed"), (F, D), out=rows)
        return out + self.bias("down_bias", (None,), (D,)) if c.mlp_bias else out


class Experts(_Projections):
    """A router sends each token through a few of E gated MLPs (Mixtral, arXiv 2401.04088).

    No token is dropped: tokens are sorted by expert, and `ragged_dot` multiplies each expert's tokens.
    """

    @nn.compact
    def __call__(self, x):
        c = self.config
        D, F, E = c.hidden_size, c.intermediate_size, c.num_experts
        scores = self.einsum("BTD,DE->BTE", x, self.weight("router", ("embed", None), (D, E)))
        wide, narrow = (None, "embed", "mlp"), (None, "mlp", "embed")
        weights = [self.weight(name, wide, (E, D, F)) for name in ("gate", "up")]
        weights.append(self.weight("down", narrow, (E, F, D)))
        if c.mlp_bias:
            scores += self.bias("router_bias", (None,), (E,))
            weights += [self.bias(name, (None, "mlp"), (E, F)) for name in ("gate_bias", "up_bias")]
            weights.append(self.bias("down_bias", (None, None), (E, D)))
        probabilities = jax.nn.softmax(scores.astype(jnp.float32), axis=-1)
        return sharding.by_rows(self._run_experts, x, probabilities, *weights)

    def _run_experts(self, x, probabilities, gate, up, down, *biases):
        """The output for one device's tokens, with all experts or a slice of the width of each."""
        chosen = self.config.experts_per_token
        tokens = x.reshape(-1, x.shape[-1])
        shares, experts = lax.top_k(probabilities.reshape(len(tokens), -1), chosen)
        if self.config.normed_shares:
            shares /= shares.sum(axis=-1, keepdims=True)
        shares = shares.reshape(-1)
        order = jnp.argsort(experts.reshape(-1))
        sizes = jnp.bincount(experts.reshape(-1), length=len(gate))
        gate_bias, up_bias, down_bias = biases or (None, None, None)
        if down_bias is not None:  # the results of devices with slices are summed: each one adds its share
            down_bias *= down.shape[1] / self.config.intermediate_size

        def dot(rows, weight, bias):
            product = lax.ragged_dot(rows, weight, sizes, precision=matmul_precision(self.dtype))
            return product if bias is None else product + bias[experts.reshape(-1)[order]]

        rows = tokens[order // chosen]
        gate, up = checkpoint_name(dot(rows, gate, gate_bias), "gate"), checkpoint_name(dot(rows, up, up_bias), "up")
        inner = _gated(self.config, gate, up).astype(x.dtype)
        out = dot(inner, down, down_bias) * shares[order][:, None].astype(x.dtype)
        return jnp.zeros_like(tokens).at[order // chosen].add(out).reshape(x.shape)


class Block(nn.Module):
    config: ModelConfig
    dtype: Any
    window: int | None
    kernel: str = "plain"
    rotates: bool = True  # whether the layer has RoPE

    @nn.compact
    def __call__(self, x, layout: Layout, cache: tuple | None = None):
        c = self.config
        norm = functools.partial(Norm, c.norm, c.norm_eps, self.dtype)
        attention = Attention(c, self.dtype, self.window, self.kernel, self.rotates, name="attention")
        mlp = (Experts if c.num_experts else MLP)(c, self.dtype, name="mlp")
        normed = norm(name="attention_norm")(x) if c.pre_norms else x.astype(self.dtype)
        attended, kv = attention(normed, layout, cache)
        kv = kv if cache is not None else None
        if c.parallel:
            return x + attended + mlp(normed), kv
        if c.post_norms:
            attended = norm(name="attention_post_norm")(attended)
        x += self._scaled(checkpoint_name(attended, "attention_residual"))
        transformed = mlp(norm(name="mlp_norm")(x) if c.pre_norms else x.astype(self.dtype))
        if c.post_norms:
            transformed = norm(name="mlp_post_norm")(transformed)
        return x + self._scaled(transformed), kv

    def _scaled(self, x: Array) -> Array:
        scale = self.config.residual_scale
        return x if scale is None else x.astype(jnp.float32) * scale


_ATTENTION = ("q", "k", "v", KEPT)
# The activations of a layer that each policy keeps for the backward pass, which computes the rest again.
REMAT: dict[str, tuple[str, ...]] = {
    "attention+mlp": (*_ATTENTION, "attention_residual", "gate", "up"),
    "attention": _ATTENTION,
    "full": (),
}


@jax.custom_vjp
def copy_for(weight: Array, copy: Array) -> Array:
    """Returns the copy; its gradient goes to the weight, in the weight's dtype."""
    del weight
    return copy


copy_for.defvjp(
    lambda weight, copy: (copy, jnp.zeros(0, weight.dtype)),
    lambda empty, gradient: (gradient.astype(empty.dtype), None),
)
