"""tests/gpu/check.py, for machines with a GPU: its dry run here, and what it makes of steps that fail."""

import contextlib
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import ROOT

CHECK = ROOT / "tests" / "gpu" / "check.py"


def read(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


# --- the dry run -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """find(step, **values) → the rows of a shortened dry run's step that have these values."""
    folder = tmp_path_factory.mktemp("check")
    environment = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    command = [sys.executable, CHECK, "--dry", "--short", f"--out={folder}"]
    # From another folder: nothing has to be installed, and it matters not where one stands.
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = read(folder)
    assert [json.loads(line) for line in done.stdout.splitlines()] == found

    def find(step, **values):
        return [row for row in found if row["step"] == step and values.items() <= row.items()]

    return find


def test_every_step_ends_well(rows):
    steps = ("environment", "attention", "train_7b", "decode", "correct")
    assert [rows(step, exit=0) != [] for step in steps] == [True] * 5
    (end,) = rows("end")
    assert (end["failed_steps"], end["failed"], end["skipped"]) == (0, [], [])


def test_environment(rows):
    import jax

    about, device, *ceilings = rows("environment")
    assert about["versions"]["jax"] == jax.__version__
    assert about["card"] is None or "NVIDIA" in about["card"]
    assert device["platform"] == "cpu"
    assert all(row["tflops"] > 0 for row in ceilings if row.get("what", "").startswith("matmul"))
    assert rows("environment", what="copy, read and written")[0]["tb_s"] > 0


@pytest.mark.parametrize("kernel", ["flash", "cudnn packed"])
def test_attention(rows, kernel):
    """bfloat16 rounds by 0.2%, once for the output and a few times on the way to the gradients."""
    (right,) = rows("attention", what="right?", kernel=kernel)
    assert right["right"]
    assert len(right["off"]) == 4
    assert all(1e-4 < off < 0.01 for off in right["off"])  # 0 would be the reference, compared with itself
    (fast,) = rows("attention", what="fast?", kernel=kernel)
    assert fast["both_ms"] > fast["forward_ms"] > 0
    assert fast["both_tflops"] > 0


def test_attention_is_compared_and_tuned(rows):
    from spin_jax.kernels import flash

    (reference,) = rows("attention", what="right?", kernel="plain", dtype="float32")
    assert reference["off"] < 1e-6  # against float64
    (chosen,) = rows("attention", what="kernel chosen")
    assert chosen["kernel"] == min(chosen["both_ms"], key=chosen["both_ms"].get)
    assert set(chosen["both_ms"]) == {"flash", "cudnn packed"}
    assert rows("attention", kernel="mosaic causal, no segments")[0]["needs"] == "a GPU"
    own, other = rows("attention", what="blocks")
    sizes = [own["flash_forward"], own["flash_dq"], own["flash_dkv"]]
    assert sizes == [list(blocks) for blocks in flash.blocks_for(64, "bfloat16")]
    assert sizes == rows("attention", what="best blocks")[0]["now"]
    assert other["flash_dq"] != own["flash_dq"]
    assert other["both_ms"] > 0


def test_training(rows):
    (row,) = rows("train_7b", what="train")
    assert (row["kernel"], row["remat"], row["mfu"], row["reached"]) == ("flash", "full", None, False)
    assert all(map(math.isfinite, row["losses"]))
    assert 0 < row["real_tokens_per_s"] <= row["computed_tokens_per_s"]
    tokens, computed = row["real_tokens_per_s"], row["computed_tokens_per_s"]
    assert row["padding"] == pytest.approx(1 - tokens / computed, abs=1e-3)  # rows have four digits
    assert row["tflops"] > 0


def test_decoding(rows):
    (row,) = rows("decode", what="decode")
    assert row["tokens_per_s"] == pytest.approx(1e3 * row["slots"] / row["step_ms"], rel=1e-2)
    assert row["context"] < row["columns"]
    (trace,) = rows("decode", what="decode trace")
    assert trace["span_ms"] > 0
    assert trace["top"][0][1] >= trace["top"][-1][1] > 0
    (cache,) = rows("decode", what="a layer's cache", kernel="flash_decode")
    assert 1e-4 < cache["off"] < 0.01
    assert rows("decode", what="prefill")[0]["tokens_per_s"] > 0
    assert rows("decode", what="draw")[0]["ms"] > 0


def test_equalities(rows):
    (scores,) = rows("correct", what="scores")
    assert 0 < scores["nats_a_token"] < 0.01
    (first,) = rows("correct", what="ln 2")
    assert abs(first["losses"][0] - math.log(2)) < 2e-3
    assert first["losses"][0] > first["losses"][-1]
    (answers,) = rows("correct", what="answers")
    assert (answers["same"], answers["tokens"]) == (1, 120)


# --- steps that fail -------------------------------------------------------------------------------


@pytest.fixture
def check():
    """The module."""
    spec = importlib.util.spec_from_file_location("gpu_check", CHECK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def step(check, tmp_path, monkeypatch):
    """make(name, body, **fields) → a step that runs this body."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def make(name, body, **fields):
        lines = "\n".join(f"    {line}" for line in body.splitlines())
        (tmp_path / f"{name}_module.py").write_text(f"import os\n\ndef run(dry, short, **options):\n{lines}\n")
        return check.Step(name, f"{name}_module", **fields)

    return make


FOUND = """print('{"found": 1}', flush=True)"""


def test_a_step_that_fails_costs_itself_alone(check, step, tmp_path):
    """Its rows are kept, and what it said; killed by the system or by an exception."""
    steps = [
        step("raises", f"{FOUND}\nraise RuntimeError('out of paper')"),
        step("dies", f"{FOUND}\nos.abort()"),
        step("works", f"print('chatter', 3)\n{FOUND}"),
    ]
    assert check.run_steps(steps, tmp_path / "out", budget=100) == ["raises", "dies"]
    rows = read(tmp_path / "out")
    assert [row["step"] for row in rows if row.get("found")] == ["raises", "dies", "works"]
    raises, dies, works = [row for row in rows if "exit" in row]
    assert raises["exit"] == 1
    assert raises["stderr"].endswith("RuntimeError: out of paper\n")
    assert dies["exit"] == -signal.SIGABRT
    assert (works["exit"], "stderr" in works) == (0, False)
    assert (rows[-1]["step"], rows[-1]["failed_steps"]) == ("end", 2)


def test_a_step_that_takes_too_long_is_killed(check, step, tmp_path):
    """With the processes that it has started; what runs beside it goes on."""
    beside = step("quick", FOUND)
    slow = """
import subprocess, time
print('{"started": %d}' % subprocess.Popen(["sleep", "600"]).pid, flush=True)
time.sleep(600)"""
    steps = [step("slow", slow, most=3, beside=(beside,)), step("next", FOUND)]
    began = time.monotonic()
    assert check.run_steps(steps, tmp_path / "out", budget=100) == ["slow"]
    assert time.monotonic() - began < 60
    rows = {row["step"]: row for row in read(tmp_path / "out") if "exit" in row}
    assert rows["slow"]["exit"] == "late"
    assert (rows["quick"]["exit"], rows["next"]["exit"]) == (0, 0)
    (started,) = [row["started"] for row in read(tmp_path / "out") if "started" in row]
    assert ended(started)


def ended(pid):
    """Whether a process has ended, or does within ten seconds."""
    for _ in range(100):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                time.sleep(0.1)
                continue
        return True
    return False


def test_rows_that_say_that_something_is_wrong(check, step, tmp_path):
    """An error and a wrong number fail a step; what only a GPU can do does not."""
    tells = "from measuring import Missing, attempt, tell\n"
    steps = [
        step("error", f"{tells}attempt(lambda: 1 / 0, what='a'); attempt(lambda: {{'b': 2.00001}}, what='c')"),
        step("wrong", f"{tells}tell(off=1.0, right=False)"),
        step("needs", f"{tells}def cannot():\n    raise Missing('a GPU')\nattempt(cannot, what='a')"),
    ]
    assert check.run_steps(steps, tmp_path / "out", budget=100, dry=True) == ["error", "wrong"]
    error, after, _, _, _, needs, *_ = read(tmp_path / "out")
    assert error["error"].startswith("ZeroDivisionError: division by zero (error_module.py:")
    assert (after["what"], after["b"]) == ("c", 2.0)
    assert needs["needs"] == "a GPU"


def test_a_step_for_which_no_time_is_left(check, step, tmp_path):
    assert check.run_steps([step("long", FOUND, least=30)], tmp_path / "out", budget=20) == []
    row, end = read(tmp_path / "out")
    assert "20 s are left" in row["skipped"]
    assert end["skipped"] == ["long"]


def test_interrupted_it_leaves_nothing_running(step, tmp_path):
    step("sleeps", """import time\nprint('{"pid": %d}' % os.getpid(), flush=True)\ntime.sleep(600)""")
    code = (
        f"import sys; sys.path.insert(0, {str(CHECK.parent)!r}); import check; "
        f"check.STEPS = (check.Step('sleeps', 'sleeps_module'),); check.main(['--out={tmp_path}/out'])"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        pid = json.loads(process.stdout.readline())["pid"]
        process.terminate()
        assert process.wait(timeout=30) == 143
    assert ended(pid)


def test_bad_arguments():
    done = subprocess.run(
        [sys.executable, CHECK, "--only=attention,sleep"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "no step sleep: choose from environment, attention, train_7b" in done.stderr
