"""Evaluates a model on tasks of lm-evaluation-harness, or answers MT-Bench questions with it.

    python -m spin_jax.evaluate --model=DIR --tasks=TASK[,TASK…] [--output=FILE.json]
    python -m spin_jax.evaluate --model=DIR --questions=FILE --output=model_answer/NAME.jsonl

  --model=DIR             a Hugging Face directory or hub id; --revision=COMMIT for a hub id
  --adapters=DIR          LoRA adapters in PEFT's format, which are merged into the weights; also a hub id
  --tasks=TASK[,TASK…]    tasks, groups or tags of the harness (pip install 'spin_jax[eval]'); leaderboard_v1
                          means the six tasks of the SPIN paper with its few-shot examples, and prints the
                          paper's own numbers beside them
  --include_path=DIR      a directory with task files of your own (YAML)
  --num_fewshot=N         examples before each question; unset: the number that the task states
  --apply_chat_template   asks in the model's chat format
  --limit=N               only the first N questions of each task, or of the question file
  --questions=FILE        JSONL of question_id, category and turns, as FastChat writes it
  --max_new_tokens=1024   the most tokens of an answer to --questions
  --output=FILE           tasks: the results as JSON; questions: the answers as FastChat's judges read them,
                          in a file that has the name of the model
  --dtype=bfloat16        of the computation: float32, bfloat16 or float16; unset: that of the checkpoint
  --batch_size=32         answers in progress at a time for each copy of the weights
  --seed=0                of the random numbers where answers are sampled

Exit codes: 0 done, 1 failed, 2 bad input, 130 and 143 stopped by Ctrl-C and SIGTERM.
"""

import functools
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from absl import flags

from spin_jax import config as config_lib
from spin_jax.cli import explain, fail, parse, set_up_jax
from spin_jax.evaluate.leaderboard import COLUMNS, LEADERBOARD, leaderboard_table
from spin_jax.runtime import platforms
from spin_jax.runtime.interrupts import Interrupts, say

# Any in place of `str | None`: `read_flags` checks that those are set that are needed.
_MODEL: flags.FlagHolder[Any] = flags.DEFINE_string("model", None, "Hugging Face directory or hub id.")
_REVISION = flags.DEFINE_string("revision", None, "Branch, tag or commit of a hub id.")
_ADAPTERS = flags.DEFINE_string("adapters", None, "Directory or hub id of LoRA adapters in PEFT's format.")
_DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16", "float16"], "Of the computation; unset: that of the checkpoint."
)
_TASKS = flags.DEFINE_list("tasks", None, f"Tasks, groups or tags of the harness, or {LEADERBOARD}.")
_INCLUDE_PATH = flags.DEFINE_string("include_path", None, "Directory with task files of your own (YAML).")
_NUM_FEWSHOT = flags.DEFINE_integer(
    "num_fewshot", None, "Examples before each question; unset: the number that the task states.", lower_bound=0
)
_CHAT = flags.DEFINE_bool("apply_chat_template", False, "Ask tasks in the model's chat format.")
_QUESTIONS = flags.DEFINE_string("questions", None, "JSONL file of question_id, category and turns.")
_MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", 1024, "The most tokens of an answer to --questions.", lower_bound=1
)
_LIMIT = flags.DEFINE_integer("limit", None, "Only the first N questions of each task.", lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 32, "Answers in progress at a time for each copy of the weights.", lower_bound=1
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the random numbers where answers are sampled.", lower_bound=0)
_OUTPUT: flags.FlagHolder[Any] = flags.DEFINE_string(
    "output", None, "File for the results (JSON) or the answers (JSONL)."
)

USAGE = "usage: python -m spin_jax.evaluate --model=DIR --tasks=gsm8k,hellaswag [--output=FILE] [--flag=value …]"


def read_flags() -> list[str]:
    """The tasks; none where there are questions. Raises ValueError for flags that do not go together."""
    tasks = [task.strip() for task in _TASKS.value or []]
    if not _MODEL.value or bool(tasks) == bool(_QUESTIONS.value):
        raise ValueError(f"--model is needed, and --tasks or --questions\n{USAGE}")
    if _QUESTIONS.value and not _OUTPUT.value:
        raise ValueError("--questions needs --output: a file like model_answer/NAME.jsonl")
    if LEADERBOARD in tasks and (_NUM_FEWSHOT.value is not None or _CHAT.value):
        raise ValueError(f"{LEADERBOARD} goes with neither --num_fewshot nor --apply_chat_template")
    return tasks


def prepare(names: list[str]) -> Callable[[], None]:
    """Checks that the output can be written, loads tasks or questions, and at the end the weights; returns the work.

    Raises:
        ValueError, FileNotFoundError: an input is wrong; the message names the flag, or the file and row.
    """
    from spin_jax.models import loading
    from spin_jax.runtime import processes

    if (output := _OUTPUT.value) is not None:
        processes.by_first(lambda: check_output(output))
    model, _ = loading.describe(_MODEL.value, _REVISION.value, dtype=_DTYPE.value)
    if _QUESTIONS.value:
        from spin_jax.evaluate import mt_bench

        if model.tokenizer.chat_template is None:
            raise ValueError(f"{_MODEL.value}: the tokenizer has no chat template")
        work = functools.partial(answer_questions, mt_bench.read_questions(_QUESTIONS.value, _LIMIT.value))
    else:
        from spin_jax.evaluate.tasks import check_model, load_tasks  # they need lm_eval, which is optional

        leaderboard = LEADERBOARD in names
        published = {task: column.num_fewshot for task, column in COLUMNS.items()}
        num_fewshot = published if leaderboard else _NUM_FEWSHOT.value
        names = [task for name in names for task in (COLUMNS if name == LEADERBOARD else [name])]
        tasks = load_tasks(names, include_path=_INCLUDE_PATH.value, num_fewshot=num_fewshot)
        check_model(tasks, model, _CHAT.value)
        work = functools.partial(run_tasks, tasks, leaderboard)
    loaded = loading.load(_MODEL.value, _REVISION.value, dtype=_DTYPE.value, adapters=_ADAPTERS.value)
    return functools.partial(work, loaded)


def check_output(path: str) -> None:
    """Raises ValueError where no file can be written to that path."""
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


def answer_questions(questions: list, model: Any) -> None:
    """Answers the questions and writes the answers."""
    from spin_jax.evaluate import mt_bench
    from spin_jax.runtime import processes
    from spin_jax.storage import files

    name = os.path.splitext(os.path.basename(_OUTPUT.value))[0]
    rows = mt_bench.answer_questions(
        model, questions, name, batch_size=_BATCH_SIZE.value, max_new_tokens=_MAX_NEW_TOKENS.value, seed=_SEED.value
    )
    files.write_jsonl(_OUTPUT.value, rows)
    processes.say(f"{_OUTPUT.value}: answers of {name} to {len(rows)} questions")


def run_tasks(tasks: Any, leaderboard: bool, model: Any) -> None:
    """Evaluates the model on the tasks, and prints and writes the results."""
    from spin_jax.evaluate import harness
    from spin_jax.evaluate.tasks import flat_metrics, results_table
    from spin_jax.runtime import processes
    from spin_jax.storage import files

    start = time.perf_counter()
    results = harness.evaluate(
        model,
        tasks,
        limit=_LIMIT.value,
        apply_chat_template=_CHAT.value,
        batch_size=_BATCH_SIZE.value,
        seed=_SEED.value,
        stderr=True,
    )
    report = {
        "model": _MODEL.value,
        "revision": model.revision,
        "adapters": _ADAPTERS.value,
        "dtype": str(model.dtype),
        "metrics": flat_metrics(results, tasks),
        "stderr": flat_metrics(results, tasks, stderr=True),
        "all": flat_metrics(results),  # also of the tasks within groups
        "num_fewshot": dict(results["n-shot"]),
        "task_versions": dict(results["versions"]),
        "limit": _LIMIT.value,
        "apply_chat_template": _CHAT.value,
        "seconds": round(time.perf_counter() - start, 1),
        "devices": f"{model.mesh.size} × {model.mesh.devices.flat[0].device_kind}",
        "versions": platforms.versions("jax", "lm_eval", "transformers"),
    }
    processes.say(results_table(results, tasks))
    if leaderboard:
        processes.say("\n" + leaderboard_table(report["all"], _MODEL.value))
    if _OUTPUT.value:
        files.write_json(_OUTPUT.value, report)


def main() -> int:
    """Runs the command line; returns its exit code."""

    def quit_now(number: int) -> None:
        say("\ninterrupted")
        os._exit(128 + number)

    interrupts = Interrupts(quit_now)
    try:
        names = parse(sys.argv, read_flags)
        set_up_jax(config_lib.default())
    except (ValueError, FileNotFoundError) as error:
        return fail(str(error))
    from spin_jax.runtime import processes

    interrupts.listen()  # where there are several processes, JAX has taken SIGTERM for itself
    work_began = False
    try:
        work = prepare(names)
        work_began = True
        work()
    except Exception as error:
        return processes.leave(error, explain(error, work_began))
    return 0


if __name__ == "__main__":
    sys.exit(main())
