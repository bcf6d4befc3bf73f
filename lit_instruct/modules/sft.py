"""Stage one: imitate demonstrations. The same module pretrains a base model on plain text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Protocol

import lightning.pytorch as pl
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from lit_instruct.models.adapters import LoraSettings, add_adapter, make_base
from lit_instruct.models.backbone import Base, check_vocabulary, fit_to_tokenizer, load_language_model
from lit_instruct.models.batching import split_demonstrations
from lit_instruct.models.forward import demonstration_loss
from lit_instruct.models.packing import admission
from lit_instruct.models.recompute import recompute_activations
from lit_instruct.models.residual_dropout import add_residual_dropout
from lit_instruct.models.unembedding import check_unembedding
from lit_instruct.modules.fsdp2 import Fsdp2Strategy
from lit_instruct.modules.guards import check_adapter, check_ranges, settle_tokenizer
from lit_instruct.modules.optimizers import (
    OptimizerFactory,
    cosine_optimizer,
    paper_adam,
)
from lit_instruct.modules.step_guard import StepGuard
from lit_instruct.modules.strategies import sum_over_ranks, world_size
from lit_instruct.modules.summed_steps import SummedSteps
from lit_instruct.modules.train_log import RunningMetrics
from lit_instruct.types import ConfigError, DemonstrationBatch, Metrics


class AuxiliaryLosses(Protocol):
    """A callback that adds losses of its own to every optimizer step (``PtxMixing``).

    It may have an attribute ``own_weight``, by which the module multiplies its own loss (1 without it).
    """

    def auxiliary_losses(self, module: pl.LightningModule, minibatch: Any) -> Iterable[Tensor]:
        """Yield weighted losses one at a time; their sum joins the module's own loss in one optimizer step."""


class SFTModule(SummedSteps[DemonstrationBatch]):
    """Supervised fine-tuning (Ouyang et al. 2022, 3.5 and C.1): next-token loss on responses, cosine to 10 %.

    Gradients are exact whatever the split: the loss of an optimizer step is the mean over the loss tokens of all its
    micro-batches on all ranks, also under ``accumulate_grad_batches``. In training, each of these is logged over the
    steps since the last log (see :class:`~lit_instruct.modules.summed_steps.SummedSteps`)::

        sft/train/loss            mean over the loss tokens, nats
        sft/train/token_acc       share of the loss tokens that are the most likely one
        sft/train/tokens          loss tokens of an optimizer step, of all its micro-batches and ranks
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
        micro_batch_tokens: int | None = None,
        gradient_checkpointing: bool = False,
        loss_chunk_tokens: int | None = None,
        adapter: LoraSettings | None = None,
        quantization: Literal["8bit", "4bit"] | None = None,
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
            micro_batch_tokens: most tokens of one forward and backward pass on each device; a larger batch goes in
                several passes of about equal size, with the same gradients. Null: all at once.
            gradient_checkpointing: keep only the input of each block for the backward pass and work the rest out again
                there; less memory, about a third more time, the same gradients.
            loss_chunk_tokens: hold the logits of so many tokens at a time and work them out again in the backward pass:
                less memory over a large vocabulary, somewhat more time, the same gradients. Null: all at once.
            adapter: train a LoRA adapter instead of all weights, for example --model.adapter.r 16 (extra peft). It
                wants about 10 times the learning rate. Checkpoints hold it alone; later stages get it merged. Null: all
                weights.
            quantization: of the frozen base below an adapter: 8bit or 4bit (QLoRA); extra quant. Null: fp32.
            max_nonfinite_steps: an optimizer step whose gradients hold NaN or infinity is left out; that many in a
                row end the run.
            optimizer: makes the optimizer from parameter groups.
        """
        super().__init__()
        check_ranges(
            learning_rate=(learning_rate, 0, None),
            final_lr_ratio=(final_lr_ratio, 0, 1),
            residual_dropout=(residual_dropout, 0, 0.99),
            micro_batch_tokens=(micro_batch_tokens, 1, None),
            loss_chunk_tokens=(loss_chunk_tokens, 1, None),
            max_nonfinite_steps=(max_nonfinite_steps, 1, None),
        )
        check_adapter(adapter, quantization, base=base)
        self.save_hyperparameters(ignore=["optimizer", "adapter"])
        self.tokenizer = settle_tokenizer(base, tokenizer, template)
        self.policy = load_language_model(fit_to_tokenizer(base, self.tokenizer))
        check_vocabulary("base", self.policy, self.tokenizer)
        if adapter is not None:
            self.policy = make_base(self.policy, source=str(base), quantization=quantization)
            add_adapter(self.policy, adapter)
        add_residual_dropout(self.policy, residual_dropout)
        if gradient_checkpointing:
            recompute_activations(self.policy)
        if loss_chunk_tokens is not None:
            check_unembedding(self.policy)
        self.loss_chunk_tokens = loss_chunk_tokens
        self.micro_batch_tokens = micro_batch_tokens
        self.learning_rate = learning_rate
        self.final_lr_ratio = final_lr_ratio
        self.warmup_steps = warmup_steps
        self.make_optimizer = optimizer
        self.step_guard = StepGuard(max_nonfinite_steps)
        self.update_rows = 0
        self.held_out = RunningMetrics()

    def configure_model(self) -> None:
        """Before the policy is cut.

        Raises:
            ConfigError: the strategy is fsdp2, and ``loss_chunk_tokens`` is set.
        """
        if self.loss_chunk_tokens is not None and isinstance(self._strategy(), Fsdp2Strategy):
            raise ConfigError(
                f"loss_chunk_tokens: got {self.loss_chunk_tokens} with {type(self._strategy()).__name__}, under which "
                "decoder and unembedding run together only; need null. Do: leave it out, and save memory with "
                "micro_batch_tokens, or use the strategy ddp."
            )
        super().configure_model()

    def loss(self, batch: DemonstrationBatch, *, denominator: Tensor | float | None = None) -> tuple[Tensor, Metrics]:
        """Mean next-token loss over the loss mask.

        Args:
            batch: demonstrations or pretraining text.
            denominator: None = the loss tokens of this batch; else what the sum is divided by.

        Returns:
            The loss (nats a token, fp32) and ``{"loss", "token_acc", "tokens"}`` of this batch.
        """
        return demonstration_loss(self.policy, batch, denominator=denominator, chunk_tokens=self.loss_chunk_tokens)

    def split(self, batch: DemonstrationBatch) -> Sequence[DemonstrationBatch]:
        """Cut a micro-batch into parts of at most ``micro_batch_tokens``."""
        return split_demonstrations(batch, self.micro_batch_tokens, padded=not admission(self.policy).packs)

    def summed_loss(self, batch: DemonstrationBatch) -> tuple[Tensor, Tensor, Metrics]:
        """The loss summed over the loss tokens of a part."""
        loss, metrics = self.loss(batch, denominator=1.0)
        for hook in self._hooks():
            loss = loss * getattr(hook, "own_weight", 1.0)
        return loss, metrics["tokens"], metrics

    def note(self, metrics: Metrics) -> None:
        """Loss and accuracy are means over tokens."""
        self.running.add(metrics["tokens"], {name: metrics[name] for name in ("loss", "token_acc")})

    def other_metrics(self, mean_count: float) -> dict[str, float]:
        """The tokens of an optimizer step."""
        return {"tokens": mean_count}

    def training_step(self, batch: DemonstrationBatch, batch_idx: int) -> Tensor:
        """One micro-batch of an optimizer step."""
        self.update_rows = len(batch.input_ids_BT) * world_size() * self.trainer.accumulate_grad_batches
        return super().training_step(batch, batch_idx)

    def before_last_pass(self, batch: DemonstrationBatch, last: DemonstrationBatch) -> None:
        """The callbacks' losses, one at a time: each is weighed against the mean over the step's tokens."""
        if not (hooks := self._hooks()):
            return
        mine = last.loss_mask_BT[:, 1:].sum() + (0 if self._step.count is None else self._step.count)
        tokens = float(sum_over_ranks(mine))
        weight = tokens / self.unit_for(tokens)
        for hook in hooks:
            for auxiliary in hook.auxiliary_losses(self, batch):
                self.backward_now(auxiliary * weight)

    def on_validation_epoch_start(self) -> None:
        """Begin with nothing, also after a validation that was broken off."""
        self.held_out.clear()

    def on_test_epoch_start(self) -> None:
        """As before a validation."""
        self.held_out.clear()

    def validation_step(self, batch: DemonstrationBatch, batch_idx: int) -> None:
        """Loss and token accuracy on held-out sequences."""
        self._measure(batch)

    def test_step(self, batch: DemonstrationBatch, batch_idx: int) -> None:
        """As validation, on the test sequences."""
        self._measure(batch)

    def on_validation_epoch_end(self) -> None:
        """Log them, and the perplexity, over all tokens of all batches and ranks."""
        self._log_held_out("val")

    def on_test_epoch_end(self) -> None:
        """As after a validation."""
        self._log_held_out("test")

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

    def _measure(self, batch: DemonstrationBatch) -> None:
        _, metrics = self.loss(batch)
        self.held_out.add(metrics["tokens"], {name: metrics[name] for name in ("loss", "token_acc")})

    def _log_held_out(self, split: str) -> None:
        means = self.held_out.means()
        if means:
            means["ppl"] = math.exp(min(means["loss"], 700.0))  # beyond that no double holds it
        for name, value in means.items():
            # Every rank has the number of all ranks; sync_dist only tells Lightning that this was thought of.
            self.log(f"sft/{split}/{name}", value, prog_bar=name == "loss", sync_dist=world_size() > 1)

    def _hooks(self) -> list[AuxiliaryLosses]:
        # By name: an isinstance of a protocol takes longer, and this is asked in every step.
        return [hook for hook in getattr(self.trainer, "callbacks", []) if hasattr(hook, "auxiliary_losses")]
