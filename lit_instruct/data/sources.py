"""Read raw rows out of files, dataset folders and the Hugging Face hub, remembering where each one came from.

Nothing here knows what a row means. A row that cannot even be parsed becomes a problem beside the good rows, so
that the validation in ``records`` can report everything that is wrong with a data set at once.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lit_instruct.types import DataError

Columns = dict[str, Any]

_SHOWN = 20
_PARQUET_ROWS = 1024
_LIST_COLUMNS = ("responses", "ranks", "messages")


class Row(NamedTuple):
    """One raw row.

    Attributes:
        place: where it stands, for messages: ``FILE:LINE`` or ``FILE row N`` (both count from 1).
        columns: name to value.
    """

    place: str
    columns: Columns


class Rows(NamedTuple):
    """What a source holds: the rows that could be parsed, and one sentence for each that could not."""

    rows: list[Row]
    problems: list[str]


def data_error(headline: str, problems: Sequence[str], advice: str) -> DataError:
    """Build the error that lists what is wrong, row by row.

    Args:
        headline: what failed as a whole.
        problems: one sentence a bad row, each starting with its place; the first 20 are shown.
        advice: what to do, the last line.
    """
    lines = [headline, *(f"  {problem}" for problem in problems[:_SHOWN])]
    if len(problems) > _SHOWN:
        lines.append(f"  ... and {len(problems) - _SHOWN} more")
    return DataError("\n".join([*lines, f"Do: {advice}"]))


def read_rows(source: str) -> Rows:
    """Read every row of one source into memory.

    Args:
        source: as ``stream_rows`` takes it.

    Raises:
        DataError: the source does not exist, cannot be read as a whole, or has no rows.
    """
    rows: list[Row] = []
    problems: list[str] = []
    for item in stream_rows(source):
        if isinstance(item, Row):
            rows.append(item)
        else:
            problems.append(item)
    return Rows(rows, problems)


def stream_rows(source: str) -> Iterator[Row | str]:
    """Read one source row by row; all formats but ``.json`` are read piece by piece, in bounded memory.

    Args:
        source: path of a ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file (the first three also as ``.gz``), a
            dataset folder, or the name of a data set on the Hugging Face hub. Folders and names may carry a split,
            ``name:validation``; without one it is ``train``.

    Yields:
        A row, or for one that cannot be parsed the sentence that says where it stands and why.

    Raises:
        DataError: the source does not exist, cannot be read as a whole, or has no rows.
    """
    empty = True
    try:
        for place, item in _open_source(source):
            empty = False
            if isinstance(item, _Unreadable):
                yield f"{source}{place}: {item}"
            elif not isinstance(item, dict):
                yield f"{source}{place}: got a {type(item).__name__}; need an object with named columns"
            else:
                yield Row(f"{source}{place}", item)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{source}: got a file that cannot be read ({error}).\nDo: check that it is whole, and its permissions."
        ) from error
    if empty:
        raise DataError(f"{source}: got no rows; need at least one.\nDo: check that the right file or split is named.")


def _open_source(source: str) -> Iterator[tuple[str, Any]]:
    """Parsed items of a source: (place within it, columns or what went wrong)."""
    path = Path(source).expanduser()
    suffix = _data_suffix(path)
    if path.is_file():
        if suffix not in _READERS:
            raise DataError(
                f"{source}: got a file ending in {path.suffix!r}; need one of {', '.join(_READERS)} (or .gz of a text "
                "format).\nDo: convert the file, or rename it if it only has the wrong ending."
            )
        return _READERS[suffix](path)
    folder, _ = _split_of(source)
    looks_like_path = suffix in _READERS or source.startswith((".", "/", "~"))
    if looks_like_path and not Path(folder).expanduser().is_dir():
        raise _missing_file(source, path)
    return _read_dataset(source)


class _Unreadable(str):
    """Why a row could not be parsed."""


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    # Bytes are decoded line by line: one bad byte then has a line number and does not hide the rest of the file.
    with _open_bytes(path) as handle:
        for number, line in enumerate(handle, start=1):
            place = f":{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.strip():
                    yield place, json.loads(text)
            except UnicodeDecodeError as error:
                yield place, _Unreadable(f"got byte 0x{line[error.start]:02x} at column {error.start + 1}; need UTF-8")
            except json.JSONDecodeError as error:
                yield place, _Unreadable(f"got invalid JSON ({error.msg} at column {error.colno}); need one object")
            except RecursionError:
                yield place, _Unreadable("got JSON that is nested too deeply; need one flat object")


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    with _open_bytes(path) as handle:
        content = handle.read()
    try:
        table = json.loads(_decode(path, content))
    except json.JSONDecodeError as error:
        hint = "rename it to .jsonl if it holds one object a line" if error.msg == "Extra data" else "repair the file"
        raise DataError(f"{path}:{error.lineno}: got invalid JSON ({error.msg}).\nDo: {hint}.") from error
    rows = table.get("data") if isinstance(table, dict) else table
    if not isinstance(rows, list):
        raise DataError(
            f'{path}: got a JSON {type(table).__name__}; need a list of rows or an object {{"data": [rows]}}.\n'
            "Do: wrap the rows in a list, or write one object a line into a .jsonl file."
        )
    return _numbered(rows)


def _read_csv(path: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    with _open_bytes(path) as binary, io.TextIOWrapper(binary, encoding="utf-8-sig", newline="") as text:
        reader = csv.DictReader(text, strict=True)
        try:
            for number, cells in enumerate(reader, start=1):
                yield f" row {number}", _parse_cells(cells)
        except csv.Error as error:
            raise DataError(
                f"{path} row {number + 1} (near line {reader.line_num}): got CSV that cannot be parsed ({error}).\n"
                "Do: check the quotes of that row, or save the data as JSONL."
            ) from error
        except UnicodeDecodeError as error:
            raise _not_utf8(path) from error


def _parse_cells(cells: dict[Any, Any]) -> Columns | _Unreadable:
    """Give CSV cells their type: list columns are JSON, an empty cell is an absent column."""
    if None in cells:
        return _Unreadable(f"got {len(cells[None])} more cells than the header has columns; need one cell a column")
    columns: Columns = {}
    for name, cell in cells.items():
        if cell is None or cell == "":
            continue
        columns[name] = cell
        if name in _LIST_COLUMNS:
            try:
                columns[name] = json.loads(cell)
            except json.JSONDecodeError as error:
                return _Unreadable(f"field {name!r}: got text that is not JSON ({error.msg}); need a JSON list")
    return columns


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(_PARQUET_ROWS):
                for columns in batch.to_pylist():
                    number += 1
                    yield f" row {number}", columns
    except (pyarrow.ArrowException, OSError) as error:
        behind = f" behind row {number}" if number else ""
        raise DataError(
            f"{path}: got a file that is not Parquet{behind} ({error}).\nDo: check how it was written."
        ) from error


def _read_dataset(source: str) -> Iterator[tuple[str, Any]]:
    """Read a dataset folder or a hub name, which may carry ``:split``."""
    import datasets

    name, split = _split_of(source)
    folder = Path(name).expanduser()
    name = str(folder) if folder.is_dir() else name
    try:
        if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(name)
            table = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            table = datasets.load_dataset(name, split=split)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{source}: got no data set: no such file here, and looking for split {split!r} of data set {name!r} gave "
            f"{type(error).__name__}: {error}\nDo: check the path or the name on the hub, the split after the colon, "
            "and that the hub can be reached."
        ) from error
    return _numbered(table)


def _numbered(rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    return ((f" row {number}", row) for number, row in enumerate(rows, start=1))


def _open_bytes(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _decode(path: Path, content: bytes) -> str:
    """Decode a whole file; it may begin with a byte order mark."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(path) from error


def _not_utf8(path: Path) -> DataError:
    """Find the line of the first byte that is not UTF-8; a line break is one byte and part of no other character."""
    with _open_bytes(path) as handle:
        for number, line in enumerate(handle, start=1):
            try:
                line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                return DataError(
                    f"{path}:{number}: got byte 0x{line[error.start]:02x}; need UTF-8.\nDo: re-encode the file."
                )
    return DataError(f"{path}: the file changed while it was read.\nDo: run again.")


def _data_suffix(path: Path) -> str:
    """The suffix that names the format, without ``.gz``."""
    return (Path(path.stem).suffix if path.suffix == ".gz" else path.suffix).lower()


def _split_of(source: str) -> tuple[str, str]:
    name, colon, split = source.rpartition(":")
    return (name, split) if colon and name and split else (source, "train")


def _missing_file(source: str, path: Path) -> DataError:
    """Say what is not there, and what stands in the folder under a similar name."""
    folder = path.parent
    if not folder.is_dir():
        return DataError(f"{source}: no such file; the folder {folder} does not exist either.\nDo: check the path.")
    here = sorted(entry.name for entry in folder.iterdir())
    near = difflib.get_close_matches(path.name, here, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "check the path."
    return DataError(f"{source}: no such file in {folder.resolve()}.\nDo: {hint}")


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
