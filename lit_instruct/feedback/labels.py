"""What comes out of the database: events with the tasks they are about."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from typing import Literal, NamedTuple

from lit_instruct.feedback.forms import Content
from lit_instruct.feedback.tasks import Task


class Label(NamedTuple):
    """One event, with the task it is about.

    Attributes:
        number: counts all events of the database.
        key: made by the sender; one event has one, however often it was sent.
        labeler: the name.
        task: what it is about.
        kind: ``answer``, ``skip`` or ``undo``.
        content: as in ``forms``; judgement k is about ``task.responses[k]``.
        response_order: the labeler saw ``task.responses[response_order[i]]`` at place i.
        seconds: that the task was in view.
        at: when it was saved, in seconds since 1970.
    """

    number: int
    key: str
    labeler: str
    task: Task
    kind: str
    content: Content
    response_order: list[int]
    seconds: float
    at: float


def read_labels(database: sqlite3.Connection, table: Literal["events", "standing"]) -> Iterator[Label]:
    """Read a table of events, in the order in which they happened.

    Args:
        database: as ``database.connect`` opens it.
        table: ``events``: all of them; ``standing``: those that hold now.
    """
    rows = database.execute(
        f"""
        SELECT e.*, labelers.name, response_order, id, tasks.kind AS task_kind, shown, hidden, wanted
        FROM {table} AS e
        JOIN labelers ON labelers.number = e.labeler
        JOIN tasks ON tasks.number = e.task
        JOIN assignments ON assignments.labeler = e.labeler AND assignments.task = e.task
        ORDER BY e.number
        """
    )
    for row in rows:
        shown, hidden = json.loads(row["shown"]), json.loads(row["hidden"])
        yield Label(
            number=row["number"],
            key=row["key"],
            labeler=row["name"],
            task=Task(row["id"], row["task_kind"], **shown, **hidden, labelers=row["wanted"]),
            kind=row["kind"],
            content=json.loads(row["content"]),
            response_order=json.loads(row["response_order"]),
            seconds=row["seconds"],
            at=row["at"],
        )
