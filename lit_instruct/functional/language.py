"""Next-token loss under a mask: SFT learns demonstrations with it, PPO-ptx keeps its pretraining text with it."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_instruct.functional.logprobs import gather_logprobs
from lit_instruct.functional.masking import divide_by_count


def next_token_loss(
    logits_BTV: Tensor,
    ids_BT: Tensor,
    loss_mask_BT: Tensor,
    *,
    reduction: str = "token_mean",
    denominator: Tensor | float | None = None,
) -> Tensor:
    """Average -log pi(token) over the tokens whose loss mask is True.

    The shift is done in here: the mask stands at the token that is to be predicted, the logits that predict it
    stand one column earlier. The first token has no predictor, the last logits have nothing to predict::

        column       0    1    2    3    4
        ids          p0   p1   r0   r1   E
        loss_mask    F    F    T    T    T
        logits       .    l1   l2   l3   .
                            \\    \\    \\
                             r0   r1   E         logits[:, t] predict ids[:, t + 1]

    InstructGPT (arXiv 2203.02155), section 3.5 (SFT) and the last term of equation 2 (which is maximised there; this
    is its negative and is minimised).

    Args:
        logits_BTV: float ``[B, T, V]`` for whole rows, or ``[N, V]`` for positions that the caller has picked; then
            logits and ids are aligned already and nothing is shifted.
        ids_BT: int64 ``[B, T]``, or ``[N]``.
        loss_mask_BT: bool ``[B, T]``, or ``[N]``. Logits under False are never read, NaN included.
        reduction: ``token_mean``: every counted token weighs the same. ``sequence_mean``: the mean of each row first,
            then over the rows that have a counted token (whole rows only).
        denominator: divide by this; None = this call's own count. Give the count of the whole optimizer step (tokens,
            or rows with a token) and micro-batches add up exactly. For whole rows column 0 is not counted:
            ``loss_mask_BT[:, 1:].sum()``.

    Returns:
        0-dim, nats per token, fp32 or wider; 0 with zero gradients if nothing is counted.

    Raises:
        ValueError: unknown reduction, shapes that do not fit, or a mask that is not bool.
    """
    if reduction not in ("token_mean", "sequence_mean"):
        raise ValueError(f"reduction: got {reduction!r}, need 'token_mean' or 'sequence_mean'")
    logits, ids, mask = _align(logits_BTV, ids_BT, loss_mask_BT)
    # Selecting first, not masking last: fewer rows are widened to fp32, and a NaN under False cannot reach a gradient.
    losses = -gather_logprobs(logits[mask], ids[mask])
    if reduction == "token_mean":
        return divide_by_count(losses.sum(), mask.sum() if denominator is None else denominator)
    if mask.dim() != 2:
        raise ValueError("reduction: got 'sequence_mean' for flat logits [N, V], need rows [B, T, V] to average over")
    tokens_BT = mask.sum(dim=1, keepdim=True).expand_as(mask)
    rows = mask.any(dim=1).sum()
    return divide_by_count((losses / tokens_BT[mask]).sum(), rows if denominator is None else denominator)


def token_accuracy(
    logits_BTV: Tensor, ids_BT: Tensor, loss_mask_BT: Tensor, *, denominator: Tensor | float | None = None
) -> Tensor:
    """Share of counted tokens that are the most likely one; alignment as in ``next_token_loss``.

    Where n tokens are equally likely, as half precision has it now and then, the right one counts 1 / n.

    Args:
        logits_BTV: float ``[B, T, V]``, or aligned ``[N, V]``.
        ids_BT: int64 ``[B, T]``, or ``[N]``.
        loss_mask_BT: bool ``[B, T]``, or ``[N]``.
        denominator: divide by this; None = the number of counted tokens.

    Returns:
        0-dim, fp32, without gradient; 0 if nothing is counted.

    Raises:
        ValueError: shapes that do not fit, or a mask that is not bool.
    """
    logits, ids, mask = _align(logits_BTV.detach(), ids_BT, loss_mask_BT)
    top = logits.amax(dim=-1)
    hit = mask & (logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1) == top)
    tied = (logits[hit] == top[hit].unsqueeze(-1)).sum(dim=-1)  # a maximum is far cheaper to find than its place
    return divide_by_count((1.0 / tied).sum(), mask.sum() if denominator is None else denominator)


def _align(logits: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bring logits, ids and mask to one shape in which equal positions belong together."""
    if mask.dtype != torch.bool:
        raise ValueError(f"loss_mask: got dtype {mask.dtype}, need torch.bool")
    if logits.dim() not in (2, 3) or not logits.shape[:-1] == ids.shape == mask.shape:
        raise ValueError(
            f"logits, ids, loss_mask: got shapes {list(logits.shape)}, {list(ids.shape)}, {list(mask.shape)}; "
            "need [B, T, V], [B, T], [B, T] for whole rows, or [N, V], [N], [N] for picked positions"
        )
    if logits.dim() == 2:
        return logits, ids, mask
    return logits[:, :-1], ids[:, 1:], mask[:, 1:]
