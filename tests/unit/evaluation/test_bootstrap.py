"""Intervals over owners, against scipy, statsmodels and all resamples that there are."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import stats

from lit_instruct.evaluation.bootstrap import number_owners, owner_interval
from tests.helpers.numbers import assert_close, assert_vector


def _clustered(owners: int, each: int, *, spread: float) -> tuple[np.ndarray, np.ndarray]:
    """Values that resemble those of the same owner."""
    stream = np.random.default_rng(5)
    owner_of = np.repeat(np.arange(owners), each)
    return stream.normal(0.4, spread, owners)[owner_of] + stream.normal(0.0, 0.1, owners * each), owner_of


def test_every_resample_of_three_owners() -> None:
    """27 draws are possible; the quantiles lie on them, whatever the size of each owner."""
    by_owner = [np.array([0.0, 1.0, 1.0, 0.0, 1.0]), np.array([1.0, 1.0]), np.array([0.0, 0.5, 0.0])]
    exact = [np.concatenate([by_owner[o] for o in drawn]).mean() for drawn in product(range(3), repeat=3)]
    owners = [name for name, values in zip("abc", by_owner, strict=True) for _ in values]
    found = owner_interval(np.concatenate(by_owner), owners, resamples=20_000)
    assert_vector([found.low, found.high], np.quantile(exact, (0.025, 0.975), method="inverted_cdf").tolist())
    assert_vector(found.mean, float(np.concatenate(by_owner).mean()))
    assert found.n == 10


def test_scipy_draws_the_same_interval() -> None:
    """Owners of equal size: a bootstrap over owners is one over the owners' means."""
    values, owner_of = _clustered(40, 6, spread=0.3)
    found = owner_interval(values, owner_of.tolist(), resamples=20_000)
    means = values.reshape(40, 6).mean(axis=1)
    other = stats.bootstrap((means,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1))
    expected = [other.confidence_interval.low, other.confidence_interval.high]
    assert_close([found.low, found.high], expected, scale=300)  # two bootstraps of 20,000 draws


def test_statsmodels_agrees_on_the_width() -> None:
    """Standard errors that are robust to clusters: what the bootstrap estimates, by a formula."""
    values, owner_of = _clustered(200, 4, spread=0.3)
    found = owner_interval(values, owner_of.tolist(), resamples=10_000)
    fitted = sm.OLS(values, np.ones(len(values))).fit(cov_type="cluster", cov_kwds={"groups": owner_of})
    assert_close((found.high - found.low) / (2 * 1.959964 * float(fitted.bse[0])), 1.0, scale=3000)  # 3 %
    naive = sm.OLS(values, np.ones(len(values))).fit()
    assert (found.high - found.low) > 1.5 * 2 * 1.959964 * float(naive.bse[0])


def test_blocks_of_draws_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values, owner_of = _clustered(30, 3, spread=0.3)
    whole = owner_interval(values, owner_of.tolist())
    monkeypatch.setattr("lit_instruct.evaluation.bootstrap._BLOCK", 1000)
    assert owner_interval(values, owner_of.tolist()) == whole


def test_every_resample_draws_as_many_owners_as_there_are() -> None:
    drawn = np.concatenate(list(number_owners("abcab").draws(resamples=50, seed=0)))
    assert drawn.shape == (50, 3)
    assert set(drawn.sum(axis=1)) == {3.0}


@pytest.mark.parametrize(("values", "owners"), [([], []), ([1.0], []), ([1.0], ["a", "b"])])
def test_as_many_owners_as_values(values: list[float], owners: list[str]) -> None:
    with pytest.raises(ValueError, match="as many of each"):
        owner_interval(values, owners)
