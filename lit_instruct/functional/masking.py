"""Statistics over the entries that count: masks from lengths, masked means, moments that merge, whitening.

Every function here drops the entries outside the mask *before* it computes with them. Multiplying by the mask
afterwards would not do: ``nan * 0`` is ``nan``, in the value and in the gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """Count, mean and sum of squared deviations: enough for a mean and a variance, and mergeable.

    Attributes:
        count: 0-dim, number of entries; a float tensor, so that the three stack into one tensor for a collective.
        mean: 0-dim, their mean; 0 if there are none.
        m2: 0-dim, ``sum((x - mean) ** 2)``; the population variance is ``m2 / count``.
    """

    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody needs on this record
    mean: Tensor
    m2: Tensor


def at_least_fp32(values: Tensor) -> Tensor:
    """Widen to fp32; fp64 stays fp64. The same tensor comes back if nothing is to be done."""
    return values if values.dtype == torch.float64 else values.float()


def divide_by_count(total: Tensor, count: Tensor | float) -> Tensor:
    """Divide a sum by how many it is over; a count of 0 divides by 1, since that sum is 0 already.

    The count may be below 1: ``global count / ranks`` is what undoes an averaging of gradients over ranks.

    Args:
        total: 0-dim float tensor.
        count: number or 0-dim tensor of any dtype.
    """
    count_tensor = torch.as_tensor(count, dtype=total.dtype, device=total.device)
    return total / torch.where(count_tensor == 0, torch.ones_like(count_tensor), count_tensor)


def check_mask(mask: Tensor, **tensors: Tensor) -> None:
    """Refuse a mask that is not bool and tensors that are not of its shape.

    Broadcasting would turn both into a plausible wrong number instead of an error.

    Args:
        mask: the mask, any shape.
        **tensors: what it is to be laid over, by name.

    Raises:
        ValueError: names the offender.
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"mask: got dtype {mask.dtype}, need torch.bool; build it from lengths or call .bool()")
    for name, tensor in tensors.items():
        if tensor.shape != mask.shape:
            raise ValueError(f"{name}: got shape {list(tensor.shape)}, need the mask's {list(mask.shape)}")


def keep(values: Tensor, mask: Tensor) -> Tensor:
    """Return the values at least in fp32, with zeros (and zero gradient) wherever the mask is False."""
    values = at_least_fp32(values)
    return torch.where(mask, values, torch.zeros_like(values))


def lengths_to_mask(lengths_B: Tensor, width: int) -> Tensor:
    """Build the mask of rows that are padded on the right.

    ::

        lengths [2, 4, 0], width 4   ->   T T F F
                                          T T T T
                                          F F F F

    Args:
        lengths_B: int ``[B]``, each between 0 and ``width``.
        width: number of columns.

    Returns:
        bool ``[B, width]``, True in the first ``lengths_B[b]`` columns of row b.
    """
    return torch.arange(width, device=lengths_B.device) < lengths_B[:, None]


def masked_mean(values: Tensor, mask: Tensor, *, denominator: Tensor | float | None = None) -> Tensor:
    """Average the entries under the mask.

    Args:
        values: float, any shape; what stands outside the mask (even NaN) has no effect.
        mask: bool, same shape.
        denominator: what to divide the sum by; None = the number of True entries. Give the count of the whole
            optimizer step to get parts that add up over micro-batches.

    Returns:
        0-dim, fp32 or wider; 0 if the mask is empty.
    """
    check_mask(mask, values=values)
    return divide_by_count(keep(values, mask).sum(), mask.sum() if denominator is None else denominator)


def masked_moments(values: Tensor, mask: Tensor) -> Moments:
    """Take count, mean and squared deviations of the entries under the mask.

    Args:
        values: float, any shape.
        mask: bool, same shape.

    Returns:
        ``Moments`` without gradient, fp32 or wider; all zero if the mask is empty.
    """
    check_mask(mask, values=values)
    values = keep(values.detach(), mask)
    count = mask.sum().to(values.dtype)
    mean = divide_by_count(values.sum(), count)
    # Two passes: E[x^2] - E[x]^2 cancels badly in fp32 once the mean is large against the spread.
    m2 = keep(values - mean, mask).square().sum()
    return Moments(count, mean, m2)


def merge_moments(a: Moments, b: Moments) -> Moments:
    """Join the moments of two sets into those of their union, as if they had been taken together.

    Chan, Golub and LeVeque (1979), the pairwise update. Either side may be empty.

    Args:
        a: moments of one set (of one rank, say).
        b: moments of another.

    Returns:
        Moments of the union.
    """
    count = a.count + b.count
    share_of_b = divide_by_count(b.count, count)
    shift = b.mean - a.mean
    return Moments(count, a.mean + shift * share_of_b, a.m2 + b.m2 + shift.square() * a.count * share_of_b)


def whiten(
    values: Tensor, mask: Tensor, *, center: bool = True, eps: float = 1e-8, moments: Moments | None = None
) -> Tensor:
    """Scale the entries under the mask to unit variance, over all of them together (not row by row).

    The variance is the population's (divided by n): what TensorFlow's moments give, and with them the code that
    the InstructGPT line descends from (Ziegler et al. 2019).

    Args:
        values: float, any shape; an entry outside the mask has no effect.
        mask: bool, same shape.
        center: True shifts the mean to 0. False scales about the mean and leaves it where it is:
            ``(x - mean) / sigma + mean``, which is not ``x / sigma``.
        eps: added to the variance under the root.
        moments: use these instead of the call's own: the merged ones of all ranks.

    Returns:
        Same shape, fp32 or wider, zeros outside the mask.
    """
    check_mask(mask, values=values)
    if moments is None:
        moments = masked_moments(values, mask)
    values = keep(values, mask)
    mean = moments.mean.to(values)
    variance = divide_by_count(moments.m2, moments.count).to(values)
    whitened = (values - mean) * torch.rsqrt(variance + eps)
    return keep(whitened if center else whitened + mean, mask)
