"""The evaluate command as its user runs it: tables, files, and what it refuses."""

import json
import os
import signal
import subprocess
import sys

import pytest
from runs import FAST_COMPILATION, ROOT

pytest.importorskip("lm_eval")

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{train: {folder}/sums.jsonl, test: {folder}/sums.jsonl}}}}
training_split: train
fewshot_split: train
test_split: test
doc_to_text: "{{{{question}}}}="
"""
SUM = """output_type: generate_until
doc_to_target: answer
generation_kwargs: {until: ["</s>"], max_gen_toks: 4}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOICE = """output_type: multiple_choice
doc_to_target: 0
doc_to_choice: ["{{answer}}", "none"]
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": f"{n}+{n}", "answer": str(2 * n)} for n in range(6)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "sums.yaml").write_text(TASK.format(name="sums", folder=folder) + SUM)
    (folder / "choices.yaml").write_text(TASK.format(name="choices", folder=folder) + CHOICE)
    return folder


@pytest.fixture(scope="module")
def evaluate(tmp_path_factory):
    """evaluate(*flags, expect=0) → (stdout, stderr)."""
    cache = tmp_path_factory.mktemp("cache")

    def run(*flags, expect=0):
        environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "XLA_FLAGS": FAST_COMPILATION}
        command = [sys.executable, "-m", "spin_jax.evaluate", *flags]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == expect, done.stdout + done.stderr
        return done.stdout, done.stderr

    return run


def test_tasks(evaluate, tiny_dir, tasks, tmp_path):
    output = tmp_path / "new" / "numbers.json"
    said, _ = evaluate(
        f"--model={tiny_dir}",
        "--tasks=sums,choices",
        f"--include_path={tasks}",
        "--num_fewshot=2",
        "--limit=5",
        "--apply_chat_template",
        f"--output={output}",
    )
    report = json.loads(output.read_text())
    assert report["metrics"].keys() == {"sums/exact_match", "choices/acc"}
    assert report["stderr"].keys() == report["metrics"].keys()
    assert report["num_fewshot"] == {"sums": 2, "choices": 2}
    assert (report["limit"], report["dtype"]) == (5, "float32")
    assert report["versions"].keys() == {"spin_jax", "jax", "lm_eval", "transformers"}
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines()]
    assert rows[0] == ["Tasks", "Version", "Filter", "n-shot", "Metric", "", "Value", "", "Stderr"]
    cells = {row[0]: row for row in rows[2:]}
    assert cells.keys() == {"sums", "choices"}
    assert cells["sums"][3:6] == ["2", "exact_match", "↑"]
    for row, name in ((cells["sums"], "sums/exact_match"), (cells["choices"], "choices/acc")):
        assert float(row[6]) == pytest.approx(report["metrics"][name], abs=1e-4)
        assert float(row[8]) == pytest.approx(report["stderr"][name], abs=1e-4)


def test_questions(evaluate, tiny_dir, tmp_path):
    question_file = tmp_path / "question.jsonl"
    questions = [
        {"question_id": 111, "category": "math", "turns": ["2+2?", "And 3+3?"], "reference": ["4", "6"]},
        {"question_id": 7, "category": "math", "turns": ["Hi"]},
    ]
    question_file.write_text("".join(json.dumps(row) + "\n" for row in questions))
    output = tmp_path / "model_answer" / "tiny-spin.jsonl"
    said, _ = evaluate(
        f"--model={tiny_dir}",
        f"--questions={question_file}",
        f"--output={output}",
        "--max_new_tokens=9",
        "--limit=1",
    )
    [row] = [json.loads(line) for line in output.read_text().splitlines()]
    assert row.keys() == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
    assert (row["question_id"], row["model_id"]) == (111, "tiny-spin")
    [choice] = row["choices"]
    assert choice["index"] == 0
    assert [type(text) for text in choice["turns"]] == [str, str]
    assert "answers of tiny-spin to 1 questions" in said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "--model is needed, and --tasks or --questions"),
        (["--model=MODEL", "--tasks=sums", "--questions=q.jsonl"], "--tasks or --questions"),
        (["--model=MODEL", "--task=sums"], "tasks"),  # did you mean
        (["--model=MODEL", "--tasks=sums", "--limit=0"], "limit"),
        (["--model=MODEL", "--questions=q.jsonl"], "needs --output"),
        (["--model=MODEL", "--tasks=leaderboard_v1", "--num_fewshot=3"], "leaderboard_v1 goes with neither"),
        (["--model=/nowhere", "--tasks=sums"], "/nowhere"),
        (
            ["--model=MODEL", "--adapters=/nowhere", "--questions=HERE/file", "--limit=1", "--output=HERE/a.jsonl"],
            "adapters path '/nowhere': no such directory",
        ),
        (["--model=MODEL", "--tasks=sums", "--include_path=/nowhere"], "no such directory"),
        (["--model=MODEL", "--tasks=sums", "--output=HERE"], "is a directory"),
        (["--model=MODEL", "--tasks=sums", "--output=HERE/file/numbers.json"], "cannot be written"),
        (["--model=MODEL", "--questions=HERE/file", "--output=HERE/a.jsonl"], "row 2: turns is 'Hi'"),
    ],
)
def test_what_it_cannot_run(evaluate, tiny_dir, tasks, tmp_path, flags, said):
    """A line that says what to do, before anything is computed."""
    (tmp_path / "file.jsonl").write_text('{"question_id": 1, "turns": ["Hi"]}\n{"question_id": 2, "turns": "Hi"}\n')
    (tmp_path / "file").write_text("")
    flags = [flag.replace("MODEL", str(tiny_dir)).replace("HERE", str(tmp_path)) for flag in flags]
    flags = [flag.replace("/file", "/file.jsonl") if "questions" in flag else flag for flag in flags]
    _, error = evaluate(*flags, expect=2)
    assert said in error
    assert "Traceback" not in error


def test_ctrl_c(tiny_dir, tasks, tmp_path):
    """Ends at once, with the shell's exit code, and leaves nothing half written."""
    output = tmp_path / "numbers.json"
    flags = f"--model={tiny_dir}", "--tasks=sums,choices", f"--include_path={tasks}", f"--output={output}"
    process = subprocess.Popen(
        [sys.executable, "-m", "spin_jax.evaluate", *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    said = ""
    while "answers" not in said:
        said += (letter := process.stdout.read(1))
        assert letter, said
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert not output.exists()
