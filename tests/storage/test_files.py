"""JSON files hold no NaN or Infinity, and a number that is missing for that reason is never the best one."""

import json
import math

import pytest

from spin_jax.evaluate.best import best_row
from spin_jax.storage import files
from spin_jax.storage.metrics import Metrics


def _refuse(constant: str):
    pytest.fail(f"{constant} is not JSON")


def _strict(text: str):
    return json.loads(text, parse_constant=_refuse)


def test_numbers_that_are_not_finite_become_null(tmp_path):
    row = {"nll": math.nan, "deep": [math.inf, (1.5, -math.inf)], "steps": 3, "final": True}
    expected = {"nll": None, "deep": [None, [1.5, None]], "steps": 3, "final": True}
    files.write_json(tmp_path / "one.json", row)
    files.write_jsonl(tmp_path / "many.jsonl", [row, row])
    assert _strict((tmp_path / "one.json").read_text()) == expected
    assert [_strict(line) for line in (tmp_path / "many.jsonl").read_text().splitlines()] == [expected] * 2
    metrics = Metrics(tmp_path)
    metrics.write("eval", 0, 1, {"nll": math.nan, "loss": 0.5})
    metrics.close()
    assert _strict((tmp_path / "metrics.jsonl").read_text()) == {
        "phase": "eval", "iteration": 0, "step": 1, "nll": None, "loss": 0.5
    }  # fmt: skip


@pytest.mark.parametrize("direction", [1, -1])
def test_null_is_never_the_best_number(direction, tmp_path):
    files.write_json(tmp_path / "summary.json", [{"nll": math.nan}, {"nll": 2.0}, {"nll": -math.inf}])
    rows = files.read_json(tmp_path / "summary.json")
    assert best_row(rows, "nll", direction) == {"nll": 2.0}
    assert best_row(rows[:1], "nll", direction) is None
