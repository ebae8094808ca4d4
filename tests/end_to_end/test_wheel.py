"""A wheel of spin_jax works where there is no clone: each package, template and stylesheet is in it."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest
from runs import ROOT


def run(*command, cwd, expect=0):
    """What a process prints that knows nothing of the clone."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel, built offline from a copy of the clone: building leaves files beside the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "spin_jax", folder / "clone/spin_jax", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "clone" / name)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder)]
    run(sys.executable, "-m", "pip", "wheel", *options, str(folder / "clone"), cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel):
    """The Python of a new environment that has the wheel, and finds our dependencies where we find them."""
    environment = wheel.parent / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", str(environment), cwd=wheel.parent)
    python = environment / "bin/python"
    (packages,) = environment.glob("lib/python*/site-packages")
    # A folder that a .pth file names comes last, and its own .pth files, which may lead to the clone, are
    # not read.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    run(*pip, "install", "--no-deps", "--no-index", str(wheel), cwd=wheel.parent)
    return python


def test_every_file_is_in_the_wheel(wheel):
    """Of the package's files only its READMEs, which are for readers of the repository, stay behind."""
    paths = (path for path in (ROOT / "spin_jax").rglob("*") if path.is_file())
    ours = {path.relative_to(ROOT).as_posix() for path in paths if "__pycache__" not in path.parts}
    ours = {name for name in ours if not name.endswith("/README.md")}
    assert "spin_jax/report/templates/style.css" in ours
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if not name.startswith("spin_jax-0")} == ours


def test_the_installed_package_works(installed, tmp_path):
    program = """
import importlib.resources, os, sys
import spin_jax
from spin_jax import config
assert spin_jax.__file__.startswith(sys.prefix), spin_jax.__file__
c = config.default()
c.data.path, c.model.path = "train.jsonl", "model"
assert config.resolve(c).selfplay.iterations == 3
assert "logistic" in spin_jax.losses.LOSSES
from spin_jax.report import page
assert importlib.resources.files(page.__package__).joinpath("templates/style.css").read_text()
print("done")
"""
    assert run(str(installed), "-c", program, cwd=tmp_path) == "done\n"


@pytest.mark.parametrize("command", ["main", "report"])
def test_an_installed_command_helps(installed, tmp_path, command):
    said = run(str(installed), "-m", f"spin_jax.{command}", "--help", cwd=tmp_path)
    assert f"python -m spin_jax.{command}" in said
