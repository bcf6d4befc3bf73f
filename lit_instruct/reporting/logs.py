"""Read what a run logged: TensorBoard's event files, or the ``metrics.csv`` of Lightning's CSVLogger."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from google.protobuf.message import DecodeError
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

from lit_instruct.types import DataError

EVENT_FILES = "events.out.tfevents.*"
CSV_FILE = "metrics.csv"

Curve = dict[int, float]
"""Step -> value, steps ascending."""

_TEXT_SUFFIX = "/text_summary"  # SummaryWriter.add_text adds it to the name


class Session(NamedTuple):
    """One process that wrote: a run that was interrupted and resumed has several.

    Attributes:
        started: seconds since 1970, of the first event.
        seconds: from the first event to the last one.
    """

    started: float
    seconds: float


class Log(NamedTuple):
    """All that was read.

    Attributes:
        curves: metric -> step -> value.
        texts: name -> step -> text, as given to ``add_text``.
        sessions: in order; empty where the log has no times.
    """

    curves: dict[str, Curve]
    texts: dict[str, dict[int, str]]
    sessions: list[Session]


def has_log(folder: Path) -> bool:
    """Whether a logger wrote into this very folder."""
    return (folder / CSV_FILE).is_file() or any(folder.glob(EVENT_FILES))


def read_logs(folders: Iterable[Path]) -> Log:
    """Read the folders that one run logged to, as one.

    Args:
        folders: the earliest first. A step that was logged again, after a resume, has its last value.

    Returns:
        The log.

    Raises:
        DataError: a file is of another kind, or has a cell that is no number.
    """
    log = Log({}, {}, [])
    for folder in folders:
        # Their names begin with the time at which they were opened.
        for path in sorted(folder.glob(EVENT_FILES)):
            _read_events(path, log)
        if (folder / CSV_FILE).is_file():
            _read_csv(folder / CSV_FILE, log)
    return Log(
        {name: dict(sorted(log.curves[name].items())) for name in sorted(log.curves)},
        {name: dict(sorted(log.texts[name].items())) for name in sorted(log.texts)},
        log.sessions,
    )


def _read_events(path: Path, log: Log) -> None:
    """Add an event file up to its end, or to where a crash cut it off."""
    times: list[float] = []
    try:
        for event in LegacyEventFileLoader(str(path)).Load():
            times.append(event.wall_time)
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    log.curves.setdefault(value.tag, {})[event.step] = value.simple_value
                elif value.tag.endswith(_TEXT_SUFFIX) and value.tensor.string_val:
                    text = value.tensor.string_val[0].decode("utf-8", errors="replace")
                    log.texts.setdefault(value.tag.removesuffix(_TEXT_SUFFIX), {})[event.step] = text
    except DecodeError as error:
        raise DataError(
            f"{path}: holds records that are not TensorBoard's. Do: move the file out of the folder."
        ) from error
    if times:
        log.sessions.append(Session(min(times), max(times) - min(times)))


def _read_csv(path: Path, log: Log) -> None:
    """Add a table of CSVLogger; a last line that a crash cut off does not count."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    rows = csv.DictReader(lines)
    if lines and "step" not in (rows.fieldnames or ()):
        raise DataError(
            f"{path}, line 1: got the columns {', '.join(rows.fieldnames or ())}; need a column step, as Lightning's "
            "CSVLogger writes it. Do: move the file out of the folder if it is no log."
        )
    for row in rows:
        step = int(_number(row["step"], path, rows.line_num, "step"))
        for name, cell in row.items():
            if name != "step" and cell:
                log.curves.setdefault(name, {})[step] = _number(cell, path, rows.line_num, name)


def _number(cell: str, path: Path, line: int, field: str) -> float:
    try:
        return float(cell)
    except ValueError as error:
        raise DataError(f"{path}, line {line}, {field}: got {cell!r}; need a number.") from error
