"""Where the scores of responses come from.

A scorer is any callable that takes the prompts and their responses and returns one fp32 number a response. PPO
asks nothing else of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lit_instruct.models.forward import join
from lit_instruct.models.scalar_head import ScalarModel
from lit_instruct.types import PromptBatch, Responses

Scorer = Callable[[PromptBatch, Responses], Tensor]
"""(prompts, responses) -> fp32 ``[B]``."""


class RewardModelScorer:
    """Scores by a trained reward model, read at the last token of each response."""

    def __init__(self, model: ScalarModel, *, batch_rows: int = 64):
        """Wrap a reward model.

        Args:
            model: with its bias set; it is put into eval mode and frozen.
            batch_rows: rows a forward pass.
        """
        self.model = model.eval().requires_grad_(False)
        self.batch_rows = batch_rows

    @torch.no_grad()
    def __call__(self, prompts: PromptBatch, responses: Responses) -> Tensor:
        """Score each response.

        Args:
            prompts: B prompts.
            responses: their responses.

        Returns:
            fp32 ``[B]``.
        """
        scores = []
        for start in range(0, len(responses.finished_B), self.batch_rows):
            rows = slice(start, start + self.batch_rows)
            ids_BT, mask_BT, _ = join(
                PromptBatch(*(x[rows] for x in prompts)), Responses(*(x[rows] for x in responses))
            )
            scores.append(self.model.scores(ids_BT, mask_BT))
        return torch.cat(scores)
