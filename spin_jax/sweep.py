"""Runs several variants of a config with several seeds, and compares their results.

    python -m spin_jax.sweep --config=FILE --variants=A,B --seeds=0,1,2 --workdir=DIR [--config.key=value …]

  --config=FILE            a config file; each run is --config=FILE:VARIANT of spin_jax.main
  --variants=A,B           variants that its get_config takes
  --seeds=0,1,2            each variant runs once with each seed
  --workdir=DIR            runs are kept in DIR/VARIANT/seed_SEED; the same command continues them
  --parallel=1             how many runs go on at a time; NVIDIA GPUs are divided evenly among them
  --numbers=A,B            numbers of summary.json that are compared (sampled_accuracy,greedy_accuracy,nll)
  --baseline=NAME          a variant (unset: the first), start or "SFT control", that the others are compared with
  --config.section.key=…   changes a key in all runs, except for seed, which --seeds gives

It prints two tables and keeps them in DIR/table.md; the numbers of each run are in DIR/table.json. The tables have the
start, the SFT control where a run has one, and the final model of each variant. The first has the means over the
seeds, with the smallest and the largest value. The second has the differences to the baseline, with their errors.

With --parallel=2 and more each run writes to its own DIR/VARIANT/seed_SEED/log.txt. A run that has fewer GPUs than it
would have alone may differ in the last bits of its sums. On a TPU host runs go on one by one only.

Example:

  python -m spin_jax.sweep --config=configs/algorithms.py --seeds=0,1,2 --workdir=/tmp/algorithms \\
      --variants=spin,hinge,exponential,correlation,spin_nll,alpha_spin,tspin,dpo,ipo,rest_em,sppo

Ctrl-C and SIGTERM stop the sweep: its runs save and end, and the same command continues them. A run that fails does not
stop the others. The exit code is 130 or 143 after a signal, otherwise the first one of a run that is not 0, or 0.
"""

import contextlib
import os
import queue
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from absl import flags
from etils import epath

from spin_jax.cli import config_overrides, fail, parse, read_config
from spin_jax.report import tables
from spin_jax.runtime.platforms import Variables, device_shares
from spin_jax.storage import files


class Run(NamedTuple):
    """A run of the sweep."""

    variant: str
    seed: int
    folder: epath.Path

    def __str__(self) -> str:
        return f"{self.variant}, seed {self.seed}"


class Processes:
    """Starts runs in processes. Ctrl-C reaches these by itself, and SIGTERM is passed on: the runs save and end."""

    program = ("-m", "spin_jax.main")  # what Python runs

    def __init__(self, config: str, overrides: Sequence[str]):
        self.stopped_by = 0  # the number of the signal
        self._config, self._overrides = config, overrides
        self._started: list[subprocess.Popen] = []
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)

    def _stop(self, number: int, _: Any) -> None:
        self.stopped_by = self.stopped_by or number
        for process in self._started if number == signal.SIGTERM else ():
            process.terminate()

    def run(self, run: Run, variables: Variables, log: epath.Path | None) -> int:
        """Runs spin_jax.main and returns its exit code.

        Args:
            variables: they change the environment of this process.
            log: the file that the output is added to; None leaves it where the sweep's own output goes.
        """
        command = [*self.program, f"--config={self._config}:{run.variant}", f"--workdir={run.folder}"]
        environment = {k: v for k, v in {**os.environ, **variables}.items() if v is not None}
        with open(log, "ab") if log else contextlib.nullcontext() as output:
            process = subprocess.Popen(
                [sys.executable, *command, f"--config.seed={run.seed}", *self._overrides],
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
                env=environment,
            )
            self._started.append(process)
            if self.stopped_by == signal.SIGTERM:  # it came while the process started
                process.terminate()
            code = process.wait()
        return code if code >= 0 else 128 - code  # killed by a signal


def run_all(processes: Processes, runs: Sequence[Run], shares: Sequence[Variables]) -> list[int]:
    """Runs them, as many at a time as there are shares of the devices, and returns their exit codes."""
    free: queue.SimpleQueue[Variables] = queue.SimpleQueue()
    for variables in shares:
        free.put(variables)

    def run_one(number: int) -> int:
        variables = free.get()
        try:
            if processes.stopped_by:
                return 128 + processes.stopped_by
            return _run_one(processes, runs[number], variables, f"{number + 1} of {len(runs)}", len(shares) > 1)
        finally:
            free.put(variables)

    with ThreadPoolExecutor(len(shares)) as pool:
        return list(pool.map(run_one, range(len(runs))))


def _run_one(processes: Processes, run: Run, variables: Variables, place: str, logs: bool) -> int:
    """Runs one, and tells when it begins and ends; `place` says which of all runs it is."""
    log, began = run.folder / "log.txt" if logs else None, time.monotonic()
    if log:
        run.folder.mkdir(parents=True, exist_ok=True)
        print(f"{place}: {run}, begins and writes to {log}", flush=True)
    else:
        print(f"\n=== {place}: {run}\n", flush=True)
    code = processes.run(run, variables, log)
    if code:
        advice = "" if code == 2 else "; the same command continues"
        fail(f"{run}, ended with {code}{advice}{f' ({log})' if log else ''}", code)
    elif log:
        print(f"{place}: {run}, is done after {(time.monotonic() - began) / 60:.1f} min", flush=True)
    return code


class Request(NamedTuple):
    """What the flags ask for."""

    config: str
    variants: list[str]
    seeds: list[int]
    workdir: epath.Path
    parallel: int
    numbers: list[str]
    baseline: str


def read_flags() -> Request:
    """The request of the command line; ValueError says what is wrong with it."""
    given = flags.FLAGS
    for file in [f"{given.config}:{variant}" for variant in given.variants if given.config] or [""]:
        read_config(file)  # for its errors only: each run reads its own
    if not (given.config and given.variants and given.workdir):
        raise ValueError("--config, --variants and --workdir are needed; see --help")
    if any(re.match(r"--?config\.seed(=|$)", argument) for argument in config_overrides()):
        raise ValueError("--config.seed would give all runs the same seed: give their seeds as --seeds=0,1,2")
    try:
        seeds = [int(seed) for seed in given.seeds]
    except ValueError:
        raise ValueError(f"--seeds={','.join(given.seeds)}: whole numbers are wanted, as in 0,1,2") from None
    baseline, baselines = given.baseline or given.variants[0], [*given.variants, tables.START, tables.CONTROL]
    if baseline not in baselines:
        raise ValueError(f"--baseline={baseline}: choose one of {', '.join(baselines)}")
    if given.parallel > 1 and "://" in given.workdir:
        raise ValueError(f"--parallel={given.parallel} keeps a log.txt for each run: --workdir has to be on a disk")
    workdir = epath.Path(given.workdir)
    return Request(given.config, given.variants, seeds, workdir, given.parallel, given.numbers, baseline)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code, which the docstring of this file explains."""
    # These are defined here because a program that imports this module may define flags of the same names.
    flags.DEFINE_string("config", None, "Config file; --config.key=value changes a key of it.")
    flags.DEFINE_string("workdir", None, "Where the runs are kept.")
    flags.DEFINE_list("variants", [], "Variants of the config file.")
    flags.DEFINE_list("seeds", ["0"], "Seeds of each variant.")
    flags.DEFINE_integer("parallel", 1, "How many runs go on at a time.", lower_bound=1)
    compared = ["sampled_accuracy", "greedy_accuracy", "nll"]
    flags.DEFINE_list("numbers", compared, "Numbers of summary.json that are compared.")
    flags.DEFINE_string("baseline", None, "The model that the others are compared with; the first variant if unset.")
    try:
        asked = parse(sys.argv if argv is None else argv, read_flags)
        shares = device_shares(asked.parallel)
    except ValueError as error:
        return fail(str(error))
    cases = dict.fromkeys((seed, variant) for seed in asked.seeds for variant in asked.variants)
    runs = [Run(variant, seed, asked.workdir / variant / f"seed_{seed}") for seed, variant in cases]
    processes = Processes(asked.config, config_overrides())
    codes = run_all(processes, runs, shares)
    code = next(filter(None, codes), 0)
    if code and processes.stopped_by:
        return 128 + processes.stopped_by
    ended = list(zip(runs, codes, strict=True))
    if finished := [run for run, failed in ended if not failed]:
        write_results(asked, finished, [run for run, failed in ended if failed])
    return code


def write_results(asked: Request, runs: Sequence[Run], unfinished: Sequence[Run]) -> None:
    """Writes table.json and table.md of the finished runs, and prints the tables."""
    found = [(run, tables.read_models(run.folder, run.variant, asked.numbers)) for run in runs]
    results = tables.by_model([(run.seed, models) for run, models in found])
    text = tables.means(results, asked.numbers)
    if differences := tables.differences(results, asked.numbers, asked.baseline):
        text += f"\n\n{tables.NOTE.format(asked.baseline)}\n\n{differences}"
    if unfinished:
        text += f"\n\nThe tables are without {'; '.join(map(str, unfinished))}."
    records = [
        {"variant": run.variant, "seed": run.seed, "numbers": {name: model.numbers for name, model in models.items()}}
        for run, models in found
    ]
    files.write_here(asked.workdir / "table.json", files.as_json(records))
    files.write_here(asked.workdir / "table.md", f"{text}\n".encode())
    print(f"\n{text}\n\nThe tables are in {asked.workdir / 'table.md'}")


if __name__ == "__main__":
    sys.exit(main())
