"""The gold score of the toy world as a source of scores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_instruct.rewards.base import Scorer, shortened, texts_of
from lit_instruct.toyworld.gold import assess
from lit_instruct.toyworld.world import ToyWorld
from lit_instruct.types import ConfigError, Prompt, PromptBatch, Responses


class GoldScorer(Scorer):
    """Scores by :func:`~lit_instruct.toyworld.gold.assess`: what a patient expert who knows all facts thinks."""

    def __init__(self, seed: int):
        """Make the world.

        Args:
            seed: of the toy world that the prompts are from.
        """
        super().__init__()
        self.seed = seed
        self.world = ToyWorld(seed)

    @torch.no_grad()
    def forward(self, prompts: PromptBatch, responses: Responses, *, tokenizer: Any) -> Tensor:
        """Assess each response.

        Args:
            prompts: B prompts with their rows.
            responses: their responses.
            tokenizer: the policy's.

        Returns:
            fp32 ``[B]``, between 0 and 1.

        Raises:
            ConfigError: a prompt is none of the toy world's.
        """
        texts = texts_of(prompts, responses, tokenizer)
        return torch.tensor(
            [self._assess(prompt, text) for prompt, text in zip(texts.prompts, texts.responses, strict=True)],
            dtype=torch.float32,
            device=responses.response_ids_BR.device,
        )

    def identity(self) -> str:
        """Its world."""
        return f"{super().identity()} {self.seed}"

    def _assess(self, prompt: Prompt, text: str) -> float:
        try:
            if not isinstance(prompt, str):
                raise ValueError("chat messages")
            return assess(self.world, prompt, text).total
        except ValueError as error:
            raise ConfigError(
                f"GoldScorer: got the prompt {shortened(prompt)}; need one of the toy world. Do: take another judge "
                "for other prompts."
            ) from error
