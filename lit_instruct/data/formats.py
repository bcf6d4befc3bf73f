"""Files to raw rows, one reader a format: JSON lines, JSON, CSV and Parquet, the texts also as ``.gz`` and ``.zst``.

A reader yields the place of each row within its file and the row's columns, or a ``Flaw`` for a row that cannot be
parsed. What spoils a file as a whole is a ``DataError``, or the operating system's own error.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from lit_instruct.data.bad_rows import Flaw
from lit_instruct.types import DataError

Columns = dict[str, Any]

MAX_ROW_BYTES = 64 * 2**20
"""A longer line, or cell of a CSV file, is no row: the file has lost its line breaks, or its quotes."""

_MAX_NESTING = 64
"""Levels of lists and objects in a row. Rows travel with prompts, and what walks through them does so recursively."""

_PARQUET_ROWS = 1024
_LIST_COLUMNS = ("responses", "ranks", "messages")
_COMPRESSED = (".gz", ".zst")


def data_suffix(path: Path) -> str:
    """The suffix that names the format, without that of the compression."""
    return (Path(path.stem).suffix if path.suffix.lower() in _COMPRESSED else path.suffix).lower()


def numbered(rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """Rows with their places, `` row N``."""
    return ((f" row {number}", row) for number, row in enumerate(rows, start=1))


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    # Bytes are decoded line by line: one bad byte then has a line number and does not hide the rest of the file.
    with _open_bytes(path) as handle:
        for number, line in enumerate(_lines(handle), start=1):
            if line is None:
                yield f":{number}", Flaw(None, f"got a line of more than {MAX_ROW_BYTES:,} bytes; need one row a line")
            elif line.strip():
                yield f":{number}", _parse_line(line, first=number == 1)


def _lines(handle: Any) -> Iterator[bytes | None]:
    """Lines; None for one that is too long, which is passed over piece by piece."""
    while line := handle.readline(MAX_ROW_BYTES + 1):
        if len(line) <= MAX_ROW_BYTES:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = handle.readline(MAX_ROW_BYTES)
        yield None


def _parse_line(line: bytes, *, first: bool) -> Any:
    try:
        return _parse_json(line.decode("utf-8-sig" if first else "utf-8").rstrip("\r\n"))
    except UnicodeDecodeError as error:
        return Flaw(None, f"got byte 0x{error.object[error.start]:02x} at column {error.start + 1}; need UTF-8")
    except _NotJsonError as error:
        return Flaw(None, f"{error}; need one object a line")


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    with _open_bytes(path) as handle:
        content = handle.read()
    if not content.strip():
        return iter(())
    try:
        table = _parse_json(_decode(path, content), nesting=_MAX_NESTING + 2)  # the list, and an object around it
    except _NotJsonError as error:
        hint = "rename it to .jsonl if it holds one object a line" if error.goes_on else "repair the file"
        raise DataError(f"{path}{error.line}: {error}.\nDo: {hint}.") from error
    rows = table.get("data") if isinstance(table, dict) else table
    if not isinstance(rows, list):
        raise DataError(
            f'{path}: got {json_type(table)}; need a list of rows or an object {{"data": [rows]}}.\n'
            "Do: wrap the rows in a list, or write one object a line into a .jsonl file."
        )
    return numbered(rows)


class _NotJsonError(Exception):
    """A text is not JSON, or not such that a row can be made of it.

    Attributes:
        line: ``:LINE`` where that is known, else empty.
        goes_on: it is JSON, and more behind it.
    """

    def __init__(self, problem: str, *, line: str = "", goes_on: bool = False) -> None:
        super().__init__(problem)
        self.line, self.goes_on = line, goes_on


def _parse_json(text: str, *, nesting: int = _MAX_NESTING) -> Any:
    """Parse JSON; what Python would let pass or choke on in its own way is a ``_NotJsonError`` too."""
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        line = f":{error.lineno}"
        if (nul := text.find("\0")) >= 0:
            line, column = f":{text.count(chr(10), 0, nul) + 1}", nul - text.rfind("\n", 0, nul)
            raise _NotJsonError(f"got a NUL byte at column {column}, not text", line=line) from error
        raise _NotJsonError(
            f"got invalid JSON ({error.msg} at column {error.colno})", line=line, goes_on=error.msg == "Extra data"
        ) from error
    except RecursionError as error:
        raise _NotJsonError("got JSON that is nested too deeply") from error
    except ValueError as error:  # Python reads no integers of more than 4,300 digits
        raise _NotJsonError("got a number of thousands of digits") from error
    if text.count("[") + text.count("{") > nesting and _is_deeper(value, nesting):
        raise _NotJsonError(f"got JSON that is nested too deeply (more than {nesting} levels)")
    return value


def _object(pairs: list[tuple[str, Any]]) -> Columns:
    """An object; of two values under one name Python would silently take the last."""
    columns = dict(pairs)
    if len(columns) < len(pairs):
        raise _NotJsonError(f"got the name {short(_most_common(name for name, _ in pairs))} twice in one object")
    return columns


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether lists and objects are nested in more levels; level by level, since recursion is what is to be avoided."""
    inside = [value]
    for _ in range(levels + 1):
        containers = [item for item in inside if isinstance(item, list | dict)]
        if not containers:
            return False
        inside = [item for box in containers for item in (box.values() if isinstance(box, dict) else box)]
    return True


def _read_csv(path: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))  # else 131,072 characters, too few for documents
    number = line = 0
    with _open_bytes(path) as binary, io.TextIOWrapper(binary, encoding="utf-8-sig", newline="") as text:
        reader = csv.DictReader(text, strict=True)
        try:
            _check_names(path, reader.fieldnames or ())
            line = reader.line_num + 1
            for number, cells in enumerate(reader, start=1):
                yield f" row {number}", _parse_cells(cells)
                line = reader.line_num + 1
        except csv.Error as error:
            raise DataError(
                f"{path} row {number + 1} (from line {line} on): got CSV that cannot be parsed ({error}).\n"
                "Do: check the quotes of that row, or save the data as JSONL."
            ) from error
        except UnicodeDecodeError as error:
            raise _not_utf8(path) from error


def _check_names(path: Path, names: Iterable[str]) -> None:
    """Column names must differ, else one column would hide the other; those without a name are not read."""
    names = [name for name in names if name]
    if len(set(names)) < len(names):
        raise DataError(
            f"{path}: got two columns with the name {short(_most_common(names))}; need names that differ.\n"
            "Do: rename or remove one of them."
        )


def _most_common(names: Iterable[str]) -> str:
    return Counter(names).most_common(1)[0][0]


def _parse_cells(cells: dict[Any, Any]) -> Columns | Flaw:
    """Give CSV cells their type: list columns are JSON, an empty cell is an absent column."""
    if None in cells:
        return Flaw(None, f"got {len(cells[None])} more cells than the header has columns; need one cell a column")
    columns: Columns = {}
    for name, cell in cells.items():
        if cell is None or cell == "":
            continue
        if "\0" in cell:
            return Flaw(name, "got a NUL byte; need text")
        columns[name] = cell
        if name in _LIST_COLUMNS:
            try:
                columns[name] = _parse_json(cell)
            except _NotJsonError as error:
                return Flaw(name, f"got text that is not JSON ({error}); need a JSON list")
    return columns


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            _check_names(path, table.schema_arrow.names)
            for batch in table.iter_batches(_PARQUET_ROWS):
                for columns in _rows_of_batch(batch):
                    number += 1
                    yield f" row {number}", columns
    except (pyarrow.ArrowException, OSError) as error:
        behind = f" behind row {number}" if number else ""
        raise DataError(
            f"{path}: got a file that is not Parquet{behind} ({error}).\nDo: check how it was written."
        ) from error


def _rows_of_batch(batch: Any) -> list[Any]:
    """Rows as Python objects; one that has a value which Python does not know spoils no other."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError):
        return [_row_of_batch(batch, index) for index in range(batch.num_rows)]


def _row_of_batch(batch: Any, index: int) -> Columns | Flaw:
    columns = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            columns[name] = column[index].as_py()
        except (ValueError, OverflowError) as error:  # text that is not UTF-8, dates after the year 9999
            return Flaw(name, f"got a value that cannot be read ({error}); need another")
    return columns


def _open_bytes(path: Path) -> Any:
    """Open a text file for reading, unpacked; it may begin with UTF-8's byte order mark, and with no other.

    Raises:
        DataError: it is UTF-16 or UTF-32.
    """
    handle = _unpacked(path)
    try:
        start = handle.peek(4)[:4]
    except BaseException:
        handle.close()
        raise
    if start.startswith((b"\xff\xfe", b"\xfe\xff")) or (len(start) == 4 and start.count(0) in (2, 3)):
        handle.close()
        raise DataError(f"{path}:1: got UTF-16 or UTF-32; need UTF-8.\nDo: re-encode the file.")
    return handle


def _unpacked(path: Path) -> Any:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")
    if path.suffix.lower() == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"))
    return path.open("rb")


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
                    f"{path}:{number}: got byte 0x{error.object[error.start]:02x}; need UTF-8.\nDo: re-encode the file."
                )
    return DataError(f"{path}: the file changed while it was read.\nDo: run again.")


def json_type(value: Any) -> str:
    """What JSON calls a value of this type, with an article where one belongs."""
    if value is None:
        return "null"
    names = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "a truth value",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), f"a {type(value).__name__}")


def short(value: Any, most: int = 40) -> str:
    """A value as Python writes it, cut to so many characters."""
    text = repr(value[:most] if isinstance(value, str) else value)
    return text if len(text) <= most else text[: most - 3] + "..."


READERS: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
"""By suffix."""
