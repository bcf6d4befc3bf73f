"""A checkpoint that a sharding strategy wrote as a folder: the network in it, read by one process, run by none.

::

    last.ckpt/
      .metadata           where the parts of each tensor lie: a pickle, of which nothing but data is taken
      __0_0.distcp ...    the tensors of ``state_dict`` and of the optimizers, a file or more a process
      meta.pt             everything else (torch.load with weights_only=True)
      whole.json          the mark, written last: the names of these files and their sizes
"""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import metadata as records
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from lit_instruct.models.handover import first_line
from lit_instruct.types import ConfigError

_TOPS = ("state_dict.", "model.")
"""Under what Lightning's strategies put the module's weights: ModelParallelStrategy, FSDPStrategy."""

_RECORDS = {
    "Metadata",
    "StorageMeta",
    "MetadataIndex",
    "TensorStorageMetadata",
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "TensorProperties",
    "_MEM_FORMAT_ENCODING",
}
_PATHS = {"PosixPath": PurePosixPath, "WindowsPath": PureWindowsPath}


def read_network(folder: Path, network: str) -> dict[str, Tensor]:
    """Read the weights of one network; neither the others nor the optimizer's state are touched.

    Args:
        folder: the checkpoint.
        network: prefix of its names in ``state_dict``, for example ``policy.``.

    Returns:
        Its whole tensors on the CPU by name, prefix removed.

    Raises:
        ConfigError: files are missing or damaged, or hold more than data.
    """
    with _explained(folder):
        reader = DataReader(folder)
        described = reader.read_metadata().state_dict_metadata
        prefix = next((top for top in _TOPS if any(name.startswith(top + network) for name in described)), _TOPS[0])
        weights = {
            name: torch.empty(tuple(about.size), dtype=about.properties.dtype)
            for name, about in described.items()
            if name.startswith(prefix + network) and isinstance(about, records.TensorStorageMetadata)
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is what is meant
            load(weights, storage_reader=reader, planner=DataPlanner(), no_dist=True)
    return {name.removeprefix(prefix + network): tensor for name, tensor in weights.items()}


def read_shards(state: dict[str, Any], folder: Path) -> None:
    """Read this process's share of a state; every process must call it.

    Args:
        state: what is wanted, nested by name; its tensors are filled in place, other values are replaced.
        folder: the checkpoint.

    Raises:
        ConfigError: files are missing or damaged, or hold more than data, or less than is wanted.
    """
    with _explained(folder):
        load(state, storage_reader=DataReader(folder), planner=DataPlanner())


def write_shards(state: dict[str, Any], folder: Path) -> None:
    """Write this process's share of a state, flushed to the disk; every process must call it.

    Args:
        state: nested by name.
        folder: is there, and empty.

    Raises:
        OSError: one of the processes could not write; all raise it.
    """
    try:
        save(state, storage_writer=FileSystemWriter(folder, sync_files=True))
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        if not isinstance(cause, OSError | RuntimeError):
            raise
        raise OSError(first_line(cause)) from error


def names_in_shards(folder: Path, prefix: str) -> set[str]:
    """What a checkpoint holds.

    Args:
        folder: the checkpoint.
        prefix: of the names that are asked for, as ``optimizer_0.state.``.

    Returns:
        The names, prefix removed.

    Raises:
        ConfigError: the folder cannot be read.
    """
    with _explained(folder):
        described = DataReader(folder).read_metadata().state_dict_metadata
    return {name.removeprefix(prefix) for name in described if name.startswith(prefix)}


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Errors over the files of a checkpoint, in the user's words."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise _more_than_data(folder, error) from error
    except (OSError, EOFError, RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise _unreadable(folder, error) from error
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise (_more_than_data if isinstance(cause, pickle.UnpicklingError) else _unreadable)(folder, cause) from error


def _more_than_data(folder: Path, error: BaseException) -> ConfigError:
    return ConfigError(
        f"checkpoint {str(folder)!r} cannot be read: {first_line(error)} Only numbers, text and tensors are taken from "
        "it, since anything else could run code. It may be from another program."
    )


def _unreadable(folder: Path, error: BaseException) -> ConfigError:
    return ConfigError(
        f"checkpoint {str(folder)!r} cannot be read: {first_line(error)} Files may be missing, cut off or of another "
        "program. Do: give the folder as the stage wrote it."
    )


class DataReader(FileSystemReader):
    """Torch's reader, which unpickles whatever ``.metadata`` names; this one knows the records that belong there."""

    def read_metadata(self, *arguments: Any, **more: Any) -> records.Metadata:
        """Where the parts of each tensor lie.

        Raises:
            UnpicklingError: the file holds more than that.
        """
        with (Path(self.path) / ".metadata").open("rb") as file:
            found = _DataUnpickler(file).load()
        if not isinstance(found, records.Metadata):
            raise pickle.UnpicklingError(f".metadata holds a {type(found).__name__}.")
        return found


class DataPlanner(DefaultLoadPlanner):
    """Torch's planner, which unpickles whatever a file holds that is no tensor; this one takes numbers and text."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put a value in its place.

        Raises:
            UnpicklingError: it is an object.
        """
        harmless = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), harmless)
        harmless.seek(0)
        super().load_bytes(read_item, harmless)


class _DataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch.distributed.checkpoint.metadata" and name in _RECORDS:
            return getattr(records, name)
        if module == "torch.distributed.checkpoint.filesystem" and name == "_StorageInfo":
            return _StorageInfo
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(torch, name)
        if module == "torch.serialization" and name == "_get_layout":
            return _layout
        if module in ("pathlib", "pathlib._local") and name in _PATHS:
            return _PATHS[name]
        if module == "builtins" and name == "getattr":  # how some versions of Python pickle a member of an Enum
            return _member
        raise pickle.UnpicklingError(f".metadata names {module}.{name}.")


def _layout(name: str) -> torch.layout:
    found = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(found, torch.layout):
        raise pickle.UnpicklingError(f".metadata names the layout {name!r}.")
    return found


def _member(kind: Any, name: str) -> Enum:
    if kind is not records._MEM_FORMAT_ENCODING:
        raise pickle.UnpicklingError(".metadata looks something up.")
    return kind[name]
