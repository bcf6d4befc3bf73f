"""Every answer of every labeler, in one SQLite file. See ``database`` for its tables.

A labeler is given one task at a time, under a lease. The lease outlasts a closed tab: whoever comes back gets the same
task with what had been typed. When it has run out, somebody else may get the place; an answer that arrives all the same
is kept. Everything that is written is one transaction.
"""

from __future__ import annotations

import json
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from lit_instruct.feedback.database import connect
from lit_instruct.feedback.forms import Content, Form, inverse, read_skip, rearranged
from lit_instruct.feedback.labels import Label, read_labels
from lit_instruct.feedback.tasks import Task
from lit_instruct.types import DataError

LONGEST_SECONDS = 3600.0
"""More time in view than this is counted as this: somebody left the page open."""


class NotGivenError(LookupError):
    """The task was never given to this labeler."""


class ConflictError(Exception):
    """What is to be written contradicts what was: the task is done already, or the key stands for another event."""


class Given(NamedTuple):
    """A task as its labeler sees it.

    Attributes:
        number: of the task in this database.
        kind: one of ``forms.KINDS``.
        shown: prompt, instruction, and the responses in the labeler's order.
        draft: what has been filled in so far, in the labeler's order; None: nothing.
        seconds: that it has been in view so far.
    """

    number: int
    kind: str
    shown: dict[str, Any]
    draft: Content | None
    seconds: float


class Progress(NamedTuple):
    """How far a labeler is: tasks that were answered, skipped, and that are still to be had."""

    answered: int
    skipped: int
    left: int


class Store:
    """The database of one labelling project.

    Args:
        path: the file; made if it is not there.
        seed: of a new database: which tasks go to several labelers, and in what order they see responses. A database
            that is there keeps its own.
        lease_seconds: for how long a task is kept for the labeler who was given it or last typed there.
        clock: seconds since 1970.

    Raises:
        DataError: the file cannot be used.
    """

    def __init__(
        self, path: Path, *, seed: int = 1, lease_seconds: float = 1800, clock: Callable[[], float] = time.time
    ) -> None:
        self.path = path
        self._lease_seconds = lease_seconds
        self._clock = clock
        self._lock = threading.RLock()  # one connection for all threads: a statement takes well under a millisecond
        self._database = connect(path, seed)
        self._seed = self._one("SELECT value FROM settings WHERE name = 'seed'")[0]

    def close(self) -> None:
        """Close the file; everything has been written before."""
        with self._lock:
            self._database.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # -- tasks and labelers

    def add_tasks(self, tasks: Sequence[Task], *, overlap: float = 0.0, overlap_labelers: int = 2) -> int:
        """Add those tasks that are not there yet.

        Args:
            tasks: with different ids.
            overlap: share of the new tasks that go to several labelers, drawn at random; the others go to one. Tasks
                that say themselves how many they want are not drawn.
            overlap_labelers: how many get such a task.

        Returns:
            How many were new.

        Raises:
            DataError: an id stands for another task in the database.
        """
        with self._write():
            rows = self._database.execute("SELECT id, kind, shown, hidden FROM tasks")
            known = {row["id"]: (row["kind"], row["shown"], row["hidden"]) for row in rows}
            changed = [task.id for task in tasks if known.get(task.id, _columns(task)) != _columns(task)]
            if changed:
                raise DataError(
                    f"{self.path}: got other tasks under ids that it has already: {', '.join(changed[:5])}"
                    f"{' ...' if len(changed) > 5 else ''}.\nDo: give changed tasks new ids, or name a new database."
                )
            new = [task for task in tasks if task.id not in known]
            open_to_draw = [task.id for task in new if task.labelers is None]
            draw = random.Random(f"{self._seed}/{len(known)}")
            several = set(draw.sample(open_to_draw, round(overlap * len(open_to_draw))))
            for task in new:
                wanted = task.labelers or (overlap_labelers if task.id in several else 1)
                self._database.execute(
                    "INSERT INTO tasks (id, kind, shown, hidden, wanted) VALUES (?, ?, ?, ?, ?)",
                    (task.id, *_columns(task), wanted),
                )
        return len(new)

    def add_labelers(self, names: Sequence[str]) -> list[str]:
        """Add those who are not there yet; returns the names of the new ones."""
        with self._write():
            known = {row["name"] for row in self._database.execute("SELECT name FROM labelers")}
            new = [name for name in dict.fromkeys(names) if name not in known]
            self._database.executemany("INSERT INTO labelers (name) VALUES (?)", [(name,) for name in new])
        return new

    def take_labelers(self, hashes: Mapping[str, bytes | None]) -> None:
        """Add the labelers of another database; those who have no link here come in with the one that they have there.

        Args:
            hashes: as ``token_hashes`` of the other one gives them.
        """
        self.add_labelers(list(hashes))
        for name, kept in self.token_hashes().items():
            found = hashes.get(name)
            if kept is None and found is not None:
                self.set_token_hash(name, found)

    def set_token_hash(self, labeler: str, token_hash: bytes) -> None:
        """Let a labeler in with the token of this hash, and no longer with an earlier one."""
        with self._write():
            self._database.execute("UPDATE labelers SET token_hash = ? WHERE name = ?", (token_hash, labeler))

    def token_hashes(self) -> dict[str, bytes | None]:
        """The hash of each labeler's token, by name; None: there is no token yet."""
        return {row["name"]: row["token_hash"] for row in self._all("SELECT name, token_hash FROM labelers")}

    def most_wanted(self) -> int:
        """The largest number of labelers that a task wants; 0: there are no tasks."""
        return int(self._one("SELECT coalesce(max(wanted), 0) FROM tasks")[0])

    # -- what a labeler does

    def give_next(self, labeler: str) -> Given | None:
        """Give a labeler something to do: first what they have been given before, the last one first.

        Args:
            labeler: the name.

        Returns:
            None: there is nothing (now); others may hold leases that will run out.
        """
        with self._write():
            who, now = self._labeler(labeler), self._clock()
            task = self._begun(who, now)
            if task is None:
                task = self._fresh(who, now)
            if task is None:
                return None
            self._assign(who, labeler, task, now)
            return self._given(who, task)

    def save_draft(self, labeler: str, task: int, draft: object, seconds: float) -> None:
        """Keep what has been filled in so far; nothing happens if the task is done.

        Args:
            labeler: the name.
            task: its number.
            draft: in the labeler's order.
            seconds: that the task has been in view.

        Raises:
            NotGivenError: it is not this labeler's.
            FormError: it is no draft of such a task.
        """
        with self._write():
            who, now = self._labeler(labeler), self._clock()
            read = self._form(who, task).draft(draft)
            if self._standing(who, task):
                return
            self._database.execute(
                "UPDATE assignments SET draft = ?, draft_seconds = ?, leased_until = ? WHERE labeler = ? AND task = ?",
                (_json(self._to_task(who, task, read)), seconds, now + self._lease_seconds, who, task),
            )

    def save(self, labeler: str, task: int, kind: str, content: object, *, key: str, seconds: float) -> bool:
        """Save an answer or a skip.

        Args:
            labeler: the name.
            task: its number.
            kind: ``answer`` or ``skip``.
            content: as in ``forms``, in the labeler's order.
            key: made by the sender, new for each event; the same event under the same key is saved once.
            seconds: that the task has been in view; at most the time since it was given is counted.

        Returns:
            Whether it was new.

        Raises:
            NotGivenError: it is not this labeler's.
            FormError: it is no complete answer to such a task, or no skip.
            ConflictError: the task is done, or the key stands for another event.
        """
        with self._write():
            who, now = self._labeler(labeler), self._clock()
            form = self._form(who, task)
            read = self._to_task(who, task, form.answer(content) if kind == "answer" else read_skip(content))
            if self._is_repeated(who, key, kind, task, read):
                return False
            if self._standing(who, task):
                raise ConflictError("this task is done already; undo it to change it")
            given = self._one("SELECT given FROM assignments WHERE labeler = ? AND task = ?", who, task)[0]
            seconds = max(0.0, min(seconds, now - given, LONGEST_SECONDS))
            self._add_event(who, task, kind, read, key=key, seconds=seconds, now=now)
            return True

    def undo(self, labeler: str, *, key: str) -> int | None:
        """Take back the labeler's last answer or skip; an answer becomes the draft of the task, which comes next.

        Args:
            labeler: the name.
            key: as in ``save``.

        Returns:
            The task's number; None: there is nothing to take back.

        Raises:
            ConflictError: the key stands for another event.
        """
        with self._write():
            who, now = self._labeler(labeler), self._clock()
            earlier = self._event(who, key)
            if earlier is not None:
                if earlier["kind"] != "undo":
                    raise ConflictError("this key stands for another event")
                return int(earlier["task"])
            rows = self._all("SELECT * FROM standing WHERE labeler = ? ORDER BY number DESC LIMIT 1", who)
            if not rows:
                return None
            last = rows[0]
            self._add_event(who, last["task"], "undo", {}, key=key, seconds=0.0, now=now)
            self._database.execute(
                "UPDATE assignments SET draft = coalesce(?, draft), draft_seconds = ?, leased_until = ?, turn = ? "
                "WHERE labeler = ? AND task = ?",
                (
                    last["content"] if last["kind"] == "answer" else None,
                    last["seconds"],
                    now + self._lease_seconds,
                    self._next_turn(who),
                    who,
                    last["task"],
                ),
            )
            return int(last["task"])

    # -- what there is

    def progress(self, labeler: str) -> Progress:
        """How far a labeler is."""
        with self._lock:
            who = self._labeler(labeler)
            counts = self._all("SELECT kind, count(*) FROM standing WHERE labeler = ? GROUP BY kind", who)
            done = {row[0]: row[1] for row in counts}
            left = self._one(
                "SELECT count(*) FROM tasks WHERE answers < wanted "
                "AND NOT EXISTS (SELECT 1 FROM standing WHERE task = tasks.number AND labeler = ?)",
                who,
            )[0]
        return Progress(done.get("answer", 0), done.get("skip", 0), left)

    def totals(self) -> tuple[int, int]:
        """How many tasks have as many answers as they want, and how many there are."""
        row = self._one("SELECT coalesce(sum(answers >= wanted), 0), count(*) FROM tasks")
        return row[0], row[1]

    def nothing_left(self) -> bool:
        """Whether there are tasks, and no labeler can be given one (any more): all are answered, or skipped by all."""
        row = self._one(
            "SELECT EXISTS (SELECT 1 FROM tasks) AND NOT EXISTS ("
            "SELECT 1 FROM tasks, labelers WHERE answers < wanted AND NOT EXISTS ("
            "SELECT 1 FROM standing WHERE task = tasks.number AND labeler = labelers.number))"
        )
        return bool(row[0])

    def labels(self) -> list[Label]:
        """What holds now: the last answer or skip of each labeler on each task that was not taken back."""
        with self._lock:
            return list(read_labels(self._database, "standing"))

    def events(self) -> list[Label]:
        """Everything that happened, in order, undos and what they took back included."""
        with self._lock:
            return list(read_labels(self._database, "events"))

    # -- inside a transaction

    @contextmanager
    def _write(self) -> Iterator[None]:
        """One transaction that holds the right to write from its start, so that what it has read stays true."""
        with self._lock:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._database.execute("COMMIT")
            except BaseException:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                raise

    def _all(self, query: str, *values: object) -> list[sqlite3.Row]:
        with self._lock:
            return self._database.execute(query, values).fetchall()

    def _one(self, query: str, *values: object) -> sqlite3.Row:
        return self._all(query, *values)[0]

    def _labeler(self, name: str) -> int:
        return int(self._one("SELECT number FROM labelers WHERE name = ?", name)[0])

    def _begun(self, who: int, now: float) -> int | None:
        """A task that was given to them, is not done, and still theirs: leased, or nobody else took the place."""
        rows = self._all(
            f"""
            SELECT task FROM assignments AS mine JOIN tasks ON tasks.number = mine.task
            WHERE labeler = ?1 AND NOT EXISTS (SELECT 1 FROM standing WHERE task = mine.task AND labeler = ?1)
            AND (leased_until > ?2 OR {_OTHERS} < wanted)
            ORDER BY turn DESC LIMIT 1
            """,
            who,
            now,
        )
        return rows[0][0] if rows else None

    def _fresh(self, who: int, now: float) -> int | None:
        """The first task that they have not had and that wants one more labeler."""
        rows = self._all(
            f"""
            SELECT number AS task FROM tasks
            WHERE NOT EXISTS (SELECT 1 FROM assignments WHERE task = tasks.number AND labeler = ?1)
            AND answers < wanted AND {_OTHERS} < wanted
            ORDER BY number LIMIT 1
            """,
            who,
            now,
        )
        return rows[0][0] if rows else None

    def _assign(self, who: int, labeler: str, task: int, now: float) -> None:
        """Lease a task to a labeler; the first time their order of the responses is drawn."""
        row = self._one("SELECT id, shown FROM tasks WHERE number = ?", task)
        order = list(range(len(json.loads(row["shown"])["responses"])))
        random.Random(f"{self._seed}/{labeler}/{row['id']}").shuffle(order)
        self._database.execute(
            "INSERT INTO assignments (labeler, task, response_order, given, leased_until, turn) "
            "VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET leased_until = excluded.leased_until",
            (who, task, _json(order), now, now + self._lease_seconds, self._next_turn(who)),
        )

    def _next_turn(self, who: int) -> int:
        return int(self._one("SELECT coalesce(max(turn), 0) + 1 FROM assignments WHERE labeler = ?", who)[0])

    def _given(self, who: int, task: int) -> Given:
        rows = self._all(
            "SELECT kind, shown, response_order, draft, draft_seconds FROM assignments "
            "JOIN tasks ON tasks.number = task WHERE labeler = ? AND task = ?",
            who,
            task,
        )
        if not rows:
            raise NotGivenError("this task was not given to you")
        row, order = rows[0], json.loads(rows[0]["response_order"])
        draft = None if row["draft"] is None else rearranged(json.loads(row["draft"]), order)
        return Given(task, row["kind"], rearranged(json.loads(row["shown"]), order), draft, row["draft_seconds"])

    def _form(self, who: int, task: int) -> Form:
        given = self._given(who, task)
        return Form(given.kind, len(given.shown["responses"]))

    def _to_task(self, who: int, task: int, content: Content) -> Content:
        """From the labeler's order of the responses to the task's."""
        row = self._one("SELECT response_order FROM assignments WHERE labeler = ? AND task = ?", who, task)
        return rearranged(content, inverse(json.loads(row[0])))

    def _standing(self, who: int, task: int) -> bool:
        return bool(self._all("SELECT 1 FROM standing WHERE labeler = ? AND task = ?", who, task))

    def _event(self, who: int, key: str) -> sqlite3.Row | None:
        rows = self._all("SELECT * FROM events WHERE labeler = ? AND key = ?", who, key)
        return rows[0] if rows else None

    def _is_repeated(self, who: int, key: str, kind: str, task: int, content: Content) -> bool:
        earlier = self._event(who, key)
        if earlier is None:
            return False
        if (earlier["kind"], earlier["task"], earlier["content"]) != (kind, task, _json(content)):
            raise ConflictError("this key stands for another event")
        return True

    def _add_event(
        self,
        who: int,
        task: int,
        kind: str,
        content: Content,
        *,
        key: str,
        seconds: float,
        now: float,
    ) -> None:
        self._database.execute(
            "INSERT INTO events (key, labeler, task, kind, content, seconds, at) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (key, who, task, kind, _json(content), seconds, now),
        )


_OTHERS = """
(SELECT count(*) FROM (
    SELECT labeler FROM standing WHERE task = tasks.number AND kind = 'answer' AND labeler <> ?1
    UNION
    SELECT labeler FROM assignments AS theirs
    WHERE task = tasks.number AND labeler <> ?1 AND leased_until > ?2
    AND NOT EXISTS (SELECT 1 FROM standing WHERE task = tasks.number AND labeler = theirs.labeler)
))"""
"""Places of a task that are taken by others than labeler ?1 at time ?2: answered, or leased and not yet done."""


def _columns(task: Task) -> tuple[str, str, str]:
    """Kind, what is shown and what is hidden, as they are stored."""
    return task.kind, _json(task.shown), _json(task.hidden)


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True)
