"""Which charts a report has: of one run, and of several beside one another."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from spin_jax.report.comparison import SeedGroup
from spin_jax.report.drawing import COLORS, Chart, Curve
from spin_jax.report.numbers import START, Row, finite, iteration_name, task_names
from spin_jax.report.workdir import Run

MAX_POINTS = 400  # of a curve: a longer one is averaged over neighbors
_BINS = 32


class Topic(NamedTuple):
    """What a chart is about."""

    name: str
    title: str
    unit: str
    note: str = ""
    numbers: Mapping[str, str] = {}  # {key of summary.json or metrics.jsonl: its label}; {}: `name` alone

    @property
    def labels(self) -> Mapping[str, str]:
        return self.numbers or {self.name: self.name}

    def split(self) -> "list[Topic]":
        """One topic for each number, for charts in which each curve is a run's."""
        parts = []
        for n, (key, label) in enumerate(self.labels.items()):
            title = label if label == key else f"{self.title}, {label}"
            title = title if len(self.labels) > 1 else self.title
            parts.append(self._replace(name=f"{self.name}_{n}", title=title, numbers={key: label}))
        return parts


# --- over iterations -----------------------------------------------------------------------------

_RIGHT = {"sampled_accuracy": "temp. 1", "greedy_accuracy": "greedy"}
_KL = {"kl_opponent": "from the opponent", "kl_start": "from the start"}
_MARGIN_NOTE = "β times how much more the human answer gained over the opponent than the opponent's own answer."
_ACCURACY_NOTE = "The share of pairs with a margin above 0. Identical answers have none."
_KL_NOTE = "Estimated on the model's own answers; a little below 0 is chance."
_ITERATIONS = (
    Topic("right", "Right answers", "share of held-out answers", "", _RIGHT),
    Topic("nll", "NLL of held-out human answers", "nats a token", "", {"nll": "NLL"}),
    Topic("margin", "Held-out margin", "β · nats an answer", _MARGIN_NOTE),
    Topic("accuracy", "Human answer preferred", "share of held-out pairs", _ACCURACY_NOTE),
    Topic("kl", "KL divergence", "nats an answer", _KL_NOTE, _KL),
    Topic("tokens", "Length of own answers", "tokens", "", {"response_tokens": "tokens"}),
)


def over_iterations(rows: Sequence[Row]) -> list[Chart]:
    """The numbers of the start and of each iteration, with those of the SFT control where there is one."""
    places = _places([row["iteration"] for row in rows])
    controls = [{**(row.get("control") or {}), "iteration": row["iteration"]} for row in rows]
    charts = []
    for topic in (*_ITERATIONS, *_task_topics(rows)):
        curves = []
        for style, (key, label) in enumerate(topic.labels.items()):
            own = [(places[row["iteration"]], y) for row in rows if math.isfinite(y := finite(row, key))]
            control = [(places[row["iteration"]], y) for row in controls if math.isfinite(y := finite(row, key))]
            if own:
                curves.append(Curve(label, *zip(*own, strict=True), style=style, marks=True))
            if control:  # it begins where the start is
                control = [point for point in own if point[0] == places.get(START)] + control
                name = f"SFT, {label}" if len(topic.labels) > 1 else "SFT control"
                curves.append(Curve(name, *zip(*control, strict=True), style=style, dash=1, marks=True))
        if curves:
            alone = f", {curves[0].label}" if len(curves) == 1 < len(topic.labels) else ""
            charts.append(_iteration_chart(topic._replace(title=topic.title + alone), curves, places))
    return charts


def _iteration_chart(topic: Topic, curves: Sequence[Curve], places: Mapping[int, float]) -> Chart:
    """Its ticks name the iterations from the first to the last that a curve has, and at most 12."""
    used = [x for curve in curves for x in curve.x]
    shown = {t: place for t, place in places.items() if min(used) <= place <= max(used)}
    named = list(shown)[:: -(-len(shown) // 12)]
    ticks = {place: iteration_name(t) if t in named else "" for t, place in shown.items()}
    return Chart(f"by_{topic.name}", topic.title, "iteration", topic.unit, curves, topic.note, ticks)


def _places(iterations: Iterable[int]) -> dict[int, float]:
    """{iteration: its place on the axis}, in order: the start comes right before the first iteration."""
    ordered = sorted(set(iterations))
    first = next((t for t in ordered if t > START), 0)
    return {t: max(t, first - 1) for t in ordered}


def _task_topics(rows: Sequence[Row]) -> list[Topic]:
    """Tasks whose numbers are shares stand together, up to six in a chart; each other one has its own."""
    names, unit = task_names(rows), "the task's metric"
    shares = [name for name in names if all(not row.get(name) or 0 <= finite(row, name) <= 1 for row in rows)]
    groups = [shares[i : i + 6] for i in range(0, len(shares), 6)]
    together = [
        Topic(f"tasks_{n}", f"Tasks ({n})" if len(groups) > 1 else "Tasks", unit, "", {name: name for name in group})
        for n, group in enumerate(groups, 1)
    ]
    others = [name for name in names if name not in shares]
    return together + [Topic(f"task_{n}", name, unit, "", {name: name}) for n, name in enumerate(others)]


# --- over optimizer steps ------------------------------------------------------------------------

_REWARDS = {"real_reward": "preferred answers", "generated_reward": "the others"}
_LOG_PROBS = {"real_logp": "preferred answers", "generated_logp": "the others"}
_REWARDS_NOTE = "β · log of how much likelier an answer is than under the reference. Their difference is the margin."
_LOG_PROBS_NOTE = (
    "The loss asks for the difference alone: log p of preferred answers may fall while the margin grows, as long as "
    "that of the others falls faster. Where it falls far, loss.nll_weight holds it."
)
_BACK_AT_0 = "Back at 0 with each new opponent."
_NOT_BACK = ("selfplay.opponent_decay", "selfplay.restart", "loss.reference_decay")  # beside loss.reference_alpha
_LEARNING = (
    Topic("loss", "Training loss", "loss", "Of each step's pairs, before its update."),
    Topic("margin", "Margin", "β · nats an answer", _BACK_AT_0),
    Topic("accuracy", "Human answer preferred", "share of pairs", "Identical answers do not count."),
    Topic("rewards", "Rewards", "β · nats an answer", _REWARDS_NOTE, _REWARDS),
    Topic("logps", "Log-probability of answers", "nats an answer", _LOG_PROBS_NOTE, _LOG_PROBS),
)
_GRADIENT_NORM = Topic("grad_norm", "Gradient norm", "norm")
_IDENTICAL = Topic("identical", "Identical pairs", "share of pairs", "Nothing is learned from these.")
_OPTIMIZATION = (
    _GRADIENT_NORM,
    Topic("learning_rate", "Learning rate", "learning rate"),
    _IDENTICAL,
    Topic("speed", "Speed", "tokens a second", "Of training.", {"tokens_per_s": "tokens a second"}),
)


def learning_curves(run: Run) -> list[Chart]:
    """What self-play learns, step by step; numbers that a user added to `losses.metrics` come last."""
    known = {"phase", "iteration", "step", "skipped"}.union(*(topic.labels for topic in (*_LEARNING, *_OPTIMIZATION)))
    logged = dict.fromkeys(key for row in run.steps.get("train", ())[-50:] for key in row)
    own = [Topic(f"own_{n}", key, "", "", {key: key}) for n, key in enumerate(logged) if key not in known]
    return list(filter(None, (_step_chart(topic, [(run, "")]) for topic in (*_LEARNING, *own))))


def optimization_curves(run: Run) -> list[Chart]:
    """How the optimizer fares, and the losses of SFT: of that before self-play, and of the control."""
    some_identical = any(np.nan_to_num(y).any() for _, y in run.series("train", "identical").values())
    topics = [topic for topic in _OPTIMIZATION if some_identical or topic is not _IDENTICAL]
    return list(filter(None, [*(_step_chart(topic, [(run, "")]) for topic in topics), _sft_chart(run)]))


def _step_chart(topic: Topic, runs: Sequence[tuple[Run, str]]) -> Chart | None:
    """A curve for each (run, name) and key; None where there are no numbers."""
    moved = any(run.config.get("loss.reference_alpha", 1) < 1 or any(map(run.config.get, _NOT_BACK)) for run, _ in runs)
    curves, notes = [], [topic.note] * (topic.note != _BACK_AT_0 or not moved)
    for n, (run, name) in enumerate(runs):
        for place, (key, label) in enumerate(topic.labels.items()):
            found, said = _curve(run.series("train", key), name or label, n + place, n // len(COLORS))
            curves += found
            notes += said
    if not curves:
        return None
    parts = _iteration_parts(runs[0][0]) if len(runs) == 1 else []
    xlabel = "optimizer steps (above: iteration)" if parts else "optimizer steps"
    note, log = _joined_notes(notes), topic is _GRADIENT_NORM and _suits_log_axis(curves)
    ylim = (-0.03, 1.03) if topic.unit.startswith("share") else None
    return Chart(f"steps_{topic.name}", topic.title, xlabel, topic.unit, curves, note, parts=parts, log=log, ylim=ylim)


def _iteration_parts(run: Run) -> list[tuple[float, float, str]]:
    """Where each iteration begins and ends, if there are several; at most eight have a name."""
    series = run.series("train", "loss")
    if len(series) < 2:
        return []
    named = list(series)[:: -(-len(series) // 8)]
    return [(int(steps[0]), int(steps[-1]) + 1, str(t) if t in named else "") for t, (steps, _) in series.items()]


def _sft_chart(run: Run) -> Chart | None:
    before, notes = _curve(run.series("sft", "loss"), "SFT before self-play", 0)
    control, more = _curve(run.series("control", "loss"), "SFT control", 1)
    curves, both = before + control, bool(before and control)
    if not curves:
        return None
    about = "On human answers alone; the control takes as many steps as self-play." if control else ""
    xlabel = "optimizer steps since self-play began" if both else "optimizer steps"
    note, log = _joined_notes([about, *notes, *more]), _suits_log_axis(curves)
    return Chart("steps_sft", "SFT loss", xlabel, "nats a token", curves, note, zero=both, log=log)


def _joined_notes(notes: Iterable[str]) -> str:
    return " ".join(dict.fromkeys(filter(None, notes)))


def _suits_log_axis(curves: Sequence[Curve]) -> bool:
    values = np.concatenate([curve.y for curve in curves])
    known = values[np.isfinite(values)]
    return bool(known.min() > 0 and known.max() > 30 * known.min())


def _curve(
    series: Mapping[int, tuple[np.ndarray, np.ndarray]], label: str, style: int, dash: int = 0
) -> tuple[list[Curve], list[str]]:
    """A curve with a gap between iterations, averaged where it has too many points, and notes; none without numbers."""
    count = sum(len(values) for _, values in series.values())
    missing = sum(int(np.isnan(values).sum()) for _, values in series.values())
    if missing == count:
        return [], []
    size = -(-count // MAX_POINTS)
    xs, ys = [], []
    for steps, values in series.values():
        xs += [mean_of_neighbors(steps.astype(float), size), [np.nan]]
        ys += [mean_of_neighbors(values, size), [np.nan]]
    notes = [f"Each point is the mean of {size} steps."] if size > 1 else []
    if missing:
        notes.append(f"{missing} of {count} steps have no finite value, and are left out.")
    return [Curve(label, np.concatenate(xs[:-1]), np.concatenate(ys[:-1]), style, dash)], notes


def mean_of_neighbors(values: np.ndarray, size: int) -> np.ndarray:
    """Means over `size` neighbors, of the values that are finite; NaN where none is."""
    padded = np.append(values, np.full(-len(values) % size, np.nan)).reshape(-1, size)
    known = np.isfinite(padded)
    sums, counts = np.where(known, padded, 0).sum(1), known.sum(1)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


# --- histograms ----------------------------------------------------------------------------------


def answer_lengths(run: Run) -> list[Chart]:
    """Tokens of human and generated answers: a chart for each iteration, all with the same axes."""
    lengths = {t: run.lengths[t] for t in _evenly_chosen(list(run.lengths))}
    if not lengths:
        return []
    edges = _bin_edges(np.concatenate([tokens for both in lengths.values() for tokens in both]), whole=True)
    shares = {t: [_shares(tokens, edges) for tokens in both] for t, both in lengths.items()}
    top = 1.05 * max(float(share.max()) for both in shares.values() for share in both)
    charts = []
    for t, (real, generated) in shares.items():
        curves = [Curve("human", edges, real, 7, filled=True), Curve(_answerer(run, t), edges, generated, 0)]
        note = f"Means: {lengths[t][0].mean():.1f} and {lengths[t][1].mean():.1f} tokens."
        title, unit = f"Lengths, pairs of iteration {t}", "share of answers"
        charts.append(Chart(f"lengths_{t}", title, "tokens", unit, curves, note, ylim=(0, top)))
    return charts


def _answerer(run: Run, t: int) -> str:
    """Who gave the answers of an iteration's pairs: the model before it, unless pairs were given."""
    if f"given pairs {t}" in run.record.get("fingerprints", {}):
        return "given"
    first = t == run.config.get("selfplay.start", 0)
    return f"generated, by {'the start' if first else f'iteration {t - 1}'}"


def held_out_margins(run: Run) -> list[Chart]:
    """The margins of held-out pairs, all iterations in one chart."""
    unlike = {t: margins[margins != 0] for t, margins in run.margins.items()}
    chosen = _evenly_chosen([t for t, margins in unlike.items() if len(margins)])
    if not chosen:
        return []
    edges = _bin_edges(np.concatenate([unlike[t] for t in chosen]), whole=False)
    curves = [Curve(f"iteration {t}", edges, _shares(unlike[t], edges), n, n % 4) for n, t in enumerate(chosen)]
    above = ", ".join(f"{(unlike[t] > 0).mean():.0%}" for t in chosen)
    identical = [1 - len(unlike[t]) / len(run.margins[t]) for t in chosen]
    notes = [f"Each against the opponent of its iteration. Above 0: {above}."]
    notes += [f"Identical pairs are left out: {', '.join(f'{share:.0%}' for share in identical)}."] * any(identical)
    note = " ".join([*notes, "The outermost bins hold what lies beyond."])
    title, xlabel, unit = "Margins of held-out pairs", "margin, β · nats an answer", "share of these pairs"
    return [Chart("margins", title, xlabel, unit, curves, note, zero=True, whole=False)]


def _evenly_chosen(iterations: Sequence[int]) -> list[int]:
    """Of more than six, the first, the last, and four between."""
    places = np.linspace(0, len(iterations) - 1, min(len(iterations), 6)).round().astype(int)
    return [iterations[place] for place in places]


def _bin_edges(values: np.ndarray, whole: bool) -> np.ndarray:
    """Edges of bins with 99% of the values between them; `whole` numbers are in the middle of theirs."""
    low, high = np.percentile(values, [0 if whole else 0.5, 99.5])
    if whole:
        width = max(1, math.ceil((high - low + 1) / _BINS))
        return np.arange(low, high + width + 1, width) - 0.5
    return np.linspace(low, high, _BINS + 1) if high > low else np.array([low - 0.5, low + 0.5])


def _shares(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """The share of values in each bin; the outer ones hold what lies beyond."""
    return np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0] / max(len(values), 1)


# --- several runs --------------------------------------------------------------------------------


def compared_iterations(groups: Sequence[SeedGroup]) -> list[Chart]:
    """A chart for each number, and in it a curve for each group: the mean of its runs, with their range."""
    rows = [row for group in groups for run in group.runs for row in run.rows]
    places = _places(row["iteration"] for row in rows)
    charts = []
    for topic in (part for whole in (*_ITERATIONS, *_task_topics(rows)) for part in whole.split()):
        (key,) = topic.labels
        curves = [curve for n, group in enumerate(groups) if (curve := _mean_curve(group, key, places, n))]
        if curves:
            charts.append(_iteration_chart(topic, curves, places))
    return charts


def _mean_curve(group: SeedGroup, key: str, places: Mapping[int, float], style: int) -> Curve | None:
    found = [(place, values) for t, place in places.items() if len(values := group.values(t, key))]
    if not found:
        return None
    x, means, low, high = zip(*((place, v.mean(), v.min(), v.max()) for place, v in found), strict=True)
    band = (low, high) if len(group.runs) > 1 else None
    return Curve(group.name, x, means, style, style // len(COLORS), marks=True, band=band)


def compared_learning(groups: Sequence[SeedGroup]) -> list[Chart]:
    """Learning curves in the same charts; of a group those of its first run."""
    runs = [(group.runs[0], group.name) for group in groups]
    charts = (_step_chart(part, runs) for topic in _LEARNING for part in topic.split())
    return list(filter(None, charts))
