"""Logs of a run: what cannot be written to them is left out, and never ends a training."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from lit_instruct.models.handover import first_line

log = logging.getLogger(__name__)

_WRITING = ("log_metrics", "log_hyperparams", "save", "finalize")  # what the Trainer calls
PAUSE_S = 60.0
"""Seconds without a log, until it is tried again."""


class OutlastFullDisk(pl.Callback):
    """A disk for logs that is full, or gone, does not end the training: lines are left out, and a warning says so.

    Every minute it is tried again. TensorBoard then goes on in another file of the same folder, since the last line of
    the first one may be half written.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Guard the loggers of the run."""
        for logger in trainer.loggers:
            for name in _WRITING:
                method = getattr(logger, name)
                if not isinstance(method, partial):  # already, by an earlier run of this Trainer
                    setattr(logger, name, partial(_write, logger, method))


def to_tensorboard(trainer: pl.Trainer, write: Callable[[Any], None]) -> None:
    """Write what is no number (a text, a picture) to the TensorBoard logs of a run, if it has any.

    Args:
        trainer: of the run; only its first process writes.
        write: is given a ``SummaryWriter``.
    """
    for logger in trainer.loggers if trainer.is_global_zero else []:
        if isinstance(logger, TensorBoardLogger):
            _write(logger, lambda logger=logger: write(logger.experiment))


class _Guard:
    """Calls what writes to one logger, unless that has failed a short while ago."""

    def __init__(self) -> None:
        self._again_at = float("-inf")

    def __call__(self, logger: Logger, write: Callable[..., Any], *arguments: Any, **named: Any) -> None:
        if time.monotonic() < self._again_at:
            return
        try:
            write(*arguments, **named)
        except (OSError, ValueError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__  # Lightning blames the value
            if not isinstance(cause, OSError):
                raise
            self._again_at = time.monotonic() + PAUSE_S
            if isinstance(logger, TensorBoardLogger):
                logger._experiment = None  # its thread is dead: the next line makes another
            log.warning(
                "the log in %s cannot be written (%s): training goes on without it, and it is tried again in %d "
                "seconds. Do: make room.",
                logger.log_dir or logger.save_dir,
                first_line(cause),
                PAUSE_S,
            )


_guards: WeakKeyDictionary[Logger, _Guard] = WeakKeyDictionary()


def _write(logger: Logger, write: Callable[..., Any], *arguments: Any, **named: Any) -> None:
    _guards.setdefault(logger, _Guard())(logger, write, *arguments, **named)
