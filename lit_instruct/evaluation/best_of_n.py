"""Best-of-n sampling: how far it moves from the model that samples, and what score it reaches."""

from __future__ import annotations

import math

import numpy as np


def best_of_n_kl(n: int) -> float:
    """KL of "the best of n samples" to the model that samples.

    Exact where no two samples tie (Stiennon et al. 2020), an upper bound else.

    Args:
        n: how many samples the best is taken of.

    Returns:
        ``log n - (n - 1) / n``, nats a sequence.

    Raises:
        ValueError: n is below 1.
    """
    if n < 1:
        raise ValueError(f"n: got {n}; need at least 1.")
    return math.log(n) - (n - 1) / n


def best_of_n_scores(scores_PN: np.ndarray, n: int, *, picked_by_PN: np.ndarray | None = None) -> np.ndarray:
    """The expected score of the best of n samples, estimated without bias from N >= n samples a prompt.

    All subsets of n out of the N samples are averaged (Nakano et al. 2021): with the samples in ascending
    order, the i-th is the best of ``comb(i - 1, n - 1)`` of the ``comb(N, n)`` subsets. The mean of N / n disjoint
    groups is unbiased too, but noisier.

    Args:
        scores_PN: fp ``[P, N]``, what is asked for.
        n: how many samples the best is taken of.
        picked_by_PN: fp ``[P, N]``, the scores by which the best is picked, where these are others (a reward model's,
            say, while ``scores_PN`` are gold); samples that tie are picked equally often.

    Returns:
        fp64 ``[P]``.

    Raises:
        ValueError: n is below 1 or above N.
    """
    scores_PN = np.asarray(scores_PN, dtype=float)
    count = scores_PN.shape[1]
    if not 1 <= n <= count:
        raise ValueError(f"n: got {n} for {count} samples a prompt; need 1 to {count}.")
    subsets = math.comb(count, n)
    share_N = np.array([math.comb(place, n - 1) / subsets for place in range(count)])
    picked_by_PN = scores_PN if picked_by_PN is None else np.asarray(picked_by_PN, dtype=float)
    best_P = np.empty(len(scores_PN))
    for row, (scores_N, picked_by_N) in enumerate(zip(scores_PN, picked_by_PN, strict=True)):
        order_N = np.argsort(picked_by_N, kind="stable")
        _, level_N, size_L = np.unique(picked_by_N[order_N], return_inverse=True, return_counts=True)
        shared_N = (np.bincount(level_N, weights=share_N) / size_L)[level_N]
        best_P[row] = shared_N @ scores_N[order_N]
    return best_P
