"""What W&B gets beside the numbers. tests/end_to_end/test_durable.py has the rest of metrics.py."""

import json
import sys
import tracemalloc

from spin_jax.storage import files, metrics

COLUMNS = ["iteration", "prompt", "human answer", "answer"]


class Table:
    """It has the parameters of wandb.Table, which is not installed for the tests."""

    def __init__(self, columns, data):
        self.columns, self.data = columns, data


class WandbRun:
    """The part of a W&B run that is used: steps that it has are not logged again."""

    def __init__(self):
        self.step, self.logged = 0, {}

    def log(self, values, step):
        assert step >= self.step
        self.logged[step], self.step = values, step + 1

    def finish(self):
        pass


def write_samples(folder, answer):
    question = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1\u2028"}]
    rows = [{"prompt_id": 7, "prompt": question, "real": "2", "generated": answer}]
    files.write_jsonl(folder / "samples.jsonl", rows)


def test_wandb_gets_the_samples_beside_the_numbers(tmp_path, monkeypatch):
    """Each table has the iterations so far; a row that did not reach W&B before a kill comes with its own."""
    run, stub = WandbRun(), type(sys)("wandb")
    stub.init, stub.Table = lambda **options: run, Table  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "wandb", stub)
    first = metrics.Metrics(tmp_path, wandb_project="p")
    first.write("eval", -1, 0, {"nll": 1.0})  # no samples: eval.fixed_prompts=0
    assert "eval/samples" not in run.logged[0]
    write_samples(tmp_path / "start", "3")
    first.write("train", 0, 0, {"loss": 0.5})
    write_samples(tmp_path / "iteration_0", "2")
    first.write("eval", 0, 1, {"nll": 0.5})
    write_samples(tmp_path / "iteration_1", "two")
    first.write("eval", 1, 1, {"nll": 0.25})
    expected = [[-1, "system: Add.\nuser: 1+1\u2028", "2", "3"], [0, "system: Add.\nuser: 1+1\u2028", "2", "2"]]
    assert "eval/samples" not in run.logged[1]
    table = run.logged[2]["eval/samples"]
    assert (table.columns, table.data) == (COLUMNS, expected)
    assert run.logged[2]["eval/nll"] == 0.5
    assert [line[0] for line in run.logged[3]["eval/samples"].data] == [-1, 0, 1]
    run.step = 2  # the last two rows did not reach it
    del run.logged[2], run.logged[3]
    metrics.Metrics(tmp_path, wandb_project="p").close()
    assert run.logged[2]["eval/samples"].data == expected
    assert [line[0] for line in run.logged[3]["eval/samples"].data] == [-1, 0, 1]


def test_a_long_run_is_not_in_memory(tmp_path):
    """Of 40,000 rows, 300 bytes each as a dict or more, memory holds 2 MB at most."""
    row = {name: 0.125 for name in ("loss", "margin", "accuracy", "real_reward", "generated_reward")}
    lines = [json.dumps({"phase": "train", "iteration": t, "step": n, **row}) for t in range(2) for n in range(20_000)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join([*lines, lines[-1][:30]]))  # a kill has cut the last line
    tracemalloc.start()
    opened = metrics.Metrics(tmp_path)
    opened.rewind("train", 1, lambda step: step >= 10_000)
    opened.write("train", 1, 10_000, {"loss": 7.0, "skipped": 1})
    assert opened.count("train", 1, lambda row: row.get("skipped")) == 1
    opened.close()
    assert tracemalloc.get_traced_memory()[1] < 2e6
    tracemalloc.stop()
    last = json.dumps({"phase": "train", "iteration": 1, "step": 10_000, "loss": 7.0, "skipped": 1})
    assert path.read_text().splitlines() == [*lines[:30_000], last]
