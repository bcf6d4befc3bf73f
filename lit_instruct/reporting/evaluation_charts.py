"""The charts of an evaluation: win rates, the frontier with best-of-n, the alignment tax, lengths."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from lit_instruct.reporting.charts import Bar, BarChart, Chart, LineChart, Points, with_lines
from lit_instruct.reporting.evaluations import Estimate, Evaluation, ModelResult


def evaluation_charts(evaluation: Evaluation, places: Mapping[str, int], slug: str) -> list[Chart]:
    """All charts that an evaluation has the numbers for.

    Args:
        evaluation: the numbers.
        places: of its models among all runs and models of the report, for the colours.
        slug: beginning of the names of files.

    Returns:
        Charts with something in them.
    """
    against = f"preferred to {evaluation.baseline}" if evaluation.baseline else "preferred"
    interval = "Lines are 95 % intervals."
    bars = [
        _bars(
            evaluation,
            places,
            lambda model: model.win_rate,
            BarChart(
                f"{slug}-win-rate",
                "Win rate",
                f"Share of prompts on which each model is {against}; ties count one half. {interval}",
                against,
                [],
                percent=True,
                reference=0.5,
            ),
            leave_out=evaluation.baseline,
        ),
        _bars(
            evaluation,
            places,
            lambda model: model.win_rate_matched_length,
            BarChart(
                f"{slug}-win-rate-matched-length",
                "Win rate at equal length",
                f"The same, with the advantage of longer responses taken out. {interval}",
                against,
                [],
                percent=True,
                reference=0.5,
            ),
            leave_out=evaluation.baseline,
        ),
        _bars(
            evaluation,
            places,
            lambda model: model.score,
            BarChart(f"{slug}-score", "Score", f"The scorer's mean score. {interval}", "score", []),
        ),
        _pretraining_loss(evaluation, places, slug),
        _bars(
            evaluation,
            places,
            lambda model: _plain(model.mean_length),
            BarChart(f"{slug}-length", "Response length", "Mean over all prompts.", "characters", []),
        ),
    ]
    win, matched, *others = bars
    return [chart for chart in (win, matched, *_frontiers(evaluation, places, slug), *others) if chart is not None]


def protocol_charts(evaluation: Evaluation, places: Mapping[str, int], slug: str) -> list[Chart]:
    """A chart for each measure of each protocol.

    Args:
        evaluation: the numbers.
        places: of its models among all runs and models of the report, for the colours.
        slug: beginning of the names of files.

    Returns:
        The charts.
    """
    charts: list[Chart] = []
    names = dict.fromkeys(name for model in evaluation.models.values() for name in model.protocols)
    for number, name in enumerate(names, start=1):
        empty = BarChart(f"{slug}-protocol-{number}", name, "Lines are 95 % intervals.", "mean", [])
        chart = _bars(evaluation, places, _protocol(name), empty)
        charts += [] if chart is None else [chart]
    return charts


def _pretraining_loss(evaluation: Evaluation, places: Mapping[str, int], slug: str) -> BarChart | None:
    """In bits a byte where they are known: tokens of several vocabularies cannot be compared."""
    measured = [model for model in evaluation.models.values() if model.pretraining_loss is not None]
    in_bits = all(model.pretraining_bits_per_byte is not None for model in measured)
    return _bars(
        evaluation,
        places,
        lambda model: _plain(model.pretraining_bits_per_byte if in_bits else model.pretraining_loss),
        BarChart(
            f"{slug}-pretraining-loss",
            "Pretraining loss",
            "On held-out pretraining text. What it rises by is part of the alignment tax.",
            "bits a byte" if in_bits else "nats a token",
            [],
        ),
    )


def _protocol(name: str) -> Callable[[ModelResult], Estimate | None]:
    return lambda model: model.protocols.get(name)


def _bars(
    evaluation: Evaluation,
    places: Mapping[str, int],
    measure: Callable[[ModelResult], Estimate | None],
    chart: BarChart,
    *,
    leave_out: str | None = None,
) -> BarChart | None:
    """The chart with a bar for each model that was measured; None if none was."""
    bars = []
    for name, model in evaluation.models.items():
        found = measure(model)
        if found is not None and math.isfinite(found.value) and name != leave_out:
            bars.append(Bar(places[name], name, found.value, found.low, found.high))
    return chart._replace(bars=bars) if bars else None


def _frontiers(evaluation: Evaluation, places: Mapping[str, int], slug: str) -> list[LineChart]:
    """None where nothing has moved from the reference: a point at 0 says no more than the score does."""
    reference = evaluation.models.get(evaluation.reference or "")
    others = [model for name, model in evaluation.models.items() if name != evaluation.reference]
    if not (reference and reference.best_of_n) and all(model.kl is None or model.score is None for model in others):
        return []
    best_of_n = f" The curve is the best of n responses of {evaluation.reference}."
    plain = LineChart(
        f"{slug}-frontier",
        "Score against KL",
        "Higher at the same distance is better." + (best_of_n if reference and reference.best_of_n else ""),
        "KL (nats a response)",
        "score",
        [],
        path=True,
        marks="single",
    )
    rooted = plain._replace(slug=f"{slug}-frontier-root", title="Score against root KL", x_label="√KL (√nats)")
    points = []
    for name, model in evaluation.models.items():
        if name == evaluation.reference:  # the best of n of others is that far from themselves
            points.append(Points(places[name], name, [(best.kl, best.score) for best in model.best_of_n]))
        if model.kl is not None and model.score is not None:
            points.append(Points(places[name], name, [(model.kl, model.score.value)], marked=True))
    # An estimate of a KL near 0 may be negative; its root is drawn at 0.
    roots = [one._replace(points=[(max(kl, 0.0) ** 0.5, score) for kl, score in one.points]) for one in points]
    return [*with_lines(plain, points), *with_lines(rooted, roots)]


def _plain(value: float | None) -> Estimate | None:
    return None if value is None else Estimate(value)
