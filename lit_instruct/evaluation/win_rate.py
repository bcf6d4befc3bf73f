"""How often one model's response is preferred to another's."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from lit_instruct.evaluation.bootstrap import RESAMPLES, owner_interval


class WinRate(NamedTuple):
    """A win rate with its interval.

    Attributes:
        rate: share of prompts won, ties one half.
        low: lower end of the 95 % interval.
        high: upper end.
        n: prompts that were judged.
    """

    rate: float
    low: float
    high: float
    n: int


def win_rate(
    ours: Sequence[float],
    theirs: Sequence[float],
    owners: Sequence[Hashable],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> WinRate:
    """Compare two models prompt by prompt; ties count one half.

    Args:
        ours: quality of our response to each prompt, higher is better.
        theirs: quality of the other model's response to the same prompts.
        owners: who wrote each prompt; the interval is a bootstrap over them.
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
    return WinRate(*owner_interval(outcomes_of(ours, theirs), owners, resamples=resamples, seed=seed))


def outcomes_of(ours: Sequence[float] | np.ndarray, theirs: Sequence[float] | np.ndarray) -> np.ndarray:
    """What each comparison of two scores counts.

    Args:
        ours: quality of our response to each of P prompts, higher is better.
        theirs: quality of the other model's.

    Returns:
        fp64 ``[P]``: 1 won, one half tied, 0 lost.
    """
    return (np.sign(np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)) + 1.0) / 2.0
