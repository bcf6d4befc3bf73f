"""What one stage hands to the next inside its checkpoint: enough to go on without the original model folder.

A stage checkpoint is a Lightning checkpoint with one more key, ``lit_instruct``::

    {"format_version": 2, "stage": "sft", "network": "policy.", "config": {...}, "tokenizer": {file name: text},
     "adapter": None}

``network`` is the prefix of the handed-over network's weights in ``state_dict``; ``config`` is the Hugging Face model
configuration; the tokenizer's files carry the chat template. Where only an adapter was trained, the weights are those
of the adapter and of a head, and ``adapter`` says what it stands on. Reading is always ``weights_only=True``. Where a
strategy saves in shards, the checkpoint is a folder (see :mod:`lit_instruct.models.sharded_checkpoint`).
"""

from __future__ import annotations

import pickle
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache, partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from lit_instruct.types import ConfigError

KEY = "lit_instruct"
_REST = "meta.pt"  # in the folder of a sharded checkpoint, everything but the tensors
FORMAT_VERSION = 2

UNREADABLE = (
    OSError,
    ValueError,
    ImportError,
    RuntimeError,
    SafetensorError,
    struct.error,
    StrictDataclassError,
    pickle.UnpicklingError,  # a .bin file that holds more than tensors
    AssertionError,
    AttributeError,
    LookupError,
    TypeError,  # these four: JSON of another form than theirs, which nobody has looked at before
)
"""What Hugging Face raises over files that are not there, cut off or of another shape; see :func:`why_unreadable`."""


@dataclass(frozen=True)
class AdapterRecord:
    """What an adapter in a checkpoint stands on.

    Attributes:
        settings: fields of :class:`~lit_instruct.models.adapters.LoraSettings`.
        sources: where its base came from: as the setting named it, and, for a file, its absolute path.
        sha256: of the decoder's weights of that base in fp32.
        quantization: of the base: ``8bit``, ``4bit`` or None.
    """

    settings: dict[str, Any]
    sources: list[str]
    sha256: str
    quantization: str | None


@dataclass(frozen=True)
class Handover:
    """A stage's network, its configuration and its tokenizer, as read from a checkpoint.

    Attributes:
        stage: ``sft``, ``rm`` or ``ppo``.
        config: the Hugging Face configuration of the network's backbone.
        read_weights: reads what ``weights`` gives.
        ema_weights: averaged parameters, prefix removed; empty where none were kept.
        tokenizer_files: file name to text.
        adapter: where ``weights`` are those of an adapter and a head alone: its base.
    """

    stage: str
    config: PretrainedConfig
    read_weights: Callable[[], dict[str, Tensor]]
    ema_weights: dict[str, Tensor]
    tokenizer_files: dict[str, str]
    adapter: AdapterRecord | None

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """The network's state dict, prefix removed; shards are read when it is first asked for."""
        return self.read_weights()

    @contextmanager
    def tokenizer_folder(self) -> Iterator[str]:
        """The tokenizer's files in a folder that lasts as long as the ``with`` block."""
        with _written(self.tokenizer_files) as folder:
            yield folder


@contextmanager
def tokenizer_files(checkpoint: Mapping[str, Any]) -> Iterator[str]:
    """The tokenizer's files of a checkpoint that is loaded already.

    Args:
        checkpoint: Lightning's dictionary, of a stage.

    Returns:
        A folder that lasts as long as the ``with`` block.
    """
    with _written(checkpoint[KEY]["tokenizer"]) as folder:
        yield folder


@contextmanager
def _written(files: Mapping[str, str]) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            (Path(folder) / Path(name).name).write_text(text, encoding="utf-8")
        yield folder


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type; Hugging Face and torch append pages that do not apply here."""
    line = next(iter(str(error).splitlines()), "") or type(error).__name__
    return line if len(line) <= 300 else line[:300] + " ..."


def why_unreadable(error: BaseException) -> str:
    """Why Hugging Face could not load something, in a sentence.

    Args:
        error: what it raised; it was asked with ``trust_remote_code=False``.

    Returns:
        That its own code is not run, if that is why, or which setting of its configuration is wrong; else the first
        line of the error.
    """
    if "trust_remote_code" in str(error):
        return "it brings Python code of its own (auto_map in a file there), which is not run."
    if "Weights only load failed" in str(error):
        return "its weights are a pickle that holds more than tensors, and anything else could run code."
    if "ignore_mismatched_sizes" in str(error):
        return "its weights have other sizes than its config.json says (the report above names them)."
    if isinstance(error, StrictDataclassError) and error.__cause__ is not None:
        return f"its config.json: {first_line(error.__cause__)}"
    if isinstance(error, AssertionError | AttributeError | LookupError | TypeError):
        return f"one of its files has another form than transformers reads ({first_line(error)})."
    return first_line(error)


def is_stage_checkpoint(path: str | PathLike[str]) -> bool:
    """Whether ``path`` is a file or a folder that Lightning's ModelCheckpoint may have written."""
    return Path(path).suffix == ".ckpt"


def write_handover(
    checkpoint: dict[str, Any],
    *,
    stage: str,
    network: str,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    adapter: AdapterRecord | None = None,
) -> None:
    """Add the handover to a checkpoint dictionary that is about to be saved.

    Args:
        checkpoint: Lightning's dictionary; the key ``lit_instruct`` is set.
        stage: ``sft``, ``rm`` or ``ppo``.
        network: prefix of the handed-over network in ``state_dict``, for example ``policy.``.
        config: configuration of the network's backbone.
        tokenizer: with its template settled.
        adapter: if the checkpoint holds an adapter alone.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = {
            path.name: path.read_text(encoding="utf-8") for path in sorted(Path(folder).iterdir()) if path.is_file()
        }
    checkpoint[KEY] = {
        "format_version": FORMAT_VERSION,
        "stage": stage,
        "network": network,
        "config": {name: value for name, value in config.to_dict().items() if name != "quantization_config"},
        "tokenizer": files,
        "adapter": None if adapter is None else asdict(adapter),
    }


@lru_cache(maxsize=4)
def _read(path: str, modified: int) -> dict[str, Any]:
    # A stage reads one file several times (weights, tokenizer, configuration): keep the last few, memory-mapped.
    return _map(path)


def _map(path: str) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def read_handover(path: str | PathLike[str]) -> Handover:
    """Read what an earlier stage hands over.

    Args:
        path: a ``.ckpt`` file, or folder of a sharded checkpoint.

    Returns:
        The network's configuration, weights (on CPU) and tokenizer files.

    Raises:
        ConfigError: it is not there, is a folder of something else, is damaged, or was not written by a stage of this
            package.
    """
    path = Path(path)
    sharded = path.is_dir()
    file = path / _REST if sharded else path
    if sharded and not file.is_file():
        raise ConfigError(
            f"checkpoint {str(path)!r} is a folder, but not of a sharded checkpoint: {_REST} is missing. Do: give the "
            "checkpoint as the stage wrote it; rename the folder of a Hugging Face model so that it does not end in "
            ".ckpt."
        )
    if not file.is_file():
        raise ConfigError(
            f"checkpoint {str(path)!r} does not exist; give the file that the earlier stage printed at its end."
        )
    if not zipfile.is_zipfile(file):
        raise ConfigError(
            f"checkpoint {str(path)!r} cannot be read: the list of its contents, which stands at the end, is missing. "
            "It may be cut off or from another program. Do: give an earlier checkpoint of that run."
        )
    try:
        checkpoint = _read(str(file.resolve()), file.stat().st_mtime_ns)
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"checkpoint {str(path)!r} cannot be read: it holds Python objects, and only tensors, numbers and text are "
            "taken from a checkpoint, since anything else could run code. It may be from another program. Do: give "
            "the file as a stage wrote it."
        ) from error
    except (OSError, zipfile.BadZipFile, RuntimeError, EOFError) as error:
        raise ConfigError(
            f"checkpoint {str(path)!r} cannot be read: {first_line(error)} It may be cut off or from another program. "
            "Do: give an earlier checkpoint of that run."
        ) from error
    handed = checkpoint.get(KEY) if isinstance(checkpoint, dict) else None
    if handed is None:
        raise ConfigError(
            f"checkpoint {str(path)!r} was not written by a stage of lit_instruct (key {KEY!r} is missing); "
            "give a stage's checkpoint, or a Hugging Face folder."
        )
    if handed["format_version"] > FORMAT_VERSION:
        raise ConfigError(
            f"checkpoint {str(path)!r} has format version {handed['format_version']}, this lit_instruct reads up to "
            f"{FORMAT_VERSION}; update the package."
        )
    return Handover(
        stage=handed["stage"],
        config=_config(handed["config"], path),
        read_weights=partial(_read_shards, path, handed["network"])
        if sharded
        else partial(_read_mapped, path, handed["network"]),
        ema_weights=_of_network(checkpoint.get("ema_state_dict", {}), handed["network"]),
        tokenizer_files=dict(handed["tokenizer"]),
        adapter=AdapterRecord(**adapter) if (adapter := handed.get("adapter")) else None,  # not in those of version 1
    )


def _of_network(tensors: dict[str, Tensor], network: str) -> dict[str, Tensor]:
    return {name.removeprefix(network): tensor for name, tensor in tensors.items() if name.startswith(network)}


def _read_mapped(file: Path, network: str) -> dict[str, Tensor]:
    # Of a mapping of its own, which ends with the weights: what was read of the one that is kept stays in memory.
    return _of_network(_map(str(file)).get("state_dict", {}), network)


def _read_shards(folder: Path, network: str) -> dict[str, Tensor]:
    from lit_instruct.models.sharded_checkpoint import read_network  # which needs a second to import

    return read_network(folder, network)


def _config(fields: dict[str, Any], path: Path) -> PretrainedConfig:
    fields = dict(fields)
    kind = fields.pop("model_type")
    try:
        return AutoConfig.for_model(kind, **fields)
    except ValueError as error:
        raise ConfigError(
            f"checkpoint {str(path)!r} holds a model of type {kind!r}, which the installed transformers does not know. "
            "Do: install the version that wrote it, or a newer one."
        ) from error
