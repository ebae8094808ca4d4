"""python -m spin_jax.main --config=configs/zephyr.py --workdir=DIR [--config.section.key=value …]

Running again with the same workdir continues. --only=sample, score or train runs one phase of the next
iteration, so that sampling and training can happen on different machines.
"""

import os
import shlex
import sys

from absl import flags
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, with overrides of its keys.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run is kept; the same one continues it.")
_ONLY = flags.DEFINE_enum("only", None, ["sample", "score", "train"], "Run one phase of the next iteration.")

USAGE = "usage: python -m spin_jax.main --config=configs/tiny.py --workdir=DIR [--config.key=value …]"


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns its exit code: 2 bad input, 130 interrupted."""
    argv = sys.argv if argv is None else argv
    from spin_jax import config as config_lib  # jax is not imported until the flags are known to be good

    try:
        rest = flags.FLAGS(argv)[1:]
        if rest:
            raise ValueError(f"unexpected argument {rest[0]!r}")
        if _CONFIG.value is None or _WORKDIR.value is None:
            raise ValueError(f"--config and --workdir are needed\n{USAGE}")
        config = config_lib.resolve(_CONFIG.value)
    except (flags.Error, ValueError, AttributeError, KeyError, TypeError, OSError) as error:
        return _fail(_explained(error, argv))

    try:
        _cache_compilations()
        from spin_jax import selfplay

        selfplay.run(config, _WORKDIR.value, only=_ONLY.value)
    except KeyboardInterrupt:
        command = shlex.join(["python", "-m", "spin_jax.main", *argv[1:]])
        print(f"\ninterrupted; to continue: {command}", flush=True)
        return 130
    except (ValueError, FileNotFoundError) as error:
        return _fail(str(error))
    return 0


def _cache_compilations() -> None:
    """Keeps compiled programs under the user's cache directory, unless JAX has been told where."""
    import jax

    if jax.config.values["jax_compilation_cache_dir"] is None:
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(cache, "spin_jax", "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr, flush=True)
    return 2


def _explained(error: Exception, argv: list[str]) -> str:
    """For a mistyped --config.section.key, the nearest key; else what the error says."""
    from spin_jax import config as config_lib

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
    return str(error)


if __name__ == "__main__":
    sys.exit(main())
