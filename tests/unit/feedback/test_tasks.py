"""Reading tasks: what is accepted, what is merged, and what every error names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lit_instruct.feedback.forms import FormError
from lit_instruct.feedback.tasks import MAX_SHOWN, read_task, read_tasks
from lit_instruct.types import DataError
from tests.helpers.labelling import rank_row, write_rows

CHAT = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]


def test_all_kinds(tmp_path: Path) -> None:
    rows = [
        rank_row(1, owner="o1"),
        {"task": "demonstrate", "prompt": CHAT, "labelers": 3},
        {"task": "write_prompt", "instruction": "a few-shot prompt"},
        {"task": "flag_prompt", "prompt": "p", "id": 17},
    ]
    rank, demonstrate, write, flag = read_tasks([str(write_rows(tmp_path / "tasks.jsonl", rows))]).tasks
    assert (rank.id, rank.prompt, rank.responses[0]) == ("task-1", "prompt 1", "response 0 to 1")
    assert rank.hidden == {"sources": [[None]] * 4, "columns": {"owner": "o1"}}
    assert (demonstrate.prompt, demonstrate.labelers, demonstrate.responses) == (CHAT, 3, [])
    assert (write.prompt, write.instruction) == (None, "a few-shot prompt")
    assert flag.id == "17"
    assert len({task.id for task in (rank, demonstrate, write, flag)}) == 4


def test_responses_that_are_the_same_text_become_one() -> None:
    task = read_task(rank_row(1) | {"responses": ["a", "b", "a", "a "], "sources": ["m1", {"model": "m2"}, "m3", 4]})
    assert task.responses == ["a", "b", "a "]
    assert task.sources == [["m1", "m3"], [{"model": "m2"}], [4]]


def test_a_pair_of_an_evaluation_is_a_ranking_of_two() -> None:
    pair = {"prompt": "p", "first": "a", "second": "", "choice": "first", "owner": "o1"}
    task = read_task(pair)
    assert (task.kind, task.responses, task.hidden["columns"]) == ("rank", ["a", ""], {"owner": "o1"})
    assert task.id == read_task(pair | {"choice": None}).id
    with pytest.raises(FormError, match="second: got nothing"):
        read_task({"prompt": "p", "first": "a"})
    with pytest.raises(FormError, match="task: got 'rnk'"):
        read_task(pair | {"task": "rnk"})


def test_rows_with_one_response_only_are_left_out_and_told(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "tasks.jsonl", [rank_row(1), rank_row(2) | {"responses": ["a", "a"]}])
    loaded = read_tasks([str(file)])
    assert [task.id for task in loaded.tasks] == ["task-1"]
    assert loaded.alike == [f"{file}:2"]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"task": None}, "task"),
        ({"task": "sort"}, "task"),
        ({"task": ["rank"]}, "task"),
        ({"prompt": None}, "prompt"),
        ({"prompt": " "}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [*CHAT, {"role": "assistant", "content": "hi"}]}, "prompt"),
        ({"prompt": [{"role": "bot", "content": "hi"}]}, "prompt[0].role"),
        ({"prompt": [{"role": "user", "content": ""}]}, "prompt[0].content"),
        ({"prompt": "x" * (MAX_SHOWN + 1)}, "prompt"),
        ({"prompt": "half a \ud83d"}, "prompt"),
        ({"responses": None}, "responses"),
        ({"responses": ["a"]}, "responses"),
        ({"responses": [str(number) for number in range(10)]}, "responses"),
        ({"responses": ["a", None]}, "responses[1]"),
        ({"responses": ["a", "\udc00"]}, "responses[1]"),
        ({"sources": ["one"]}, "sources"),
        ({"sources": "model"}, "sources"),
        ({"labelers": 0}, "labelers"),
        ({"labelers": True}, "labelers"),
        ({"id": 1.5}, "id"),
        ({"id": []}, "id"),
    ],
)
def test_a_bad_field_is_named(change: dict[str, Any], field: str) -> None:
    with pytest.raises(FormError) as raised:
        read_task(rank_row(1) | change)
    assert raised.value.field == field


def test_an_instruction_is_needed_to_write_a_prompt() -> None:
    with pytest.raises(FormError, match="instruction"):
        read_task({"task": "write_prompt"})


def test_hostile_texts_are_read_to_the_letter() -> None:
    texts = ["<script>alert(1)</script>", "a\0b", "\u202eabc", "", "x" * MAX_SHOWN]
    assert read_task(rank_row(1) | {"responses": texts}).responses == texts


def test_all_problems_of_all_files_are_told_at_once(tmp_path: Path) -> None:
    one = write_rows(tmp_path / "one.jsonl", [rank_row(1), rank_row(1), {"task": "rank"}])
    two = tmp_path / "two.jsonl"
    two.write_text("{broken\n" + '{"task": "demonstrate", "prompt": "p"}\n' * 2, encoding="utf-8")
    with pytest.raises(DataError) as raised:
        read_tasks([str(one), str(two)])
    message = str(raised.value)
    assert f"{one}:2: field 'id'" in message
    assert f"{one}:3: field 'prompt'" in message
    assert f"{two}:1: " in message
    assert f"{two}:3: field 'id'" in message  # the same task again, without an id
    assert f"{one}:1" not in message
