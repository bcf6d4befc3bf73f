"""The win rate at matched length, against statsmodels' regression and data whose answer is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import statsmodels.api as sm

from lit_instruct.evaluation.matched_length import RIDGE, matched_win_rate, rate_at_zero
from tests.helpers.numbers import assert_close, assert_vector


def _made(prompts: int, *, advantage: float, length_effect: float, shift: float) -> tuple[np.ndarray, Any, Any]:
    """Outcomes that follow the model exactly: our responses are ``exp(shift)`` times as long on average."""
    stream = np.random.default_rng(3)
    theirs = stream.integers(50, 400, prompts)
    ours = np.maximum(1, np.round(theirs * np.exp(stream.normal(shift, 0.5, prompts)))).astype(int)
    ratio = np.log1p(ours) - np.log1p(theirs)
    wins = stream.random(prompts) < 1 / (1 + np.exp(-(advantage + length_effect * ratio)))
    return wins.astype(float), ours, theirs


def test_statsmodels_fits_the_same() -> None:
    """With ties as halves, weights, and the ridge on the slope alone."""
    stream = np.random.default_rng(0)
    x = stream.normal(0.3, 1.0, 60)
    y = stream.choice([0.0, 0.5, 1.0], 60)
    weights = stream.integers(0, 4, (3, 60)).astype(float)
    weights[0] = 1.0
    expected = []
    for w in weights:
        repeated = np.repeat(np.arange(60), w.astype(int))
        model = sm.GLM(y[repeated], sm.add_constant(x[repeated]), family=sm.families.Binomial())
        fitted = model.fit_regularized(
            alpha=np.array([0.0, RIDGE / len(repeated)]), L1_wt=0.0, cnvrg_tol=1e-12, maxiter=500
        )
        expected.append(1 / (1 + np.exp(-fitted.params[0])))
    assert_vector(rate_at_zero(x, y, weights).tolist(), expected)


def test_length_alone_is_no_advantage() -> None:
    """Equal models, one of which writes longer responses: it wins by length, and at matched length it does not."""
    outcomes, ours, theirs = _made(4000, advantage=0.0, length_effect=2.0, shift=0.6)
    found = matched_win_rate(outcomes, ours, theirs, range(4000), resamples=300)
    assert found is not None
    assert outcomes.mean() > 0.68
    assert found.low < 0.5 < found.high
    assert found.high - found.low < 0.1
    assert found.n == 4000
    ratio = (ours + 1) / (theirs + 1)
    assert found.similar == int(((ratio <= 1.1) & (ratio >= 1 / 1.1)).sum())


def test_an_advantage_is_found_under_shorter_responses() -> None:
    outcomes, ours, theirs = _made(4000, advantage=1.0, length_effect=2.0, shift=-0.6)
    found = matched_win_rate(outcomes, ours, theirs, range(4000), resamples=300)
    assert found is not None
    assert found.low < 1 / (1 + np.exp(-1.0)) < found.high
    assert outcomes.mean() < 0.55


def test_equal_lengths_give_the_plain_rate() -> None:
    outcomes = [1.0, 1.0, 0.0, 0.5, 1.0]
    found = matched_win_rate(outcomes, [7] * 5, [7] * 5, "aabbc")
    assert found is not None
    assert_vector(found.rate, 0.7)
    assert found.similar == found.n == 5


@pytest.mark.parametrize(("outcome", "rate"), [(1.0, 1.0), (0.0, 0.0), (0.5, 0.5)])
def test_outcomes_that_are_all_alike(outcome: float, rate: float) -> None:
    found = matched_win_rate([outcome] * 6, [5, 6, 7, 8, 9, 10], [10, 9, 8, 7, 6, 5], range(6))
    assert found is not None
    assert_close([found.rate, found.low, found.high], [rate] * 3)


def test_length_that_parts_wins_from_losses_leaves_a_finite_rate() -> None:
    found = matched_win_rate([1.0, 1.0, 0.0, 0.0], [20, 30, 10, 10], [10, 10, 20, 30], range(4))
    assert found is not None
    assert_vector(found.rate, 0.5)
    assert np.isfinite([found.low, found.high]).all()


def test_swapping_the_models_mirrors_the_rate() -> None:
    outcomes, ours, theirs = _made(200, advantage=0.5, length_effect=1.0, shift=0.2)
    one = matched_win_rate(outcomes, ours, theirs, range(200), resamples=2)
    other = matched_win_rate(1 - outcomes, theirs, ours, range(200), resamples=2)
    assert one is not None
    assert other is not None
    assert_vector(one.rate + other.rate, 1.0)


def test_owners_widen_the_interval() -> None:
    outcomes, ours, theirs = _made(400, advantage=0.5, length_effect=1.0, shift=0.0)
    alone = matched_win_rate(outcomes, ours, theirs, range(400), resamples=500)
    order = np.argsort(outcomes, kind="stable")  # owners whose prompts are all won or all lost
    few = matched_win_rate(outcomes[order], ours[order], theirs[order], [n // 40 for n in range(400)], resamples=500)
    assert alone is not None
    assert few is not None
    assert few.high - few.low > 2 * (alone.high - alone.low)


def test_nothing_is_said_where_all_responses_are_longer() -> None:
    assert matched_win_rate([1.0, 0.0], [20, 30], [10, 10], "ab") is None
    assert matched_win_rate([1.0, 0.0], [10, 10], [20, 30], "ab") is None


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="as many of each"):
        matched_win_rate([1.0], [1, 2], [1], ["a"])
