"""The optimizer step of SFT and reward model: sums go backward, pass by pass, and the mean comes last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_instruct.models.sharding import in_step
from lit_instruct.modules.checkpoints import StageCheckpoint
from lit_instruct.modules.optimizers import gradients_of, power_of_two
from lit_instruct.modules.resuming import ends_optimizer_step
from lit_instruct.modules.step_guard import total_norm
from lit_instruct.modules.strategies import gather_objects, sum_over_ranks, world_size
from lit_instruct.modules.train_log import RunningMetrics
from lit_instruct.types import ConfigError, Metrics

Batch = TypeVar("Batch")


@dataclass
class _Step:
    """One optimizer step and its current micro-batch."""

    count: Tensor | None = None  # of this rank so far: loss tokens, or prompts with a pair
    opens: bool = True  # the micro-batch is the step's first
    went_backward: bool = False  # some of the micro-batch has
    joined: Tensor | None = None  # losses that wait for the last pass


class SummedSteps(StageCheckpoint, Generic[Batch]):
    """Exact gradients whatever the split: the loss of an optimizer step is one mean over all that it counts.

    It counts loss tokens (SFT) or prompts with a pair (reward model), of all passes, micro-batches and ranks. How many
    these are is known at the step's end only, so sums go backward and the gradients are divided before Lightning clips
    them.

    A micro-batch of more than ``micro_batch_tokens`` goes forward and backward in several passes. All but the last are
    done with inside ``training_step``, so that one pass is in memory at a time; the last is Lightning's, which under
    DDP sends the sum of all to the other ranks.

    Under ``{stage}/train/`` it logs, whenever the Trainer writes its log (``log_every_n_steps``) and at the end of each
    epoch, means over the optimizer steps since it last did, of all ranks: each loss and accuracy over what it counts,
    not over batches. ``lr`` and ``skipped_steps`` are those of the last step.

    Attributes:
        micro_batch_tokens: most tokens of a pass on each device; None = each micro-batch in one pass.
        running: the means since the last log.
    """

    micro_batch_tokens: int | None
    bar_metrics: tuple[str, ...] = ("loss",)  # that a progress bar shows too
    _running_states: list[dict[str, Any]] | None = None  # of a resumed run, until it starts

    def __init__(self) -> None:
        """Begin with no step."""
        super().__init__()
        self.running = RunningMetrics()
        self._step = _Step()
        self._unit = 0.0  # that losses are divided by on their way back; 0: not known yet

    @property
    def trained(self) -> nn.Module:
        """The network that the optimizer trains."""
        return getattr(self, self.handed_over)

    def split(self, batch: Batch) -> Sequence[Batch]:
        """Cut a micro-batch into parts of at most ``micro_batch_tokens``."""
        raise NotImplementedError

    def summed_loss(self, batch: Batch) -> tuple[Tensor, Tensor, Metrics]:
        """The loss of a part as a sum.

        Returns:
            The sum, with its gradient; what it counts, 0-dim; and the metrics for :meth:`note`.
        """
        raise NotImplementedError

    def note(self, metrics: Metrics) -> None:
        """Add the metrics of a part to the running means."""
        raise NotImplementedError

    def before_last_pass(self, batch: Batch, last: Batch) -> None:
        """Let other losses go backward into the same optimizer step; called at its last micro-batch.

        Args:
            batch: the micro-batch.
            last: its last part, which has not been counted yet.
        """

    def other_metrics(self, mean_count: float) -> dict[str, float]:
        """More to log: what an optimizer step counted, on the average."""
        return {}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One micro-batch of an optimizer step."""
        opens = batch_idx % self.trainer.accumulate_grad_batches == 0
        step = self._step = _Step(None if opens else self._step.count, opens)
        passes = in_step(self.split(batch), self.trained)
        for part, counts in passes[:-1]:
            self.backward_now(self._pass(part, len(passes), counts=counts))
        last = passes[-1].part
        if self._ends_step(batch_idx):
            self.before_last_pass(batch, last)
        loss = self._pass(last, len(passes))
        return loss if step.joined is None else loss + step.joined

    def backward_now(self, loss: Tensor) -> None:
        """Add the gradient of a loss to the optimizer step, inside ``training_step``.

        Args:
            loss: in the scale of what ``training_step`` returns. Its graph is freed. Under DDP nothing is sent: the
                gradients stay in this process until the pass that ``training_step`` returns. A strategy that allows
                no backward pass there gets it with that pass.
        """
        if not self._may_go_backward():
            self._step.joined = loss if self._step.joined is None else self._step.joined + loss
            return
        if self._step.opens and not self._step.went_backward:
            self._optimizer().zero_grad()
        self._step.went_backward = True
        with torch.autocast(self.device.type, enabled=False):  # as where Lightning calls it
            self.trainer.strategy.backward(loss / self.trainer.accumulate_grad_batches, None)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Lightning calls it between ``training_step`` and its own backward pass: what is there by then must stay."""
        if not self._step.went_backward:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Turn summed gradients into the mean over what the step counts; Lightning clips afterwards."""
        assert self._step.count is not None
        gradients = gradients_of(optimizer)
        norm = total_norm(gradients)
        if isinstance(self.trainer.strategy, FSDPStrategy):  # of this rank's shards; all ranks must decide alike
            norm = sum_over_ranks(norm.square()).sqrt()
        count = int(sum_over_ranks(self._step.count))
        if self.step_guard.check([self.trained], [norm]) and gradients:
            # One call: a loop in Python would take longer than the multiplication.
            torch._foreach_mul_(gradients, self.trainer.accumulate_grad_batches * self._unit / max(count, 1))
        self.running.end_step(count, optimizer.param_groups[0]["lr"])
        if self._log_is_due() and not self.trainer.should_stop:
            self._log_means()

    def setup(self, stage: str) -> None:
        """Refuse what the strategy cannot do, before anything is trained.

        Raises:
            ConfigError: ``micro_batch_tokens`` is set, and the strategy allows one backward pass a micro-batch.
        """
        if stage == "fit" and self.micro_batch_tokens and not self._may_go_backward():
            raise ConfigError(
                f"micro_batch_tokens: got {self.micro_batch_tokens} with {type(self.trainer.strategy).__name__}, which "
                "allows one backward pass a batch; need one process or the strategy ddp. Set it to null; with "
                "trainer.accumulate_grad_batches, smaller batches have the same gradients."
            )

    def on_train_start(self) -> None:
        """What a run that was broken off has left is not part of this one, but what a checkpoint holds is."""
        self.running.clear()
        if self._running_states is not None:
            self.running.load_state_dict(self._running_states, self.device)
            self._running_states = None
        super().on_train_start()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what has been added up since the last log, on each rank."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["running"] = (
            gather_objects(self.running.state_dict()) if self._running_states is None else self._running_states
        )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep it until training starts."""
        super().on_load_checkpoint(checkpoint)
        if self.resumes:
            self._running_states = checkpoint.get("running")  # not in those of earlier versions

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """When a run is to stop Lightning writes its log, also if a callback's ``on_train_batch_end`` has said so."""
        if self.trainer.should_stop and self._ends_step(batch_idx):
            self._log_means()

    def on_train_epoch_end(self) -> None:
        """Log the steps since the last log, so that the last ones of a run are not lost."""
        self._log_means(sync_dist=world_size() > 1)  # they are of all ranks; this only says so

    def unit_for(self, count: float) -> float:
        """What losses are divided by on their way back, so that sums have about the size of means.

        Args:
            count: what the step will count on all ranks, about; read once in a run, for all processes have to divide
                by the same.
        """
        self._unit = self._unit or power_of_two(count)
        return self._unit

    def _pass(self, part: Batch, parts: int, *, counts: bool = True) -> Tensor:
        """The loss of a part for its way back: DDP averages over ranks and Lightning over micro-batches."""
        total, count, metrics = self.summed_loss(part)
        if counts:
            self.note(metrics)
        else:  # it only keeps other ranks company
            total, count = total * 0.0, count * 0
        step = self._step
        step.count = count if step.count is None else step.count + count
        if not self._unit:
            self.unit_for(float(sum_over_ranks(count * parts)) * self.trainer.accumulate_grad_batches)
        return total * (world_size() / self._unit)

    def _log_is_due(self) -> bool:
        """Whether Lightning writes its log after the optimizer step that is being taken."""
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # set without being declared
        return every > 0 and (self.trainer.global_step + 1) % every == 0

    def _log_means(self, *, sync_dist: bool = False) -> None:
        if not self.running.steps:
            return
        means = self.other_metrics(self.running.counted / self.running.steps)
        means |= {"lr": self.running.learning_rate, "skipped_steps": float(self.step_guard.skipped)}
        means |= self.running.means()
        # On the CPU, for Lightning reads what the progress bar shows after every step; NCCL cannot send it from there.
        device = self.device if sync_dist else "cpu"
        for name, value in means.items():
            mean = torch.tensor(value, dtype=torch.float32, device=device)
            self.log(f"{self.stage}/train/{name}", mean, prog_bar=name in self.bar_metrics, sync_dist=sync_dist)

    def _optimizer(self) -> Optimizer:
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, Optimizer)
        return optimizer

    def _ends_step(self, batch_idx: int) -> bool:
        return ends_optimizer_step(self.trainer, batch_idx)

    def _may_go_backward(self) -> bool:
        """Whether gradients may be made inside ``training_step``: FSDP is in its own forward pass there."""
        strategy = self.trainer.strategy
        return not isinstance(strategy, FSDPStrategy) and not strategy.handles_gradient_accumulation
