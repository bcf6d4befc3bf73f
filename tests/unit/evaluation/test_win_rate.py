"""Win rates: ties, and an interval that knows who asked."""

from __future__ import annotations

import pytest

from lit_instruct.evaluation.win_rate import win_rate
from tests.helpers.numbers import assert_vector


def _scores(wins: int, ties: int, losses: int) -> tuple[list[float], list[float]]:
    return [1.0] * wins + [0.5] * ties + [0.0] * losses, [0.0] * wins + [0.5] * ties + [1.0] * losses


def test_vector_winrate_with_ties() -> None:
    ours, theirs = _scores(150, 20, 30)
    result = win_rate(ours, theirs, range(200))
    assert_vector(result.rate, 0.8)
    # Where every prompt has an owner of its own, the bootstrap is close to the normal interval of half-width 0.0509.
    assert abs((result.high - result.low) / 2 - 0.05092135803) < 0.006


def test_a_model_against_itself_ties() -> None:
    result = win_rate([0.1, 0.7], [0.1, 0.7], ["a", "b"])
    assert result == (0.5, 0.5, 0.5, 2)


def test_swapping_the_models_mirrors_the_rate() -> None:
    ours, theirs = _scores(5, 2, 9)
    owners = [f"owner {number % 4}" for number in range(16)]
    assert_vector(win_rate(ours, theirs, owners).rate + win_rate(theirs, ours, owners).rate, 1.0)


def test_owners_and_not_prompts_are_drawn() -> None:
    """Two owners, one always won and one always lost: any draw has rate 0, one half or 1."""
    ours, theirs = _scores(500, 0, 500)
    owners = ["won"] * 500 + ["lost"] * 500
    assert win_rate(ours, theirs, owners)[1:3] == (0.0, 1.0)
    alone = win_rate(ours, theirs, range(1000))
    assert 0.46 < alone.low < 0.48
    assert 0.52 < alone.high < 0.54


def test_owners_weigh_as_many_prompts_as_they_have() -> None:
    ours, theirs = _scores(9, 0, 1)
    assert_vector(win_rate(ours, theirs, ["many"] * 9 + ["one"]).rate, 0.9)


@pytest.mark.parametrize(("ours", "theirs", "owners"), [([], [], []), ([1.0], [1.0, 2.0], ["a"]), ([1.0], [1.0], [])])
def test_lengths_must_agree(ours: list[float], theirs: list[float], owners: list[str]) -> None:
    with pytest.raises(ValueError, match="as many of each"):
        win_rate(ours, theirs, owners)
