"""Every accepted form of row, in every file format, and every way in which a row can be wrong."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from lit_instruct.data.records import (
    ComparisonRecord,
    DemonstrationRecord,
    PromptRecord,
    TextRecord,
    read_comparisons,
    read_demonstrations,
    read_prompts,
    read_texts,
)
from lit_instruct.types import DataError
from tests.unit.data.worlds import write_jsonl

USER = {"role": "user", "content": "q"}
REPLY = {"role": "assistant", "content": "a"}
CHAT = [{"role": "system", "content": "s"}, USER, REPLY, {"role": "user", "content": "q2"}]
SHARED = Path(__file__).parents[3].parent / "shared"


def reply(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("read", "row", "expected"),
    [
        (read_demonstrations, {"prompt": "q", "response": "a"}, DemonstrationRecord("q", "a")),
        (read_demonstrations, {"prompt": "q", "completion": "a", "other": None}, DemonstrationRecord("q", "a")),
        (read_demonstrations, {"prompt": CHAT, "response": "a"}, DemonstrationRecord(CHAT, "a")),
        (read_demonstrations, {"prompt": [USER], "completion": [REPLY]}, DemonstrationRecord([USER], "a")),
        (read_demonstrations, {"messages": [*CHAT, reply("b")]}, DemonstrationRecord(CHAT, "b")),
        (
            read_demonstrations,
            {"messages": [{**USER, "name": None}, {**REPLY, "tool_calls": None}]},
            DemonstrationRecord([USER], "a"),
        ),
        (
            read_comparisons,
            {"prompt": "q", "responses": ["a", "b", "c"], "ranks": [2, 1, 2]},
            ComparisonRecord("q", ["a", "b", "c"], [2, 1, 2], None),
        ),
        (
            read_comparisons,
            {"prompt": "q", "responses": ["a", "a"], "ranks": [1, 9], "labeler": 7},
            ComparisonRecord("q", ["a", "a"], [1, 9], "7"),
        ),
        (
            read_comparisons,
            {"prompt": "q", "chosen": "a", "rejected": "b", "labeler": None},
            ComparisonRecord("q", ["a", "b"], [1, 2], None),
        ),
        (
            read_comparisons,
            {"chosen": [USER, REPLY], "rejected": [USER, reply("b")]},
            ComparisonRecord([USER], ["a", "b"], [1, 2], None),
        ),
        (
            read_comparisons,
            {"prompt": "q", "chosen": [USER, REPLY], "rejected": [reply("b")]},
            ComparisonRecord("q", ["a", "b"], [1, 2], None),
        ),
        (read_prompts, {"prompt": "q"}, PromptRecord("q", {})),
        (read_prompts, {"prompt": CHAT, "responses": 3}, PromptRecord(CHAT, {"responses": 3})),
        (read_prompts, {"messages": [*CHAT, reply("b")]}, PromptRecord(CHAT, {})),
        (read_prompts, {"messages": CHAT, "key": [1]}, PromptRecord(CHAT, {"key": [1]})),
        (
            read_prompts,
            {"chosen": [USER, REPLY], "rejected": [USER, reply("b")], "source": None},
            PromptRecord([USER], {"source": None}),
        ),
        (read_texts, {"text": " once \n"}, TextRecord(" once \n")),
    ],
)
def test_accepted_rows(tmp_path: Path, read: Any, row: dict[str, Any], expected: Any) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [row])
    loaded = read(path)
    assert loaded.records == [expected]
    assert loaded.places == [f"{path}:1"]


COMPARISON = {"prompt": "q", "responses": ["a", "b"], "ranks": [1, 2]}
BAD_ROWS = [
    (read_comparisons, {**COMPARISON, "responses": list("abcde"), "ranks": [1, 2, 3, 4]}, "ranks", "4 ranks for 5"),
    (read_comparisons, {**COMPARISON, "ranks": [1, 0]}, "ranks[1]", "got 0 (int); need an integer of at least 1"),
    (read_comparisons, {**COMPARISON, "ranks": [True, 2]}, "ranks[0]", "got True (bool)"),
    (read_comparisons, {**COMPARISON, "ranks": [1, 1.5]}, "ranks[1]", "got 1.5 (float)"),
    (read_comparisons, {**COMPARISON, "ranks": [float("nan"), 2]}, "ranks[0]", "got nan"),
    (read_comparisons, {**COMPARISON, "ranks": [1, None]}, "ranks[1]", "got null"),
    (read_comparisons, {**COMPARISON, "ranks": ["1", "2"]}, "ranks[0]", "got '1' (str)"),
    (read_comparisons, {**COMPARISON, "ranks": 1}, "ranks", "got 1 (int); need a list"),
    (read_comparisons, {**COMPARISON, "responses": ["a"], "ranks": [1]}, "responses", "got 1; need at least 2"),
    (read_comparisons, {**COMPARISON, "responses": "ab"}, "responses", "got 'ab' (str); need a list"),
    (read_comparisons, {**COMPARISON, "responses": ["a", None]}, "responses[1]", "got null"),
    (read_comparisons, {**COMPARISON, "responses": ["a", " \n"]}, "responses[1]", "empty"),
    (read_comparisons, {"prompt": "q", "responses": ["a", "b"]}, "ranks", "columns found: 'prompt', 'responses'"),
    (read_comparisons, {"prompt": "q", "rejected": "b"}, "chosen", "no such column"),
    (read_comparisons, {"chosen": "a", "rejected": "b"}, "prompt", '{"prompt", "chosen", "rejected"}'),
    (read_comparisons, {"chosen": [USER, REPLY], "rejected": [USER]}, "rejected", "need one by 'assistant'"),
    (read_comparisons, {"chosen": [USER, REPLY], "rejected": [CHAT[3], REPLY]}, "rejected", "differ from the prompt"),
    (read_comparisons, {"chosen": [REPLY], "rejected": [REPLY]}, "chosen", "need the user's message"),
    (read_demonstrations, {"prompt": "q"}, "response", "columns found: 'prompt'"),
    (read_demonstrations, {"question": "q", "answer": "a"}, "prompt", '{"messages"}'),
    (read_demonstrations, {}, "prompt", "columns found: none"),
    (read_demonstrations, {"prompt": "q", "response": ""}, "response", "empty"),
    (read_demonstrations, {"prompt": "", "response": "a"}, "prompt", "empty"),
    (read_demonstrations, {"prompt": None, "response": "a"}, "prompt", "got null"),
    (read_demonstrations, {"prompt": 3, "response": "a"}, "prompt", "got 3 (int)"),
    (read_demonstrations, {"prompt": [], "response": "a"}, "prompt", "not empty"),
    (read_demonstrations, {"prompt": [None], "response": "a"}, "prompt[0]", "got null"),
    (read_demonstrations, {"prompt": [{"role": "user"}], "response": "a"}, "prompt[0]", "'content'"),
    (read_demonstrations, {"prompt": [{**USER, "content": ""}], "response": "a"}, "prompt[0].content", "empty"),
    (read_demonstrations, {"prompt": [{**USER, "role": "bot"}], "response": "a"}, "prompt[0].role", "got 'bot'"),
    (read_demonstrations, {"prompt": [USER, REPLY], "response": "a"}, "prompt", "ends with 'user'"),
    (read_demonstrations, {"messages": [USER]}, "messages", "need one by 'assistant'"),
    (read_demonstrations, {"messages": None}, "messages", "got null"),
    (read_prompts, {"text": "t"}, "prompt", "columns found: 'text'"),
    (read_texts, {"prompt": "q"}, "text", "columns found: 'prompt'"),
    (read_texts, {"text": ["t"]}, "text", "got ['t'] (list)"),
]


@pytest.mark.parametrize(("read", "row", "field", "problem"), BAD_ROWS)
def test_bad_rows_name_place_field_and_problem(
    tmp_path: Path, read: Any, row: dict[str, Any], field: str, problem: str
) -> None:
    good = {"text": "t", "messages": [USER, REPLY], **COMPARISON, "response": "a"}
    path = write_jsonl(tmp_path / "rows.jsonl", [good, "", row])
    with pytest.raises(DataError) as error:
        read(path)
    lines = str(error.value).splitlines()
    assert lines[0].startswith("1 of 2 rows")
    assert lines[1].strip().startswith(f"{path}:3: field {field!r}: ")
    assert problem in lines[1]
    assert lines[-1].startswith("Do: ")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"prompt": "q", "response"', "invalid JSON"),
        (b'{"prompt": "caf\xe9", "response": "a"}', "byte 0xe9 at column 16; need UTF-8"),
        (b'["q", "a"]', "got a list; need an object"),
        (b"[" * 100_000, "nested"),
    ],
)
def test_broken_lines_are_named_and_hide_nothing(tmp_path: Path, line: bytes, problem: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "q", "response": "a"}\n' + line + b'\n{"prompt": "q"}\n')
    with pytest.raises(DataError) as error:
        read_demonstrations(str(path))
    assert f"{path}:2: " in str(error.value)
    assert problem in str(error.value)
    assert f"{path}:3: field 'response'" in str(error.value)


def test_the_first_twenty_of_many_bad_rows_are_listed(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "q"}] * 37)
    with pytest.raises(DataError) as error:
        read_demonstrations(path)
    lines = str(error.value).splitlines()
    assert f"{path}:20: " in str(error.value)
    assert f"{path}:21: " not in str(error.value)
    assert lines[-2].strip() == "... and 17 more"


ROWS = [
    {"prompt": 'say, "hi"\nthere', "responses": ["a", "b", "c"], "ranks": [1, 2, 2]},
    {"prompt": "naïve \u2028 q", "responses": ["d", "e"], "ranks": [2, 1]},
]


def write_as(form: str, folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / f"rows.{form}"
    if form == "jsonl":
        write_jsonl(path, rows)
    elif form == "jsonl.gz":
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    elif form == "json":
        path.write_text(json.dumps(rows))
    elif form == "data.json":
        path.write_text(json.dumps({"data": rows, "version": 1}), encoding="utf-8-sig")
    elif form == "csv":
        with path.open("w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, list(rows[0]))
            writer.writeheader()
            for row in rows:
                writer.writerow({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()})
    else:
        import datasets

        table = datasets.Dataset.from_list(rows)
        if form == "parquet":
            table.to_parquet(str(path))
        elif form == "saved":
            table.save_to_disk(str(path))
        elif form == "saved_splits":
            datasets.DatasetDict({"train": table, "held": table.select([1])}).save_to_disk(str(path))
        else:
            path.mkdir()
            write_jsonl(path / "train.jsonl", rows)
            write_jsonl(path / "test.jsonl", rows[1:])
    return str(path)


FORMS = ["jsonl", "jsonl.gz", "json", "data.json", "csv", "parquet", "saved", "saved_splits", "folder"]


@pytest.mark.parametrize("form", FORMS)
def test_formats_hold_the_same_rows(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    path = write_as(form, tmp_path, ROWS)
    loaded = read_comparisons(path)
    assert loaded.records == [ComparisonRecord(r["prompt"], r["responses"], r["ranks"], None) for r in ROWS]
    second = f"{path}:2" if "jsonl" in form else f"{path} row 2"
    assert loaded.places[1] == second


@pytest.mark.parametrize("form", ["json", "csv", "parquet", "saved"])
def test_other_formats_name_the_row(tmp_path: Path, form: str) -> None:
    path = write_as(form, tmp_path, [ROWS[0], {**ROWS[1], "ranks": [1, 2, 3]}])
    with pytest.raises(DataError, match="got 3 ranks for 2 responses") as error:
        read_comparisons(path)
    assert f"{path} row 2: field 'ranks'" in str(error.value)


@pytest.mark.parametrize(("form", "split"), [("saved_splits", "held"), ("folder", "test")])
def test_a_split_stands_after_a_colon(tmp_path: Path, form: str, split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    path = write_as(form, tmp_path, ROWS)
    assert read_comparisons(f"{path}:{split}").records[0].responses == ["d", "e"]
    with pytest.raises(DataError, match="'nowhere'"):
        read_comparisons(f"{path}:nowhere")


def test_several_sources_are_read_in_order(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    second = write_jsonl(tmp_path / "b.jsonl", [{"text": "b"}, {"text": "c"}])
    loaded = read_texts([first, second])
    assert [record.text for record in loaded.records] == ["a", "b", "c"]
    assert loaded.places[2] == f"{second}:2"
    with pytest.raises(DataError, match="no sources"):
        read_texts([])


def test_a_missing_file_suggests_its_neighbour(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "demonstrations.jsonl", [])
    with pytest.raises(DataError, match=r"did you mean demonstrations\.jsonl\?"):
        read_demonstrations(str(tmp_path / "demonstration.jsonl"))
    with pytest.raises(DataError, match=r"folder .*nowhere does not exist"):
        read_demonstrations(str(tmp_path / "nowhere" / "x.jsonl"))


def test_an_unknown_hub_name_says_what_was_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, split: str) -> None:
        raise FileNotFoundError(f"no {name}")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(DataError, match=r"no such file here.*split 'test' of data set 'someone/nothing'"):
        read_demonstrations("someone/nothing:test")


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.jsonl", "", "got no rows"),
        ("a.json", "[]", "got no rows"),
        ("a.csv", "prompt,response\n", "got no rows"),
        ("a.json", '{"rows": []}', "need a list of rows"),
        ("a.json", '[\n{"prompt": }]', r"a\.json:2: got invalid JSON"),
        ("a.json", '{"prompt": "q"}\n{"prompt": "q"}', r"rename it to \.jsonl"),
        ("a.parquet", "no", "not Parquet"),
        ("a.txt", "no", r"'\.txt'; need one of \.jsonl"),
        ("a.csv", 'prompt,response\nq,"a', "row 1"),
        ("a.csv", "prompt,response\nq,a,b\n", "row 1: got 1 more cells"),
        ("a.csv", "prompt,response\nq,\n", r"row 1: field 'response'"),
        ("a.csv", "messages\nhello\n", "row 1: field 'messages': got text that is not JSON"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, name: str, content: str, problem: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=problem) as error:
        read_demonstrations(str(tmp_path / name))
    assert "\nDo: " in str(error.value)


@pytest.mark.parametrize("name", ["a.json", "a.csv"])
def test_wrong_encodings_have_a_line(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"[\n\xff]")
    with pytest.raises(DataError, match=r":2: got byte 0xff; need UTF-8"):
        read_demonstrations(str(tmp_path / name))


def test_rankings_may_be_tied_but_not_all_of_them(tmp_path: Path) -> None:
    tied = {**COMPARISON, "ranks": [1, 1]}
    assert len(read_comparisons(write_jsonl(tmp_path / "some.jsonl", [tied, COMPARISON])).records) == 2
    with pytest.raises(DataError, match="got 2 rankings in which all responses are tied"):
        read_comparisons(write_jsonl(tmp_path / "all.jsonl", [tied, tied]))


@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="the collection of real data sets is not beside the project")
def test_real_rows_are_accepted() -> None:
    folder = SHARED / "data" / "oasst"
    assert len(read_comparisons(str(folder / "comparisons.jsonl")).records) == 118
    assert len(read_demonstrations(str(folder / "demonstrations.jsonl")).records) == 149
    assert len(read_prompts(str(folder / "prompts.jsonl")).records) == 250
