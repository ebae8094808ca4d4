"""Draws charts with matplotlib: as SVG for the page, as PNG for a paper, and many in one PNG.

There is one style, for a white ground: templates/charts.mplstyle. Where the reader wants a dark page, its style sheet
inverts the SVG.
"""

import base64
import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple

import numpy as np

from spin_jax.runtime.secrets import redacted

# The color-blind can tell these apart, and each has a contrast of 3:1 or more, on white and, inverted, on the
# page's dark ground. The first two, dark blue and orange, differ in gray as well.
COLORS = ("#0b4f8f", "#d9700d", "#00775a", "#a03a80", "#7d6000", "#2b87bd", "#b3202c", "#5c6570")
DASHES = ((), (5, 2), (1.5, 1.5), (6, 2, 1.5, 2))
_MARKERS = "osD^vPX*"
_SIZE = 3.8, 2.75  # inches of a chart
_INK = "#1b1f23"


class Curve(NamedTuple):
    """A line, or the outline of a histogram: `x` then holds the edges of its bins, one more than `y`."""

    label: str
    x: Sequence[float] | np.ndarray
    y: Sequence[float] | np.ndarray  # NaN interrupts the line
    style: int = 0  # the index of its color and marker; after the last come the first again
    dash: int = 0  # the index of its dashes, likewise
    marks: bool = False
    filled: bool = False
    band: tuple[Sequence[float] | np.ndarray, Sequence[float] | np.ndarray] | None = None  # lowest, highest

    @property
    def is_histogram(self) -> bool:
        return len(self.x) == len(self.y) + 1

    @property
    def color(self) -> str:
        return COLORS[self.style % len(COLORS)]

    @property
    def dashes(self) -> tuple[float, ...]:
        return DASHES[self.dash % len(DASHES)]

    def description(self) -> str:
        values = np.asarray(self.y, float)
        known = values[np.isfinite(values)]
        if not len(known):
            return f"{self.label}: no numbers"
        if self.is_histogram:
            peak = int(np.nanargmax(values))
            return f"{self.label}: most between {self.x[peak]:.4g} and {self.x[peak + 1]:.4g}"
        return f"{self.label}: from {known[0]:.4g} to {known[-1]:.4g}"


class Chart(NamedTuple):
    """Curves on one pair of axes."""

    name: str  # of its PNG file: [a-z0-9_]+
    title: str
    xlabel: str
    ylabel: str
    curves: Sequence[Curve]
    note: str = ""  # what the reader should know; it stands beside the chart, not in it
    ticks: Mapping[float, str] | None = None  # of the x axis
    parts: Sequence[tuple[float, float, str]] = ()  # of the x axis: begin, end, name
    log: bool = False  # a logarithmic y axis
    zero: bool = False  # a line at x = 0
    whole: bool = True  # only whole numbers on the x axis
    ylim: tuple[float, float] | None = None

    def description(self) -> str:
        """The chart in words, for readers who cannot see it."""
        curves = "; ".join(curve.description() for curve in self.curves)
        return f"{self.title}: {self.ylabel} over {self.xlabel}. {curves}."


def svg_url(chart: Chart) -> str:
    """The chart as a data: URL of an SVG image, without a ground, title and legend: the page adds these."""
    with _new_figure(1) as (figure, [axes]):
        _draw(axes, chart)
        image = _saved(figure, "svg", transparent=True, metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(image).decode()}"


def png(chart: Chart) -> bytes:
    """The chart on white with its title and legend, at 300 dots per inch."""
    with _new_figure(1) as (figure, [axes]):
        lines, labels = _draw(axes, chart)
        axes.set_title(_plain(chart.title), pad=18 if chart.parts else 6)
        if len(lines) > 1:
            figure.set_figheight(_SIZE[1] + 0.2 * -(-len(lines) // 2))
            figure.legend(lines, labels, loc="outside lower center", ncols=2)
        return _saved(figure, "png", dpi=300)


def png_grid(charts: Sequence[Chart]) -> bytes:
    """One PNG of all charts, in up to three columns."""
    with _new_figure(max(len(charts), 1), columns=3) as (figure, grid):
        figure.set_figheight(1.2 * figure.get_figheight())  # room for titles
        for axes, chart in zip(grid, charts, strict=False):
            axes.legend(*_draw(axes, chart), fontsize=8)
            axes.set_title(_plain(chart.title))
        for axes in grid[len(charts) :]:
            axes.set_visible(False)
        return _saved(figure, "png", dpi=150)


@contextlib.contextmanager
def _new_figure(count: int, columns: int = 1) -> Iterator[tuple[Any, list[Any]]]:
    """A figure in the style of all charts, and its `count` pairs of axes or more, row by row."""
    import matplotlib
    from matplotlib.figure import Figure

    across, down = min(count, columns), -(-count // columns)
    style = resources.files("spin_jax.report") / "templates" / "charts.mplstyle"
    with resources.as_file(style) as path, matplotlib.rc_context(fname=path):
        figure = Figure(figsize=(_SIZE[0] * across, _SIZE[1] * down))
        yield figure, list(figure.subplots(down, across, squeeze=False).flat)


def _saved(figure: Any, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, **options)
    return buffer.getvalue()


def _draw(axes: Any, chart: Chart) -> tuple[list[Any], list[str]]:
    """Draws the curves and the axes; returns the lines and labels of a legend."""
    lines = [_draw_curve(axes, curve) for curve in chart.curves]
    axes.set(xlabel=_plain(chart.xlabel), ylabel=_plain(chart.ylabel))
    if chart.zero:
        axes.axvline(0, color=_INK, linewidth=0.8)
    if chart.ticks is not None:
        axes.set_xticks(list(chart.ticks), list(chart.ticks.values()))
        axes.set_xlim(min(chart.ticks) - 0.2, max(chart.ticks) + 0.2)
    else:
        axes.locator_params(axis="x", nbins=6, integer=chart.whole)
    if chart.log:
        axes.set_yscale("log")
    else:
        axes.locator_params(axis="y", nbins=6)
    axes.set_ylim(chart.ylim)
    axes.yaxis.get_offset_text().set(x=0, ha="right")  # a power of ten stands left of the names of parts
    for begin, end, name in chart.parts:
        if begin > chart.parts[0][0]:
            axes.axvline(begin, color=_INK, linewidth=0.8, dashes=(2, 2), alpha=0.6)
        place = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "bottom"}
        axes.text((begin + end) / 2, 1.01, _plain(name), fontsize=9, **place)
    return lines, [_plain(curve.label) for curve in chart.curves]


def _draw_curve(axes: Any, curve: Curve) -> Any:
    if curve.is_histogram and curve.filled:
        return axes.stairs(curve.y, curve.x, color=curve.color, fill=True, alpha=0.35, linewidth=0)
    if curve.is_histogram:
        linestyle = (0, curve.dashes) if curve.dashes else "-"
        return axes.stairs(curve.y, curve.x, color=curve.color, linestyle=linestyle, linewidth=1.6)
    if curve.band:
        axes.fill_between(curve.x, *curve.band, color=curve.color, alpha=0.2, linewidth=0)
    marker = _MARKERS[curve.style % len(_MARKERS)] if curve.marks else ""
    return axes.plot(curve.x, curve.y, color=curve.color, marker=marker, dashes=curve.dashes)[0]


def _plain(text: str) -> str:
    """Text from data as matplotlib and XML take it: no control characters, no $ (it begins a formula)."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in redacted(text))
    return shown.replace("$", r"\$")
