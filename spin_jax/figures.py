"""What is drawn: panels of curves, as inline SVG for a page and as PNG for papers. matplotlib draws.

In an SVG for a page, text and axes have the page's text color, and curves the colors --c0 … --c7 of its
style sheet: both change with the page between light and dark.
"""

import dataclasses
import html
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Apart for the color-blind, and 3:1 on white. The first two, dark blue and orange, are apart in gray too.
PALETTE = ("#0b4f8f", "#d9700d", "#00775a", "#a03a80", "#7d6000", "#2b87bd", "#b3202c", "#5c6570")
DASHES = ((), (5, 2), (1.5, 1.5), (6, 2, 1.5, 2))
_MARKERS = "osD^vPX*"
_SIZE = 3.8, 2.75  # inches of a panel
_DPI = 300  # of a PNG
_COLUMNS = 3  # of `grid`


@dataclasses.dataclass(frozen=True)
class Curve:
    """A line, or the outline of a histogram: `x` are then edges, one more than `y`."""

    label: str
    x: Sequence[float] | np.ndarray
    y: Sequence[float] | np.ndarray  # NaN breaks the line
    color: int = 0  # of PALETTE, round and round
    dash: int = 0  # of DASHES, round and round
    marks: bool = False
    filled: bool = False
    band: tuple[Sequence[float] | np.ndarray, Sequence[float] | np.ndarray] | None = None  # lowest, highest

    @property
    def edges(self) -> bool:
        return len(self.x) == len(self.y) + 1


@dataclasses.dataclass(frozen=True)
class Panel:
    """A figure of one pair of axes."""

    name: str  # of its file, and of what is in its SVG: [a-z0-9_]+
    title: str
    xlabel: str
    ylabel: str
    curves: Sequence[Curve]
    note: str = ""  # what the reader should know; beside the figure, not in it
    ticks: Mapping[float, str] | None = None  # of the x axis
    parts: Sequence[tuple[float, float, str]] = ()  # of the x axis: begin, end, name
    log: bool = False
    zero: bool = False  # a line where x is 0
    whole: bool = True  # only whole numbers on the x axis
    ylim: tuple[float, float] | None = None

    def text(self) -> str:
        """What it shows, for who cannot see it."""
        return f"{self.title}: {self.ylabel} over {self.xlabel}. {'; '.join(map(_told, self.curves))}."


def _told(curve: Curve) -> str:
    values = np.asarray(curve.y, float)
    known = values[np.isfinite(values)]
    if curve.edges:
        peak = int(np.nanargmax(values))
        return f"{curve.label}: most between {curve.x[peak]:.4g} and {curve.x[peak + 1]:.4g}"
    return f"{curve.label}: from {known[0]:.4g} to {known[-1]:.4g}" if len(known) else curve.label


# --- files ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Ink:
    text: str
    grid: str
    curves: Sequence[str]


_PRINT = _Ink("#1b1f23", "#d4d8dc", PALETTE)
# Stand-ins, in whose place a style sheet's colors come.
_PAGE = _Ink("#0a0b0c", "#0a0b0d", tuple(f"#0a0c{n:02x}" for n in range(len(PALETTE))))
_STYLE_SHEET = {
    _PAGE.text: "currentColor",
    _PAGE.grid: "var(--grid)",
    **{color: f"var(--c{n})" for n, color in enumerate(_PAGE.curves)},
}


def svg(panel: Panel) -> str:
    """The panel as an <svg> to stand in a page; its legend and title are left to the page.

    The same panel gives the same text. No id in it is that of another panel's.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": panel.name}):
        figure = Figure(figsize=_SIZE)
        axis = figure.subplots()
        _draw(axis, panel, _PAGE)
        _fit(axis, panel)
        for ground in (figure.patch, axis.patch):
            ground.set_visible(False)
        buffer = io.StringIO()
        nameless = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(buffer, metadata=nameless)
    text = buffer.getvalue()
    view = re.search(r'viewBox="[^"]*"', text)
    assert view
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r">\s+<", "><", text[text.index("<g ") :])
    used = set(re.findall(r'(?:href="#|url\(#)(\w+)', text))
    text = re.sub(r"<[^>]*>", lambda tag: _in_page(tag[0], panel.name, used), text)
    return f'<svg {view[0]} role="img" aria-label="{html.escape(panel.text())}">{text}'


def _in_page(tag: str, name: str, used: set[str]) -> str:
    """A tag of matplotlib's with ids of the panel's own, the page's colors, and two decimals of six."""
    tag = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", tag)
    tag = re.sub(r'xlink:href="#', f'href="#{name}-', tag).replace("url(#", f"url(#{name}-")
    for stand_in, color in _STYLE_SHEET.items():
        tag = tag.replace(stand_in, color)
    return re.sub(r"-?\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", tag)


def png(panel: Panel) -> bytes:
    """The panel on white, with title and legend, for print: 300 dpi."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, layout="constrained")
    axis = figure.subplots()
    _draw(axis, panel, _PRINT)
    axis.set_title(_plain(panel.title), fontsize=11, pad=18 if panel.parts else 6)
    if len(panel.curves) > 1:
        rows = -(-len(panel.curves) // 2)
        figure.set_size_inches(_SIZE[0], _SIZE[1] + 0.2 * rows)
        handles, labels = _legend(axis)
        figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    return _png(figure, _DPI)


def grid(panels: Sequence[Panel]) -> bytes:
    """A PNG of all panels side by side."""
    from matplotlib.figure import Figure

    across, down = min(max(len(panels), 1), _COLUMNS), -(-max(len(panels), 1) // _COLUMNS)
    figure = Figure(figsize=(_SIZE[0] * across, 1.2 * _SIZE[1] * down), layout="constrained")
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    for axis, panel in zip(axes, panels, strict=False):
        _draw(axis, panel, _PRINT)
        axis.set_title(_plain(panel.title), fontsize=11)
        axis.legend(*_legend(axis), fontsize=8, frameon=False)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    return _png(figure, 150)


def _png(figure: Any, dpi: int) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


# --- drawing -------------------------------------------------------------------------------------


def _draw(axis: Any, panel: Panel, ink: _Ink) -> None:
    for curve in panel.curves:
        _draw_curve(axis, curve, ink)
    axis.set_xlabel(_plain(panel.xlabel), fontsize=10, color=ink.text)
    axis.set_ylabel(_plain(panel.ylabel), fontsize=10, color=ink.text)
    axis.tick_params(labelsize=9.5, colors=ink.text, length=3)
    axis.grid(color=ink.grid, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(ink.text)
    if panel.zero:
        axis.axvline(0, color=ink.text, linewidth=0.8)
    if panel.ticks is not None:
        axis.set_xticks(list(panel.ticks), list(panel.ticks.values()))
        axis.set_xlim(min(panel.ticks) - 0.2, max(panel.ticks) + 0.2)
    else:
        axis.locator_params(axis="x", nbins=6, integer=panel.whole)
    if panel.log:
        axis.set_yscale("log")
    else:
        axis.locator_params(axis="y", nbins=6)
    _number(axis.yaxis)
    if panel.ticks is None:
        _number(axis.xaxis)
    if panel.ylim:
        axis.set_ylim(*panel.ylim)
    for begin, end, name in panel.parts:
        if begin > panel.parts[0][0]:
            axis.axvline(begin, color=ink.text, linewidth=0.8, dashes=(2, 2), alpha=0.6)
        place = {"transform": axis.get_xaxis_transform(), "ha": "center", "va": "bottom"}
        axis.text((begin + end) / 2, 1.01, _plain(name), fontsize=9, color=ink.text, **place)


def _draw_curve(axis: Any, curve: Curve, ink: _Ink) -> None:
    color = ink.curves[curve.color % len(ink.curves)]
    label = f"curve {curve.label}"  # matplotlib leaves out of a legend what begins with _
    if curve.edges:
        if curve.filled:
            axis.stairs(curve.y, curve.x, color=color, fill=True, alpha=0.35, linewidth=0, label=label)
        else:
            artist = axis.stairs(curve.y, curve.x, color=color, linewidth=1.6, label=label)
            artist.set_linestyle((0, DASHES[curve.dash % len(DASHES)] or None) if curve.dash else "-")
        return
    if curve.band:
        axis.fill_between(curve.x, *curve.band, color=color, alpha=0.2, linewidth=0)
    marks = {"marker": _MARKERS[curve.color % len(_MARKERS)], "markersize": 4.5} if curve.marks else {}
    (line,) = axis.plot(curve.x, curve.y, color=color, linewidth=1.6, label=label, **marks)
    line.set_dashes(DASHES[curve.dash % len(DASHES)])


def _fit(axis: Any, panel: Panel) -> None:
    """Leaves the room that labels take around the axes, in half the time of matplotlib's own layouts."""
    low, high = sorted(axis.get_ylim())
    ticks = [tick for tick in axis.get_yticks() if low <= tick <= high]
    longest = max(map(len, axis.yaxis.get_major_formatter().format_ticks(ticks)), default=0)
    left, right, bottom, top = 0.36 + 0.08 * longest, 0.2, 0.46, 0.24 if panel.parts else 0.1  # inches
    width, height = _SIZE
    axis.set_position(
        (left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height)
    )


def _legend(axis: Any) -> tuple[list[Any], list[str]]:
    handles, labels = axis.get_legend_handles_labels()
    return handles, [_plain(label.removeprefix("curve ")) for label in labels]


def _number(axis: Any) -> None:
    """Numbers at an axis' ticks, of as many decimals each: 0.80, 0.85; 12k; 5e−07."""
    from matplotlib.ticker import FixedLocator, FuncFormatter

    class Numbers(FuncFormatter):
        def format_ticks(self, values: Sequence[float]) -> list[str]:
            texts = [self(value) for value in values]
            if max(map(abs, values), default=0) >= 10_000:
                return [f"{value / 1000:g}k".replace("-", "−") if value else "0" for value in values]
            if isinstance(axis.get_major_locator(), FixedLocator) or axis.get_scale() == "log":
                return texts
            decimals = max((len(text.partition(".")[2]) for text in texts), default=0)
            plain = all(re.fullmatch(r"−?[\d.]+", text) for text in texts)
            return [f"{value:.{decimals}f}".replace("-", "−") for value in values] if plain else texts

    def text(value: float, position: int | None = None) -> str:
        value = 0.0 if abs(value) < 1e-12 else value
        return f"{value:g}".replace("-", "−")

    axis.set_major_formatter(Numbers(text))


def _plain(text: str) -> str:
    """Text from data, for matplotlib, to whom $ begins a formula and half a surrogate pair is no text."""
    return text.encode(errors="replace").decode().replace("$", r"\$")
