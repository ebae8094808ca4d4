"""python -m spin_jax.main --config=configs/zephyr.py --workdir=DIR [--config.section.key=value …]

Running again with the same workdir continues. --check reads and checks everything, says what it found, and
ends before anything is trained or written. --only=sample, score or train runs one phase of the next
iteration, so that sampling and training can happen on different machines. On several hosts, start it once on
each (on SLURM once a GPU): they find each other on TPU pods, SLURM and Open MPI; elsewhere
--coordinator=HOST:PORT --num_processes=N --process_id=I. The workdir is one that all of them see.
"""

import os
import shlex
import sys
import traceback
from typing import Any

from absl import flags
from ml_collections import config_flags

from spin_jax import config as config_lib
from spin_jax.command import fail, parse, set_up_jax
from spin_jax.interrupts import Interrupts, say

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, with overrides of its keys.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run is kept; the same one continues it.")
_ONLY = flags.DEFINE_enum("only", None, ["sample", "score", "train"], "Run one phase of the next iteration.")
_CHECK = flags.DEFINE_bool("check", False, "Check config, data, tokenizer and model files, and end.")

USAGE = "usage: python -m spin_jax.main --config=configs/tiny.py --workdir=DIR [--config.key=value …]"


def read_flags() -> tuple[Any, str | None]:
    """The config and the workdir that the flags ask for."""
    if _CONFIG.value is None or (_WORKDIR.value is None and not _CHECK.value):
        raise ValueError(f"--config and --workdir are needed\n{USAGE}")
    return config_lib.resolve(_CONFIG.value), _WORKDIR.value


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns its exit code.

    0 done, 1 failed (a full disk, numbers that are not finite), 2 bad input; 130 and 143 stopped by Ctrl-C or
    SIGTERM. After all but 2 the same command continues.
    """
    argv = sys.argv if argv is None else argv
    again = f"to continue: {shlex.join(['python', '-m', 'spin_jax.main', *argv[1:]])}"

    def quit_now(number: int) -> None:
        say(config_lib.redacted(f"\nquit at once; {again}"))
        os._exit(128 + number)

    interrupts = Interrupts(quit_now)
    try:
        config, workdir = parse(argv, read_flags)
        set_up_jax(config)
    except (ValueError, FileNotFoundError) as error:
        return fail(str(error))
    from spin_jax import hosts, selfplay, train

    interrupts.speaks = hosts.first()
    interrupts.listen()  # JAX takes SIGTERM for itself where there are several processes
    try:
        if _CHECK.value or workdir is None:
            selfplay.check(config, workdir)
        else:
            selfplay.run(config, workdir, only=_ONLY.value, should_stop=interrupts)
    except train.Interrupted as stopped:
        if hosts.first():
            say(config_lib.redacted(f"\ninterrupted; {again}"))
        return 128 + stopped.number
    except Exception as error:
        return hosts.leave(error, _failed(error, interrupts.asked, again))
    return 0


def _failed(error: Exception, began: bool, again: str) -> int:
    """Says what went wrong; returns the exit code. Before the run `began`, it is the input that is bad."""
    from spin_jax import files, hosts, opponent, train

    if isinstance(error, hosts.OtherFailed):
        return fail(str(error), error.code)
    if isinstance(error, files.Damaged | opponent.Missing):
        return fail(str(error))
    if isinstance(error, ValueError | FileNotFoundError) and not began:
        return fail(str(error))
    if isinstance(error, train.NotFinite | FloatingPointError | OSError):
        return fail(f"{error}\n{again}", 1)
    return fail("".join([*traceback.format_exception(error), again]), 1)


if __name__ == "__main__":
    sys.exit(main())
