"""What JAX and its compilers are told about the machine before they start."""

import contextlib
import glob
import importlib.util
import os
import subprocess
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import spin_jax

Variables = Mapping[str, str | None]  # of a process's environment; None stands for one that is removed

# Flags that help: what layers exchange travels while the layer before computes. config.compiler_flags=false
# leaves them out. libtpu 0.0.42 and 0.0.48 compile the training step to the same program without them.
COMPILER_FLAGS = {
    "LIBTPU_INIT_ARGS": (
        "--xla_tpu_enable_async_collective_fusion=true",
        "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
        "--xla_tpu_enable_async_collective_fusion_multiple_steps=true",
        "--xla_tpu_overlap_compute_collective_tc=true",
        "--xla_enable_async_all_gather=true",
    ),
    "XLA_FLAGS": ("--xla_gpu_enable_latency_hiding_scheduler=true",),
}

# A GPU needs these to give the same bits again: no atomics, and no kernels chosen by measured time.
DETERMINISTIC = ("--xla_gpu_deterministic_ops=true", "--xla_gpu_autotune_level=0")

# The runtimes of TPU VMs, GKE and Slurm set these for their processes, also where a driver hides the chips.
TPU_VARIABLES = (
    "CLOUD_TPU_TASK_ID",
    "TPU_ACCELERATOR_TYPE",
    "TPU_NAME",
    "TPU_VISIBLE_CHIPS",
    "TPU_WORKER_HOSTNAMES",
    "TPU_WORKER_ID",
)


def set_compiler_flags(config: Any) -> None:
    """Sets the variables that the compilers of all platforms read when JAX is first asked for a device."""
    wanted = dict(COMPILER_FLAGS) if config.compiler_flags else {}
    if config.deterministic:
        wanted["XLA_FLAGS"] = (*wanted.get("XLA_FLAGS", ()), *DETERMINISTIC)
    for variable, known in wanted.items():  # the user's own flags come last, and win
        os.environ[variable] = " ".join([*known, os.environ.get(variable, "")]).strip()


def _shows_tpu() -> bool:
    devices = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    return bool(devices or os.environ.keys() & set(TPU_VARIABLES))


def skip_absent_tpu() -> None:
    """Keeps JAX from loading libtpu, which takes seconds and prints errors, on a machine without a TPU.

    It sets the platform to the CPU where there is neither a sign of a TPU nor a plugin for another accelerator, unless
    the user or JAX has named the platforms (JAX does where it finds the PCI device of a TPU). A program that uses
    spin_jax as a library may call it before it asks for a device.
    """
    import jax

    if jax.config.values["jax_platforms"] or "JAX_FORCE_TPU_INIT" in os.environ:
        return
    has_plugin = metadata.entry_points(group="jax_plugins") or importlib.util.find_spec("jax_plugins")
    if not _shows_tpu() and not has_plugin:
        jax.config.update("jax_platforms", "cpu")


def cache_compilations() -> None:
    """Keeps compiled programs under the user's cache directory, unless JAX has a directory for them."""
    import jax

    if jax.config.values["jax_compilation_cache_dir"] is None:
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(cache, "spin_jax", "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def device_shares(parallel: int) -> list[Variables]:
    """What tells each of the programs that run beside one another on this machine which devices are its own.

    All get equally many NVIDIA GPUs; those that are left over stay idle. CPUs are shared. ValueError: there are fewer
    GPUs than programs, or it is a TPU host, whose chips belong to one program.
    """
    if parallel == 1:
        return [{}]
    named = {name for name in os.environ.get("JAX_PLATFORMS", "").split(",") if name}
    gpus = _visible_gpus() if not named or named & {"cuda", "gpu"} else []
    if not gpus and (_shows_tpu() if not named else "tpu" in named):
        raise ValueError("--parallel is for CPUs and NVIDIA GPUs: on a TPU host one run uses all chips")
    if 0 < len(gpus) < parallel:
        raise ValueError(f"--parallel={parallel}: each run needs a GPU of its own, and {len(gpus)} are visible")
    share = len(gpus) // parallel
    # In a job of SLURM's, JAX listens on a port that it derives from the job: only one of the programs could have it.
    alone = {"SLURM_JOB_ID": None}
    shares = [gpus[n * share : (n + 1) * share] for n in range(parallel)]
    return [{**alone, "CUDA_VISIBLE_DEVICES": ",".join(mine)} if mine else alone for mine in shares]


def _visible_gpus() -> list[str]:
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [gpu for gpu in visible.split(",") if gpu.strip()]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return []


def versions(*packages: str) -> dict[str, str]:
    """The versions of spin_jax, which may be a clone that is not installed, and of these packages."""
    return {"spin_jax": spin_jax.__version__, **{name: metadata.version(name) for name in packages}}
