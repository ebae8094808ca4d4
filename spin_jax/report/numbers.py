"""The numbers of summary.json: their names, groups and formats, and the table of them as text.

It imports nothing that draws: a run prints this table at its end.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Row = Mapping[str, Any]  # of summary.json, metrics.jsonl or samples.jsonl

START = -1  # the iteration number of the model that self-play starts from
_WIDTH = 110  # columns of the text table, at most


class Number(NamedTuple):
    """A number of summary.json, and how it is written."""

    key: str
    label: str
    form: str


# {title: the numbers that stand together in a table}
SECTIONS: Mapping[str, Sequence[Number]] = {
    "held-out answers": (
        Number("nll", "NLL of the human's, nats a token", "{:.4f}"),
        Number("greedy_accuracy", "right, greedy", "{:.3f}"),
        Number("sampled_accuracy", "right, temperature 1", "{:.3f}"),
        Number("response_identical", "identical to the human one", "{:.3f}"),
        Number("response_tokens", "tokens", "{:.1f}"),
        Number("response_truncated", "cut at max_new_tokens", "{:.3f}"),
        Number("response_distinct_2", "different pairs of neighbouring tokens", "{:.3f}"),
        Number("classifier_accuracy", "told from human ones by a classifier", "{:.3f}"),
    ),
    "held-out pairs, against the opponent": (
        Number("margin", "margin", "{:.3f}"),
        Number("accuracy", "human answer preferred (accuracy)", "{:.3f}"),
        Number("loss", "loss", "{:.4f}"),
        Number("identical", "identical pairs", "{:.3f}"),
    ),
    "KL, nats an answer": (
        Number("kl_opponent", "from the opponent", "{:.3f}"),
        Number("kl_start", "from the start", "{:.3f}"),
    ),
    "training": (
        Number("pairs", "pairs", "{:d}"),
        Number("steps", "steps", "{:d}"),
        Number("skipped", "skipped steps", "{:d}"),
        Number("minutes", "minutes", "{:.1f}"),
    ),
}


def finite(row: Row, key: str) -> float:
    """The row's number of that name; NaN where it has none, or one that is not finite."""
    value = row.get(key)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan


def is_shown(row: Row, key: str) -> bool:
    """Whether the row has that number, and it says something: that no step was skipped does not."""
    return key in row and not (key in ("skipped", "response_truncated") and row[key] == 0)


def value_and_error(row: Row, number: Number) -> tuple[str, str]:
    """The row's number as text, and "± …" with its standard error, or "".

    The number is "–" where the row has none, and "NaN" where it is not finite (JSON has null there). An error of 0 says
    nothing: it is estimated so where no answer, or every one, is right.
    """
    if number.key not in row:
        return "–", ""
    value = finite(row, number.key)
    if math.isnan(value):
        return "NaN", ""
    name, slash, rest = number.key.partition("/")  # nll; or of a task: task/metric, task/metric/filter
    metric, *filters = rest.split("/")
    error = finite(row, "/".join([name, f"{metric}_stderr", *filters]) if slash else f"{name}_stderr")
    text = number.form.format(int(value) if number.form == "{:d}" else value)
    return text, f"± {error:.2g}" if error > 0 else ""


def written(row: Row, number: Number) -> str:
    return " ".join(filter(None, value_and_error(row, number)))


def iteration_name(t: int) -> str:
    return "start" if t == START else str(t)


def heading(row: Row) -> str:
    """The head of a row's column; a star marks the final model."""
    return iteration_name(row["iteration"]) + (" *" if row.get("final") else "")


def task_names(rows: Sequence[Row]) -> list[str]:
    """The names of the tasks' numbers, without their standard errors."""
    return list(dict.fromkeys(key for row in rows for key in row if "/" in key and "_stderr" not in key))


def summary_table(rows: Sequence[Row]) -> str:
    """The table as text: a line for each number and a column for each iteration, below them the SFT control.

    It is at most 110 columns wide, except for a name that leaves no room: further iterations come below.
    """
    *others, training = SECTIONS.items()
    tasks = "tasks", [Number(name, name, "{:.4g}") for name in task_names(rows)]
    lines = [("iteration", list(map(heading, rows)))]
    for title, shown in (*others, tasks, training):
        lines += _lines(rows, title, shown)
    first = max(len(label) for label, _ in lines)
    widths = [max(map(len, column)) for column in zip(*(cells for _, cells in lines if cells), strict=True)]
    lines.insert(1, ("─" * first, ["─" * width for width in widths]))
    count = max(1, (_WIDTH - first) // (max(widths, default=0) + 2))
    padded = [(label.ljust(first), [c.rjust(w) for c, w in zip(cells, widths, strict=False)]) for label, cells in lines]
    blocks = [
        "\n".join("  ".join([label, *cells[begin : begin + count]]).rstrip() for label, cells in padded)
        for begin in range(0, len(rows), count)
    ]
    notes = ["* the final model"] if any(row.get("final") for row in rows) else []
    notes += [f"stopped early: {row['stopped']}" for row in rows if row.get("stopped")]
    return "\n\n".join([*blocks, *notes])


def _lines(rows: Sequence[Row], title: str, shown: Sequence[Number]) -> list[tuple[str, list[str]]]:
    """(label, cells) of a section's lines, its title first; nothing where no row has any of its numbers."""
    controls = [row.get("control") or {} for row in rows]
    lines = [
        (name, [written(row, number) for row in source])
        for number in shown
        for source, name in ((rows, f"  {number.label}"), (controls, "    SFT control"))
        if any(is_shown(row, number.key) for row in source)
    ]
    return [(title, []), *lines] if lines else []
