"""The plain ways: padded rows, pairs as rows of their own, ``generate``. PyTorch and transformers alone.

They are what the fast paths are held against where there is no peer to run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from scripts.benchmark.cases import EOS, PAD, SEED


def padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Ids and mask, int64 ``[B, T]``, padded on the right."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])


def head_weight(width: int) -> Tensor:
    """What both sides' reward models begin with: one row ``[1, width]``, N(0, 1 / (width + 1))."""
    return torch.randn(1, width, generator=torch.Generator().manual_seed(SEED)) * (width + 1) ** -0.5


def demonstration_backward(model: Any, batch: Any, *, bf16: bool) -> float:
    """Next-token loss on the responses of padded rows, and its gradients.

    Args:
        model: a causal language model.
        batch: ids, mask and loss mask, ``[B, T]``, padded on the right.
        bf16: under autocast.

    Returns:
        The mean loss in nats.
    """
    ids, mask, loss_mask = batch[:3]
    labels = ids.masked_fill(~loss_mask, -100)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model(input_ids=ids, attention_mask=mask.long(), labels=labels, use_cache=False).loss
    loss.backward()
    return float(loss.detach())


def pairs_backward(model: Any, pairs: list[dict[str, Any]], *, rows: int, bf16: bool) -> float:
    """The pair loss with every pair as two whole rows, and its gradients.

    Args:
        model: a sequence classifier with one output.
        pairs: ``chosen_ids`` and ``rejected_ids``, each with its prompt.
        rows: pairs of a forward pass.
        bf16: under autocast.

    Returns:
        The mean loss in nats.
    """
    total = 0.0
    for start in range(0, len(pairs), rows):
        part = pairs[start : start + rows]
        ids, mask = padded([pair["chosen_ids"] for pair in part] + [pair["rejected_ids"] for pair in part])
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            scores = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float().squeeze(-1)
        better, worse = scores.chunk(2)
        loss = -torch.nn.functional.logsigmoid(better - worse).sum() / len(pairs)
        loss.backward()
        total += float(loss.detach())
    return total


@torch.no_grad()
def generated_lengths(model: Any, prompt_ids: Tensor, *, rows: int, max_tokens: int) -> Tensor:
    """Sample with ``generate``, in groups of so many rows.

    Args:
        model: a causal language model in eval mode.
        prompt_ids: int64 ``[B, P]`` without padding.
        rows: of a group.
        max_tokens: of a response.

    Returns:
        Tokens of each response, its end of text included, int64 ``[B]``.
    """
    lengths = []
    for ids in prompt_ids.split(rows):
        made = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            max_new_tokens=max_tokens,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )[:, ids.shape[1] :]
        ended = (made == EOS).int()
        before = ended.cumsum(dim=1) - ended  # ends of text before each token
        lengths.append((before == 0).sum(dim=1))
    return torch.cat(lengths)
