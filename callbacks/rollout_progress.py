"""Progress inside a PPO iteration: how many responses are finished."""

from __future__ import annotations

import sys
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm


class RolloutProgressBar(TQDMProgressBar):
    """Lightning's progress bar, with one more bar while responses are sampled (finished / wanted)."""

    def __init__(self, refresh_rate: int = 1, leave: bool = False):
        """As Lightning's.

        Args:
            refresh_rate: batches between updates of the bars; 0 switches them off.
            leave: keep the bars of finished epochs on the screen.
        """
        super().__init__(refresh_rate=refresh_rate, leave=leave)
        self._rollout_bar: Tqdm | None = None

    def on_rollout_progress(self, module: pl.LightningModule, finished: int, wanted: int) -> None:
        """Called by ``PPOModule`` while it samples.

        Args:
            module: the module that samples.
            finished: responses that have ended.
            wanted: responses of this rollout on this rank.
        """
        if self.is_disabled:
            return
        if self._rollout_bar is None:
            self._rollout_bar = Tqdm(
                desc="  sampling",
                total=wanted,
                position=2 * self.process_position + 1,
                leave=False,
                dynamic_ncols=True,
                file=sys.stdout,
                unit="responses",
            )
        self._rollout_bar.update(finished - self._rollout_bar.n)
        if finished >= wanted:
            self._rollout_bar.close()
            self._rollout_bar = None

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Close a bar that an interrupted rollout left behind."""
        if self._rollout_bar is not None:
            self._rollout_bar.close()
            self._rollout_bar = None

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """The bar's numbers without Lightning's version of the log folder."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics
