"""Checkpoints, files and folders of shards, that are whole or not there, and how to tell."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lit_instruct.models.handover import first_line
from lit_instruct.types import ConfigError, SaveError

_PART = ".part"  # ends the name of a checkpoint that is being written
_OLD = ".old"  # ends the name of one whose place is being taken
_MARK = "whole.json"  # in a folder of shards, written last: the files and their sizes
_REQUIRED = (".metadata", "meta.pt")  # in a folder without a mark: of an earlier version, or of Lightning's own FSDP


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
        part = part_of(target)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            write_flushed(checkpoint, part)
            swap_in(part, target)
        except (OSError, RuntimeError) as error:  # torch says of a full disk that its writer failed
            raise save_error(target, first_line(error)) from error

    def remove_checkpoint(self, path: _PATH) -> None:
        """Remove a checkpoint: a folder at once, so that a kill leaves none that looks whole.

        Args:
            path: file or folder.
        """
        if "://" not in str(path) and Path(path).is_dir() and not Path(path).is_symlink():
            old = old_of(Path(path))
            _remove(old)
            os.rename(path, old)
            path = old
        super().remove_checkpoint(path)

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
        with readable(path):
            loaded: dict[str, Any] = super().load_checkpoint(path, map_location, weights_only=True)
        return loaded


@contextmanager
def readable(path: _PATH) -> Iterator[None]:
    """Reading a checkpoint: what torch says of a file that is no whole checkpoint, in the user's words.

    Args:
        path: that is read.

    Raises:
        ConfigError: the file is not there, is cut off or holds more than data.
    """
    try:
        yield
    except (OSError, RuntimeError, EOFError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise ConfigError(
            f"checkpoint {str(path)!r} cannot be read: {first_line(error)} It may be cut off or from another "
            "program. Do: give an earlier one, or --auto_resume true, which takes the newest that is whole."
        ) from error


def write_flushed(content: dict[str, Any], path: Path) -> None:
    """Write a file that is on the disk when this returns.

    Args:
        content: for ``torch.save``.
        path: of the file.
    """
    with path.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def part_of(target: Path) -> Path:
    """Where a checkpoint is written before it takes its place: beside it, hidden."""
    return target.with_name(f".{target.name}{_PART}")


def old_of(target: Path) -> Path:
    """Where the checkpoint that had this place waits until the new one has taken it."""
    return target.with_name(f".{target.name}{_OLD}")


def swap_in(part: Path, target: Path) -> None:
    """Let what has been written take its place, and flush the names.

    A file takes the place of a file at once. A folder cannot: between two renames the place is empty. Then the new one
    is whole beside it, and so is the old one; :func:`newest_whole` looks there too.

    Args:
        part: the file or folder, flushed; see :func:`part_of`.
        target: its place.
    """
    old = old_of(target)
    if target.is_dir() or (part.is_dir() and target.exists()):
        _remove(old)
        os.rename(target, old)
    os.replace(part, target)
    flush_folder(target.parent)
    _remove(old)


def begin_part(target: Path) -> Path:
    """An empty folder for the shards of a checkpoint.

    A killed process may have left a whole one there, and nothing in its place: that one takes its place first.

    Args:
        target: where the checkpoint is to be in the end.

    Returns:
        The folder to write into.
    """
    part = part_of(target)
    if part.is_dir() and is_whole(part):
        swap_in(part, target)
    elif old_of(target).exists() and not target.exists():
        os.rename(old_of(target), target)
    _remove(part)
    part.mkdir(parents=True)
    return part


def mark_as_whole(folder: Path) -> None:
    """Write into a folder of shards, last of all, which files it has and how long they are.

    Args:
        folder: all of its files are written and flushed.
    """
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    with (folder / _MARK).open("w", encoding="utf-8") as file:
        json.dump(sizes, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    flush_folder(folder)


def save_error(target: Path, reason: str) -> SaveError:
    """What is said when a checkpoint could not be written; what has been written of it is removed.

    Args:
        target: where it was to be.
        reason: why not.

    Returns:
        The error, to be raised.
    """
    kept = "The one that was there before is as it was" if target.exists() else "Nothing was there before"
    try:
        _remove(part_of(target))
    except OSError:
        kept += f", and {str(part_of(target))!r} is left over"
    return SaveError(
        f"checkpoint {str(target)!r} could not be written: {reason} {_room(target)}{kept}. Do: make room or give "
        "another folder (dirpath of ModelCheckpoint), and go on from the last checkpoint with --ckpt_path or "
        "--auto_resume true."
    )


def _room(target: Path) -> str:
    """How much room the disk has; torch does not always say that this is what was missing."""
    try:
        free = shutil.disk_usage(target.parent).free
    except OSError:  # there is no such folder
        return ""
    return f"({free / 1e6:.1f} MB are free there.) "


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush_folder(folder: Path) -> None:
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

    Of a file only the end is looked at, where its list of contents stands. That is enough: all of it is on the disk
    before it gets its name, so that no loss of power leaves a hole in the middle.

    Args:
        checkpoint: a file; or a folder of shards, whose mark names the files and their sizes.

    Returns:
        False also for files of other programs.
    """
    if checkpoint.is_dir():
        return _is_whole_folder(checkpoint)
    if not zipfile.is_zipfile(checkpoint):
        return False
    with zipfile.ZipFile(checkpoint) as file:
        return any(name.endswith("/data.pkl") for name in file.namelist())


def _is_whole_folder(folder: Path) -> bool:
    mark = folder / _MARK
    if not mark.exists():
        return all((folder / name).is_file() for name in _REQUIRED)
    try:
        sizes = json.loads(mark.read_text(encoding="utf-8"))
    except ValueError:
        return False
    found = {path.name: path.stat().st_size for path in folder.iterdir()}
    return all(found.get(name) == size for name, size in sizes.items())


def newest_whole(folders: list[Path]) -> tuple[Path | None, list[Path]]:
    """The checkpoint to go on from.

    Args:
        folders: where checkpoints may lie; not those below.

    Returns:
        The newest whole one, or None; and the damaged ones that are newer.
    """
    there = [folder for folder in folders if folder.is_dir()]
    found = {path.resolve(): path for folder in there for path in folder.glob("*.ckpt") if path.exists()}
    # A process that was killed between two renames leaves whole folders beside their place.
    beside = [path for folder in there for end in (_PART, _OLD) for path in folder.glob(f".*.ckpt{end}")]
    found |= {path.resolve(): path for path in beside if path.is_dir() and (path / _MARK).exists() and is_whole(path)}
    damaged: list[Path] = []
    for path in sorted(found.values(), key=lambda path: path.stat().st_mtime_ns, reverse=True):
        if is_whole(path):
            return path, damaged
        damaged.append(path)
    return None, damaged
