"""What the commands share: flags, help, the compilation cache, and errors without a traceback."""

import ast
import difflib
import glob
import importlib.util
import inspect
import os
import re
import runpy
import sys
import traceback
from collections.abc import Callable
from importlib import metadata
from typing import Any, TypeVar

from absl import flags
from ml_collections import ConfigDict

from spin_jax import config as config_lib
from spin_jax import config_values, errors
from spin_jax.errors import ConfigError
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

# What the runtimes of TPU VMs, GKE and Slurm tell their processes, where a chip may hide behind a driver.
TPU_VARIABLES = (
    "CLOUD_TPU_TASK_ID",
    "TPU_ACCELERATOR_TYPE",
    "TPU_NAME",
    "TPU_VISIBLE_CHIPS",
    "TPU_WORKER_HOSTNAMES",
    "TPU_WORKER_ID",
)

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
    """Returns what `read` makes of the command line's flags. Its module's docstring is the command's help.

    A command with a config defines a flag `config`, the file's name, and its `read` calls `read_config`.

    Raises:
        ValueError: what is wrong with the flags, or with the config file, in the words of who typed them.
        SystemExit: help was asked for, and is printed.
    """
    if help_flags := {"-h", "-help", "--help", "-helpfull", "--helpfull"} & set(argv[1:]):
        print((sys.modules[read.__module__].__doc__ or "").strip())
        if "config" in flags.FLAGS:
            print(f"\nConfig keys, each with its default and meaning: {os.path.relpath(config_lib.__file__)}")
        print("--helpfull lists every flag, those of libraries too.")
        if any(name.endswith("full") for name in help_flags):
            print(flags.FLAGS.get_help())
        raise SystemExit(0)
    try:
        if "config" in flags.FLAGS:
            argv, _overrides[:] = _split(argv)
        if positional := flags.FLAGS(argv)[1:]:
            raise ValueError(f"unexpected argument {positional[0]!r}")
        return read()
    except flags.UnrecognizedFlagError as error:
        raise ValueError(_unknown_flag(error.flagname)) from error
    except (flags.Error, OSError) as error:
        raise ValueError(str(error)) from error


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


# --- the config -----------------------------------------------------------------------------------

_overrides: list[tuple[str, str]] = []  # key and text of each --config.key=text, of the line that was parsed

_PARSERS: dict[type | None, flags.ArgumentParser] = {
    bool: flags.BooleanParser(),
    int: flags.IntegerParser(),
    float: flags.FloatParser(),
    str: flags.ArgumentParser(),
}
_WANTED = {bool: "true or false", int: "a whole number", float: "a number"}


def read_config() -> Any:
    """Returns the ConfigDict of --config with each --config.key=value laid over it; None without --config.

    Its keys and values are not checked yet: `config.resolve` does, and says what is wanted.

    Raises:
        ValueError: what is wrong with the file.
    """
    if not (file := flags.FLAGS["config"].value):
        if _overrides:
            raise ConfigError(f"--config.{_overrides[0][0]} needs --config=FILE")
        return None
    config = _load(file)
    texts: dict[str, list[str]] = {}
    for key, text in _overrides:
        texts.setdefault(key, []).append(text)
    with config.unlocked(), config.ignore_type():
        for key in texts:
            _override(config, key, texts[key])
    return config


def config_overrides() -> list[str]:
    """Returns the --config.key=value flags of the command line, to hand on to another command."""
    return [f"--config.{key}={text}" for key, text in _overrides]


def _split(argv: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Returns the other arguments, and key and text of each `--config.key=text` or `--config.key text`."""
    others, overrides = [], []
    arguments = iter(flags.FLAGS.read_flags_from_files(argv, force_gnu=False))
    for argument in arguments:
        found = re.fullmatch(r"--?(no)?config\.([^=]+)(?:=(.*))?", argument, re.DOTALL)
        negated, key, text = found.groups() if found else ("", "", "")
        is_switch = _kind(key) is bool
        if not found or (negated and not is_switch):
            others.append(argument)
            continue
        if text is None and (text := str(not negated) if is_switch else next(arguments, None)) is None:
            raise ConfigError(f"--config.{key} needs a value")
        overrides.append((key, text))
    return others, overrides


def _override(config: Any, key: str, texts: list[str]) -> None:
    """Sets a key, to several values where it is a tuple that was given several times."""
    *sections, name = key.split(".")
    in_architecture, text = sections == ["model", "architecture"], texts[-1]
    kind = _kind(key, config) if in_architecture else _kind(key)
    if in_architecture and kind is None:  # a file may state any key there, and a flag changes only those
        stated = list(config.get("model", {}).get("architecture", {}))
        hint = config_values.nearest(name, stated, "config.model.architecture.") if stated else ""
        raise ConfigError(f"no config key {key} (--config.{key}={text}){hint}")
    if kind is tuple:
        values = [_literal(text) for text in texts]
        value = sum((value if isinstance(value, tuple) else (value,) for value in values), ())
    else:
        try:
            value = _PARSERS[kind].parse(text) if kind in _PARSERS else _literal(text)
        except ValueError as error:
            raise ConfigError(f"--config.{key}={text}: {_WANTED[kind]} is wanted") from error
    section = config
    for part in sections:
        if not isinstance(section.get(part), ConfigDict):
            section[part] = ConfigDict()
        section = section[part]
    section[name] = ConfigDict(value) if isinstance(value, dict) else value


def _kind(key: str, config: Any = None) -> type | None:
    """Returns the type of a key's values; None for a key that `config`, or the default one, does not have."""
    *sections, name = key.split(".")
    section = config or config_lib.default()
    for part in sections:
        section = section.get(part) if isinstance(section, ConfigDict) else None
    return section.get_type(name) if isinstance(section, ConfigDict) and name in section else None


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _load(argument: str) -> ConfigDict:
    """Runs a config file, FILE or FILE:VARIANT; ValueError says what is wrong with it."""
    path, colon, variant = argument.partition(":")
    if not os.path.isfile(path):
        folder = os.path.dirname(path)
        others = (
            [os.path.join(folder, name) for name in os.listdir(folder or ".")]
            if os.path.isdir(folder or ".")
            else []
        )
        hint = config_values.nearest(path, [name for name in others if name.endswith(".py")])
        raise ValueError(f"no config file {path}{hint if others else ''}")
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


# --- the machine ----------------------------------------------------------------------------------


def set_compiler_flags(config: Any) -> None:
    """For the compilers of all platforms: they look when they are first asked for a device."""
    wanted = dict(COMPILER_FLAGS) if config.compiler_flags else {}
    if config.deterministic:
        wanted["XLA_FLAGS"] = (*wanted.get("XLA_FLAGS", ()), *DETERMINISTIC)
    for variable, known in wanted.items():  # the user's come last, and count
        os.environ[variable] = " ".join([*known, os.environ.get(variable, "")]).strip()


def skip_absent_tpu() -> None:
    """Keeps JAX from loading libtpu, which takes seconds and prints errors, on a machine without a TPU.

    JAX loads libtpu wherever it is installed. Where there is neither a sign of a TPU nor a plugin for another
    accelerator, only the CPU is left, and JAX is told so. Nothing is changed where the user or JAX has named
    the platforms (JAX does where it finds the PCI device of a TPU).
    """
    import jax

    if jax.config.values["jax_platforms"] or "JAX_FORCE_TPU_INIT" in os.environ:
        return
    has_tpu = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    has_tpu = has_tpu or any(name in os.environ for name in TPU_VARIABLES)
    has_plugin = metadata.entry_points(group="jax_plugins") or importlib.util.find_spec("jax_plugins")
    if not has_tpu and not has_plugin:
        jax.config.update("jax_platforms", "cpu")


def set_up_jax(config: Any) -> None:
    """Compiler flags, other processes, the compilation cache; before anything asks for a device."""
    skip_absent_tpu()
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

    Before the work `began`, it is the input that is bad.
    """
    if isinstance(error, errors.OtherFailed):
        return fail(str(error), error.exit_code)
    if isinstance(error, errors.SpinJaxError):
        code, message = error.exit_code, str(error)
    elif isinstance(error, ValueError | FileNotFoundError) and not began:
        code, message = 2, str(error)
    elif isinstance(error, FloatingPointError | OSError):
        code, message = 1, str(error)
    else:
        code, message = 1, "".join(traceback.format_exception(error)).rstrip("\n")
    return fail(message if code == 2 else message + again, code)
