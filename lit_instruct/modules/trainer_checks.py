"""Settings of the Trainer that Lightning takes without a word and stumbles over later, or explains on a page."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning.pytorch as pl
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_instruct.types import ConfigError

_LEAST_ROOM = 64 * 1024
"""Bytes that a run writes before its first step: settings and the beginning of its logs."""


@contextmanager
def made_by_lightning(section: str) -> Iterator[None]:
    """What Lightning refuses while it makes something from its settings is a mistake in these.

    Args:
        section: of the configuration.

    Raises:
        ConfigError: it refuses.
    """
    try:
        yield
    except ConfigError:
        raise
    except (MisconfigurationException, ValueError, TypeError, ImportError) as error:
        reason = " ".join(str(error).split())
        if reason.startswith(("Does not validate", "Problem with given class_path")):
            raise  # of a class that the section names; the caller knows what to say
        reason = reason if len(reason) <= 400 else f"{reason[:400]} ..."
        raise ConfigError(f"{section}: {reason.rstrip('.')}. Do: change that setting of {section}.") from error


def check_trainer(trainer: pl.Trainer) -> None:
    """Refuse, before any process is started, settings under which no training comes about.

    Args:
        trainer: that is about to fit.

    Raises:
        ConfigError: it would train nothing, divide by zero, wait for ever, or find at the first checkpoint that
            nothing can be written.
    """
    for name, value, need in (  # Lightning itself refuses what is below
        ("max_steps", trainer.max_steps, "at least 1, or -1 for no limit"),
        ("max_epochs", trainer.max_epochs, "at least 1, or -1 for no limit"),
        ("limit_train_batches", trainer.limit_train_batches, "more than 0"),
    ):
        if value == 0:
            raise ConfigError(f"trainer.{name}: got {value}; need {need}. Do: change it.")
    for name, number in (
        ("accumulate_grad_batches", trainer.accumulate_grad_batches),
        ("check_val_every_n_epoch", trainer.check_val_every_n_epoch),
    ):
        if number is not None and number < 1:
            raise ConfigError(f"trainer.{name}: got {number}; need at least 1. Do: change it.")
    if trainer.gradient_clip_val is not None and not trainer.gradient_clip_val >= 0:
        raise ConfigError(
            f"trainer.gradient_clip_val: got {trainer.gradient_clip_val}; need at least 0, or null. Do: change it."
        )
    every: int | None = getattr(trainer, "log_every_n_steps", None)  # set by a connector, and not declared
    if every is not None and every < 0:
        raise ConfigError(
            f"trainer.log_every_n_steps: got {every}; need at least 1, or 0 for no lines of the log. Do: change it."
        )
    _check_nodes(trainer)
    _check_folders(trainer)


def _check_nodes(trainer: pl.Trainer) -> None:
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if trainer.num_nodes > 1 and isinstance(environment, LightningEnvironment) and "MASTER_ADDR" not in os.environ:
        raise ConfigError(
            f"trainer.num_nodes: got {trainer.num_nodes}, and nothing says where the first node is; need that, or each "
            "waits for the others for ever. Do: start it with torchrun or srun (see the README), or set MASTER_ADDR, "
            "MASTER_PORT and NODE_RANK."
        )


def _check_folders(trainer: pl.Trainer) -> None:
    """All folders that the run will write to."""
    _check_folder("trainer.default_root_dir", trainer.default_root_dir)
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is not None:
            _check_folder("dirpath of ModelCheckpoint", str(callback.dirpath))
    for logger in trainer.loggers:
        if logger.save_dir is not None:
            _check_folder("save_dir of the logger", logger.save_dir)


def _check_folder(name: str, folder: str) -> None:
    if "://" in folder:
        return
    there = next(path for path in (Path(folder).resolve(), *Path(folder).resolve().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(_LEAST_ROOM))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ConfigError(
            f"{name}: got {folder!r}, where nothing can be written ({there}: {error.strerror}); need a folder that "
            "this user may write to, on a disk with room. Do: give another one, or make room."
        ) from error


class ValidationInterval(pl.Callback):
    """Refuses, once the data are read, an interval that no epoch reaches the end of."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Before Lightning does, on a page.

        Raises:
            ConfigError: an epoch has fewer batches.
        """
        interval = trainer.val_check_interval
        loader_of = getattr(getattr(trainer, "datamodule", None), "train_dataloader", None)
        if loader_of is None or not isinstance(interval, int) or trainer.check_val_every_n_epoch is None:
            return
        batches = len(loader_of())
        if interval > batches and trainer.limit_val_batches != 0:
            raise ConfigError(
                f"trainer.val_check_interval: got {interval} for an epoch of {batches} batches; need at most as many. "
                "Do: lower it, or set check_val_every_n_epoch to null, which counts over epochs."
            )
