"""Best of n: the stored vector, and every subset of the samples."""

from __future__ import annotations

from itertools import combinations, permutations

import numpy as np
import pytest

from lit_instruct.evaluation.best_of_n import best_of_n_kl, best_of_n_scores
from tests.helpers.numbers import assert_vector


def test_vector_best_of_n_kl() -> None:
    expected = [0.0, 0.1931471806, 0.6362943611, 1.835088722, 3.174508083]
    assert_vector([best_of_n_kl(n) for n in (1, 2, 4, 16, 64)], expected)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6])
def test_mean_over_all_subsets(n: int) -> None:
    scores = np.random.default_rng(n).normal(size=(4, 6))
    expected = [float(np.mean([max(some) for some in combinations(row, n)])) for row in scores]
    assert_vector(best_of_n_scores(scores, n).tolist(), expected)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_picked_by_other_scores_with_ties(n: int) -> None:
    """Of samples that tie for the best any is picked: the mean over all orders in which they might come."""
    scores, picked_by = [3.0, -1.0, 0.5, 7.0], [1.0, 2.0, 2.0, 0.0]
    found = []
    for order in permutations(range(4)):
        for subset in combinations(order, n):
            found.append(scores[max(subset, key=lambda place: picked_by[place])])  # the first of the best ones
    value = best_of_n_scores(np.array([scores]), n, picked_by_PN=np.array([picked_by]))
    assert_vector(value.tolist(), [float(np.mean(found))])


def test_a_proxy_that_is_wrong_picks_the_worst() -> None:
    scores = np.array([[0.0, 1.0, 2.0]])
    assert_vector(best_of_n_scores(scores, 3, picked_by_PN=-scores).tolist(), [0.0])


@pytest.mark.parametrize("n", [0, 4])
def test_no_more_than_there_are(n: int) -> None:
    with pytest.raises(ValueError, match="n: got"):
        best_of_n_scores(np.zeros((1, 3)), n)


def test_no_best_of_none() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        best_of_n_kl(0)
