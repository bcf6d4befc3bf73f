"""Stage one: imitate demonstrations. The same module pretrains a base model on plain text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, cast, runtime_checkable

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lit_instruct.models.backbone import Base, fit_to_tokenizer, load_language_model
from lit_instruct.models.forward import demonstration_loss
from lit_instruct.models.residual_dropout import add_residual_dropout
from lit_instruct.models.tokenizer import load_tokenizer
from lit_instruct.modules.checkpoints import StageCheckpoint
from lit_instruct.modules.guards import check_ranges, tokenizer_source
from lit_instruct.modules.optimizers import (
    OptimizerFactory,
    cosine_optimizer,
    paper_adam,
    power_of_two,
    scale_gradients,
)
from lit_instruct.modules.step_guard import StepGuard
from lit_instruct.modules.strategies import numbers_over_ranks, world_size
from lit_instruct.types import DemonstrationBatch, Metrics


@runtime_checkable
class AuxiliaryLosses(Protocol):
    """A callback that adds losses of its own to every optimizer step (``PtxMixing``).

    It may have an attribute ``own_weight``, by which the module multiplies its own loss (1 without it).
    """

    def auxiliary_losses(self, module: pl.LightningModule, minibatch: Any) -> Iterable[Tensor]:
        """Yield weighted losses one at a time; their sum joins the module's own loss in one optimizer step."""


class Perplexity(MeanMetric):
    """The exponential of a mean: of the loss over all tokens of all batches and ranks, and not of each batch's."""

    def compute(self) -> Tensor:
        """The perplexity of what has been seen."""
        return super().compute().exp()


class SFTModule(StageCheckpoint):
    """Supervised fine-tuning (Ouyang et al. 2022, 3.5 and C.1): next-token loss on responses, cosine to 10 %.

    Gradients are exact whatever the split: the loss of an optimizer step is the mean over the loss tokens of all its
    micro-batches on all ranks, also under ``accumulate_grad_batches``.
    """

    stage = "sft"
    handed_over = "policy"
    base_argument = "base"

    def __init__(
        self,
        base: Base,
        tokenizer: str | None = None,
        template: str = "auto",
        learning_rate: float = 9.65e-6,
        final_lr_ratio: float = 0.1,
        warmup_steps: int = 0,
        residual_dropout: float = 0.0,
        max_nonfinite_steps: int = 10,
        optimizer: OptimizerFactory = paper_adam,
    ):
        """Load the model and its tokenizer.

        Args:
            base: the language model to start from: hub name, folder, GGUF file, checkpoint of an earlier stage, or a
                bare configuration such as {model_type: llama, hidden_size: 128}.
            tokenizer: hub name, folder or checkpoint; default: from beside the base model.
            template: how prompts become text: auto, plain, verbatim or the path of a Jinja file.
            learning_rate: peak rate (the paper's 1.3B and 6B models: 9.65e-6).
            final_lr_ratio: the rate ends at this share of its peak, along a cosine.
            warmup_steps: optimizer steps of linear warm-up before the cosine.
            residual_dropout: share of what attention and feed-forward add to the residual stream that is dropped in
                training (the paper's SFT: 0.2); works on any decoder, and later stages run without it.
            max_nonfinite_steps: an optimizer step whose gradients hold NaN or infinity is left out; that many in a
                row end the run.
            optimizer: makes the optimizer from parameter groups.
        """
        super().__init__()
        check_ranges(
            learning_rate=(learning_rate, 0, None),
            final_lr_ratio=(final_lr_ratio, 0, 1),
            residual_dropout=(residual_dropout, 0, 0.99),
            max_nonfinite_steps=(max_nonfinite_steps, 1, None),
        )
        self.save_hyperparameters(ignore=["optimizer"])
        self.tokenizer = load_tokenizer(tokenizer_source(base, tokenizer), template=template)
        self.policy = load_language_model(fit_to_tokenizer(base, self.tokenizer))
        add_residual_dropout(self.policy, residual_dropout)
        self.learning_rate = learning_rate
        self.final_lr_ratio = final_lr_ratio
        self.warmup_steps = warmup_steps
        self.make_optimizer = optimizer
        self.step_guard = StepGuard(max_nonfinite_steps)
        self.update_rows = 0
        # Two, so that a test run never mixes with the validation of a fit.
        self.perplexity = nn.ModuleDict({split: Perplexity() for split in ("val", "test")})
        self._tokens_in_step = 0.0
        self._unit = 0.0  # that losses are divided by on their way back; 0: not known yet

    def loss(self, batch: DemonstrationBatch, *, denominator: Tensor | float | None = None) -> tuple[Tensor, Metrics]:
        """Mean next-token loss over the loss mask.

        Args:
            batch: demonstrations or pretraining text.
            denominator: None = the loss tokens of this batch; else what the sum is divided by.

        Returns:
            The loss (nats a token, fp32) and ``{"loss", "token_acc", "tokens"}`` of this batch.
        """
        return demonstration_loss(self.policy, batch, denominator=denominator)

    def training_step(self, batch: DemonstrationBatch, batch_idx: int) -> Tensor:
        """One micro-batch of an optimizer step."""
        loss, metrics = self.loss(batch, denominator=1.0)
        self._tokens_in_step += float(metrics["tokens"])
        accumulate = self.trainer.accumulate_grad_batches
        self.update_rows = len(batch.input_ids_BT) * world_size() * accumulate
        hooks = [hook for hook in self._callbacks() if isinstance(hook, AuxiliaryLosses)]
        # DDP averages over ranks and Lightning over micro-batches, while the number of tokens of the whole step is
        # known only at its last micro-batch: sums go backward, and on_before_optimizer_step divides.
        self._unit = self._unit or power_of_two(self._global_tokens() * accumulate)
        total = loss * world_size()
        for hook in hooks:
            total = total * getattr(hook, "own_weight", 1.0)
        if self._ends_step(batch_idx):
            tokens = self._global_tokens()
            for hook in hooks:
                for auxiliary in hook.auxiliary_losses(self, batch):
                    total = total + auxiliary * tokens
        self.log("sft/train/loss", metrics["loss"], prog_bar=True)
        self.log("sft/train/token_acc", metrics["token_acc"])
        self.log("sft/train/tokens", metrics["tokens"].float())
        return total / self._unit

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Turn summed gradients into the mean over the tokens of the step; Lightning clips afterwards."""
        scale = self.trainer.accumulate_grad_batches * self._unit / self._global_tokens()
        self._tokens_in_step = 0.0
        scale_gradients(self.policy, scale)
        self.step_guard.check([self.policy])
        self.log("sft/train/lr", optimizer.param_groups[0]["lr"])
        self.log("sft/train/skipped_steps", float(self.step_guard.skipped))

    def validation_step(self, batch: DemonstrationBatch, batch_idx: int) -> None:
        """Loss, perplexity and token accuracy on held-out sequences."""
        self._evaluate(batch, "val")

    def test_step(self, batch: DemonstrationBatch, batch_idx: int) -> None:
        """As validation, on the test sequences."""
        self._evaluate(batch, "test")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """One optimizer, cosine to a floor over all steps of the run."""
        return cosine_optimizer(
            self.policy,
            self.trainer,
            self.make_optimizer,
            learning_rate=self.learning_rate,
            final_lr_ratio=self.final_lr_ratio,
            warmup_steps=self.warmup_steps,
        )

    def _evaluate(self, batch: DemonstrationBatch, split: str) -> None:
        loss, metrics = self.loss(batch)
        tokens = int(metrics["tokens"])
        self.log(f"sft/{split}/loss", loss, batch_size=tokens, on_epoch=True, sync_dist=True, prog_bar=True)
        meter = cast("Perplexity", self.perplexity[split])
        meter.update(loss, weight=tokens)
        self.log(f"sft/{split}/ppl", meter, on_epoch=True)
        self.log(f"sft/{split}/token_acc", metrics["token_acc"], batch_size=tokens, on_epoch=True, sync_dist=True)

    def _callbacks(self) -> list[Any]:
        return list(getattr(self.trainer, "callbacks", []))

    def _ends_step(self, batch_idx: int) -> bool:
        return (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0 or self.trainer.is_last_batch

    def _global_tokens(self) -> float:
        return numbers_over_ranks(self._tokens_in_step, device=self.device)[0]
