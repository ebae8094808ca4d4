"""python -m spin_jax.main --config=configs/zephyr.py --workdir=DIR [--config.section.key=value …]

Running again with the same workdir continues. --only=sample, score or train runs one phase of the next
iteration, so that sampling and training can happen on different machines. On several hosts, start it once on
each (on SLURM once a GPU): they find each other on TPU pods, SLURM and Open MPI; elsewhere
--coordinator=HOST:PORT --num_processes=N --process_id=I. The workdir is one that all of them see.
"""

import shlex
import sys
from typing import Any

from absl import flags
from ml_collections import config_flags

from spin_jax import config as config_lib
from spin_jax.command import fail, parse, set_up_jax

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, with overrides of its keys.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run is kept; the same one continues it.")
_ONLY = flags.DEFINE_enum("only", None, ["sample", "score", "train"], "Run one phase of the next iteration.")

USAGE = "usage: python -m spin_jax.main --config=configs/tiny.py --workdir=DIR [--config.key=value …]"


def read_flags() -> tuple[Any, str]:
    """The config and the workdir that the flags ask for."""
    if _CONFIG.value is None or _WORKDIR.value is None:
        raise ValueError(f"--config and --workdir are needed\n{USAGE}")
    return config_lib.resolve(_CONFIG.value), _WORKDIR.value


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns its exit code: 2 bad input, 130 interrupted."""
    argv = sys.argv if argv is None else argv
    try:
        config, workdir = parse(argv, read_flags)
        set_up_jax(config)
        from spin_jax import selfplay

        selfplay.run(config, workdir, only=_ONLY.value)
    except KeyboardInterrupt:
        from spin_jax import hosts

        hosts.say(f"\ninterrupted; to continue: {shlex.join(['python', '-m', 'spin_jax.main', *argv[1:]])}")
        return 130
    except (ValueError, FileNotFoundError) as error:
        return fail(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
