"""The forms that Gao et al. 2022 found for the gold score as a policy moves away from where it started.

With ``d = sqrt(KL)`` and R the gain of the gold score over the start:

    best of n:              R = d (alpha - beta d)
    reinforcement learning: R = d (alpha - beta log d)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


class Fit(NamedTuple):
    """A fitted form.

    Attributes:
        alpha: gain a unit of distance at the start.
        beta: how soon it turns.
        r2: share of the variance of R that the form explains.
    """

    alpha: float
    beta: float
    r2: float


def best_of_n_form(d: np.ndarray) -> np.ndarray:
    """What beta is multiplied by, for best of n."""
    return -d * d


def reinforcement_form(d: np.ndarray) -> np.ndarray:
    """What beta is multiplied by, for reinforcement learning."""
    return -d * np.log(d)


def fit(kl: Sequence[float], gains: Sequence[float], form: Callable[[np.ndarray], np.ndarray]) -> Fit:
    """Fit alpha and beta by least squares; both stand linearly in the forms.

    Args:
        kl: nats, above 0.
        gains: of the gold score.
        form: ``best_of_n_form`` or ``reinforcement_form``.

    Returns:
        The fit.

    Raises:
        ValueError: there are fewer than three points, or a KL that is not above 0.
    """
    if len(kl) < 3 or min(kl) <= 0:
        raise ValueError(f"got {len(kl)} points with KL from {min(kl, default=0)}; need 3 or more above 0.")
    d = np.sqrt(np.asarray(kl, dtype=float))
    wanted = np.asarray(gains, dtype=float)
    terms = np.stack([d, form(d)], axis=1)
    (alpha, beta), *_ = np.linalg.lstsq(terms, wanted, rcond=None)
    left = wanted - terms @ np.array([alpha, beta])
    return Fit(float(alpha), float(beta), float(1.0 - left @ left / np.square(wanted - wanted.mean()).sum()))
