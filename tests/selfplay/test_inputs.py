"""Which rows are held out."""

import json
import runpy

import pytest
from runs import ROOT

from spin_jax import config, tiny
from spin_jax.selfplay.prepare import prepare


@pytest.fixture
def tiny_config():
    return runpy.run_path(str(ROOT / "configs" / "tiny.py"))["get_config"]("smoke")


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prompts(examples):
    return {example.messages[0]["content"] for example in examples}


def test_held_out_rows_of_their_own(tiny_config, tmp_path):
    """eval.path gives them; their prompts are in no training data, and ids are unique."""
    rows = tiny.problems()
    tiny_config.data.path = write_rows(tmp_path / "train.jsonl", rows[:40])
    tiny_config.eval.path = write_rows(tmp_path / "test.jsonl", rows[30:60])
    prepared = prepare(config.resolve(tiny_config), None)
    (train,) = prepared.datasets
    assert prompts(train) == {row["question"] for row in rows[:30]}
    assert prompts(prepared.held_out) == {row["question"] for row in rows[30:60]}
    ids = [example.prompt_id for example in (*train, *prepared.held_out)]
    assert len(set(ids)) == len(ids)
    tiny_config.eval.limit = 7
    assert len(prepare(config.resolve(tiny_config), None).held_out) == 7


def test_nothing_left_to_train_on(tiny_config, tmp_path):
    tiny_config.data.path = tiny_config.eval.path = write_rows(tmp_path / "train.jsonl", tiny.problems()[:20])
    with pytest.raises(ValueError, match="nothing is left to train on"):
        prepare(config.resolve(tiny_config), None)


def test_other_held_out_rows_are_another_run(tiny_config, tmp_path):
    """Their file may move; their content is part of what the run is."""
    rows = tiny.problems()
    tiny_config.data.path = write_rows(tmp_path / "train.jsonl", rows[:40])
    names = []
    for name, chosen in (("a.jsonl", rows[50:60]), ("b.jsonl", rows[50:60]), ("c.jsonl", rows[60:70])):
        tiny_config.eval.path = write_rows(tmp_path / name, chosen)
        names.append(prepare(config.resolve(tiny_config), None).identity["fingerprints"]["held-out data"])
    assert names[0] == names[1] != names[2]
