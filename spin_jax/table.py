"""What a run came to, as text: the numbers of summary.json side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

Row = dict[str, Any]

_WIDTH = 110  # columns of the table, at most

# Numbers of summary.json in groups: key, label, format. A number is shown where any row has it.
GROUPS = (
    (
        "held-out answers",
        (
            ("nll", "NLL of the human's, nats a token", "{:.4f}"),
            ("greedy_accuracy", "right, greedy", "{:.3f}"),
            ("sampled_accuracy", "right, temperature 1", "{:.3f}"),
            ("response_identical", "identical to the human one", "{:.3f}"),
            ("response_tokens", "tokens", "{:.1f}"),
            ("response_truncated", "cut at max_new_tokens", "{:.3f}"),
        ),
    ),
    (
        "held-out pairs, against the opponent",
        (
            ("margin", "margin", "{:.3f}"),
            ("accuracy", "human answer preferred (accuracy)", "{:.3f}"),
            ("loss", "loss", "{:.4f}"),
            ("identical", "identical pairs", "{:.3f}"),
        ),
    ),
    (
        "KL, nats an answer",
        (("kl_opponent", "from the opponent", "{:.3f}"), ("kl_start", "from the start", "{:.3f}")),
    ),
    (
        "training",
        (
            ("pairs", "pairs", "{:d}"),
            ("steps", "steps", "{:d}"),
            ("skipped", "skipped steps", "{:d}"),
            ("minutes", "minutes", "{:.1f}"),
        ),
    ),
)
IF_ANY = ("skipped", "response_truncated")  # told where they are not 0


def table(rows: Sequence[Row]) -> str:
    """A line a number, the start and the iterations side by side, the SFT control at equal steps below.

    At most 110 columns wide (but for a name that leaves no room): more iterations than that go below.
    """
    names = [_heading(row) for row in rows]
    lines = [line for group in _groups(rows) for line in _lines(rows, *group)]
    first = max(len(label) for label in ("iteration", *(label for label, _ in lines)))
    widths = [
        max(map(len, [name, *(cells[i] for _, cells in lines if cells)])) for i, name in enumerate(names)
    ]
    fit = max(1, (_WIDTH - first) // (max(widths, default=0) + 2))
    blocks = []
    for begin in range(0, len(rows), fit):
        part = range(begin, min(begin + fit, len(rows)))

        def line(label: str, cells: Sequence[str], part: range = part) -> str:
            text = label.ljust(first) + "".join(f"  {cells[i].rjust(widths[i])}" for i in part if cells)
            return text.rstrip()

        rule = line("─" * first, ["─" * width for width in widths])
        blocks.append("\n".join([line("iteration", names), rule, *(line(*one) for one in lines)]))
    notes = ["* the final model"] if any(row.get("final") for row in rows) else []
    notes += [f"stopped early: {row['stopped']}" for row in rows if row.get("stopped")]
    return "\n\n".join([*blocks, *notes])


def _heading(row: Row) -> str:
    name = "start" if row["iteration"] < 0 else str(row["iteration"])
    return f"{name} *" if row.get("final") else name


def _groups(rows: Sequence[Row]) -> list[tuple[str, Sequence[tuple[str, str, str]]]]:
    """GROUPS, with the tasks' numbers before the last."""
    tasks = [(name, name, "{:.4g}") for name in tasks_of(rows)]
    return [*GROUPS[:-1], ("tasks", tasks), GROUPS[-1]]


def tasks_of(rows: Sequence[Row]) -> list[str]:
    """The names of tasks' numbers, their standard errors left out."""
    names = dict.fromkeys(key for row in rows for key in row if "/" in key)
    return [name for name in names if "_stderr" not in name]


def _lines(
    rows: Sequence[Row], title: str, wanted: Sequence[tuple[str, str, str]]
) -> list[tuple[str, list[str]]]:
    """(label, cells) of a group, its title first; nothing where no row has any of it."""
    controls = [row.get("control") or {} for row in rows]
    lines = []
    for key, label, form in wanted:
        for source, name in ((rows, f"  {label}"), (controls, "    SFT control")):
            if any(_shown(key, row) for row in source):
                lines.append((name, [_cell(row.get(key), form) for row in source]))
    return [(title, []), *lines] if lines else []


def _shown(key: str, row: Mapping[str, Any]) -> bool:
    """Whether a number says something: a step that was skipped does, none that was does not."""
    return row.get(key) is not None and not (key in IF_ANY and row[key] == 0)


def _cell(value: Any, form: str) -> str:
    return "–" if value is None else form.format(value)
