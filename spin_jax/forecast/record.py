"""What the phases of a run take, beside what they were expected to take: times.json of a workdir."""

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from etils import epath

from spin_jax.report.numbers import START
from spin_jax.runtime import processes, stopwatch
from spin_jax.runtime.console import duration
from spin_jax.storage import files

PHASES = ("load", "compile", "sft", "sample", "judge", "score", "train", "control")
PHASES += ("evaluation", "checkpoint", "export")
_OFF = 1.3  # an expectation that is off by more than this factor is named
_SHORT_S = 1.0  # phases that take less, and were expected to, are not named


class Record(contextlib.AbstractContextManager):
    """The seconds of each phase of each iteration, of all attempts of a run together.

    `flush` writes them, which a run does where it makes sure of its metrics. A kill loses those since then, and the run
    repeats what took them.
    """

    def __init__(self, path: epath.Path):
        self._path = path
        self.seconds = {int(t): Counter(s) for t, s in (files.read_agreed(path) or {}).items()}

    def __enter__(self) -> "Record":
        self._begin(START)
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()
        stopwatch.count_in(Counter())

    def each(self, iterations: Iterable[int]) -> Iterator[int]:
        """The iterations one by one: what happens until the next one counts for each. Before is the START."""
        for t in iterations:
            self._begin(t)
            yield t

    def _begin(self, t: int) -> None:
        stopwatch.count_in(self.seconds.setdefault(t, Counter()))

    def total(self, iterations: Iterable[int]) -> Counter[str]:
        """The seconds of each phase of these iterations together."""
        stopwatch.tick()
        return sum((self.seconds[t] for t in iterations), Counter())

    def minutes(self, t: int) -> float:
        stopwatch.tick()
        return round(self.seconds[t].total() / 60, 3)

    def flush(self) -> None:
        stopwatch.tick()
        rounded = {t: {name: round(s, 3) for name, s in phases.items()} for t, phases in self.seconds.items()}
        if processes.first():
            with contextlib.suppress(OSError):  # where the disk is full, others say so
                files.write_here(self._path, files.as_json(rounded))


def comparison(expected: Mapping[str, float], took: Mapping[str, float]) -> str:
    """A table of the seconds of each phase, and a line on those that the expectation is off by more than 30%."""
    rest = sum(seconds for name, seconds in took.items() if name not in PHASES)
    ours_of = {**expected, "all": sum(expected.values())}
    theirs_of = {**took, "other": rest, "all": sum(took.values())}
    lines, off = [f"{'time':<12}{'expected':>10}{'took':>10}"], []
    for name in (*PHASES, "other", "all"):
        ours, theirs = ours_of.get(name, 0.0), theirs_of.get(name, 0.0)
        if max(ours, theirs) >= 0.05:
            lines.append(f"{name:<12}{duration(ours):>10}{duration(theirs):>10}")
        if max(ours, theirs) >= _SHORT_S and name in PHASES and not ours / _OFF <= theirs <= ours * _OFF:
            off.append(f"{name} takes {theirs / ours:.2g} times as long" if ours else f"{name} was not expected")
    return "\n".join([*lines, *([f"plan is off by more than 30%: {', '.join(off)}"] if off else [])])
