"""The notebooks: each is what its source says, and runs from top to bottom, without a network."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time

import jupytext
import nbformat
import numpy as np
import pandas as pd
import pytest
from nbclient import NotebookClient
from runs import ROOT, Command

from spin_jax.data import parquet
from spin_jax.data.records import Pair
from spin_jax.storage import files

NOTEBOOKS = ROOT / "notebooks"
NAMES = ("inspect_a_run", "modify_the_loss", "spin_small_model")


def source_of(name):
    return jupytext.read(NOTEBOOKS / f"{name}.py")


def tagged(notebook, tag):
    """The number of the cell with a tag."""
    return next(i for i, cell in enumerate(notebook.cells) if tag in cell.metadata.get("tags", ()))


class Executed:
    """What the cells of a notebook have put out."""

    def __init__(self, name, folder, **parameters):
        """`parameters` are set after the cell that is tagged so, as papermill does."""
        notebook = source_of(name)
        given = "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
        notebook.cells.insert(tagged(notebook, "parameters") + 1, nbformat.v4.new_code_cell(given))
        environment = Command().environment() | {
            "HF_HUB_OFFLINE": "1",
            "IPYTHONDIR": str(folder / "ipython"),
            "PYTHONPATH": str(ROOT),
        }
        resources = {"metadata": {"path": str(folder)}}
        client = NotebookClient(notebook, timeout=900, kernel_name="python3", resources=resources)
        client.execute(env=environment)
        outputs = [out for cell in notebook.cells for out in cell.get("outputs", ())]
        self.text = "".join(out.text for out in outputs if out.output_type == "stream")
        shown = [out.data for out in outputs if "data" in out]
        self.figures = [data["image/png"] for data in shown if "image/png" in data]
        self.tables = [data["text/html"] for data in shown if "text/html" in data]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("notebooks")


@pytest.fixture(scope="module")
def small_model(folder):
    """The first notebook, on the tiny model; it leaves its run where the last one looks."""
    return Executed("spin_small_model", folder, WITHOUT_HUB="tiny:smoke", WORKDIR="runs/tiny")


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_there_is_no_other_notebook():
    assert {path.stem for path in NOTEBOOKS.iterdir() if path.suffix in (".py", ".ipynb")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_what_jupytext_makes_of_its_source(name):
    source, notebook = source_of(name), nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)

    def cells(of):
        return [(cell.cell_type, cell.source, cell.metadata.get("tags")) for cell in of.cells]

    command = f"python -m jupytext --to ipynb --update notebooks/{name}.py"
    assert cells(notebook) == cells(source), command
    assert notebook.metadata.kernelspec.name == "python3"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code), f"clear the outputs: {command}"


def test_the_set_up_cell_works_without_an_installation(tmp_path):
    """With its first command activated, it fetches the code, and finds both the package and configs/."""
    cells = {cell.source for name in NAMES for cell in source_of(name).cells if "github.com/OWNER" in cell.source}
    (cell,) = cells  # the same in each notebook
    (command,) = [line[3:] for line in cell.splitlines() if line.startswith("# !")]
    programs = {"git": f'ln -s {ROOT} "${{@: -1}}"', "pip": 'echo "$@" > pip.txt'}
    for name, body in programs.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": ""}
    subprocess.run(command, shell=True, cwd=tmp_path, env=environment, check=True, timeout=60)
    assert (tmp_path / "pip.txt").read_text().split() == ["install", "-q", "-e", "./spin_jax_code"]
    script = f"{cell}\nimport configs.tiny\nprint(spin_jax.__file__, configs.tiny.__file__, sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    code = tmp_path / "spin_jax_code"
    assert done.stdout.split() == [
        str(code / "spin_jax" / "__init__.py"),
        str(code / "configs" / "tiny.py"),
    ], done.stderr


def test_a_silent_hub_is_not_waited_for(tmp_path):
    notebook = source_of("spin_small_model")
    cell = tmp_path / "cell.py"
    settings = "MODEL, DATA, WITHOUT_HUB = 'some/model', 'some/data', 'tiny'"
    cell.write_text(f"{settings}\n{notebook.cells[tagged(notebook, 'network')].source}")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and never answers
        environment = {
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}",
            "HF_HUB_OFFLINE": "0",
        }
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, cell], env=environment, capture_output=True, text=True, timeout=60, check=True
        )
    assert "falls back to the tiny model" in done.stdout
    assert time.monotonic() - began < 20


def test_spin_small_model(small_model, folder):
    assert "falls back to the tiny model" in small_model.text
    assert "held-out pairs, against the opponent" in small_model.text
    assert [row["iteration"] for row in json.loads((folder / "runs/tiny/summary.json").read_text())] == [
        -1,
        0,
        1,
    ]
    assert len(small_model.figures) == 1
    (answers,) = small_model.tables
    for row in read_rows(folder / "runs/tiny/iteration_1/samples.jsonl"):
        assert f">{row['prompt'][0]['content']}</td>" in answers


def test_modify_the_loss(folder):
    executed = Executed("modify_the_loss", folder, TINY="smoke")
    assert len(executed.figures) == 2
    runs = folder / "runs/modify_the_loss"
    begun, done = [], []
    for name in ("logistic", "smoothed"):
        begun.append(next(row for row in read_rows(runs / name / "metrics.jsonl") if row["phase"] == "train"))
        done.append(json.loads((runs / name / "summary.json").read_text())[-1])
    logistic, smoothed = begun
    assert logistic["real_logp"] == smoothed["real_logp"]  # the same start
    assert logistic["generated_logp"] == smoothed["generated_logp"]  # and the same opponent's answers
    assert logistic["loss"] == pytest.approx(smoothed["loss"])  # ln 2, both
    logistic, smoothed = done
    assert logistic["margin"] > smoothed["margin"] + 0.01
    (table,) = executed.tables
    assert "smoothed" in table
    assert "'broken_losses:averaged': of 8 rows it returns an array []" in executed.text
    assert "'broken_losses:square_root': its gradient is" in executed.text
    assert not (runs / "broken").exists()  # told before anything was made


def test_inspect_a_run(small_model, folder):
    executed = Executed("inspect_a_run", folder, TINY="smoke", WORKDIR="absent")
    assert "There is no run in absent" in executed.text
    assert "iteration 1: 180 pairs, 0% the same answer twice" in executed.text
    assert len(executed.figures) == 4
    assert len(executed.tables) == 5
    sums = read_rows(folder / "runs/tiny/iteration_0/samples.jsonl")
    assert f">{sums[0]['prompt'][0]['content']}</td>" in executed.tables[3]


def cell(name, text):
    """The source of the notebook's cell that has this text."""
    return next(cell.source for cell in source_of(name).cells if text in cell.source)


def test_the_pairs_of_any_pairing_have_their_answers(tmp_path):
    """Of two prompts with three answers each: the human one is chosen, rejected, or neither."""

    def message(text):
        return [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}]

    def answered(prompt, n):
        ids = [np.zeros(size, np.int32) for size in (1, 9, n + 1)]
        return Pair(prompt, n, message(f"human {prompt}"), message(f"own {prompt} {n}"), *ids, truncated=n == 2)

    rows = {(5, -1, 2): -1.0, (5, 0, 1): -2.0, (6, 1, -1): -3.0}  # (prompt, chosen, rejected): log p of the chosen one
    chosen = [dataclasses.replace(answered(p, n), sample_id=m, chosen_id=n) for p, n, m in rows]
    logps = np.array([[logp, -9] for logp in rows.values()])
    content = {"pairs/train-0": parquet.pairs_to_parquet([answered(p, n) for p in (5, 6) for n in range(3)])}
    content["scores/iteration_0-train-0"] = parquet.scores_to_parquet(0, chosen, logps)
    for name, data in content.items():
        files.write_here(tmp_path / "iteration_0" / f"{name}.parquet", data)
    found = {"pd": pd, "RUN": tmp_path, "ITERATIONS": [0], "FIRST": "chosen", "SECOND": "rejected"}
    exec(cell("inspect_a_run", "def scored("), found)
    table = found["pairs"][0]
    assert table.chosen.tolist() == ["human 5", "own 5 0", "own 6 1"]
    assert table.rejected.tolist() == ["own 5 2", "own 5 1", "human 6"]
    assert table.chosen_tokens.tolist() == [9, 1, 2]
    assert table.rejected_tokens.tolist() == [3, 2, 9]
    assert table.truncated.tolist() == [True, False, False]
    assert table.real_logp.tolist() == [-1, -2, -3]


@pytest.mark.parametrize(
    ("rows", "metrics", "message"),
    [
        ([{"iteration": -1}], {"phase": "sft"}, "No iteration of .* is finished yet"),
        ([{"iteration": 0}], {"generated_logp": -3.0}, "loss sppo has one answer, and this notebook compares two"),
    ],
)
def test_runs_that_the_notebook_cannot_show(rows, metrics, message, tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps(rows))
    (tmp_path / "metrics.jsonl").write_text(json.dumps(metrics))
    (tmp_path / "config.json").write_text(json.dumps({"config": {"loss": {"name": "sppo"}}}))
    with pytest.raises(ValueError, match=message):
        exec(cell("inspect_a_run", "ITERATIONS = "), {"RUN": tmp_path})


@pytest.mark.long
def test_spin_small_model_without_a_hub(folder):
    """SmolLM2 from the package, on sums because GSM8K is not here either."""
    found = Executed("spin_small_model", folder, ROWS=40, WORKDIR="runs/package")
    if "cannot be downloaded" in found.text:
        pytest.skip(found.text)
    assert "smollm2-135m-instruct on spin_jax.tiny:problems" in found.text
    assert "held-out pairs, against the opponent" in found.text
