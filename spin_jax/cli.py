"""What all commands share: flags, help, config overrides, set-up of JAX, errors without a traceback."""

import difflib
import glob
import inspect
import os
import re
import runpy
import sys
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

from absl import flags
from ml_collections import ConfigDict, config_flags

from spin_jax import config as config_lib
from spin_jax import config_values, errors
from spin_jax.errors import ConfigError
from spin_jax.runtime import chips, platforms, secrets

Request = TypeVar("Request")

_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, if the processes do not find it.")
_PROCESSES = flags.DEFINE_integer("num_processes", None, "The number of processes; with --coordinator.", lower_bound=1)
_PROCESS = flags.DEFINE_integer("process_id", None, "This process's number, from 0; with --coordinator.", lower_bound=0)
_HEARTBEAT = flags.DEFINE_integer("heartbeat_s", 100, "Seconds of silence after which processes end.", lower_bound=1)

_unparsed: list[str] = []  # the program's name, and the arguments that the flags of the command leave over


def parse(argv: list[str], read: Callable[[], Request]) -> Request:
    """Parses the command line and returns what `read` makes of the flags.

    The docstring of the module that defines `read` is the help of the command; SystemExit follows it. A command that
    takes a config defines a flag `config`, which is the name of a file, and its `read` calls `read_config`. ValueError
    says what is wrong with the flags or the config file.
    """
    takes_config = "config" in flags.FLAGS
    if help_flags := {"-h", "-help", "--help", "-helpfull", "--helpfull"} & set(argv[1:]):
        print((sys.modules[read.__module__].__doc__ or "").strip())
        if takes_config:
            print(f"\nConfig keys, each with its default and meaning: {os.path.relpath(config_lib.__file__)}")
        print("--helpfull lists every flag, also those of libraries.")
        if any(name.endswith("full") for name in help_flags):
            print(flags.FLAGS.get_help())
        raise SystemExit(0)
    try:
        flags.FLAGS.set_gnu_getopt()  # flags may follow the value in `--config.key value`
        _unparsed[:] = flags.FLAGS(argv, known_only=takes_config)
        if _unparsed[1:] and not takes_config:
            raise ValueError(f"unexpected argument {_unparsed[1]!r}")
        return read()
    except flags.UnrecognizedFlagError as error:
        raise ValueError(_unknown_flag(error.flagname)) from error
    except (flags.Error, OSError) as error:
        raise ValueError(str(error)) from error


def _unknown_flag(name: str) -> str:
    """The message for a flag that does not exist; it names the nearest of our flags, not of a library's."""
    by_module = flags.FLAGS.flags_by_module_dict().items()
    ours = [flag.name for module, defined in by_module if not module.startswith("absl.") for flag in defined]
    typed, dot, key = name.partition(".")
    close = difflib.get_close_matches(typed, ours, n=1)
    return f"no flag --{name}; " + (f"did you mean --{close[0]}{dot}{key}?" if close else "see --help")


def read_config(file: str | None = None) -> Any:
    """Returns the ConfigDict of a config file, with each --config.key=value of the command line laid over it.

    `file` is FILE or FILE:VARIANT; None stands for the value of --config, "" for no file. `config.resolve` checks the
    values. ValueError says that the file, the name of a key or the type of a value is wrong, or a flag is unknown.
    """
    given = flags.FLAGS["config"].value
    file = given if file is None else file
    config = _load(file) if file else ConfigDict()
    overrides = _parse_overrides(config)
    if overrides and not given:
        raise ConfigError(f"--config.{next(iter(overrides))} needs --config=FILE")
    with config.unlocked(), config.ignore_type():
        config.update_from_flattened_dict(overrides)
    return config if file else None


def config_overrides() -> list[str]:
    """Returns the --config.key=value arguments as they were typed, to pass them on to another command."""
    return _unparsed[1:]


def _parse_overrides(config: ConfigDict) -> dict[str, Any]:
    """Returns {key: value} of the --config.key=value arguments.

    The types of keys are those of the default config, whatever a file says, except in model.architecture:
    there the file may state any key, and an override changes one that it states.
    """
    typed = config_lib.default()
    model = config.get("model")
    architecture = model.get("architecture") if isinstance(model, ConfigDict) else None
    if isinstance(architecture, ConfigDict):
        typed.model.architecture = architecture.copy_and_resolve_references()
    matches = [re.match(r"--?(?:no)?config\.([^=]*)", argument) for argument in _unparsed[1:]]
    types = {found[1]: _type_of(found[1], typed) for found in matches if found}
    values = flags.FlagValues()
    values.set_gnu_getopt()
    config_flags.DEFINE_config_dict("config", typed, flag_values=values, lock_config=False, sys_argv=_unparsed)
    try:
        positional = values(_unparsed)[1:]
    except flags.IllegalFlagValueError as error:
        argument = str(error).removeprefix("flag ").removesuffix(f": {error.__context__}")
        wanted = config_values.KINDS.get(types[argument.partition("=")[0].removeprefix("--config.")])
        raise ConfigError(f"{argument}: {wanted} is wanted" if wanted else str(error)) from error
    if positional:
        raise ValueError(f"unexpected argument {positional[0]!r}")
    return config_flags.get_override_values(values["config"])


def _type_of(key: str, config: ConfigDict) -> type:
    """Returns the type of a key's values, or raises ConfigError, which names the nearest key."""
    kind, prefix = ConfigDict, ""
    section: Any = config
    for name in key.split("."):
        names = list(section) if isinstance(section, ConfigDict) else []
        if name not in names:
            raise ConfigError(f"config has no key {key}{config_values.nearest(name, names, prefix)}")
        kind = section.get_type(name)
        section, prefix = section[name], f"{prefix}{name}."
    return kind


def _load(argument: str) -> ConfigDict:
    """Runs a config file, FILE or FILE:VARIANT, and returns its config; ValueError says what is wrong."""
    path, colon, variant = argument.partition(":")
    if not os.path.isfile(path):
        others = glob.glob(os.path.join(glob.escape(os.path.dirname(path)), "*.py"))
        raise ValueError(f"no config file {path}{config_values.nearest(path, others)}")
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
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        said = f"{path}:{lines[-1]}: {kind}{error}" if lines else str(error)
        if isinstance(error, SyntaxError):
            said = f"{error.filename or path}:{error.lineno}: SyntaxError: {error.msg}"
        raise ValueError(said) from error
    return config


def set_up_jax(config: Any) -> None:
    """Sets compiler flags and the compilation cache, and connects to the other processes, before JAX has devices."""
    platforms.skip_absent_tpu()
    platforms.set_compiler_flags(config)
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", chips.GPU_MEMORY)
    from spin_jax.runtime import processes

    processes.connect(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value, _HEARTBEAT.value)
    platforms.cache_compilations()


def fail(message: str, code: int = 2) -> int:
    """Prints what went wrong and returns the exit code; the code 2 stands for bad input."""
    print(f"error: {secrets.redacted(message)}", file=sys.stderr, flush=True)
    return code


def explain(error: Exception, work_began: bool, advice: str = "") -> int:
    """Prints what went wrong and returns the exit code.

    Until the work began, a ValueError or FileNotFoundError is a fault of the input. Other errors that are not ours are
    printed with their traceback. `advice` is printed after the message, except where the input was bad.
    """
    code = errors.exit_code(error, work_began)
    known = code == 2 or isinstance(error, errors.SpinJaxError | FloatingPointError | OSError)
    message = str(error) if known else "".join(traceback.format_exception(error)).rstrip("\n")
    return fail(message if code == 2 or isinstance(error, errors.OtherFailed) else message + advice, code)
