"""XLA's compiler for GPUs, on machines without one: it comes with the plugin `jax_cuda13_plugin`.

    compiled = for_gpu(f, *abstract_arguments)     # arrays of `gpu_mesh()`

It needs no driver and no card. What it does not do there: measure kernels to choose among them, call cuDNN.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import pytest
from jax.experimental import topologies

from spin_jax.runtime import sharding

# What XLA asks of a card before it compiles for it (protobuf text, `GpuTargetConfigProto`).
_H200 = """
gpu_device_info {
  name: "NVIDIA H200"
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 threads_per_warp: 32
  threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  l2_cache_size: 62914560 memory_bandwidth: 4800000000000 device_memory_size: 150754820096
}
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
dnn_version_info { major: 9 minor: 15 }
runtime_version { major: 13 }
"""


@functools.cache
def gpu_mesh() -> jax.sharding.Mesh:
    """One H200 that is not there; a test that asks for it is skipped where its compiler is not installed."""
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name="", target_config=_H200, topology="1x1x1"
        )
    except (NotImplementedError, RuntimeError, ValueError) as error:
        pytest.skip(f"needs XLA's compiler for GPUs, of jax_cuda13_plugin ({error})")
    return sharding.make_mesh(devices=topology.devices)


def for_gpu(f: Callable, *arguments: Any) -> Any:
    """f compiled for the H200 of `gpu_mesh`; without shardings, arguments are whole."""
    mesh = gpu_mesh()
    with jax.set_mesh(mesh):
        return jax.jit(f).trace(*arguments).lower(lowering_platforms=("cuda",)).compile()
