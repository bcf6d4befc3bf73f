"""Encoded samples to padded batches. Pure functions; the padding picture is in ``lit_instruct.types``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lit_instruct.types import ComparisonBatch, DemonstrationBatch, PromptBatch


class EncodedDemonstration(NamedTuple):
    """A prompt and its response (with end of text) as token ids."""

    prompt_ids: list[int]
    response_ids: list[int]

    @property
    def response_len(self) -> int:
        """Tokens of the response."""
        return len(self.response_ids)


class EncodedComparison(NamedTuple):
    """A prompt, its K responses (each with end of text) as token ids, their ranks, and the labeler's number or -1."""

    prompt_ids: list[int]
    responses_ids: list[list[int]]
    ranks: list[int]
    labeler: int = -1

    @property
    def response_len(self) -> int:
        """Tokens of the longest response."""
        return max(map(len, self.responses_ids))


class EncodedPrompt(NamedTuple):
    """A prompt as token ids, and the row of the data that it came from (``prompt`` and other columns), if any."""

    prompt_ids: list[int]
    row: dict[str, Any] | None = None

    @property
    def response_len(self) -> int:
        """No response yet."""
        return 0


def collate_demonstrations(
    samples: Sequence[EncodedDemonstration], pad_id: int, *, loss_on_prompt: bool = False
) -> DemonstrationBatch:
    """Join each prompt with its response and pad on the right.

    Args:
        samples: B demonstrations.
        pad_id: fills the padding; may be the end of text, since masks come from lengths.
        loss_on_prompt: the loss mask is True at the prompt too.

    Returns:
        Batch with ``T`` = the longest sequence.
    """
    input_ids_BT, attention_mask_BT = _pad([s.prompt_ids + s.response_ids for s in samples], pad_id)
    if loss_on_prompt:
        return DemonstrationBatch(input_ids_BT, attention_mask_BT, attention_mask_BT.clone())
    prompt_len_B = torch.tensor([len(sample.prompt_ids) for sample in samples])
    in_response_BT = torch.arange(input_ids_BT.shape[1]) >= prompt_len_B[:, None]
    return DemonstrationBatch(input_ids_BT, attention_mask_BT, attention_mask_BT & in_response_BT)


def collate_comparisons(samples: Sequence[EncodedComparison], pad_id: int) -> ComparisonBatch:
    """Pad B prompts on the left, each once, and their N ragged responses on the right.

    Args:
        samples: B prompts with their ranked responses; K may differ between them.
        pad_id: fills the padding.

    Returns:
        Batch with ``N`` = sum of K, rows of one prompt side by side.
    """
    prompt_ids_BP, prompt_mask_BP = _pad([sample.prompt_ids for sample in samples], pad_id, left=True)
    response_ids_NR, response_mask_NR = _pad([ids for sample in samples for ids in sample.responses_ids], pad_id)
    counts_B = torch.tensor([len(sample.responses_ids) for sample in samples])
    return ComparisonBatch(
        prompt_ids_BP=prompt_ids_BP,
        prompt_mask_BP=prompt_mask_BP,
        response_ids_NR=response_ids_NR,
        response_mask_NR=response_mask_NR,
        ranks_N=torch.tensor([rank for sample in samples for rank in sample.ranks]),
        group_N=torch.arange(len(samples)).repeat_interleave(counts_B),
        labeler_B=torch.tensor([sample.labeler for sample in samples]),
    )


def collate_prompts(samples: Sequence[EncodedPrompt], pad_id: int) -> PromptBatch:
    """Pad B prompts on the left, so that all responses start in one column; their rows go along if all have one."""
    rows = [sample.row for sample in samples if sample.row is not None]
    ids_BP, mask_BP = _pad([sample.prompt_ids for sample in samples], pad_id, left=True)
    return PromptBatch(ids_BP, mask_BP, rows if len(rows) == len(samples) else ())


def collate_chunks(chunks: Sequence[np.ndarray]) -> DemonstrationBatch:
    """Stack B chunks of pretraining text, integer arrays ``[T]``; nothing is padded, every token is predicted."""
    input_ids_BT = torch.from_numpy(np.stack(chunks).astype(np.int64))
    everywhere_BT = torch.ones_like(input_ids_BT, dtype=torch.bool)
    return DemonstrationBatch(input_ids_BT, everywhere_BT, everywhere_BT.clone())


def _pad(rows: Sequence[list[int]], pad_id: int, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Pad to the longest row: int64 ids ``[B, T]`` and their bool mask."""
    lengths_B = torch.tensor([len(row) for row in rows])
    width = int(lengths_B.max())
    columns_T = torch.arange(width)
    mask_BT = columns_T >= width - lengths_B[:, None] if left else columns_T < lengths_B[:, None]
    ids_BT = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    # Row-major order of the mask is the order of the concatenated rows, on either side of the padding.
    ids_BT[mask_BT] = torch.tensor([token for row in rows for token in row], dtype=torch.int64)
    return ids_BT, mask_BT
