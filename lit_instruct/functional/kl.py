"""How far the policy has moved from its reference: per-token estimators, and the controller of their price.

Source of the names: J. Schulman, "Approximating KL Divergence" (2020). With x sampled from the policy and
r = reference(x) / policy(x)::

    k1 = -log r              unbiased, either sign, noisy        the penalty inside the rewards
    k2 = (log r)^2 / 2       biased, never negative, calm        a diagnostic
    k3 = (r - 1) - log r     unbiased, never negative, calm      a diagnostic
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lit_instruct.functional.masking import at_least_fp32

_MAX_ERROR = 0.2
"""Ziegler et al. (2019), section 2.2: the controller's proportional error is clipped to this."""


class KLEstimates(NamedTuple):
    """Three estimators of KL(policy || reference), per token, same shape as the log-probabilities, nats.

    Attributes:
        k1: unbiased; may be negative.
        k2: biased, low variance.
        k3: unbiased, non-negative.
    """

    k1: Tensor
    k2: Tensor
    k3: Tensor


def kl_estimates(logprobs: Tensor, reference_logprobs: Tensor) -> KLEstimates:
    """Estimate KL(policy || reference) at tokens that the policy sampled.

    Mask before summing or averaging: what stands at padding is computed like the rest.

    Args:
        logprobs: float, any shape, log pi(token) under the policy that sampled.
        reference_logprobs: float, same shape, under the reference.

    Returns:
        ``KLEstimates``, fp32 or wider.
    """
    k1 = at_least_fp32(logprobs) - at_least_fp32(reference_logprobs)
    # expm1, since r - 1 loses all its digits where the two models nearly agree.
    return KLEstimates(k1=k1, k2=k1.square() / 2, k3=torch.expm1(-k1) + k1)


def adaptive_kl_coef(
    kl_coef: float, observed_kl: float | Tensor, *, target: float, horizon: float, episodes: int
) -> float:
    """Move the KL coefficient towards the value at which the policy stays ``target`` nats away.

    Ziegler et al. (2019), section 2.2, with the gain of their released code, ``episodes / horizon``; the
    paper's fixed gain of 0.1 is ``episodes=1000, horizon=10000``. InstructGPT itself keeps the coefficient fixed.

    Args:
        kl_coef: the coefficient of the iteration just finished.
        observed_kl: that iteration's mean KL per *sequence* (k1), nats.
        target: wanted KL per sequence, nats.
        horizon: number of episodes over which a full-size error multiplies the coefficient by about e^0.2.
        episodes: episodes of the iteration.

    Returns:
        The coefficient for the next iteration.

    Raises:
        ValueError: target or horizon is not positive.
    """
    if not (target > 0 and horizon > 0):
        raise ValueError(f"adaptive KL: got target={target} and horizon={horizon}, need both above 0")
    error = min(max(float(observed_kl) / target - 1.0, -_MAX_ERROR), _MAX_ERROR)
    return kl_coef * (1.0 + error * episodes / horizon)
