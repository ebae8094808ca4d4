"""Runs several variants of a config with several seeds, one after the other, and compares their results.

    python -m spin_jax.sweep --config=FILE --variants=A,B --seeds=0,1,2 --workdir=DIR [--config.key=value …]

  --config=FILE            a config file; each run is --config=FILE:VARIANT of spin_jax.main
  --variants=A,B           variants that its get_config takes
  --seeds=0,1,2            each variant runs once with each seed
  --workdir=DIR            runs are kept in DIR/VARIANT/seed_SEED; the same command continues them
  --numbers=A,B            numbers of summary.json that are compared (sampled_accuracy,greedy_accuracy,nll)
  --config.section.key=…   changes a key in all runs

It prints a table, and keeps it in DIR/table.md, and the numbers of each run in DIR/table.json. The table has
the start, the SFT control where a run has one, and the final model of each variant: the mean over the seeds,
with the smallest and the largest value.

Example:

  python -m spin_jax.sweep --config=configs/algorithms.py --seeds=0,1,2 --workdir=/tmp/algorithms \\
      --variants=spin,hinge,exponential,correlation,spin_nll,alpha_spin,tspin,dpo,ipo,rest_em,sppo

The exit code is the first exit code of a run that is not 0, or else 0; spin_jax.main explains them.
"""

import signal
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from etils import epath

from spin_jax.cli import config_overrides, fail, parse, read_config
from spin_jax.storage import files

Numbers = dict[str, float]


def run(config: str, variant: str, seed: int, workdir: epath.Path, overrides: Sequence[str]) -> int:
    """Runs spin_jax.main in another process, and returns its exit code.

    Ctrl-C reaches that process by itself, and SIGTERM is passed on to it: it saves, and both processes end.
    """
    command = ["-m", "spin_jax.main", f"--config={config}:{variant}", f"--workdir={workdir}"]
    process = subprocess.Popen([sys.executable, *command, f"--config.seed={seed}", *overrides])
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    while True:
        try:
            code = process.wait()
            return code if code >= 0 else 128 - code  # killed by a signal
        except KeyboardInterrupt:
            continue


def outcome(rows: Sequence[Mapping[str, Any]], variant: str, numbers: Sequence[str]) -> dict[str, Numbers]:
    """Returns {name: numbers} of start, SFT control and final model, from the rows of summary.json."""
    final = next((row for row in rows if row.get("final")), rows[-1])
    parts = {"start": rows[0], "SFT control": rows[-1].get("control") or {}, variant: final}
    found = {name: {n: row[n] for n in numbers if row.get(n) is not None} for name, row in parts.items()}
    return {name: values for name, values in found.items() if values}


def table(runs: Sequence[tuple[str, int, Mapping[str, Numbers]]], numbers: Sequence[str]) -> str:
    """Returns a Markdown table of runs, (variant, seed, `outcome`).

    Each model has a line, with the mean over the seeds and (smallest, largest) of each number.
    """
    lines: dict[str, dict[int, Mapping[str, float]]] = {}
    for _, seed, found in runs:
        for name, values in found.items():
            lines.setdefault(name, {}).setdefault(seed, values)  # all runs of a seed have the same start
    text = [f"| | {' | '.join(numbers)} |", "|---" * (len(numbers) + 1) + "|"]
    for name, by_seed in lines.items():
        columns = [[values[n] for values in by_seed.values() if n in values] for n in numbers]
        text.append(f"| {name} | {' | '.join(map(_cell, columns))} |")
    return "\n".join(text)


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    spread = f" ({min(values):.4g}, {max(values):.4g})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4g}{spread}"


def read_flags() -> tuple[str, list[str], list[int], epath.Path, list[str]]:
    """(config file, variants, seeds, workdir, numbers), from the flags."""
    given = flags.FLAGS
    # The first variant is read here for its errors only: each run reads its own.
    read_config(f"{given.config}:{given.variants[0]}" if given.config and given.variants else "")
    if not (given.config and given.variants and given.workdir):
        raise ValueError("--config, --variants and --workdir are needed; see --help")
    try:
        seeds = [int(seed) for seed in given.seeds]
    except ValueError:
        raise ValueError(f"--seeds={','.join(given.seeds)}: whole numbers are wanted, as in 0,1,2") from None
    return given.config, given.variants, seeds, epath.Path(given.workdir), given.numbers


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code, which the docstring of this file explains."""
    # These are defined here because a program that imports this module may define flags of the same names.
    flags.DEFINE_string("config", None, "Config file; --config.key=value changes a key of it.")
    flags.DEFINE_string("workdir", None, "Where the runs are kept.")
    flags.DEFINE_list("variants", [], "Variants of the config file.")
    flags.DEFINE_list("seeds", ["0"], "Seeds of each variant.")
    compared = ["sampled_accuracy", "greedy_accuracy", "nll"]
    flags.DEFINE_list("numbers", compared, "Numbers of summary.json that are compared.")
    try:
        config, variants, seeds, workdir, numbers = parse(sys.argv if argv is None else argv, read_flags)
    except ValueError as error:
        return fail(str(error))
    runs = []
    for number, (seed, variant) in enumerate((s, v) for s in seeds for v in variants):
        folder = workdir / variant / f"seed_{seed}"
        print(f"\n=== {number + 1} of {len(seeds) * len(variants)}: {variant}, seed {seed}\n", flush=True)
        if code := run(config, variant, seed, folder, config_overrides()):
            return fail(f"{variant}, seed {seed}, ended with {code}; the same command continues", code)
        runs.append((variant, seed, outcome(files.read_json(folder / "summary.json"), variant, numbers)))
    text = table(runs, numbers)
    records = [{"variant": variant, "seed": seed, "numbers": found} for variant, seed, found in runs]
    files.write_here(workdir / "table.json", files.as_json(records))
    files.write_here(workdir / "table.md", f"{text}\n".encode())
    print(f"\n{text}\n\nThe table is in {workdir / 'table.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
