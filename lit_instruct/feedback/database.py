"""The SQLite file of a labelling project: its tables, and opening it.

``events`` is what happened, in order, and is never changed: triggers refuse it. What holds now is the view
``standing``, which replays them: the last event of a labeler on a task counts, and an undo takes it back. Tasks and
labelers are only added to. ``assignments`` is the one table that changes: who has been given what, until when, and what
has been typed there so far.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from lit_instruct.types import DataError

VERSION = 1
_APPLICATION = 0x4C697446  # "LitF": tells this file from other SQLite databases

_SCHEMA = """
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);

CREATE TABLE labelers (
    number INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    token_hash BLOB  -- SHA-256 of the personal token; null: no link was made
);

CREATE TABLE tasks (
    number INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    kind TEXT NOT NULL,
    shown TEXT NOT NULL,  -- JSON
    hidden TEXT NOT NULL,  -- JSON, kept from labelers: sources of the responses, owner
    wanted INTEGER NOT NULL CHECK (wanted >= 1),  -- labelers
    answers INTEGER NOT NULL DEFAULT 0  -- that stand, see the trigger
);
CREATE INDEX open_tasks ON tasks (number) WHERE answers < wanted;

CREATE TABLE events (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    key TEXT NOT NULL,  -- made by the sender: the same event sent again is not a second one
    labeler INTEGER NOT NULL REFERENCES labelers,
    task INTEGER NOT NULL REFERENCES tasks,
    kind TEXT NOT NULL CHECK (kind IN ('answer', 'skip', 'undo')),
    content TEXT NOT NULL,  -- JSON; responses in the order of the task
    seconds REAL NOT NULL,  -- that the task was in view
    at REAL NOT NULL,  -- seconds since 1970
    UNIQUE (labeler, key)
);
CREATE INDEX events_by_task ON events (task, labeler, number, kind);
CREATE TRIGGER events_stay BEFORE UPDATE ON events BEGIN SELECT RAISE(ABORT, 'events are never changed'); END;
CREATE TRIGGER events_last BEFORE DELETE ON events BEGIN SELECT RAISE(ABORT, 'events are never deleted'); END;

CREATE VIEW standing AS
SELECT * FROM events AS this
WHERE kind <> 'undo' AND NOT EXISTS (
    SELECT 1 FROM events AS later
    WHERE later.task = this.task AND later.labeler = this.labeler AND later.number > this.number
);

-- Counted anew from the events of the task at each of them; with it, open tasks are found without counting all.
CREATE TRIGGER answers_counted AFTER INSERT ON events BEGIN
    UPDATE tasks SET answers = (SELECT count(*) FROM standing WHERE task = NEW.task AND kind = 'answer')
    WHERE number = NEW.task;
END;

CREATE TABLE assignments (
    labeler INTEGER NOT NULL REFERENCES labelers,
    task INTEGER NOT NULL REFERENCES tasks,
    response_order TEXT NOT NULL,  -- JSON: the labeler's response i is the task's response response_order[i]
    given REAL NOT NULL,
    leased_until REAL NOT NULL,
    turn INTEGER NOT NULL,  -- the highest is shown first
    draft TEXT,  -- JSON; responses in the order of the task
    draft_seconds REAL NOT NULL DEFAULT 0,
    PRIMARY KEY (task, labeler)
);
CREATE INDEX assignments_by_labeler ON assignments (labeler, turn);
"""


def connect(path: Path, seed: int) -> sqlite3.Connection:
    """Open the file, and make it if it is not there or empty.

    What has been committed survives the end of the process and of the machine: WAL with ``synchronous=FULL``. Several
    threads (one at a time) and processes may write.

    Args:
        path: of the database.
        seed: of a new database, for the shares and orders that are drawn.

    Raises:
        DataError: it is no labelling database, of another version, or cannot be opened.
    """
    if not path.parent.is_dir():
        raise DataError(f"{path}: got a file in a folder that does not exist.\nDo: make {path.parent}, or check it.")
    try:
        # Transactions are begun by hand (isolation_level None), since reading and writing are one step here.
        connection = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
        try:
            _set_up(connection, path, seed)
        except BaseException:
            connection.close()
            raise
    except sqlite3.Error as error:
        raise DataError(
            f"{path}: got a file that cannot be used as a labelling database ({error}).\n"
            "Do: check its name and permissions, and that the disk is not full; name a new file to begin anew."
        ) from error
    return connection


def _set_up(connection: sqlite3.Connection, path: Path, seed: int) -> None:
    connection.row_factory = sqlite3.Row
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("BEGIN IMMEDIATE")  # of two processes that open a new file one makes the tables
    try:
        if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
            for statement in _statements(_SCHEMA):
                connection.execute(statement)
            connection.execute("INSERT INTO settings VALUES ('seed', ?)", (str(seed),))
            connection.execute(f"PRAGMA application_id = {_APPLICATION}")
            connection.execute(f"PRAGMA user_version = {VERSION}")
        application = connection.execute("PRAGMA application_id").fetchone()[0]
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if application != _APPLICATION:
            raise DataError(f"{path}: got the database of another program.\nDo: name another file.")
        if version != VERSION:
            raise DataError(
                f"{path}: got a labelling database of version {version}; need version {VERSION}.\n"
                "Do: open it with the release of lit-instruct that wrote it."
            )
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def _statements(script: str) -> list[str]:
    """Cut a script into statements; ``executescript`` would commit in between."""
    statements, part = [], ""
    for line in script.splitlines():
        part += f"{line}\n"
        if sqlite3.complete_statement(part):
            statements.append(part)
            part = ""
    return statements
