"""One command runs several variants and seeds, and prints a table of their results."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from runs import ROOT, Command

from spin_jax.data import parquet
from spin_jax.report import tables
from spin_jax.storage import files

ROWS = [
    {"iteration": -1, "nll": 1.0, "greedy_accuracy": 0.5},
    {"iteration": 0, "nll": 0.5, "greedy_accuracy": 0.75, "final": True, "control": {"nll": 0.7}},
    {"iteration": 1, "nll": 0.6, "greedy_accuracy": 0.7, "control": {"nll": 0.625}},
]


def write_prompts(folder, ids, logps, tokens, right):
    columns = {"real_logp": np.float32(logps), "real_tokens": np.array(tokens), "greedy_accuracy": np.array(right)}
    files.write_here(folder / "held_out_prompts.parquet", parquet.prompts_to_parquet(ids, columns))


def test_models_of_a_run(tmp_path):
    """The final model need not be the last one; the control is the one after all steps. Files may be absent."""
    (tmp_path / "summary.json").write_text(json.dumps(ROWS))
    write_prompts(tmp_path / "iteration_0", [3, 9], [-1.0, -2.0], [2, 4], [0.5, 1.0])
    write_prompts(tmp_path / "control" / "iteration_1", [3, 9], [-1.0, -4.0], [2, 6], [0.0, 1.0])
    found = tables.read_models(tmp_path, "spin", ["nll", "greedy_accuracy", "sampled_accuracy"])
    assert {name: model.numbers for name, model in found.items()} == {
        "start": {"nll": 1.0, "greedy_accuracy": 0.5},
        "SFT control": {"nll": 0.625},
        "spin": {"nll": 0.5, "greedy_accuracy": 0.75},
    }
    assert found["start"].prompts == {}
    assert found["spin"].prompts == {"nll": {3: 0.5, 9: 0.5}, "greedy_accuracy": {3: 0.5, 9: 1.0}}
    # NLL 5/8. The first prompt has 1 − 5/8 · 2 nats less than its share, for 4 tokens on average.
    assert found["SFT control"].prompts["nll"] == {3: 0.625 - 0.0625, 9: 0.625 + 0.0625}
    (tmp_path / "summary.json").write_text(json.dumps(ROWS[:1]))
    assert list(tables.read_models(tmp_path, "sft", ["nll"])) == ["start", "sft"]


def model(prompts=None, **numbers):
    return tables.Model(numbers, prompts or {})


def test_means():
    runs = [
        (0, {"start": model(nll=1.0), "a": model(nll=0.5, x=3.0)}),
        (0, {"start": model(nll=1.0), "b": model(nll=0.25)}),
        (1, {"start": model(nll=2.0), "a": model(nll=0.75, x=3.0)}),
    ]
    assert tables.means(tables.by_model(runs), ["nll", "x"]).splitlines() == [
        "|  | nll | x |",
        "|---|---|---|",
        "| start | 1.5 (1, 2) |  |",
        "| a | 0.625 (0.5, 0.75) | 3 (3, 3) |",
        "| b | 0.25 |  |",
    ]


def test_differences_are_taken_seed_by_seed():
    """a − b: 0.5, 0.75 and 1, so 0.75 ± 0.25/√3, although both differ far more between seeds. c has one seed."""
    runs = [
        (0, {"a": model(nll=1.5, x=1.0), "b": model(nll=1.0)}),
        (1, {"a": model(nll=10.75), "b": model(nll=10.0)}),
        (2, {"a": model(nll=101.0), "b": model(nll=100.0), "c": model(nll=99.0)}),
        (3, {"a": model(nll=7.0)}),
    ]
    results = tables.by_model(runs)
    assert tables.differences(results, ["nll", "x"], "b").splitlines() == [
        "| minus b | nll | x |",
        "|---|---|---|",
        "| a | +0.75 ± 0.14 |  |",
        "| c | -1 |  |",
    ]
    assert tables.differences(results, ["x"], "b") == ""
    assert tables.differences(results, ["nll"], "d") == ""


def test_the_error_over_prompts():
    """Differences 1, 2 and 6 of one seed: 3 ± √(7/3). The same prompts in two seeds: their means, 1, 3 and 8."""
    theirs = {1: 0.5, 2: 0.5, 3: -1.0}
    ours = {1: 1.5, 2: 2.5, 3: 5.0}
    assert tables.error_over_prompts([(ours, theirs)]) == pytest.approx(math.sqrt(7 / 3))
    second = {1: 1.5, 2: 4.5, 3: 9.0}
    assert tables.error_over_prompts([(ours, theirs), (second, theirs)]) == pytest.approx(math.sqrt(13 / 3))
    # Other prompts in the other seed are independent: squares of the errors are added, here with 6/5 for 3/2.
    others = ({10 * p: x for p, x in ours.items()}, {10 * p: x for p, x in theirs.items()})
    both = tables.error_over_prompts([(ours, theirs), others])
    assert both == pytest.approx(math.sqrt(2 * 7 / 3) / 2 * math.sqrt((6 / 5) / (3 / 2)))
    assert tables.error_over_prompts([(ours, {1: 0.5})]) is None
    assert tables.error_over_prompts([({}, {})]) is None
    runs = [(0, {"a": model({"nll": ours}, nll=3.0), "b": model({"nll": theirs}, nll=0.0)})]
    assert "| a | +3 [± 1.5] |" in tables.differences(tables.by_model(runs), ["nll"], "b")


def test_the_error_of_a_difference_of_nlls_is_that_of_a_ratio():
    """Against the jackknife over 300 prompts, within 2%: both are right to first order in 1/300."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 200, 300)
    logps = [-tokens * rng.uniform(0.5, 1.5, 300), -tokens * rng.uniform(0.5, 1.4, 300)]
    columns = [{"prompt_id": np.arange(300), "real_logp": x, "real_tokens": tokens} for x in logps]
    values = [tables.prompt_values(column)["nll"] for column in columns]
    assert np.mean(list(values[0].values())) == pytest.approx(-logps[0].sum() / tokens.sum())
    gains = logps[1] - logps[0]
    without = (gains.sum() - gains) / (tokens.sum() - tokens)
    jackknife = np.sqrt(299 / 300 * ((without - without.mean()) ** 2).sum())
    assert tables.error_over_prompts([(values[0], values[1])]) == pytest.approx(jackknife, rel=0.02)


# --- processes -----------------------------------------------------------------------------------


# What stands in for spin_jax.main: it takes its behaviour from the seed and from the variant.
STAND_IN = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[2].partition("=")[2])
variant, seed = folder.parent.name, sys.argv[3][-1]
print(variant, seed, os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("SLURM_JOB_ID"), flush=True)
(folder / "summary.json").write_text('[{"iteration": -1, "nll": %s.5}]' % seed)
while variant == "meets" and len(list(folder.parent.glob("*/summary.json"))) < 2:
    time.sleep(0.01)
if variant == "waits":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: (folder / "saved").touch() or sys.exit(9))
    (folder / "ready").touch()
    time.sleep(100)
sys.exit(3 if variant == "fails" else 0)
"""
SWEEP = "import sys; from spin_jax import sweep; sweep.Processes.program = [{!r}]; sys.exit(sweep.main())"


def start_stand_ins(tmp_path, *arguments):
    (tmp_path / "main.py").write_text(STAND_IN)
    (tmp_path / "config.py").write_text("from spin_jax import config\ndef get_config(v): return config.default()\n")
    flags = [f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'runs'}", *arguments]
    environment = Command().environment() | {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_JOB_ID": "1"}
    environment.pop("JAX_PLATFORMS", None)
    command = [sys.executable, "-c", SWEEP.format(str(tmp_path / "main.py")), *flags]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=-1, stderr=-1, text=True, start_new_session=True)


def send(number, process):
    """Ctrl-C as a terminal sends it, to the runs as well; SIGTERM as a scheduler sends it, to the sweep alone."""
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)


def test_runs_go_on_side_by_side_and_one_that_fails_stops_no_other(tmp_path):
    """`meets` ends only when both seeds have begun. The exit code is that of the run which failed."""
    process = start_stand_ins(tmp_path, "--variants=fails,meets", "--seeds=0,1", "--parallel=3", "--baseline=start")
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 3, said + errors
    logs = [(tmp_path / "runs" / "meets" / f"seed_{seed}" / "log.txt").read_text().split() for seed in (0, 1)]
    assert [log[:2] + log[3:] for log in logs] == [["meets", "0", "None"], ["meets", "1", "None"]]
    assert logs[0][2] != logs[1][2]
    assert {log[2] for log in logs} < {"0", "1", "2"}
    for seed in (0, 1):
        log = tmp_path / "runs" / "fails" / f"seed_{seed}" / "log.txt"
        assert f"error: fails, seed {seed}, ended with 3; the same command continues ({log})" in errors
    assert "2 of 4: meets, seed 0, begins and writes to" in said
    assert "2 of 4: meets, seed 0, is done after 0.0 min" in said
    text = (tmp_path / "runs" / "table.md").read_text()
    assert "| meets |  |  | 1 (0.5, 1.5) |" in text
    assert "The tables are without fails, seed 0; fails, seed 1." in text
    assert "| meets |  |  | +0 ± 0 |" in text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_reaches_all_runs(number, tmp_path):
    """They save; no further run begins."""
    process = start_stand_ins(tmp_path, "--variants=waits", "--seeds=0,1,2", "--parallel=2")
    folders = [tmp_path / "runs" / "waits" / f"seed_{seed}" for seed in (0, 1, 2)]
    began = time.monotonic()
    while not all((folder / "ready").exists() for folder in folders[:2]) and time.monotonic() - began < 60:
        time.sleep(0.02)
    send(number, process)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, said + errors
    assert [(folder / "saved").exists() for folder in folders] == [True, True, False]
    assert "seed 1, ended with 9; the same" in errors
    assert "seed 2" not in said + errors


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
    """A variant that cannot run stops no other. Started again, the sweep finds the other done, and goes on."""
    config, smoke = "--config=configs/algorithms.py", tmp_path / "spin" / "tiny:smoke"
    flags = ["--config.selfplay.iterations=0"]
    said = swept(tmp_path, config, "--variants=spin/small_gsm8k,spin/tiny:smoke", "--parallel=2", *flags, expect=2)
    log = tmp_path / "spin" / "small_gsm8k" / "seed_0" / "log.txt"
    assert f"1 of 2: spin/small_gsm8k, seed 0, begins and writes to {log}" in said.stdout
    assert f"spin/small_gsm8k, seed 0, ended with 2 ({log})" in said.stderr
    assert "error: model.path is not set" in log.read_text()
    model = smoke / "seed_0" / "start" / "model" / "SHA256SUMS"
    before = model.stat().st_mtime_ns
    said = swept(tmp_path, config, "--variants=spin/tiny:smoke", "--seeds=0,1", *flags, expect=0)
    assert model.stat().st_mtime_ns == before
    text = (tmp_path / "table.md").read_text()
    assert text.strip() in said.stdout
    assert [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| ")] == [
        *("| ", "| start", "| spin/tiny:smoke"),
        *("| minus spin/tiny:smoke", "| start"),
    ]
    assert "+0 ± 0 [± 0]" in text.splitlines()[-1]  # there is no iteration, and the final model is the start
    records = json.loads((tmp_path / "table.json").read_text())
    assert [(record["variant"], record["seed"]) for record in records] == [("spin/tiny:smoke", s) for s in (0, 1)]
    for record in records:
        assert record["numbers"]["spin/tiny:smoke"]["nll"] == record["numbers"]["start"]["nll"] > 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_stopped_run_saves(number, tmp_path):
    """The sweep ends with its exit code."""
    command = [sys.executable, "-m", "spin_jax.sweep", "--config=configs/algorithms.py"]
    flags = ["--variants=spin/tiny:smoke", "--config.sft.epochs=500", f"--workdir={tmp_path}"]
    flags.append("--config.sft.schedule_epochs=500")
    environment = Command().environment()
    process = subprocess.Popen(
        [*command, *flags], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    metrics = tmp_path / "spin" / "tiny:smoke" / "seed_0" / "metrics.jsonl"
    began = time.monotonic()
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() - began < 120:
        time.sleep(0.1)
    send(number, process)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 128 + number, said
    assert f"spin/tiny:smoke, seed 0, ended with {128 + number}; the same command continues" in said
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
        (["--config=configs/algorithms.py", "--variants=spin,spinn"], "and not 'spinn'"),
        (
            ["--config=configs/tiny.py", "--variants=smoke", "--baseline=smok"],
            "--baseline=smok: choose one of smoke, start, SFT control",
        ),
        (["--config=configs/tiny.py", "--variants=smoke", "--parallel=0"], "--parallel=0"),
        (["--config=configs/tiny.py", "--variants=smoke", "--config.seed=3"], "give their seeds as --seeds=0,1,2"),
        (["--config=configs/tiny.py", "--variants=smoke", "--config.seed", "3"], "give their seeds as --seeds=0,1,2"),
    ],
)
def test_flags(arguments, message, tmp_path):
    assert message in swept(tmp_path, *arguments, expect=2).stderr


# Starts no run, and prints what would be started; in a process of its own, as modules define the same flags.
PRINT_RUN = """
from spin_jax import sweep
sweep.Processes.program = ["-c", "import sys; print(sys.argv); sys.exit(7)"]
sweep.main()
"""


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
    run = ["-c", f"--config={file}:smoke", f"--workdir={tmp_path / 'smoke' / 'seed_0'}", "--config.seed=0"]
    assert done.stdout.splitlines()[-1] == str([*run, *keys]), done.stderr
