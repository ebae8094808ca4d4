"""What a run came to: the printed table and the plot."""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]
Panel = tuple[str, list[tuple[str, str]]]  # title, and (key, label) of its curves

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
    return row.get(key) is not None and not (key in ("skipped", "response_truncated") and row[key] == 0)


def _cell(value: Any, form: str) -> str:
    return "–" if value is None else form.format(value)


# --- the plot ------------------------------------------------------------------------------------

_COLORS = ("#1f5fa8", "#d9822b", "#3a8f5c", "#a23b72", "#6b6b6b", "#8a6d3b", "#4fb0c6", "#c0392b")
_COLUMNS = 3


def plot(rows: Sequence[Row]) -> bytes:
    """A PNG: the numbers of the table by iteration, with the control where there is one."""
    from matplotlib.figure import Figure

    panels = _panels(rows)
    across, down = min(max(len(panels), 1), _COLUMNS), -(-max(len(panels), 1) // _COLUMNS)
    figure = Figure(figsize=(4.2 * across, 3.6 * down), layout="constrained")
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    for axis, (title, curves) in zip(axes, panels, strict=False):
        for color, (key, label) in zip(_COLORS, curves, strict=False):
            _curves(axis, rows, key, label, color)
        axis.set_title(title, fontsize=10)
        axis.set_xticks([row["iteration"] for row in rows])
        axis.set_xticklabels(["start" if r["iteration"] < 0 else str(r["iteration"]) for r in rows])
        axis.set_xlabel("iteration")
        axis.set_xlim(rows[0]["iteration"] - 0.2, rows[-1]["iteration"] + 0.2)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8, frameon=False)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _panels(rows: Sequence[Row]) -> list[Panel]:
    """What there is to draw. Of tasks, shares only (a perplexity has another scale), one a color."""
    shares = [
        name
        for name in tasks_of(rows)
        if all(0 <= row[name] <= 1 for row in rows if row.get(name) is not None)
    ]
    panels = [
        ("right answers", [("greedy_accuracy", "greedy"), ("sampled_accuracy", "temperature 1")]),
        ("held-out NLL (nats a token)", [("nll", "NLL")]),
        ("held-out margin", [("margin", "margin")]),
        ("KL (nats an answer)", [("kl_opponent", "from the opponent"), ("kl_start", "from the start")]),
        ("tokens an answer", [("response_tokens", "tokens")]),
        ("tasks", [(name, name) for name in shares[: len(_COLORS)]]),
    ]
    return [panel for panel in panels if any(_known(rows, key) for key, _ in panel[1])]


def _known(rows: Sequence[Row], key: str) -> list[tuple[int, float]]:
    """(iteration, value) where there is a number to draw."""
    values = [(row["iteration"], row.get(key)) for row in rows]
    return [(t, value) for t, value in values if value is not None and math.isfinite(value)]


def _curves(axis: Any, rows: Sequence[Row], key: str, label: str, color: str) -> None:
    """The curve of a number, and that of the control, which begins where the start is."""
    draw: Callable[..., Any] = axis.plot
    style = {"marker": "o", "markersize": 4, "color": color}
    draw(*_columns(_known(rows, key)), "-", label=label, **style)
    controls = _known([{"iteration": r["iteration"], **(r.get("control") or {})} for r in rows], key)
    if controls:
        start = _known([row for row in rows if row["iteration"] < 0], key)
        draw(*_columns(start + controls), "--", label=f"SFT control, {label}", **style)


def _columns(points: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
