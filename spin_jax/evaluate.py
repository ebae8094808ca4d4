"""lm-evaluation-harness on a model (pip install 'spin_jax[eval]'), or answers to MT-Bench-style questions.

    python -m spin_jax.evaluate --model=DIR --tasks=TASK[,TASK…] [--output=FILE.json]
    python -m spin_jax.evaluate --model=DIR --questions=FILE --output=model_answer/NAME.jsonl

  --model=DIR             a Hugging Face directory or hub id; --revision=COMMIT of the latter
  --tasks=TASK[,TASK…]    tasks, groups or tags of the harness; leaderboard_v1 is the paper's six with their
                          few-shot examples, and the paper's own numbers beside them
  --include_path=DIR      a folder of task files of your own (YAML)
  --num_fewshot=N         examples before each question; unset: as the task says
  --apply_chat_template   ask in the model's chat format
  --limit=N               the first N questions of each task only
  --questions=FILE        JSONL of question_id, category and turns, as FastChat has it
  --max_new_tokens=1024   of an answer to those
  --output=FILE           the results as JSON; answers as FastChat's judges read them, the file named
                          after the model
  --dtype=float32         of computation: bfloat16, float16; unset: the checkpoint's
  --batch_size=32         answers in progress at a time, for every copy of the weights
  --seed=0                of what is drawn

Exit codes: 0 done, 1 failed, 2 bad input, 130 and 143 stopped by Ctrl-C and SIGTERM.
"""

import os
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from typing import Any, NamedTuple

from absl import flags

from spin_jax import config as config_lib
from spin_jax.cli import fail, failed, parse, set_up_jax
from spin_jax.runtime.interrupts import Interrupts, say

_MODEL = flags.DEFINE_string("model", None, "Hugging Face directory or hub id.")
_REVISION = flags.DEFINE_string("revision", None, "Branch, tag or commit of a hub id.")
_DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16", "float16"], "Of computation; unset: the checkpoint's."
)
_TASKS = flags.DEFINE_list("tasks", None, "Tasks, groups or tags of the harness, or leaderboard_v1.")
_INCLUDE_PATH = flags.DEFINE_string("include_path", None, "Directory of task files (YAML) of your own.")
_NUM_FEWSHOT = flags.DEFINE_integer(
    "num_fewshot", None, "Examples before each question; unset: as the task says.", lower_bound=0
)
_CHAT = flags.DEFINE_bool("apply_chat_template", False, "Ask tasks in the model's chat format.")
_QUESTIONS = flags.DEFINE_string("questions", None, "JSONL file of question_id, category and turns.")
_MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", 1024, "Tokens of an answer to --questions, at most.", lower_bound=1
)
_LIMIT = flags.DEFINE_integer("limit", None, "The first so many questions of each task only.", lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 32, "Answers in progress at a time, for every copy of the weights.", lower_bound=1
)
_SEED = flags.DEFINE_integer("seed", 0, "Of what is drawn.", lower_bound=0)
_OUTPUT = flags.DEFINE_string("output", None, "File for the results: JSON; for answers: JSONL.")

USAGE = (
    "usage: python -m spin_jax.evaluate --model=DIR --tasks=gsm8k,hellaswag [--output=FILE] [--flag=value …]"
)

LEADERBOARD = "leaderboard_v1"


class Column(NamedTuple):
    """One of the six tasks of the first Open LLM Leaderboard."""

    title: str
    num_fewshot: int
    metric: str


COLUMNS = {
    "arc_challenge": Column("ARC", 25, "acc_norm"),
    "truthfulqa_mc2": Column("TruthfulQA", 0, "acc"),
    "winogrande": Column("Winogrande", 5, "acc"),
    "gsm8k": Column("GSM8K", 5, "exact_match/strict-match"),
    "hellaswag": Column("HellaSwag", 10, "acc_norm"),
    "mmlu": Column("MMLU", 5, "acc"),
}
# arXiv 2401.01335, with lm-evaluation-harness v0.4.0.
PUBLISHED = {
    "paper: SFT": (60.41, 43.73, 74.19, 26.76, 82.85, 60.92),
    "paper: DPO, 62k preferences": (63.65, 55.19, 72.61, 33.43, 84.44, 58.52),
    "paper: SPIN iteration 0": (63.40, 49.18, 72.69, 35.10, 84.38, 60.03),
    "paper: SPIN iteration 1": (65.19, 55.17, 72.30, 35.78, 84.96, 59.34),
    "paper: SPIN iteration 2": (65.96, 54.91, 73.56, 38.06, 85.41, 59.93),
    "paper: SPIN iteration 3": (65.87, 54.90, 73.72, 38.97, 85.54, 59.99),
}
_PACKAGES = ("spin_jax", "jax", "lm_eval", "transformers")


class Asked(NamedTuple):
    """What the flags ask for."""

    model: str
    tasks: list[str]  # the preset's written out; none where there are questions
    preset: bool  # the leaderboard is among them
    questions: str | None
    output: str | None


def read_flags() -> Asked:
    """Raises ValueError for flags that do not go together."""
    tasks = [task.strip() for task in _TASKS.value or []]
    if not _MODEL.value or bool(tasks) == bool(_QUESTIONS.value):
        raise ValueError(f"--model is needed, and --tasks or --questions\n{USAGE}")
    if _QUESTIONS.value and not _OUTPUT.value:
        raise ValueError("--questions needs --output: a file like model_answer/NAME.jsonl")
    preset = LEADERBOARD in tasks
    if preset:
        if _NUM_FEWSHOT.value is not None or _CHAT.value:
            raise ValueError(f"{LEADERBOARD} says how it asks: no --num_fewshot, no --apply_chat_template")
        at = tasks.index(LEADERBOARD)
        tasks[at : at + 1] = COLUMNS
    return Asked(_MODEL.value, list(dict.fromkeys(tasks)), preset, _QUESTIONS.value, _OUTPUT.value)


class Job(NamedTuple):
    """What is to be computed, all of it read."""

    model: Any  # model.Model
    tasks: Any  # harness.Tasks, where there are no questions
    questions: list  # of questions.Question


def prepare(asked: Asked) -> Job:
    """Reads tasks or questions and, last, the weights; finds out whether the output can be written.

    Raises:
        ValueError, FileNotFoundError: naming the flag, or the file and row.
    """
    from spin_jax import questions
    from spin_jax.models import loading
    from spin_jax.runtime import processes

    if (output := asked.output) is not None:
        processes.by_first(lambda: check_output(output))
    model, _ = loading.describe(asked.model, _REVISION.value, dtype=_DTYPE.value)
    tasks, rows = None, []
    if asked.questions:
        if model.tokenizer.chat_template is None:
            raise ValueError(f"{asked.model}: the tokenizer has no chat template")
        rows = questions.read(asked.questions, _LIMIT.value)
    else:
        from spin_jax import harness  # only now: not everyone has lm_eval

        preset = {task: column.num_fewshot for task, column in COLUMNS.items()}
        wanted = preset if asked.preset else _NUM_FEWSHOT.value
        tasks = harness.load_tasks(asked.tasks, include_path=_INCLUDE_PATH.value, num_fewshot=wanted)
        harness.check_asked(tasks, model, _CHAT.value)
    return Job(loading.load(asked.model, _REVISION.value, dtype=_DTYPE.value), tasks, rows)


def check_output(path: str) -> None:
    """Raises ValueError where no file can be written there."""
    from etils import epath

    from spin_jax.storage import files

    target = epath.Path(path)
    try:
        if target.is_dir():
            raise ValueError(f"--output={path} is a directory: name a file")
        probe = target.parent / f".{target.name}.probe"
        files.write_here(probe, b"")
        probe.unlink()
    except OSError as error:
        raise ValueError(f"--output={path} cannot be written: {error}") from error


def answer_questions(asked: Asked, job: Job) -> None:
    """Computes and writes."""
    from spin_jax import questions
    from spin_jax.runtime import processes
    from spin_jax.storage import files

    assert asked.output is not None
    name = os.path.splitext(os.path.basename(asked.output))[0]
    rows = questions.answers(
        job.model,
        job.questions,
        name,
        batch_size=_BATCH_SIZE.value,
        max_new_tokens=_MAX_NEW_TOKENS.value,
        seed=_SEED.value,
    )
    files.write_jsonl(asked.output, rows)
    processes.say(f"{asked.output}: answers of {name} to {len(rows)} questions")


def run_tasks(asked: Asked, job: Job) -> None:
    """Computes, prints and writes."""
    from spin_jax import harness
    from spin_jax.runtime import processes
    from spin_jax.storage import files

    began = time.perf_counter()
    results = harness.evaluate(
        job.model,
        job.tasks,
        limit=_LIMIT.value,
        apply_chat_template=_CHAT.value,
        batch_size=_BATCH_SIZE.value,
        seed=_SEED.value,
        stderr=True,
    )
    report = {
        "model": asked.model,
        "revision": job.model.revision,
        "dtype": str(job.model.dtype),
        "metrics": harness.numbers(results, job.tasks),
        "stderr": harness.numbers(results, job.tasks, stderr=True),
        "all": harness.numbers(results),  # those of tasks within groups as well
        "num_fewshot": dict(results["n-shot"]),
        "task_versions": dict(results["versions"]),
        "limit": _LIMIT.value,
        "apply_chat_template": _CHAT.value,
        "seconds": round(time.perf_counter() - began, 1),
        "devices": f"{job.model.mesh.size} × {job.model.mesh.devices.flat[0].device_kind}",
        "versions": {name: metadata.version(name) for name in _PACKAGES},
    }
    processes.say(table(report))
    if asked.preset:
        processes.say("\n" + leaderboard(report["all"], asked.model))
    if asked.output:
        files.write_json(asked.output, report)


def table(report: Mapping[str, Any]) -> str:
    """The numbers for people."""
    lines = [("task", "few-shot", "metric", "value", "± stderr")]
    for name, value in report["metrics"].items():
        task, _, metric = name.partition("/")
        error = report["stderr"].get(name)
        shots = str(report["num_fewshot"].get(task, ""))
        lines.append((task, shots, metric, f"{value:.4f}", "" if error is None else f"{error:.4f}"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def leaderboard(numbers: Mapping[str, float], name: str) -> str:
    """The six tasks and their mean, in percent, under the paper's."""
    own = tuple(100 * numbers[f"{task}/{column.metric}"] for task, column in COLUMNS.items())
    titles = [column.title for column in COLUMNS.values()]
    lines = [f"| | {' | '.join(titles)} | average |", "|---" * (len(titles) + 2) + "|"]
    for row, values in {**PUBLISHED, name: own}.items():
        cells = [f"{value:.2f}" for value in (*values, sum(values) / len(values))]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns its exit code: 0 done, 1 failed, 2 bad input; 130 and 143 stopped."""
    argv = sys.argv if argv is None else argv

    def quit_now(number: int) -> None:
        say("\ninterrupted")
        os._exit(128 + number)

    interrupts = Interrupts(quit_now)
    try:
        asked = parse(argv, read_flags)
        set_up_jax(config_lib.default())
    except (ValueError, FileNotFoundError) as error:
        return fail(str(error))
    from spin_jax.runtime import processes

    interrupts.listen()  # JAX takes SIGTERM for itself where there are several processes
    began = False
    try:
        job = prepare(asked)
        began = True
        answer_questions(asked, job) if asked.questions else run_tasks(asked, job)
    except Exception as error:
        return processes.leave(error, failed(error, began))
    return 0


if __name__ == "__main__":
    sys.exit(main())
