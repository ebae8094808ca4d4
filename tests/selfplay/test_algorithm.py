"""The whole loop, run as a user runs it: one command, again, interrupted, phase by phase."""

import json
import math
import os
import shutil
import subprocess
import sys
import types

import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest
from etils import epath
from runs import ROOT, SHARED, Command, assert_same_run, read_metrics, read_pairs, weights

from spin_jax import config, pairs
from spin_jax.data.records import Example
from spin_jax.forecast import sizes
from spin_jax.forecast.job import assumed_work
from spin_jax.models import cost
from spin_jax.plan.planned_run import planned_run
from spin_jax.report import tables
from spin_jax.selfplay import announce
from spin_jax.selfplay.algorithm import SelfPlay
from spin_jax.selfplay.opponent import Opponent
from spin_jax.selfplay.prepare import prepare
from spin_jax.training.packing import RowShape

STEP_KEYS = {
    "loss",
    "margin",
    "accuracy",
    "real_reward",
    "generated_reward",
    "real_logp",
    "generated_logp",
    "identical",
    "grad_norm",
    "learning_rate",
    "tokens_per_s",
}


@pytest.fixture(scope="session")
def command(tmp_path_factory):
    return Command()


@pytest.fixture(scope="session")
def finished(command, tmp_path_factory):
    """(workdir, output) of an uninterrupted smoke run."""
    workdir = tmp_path_factory.mktemp("run")
    return workdir, command(workdir)


def test_one_command_leaves_everything(finished):
    workdir, output = finished
    summary = json.loads((workdir / "summary.json").read_text())
    assert [row["iteration"] for row in summary] == [-1, 0, 1]
    for row in summary:
        assert {"nll", "greedy_accuracy", "sampled_accuracy"} <= row.keys()
        assert row["iteration"] < 0 or {"margin", "loss", "accuracy", "control"} <= row.keys()
    for heading in ("NLL", "greedy", "margin", "SFT control", "KL", "final model: iteration 1"):
        assert heading in output
    assert (workdir / "summary.png").read_bytes().startswith(b"\x89PNG")
    assert list((workdir / "tensorboard").iterdir())
    config = json.loads((workdir / "config.json").read_text())
    assert config["config"]["loss"]["beta"] == [10.0]
    assert "jax" in config["versions"]
    for t in (0, 1):
        lines = (workdir / f"iteration_{t}" / "samples.jsonl").read_text().splitlines()
        assert {"prompt", "real", "generated"} <= json.loads(lines[0]).keys()
        assert not (workdir / f"iteration_{t}" / "train").exists()  # pruned


def test_the_values_of_the_prompts_have_the_numbers_of_the_summary_as_their_mean(finished):
    """Of the start, the control and the final model; the sum of float32 log-probs is rounded, hence 1e-6."""
    models = tables.read_models(epath.Path(finished[0]), "spin", ["nll", "greedy_accuracy", "sampled_accuracy"])
    assert list(models) == ["start", "SFT control", "spin"]
    for model in models.values():
        for number, value in model.numbers.items():
            assert len(model.prompts[number]) == 20
            assert np.mean(list(model.prompts[number].values())) == pytest.approx(value, rel=1e-6)


def test_the_phases_are_timed_beside_what_plan_expects(finished):
    """The start is trained, each iteration is sampled, scored and trained; the control comes after the last one."""
    workdir, output = finished
    seconds = json.loads((workdir / "times.json").read_text())
    assert list(seconds) == ["-1", "0", "1"]
    assert seconds["-1"].keys() >= {"compile", "sft", "evaluation", "checkpoint", "export"}
    for t in ("0", "1"):
        assert seconds[t].keys() >= {"sample", "score", "train", "evaluation", "checkpoint", "export", "load"}
    assert "control" in seconds["1"]
    assert min(min(phases.values()) for phases in seconds.values()) >= 0
    rows = json.loads((workdir / "summary.json").read_text())
    for row in rows[1:]:  # the last one's has no control yet
        assert 0 < row["minutes"] <= sum(seconds[str(row["iteration"])].values()) / 60 + 0.001
    lines = [line.split() for line in output.splitlines()]
    assert ["time", "expected", "took"] in lines
    assert {"compile", "train", "evaluation", "all"} <= {line[0] for line in lines if len(line) == 5}


def test_fewer_iterations_are_compared_alone(finished, command, tmp_path):
    """A finished run that is asked for one iteration less knows the times of a third, and expects none of it."""
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    lines = [line.split() for line in command(workdir, "--config.selfplay.iterations=1").splitlines()]
    took = next(line for line in lines if line[:1] == ["sample"] and len(line) == 5)
    seconds = json.loads((workdir / "times.json").read_text())
    factor = {"s": 1, "ms": 1e-3}[took[4]]
    assert float(took[3]) * factor == pytest.approx(seconds["0"]["sample"], rel=0.01, abs=1e-3)


def test_pairs_by_which_times_are_expected_fit_the_rows_of_the_run():
    """Prompts of 4 tokens, answers of 3 and of 60: the long one does not fit with answers of 20 beside it."""
    ids = [np.zeros(size, np.int32) for size in (4, 3, 60)]
    examples = [Example(number, [], ids[0], ids[1 + number]) for number in (0, 1)]
    shape = RowShape(rows=1, length=32, groups=4)
    c = types.SimpleNamespace(train=types.SimpleNamespace(batch_size=1))
    run = types.SimpleNamespace(datasets=[examples], config=c, roles=("real", "generated"), pair_shape=shape)
    pairs = announce.typical_pairs(run, 20.4)
    assert [(len(pair.prompt), len(pair.real), len(pair.generated)) for pair in pairs] == [(4, 3, 20)]


def test_plan_knows_the_bytes_of_a_run(finished):
    """What plan says of tiny:smoke on this machine, and the files: each kind, and all but the charts, to a tenth."""
    workdir, _ = finished
    c = config.resolve(json.loads((workdir / "config.json").read_text())["config"])
    job, size = planned_run(c, "cpu:1", compiles=False).job, {}
    for path in (p for p in workdir.rglob("*") if p.is_file()):
        kind = next((kind for kind in ("checkpoint", "pairs", "scores", "model") if kind in path.parts), path.name)
        size[kind] = size.get(kind, 0) + path.stat().st_size
    expected = sizes.of_run(job, assumed_work(c, 200))
    made = 6 * 4 * cost.all_params(job.model.config)  # the start's checkpoint and export; the control's two and one
    assert expected["start"] + expected["control"] == pytest.approx(5 / 6 * made)
    assert size["checkpoint"] == pytest.approx(5 / 6 * made, rel=0.1)
    assert size["model"] == pytest.approx(4 / 6 * made, rel=0.1)
    assert sum(expected.values()) == pytest.approx(sum(size.values()) - size["summary.png"], rel=0.1)


def test_metrics_follow_the_contract(finished):
    workdir, _ = finished
    rows = read_metrics(workdir)
    assert {row["phase"] for row in rows} == {"sft", "sample", "score", "train", "eval", "control"}
    for t, steps in ((0, 3), (1, 6)):  # 180 pairs, then 360 with the ones mixed in, 64 a step
        train = [row for row in rows if row["phase"] == "train" and row["iteration"] == t]
        assert [row["step"] for row in train] == list(range(steps))
        assert all(row.keys() >= STEP_KEYS for row in train)
        assert train[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert train[-1]["margin"] > train[0]["margin"]
    assert [r["step"] for r in rows if r["phase"] == "sft"] == list(range(6))
    assert {r["iteration"] for r in rows if r["phase"] == "sft"} == {-1}


def test_pairs_are_the_published_format_and_ids_the_truth(finished):
    from datasets import load_dataset
    from transformers import AutoTokenizer

    workdir, _ = finished
    tokenizer = AutoTokenizer.from_pretrained(workdir / "start" / "model")
    pairs = load_dataset(str(workdir / "iteration_0" / "pairs"), cache_dir=str(workdir / "cache"))
    assert {name: len(rows) for name, rows in pairs.items()} == {"train": 180, "test": 20}
    ids = [*pairs["train"]["prompt_id"], *pairs["test"]["prompt_id"]]
    assert len(set(ids)) == 200
    for row in pairs["train"].select(range(20)):
        assert row["real"][:-1] == row["generated"][:-1]
        assert tokenizer.decode(row["generated_tokens"], skip_special_tokens=True) == row["generated"][-1]["content"]
        assert row["truncated"] == (row["generated_tokens"][-1] != tokenizer.eos_token_id)


def test_transformers_opens_every_model(finished):
    """And gives our log-probs: the held-out NLL of summary.json, recomputed by torch to 1e-4."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    workdir, _ = finished
    summary = json.loads((workdir / "summary.json").read_text())
    rows = pq.read_table(next((workdir / "iteration_0" / "pairs").glob("test*"))).to_pylist()
    for folder, row in (("start", summary[0]), ("iteration_0", summary[1]), ("iteration_1", summary[2])):
        model = AutoModelForCausalLM.from_pretrained(workdir / folder / "model")
        total = count = 0
        for pair in rows:
            ids = torch.tensor([pair["prompt_tokens"] + pair["real_tokens"]])
            with torch.no_grad():
                logps = torch.log_softmax(model(ids).logits[0].float(), -1)
            prompt = len(pair["prompt_tokens"])
            total -= sum(float(logps[i - 1, ids[0, i]]) for i in range(prompt, ids.shape[1]))
            count += len(pair["real_tokens"])
        assert row["nll"] == pytest.approx(total / count, abs=1e-4)


def test_running_again_changes_nothing(finished, command):
    workdir, _ = finished
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*.parquet")}
    metrics = (workdir / "metrics.jsonl").read_text()
    output = command(workdir)
    assert "iteration 1" in output
    assert "2 of them done" in output
    assert before == {p: p.stat().st_mtime_ns for p in workdir.rglob("*.parquet")}
    assert (workdir / "metrics.jsonl").read_text() == metrics


def test_another_config_is_refused_the_workdir(finished, command):
    workdir, _ = finished
    output = command(workdir, "--config.loss.beta=2", expect=2)
    assert "holds another run: there loss.beta is [10.0], and now [2]" in output


@pytest.mark.long
def test_phase_by_phase_equals_one_run(command, finished, tmp_path):
    """In a workdir given relatively (its checkpoints need absolute paths); out of order they say so."""
    whole, _ = finished
    relative = os.path.relpath(tmp_path / "run", ROOT)
    assert "run --only=sample first" in command(relative, "--only=score", expect=2)
    command(relative, "--only=sample")
    assert "run --only=score first" in command(relative, "--only=train", expect=2)
    for phase in ("score", "train", "sample", "score", "train"):
        command(relative, f"--only={phase}")
    assert_same_run(whole, tmp_path / "run")


@pytest.mark.parametrize(("decay", "averages"), [(0.0, [1, 3, 7]), (0.25, [1, 2.5, 5.875])])
def test_a_moving_average_by_hand(decay, averages):
    """0.25 · 1 + 0.75 · 3 = 2.5, and 0.25 · 2.5 + 0.75 · 7 = 5.875; all are exact in float32."""
    play = object.__new__(SelfPlay)
    play.run = types.SimpleNamespace(config=config.resolve({**RESOLVED, "selfplay": {"opponent_decay": decay}}))
    play.trained = lambda t: {"w": jnp.float32([1, 3, 7][t])}
    assert [float(play.weights(t)["w"]) for t in range(3)] == averages


RESOLVED = {"model": {"path": "-"}, "data": {"path": "-"}}


def test_enough_files_are_sampled_together_to_keep_all_slots_busy(mesh):
    """Four times the slots, however small the files; a round that lacks a file is repeated as a whole."""
    c = config.default()
    c.sampling.shard_size, c.sampling.batch_size, c.sampling.tensor = 8, 4, 1
    model = types.SimpleNamespace(mesh=mesh)
    opponent = Opponent(types.SimpleNamespace(config=c, model=model), None, None, None)
    shards = [(None, [])] * 5
    assert list(opponent._rounds(shards, [False] * 5)) == [(0, 1), (2, 3), (4,)]
    assert list(opponent._rounds(shards, [True, True, True, False, True])) == [(2, 3)]
    c.sampling.shard_size = 1024
    assert list(opponent._rounds(shards, [True, False, True, True, True])) == [(1,)]


def test_start_from_a_given_model_and_pairs(command, finished, tmp_path):
    """Iteration 1 from iteration 0's export and both iterations' pairs is iteration 1 of the whole run."""
    whole, _ = finished
    command(
        tmp_path,
        "--config.selfplay.start=1",
        f"--config.model.path={whole / 'iteration_0' / 'model'}",
        f"--config.selfplay.pairs=0={whole / 'iteration_0' / 'pairs'},1={whole / 'iteration_1' / 'pairs'}",
        "--config.sft.epochs=0",
        "--config.sft.control=False",
    )
    ours, theirs = (weights(x / "iteration_1" / "model") for x in (tmp_path, whole))
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name])
    assert [row["iteration"] for row in json.loads((tmp_path / "summary.json").read_text())] == [-1, 1]


def test_sampling_from_start_is_the_same_too(command, finished, tmp_path):
    """Without given pairs iteration 1 samples its own: the same, for keys know the iteration."""
    whole, _ = finished
    command(
        tmp_path,
        "--only=sample",
        "--config.selfplay.start=1",
        f"--config.model.path={whole / 'iteration_0' / 'model'}",
        "--config.sft.epochs=0",
    )
    assert read_pairs(tmp_path / "iteration_1" / "pairs") == read_pairs(whole / "iteration_1" / "pairs")


def test_published_pairs_replace_data_and_sampling(command, finished, tmp_path):
    """JSONL of real and generated alone: no data.path, nothing sampled; β and mixing reach the steps."""
    whole, _ = finished
    path = tmp_path / "pairs.jsonl"
    rows = read_pairs(whole / "iteration_0" / "pairs")
    rows = [row for row in rows if row["generated"][-1]["content"].strip()][:100]  # empty ones are dropped
    path.write_text("".join(json.dumps({k: row[k] for k in ("real", "generated")}) + "\n" for row in rows))
    config = tmp_path / "given.py"
    config.write_text(
        "from configs.tiny import get_config as tiny\n\n\ndef get_config():\n    c = tiny('smoke')\n"
        "    c.data = type(c.data)({**c.data, 'path': None})\n    return c\n"
    )
    workdir = tmp_path / "run"
    command(
        workdir,
        f"--config.selfplay.pairs={path},{path}",
        f"--config.model.path={whole / 'start' / 'model'}",
        "--config.sft.epochs=0",
        "--config.sft.control=False",
        "--config.loss.beta=(0.5,2.0)",
        "--config.train.learning_rate=(1e-4,1e-9)",
        config=str(config),
    )
    summary = json.loads((workdir / "summary.json").read_text())
    assert [row.get("pairs") for row in summary] == [None, 90, 180]  # 10 held out; 90 mixed in
    assert [row.get("beta") for row in summary] == [None, 0.5, 2.0]
    train = [row for row in read_metrics(workdir) if row["phase"] == "train"]
    assert max(row["learning_rate"] for row in train if row["iteration"] == 1) <= 1e-9
    assert not [row for row in read_metrics(workdir) if row["phase"] == "sample"]
    sources = {row["source_iteration"] for row in read_pairs(workdir / "iteration_1" / "scores")}
    assert sources == {0, 1}


def test_answers_by_vllm_come_back_as_our_own(command, finished, tmp_path):
    """The README's recipe with a stand-in for vLLM, which answers as our sampler did: the same weights."""
    whole, _ = finished
    run, prompts, given = tmp_path / "run", tmp_path / "prompts.jsonl", tmp_path / "pairs.jsonl"
    (tmp_path / "site").mkdir()
    shutil.copy(ROOT / "tests" / "helpers" / "vllm_stub.py", tmp_path / "site" / "vllm.py")
    known = read_pairs(whole / "iteration_0" / "pairs")
    answers = [[row["prompt_tokens"], row["generated_tokens"]] for row in known]
    (tmp_path / "answers.json").write_text(json.dumps(answers))

    command(run, "--config.selfplay.iterations=0", "--config.sft.control=False")  # makes the start
    start = run / "start" / "model"
    said = pairs.write_prompts(str(run), str(prompts))
    assert said == f"{prompts}: 200 prompts of iteration 0, to be answered by {start}"
    done = subprocess.run(
        [sys.executable, "-S", "launch/vllm_answers.py", f"--prompts={prompts}", f"--output={given}"],
        cwd=ROOT,
        env={"PYTHONPATH": str(tmp_path / "site"), "VLLM_STUB": str(tmp_path / "answers.json")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "200 pairs for iteration 0" in done.stdout, done.stderr
    one = ["--config.selfplay.iterations=1", "--config.sft.control=False"]
    command(run, *one, f"--config.selfplay.pairs=0={given}")

    assert read_pairs(run / "iteration_0" / "pairs") == known
    ours, theirs = (weights(x / "iteration_0" / "model") for x in (run, whole))
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name])
    assert "given pairs of iteration 0" in (run / "iteration_0" / "model" / "README.md").read_text()
    with pytest.raises(ValueError, match="iteration 0 has answers already"):
        pairs.write_prompts(str(run), str(prompts), 0)
    with pytest.raises(FileNotFoundError, match=r"iteration_1/model, which will answer in iteration 2, is not"):
        pairs.write_prompts(str(run), str(prompts), 2)
    said = pairs.write_prompts(str(run), str(prompts))
    assert said.endswith(f"200 prompts of iteration 1, to be answered by {run / 'iteration_0' / 'model'}")
    # Without them, or with others, it would be another run.
    c = config.resolve(json.loads((run / "config.json").read_text())["config"])
    c = c.changed({"selfplay.pairs": ""})
    with pytest.raises(ValueError, match=r"there fingerprints.given pairs 0 is '200 pairs, .*, and now None"):
        prepare(c, str(run))


def test_pairs_come_too_late_for_an_iteration_that_was_answered(finished):
    """For one that is to come they may be added."""
    workdir, _ = finished
    c = config.resolve(json.loads((workdir / "config.json").read_text())["config"])
    late = f"2={workdir / 'iteration_1' / 'pairs'}"
    c = c.changed({"selfplay.iterations": 3, "selfplay.pairs": late})
    assert len(prepare(c, str(workdir)).given[2]) == 200
    c = c.changed({"selfplay.pairs": f"1={workdir / 'iteration_0' / 'pairs'}"})
    with pytest.raises(ValueError, match=r"gives pairs for iteration 1, and .*/iteration_1/pairs holds answers"):
        prepare(c, str(workdir))


@pytest.mark.parametrize("axis", ["data", "context"])
def test_one_device_equals_eight(axis, command, finished, tmp_path):
    """The whole loop on 8 simulated devices (2 × 2 × 2): the same numbers, but for sums in other orders.

    The sampler's devices have whole answers, the same ones, also where those of training share rows.
    """
    whole, _ = finished
    command(tmp_path, f"--config.mesh.{axis}=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2", devices=8)
    answers = [[row["generated"] for row in read_pairs(run / "iteration_0" / "pairs")] for run in (whole, tmp_path)]
    assert answers[0] == answers[1]
    summaries = [json.loads((x / "summary.json").read_text()) for x in (whole, tmp_path)]
    for one, eight in zip(*summaries, strict=True):
        assert one["nll"] == pytest.approx(eight["nll"], rel=1e-3)
        if one["iteration"] == 0:
            assert one["margin"] == pytest.approx(eight["margin"], rel=2e-2, abs=1e-3)


def test_programs_are_compiled_once(command, tmp_path):
    """Two iterations, one program for each thing that is done, though lengths differ from step to step."""
    program = f"""
import spin_jax
from configs.tiny import get_config
from spin_jax.sampling import slots
from spin_jax.selfplay import fitting
from spin_jax.training import log_probs
steps = []
make = fitting.make_step
fitting.make_step = lambda *a: steps.append(make(*a)) or steps[-1]
spin_jax.run(get_config("smoke"), {str(tmp_path)!r})
print("compiled", [step._cache_size() for step in dict.fromkeys(steps)],
      log_probs.score_rows._cache_size(), slots.prefill._cache_size(), slots.decode._cache_size())
"""
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**command.environment(), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    # Scoring: pairs, and human answers for the NLL. Sampling: temperature 1, and greedy for evaluation.
    assert "compiled [1, 1] 2 2 2" in result.stdout, result.stdout + result.stderr


@pytest.fixture(scope="session")
def small_mistral(tmp_path_factory):
    """A small Mistral that transformers wrote, with the real tokenizer."""
    if not SHARED.exists():
        pytest.skip("GSM8K and the real Mistral tokenizer are not here")
    torch = pytest.importorskip("torch")
    from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=32000,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=64,
        max_position_embeddings=1024,
    )
    folder = tmp_path_factory.mktemp("mistral")
    MistralForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(SHARED / "mistral_tokenizer").save_pretrained(folder)
    return folder


@pytest.mark.long
@pytest.mark.parametrize("official", [False, True])
def test_real_prompts(command, small_mistral, tmp_path, official):
    """Two iterations on 64 GSM8K prompts with the real tokenizer, in bfloat16, from one command."""
    lines = (SHARED / "gsm8k" / "train.jsonl").read_text().splitlines()
    data = tmp_path / "train.jsonl"
    data.write_text("\n".join(sorted(lines, key=len)[:100]))  # the short ones: a test has two cores
    output = command(
        tmp_path / "run",
        f"--config.model.path={small_mistral}",
        f"--config.data.path={data}",
        f"--config.data.limit={24 if official else 64}",
        "--config.lengths.max_prompt=64",
        "--config.lengths.max_length=128",
        "--config.sampling.max_new_tokens=16",
        "--config.train.batch_size=16",
        f"--config.official={official}",
        config="configs/small_gsm8k.py",
        fast_compilation=False,  # a vocabulary of 32,000 is work to compute, too
    )
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [row["iteration"] for row in summary] == [-1, 0, 1], output
    pairs = read_pairs(tmp_path / "run" / "iteration_1" / "pairs")
    assert len({row["prompt_id"] for row in pairs}) == len(pairs) == (24 if official else 64)
    train = [row for row in read_metrics(tmp_path / "run") if row["phase"] == "train"]
    assert train[0]["loss"] == pytest.approx(math.log(2), abs=2e-2)  # bfloat16: logits of 8 bits
    assert all(row["generated_tokens"][-1] == 2 for row in pairs) or not official
    assert not (tmp_path / "run" / "start" / "model").exists()  # it was given, not made here
