"""What the formats of other labelling programs have in common: one record a task, with what several labelers said.

Rows of one task are brought together for them and taken apart again. What a row holds beyond the fields of the other
program travels along as JSON under the name ``lit_instruct``, so that nothing is lost on the way there and back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from lit_instruct.data.sources import Row, stream_rows
from lit_instruct.feedback.forms import FormError
from lit_instruct.feedback.rows import Columns, LabelRows, check_row, empty_rows, kind_of, refuse, short

EXTRA = "lit_instruct"

_NATIVE = frozenset(["prompt", "responses", "ranks", "ratings", "flags", "response", "note"])


class Fields(NamedTuple):
    """What the fields of a foreign project are called.

    Attributes:
        prompt: the field with the prompt.
        response: the text question whose answer is a demonstration.
        buckets: Label Studio's buckets, the best first; empty: they end in numbers, the lowest is best.
    """

    prompt: str = "prompt"
    response: str = "response"
    buckets: tuple[str, ...] = ()


class TaskRows(NamedTuple):
    """The rows of one task, one of each labeler.

    Attributes:
        kind: ``comparisons``, ``demonstrations`` or ``prompts``.
        id: of the task; None: it has none.
        rows: at least one.
    """

    kind: str
    id: str | None
    rows: list[Columns]


def by_task(rows: LabelRows) -> list[TaskRows]:
    """Bring the rows of each task together, in the order of the rows.

    A labeler who is there twice for one task is given another record, since programs keep one answer a person.
    """
    tasks: dict[str, TaskRows] = {}
    for row in (*rows.comparisons, *rows.demonstrations, *rows.prompts):
        kind = kind_of(row)
        written = kind == "prompts" and "flags" not in row  # by the labeler: a task of others may be another prompt
        shown = [kind, row.get("id"), None if written and "id" in row else row["prompt"], row.get("responses"), written]
        number = 0
        while (key := json.dumps([*shown, number])) in tasks and _has(tasks[key], row.get("labeler")):
            number += 1
        tasks.setdefault(key, TaskRows(kind, row.get("id"), [])).rows.append(row)
    return list(tasks.values())


def _has(task: TaskRows, labeler: str | None) -> bool:
    return any(row.get("labeler") == labeler for row in task.rows)


def beyond(row: Columns) -> Columns:
    """What a row holds that other programs have no field for.

    That is the labeler's name too, since they number people, and fields without content, which they do not keep.
    """
    return {name: value for name, value in row.items() if name not in _NATIVE or _is_empty(value)}


def _is_empty(value: Any) -> bool:
    return not value or (isinstance(value, list) and not any(value))


def read_foreign(sources: Sequence[str], read: Callable[[Columns], tuple[list[Columns], int]]) -> tuple[LabelRows, int]:
    """Read files of another program.

    Args:
        sources: ``.json`` or ``.jsonl`` files.
        read: makes rows of a record, and says how many answers it left out; raises FormError.

    Returns:
        The rows, and how many answers were left out since they were not handed in.

    Raises:
        DataError: records that cannot be used, with place and field.
    """
    rows, problems, left_out = empty_rows(), [], 0
    for item in _records(sources):
        if not isinstance(item, Row):
            problems.append(str(item))
            continue
        try:
            found, unfinished = read(item.columns)
            checked = [check_row(row) for row in found]
        except FormError as error:
            problems.append(f"{item.place}: field {error.field!r}: {error.problem}")
            continue
        left_out += unfinished
        for row in checked:
            rows.add(row)
    refuse(problems, "labels")
    return rows, left_out


def _records(sources: Sequence[str]) -> Iterator[object]:
    for source in sources:
        yield from stream_rows(source)


def read_extra(value: Any, field: str) -> dict[str, Columns]:
    """Read what an export of this package has sent along: columns by the program's name of the labeler.

    Args:
        value: JSON text; None: there is nothing.
        field: where it stands.

    Raises:
        FormError: it is not what was written.
    """
    if value is None:
        return {}
    try:
        extra = json.loads(value) if isinstance(value, str) else None
    except (ValueError, RecursionError) as error:
        raise FormError(field, "got text that is not JSON; leave it as it was exported, or remove it") from error
    if not isinstance(extra, dict) or not all(isinstance(columns, dict) for columns in extra.values()):
        raise FormError(field, f"got {short(value)}; need it as it was exported, or remove it")
    for columns in extra.values():
        if taken := sorted(name for name in _NATIVE & columns.keys() if not _is_empty(columns[name])):
            raise FormError(field, f"got the columns {', '.join(taken)}, which stand elsewhere; remove them there")
    return extra


def ranks_of_names(names: Sequence[str], levels: Sequence[Sequence[Any]], field: str) -> list[int]:
    """Ranks of the responses that bear these names.

    Args:
        names: of the responses, in their order.
        levels: names on each level, the best first.
        field: where the levels stand.

    Raises:
        FormError: a name is there twice, is not there, or is not one of them.
    """
    ranks: dict[str, int] = {}
    for rank, level in enumerate([level for level in levels if level], start=1):
        for name in level:
            if not isinstance(name, str) or name not in names:
                raise FormError(field, f"got {short(name)}; need one of {', '.join(names)}")
            if name in ranks:
                raise FormError(field, f"got {name!r} twice; need it once")
            ranks[name] = rank
    if missing := [name for name in names if name not in ranks]:
        raise FormError(field, f"got no rank of {', '.join(missing)}; need all responses ranked")
    return [ranks[name] for name in names]


def expect(value: Any, kind: type, field: str) -> Any:
    """Return a value of the type it must have.

    Raises:
        FormError: it has another.
    """
    if not isinstance(value, kind):
        needed = {"dict": "an object", "list": "a list", "str": "a text"}[kind.__name__]
        raise FormError(field, f"got {short(value)}; need {needed}")
    return value
