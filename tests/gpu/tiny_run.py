"""A whole run, from the SFT start to the table at its end: configs/tiny.py:smoke, as its user starts it."""

import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import attempt


def run(dry: bool, short: bool) -> None:
    """Tells the row of this step."""
    attempt(_run, what="the tiny run")


def _run() -> dict:
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        command = [
            sys.executable,
            "-m",
            "spin_jax.main",
            "--config=configs/tiny.py:smoke",
            f"--workdir={folder}",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - began
        if done.returncode:
            raise RuntimeError(f"exit code {done.returncode}: {(done.stdout + done.stderr)[-250:]}")
        rows = json.loads((Path(folder) / "summary.json").read_text())
    losses = [row["nll"] for row in rows]
    return {
        "seconds": seconds,
        "iterations": [row["iteration"] for row in rows],
        "nll": losses,
        "right": [row["iteration"] for row in rows] == [-1, 0, 1] and all(map(math.isfinite, losses)),
    }
