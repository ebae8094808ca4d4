"""What a run came to: the printed table and the plot."""

import io
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]

# key, heading, format; a column stands where any row has it
COLUMNS = (
    ("nll", "NLL", "{:.4f}"),
    ("greedy_accuracy", "greedy", "{:.3f}"),
    ("sampled_accuracy", "temp. 1", "{:.3f}"),
    ("margin", "margin", "{:.3f}"),
    ("accuracy", "real > gen.", "{:.3f}"),
    ("loss", "loss", "{:.4f}"),
    ("identical", "identical", "{:.3f}"),
    ("pairs", "pairs", "{:d}"),
    ("steps", "steps", "{:d}"),
    ("minutes", "minutes", "{:.1f}"),
)
CONTROL = (
    ("nll", "SFT: NLL", "{:.4f}"),
    ("greedy_accuracy", "SFT: greedy", "{:.3f}"),
    ("sampled_accuracy", "SFT: temp. 1", "{:.3f}"),
)


def table(rows: Sequence[Row]) -> str:
    """The start and every iteration side by side, the SFT control at equal steps to the right."""
    controls = [row.get("control") or {} for row in rows]
    columns = [
        (heading, [form.format(r[key]) if r.get(key) is not None else "–" for r in source])
        for source, wanted in ((rows, COLUMNS), (controls, CONTROL))
        for key, heading, form in wanted
        if any(r.get(key) is not None for r in source)
    ]
    names = ["start" if row["iteration"] < 0 else f"iteration {row['iteration']}" for row in rows]
    columns.insert(0, ("", names))
    widths = [max(map(len, [heading, *cells])) for heading, cells in columns]
    lines = [[heading for heading, _ in columns], ["─" * width for width in widths]]
    lines += [[cells[i] for _, cells in columns] for i in range(len(rows))]
    return "\n".join(
        "  ".join(
            cell.rjust(w) if i else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def plot(rows: Sequence[Row]) -> bytes:
    """A PNG: accuracy, NLL and margin by iteration, with the control where there is one."""
    from matplotlib.figure import Figure

    panels = [
        ("accuracy", (("greedy_accuracy", "greedy"), ("sampled_accuracy", "temperature 1"))),
        ("held-out NLL (nats a token)", (("nll", "NLL"),)),
        ("held-out margin", (("margin", "margin"),)),
    ]
    panels = [p for p in panels if any(row.get(key) is not None for row in rows for key, _ in p[1])]
    figure = Figure(figsize=(4.2 * max(len(panels), 1), 3.6), layout="constrained")
    axes = figure.subplots(1, max(len(panels), 1), squeeze=False)[0]
    for axis, (title, lines) in zip(axes, panels, strict=False):
        for color, (key, label) in zip(("#1f5fa8", "#d9822b"), lines, strict=False):
            _line(axis, [(r["iteration"], r.get(key)) for r in rows], f"SPIN, {label}", color, "-")
            controls = [(r["iteration"], (r.get("control") or {}).get(key)) for r in rows]
            if any(value is not None for _, value in controls):
                start = [(r["iteration"], r.get(key)) for r in rows if r["iteration"] < 0]
                _line(axis, start + controls[len(start) :], f"SFT control, {label}", color, "--")
        axis.set_title(title, fontsize=10)
        axis.set_xticks([row["iteration"] for row in rows])
        axis.set_xticklabels(["start" if r["iteration"] < 0 else str(r["iteration"]) for r in rows])
        axis.set_xlabel("iteration")
        axis.set_xlim(rows[0]["iteration"] - 0.2, rows[-1]["iteration"] + 0.2)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _line(axis: Any, points: list[tuple[int, float | None]], label: str, color: str, style: str) -> None:
    known = [(x, y) for x, y in points if y is not None]
    axis.plot(*zip(*known, strict=True), style, marker="o", markersize=4, color=color, label=label)
