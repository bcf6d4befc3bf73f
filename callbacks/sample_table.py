"""Show what the policy writes: a table of a few fixed prompts in TensorBoard's text tab."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from lit_instruct.functional import kl_estimates
from lit_instruct.modules.ppo import PPOModule
from lit_instruct.modules.run_logs import to_tensorboard
from lit_instruct.types import ConfigError, PromptBatch, Rollout


class SampleTable(pl.Callback):
    """After validation: prompt, response, score and KL of the first few validation prompts.

    The same prompts and the same random streams every time, so that rows can be compared over a run. With ``WeightEMA``
    the samples are those of the averaged weights, like the rest of validation.
    """

    def __init__(self, prompts: int = 8):
        """Set the size of the table.

        Args:
            prompts: how many rows; the first ones of the validation data, at most one batch.
        """
        super().__init__()
        if prompts < 1:
            raise ConfigError(f"SampleTable prompts: got {prompts}; need at least 1.")
        self.prompts = prompts

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse modules that write no responses."""
        if not isinstance(pl_module, PPOModule):
            raise ConfigError(
                f"SampleTable: got a {type(pl_module).__name__}; need a PPOModule, which samples. Remove it."
            )

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Sample for the first batch only, before the module does its own validation on it."""
        if batch_idx == 0 and not trainer.sanity_checking:
            assert isinstance(pl_module, PPOModule)
            few = PromptBatch(*(x[: self.prompts] for x in batch))
            table = self.table(pl_module, pl_module.validation_rollout(few))  # all ranks: they number rows together
            to_tensorboard(trainer, lambda log: log.add_text("ppo/val/samples", table, pl_module.iterations_done))

    @staticmethod
    def table(module: PPOModule, rollout: Rollout) -> str:
        """A Markdown table of a rollout.

        Args:
            module: whose tokenizer decodes.
            rollout: the samples.

        Returns:
            Markdown, one row a response.
        """
        mask_BR = rollout.response_mask_BR
        kl_B = kl_estimates(rollout.old_logprobs_BR, rollout.reference_logprobs_BR).k1.where(mask_BR, 0.0).sum(dim=1)
        lines = ["| prompt | response | score | KL (nats) |", "|---|---|---|---|"]
        for row in range(len(mask_BR)):
            prompt = _text(module, rollout.prompt_ids_BP[row][rollout.prompt_mask_BP[row]])
            response = _text(module, rollout.response_ids_BR[row][mask_BR[row]])
            if not bool(rollout.finished_B[row]):
                response += " …"
            lines.append(f"| {prompt} | {response} | {float(rollout.scores_B[row]):.2f} | {float(kl_B[row]):.2f} |")
        return "\n".join(lines)


def _text(module: PPOModule, ids: Any) -> str:
    text = module.tokenizer.decode(ids.tolist(), skip_special_tokens=True)
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", "<br>")
