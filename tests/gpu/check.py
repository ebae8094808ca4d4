"""What a quarter of an hour on a GPU should tell about spin_jax: nine steps, in one command.

    python tests/gpu/check.py [--dry [--short]] [--out=DIR] [--budget=480] [--only=STEP,STEP]

Each step is a process of its own with a time limit. What it finds is printed as JSON rows and appended to
DIR/results.jsonl at once, so that a crash or a full memory costs one step only. The steps stand in the order
of their worth:

  environment     the card and the versions; what its memory and its matrix products reach at most
  attention       kernels against plain attention in float32, forward and backward; then their times at the
                  shapes of the 7B recipe, block sizes of ours, and which kernel is the fastest
  train_7b        the step of configs/zephyr.py: tokens/s, MFU, peak memory, the longest operations of a trace
  decode          tokens/s of 7B at 128, 64 and 256 slots, prefill, one layer's look at the cache, the draw
  correct         packed scores against scores alone, ln 2, gradients, and answers against a simple sampler;
                  tiny_run, a whole run of configs/tiny.py:smoke, runs beside it: neither of the two is timed
  train_1b        three remat policies of a 1B model
  train_7b+       the 7B step with another remat policy
  train_7b_plain  the 7B step, 8 layers of it, with plain attention
  decode-         decoding at 128 slots without command buffers

--dry runs all of it on a CPU in miniature, with kernels interpreted; what needs a GPU says so in its row.
--short does the five steps that the others repeat, with less in each.

Exit codes: 0 done; 1 a step crashed or took too long, or a row of it has an `error` or says `right: false`;
2 bad arguments.
"""

import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
_STDERR = 1500  # characters of it that are kept of a step that failed


class Step(NamedTuple):
    """One process: `run(dry=…, short=…, **options)` of a module beside this file."""

    name: str
    module: str
    options: dict[str, Any] = {}  # noqa: RUF012 (nobody changes it)
    most: float = 60  # seconds after which it is killed
    least: float = 10  # it is not begun where fewer seconds are left
    flags: str = ""  # for XLA
    shares_memory: bool = False  # takes what memory it needs, not all of it at once
    beside: tuple["Step", ...] = ()  # they run at the same time
    short: bool = True  # --short does it


TINY_RUN = Step("tiny_run", "tiny_run", most=200, shares_memory=True, short=False)
STEPS = (
    Step("environment", "environment_step", most=60, shares_memory=True),
    Step("attention", "attention_step", most=150, least=30),
    Step("train_7b", "training_step", {"arch": "7b", "remat": ["full"], "trace": True}, 150, 45),
    Step("decode", "decoding_step", {"slots": [128, 64, 256], "trace": True, "extras": True}, 150, 45),
    Step("correct", "correctness_step", most=110, least=40, shares_memory=True, beside=(TINY_RUN,)),
    Step(
        "train_1b",
        "training_step",
        {"arch": "1b", "remat": ["full", "attention+mlp", "none"]},
        most=110,
        least=40,
        short=False,
    ),
    Step(
        "train_7b+",
        "training_step",
        {"arch": "7b", "remat": ["attention+mlp"]},
        most=100,
        least=50,
        short=False,
    ),
    Step(
        "train_7b_plain",
        "training_step",
        {"arch": "7b", "remat": ["full"], "attention": "plain", "layers": 8},
        most=60,
        least=40,
        short=False,
    ),
    Step(
        "decode-",
        "decoding_step",
        {"slots": [128]},
        most=60,
        least=40,
        flags="--xla_gpu_enable_command_buffer=",
        short=False,
    ),
)


class Results:
    """The rows of all steps, written as they come, and the steps that failed."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / "results.jsonl").open("a")
        self._began = time.monotonic()
        self._lock = threading.Lock()
        self.failed: list[str] = []

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def add(self, step: str, row: dict[str, Any]) -> None:
        line = json.dumps({"t": round(self.seconds, 1), "step": step, **row}, ensure_ascii=False)
        with self._lock:
            print(line, flush=True)
            self._file.write(line + "\n")
            self._file.flush()
            bad = "error" in row or row.get("right") is False or row.get("exit", 0) != 0
            if bad and step not in self.failed:
                self.failed.append(step)


def run_steps(steps: Sequence[Step], out: Path, *, budget: float, dry: bool = False, short: bool = False) -> list[str]:
    """Runs steps one after another, and returns the names of those that failed.

    Args:
        out: the folder of results.jsonl.
        budget: seconds for all of them. A step that would not get its `least` of them is skipped.
        dry, short: see the top of this file.
    """
    results, skipped = Results(out), []
    for step in steps:
        left = budget - results.seconds
        if left < step.least:
            skipped.append(step.name)
            results.add(step.name, {"skipped": f"{left:.0f} s are left, and it takes {step.least:.0f} or more"})
            continue
        together = [step, *(each for each in step.beside if each.short or not short)]
        processes = [_start(each, dry, short) for each in together]
        with ThreadPoolExecutor(len(together)) as pool:
            try:
                rows = [
                    pool.submit(_follow, each.name, process, min(each.most, left), results)
                    for each, process in zip(together, processes, strict=True)
                ]
                for done in rows:
                    done.result()
            finally:  # a check that is interrupted leaves nothing running
                for process in processes:
                    _kill(process)
    end = {"failed_steps": len(results.failed), "failed": results.failed, "skipped": skipped}
    results.add("end", {**end, "seconds": round(results.seconds, 1)})
    return results.failed


def _start(step: Step, dry: bool, short: bool) -> subprocess.Popen:
    env = dict(os.environ, PYTHONUNBUFFERED="1", TF_CPP_MIN_LOG_LEVEL="2")
    paths = [str(ROOT), str(HERE), *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    env["PYTHONPATH"] = os.pathsep.join(paths)
    env.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "spin_jax_gpu_check"))
    env.setdefault("CUDA_VISIBLE_DEVICES", "0")  # the numbers are those of one card
    env["HF_HUB_OFFLINE"] = env["TRANSFORMERS_OFFLINE"] = "1"
    if dry:
        env["JAX_PLATFORMS"] = "cpu"
    if step.flags and not dry:  # they are the GPU compiler's
        env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} {step.flags}".strip()
    if step.shares_memory:
        env["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    call = {"module": step.module, "options": {**step.options, "dry": dry, "short": short}}
    return subprocess.Popen(
        [sys.executable, str(HERE / "check.py"), "--call", json.dumps(call)],
        cwd=ROOT,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # it is killed with all that it has started
    )


def _follow(name: str, process: subprocess.Popen, seconds: float, results: Results) -> None:
    """Passes on a process's rows until it ends or its time is over."""
    late, errors, began = threading.Event(), [], time.monotonic()

    def stop() -> None:
        late.set()
        _kill(process)

    timer = threading.Timer(seconds, stop)
    listener = threading.Thread(target=lambda: errors.append(process.stderr.read()))
    timer.start()
    listener.start()
    try:
        for line in process.stdout:
            with contextlib.suppress(ValueError):  # what is no row is some library's chatter
                if isinstance(row := json.loads(line), dict):
                    results.add(name, row)
        code = process.wait()
        listener.join()
    finally:
        timer.cancel()
    row = {"exit": "late" if late.is_set() else code, "seconds": round(time.monotonic() - began, 1)}
    if code:
        row["stderr"] = "".join(errors)[-_STDERR:]
    results.add(name, row)


def _kill(process: subprocess.Popen) -> None:
    """Ends a process and those that it has started; nothing where they have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _call(module: str, options: dict[str, Any]) -> int:
    """What a step's own process does."""
    import warnings

    warnings.simplefilter("ignore")
    importlib.import_module(module).run(**options)
    return 0


def chosen(only: str, short: bool) -> list[Step]:
    """The steps that the command line asks for.

    Raises:
        ValueError: there is none of that name.
    """
    names = [name for name in only.split(",") if name]
    known = [step.name for step in STEPS]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"no step {', '.join(unknown)}: choose from {', '.join(known)}")
    if names:
        return [step for step in STEPS if step.name in names]
    return [step for step in STEPS if step.short or not short]


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--dry", action="store_true", help="on a CPU, in miniature")
    parser.add_argument("--short", action="store_true", help="fewer steps, with less in each")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(os.environ.get("OUT") or "gpu_check_out"),
        help="the folder of results.jsonl; unset: $OUT, or else gpu_check_out",
    )
    parser.add_argument("--budget", type=float, help="seconds for all of it; unset: 480, in a dry run 1800")
    parser.add_argument("--only", default="", help="names of steps, with commas between them")
    parser.add_argument("--call", help=argparse.SUPPRESS)  # a step's own process
    args = parser.parse_args(argv)
    if args.call:
        return _call(**json.loads(args.call))
    try:
        steps = chosen(args.only, args.short)
    except ValueError as error:
        parser.error(str(error))
    if args.dry:  # limits are a card's, and a CPU may be slow or shared
        steps = [step._replace(most=900, beside=tuple(s._replace(most=900) for s in step.beside)) for step in steps]
    budget = args.budget or (1800 if args.dry else 480)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    return 1 if run_steps(steps, args.out, budget=budget, dry=args.dry, short=args.short) else 0


if __name__ == "__main__":
    sys.exit(main())
