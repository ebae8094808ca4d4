"""Runs that tests of the report share."""

import shutil

import pytest
from example_run import change, write_run

from spin_jax.report import page


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "logistic")


@pytest.fixture
def copy(finished, tmp_path):
    """A run to change, and a function that makes its page."""

    def text(**options):
        page.write([str(tmp_path / "run")], str(tmp_path / "page.html"), **options)
        return (tmp_path / "page.html").read_text()

    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run", text


@pytest.fixture(scope="session")
def several(tmp_path_factory):
    """Two seeds of one config, and another loss."""
    folder = tmp_path_factory.mktemp("several")
    runs = [write_run(folder / f"logistic_{seed}", seed=seed) for seed in (0, 1)]
    change(runs[1] / "summary.json", lambda row: {**row, "nll": row["nll"] + 0.1})
    return [*runs, write_run(folder / "hinge", loss={"name": "hinge", "beta": (0.1, 0.5)})]
