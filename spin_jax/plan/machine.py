"""The machines that `plan` knows, and devices to compile for that need not be there.

A topology is FAMILY:SIZE or FAMILY:SIZE*COUNT. `v5e:8x8` is a slice of TPUs and `v5e:8x8*2` are two; `h100:8` is a node
of eight GPUs and `h100:8*2` are two. `cpu:1` is the machine that runs the command.

A compiler works without the device that it compiles for. The compiler for TPUs, in libtpu, knows them by name. XLA's
compiler for GPUs, in a plugin of JAX, needs a description of the chip. Without a compiler there is still arithmetic.
"""

import functools
import math
import os
import re
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from spin_jax.errors import NoCompiler

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_DEEP = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
_NODE = ("1", "2", "4", "8")


class Gpu(NamedTuple):
    """What XLA's compiler needs to know about a GPU: the numbers of CUDA's device properties."""

    cores: int  # streaming multiprocessors
    units: int  # float32 units in each
    shared: int  # bytes of shared memory of a core
    shared_block: int  # bytes of shared memory that a block may ask for
    l2: int  # bytes of the L2 cache
    clock: float  # GHz
    bandwidth: int  # bytes per second, of device memory
    memory: int  # bytes
    capability: tuple[int, str]  # CUDA's compute capability: the major number, and the feature extension


class Family(NamedTuple):
    """Machines of one kind of chip."""

    device_kind: str  # JAX's name of a device
    sizes: tuple[str, ...]  # of a slice or node, the smallest first
    gpu: Gpu | None = None  # None for TPUs
    per_chip: int = 1  # devices in a chip


# The numbers of the GPUs are those of XLA's own descriptions, openxla/xla at 4336d12e (H100: 0774019d),
# xla/backends/gpu/target_config/specs/{a100_sxm_80,h100_sxm,h200}.txtpb. H200's memory is the 139.80 GiB that
# PyTorch's messages name; XLA's file has a round 141.
_A100 = Gpu(108, 64, 167936, 166912, 41943040, 1.41, 2039040000000, 85100068864, (8, "NONE"))
_H100 = Gpu(132, 128, 233472, 232448, 52428800, 1.98, 3352320000000, 84942979072, (9, "ACCELERATED_FEATURES"))
_H200 = _H100._replace(bandwidth=4800000000000, memory=int(139.8 * 2**30))

# TPU7x is the seventh generation, Ironwood: a chip has two chiplets, and each is a device.
FAMILIES = {
    "v4": Family("TPU v4", _DEEP),
    "v5e": Family("TPU v5 lite", _FLAT),
    "v5p": Family("TPU v5", _DEEP),
    "v6e": Family("TPU v6 lite", _FLAT),
    "tpu7x": Family("TPU7x", _DEEP, per_chip=2),
    "a100": Family("NVIDIA A100-SXM4-80GB", _NODE, _A100),
    "h100": Family("NVIDIA H100 80GB HBM3", _NODE, _H100),
    "h200": Family("NVIDIA H200", _NODE, _H200),
    "cpu": Family("cpu", ("1",)),  # this machine, whose rates are measured
}


class Topology(NamedTuple):
    """A machine: one or several slices of TPUs, or nodes of GPUs."""

    family: str
    size: str  # of a slice or node
    slices: int  # how many slices or nodes

    @property
    def devices(self) -> int:
        return math.prod(map(int, self.size.split("x"))) * FAMILIES[self.family].per_chip * self.slices

    @property
    def hosts(self) -> int:
        """Processes: one for each node of GPUs, or four chips of TPUs."""
        family = FAMILIES[self.family]
        return self.slices * (1 if family.gpu else math.ceil(self.devices / self.slices / family.per_chip / 4))

    def __str__(self) -> str:
        return f"{self.family}:{self.size}" + (f"*{self.slices}" if self.slices > 1 else "")


def parse_topology(topology: str) -> Topology:
    """The topology with a name such as v5e:8x8*2; ValueError for a name that is not known."""
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)(?:\*([1-9]\d*))?", topology)
    family = FAMILIES.get(found[1]) if found else None
    on_cpu = found and found[1] == "cpu" and topology != "cpu:1"
    if not found or not family or (family.gpu and "x" in found[2]) or int(found[2].split("x")[0]) == 0 or on_cpu:
        machines = ", ".join(f"{name}:{known.sizes[-1]}" for name, known in FAMILIES.items())
        raise ValueError(f"--topology={topology}: a machine such as {machines}; v5e:8x8*2 is two slices")
    return Topology(found[1], found[2], int(found[3] or 1))


class Device(NamedTuple):
    """The properties of a device that arithmetic asks for."""

    device_kind: str
    platform: str


def planning_mesh(topology: Topology, shape: Mapping[str, int]) -> Any:
    """What arithmetic asks of a mesh of the topology; it needs no compiler."""
    family = FAMILIES[topology.family]
    devices = np.empty(topology.devices, object)
    platform = "gpu" if family.gpu else "cpu" if topology.family == "cpu" else "tpu"
    devices[:] = [Device(family.device_kind, platform)] * devices.size
    return types.SimpleNamespace(devices=devices, shape=shape, size=topology.devices)


def expect_no_device() -> None:
    """Tells the libraries of the compilers that no device is here. Call it before JAX uses them."""
    no_device = {
        # libtpu asks where it runs, complains if that is no TPU machine, and lets only one process in at a time.
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        # JAX's plugin for CUDA looks for a driver and for libraries, which a compilation does not need.
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    }
    for name, value in no_device.items():
        os.environ.setdefault(name, value)
    # XLA warns of programs that need more memory than there is, which is just what `plan` finds out. JAX has set the
    # variable to 1, so a 1 is not the user's choice.
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"


@functools.cache
def topology_devices(topology: Topology) -> list[Any]:
    """Devices to compile for. The devices of a node or slice stand together.

    NoCompiler: no compiler for GPUs is installed; ValueError: none for TPUs, or it knows no machine of that size.
    """
    from jax.experimental import topologies

    family = FAMILIES[topology.family]
    expect_no_device()
    if topology.family == "cpu":
        return jax.devices("cpu")[:1]
    if family.gpu:
        # Slices × processes × devices of each process. A run has one process for each node.
        grid = f"1x{topology.slices}x{topology.size}"
        options: dict[str, Any] = {"platform": "cuda", "target_config": gpu_target(family), "topology": grid}
    else:
        options = {"platform": "tpu", "topology_name": str(topology._replace(slices=1)), "num_slices": topology.slices}
        # The two cores of a v4 are one device, as on Google's machines. (v5p needs no option for that.)
        options |= {"chip_config_name": "megacore"} if topology.family == "v4" else {}
    try:
        return list(topologies.get_topology_desc(**options).devices)
    except Exception as error:  # of any kind: the compiler is missing, or knows no such size
        if family.gpu:
            why = "" if isinstance(error, NotImplementedError) else f": {error}"
            install = f"pip install jax-cuda13-plugin=={jax.__version__}"  # this plugin is the compiler alone
            raise NoCompiler(f"to compile: {install}, no GPU is needed{why}") from error
        advice = "cannot be compiled for here (pip install 'jax[tpu]')"
        raise ValueError(f"--topology={topology} {advice}: {error}") from error


def gpu_target(family: Family) -> str:
    """XLA's description of a GPU: a GpuTargetConfigProto as text."""
    gpu, name = family.gpu, family.device_kind
    assert gpu
    major, features = gpu.capability
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: {gpu.shared} shared_memory_per_block_optin: {gpu.shared_block}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: {gpu.cores} fpus_per_core: {gpu.units} clock_rate_ghz: {gpu.clock}
  memory_bandwidth: {gpu.bandwidth} l2_cache_size: {gpu.l2} device_memory_size: {gpu.memory}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  cuda_compute_capability {{ major: {major} feature_extension: {features} }}
  device_address_bits: 64
  pcie_bandwidth: 34359738368
  ecc_enabled: true
  device_vendor: "NVIDIA Corporation"
  name: "{name}"
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.15.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 15 }}
runtime_version {{ major: 13 minor: 0 }}
device_description_str: "{name}"
"""
