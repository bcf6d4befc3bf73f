"""Checkpoint files that are whole or not there, and how to tell."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lit_instruct.models.handover import first_line
from lit_instruct.types import ConfigError, SaveError

_PART = ".part"  # ends the name of a checkpoint that is being written
_SHARDS_MARK = "meta.pt"  # Lightning writes it when all shards are on disk


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, flushes it to the disk and renames it: whatever happens, the old one stays.

    Lightning's own writes into the folder for temporary files and copies from there, where that is another disk; killed
    meanwhile it leaves a file that is cut off. Reading takes tensors, numbers and text, nothing that could run code.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        """Write a checkpoint.

        Args:
            checkpoint: what to write.
            path: where; an address of another file system is left to Lightning.
            storage_options: of such an address.

        Raises:
            SaveError: it could not be written; what was there before still is.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        part = target.with_name(f".{target.name}{_PART}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, target)
            _flush_folder(target.parent)
        except (OSError, RuntimeError) as error:  # torch says of a full disk that its writer failed
            kept = "The one that was there before is as it was" if target.exists() else "Nothing was there before"
            try:
                part.unlink(missing_ok=True)
            except OSError:
                kept += f", and {str(part)!r} is left over"
            raise SaveError(
                f"checkpoint {str(target)!r} could not be written: {first_line(error)} {kept}. Do: make room or give "
                "another folder (dirpath of ModelCheckpoint), and go on from the last checkpoint with --ckpt_path."
            ) from error

    def load_checkpoint(
        self,
        path: _PATH,
        map_location: Callable[..., Any] | None = lambda storage, _: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint.

        Args:
            path: of the file.
            map_location: of ``torch.load``.
            weights_only: not read: it is always True.

        Returns:
            The checkpoint.

        Raises:
            ConfigError: the file is not there, is cut off or holds more than data.
        """
        try:
            loaded: dict[str, Any] = super().load_checkpoint(path, map_location, weights_only=True)
        except (OSError, RuntimeError, EOFError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
            raise ConfigError(
                f"checkpoint {str(path)!r} cannot be read: {first_line(error)} It may be cut off or from another "
                "program. Do: give an earlier one, or --auto_resume true, which takes the newest that is whole."
            ) from error
        return loaded


def _flush_folder(folder: Path) -> None:
    """The new name must be on the disk too."""
    if os.name != "posix":
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end.

    Args:
        checkpoint: a file, whose list of contents stands at its end; or a folder of shards.

    Returns:
        False also for files of other programs.
    """
    if checkpoint.is_dir():
        return (checkpoint / _SHARDS_MARK).is_file() and (checkpoint / ".metadata").is_file()
    if not zipfile.is_zipfile(checkpoint):
        return False
    with zipfile.ZipFile(checkpoint) as file:
        return any(name.endswith("/data.pkl") for name in file.namelist())


def newest_whole(folders: list[Path]) -> tuple[Path | None, list[Path]]:
    """The checkpoint to go on from.

    Args:
        folders: where checkpoints may lie; not those below.

    Returns:
        The newest whole one, or None; and the damaged ones that are newer.
    """
    found = {path.resolve(): path for folder in folders if folder.is_dir() for path in folder.glob("*.ckpt")}
    damaged: list[Path] = []
    for path in sorted(found.values(), key=lambda path: path.stat().st_mtime_ns, reverse=True):
        if is_whole(path):
            return path, damaged
        damaged.append(path)
    return None, damaged
