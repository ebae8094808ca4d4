"""Tasks of lm-evaluation-harness: which ones load, how they generate, and what is refused."""

import subprocess
import sys

import pytest
from runs import ROOT

pytest.importorskip("lm_eval")

from spin_jax.evaluate import harness, tasks
from spin_jax.evaluate.tasks import GenerationOptions
from spin_jax.sampling.next_token import Sampling


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({}, (256, (), 0, None, None)),
        ({"until": "a", "max_tokens": 7, "temperature": 0.0}, (7, ("a",), 0, None, None)),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.9}, (256, (), 0, None, None)),
        ({"temperature": 0.5, "max_new_tokens": 3, "max_tokens": 4}, (3, (), 0.5, 50, None)),
        ({"do_sample": True, "temperature": 2, "top_k": 0, "top_p": 0.5}, (256, (), 2, None, 0.5)),
        ({"num_beams": 1, "until": ["a", "b"]}, (256, ("a", "b"), 0, None, None)),
    ],
)
def test_generation_kwargs(kwargs, expected):
    limit, until, *strategy = expected
    assert GenerationOptions.from_kwargs(kwargs) == (Sampling(limit, *strategy), until)


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"num_beams": 4}, "num_beams=4 is not supported"),
        ({"max_length": 100}, "max_length=100"),
        ({"do_sample": True}, "temperature above 0"),
        ({"temperature": 0.5, "top_p": 2}, "top_p=2"),
        ({"max_gen_toks": 0}, "max_new_tokens=0"),
    ],
)
def test_generation_kwargs_that_are_refused(kwargs, said):
    with pytest.raises(ValueError, match=said):
        GenerationOptions.from_kwargs(kwargs)


def test_tasks_that_cannot_run(tiny_model, task_folder, tmp_path, monkeypatch):
    """Each is named, with what to do, before anything is computed."""
    read_index = tasks._read_index
    # The harness's own tasks take long to read.
    monkeypatch.setattr(tasks, "_read_index", lambda path, defaults: read_index(path, False))
    broken = tmp_path / "broken.yaml"
    text = (task_folder / "small_gsm8k.yaml").read_text()
    for old, new, said in (
        ("", "", "did you mean small_gsm8k?"),
        ("max_gen_toks: 24", "num_beams: 4", "small_gsm8k: ValueError: generation_kwargs: num_beams=4"),
        ("max_gen_toks: 24", "max_gen_toks: 256", "small_gsm8k: answers of 256 tokens"),
        ("train.jsonl", "nowhere.jsonl", "small_gsm8k: .*nowhere.jsonl"),
    ):
        broken.write_text(text.replace(old, new) if old else text)
        name = "small_gsm8k" if old else "smal_gsm8k"
        with pytest.raises(ValueError, match=said):
            harness.run_tasks(tiny_model, [name], include_path=str(tmp_path))
    with pytest.raises(ValueError, match="no such directory"):
        tasks.check_tasks(["small_gsm8k"], str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="no task"):
        tasks.check_tasks([])
    with pytest.raises(ValueError, match="from 1 to 256"):
        harness.HarnessModel(tiny_model)._loglikelihood_tokens([((), [1], [])])


def test_without_lm_eval():
    """The error says how to install it."""
    program = """
import sys
sys.modules["lm_eval"] = None
try:
    from spin_jax.evaluate import harness
except ValueError as error:
    assert isinstance(error, ImportError)
    assert "pip install 'spin_jax[eval]'" in str(error)
    print("explained")
"""
    command = [sys.executable, "-c", program]
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert process.returncode == 0, process.stderr
    assert process.stdout == "explained\n"


GROUP = """
group: both
task: [small_choices, small_last_word]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
"""


def test_a_group_stands_for_its_tasks_unless_they_are_named(task_folder, tmp_path):
    """In the flat numbers, and in the table that users see."""
    for name in ("small_choices", "small_last_word"):
        (tmp_path / f"{name}.yaml").write_text((task_folder / f"{name}.yaml").read_text())
    (tmp_path / "both.yaml").write_text(GROUP)
    numbers = {"acc,none": 0.5, "acc_stderr,none": 0.1}
    names = ("both", "small_choices", "small_last_word")
    results = {
        "results": {name: {"alias": name, **numbers} for name in names},
        "versions": dict.fromkeys(names, 1.0),
        "n-shot": dict.fromkeys(names, 0),
        "higher_is_better": {name: {"acc": True} for name in names},
        "group_subtasks": {"both": ["small_choices", "small_last_word"]},
    }
    for requested, shown in ((["both"], {"both"}), (["both", "small_choices"], {"both", "small_choices"})):
        found = tasks.load_tasks(requested, include_path=str(tmp_path))
        assert tasks.flat_metrics(results, found) == {f"{name}/acc": 0.5 for name in shown}
        assert tasks.flat_metrics(results, found, stderr=True) == {f"{name}/acc": 0.1 for name in shown}
        table = tasks.results_table(results, found)
        assert {name for name in names if name in table} == shown
    assert tasks.flat_metrics(results) == {f"{name}/acc": 0.5 for name in names}
    assert tasks.metric_directions(["both"], str(tmp_path))["both/acc"] == 1
