"""Accuracies over the runs of a cross-validation over labelers, with intervals that know who ranked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000

Counts = Mapping[str, Sequence[float]]
"""Labeler -> [pairs in the labeler's order, pairs that "the longer response wins" gets right, pairs]."""

Runs = Sequence[tuple[int, Counts]]
"""The fold of each run, and what was counted in it."""


class Figure(NamedTuple):
    """An accuracy over all runs.

    Attributes:
        accuracy: pairs in the labelers' order, pooled over labelers, folds and seeds.
        low: lower end of the 95 % interval, a bootstrap over labelers.
        high: its upper end.
        standard_error: standard deviation of the folds' accuracies (each pooled over its seeds) / sqrt(folds).
        length_baseline: what "the longer response wins" gets on the same pairs.
        pairs: measured pairs, each once a run.
        labelers: how many labelers ranked these pairs.
    """

    accuracy: float
    low: float
    high: float
    standard_error: float
    length_baseline: float
    pairs: int
    labelers: int


def figure(runs: Runs, *, seed: int = 0) -> Figure:
    """Put runs together.

    Args:
        runs: of one kind of set.
        seed: of the bootstrap.

    Returns:
        Accuracy with its interval.
    """
    counts_L3 = _table(runs, _labelers(runs))
    folds = sorted({fold for fold, _ in runs})
    by_fold = [_table([run for run in runs if run[0] == fold], _labelers(runs)).sum(axis=0) for fold in folds]
    correct, longer, pairs = counts_L3.sum(axis=0).tolist()
    return Figure(
        correct / pairs,
        *_interval(_resampled(counts_L3, seed)),
        standard_error=float(np.std([c / n for c, _, n in by_fold], ddof=1) / len(folds) ** 0.5),
        length_baseline=longer / pairs,
        pairs=int(pairs),
        labelers=int((counts_L3[:, 2] > 0).sum()),
    )


def difference(own: Runs, heldout: Runs, *, seed: int = 0) -> dict[str, float]:
    """Accuracy on own labelers minus accuracy on held-out ones: every labeler is both, in different folds.

    Args:
        own: runs measured on labelers of the training.
        heldout: the same runs measured on the others.
        seed: of the bootstrap, which draws each labeler with both of its numbers.

    Returns:
        ``difference`` and its 95 % interval ``low``, ``high``.
    """
    names = sorted({*_labelers(own), *_labelers(heldout)})
    ours_L3, theirs_L3 = _table(own, names), _table(heldout, names)
    low, high = _interval(_resampled(ours_L3, seed) - _resampled(theirs_L3, seed))
    (ours, _, our_pairs), (theirs, _, their_pairs) = ours_L3.sum(axis=0).tolist(), theirs_L3.sum(axis=0).tolist()
    return {"difference": ours / our_pairs - theirs / their_pairs, "low": low, "high": high}


def _labelers(runs: Runs) -> list[str]:
    return sorted({name for _, counts in runs for name in counts})


def _table(runs: Runs, names: Sequence[str]) -> np.ndarray:
    """Counts summed over runs: fp64 ``[L, 3]``."""
    return np.array(
        [np.sum([counts.get(name, (0, 0, 0)) for _, counts in runs], axis=0) for name in names], dtype=float
    )


def _resampled(counts_L3: np.ndarray, seed: int) -> np.ndarray:
    """Accuracies with as many labelers drawn anew: of two tables of as many labelers, the same ones."""
    drawn = np.random.default_rng(seed).integers(len(counts_L3), size=(RESAMPLES, len(counts_L3)))
    correct, pairs = counts_L3[drawn, 0].sum(axis=1), counts_L3[drawn, 2].sum(axis=1)
    return np.divide(correct, pairs, out=np.full(RESAMPLES, np.nan), where=pairs > 0)


def _interval(accuracies: np.ndarray) -> tuple[float, float]:
    low, high = np.nanquantile(accuracies, (0.025, 0.975))
    return float(low), float(high)
