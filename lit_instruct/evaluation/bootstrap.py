"""Means with 95 % intervals that know whose prompts they are taken over."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000
_BLOCK = 4_000_000  # numbers held at a time


class Interval(NamedTuple):
    """A mean with its interval.

    Attributes:
        mean: over all values.
        low: lower end of the 95 % interval.
        high: upper end.
        n: how many values.
    """

    mean: float
    low: float
    high: float
    n: int


class Owners(NamedTuple):
    """Who each of P values belongs to.

    Attributes:
        of_P: int64 ``[P]``, the number of the owner.
        total: how many owners.
    """

    of_P: np.ndarray
    total: int

    def sums(self, values_P: np.ndarray) -> np.ndarray:
        """The sum of each owner's values: fp64 ``[O]``."""
        return np.bincount(self.of_P, weights=values_P, minlength=self.total)

    def draws(self, *, resamples: int, seed: int) -> Iterator[np.ndarray]:
        """Draw as many owners as there are, with replacement, again and again.

        Args:
            resamples: how often.
            seed: of the draws.

        Yields:
            fp64 ``[r, O]``, how often each owner was drawn; together ``resamples`` rows.
        """
        stream = np.random.default_rng(seed)
        rows = max(1, _BLOCK // max(len(self.of_P), self.total))
        for start in range(0, resamples, rows):
            some = min(rows, resamples - start)
            drawn = stream.integers(self.total, size=(some, self.total))
            places = drawn + self.total * np.arange(some)[:, None]
            yield np.bincount(places.ravel(), minlength=some * self.total).reshape(some, self.total).astype(float)


def number_owners(owners: Sequence[Hashable]) -> Owners:
    """Number owners in the order in which they first occur.

    Args:
        owners: of P values.

    Returns:
        Their numbers.
    """
    numbers = {owner: number for number, owner in enumerate(dict.fromkeys(owners))}
    return Owners(np.array([numbers[owner] for owner in owners], dtype=np.int64), len(numbers))


def percentile_interval(estimates: np.ndarray) -> tuple[float, float]:
    """Where the middle 95 % of bootstrapped estimates lie.

    Args:
        estimates: one a resample.

    Returns:
        Lower and upper end.
    """
    low, high = np.quantile(estimates, (0.025, 0.975))
    return float(low), float(high)


def owner_interval(
    values: Sequence[float] | np.ndarray,
    owners: Sequence[Hashable],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The mean of all values, with an interval from a bootstrap over owners.

    Owners are drawn and not values: those of one owner resemble each other, and a validation set may be dominated by a
    few (Ouyang et al. 2022, table 6). An owner that is drawn brings all its values.

    Args:
        values: one or more finite numbers.
        owners: who each of them belongs to.
        resamples: how often owners are drawn anew.
        seed: of the draws.

    Returns:
        The mean, its 95 % interval (percentiles) and the number of values.

    Raises:
        ValueError: there are no values, or not as many owners.
    """
    if not len(values) or len(values) != len(owners):
        raise ValueError(f"got {len(values)} values and {len(owners)} owners; need as many of each, at least 1.")
    values_P = np.asarray(values, dtype=float)
    numbered = number_owners(owners)
    sums_O, counts_O = numbered.sums(values_P), numbered.sums(np.ones_like(values_P))
    means = [(drawn @ sums_O) / (drawn @ counts_O) for drawn in numbered.draws(resamples=resamples, seed=seed)]
    return Interval(float(values_P.mean()), *percentile_interval(np.concatenate(means)), n=len(values_P))
