"""Kills the command again and again, and compares what it comes to with a run that nobody disturbed.

    python tests/helpers/kill_harness.py --workdir=DIR [--kills=50] [--signal=KILL] [--processes=1] [FLAGS]

A reference run shows which phases there are, in which order and how long. Then the same command runs in a
workdir of its own: at a random moment of each phase it is killed and started again, until it is done; as
often as it takes. `phase` tells from the workdir alone what a run is at. FLAGS that --help does not list go
to spin_jax.main. Exit status: 0 where all runs came to the same, to the bit, and no work was done twice
that need not have been; else 1, and what is wrong.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import signal
import socket
import sys
import time
from typing import NamedTuple

from runs import Command, differences, step_of

# Phases long enough to hit, in a run short enough to repeat.
FLAGS = (
    "--config.data.limit=80",
    "--config.sft.epochs=1",
    "--config.sft.batch_size=8",
    "--config.train.batch_size=8",
    "--config.sampling.shard_size=8",
    "--config.sampling.batch_size=8",
    "--config.checkpoint.every_steps=4",
    "--config.data.today=2026-01-31",  # runs that are compared may begin on different days
)
STOPPED = {signal.SIGTERM: 143, signal.SIGINT: 130}  # exit codes of a run that was asked to stop
STOPS_WITHIN = 120  # seconds from such a signal
POLL = 0.01  # seconds


# --- what a run is at ----------------------------------------------------------------------------


class Phase(NamedTuple):
    kind: str  # starting, sft, sample, score, train, checkpointing, exporting, evaluating, control …
    folder: str = ""  # of the workdir: start, iteration_0, control/iteration_0, …

    def __str__(self):
        return f"{self.kind} {self.folder}".strip()


def phase(workdir, since=0.0):
    """What the run in `workdir` is at, as its files tell.

    Args:
        since: the time of its start, in seconds; one that has changed nothing since is `starting`, and saves
            that were broken off before do not count. 0: nobody knows.
    """
    files = listing(workdir)
    new = [name for name, changed in files.items() if changed >= since]
    if "config.json" not in files or all(name.split("/")[0] in ("config.json", "tensorboard") for name in new):
        return Phase("starting")
    if "summary.png" in new:
        return Phase("finished")
    config = read_json(workdir / "config.json")["config"]
    iterations = range(config["selfplay"]["start"], config["selfplay"]["iterations"])
    summary = read_json(workdir / "summary.json") if "summary.json" in files else []
    rows = {row["iteration"]: row for row in summary}
    for t in (-1, *iterations):
        if t not in rows:
            folder = "start" if t < 0 else f"iteration_{t}"
            return Phase(_within(files, folder, t, since), folder)
    if config["sft"]["control"]:
        for t in iterations:
            if "control" not in rows[t]:
                folder = f"control/iteration_{t}"
                return Phase(_within(files, folder, t, since), folder)
        if not _exported(files, "control"):
            return Phase("exporting", "control")
    return Phase("reporting")


def _within(files, folder, t, since):
    """The kind of phase between the beginning of an iteration, of the start or of a control and its end."""
    saves = checkpoints(files, folder)
    if any(not whole and newest >= since for whole, newest in saves.values()):
        return "checkpointing"
    if not saves.get(f"{folder}/checkpoint", (False,))[0]:
        if folder.startswith("control"):
            return "control"
        if t < 0:
            return "sft"
        pairs, scores = ([n for n in files if n.startswith(f"{folder}/{x}/")] for x in ("pairs", "scores"))
        return "sample" if not _complete(pairs) else "score" if not _complete(scores) else "train"
    if folder.startswith("control") or _exported(files, folder):
        return "evaluating"
    return "exporting"


def listing(workdir):
    """{path below `workdir`: time of its last change}; temporary files are none of it."""
    found = {}
    for folder, _, names in os.walk(workdir):
        for name in names:
            path = os.path.join(folder, name)
            with contextlib.suppress(FileNotFoundError):  # a run is at work here
                if not name.endswith(".tmp"):
                    found[os.path.relpath(path, workdir)] = os.stat(path).st_mtime
    return found


def checkpoints(files, folder=""):
    """{folder of a checkpoint: (it is whole, time of its last change)}."""
    found = collections.defaultdict(dict)
    for name, changed in files.items():
        parts = name.split("/")
        for word, depth in (("checkpoint", 1), ("train", 2)):  # …/checkpoint/FILE, …/train/STEP/FILE
            if name.startswith(folder) and word in parts[:-depth]:
                inside = parts.index(word) + depth
                found["/".join(parts[:inside])]["/".join(parts[inside:])] = changed
                break
    mark = _last_file(files, "commit_success.txt", ("checkpoint", "train"))
    return {path: (mark in inside, max(inside.values())) for path, inside in found.items()}


def _exported(files, folder):
    return f"{folder}/model/{_last_file(files, 'config.json', ('model',))}" in files


def _last_file(files, otherwise, folders):
    """The name of the file that makes a checkpoint or export whole: SHA256SUMS in runs that have those."""
    sums = [name.split("/") for name in files if name.endswith("/SHA256SUMS")]
    return "SHA256SUMS" if any(set(folders) & set(parts) for parts in sums) else otherwise


def _complete(names):
    """Whether all files of pairs or scores are there: …train-00000-of-00012, …, the held-out ones last."""
    groups = collections.Counter((name.rpartition("-of-")[0][:-6], name[-13:-8]) for name in names)
    held_out = any(group.endswith("test") for group, _ in groups)
    return held_out and all(there == int(count) for (_, count), there in groups.items())


def read_json(path):
    return json.loads(path.read_text())


# --- a run, and one that is killed ---------------------------------------------------------------


@dataclasses.dataclass
class Kept:
    """What a run has on disk at some moment: rows of metrics.jsonl, and times of what is made but once."""

    rows: dict  # {step: line}
    pieces: dict  # {name: time}: pairs, scores, checkpoints, exports

    @classmethod
    def of(cls, workdir):
        rows, metrics = {}, workdir / "metrics.jsonl"
        for line in metrics.read_text().splitlines() if metrics.exists() else []:
            with contextlib.suppress(ValueError):  # cut off by the kill
                rows[step_of(json.loads(line))] = line
        files = listing(workdir)
        pieces = {name: changed for name, changed in files.items() if name.endswith(".parquet")}
        pieces |= {name: changed for name, (whole, changed) in checkpoints(files).items() if whole}
        exports = {name.partition("/model/")[0] for name in files if "/model/" in name}
        pieces |= {f"{x}/model": files[f"{x}/model/config.json"] for x in exports if _exported(files, x)}
        return cls(rows, pieces)


@dataclasses.dataclass
class Kill:
    """One kill, and what it cost."""

    number: signal.Signals
    phase: Phase
    codes: list[int]  # exit codes, the process first that got the signal
    seconds: float  # until all processes had ended
    problems: list[str]
    again: list = dataclasses.field(default_factory=list)  # steps whose rows were written again

    def __str__(self):
        rows = f", {len(self.again)} rows made again" if self.again else ""
        codes = " ".join(map(str, self.codes))
        return f"{self.phase}: {self.number.name}, exit {codes} after {self.seconds:.1f} s{rows}"


class Run:
    """A workdir, and the command that is started on it: one process, or several with simulated devices."""

    def __init__(self, workdir, command, flags=FLAGS, *, config="configs/tiny.py:smoke", processes=1, heartbeat=100):
        self.workdir, self.command, self.flags = pathlib.Path(workdir), command, flags
        self.config, self.count, self.heartbeat = config, processes, heartbeat
        self.processes, self.logs, self.began, self.starts = [], [], 0.0, 0

    def start(self):
        self.began, self.starts = time.time(), self.starts + 1
        folder = self.workdir.with_name(f"{self.workdir.name}_logs")
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"{self.starts:03d}_{n}.txt" for n in range(self.count)]
        self.processes, port = [], free_port()
        for n, log in enumerate(self.logs):
            place = [f"--coordinator=localhost:{port}", f"--num_processes={self.count}", f"--process_id={n}"]
            place.append(f"--heartbeat_s={int(self.heartbeat)}")
            with open(log, "w") as stdout:
                process = self.command.start(
                    self.workdir,
                    *self.flags,
                    *(place if self.count > 1 else []),
                    config=self.config,
                    devices=1 if self.count == 1 else 4,
                    stdout=stdout,
                )
            self.processes.append(process)

    def phase(self):
        return phase(self.workdir, self.began)

    def going(self):
        return all(process.poll() is None for process in self.processes)

    def finish(self):
        """Waits for the end.

        Raises:
            RuntimeError: it was no good one.
        """
        codes = self._ended(3600)
        if any(codes):
            raise RuntimeError(f"exit codes {codes} without a signal\n{self.tail()}")

    def _ended(self, seconds):
        """Exit codes; None of a process that goes on after so many seconds. That is killed."""
        until = time.monotonic() + seconds
        while any(process.poll() is None for process in self.processes) and time.monotonic() < until:
            time.sleep(POLL)
        codes = [process.poll() for process in self.processes]
        self.stop()
        return codes

    def stop(self):
        for process in self.processes:
            process.kill()
            process.wait()

    def tail(self, lines=4):
        """The last lines that each process printed."""
        texts = [log.read_text().strip().splitlines()[-lines:] for log in self.logs]
        return "\n".join(f"  {n}| {line[-300:]}" for n, text in enumerate(texts) for line in text)

    def reach(self, target, timeline):
        """Waits until the run is at `target`; False where it has gone past, or ended."""
        while self.going():
            now = self.phase()
            if now == target:
                return True
            if now in timeline and timeline[now].first > timeline[target].last:
                return False
            time.sleep(POLL)
        return False

    def kill(self, number, victim=0):
        """Sends the signal to one process and waits for all; None where one had ended before."""
        if not self.going():
            return None
        before, began = self.phase(), time.monotonic()
        self.processes[victim].send_signal(number)
        graceful = number in STOPPED
        codes = self._ended(STOPS_WITHIN if graceful or self.count == 1 else self.heartbeat + 30)
        seconds, after = time.monotonic() - began, self.phase()
        codes = [codes[victim], *(code for n, code in enumerate(codes) if n != victim)]
        if number is signal.SIGKILL and codes[0] == 0:  # it was quicker
            return None
        at = before if graceful or self.count > 1 else after
        return Kill(number, at, codes, seconds, self._judge(number, codes, before, after))

    def _judge(self, number, codes, before, after):
        """What is wrong about how the processes ended."""
        if None in codes:
            return [f"{before}: exit codes {codes} ({number.name}, to the first): one did not end\n{self.tail()}"]
        if number is signal.SIGKILL:
            return []
        right = {STOPPED[number]} | ({-number} if before.kind == "starting" else set())
        right |= {0} if after.kind == "finished" else set()
        text = "".join(log.read_text() for log in self.logs)
        if not right.issuperset(codes):
            return [f"{before}: exit codes {codes} after {number.name}\n{self.tail()}"]
        if STOPPED[number] in codes and "to continue: python -m spin_jax.main" not in text:
            return [f"{before}: {number.name} leaves no word on how to continue\n{self.tail()}"]
        return []


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


# --- kills all over a run ------------------------------------------------------------------------


@dataclasses.dataclass
class Span:
    """When the reference run was at a phase, in seconds from its start."""

    first: float
    last: float
    times: int = 1
    total: float = 0.0


def delay(now, span):
    """How long after the beginning of a phase a kill may come. Saves are short, and training has many."""
    return span.total / span.times if now.kind == "checkpointing" else span.last - span.first


def reference(run):
    """Runs it undisturbed; returns {phase: Span}, in the order in which they began."""
    run.start()
    began, spans, last, before = time.monotonic(), {}, None, 0.0
    while run.going():
        now, clock = run.phase(), time.monotonic() - began
        span = spans.setdefault(now, Span(clock, clock, 0))
        span.last = clock
        if now == last:
            span.total += clock - before
        else:
            span.times += 1
        last, before = now, clock
        time.sleep(POLL)
    run.finish()
    return {now: span for now, span in spans.items() if now.kind != "finished"}


def pass_over(run, targets, timeline, signals, rng, say=print):
    """One run from its beginning to its end, killed once at each target that it meets."""
    kills, blamed, kept = [], None, Kept.of(run.workdir)

    def account():
        """Finds what was done again since the last kill that interrupted anything."""
        nonlocal kept
        now = Kept.of(run.workdir)
        if blamed is not None:
            again = [step for step, line in kept.rows.items() if now.rows.get(step) != line]
            blamed.again += again
            if blamed.number in STOPPED and len(again) > 1:
                blamed.problems.append(f"{blamed.phase}: {blamed.number.name} lost {len(again)} steps, {again[:5]} …")
            twice = [x for x, changed in kept.pieces.items() if now.pieces.get(x, changed) != changed]
            blamed.problems += [f"{blamed.phase}: {name} was made twice" for name in twice]
        kept = now

    run.start()
    for target in targets:
        if not run.reach(target, timeline):
            continue
        time.sleep(rng.uniform(0, delay(target, timeline[target])))
        kill = run.kill(signals[len(kills) % len(signals)], rng.randrange(run.count))
        if kill is None:
            break
        account()
        say(f"{len(kills) + 1:3d}. aimed at {target}: {kill}")
        if run.count > 1 or kill.problems:
            say(run.tail())
        kills.append(kill)
        blamed = kill if blamed is None or kill.phase.kind != "starting" else blamed
        run.start()
    run.finish()
    account()
    return kills


def torture(make_run, timeline, kills, signals, rng, phases=(), tries=3, say=print):
    """Passes over the run until it was killed so many times, and in each kind of phase.

    Args:
        make_run: number of a pass → its `Run`, in a new workdir.
        timeline: of `reference`.
        signals: sent in turn.
        phases: the kinds to aim at; all, where none is named.
        tries: passes that are added for kinds that chance has left out.

    Returns:
        The kills, and the runs that they were made on.
    """
    targets = [target for target in timeline if not phases or target.kind in phases]
    done, runs = [], []

    def go(chosen):
        runs.append(make_run(len(runs)))
        done.extend(pass_over(runs[-1], chosen, timeline, signals, rng, say))

    while len(done) < kills and len(runs) <= kills:
        few = min(kills - len(done), len(targets))
        go(sorted(rng.sample(targets, few), key=targets.index))
    for _ in range(tries):
        missing = {target.kind for target in targets} - {kill.phase.kind for kill in done}
        if missing:
            say(f"not hit yet: {', '.join(sorted(missing))}")
            of_kind = {kind: [x for x in targets if x.kind == kind] for kind in sorted(missing)}
            go(sorted(map(rng.choice, of_kind.values()), key=targets.index))
    return done, runs


def table(kills, timeline):
    """Kinds of phases, how often each was hit, and what that cost."""
    kinds = list(dict.fromkeys([*(now.kind for now in timeline), *(kill.phase.kind for kill in kills)]))
    rows = [("phase", "kills", "rows made again", "most at once", "slowest end", "exit codes")]
    for kind in kinds:
        hit = [kill for kill in kills if kill.phase.kind == kind]
        again = [len(kill.again) for kill in hit]
        codes = collections.Counter(" ".join(map(str, kill.codes)) for kill in hit)
        shown = ", ".join(f"{code} ({count})" for code, count in codes.items())
        slowest = f"{max((kill.seconds for kill in hit), default=0):.1f} s"
        rows.append((kind, str(len(hit)), str(sum(again)), str(max(again, default=0)), slowest, shown))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def problems(kills, runs, whole):
    """Everything that is wrong: ends, work done twice, results that differ."""
    found = [problem for kill in kills for problem in kill.problems]
    for run in runs:
        found += differences(run.workdir, whole)
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="a new folder; nothing is deleted")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--signal", default="KILL", help="KILL, TERM or INT; several, comma between, in turn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--phases", default="", help="kinds to aim at, comma between; all where not given")
    parser.add_argument("--processes", type=int, default=1, help="one of them is killed; the others must end")
    parser.add_argument("--heartbeat", type=float, default=100, help="seconds after which those notice")
    parser.add_argument("--cache", type=pathlib.Path, help="of compiled programs; unset: in the workdir")
    parser.add_argument("--config", default="configs/tiny.py:smoke")
    options, flags = parser.parse_known_args(argv)
    if (options.workdir / "reference").exists():
        parser.error(f"{options.workdir} holds a run: take a new one")

    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # devices are simulated, and tensors only compared
    command = Command(options.cache or options.workdir / "cache")

    def make_run(name):
        return Run(
            options.workdir / str(name),
            command,
            [*FLAGS, *flags],
            config=options.config,
            processes=options.processes,
            heartbeat=options.heartbeat,
        )

    compiled = command.cache.exists()
    if not compiled:
        reference(make_run("compiling"))  # its phases are longer
    whole = make_run("reference")
    timeline = reference(whole)
    warm = [] if compiled else differences(options.workdir / "compiling", whole.workdir)
    print("\n".join(f"{s.first:6.2f} – {s.last:6.2f} s  {now}  ({s.total:.2f} s)" for now, s in timeline.items()))
    kills, runs = torture(
        lambda number: make_run(f"pass_{number}"),
        timeline,
        options.kills,
        [signal.Signals[f"SIG{name}"] for name in options.signal.split(",")],
        random.Random(options.seed),
        [kind for kind in options.phases.split(",") if kind],
    )
    wrong = warm + problems(kills, runs, whole.workdir)
    print("", *kills, sep="\n")
    print(f"\n{table(kills, timeline)}\n\n{len(kills)} kills in {len(runs)} runs: ", end="")
    print("all equal the undisturbed one" if not wrong else "\n".join(["", *wrong]))
    leftovers = [path for run in runs for path in run.workdir.rglob("*.tmp")]
    print(f"{len(leftovers)} temporary files stay behind", *leftovers[:10], sep="\n  ")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
