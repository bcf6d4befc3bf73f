"""Numbers that say whether a rollout looks healthy: does the score follow length, does text repeat, do prompts differ.

Nothing is learned from them; ``rollouts.describe`` logs them and the callback ``Health`` reads them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_instruct.functional.masking import at_least_fp32, check_mask


@torch.no_grad()
def correlation(x_B: Tensor, y_B: Tensor) -> Tensor:
    """Pearson's coefficient of two samples.

    Args:
        x_B: any real dtype, ``[B]``.
        y_B: the same shape.

    Returns:
        0-dim, fp32 or wider, -1 to 1; 0 if one of the two does not vary, where the coefficient has no meaning.

    Raises:
        ValueError: shapes that do not fit.
    """
    if x_B.shape != y_B.shape:
        raise ValueError(f"correlation: got shapes {list(x_B.shape)} and {list(y_B.shape)}, need the same")
    x_B, y_B = at_least_fp32(x_B), at_least_fp32(y_B)
    # Equal numbers can miss their own mean by a rounding: asked of the numbers, not of their squared deviations.
    if not len(x_B) or bool((x_B == x_B[0]).all() | (y_B == y_B[0]).all()):
        return x_B.new_zeros(())
    x_B, y_B = x_B - x_B.mean(), y_B - y_B.mean()
    return (x_B * y_B).sum() / (x_B.norm() * y_B.norm())


@torch.no_grad()
def repeated_ngrams(ids_BR: Tensor, mask_BR: Tensor, *, size: int = 4) -> Tensor:
    """Share of a response's n-grams that occurred in it before, averaged over responses.

    ::

        a b c d a b c d e     size 4: abcd bcda cdab dabc ABCD bcde     1 of 6 occurred before

    Args:
        ids_BR: int64 ``[B, R]``, not negative.
        mask_BR: bool ``[B, R]``.
        size: tokens of an n-gram.

    Returns:
        0-dim fp32, 0 to 1: mean over the responses with at least ``size`` tokens, each counting alike; 0 if there is
        none.

    Raises:
        ValueError: shapes that do not fit, a mask that is not bool, or a size below 1.
    """
    check_mask(mask_BR, ids=ids_BR)
    if size < 1:
        raise ValueError(f"size: got {size}, need 1 or more")
    rows, width = ids_BR.shape
    if rows == 0 or width < size:
        return torch.zeros((), device=ids_BR.device)
    windows = width - size + 1
    # Number the distinct n-grams by numbering pairs (n-1-gram, next token): exact, and each sort is over one column.
    tokens_BR = codes_BW = torch.unique(ids_BR, return_inverse=True)[1]
    vocabulary = int(tokens_BR.max()) + 1
    counted_BW = mask_BR[:, :windows].clone()
    for shift in range(1, size):
        pairs = codes_BW[:, : width - shift] * vocabulary + tokens_BR[:, shift:]
        codes_BW = torch.unique(pairs, return_inverse=True)[1]
        counted_BW &= mask_BR[:, shift : shift + windows]
    kinds = int(codes_BW.max()) + 1
    row_B1 = torch.arange(rows, device=ids_BR.device)[:, None]
    seen = torch.unique((row_B1 * kinds + codes_BW)[counted_BW])
    distinct_B = torch.bincount(seen // kinds, minlength=rows)
    total_B = counted_BW.sum(dim=1)
    share_B = 1.0 - distinct_B / total_B.clamp_min(1)
    long_enough_B = total_B > 0
    return (share_B * long_enough_B).sum() / long_enough_B.sum().clamp_min(1)


@torch.no_grad()
def distinct_rows(ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Share of rows that differ, what stands at padding aside.

    Args:
        ids_BT: int64 ``[B, T]``, not negative, all rows padded on the same side.
        mask_BT: bool ``[B, T]``.

    Returns:
        0-dim fp32: number of different rows / B; 1 if there is none.

    Raises:
        ValueError: shapes that do not fit, or a mask that is not bool.
    """
    check_mask(mask_BT, ids=ids_BT)
    if not len(ids_BT):
        return torch.ones((), device=ids_BT.device)
    different = torch.unique(ids_BT.where(mask_BT, -1), dim=0)
    return torch.tensor(len(different) / len(ids_BT), device=ids_BT.device)
