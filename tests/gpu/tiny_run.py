"""A whole run, from the SFT start to the table at its end: configs/tiny.py:smoke, as its user starts it."""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from importlib import metadata
from pathlib import Path

from measuring import attempt


def run(dry: bool, short: bool) -> None:
    """Tells the row of this step."""
    attempt(_run, what="the tiny run")


def _run() -> dict:
    with tempfile.TemporaryDirectory() as folder:
        packages = Path(folder) / "packages"
        _make_known(packages)
        path = os.pathsep.join([os.environ["PYTHONPATH"], str(packages)])  # check.py has set it
        command = [sys.executable, "-m", "spin_jax.main", "--config=configs/tiny.py:smoke"]
        began = time.perf_counter()
        done = subprocess.run(
            [*command, f"--workdir={folder}/run"],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        seconds = time.perf_counter() - began
        if done.returncode:
            raise RuntimeError(f"exit code {done.returncode}: {(done.stdout + done.stderr)[-250:]}")
        rows = json.loads((Path(folder) / "run" / "summary.json").read_text())
    losses = [row["nll"] for row in rows]
    return {
        "seconds": seconds,
        "iterations": [row["iteration"] for row in rows],
        "nll": losses,
        "right": [row["iteration"] for row in rows] == [-1, 0, 1] and all(map(math.isfinite, losses)),
    }


def _make_known(packages: Path) -> None:
    """A run notes spin_jax's version: Python is told it here, where the package is not installed."""
    try:
        metadata.version("spin_jax")
    except metadata.PackageNotFoundError:
        version = tomllib.loads(Path("pyproject.toml").read_text())["project"]["version"]
        about = packages / f"spin_jax-{version}.dist-info"
        about.mkdir(parents=True)
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: spin_jax\nVersion: {version}\n")
