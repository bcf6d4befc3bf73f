"""Figures as data: what is drawn, before anything is drawn. Tests look here, readers of alt texts too."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from lit_instruct.reporting.numbers import number

SMOOTH_FROM, SMOOTH_PATH_FROM = 60, 10
"""A curve with so many points is drawn thin, with its moving mean over it; a path, which goes to and fro, earlier."""


class Line(NamedTuple):
    """One curve.

    Attributes:
        run: place of the run among those of the report, for the colour.
        label: name of the run.
        x: finite, ascending unless the chart is a path.
        y: finite, as many.
        marked: drawn with marks; LineChart.marks says what that means.
    """

    run: int
    label: str
    x: list[float]
    y: list[float]
    marked: bool = False


class LineChart(NamedTuple):
    """Curves over one axis.

    Attributes:
        slug: names the file.
        title: above the figure.
        caption: how to read it.
        x_label: with the unit.
        y_label: with the unit.
        lines: at least one, none of them empty.
        percent: y is a share.
        path: x is measured too, points are joined in the order of time.
        diagonal: draw y = x.
        marks: what lines with marks are.
        named: say which line is whose: there are several runs, even if only one of them is in this chart.
    """

    slug: str
    title: str
    caption: str
    x_label: str
    y_label: str
    lines: list[Line]
    percent: bool = False
    path: bool = False
    diagonal: bool = False
    marks: str = "held out"
    named: bool = False


class Bar(NamedTuple):
    """One number of one model.

    Attributes:
        run: place of the model, for the colour.
        label: its name.
        value: finite.
        low: lower end of the interval; None if there is none.
        high: upper end.
    """

    run: int
    label: str
    value: float
    low: float | None = None
    high: float | None = None


class BarChart(NamedTuple):
    """Numbers side by side, a bar each.

    Attributes:
        slug: names the file.
        title: above the figure.
        caption: how to read it.
        x_label: with the unit.
        bars: from top to bottom, at least one.
        percent: values are shares.
        reference: value to compare with, drawn as a line; None: none.
    """

    slug: str
    title: str
    caption: str
    x_label: str
    bars: list[Bar]
    percent: bool = False
    reference: float | None = None


Chart = LineChart | BarChart


class Points(NamedTuple):
    """What a line is made of.

    Attributes:
        run: place of the run.
        label: its name.
        points: x and y, maybe none, maybe not finite.
        marked: as in ``Line``.
    """

    run: int
    label: str
    points: Iterable[tuple[float, float]]
    marked: bool = False


def with_lines(chart: LineChart, given: Sequence[Points]) -> list[LineChart]:
    """Fill a chart; its caption then says what was done to the points.

    Args:
        chart: without lines.
        given: of all runs, whether they have points or not.

    Returns:
        The chart with a line for each of those that have finite points; nothing if none has.
    """
    lines, left_out = [], 0
    for one in given:
        points = list(one.points)
        finite = [(float(x), float(y)) for x, y in points if math.isfinite(x) and math.isfinite(y)]
        left_out += len(points) - len(finite)
        if finite:
            lines.append(Line(one.run, one.label, [x for x, _ in finite], [y for _, y in finite], one.marked))
    if not lines:
        return []
    caption = chart.caption
    if any(window_of(line, path=chart.path) > 1 for line in lines):
        caption += " The bold line is a moving mean."
    if left_out:
        caption += f" Points that are not finite are left out: {left_out}."
    return [chart._replace(lines=lines, caption=caption, named=len({one.run for one in given}) > 1)]


def moving_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean over a window around each value; at the ends over the part of it that there is, to both sides alike.

    Args:
        values: n numbers.
        window: odd.

    Returns:
        n numbers.
    """
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=float))])
    places = np.arange(len(values))
    reach = np.minimum(np.minimum(places, places[::-1]), window // 2)
    return ((sums[places + reach + 1] - sums[places - reach]) / (2 * reach + 1)).tolist()


def window_of(line: Line, *, path: bool) -> int:
    """Over how many points the moving mean of a line goes.

    Args:
        line: that is drawn.
        path: both of its coordinates are measured.

    Returns:
        An odd number; 1: the line is drawn as it is.
    """
    few, share = (SMOOTH_PATH_FROM, 16) if path else (SMOOTH_FROM, 40)
    return 1 if line.marked or len(line.x) < few else 2 * (len(line.x) // share) + 3


def alt_text(chart: Chart) -> str:
    """The chart in words and numbers, for those who do not see it.

    Args:
        chart: the data.

    Returns:
        One or more sentences.
    """
    if isinstance(chart, BarChart):
        return f"{chart.title}. " + " ".join(_bar_in_words(bar, percent=chart.percent) for bar in chart.bars)
    say = _path_in_words if chart.path else _line_in_words
    lines = [
        f"{line.label}{f' ({chart.marks})' if line.marked else ''}: {say(line, percent=chart.percent)}."
        for line in chart.lines
    ]
    return f"{chart.title}: {chart.y_label} against {chart.x_label}. " + " ".join(lines)


def _line_in_words(line: Line, *, percent: bool) -> str:
    y = [number(value, percent=percent) for value in line.y]
    if len(y) == 1:
        return f"{y[0]} at {number(line.x[0])}"
    low, high = (line.y.index(extreme(line.y)) for extreme in (min, max))
    return (
        f"from {y[0]} at {number(line.x[0])} to {y[-1]} at {number(line.x[-1])}, lowest {y[low]} at "
        f"{number(line.x[low])}, highest {y[high]} at {number(line.x[high])}"
    )


def _path_in_words(line: Line, *, percent: bool) -> str:
    points = [f"({number(x)}, {number(y, percent=percent)})" for x, y in zip(line.x, line.y, strict=True)]
    best = points[line.y.index(max(line.y))]
    return points[0] if len(points) == 1 else f"from {points[0]} to {points[-1]}, highest {best}"


def _bar_in_words(bar: Bar, *, percent: bool) -> str:
    interval = ""
    if bar.low is not None and bar.high is not None:
        interval = f" [{number(bar.low, percent=percent)}, {number(bar.high, percent=percent)}]"
    return f"{bar.label}: {number(bar.value, percent=percent)}{interval}."
