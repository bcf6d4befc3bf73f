"""Data."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lit_instruct import ComparisonDataModule, DemonstrationDataModule, PretrainingDataModule, PromptDataModule
from lit_instruct.data.preparation import prepare
from scripts.bad_inputs.case import Case

Run = Callable[[Path], object]

_GOOD = {"prompt": "w1", "response": "w2", "responses": ["w1", "w2"], "ranks": [1, 2], "text": "w1 w2"}
_LINE = json.dumps(_GOOD) + "\n"
_NO_SYSTEM = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system messages') }}{% endif %}"
_TEMPLATE = _NO_SYSTEM + "{{ m.content }} {% endfor %}:"


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    vocabulary = {"<eos>": 0, "<unk>": 1, ":": 2, "w1": 3, "w2": 4}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<unk>")
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


def _read(kind: type[Any], source: str, **settings: Any) -> object:
    module = kind(source, _tokenizer(), **({"val": 0.0, "batch_size": 1} | settings))
    return module.setup("fit")


def _file(name: str, content: str | bytes, kind: type[Any] = DemonstrationDataModule, **settings: Any) -> Run:
    """Read a file with this content."""

    def run(folder: Path) -> object:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return _read(kind, name, **settings)

    return run


def _row(row: Any, kind: type[Any] = DemonstrationDataModule, **settings: Any) -> Run:
    """Read a file of which the second row is this one; a text is written as it is."""
    line = row if isinstance(row, str) else json.dumps(row)
    return _file("rows.jsonl", f"{_LINE}{line}\n", kind, **settings)


def _ranking(**changes: Any) -> Run:
    return _row(_GOOD | changes, ComparisonDataModule)


def _parquet(*columns: tuple[str, Any], left: float = 1.0) -> Run:
    """Read a Parquet file with these columns, of which a share is left."""

    def run(folder: Path) -> object:
        names, arrays = zip(*columns, strict=True)
        path = folder / "rows.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_arrays(list(arrays), names=list(names)), path)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * left)])
        return _read(DemonstrationDataModule, path.name)

    return run


def _zstd(content: str) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content.encode())
    return sink.getvalue().to_pybytes()


def _pipe(folder: Path) -> object:
    os.mkfifo(folder / "rows.jsonl")
    return _read(DemonstrationDataModule, "rows.jsonl")


def _link(folder: Path) -> object:
    (folder / "rows.jsonl").symlink_to("rows.jsonl")
    return _read(DemonstrationDataModule, "rows.jsonl")


def _misspelt(folder: Path) -> object:
    (folder / "demonstrations.jsonl").write_text(_LINE)
    return _read(DemonstrationDataModule, "demonstration.jsonl")


def _prepare(row: dict[str, Any], **settings: Any) -> Run:
    def run(folder: Path) -> object:
        (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
        return prepare("rows.jsonl", _tokenizer(), "out", **settings)

    return run


_WORDS = pyarrow.array(["w1", "w2"])

CASES = [
    # Files.
    Case("a file that is not there", _misspelt),
    Case("a file of an unknown kind", _file("rows.txt", _LINE)),
    Case("an empty file", _file("rows.jsonl", "")),
    Case("a pipe", _pipe),
    Case("a link that leads to itself", _link),
    Case("a gzip file that was cut off", _file("rows.jsonl.gz", gzip.compress(_LINE.encode(), mtime=0)[:-9])),
    Case("a .gz file that is not packed", _file("rows.jsonl.gz", _LINE)),
    Case("a zstd file that was cut off", _file("rows.jsonl.zst", _zstd(_LINE)[:-5])),
    Case("a file in UTF-16", _file("rows.jsonl", _LINE.encode("utf-16"))),
    Case("a line in Latin-1", _file("rows.jsonl", _LINE.encode() + b'{"prompt": "caf\xe9", "response": "w1"}\n')),
    Case("a CSV file in Latin-1", _file("rows.csv", b"prompt,response\nw1,w2\ncaf\xe9,w2\n")),
    Case("a Parquet file that was cut off", _parquet(("prompt", _WORDS), ("response", _WORDS), left=0.5)),
    # Lines and cells.
    Case("a line that is no JSON", _row('{"prompt": "w1", "response"')),
    Case("a line that is a list", _row(["w1", "w2"])),
    Case("objects one after the other in a .json file", _file("rows.json", _LINE * 2)),
    Case("a .json file that holds a number", _file("rows.json", "3")),
    Case("a line with a NUL byte", _row('{"prompt": "w\0", "response": "w1"}')),
    Case("a name that stands twice in one object", _row('{"prompt": "w1", "prompt": "w2", "response": "w1"}')),
    Case("a number of 5,000 digits", _row('{"prompt": "w1", "response": "w2", "n": ' + "9" * 5000 + "}")),
    Case(
        "lists within lists, 100 deep", _row('{"prompt": "w1", "response": "w2", "n": ' + "[" * 100 + "]" * 100 + "}")
    ),
    Case("a line of 70 MB", _row('{"prompt": "' + "x" * 70_000_000 + '"}')),
    Case("a quote that is not closed in a CSV file", _file("rows.csv", 'prompt,response\nw1,w2\nw1,"w2\nw1,w2\n')),
    Case("more cells than columns in a CSV file", _file("rows.csv", "prompt,response\nw1,w2,w3\n")),
    Case("two CSV columns of one name", _file("rows.csv", "prompt,response,prompt\nw1,w2,w1\n")),
    Case("a CSV file with semicolons", _file("rows.csv", "prompt;response\nw1;w2\n")),
    Case("a Parquet column of bytes", _parquet(("prompt", _WORDS), ("response", pyarrow.array([b"w1", b"w2"])))),
    # Fields.
    Case("columns of other names", _row({"question": "w1", "answer": "w2"})),
    Case("a prompt that is null", _row({"prompt": None, "response": "w1"})),
    Case("a prompt of white space", _row({"prompt": " \n", "response": "w1"})),
    Case("half a surrogate pair", _row('{"prompt": "w1 \\ud800", "response": "w1"}')),
    Case("a message by nobody", _row({"prompt": [{"role": None, "content": "w1"}], "response": "w1"})),
    Case("a message without content", _row({"prompt": [{"role": "user"}], "response": "w1"})),
    Case("a conversation that ends with the user", _row({"messages": [{"role": "user", "content": "w1"}]})),
    Case("a rank that is NaN", _ranking(ranks=[1, float("nan")])),
    Case("a rank with a decimal point", _ranking(ranks=[1.0, 2.0])),
    Case("a rank as text", _ranking(ranks=["1", "2"])),
    Case("a rank of 0", _ranking(ranks=[0, 1])),
    Case("fewer ranks than responses", _ranking(ranks=[1])),
    Case("one response to rank", _ranking(responses=["w1"], ranks=[1])),
    Case("10,000 responses to rank", _ranking(responses=["w1"] * 10_000, ranks=[1, *[2] * 9999])),
    Case("a response that is null", _ranking(responses=["w1", None])),
    Case(
        "responses that are all tied", _file("rows.jsonl", json.dumps(_GOOD | {"ranks": [1, 1]}), ComparisonDataModule)
    ),
    # Encoding.
    Case(
        "a system message that the template refuses",
        _row({"prompt": [{"role": "system", "content": "w1"}, {"role": "user", "content": "w1"}], "response": "w2"}),
    ),
    Case("an end of text inside a response", _row({"prompt": "w1", "response": "w1 <eos> w2"})),
    Case("a sample that is too long", _row({"prompt": "w1 w2 w1 w2", "response": "w1"}, max_length=4)),
    Case("too little text for one chunk", _file("rows.jsonl", _LINE, PretrainingDataModule, chunk_tokens=512)),
    Case("fewer rows than batch_size", _file("rows.jsonl", _LINE, PromptDataModule, batch_size=8)),
    # Rows that are left out, and others that are only told.
    Case("bad rows, with on_bad_row=skip", _row({"prompt": "w1"}, on_bad_row="skip")),
    Case("nothing but bad rows, with on_bad_row=skip", _file("rows.jsonl", "{}\n{}\n", on_bad_row="skip")),
    Case("two rows with one id", _file("rows.jsonl", (json.dumps(_GOOD | {"id": 7}) + "\n") * 2)),
    Case("a prompt without its owner, for data prepare", _prepare({"prompt": "w1"})),
    Case(
        "a value of --only that no row has, for data prepare",
        _prepare({"prompt": "w1", "owner": 1, "source": "api"}, only="source=customer"),
    ),
]
