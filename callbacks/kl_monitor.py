"""Watch how far the policy has moved from its reference; optionally steer the KL coefficient."""

from __future__ import annotations

import logging
from typing import Literal

import lightning.pytorch as pl

from lit_instruct.functional import adaptive_kl_coef, kl_estimates
from lit_instruct.modules.ppo import PPOModule
from lit_instruct.modules.strategies import max_over_ranks, sum_over_ranks, world_size
from lit_instruct.types import ConfigError, Experience, Metrics, Rollout

log = logging.getLogger(__name__)


class KLMonitor(pl.Callback):
    """Logs KL per token and the low-variance estimate k3; warns or stops above a ceiling; adaptive coefficient.

    The estimates follow Schulman's note on approximating KL: k1 (the module logs it as ``objective/kl``) is what the
    reward is charged, unbiased and noisy; k3 never is negative. The controller is that of Ziegler et al. 2019, 2.2.
    """

    def __init__(
        self,
        ceiling: float | None = None,
        action: Literal["warn", "stop"] = "warn",
        target: float | None = None,
        horizon: int = 10_000,
    ):
        """Set what to watch for.

        Args:
            ceiling: nats a sequence that the mean KL should not exceed; null: no ceiling.
            action: above the ceiling, warn or stop the run after the iteration.
            target: nats a sequence that the controller aims at; null: the coefficient stays as it is.
            horizon: episodes over which the controller corrects an error of its full range.
        """
        super().__init__()
        if action not in ("warn", "stop"):
            raise ConfigError(f"KLMonitor action: got {action!r}; need warn or stop.")
        for name, value in (("ceiling", ceiling), ("target", target), ("horizon", horizon)):
            if value is not None and value <= 0:
                raise ConfigError(f"KLMonitor {name}: got {value}; need more than 0, or null for none.")
        self.ceiling, self.action, self.target, self.horizon = ceiling, action, target, horizon
        self._estimates: Metrics = {}
        self._trainer: pl.Trainer | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remember whom to stop; a custom loop has no Trainer and can only be warned."""
        self._trainer = trainer

    def _stop(self) -> None:
        if self._trainer is not None:
            self._trainer.should_stop = True

    def on_experience(self, module: PPOModule, rollout: Rollout, experience: Experience) -> None:
        """Measure the KL of the fresh samples."""
        mask_BR = rollout.response_mask_BR
        k1_BR, _, k3_BR = (
            k.where(mask_BR, 0.0) for k in kl_estimates(rollout.old_logprobs_BR, rollout.reference_logprobs_BR)
        )
        sums = [k1_BR.sum(), k3_BR.sum(), mask_BR.sum().to(k1_BR.dtype), k1_BR.new_tensor(len(mask_BR))]
        k1, k3, tokens, episodes = (float(sum_over_ranks(x)) for x in sums)
        self._estimates = {
            "objective/kl_per_token": k1 / tokens,
            "objective/kl_k3": k3 / episodes,
            "objective/kl_max": max_over_ranks(float(k1_BR.sum(dim=1).max()), k1_BR.device),
        }
        self._kl, self._episodes = k1 / episodes, len(mask_BR) * world_size()

    def after_iteration(self, module: PPOModule, metrics: Metrics) -> None:
        """Add the estimates to the iteration's metrics, steer, and act on the ceiling."""
        metrics |= self._estimates
        if self.target is not None:
            module.kl_coef = adaptive_kl_coef(
                module.kl_coef, self._kl, target=self.target, horizon=self.horizon, episodes=self._episodes
            )
        if self.ceiling is not None and self._kl > self.ceiling:
            advice = "raise kl_coef, lower learning_rate, or stop here: reward models are exploited at high KL."
            log.warning("KL to the reference is %.2f nats a sequence, above %.2f; %s", self._kl, self.ceiling, advice)
            if self.action == "stop":
                self._stop()
