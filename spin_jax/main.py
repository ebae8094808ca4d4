"""Runs self-play fine-tuning (SPIN). The same command continues a run that was stopped.

    python -m spin_jax.main --config=FILE[:VARIANT] --workdir=DIR [--config.section.key=value …]

  --config=FILE[:VARIANT]  a Python file with get_config(), such as those in configs/, and one of its variants
  --config.section.key=…   any key of the config: --config.model.path=DIR, --config.train.epochs='(1,2)'
  --workdir=DIR            the folder of the run, where it is also continued; gs://BUCKET/FOLDER works too
  --check                  checks config, data, tokenizer and model files, reports what it found, and ends
  --only=PHASE             runs one phase of the next iteration: sample, score or train

With several hosts, start one process on each of them (with SLURM, one for each GPU). All of them must see the
workdir. On TPU pods, with SLURM and with Open MPI the processes find each other. Elsewhere, tell them:

  --coordinator=HOST:PORT --num_processes=N --process_id=I
  --heartbeat_s=100        if a process is silent for this many seconds, the others end

Examples:

  python -m spin_jax.main --config=configs/tiny.py --workdir=/tmp/spin_tiny
  python -m spin_jax.main --config=configs/zephyr.py --check
  python -m spin_jax.main --config=configs/small_gsm8k.py --workdir=DIR \\
      --config.model.path=MODEL --config.data.path=train.jsonl

Exit codes: 0 the run is done; 1 it failed (a full disk, numbers that are not finite, a crash); 2 bad input;
130 and 143 it was stopped by Ctrl-C or SIGTERM, and everything is saved. The same command continues after all
of these but 2.
"""

import os
import shlex
import sys
from typing import Any

from absl import flags

from spin_jax import config as config_lib
from spin_jax.cli import explain, fail, parse, read_config, set_up_jax
from spin_jax.runtime import secrets
from spin_jax.runtime.interrupts import Interrupts, say

flags.DEFINE_string("config", None, "Config file; --config.key=value changes one of its keys.")
_WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the run, where it is also continued.")
_ONLY = flags.DEFINE_enum("only", None, ["sample", "score", "train"], "Run one phase of the next iteration.")
_CHECK = flags.DEFINE_bool("check", False, "Check config, data, tokenizer and model files, then end.")


def read_flags() -> tuple[Any, str | None]:
    """(config, workdir), from the flags."""
    config = read_config()
    if config is None or (_WORKDIR.value is None and not _CHECK.value):
        raise ValueError("--config and --workdir are needed; see --help")
    return config_lib.resolve(config), _WORKDIR.value


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code, which the docstring of this file explains."""
    argv = sys.argv if argv is None else argv
    hint = f"to continue: {shlex.join(['python', '-m', 'spin_jax.main', *argv[1:]])}"

    def quit_now(number: int) -> None:
        say(secrets.redacted(f"\nquit at once; {hint}"))
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
    interrupts.listen()  # only now: with several processes JAX has just taken SIGTERM for itself
    try:
        if _CHECK.value or workdir is None:
            algorithm.check(config, workdir)
        else:
            algorithm.run(config, workdir, only=_ONLY.value, should_stop=interrupts)
    except errors.Interrupted as stopped:
        if processes.first():
            say(secrets.redacted(f"\ninterrupted; {hint}"))
        return stopped.exit_code
    except Exception as error:
        return processes.leave(error, explain(error, interrupts.asked, f"\n{hint}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
