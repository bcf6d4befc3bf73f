"""From K ranked responses per prompt to a loss, an accuracy and a calibration.

InstructGPT (arXiv 2203.02155), section 3.5 and equation 1. The batch is flat and ragged::

    group_N   0  0  0  0  1  1  3  3  3       the prompt of each response; values may be skipped
    ranks_N   1  2  2  3  2  1  1  1  1       1 is best; equal ranks are ties
    pairs     5 (one tie dropped)  1  none    (better, worse) inside one prompt

A prompt counts once, however many pairs it has: pooling all pairs of the batch would let K = 9 (36 pairs) outweigh
K = 4 (6 pairs) six times. A prompt without a pair (ties only, or K = 1) counts not at all.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_instruct.functional.masking import at_least_fp32, divide_by_count


class Calibration(NamedTuple):
    """How far the probabilities ``sigmoid(difference)`` can be believed. All without gradient, fp32 or wider.

    Attributes:
        ece: 0-dim, expected calibration error: mean over pairs of ``|accuracy - confidence|`` of the pair's bin.
        brier: 0-dim, mean of ``(1 - p) ** 2`` with p the probability given to the human's choice.
        log_loss: 0-dim, mean of ``-log p``, nats.
        accuracy: 0-dim, share of pairs put in the human's order; equal scores count one half.
        bin_edges: ``[bins + 1]``, equal steps from 0.5 to 1; the lower edge belongs to the bin, 1 to the last one.
        bin_counts: ``[bins]``, pairs per bin.
        bin_confidences: ``[bins]``, mean confidence ``max(p, 1 - p)``; 0 where the bin is empty.
        bin_accuracies: ``[bins]``, accuracy; 0 where the bin is empty.
    """

    ece: Tensor
    brier: Tensor
    log_loss: Tensor
    accuracy: Tensor
    bin_edges: Tensor
    bin_counts: Tensor
    bin_confidences: Tensor
    bin_accuracies: Tensor


def last_token_index(mask_BT: Tensor) -> Tensor:
    """Find the last True of each row: where a reward model is read.

    ::

        mask   F T T F   ->  2     (sum - 1 would say 1: right only if padding is on the right alone)
               T T T T   ->  3
               F F F F   -> -1     (no token: nothing to read)

    Args:
        mask_BT: bool ``[B, T]``.

    Returns:
        int64 ``[B]``.
    """
    positions = torch.arange(1, mask_BT.shape[1] + 1, device=mask_BT.device)
    return (mask_BT * positions).amax(dim=1) - 1


def pair_differences(scores_N: Tensor, ranks_N: Tensor, group_N: Tensor) -> tuple[Tensor, Tensor]:
    """List score(better) - score(worse) for every pair that the labeler ordered. Ties make no pair.

    Args:
        scores_N: float ``[N]``.
        ranks_N: int ``[N]``, 1 is best.
        group_N: int ``[N]``, the prompt of each response.

    Returns:
        Differences ``[M]``, fp32 or wider, with gradient, and the prompt ``[M]`` (value of ``group_N``) of each.

    Raises:
        ValueError: the three do not have one shape ``[N]``.
    """
    _check_flat(scores_N, ranks_N, group_N)
    better_M, worse_M = _pairs(ranks_N, group_N).nonzero(as_tuple=True)
    scores_N = at_least_fp32(scores_N)
    return scores_N[better_M] - scores_N[worse_M], group_N[better_M]


def pair_credit(differences_M: Tensor) -> Tensor:
    """Give each pair its share of a hit: 1 in the labeler's order, 1/2 for equal scores, 0 the other way round.

    Args:
        differences_M: float ``[M]`` from ``pair_differences``.

    Returns:
        ``[M]``, in the dtype of the differences, without gradient.
    """
    return ((differences_M > 0) + 0.5 * (differences_M == 0)).to(differences_M.dtype)


def prompts_with_pair(ranks_N: Tensor, group_N: Tensor) -> Tensor:
    """Count the prompts that have at least one pair: the denominator of ``ranking_loss``.

    Args:
        ranks_N: int ``[N]``, 1 is best.
        group_N: int ``[N]``, the prompt of each response.

    Returns:
        int64, 0-dim. Sum it over micro-batches and ranks before the first backward.
    """
    _check_flat(ranks_N, ranks_N, group_N)
    better_M, _ = _pairs(ranks_N, group_N).nonzero(as_tuple=True)
    return torch.tensor(group_N[better_M].unique().numel(), device=group_N.device)


def ranking_loss(
    scores_N: Tensor,
    ranks_N: Tensor,
    group_N: Tensor,
    *,
    normalize: str = "retained",
    denominator: Tensor | float | None = None,
) -> Tensor:
    """Score the better response above the worse: mean over prompts of the mean over a prompt's pairs.

    ``-log sigmoid(better - worse)`` for each pair; InstructGPT's equation 1, with K = 2 the usual pairwise loss.

    Args:
        scores_N: float ``[N]``.
        ranks_N: int ``[N]``, 1 is best, equal ranks are ties and make no pair.
        group_N: int ``[N]``, the prompt of each response; any integers, in any order.
        normalize: what a prompt's sum is divided by. ``retained``: its pairs, after ties were dropped.
            ``k_choose_2``: K (K - 1) / 2 as equation 1 is printed, so that a prompt with ties weighs less. Without
            ties the two agree.
        denominator: number of prompts to divide by; None = this call's prompts with a pair. Give the number of the
            whole optimizer step (``prompts_with_pair``, summed) and micro-batches add up exactly.

    Returns:
        0-dim, fp32 or wider. Without a single pair a 0 that backpropagates zeros, so that no rank skips a backward.

    Raises:
        ValueError: unknown ``normalize``, or shapes that do not fit.
    """
    if normalize not in ("retained", "k_choose_2"):
        raise ValueError(f"normalize: got {normalize!r}, need 'retained' or 'k_choose_2'")
    _check_flat(scores_N, ranks_N, group_N)
    scores_N = at_least_fp32(scores_N)
    better_NN = _pairs(ranks_N, group_N)
    better_M, worse_M = better_NN.nonzero(as_tuple=True)
    same_NN = group_N[:, None] == group_N[None, :]
    if normalize == "retained":
        # Pairs of the whole prompt, written at each of its responses. A sum and not a matrix product: autocast
        # would run the product in bf16, which cannot count beyond 256.
        per_prompt_N = (same_NN * better_NN.sum(dim=1)).sum(dim=1)
    else:
        size_N = same_NN.sum(dim=1)
        per_prompt_N = size_N * (size_N - 1) // 2
    losses_M = F.softplus(scores_N[worse_M] - scores_N[better_M])
    total = (losses_M / per_prompt_N[better_M]).sum()
    count = group_N[better_M].unique().numel() if denominator is None else denominator
    return divide_by_count(total, count)


def ranking_accuracy(scores_N: Tensor, ranks_N: Tensor, group_N: Tensor) -> tuple[Tensor, Tensor]:
    """Count the pairs that the scores put in the labeler's order, pooled over prompts.

    Args:
        scores_N: float ``[N]``.
        ranks_N: int ``[N]``, 1 is best; tied responses make no pair.
        group_N: int ``[N]``, the prompt of each response.

    Returns:
        ``(correct, total)``, 0-dim: the first fp32 or wider, where equal scores count one half (a model that says
        nothing is at 50 %, not at 0); the second int64. Divide after both were summed over the whole set.
    """
    differences_M, _ = pair_differences(scores_N.detach(), ranks_N, group_N)
    return pair_credit(differences_M).sum(), torch.tensor(differences_M.numel(), device=scores_N.device)


def calibration(differences_M: Tensor, *, bins: int = 5) -> Calibration:
    """Compare the probabilities that the scores imply with how often they are right.

    Each pair is folded: confidence ``max(p, 1 - p)`` against whether the order was right, so that the direction in
    which a pair happens to be written does not matter.

    Args:
        differences_M: float ``[M]`` from ``pair_differences``: score of the better minus score of the worse.
        bins: number of equal bins on [0.5, 1].

    Returns:
        ``Calibration``; all zero if there are no pairs.

    Raises:
        ValueError: fewer than one bin.
    """
    if bins < 1:
        raise ValueError(f"bins: got {bins}, need at least 1")
    differences = at_least_fp32(differences_M.detach())
    count = differences.numel()
    right, credit = torch.sigmoid(differences), pair_credit(differences)
    confidence = torch.sigmoid(differences.abs())
    edges = torch.linspace(0.5, 1.0, bins + 1, dtype=differences.dtype, device=differences.device)
    # Only inner edges are searched, so that a confidence of exactly 1 falls into the last bin and not behind it.
    bin_M = torch.bucketize(confidence, edges[1:-1], right=True)
    counts, confidences, accuracies = (
        torch.zeros_like(edges[1:]).index_add(0, bin_M, values)
        for values in (torch.ones_like(confidence), confidence, credit)
    )
    filled = counts.clamp(min=1)
    return Calibration(
        ece=divide_by_count((accuracies - confidences).abs().sum(), count),
        brier=divide_by_count((1.0 - right).square().sum(), count),
        log_loss=divide_by_count(F.softplus(-differences).sum(), count),
        accuracy=divide_by_count(credit.sum(), count),
        bin_edges=edges,
        bin_counts=counts,
        bin_confidences=confidences / filled,
        bin_accuracies=accuracies / filled,
    )


def _pairs(ranks_N: Tensor, group_N: Tensor) -> Tensor:
    """Mark ``[i, j]``: i and j answer one prompt and i was ranked better. N is hundreds, so N x N is small."""
    return (group_N[:, None] == group_N[None, :]) & (ranks_N[:, None] < ranks_N[None, :])


def _check_flat(scores_N: Tensor, ranks_N: Tensor, group_N: Tensor) -> None:
    shapes = [list(tensor.shape) for tensor in (scores_N, ranks_N, group_N)]
    if scores_N.dim() != 1 or shapes[0] != shapes[1] or shapes[0] != shapes[2]:
        raise ValueError(f"scores, ranks, groups: got shapes {shapes}, need one flat shape [N] for all three")
