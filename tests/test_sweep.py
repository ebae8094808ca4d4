"""One command runs several variants and seeds, and prints a table of their results."""

import json
import subprocess
import sys
import time

import pytest
from runs import ROOT, Command

from spin_jax import sweep

ROWS = [
    {"iteration": -1, "nll": 1.0, "greedy_accuracy": 0.5},
    {"iteration": 0, "nll": 0.5, "greedy_accuracy": 0.75, "final": True, "control": {"nll": 0.7}},
    {"iteration": 1, "nll": 0.6, "greedy_accuracy": 0.7, "control": {"nll": 0.625}},
]


def test_outcome():
    """The final model's, which need not be the last; the control's after all steps."""
    found = sweep.outcome(ROWS, "spin", ["nll", "greedy_accuracy", "sampled_accuracy"])
    assert found == {
        "start": {"nll": 1.0, "greedy_accuracy": 0.5},
        "SFT control": {"nll": 0.625},
        "spin": {"nll": 0.5, "greedy_accuracy": 0.75},
    }
    assert sweep.outcome(ROWS[:1], "sft", ["nll"]) == {"start": {"nll": 1.0}, "sft": {"nll": 1.0}}


def test_table():
    runs = [
        ("a", 0, {"start": {"nll": 1.0}, "a": {"nll": 0.5, "x": 3.0}}),
        ("b", 0, {"start": {"nll": 1.0}, "b": {"nll": 0.25}}),
        ("a", 1, {"start": {"nll": 2.0}, "a": {"nll": 0.75, "x": 3.0}}),
    ]
    assert sweep.table(runs, ["nll", "x"]).splitlines() == [
        "| | nll | x |",
        "|---|---|---|",
        "| start | 1.5 (1, 2) |  |",
        "| a | 0.625 (0.5, 0.75) | 3 (3, 3) |",
        "| b | 0.25 |  |",
    ]


def swept(workdir, *arguments, expect):
    command = [
        sys.executable,
        "-m",
        "spin_jax.sweep",
        *arguments,
        *([f"--workdir={workdir}"] if workdir else []),
    ]
    done = subprocess.run(command, cwd=ROOT, env=Command().environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == expect, done.stdout + done.stderr
    return done


def test_the_command(tmp_path):
    """Started again, it finds all done; a variant that cannot run ends it with that run's exit code."""
    config = "--config=configs/algorithms.py"
    flags = ["--seeds=0", "--config.selfplay.iterations=0"]
    said = swept(tmp_path, config, "--variants=spin/tiny:smoke,spinn", *flags, expect=2)
    assert "1 of 2: spin/tiny:smoke, seed 0" in said.stdout
    assert "spinn, seed 0, ended with 2" in said.stderr
    before = (tmp_path / "spin/tiny:smoke" / "seed_0" / "start" / "model" / "SHA256SUMS").stat().st_mtime_ns
    said = swept(tmp_path, config, "--variants=spin/tiny:smoke", *flags, expect=0)
    assert (tmp_path / "spin/tiny:smoke" / "seed_0" / "start" / "model" / "SHA256SUMS").stat().st_mtime_ns == before
    text = (tmp_path / "table.md").read_text()
    assert text.strip() in said.stdout
    assert [line.split(" | ")[0] for line in text.splitlines()[2:]] == ["| start", "| spin/tiny:smoke"]
    (record,) = json.loads((tmp_path / "table.json").read_text())
    assert (record["variant"], record["seed"]) == ("spin/tiny:smoke", 0)
    assert record["numbers"]["spin/tiny:smoke"]["nll"] == record["numbers"]["start"]["nll"] > 0


def test_sigterm_is_passed_on(tmp_path):
    """The run saves and ends, and the sweep with it, with its exit code."""
    command = [sys.executable, "-m", "spin_jax.sweep", "--config=configs/algorithms.py"]
    flags = ["--variants=spin/tiny:smoke", "--config.sft.epochs=500", f"--workdir={tmp_path}"]
    flags.append("--config.sft.schedule_epochs=500")
    process = subprocess.Popen(
        [*command, *flags], cwd=ROOT, env=Command().environment(), stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "spin" / "tiny:smoke" / "seed_0" / "metrics.jsonl"
    began = time.monotonic()
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() - began < 120:
        time.sleep(0.1)
    process.terminate()
    _, said = process.communicate(timeout=120)
    assert process.returncode == 143, said
    assert "spin/tiny:smoke, seed 0, ended with 143; the same command continues" in said
    assert list((tmp_path / "spin" / "tiny:smoke" / "seed_0" / "start" / "train").iterdir())  # it has saved


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variants=a"], "--config, --variants and --workdir are needed"),
        (
            ["--config=configs/tiny.py", "--variants=smoke", "--seeds=x"],
            "--seeds=x: whole numbers are wanted",
        ),
        (
            ["--config=configs/tiny.py", "--variants=smoke", "--config.loss.betta=1"],
            "did you mean loss.beta",
        ),
        (["--config=configs/algorithms.py", "--varaints=a"], "did you mean --variants"),
    ],
)
def test_flags(arguments, message, tmp_path):
    assert message in swept(tmp_path, *arguments, expect=2).stderr


# Starts no run, and prints what would be started; in a process of its own, as modules define the same flags.
PRINT_RUN = "from spin_jax import sweep; sweep.run = lambda *run: print(*run) or 7; sweep.main()"


def test_config_flags_are_passed_on(tmp_path):
    """Each run gets them as they were typed: with `=` or a space, and switches with neither."""
    keys = [
        "--config.loss.beta",
        "0.5",
        "-config.sft.epochs=2",
        "--config.official",
        "--noconfig.logging.plot",
    ]
    file = "configs/tiny.py"
    others = ["--config", file, "--variants=smoke", f"--workdir={tmp_path}"]
    command = [sys.executable, "-c", PRINT_RUN, *keys, *others]
    done = subprocess.run(command, cwd=ROOT, env=Command().environment(), capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == f"{file} smoke 0 {tmp_path / 'smoke' / 'seed_0'} {keys}", done.stderr
