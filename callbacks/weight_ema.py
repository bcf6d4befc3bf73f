"""An exponential moving average of the policy's weights, for validation, sampling and export."""

from __future__ import annotations

from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn

from lit_instruct.models.sharding import cut_like, whole
from lit_instruct.types import ConfigError, Metrics


class WeightEMA(pl.Callback):
    """Keeps average <- decay * average + (1 - decay) * weights, of the policy only (Ouyang et al. 2022, C.4: 0.992).

    What is frozen below an adapter has no average.

    The average starts at the initial weights, is kept in fp32 beside each parameter (a shard beside a shard), and
    stands in for the weights during validation. Training never sees it.
    """

    def __init__(self, decay: float = 0.992, unit: Literal["step", "iteration"] = "step"):
        """Set how slowly the average follows.

        Args:
            decay: share of the old average that each update keeps.
            unit: one update an optimizer step, or one a PPO iteration.
        """
        super().__init__()
        if not 0 <= decay < 1:
            raise ConfigError(f"WeightEMA decay: got {decay}; need at least 0 and less than 1.")
        if unit not in ("step", "iteration"):
            raise ConfigError(f"WeightEMA unit: got {unit!r}; need step or iteration.")
        self.decay, self.unit = decay, unit
        self.average: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}
        self._steps_seen = 0

    def start(self, module: Any) -> None:
        """Take the weights as they are for the first average; nothing happens if there is one already.

        Args:
            module: with a ``policy``.
        """
        if not self.average:
            self.average = {name: p.detach().float().clone() for name, p in _trained(module)}

    @torch.no_grad()
    def update(self, module: Any) -> None:
        """Move the average a step towards the weights.

        Args:
            module: with a ``policy``.
        """
        for name, parameter in _trained(module):
            average = self.average[name] = cut_like(self.average[name], parameter)
            average.lerp_(parameter.detach().float(), 1.0 - self.decay)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a module without a policy, and a strategy under which parameters are no tensors of their own."""
        if not hasattr(pl_module, "policy"):
            raise ConfigError(
                f"WeightEMA: got a {type(pl_module).__name__}; need an SFTModule or a PPOModule, whose policy it "
                "averages. Do: remove it."
            )
        if isinstance(trainer.strategy, FSDPStrategy):
            raise ConfigError(
                "WeightEMA: got the strategy fsdp (FSDP1), which joins the shards of all weights; need one that keeps "
                "weights apart. Do: --trainer.strategy fsdp2 or --config strategy/fsdp.yaml, or remove WeightEMA."
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin at the initial weights."""
        self.start(pl_module)

    def after_update(self, module: Any, minibatch_metrics: Metrics) -> None:
        """PPO: after each optimizer step."""
        if self.unit == "step":
            self.start(module)
            self.update(module)

    def after_iteration(self, module: Any, metrics: Metrics) -> None:
        """PPO: after each iteration."""
        if self.unit == "iteration":
            self.start(module)
            self.update(module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """SFT: after each optimizer step, of which accumulation makes fewer than batches."""
        if pl_module.automatic_optimization and trainer.global_step != self._steps_seen:
            self._steps_seen = trainer.global_step
            self.update(pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validate the average."""
        self._swap_in(pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the weights back."""
        self._swap_out(pl_module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Test the average, as validation does."""
        self._swap_in(pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the weights back."""
        self._swap_out(pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Validation may have been cut short: what is saved now must be the weights."""
        self._swap_out(pl_module)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the average beside the weights; ``load_language_model(..., ema=True)`` reads it."""
        saved: dict[str, Tensor] = {}
        for name, tensor in self.average.items():
            joined = whole(tensor)  # on all ranks together; one of them writes it, so only there it is kept
            if trainer.is_global_zero:
                saved[f"policy.{name}"] = joined.cpu()
        checkpoint["ema_state_dict"] = saved

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on from the saved average."""
        saved = checkpoint.get("ema_state_dict", {})
        self.average = {name.removeprefix("policy."): tensor.clone() for name, tensor in saved.items()}
        self._steps_seen = checkpoint["global_step"]

    @torch.no_grad()
    def _swap_in(self, module: Any) -> None:
        if self.average and not self._weights:
            for name, parameter in _trained(module):
                self._weights[name] = parameter.detach().clone()
                parameter.copy_(cut_like(self.average[name], parameter))

    @torch.no_grad()
    def _swap_out(self, module: Any) -> None:
        if self._weights:
            for name, parameter in _trained(module):
                parameter.copy_(self._weights[name])
            self._weights = {}


def _trained(module: Any) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in module.policy.named_parameters() if parameter.requires_grad]
