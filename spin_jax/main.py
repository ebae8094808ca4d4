"""Runs self-play fine-tuning (SPIN), or goes on with a run: the same command continues what has begun.

    python -m spin_jax.main --config=FILE[:VARIANT] --workdir=DIR [--config.section.key=value …]

  --config=FILE[:VARIANT]  a Python file with get_config(), as those in configs/, or a variant that it knows
  --config.section.key=…   any key of it: --config.model.path=DIR, --config.train.epochs='(1,2)'
  --workdir=DIR            where the run is kept, and continued: a folder, or gs://BUCKET/FOLDER
  --check                  reads and checks config, data, tokenizer and model files, says what it found, ends
  --only=PHASE             sample, score or train: just this phase of the next iteration

Several processes, one a host (on SLURM one a GPU), find each other on TPU pods, SLURM and Open MPI, and
share a workdir that all of them see; elsewhere:

  --coordinator=HOST:PORT --num_processes=N --process_id=I
  --heartbeat_s=100        a process that is silent for so many seconds is dead, and the others end

Examples:

  python -m spin_jax.main --config=configs/tiny.py --workdir=/tmp/spin_tiny
  python -m spin_jax.main --config=configs/zephyr.py --check
  python -m spin_jax.main --config=configs/small_gsm8k.py --workdir=DIR \\
      --config.model.path=MODEL --config.data.path=train.jsonl

Exit codes: 0 done; 1 failed (a full disk, numbers that are not finite, a crash); 2 bad input; 130 and 143
stopped by Ctrl-C and SIGTERM, everything saved. After all but 2 the same command continues.
"""

import os
import shlex
import sys
from typing import Any

from absl import flags

from spin_jax import config as config_lib
from spin_jax.cli import fail, failed, parse, read_config, set_up_jax
from spin_jax.runtime import secrets
from spin_jax.runtime.interrupts import Interrupts, say

flags.DEFINE_string("config", None, "Config file; --config.key=value changes a key of it.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run is kept; the same one continues it.")
_ONLY = flags.DEFINE_enum("only", None, ["sample", "score", "train"], "Run one phase of the next iteration.")
_CHECK = flags.DEFINE_bool("check", False, "Check config, data, tokenizer and model files, and end.")


def read_flags() -> tuple[Any, str | None]:
    """The config and the workdir that the flags ask for."""
    config = read_config()
    if config is None or (_WORKDIR.value is None and not _CHECK.value):
        raise ValueError("--config and --workdir are needed; see --help")
    return config_lib.resolve(config), _WORKDIR.value


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns its exit code.

    0 done, 1 failed (a full disk, numbers that are not finite), 2 bad input; 130 and 143 stopped by Ctrl-C or
    SIGTERM. After all but 2 the same command continues.
    """
    argv = sys.argv if argv is None else argv
    again = f"to continue: {shlex.join(['python', '-m', 'spin_jax.main', *argv[1:]])}"

    def quit_now(number: int) -> None:
        say(secrets.redacted(f"\nquit at once; {again}"))
        os._exit(128 + number)

    interrupts = Interrupts(quit_now)
    try:
        config, workdir = parse(argv, read_flags)
        set_up_jax(config)
    except (ValueError, FileNotFoundError) as error:
        return fail(str(error))
    from spin_jax import errors
    from spin_jax.runtime import processes
    from spin_jax.selfplay import algorithm

    interrupts.speaks = processes.first()
    interrupts.listen()  # JAX takes SIGTERM for itself where there are several processes
    try:
        if _CHECK.value or workdir is None:
            algorithm.check(config, workdir)
        else:
            algorithm.run(config, workdir, only=_ONLY.value, should_stop=interrupts)
    except errors.Interrupted as stopped:
        if processes.first():
            say(secrets.redacted(f"\ninterrupted; {again}"))
        return stopped.exit_code
    except Exception as error:
        return processes.leave(error, failed(error, interrupts.asked, f"\n{again}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
