"""Charts hold the numbers of the logs, figures those of the charts, and alt texts say them."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from PIL import Image

from lit_instruct.functional import calibration
from lit_instruct.modules.reward_metrics import reliability_table
from lit_instruct.reporting.charts import Bar, BarChart, Line, LineChart, Points, alt_text, moving_mean, with_lines
from lit_instruct.reporting.drawing import DARK, LIGHT, TickNumbers, as_png, draw
from lit_instruct.reporting.runs import Run
from lit_instruct.reporting.stage_charts import (
    course_charts,
    flat_metrics,
    frontier_charts,
    last_value,
    parse_reliability,
    reward_charts,
)
from lit_instruct.reporting.stages import PLOTS
from tests.helpers.numbers import assert_close
from tests.unit.reporting.places import ppo_curves


def run(
    name: str, stage: str, curves: dict[str, dict[int, float]], texts: dict[str, dict[int, str]] | None = None
) -> Run:
    return Run(name, Path(name), stage, curves, texts or {}, [], {}, [])


EMPTY = LineChart("x", "Title", "Caption.", "iteration", "score", [])


# -- what is in a chart


def test_a_metric_of_two_runs_with_its_held_out_values() -> None:
    first = run("a", "ppo", ppo_curves(iterations=3))
    second = run("b", "ppo", ppo_curves(iterations=2, lift=1.0) | {"ppo/val/objective/score": {2: 9.0}})
    score, kl, length = course_charts("ppo", [(0, first), (1, second)], main=True)
    assert (score.title, kl.title, length.title) == ("Score", "KL to the reference", "Response length")
    assert score.lines == [
        Line(0, "a", [1, 2, 3], [0.5, 1.0, 1.5]),
        Line(1, "b", [1, 2], [1.5, 2.0]),
        Line(1, "b", [2], [9.0], marked=True),
    ]
    assert kl.lines == [Line(0, "a", [1, 2, 3], [0.25, 1.0, 2.25]), Line(1, "b", [1, 2], [0.25, 1.0])]
    assert score.named
    assert not course_charts("ppo", [(0, first)], main=True)[0].named


def test_what_does_not_move_is_a_number_and_no_chart() -> None:
    one = run("a", "ppo", ppo_curves() | {"ppo/val/rollout/eos_rate": {5: 0.75}})
    other = run("b", "ppo", ppo_curves())
    assert course_charts("ppo", [(0, one), (1, other)], main=False) == []
    assert flat_metrics("ppo", [(0, one), (1, other)]) == [
        ("Finished responses, held out", ["75.0\u00a0%", None]),
        ("KL coefficient", ["0.0200", "0.0200"]),
    ]


def test_a_step_in_one_of_two_runs_is_a_curve() -> None:
    moving = run("a", "ppo", {"ppo/train/objective/kl_coef": {1: 0.1, 2: 0.2}})
    still = run("b", "ppo", {"ppo/train/objective/kl_coef": {1: 0.1, 2: 0.1}})
    (chart,) = course_charts("ppo", [(0, moving), (1, still)], main=False)
    assert [line.y for line in chart.lines] == [[0.1, 0.2], [0.1, 0.1]]
    assert flat_metrics("ppo", [(0, moving), (1, still)]) == []


def test_the_frontier_joins_score_and_kl_of_the_same_iteration() -> None:
    curves = {
        "ppo/train/objective/kl": {1: -0.01, 2: 4.0, 3: 9.0, 4: 1.0},
        "ppo/train/objective/score": {2: 0.2, 1: 0.1, 4: 0.4, 5: 0.5},
        "ppo/val/objective/kl": {4: 16.0},
        "ppo/val/objective/score": {4: 0.6},
    }
    plain, rooted = frontier_charts([(3, run("a", "ppo", curves))])
    assert plain.lines == [Line(3, "a", [-0.01, 4.0, 1.0], [0.1, 0.2, 0.4]), Line(3, "a", [16.0], [0.6], marked=True)]
    assert rooted.lines == [Line(3, "a", [0.0, 2.0, 1.0], [0.1, 0.2, 0.4]), Line(3, "a", [4.0], [0.6], marked=True)]
    assert frontier_charts([(0, run("a", "ppo", {"ppo/train/objective/kl": {1: 1.0}}))]) == []


def test_reliability_is_what_the_reward_stage_measured() -> None:
    fit = calibration(torch.randn(500, generator=torch.Generator().manual_seed(0)) * 2 + 1)
    points = parse_reliability(reliability_table(fit))
    filled = fit.bin_counts > 0
    assert 2 < len(points) == int(filled.sum())
    assert_close([x for x, _ in points], fit.bin_confidences[filled])
    assert_close([y for _, y in points], fit.bin_accuracies[filled])


def test_bins_without_pairs_are_not_in_the_table() -> None:
    assert len(parse_reliability(reliability_table(calibration(torch.tensor([0.0, 9.0, 9.0]))))) == 2
    assert parse_reliability(reliability_table(calibration(torch.zeros(0)))) == []


def test_charts_of_a_reward_model_are_of_its_last_validation() -> None:
    early, late = (f"| confidence | accuracy | pairs |\n|---|---|---|\n| 0.55 | {y} | 9 |" for y in (0.1, 0.6))
    curves = {
        "rm/val/acc_k/10": {1: 0.1, 2: 0.8},  # as names are sorted
        "rm/val/acc_k/9": {1: 0.1, 2: 0.7},
        "rm/val/acc_labeler/ann": {2: 0.9},
        "rm/val/acc_labeler/bob": {2: 0.5},
        "rm/val/acc_len_baseline_k/9": {2: 0.3},
        "rm/val/acc_labeler_min": {2: 0.5},
    }
    charts = reward_charts([(0, run("a", "rm", curves, {"rm/val/reliability": {1: early, 2: late}}))])
    assert [chart.slug for chart in charts] == ["rm-reliability", "rm-accuracy-by-k", "rm-accuracy-by-labeler"]
    assert [[(line.x, line.y) for line in chart.lines] for chart in charts] == [
        [([0.55], [0.6])],
        [([9.0, 10.0], [0.7, 0.8])],
        [([1, 2], [0.5, 0.9])],
    ]
    assert reward_charts([(0, run("a", "rm", {}))]) == []


def test_points_that_are_not_finite_are_left_out_and_counted() -> None:
    (chart,) = with_lines(EMPTY, [Points(0, "a", [(1, math.nan), (2, 1.0), (3, math.inf), (4, 2.0)])])
    assert chart.lines == [Line(0, "a", [2, 4], [1.0, 2.0])]
    assert chart.caption == "Caption. Points that are not finite are left out: 2."
    assert with_lines(EMPTY, [Points(0, "a", [(1, math.nan)]), Points(1, "b", [])]) == []


@pytest.mark.parametrize("window", [1, 3, 7])
def test_the_moving_mean(window: int) -> None:
    values = np.random.default_rng(1).normal(size=12).tolist()
    expected = []
    for place in range(12):
        reach = min(window // 2, place, 11 - place)
        around = values[place - reach : place + reach + 1]
        expected.append(sum(around) / len(around))
    assert_close(moving_mean(values, window), expected)


def test_a_base_model_has_the_metrics_of_sft() -> None:
    base = run("base", "pretrain", {"sft/train/loss": {1: 3.0, 2: 2.0}})
    (chart,) = course_charts("pretrain", [(0, base)], main=True)
    assert (chart.slug, chart.lines[0].y) == ("pretrain-loss", [3.0, 2.0])
    assert last_value(base, "train/loss", percent=False) == "2"


def test_every_chart_of_a_stage_has_a_file_of_its_own() -> None:
    for stage, plots in PLOTS.items():
        titles = [plot.title for plot in plots]
        assert len(set(titles)) == len(titles), stage


# -- what is in a figure


def test_figures_show_the_numbers_of_the_chart() -> None:
    lines = [Line(0, "a", [1.0, 2.0, 4.0], [3.0, 1.0, 2.0]), Line(9, "b", [1.0], [2.5], marked=True)]
    (axes,) = draw(EMPTY._replace(lines=lines), LIGHT).axes
    drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines]
    assert drawn == [([1.0, 2.0, 4.0], [3.0, 1.0, 2.0]), ([1.0], [2.5])]
    assert [to_hex(line.get_color()) for line in axes.lines] == [LIGHT.runs[0], LIGHT.runs[1]]
    assert axes.lines[0].get_linestyle() != axes.lines[1].get_linestyle()  # the tenth run is not the second
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("iteration", "score")


def test_long_curves_are_drawn_twice() -> None:
    y = np.random.default_rng(0).normal(size=200).tolist()
    (axes,) = draw(EMPTY._replace(lines=[Line(0, "a", list(range(200)), y)]), LIGHT).axes
    thin, bold = axes.lines
    assert list(thin.get_ydata()) == y
    assert list(bold.get_xdata()) == list(range(200))
    assert thin.get_linewidth() < bold.get_linewidth()
    assert np.std(bold.get_ydata()) < 0.5 * np.std(y)


def test_a_path_is_smoothed_in_both_directions() -> None:
    x, y = ([float(v) for v in np.random.default_rng(seed).normal(size=30)] for seed in (0, 1))
    (axes,) = draw(EMPTY._replace(lines=[Line(0, "a", x, y)], path=True), LIGHT).axes
    dots, bold = axes.lines
    assert (list(dots.get_xdata()), list(dots.get_ydata())) == (x, y)
    assert dots.get_linestyle() == "None"
    assert np.std(bold.get_xdata()) < 0.8 * np.std(x)


def test_names_are_shown_as_they_are() -> None:
    hostile = ["_hidden", "$\\frac{1$", "<b>&"]
    lines = [Line(number, name, [1.0, 2.0], [1.0, 2.0]) for number, name in enumerate(hostile)]
    chart = EMPTY._replace(lines=[*lines, lines[0]._replace(marked=True)], named=True)
    (axes,) = draw(chart, LIGHT).axes
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == [*hostile, "held out"]
    assert as_png(chart, LIGHT)[:4] == b"\x89PNG"
    bars = BarChart("x", "Title", "Caption.", "x", [Bar(0, name, 1.0) for name in hostile])
    (axes,) = draw(bars, LIGHT).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == hostile
    assert as_png(bars, LIGHT)[:4] == b"\x89PNG"


def test_bars_show_values_intervals_and_the_reference() -> None:
    bars = [Bar(0, "sft", 0.6, 0.55, 0.65), Bar(1, "ppo", -0.2)]
    (axes,) = draw(BarChart("x", "Title", "Caption.", "wins", bars, percent=True, reference=0.5), LIGHT).axes
    assert [patch.get_width() for patch in axes.patches] == [0.6, -0.2]
    interval, reference = axes.lines
    assert (list(interval.get_xdata()), list(interval.get_ydata())) == ([0.55, 0.65], [0, 0])
    assert list(reference.get_xdata()) == [0.5, 0.5]
    assert [text.get_text() for text in axes.texts] == ["60.0\u00a0%", "−20.0\u00a0%"]


def test_pictures_have_few_colours_and_those_of_their_theme() -> None:
    y = np.random.default_rng(0).normal(size=200).tolist()
    chart = EMPTY._replace(lines=[Line(0, "a", list(range(200)), y)])
    for theme in (LIGHT, DARK):
        picture = Image.open(io.BytesIO(as_png(chart, theme)))
        assert picture.mode == "P"  # a palette
        assert picture.width >= 720  # twice the width of a phone
        picture = picture.convert("RGB")
        assert "#{:02x}{:02x}{:02x}".format(*picture.getpixel((2, 2))) == theme.paper


def test_ticks_have_the_decimals_of_their_steps() -> None:
    ticks = TickNumbers(percent=False)
    assert ticks.format_ticks([0.0, 0.25, 0.5]) == ["0.00", "0.25", "0.50"]
    assert ticks.format_ticks([-1000.0, 0.0, 1000.0]) == ["−1,000", "0", "1,000"]
    assert ticks.format_ticks([0.0, 2e-6]) == ["0", "2e-6"]
    assert TickNumbers(percent=True).format_ticks([0.5, 0.525]) == ["50.0\u00a0%", "52.5\u00a0%"]
    assert ticks.format_ticks([]) == []


# -- what is said of it


def test_alt_texts_say_the_numbers() -> None:
    lines = [Line(0, "a", [1, 2, 3], [0.5, 2.0, -1.0]), Line(1, "b", [3], [0.25], marked=True)]
    assert alt_text(EMPTY._replace(lines=lines)) == (
        "Title: score against iteration. a: from 0.500 at 1 to −1 at 3, lowest −1 at 3, highest 2 at 2. "
        "b (held out): 0.250 at 3."
    )
    assert alt_text(EMPTY._replace(lines=lines, path=True, x_label="KL")) == (
        "Title: score against KL. a: from (1, 0.500) to (3, −1), highest (2, 2). b (held out): (3, 0.250)."
    )
    bars = [Bar(0, "sft", 0.6, 0.55, 0.65), Bar(1, "ppo", 0.7)]
    assert alt_text(BarChart("x", "Win rate", "Caption.", "wins", bars, percent=True)) == (
        "Win rate. sft: 60.0\u00a0% [55.0\u00a0%, 65.0\u00a0%]. ppo: 70.0\u00a0%."
    )
