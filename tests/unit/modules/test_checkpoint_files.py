"""Checkpoints that are cut off, full disks, processes that are killed while they write: the last good one stays."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel

from lit_instruct import SFTModule
from lit_instruct.cli import main, run_stage
from lit_instruct.modules.checkpoint_files import WholeCheckpointIO, is_whole, newest_whole
from lit_instruct.types import ConfigError, SaveError
from tests.helpers.tiny import demonstrations, quiet_trainer, save_stage


def record(number: int) -> dict[str, Any]:
    return {"number": number, "weights": torch.full((20_000,), float(number))}


def read(path: Path) -> int:
    loaded = WholeCheckpointIO().load_checkpoint(path)
    assert torch.equal(loaded["weights"], torch.full((20_000,), float(loaded["number"])))
    return int(loaded["number"])


def test_what_is_saved_is_read_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.ckpt"
    for number in (1, 2):
        WholeCheckpointIO().save_checkpoint(record(number), path)
        assert read(path) == number
        assert is_whole(path)
    assert [file.name for file in path.parent.iterdir()] == ["a.ckpt"]


def test_a_file_that_is_cut_off_is_recognised(base: str, tmp_path: Path) -> None:
    whole = Path(save_stage(SFTModule(base), tmp_path / "whole.ckpt"))
    content, stream = whole.read_bytes(), random.Random(0)
    assert is_whole(whole)
    for length in [0, len(content) - 1, *(stream.randrange(len(content)) for _ in range(20))]:
        cut = tmp_path / "cut.ckpt"
        cut.write_bytes(content[:length])
        assert not is_whole(cut)
        with pytest.raises(ConfigError, match=r"cut.ckpt' cannot be read: .*auto_resume"):
            WholeCheckpointIO().load_checkpoint(cut)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"state": Bomb()}, tmp_path / "bomb.ckpt")
    with pytest.raises(ConfigError, match=r"bomb.ckpt' cannot be read"):
        WholeCheckpointIO().load_checkpoint(tmp_path / "bomb.ckpt", weights_only=False)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("room", [0, 100, 30_000, 79_000])
def test_a_full_disk_leaves_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    path = tmp_path / "a.ckpt"
    WholeCheckpointIO().save_checkpoint(record(1), path)
    opened = Path.open

    class Full:
        """A file on a disk with so much room."""

        def __init__(self, file: Any) -> None:
            self.file, self.left = file, room

        def write(self, data: Any) -> int:
            self.left -= len(data)
            if self.left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return int(self.file.write(data))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: Any) -> None:
            self.file.close()

    monkeypatch.setattr(Path, "open", lambda self, mode="r", *rest: Full(opened(self, mode, *rest)))
    with pytest.raises(SaveError, match=r"a.ckpt' could not be written: .*as it was. Do: make room"):
        WholeCheckpointIO().save_checkpoint(record(2), path)
    monkeypatch.undo()
    assert read(path) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["a.ckpt"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(SaveError, match=r"a.ckpt' could not be written: .*Nothing was there before"):
        WholeCheckpointIO().save_checkpoint(record(1), tmp_path / "file" / "a.ckpt")


_WRITER = """
import sys, torch
from lit_instruct.modules.checkpoint_files import WholeCheckpointIO
number = 0
while True:
    number += 1
    made = {"number": number, "weights": torch.full((20_000,), float(number))}
    WholeCheckpointIO().save_checkpoint(made, sys.argv[1])
    if number == 1:
        print("writing", flush=True)
"""


def test_killed_while_it_writes(tmp_path: Path) -> None:
    path, stream = tmp_path / "a.ckpt", random.Random(0)
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", _WRITER, str(path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        time.sleep(stream.uniform(0.05, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
        process.stdout.close()
        assert is_whole(path)
        assert read(path) > 1


def test_the_newest_whole_one(tmp_path: Path) -> None:
    assert newest_whole([tmp_path / "nowhere", tmp_path]) == (None, [])
    for age, name in enumerate(("newest", "middle", "oldest")):
        WholeCheckpointIO().save_checkpoint(record(age), tmp_path / f"{name}.ckpt")
        os.utime(tmp_path / f"{name}.ckpt", (1000 - age, 1000 - age))
    assert newest_whole([tmp_path, tmp_path]) == ((tmp_path / "newest.ckpt").resolve(), [])
    (tmp_path / "newest.ckpt").write_bytes((tmp_path / "newest.ckpt").read_bytes()[:-50])
    os.utime(tmp_path / "newest.ckpt", (1001, 1001))
    unfinished = tmp_path / "shards.ckpt"
    unfinished.mkdir()
    os.utime(unfinished, (1002, 1002))
    (tmp_path / ".other.ckpt.part").write_bytes(b"not yet")
    found, damaged = newest_whole([tmp_path])
    assert found == (tmp_path / "middle.ckpt").resolve()
    assert [path.name for path in damaged] == ["shards.ckpt", "newest.ckpt"]


class Failing(WholeCheckpointIO):
    """Its disk is full from the third checkpoint on."""

    saved = 0

    def save_checkpoint(self, *arguments: Any, **more: Any) -> None:
        self.saved += 1
        with pytest.MonkeyPatch.context() as patch:
            if self.saved > 2:
                patch.setattr(os, "fsync", no_room)
            super().save_checkpoint(*arguments, **more)


def no_room(_: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("last", [False, True, "link"])
@pytest.mark.parametrize("filename", ["{step}", "always"])
def test_save_top_k_keeps_the_last_good_one(tmp_path: Path, last: Any, filename: str) -> None:
    """Lightning removes the one before only after the new one is written; if it cannot be, nothing is removed."""
    saver = pl.callbacks.ModelCheckpoint(
        tmp_path, filename, every_n_train_steps=1, save_last=last, enable_version_counter=False
    )
    trainer = quiet_trainer(max_epochs=1, limit_val_batches=0, callbacks=[saver], plugins=[Failing()])
    with pytest.raises(SaveError, match=r"could not be written: .*No space left .*MB are free"):
        trainer.fit(BoringModel())
    found, damaged = newest_whole([tmp_path])
    assert damaged == []
    assert found is not None
    assert WholeCheckpointIO().load_checkpoint(found)["global_step"] == (1 if last is True else 2)
    names = {path.name for path in tmp_path.iterdir()}
    assert len(names) == 1 + bool(last)


def test_a_link_whose_checkpoint_is_gone_is_passed_over(tmp_path: Path) -> None:
    """Killed between removing the one before and setting the link anew, Lightning leaves it like that."""
    WholeCheckpointIO().save_checkpoint(record(1), tmp_path / "a.ckpt")
    (tmp_path / "last.ckpt").symlink_to(tmp_path / "gone.ckpt")
    assert newest_whole([tmp_path]) == ((tmp_path / "a.ckpt").resolve(), [])


def test_a_folder_that_is_read_only(tmp_path: Path) -> None:
    """For root too, whom permissions do not stop."""
    folder = tmp_path / "fixed"
    WholeCheckpointIO().save_checkpoint(record(1), folder / "a.ckpt")
    if subprocess.run(["chattr", "+i", str(folder)], capture_output=True).returncode:
        pytest.skip("this file system, or user, cannot make a folder immutable")
    try:
        with pytest.raises(SaveError, match=r"a.ckpt' could not be written: .*not permitted.*as it was"):
            WholeCheckpointIO().save_checkpoint(record(2), folder / "a.ckpt")
        assert read(folder / "a.ckpt") == 1
    finally:
        subprocess.run(["chattr", "-i", str(folder)], check=True)


def test_auto_resume(base: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Begins where there is nothing, and then goes on from the newest that is whole."""
    data = demonstrations(folder / "d.jsonl", 16)
    saved = "{class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: {dirpath: runs, filename: '{step}', "
    saved += "every_n_train_steps: 1, save_top_k: -1}}"
    words = ["fit", "--model.base", base, "--data.demonstrations", data, "--data.batch_size", "4", "--data.val", "0"]
    words += ["--trainer.accelerator", "cpu", "--trainer.logger", "false", "--trainer.callbacks", f"[{saved}]"]
    words += ["--trainer.enable_progress_bar", "false", "--auto_resume", "true", "--trainer.max_steps"]
    assert run_stage("sft", [*words, "2"]).trainer.global_step == 2
    kept = sorted(path.name for path in (folder / "runs").iterdir())
    assert kept == ["step=1.ckpt", "step=2.ckpt"]
    broken = folder / "runs" / "step=2.ckpt"
    broken.write_bytes(broken.read_bytes()[:1000])
    with pytest.warns(UserWarning, match=r"step=2.ckpt' is not whole"):
        again = run_stage("sft", [*words, "3"])
    assert again.config["fit"].ckpt_path == "runs/step=1.ckpt"
    assert again.trainer.global_step == 3
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["sft", *words[:-3], "--auto_resume", "true", "--trainer.callbacks", "[]"])
    assert "auto_resume: got true, but no ModelCheckpoint" in capsys.readouterr().err
