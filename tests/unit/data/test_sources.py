"""Rows one by one: nothing is read ahead of what is asked for, whatever the format."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from lit_instruct.data.records import PromptRecord, prompt_of, stream_prompts
from lit_instruct.data.sources import Row, stream_rows
from lit_instruct.types import DataError
from tests.unit.data.worlds import write_jsonl

ROWS = 12_000


def write_lines(path: Path) -> None:
    path.write_text("".join(json.dumps({"prompt": f"{n} " + "x" * 500}) + "\n" for n in range(ROWS)))


def write_zipped(path: Path) -> None:
    path.write_bytes(
        gzip.compress("".join(json.dumps({"prompt": f"{n} " + "x" * 500}) + "\n" for n in range(ROWS)).encode(), 1)
    )


def write_csv(path: Path) -> None:
    with path.open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["prompt"])
        writer.writerows([f"{n} " + "x" * 500] for n in range(ROWS))


def write_parquet(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"prompt": [f"{n} " + "x" * 500 for n in range(ROWS)]})
    pyarrow.parquet.write_table(table, path, row_group_size=1500)


@pytest.mark.parametrize(
    ("name", "write"),
    [("a.jsonl", write_lines), ("a.jsonl.gz", write_zipped), ("a.csv", write_csv), ("a.parquet", write_parquet)],
)
def test_memory_does_not_grow_with_the_file(tmp_path: Path, name: str, write: Callable[[Path], None]) -> None:
    write(tmp_path / name)
    source = str(tmp_path / name)
    next(stream_rows(source))  # what is imported and cached at first use
    tracemalloc.start()
    numbers = []
    for item in stream_rows(source):
        assert isinstance(item, Row)
        numbers.append(int(item.columns["prompt"].split()[0]))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert numbers == list(range(ROWS))
    assert peak < 3e6, "the texts alone are 6 MB"


def test_what_is_wrong_comes_in_its_place(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "q"}, "{", {"prompt": ""}, {"prompt": "r"}])
    items = list(stream_prompts(path))
    assert items[0] == (Row(f"{path}:1", {"prompt": "q"}), PromptRecord("q", {}))
    assert str(items[1]).startswith(f"{path}:2: got invalid JSON")
    assert str(items[2]).startswith(f"{path}:3: field 'prompt': got an empty text")
    assert items[3][1] == PromptRecord("r", {})
    assert list(stream_rows(path))[1] == items[1]


def test_the_prompt_of_a_row(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": messages}, {"prompt": "q"}])
    for item in stream_prompts([path]):
        assert not isinstance(item, str)
        assert prompt_of(item[0].columns) == item[1].prompt


@pytest.mark.parametrize("cut", [30, 2000])
def test_a_file_that_is_cut_off_is_told(tmp_path: Path, cut: int) -> None:
    write_zipped(tmp_path / "whole.gz")
    content = (tmp_path / "whole.gz").read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(content[:cut])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: got a file that cannot be read"):
        list(stream_rows(str(tmp_path / "a.jsonl.gz")))


def test_bytes_in_the_middle_of_a_csv_have_a_line(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv")
    with (tmp_path / "a.csv").open("ab") as handle:
        handle.write(b"caf\xe9\r\n")
    with pytest.raises(DataError, match=rf"a\.csv:{ROWS + 2}: got byte 0xe9; need UTF-8"):
        list(stream_rows(str(tmp_path / "a.csv")))


def test_parquet_that_breaks_off_says_how_far_it_went(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet")
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 20_000] = b"\xff" * 20_000
    (tmp_path / "a.parquet").write_bytes(content)
    stream = stream_rows(str(tmp_path / "a.parquet"))
    assert len(list(itertools.islice(stream, 1500))) == 1500
    with pytest.raises(DataError, match=r"a\.parquet: got a file that is not Parquet behind row \d+"):
        list(stream)
