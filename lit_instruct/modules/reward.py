"""Stage two: a model of human preference, learned from rankings of K responses to one prompt."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any, Literal, cast

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from lit_instruct.functional import (
    prompts_with_pair,
    ranking_accuracy,
    ranking_loss,
)
from lit_instruct.models.adapters import LoraSettings, add_adapter, make_base
from lit_instruct.models.backbone import Base, check_vocabulary, fit_to_tokenizer
from lit_instruct.models.batching import split_comparisons
from lit_instruct.models.packing import admission
from lit_instruct.models.recompute import recompute_activations
from lit_instruct.models.scalar_head import ScalarModel
from lit_instruct.modules.guards import check_adapter, check_choice, check_ranges, settle_tokenizer
from lit_instruct.modules.optimizers import (
    OptimizerFactory,
    cosine_optimizer,
    paper_adam,
)
from lit_instruct.modules.reward_metrics import (
    RankingMeter,
    RankingReport,
    named_values,
    reliability_picture,
    reliability_table,
)
from lit_instruct.modules.run_logs import to_tensorboard
from lit_instruct.modules.step_guard import StepGuard
from lit_instruct.modules.strategies import numbers_over_ranks, world_size
from lit_instruct.modules.summed_steps import SummedSteps
from lit_instruct.types import ComparisonBatch, DemonstrationBatch, Metrics

log = logging.getLogger(__name__)


class RewardModule(SummedSteps[ComparisonBatch]):
    """Reward model training on K-way rankings (Ouyang et al. 2022, equation 1).

    One prompt with its K responses is one element of a batch: K forward passes serve all its K(K-1)/2 pairs, and a
    prompt with many responses weighs no more than one with few. After training, demonstrations score 0 on average.

    In training, ``rm/train/loss`` (a mean over prompts), ``rm/train/acc`` and ``rm/train/acc_len_baseline`` (means over
    pairs) are logged over the steps since the last log; see :class:`~lit_instruct.modules.summed_steps.SummedSteps`.

    Held-out rankings (``validate``, ``test``) are measured as a whole, whatever the batches and the ranks; each under
    ``rm/val/`` or ``rm/test/``::

        loss                      as in training: a mean over prompts
        log_loss                  mean of softplus(-difference) over all pairs, nats
        acc                       pairs in the labeler's order; equal scores count one half
        acc_prompt_mean           the same, averaged over prompts: a prompt with many pairs weighs as much as another
        acc_k/K                   of the prompts with K responses
        acc_labeler/NAME          of one labeler; acc_labeler_min and acc_labeler_spread over the labelers with 20 pairs
        acc_len_baseline...       beside each of these accuracies: what "the longer response wins" gets
        ece, brier                how far sigmoid(difference) can be believed; a picture of it in TensorBoard
        margin                    mean difference of a pair
        score_mean, score_std     of all responses
        len_corr                  Spearman's correlation of score and response length, over all responses
        len_corr_within_prompts   of score and length of the responses to one prompt: what ranking by length would do

    Attributes:
        reports: ``val`` and ``test`` -> the last measurement with its counts.
    """

    stage = "rm"
    handed_over = "reward_model"
    base_argument = "base"
    bar_metrics = ("loss", "acc")

    def __init__(
        self,
        base: Base,
        tokenizer: str | None = None,
        template: str = "auto",
        learning_rate: float = 9e-6,
        final_lr_ratio: float = 0.1,
        normalize: Literal["retained", "k_choose_2"] = "retained",
        micro_batch_tokens: int | None = None,
        gradient_checkpointing: bool = False,
        adapter: LoraSettings | None = None,
        quantization: Literal["8bit", "4bit"] | None = None,
        max_nonfinite_steps: int = 10,
        optimizer: OptimizerFactory = paper_adam,
    ):
        """Load the decoder (usually an SFT checkpoint) and put a fresh scalar head on it.

        Args:
            base: the model to start from: checkpoint of the SFT stage, hub name, folder, GGUF file or configuration.
            tokenizer: hub name, folder or checkpoint; default: from beside the base model.
            template: how prompts become text: auto, plain, verbatim or the path of a Jinja file.
            learning_rate: peak rate (the paper's: 9e-6).
            final_lr_ratio: the rate ends at this share of its peak, along a cosine.
            normalize: what a prompt's pair losses are divided by: retained (the pairs that are no ties) or
                k_choose_2 (all pairs, as equation 1 is written).
            micro_batch_tokens: most tokens of one forward and backward pass on each device; a larger batch goes in
                several passes of about equal size, with the same gradients; a prompt stays together with its
                responses. Null: all at once.
            gradient_checkpointing: keep only the input of each block for the backward pass and work the rest out again
                there; less memory, about a third more time, the same gradients.
            adapter: train a LoRA adapter and the head instead of all weights, for example --model.adapter.r 16 (extra
                peft). It wants about 10 times the learning rate. Checkpoints hold these alone. Null: all weights.
            quantization: of the frozen base below an adapter: 8bit or 4bit (QLoRA); extra quant. Null: fp32.
            max_nonfinite_steps: an optimizer step whose gradients hold NaN or infinity is left out; that many in a
                row end the run.
            optimizer: makes the optimizer from parameter groups.
        """
        super().__init__()
        check_choice("normalize", normalize, ("retained", "k_choose_2"))
        check_ranges(
            learning_rate=(learning_rate, 0, None),
            final_lr_ratio=(final_lr_ratio, 0, 1),
            micro_batch_tokens=(micro_batch_tokens, 1, None),
            max_nonfinite_steps=(max_nonfinite_steps, 1, None),
        )
        check_adapter(adapter, quantization, base=base)
        self.save_hyperparameters(ignore=["optimizer", "adapter"])
        self.tokenizer = settle_tokenizer(base, tokenizer, template)
        self.reward_model = ScalarModel.from_base(fit_to_tokenizer(base, self.tokenizer))
        check_vocabulary("base", self.reward_model.trunk, self.tokenizer)
        if adapter is not None:
            trunk = make_base(self.reward_model.trunk, source=str(base), quantization=quantization)
            add_adapter(trunk, adapter)
            self.reward_model.trunk = trunk
        if gradient_checkpointing:
            recompute_activations(self.reward_model.trunk)
        self.micro_batch_tokens = micro_batch_tokens
        self.learning_rate = learning_rate
        self.final_lr_ratio = final_lr_ratio
        self.normalize = normalize
        self.make_optimizer = optimizer
        self.step_guard = StepGuard(max_nonfinite_steps)
        # Two, so that a test run never mixes with the validation of a fit.
        self.meters = nn.ModuleDict({split: RankingMeter(normalize) for split in ("val", "test")})
        self.reports: dict[str, RankingReport] = {}
        self._bias_of_step = -1

    def scores(self, batch: ComparisonBatch) -> Tensor:
        """One score a response.

        Args:
            batch: B prompts with N responses.

        Returns:
            fp32 ``[N]``.
        """
        return self.reward_model.ranking_scores(batch)

    def loss(self, batch: ComparisonBatch, *, denominator: Tensor | float | None = None) -> tuple[Tensor, Metrics]:
        """Mean over prompts of the mean pair loss of each.

        Args:
            batch: B prompts with N ranked responses.
            denominator: None = this batch's prompts with a pair; else what the sum over prompts is divided by.

        Returns:
            The loss (nats) and ``{"loss", "acc", "acc_len_baseline", "prompts", "pairs"}`` of this batch.
        """
        with self.reward_model.unshifted():  # only differences count: when the bias was set last must not move a bit
            scores_N = self.scores(batch)
        total = ranking_loss(scores_N, batch.ranks_N, batch.group_N, normalize=self.normalize, denominator=1.0)
        prompts = prompts_with_pair(batch.ranks_N, batch.group_N)
        with torch.no_grad():
            correct, pairs = ranking_accuracy(scores_N, batch.ranks_N, batch.group_N)
            longer, _ = ranking_accuracy(batch.response_mask_NR.sum(dim=1), batch.ranks_N, batch.group_N)
        some, some_pairs = prompts.clamp_min(1), pairs.clamp_min(1)
        metrics = {
            "loss": total.detach() / some,
            "acc": correct / some_pairs,
            "acc_len_baseline": longer / some_pairs,
            "prompts": prompts,
            "pairs": pairs,
        }
        return total / (some if denominator is None else denominator), metrics

    def split(self, batch: ComparisonBatch) -> Sequence[ComparisonBatch]:
        """Cut a micro-batch into parts of at most ``micro_batch_tokens``."""
        return split_comparisons(batch, self.micro_batch_tokens, padded=not admission(self.reward_model.trunk).packs)

    def summed_loss(self, batch: ComparisonBatch) -> tuple[Tensor, Tensor, Metrics]:
        """The loss summed over the prompts of a part that have a pair."""
        loss, metrics = self.loss(batch, denominator=1.0)
        return loss, metrics["prompts"], metrics

    def note(self, metrics: Metrics) -> None:
        """The loss is a mean over prompts, the accuracies are over pairs."""
        self.running.add(metrics["prompts"], {"loss": metrics["loss"]})
        self.running.add(metrics["pairs"], {name: metrics[name] for name in ("acc", "acc_len_baseline")})

    def on_fit_start(self) -> None:
        """Say so if scores will not be shifted."""
        super().on_fit_start()
        if self._demonstrations() is None and self.trainer.is_global_zero:
            log.warning(
                "no demonstrations were given, so scores are not shifted (bias %g) and a score of 0 means nothing in "
                "particular; to shift them so that demonstrations score 0 on average, set data.demonstrations",
                float(self.reward_model.score_bias),
            )

    def on_validation_start(self) -> None:
        """Set the bias first, so that validation scores and checkpoints saved afterwards are normalised."""
        if not self.trainer.sanity_checking:
            self._normalise()

    def on_train_epoch_end(self) -> None:
        """Set the bias before the checkpoint of this epoch is written."""
        super().on_train_epoch_end()
        self._normalise()

    def on_validation_epoch_start(self) -> None:
        """Begin with nothing, also after a validation that was broken off."""
        self._meter("val").reset()

    def on_test_epoch_start(self) -> None:
        """As before a validation."""
        self._meter("test").reset()

    def validation_step(self, batch: ComparisonBatch, batch_idx: int) -> None:
        """Score held-out rankings."""
        self._meter("val").update(self.scores(batch), batch)

    def test_step(self, batch: ComparisonBatch, batch_idx: int) -> None:
        """Score the test rankings."""
        self._meter("test").update(self.scores(batch), batch)

    def on_validation_epoch_end(self) -> None:
        """Measure the scores of all held-out rankings."""
        self._measure("val")

    def on_test_epoch_end(self) -> None:
        """Measure the scores of all test rankings."""
        self._measure("test")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """One optimizer, cosine to a floor over all steps of the run."""
        return cosine_optimizer(
            self.reward_model,
            self.trainer,
            self.make_optimizer,
            learning_rate=self.learning_rate,
            final_lr_ratio=self.final_lr_ratio,
        )

    @torch.no_grad()
    def set_score_bias(self, demonstrations: Iterable[DemonstrationBatch]) -> float:
        """Shift scores so that demonstrations score 0 on average (Ouyang et al. 2022, 3.5); the order stays.

        Args:
            demonstrations: this rank's share of them.

        Returns:
            The bias: the demonstrations' mean score before the shift.
        """
        was_training = self.reward_model.training
        self.reward_model.eval()
        total, count = 0.0, 0
        with self.sampling_weights(), self.reward_model.unshifted():  # between steps fsdp has only shards
            for batch in demonstrations:
                ids_BT, mask_BT = batch.input_ids_BT.to(self.device), batch.attention_mask_BT.to(self.device)
                raw_B = self.reward_model.scores(ids_BT, mask_BT)
                total += float(raw_B.cpu().double().sum())
                count += len(raw_B)
        summed, rows = numbers_over_ranks(total, float(count), device=self.device)
        bias = summed / rows
        self.reward_model.score_bias.fill_(bias)
        self.reward_model.train(was_training)
        return bias

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Set the bias: a checkpoint in the middle of an epoch is handed over too, with the scores of its weights."""
        if self._trainer is not None:
            self._normalise()
        checkpoint["state_dict"]["reward_model.score_bias"] = self.reward_model.score_bias.detach().clone()
        super().on_save_checkpoint(checkpoint)

    def _normalise(self) -> None:
        loader = self._demonstrations()
        if loader is not None and self._bias_of_step != self.global_step:
            self.set_score_bias(loader)
            self._bias_of_step = self.global_step

    def _demonstrations(self) -> Iterable[DemonstrationBatch] | None:
        loader_of = getattr(getattr(self.trainer, "datamodule", None), "demonstration_dataloader", None)
        return loader_of() if loader_of is not None else None

    def _meter(self, split: str) -> RankingMeter:
        return cast("RankingMeter", self.meters[split])

    def _measure(self, split: str) -> None:
        measured = self.reports[split] = self._meter(split).compute()
        names = getattr(getattr(self.trainer, "datamodule", None), "labelers", ())
        for name, value in named_values(measured, names).items():
            # Every rank has the number of all ranks; sync_dist only tells Lightning that this was thought of.
            self.log(f"rm/{split}/{name}", value, sync_dist=world_size() > 1, prog_bar=name in ("acc", "log_loss"))
        if measured.overall.pairs and not self.trainer.sanity_checking:
            name, step = f"rm/{split}/reliability", self.global_step
            to_tensorboard(
                self.trainer,
                lambda log: log.add_image(name, reliability_picture(measured.calibration), step, dataformats="HWC"),
            )
            to_tensorboard(self.trainer, lambda log: log.add_text(name, reliability_table(measured.calibration), step))
