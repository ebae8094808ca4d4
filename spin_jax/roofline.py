"""What a model costs and what a chip offers: FLOPs, bytes, and the least time that decoding can take.

Axes: L layers, D model, N query heads, K key/value heads, H head dim, F mlp, V vocabulary.
"""

import dataclasses
import functools
from typing import Any

import numpy as np

from spin_jax import sharding
from spin_jax.batches import Rows, filled_tokens
from spin_jax.model import ModelConfig, abstract_params, count_params


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device as JAX counts them, by its maker's data sheet."""

    flops: float  # dense bfloat16, a second
    bandwidth: float  # bytes of device memory, a second
    memory: float  # bytes
    links: float  # bytes a second that come in from other devices: half of the two directions' sum


_GIB = 2.0**30
_V5P = Chip(459e12, 2.77e12, 95 * _GIB, 600e9)
_V5E = Chip(197e12, 0.82e12, 16 * _GIB, 200e9)
_V6E = Chip(918e12, 1.64e12, 32 * _GIB, 400e9)
# By the whole `device_kind`: "TPU v5" is a v5p and "TPU v5 lite" a v5e, and a part of a card (MIG) has a
# name of its own. TPUs' names are those of jax/_src/pallas/mosaic/tpu_info.py, their numbers those of
# docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}. A TPU7x (Ironwood) is two devices, each half of the
# chip's 2307 TFLOP/s, 192 GiB, 7380 GB/s and 1200 GB/s of links. A GPU's memory is as CUDA counts it.
CHIPS = {
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 2.04e12, 79.2 * _GIB, 300e9),
    "NVIDIA A100 80GB PCIe": Chip(312e12, 1.94e12, 79.2 * _GIB, 300e9),
    "NVIDIA A100-SXM4-40GB": Chip(312e12, 1.555e12, 39.4 * _GIB, 300e9),
    "NVIDIA A100-PCIE-40GB": Chip(312e12, 1.555e12, 39.4 * _GIB, 300e9),
    "NVIDIA H100 80GB HBM3": Chip(989e12, 3.35e12, 79.1 * _GIB, 450e9),
    "NVIDIA H100 PCIe": Chip(756e12, 2.0e12, 79.1 * _GIB, 300e9),
    "NVIDIA H100 NVL": Chip(835e12, 3.9e12, 93.1 * _GIB, 300e9),
    "NVIDIA H200": Chip(989e12, 4.8e12, 139.8 * _GIB, 450e9),
    "NVIDIA H200 NVL": Chip(835e12, 4.8e12, 139.8 * _GIB, 450e9),
    "TPU v4": Chip(275e12, 1.23e12, 32 * _GIB, 300e9),
    "TPU v5e": _V5E,
    "TPU v5 lite": _V5E,
    "TPU v5p": _V5P,
    "TPU v5": _V5P,
    "TPU v6e": _V6E,
    "TPU v6 lite": _V6E,
    "TPU7x": Chip(2307e12 / 2, 7.38e12 / 2, 96 * _GIB, 300e9),
}


def chip(device_kind: str) -> Chip | None:
    """The chip of `jax.Device.device_kind`, or None for one that is not listed, a CPU among them."""
    return CHIPS.get(device_kind)


def unknown_peak(device: Any) -> str:
    """What there is to say of a device whose MFU cannot be told; nothing of a CPU, of which none asks."""
    if device.platform == "cpu" or chip(device.device_kind):
        return ""
    return (
        f"roofline.CHIPS has no {device.device_kind!r}: MFU and the share of the roofline are unknown (null)"
    )


def layer_params(c: ModelConfig, experts: int | None = None) -> int:
    """Weights of one layer that multiply a token; or of a layer with so many of its experts."""
    experts = c.experts_per_token if experts is None else experts
    heads = 2 * c.num_attention_heads + 2 * c.num_key_value_heads
    mlp = (3 if c.gated else 2) * c.intermediate_size
    return c.hidden_size * (heads * c.head_dim + max(1, experts) * mlp + c.num_experts)


@functools.cache
def all_params(c: ModelConfig) -> int:
    """All numbers of the parameter tree."""
    return count_params(sharding.unboxed(abstract_params(c)))


def cached_numbers(c: ModelConfig, columns: int) -> int:
    """Keys and values of so many tokens."""
    return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * columns


def score_share(c: ModelConfig) -> float:
    """What one token's look at another costs, in units of the rest of a layer's work on a token."""
    return 2 * c.num_attention_heads * c.head_dim / layer_params(c)


def forward_flops(c: ModelConfig, tokens: float, projected: float, seen: float) -> float:
    """Of a forward pass; training takes three times as much. Multiplying and adding count as two.

    Args:
        tokens: real tokens, a shared prompt's once.
        projected: those whose logits are needed.
        seen: Σ over tokens of the tokens each one sees, itself among them: attention is causal.
    """
    linear = 2 * c.num_hidden_layers * layer_params(c) * tokens
    head = 2 * c.hidden_size * c.vocab_size * projected
    attention = 4 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * seen
    return linear + head + attention


def rows_flops(c: ModelConfig, rows: Rows) -> float:
    """`forward_flops` of packed rows: every token once, logits of responses, causal attention."""
    # A token sees its own sequence up to itself, or the window: its position, and one more.
    positions, tokens = rows.layout.positions + 1, rows.layout.segments != 0
    windows = [window or positions.size for window in c.windows]
    seen = np.mean([np.sum(np.minimum(positions, window), where=tokens) for window in windows])
    return forward_flops(c, filled_tokens(rows), int(rows.lengths.sum()), float(seen))


def decode_step_s(
    c: ModelConfig, chip: Chip, batch: int, context: float, itemsize: int, devices: int = 1
) -> float:
    """The least seconds a decode step takes: weights read once or multiplied, and the cache read.

    Args:
        batch: answers in progress on the devices that share one copy of the model.
        context: tokens of each so far, on average.
        itemsize: bytes of a weight and of a cached number.
        devices: how many share that copy.
    """
    read = min(c.num_experts, batch * c.experts_per_token)  # experts: all, but of small batches
    weights = c.num_hidden_layers * layer_params(c, read) + c.hidden_size * c.vocab_size
    cached = cached_numbers(c, 1) * context * batch
    compute = forward_flops(c, batch, batch, 0) / chip.flops
    return (max(weights * itemsize / chip.bandwidth, compute) + cached * itemsize / chip.bandwidth) / devices
