"""How two numbers per response go together: over all responses, and within the responses to one prompt.

Written for the question whether a reward model prefers long responses (Stiennon et al. 2020). Both are 0 where one side
does not vary, since then there is nothing to go together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_instruct.functional.diagnostics import correlation
from lit_instruct.functional.masking import at_least_fp32


def spearman_correlation(x_N: Tensor, y_N: Tensor) -> Tensor:
    """Correlate the ranks of two series (Spearman 1904); equal values share the mean of their ranks.

    Over responses to many prompts it mixes two things: that some prompts get higher scores and longer answers, and
    that longer answers to one prompt get higher scores. For the second alone see ``within_group_correlation``.

    Args:
        x_N: number ``[N]``.
        y_N: number ``[N]``.

    Returns:
        0-dim, fp64, between -1 and 1, without gradient; 0 if either side is constant.

    Raises:
        ValueError: the two do not have one shape ``[N]``.
    """
    _check_flat(x_N, y_N)
    return correlation(_mean_ranks(x_N), _mean_ranks(y_N))


@torch.no_grad()
def within_group_correlation(x_N: Tensor, y_N: Tensor, group_N: Tensor) -> Tensor:
    """Correlate what is left of two series once each group's mean is taken off (Pearson, pooled over groups).

    ``sum (x - mean_g x)(y - mean_g y) / sqrt(sum (x - mean_g x)^2 * sum (y - mean_g y)^2)``: with prompts as groups it
    compares responses to one prompt only, which is all that a ranking can teach.

    Args:
        x_N: number ``[N]``.
        y_N: number ``[N]``.
        group_N: int ``[N]``, any integers in any order; a group of one adds nothing.

    Returns:
        0-dim, fp32 or wider, between -1 and 1, without gradient; 0 if either side is constant in every group.

    Raises:
        ValueError: the three do not have one shape ``[N]``.
    """
    _check_flat(x_N, y_N, group_N)
    _, index_N, count_G = group_N.unique(return_inverse=True, return_counts=True)
    return correlation(*(_centred(values_N, index_N, count_G) for values_N in (x_N, y_N)))


def _centred(values_N: Tensor, index_N: Tensor, count_G: Tensor) -> Tensor:
    """Take off the group's mean."""
    values_N = at_least_fp32(values_N)
    mean_G = values_N.new_zeros(len(count_G)).index_add(0, index_N, values_N) / count_G
    return values_N - mean_G[index_N]


def _mean_ranks(values_N: Tensor) -> Tensor:
    """Ranks from 1, lowest first; equal values get the mean of the ranks that they take up together."""
    _, index_N, count_U = values_N.detach().unique(return_inverse=True, return_counts=True)
    return (count_U.cumsum(0) - (count_U - 1) / 2.0).double()[index_N]


def _check_flat(*series: Tensor) -> None:
    shapes = [list(values.shape) for values in series]
    if series[0].dim() != 1 or any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"got shapes {shapes}, need one flat shape [N] for all")
