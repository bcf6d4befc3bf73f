"""How often one model's response is preferred to another's."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np


class WinRate(NamedTuple):
    """A win rate with its interval.

    Attributes:
        rate: share of prompts won, ties one half.
        low: lower end of the 95 % interval.
        high: upper end.
    """

    rate: float
    low: float
    high: float


def win_rate(
    ours: Sequence[float], theirs: Sequence[float], owners: Sequence[Hashable], *, resamples: int = 2000, seed: int = 0
) -> WinRate:
    """Compare two models prompt by prompt; ties count one half.

    The interval is a bootstrap over the owners of the prompts and not over the prompts: those of one owner resemble
    each other, and a validation set may be dominated by a few (Ouyang et al. 2022, table 6).

    Args:
        ours: quality of our response to each prompt, higher is better.
        theirs: quality of the other model's response to the same prompts.
        owners: who wrote each prompt.
        resamples: how often owners are drawn anew.
        seed: of the draws.

    Returns:
        The win rate and its 95 % interval.

    Raises:
        ValueError: there are no prompts, or the three differ in length.
    """
    if not len(ours) == len(theirs) == len(owners) or not len(ours):
        raise ValueError(
            f"got {len(ours)}, {len(theirs)} scores and {len(owners)} owners; need as many of each, at least 1."
        )
    outcomes = (np.sign(np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)) + 1.0) / 2.0
    numbers = {owner: number for number, owner in enumerate(dict.fromkeys(owners))}
    owner_of = np.array([numbers[owner] for owner in owners])
    wins_O = np.bincount(owner_of, weights=outcomes)
    prompts_O = np.bincount(owner_of)
    drawn = np.random.default_rng(seed).integers(len(numbers), size=(resamples, len(numbers)))
    rates = wins_O[drawn].sum(axis=1) / prompts_O[drawn].sum(axis=1)
    low, high = np.quantile(rates, (0.025, 0.975))
    return WinRate(float(outcomes.mean()), float(low), float(high))
