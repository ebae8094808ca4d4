"""What the commands share: flags, the compilation cache, and errors without a traceback."""

import os
import sys
from collections.abc import Callable
from typing import TypeVar

from absl import flags

from spin_jax import config as config_lib

Asked = TypeVar("Asked")


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
