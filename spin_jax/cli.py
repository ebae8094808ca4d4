"""What the commands share: flags, help, the compilation cache, and errors without a traceback."""

import difflib
import inspect
import itertools
import os
import runpy
import sys
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

from absl import flags
from ml_collections import ConfigDict

from spin_jax import config as config_lib
from spin_jax import config_values
from spin_jax.errors import ConfigError, OtherFailed
from spin_jax.runtime import chips, secrets

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

# What a GPU needs to give the same bits again: no atomics, and no kernels chosen by a stop-watch.
DETERMINISTIC = ("--xla_gpu_deterministic_ops=true", "--xla_gpu_autotune_level=0")

_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, where the processes are not found by themselves."
)
_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "How many processes; with --coordinator.", lower_bound=1
)
_PROCESS = flags.DEFINE_integer("process_id", None, "Which one this is; with --coordinator.", lower_bound=0)
_HEARTBEAT = flags.DEFINE_integer(
    "heartbeat_s",
    100,
    "A process that is silent for so many seconds is dead, and the others end.",
    lower_bound=1,
)


def parse(argv: list[str], read: Callable[[], Asked]) -> Asked:
    """What `read` makes of the command line's flags. Its module's docstring is the command's help.

    Raises:
        ValueError: what is wrong with them, or with the config file, in the words of who typed them.
        SystemExit: help was asked for, and is printed.
    """
    if asked := {"-h", "-help", "--help", "-helpfull", "--helpfull"} & set(argv[1:]):
        print((sys.modules[read.__module__].__doc__ or "").strip())
        if "config" in flags.FLAGS:
            print(f"\nConfig keys, each with its default and meaning: {os.path.relpath(config_lib.__file__)}")
        print("--helpfull lists every flag, those of libraries too.")
        if any(name.endswith("full") for name in asked):
            print(flags.FLAGS.get_help())
        raise SystemExit(0)
    try:
        rest = flags.FLAGS(argv)[1:]
        if rest:
            raise ValueError(f"unexpected argument {rest[0]!r}")
        if _config_file(argv) and not isinstance(flags.FLAGS["config"].value, ConfigDict):
            raise ValueError("no config")  # explained below
        return read()
    except ConfigError:
        raise
    except (flags.Error, ValueError, OSError) as error:
        raise ValueError(_explained(argv, error) or str(error)) from error
    except Exception as error:  # ConfigDict's, of a mistyped key; a config file's, of any kind; or a bug
        if explained := _explained(argv, error):
            raise ValueError(explained) from error
        raise


def set_compiler_flags(config: Any) -> None:
    """For the compilers of all platforms: they look when they are first asked for a device."""
    wanted = dict(COMPILER_FLAGS) if config.compiler_flags else {}
    if config.deterministic:
        wanted["XLA_FLAGS"] = (*wanted.get("XLA_FLAGS", ()), *DETERMINISTIC)
    for variable, known in wanted.items():  # the user's come last, and count
        os.environ[variable] = " ".join([*known, os.environ.get(variable, "")]).strip()


def set_up_jax(config: Any) -> None:
    """Compiler flags, other processes, the compilation cache; before anything asks for a device."""
    set_compiler_flags(config)
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", chips.GPU_MEMORY)
    from spin_jax.runtime import processes

    processes.connect(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value, _HEARTBEAT.value)
    cache_compilations()


def cache_compilations() -> None:
    """Keeps compiled programs under the user's cache directory, unless JAX has been told where."""
    import jax

    if jax.config.values["jax_compilation_cache_dir"] is None:
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(cache, "spin_jax", "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def fail(message: str, code: int = 2) -> int:
    """Prints what went wrong; returns the exit code, unless told otherwise that for bad input."""
    print(f"error: {secrets.redacted(message)}", file=sys.stderr, flush=True)
    return code


def failed(error: Exception, began: bool, again: str = "") -> int:
    """Says what went wrong, and `again` after it; returns the exit code.

    The package's own errors know theirs (errors.py). Before the work `began`, other ValueErrors and missing
    files are bad input.
    """
    code = getattr(error, "exit_code", None)
    if code is None and isinstance(error, ValueError | FileNotFoundError) and not began:
        code = 2
    if code is None and isinstance(error, FloatingPointError | OSError):
        code = 1
    if code is not None:
        return fail(str(error) if code == 2 or isinstance(error, OtherFailed) else f"{error}{again}", code)
    return fail("".join(traceback.format_exception(error)).rstrip("\n") + again, 1)


def _config_file(argv: list[str]) -> str | None:
    """What --config was given: FILE or FILE:VARIANT."""
    for argument, following in itertools.zip_longest(argv[1:], argv[2:]):
        name, equals, value = argument.partition("=")
        if name in ("--config", "-config"):
            return value if equals else following
    return None


def _explained(argv: list[str], error: Exception) -> str | None:
    """What is wrong with the config file; for --config.section.key=value, the nearest key or the type."""
    config = None
    if file := _config_file(argv):
        try:
            config = _load(file)
        except ValueError as problem:
            return str(problem)
    for argument in argv[1:]:
        name = argument.lstrip("-").partition("=")[0]
        if argument.startswith("-") and name.startswith("config."):
            if unknown := _unknown_key(argument, name.split(".")[1:], config):
                return unknown
            if isinstance(error, flags.IllegalFlagValueError) and f"flag --{name}=" in str(error):
                return _wrong_type(name, str(error).partition("=")[2].partition(": ")[0])
    if isinstance(error, flags.UnrecognizedFlagError):
        return _unknown_flag(error.flagname)
    return None


def _unknown_flag(name: str) -> str:
    """For a flag that there is not, the nearest: of ours, not of the libraries'."""
    ours = [
        flag.name
        for module, defined in flags.FLAGS.flags_by_module_dict().items()
        for flag in defined
        if not module.startswith("absl.") and "." not in flag.name
    ]
    typed, dot, key = name.partition(".")
    close = difflib.get_close_matches(typed, ours, n=1)
    return f"no flag --{name}" + (f"; did you mean --{close[0]}{dot}{key}?" if close else "; see --help")


def _load(argument: str) -> ConfigDict:
    """Runs a config file once more, now that something is wrong; ValueError says what is wrong with it."""
    path, colon, variant = argument.partition(":")
    if not os.path.isfile(path):
        folder = os.path.dirname(path)
        there = (
            [os.path.join(folder, name) for name in os.listdir(folder or ".")]
            if os.path.isdir(folder or ".")
            else []
        )
        hint = config_values.nearest(path, [name for name in there if name.endswith(".py")])
        raise ValueError(f"no config file {path}{hint if there else ''}")
    try:
        get_config = runpy.run_path(path).get("get_config")
        if not callable(get_config):
            raise ValueError(f"{path} has no function get_config")
        variants = [variant] if colon else []
        try:
            inspect.signature(get_config).bind(*variants)
        except TypeError as error:
            said = f"has no variants: leave out :{variant}" if colon else "needs a variant: FILE:VARIANT"
            raise ValueError(f"{path} {said}") from error
        config = get_config(*variants)
        if not isinstance(config, ConfigDict):
            raise ValueError(f"{path}: get_config returns {config!r:.80}, and should return a ConfigDict")
    except Exception as error:
        lines = [
            frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path
        ]
        if isinstance(error, SyntaxError):
            place, said = f"{error.filename or path}:{error.lineno}: ", f"SyntaxError: {error.msg}"
        elif lines:
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            place, said = f"{path}:{lines[-1]}: ", f"{kind}{error}"
        else:
            place, said = "", str(error)
        raise ValueError(f"{place}{said}") from error
    return config


def _unknown_key(argument: str, path: list[str], config: Any) -> str | None:
    """For a key that no config has, the nearest; `config` is the file's, where there is one."""
    section = config_lib.default()
    for depth, key in enumerate(path):
        prefix = "".join(f"{part}." for part in path[:depth])
        if not isinstance(section, ConfigDict):
            return f"config.{prefix.rstrip('.')} is a value, not a section ({argument})"
        if prefix == "model.architecture.":  # any keys, but a flag changes only those that are there
            section = config.model.architecture if config and "model" in config else section
        if key not in section:
            hint = config_values.nearest(key, list(section), f"config.{prefix}") if list(section) else ""
            return f"no config key {prefix}{key} ({argument}){hint}"
        section = section[key]
    return None


def _wrong_type(name: str, value: str) -> str | None:
    """In place of absl's words, which say what failed and not what is wanted."""
    *sections, key = name.split(".")[1:]
    section = config_lib.default()
    for part in sections:
        section = section[part]
    if key not in section:
        return None
    if isinstance(section[key], ConfigDict):
        return f"{name} is a section, and got {value!r}"
    return f"{name}={value}: {config_values.wanted(section, key)}"
