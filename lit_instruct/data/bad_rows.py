"""Rows that cannot be used: what is said about them, and how they are noted when they are left out.

Whoever finds something wrong with a row says what (``Flaw``); whoever knows where the row stands makes a ``Problem`` of
it. A whole data set is looked through before anything is decided, so that all its problems are told at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from lit_instruct.types import ConfigError, DataError

OnBadRow = Literal["error", "skip"]

SKIPPED_FILE = "skipped_rows.jsonl"

_SHOWN = 20


class Flaw(NamedTuple):
    """What is wrong with a row.

    Attributes:
        field: the column, or a place in it (``ranks[1]``); None: the row as a whole.
        problem: what was got and what is needed.
    """

    field: str | None
    problem: str

    def __str__(self) -> str:
        return self.problem if self.field is None else f"field {self.field!r}: {self.problem}"


class Place(str):
    """Where a row stands: ``FILE:LINE`` or ``FILE row N``, both counted from 1.

    Attributes:
        source: the file or data set, as the user named it.
    """

    source: str

    def __new__(cls, source: str, within: str) -> Place:
        """Join the source with the place within it (``:LINE`` or `` row N``)."""
        place = super().__new__(cls, source + within)
        place.source = source
        return place


class Problem(NamedTuple):
    """A row that cannot be used: where it stands and what is wrong with it."""

    place: Place
    flaw: Flaw

    def __str__(self) -> str:
        return f"{self.place}: {self.flaw}"

    def as_json(self) -> str:
        """One line of the file of skipped rows, without a line break."""
        row = {"source": self.place.source, "place": self.place, **self.flaw._asdict()}
        return json.dumps(row, ensure_ascii=False)


def check_on_bad_row(value: object) -> None:
    """Refuse what is no ``OnBadRow``.

    Raises:
        ConfigError: it is none.
    """
    if value not in get_args(OnBadRow):
        raise ConfigError(f"on_bad_row: got {value!r}; need one of {', '.join(get_args(OnBadRow))}. Do: change it.")


def data_error(headline: str, problems: Sequence[object], advice: str) -> DataError:
    """Build the error that lists what is wrong, row by row.

    Args:
        headline: what failed as a whole.
        problems: one sentence a bad row, each starting with its place; the first 20 are shown.
        advice: what to do, the last line.
    """
    return DataError("\n".join([headline, *listed(problems), f"Do: {advice}"]))


def listed(problems: Sequence[object]) -> list[str]:
    """Lines that show the first 20 problems and count the rest."""
    lines = [f"  {problem}" for problem in problems[:_SHOWN]]
    return lines if len(problems) <= _SHOWN else [*lines, f"  ... and {len(problems) - _SHOWN} more"]


def write_skipped(folder: Path, problems: Iterable[Problem]) -> Path:
    """Write one JSON object a skipped row: ``source``, ``place``, ``field`` (or null) and ``problem``.

    The file takes its name when it is complete, so that a run that ends meanwhile leaves no half of it.

    Args:
        folder: where it goes; made if it is not there.
        problems: the rows; none: the file is empty.

    Returns:
        The file.

    Raises:
        OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SKIPPED_FILE
    part = path.with_name(f".{path.name}.part")
    try:
        # Half a surrogate pair, which UTF-8 does not know, is written as JSON writes it: \udc80.
        with part.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as handle:
            handle.writelines(f"{problem.as_json()}\n" for problem in problems)
            handle.flush()
            os.fsync(handle.fileno())
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    return path
