"""What a model costs and what a chip offers: FLOPs, bytes, and the least time that decoding can take.

Axes: L layers, D model, N query heads, K key/value heads, H head dim, F mlp, V vocabulary.
"""

import functools
from typing import Any

from spin_jax.kernels import quantized
from spin_jax.models.architecture import ModelConfig
from spin_jax.models.params import abstract_params, count_params
from spin_jax.runtime import sharding
from spin_jax.runtime.chips import Chip


def layer_params(c: ModelConfig, experts: int | None = None) -> int:
    """How many weights of one layer multiply a token; `experts` sets the number of experts that count."""
    experts = c.experts_per_token if experts is None else experts
    heads = 2 * c.num_attention_heads + 2 * c.num_key_value_heads
    mlp = (3 if c.gated else 2) * c.intermediate_size
    return c.hidden_size * (heads * c.head_dim + max(1, experts) * mlp + c.num_experts)


@functools.cache
def all_params(c: ModelConfig) -> int:
    """How many numbers the parameter tree has."""
    return count_params(sharding.unboxed(abstract_params(c)))


def frozen_bytes(c: ModelConfig, mesh: Any, itemsize: int, stored: str | None) -> float:
    """The bytes of each device's frozen weights under adapters; `stored` is train.frozen_dtype."""
    shards = sharding.weight_shards(mesh)
    whole = itemsize * all_params(c) / shards
    if not stored:
        return whole
    heads, mlp = 2 * (c.num_attention_heads + c.num_key_value_heads) * c.head_dim, (2 + c.gated) * c.intermediate_size
    axes = (heads, c.head_dim), (mlp, c.intermediate_size // sharding.tensor_shards(mesh))
    saved = [n * (itemsize - quantized.BYTES[stored] - 4 / quantized.block(size)) for n, size in axes]  # float32 scales
    return whole - c.num_hidden_layers * c.hidden_size * sum(saved) / shards


def cached_numbers(c: ModelConfig, columns: int) -> int:
    """How many numbers the keys and values of this many tokens have."""
    return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * columns


def score_share(c: ModelConfig) -> float:
    """The cost of one attention score, relative to the rest of a layer's work on a token."""
    return 2 * c.num_attention_heads * c.head_dim / layer_params(c)


def forward_flops(c: ModelConfig, tokens: float, projected: float, seen: float) -> float:
    """FLOPs of a forward pass; training takes three times as many. Multiplying and adding count as two.

    Args:
        tokens: real tokens; a shared prompt counts once.
        projected: how many tokens need logits.
        seen: the sum, over tokens, of the tokens that each one sees, including itself (attention is causal).
    """
    linear = 2 * c.num_hidden_layers * layer_params(c) * tokens
    head = 2 * c.hidden_size * c.vocab_size * projected
    attention = 4 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * seen
    return linear + head + attention


def decode_step_s(c: ModelConfig, chip: Chip, batch: int, context: float, itemsize: int, devices: int = 1) -> float:
    """The least time of a decode step, in seconds: reading or multiplying the weights, and reading the cache.

    Args:
        batch: answers in progress on the devices that share one copy of the model.
        context: tokens of each answer so far, on average.
        itemsize: bytes of a weight and of a cached number.
        devices: how many share that copy.
    """
    read = min(c.num_experts, batch * c.experts_per_token)  # a small batch does not use all experts
    weights = c.num_hidden_layers * layer_params(c, read) + c.hidden_size * c.vocab_size
    cached = cached_numbers(c, 1) * context * batch
    compute = forward_flops(c, batch, batch, 0) / chip.flops
    return (max(weights * itemsize / chip.bandwidth, compute) + cached * itemsize / chip.bandwidth) / devices
