"""The win rate that two models would have if their responses were equally long.

Judges like long responses, so part of a win rate may be length alone. In the manner of Stiennon et
al. (2020) the outcome is regressed on the logarithm of the ratio of lengths, and read where that ratio is 1::

    P(ours is preferred) = sigmoid(a + b * log((our length + 1) / (their length + 1)))        rate = sigmoid(a)

A tie is an outcome of one half. Lengths are those of the texts in characters, the one unit that models of different
tokenizers share. b carries a small ridge, that of one pseudo-observation a standard deviation of the log-ratio, so that
length that parts wins from losses completely leaves it finite.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from lit_instruct.evaluation.bootstrap import RESAMPLES, number_owners, percentile_interval

RIDGE = 1.0
_ITERATIONS, _LARGEST_STEP, _LARGEST_LOGIT, _TOLERANCE = 60, 2.0, 30.0, 1e-10
_SIMILAR = 1.1


class MatchedWinRate(NamedTuple):
    """A win rate at matched length.

    Attributes:
        rate: the model's probability to be preferred with responses as long as the other model's.
        low: lower end of the 95 % interval.
        high: upper end.
        n: prompts that the regression reads.
        similar: those of them whose two responses differ by at most a tenth in length; where there are few, the rate is
            what the others suggest and not what was seen.
    """

    rate: float
    low: float
    high: float
    n: int
    similar: int


def matched_win_rate(
    outcomes: Sequence[float] | np.ndarray,
    our_lengths: Sequence[int],
    their_lengths: Sequence[int],
    owners: Sequence[Hashable],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> MatchedWinRate | None:
    """Work out the win rate at matched length.

    Args:
        outcomes: of P comparisons: 1 won, one half tied, 0 lost, or anything between them.
        our_lengths: of our responses.
        their_lengths: of the other model's.
        owners: who wrote each prompt; the interval is a bootstrap over them, with a regression for each resample.
        resamples: how often owners are drawn anew.
        seed: of the draws.

    Returns:
        The rate; None where one model's responses are all longer than the other's, so that nothing was seen on one
        side of equal length.

    Raises:
        ValueError: there are no comparisons, or the four differ in length.
    """
    if not len(outcomes) == len(our_lengths) == len(their_lengths) == len(owners) or not len(outcomes):
        raise ValueError(
            f"got {len(outcomes)} outcomes, {len(our_lengths)} and {len(their_lengths)} lengths, {len(owners)} owners; "
            "need as many of each, at least 1."
        )
    ratios_P = np.log1p(np.asarray(our_lengths, dtype=float)) - np.log1p(np.asarray(their_lengths, dtype=float))
    if ratios_P.min() > 0 or ratios_P.max() < 0:
        return None
    outcomes_P = np.asarray(outcomes, dtype=float)
    scaled_P = ratios_P / (ratios_P.std() or 1.0)
    numbered = number_owners(owners)
    rates = [
        rate_at_zero(scaled_P, outcomes_P, drawn[:, numbered.of_P])
        for drawn in numbered.draws(resamples=resamples, seed=seed)
    ]
    (rate,) = rate_at_zero(scaled_P, outcomes_P, np.ones((1, len(outcomes_P))))
    return MatchedWinRate(
        float(rate),
        *percentile_interval(np.concatenate(rates)),
        n=len(outcomes_P),
        similar=int((np.abs(ratios_P) <= np.log(_SIMILAR)).sum()),
    )


def rate_at_zero(covariate_P: np.ndarray, outcomes_P: np.ndarray, weights_RP: np.ndarray) -> np.ndarray:
    """Weighted logistic regressions on one covariate, read where it is 0.

    Newton's method, all R at once. Steps are bounded, since outcomes that are all alike have no finite intercept.

    Args:
        covariate_P: fp64 ``[P]``, of standard deviation 1.
        outcomes_P: fp64 ``[P]``, between 0 and 1.
        weights_RP: fp64 ``[R, P]``, how often each observation counts.

    Returns:
        fp64 ``[R]``, the fitted probabilities at 0.
    """
    intercept_R = np.zeros(len(weights_RP))
    slope_R = np.zeros(len(weights_RP))
    for _ in range(_ITERATIONS):
        logits_RP = np.clip(intercept_R[:, None] + slope_R[:, None] * covariate_P, -_LARGEST_LOGIT, _LARGEST_LOGIT)
        fitted_RP = 1.0 / (1.0 + np.exp(-logits_RP))
        error_RP = weights_RP * (outcomes_P - fitted_RP)
        spread_RP = weights_RP * fitted_RP * (1.0 - fitted_RP)
        gradient_a, gradient_b = error_RP.sum(axis=1), error_RP @ covariate_P - RIDGE * slope_R
        curve_aa, curve_ab = spread_RP.sum(axis=1), spread_RP @ covariate_P
        curve_bb = spread_RP @ covariate_P**2 + RIDGE
        determinant = curve_aa * curve_bb - curve_ab**2
        step_a = np.clip((curve_bb * gradient_a - curve_ab * gradient_b) / determinant, -_LARGEST_STEP, _LARGEST_STEP)
        step_b = np.clip((curve_aa * gradient_b - curve_ab * gradient_a) / determinant, -_LARGEST_STEP, _LARGEST_STEP)
        intercept_R = np.clip(intercept_R + step_a, -_LARGEST_LOGIT, _LARGEST_LOGIT)
        slope_R = slope_R + step_b
        if max(np.abs(step_a).max(), np.abs(step_b).max()) < _TOLERANCE:
            break
    return 1.0 / (1.0 + np.exp(-intercept_R))
