"""Prompts on disk while they are prepared: memory stays the same however many there are.

A throw-away SQLite file. The unique key of a prompt's beginning removes duplicates as rows come in, and one query
finds who has too many; both need an index or a sort that need not fit into memory.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

_CACHE_KIB = 65536
_BATCH = 1024

_TABLES = """
CREATE TABLE prompts (
    number INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, owner TEXT NOT NULL, priority BLOB NOT NULL,
    tokens INTEGER NOT NULL, wanted INTEGER NOT NULL, line TEXT NOT NULL
);
CREATE TABLE written (split TEXT NOT NULL, owner TEXT NOT NULL);
"""

_TOO_MANY = """
SELECT number FROM
    (SELECT number, row_number() OVER (PARTITION BY owner ORDER BY priority, number) AS place FROM prompts)
WHERE place > ?
"""


class StoredPrompt(NamedTuple):
    """A row while it is prepared.

    Attributes:
        key: digest of its beginning; no two stored prompts have the same.
        owner: who wrote it.
        priority: of an owner's prompts those with the lowest are kept.
        tokens: its length.
        wanted: it goes into the files.
        line: the whole row as JSON.
    """

    key: bytes
    owner: str
    priority: bytes
    tokens: int
    wanted: bool
    line: str


class PromptStore:
    """Prompts in a file, in the order in which they came.

    Args:
        path: of a file that does not exist; whoever made the folder removes it.
    """

    def __init__(self, path: Path) -> None:
        self._database = sqlite3.connect(path, isolation_level=None)
        for setting in ("journal_mode=OFF", "synchronous=OFF", "locking_mode=EXCLUSIVE", f"cache_size=-{_CACHE_KIB}"):
            self._database.execute(f"PRAGMA {setting}")
        self._database.executescript(_TABLES)
        self._database.execute("BEGIN")  # never committed: the file outlives no run

    def close(self) -> None:
        """Let go of the file."""
        self._database.close()

    def add(self, prompts: Iterable[StoredPrompt]) -> int:
        """Store prompts whose key is new, and count them."""
        return self._database.executemany(
            "INSERT OR IGNORE INTO prompts (key, owner, priority, tokens, wanted, line) VALUES (?, ?, ?, ?, ?, ?)",
            prompts,
        ).rowcount

    def cap(self, most: int) -> int:
        """Remove what an owner has beyond ``most`` prompts, and count it."""
        return self._database.execute(f"DELETE FROM prompts WHERE number IN ({_TOO_MANY})", (most,)).rowcount

    def __iter__(self) -> Iterator[tuple[int, StoredPrompt]]:
        """All prompts with their numbers; ``rekey`` and ``note`` may be called meanwhile."""
        last = 0
        while True:
            rows = self._database.execute(
                "SELECT number, key, owner, priority, tokens, wanted, line FROM prompts WHERE number > ? "
                "ORDER BY number LIMIT ?",
                (last, _BATCH),
            ).fetchall()
            if not rows:
                return
            for number, key, owner, priority, tokens, wanted, line in rows:
                yield number, StoredPrompt(key, owner, priority, tokens, bool(wanted), line)
            last = rows[-1][0]

    def rekey(self, number: int, key: bytes) -> bool:
        """Give a prompt another key; False, and nothing changes, if another prompt has it."""
        # OR IGNORE and not an error: without a journal a statement that fails cannot be undone.
        done = self._database.execute("UPDATE OR IGNORE prompts SET key = ? WHERE number = ?", (key, number))
        return done.rowcount == 1

    def note(self, split: str, owner: str) -> None:
        """Note that a prompt of this owner was written."""
        self._database.execute("INSERT INTO written VALUES (?, ?)", (split, owner))

    def owners(self, split: str) -> int:
        """How many owners have written prompts in this split."""
        query = "SELECT COUNT(DISTINCT owner) FROM written WHERE split = ?"
        return int(self._database.execute(query, (split,)).fetchone()[0])
