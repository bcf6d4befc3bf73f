"""Files that are damaged, packed, in another encoding or no files at all: each is read, or told in our own words."""

from __future__ import annotations

import csv
import gzip
import json
import os
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from lit_instruct.data import formats
from lit_instruct.data.bad_rows import Problem
from lit_instruct.data.records import read_demonstrations
from lit_instruct.data.sources import Row, stream_rows
from lit_instruct.types import DataError
from tests.unit.data.worlds import write_jsonl

ROW = {"prompt": "q", "response": "a"}
LINE = json.dumps(ROW).encode() + b"\n"
NOISE = json.dumps({"prompt": random.Random(0).randbytes(3000).hex(), "response": "a"}).encode() + b"\n"


def zstd(content: bytes) -> bytes:
    packed = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(packed, "zstd") as stream:
        stream.write(content)
    return packed.getvalue().to_pybytes()


def told(path: Path | str, *parts: str) -> str:
    """The error about a file: it has these parts, and says what to do."""
    with pytest.raises(DataError) as error:
        read_demonstrations(str(path))
    message = str(error.value)
    for part in parts:
        assert part in message
    assert message.splitlines()[-1].startswith("Do: ")
    assert len(message) < 4000
    return message


@pytest.mark.parametrize("ending", [".gz", ".zst", ".GZ"])
@pytest.mark.parametrize("form", ["jsonl", "json", "csv"])
def test_packed_files_are_read(tmp_path: Path, form: str, ending: str) -> None:
    content = {"jsonl": LINE * 3, "json": json.dumps([ROW] * 3).encode(), "csv": b"prompt,response\n" + b"q,a\n" * 3}
    path = tmp_path / f"rows.{form}{ending}"
    path.write_bytes((zstd if ending == ".zst" else gzip.compress)(content[form]))
    assert read_demonstrations(str(path)).records == [("q", "a")] * 3


@pytest.mark.parametrize(("ending", "pack"), [(".gz", gzip.compress), (".zst", zstd)])
def test_packed_parts_that_were_joined_are_one_file(
    tmp_path: Path, ending: str, pack: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / f"rows.jsonl{ending}"
    path.write_bytes(pack(LINE * 2) + pack(LINE))
    assert len(read_demonstrations(str(path)).records) == 3


@pytest.mark.parametrize(("ending", "pack"), [(".gz", gzip.compress), (".zst", zstd)])
@pytest.mark.parametrize("left", [0.1, 0.5, 0.99, -1])
def test_packed_files_that_are_cut_off(
    tmp_path: Path, ending: str, pack: Callable[[bytes], bytes], left: float
) -> None:
    content = pack(NOISE * 20)
    path = tmp_path / f"rows.jsonl{ending}"
    path.write_bytes(content[: int(len(content) * left) if left > 0 else -1])
    told(path, f"{path}: got a file that cannot be read (", "check that it is whole")


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("content", [LINE, b"PK\x03\x04", LINE[:3]])
def test_files_that_are_not_packed_as_they_say(tmp_path: Path, ending: str, content: bytes) -> None:
    path = tmp_path / f"rows.jsonl{ending}"
    path.write_bytes(content)
    told(path, f"{path}: got a file that cannot be read (")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.jsonl.gz"])
def test_other_unicode_encodings_are_named(tmp_path: Path, name: str, encoding: str) -> None:
    text = "prompt,response\nq,a\n" if "csv" in name else json.dumps(ROW)
    content = text.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    told(tmp_path / name, f"{name}:1: got UTF-16 or UTF-32; need UTF-8")


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.jsonl", json.dumps(ROW)), ("a.json", json.dumps([ROW])), ("a.csv", "prompt,response\nq,a\n")],
)
def test_a_byte_order_mark_of_utf8_does_no_harm(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert read_demonstrations(str(tmp_path / name)).records == [("q", "a")]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"prompt": "q\0", "response": "a"}', "got a NUL byte at column 14, not text; need one object a line"),
        (b"\0" * 4096, "got a NUL byte at column 1"),
        (b'{"prompt": "q", "response": "a", "prompt": "r"}', "got the name 'prompt' twice in one object"),
        (b'{"prompt": [{"role": "user", "role": "user"}]}', "got the name 'role' twice"),
        (b'{"n": ' + b"9" * 5000 + b"}", "got a number of thousands of digits"),
        (b'{"n": -' + b"9" * 5000 + b"}", "got a number of thousands of digits"),
        (b"[" * 100_000 + b"]" * 100_000, "got JSON that is nested too deeply"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "nested too deeply (more than 64 levels)"),
        (b'{"a":[' * 33 + b"]}" * 33, "nested too deeply (more than 64 levels)"),
        (b'{"prompt": "q"} {"prompt": "q"}', "got invalid JSON (Extra data at column 17)"),
        (b'{"prompt": caf\xc3\xa9}', "got invalid JSON (Expecting value at column 12)"),
        (b'{"prompt"', "got invalid JSON (Expecting ':' delimiter at column 10)"),
        (b"3", "got a number; need an object"),
        (b"null", "got null; need an object"),
        (b"true", "got a truth value; need an object"),
        (b'"q"', "got a text; need an object"),
        (b"NaN", "got a number; need an object"),
        (b'{"prompt": "q\\ud800", "response": "a"}', "field 'prompt': got half a surrogate pair at character 2"),
        (
            b'{"prompt": "q", "response": "\\udc00\\ud800"}',
            "field 'response': got half a surrogate pair at character 1",
        ),
        (b'{"' + b"x" * 100_000 + b'": 1}', "columns found: '" + "x" * 30),
        (b"{" + b",".join(b'"%d": 1' % n for n in range(5000)) + b"}", " and 4980 more); need"),
    ],
)
def test_bad_lines_have_their_place_and_hide_no_other(tmp_path: Path, line: bytes, problem: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(LINE + line + b"\n" + b'{"prompt": "q"}\n')
    told(path, "2 of 3 rows", f"{path}:2: ", problem, f"{path}:3: field 'response'")


@pytest.mark.parametrize(
    "line",
    [
        b'{"prompt": "q", "response": "a", "n": [1e999, -Infinity, NaN]}',
        b'{"x": [], "a":' + b'{"a":' * 63 + b"1" + b"}" * 64,
        b'{"prompt": "q\\u0000", "response": "\\ud83d\\ude00"}',
        b'{"n": ' + b"9" * 4000 + b"}",
        b'{"n": "' + b"[" * 100_000 + b'"}',
    ],
)
def test_lines_that_are_strange_but_whole_are_read(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(LINE + line)
    _, row = stream_rows(str(path))
    assert isinstance(row, Row)
    assert repr(row.columns) == repr(json.loads(line))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b""),
        ("a.jsonl", b" \t\r\n \n"),
        ("a.json", b""),
        ("a.json", b" \n"),
        ("a.json", b"[]"),
        ("a.csv", b""),
        ("a.csv", b"\n\n"),
        ("a.csv", b"prompt,response\n"),
        ("a.jsonl.gz", b""),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0)),
        ("a.jsonl.zst", b""),
        ("a.jsonl.zst", zstd(b"\n")),
    ],
)
def test_empty_files(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    told(tmp_path / name, f"{name}: got no rows; need at least one")


@pytest.mark.parametrize(
    ("content", "got"),
    [("3", "a number"), ("null", "null"), ('"x"', "a text"), ("{}", "an object"), ('{"data": {}}', "an object")],
)
def test_json_files_must_hold_a_list(tmp_path: Path, content: str, got: str) -> None:
    (tmp_path / "a.json").write_text(content)
    told(tmp_path / "a.json", f"a.json: got {got}; need a list of rows")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'[{"prompt": "q"},\n{"prompt": "\0"}]', "a.json:2: got a NUL byte at column 13"),
        (b'[{"prompt": "q", "prompt": "q"}]', "a.json: got the name 'prompt' twice in one object"),
        (b"[" + b"9" * 5000 + b"]", "a.json: got a number of thousands of digits"),
        (b"[" * 100_000, "a.json: got JSON that is nested too deeply"),
        (b'[{"x":' + b"[" * 90 + b"]" * 90 + b"}]", "a.json: got JSON that is nested too deeply"),
    ],
)
def test_json_that_python_alone_would_take_or_choke_on(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    told(tmp_path / "a.json", problem)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"prompt,response\nq,a\nq,\0\n", "row 2: field 'response': got a NUL byte; need text"),
        (b'prompt,response\nq,a\nq,"a\nq,a\n', "row 2 (from line 3 on): got CSV that cannot be parsed"),
        (b'prompt,response\n"q\nq",a\nq,"a"b\n', "row 2 (from line 4 on): got CSV that cannot be parsed"),
        (b"prompt,response\nq\n", "row 1: field 'response': got no such column (columns found: 'prompt')"),
        (b"prompt,response\nq,a,b,c\n", "row 1: got 2 more cells than the header has columns"),
        (b"prompt,response,prompt\nq,a,r\n", "a.csv: got two columns with the name 'prompt'"),
        (b"\nq,a\n", "row 1: got 2 more cells than the header"),
        (b"prompt;response\nq;a\n", "columns found: 'prompt;response'"),
        (
            b'messages\n"' + b"[" * 100_000 + b'"\n',
            "row 1: field 'messages': got text that is not JSON (got JSON that is",
        ),
        (b"messages\n" + b"9" * 5000 + b"\n", "row 1: field 'messages': got text that is not JSON"),
        (b"prompt,response\nq,a\nq,caf\xe9\n", "a.csv:3: got byte 0xe9; need UTF-8"),
    ],
)
def test_bad_csv(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    told(tmp_path / "a.csv", problem)


def test_csv_with_long_cells_and_columns_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = csv.field_size_limit(131_072)  # Python's own
    try:
        (tmp_path / "a.csv").write_text(f",prompt,response,,\n0,{'x' * 200_000},a,,\n")
        assert read_demonstrations(str(tmp_path / "a.csv")).records == [("x" * 200_000, "a")]
        monkeypatch.setattr(formats, "MAX_ROW_BYTES", 1000)
        csv.field_size_limit(1000)
        told(tmp_path / "a.csv", "row 1 (from line 2 on): got CSV that cannot be parsed (field larger than field limit")
    finally:
        csv.field_size_limit(before)


def write_parquet(path: Path, columns: list[tuple[str, Any]]) -> Path:
    names, arrays = zip(*columns, strict=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(list(arrays), names=list(names)), path)
    return path


def of_bytes(*values: bytes) -> Any:
    """A column that says it is text, and holds these bytes."""
    offsets = pyarrow.array([0, *(sum(map(len, values[: n + 1])) for n in range(len(values)))], pyarrow.int32())
    content = pyarrow.py_buffer(b"".join(values))
    return pyarrow.Array.from_buffers(pyarrow.string(), len(values), [None, offsets.buffers()[1], content])


def test_parquet_with_values_that_python_does_not_know(tmp_path: Path) -> None:
    """One such value spoils its own row alone."""
    texts = pyarrow.array(["q", "q", "q"])
    path = write_parquet(tmp_path / "a.parquet", [("prompt", texts), ("response", of_bytes(b"a", b"caf\xe9", b"a"))])
    told(path, "1 of 3 rows", f"{path} row 2: field 'response': got a value that cannot be read ('utf-8' codec")
    far = pyarrow.array([0, 2**53, 0], pyarrow.timestamp("ms"))
    path = write_parquet(tmp_path / "b.parquet", [("prompt", texts), ("response", texts), ("date", far)])
    told(path, f"{path} row 2: field 'date': got a value that cannot be read")


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (pyarrow.array([b"a"]), "row 1: field 'response': got b'a' (bytes); need a response as text"),
        (pyarrow.array([{"text": "a"}]), "row 1: field 'response': got {'text': 'a'} (dict)"),
        (pyarrow.array([0], pyarrow.timestamp("s")), "row 1: field 'response': got datetime.datetime(1970"),
        (pyarrow.array([None], pyarrow.string()), "row 1: field 'response': got null"),
        (pyarrow.array([1.5]), "row 1: field 'response': got 1.5 (float)"),
        (pyarrow.array([["a"]]), "row 1: field 'response[0]': got 'a' (str); need {'role': ..., 'content': ...}"),
    ],
)
def test_parquet_with_columns_of_other_types(tmp_path: Path, values: Any, problem: str) -> None:
    path = write_parquet(tmp_path / "a.parquet", [("prompt", pyarrow.array(["q"])), ("response", values)])
    told(path, problem)


def test_parquet_with_two_columns_of_one_name(tmp_path: Path) -> None:
    text = pyarrow.array(["q"])
    path = write_parquet(tmp_path / "a.parquet", [("prompt", text), ("prompt", text), ("response", text)])
    told(path, "a.parquet: got two columns with the name 'prompt'")


@pytest.mark.parametrize("left", [0.2, 0.6, 0.99])
def test_parquet_that_is_cut_off(tmp_path: Path, left: float) -> None:
    path = write_parquet(tmp_path / "a.parquet", [("prompt", pyarrow.array(["q"] * 100))])
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * left)])
    told(path, "a.parquet: got a file that is not Parquet")


def test_a_dataset_folder_that_is_damaged(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list([{**ROW, "response": "a" * 100}] * 500).save_to_disk(str(tmp_path / "saved"))
    (file,) = (tmp_path / "saved").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:20_000])
    told(tmp_path / "saved", "saved: got ")


# What is no file.


def test_pipes_and_devices_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    told(tmp_path / "a.jsonl", "a.jsonl: got a pipe or a device; need a file")
    told("/dev/null", "/dev/null: got a pipe or a device")


def test_links_that_lead_nowhere(tmp_path: Path) -> None:
    for name, target in (("a.jsonl", "a.jsonl"), ("b.jsonl", "gone.jsonl")):
        (tmp_path / name).symlink_to(tmp_path / target)
        told(tmp_path / name, f"{name}: got a link that leads to no file", target)


def test_a_folder_with_the_name_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").mkdir()
    told(tmp_path / "a.jsonl", "a.jsonl: got no data set")


@pytest.mark.parametrize("source", ["", " ", "~nobody-of-this-name/a.jsonl", "a\0b.jsonl", "x" * 300 + ".jsonl"])
def test_names_that_cannot_be_a_file(source: str) -> None:
    told(source)


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *arguments: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    path = write_jsonl(tmp_path / "a.jsonl", [ROW])
    monkeypatch.setattr(Path, "open", refuse)
    told(path, f"{path}: got a file that cannot be read ([Errno 13] Permission denied", "permissions")


# Lines without end.


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_line_without_end_takes_no_more_memory_than_a_row_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pack: Callable[[bytes], bytes]
) -> None:
    monkeypatch.setattr(formats, "MAX_ROW_BYTES", 100_000)
    path = tmp_path / f"rows.jsonl{'.gz' if pack is gzip.compress else ''}"
    path.write_bytes(pack(LINE + b'{"prompt": "' + b"x" * 20_000_000 + b'"}\n{"prompt": "q"}\n'))
    list(stream_rows(write_jsonl(tmp_path / "first.jsonl", [ROW])))  # what is imported and cached at first use
    tracemalloc.start()
    first, long, last = stream_rows(str(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert str(long) == f"{path}:2: got a line of more than 100,000 bytes; need one row a line"
    assert [first.place, last.place] == [f"{path}:1", f"{path}:3"]
    assert peak < 2e6


@pytest.mark.parametrize("end", [b"\n", b""])
def test_the_longest_line_that_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: bytes) -> None:
    monkeypatch.setattr(formats, "MAX_ROW_BYTES", 1000)
    line = b'{"prompt": "' + b"x" * (1000 - 14 - len(end)) + b'"}' + end
    assert len(line) == 1000
    (tmp_path / "a.jsonl").write_bytes(LINE + line)
    assert [type(row) for row in stream_rows(str(tmp_path / "a.jsonl"))] == [Row, Row]
    (tmp_path / "a.jsonl").write_bytes(LINE + b" " + line)
    assert [type(row) for row in stream_rows(str(tmp_path / "a.jsonl"))] == [Row, Problem]
