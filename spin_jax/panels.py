"""Which figures there are of a run, and of several beside one another: numbers to panels of curves."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from spin_jax.figures import PALETTE, Curve, Panel
from spin_jax.table import tasks_of
from spin_jax.workdir import START, Run, number

Row = Mapping[str, Any]

MOST_POINTS = 400  # of a curve: a longer one is averaged over neighbors
_MOST_ITERATIONS = 6  # with a histogram of their own
_BINS = 32

# --- over iterations -----------------------------------------------------------------------------

# name, title, unit, and (key of summary.json, label) of the curves.
_OF_ITERATIONS = (
    (
        "right",
        "Right answers",
        "share of held-out answers",
        (("sampled_accuracy", "temp. 1"), ("greedy_accuracy", "greedy")),
    ),
    ("nll", "NLL of held-out human answers", "nats a token", (("nll", "NLL"),)),
    ("margin", "Held-out margin", "β · nats an answer", (("margin", "margin"),)),
    ("accuracy", "Human answer preferred", "share of held-out pairs", (("accuracy", "accuracy"),)),
    (
        "kl",
        "KL divergence",
        "nats an answer",
        (("kl_opponent", "from the opponent"), ("kl_start", "from the start")),
    ),
    ("tokens", "Length of own answers", "tokens", (("response_tokens", "tokens"),)),
)
_NOTES = {
    "margin": "β times how much more the human answer gained over the opponent than the opponent's own.",
    "accuracy": "The share of pairs with a margin above 0. Identical answers have none.",
    "kl": "Estimated on the model's own answers; a little below 0 is chance.",
}


def of_iterations(rows: Sequence[Row]) -> list[Panel]:
    """The numbers of the start and each iteration, with the SFT control's where there is one."""
    rows = _placed(rows)
    panels = []
    for name, title, unit, wanted in [*_OF_ITERATIONS, *_of_tasks(rows)]:
        curves = []
        for color, (key, label) in enumerate(wanted):
            own, control = _known(rows, key), _known_of_control(rows, key)
            if own:
                curves.append(Curve(label, *_columns(own), color=color, marks=True))
            if control:
                said = f"SFT, {label}" if len(wanted) > 1 else "SFT control"
                curves.append(Curve(said, *_columns(control), color=color, dash=1, marks=True))
        if curves:
            alone = f", {curves[0].label}" if len(curves) == 1 < len(wanted) else ""
            note, ticks = _NOTES.get(name, ""), _ticks(rows, curves)
            panels.append(Panel(f"by_{name}", f"{title}{alone}", "iteration", unit, curves, note, ticks))
    return panels


def _placed(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows with the `place` on the axis: the start comes right before the first iteration."""
    first = min((row["iteration"] for row in rows if row["iteration"] > START), default=0)
    return [{**row, "place": max(row["iteration"], first - 1)} for row in rows]


def _ticks(rows: Sequence[Row], curves: Sequence[Curve]) -> dict[float, str]:
    """The names of iterations, from the first to the last that a curve has."""
    used = [x for curve in curves for x in curve.x]
    rows = [row for row in rows if min(used) <= row["place"] <= max(used)]
    names = {row["place"]: "start" if row["iteration"] == START else str(row["iteration"]) for row in rows}
    every = -(-len(names) // 12)
    return {place: name if n % every == 0 else "" for n, (place, name) in enumerate(sorted(names.items()))}


def _of_tasks(rows: Sequence[Row]) -> list[tuple[str, str, str, list[tuple[str, str]]]]:
    """Shares together, as many as there are colors; what has another scale by itself."""
    names = tasks_of(rows)  # pyright: ignore[reportArgumentType]
    shares = [name for name in names if all(not row.get(name) or 0 <= number(row, name) <= 1 for row in rows)]
    groups = [shares[i : i + 6] for i in range(0, len(shares), 6)]
    panels = [
        (
            f"tasks_{n}",
            "Tasks" if len(groups) == 1 else f"Tasks ({n})",
            "the task's metric",
            [(s, s) for s in group],
        )
        for n, group in enumerate(groups, 1)
    ]
    others = [name for name in names if name not in shares]
    return panels + [
        (f"task_{n}", name, "the task's metric", [(name, name)]) for n, name in enumerate(others)
    ]


def _known(rows: Sequence[Row], key: str) -> list[tuple[float, float]]:
    """(place, value) where there is a number to draw."""
    values = [(row["place"], number(row, key)) for row in rows]
    return [(place, value) for place, value in values if math.isfinite(value)]


def _known_of_control(rows: Sequence[Row], key: str) -> list[tuple[float, float]]:
    """The control's, which begins where the start is."""
    controls = _known([{**(row.get("control") or {}), "place": row["place"]} for row in rows], key)
    return controls and _known([row for row in rows if row["iteration"] == START], key) + controls


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


# --- over optimizer steps ------------------------------------------------------------------------

_LEARNING = (
    ("loss", "Training loss", "loss", (("loss", "loss"),), "Of each step's pairs, before its update."),
    ("margin", "Margin", "β · nats an answer", (("margin", "margin"),), "Back at 0 with each new opponent."),
    (
        "accuracy",
        "Human answer preferred",
        "share of pairs",
        (("accuracy", "accuracy"),),
        "Identical answers count as not.",
    ),
    (
        "rewards",
        "Rewards",
        "β · nats an answer",
        (("real_reward", "human answers"), ("generated_reward", "generated answers")),
        "β · log of how much likelier an answer is than under the opponent. Their difference is the margin.",
    ),
    (
        "logps",
        "Log-probability of answers",
        "nats an answer",
        (("real_logp", "human answers"), ("generated_logp", "generated answers")),
        "The loss asks for the difference alone: log p of human answers may fall while the margin grows, as "
        "long as that of generated ones falls faster. Where it falls far, loss.nll_weight holds it.",
    ),
)
_OPTIMIZATION = (
    ("grad_norm", "Gradient norm", "norm", (("grad_norm", "gradient norm"),), ""),
    ("learning_rate", "Learning rate", "learning rate", (("learning_rate", "learning rate"),), ""),
    (
        "identical",
        "Identical pairs",
        "share of pairs",
        (("identical", "identical"),),
        "Nothing is learned from these.",
    ),
    ("speed", "Speed", "tokens a second", (("tokens_per_s", "tokens a second"),), "Of training."),
)
_TOLD = {"skipped"} | {key for part in (*_LEARNING, *_OPTIMIZATION) for key, _ in part[3]}
_NOT_NUMBERS = {"phase", "iteration", "step"}


def learning(run: Run) -> list[Panel]:
    """What self-play learns, step by step; a loss's own numbers come last."""
    own = dict.fromkeys(key for row in run.steps.get("train", ())[-50:] for key in row)
    others = [
        (f"own_{n}", key, "", ((key, key),), "")
        for n, key in enumerate(own)
        if key not in _TOLD | _NOT_NUMBERS
    ]
    return [panel for one in (*_LEARNING, *others) if (panel := _of_steps([(run, "")], *one))]


def optimization(run: Run) -> list[Panel]:
    """How the optimizer fares, and SFT: that before self-play, and the control."""
    panels = [_of_steps([(run, "")], *one) for one in _OPTIMIZATION]
    if panels[2] and not any(np.nan_to_num(curve.y).any() for curve in panels[2].curves):
        panels[2] = None  # none ever was
    return [panel for panel in [*panels, _sft(run)] if panel]


def _of_steps(
    runs: Sequence[tuple[Run, str]],
    name: str,
    title: str,
    unit: str,
    wanted: Sequence[tuple[str, str]],
    note: str,
) -> Panel | None:
    """A curve for each run and key that has numbers."""
    curves, notes = [], [note] if note else []
    for color, (run, who) in enumerate(runs):
        for place, (key, label) in enumerate(wanted):
            line = _line(run.series("train", key))
            if line:
                curves.append(Curve(who or label, line.x, line.y, color + place, color // len(PALETTE)))
                notes += line.notes
    values = np.concatenate([np.asarray(curve.y) for curve in curves]) if curves else np.empty(0)
    known = values[np.isfinite(values)]
    if not len(known):
        return None
    parts = _parts(runs[0][0]) if len(runs) == 1 else []
    return Panel(
        f"steps_{name}",
        title,
        "optimizer steps (above: iteration)" if parts else "optimizer steps",
        unit,
        curves,
        " ".join(dict.fromkeys(notes)),
        parts=parts,
        log=name == "grad_norm" and _wide(known),
        ylim=(-0.03, 1.03) if unit.startswith("share") else None,
    )


def _parts(run: Run) -> list[tuple[float, float, str]]:
    """Iterations on the axis of steps, where there are several; of many, not all are named."""
    series = run.series("train", "loss")
    if len(series) < 2:
        return []
    every = -(-len(series) // 8)
    ends = [int(steps[-1]) + 1 for steps, _ in series.values()]
    begins = [int(steps[0]) for steps, _ in series.values()]
    return [
        (begin, end, "" if n % every else str(t))
        for n, (t, begin, end) in enumerate(zip(series, begins, ends, strict=True))
    ]


def _sft(run: Run) -> Panel | None:
    before, control = _line(run.series("sft", "loss")), _line(run.series("control", "loss"))
    curves = []
    if before:
        curves.append(Curve("SFT before self-play", before.x, before.y, 0))
    if control:
        curves.append(Curve("SFT control", control.x, control.y, 1))
    if not curves:
        return None
    notes = ["On human answers alone; the control takes as many steps as self-play." if control else ""]
    notes += [note for line in (before, control) if line for note in line.notes]
    return Panel(
        "steps_sft",
        "SFT loss",
        "optimizer steps since self-play began" if before and control else "optimizer steps",
        "nats a token",
        curves,
        " ".join(dict.fromkeys(filter(None, notes))),
        zero=bool(before and control),
        log=_wide(np.concatenate([curve.y for curve in curves])),
    )


def _wide(values: np.ndarray) -> bool:
    """Whether a logarithmic axis shows them better."""
    known = values[np.isfinite(values)]
    return bool(known.min() > 0 and known.max() > 30 * known.min())


@dataclasses.dataclass(frozen=True)
class _Line:
    x: np.ndarray
    y: np.ndarray
    notes: Sequence[str]


def _line(series: Mapping[int, tuple[np.ndarray, np.ndarray]]) -> _Line | None:
    """One line with a gap between iterations, averaged where it has too many points; None without numbers."""
    count = sum(len(values) for _, values in series.values())
    missing = sum(int(np.isnan(values).sum()) for _, values in series.values())
    if missing == count:
        return None
    size = -(-count // MOST_POINTS)
    xs, ys = [], []
    for steps, values in series.values():
        xs += [_means(steps.astype(float), size), [np.nan]]
        ys += [_means(values, size), [np.nan]]
    notes = [f"Each point is the mean of {size} steps."] if size > 1 else []
    if missing:
        notes.append(f"{missing} of {count} steps have no finite value, and are left out.")
    return _Line(np.concatenate(xs[:-1]), np.concatenate(ys[:-1]), notes)


def _means(values: np.ndarray, size: int) -> np.ndarray:
    """Means over `size` neighbors, of the values that are finite; NaN where none is."""
    padded = np.append(values, np.full(-len(values) % size, np.nan)).reshape(-1, size)
    known = np.isfinite(padded)
    sums, counts = np.where(known, padded, 0).sum(1), known.sum(1)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


# --- histograms ----------------------------------------------------------------------------------


def lengths(run: Run) -> list[Panel]:
    """Tokens of human and generated answers, an iteration a panel, on the same axes."""
    chosen = _some(list(run.lengths))
    if not chosen:
        return []
    every = [run.lengths[t] for t in chosen]
    edges = _edges(np.concatenate([part for one in every for part in (one.real, one.generated)]), whole=True)
    shares = {
        t: [_shares(of, edges) for of in (run.lengths[t].real, run.lengths[t].generated)] for t in chosen
    }
    top = 1.05 * max(float(share.max()) for both in shares.values() for share in both)
    return [
        Panel(
            f"lengths_{t}",
            f"Lengths, pairs of iteration {t}",
            "tokens",
            "share of answers",
            [Curve("human", edges, real, 7, filled=True), Curve(_whose(run, t), edges, generated, 0)],
            f"Means: {run.lengths[t].real.mean():.1f} and {run.lengths[t].generated.mean():.1f} tokens.",
            ylim=(0, top),
        )
        for t, (real, generated) in shares.items()
    ]


def _whose(run: Run, t: int) -> str:
    """Who gave the answers of an iteration's pairs: the model before it."""
    if f"given pairs {t}" in run.record.get("fingerprints", {}):
        return "given"
    first = t == run.config.get("selfplay.start", 0)
    return f"generated, by {'the start' if first else f'iteration {t - 1}'}"


def margins(run: Run) -> Panel | None:
    """Margins of held-out pairs, iterations over one another."""
    unlike = {t: margins[margins != 0] for t, margins in run.margins.items()}
    chosen = _some([t for t, margins in unlike.items() if len(margins)])
    if not chosen:
        return None
    edges = _edges(np.concatenate([unlike[t] for t in chosen]), whole=False)
    curves = [
        Curve(f"iteration {t}", edges, _shares(unlike[t], edges), n, n % 4) for n, t in enumerate(chosen)
    ]
    above = ", ".join(f"{(unlike[t] > 0).mean():.0%}" for t in chosen)
    same = [1 - len(unlike[t]) / len(run.margins[t]) for t in chosen]
    left_out = (
        f" Left out: identical pairs, {', '.join(f'{share:.0%}' for share in same)}." if any(same) else ""
    )
    return Panel(
        "margins",
        "Margins of held-out pairs",
        "margin, β · nats an answer",
        "share of these pairs",
        curves,
        f"Each against the opponent of its iteration. Above 0: {above}.{left_out} The outermost bins hold "
        "what lies beyond.",
        zero=True,
        whole=False,
    )


def _some(iterations: Sequence[int]) -> list[int]:
    """Of many, the first, the last, and some between."""
    if len(iterations) <= _MOST_ITERATIONS:
        return list(iterations)
    places = np.linspace(0, len(iterations) - 1, _MOST_ITERATIONS).round().astype(int)
    return [iterations[place] for place in places]


def _edges(values: np.ndarray, whole: bool) -> np.ndarray:
    """Of bins that hold 99% of the values between them; `whole` numbers are in the middle of theirs."""
    low, high = np.percentile(values, [0 if whole else 0.5, 99.5])
    if whole:
        width = max(1, math.ceil((high - low + 1) / _BINS))
        return np.arange(low, high + width + 1, width) - 0.5
    return np.linspace(low, high, _BINS + 1) if high > low else np.array([low - 0.5, low + 0.5])


def _shares(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """The share of values in each bin; the outer ones hold what lies beyond."""
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    return counts / max(len(values), 1)


# --- several runs --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seed."""

    name: str
    runs: Sequence[Run]

    def values(self, iteration: int, key: str, control: bool = False) -> np.ndarray:
        """Each run's number of an iteration, where it has one."""
        rows = [row for run in self.runs for row in run.rows if row["iteration"] == iteration]
        found = np.array([number(row.get("control") or {} if control else row, key) for row in rows])
        return found[np.isfinite(found)]


def compared_iterations(groups: Sequence[Group]) -> list[Panel]:
    """A panel for each number, a line for each group: the mean of its runs, and from lowest to highest."""
    iterations = sorted({row["iteration"] for group in groups for run in group.runs for row in run.rows})
    rows = [row for group in groups for run in group.runs for row in run.rows]
    placed = _placed([{"iteration": t} for t in iterations])
    panels = []
    for name, title, unit, wanted in [*_OF_ITERATIONS, *_of_tasks(rows)]:
        for n, (key, label) in enumerate(wanted):
            curves = [curve for g, group in enumerate(groups) if (curve := _over(group, key, placed, g))]
            if curves:
                full = title if len(wanted) == 1 else label if label == key else f"{title}, {label}"
                note = _NOTES.get(name, "")
                panels.append(
                    Panel(f"by_{name}_{n}", full, "iteration", unit, curves, note, _ticks(placed, curves))
                )
    return panels


def _over(group: Group, key: str, placed: Sequence[Row], color: int) -> Curve | None:
    found = [(row["place"], group.values(row["iteration"], key)) for row in placed]
    found = [(place, values) for place, values in found if len(values)]
    if not found:
        return None
    x, means, low, high = zip(*((place, v.mean(), v.min(), v.max()) for place, v in found), strict=True)
    band = (low, high) if len(group.runs) > 1 else None
    return Curve(group.name, x, means, color, color // len(PALETTE), marks=True, band=band)


def compared_steps(groups: Sequence[Group]) -> list[Panel]:
    """Learning curves over one another; of a group that of its first run."""
    runs = [(group.runs[0], group.name) for group in groups]
    parts = (
        (f"{name}_{n}", title if len(wanted) == 1 else f"{title}: {label}", unit, ((key, label),), note)
        for name, title, unit, wanted, note in _LEARNING
        for n, (key, label) in enumerate(wanted)
    )
    return [panel for one in parts if (panel := _of_steps(runs, *one))]
