"""A run that is told to end saves between two steps, and ends with the exit status that says so."""

from __future__ import annotations

import logging
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_instruct.modules.resuming import ends_optimizer_step
from lit_instruct.modules.strategies import max_over_ranks

log = logging.getLogger(__name__)

FILE = "interrupted.ckpt"


class Interrupted(SystemExit):
    """The run was told to end; its status is 128 + the number of the signal, as of a process that the signal killed."""


class SaveOnSignal(pl.Callback):
    """SIGTERM or Ctrl-C: the step (of PPO: the iteration) is finished, ``interrupted.ckpt`` written, the run ended.

    Half of a step cannot be saved: its weights are of no iteration. A second Ctrl-C ends at once, without saving. On
    several processes one that is told is enough. Where SLURM requeues jobs, its signal saves and requeues between two
    steps too, by Lightning's own handler, and SIGTERM is left to Lightning.

    The exit status is 143 after SIGTERM and 130 after Ctrl-C; Lightning's own would be 0 and 1.

    Attributes:
        received: number of the last signal that has not been served; 0: none.
    """

    def __init__(self) -> None:
        """Wait for nothing yet."""
        self.received = 0
        self._requeue = 0  # the number of SLURM's signal, where it is ours to serve
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the signals over: not before, for Lightning puts its own handlers in front of those that it finds."""
        # What came while the sanity check ran, Lightning has heard.
        self.received, self._requeue = int(signal.SIGTERM) if trainer.received_sigterm else 0, 0
        if threading.current_thread() is not threading.main_thread():  # which alone may
            return
        cluster = getattr(trainer.strategy, "cluster_environment", None)  # not there on a single device
        if cluster is None and SLURMEnvironment.detect():
            cluster = SLURMEnvironment()
        requeue = cluster.requeue_signal if isinstance(cluster, SLURMEnvironment) and cluster.auto_requeue else None
        if requeue is not None and callable(signal.getsignal(requeue)):
            self._requeue = requeue
            self._take(requeue, self._note)
        else:
            self._take(signal.SIGTERM, self._note)
        self._take(signal.SIGINT, self._note)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Between two steps: all processes agree, save and end.

        Raises:
            Interrupted: the run was told to end.
        """
        if not ends_optimizer_step(trainer, batch_idx):
            return
        number = int(max_over_ranks(float(self.received), pl_module.device))
        if not number:
            return
        if number == self._requeue:
            self.received = 0 if self.received == number else self.received
            self._before[number](number, None)
            return
        path = self._folder(trainer) / FILE
        trainer.save_checkpoint(path)
        rank_zero_info(f"{signal.Signals(number).name}: saved between two steps. Go on with --ckpt_path {path}")
        raise Interrupted(128 + number)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the signals back."""
        self._give_back()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Lightning does not call ``teardown`` then; and where it serves SIGTERM itself its exit status would be 0."""
        self._give_back()
        if isinstance(exception, SIGTERMException):  # before training, or in a validation of its own
            exception.code = 128 + signal.SIGTERM
            rank_zero_info("SIGTERM: ended without saving; --auto_resume true goes on from the last checkpoint")

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.received = number
        log.warning("%s: the step is finished first, then saved", signal.Signals(number).name)

    def _take(self, number: int, handler: Any) -> None:
        self._before[number] = signal.signal(number, handler)

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    @staticmethod
    def _folder(trainer: pl.Trainer) -> Path:
        """Where the run's checkpoints lie."""
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath:
                return Path(callback.dirpath)
        return Path(trainer.default_root_dir)
