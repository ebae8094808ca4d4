"""The card, the versions, and its two ceilings: what a copy reaches of memory, and a matrix product.

Shares of a data sheet's numbers are as good as the card is: these rows say how good this one is, today.
"""

import functools
import os
import platform
import subprocess
from importlib import metadata

import jax
import jax.numpy as jnp
from measuring import attempt, memory, on_gpu, tell, timed

_PACKAGES = [
    "jax",
    "jaxlib",
    "jax-cuda13-plugin",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "transformers",
    "nvidia-cudnn-cu13",
]
_CARD = "name,memory.total,driver_version,clocks.sm,clocks.mem,power.limit"


def run(dry: bool, short: bool) -> None:
    """Tells the rows of this step."""
    tell(
        card=_said("nvidia-smi", f"--query-gpu={_CARD}", "--format=csv,noheader"),
        commit=_said("git", "rev-parse", "HEAD"),
        changed_files=_said("git", "status", "--porcelain", "--untracked-files=no"),
        versions={name: _version(name) for name in _PACKAGES},
        python=platform.python_version(),
        cores=os.cpu_count(),
    )
    device = jax.devices()[0]
    tell(device=device.device_kind, platform=device.platform, count=len(jax.devices()), **memory())
    if not dry and not on_gpu():
        raise SystemExit("there is no GPU that JAX can use: install jax[cuda13], or try --dry")
    D, F = (128, 256) if dry else (4096, 14336)  # of the 7B model
    square = 256 if dry else 8192
    attempt(functools.partial(_matmul, square, square, square), what=f"matmul {square}, bf16")
    attempt(functools.partial(_copy, 2**20 if dry else 2**31), what="copy, read and written")
    for rows in (128,) if short else (64, 128, 256):  # a decoding step's products
        attempt(functools.partial(_thin_matmuls, rows, D, F), what=f"matmul {rows} × {D} × {F}, weights read")
    for rows in (512,) if dry else (6144, 8192, 16384):  # a training step's
        attempt(functools.partial(_matmul, rows, D, F), what=f"matmul {rows} × {D} × {F}")


def _said(*command: str) -> str | None:
    """What a command prints; None where there is no such command, or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _random(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def _matmul(rows: int, inner: int, columns: int) -> dict:
    a, b = _random(0, rows, inner), _random(1, inner, columns)
    product = jax.jit(jnp.matmul)
    return {"tflops": 2 * rows * inner * columns / timed(lambda: product(a, b)) / 1e12}


def _copy(numbers: int) -> dict:
    x = jnp.ones(numbers, jnp.bfloat16)
    add = jax.jit(lambda x: x + 1)
    return {"tb_s": 2 * x.nbytes / timed(lambda: add(x)) / 1e12}


def _thin_matmuls(rows: int, inner: int, columns: int) -> dict:
    """A few rows against eight weights, more than a cache holds: they are read anew each time."""
    a, weights = _random(2, rows, inner), _random(3, 8, inner, columns)
    products = jax.jit(lambda a, weights: [a @ weights[n] for n in range(8)])
    seconds = timed(lambda: products(a, weights)) / 8
    numbers = inner * columns
    return {"tb_s": 2 * numbers / seconds / 1e12, "tflops": 2 * rows * numbers / seconds / 1e12}
