"""Scores of a reward model that this package has trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_instruct.models.forward import join
from lit_instruct.models.handover import is_stage_checkpoint, read_handover
from lit_instruct.models.reward_folder import is_reward_folder
from lit_instruct.models.scalar_head import ScalarModel
from lit_instruct.models.sharding import in_step
from lit_instruct.models.tokenizer import load_tokenizer, reads_alike
from lit_instruct.rewards.base import Scorer
from lit_instruct.types import ConfigError, PromptBatch, Responses


class RewardModelScorer(Scorer):
    """Scores by a trained reward model, read at the last token of each response. Works on ids: no text is needed."""

    def __init__(self, model: str | ScalarModel, *, batch_rows: int = 64, policy: Any = None):
        """Load or wrap a reward model.

        Args:
            model: checkpoint of the reward stage, the folder into which it was exported, or a loaded model with its
                bias set; it is put into eval mode and frozen.
            batch_rows: rows a forward pass.
            policy: the frozen base on which the checkpoint's adapter stands and which is not loaded again
                (``memory: shared_base``).
        """
        super().__init__()
        if batch_rows < 1:
            raise ConfigError(f"RewardModelScorer batch_rows: got {batch_rows}; need at least 1.")
        self.checkpoint = None if isinstance(model, ScalarModel) else model
        if not isinstance(model, ScalarModel):
            _refuse_other_stages(model)
            shares = policy is not None
            model = ScalarModel.sharing(policy, model, "reward_model") if shares else ScalarModel.from_base(model)
        self.model = model.eval().requires_grad_(False)
        self.batch_rows = batch_rows

    @torch.no_grad()
    def forward(self, prompts: PromptBatch, responses: Responses, *, tokenizer: Any = None) -> Tensor:
        """Score each response.

        Args:
            prompts: B prompts.
            responses: their responses.
            tokenizer: not needed: reward model and policy share one.

        Returns:
            fp32 ``[B]``.
        """
        scores = []
        starts = range(0, len(responses.finished_B), self.batch_rows)
        for start, counts in in_step(starts, self.model):
            rows = slice(start, start + self.batch_rows)
            ids_BT, mask_BT, _ = join(
                PromptBatch(prompts.prompt_ids_BP[rows], prompts.prompt_mask_BP[rows]),
                Responses(*(x[rows] for x in responses)),
            )
            some = self.model.scores(ids_BT, mask_BT)
            if counts:
                scores.append(some)
        return torch.cat(scores)

    def check(self, tokenizer: Any) -> None:
        """Refuse a checkpoint that reads other tokens than the policy writes.

        Args:
            tokenizer: the policy's.

        Raises:
            ConfigError: vocabulary or template differ. A model that was handed over loaded is taken as it is.
        """
        if self.checkpoint is None:
            return
        own = load_tokenizer(self.checkpoint)
        if not reads_alike(own, tokenizer) or own.chat_template != tokenizer.chat_template:
            raise ConfigError(
                f"reward_model: {self.checkpoint!r} was trained with another tokenizer or template than the policy's, "
                "so it would read other tokens than the policy writes. Train the reward model from the same SFT "
                "checkpoint, or use a reward that reads text (lit_instruct.rewards.ClassifierScorer)."
            )


def _refuse_other_stages(path: str) -> None:
    if not is_stage_checkpoint(Path(path)):
        if is_reward_folder(path):
            return
        raise ConfigError(
            f"reward_model: got {path!r}; need the .ckpt of a reward stage (lit-instruct rm fit), or the folder into "
            "which it was exported. A Hugging Face classifier is a reward of its own: "
            "lit_instruct.rewards.ClassifierScorer."
        )
    if (stage := read_handover(path).stage) != "rm":
        raise ConfigError(
            f"reward_model: {path!r} comes from the stage {stage!r}, whose model gives no scores; need the .ckpt of a "
            "reward stage (lit-instruct rm fit)."
        )
