"""A checkpoint that a sharding strategy wrote as a folder: the network in it, read by one process, run by none.

::

    last.ckpt/
      .metadata           where the parts of each tensor lie: a pickle, of which nothing but data is taken
      __0_0.distcp ...    the tensors of ``state_dict`` and of the optimizers, a file or more a process
      meta.pt             everything else (torch.load with weights_only=True)
"""

from __future__ import annotations

import pickle
import warnings
from enum import Enum
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import metadata as records
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.state_dict_loader import load

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
    try:
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
            load(weights, storage_reader=reader, no_dist=True)
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"checkpoint {str(folder)!r} cannot be read: {first_line(error)} Only numbers, text and the places of "
            "tensors are taken from its .metadata, since anything else could run code. It may be from another program."
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise _unreadable(folder, error) from error
    except CheckpointException as error:
        raise _unreadable(folder, next(iter(error.failures.values()))[0]) from error
    return {name.removeprefix(prefix + network): tensor for name, tensor in weights.items()}


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
