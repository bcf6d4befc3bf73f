"""Argilla's records, as ``dataset.records.to_json`` writes them, to and from rows of labels.

A record (one task) that is written; ``user_id`` is made of the labeler's name where that is no UUID itself::

    {"id": ..., "fields": {"prompt": ..., "response-1": ..., "response-2": ...},
     "responses": {"ranking": [{"value": ["response-2", "response-1"], "user_id": UUID, "status": "submitted"}],
                   "rating-response-1": [...], "flags-response-1": [...], "note": [...]},
     "suggestions": {}, "vectors": {}, "metadata": {"lit_instruct": JSON text}, "_server_id": null}

Text tasks have the questions ``response``, ``written-prompt`` (with the field ``instruction``) or ``flags``. A ranking
without ties is a list of names, the best first, as version 2 takes and gives it; that form has no ties, so a ranking
with ties is ``[{"value": name, "rank": 1}, ...]``, as the server stores it and version 1 gives it. Both are read, and
so are answers in a list, one for each person: ``{"user_id", "status", "values": {question: {"value": ...}}}``.
"""

from __future__ import annotations

import json
import uuid
from typing import Any

from lit_instruct.feedback.foreign import (
    EXTRA,
    Fields,
    TaskRows,
    beyond,
    expect,
    ranks_of_names,
    read_extra,
)
from lit_instruct.feedback.forms import FormError
from lit_instruct.feedback.rows import Columns, short

_NAMESPACE = uuid.UUID("6f1f3d0e-6f0b-4c52-9a25-6a2a3a0d6c11")
"""Of the ids that are made of names: a name is the same person in every export."""

RANKING, WRITTEN, FLAGS, NOTE = "ranking", "written-prompt", "flags", "note"


def to_record(task: TaskRows) -> Columns:
    """Make a record of a task.

    Args:
        task: with the rows of its labelers.
    """
    first = task.rows[0]
    names = [f"response-{place}" for place in range(1, len(first.get("responses", ())) + 1)]
    if task.kind == "prompts" and "flags" not in first:
        fields = {"instruction": first.get("instruction", "")}
    else:
        fields = {"prompt": first["prompt"]} | dict(zip(names, first.get("responses", ()), strict=True))
    answers: dict[str, list[Columns]] = {}
    extra = {}
    for row in task.rows:
        user = _user_id(row.get("labeler"))
        extra[user] = beyond(row)
        for question, value in _values(task.kind, row, names).items():
            answers.setdefault(question, []).append({"value": value, "user_id": user, "status": "submitted"})
    return {
        "id": task.id,
        "fields": fields,
        "metadata": {EXTRA: json.dumps(extra)},
        "suggestions": {},
        "responses": answers,
        "vectors": {},
        "_server_id": None,
    }


def _user_id(labeler: str | None) -> str:
    try:
        return str(uuid.UUID(labeler or ""))
    except ValueError:
        return str(uuid.uuid5(_NAMESPACE, labeler or ""))


def _values(kind: str, row: Columns, names: list[str]) -> Columns:
    """Answers by question; without those that are empty."""
    values: Columns = {NOTE: row.get("note")}
    if kind == "comparisons":
        values[RANKING] = _ranking_value(names, row["ranks"])
        values |= {f"rating-{name}": rating for name, rating in zip(names, row.get("ratings") or (), strict=False)}
        values |= {f"flags-{name}": flags for name, flags in zip(names, row.get("flags") or (), strict=False)}
    elif kind == "demonstrations":
        values["response"] = row["response"]
    elif "flags" in row:
        values[FLAGS] = row["flags"]
    else:
        values[WRITTEN] = row["prompt"]
    return {question: value for question, value in values.items() if value or question == FLAGS}


def _ranking_value(names: list[str], ranks: list[int]) -> list[Any]:
    ordered = sorted(zip(ranks, names, strict=True), key=lambda pair: pair[0])
    if len(set(ranks)) == len(ranks):
        return [name for _, name in ordered]
    return [{"value": name, "rank": rank} for rank, name in ordered]


def from_record(record: Columns, fields: Fields) -> tuple[list[Columns], int]:
    """Make rows of a record, one of each person who handed in an answer.

    Args:
        record: as it was exported.
        fields: what its fields are called.

    Returns:
        The rows, and how many answers were drafts or discarded.

    Raises:
        FormError: it is no such record.
    """
    shown = expect(record.get("fields"), dict, "fields")
    metadata = expect(record.get("metadata") or {}, dict, "metadata")
    extra = read_extra(metadata.get(EXTRA), f"metadata.{EXTRA}")
    people, left_out = _people(record.get("responses"))
    rows = []
    for user, values in people.items():
        row: Columns = {"labeler": user, **({} if record.get("id") is None else {"id": record["id"]})}
        row |= _row(shown, values, fields)
        rows.append(row if user not in extra else _known(row, extra[user]))
    return rows, left_out


def _known(row: Columns, columns: Columns) -> Columns:
    """A row that this package has exported: labeler and id are as they were, or were not there."""
    return {name: value for name, value in row.items() if name not in ("labeler", "id")} | columns


def _people(responses: Any) -> tuple[dict[str, Columns], int]:
    """Answers that were handed in, by person and question; and how many people's were not."""
    answers = list(_answers(responses or {}))
    unfinished = {user for user, status, _, _ in answers if status not in (None, "submitted")}
    people: dict[str, Columns] = {}
    for user, _, question, value in answers:
        if user not in unfinished:
            people.setdefault(user, {})[question] = value
    return people, len(unfinished)


def _answers(responses: Any) -> list[tuple[str, Any, str, Any]]:
    """(person, status, question, value) of either form."""
    found = []
    if isinstance(responses, dict):
        for question, given in responses.items():
            for index, item in enumerate(expect(given, list, f"responses.{question}")):
                place = f"responses.{question}[{index}]"
                expect(item, dict, place)
                found.append((_user(item, place), item.get("status"), question, item.get("value")))
        return found
    for index, item in enumerate(expect(responses, list, "responses")):
        place = f"responses[{index}]"
        values = expect(expect(item, dict, place).get("values") or {}, dict, f"{place}.values")
        for question, value in values.items():
            inner = expect(value, dict, f"{place}.values.{question}").get("value")
            found.append((_user(item, place), item.get("status"), question, inner))
    return found


def _user(item: Columns, place: str) -> str:
    user = item.get("user_id")
    if not isinstance(user, str | int) or isinstance(user, bool):
        raise FormError(f"{place}.user_id", f"got {short(user)}; need the id of a person")
    return str(user)


def _row(shown: Columns, values: Columns, fields: Fields) -> Columns:
    """What one person said of a task."""
    row: Columns = {NOTE: values[NOTE]} if values.get(NOTE) else {}
    if WRITTEN in values:
        return {"prompt": values[WRITTEN], **row}
    row = {"prompt": _prompt(shown, fields.prompt), **row}
    if (question := _ranking_question(values, shown)) is not None:
        return row | _ranked(shown, values, question, fields.prompt)
    if fields.response in values:
        return {**row, "response": values[fields.response]}
    if FLAGS in values:
        return {**row, FLAGS: values[FLAGS]}
    raise FormError(
        "responses",
        f"got the questions {', '.join(values)}, of which none is a ranking of fields, and none is called "
        f"{fields.response!r}; need one (--response_field names a text question)",
    )


def _prompt(shown: Columns, field: str) -> Any:
    if field not in shown:
        raise FormError(f"fields.{field}", f"got the fields {', '.join(shown)}; need the prompt (--prompt_field)")
    return shown[field]


def _ranking_question(values: Columns, shown: Columns) -> str | None:
    """The question that ranks fields."""
    for question, value in values.items():
        if isinstance(value, list) and value:
            with_ranks = all(isinstance(item, dict) and {"value", "rank"} <= item.keys() for item in value)
            if question == RANKING or with_ranks or all(isinstance(item, str) and item in shown for item in value):
                return question
    return None


def _ranked(shown: Columns, values: Columns, question: str, prompt: str) -> Columns:
    place = f"responses.{question}"
    levels = _levels(values[question], place)
    ranked = [name for level in levels for name in level]
    names = [name for name in shown if name != prompt and name in ranked]
    row: Columns = {"responses": [shown[name] for name in names], "ranks": ranks_of_names(names, levels, place)}
    ratings = [values.get(f"rating-{name}") for name in names]
    flags = [values.get(f"flags-{name}", []) for name in names]
    return row | ({"ratings": ratings} if any(ratings) else {}) | ({"flags": flags} if any(flags) else {})


def _levels(value: list[Any], place: str) -> list[list[Any]]:
    """Names on each level, the best first."""
    if all(isinstance(item, str) for item in value):
        return [[name] for name in value]
    by_rank: dict[int, list[Any]] = {}
    for index, item in enumerate(value):
        here = f"{place}[{index}]"
        rank = expect(item, dict, here).get("rank")
        if type(rank) is not int:
            raise FormError(f"{here}.rank", f"got {short(rank)}; need a whole number, 1 for the best")
        by_rank.setdefault(rank, []).append(item.get("value"))
    return [by_rank[rank] for rank in sorted(by_rank)]
