"""The charts of stages: metrics over the course of runs, the frontier, and what a reward model is worth."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lit_instruct.reporting.charts import LineChart, Points, with_lines
from lit_instruct.reporting.logs import Curve
from lit_instruct.reporting.numbers import number
from lit_instruct.reporting.runs import Run
from lit_instruct.reporting.stages import PLOTS, ROWS, Plot

RELIABILITY = "rm/val/reliability"
"""The name under which the reward stage logs the table of its reliability curve."""


def metric_prefix(stage: str) -> str:
    """The first part of a stage's metrics: base models are trained by the module of SFT."""
    return "sft" if stage == "pretrain" else stage


def curve(run: Run, name: str) -> Curve:
    """A metric of a run, without the stage in its name; empty where it was not logged."""
    return run.curves.get(f"{metric_prefix(run.stage)}/{name}", {})


def x_label(stage: str) -> str:
    """What steps are counted in."""
    return "iteration" if stage == "ppo" else "optimizer step"


def course_charts(stage: str, runs: Sequence[tuple[int, Run]], *, main: bool) -> list[LineChart]:
    """The charts of metrics over the course of runs.

    Args:
        stage: of all of them.
        runs: with their places in the report.
        main: those that everybody looks at, or the others.

    Returns:
        Charts in which something moves.
    """
    charts = [chart for plot in PLOTS[stage] if plot.main == main for chart in _course(plot, stage, runs)]
    return [chart for chart in charts if not _is_flat(chart)]


def flat_metrics(stage: str, runs: Sequence[tuple[int, Run]]) -> list[tuple[str, list[str | None]]]:
    """What stayed the same in every run or was measured once, and would be no curve.

    Args:
        stage: of all runs.
        runs: with their places in the report.

    Returns:
        Name of each such metric and its last value in each run, None where it was not logged. Those that the table of
        last values has are not repeated.
    """
    shown = {row.metric for row in ROWS[stage]}
    found = []
    for plot in PLOTS[stage]:
        if not any(_is_flat(chart) for chart in _course(plot, stage, runs)):
            continue
        for split, addition in (("train", ""), ("val", ", held out")):
            last = [last_value(run, f"{split}/{plot.metric}", percent=plot.percent) for _, run in runs]
            if any(value is not None for value in last) and f"{split}/{plot.metric}" not in shown:
                found.append((f"{plot.title}{addition}", last))
    return found


def last_value(run: Run, name: str, *, percent: bool) -> str | None:
    """The last value of a metric, to be read.

    Args:
        run: that may have logged it.
        name: of the metric, without the stage.
        percent: it is a share.

    Returns:
        The number; None if it was not logged.
    """
    values = curve(run, name)
    return number(values[max(values)], percent=percent) if values else None


def _course(plot: Plot, stage: str, runs: Sequence[tuple[int, Run]]) -> list[LineChart]:
    lines = [
        Points(place, run.name, curve(run, f"{split}/{plot.metric}").items(), marked=split == "val")
        for split in ("train", "val")
        for place, run in runs
    ]
    slug = f"{stage}-{_slug(plot.title)}"
    empty = LineChart(slug, plot.title, plot.caption, x_label(stage), plot.y_label, [], plot.percent)
    return with_lines(empty, lines)


def _is_flat(chart: LineChart) -> bool:
    return all(min(line.y) == max(line.y) for line in chart.lines)


def frontier_charts(runs: Sequence[tuple[int, Run]]) -> list[LineChart]:
    """Score against KL and against its square root, in the order of time (Gao et al. 2022 found laws in the root).

    Args:
        runs: of PPO, with their places in the report.

    Returns:
        Two charts, with the held-out points where there are some; none without the metrics.
    """
    caption = "Iterations in their order. Of two runs the higher one gets more for the same distance."
    plain = LineChart("ppo-frontier", "Score against KL", caption, "KL (nats a response)", "score", [], path=True)
    rooted = LineChart(
        "ppo-frontier-root",
        "Score against root KL",
        "Over the root of KL, gains that fade bend down to a maximum: beyond it the reward model is exploited.",
        "√KL (√nats)",
        "score",
        [],
        path=True,
    )
    points, roots = [], []
    for split in ("train", "val"):
        for place, run in runs:
            kl, score = (curve(run, f"{split}/objective/{name}") for name in ("kl", "score"))
            both = [(kl[step], score[step]) for step in kl if step in score]
            points.append(Points(place, run.name, both, marked=split == "val"))
            # An estimate of a KL near 0 may be negative; its root is drawn at 0.
            roots.append(points[-1]._replace(points=[(max(x, 0.0) ** 0.5, y) for x, y in both]))
    return [*with_lines(plain, points), *with_lines(rooted, roots)]


def reward_charts(runs: Sequence[tuple[int, Run]]) -> list[LineChart]:
    """Reliability, and accuracy by K and by labeler, all at the last validation.

    Args:
        runs: of the reward stage, with their places in the report.

    Returns:
        Charts with something in them.
    """
    reliability = LineChart(
        "rm-reliability",
        "Reliability",
        "Pairs grouped by the model's confidence in its choice. On the diagonal a probability means what it says; "
        "below it the model is too sure.",
        "confidence",
        "share of pairs right",
        [],
        percent=True,
        diagonal=True,
    )
    by_size = LineChart(
        "rm-accuracy-by-k",
        "Accuracy by ranking size",
        "Held-out pairs of prompts with K ranked responses.",
        "K",
        "share of pairs",
        [],
        percent=True,
    )
    by_labeler = LineChart(
        "rm-accuracy-by-labeler",
        "Accuracy by labeler",
        "Each point is a labeler, from the one that the model agrees with least.",
        "labelers in order",
        "share of pairs",
        [],
        percent=True,
    )
    tables, sizes, labelers = [], [], []
    for place, run in runs:
        by_k = [(float(size), accuracy) for size, accuracy in _last_by(run, "acc_k").items()]
        in_order = enumerate(sorted(_last_by(run, "acc_labeler").values()), start=1)
        tables.append(Points(place, run.name, _last_reliability(run), marked=True))
        sizes.append(Points(place, run.name, sorted(by_k), marked=True))
        labelers.append(Points(place, run.name, in_order, marked=True))
    return [*with_lines(reliability, tables), *with_lines(by_size, sizes), *with_lines(by_labeler, labelers)]


def parse_reliability(table: str) -> list[tuple[float, float]]:
    """Read a table of the reward stage's reliability.

    Args:
        table: Markdown with the columns confidence, accuracy, pairs.

    Returns:
        Confidence and accuracy of each bin with pairs.
    """
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return [(float(confidence), float(accuracy)) for confidence, accuracy, _ in rows]


def _last_reliability(run: Run) -> list[tuple[float, float]]:
    tables = run.texts.get(RELIABILITY, {})
    return parse_reliability(tables[max(tables)]) if tables else []


def _last_by(run: Run, metric: str) -> dict[str, float]:
    """Last held-out values of a metric with variants, by variant."""
    prefix = f"rm/val/{metric}/"
    found = {name.removeprefix(prefix): values for name, values in run.curves.items() if name.startswith(prefix)}
    return {variant: values[max(values)] for variant, values in found.items()}


def _slug(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
