"""What a step still has to do when a checkpoint is written at its end, and Lightning leaves out on resuming.

``ModelCheckpoint`` writes in ``on_train_batch_end`` (or ``on_train_epoch_end``). Only then does Lightning write the log
of the step, validate if it is time to, and end the epoch if that was its last batch. A run that goes on from such a
checkpoint would go on behind all that: the line of the log, the validation with what it chooses, the epoch's hooks
would be missing. So the checkpoint carries the line, and a resumed run does the rest first.

The loops of Lightning are read and moved here as its own ``reset`` methods do, and nowhere else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import lightning.pytorch as pl
from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loops.training_epoch_loop import RestartStage


class LogLine(TypedDict):
    """What the loggers are to be told.

    Attributes:
        step: on their x-axis.
        metrics: by name.
    """

    step: int
    metrics: dict[str, float]


class Limits(NamedTuple):
    """How long a run is; -1: as long as it takes."""

    max_steps: int
    max_epochs: int | None


def ends_optimizer_step(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether a micro-batch is the last one of its optimizer step: only then nothing is lost between two batches.

    Args:
        trainer: in ``on_train_batch_end``.
        batch_idx: number of the micro-batch in its epoch.
    """
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or bool(trainer.is_last_batch)


def line_to_come(trainer: pl.Trainer) -> LogLine | None:
    """The line of the log that Lightning writes after the checkpoint that is being made; every process must call it.

    Args:
        trainer: that saves.

    Returns:
        The line; None where none is due.
    """
    fit, batches = trainer.fit_loop, trainer.fit_loop.epoch_loop
    if not (trainer.training and trainer.loggers):
        return None
    at_batch_end = _one_behind(batches.batch_progress.total)
    at_epoch_end = not at_batch_end and _one_behind(fit.epoch_progress.total)
    if not (at_epoch_end or (at_batch_end and _logs_this_step(trainer))):
        return None
    metrics: dict[str, Any] = convert_tensors_to_scalars(dict(batches._results.metrics(on_step=at_batch_end)["log"]))
    if not metrics:
        return None
    step = metrics.pop("step", None)
    if step is None:  # as Lightning does
        metrics.setdefault("epoch", trainer.current_epoch)
        step = batches._batches_that_stepped - at_epoch_end
    return {"step": int(step), "metrics": {name: float(value) for name, value in metrics.items()}}


def write_line(trainer: pl.Trainer, line: LogLine) -> None:
    """Tell the loggers what the interrupted run may not have told them any more.

    Args:
        trainer: with the loggers.
        line: of :func:`line_to_come`.
    """
    for logger in trainer.loggers:
        logger.log_metrics(dict(line["metrics"]), step=line["step"])
        logger.save()


def is_finished(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> bool:
    """Whether a checkpoint is of the last step of this run.

    Args:
        trainer: with the limits.
        checkpoint: of Lightning.
    """
    epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    limits = Limits(trainer.fit_loop.max_steps, trainer.fit_loop.max_epochs)
    return 0 <= limits.max_steps <= checkpoint["global_step"] or 0 <= (limits.max_epochs or -1) <= epochs


def lift_limits(trainer: pl.Trainer) -> Limits:
    """Let Lightning begin a run that is finished, as far as ``on_train_start``; it would skip all of it.

    Args:
        trainer: that is about to train.

    Returns:
        The limits, for :func:`set_limits`.
    """
    limits = Limits(trainer.fit_loop.max_steps, trainer.fit_loop.max_epochs)
    set_limits(trainer, Limits(-1, -1))
    return limits


def set_limits(trainer: pl.Trainer, limits: Limits) -> None:
    """Set how long a run is.

    Args:
        trainer: that trains.
        limits: of the run.
    """
    trainer.fit_loop.epoch_loop.max_steps, trainer.fit_loop.max_epochs = limits


def finish_step(trainer: pl.Trainer) -> None:
    """Validate, and end the epoch, if the step after which the checkpoint was written had to do so.

    Args:
        trainer: in ``on_train_start`` of a resumed run.
    """
    fit, batches, fetcher = trainer.fit_loop, trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    assert fetcher is not None
    _remember_that_it_is_saved(trainer)
    if fit.restarted_on_epoch_end:  # Lightning would end it a second time
        _begin_next_epoch(trainer)
        return
    ends_run = trainer.should_stop or 0 <= batches.max_steps <= trainer.global_step
    if batches.restarted_on_last:  # after a validation, from where Lightning goes on rightly, if it goes on
        if ends_run:
            _end_epoch(trainer)
        return
    if not batches.restarted_on_train_batch_end:
        return
    ends_epoch = fit.restarted_mid_epoch and batches.batch_progress.is_last_batch
    if ends_epoch:  # Lightning has counted it as over
        _add(fit.epoch_progress, processed=-1, completed=-1)
    validates = batches._should_check_val_fx(fetcher)
    if not (validates or ends_epoch or ends_run):
        return
    _add(batches.batch_progress, completed=1)
    batches._restart_stage = RestartStage.RESTARTED_ON_LAST
    if validates:
        _validate(trainer)
    if ends_epoch or ends_run:
        _end_epoch(trainer)


def _validate(trainer: pl.Trainer) -> None:
    """As in the middle of training. What is left then is that of a checkpoint of the end of a validation."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.restarting = False
    trainer.validating = True
    loop.run()
    trainer.training = True
    loop._has_run = False  # since the restart, as there


def _end_epoch(trainer: pl.Trainer) -> None:
    trainer.fit_loop.epoch_loop._batches_that_stepped += 1
    trainer.fit_loop.on_advance_end()
    _begin_next_epoch(trainer)


def _begin_next_epoch(trainer: pl.Trainer) -> None:
    fit = trainer.fit_loop
    progress: Any = fit.epoch_progress
    for tracker in (progress.total, progress.current):
        tracker.completed = tracker.processed
    fit.reset_restart_stage()
    fit.epoch_loop.restarting = False


def _remember_that_it_is_saved(trainer: pl.Trainer) -> None:
    """Tell callbacks that save what they do not keep: that this step is saved, and that ``last.ckpt`` is of it.

    They would save again in the middle of the next step, whose gradients would be lost; or at the end of the run, when
    the epoch of the last step is counted as over.
    """
    resumed = Path(str(trainer.ckpt_path)).resolve()
    for callback in trainer.checkpoint_callbacks:
        if not isinstance(callback, ModelCheckpoint):
            continue
        if callback._every_n_train_steps:
            callback._last_global_step_saved = trainer.global_step
        if callback.last_model_path and Path(callback.last_model_path).resolve() == resumed:
            callback._last_checkpoint_saved = callback.last_model_path


def _logs_this_step(trainer: pl.Trainer) -> bool:
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set without being declared
    due = every > 0 and (trainer.fit_loop.epoch_loop._batches_that_stepped + 1) % every == 0
    return (due or trainer.should_stop) and not trainer.fit_loop._should_accumulate()


def _one_behind(progress: Any) -> bool:
    return bool(progress.processed == progress.completed + 1)


def _add(progress: Any, **counts: int) -> None:
    for tracker in (progress.total, progress.current):
        for name, count in counts.items():
            setattr(tracker, name, getattr(tracker, name) + count)
