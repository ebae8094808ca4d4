"""The data sheets of accelerators: peak FLOP/s, memory and bandwidth, by JAX's device kind."""

import dataclasses
import functools
import os
import timeit
from collections.abc import Callable, Sequence
from typing import Any

GPU_MEMORY = "0.92"  # the share of a GPU's memory that JAX takes; its default is three quarters


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
    """The chip of `jax.Device.device_kind`, or None for one that is not listed, such as a CPU."""
    return CHIPS.get(device_kind)


def chip_of(devices: Sequence[Any]) -> Chip:
    """The chip of these devices, which one process has. One that is not listed, such as a CPU, is measured."""
    return chip(devices[0].device_kind) or _measured(devices[0].platform, len(devices))


@functools.cache
def _measured(platform: str, devices: int) -> Chip:
    """The rates of a matrix product and of a sum, in half a second. The devices of a CPU share them."""
    import jax  # the commands that need no devices import this file, too
    import jax.numpy as jnp

    def seconds(run: Callable[..., Any], *arguments: Any) -> float:
        """The least seconds of a call; the first one compiles."""
        call = jax.jit(run)
        return min(timeit.repeat(lambda: jax.block_until_ready(call(*arguments)), number=1, repeat=6)[1:])

    size, dtype, share = (1024, jnp.float32, devices) if platform == "cpu" else (8192, jnp.bfloat16, 1)
    square = jnp.ones((size, size), dtype)
    flops = 2 * size**3 / seconds(jnp.matmul, square, square) / share
    bandwidth = 2.0**28 / seconds(jnp.sum, jnp.ones(2**26, jnp.float32)) / share
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / share
    return Chip(flops, bandwidth, memory, links=bandwidth)


def unknown_peak(device: Any) -> str:
    """A note that the MFU of this device is unknown; "" for a listed device and for a CPU."""
    if device.platform == "cpu" or chip(device.device_kind):
        return ""
    missing = f"spin_jax.runtime.chips.CHIPS has no {device.device_kind!r}"
    return f"{missing}: MFU and the share of the roofline are unknown (null)"
