"""What JAX is told about the machine before it starts."""

import glob
import os
import subprocess
import sys

import pytest
from runs import ROOT

from spin_jax.runtime import platforms


@pytest.mark.skipif(bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")), reason="may have a TPU")
@pytest.mark.parametrize("variables", [{}, {"TPU_WORKER_ID": "0"}, {"JAX_PLATFORMS": "tpu,cpu"}])
def test_libtpu_is_left_alone_where_there_is_no_tpu(variables):
    """Without a TPU, JAX does not load libtpu; a variable of TPU machines, or JAX_PLATFORMS, keeps it."""
    script = (
        "import jax; from spin_jax.runtime import platforms; platforms.skip_absent_tpu()\n"
        "print(jax.config.jax_platforms)\n"
        "import spin_jax.selfplay.algorithm"
    )
    unset = {"JAX_PLATFORMS", "JAX_FORCE_TPU_INIT", *platforms.TPU_VARIABLES}
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    left_alone = variables.get("JAX_PLATFORMS", "None")
    assert done.stdout.strip() == (left_alone if variables else "cpu")


@pytest.mark.parametrize(
    ("environment", "parallel", "expected"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, 1, [{}]),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3,4"}, 2, ["0,1", "2,3"]),
        ({"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b", "JAX_PLATFORMS": "cuda,cpu"}, 2, ["GPU-a", "GPU-b"]),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "JAX_PLATFORMS": "cpu"}, 3, [None] * 3),
        ({"CUDA_VISIBLE_DEVICES": "3"}, 2, "--parallel=2: each run needs a GPU of its own, and 1 are visible"),
        ({"JAX_PLATFORMS": "tpu"}, 2, "on a TPU host one run uses all chips"),
        ({"CUDA_VISIBLE_DEVICES": "", "TPU_WORKER_ID": "0"}, 2, "on a TPU host one run uses all chips"),
    ],
)
def test_shares_of_the_devices(environment, parallel, expected, monkeypatch):
    """GPUs are divided evenly, and what is left over stays idle. CPUs are shared."""
    for name in ("CUDA_VISIBLE_DEVICES", "JAX_PLATFORMS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            platforms.device_shares(parallel)
    elif parallel == 1:
        assert platforms.device_shares(parallel) == expected
    else:
        assert [share.get("CUDA_VISIBLE_DEVICES") for share in platforms.device_shares(parallel)] == expected
