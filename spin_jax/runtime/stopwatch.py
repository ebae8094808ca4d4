"""The seconds that this process spends in each phase of a run: sample, train, checkpoint, compile, …

A function that is a phase has the decorator `phase`. A phase within another one stops the clock of the outer one, so
that the seconds of all phases add up to those of the clock on the wall. What is no phase is OTHER.
"""

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax

OTHER = "other"
EVALUATION = "evaluation"  # answers and scores that are made for it are a part of it

_open = [OTHER]  # the phases that the process is in, the innermost one last
_seconds: Any = Counter()
_since = time.perf_counter()
_compilations: list[tuple[float, float]] = []  # (when it began, its seconds), of those that no other one contains


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """The seconds of the block, or of the decorated function, count for this phase."""
    name = EVALUATION if _open[-1] == EVALUATION and name in ("sample", "score") else name
    tick()
    _open.append(name)
    try:
        yield
    finally:
        tick()
        _open.pop()


def tick() -> None:
    """Adds the seconds up to now to those of the present phase."""
    global _since
    now = time.perf_counter()
    _seconds[_open[-1]] += now - _since
    _since = now


def count_in(seconds: Any) -> Any:
    """From now on the seconds of each phase are added to this Counter."""
    global _seconds
    tick()
    _seconds = seconds
    return seconds


def _compiled(event: str, seconds: float, **_: Any) -> None:
    """Tracing, lowering and compiling are a phase of their own. JAX reports each when it ends, inner ones first."""
    if event.startswith("/jax/core/compile/"):
        began, own = time.perf_counter() - seconds, seconds
        while _compilations and _compilations[-1][0] >= began:
            own -= _compilations.pop()[1]
        _compilations.append((began, seconds))
        _seconds["compile"] += own
        _seconds[_open[-1]] -= own


jax.monitoring.register_event_duration_secs_listener(_compiled)  # pyright: ignore[reportArgumentType]
