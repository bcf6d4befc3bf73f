"""Correlations against loops over Python numbers."""

from __future__ import annotations

import math
from statistics import correlation as pearson

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_instruct.functional import spearman_correlation, within_group_correlation
from tests.helpers.numbers import assert_close
from tests.unit.functional.vectors import f64

quick = settings(max_examples=40, deadline=None)
numbers = st.integers(-3, 3).map(float)  # with many ties
pairs = st.lists(st.tuples(numbers, numbers), min_size=2, max_size=9)
grouped = st.lists(st.tuples(numbers, numbers, st.integers(0, 3)), min_size=2, max_size=12)


def mean_ranks(values: list[float]) -> list[float]:
    """Rank = values below + the middle of the equal ones."""
    return [sum(other < value for other in values) + (values.count(value) + 1) / 2 for value in values]


@quick
@given(pairs)
def test_spearman_is_pearson_of_mean_ranks(rows: list[tuple[float, float]]) -> None:
    x, y = map(list, zip(*rows, strict=True))
    varies = len(set(x)) > 1 and len(set(y)) > 1
    need = pearson(mean_ranks(x), mean_ranks(y)) if varies else 0.0
    assert_close(spearman_correlation(f64(x), f64(y)), need, dtype=torch.float64)


def test_spearman_without_ties_is_the_textbook_formula() -> None:
    """1 - 6 sum d^2 / (n (n^2 - 1)); and only the order counts."""
    x, y = [86.0, 97.0, 99.0, 100.0, 101.0], [2.0, 20.0, 28.0, 27.0, 50.0]
    d = [a - b for a, b in zip(mean_ranks(x), mean_ranks(y), strict=True)]
    need = 1 - 6 * sum(v * v for v in d) / (5 * 24)
    assert need == pytest.approx(0.9)
    assert_close(spearman_correlation(f64(x), torch.tensor([2, 20, 28, 27, 50])), need, dtype=torch.float64)
    assert_close(spearman_correlation(f64(x).exp(), f64(y) ** 3), need, dtype=torch.float64)


@quick
@given(grouped)
def test_within_groups_against_a_loop(rows: list[tuple[float, float, int]]) -> None:
    def left(column: int) -> list[float]:
        means = {g: [row[column] for row in rows if row[2] == g] for _, _, g in rows}
        return [row[column] - math.fsum(means[row[2]]) / len(means[row[2]]) for row in rows]

    x, y = left(0), left(1)
    scale = math.sqrt(math.fsum(v * v for v in x) * math.fsum(v * v for v in y))
    need = math.fsum(a * b for a, b in zip(x, y, strict=True)) / scale if scale > 1e-12 else 0.0
    columns = [f64([row[n] for row in rows]) for n in range(2)]
    groups = torch.tensor([5 * row[2] - 7 for row in rows])
    assert_close(within_group_correlation(*columns, groups), need, dtype=torch.float64)


def test_prompts_apart_and_together_can_say_opposite_things() -> None:
    """Prompts with long answers get high scores, but among the answers to one prompt the short ones do."""
    scores, lengths = f64([1, 2, 3, 11, 12, 13]), torch.tensor([3, 2, 1, 13, 12, 11])
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    assert float(spearman_correlation(scores, lengths)) > 0.5
    assert_close(within_group_correlation(scores, lengths, groups), -1.0)


def test_rounding_is_no_variation() -> None:
    """Three times 0.1 has a mean that is not 0.1: what is left of two constant groups may differ in the last bit."""
    scores, lengths = f64([0.1, 0.1, 0.1, 0.7, 0.7, 0.7, 0.7]), torch.tensor([1, 2, 6, 4, 9, 7, 7])
    assert sum([0.1] * 3) / 3 != 0.1
    groups = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    assert_close(within_group_correlation(scores, lengths, groups), 0.0, dtype=torch.float64)


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"got shapes \[\[3\], \[2\]\]"):
        spearman_correlation(torch.zeros(3), torch.zeros(2))
    with pytest.raises(ValueError, match="need one flat shape"):
        within_group_correlation(torch.zeros(3), torch.zeros(3), torch.zeros(3, 1))
