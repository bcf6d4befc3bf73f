"""Labels to files and back: what trains, Argilla's and Label Studio's formats, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_instruct import ComparisonDataModule, DemonstrationDataModule, PromptDataModule
from lit_instruct.feedback import argilla, label_studio
from lit_instruct.feedback.access import new_token, token_hash
from lit_instruct.feedback.exchange import main
from lit_instruct.feedback.foreign import Fields
from lit_instruct.feedback.forms import FormError
from lit_instruct.feedback.rows import check_row, kind_of
from lit_instruct.feedback.store import Store
from lit_instruct.feedback.tasks import read_task
from lit_instruct.types import ConfigError, DataError
from tests.helpers.labelling import key, ranking, write_rows
from tests.helpers.tiny import save_tokenizer

SOURCES = [{"model": "a", "seed": 1}, {"model": "b"}, None]
TASKS = [
    {
        "task": "rank",
        "id": "r1",
        "prompt": "w1 w2",
        "responses": ["w3", "w4 w5", "w6"],
        "sources": SOURCES,
        "owner": "o",
    },
    {"task": "rank", "id": "r2", "prompt": [{"role": "user", "content": "w7"}], "responses": ["w8", "", "w9"]},
    {"task": "demonstrate", "id": "d", "prompt": "w2", "owner": "o2", "labeler": "a column of the task's own"},
    {"task": "write_prompt", "id": "w", "instruction": "about w1"},
    {"task": "flag_prompt", "id": "f", "prompt": "w5", "topic": {"deep": [1, None]}},
]
ANSWERS = {
    "ann": [
        ranking([2, 1, 1], rating=6, flags=["opinion"], note='"<b>\u202e'),
        ranking([1, 2, 3]),
        {"response": "w1 w1", "note": ""},
        {"prompt": "w3 w3", "note": "n"},
        {"flags": ["unclear"], "note": ""},
    ],
    "bob@example.org": [
        ranking([1, 2, 3]),
        ranking([1, 1, 1]),
        {"response": "w4", "note": ""},
        {"prompt": "w2", "note": ""},
        {"flags": [], "note": ""},
    ],
}


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """Two labelers who did every task; the last one of a third was skipped."""
    path = tmp_path / "labels.sqlite"
    with Store(path) as store:
        store.add_tasks([read_task({**task, "labelers": 3}) for task in TASKS])
        store.add_labelers([*ANSWERS, "eve"])
        for name, answers in ANSWERS.items():
            for content in answers:
                given = store.give_next(name)
                if given.kind == "rank":  # the answers above are in the order of the task
                    order = [TASKS[given.number - 1]["responses"].index(text) for text in given.shown["responses"]]
                    content = {**content, "responses": [content["responses"][index] for index in order]}
                store.save(name, given.number, "answer", content, key=key(), seconds=0)
        given = store.give_next("eve")
        store.save("eve", given.number, "skip", {"reason": "unclear", "note": ""}, key=key(), seconds=0)
    return path


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def everything(folder: Path) -> dict[str, list[str]]:
    """Every row of every file, in no order."""
    return {path.name: sorted(json.dumps(row, sort_keys=True) for row in rows_of(path)) for path in folder.iterdir()}


def test_an_export_holds_what_was_said(database, tmp_path):
    main(["export", str(database), "--out", str(tmp_path / "out")])
    comparisons = rows_of(tmp_path / "out" / "comparisons.jsonl")
    assert [row["labeler"] for row in comparisons] == ["ann", "ann", "bob@example.org", "bob@example.org"]
    first = comparisons[0]
    assert first["prompt"] == "w1 w2"
    assert first["responses"] == ["w3", "w4 w5", "w6"]
    assert first["ranks"] == [2, 1, 1]
    assert first["ratings"] == [6, 6, 6]
    assert first["flags"] == [["opinion"]] * 3
    assert first["owner"] == "o"
    assert first["sources"] == [[source] for source in SOURCES]
    demonstrations = rows_of(tmp_path / "out" / "demonstrations.jsonl")
    assert [(row["prompt"], row["response"], row["labeler"]) for row in demonstrations] == [
        ("w2", "w1 w1", "ann"),
        ("w2", "w4", "bob@example.org"),
    ]
    assert demonstrations[0]["columns"] == {"labeler": "a column of the task's own"}
    written, flagged, *_ = rows_of(tmp_path / "out" / "prompts.jsonl")
    assert (written["prompt"], written["owner"], written["instruction"]) == ("w3 w3", "ann", "about w1")
    assert (flagged["prompt"], flagged["flags"], flagged["topic"]) == ("w5", ["unclear"], {"deep": [1, None]})


def test_responses_without_text_are_left_out_and_told(database, tmp_path, capsys):
    """A response of nothing cannot be learnt from; the ranking closes up behind it."""
    main(["export", str(database), "--out", str(tmp_path / "out")])
    second = rows_of(tmp_path / "out" / "comparisons.jsonl")[1]
    assert second["responses"] == ["w8", "w9"]
    assert second["ranks"] == [1, 2]
    assert len(second["ratings"]) == len(second["flags"]) == len(second["sources"]) == 2
    assert "no text: 2 responses" in capsys.readouterr().out


def test_the_data_modules_read_an_export(database, tmp_path):
    main(["export", str(database), "--out", str(tmp_path / "out")])
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    kept = {"tokenizer": tokenizer, "batch_size": 1}
    modules = [
        ComparisonDataModule(str(tmp_path / "out" / "comparisons.jsonl"), **kept),
        DemonstrationDataModule(str(tmp_path / "out" / "demonstrations.jsonl"), **kept),
        PromptDataModule(str(tmp_path / "out" / "prompts.jsonl"), **kept),
    ]
    batches = []
    for module in modules:
        module.setup("fit")
        batches.append(next(iter(module.train_dataloader())))
    assert batches[0].labeler_B is not None
    assert set(batches[0].ranks_N.tolist()) <= {1, 2, 3}
    assert len(batches[1].input_ids_BT) == len(batches[2].prompt_ids_BP) == 1


@pytest.mark.parametrize("form", ["argilla", "label-studio"])
def test_another_programs_format_and_back_loses_nothing(database, tmp_path, form):
    main(["export", str(database), "--out", str(tmp_path / "direct")])
    main(["export", str(database), "--out", str(tmp_path / form), "--format", form])
    main(["import", str(tmp_path / form / f"{form}.json"), "--out", str(tmp_path / "back"), "--format", form])
    assert everything(tmp_path / "back") == everything(tmp_path / "direct")


@pytest.mark.parametrize("form", ["argilla", "label-studio"])
def test_rows_of_files_go_there_and_back(tmp_path, form):
    """Rows without labeler, ratings or id; one labeler twice; gaps in the ranks close."""
    rows = [
        {"prompt": "p", "responses": ["a", "b"], "ranks": [5, 1]},
        {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 1], "labeler": 7, "ratings": [None, 3]},
        {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 2], "labeler": 7, "flags": [["sexual"], []]},
        {"prompt": "p", "chosen": "a", "rejected": "b", "labeler": "7d444840-9dc0-11d1-b245-5ffdce74fad2"},
    ]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    main(["export", str(source), "--out", str(tmp_path / "direct")])
    main(["export", str(source), "--out", str(tmp_path / form), "--format", form])
    main(["import", str(tmp_path / form / f"{form}.json"), "--out", str(tmp_path / "back"), "--format", form])
    assert everything(tmp_path / "back") == everything(tmp_path / "direct")
    assert [row["ranks"] for row in rows_of(tmp_path / "direct" / "comparisons.jsonl")] == [
        [2, 1],
        [1, 1],
        [1, 2],
        [1, 2],
    ]


@pytest.mark.parametrize("form", ["jsonl", "argilla", "label-studio"])
def test_no_token_is_exported(database, tmp_path, form):
    token = new_token()
    with Store(database) as store:
        store.set_token_hash("ann", token_hash(token))
    main(["export", str(database), "--out", str(tmp_path / "out"), "--format", form])
    text = "".join(path.read_text(encoding="utf-8") for path in (tmp_path / "out").iterdir())
    assert "ann" in text
    assert token not in text
    assert token_hash(token).hex() not in text
    assert "token" not in text


def test_files_that_exist_are_kept(database, tmp_path):
    (tmp_path / "comparisons.jsonl").write_text("mine")
    with pytest.raises(ConfigError, match="overwrite"):
        main(["export", str(database), "--out", str(tmp_path)])
    assert (tmp_path / "comparisons.jsonl").read_text() == "mine"
    assert not (tmp_path / "prompts.jsonl").exists()
    main(["export", str(database), "--out", str(tmp_path), "--overwrite"])
    assert rows_of(tmp_path / "comparisons.jsonl")


def test_a_database_that_does_not_exist_is_not_made(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        main(["export", str(tmp_path / "labels.sqlite"), "--out", str(tmp_path / "out")])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match="no such file"):
        main(["export", "not_there.sqlite", "--out", str(tmp_path / "out")])


# -- files of the other programs, in their documented formats

USER, OTHER = "acc2c3d4-0000-4000-8000-000000000001", "acc2c3d4-0000-4000-8000-000000000002"


def imported(tmp_path: Path, form: str, records: Any, *options: str) -> dict[str, list[dict[str, Any]]]:
    source = tmp_path / "theirs.json"
    source.write_text(json.dumps(records), encoding="utf-8")
    main(["import", str(source), "--out", str(tmp_path / "out"), "--format", form, *options])
    return {path.stem: rows_of(path) for path in (tmp_path / "out").iterdir()}


def test_argilla_2_records_load(tmp_path):
    """As ``to_json`` writes a dataset: answers by question, rankings as names."""
    record = {
        "id": "5",
        "fields": {"instruction": "Say hello.", "reply-1": "Hello", "reply-2": "Hi", "reply-3": "Go away"},
        "metadata": {"split": "train"},
        "suggestions": {"preference": {"value": ["reply-1", "reply-2", "reply-3"], "score": None, "agent": "m"}},
        "responses": {
            "preference": [
                {"value": ["reply-2", "reply-1", "reply-3"], "user_id": USER},
                {"value": ["reply-3", "reply-1", "reply-2"], "user_id": OTHER, "status": "discarded"},
            ],
            "why": [{"value": "shorter", "user_id": USER}],
        },
        "vectors": {},
        "_server_id": "3b6c",
    }
    rows = imported(tmp_path, "argilla", [record], "--prompt_field", "instruction")
    assert rows == {
        "comparisons": [
            {
                "labeler": USER,
                "id": "5",
                "prompt": "Say hello.",
                "responses": ["Hello", "Hi", "Go away"],
                "ranks": [2, 1, 3],
            }
        ]
    }


def test_argilla_1_records_load(tmp_path, capsys):
    """Answers by person, rankings with ranks and ties; a text question."""
    ties = [{"rank": 1, "value": "b"}, {"rank": 1, "value": "a"}, {"rank": 3, "value": "c"}]
    records = [
        {
            "fields": {"prompt": "p", "a": "A", "b": "B", "c": "C"},
            "responses": [
                {"user_id": USER, "status": "submitted", "values": {"order": {"value": ties}}},
                {"user_id": OTHER, "status": "draft", "values": {"order": {"value": ties[:1]}}},
            ],
        },
        {
            "fields": {"prompt": "p2"},
            "responses": [{"user_id": USER, "status": "submitted", "values": {"answer": {"value": "mine"}}}],
        },
        {"fields": {"prompt": "not yet looked at"}, "responses": []},
    ]
    rows = imported(tmp_path, "argilla", records, "--response_field", "answer")
    assert rows["comparisons"][0]["ranks"] == [1, 1, 2]
    assert rows["demonstrations"] == [{"labeler": USER, "prompt": "p2", "response": "mine"}]
    assert "1 answers" in capsys.readouterr().out


ITEMS = [{"id": "blog", "title": "t", "body": "B"}, {"id": "mdn", "title": "M"}, {"id": 3, "body": "W"}]


def ranked(value: Any, **more: Any) -> dict[str, Any]:
    result = {"value": {"ranker": value}, "id": "x", "from_name": "rank", "to_name": "results", "type": "ranker"}
    annotation = {"id": 1, "completed_by": {"id": 4, "email": "a@b.c"}, "result": [result], "lead_time": 4.5, **more}
    return {"id": 17, "data": {"prompt": "p", "items": ITEMS}, "annotations": [annotation], "predictions": []}


@pytest.mark.parametrize(
    ("value", "options", "ranks"),
    [
        ({"rank": ["mdn", "3", "blog"]}, (), [3, 1, 2]),
        (["mdn", "3", "blog"], (), [3, 1, 2]),
        ({"tier 2": ["blog"], "tier 1": ["3", "mdn"]}, (), [2, 1, 1]),
        ({"tier 10": ["blog"], "tier 9": ["3", "mdn"]}, (), [2, 1, 1]),
        ({"bad": ["blog"], "good": ["3", "mdn"], "_": []}, ("--buckets", "good,middling,bad"), [2, 1, 1]),
        ({"good": ["blog", "3", "mdn"]}, ("--buckets", "good,bad"), [1, 1, 1]),
    ],
)
def test_label_studio_rankings_load(tmp_path, value, options, ranks):
    rows = imported(tmp_path, "label-studio", [ranked(value), ranked(value, was_cancelled=True)], *options)
    wanted = {"prompt": "p", "responses": ["B", "M", "W"], "ranks": ranks, "labeler": "a@b.c", "id": 17, "seconds": 4.5}
    assert rows == {"comparisons": [wanted]}


def test_label_studio_texts_load(tmp_path):
    area = {"value": {"text": ["one", "two"]}, "from_name": "answer", "to_name": "q", "type": "textarea"}
    task = {"data": {"question": "p"}, "annotations": [{"completed_by": 2, "result": [area]}]}
    rows = imported(tmp_path, "label-studio", [task], "--prompt_field", "question", "--response_field", "answer")
    assert rows == {"demonstrations": [{"prompt": "p", "response": "one\ntwo", "labeler": "2"}]}


# -- what is refused

FINE = {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 2]}


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"ranks": [1]}, "ranks"),
        ({"ranks": [0, 1]}, "ranks[0]"),
        ({"ranks": [True, 1]}, "ranks[0]"),
        ({"ranks": [1.0, 2]}, "ranks[0]"),
        ({"ranks": None}, "ranks"),
        ({"responses": "ab"}, "responses"),
        ({"responses": ["a"]}, "responses"),
        ({"responses": ["a", "\ud800"]}, "responses[1]"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": [{"role": "user"}]}, "prompt"),
        ({"prompt": "\udfff"}, "prompt"),
        ({"ratings": [8, 1]}, "ratings[0]"),
        ({"flags": [["made up"], []]}, "flags[0][0]"),
        ({"labeler": ["ann"]}, "labeler"),
        ({"at": float("nan")}, "at"),
        ({"seconds": -1}, "seconds"),
        ({"sources": [1]}, "sources"),
    ],
)
def test_bad_rows_are_refused_by_line_and_field(tmp_path, changes, field):
    source = write_rows(tmp_path / "rows.jsonl", [FINE, {**FINE, **changes}])
    with pytest.raises(DataError) as error:
        main(["export", str(source), "--out", str(tmp_path / "out")])
    assert f"rows.jsonl:2: field '{field}'" in str(error.value)
    assert not (tmp_path / "out").exists()


def argilla_record(**changes: Any) -> dict[str, Any]:
    answers = {"ranking": [{"value": ["a", "b"], "user_id": USER}]}
    return {"id": "1", "fields": {"prompt": "p", "a": "A", "b": "B"}, "responses": answers, **changes}


@pytest.mark.parametrize(
    ("record", "field"),
    [
        (argilla_record(fields=[]), "fields"),
        (argilla_record(fields={"q": "p"}), "fields.prompt"),
        (argilla_record(fields={"prompt": "p", "a": "A", "b": 3}), "responses[1]"),
        (argilla_record(responses={"ranking": [{"value": ["a", "c"], "user_id": USER}]}), "responses.ranking"),
        (argilla_record(responses={"ranking": [{"value": ["a", "a"], "user_id": USER}]}), "responses.ranking"),
        (argilla_record(responses={"ranking": [{"value": ["a", {}], "user_id": USER}]}), "responses.ranking[0]"),
        (argilla_record(responses={"ranking": ["a"]}), "responses.ranking[0]"),
        (argilla_record(responses={"ranking": [{"value": ["a", "b"]}]}), "responses.ranking[0].user_id"),
        (argilla_record(responses={"score": [{"value": 3, "user_id": USER}]}), "responses"),
        (argilla_record(responses=[{"user_id": USER, "values": []}, 3]), "responses[1]"),
        (argilla_record(responses=3), "responses"),
        (argilla_record(metadata={"lit_instruct": "{"}), "metadata.lit_instruct"),
        (argilla_record(metadata={"lit_instruct": "[" * 100_000}), "metadata.lit_instruct"),
        (argilla_record(metadata={"lit_instruct": json.dumps({USER: {"ranks": [9, 9]}})}), "metadata.lit_instruct"),
        (argilla_record(metadata={"lit_instruct": json.dumps({USER: {"at": "now"}})}), "at"),
    ],
)
def test_bad_argilla_records_are_refused_by_row_and_field(tmp_path, record, field):
    with pytest.raises(DataError) as error:
        imported(tmp_path, "argilla", [argilla_record(), record])
    assert f"theirs.json row 2: field '{field}'" in str(error.value)


@pytest.mark.parametrize(
    ("task", "field"),
    [
        (ranked({"rank": ["mdn", "3"]}), "annotations[0].result[0].value.ranker"),
        (ranked({"rank": ["mdn", "3", "blog", "blog"]}), "annotations[0].result[0].value.ranker"),
        (ranked({"rank": ["none"]}), "annotations[0].result[0].value.ranker"),
        (ranked({"rank": 3}), "annotations[0].result[0].value.ranker.rank"),
        (ranked({"good": ["mdn"], "bad": ["3", "blog"]}), "annotations[0].result[0].value.ranker"),
        (ranked({"a1": ["mdn"], "_": ["3", "blog"]}), "annotations[0].result[0].value.ranker._"),
        (ranked(None), "annotations[0].result[0].value.ranker"),
        (ranked([], completed_by=None, result=[]), "annotations[0].result"),
        (ranked({"rank": ["mdn", "3", "blog"]}, completed_by=None), "annotations[0].completed_by"),
        ({"annotations": []}, "data"),
        ({"data": {}, "annotations": 3}, "annotations"),
        ({"data": {}, "annotations": [{"completed_by": 1, "result": []}]}, "data.prompt"),
    ],
)
def test_bad_label_studio_tasks_are_refused_by_row_and_field(tmp_path, task, field):
    with pytest.raises(DataError) as error:
        imported(tmp_path, "label-studio", [ranked({"rank": ["mdn", "3", "blog"]}), task])
    assert f"theirs.json row 2: field '{field}'" in str(error.value)


# -- anything at all

LEAVES = st.none() | st.booleans() | st.integers(-2, 9) | st.floats() | st.text(max_size=3)
NAMES = st.sampled_from(["a", "b", "3", "mdn", "blog", "rank", "prompt", "value", "rating-a", "note"])
VALUES = st.recursive(
    LEAVES | NAMES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3), max_leaves=8
)
RATED = {"type": "rating", "from_name": "rating-mdn", "value": {"rating": 3}}
FLAGGED = {"type": "choices", "from_name": "flags-mdn", "value": {"choices": ["opinion"]}}
NOTED = {"type": "textarea", "from_name": "note", "value": {"text": ["n"]}}


def whole_records() -> list[tuple[Any, dict[str, Any]]]:
    """A good row of each format, with all that it may hold."""
    answers = {"rating-a": [{"value": 3, "user_id": USER}], "flags-a": [{"value": ["opinion"], "user_id": USER}]}
    answers |= {"ranking": [{"value": [{"value": "a", "rank": 1}, {"value": "b", "rank": 2}], "user_id": USER}]}
    argilla_1 = [{"user_id": USER, "status": "submitted", "values": {"ranking": {"value": ["a", "b"]}}}]
    extra = {"lit_instruct": json.dumps({USER: {"labeler": "ann", "at": 3.0}})}
    task = ranked({"tier 1": ["mdn", "3"], "tier 2": ["blog"]})
    task["annotations"][0]["result"] += [RATED, FLAGGED, NOTED]
    row = {**FINE, "ratings": [1, 2], "flags": [["sexual"], []], "labeler": "l", "note": "", "id": "i"}
    return [
        (argilla.from_record, argilla_record(responses=answers, metadata=extra)),
        (argilla.from_record, argilla_record(responses=argilla_1)),
        (label_studio.from_task, task),
        (
            lambda row, fields: ([row], 0),
            {**row, "sources": [1, 2], "seconds": 1.0, "at": 2, "instruction": "", "columns": {"a": 1}},
        ),
    ]


def paths(value: Any) -> list[tuple[Any, ...]]:
    """Where every part of a value stands."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [(), *((name, *path) for name, part in inner for path in paths(part))]


def with_part(value: Any, path: tuple[Any, ...], part: Any) -> Any:
    if not path:
        return part
    changed = copy.copy(value)
    changed[path[0]] = with_part(value[path[0]], path[1:], part)
    return changed


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_whatever_stands_in_a_record_is_read_or_refused(data):
    """One part of a good record becomes something else: nothing but a FormError is raised, and what is read trains."""
    read, record = data.draw(st.sampled_from(whole_records()))
    changed = with_part(record, data.draw(st.sampled_from(paths(record)[1:])), data.draw(VALUES))
    try:
        rows = [check_row(row) for row in read(changed, Fields())[0]]
    except FormError:
        return
    for row in rows:
        json.dumps(row)
        assert isinstance(row.get("labeler"), str | None)
        assert isinstance(row.get("note"), str | None)
        assert isinstance(row.get("id"), str | int | None)
        if kind_of(row) == "comparisons":
            assert all(isinstance(text, str) for text in row["responses"])
            assert set(row["ranks"]) == set(range(1, len(set(row["ranks"])) + 1))


@pytest.mark.parametrize("number", range(4))
def test_the_good_records_are_read(number):
    read, record = whole_records()[number]
    assert [kind_of(check_row(row)) for row in read(record, Fields())[0]] == ["comparisons"]
