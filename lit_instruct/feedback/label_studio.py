"""Label Studio's tasks, as its JSON export writes them, to and from rows of labels.

A task that is written, with one annotation of each labeler; ``completed_by`` counts labelers, or is their e-mail::

    {"data": {"prompt": ..., "responses": [{"id": "response-1", "body": ...}, ...], "lit_instruct": JSON text},
     "annotations": [{"completed_by": 1, "was_cancelled": false, "lead_time": 41.5, "result": [
        {"type": "ranker", "value": {"ranker": {"rank-1": ["response-2"], "rank-2": ["response-1"]}}, ...},
        {"type": "rating", "from_name": "rating-response-1", "value": {"rating": 6}, ...},
        {"type": "choices", "from_name": "flags-response-1", "value": {"choices": ["hallucination"]}, ...},
        {"type": "textarea", "from_name": "note", "value": {"text": ["..."]}, ...}]}], "predictions": []}

Responses of one bucket are tied. Text tasks have a ``textarea`` called ``response`` or ``written-prompt``, or
``choices`` called ``flags``. What is read may also be a ranking without buckets, a list of ids, the best first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
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

WRITTEN, FLAGS, NOTE = "written-prompt", "flags", "note"
_VALUES = {"ranker": "ranker", "rating": "rating", "choices": "choices", "textarea": "text"}
"""Type of a result to the name under which its value stands."""


def to_task(task: TaskRows, numbers: Mapping[str | None, int]) -> Columns:
    """Make a task of this format.

    Args:
        task: with the rows of its labelers.
        numbers: of the labelers.
    """
    first = task.rows[0]
    names = [f"response-{place}" for place in range(1, len(first.get("responses", ())) + 1)]
    data: Columns = {"prompt": first["prompt"]}
    if task.kind == "prompts" and "flags" not in first:
        data = {"instruction": first.get("instruction", "")}
    if names:
        data["responses"] = [{"id": name, "body": text} for name, text in zip(names, first["responses"], strict=True)]
    people = [_completed_by(row.get("labeler"), numbers) for row in task.rows]
    data[EXTRA] = json.dumps({_person(who): beyond(row) for who, row in zip(people, task.rows, strict=True)})
    annotations = [
        {
            "completed_by": who,
            "was_cancelled": False,
            "lead_time": row.get("seconds"),
            "result": [
                _result(number, name, kind, value)
                for number, (name, kind, value) in enumerate(_answers(task.kind, row, names), start=1)
            ],
        }
        for who, row in zip(people, task.rows, strict=True)
    ]
    return {"data": data, "annotations": annotations, "predictions": []}


def _completed_by(labeler: str | None, numbers: Mapping[str | None, int]) -> Any:
    return {"email": labeler} if labeler and "@" in labeler else numbers[labeler]


def _person(completed_by: Any) -> str:
    return str(completed_by["email"] if isinstance(completed_by, dict) else completed_by)


def _answers(kind: str, row: Columns, names: list[str]) -> list[tuple[str, str, Any]]:
    """(name, type, value) of each field that was filled in."""
    found: list[tuple[str, str, Any]] = []
    if kind == "comparisons":
        levels = {f"rank-{place}": rank for place, rank in enumerate(sorted(set(row["ranks"])), start=1)}
        pairs = list(zip(names, row["ranks"], strict=True))
        buckets = {bucket: [name for name, rank in pairs if rank == level] for bucket, level in levels.items()}
        found.append(("ranking", "ranker", buckets))
        found += [(f"rating-{n}", "rating", value) for n, value in zip(names, row.get("ratings") or (), strict=False)]
        found += [(f"flags-{n}", "choices", value) for n, value in zip(names, row.get("flags") or (), strict=False)]
    elif kind == "demonstrations":
        found.append(("response", "textarea", [row["response"]]))
    elif "flags" in row:
        found.append((FLAGS, "choices", row["flags"]))
    else:
        found.append((WRITTEN, "textarea", [row["prompt"]]))
    if row.get("note"):
        found.append((NOTE, "textarea", [row["note"]]))
    return [answer for answer in found if answer[2] or answer[0] == FLAGS]


def _result(number: int, name: str, kind: str, value: Any) -> Columns:
    to_name = "responses" if kind == "ranker" else "prompt"
    return {
        "id": f"result-{number}",
        "from_name": name,
        "to_name": to_name,
        "type": kind,
        "value": {_VALUES[kind]: value},
    }


def from_task(task: Columns, fields: Fields) -> tuple[list[Columns], int]:
    """Make rows of a task, one of each annotation.

    Args:
        task: as it was exported.
        fields: what its fields are called.

    Returns:
        The rows, and how many annotations were cancelled.

    Raises:
        FormError: it is no such task.
    """
    data = expect(task.get("data"), dict, "data")
    extra = read_extra(data.get(EXTRA), f"data.{EXTRA}")
    rows, cancelled = [], 0
    for index, annotation in enumerate(expect(task.get("annotations"), list, "annotations")):
        place = f"annotations[{index}]"
        if expect(annotation, dict, place).get("was_cancelled"):
            cancelled += 1
            continue
        row = _row(data, _results(annotation.get("result"), f"{place}.result"), fields, f"{place}.result")
        who = _labeler(annotation.get("completed_by"), f"{place}.completed_by")
        rows.append(row | (extra[who] if who in extra else _about(task, annotation, who)))
    return rows, cancelled


def _about(task: Columns, annotation: Columns, who: str) -> Columns:
    about = {"labeler": who, "id": task.get("id"), "seconds": annotation.get("lead_time")}
    return {name: value for name, value in about.items() if value is not None}


def _labeler(value: Any, place: str) -> str:
    """A number, or an object with e-mail or number."""
    if isinstance(value, dict):
        value = value.get("email", value.get("id"))
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise FormError(place, f"got {short(value)}; need the number of a person, or an object with 'email' or 'id'")
    return str(value)


def _results(value: Any, place: str) -> list[tuple[str, str, Any, str]]:
    """(name, type, value, place) of the results that are read here; other types are passed over."""
    found = []
    for index, result in enumerate(expect(value, list, place)):
        here = f"{place}[{index}]"
        kind = expect(result, dict, here).get("type")
        if isinstance(kind, str) and kind in _VALUES:
            here = f"{here}.value"
            inner = expect(result.get("value"), dict, here)
            found.append((str(result.get("from_name")), kind, inner.get(_VALUES[kind]), f"{here}.{_VALUES[kind]}"))
    return found


def _row(data: Columns, results: list[tuple[str, str, Any, str]], fields: Fields, place: str) -> Columns:
    """What one person said of a task."""
    named = {name: (value, here) for name, _, value, here in results}
    row: Columns = {NOTE: _text(*named[NOTE])} if NOTE in named else {}
    if WRITTEN in named:
        return {"prompt": _text(*named[WRITTEN]), **row}
    if fields.prompt not in data:
        raise FormError(f"data.{fields.prompt}", f"got {', '.join(data)}; need the prompt (--prompt_field)")
    row = {"prompt": data[fields.prompt], **row}
    rankings = [(value, here) for _, kind, value, here in results if kind == "ranker"]
    if rankings:
        return row | _ranked(data, *rankings[0], named, fields)
    if fields.response in named:
        return {**row, "response": _text(*named[fields.response])}
    if FLAGS in named:
        return {**row, FLAGS: named[FLAGS][0]}
    raise FormError(
        place,
        f"got results called {', '.join(named) or '(none)'}, of which none is a ranking, and none is called "
        f"{fields.response!r}; need one (--response_field names a text area)",
    )


def _text(value: Any, place: str) -> str:
    """The text of a text area, which is a list of its submissions."""
    parts = [value] if isinstance(value, str) else expect(value, list, place)
    return "\n".join(expect(part, str, f"{place}[{index}]") for index, part in enumerate(parts))


def _ranked(data: Columns, value: Any, place: str, named: Mapping[str, tuple[Any, str]], fields: Fields) -> Columns:
    levels = _levels(value, place, fields.buckets)
    texts = _items(data, {name for level in levels for name in level if isinstance(name, str)}, place)
    names = list(texts)
    row: Columns = {"responses": list(texts.values()), "ranks": ranks_of_names(names, levels, place)}
    ratings = [named.get(f"rating-{name}", (None, ""))[0] for name in names]
    flags = [named.get(f"flags-{name}", ([], ""))[0] for name in names]
    return row | ({"ratings": ratings} if any(ratings) else {}) | ({"flags": flags} if any(flags) else {})


def _levels(value: Any, place: str, order: tuple[str, ...]) -> list[list[Any]]:
    """Ids on each level, the best first: of buckets, or of one list."""
    if isinstance(value, list):
        return [[name] for name in value]
    buckets = {name: expect(ids, list, f"{place}.{name}") for name, ids in expect(value, dict, place).items()}
    if unsorted := buckets.pop("_", []):
        raise FormError(f"{place}._", f"got {len(unsorted)} responses in no bucket; need all in buckets")
    if len(buckets) == 1 and not order:
        ids = next(iter(buckets.values()))
        # A lone bucket of a ranking with buckets holds responses that are all tied.
        return [ids] if "rank-1" in buckets else [[name] for name in ids]
    if order:
        if unknown := [name for name in buckets if name not in order]:
            raise FormError(place, f"got the buckets {', '.join(unknown)}; need some of {', '.join(order)}")
        return [buckets.get(name, []) for name in order]
    numbers = {name: re.search(r"(\d+)$", name) for name in buckets}
    if not all(numbers.values()):
        raise FormError(
            place, f"got the buckets {', '.join(buckets)}; need names that end in numbers, or --buckets BEST,...,WORST"
        )
    return [buckets[name] for name in sorted(buckets, key=lambda name: int(numbers[name][0]))]  # type: ignore[index]


def _items(data: Columns, ranked: set[str], place: str) -> dict[str, Any]:
    """Text by id of the list in the data whose items were ranked."""
    for name, items in data.items():
        if isinstance(items, list) and items and all(isinstance(item, dict) and "id" in item for item in items):
            texts = {str(item["id"]): item.get("body", item.get("title")) for item in items}
            if len(texts) != len(items):
                raise FormError(f"data.{name}", "got an id twice; need different ones")
            if ranked & texts.keys():
                return texts
    raise FormError(place, "got ids that no list in 'data' has; need a list of items {'id', 'body'}")
