"""Killed in the midst of things, and asked to stop: the same command goes on to the same result, to the bit.

SPIN_JAX_KILLS=50 makes the long form of it: so many kills, all over the run, with each signal.
"""

import os
import random
import shutil
import signal

import judges
import numpy as np
import pyarrow.parquet as pq
import pytest
import reward_models
from kill_harness import FLAGS, Phase, Run, phase, problems, reference, table, torture
from runs import ROOT, Command, differences, read_metrics, read_pairs

from spin_jax.evaluate.reward_model import RewardModel

LONG = int(os.environ.get("SPIN_JAX_KILLS", "0"))
# The short form is of a shorter run, and has 4 kills.
SHORT = () if LONG else ("--config.data.limit=40", "--config.selfplay.iterations=1")
FEW = ("sft", "sample", "train", "exporting")
EACH = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
SIGNALS = [[one] for one in EACH] if LONG else [EACH]


@pytest.fixture(scope="module")
def make_run(tmp_path_factory):
    """make_run(name, *flags) → a `Run` in a new workdir; programs are compiled once for all tests of the command."""
    command = Command()
    folder, runs = tmp_path_factory.mktemp("killed"), []

    def make(name, *flags):
        runs.append(Run(folder / name, command, (*FLAGS, *SHORT, *flags)))
        return runs[-1]

    with pytest.MonkeyPatch.context() as patch:  # the judges of tests/helpers are importable
        patch.setenv("PYTHONPATH", str(ROOT / "tests" / "helpers"), prepend=os.pathsep)
        yield make
    for run in runs:
        run.stop()


@pytest.fixture(scope="module")
def whole(make_run):
    """(workdir, timeline) of an undisturbed run."""
    run = make_run("reference")
    return run.workdir, reference(run)


@pytest.mark.parametrize("signals", SIGNALS)
def test_a_run_that_is_stopped_anywhere_comes_to_the_same(signals, make_run, whole):
    workdir, timeline = whole
    wanted = LONG or 4
    kills, runs = torture(
        lambda count: make_run(f"{signals[0].name}_{count}"),
        timeline,
        wanted,
        signals,
        random.Random(0),
        () if LONG else FEW,
        tries=3 if LONG else 0,
    )
    text = "\n".join(["", *map(str, kills), table(kills, timeline)])
    print(text)
    assert len(kills) >= wanted, text
    wrong = problems(kills, runs, workdir)
    assert not wrong, "\n".join([text, *wrong])


RIGHT_WRONG = (
    "--config.data.limit=40",
    "--config.selfplay.iterations=1",
    "--config.selfplay.samples=3",
    "--config.selfplay.pairing=right/wrong",
    "--config.eval.verifier=judges:even",
    "--config.eval.kl=False",
    "--config.sft.control=False",
)


def test_right_and_wrong_answers_are_paired_alike_after_kills(make_run, tmp_path):
    """A verifier and a reward model in one run: the best right answer to each prompt against the worst wrong one."""
    reward_models.write(tmp_path / "reward_model", "llama")
    flags = (*RIGHT_WRONG, f"--config.selfplay.scorer={tmp_path / 'reward_model'}")
    whole = make_run("right_wrong", *flags)
    timeline = reference(whole)
    kills, runs = torture(
        lambda count: make_run(f"right_wrong_{count}", *flags),
        timeline,
        3,
        [signal.SIGKILL],
        random.Random(0),
        ("sample", "score", "train"),
        tries=0,
    )
    assert len(kills) == 3
    assert not problems(kills, runs, whole.workdir)

    folder = whole.workdir / "iteration_0"
    model, expected, held_out = RewardModel(str(tmp_path / "reward_model")), {}, set()
    for path in sorted((folder / "pairs").glob("*.parquet")):
        answers, table_rows = {}, pq.read_table(path).to_pylist()
        scores = model.scores([model.tokens(row["generated"]) for row in table_rows])
        np.testing.assert_allclose([row["score"] for row in table_rows], scores, atol=1e-5)
        for row in table_rows:
            assert row["right"] == judges.even("", row["generated"][-1]["content"])
            answers.setdefault(row["prompt_id"], []).append((row["score"], row["right"], row["sample_id"]))
        for prompt_id, rows in answers.items():
            assert [sample_id for *_, sample_id in rows] == [0, 1, 2]  # all answers are kept
            if path.name.startswith("test"):
                held_out |= {(prompt_id, sample_id, -1) for *_, sample_id in rows}
            elif 0 < sum(right for _, right, _ in rows) < 3:
                _, chosen = max((score, -sample_id) for score, right, sample_id in rows if right)
                _, rejected = min((score, sample_id) for score, right, sample_id in rows if not right)
                expected[prompt_id] = (prompt_id, rejected, -chosen)
    scores = read_pairs(folder / "scores")
    found = [(row["prompt_id"], row["sample_id"], row.get("chosen_id", -1)) for row in scores]
    assert len(found) == len(set(found))
    assert set(found) == {*expected.values(), *held_out}
    assert 4 <= len(expected) < 36
    rows = [row for row in read_metrics(whole.workdir) if row["phase"] == "score"]
    assert sum(row.get("prompts", 0) for row in rows) == 36
    assert sum(row.get("without_pair", 0) for row in rows) == 36 - len(expected)
    assert f"makes {len(expected)} pairs of the answers to 36 prompts; no pair of" in whole.logs[0].read_text()


def test_differences_see_a_flipped_bit_a_row_too_many_and_a_missing_file(whole, tmp_path):
    workdir, _ = whole
    copy = tmp_path / "copy"
    shutil.copytree(workdir, copy)
    assert not differences(workdir, copy)
    weights = copy / "iteration_0" / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    metrics = copy / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + metrics.read_text().splitlines()[0] + "\n")
    (copy / "iteration_0" / "samples.jsonl").unlink()
    found = "\n".join(differences(workdir, copy))
    assert "model.safetensors differs" in found
    assert "twice" in found
    assert "samples.jsonl is only in" in found


def test_phases_are_told_from_the_files(whole, tmp_path):
    workdir, timeline = whole
    kinds = {now.kind for now in timeline}
    assert kinds >= {"starting", "sft", "sample", "score", "train", "control", "evaluating", "reporting"}
    copy = tmp_path / "copy"
    assert phase(copy) == Phase("starting")
    shutil.copytree(workdir, copy)
    assert phase(copy) == Phase("finished")
    (copy / "summary.png").unlink()
    assert phase(copy) == Phase("reporting")
    (copy / "summary.json").unlink()
    assert phase(copy) == Phase("evaluating", "start")
    (copy / "start" / "model" / "SHA256SUMS").unlink()
    (copy / "start" / "model" / "config.json").unlink()
    assert phase(copy) == Phase("exporting", "start")
    (copy / "start" / "checkpoint" / "commit_success.txt").unlink()
    for sums in copy.rglob("SHA256SUMS"):
        sums.unlink()
    assert phase(copy) == Phase("checkpointing", "start")
