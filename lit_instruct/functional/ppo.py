"""PPO's arithmetic on responses: rewards per token, advantages, the two clipped losses.

Column t of every ``_BR`` tensor belongs to response token t; responses are padded on the right. Sources: InstructGPT
(arXiv 2203.02155), section 3.5, equation 2; Ziegler et al. 2019 and Stiennon et al. 2020 for the per-token penalty;
Schulman et al. 2016 for GAE and 2017 for PPO.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_instruct.functional.kl import kl_estimates
from lit_instruct.functional.masking import (
    at_least_fp32,
    check_mask,
    divide_by_count,
    keep,
    masked_mean,
    masked_moments,
)
from lit_instruct.functional.ranking import last_token_index


def missing_eos_scores(scores_B: Tensor, finished_B: Tensor, *, rule: str, value: float = -1.0) -> Tensor:
    """Mark down responses that ran into the length limit. InstructGPT states no rule; three are in use.

    Args:
        scores_B: float ``[B]``, from the reward model.
        finished_B: bool ``[B]``, True where the response ended by itself.
        rule: ``none``: leave the score. ``replace``: the score becomes ``value`` (Ziegler et al.). ``subtract``:
            ``abs(value)`` is taken off, so that a better response still scores better.
        value: see the rule; the sign does not matter for ``subtract``.

    Returns:
        ``[B]``, fp32 or wider.

    Raises:
        ValueError: unknown rule, or shapes that do not fit.
    """
    check_mask(finished_B, scores=scores_B)
    scores = at_least_fp32(scores_B)
    if rule == "none":
        return scores
    if rule == "replace":
        return torch.where(finished_B, scores, torch.full_like(scores, value))
    if rule == "subtract":
        return torch.where(finished_B, scores, scores - abs(value))
    raise ValueError(f"rule: got {rule!r}, need 'none', 'replace' or 'subtract'")


@torch.no_grad()
def token_rewards(
    scores_B: Tensor, logprobs_BR: Tensor, reference_logprobs_BR: Tensor, mask_BR: Tensor, *, kl_coef: float
) -> Tensor:
    """Charge each token for leaving the reference, and pay the score at the last one.

    ::

        mask      T      T      T      F      F        s = score, c = kl_coef, k = log pi - log reference
        rewards  -c k0  -c k1  -c k2+s 0      0        (paid at the last True, not in the last column)

    Args:
        scores_B: float ``[B]``.
        logprobs_BR: float ``[B, R]``, nats, of the policy that sampled.
        reference_logprobs_BR: float ``[B, R]``, nats.
        mask_BR: bool ``[B, R]``; anything may stand outside it.
        kl_coef: price of one nat.

    Returns:
        ``[B, R]``, fp32 or wider, zeros at padding, no gradient: PPO takes rewards as constants. A row without a token
        is paid nothing.

    Raises:
        ValueError: shapes that do not fit, or a mask that is not bool.
    """
    check_mask(mask_BR, logprobs=logprobs_BR, reference_logprobs=reference_logprobs_BR)
    if scores_B.shape != mask_BR.shape[:1]:
        raise ValueError(f"scores: got shape {list(scores_B.shape)}, need one per row, {list(mask_BR.shape[:1])}")
    penalties = kl_coef * kl_estimates(keep(logprobs_BR, mask_BR), keep(reference_logprobs_BR, mask_BR)).k1
    columns = torch.arange(mask_BR.shape[1], device=mask_BR.device)
    last_BR = columns == last_token_index(mask_BR)[:, None]
    return keep(at_least_fp32(scores_B)[:, None].expand(mask_BR.shape), last_BR) - penalties


@torch.no_grad()
def generalized_advantages(
    rewards_BR: Tensor, values_BR: Tensor, mask_BR: Tensor, *, discount: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Walk back from the last token and sum the discounted surprises (GAE).

    ::

        mask          T             T             T            F
        surprise  r0 + d v1 - v0  r1 + d v2 - v1  r2 +  0 - v2  0       d = discount, e = d * gae_lambda
        advantage     s0 + e A1     s1 + e A2     s2           0       (after the last token the value is 0,
        return        A0 + v0       A1 + v1       A2 + v2      0        also when the length limit cut the response)

    With ``gae_lambda=1`` and ``discount=1`` a return is the plain sum of the rewards from there on.

    Args:
        rewards_BR: float ``[B, R]``.
        values_BR: float ``[B, R]``, column t the value of the state before token t.
        mask_BR: bool ``[B, R]``; anything may stand outside it.
        discount: 0 to 1; InstructGPT uses 1.
        gae_lambda: 0 to 1; 0.95.

    Returns:
        ``(advantages, returns)``, each ``[B, R]``, fp32 or wider, zeros at padding, no gradient. Returns are taken
        before any whitening.

    Raises:
        ValueError: a coefficient outside 0 to 1, shapes that do not fit, or a mask that is not bool.
    """
    check_mask(mask_BR, rewards=rewards_BR, values=values_BR)
    if not (0.0 <= discount <= 1.0 and 0.0 <= gae_lambda <= 1.0):
        raise ValueError(f"got discount={discount} and gae_lambda={gae_lambda}, need both between 0 and 1")
    rewards, values = keep(rewards_BR, mask_BR), keep(values_BR, mask_BR)
    advantages = torch.zeros_like(values)
    advantage_B = next_value_B = values.new_zeros(values.shape[0])
    for column in reversed(range(values.shape[1])):
        surprise_B = rewards[:, column] + discount * next_value_B - values[:, column]
        advantage_B = keep(surprise_B + discount * gae_lambda * advantage_B, mask_BR[:, column])
        advantages[:, column] = advantage_B
        next_value_B = values[:, column]
    return advantages, advantages + values


def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_range: float,
    denominator: Tensor | float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped surrogate: ``mean(max(-A ratio, -A clip(ratio, 1 - c, 1 + c)))`` over the tokens under the mask.

    The gradient vanishes where the step has gone far enough in the wanted direction (A > 0 and ratio > 1 + c, or A < 0
    and ratio < 1 - c) and nowhere else. Schulman et al. 2017, equation 7, with the sign turned.

    Args:
        logprobs: float, any shape (``[B, R]`` as a rule), of the policy that learns.
        old_logprobs: float, same shape, of the policy that sampled; constants.
        advantages: float, same shape; constants.
        mask: bool, same shape; what stands outside it, NaN included, reaches neither loss nor gradient.
        clip_range: c above.
        denominator: divide by this; None = the number of True entries. With the count of the whole optimizer step the
            losses of micro-batches sum to the loss of the step, and so do all metrics that are means; of
            ``ratio_max`` take the maximum.

    Returns:
        ``(loss, metrics)``: 0-dim, fp32 or wider; the metrics without gradient. ``clip_fraction``: share of tokens
        where the clipped term is the larger one. ``approx_kl`` (k3), ``approx_kl_k1``, ``approx_kl_k2``: KL(old || new)
        from samples of the old policy, nats per token. ``ratio_mean``, ``ratio_max`` (0 if the mask is empty).

    Raises:
        ValueError: a negative clip range, shapes that do not fit, or a mask that is not bool.
    """
    check_mask(mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    if clip_range < 0:
        raise ValueError(f"clip_range: got {clip_range}, need 0 or more")
    logprobs, old_logprobs = keep(logprobs, mask), keep(old_logprobs.detach(), mask)
    advantages = keep(advantages.detach(), mask)
    count = mask.sum() if denominator is None else denominator
    ratio = torch.exp(logprobs - old_logprobs)
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    loss = masked_mean(torch.maximum(unclipped, clipped), mask, denominator=count)
    with torch.no_grad():
        kl = kl_estimates(old_logprobs, logprobs)
        means = {
            "clip_fraction": (clipped > unclipped).to(ratio.dtype),
            "approx_kl": kl.k3,
            "approx_kl_k1": kl.k1,
            "approx_kl_k2": kl.k2,
            "ratio_mean": ratio,
        }
        metrics = {name: masked_mean(values, mask, denominator=count) for name, values in means.items()}
        ratios = keep(ratio, mask)  # ratios are positive, so a 0 at padding is never the maximum
        metrics["ratio_max"] = ratios.max() if ratios.numel() else ratios.new_zeros(())
    return loss, metrics


def clipped_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip_range: float | None,
    denominator: Tensor | float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Half the squared error to the returns, the larger of the plain one and that of the value kept near its old self.

    ``mean(max((v - G)^2, (v_old + clip(v - v_old, -c, c) - G)^2)) / 2``. As in the code of Ziegler et al. 2019. The
    clip range is in units of reward: scores of a large spread make it a brake.

    Args:
        values: float, any shape (``[B, R]`` as a rule), of the value model that learns.
        old_values: float, same shape, at sampling time; constants.
        returns: float, same shape; constants.
        mask: bool, same shape; what stands outside it, NaN included, reaches neither loss nor gradient.
        clip_range: c above; None = plain squared error.
        denominator: divide by this; None = the number of True entries. With the count of the whole optimizer step
            losses and metrics of micro-batches sum to those of the step.

    Returns:
        ``(loss, metrics)``: 0-dim, fp32 or wider, the 1/2 included; ``clip_fraction``, without gradient: share of
        tokens where the clipped term is the larger one.

    Raises:
        ValueError: a negative clip range, shapes that do not fit, or a mask that is not bool.
    """
    check_mask(mask, values=values, old_values=old_values, returns=returns)
    if clip_range is not None and clip_range < 0:
        raise ValueError(f"clip_range: got {clip_range}, need 0 or more, or None for no clipping")
    values, old_values = keep(values, mask), keep(old_values.detach(), mask)
    returns = keep(returns.detach(), mask)
    count = mask.sum() if denominator is None else denominator
    unclipped = clipped = (values - returns).square()
    if clip_range is not None:
        # Not old + clamp(new - old): it rounds values that are not clipped, and half of those would count as clipped.
        near = values.clamp(old_values - clip_range, old_values + clip_range)
        clipped = (near - returns).square()
    loss = 0.5 * masked_mean(torch.maximum(unclipped, clipped), mask, denominator=count)
    clip_fraction = masked_mean((clipped > unclipped).to(loss.dtype), mask, denominator=count)
    return loss, {"clip_fraction": clip_fraction}


def explained_variance(old_values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Share of the returns' variance that the values foresaw: ``1 - mean((G - v)^2) / var(G)``.

    Args:
        old_values: float, any shape, at sampling time.
        returns: float, same shape.
        mask: bool, same shape.

    Returns:
        0-dim, fp32 or wider, without gradient: 1 is perfect, below 0 is worse than a constant; 0 if the returns do not
        vary (or the mask is empty), where the share has no meaning.

    Raises:
        ValueError: shapes that do not fit, or a mask that is not bool.
    """
    check_mask(mask, old_values=old_values, returns=returns)
    moments = masked_moments(returns, mask)
    squared_error = (keep(returns.detach(), mask) - keep(old_values.detach(), mask)).square().sum()
    share = 1.0 - divide_by_count(squared_error, moments.m2)
    return torch.where(moments.m2 > 0, share, torch.zeros_like(share))
