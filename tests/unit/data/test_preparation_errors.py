"""What ``data prepare`` says when it cannot go on, what it leaves behind then, and its command line."""

from __future__ import annotations

import json
import logging
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_instruct.cli import main
from lit_instruct.data import preparation
from lit_instruct.data.preparation import prepare
from lit_instruct.types import ConfigError, DataError
from tests.helpers.tiny import save_tokenizer
from tests.unit.data.test_preparation import ALL_IN_TRAIN, EMAIL, TOKENIZER, owner_in, rows, run, words
from tests.unit.data.worlds import write_jsonl

FILES = {"train.jsonl", "val.jsonl", "test.jsonl", "report.json"}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "w1"}, "field 'owner': got no such column (columns found: 'prompt'); need the prompt's owner"),
        ({"prompt": "w1", "owner": None}, "field 'owner': got None"),
        ({"prompt": "w1", "owner": " "}, "field 'owner': got ' '"),
        ({"prompt": "w1", "owner": True}, "field 'owner': got True"),
        ({"prompt": "w1", "owner": 1.5}, "field 'owner': got 1.5"),
        ({"prompt": "", "owner": "a"}, "field 'prompt': got an empty text"),
        ({"owner": "a"}, "field 'prompt': got no such column"),
        ({"prompt": [{"role": "assistant", "content": "w"}], "owner": "a"}, "field 'prompt': got a last message by"),
        ('{"prompt": "w1", "owner"', "got invalid JSON"),
        ('{"prompt": "w1 \\ud800", "owner": "a"}', "field 'prompt': got half a surrogate pair at character 4"),
        ('{"prompt": "w1", "owner": "a", "note": "\\ud800"}', "got what cannot be written as JSON in UTF-8"),
        ("[]", "got a list; need an object"),
    ],
)
def test_bad_rows_are_named_and_nothing_is_written(tmp_path: Path, row: Any, problem: str) -> None:
    with pytest.raises(DataError) as error:
        run(tmp_path, [*rows("w1"), row, *rows("w2"), {"owner": "b"}])
    first, *problems, advice = str(error.value).splitlines()
    assert first == "2 of the 4 rows read cannot be used:"
    assert problems[0].startswith(f"  {tmp_path}/rows.jsonl:2: {problem}")
    assert problems[1].startswith(f"  {tmp_path}/rows.jsonl:4: field 'prompt'")
    assert advice.startswith("Do: ")
    assert names(tmp_path / "out") == set()


def test_a_million_bad_rows_are_not_collected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^1\d\d\d of the \d{4} rows read") as error:
        run(tmp_path, [{"prompt": "w1"}] * 5000)
    assert len(str(error.value).splitlines()) == 23


def test_what_parquet_holds_and_json_cannot(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    source = str(tmp_path / "rows.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["w1"], "owner": ["a"], "picture": [b"\x00"]}), source)
    with pytest.raises(DataError, match=r"rows.parquet row 1: got what cannot be written as JSON .*\(a bytes\)"):
        prepare(source, TOKENIZER, str(tmp_path / "out"))


def test_another_column_may_name_the_owner(tmp_path: Path) -> None:
    report, _ = run(tmp_path, [{"prompt": "w1", "organisation": "x"}], owner="organisation", **ALL_IN_TRAIN)
    assert report.splits["train"]["owners"] == 1
    with pytest.raises(DataError, match=r"rows.jsonl:1: field 'user': got no such column"):
        run(tmp_path, rows("w1"), owner="user")


def test_a_value_of_only_that_no_row_has(tmp_path: Path) -> None:
    """The first ten values that there are may show what was meant."""
    table = [{"prompt": f"w{n}", "owner": "a", "source": f"s{n}"} for n in range(12)]
    with pytest.raises(ConfigError, match=r"only: got 'source=customer', and none of 12 rows") as error:
        run(tmp_path, table, only="source=customer")
    assert "'source' has (found: 's0', 's1', " in str(error.value)
    assert "'s9', ...). Do: check the value." in str(error.value)
    assert names(tmp_path / "out") == set()
    with pytest.raises(ConfigError, match=r"\(found: '7', 'null'\)"):
        run(tmp_path, [{"prompt": f"w{n}", "owner": "a", "n": n} for n in (7, None)], only="n=8")


def test_the_column_of_only_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:1: field 'source': got no such column .* only=source=customer"):
        run(tmp_path, rows("w1"), only="source=customer")


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ({"max_prompt_tokens": 0}, "max_prompt_tokens: got 0; need at least 1"),
        ({"prefix_tokens": 0}, "prefix_tokens: got 0"),
        ({"max_per_owner": -1}, "max_per_owner: got -1"),
        ({"val": -0.1}, "val, test: got -0.1 and 0.1"),
        ({"val": 0.5, "test": 0.5}, "together below 1"),
        ({"val": float("nan")}, "val, test: got nan"),
        ({"only": "customer"}, "only: got 'customer'; need COLUMN=VALUE"),
        ({"only": "source="}, "need COLUMN=VALUE"),
        ({"personal_data_model": "en_core_web_sm"}, "personal_data_model: .* need personal_data='presidio'"),
        ({"tokenizer": "/nowhere"}, "no tokenizer could be loaded from '/nowhere'"),
    ],
)
def test_settings_that_cannot_work(tmp_path: Path, setting: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        run(tmp_path, rows("w1"), **setting)
    assert not (tmp_path / "out").exists()


def test_no_sources(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no sources of prompts"):
        prepare([], TOKENIZER, str(tmp_path))


def test_nothing_to_train_on(tmp_path: Path) -> None:
    for table in (rows("w1", owner=owner_in("test")), rows(f"w1 {EMAIL}", owner=owner_in("train"))):
        with pytest.raises(DataError, match=r"(?s)got no prompts to train on, of 1 read:.*split by owner"):
            run(tmp_path, table)
        assert names(tmp_path / "out") == set()


@pytest.mark.parametrize("name", sorted(FILES))
def test_files_of_an_earlier_run_are_not_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(ConfigError, match=rf"already holds {name}\. Do: .*overwrite=true"):
        run(tmp_path, rows("w1"), overwrite=False)
    assert (tmp_path / "out" / name).read_text() == "mine"
    run(tmp_path, rows("w1"), **ALL_IN_TRAIN)
    assert (tmp_path / "out" / name).read_text() != "mine"
    assert names(tmp_path / "out") == FILES


@pytest.mark.parametrize(
    "step", ["prompt_store.PromptStore.add", "prompt_store.PromptStore.note", "preparation.split_of"]
)
def test_a_run_that_fails_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    run(tmp_path, rows("w1"), **ALL_IN_TRAIN)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def fail(*arguments: Any, **more: Any) -> None:
        raise sqlite3.OperationalError("database or disk is full") if "Store" in step else OSError(28, "No space left")

    monkeypatch.setattr(f"lit_instruct.data.{step}", fail)
    with pytest.raises(ConfigError, match=r"out: writing to .* failed \(.*(is full|No space left).*Do: make room"):
        run(tmp_path, rows("w1", "w2"), **ALL_IN_TRAIN)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_an_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(preparation, "split_of", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, rows("w1"))
    assert names(tmp_path / "out") == set()


def test_the_report_is_moved_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it stands, everything does: an old one does not vouch for new files."""
    run(tmp_path, rows("w1"), **ALL_IN_TRAIN)
    moved: list[str] = []
    replace = Path.replace

    def watched(path: Path, target: Path) -> Path:
        assert not (tmp_path / "out" / "report.json").exists()
        moved.append(target.name)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", watched)
    run(tmp_path, rows("w2"), **ALL_IN_TRAIN)
    assert sorted(moved) == sorted(FILES)
    assert moved[-1] == "report.json"


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in ("file", "file/out"):
        with pytest.raises(ConfigError, match=r"out: got .* need a folder that can be written"):
            run(tmp_path, rows("w1"), out=str(tmp_path / out))


def test_sources_may_lie_where_the_files_go(tmp_path: Path) -> None:
    run(tmp_path, rows("w1", "w2"), **ALL_IN_TRAIN)
    source = str(tmp_path / "out" / "train.jsonl")
    report, splits = run(tmp_path, [], prompts=source, max_prompt_tokens=1, **ALL_IN_TRAIN)
    assert (report.steps[0].left, len(splits["train"])) == (2, 2)


# -- the command


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger("lit_instruct.data.preparation"), "level", logging.NOTSET)
    save_tokenizer(tmp_path / "tokenizer")
    write_jsonl(tmp_path / "a.jsonl", rows(*(words(n, 3) for n in range(8)), owner=owner_in("train")))
    write_jsonl(tmp_path / "b.jsonl", rows(*(words(n, 4) for n in range(8)), owner=owner_in("val")))
    return tmp_path


COMMAND = ["data", "prepare", "--prompts", "a.jsonl", "b.jsonl", "--tokenizer", "tokenizer", "--out", "out"]


def test_the_command_takes_several_files_and_prints_the_table(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*COMMAND, "--max_per_owner", "5", "--owner", "owner"])
    printed = capsys.readouterr().out
    assert [line.split()[-2:] for line in printed.splitlines() if line.startswith("3 ")] == [["6", "10"]]
    report = json.loads((here / "out/report.json").read_text())
    assert report["settings"]["prompts"] == ["a.jsonl", "b.jsonl"]
    assert report["settings"]["max_per_owner"] == 5
    assert len((here / "out/val.jsonl").read_text().splitlines()) == 5


def test_the_command_takes_a_file_of_options(here: Path) -> None:
    options = {"prompts": ["a.jsonl"], "tokenizer": "tokenizer", "out": "out", "max_per_owner": 3, "owner": None}
    Path("prepare.yaml").write_text(yaml.safe_dump(options))
    main(["data", "prepare", "--config", "prepare.yaml", "--val", "0", "--test", "0"])
    assert len((here / "out/train.jsonl").read_text().splitlines()) == 8
    assert json.loads((here / "out/report.json").read_text())["settings"]["max_per_owner"] == 3


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["data"], "need a command: prepare"),
        (["data", "clean"], "need a command: prepare"),
        (["data", "prepare"], "required: prompts, tokenizer, out"),
        ([*COMMAND, "--vall", "0"], "unrecognized arguments: --vall"),
        ([*COMMAND, "--val", "much"], '"val"'),
        ([*COMMAND, "--personal_data", "spell"], '"personal_data"'),
        ([*COMMAND, "--val", "2"], "data prepare: val, test: got 2.0"),
        ([*COMMAND, "--owner", "user"], r"a.jsonl:1: field 'user'"),
        (["data", "prepare", "--prompts", "c.jsonl", *COMMAND[5:]], "c.jsonl: no such file"),
    ],
)
def test_mistakes_on_the_command_line(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], problem: str
) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("lit-instruct: error: data")
    assert problem in printed


def test_the_help_lists_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["data", "prepare", "--help"])
    assert left.value.code == 0
    printed = capsys.readouterr().out
    assert "Most prompts of one owner." in printed
    main(["--help"])
    assert "lit-instruct data prepare" in capsys.readouterr().out
