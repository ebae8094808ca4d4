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
