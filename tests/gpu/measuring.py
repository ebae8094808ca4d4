"""Rows of results, and the clock: what every step of the check uses."""

import json
import os
import statistics
import time
import traceback
from collections.abc import Callable
from typing import Any

import jax


class Missing(Exception):
    """What a measurement needs, and this machine or this version of JAX does not have."""


def tell(**row: Any) -> None:
    """One row of the results: a line of JSON, its numbers cut to four digits."""
    print(json.dumps(_short(row), ensure_ascii=False), flush=True)


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _short(part) for key, part in value.items()}
    return [_short(part) for part in value] if isinstance(value, list | tuple) else value


def attempt(measure: Callable[[], dict[str, Any]], **row: Any) -> dict[str, Any] | None:
    """One measurement, which is told as a row.

    What goes wrong is told, too, as `error`; what only cannot be measured here, as `needs`.

    Returns:
        what was found, or None.
    """
    try:
        found = measure()
    except Missing as missing:
        tell(**row, needs=str(missing))
        return None
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{os.path.basename(last.filename)}:{last.lineno}"
        tell(**row, error=f"{type(error).__name__}: {str(error)[:300]} ({place})")
        return None
    tell(**row, **found)
    return found


def on_gpu() -> bool:
    return jax.default_backend() == "gpu"


def need_gpu() -> None:
    """Raises Missing where there is no GPU."""
    if not on_gpu():
        raise Missing("a GPU")


def timed(run: Callable[[], Any], times: int = 10) -> float:
    """Seconds of a call: the median of three rounds, in which the calls are queued as they are in a run."""
    jax.block_until_ready(run())
    rounds, out = [], None
    for _ in range(3):
        began = time.perf_counter()
        for _ in range(times):
            out = run()
        jax.block_until_ready(out)
        rounds.append((time.perf_counter() - began) / times)
    return statistics.median(rounds)


def memory() -> dict[str, float]:
    """GiB of the first device: the most that this process has used, and what it may use; a CPU says 0."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return {
        "peak_gib": stats.get("peak_bytes_in_use", 0) / 2**30,
        "limit_gib": stats.get("bytes_limit", 0) / 2**30,
    }
