"""The oldest versions that pyproject.toml allows: they install together, and a run, parity tests and notebooks pass."""

import json
import os
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from runs import ROOT

TOOLS = ("gguf", "ipykernel", "jupytext", "nbclient", "pytest", "pytest-xdist", "qwix", "torch")
TESTS = (
    "tests/data",
    "tests/models",
    "tests/training/test_log_probs.py",
    "tests/training/test_step.py",
    "tests/test_losses.py",
    "tests/end_to_end/test_notebooks.py",
    "tests/end_to_end/test_real_model.py",
)


def run(*command):
    """What a command prints, in the clone."""
    environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-8000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def python(project, tmp_path_factory):
    """The Python of an environment with the oldest versions; the tools of the tests are as new as they come."""
    pytest.importorskip("uv")
    uv, environment = (sys.executable, "-m", "uv"), str(tmp_path_factory.mktemp("oldest") / "environment")
    run(*uv, "venv", "--python", sys.executable, environment)
    # Wheels only: an old source distribution would need an old compiler.
    install = (*uv, "pip", "install", "--python", environment, "--only-binary", ":all:")
    run(*install, "--resolution", "lowest-direct", "-r", "pyproject.toml")
    wanted = map(Requirement, project["optional-dependencies"]["test"])
    run(*install, *(str(requirement) for requirement in wanted if requirement.name in TOOLS))
    return f"{environment}/bin/python"


@pytest.mark.long
def test_versions_are_the_bounds(project, python):
    """Otherwise the other tests would show nothing about the bounds."""
    printed = run(sys.executable, "-m", "uv", "pip", "list", "--python", python, "--format", "json")
    installed = {package["name"]: Version(package["version"]) for package in json.loads(printed)}
    for requirement in map(Requirement, project["dependencies"]):
        (bound,) = requirement.specifier
        assert installed[canonicalize_name(requirement.name)] == Version(bound.version), requirement


@pytest.mark.long
def test_a_run_and_its_report(python, tmp_path):
    run(python, "-m", "spin_jax.main", "--config=configs/tiny.py:smoke", f"--workdir={tmp_path}")
    run(python, "-m", "spin_jax.report", f"--workdir={tmp_path}")
    assert (tmp_path / "report.html").exists()


@pytest.mark.long
def test_parity_and_notebooks(python):
    assert " passed" in run(python, "-m", "pytest", *TESTS)
