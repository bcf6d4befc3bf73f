"""What a run that is going to be killed tells, in files that outlive it. It gets both classes by their import path."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

PHASES = "phases.txt"
JOURNAL = "journal.jsonl"


def _append(path: Path, line: str) -> None:
    """One write a line: a process that is killed leaves none half-written."""
    opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        os.write(opened, f"{line}\n".encode())
    finally:
        os.close(opened)


class Witness(pl.Callback):
    """Writes ``PHASE STEP`` whenever another phase begins, and the texts that PPO samples.

    Phases: ``start``, ``rollout`` (PPO), ``update``, ``save``, ``validation``, ``sanity``.
    """

    def __init__(self, slow_disk_s: float = 0.0):
        """Set how slow the disk is.

        Args:
            slow_disk_s: what each flush takes longer, before and after, so that a kill can fall into it.
        """
        super().__init__()
        self.slow_disk_s = slow_disk_s

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        flush = os.fsync
        if self.slow_disk_s and not hasattr(flush, "slow"):

            def slow(opened: int) -> None:
                time.sleep(self.slow_disk_s)
                flush(opened)
                time.sleep(self.slow_disk_s)

            slow.slow = True  # type: ignore[attr-defined]
            os.fsync = slow

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._phase(trainer, "start")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._phase(trainer, "update" if pl_module.automatic_optimization else "rollout")

    def on_experience(self, module: Any, rollout: Any, experience: Any) -> None:
        self._phase(module.trainer, "update")
        texts = [
            module.tokenizer.decode(ids[mask].tolist())
            for ids, mask in zip(rollout.response_ids_BR, rollout.response_mask_BR, strict=True)
        ]
        if module.trainer.is_global_zero:
            _append(Path(JOURNAL), json.dumps({"step": module.iterations_done, "texts": texts}))

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._phase(trainer, "sanity" if trainer.sanity_checking else "validation")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._phase(trainer, "validated")

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._phase(trainer, "save")

    def _phase(self, trainer: pl.Trainer, name: str) -> None:
        if trainer.is_global_zero:
            _append(Path(PHASES), f"{name} {trainer.global_step}")


class Journal(TensorBoardLogger):
    """Everything that is logged, a line each; a TensorBoard logger, since texts and pictures go to those alone."""

    def __init__(self) -> None:
        super().__init__("logs", name="", version="")

    @property
    def experiment(self) -> Any:
        return self

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        _append(Path(JOURNAL), json.dumps({"step": step, "metrics": {name: float(x) for name, x in metrics.items()}}))

    @rank_zero_only
    def add_text(self, tag: str, text: str, step: int) -> None:
        _append(Path(JOURNAL), json.dumps({"step": step, "text": {tag: text}}))

    @rank_zero_only
    def add_image(self, tag: str, picture: Any, step: int, **_: Any) -> None:
        digest = hashlib.sha256(picture.tobytes()).hexdigest()
        _append(Path(JOURNAL), json.dumps({"step": step, "picture": {tag: digest}}))

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Not looked at."""

    def log_graph(self, *_: Any, **__: Any) -> None:
        """Not looked at."""

    def save(self) -> None:
        """Each line is written at once."""

    def finalize(self, status: str) -> None:
        """There is nothing to close."""
