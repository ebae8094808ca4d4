"""What the commands share: flags, the compilation cache, and errors without a traceback."""

import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from absl import flags

from spin_jax import config as config_lib

Asked = TypeVar("Asked")

# Known to help: what layers exchange travels while the layer before computes. Off by config.compiler_flags.
# libtpu 0.0.42 and 0.0.48 do it by themselves: the compiled training step is the same without these.
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

_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, where the processes are not found by themselves."
)
_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "How many processes; with --coordinator.", lower_bound=1
)
_PROCESS = flags.DEFINE_integer("process_id", None, "Which one this is; with --coordinator.", lower_bound=0)


def parse(argv: list[str], read: Callable[[], Asked]) -> Asked:
    """What `read` makes of the command line's flags.

    Raises:
        ValueError: what is wrong with them, in the words of who typed them.
    """
    try:
        rest = flags.FLAGS(argv)[1:]
        if rest:
            raise ValueError(f"unexpected argument {rest[0]!r}")
        return read()
    except (flags.Error, ValueError, OSError) as error:
        raise ValueError(_explained(argv) or str(error)) from error
    except (AttributeError, KeyError, TypeError) as error:  # ConfigDict's, of a mistyped key; or a bug
        if explained := _explained(argv):
            raise ValueError(explained) from error
        raise


def set_compiler_flags(config: Any) -> None:
    """For the compilers of all platforms: they look when they are first asked for a device."""
    if config.compiler_flags:
        for variable, known in COMPILER_FLAGS.items():  # the user's come last, and count
            os.environ[variable] = " ".join([*known, os.environ.get(variable, "")]).strip()


def set_up_jax(config: Any) -> None:
    """Compiler flags, other processes, the compilation cache; before anything asks for a device."""
    set_compiler_flags(config)
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", config_lib.GPU_MEMORY)
    from spin_jax import hosts

    hosts.connect(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    cache_compilations()


def cache_compilations() -> None:
    """Keeps compiled programs under the user's cache directory, unless JAX has been told where."""
    import jax

    if jax.config.values["jax_compilation_cache_dir"] is None:
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(cache, "spin_jax", "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def fail(message: str) -> int:
    """Prints what went wrong; returns the exit code for bad input."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    return 2


def _explained(argv: list[str]) -> str | None:
    """For a mistyped --config.section.key, the nearest key."""
    for argument in argv[1:]:
        name = argument.lstrip("-").partition("=")[0]
        if not argument.startswith("-") or not name.startswith("config."):
            continue
        section, path = config_lib.default(), name.split(".")[1:]
        for depth, key in enumerate(path):
            prefix = "".join(f"{part}." for part in path[:depth])
            if prefix == "model.architecture.":
                break
            if not isinstance(section, type(config_lib.default())):
                return f"config.{prefix.rstrip('.')} is a value, not a section ({argument})"
            if key not in section:
                hint = config_lib.nearest(key, list(section), f"config.{prefix}")
                return f"no config key {prefix}{key} ({argument}){hint}"
            section = section[key]
    return None
