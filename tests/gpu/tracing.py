"""What a profiler's trace says about one call: the longest operations, and how busy the device was."""

import collections
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData
from measuring import on_gpu

_MOST = 25  # operations that a row names


def traced(run: Callable[[], Any]) -> dict[str, Any]:
    """Runs a function once under the profiler, until the device is done; see `top_operations`."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        (path, *_) = Path(folder).rglob("*.xplane.pb")
        return top_operations(ProfileData.from_file(str(path)))


def top_operations(data: ProfileData) -> dict[str, Any]:
    """Milliseconds by kernel, `top` as [name, milliseconds, calls], and of the device as a whole.

    A GPU's kernels are the events of its streams. In a dry run it is the threads of XLA on the CPU, which
    tells nothing but that the reading of a trace works.
    """
    plane_part, line_part = ("GPU", "Stream") if on_gpu() else ("CPU", "XLA")
    times, calls = collections.Counter(), collections.Counter()
    first, last = float("inf"), 0.0
    for plane in data.planes:
        for line in plane.lines if plane_part in plane.name else ():
            if line_part not in line.name:
                continue
            for event in line.events:
                name = re.sub(r"([._]?\d+)+$", "", event.name)  # fusion.12 and fusion.13 are one
                times[name] += event.duration_ns / 1e6
                calls[name] += 1
                first, last = min(first, event.start_ns), max(last, event.start_ns + event.duration_ns)
    if not times:  # so that one sees where they are
        return {"no_events": {p.name: sorted({line.name for line in p.lines})[:12] for p in data.planes}}
    busy, count = sum(times.values()), sum(calls.values())
    return {
        "busy_ms": busy,
        "span_ms": (last - first) / 1e6,
        "kernels": count,
        "mean_us": 1e3 * busy / count,
        "top": [[name[:90], ms, calls[name]] for name, ms in times.most_common(_MOST)],
    }
