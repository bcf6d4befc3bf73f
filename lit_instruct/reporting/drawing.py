"""Charts drawn with Matplotlib, small enough to be read on a phone."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import Formatter, MaxNLocator
from PIL import Image

from lit_instruct.reporting.charts import BarChart, Chart, LineChart, moving_mean, window_of
from lit_instruct.reporting.numbers import number

WIDTH, HEIGHT = 4.4, 2.9  # inches; at 11 points a phone shows letters of 12 pixels
DPI = 180
COLORS = 64


class Theme(NamedTuple):
    """Colours for a background.

    Attributes:
        paper: behind everything.
        ink: text and axes.
        faint: grid and reference lines.
        runs: of runs and models, one after another (Okabe and Ito's, which colour-blind readers can tell apart).
    """

    paper: str
    ink: str
    faint: str
    runs: tuple[str, ...]


LIGHT = Theme(
    "#ffffff",
    "#333333",
    "#d8d8d8",
    ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#000000"),
)
DARK = Theme(
    "#1b1d21",
    "#d0d0d0",
    "#454850",
    ("#56b4e9", "#f0703a", "#2fc49a", "#dd9cc2", "#e6b000", "#3f8fd2", "#a0a0a0", "#f7f2c0"),
)

_DASHES = ("-", (0, (4, 1.5)))  # from the ninth run on, colours come again with dashes
_MARKERS = "osD^vP*X"


def draw(chart: Chart, theme: Theme) -> Figure:
    """Draw a chart.

    Args:
        chart: its data.
        theme: its colours.

    Returns:
        The figure. It is not pyplot's, which would keep figures open and choose a window system.
    """
    if isinstance(chart, LineChart):
        entries = _legend(chart, theme)
        height = HEIGHT + 0.22 * (math.ceil(len(entries) / _columns(entries)) - 1)
    else:
        height = 0.9 + 0.36 * len(chart.bars)
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor=theme.paper, layout="constrained")
    axes = figure.add_subplot(facecolor=theme.paper)
    if isinstance(chart, LineChart):
        _draw_lines(axes, chart, theme)
    else:
        _draw_bars(axes, chart, theme)
    _style(axes, theme)
    return figure


def as_png(chart: Chart, theme: Theme) -> bytes:
    """Draw a chart as a PNG file.

    Args:
        chart: its data.
        theme: its colours.

    Returns:
        The file; a third as large as with all colours.
    """
    canvas = FigureCanvasAgg(draw(chart, theme))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # drawn as a box
        canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(COLORS)
    buffer = io.BytesIO()
    picture.save(buffer, format="png")
    return buffer.getvalue()


def _draw_lines(axes: Axes, chart: LineChart, theme: Theme) -> None:
    for line in chart.lines:
        color, dashes = _look(line.run, theme)
        marker = _MARKERS[line.run % len(_MARKERS)] if line.marked or len(line.x) == 1 else ""
        window = window_of(line, path=chart.path)
        if window == 1:
            axes.plot(line.x, line.y, color=color, linestyle=dashes, linewidth=1.8, marker=marker, markersize=5)
            continue
        thin: dict[str, Any] = {"linestyle": "", "marker": ".", "alpha": 0.5} if chart.path else {"alpha": 0.35}
        axes.plot(line.x, line.y, color=color, linewidth=0.8, **thin)
        x = moving_mean(line.x, window) if chart.path else line.x
        axes.plot(x, moving_mean(line.y, window), color=color, linestyle=dashes, linewidth=2.0)
    if chart.diagonal:
        axes.axline((0.5, 0.5), slope=1, color=theme.ink, linewidth=1, linestyle=":")
    axes.set(xlabel=chart.x_label, ylabel=chart.y_label)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=not chart.path and not chart.diagonal))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.xaxis.set_major_formatter(TickNumbers(percent=chart.diagonal))
    axes.yaxis.set_major_formatter(TickNumbers(percent=chart.percent))
    axes.grid(color=theme.faint, linewidth=0.6)
    _draw_legend(axes, _legend(chart, theme), theme)


def _draw_bars(axes: Axes, chart: BarChart, theme: Theme) -> None:
    places = range(len(chart.bars))
    for place, bar in zip(places, chart.bars, strict=True):
        color, _ = _look(bar.run, theme)
        axes.barh(place, bar.value, height=0.62, color=color, alpha=0.85)
        if bar.low is not None and bar.high is not None:
            axes.plot([bar.low, bar.high], [place, place], color=theme.ink, linewidth=1.6, marker="|", markersize=7)
        end = max(bar.value, bar.high if bar.high is not None else bar.value, 0.0)
        text = number(bar.value, percent=chart.percent)
        axes.annotate(text, (end, place), (5, 0), textcoords="offset points", va="center", color=theme.ink, fontsize=10)
    if chart.reference is not None:
        axes.axvline(chart.reference, color=theme.ink, linewidth=1, linestyle=":")
    axes.set_yticks(list(places), [_shortened(bar.label) for bar in chart.bars], parse_math=False)
    axes.invert_yaxis()
    axes.margins(x=0.18)
    axes.set_xlabel(chart.x_label)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.xaxis.set_major_formatter(TickNumbers(percent=chart.percent))
    axes.grid(axis="x", color=theme.faint, linewidth=0.6)


def _legend(chart: LineChart, theme: Theme) -> list[tuple[str, Line2D]]:
    """Names of runs, if asked for; and what marks mean, if there are lines without."""
    entries = []
    if chart.named:
        for run, name in {line.run: line.label for line in chart.lines}.items():
            color, dashes = _look(run, theme)
            entries.append((_shortened(name), Line2D([], [], color=color, linestyle=dashes, linewidth=2.4)))
    if len({line.marked for line in chart.lines}) > 1:
        marker = _MARKERS[next(line.run for line in chart.lines if line.marked) % len(_MARKERS)]
        entries.append((chart.marks, Line2D([], [], color=theme.ink, marker=marker, markersize=5, linewidth=1.4)))
    return entries


def _columns(entries: Sequence[tuple[str, Line2D]]) -> int:
    longest = max((len(name) for name, _ in entries), default=0)
    return 3 if longest <= 10 else 2 if longest <= 18 else 1


def _draw_legend(axes: Axes, entries: Sequence[tuple[str, Line2D]], theme: Theme) -> None:
    if not entries:
        return
    legend = axes.legend(
        [handle for _, handle in entries],
        ["." for _ in entries],  # names are put in afterwards: older Matplotlibs leave out those that begin with _
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        ncols=_columns(entries),
        frameon=False,
        fontsize=10,
        handlelength=1.6,
        borderaxespad=0.2,
    )
    for text, (name, _) in zip(legend.get_texts(), entries, strict=True):
        text.set_parse_math(False)
        text.set_text(name)
        text.set_color(theme.ink)


def _style(axes: Axes, theme: Theme) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(theme.faint)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.ink, labelsize=10, length=0)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(theme.ink)
        label.set_fontsize(11)


class TickNumbers(Formatter):
    """Numbers at the ticks of an axis, all with as many decimals as the steps between them need."""

    def __init__(self, *, percent: bool):
        """Set the unit.

        Args:
            percent: numbers are shares.
        """
        self.factor, self.unit = (100, "\u00a0%") if percent else (1, "")

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        """Write all of them."""
        scaled = [self.factor * float(value) for value in values]
        step = min((b - a for a, b in pairwise(scaled)), default=1.0)
        if max(map(abs, scaled), default=0.0) >= 1e5 or step < 1e-4:
            return [number(value) + self.unit for value in scaled]
        decimals = next((places for places in range(5) if abs(round(step, places) - step) < 1e-6 * step), 5)
        return [f"{value:,.{decimals}f}".replace("-", "−") + self.unit for value in scaled]

    def __call__(self, value: float, pos: int | None = None) -> str:
        """Write a single one."""
        return self.format_ticks([value])[0]


def _look(run: int, theme: Theme) -> tuple[str, Any]:
    """Colour and dashes of a run."""
    return theme.runs[run % len(theme.runs)], _DASHES[run // len(theme.runs) % len(_DASHES)]


def _shortened(name: str) -> str:
    return name if len(name) <= 22 else f"…{name[-21:]}"
