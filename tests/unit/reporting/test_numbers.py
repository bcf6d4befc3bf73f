"""Numbers and times as people read them."""

from __future__ import annotations

import math

import pytest

from lit_instruct.reporting.numbers import duration, hundredths, moment, number


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.53449, "0.534"),
        (12.345, "12.3"),
        (-1.5, "−1.50"),
        (1234.5, "1,234"),
        (40.0, "40"),
        (5_120_000.0, "5,120,000"),
        (2.5e9, "2.5e9"),
        (9.65e-6, "9.65e-6"),
        (-1e-4, "−1e-4"),
        (0.001, "0.00100"),
        (math.inf, "inf"),
        (math.nan, "nan"),
    ],
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


def test_shares() -> None:
    assert number(0.7105, percent=True) == "71.0\u00a0%"
    assert number(math.nan, percent=True) == "nan"
    assert hundredths(-0.456) == "−0.46"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (7.44, "7.4 s"),
        (59.99, "60.0 s"),
        (750, "12 min 30 s"),
        (3599.7, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (3 * 86400 + 4 * 3600, "3 d 4 h"),
    ],
)
def test_times(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_moments() -> None:
    assert moment(1_700_000_000) == "2023-11-14 22:13 UTC"
