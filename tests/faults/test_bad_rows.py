"""``on_bad_row``: rows that cannot be used end the run with all that is wrong, or are left out, counted and listed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lit_instruct import (
    ComparisonDataModule,
    DemonstrationDataModule,
    PretrainingDataModule,
    PromptDataModule,
)
from lit_instruct.cli import main
from lit_instruct.data.bad_rows import Flaw, Place, Problem, write_skipped
from lit_instruct.data.preparation import prepare
from lit_instruct.data.records import read_comparisons
from lit_instruct.types import ConfigError, DataError
from tests.helpers.tiny import TEMPLATE, ids, save_model, save_tokenizer, tiny_tokenizer

USER = {"role": "user", "content": "w1"}
REFUSING = "{% if messages[0].role == 'system' %}{{ raise_exception('no system message') }}{% endif %}" + TEMPLATE
GOOD = [
    {"prompt": f"w{n}", "response": f"w{n} w1", "responses": ["w1", "w2"], "ranks": [1, 2], "text": "w1 w2 w3 w4"}
    for n in range(4)
]
SYSTEM = [{"role": "system", "content": "w1"}, USER]

KINDS: dict[str, Any] = {
    "demonstrations": DemonstrationDataModule,
    "comparisons": ComparisonDataModule,
    "prompts": PromptDataModule,
    "text": PretrainingDataModule,
}


def lines(path: Path, *rows: Any) -> str:
    """One row a line; a text is written as it is."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def skipped(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "skipped_rows.jsonl").read_text().splitlines()]


def module_of(kind: str, source: str, *, template: str = TEMPLATE, **more: Any) -> Any:
    settings = {"val": 0.0, "batch_size": 1, "on_bad_row": "skip"} | more
    if kind == "text":
        settings |= {"chunk_tokens": 2}
    return KINDS[kind](source, tiny_tokenizer(template=template), **settings)


def set_up(kind: str, source: str, *, rank: int = 0, folder: str | None = None, **more: Any) -> Any:
    module = module_of(kind, source, **more)
    module.trainer = SimpleNamespace(
        world_size=2,
        global_rank=rank,
        accumulate_grad_batches=1,
        lightning_module=None,
        log_dir=folder,
        default_root_dir="root",
    )
    module.batch_size = 2
    module.setup("fit")
    return module


# Three rows that cannot be used, each found at another step: parsing, validating, encoding.
BAD: dict[str, list[tuple[Any, str | None, str]]] = {
    "demonstrations": [
        ("{", None, "got invalid JSON"),
        ({"prompt": "w1"}, "response", "got no such column"),
        ({"prompt": SYSTEM, "response": "w1"}, "prompt", "no system message"),
        ({"prompt": "w1", "response": "w1 <eos> w2"}, "response", "got the end-of-text token '<eos>' as token 2 of 4"),
    ],
    "comparisons": [
        ("[1]", None, "got a list"),
        ({"prompt": "w1", "responses": ["w1", "w2"], "ranks": [1, float("nan")]}, "ranks[1]", "got nan"),
        ({"prompt": SYSTEM, "responses": ["w1", "w2"], "ranks": [1, 2]}, "prompt", "no system message"),
        ({"prompt": "w1", "chosen": "w1", "rejected": "<eos> w2"}, "response 2", "as token 1 of 3"),
    ],
    "prompts": [
        ("{", None, "got invalid JSON"),
        ({"prompt": None}, "prompt", "got null"),
        ({"prompt": SYSTEM}, "prompt", "no system message"),
    ],
    "text": [("{", None, "got invalid JSON"), ({"text": " "}, "text", "got an empty text")],
}


@pytest.mark.parametrize("kind", KINDS)
def test_skip_keeps_the_other_rows_and_lists_these(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    bad = [row for row, _, _ in BAD[kind]]
    source = lines(tmp_path / "rows.jsonl", GOOD[0], *bad, *GOOD[1:])
    clean = module_of(kind, lines(tmp_path / "clean.jsonl", *GOOD), template=REFUSING)
    clean.setup("fit")
    assert skipped(tmp_path) == []
    assert "left out" not in caplog.text
    module = module_of(kind, source, template=REFUSING)
    module.setup("fit")
    as_lists = [list(map(str, m.samples.train)) for m in (module, clean)]
    assert as_lists[0] == as_lists[1]
    assert len(as_lists[0]) >= len(GOOD)
    for number, (found, (_, field, problem)) in enumerate(zip(skipped(tmp_path), BAD[kind], strict=True), start=2):
        assert (found["source"], found["place"], found["field"]) == (source, f"{source}:{number}", field)
        assert problem in found["problem"]
    (told,) = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert told == (
        f"on_bad_row=skip: left out {len(bad)} of {len(bad) + 4} rows. Do: read skipped_rows.jsonl, which lists them."
    )


@pytest.mark.parametrize("kind", KINDS)
def test_error_tells_all_at_once_whichever_step_found_it(kind: str, tmp_path: Path) -> None:
    bad = [row for row, _, _ in BAD[kind]]
    source = lines(tmp_path / "rows.jsonl", *GOOD, *bad)
    with pytest.raises(DataError) as error:
        module_of(kind, source, template=REFUSING, on_bad_row="error").setup("fit")
    first, *problems, advice = str(error.value).splitlines()
    assert first == f"{len(bad)} of {len(bad) + 4} rows cannot be used as {kind}:"
    for number, (line, (_, field, problem)) in enumerate(zip(problems, BAD[kind], strict=True), start=5):
        assert line.startswith(f"  {source}:{number}: " + (f"field {field!r}: " if field else ""))
        assert problem in line
    assert advice.startswith("Do: mend or remove these rows, or set on_bad_row to skip to leave them out.")


def test_error_is_what_happens_unless_asked_otherwise(tmp_path: Path) -> None:
    source = lines(tmp_path / "rows.jsonl", *GOOD, "{")
    for kind, cls in KINDS.items():
        with pytest.raises(DataError, match=f"1 of 5 rows cannot be used as {kind}"):
            cls(source, tiny_tokenizer()).setup("fit")


@pytest.mark.parametrize("kind", KINDS)
def test_something_must_be_left(kind: str, tmp_path: Path) -> None:
    source = lines(tmp_path / "rows.jsonl", *[row for row, _, _ in BAD[kind]])
    count = len(BAD[kind])
    with pytest.raises(DataError, match=f"{count} of {count} rows cannot be used as {kind}:") as error:
        module_of(kind, source, template=REFUSING).setup("fit")
    assert "on_bad_row" not in str(error.value)  # no advice that would not help


def test_all_data_of_a_run_are_in_one_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sources = {name: lines(tmp_path / f"{name}.jsonl", *GOOD, "{") for name in ("train", "val", "test", "demos")}
    module = module_of(
        "comparisons", sources["train"], val=sources["val"], test=sources["test"], demonstrations=sources["demos"]
    )
    module.setup("fit")
    assert {row["source"] for row in skipped(tmp_path)} == set(sources.values())
    module.setup("validate")
    assert len(skipped(tmp_path)) == 4
    module.trainer = SimpleNamespace(
        world_size=1,
        global_rank=0,
        accumulate_grad_batches=1,
        lightning_module=SimpleNamespace(sample_token_limit=30),
        log_dir=str(tmp_path),
        default_root_dir="",
    )
    module.setup("fit")  # read again, for another limit
    assert len(skipped(tmp_path)) == 4


def test_every_rank_keeps_the_same_rows_and_one_of_them_tells(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = lines(tmp_path / "rows.jsonl", GOOD[0], "{", *GOOD[1:], {"prompt": "w1"}, "[]")
    kept, told = [], []
    for rank in range(2):
        caplog.clear()
        module = set_up("demonstrations", source, rank=rank, folder=str(tmp_path / f"of{rank}"))
        kept.append(module.samples.train)
        told.append(caplog.text.count("left out 3 of 7 rows"))
    assert kept[0] == kept[1]
    assert told == [1, 0]
    assert [path.name for path in tmp_path.glob("of*")] == ["of0"]


def test_the_list_lies_where_the_logs_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = lines(tmp_path / "rows.jsonl", *GOOD, "{")
    set_up("prompts", source, folder="logs/version_3")
    assert len(skipped(tmp_path / "logs/version_3")) == 1
    set_up("prompts", source, folder=None)  # a logger without a folder
    assert len(skipped(tmp_path / "root")) == 1


def test_long_prompts_are_another_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = lines(tmp_path / "rows.jsonl", *GOOD, "{", {"prompt": "w1 " * 20, "response": "w1"})
    with pytest.raises(DataError, match=r"1 of 5 samples have more tokens than allowed"):
        module_of("demonstrations", source, max_length=10).setup("fit")
    module = module_of("demonstrations", source, max_length=10, long_prompt="drop")
    module.setup("fit")
    assert [sample.prompt_ids for sample in module.samples.train] == [ids(f"w{n} :") for n in range(4)]
    assert len(skipped(tmp_path)) == 1


def test_a_row_takes_its_labeler_and_its_columns_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept after a row that is left out in the middle still belongs together."""
    monkeypatch.chdir(tmp_path)
    rows = [{**row, "labeler": f"l{n}", "key": n} for n, row in enumerate(GOOD)]
    rows[1]["responses"] = ["w1 <eos> w2", "w3"]
    rows[2]["responses"] = ["w5", "w6", "w7"]
    rows[2]["ranks"] = [3, 1, 2]
    source = lines(tmp_path / "rows.jsonl", *rows)
    module = module_of("comparisons", source)
    module.setup("fit")
    found = {module.labelers[s.labeler]: (s.responses_ids, s.ranks) for s in module.samples.train}
    assert set(found) == {"l0", "l2", "l3"}
    assert found["l2"] == ([ids("w5 <eos>"), ids("w6 <eos>"), ids("w7 <eos>")], [3, 1, 2])
    rows[1]["prompt"] = SYSTEM
    module = module_of("prompts", lines(tmp_path / "rows.jsonl", *rows), template=REFUSING)
    module.setup("fit")
    assert [(s.row["key"], s.prompt_ids) for s in module.samples.train] == [(n, ids(f"w{n} :")) for n in (0, 2, 3)]


@pytest.mark.parametrize("broken", ["mkdir", "fsync", "replace"])
def test_a_list_that_cannot_be_written_does_not_end_the_run(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The rows are told in the warning instead, and an older list stays whole."""
    source = lines(tmp_path / "rows.jsonl", *GOOD, *["{"] * 30)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "skipped_rows.jsonl").write_text("old\n")

    def full(*arguments: Any, **more: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(*((os, "fsync") if broken == "fsync" else (Path, broken)), full)
        module = set_up("prompts", source, folder=str(tmp_path / "logs"))
    assert len(module.samples.train) == 4
    assert "left out 30 of 34 rows. They could not be listed in" in caplog.text
    assert "No space left on device" in caplog.text
    assert f"{source}:24: got invalid JSON" in caplog.text
    assert "... and 10 more" in caplog.text
    assert (tmp_path / "logs" / "skipped_rows.jsonl").read_text() == "old\n"
    assert os.listdir(tmp_path / "logs") == ["skipped_rows.jsonl"]


def test_the_list_holds_any_name_and_text(tmp_path: Path) -> None:
    """A file name that is not UTF-8, and what JSON must escape."""
    problem = Problem(Place("caf\udce9.jsonl", ":1"), Flaw(None, 'got "é\n\u2028"'))
    (row,) = map(json.loads, write_skipped(tmp_path, [problem]).read_bytes().split(b"\n")[:-1])
    assert row == {
        "source": "caf\udce9.jsonl",
        "place": "caf\udce9.jsonl:1",
        "field": None,
        "problem": 'got "é\n\u2028"',
    }


@pytest.mark.parametrize("value", ["ignore", None, True])
def test_the_choice_is_checked_at_construction(value: Any) -> None:
    for cls in KINDS.values():
        with pytest.raises(ConfigError, match=r"on_bad_row: got .*; need one of error, skip"):
            cls("rows.jsonl", tiny_tokenizer(), on_bad_row=value)


# What a row may hold.


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"responses": ["w1"] * 10_000, "ranks": [1, *[2] * 9999]}, "'responses': got 10,000; need at most 1,000"),
        ({"responses": [], "ranks": []}, "'responses': got 0; need at least 2"),
        ({"responses": ["w1", [None]]}, "'responses[1]': got [None] (list)"),
        ({"responses": None}, "'responses': got null; need a list"),
        ({"ranks": [1.0, 2.0]}, "'ranks[0]': got 1.0 (float); need an integer"),
        ({"ranks": [-1, 2]}, "'ranks[0]': got -1 (int); need an integer of at least 1"),
        ({"ranks": [1, 2**31]}, "'ranks[1]': got 2147483648 (int); need at most 2,147,483,647"),
        ({"ranks": [1, 10**400]}, "'ranks[1]': got 1000000000000000000000000000000000000... (int); need at most"),
        ({"ranks": [1, float("inf")]}, "'ranks[1]': got inf (float)"),
        ({"ranks": "12"}, "'ranks': got '12' (str); need a list"),
        ({"ranks": [[1], [2]]}, "'ranks[0]': got [1] (list)"),
        ({"prompt": [{"role": None, "content": "w1"}]}, "'prompt[0].role': got null; need one of system, user"),
        ({"prompt": [{"role": ["user"], "content": "w1"}]}, "'prompt[0].role': got ['user'] (list)"),
        ({"prompt": [{"role": "user", "content": None}]}, "'prompt[0].content': got null"),
        ({"prompt": [[]]}, "'prompt[0]': got [] (list)"),
        ({"prompt": "\u2003\n"}, "'prompt': got an empty text"),
        ({"labeler": ["ann"]}, "'labeler': got ['ann'] (list); need a name or a number"),
        ({"labeler": float("nan")}, "'labeler': got nan (float)"),
        ({"labeler": ""}, "'labeler': got an empty text"),
        ({"labeler": "\ud800"}, "'labeler': got half a surrogate pair"),
    ],
)
def test_rankings_that_cannot_be_used(changes: dict[str, Any], problem: str, tmp_path: Path) -> None:
    source = lines(tmp_path / "rows.jsonl", GOOD[0], {**GOOD[1], **changes})
    with pytest.raises(DataError) as error:
        read_comparisons(source)
    assert f"{source}:2: field {problem}" in str(error.value)


def test_a_thousand_responses_can_be_ranked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    row = {"prompt": "w1", "responses": [f"w{n % 30}" for n in range(1000)], "ranks": list(range(1, 1001))}
    module = module_of("comparisons", lines(tmp_path / "rows.jsonl", row))
    module.setup("fit")
    (batch,) = module.train_dataloader()
    assert batch.ranks_N.tolist() == row["ranks"]
    assert batch.response_ids_NR[:, 0].tolist() == [ids(text)[0] for text in row["responses"]]


def test_ids_that_stand_twice_are_told_and_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        {**GOOD[0], "id": 7},
        {**GOOD[1], "id": "7"},
        {**GOOD[2], "id": 7},
        {**GOOD[3], "id": None},
        GOOD[3],
        GOOD[3],
    ]
    source = lines(tmp_path / "rows.jsonl", *rows)
    other = lines(tmp_path / "more.jsonl", {**GOOD[0], "id": "7"})
    module = module_of("demonstrations", [source, other], on_bad_row="error")
    module.setup("fit")
    assert len(module.samples.train) == 7  # the same row twice may be meant: it weighs twice
    (told,) = [record.getMessage() for record in caplog.records if "id" in record.getMessage()]
    assert told.splitlines() == [
        "2 rows of demonstrations have an id that stands in an earlier row; all are used:",
        f"  {source}:3: id 7 stands in {source}:1 too",
        f"  {other}:1: id '7' stands in {source}:2 too",
        "Do: check whether data were added twice.",
    ]


def test_what_two_labelers_say_about_one_task_was_not_added_twice(tmp_path: Path) -> None:
    row = {"prompt": "w1", "responses": ["w2", "w3"], "ranks": [1, 2], "id": 7}
    source = lines(tmp_path / "rows.jsonl", *({**row, "labeler": name} for name in ("ann", "bob", "ann")))
    assert read_comparisons(source).repeated_ids == [f"{source}:3: id 7 stands in {source}:1 too"]


# The commands.


def test_the_command_line_leaves_rows_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "base")
    lines(tmp_path / "d.jsonl", *GOOD, *GOOD, "{", {"prompt": "w1"})
    command = "sft fit --config sft/default.yaml --model.base base --data.demonstrations d.jsonl --data.batch_size 8"
    more = "--trainer.max_epochs 1 --data.val 0 --trainer.accelerator cpu --trainer.devices 1 --trainer.logger false"
    with pytest.raises(SystemExit):
        main(f"{command} {more}".split())
    assert "d.jsonl:9: got invalid JSON" in capfd.readouterr().err
    assert not (tmp_path / "runs" / "sft" / "skipped_rows.jsonl").exists()
    main(f"{command} {more} --data.on_bad_row skip".split())
    assert [row["place"] for row in skipped(tmp_path / "runs" / "sft")] == ["d.jsonl:9", "d.jsonl:10"]


def test_cross_validation_leaves_rows_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    dealt: list[int] = []

    def deal(records: list[Any], **settings: Any) -> None:
        dealt.append(len(records))
        raise ConfigError("enough seen")

    monkeypatch.setattr("lit_instruct.evaluation.cross_validation.make_folds", deal)
    lines(tmp_path / "c.jsonl", *GOOD, "{")
    command = "rm cross-validate --out cv --config rm/default.yaml --model.base base --data.comparisons c.jsonl"
    for more, said in (([], "1 of 5 rows cannot be used"), (["--data.on_bad_row", "skip"], "enough seen")):
        with pytest.raises(SystemExit):
            main([*command.split(), *more])
        assert said in capfd.readouterr().err
    assert dealt == [4]
    assert [row["place"] for row in skipped(tmp_path / "cv")] == ["c.jsonl:5"]


def prepared(folder: Path, *rows: Any, template: str = TEMPLATE, **more: Any) -> Any:
    source = lines(folder / "rows.jsonl", *rows)
    settings = {"val": 0.0, "test": 0.0, "owner": None, "on_bad_row": "skip"} | more
    return prepare(source, save_tokenizer(folder / "tokenizer", template=template), str(folder / "out"), **settings)


def test_data_prepare_leaves_rows_out(tmp_path: Path) -> None:
    bad = [row for row, _, _ in BAD["prompts"]]
    report = prepared(tmp_path, GOOD[0], *bad, *GOOD[1:], template=REFUSING)
    assert [(step.name, step.removed, step.left) for step in report.steps][:2] == [
        ("prompts", 0, 7),
        ("on_bad_row", 3, 4),
    ]
    assert "3 rows were left out; skipped_rows.jsonl lists them." in report.table()
    assert [row["place"] for row in skipped(tmp_path / "out")] == [f"{tmp_path}/rows.jsonl:{n}" for n in (2, 3, 4)]
    assert len((tmp_path / "out" / "train.jsonl").read_text().splitlines()) == 4
    report = prepared(tmp_path, *GOOD, overwrite=True)
    assert skipped(tmp_path / "out") == []
    prepared(tmp_path, *GOOD, overwrite=True, on_bad_row="error")
    assert not (tmp_path / "out" / "skipped_rows.jsonl").exists()  # an old list does not speak of new files
    with pytest.raises(DataError, match=r"(?s)3 of the 7 rows .*:4: field 'prompt': .*no system message.*--on_bad_row"):
        prepared(tmp_path, GOOD[0], *bad, *GOOD[1:], template=REFUSING, overwrite=True, on_bad_row="error")
    with pytest.raises(DataError, match="3 of the 3 rows read cannot be used"):
        prepared(tmp_path, *bad, template=REFUSING, overwrite=True)
    with pytest.raises(ConfigError, match="on_bad_row: got 'no'; need one of error, skip"):
        prepared(tmp_path, *GOOD, overwrite=True, on_bad_row="no")
