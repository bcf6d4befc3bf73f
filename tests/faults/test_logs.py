"""The disk of the logs is full, or the process is killed: no training ends for it, and no line of before is lost."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from tensorboard.compat.tensorflow_stub.io.gfile import LocalFileSystem

from lit_instruct import DemonstrationDataModule, SFTModule
from lit_instruct.modules import run_logs
from lit_instruct.modules.run_logs import OutlastFullDisk, to_tensorboard
from tests.helpers.tiny import demonstrations, quiet_trainer, scalars, sgd, weights

STEPS = 12
FULL = OSError(errno.ENOSPC, "No space left on device")


class Full(pl.Callback):
    """The disk is full from one step on, until another begins; a text is written at each step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, start: int, end: int) -> None:
        self.steps, self.now = range(start, end), False
        write = LocalFileSystem._write

        def write_or_fail(system: Any, *arguments: Any) -> Any:
            if self.now:
                raise FULL
            return write(system, *arguments)

        monkeypatch.setattr(LocalFileSystem, "_write", write_or_fail)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, step: int) -> None:
        self.now = trainer.global_step in self.steps

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: Any) -> None:
        to_tensorboard(trainer, lambda log: log.add_text("note", "x", trainer.global_step))


def train(base: str, folder: Path, logger: Logger, *callbacks: pl.Callback) -> torch.Tensor:
    torch.manual_seed(1)
    module = SFTModule(base, learning_rate=0.1, optimizer=sgd)
    data = DemonstrationDataModule(demonstrations(folder / "d.jsonl", 32), module.tokenizer, batch_size=8, val=0)
    trainer = quiet_trainer(
        max_steps=STEPS, logger=logger, log_every_n_steps=1, callbacks=[*callbacks, OutlastFullDisk()]
    )
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == STEPS
    return weights(module.policy)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread
def test_training_outlasts_a_full_disk(
    base: str, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(run_logs, "PAUSE_S", 0.0)
    undisturbed = train(base, folder, TensorBoardLogger(folder, name="", version="a"))
    disturbed = train(base, folder, TensorBoardLogger(folder, name="", version="b"), Full(monkeypatch, 3, 7))
    assert torch.equal(disturbed, undisturbed)
    lines = scalars(folder / "a", "sft/train/loss")
    assert [step for step, _ in lines] == list(range(STEPS))
    kept = [line for line in lines if line[0] not in range(3, 7)]
    # Each file by itself: the names of files of one second do not say which is the first.
    files = [file for file in (folder / "b").glob("events*") if b"sft/train/loss" in file.read_bytes()]
    assert len(files) == 2
    assert sorted(line for file in files for line in scalars(file, "sft/train/loss")) == kept
    assert "No space left on device" in caplog.text
    assert str(folder / "b") in caplog.text


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_it_is_not_tried_at_each_line(
    base: str, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    train(base, folder, TensorBoardLogger(folder, name="", version="b"), Full(monkeypatch, 3, STEPS))
    assert caplog.text.count("No space left on device") == 1
    assert len(list((folder / "b").glob("events*"))) == 1


def test_other_loggers_outlast_it_too(base: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class FullCSV(CSVLogger):
        asked = 0

        def save(self) -> None:
            FullCSV.asked += 1
            raise FULL

    train(base, folder, FullCSV(folder))
    assert FullCSV.asked == 1


def test_what_is_no_matter_of_a_disk_is_raised(base: str, folder: Path) -> None:
    class Broken(CSVLogger):
        def log_metrics(self, *arguments: Any, **named: Any) -> None:
            raise ValueError("not a number")

    with pytest.raises(ValueError, match="not a number"):
        train(base, folder, Broken(folder))


class Killed(pl.Callback):
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, step: int) -> None:
        if trainer.global_step == 7:
            os.kill(os.getpid(), signal.SIGKILL)


def _train_until_killed(_: int, base: str, folder: str) -> None:
    train(base, Path(folder), TensorBoardLogger(folder, name="", version="a"), Killed())


def test_lines_before_a_kill_are_in_the_file(base: str, folder: Path) -> None:
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGKILL"):
        torch.multiprocessing.spawn(_train_until_killed, args=(base, str(folder)))
    assert [step for step, _ in scalars(folder / "a", "sft/train/loss")] == list(range(7))
