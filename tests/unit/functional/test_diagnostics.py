"""Diagnostics against loops over plain lists."""

from __future__ import annotations

import math
import random

import pytest
import torch

from lit_instruct.functional import correlation, distinct_rows, lengths_to_mask, repeated_ngrams
from tests.helpers.numbers import assert_close


def ragged(seed: int, *, rows: int, width: int, words: int) -> list[list[int]]:
    stream = random.Random(seed)
    return [[stream.randrange(words) for _ in range(stream.randint(1, width))] for _ in range(rows)]


def right_padded(rows: list[list[int]], width: int, filler: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.tensor([row + [filler] * (width - len(row)) for row in rows])
    return ids, lengths_to_mask(torch.tensor([len(row) for row in rows]), width)


def repeated_by_loop(rows: list[list[int]], size: int) -> float:
    shares = []
    for row in rows:
        seen, repeats, count = [], 0, 0
        for start in range(len(row) - size + 1):
            gram = row[start : start + size]
            repeats += gram in seen
            count += 1
            seen.append(gram)
        if count:
            shares.append(repeats / count)
    return sum(shares) / len(shares) if shares else 0.0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("filler", [0, 70_000])
def test_repeated_ngrams_against_a_loop(seed: int, size: int, filler: int) -> None:
    rows = ragged(seed, rows=7, width=30, words=2 + seed)
    expected = repeated_by_loop(rows, size)
    assert_close(repeated_ngrams(*right_padded(rows, 30, filler), size=size), expected)
    if size <= 2:
        assert 0 < expected < 1


def test_repeated_ngrams_by_hand() -> None:
    ids = torch.tensor([[1, 2, 3, 4, 1, 2, 3, 4, 5], [7, 7, 7, 7, 7, 7, 0, 0, 0], [1, 2, 3, 0, 0, 0, 0, 0, 0]])
    mask = lengths_to_mask(torch.tensor([9, 6, 3]), 9)
    assert_close(repeated_ngrams(ids, mask), (1 / 6 + 2 / 3) / 2)  # the third is too short to count
    assert_close(repeated_ngrams(ids[2:], mask[2:]), 0.0)
    assert_close(repeated_ngrams(ids[:, :3], mask[:, :3]), 0.0)
    assert_close(repeated_ngrams(ids[:0], mask[:0]), 0.0)


def test_what_one_response_says_another_may_say() -> None:
    ids = torch.tensor([[1, 2, 3, 4, 5]]).expand(3, 5)
    assert_close(repeated_ngrams(ids, torch.ones(3, 5, dtype=torch.bool)), 0.0)


@pytest.mark.parametrize("seed", range(4))
def test_distinct_rows_against_a_loop(seed: int) -> None:
    rows = ragged(seed, rows=40, width=3, words=3)
    ids, mask = right_padded(rows, 3, 1)  # the filler is a word too: padding is told by the mask alone
    expected = len({tuple(row) for row in rows}) / 40
    assert 0.1 < expected < 0.9
    assert_close(distinct_rows(ids, mask), expected)
    assert_close(distinct_rows(ids.flip(1), mask.flip(1)), expected)  # padded on the left, as prompts are


@pytest.mark.parametrize("seed", range(4))
def test_correlation_against_a_loop(seed: int) -> None:
    stream = random.Random(seed)
    x = [stream.gauss(5, 2) for _ in range(30)]
    y = [stream.gauss(0, 1) + 0.3 * seed * value for value in x]
    mean_x, mean_y = sum(x) / 30, sum(y) / 30
    cross = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    expected = cross / math.sqrt(sum((a - mean_x) ** 2 for a in x) * sum((b - mean_y) ** 2 for b in y))
    assert_close(correlation(torch.tensor(x), torch.tensor(y)), expected)
    assert_close(correlation(torch.tensor(x), -torch.tensor(x)), -1.0)
    assert_close(correlation(torch.tensor(x), 3 * torch.tensor(x) + 1), 1.0)


@pytest.mark.parametrize("constant", [0.1, 1e6 + 0.3, 0.0])
def test_correlation_with_what_does_not_vary_is_0(constant: float) -> None:
    """The mean of equal floats may be another float; the rounding must not be taken for a spread."""
    x = torch.full((7,), constant)
    assert correlation(x, torch.arange(7)) == correlation(torch.arange(7), x) == 0
    assert correlation(x[:0], x[:0]) == 0


def test_shapes_that_do_not_fit_are_refused() -> None:
    ids, mask = torch.zeros(2, 5, dtype=torch.long), torch.ones(2, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"need the mask's \[2, 5\]"):
        repeated_ngrams(ids[:, :4], mask)
    with pytest.raises(ValueError, match="size: got 0"):
        repeated_ngrams(ids, mask, size=0)
    with pytest.raises(ValueError, match=r"need torch\.bool"):
        distinct_rows(ids, mask.long())
    with pytest.raises(ValueError, match=r"got shapes \[2\] and \[3\]"):
        correlation(torch.zeros(2), torch.zeros(3))
