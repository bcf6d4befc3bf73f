"""Read raw rows out of files, dataset folders and the Hugging Face hub, remembering where each one came from.

Nothing here knows what a row means. A row that cannot even be parsed becomes a problem beside the good rows, so
that the validation in ``records`` can report everything that is wrong with a data set at once.
"""

from __future__ import annotations

import difflib
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lit_instruct.data.bad_rows import Flaw, Place, Problem
from lit_instruct.data.formats import READERS, Columns, data_suffix, json_type, numbered
from lit_instruct.types import DataError


class Row(NamedTuple):
    """One raw row.

    Attributes:
        place: where it stands, for messages.
        columns: name to value.
    """

    place: Place
    columns: Columns


def stream_rows(source: str) -> Iterator[Row | Problem]:
    """Read one source row by row; all formats but ``.json`` are read piece by piece, in bounded memory.

    Args:
        source: path of a ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file (the first three also as ``.gz`` and
            ``.zst``), a dataset folder, or the name of a data set on the Hugging Face hub. Folders and names may
            carry a split, ``name:validation``; without one it is ``train``.

    Yields:
        A row, or what is wrong with one that cannot be parsed.

    Raises:
        DataError: the source does not exist, cannot be read as a whole, or has no rows.
    """
    empty = True
    try:
        for within, item in _open_source(source):
            empty = False
            place = Place(source, within)
            if isinstance(item, Flaw):
                yield Problem(place, item)
            elif not isinstance(item, dict):
                yield Problem(place, Flaw(None, f"got {json_type(item)}; need an object with named columns"))
            else:
                yield Row(place, item)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{source}: got a file that cannot be read ({error}).\nDo: check that it is whole, and its permissions."
        ) from error
    if empty:
        raise DataError(f"{source}: got no rows; need at least one.\nDo: check that the right file or split is named.")


def _open_source(source: str) -> Iterator[tuple[str, Any]]:
    """Parsed items of a source: (place within it, columns or what went wrong)."""
    path = _path(source)
    suffix = data_suffix(path)
    if path.is_file():
        if suffix not in READERS:
            raise DataError(
                f"{source}: got a file ending in {path.suffix!r}; need one of {', '.join(READERS)} (or .gz or .zst of "
                "a text format).\nDo: convert the file, or rename it if it only has the wrong ending."
            )
        return READERS[suffix](path)
    folder, _ = _split_of(source)
    looks_like_path = not source.strip() or suffix in READERS or source.startswith((".", "/", "~"))
    if looks_like_path and not (source.strip() and _path(folder).is_dir()):
        raise _missing_file(source, path)
    return _read_dataset(source)


def _read_dataset(source: str) -> Iterator[tuple[str, Any]]:
    """Read a dataset folder or a hub name, which may carry ``:split``."""
    import datasets
    import pyarrow  # type: ignore[import-untyped]

    name, split = _split_of(source)
    folder = _path(name)
    name = str(folder) if folder.is_dir() else name
    try:
        if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(name)
            table = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            table = datasets.load_dataset(name, split=split)
    except (
        datasets.exceptions.DatasetsError,
        pyarrow.ArrowException,
        OSError,
        ValueError,
        KeyError,
        RuntimeError,
    ) as error:
        raise DataError(
            f"{source}: got no data set: no such file here, and looking for split {split!r} of data set {name!r} gave "
            f"{type(error).__name__}: {error}\nDo: check the path or the name on the hub, the split after the colon, "
            "and that the hub can be reached."
        ) from error
    try:
        yield from numbered(table)
    except pyarrow.ArrowException as error:
        raise DataError(f"{source}: got a data set that breaks off ({error}).\nDo: write it again.") from error


def _path(source: str) -> Path:
    return Path(os.path.expanduser(source))  # that of Path raises an error for the home of a user who is not known


def _split_of(source: str) -> tuple[str, str]:
    name, colon, split = source.rpartition(":")
    return (name, split) if colon and name and split else (source, "train")


def _missing_file(source: str, path: Path) -> DataError:
    """Say what is not there, and what stands in the folder under a similar name."""
    if not source.strip():
        return DataError("got an empty name of a source; need a file or data set.\nDo: name one.")
    if path.exists():
        return DataError(
            f"{source}: got a pipe or a device; need a file, which every process can read.\nDo: write the data to one."
        )
    if path.is_symlink():
        return DataError(f"{source}: got a link that leads to no file ({path.readlink()}).\nDo: mend the link.")
    folder = path.parent
    if not folder.is_dir():
        return DataError(f"{source}: no such file; the folder {folder} does not exist either.\nDo: check the path.")
    here = sorted(entry.name for entry in folder.iterdir())
    near = difflib.get_close_matches(path.name, here, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "check the path."
    return DataError(f"{source}: no such file in {folder.resolve()}.\nDo: {hint}")
