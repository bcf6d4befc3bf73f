"""Shares with intervals: a bootstrap that draws whole tasks, since the pairs of one task hang together."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

RESAMPLES = 2000
_CHUNK = 100  # resamples at a time: a hundred times as many numbers as tasks


class Share(NamedTuple):
    """A share of pairs.

    Attributes:
        share: pooled over all tasks; None: there are no pairs.
        low: lower end of its 95 % interval.
        high: its upper end.
        standard_error: standard deviation of the resampled shares.
        pairs: how many pairs it is a share of.
    """

    share: float | None
    low: float | None
    high: float | None
    standard_error: float | None
    pairs: int


class Resampled(NamedTuple):
    """Counts of each task, and their sums over tasks that were drawn anew.

    Attributes:
        sums_C: fp64 ``[C]``, over all tasks.
        drawn_SC: fp64 ``[RESAMPLES, C]``, over as many tasks drawn with replacement.
    """

    sums_C: np.ndarray
    drawn_SC: np.ndarray

    def share(self, part: int, whole: int) -> Share:
        """The share that column ``part`` is of column ``whole``."""
        if not self.sums_C[whole]:
            return Share(None, None, None, None, 0)
        drawn_S = self._ratio(part, whole)
        low, high = np.nanquantile(drawn_S, (0.025, 0.975)).tolist()
        share = float(self.sums_C[part] / self.sums_C[whole])
        return Share(share, low, high, float(np.nanstd(drawn_S)), int(self.sums_C[whole]))

    def difference(self, one: tuple[int, int], other: tuple[int, int]) -> Share:
        """One share minus another, of the same tasks; ``pairs`` are those of the first."""
        if not self.sums_C[one[1]] or not self.sums_C[other[1]]:
            return Share(None, None, None, None, 0)
        drawn_S = self._ratio(*one) - self._ratio(*other)
        low, high = np.nanquantile(drawn_S, (0.025, 0.975)).tolist()
        value = self.sums_C[one[0]] / self.sums_C[one[1]] - self.sums_C[other[0]] / self.sums_C[other[1]]
        return Share(float(value), low, high, float(np.nanstd(drawn_S)), int(self.sums_C[one[1]]))

    def _ratio(self, part: int, whole: int) -> np.ndarray:
        parts_S, wholes_S = self.drawn_SC[:, part], self.drawn_SC[:, whole]
        return np.divide(parts_S, wholes_S, out=np.full(RESAMPLES, np.nan), where=wholes_S > 0)


def resample(counts_TC: np.ndarray, *, seed: int = 0) -> Resampled:
    """Draw tasks with replacement and add up their counts.

    Args:
        counts_TC: fp64 ``[T, C]``, one row a task.
        seed: of the draws; the same for all columns.
    """
    stream, tasks = np.random.default_rng(seed), len(counts_TC)
    chunks = [
        stream.multinomial(tasks, np.full(tasks, 1 / tasks), size=_CHUNK) @ counts_TC
        for _ in range(RESAMPLES // _CHUNK)
    ]
    return Resampled(counts_TC.sum(axis=0), np.concatenate(chunks))
