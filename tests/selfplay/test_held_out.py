"""What is measured after each iteration, and what follows from it: the best model, and an early stop."""

import contextlib
import io
import itertools
import json
import pathlib
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from runs import ROOT, weights
from torch_reference import torch_score

import spin_jax
from spin_jax import config, errors
from spin_jax.evaluate import measures
from spin_jax.evaluate.best import DIRECTIONS, best_row, direction
from spin_jax.report import charts, drawing, numbers, page
from spin_jax.selfplay import held_out
from spin_jax.tiny import problems


def tiny(**sections):
    """`configs/tiny.py:smoke` on 60 sums; what is given is laid over it.

    Its second iteration learns nothing: it is its opponent again.
    """
    namespace: dict = {}
    exec(compile((ROOT / "configs" / "tiny.py").read_text(), "tiny.py", "exec"), namespace)
    c = namespace["get_config"]("smoke")
    c.data.limit, c.sft.control, c.selfplay.iterations = 60, False, 3
    c.sft.batch_size = 4
    c.logging.plot = c.logging.tensorboard = False
    c.train.batch_size, c.train.warmup_ratio = 16, 0.0
    c.train.learning_rate, c.eval.samples = (1e-3, 1e-30, 1e-3), 2
    for name, values in sections.items():
        c[name].update(values)
    return c


def without_times(summary):
    return [{k: v for k, v in row.items() if k != "minutes"} for row in summary]


def unmarked(row):
    return {k: v for k, v in row.items() if k not in ("final", "stopped")}


def assert_same_model(one, other):
    one, other = weights(one), weights(other)
    for name in other:
        np.testing.assert_array_equal(one[name], other[name])


def copied(workdir, tmp_path, iterations):
    """A copy of a run as if it had come no further."""
    copy = pathlib.Path(shutil.copytree(workdir, tmp_path / "run"))
    rows = [unmarked(row) for row in read_summary(copy) if row["iteration"] < iterations]
    (copy / "summary.json").write_text(json.dumps(rows))
    for folder in copy.glob("iteration_*"):
        if int(folder.name.partition("_")[2]) >= iterations:
            shutil.rmtree(folder)
    return copy


def read_summary(workdir):
    return json.loads((workdir / "summary.json").read_text())


pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(workdir, summary, {iteration: own held-out answers}, held-out examples) of three iterations."""
    workdir, answers, examples = tmp_path_factory.mktemp("evaluation") / "run", [], []
    sample = held_out.Evaluation.sample

    def recorded(evaluation, params):
        answers.append(sample(evaluation, params))
        examples[:] = evaluation._run.held_out
        return answers[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(held_out.Evaluation, "sample", recorded)
        summary = spin_jax.run(tiny(), str(workdir))
    return workdir, summary, dict(zip((-1, 0, 1, 2), answers, strict=True)), examples


# --- numbers -------------------------------------------------------------------------------------


def test_held_out_pairs_have_the_numbers_of_the_summary_after_a_change_of_beta(finished, tmp_path):
    """A run that is interrupted between held_out.parquet and its row continues with another β."""
    workdir, summary, _, _ = finished
    copy = pathlib.Path(shutil.copytree(workdir, tmp_path / "run"))
    (copy / "summary.json").write_text(json.dumps([unmarked(row) for row in summary if row["iteration"] < 2]))
    c = tiny(loss={"beta": (3 * summary[-1]["beta"],)})
    c.resume_anyway = True
    row = spin_jax.run(c, str(copy))[-1]
    pairs = pq.read_table(copy / "iteration_2" / "held_out.parquet").to_pandas()
    for name in ("loss", "margin", "real_reward"):
        assert pairs[name].mean() == pytest.approx(row[name], rel=1e-5)
    assert row["margin"] == pytest.approx(3 * summary[-1]["margin"], rel=1e-4)  # by the weights of before


def torch_scores(folder, examples, answers):
    """log p of each answer; they are to all examples in turn, more than once."""
    model = pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(folder / "model")
    prompts = (example.prompt for example in itertools.cycle(examples))
    return np.array([torch_score(model, *item) for item in zip(prompts, answers, strict=False)])


@pytest.mark.parametrize(("t", "folder"), [(-1, "start"), (0, "iteration_0")])
def test_held_out_prompts_have_what_the_summary_sums_up(finished, t, folder):
    """log p of each human answer is transformers', within 1e-3 nats: both compute in float32."""
    workdir, summary, _, examples = finished
    row = next(row for row in summary if row["iteration"] == t)
    prompts = pq.read_table(workdir / folder / "held_out_prompts.parquet").to_pandas()
    assert prompts["prompt_id"].tolist() == [example.prompt_id for example in examples]
    assert prompts["real_tokens"].tolist() == [len(example.real) for example in examples]
    expected = torch_scores(workdir / folder, examples, [example.real for example in examples])
    np.testing.assert_allclose(prompts["real_logp"], expected, atol=1e-3)
    assert -prompts["real_logp"].sum() / prompts["real_tokens"].sum() == pytest.approx(row["nll"], rel=1e-6)
    for name in ("greedy_accuracy", "sampled_accuracy"):
        assert prompts[name].mean() == pytest.approx(row[name], rel=1e-12)


def test_kl_is_that_of_the_models_own_answers_by_transformers(finished):
    workdir, summary, drawn, examples = finished
    for t, opponent in ((0, "start"), (2, "iteration_1")):
        answers = drawn[t]
        assert len(answers) == 2 * len(examples) == 12
        own, other, start = (
            torch_scores(workdir / folder, examples, answers) for folder in (f"iteration_{t}", opponent, "start")
        )
        assert summary[1 + t]["kl_opponent"] == pytest.approx((own - other).mean(), abs=1e-3)
        assert summary[1 + t]["kl_start"] == pytest.approx((own - start).mean(), abs=1e-3)
        assert abs(summary[1 + t]["kl_start"]) > 1e-2
    assert summary[1]["kl_opponent"] == summary[1]["kl_start"]
    assert summary[3]["kl_opponent"] != summary[3]["kl_start"]


def test_a_model_that_has_not_moved_is_at_no_distance(finished):
    _, summary, drawn, _ = finished
    assert summary[2]["kl_opponent"] == 0
    assert summary[2]["kl_start"] == summary[1]["kl_start"]
    assert all(map(np.array_equal, drawn[0], drawn[1]))


def test_kl_is_unbiased_and_less_noisy_than_the_estimator_it_is_not():
    """Of answers of 40 tokens, each of a Bernoulli law: against the sum over all tokens."""
    rng = np.random.default_rng(0)
    p, q = np.full(40, 0.3), np.linspace(0.05, 0.6, 40)
    exact = np.sum(p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))
    ones = rng.random((4000, 40)) < p
    own, other = (np.where(ones, np.log(x), np.log(1 - x)).sum(1).astype(np.float32) for x in (p, q))
    assert measures.kl(own, other) == pytest.approx(exact, abs=float((own - other).std()) / 10)
    k3 = np.exp(other - own) - 1 - (other - own)
    assert (own - other).std() < k3.std()


def test_responses_are_described(finished):
    _, summary, drawn, examples = finished
    for row in summary:
        answers = drawn[row["iteration"]]
        assert row["response_tokens"] == pytest.approx(np.mean([len(answer) for answer in answers]))
        same = [np.array_equal(examples[i % len(examples)].real, a) for i, a in enumerate(answers)]
        assert row["response_identical"] == pytest.approx(np.mean(same))
        assert row["response_truncated"] == pytest.approx(np.mean([answer[-1] != 2 for answer in answers]))
    assert "kl_start" not in summary[0]


def test_summary_and_eval_rows_agree(finished):
    workdir, summary, *_ = finished
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    evaluated = {row["iteration"]: row for row in lines if row["phase"] == "eval"}
    for row in summary:
        assert row.items() - {("final", True)} <= evaluated[row["iteration"]].items()


def test_kl_can_be_left_out_and_weights_do_not_change(finished, tmp_path):
    """Without it the trained parameters go on to the next iteration, and are not read again."""
    whole, summary, *_ = finished
    copy = copied(whole, tmp_path, 0)
    again = spin_jax.run(tiny(eval={"kl": False}, selfplay={"iterations": 2}), str(copy))
    for row, other in zip(without_times(summary[:3]), without_times(again), strict=True):
        assert {k: v for k, v in row.items() if not k.startswith("kl_")} == unmarked(other)
    for t in range(2):
        assert_same_model(copy / f"iteration_{t}" / "model", whole / f"iteration_{t}" / "model")


# --- interrupted ---------------------------------------------------------------------------------


def stopping(after):
    """A `should_stop` that says SIGINT once it has been asked so often."""
    asked = itertools.count()
    return lambda: 2 * (next(asked) >= after)


def test_evaluation_is_stopped_anywhere_and_comes_to_the_same(finished, tmp_path):
    """Before its first batch, before its second, …: until it goes through."""
    whole, summary, *_ = finished
    copy = pathlib.Path(shutil.copytree(whole, tmp_path / "run"))
    (copy / "summary.json").write_text(json.dumps([unmarked(row) for row in summary[:3]]))
    stops = 0
    for after in itertools.count(0, 3):
        try:
            spin_jax.run(tiny(), str(copy), should_stop=stopping(after))
            break
        except errors.Interrupted:
            stops += 1
    assert stops >= 3  # among pairs, NLL, sampling, greedy, samples.jsonl, three models' log-probs
    assert without_times(read_summary(copy)) == without_times(summary)


# --- the best of them, and no more ---------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(finished, tmp_path_factory):
    """(config, workdir, what was said) of a run that ends after iteration 1, which was no better than 0."""
    c = tiny(checkpoint={"best": "nll"}, selfplay={"patience": 1}, sft={"control": True})
    workdir, said = copied(finished[0], tmp_path_factory.mktemp("stopped"), 2), io.StringIO()
    with contextlib.redirect_stdout(said):
        spin_jax.run(c, str(workdir))
    return c, workdir, said.getvalue()


def test_a_run_stops_when_the_best_is_past(stopped, finished):
    _, workdir, said = stopped
    summary = read_summary(workdir)
    assert [row["iteration"] for row in summary] == [-1, 0, 1]
    assert summary[1]["nll"] < summary[0]["nll"]
    why = f"nll has not improved on iteration 0's {summary[1]['nll']:.4g} since (selfplay.patience=1)"
    assert summary[2]["stopped"] == why
    assert f"stopped after iteration 1: {why}" in said
    assert [row.get("final") for row in summary] == [None, True, None]
    assert f"final model: iteration 0, in {workdir / 'best'}" in said
    assert {"nll", "response_tokens"} <= summary[2]["control"].keys()
    assert_same_model(workdir / "best", finished[0] / "iteration_0" / "model")


@pytest.mark.parametrize("only", [None, "sample", "train"])
def test_a_run_that_has_stopped_stays_so_and_says_why(stopped, only, capfd):
    c, workdir, _ = stopped
    before = read_summary(workdir)
    assert spin_jax.run(c, str(workdir), only=only) == before == read_summary(workdir)
    assert "stopped after iteration 1: nll has not improved" in capfd.readouterr().out
    assert not (workdir / "iteration_2").exists()


def test_more_patience_goes_on(stopped, finished, tmp_path):
    """To where a run that never stopped comes; the control keeps step."""
    c, workdir, _ = stopped
    copy = pathlib.Path(shutil.copytree(workdir, tmp_path / "run"))
    c = config.resolve(c).changed({"selfplay.patience": 2})
    summary = spin_jax.run(c, str(copy))
    final = next(row for row in summary if row.get("final"))
    assert final["nll"] == min(row["nll"] for row in summary[1:])
    controls = [row.pop("control", None) for row in summary]
    assert [control is not None for control in controls] == [False, True, True, True]
    rows, whole = (list(map(unmarked, without_times(x))) for x in (summary, finished[1]))
    assert rows == whole
    models = [weights(copy / "control" / "model"), weights(workdir / "control" / "model")]
    assert any(not np.array_equal(a, b) for a, b in zip(*map(dict.values, models), strict=True))


def test_the_start_sets_the_mark_but_is_not_exported(finished, tmp_path):
    """An iteration that is worse than the start is no progress, and still the best that was made."""
    copy = copied(finished[0], tmp_path, 1)
    rows = [{**row, "nll": nll} for row, nll in zip(read_summary(copy), (0.1, 0.2), strict=True)]
    (copy / "summary.json").write_text(json.dumps(rows))
    c = tiny(checkpoint={"best": "nll"}, selfplay={"patience": 1})
    summary = spin_jax.run(c, str(copy))
    assert [row["iteration"] for row in summary] == [-1, 0]
    assert "nll has not improved on the start's 0.1 since" in summary[1]["stopped"]
    assert summary[1]["final"]


def test_best_knows_directions_ties_and_what_is_no_number():
    rows = [{"iteration": t, "nll": x, "t/acc": y} for t, x, y in ((0, 0.3, 0.1), (1, 0.2, 0.5), (2, 0.2, 0.5))]
    rows += [{"iteration": 3, "nll": float("nan"), "t/acc": None}, {"iteration": 4}]
    assert best_row(rows, "nll", direction("nll", ()))["iteration"] == 1
    assert best_row(rows, "t/acc", 1)["iteration"] == 1
    assert best_row(rows, "t/acc", -1)["iteration"] == 0
    assert best_row(rows, "margin", 1) is None
    with pytest.raises(ValueError, match=r"checkpoint\.best='kl_start': choose from nll, loss, .*identical$"):
        direction("kl_start", ())
    with pytest.raises(ValueError, match=r"or a number of gsm8k, arc: task/metric$"):
        direction("acc", ["gsm8k", "arc"])
    final_model = (ROOT / "configs" / "README.md").read_text().partition("## The final model")[2].partition("##")[0]
    assert all(f"`{name}`" in final_model for name in DIRECTIONS)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"selfplay": {"patience": 2}}, "selfplay.patience=2 needs checkpoint.best"),
        ({"selfplay": {"patience": 0}, "checkpoint": {"best": "nll"}}, "selfplay.patience=0: at least 1"),
        ({"eval": {"include_path": "x"}}, "eval.include_path='x' is of no use without eval.tasks"),
        ({"eval": {"tasks": "a,,b"}}, "eval.tasks='a,,b': task names, separated by commas"),
        ({"eval": {"tasks": "a", "tasks_limit": 0}}, "eval.tasks_limit=0: at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(sections, message):
    with pytest.raises(errors.ConfigError, match="^" + message.replace(".", r"\.")):
        config.resolve(tiny(**sections))


# --- tasks ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def task_files(tmp_path_factory):
    """A directory of two tasks of lm-evaluation-harness: sums, and half as many."""
    pytest.importorskip("spin_jax.evaluate.harness", exc_type=ImportError)
    folder = tmp_path_factory.mktemp("tasks")
    for name, count in (("sums", 8), ("few_sums", 4)):
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in problems(count, seed=1)))
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            "output_type": "loglikelihood",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{answer}}",
            "target_delimiter": "=",
            "metric_list": [
                {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
                {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            ],
        }
        (folder / f"{name}.yaml").write_text(json.dumps(task))  # which YAML holds
    return str(folder)


def test_the_best_by_a_task_is_the_final_model(task_files, tmp_path, capfd):
    """A task after each iteration; the last iteration is ruined, and the one before it is exported."""
    c = tiny(
        selfplay={"iterations": 2},
        train={"learning_rate": (1e-3, 1.0)},
        eval={"tasks": "sums", "include_path": task_files},
        checkpoint={"best": "sums/perplexity"},
    )
    summary = spin_jax.run(c, str(tmp_path))
    values = [row["sums/perplexity"] for row in summary]
    assert values[1] < values[2]
    assert [row.get("final") for row in summary] == [None, True, None]
    assert_same_model(tmp_path / "best", tmp_path / "iteration_0" / "model")
    said = capfd.readouterr().out
    assert f"final model: iteration 0, in {tmp_path / 'best'}" in said
    assert "  sums/perplexity " in said
    assert all(0 <= row["sums/acc"] <= 1 for row in summary)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["sums/perplexity"] for row in lines if row["phase"] == "eval"] == values


def test_a_task_that_is_done_is_not_run_again(task_files, finished, tmp_path, monkeypatch):
    """An interruption costs one task; another limit asks again."""
    from spin_jax.evaluate import harness

    asked = []

    def run_tasks(model, tasks, *, include_path, limit, seed, should_stop):
        asked.append((tasks, limit))
        if len(asked) == 2:
            raise errors.Interrupted(2)
        return {f"{tasks[0]}/acc": 0.5}

    monkeypatch.setattr(harness, "run_tasks", run_tasks)
    copy = copied(finished[0], tmp_path, 1)
    (copy / "summary.json").write_text(json.dumps(read_summary(copy)[:1]))
    options = {"tasks": "sums, few_sums", "include_path": task_files, "tasks_limit": 2}
    c = tiny(eval=options, selfplay={"iterations": 1})
    with pytest.raises(errors.Interrupted):
        spin_jax.run(c, str(copy))
    row = spin_jax.run(c, str(copy))[1]
    assert asked == [(["sums"], 2), (["few_sums"], 2), (["few_sums"], 2)]
    assert row["sums/acc"] == row["few_sums/acc"] == 0.5
    (copy / "summary.json").write_text(json.dumps(read_summary(copy)[:1]))
    spin_jax.run(tiny(eval=options | {"tasks_limit": 3}, selfplay={"iterations": 1}), str(copy))
    assert asked[3:] == [(["sums"], 3), (["few_sums"], 3)]


@pytest.mark.parametrize(
    ("tasks", "best", "message"),
    [
        ("sums", "sums/f1", r"checkpoint\.best='sums/f1': the tasks have sums/perplexity, sums/acc"),
        ("sums", "bleu", r"checkpoint\.best='bleu': choose from nll, .* or a number of sums: task/metric"),
        (None, "sums/acc", r"checkpoint\.best='sums/acc': choose from nll, "),
    ],
)
def test_tasks_and_their_numbers_are_checked_before_anything_is_compiled(task_files, tmp_path, tasks, best, message):
    options = {"tasks": tasks, "include_path": task_files} if tasks else {}
    with pytest.raises(ValueError, match=message):
        spin_jax.run(tiny(eval=options, checkpoint={"best": best}), str(tmp_path / "run"))
    with pytest.raises(ValueError, match="include_path='nowhere': no such directory"):
        spin_jax.run(tiny(eval={"tasks": "sums", "include_path": "nowhere"}), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_task_says_what_is_better(task_files):
    assert direction("sums/perplexity", ["sums"], task_files) == -1
    assert direction("sums/acc", ["few_sums", "sums"], task_files) == 1
    assert direction("sums/acc/some-filter", ["sums"], task_files) == 1


# --- the table -----------------------------------------------------------------------------------


def full_rows(iterations):
    keys = [key for wanted in numbers.SECTIONS.values() for key, *_ in wanted]
    values = {key: 9999 if key in ("pairs", "steps", "skipped") else -123.45678 for key in keys}
    values["leaderboard_musr_murder_mysteries/exact_match,strict-match"] = 0.123456789
    control = {"nll": 0.5, "greedy_accuracy": 1.0}
    return [{"iteration": -1, "nll": 0.1}] + [{"iteration": t, **values, "control": control} for t in range(iterations)]


@pytest.mark.parametrize("iterations", [0, 1, 4, 30])
def test_the_table_is_not_wide_and_holds_everything(iterations):
    rows = full_rows(iterations)
    text = numbers.summary_table(rows)
    assert max(map(len, text.splitlines())) <= 110
    for t in range(iterations):
        assert text.count(f" {t} ") + text.count(f" {t}\n") >= 1
    if iterations:
        assert text.count("-123.46") + text.count("-123.45") == iterations * 13
        assert "leaderboard_musr_murder_mysteries/exact_match,strict-match" in text
    assert ("SFT control" in text) == bool(iterations)


def test_a_standard_error_stands_beside_its_number():
    """Where no answer is right the estimate is 0, which says nothing."""
    row = {"iteration": -1, "nll": 0.1, "nll_stderr": 0.02, "greedy_accuracy": 0.0, "greedy_accuracy_stderr": 0.0}
    text = numbers.summary_table([row | {"sampled_accuracy": 0.5, "sampled_accuracy_stderr": None}])
    assert "0.1000 ± 0.02" in text
    assert text.count("±") == 1


def test_the_table_leaves_out_what_nobody_has():
    rows = [{"iteration": -1, "nll": 0.25}, {"iteration": 0, "nll": 0.125, "skipped": 0, "final": True}]
    assert numbers.summary_table(rows).splitlines() == [
        "iteration                            start     0 *",
        "──────────────────────────────────  ──────  ──────",
        "held-out answers",
        "  NLL of the human's, nats a token  0.2500  0.1250",
        "",
        "* the final model",
    ]
    assert drawing.png_grid(charts.over_iterations(rows)).startswith(b"\x89PNG")


def test_a_report_of_a_real_run(stopped, tmp_path):
    """The files that a run leaves are those that the report reads."""
    _, folder, _ = stopped
    page.write([str(folder)], str(tmp_path / "page.html"))
    text = (tmp_path / "page.html").read_text()
    assert "Stopped early: nll has not improved" in text
    for title in ("Right answers", "Training loss", "Lengths, pairs of iteration 1", "SFT loss"):
        assert f"<b>{title}</b>" in text
    assert text.count("<article") == len((folder / "iteration_0" / "samples.jsonl").read_text().splitlines())
