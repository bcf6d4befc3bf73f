"""Labels as rows of files: what the DataModules read, with everything else that is known of a label beside it.

One row is what one labeler said about one task::

    comparisons      {"prompt", "responses", "ranks", "ratings", "flags"}
    demonstrations   {"prompt", "response"}
    prompts          {"prompt"}: written by the labeler, or looked through, then with "flags"

All may carry ``labeler``, ``owner``, ``note``, ``id`` (of the task), ``instruction``, ``sources``, ``seconds`` (in
view), ``at`` (seconds since 1970) and the task's other columns. One of those that is called like a column of the row
stands in ``columns``. Rank 1 is best, equal ranks are ties, and entry k of a list belongs to ``responses[k]``.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lit_instruct.data.bad_rows import data_error
from lit_instruct.data.sources import Row, stream_rows
from lit_instruct.feedback.forms import MAX_RATING, PROMPT_FLAGS, RESPONSE_FLAGS, FormError
from lit_instruct.feedback.labels import Label
from lit_instruct.feedback.store import Store
from lit_instruct.feedback.tasks import Task, read_task
from lit_instruct.types import ConfigError, DataError

Columns = dict[str, Any]

_KINDS = {"rank": "comparisons", "demonstrate": "demonstrations", "write_prompt": "prompts", "flag_prompt": "prompts"}
_OF_ANSWER = ("prompt", "responses", "ranks", "ratings", "flags", "response", "labeler", "note", "seconds", "at")
OWN_COLUMNS = frozenset([*_OF_ANSWER, "id", "instruction", "sources", "columns"])
"""What a row says itself; other columns are the task's."""


class LabelRows(NamedTuple):
    """Rows by the file into which they belong."""

    comparisons: list[Columns]
    demonstrations: list[Columns]
    prompts: list[Columns]

    def add(self, row: Columns) -> None:
        """Put a row where its columns say that it belongs."""
        getattr(self, kind_of(row)).append(row)


def empty_rows() -> LabelRows:
    """No rows yet."""
    return LabelRows([], [], [])


def kind_of(columns: Mapping[str, Any]) -> str:
    """The file of a row: ``comparisons``, ``demonstrations`` or ``prompts``."""
    if "ranks" in columns or "responses" in columns or "chosen" in columns:
        return "comparisons"
    return "demonstrations" if "response" in columns else "prompts"


# -- out of a database


def rows_of_labels(labels: Iterable[Label]) -> LabelRows:
    """Make rows of answers; skips have none.

    Args:
        labels: those that hold, as ``Store.labels`` gives them.
    """
    rows = empty_rows()
    for label in labels:
        if label.kind == "answer":
            getattr(rows, _KINDS[label.task.kind]).append(_row_of_label(label))
    return rows


def _row_of_label(label: Label) -> Columns:
    task, said = label.task, label.content
    row: Columns = {"prompt": task.prompt}
    if task.kind == "rank":
        judged = said["responses"]
        row["responses"] = task.responses
        for column, field in (("ranks", "rank"), ("ratings", "rating"), ("flags", "flags")):
            row[column] = [judgement[field] for judgement in judged]
        row["sources"] = task.sources
    elif task.kind == "demonstrate":
        row["response"] = said["response"]
    elif task.kind == "write_prompt":
        row["prompt"] = said["prompt"]
    else:
        row["flags"] = said["flags"]
    row |= {"labeler": label.labeler, "note": said["note"], "id": task.id, "seconds": label.seconds, "at": label.at}
    if task.instruction:
        row["instruction"] = task.instruction
    return row | _other_columns(task, label.labeler)


def _other_columns(task: Task, labeler: str) -> Columns:
    """The task's other columns; a prompt that a labeler wrote is the labeler's own, unless the task names an owner."""
    columns = {"owner": labeler} | task.columns if task.kind == "write_prompt" else task.columns
    others = {name: value for name, value in columns.items() if name not in OWN_COLUMNS}
    hidden_by_own = {name: value for name, value in columns.items() if name in OWN_COLUMNS}
    return others | ({"columns": hidden_by_own} if hidden_by_own else {})


# -- out of files


def read_label_rows(sources: Sequence[str]) -> LabelRows:
    """Read the labels of databases and of files of rows.

    Args:
        sources: databases of ``lit-instruct label``, and files as ``lit_instruct.data.sources`` takes them.

    Raises:
        DataError: a source does not exist, or rows cannot be used, with place and field.
    """
    rows, problems = empty_rows(), []
    for source in sources:
        if is_database(source):
            with Store(Path(source)) as store:
                found = rows_of_labels(store.labels())
            for into, more in zip(rows, found, strict=True):
                into.extend(more)
            continue
        for item in stream_rows(source):
            problem = _add(rows, item) if isinstance(item, Row) else str(item)
            problems += [problem] if problem else []
    refuse(problems, "labels")
    return rows


def is_database(source: str) -> bool:
    """Whether a source is an SQLite database.

    Raises:
        DataError: it is called like one and is not there.
    """
    path = Path(source)
    if not path.is_file():
        if path.suffix in (".sqlite", ".sqlite3", ".db"):  # not to be looked for among the data sets of the hub
            raise DataError(f"{source}: no such file.\nDo: check the path of the database.")
        return False
    with path.open("rb") as file:
        return file.read(16) == b"SQLite format 3\0"


def _add(rows: LabelRows, row: Row) -> str | None:
    """Check a row and add it; returns what is wrong with it."""
    try:
        rows.add(check_row(row.columns))
    except FormError as error:
        return f"{row.place}: field {error.field!r}: {error.problem}"
    return None


def refuse(problems: Sequence[str], what: str) -> None:
    """Raise if there are problems.

    Args:
        problems: one sentence each, with place and field.
        what: the rows are not.

    Raises:
        DataError: there are some.
    """
    if problems:
        raise data_error(
            f"{len(problems)} rows cannot be used as {what}:", problems, "mend or remove them; see docs/feedback.md."
        )


def check_row(row: Columns) -> Columns:
    """Check a row; a pair (``prompt``, ``chosen``, ``rejected``) becomes a ranking of two.

    Args:
        row: its columns.

    Returns:
        The row, with ``labeler`` as text and ranks without gaps.

    Raises:
        FormError: a column cannot be used.
    """
    row = {**row, "prompt": read_task({"task": "flag_prompt", "prompt": row.get("prompt")}).prompt}
    if "chosen" in row and "ranks" not in row:
        row |= {"responses": [row.pop("chosen"), row.pop("rejected", None)], "ranks": [1, 2]}
    kind = kind_of(row)
    if kind == "comparisons":
        _check_ranking(row)
        row["ranks"] = _without_gaps(row["ranks"])
    elif kind == "demonstrations":
        check_text(row["response"], "response")
    elif row.get("flags") is not None:
        check_list(row["flags"], "flags", lambda flag, field: _check_flag(flag, field, PROMPT_FLAGS))
    _check_about(row)
    return row if row.get("labeler") is None else {**row, "labeler": str(row["labeler"])}


def check_text(value: Any, field: str, *, filled: bool = True) -> str:
    """Return a text that can be written as UTF-8.

    Raises:
        FormError: it is no such text, or is blank and must not be.
    """
    if not isinstance(value, str) or (filled and not value.strip()):
        raise FormError(field, f"got {short(value)}; need a text{' that is not empty' if filled else ''}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise FormError(field, f"got half of a surrogate pair at character {error.start + 1}; need UTF-8") from error
    return value


def check_list(value: Any, field: str, check: Callable[[Any, str], object], *, length: int | None = None) -> None:
    """Check a list item by item.

    Args:
        value: should be a list.
        field: its name.
        check: called with each item and its name; raises FormError.
        length: that it must have.

    Raises:
        FormError: it is no such list.
    """
    if not isinstance(value, list) or (length is not None and len(value) != length):
        wanted = "a list" if length is None else f"a list of {length}, one for each response"
        raise FormError(field, f"got {short(value)}; need {wanted}")
    for index, item in enumerate(value):
        check(item, f"{field}[{index}]")


def short(value: Any) -> str:
    """A value for a message."""
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _check_ranking(row: Columns) -> None:
    check_list(row.get("responses"), "responses", lambda item, field: check_text(item, field, filled=False))
    count = len(row["responses"])
    if count < 2:
        raise FormError("responses", f"got {count}; need at least 2 to rank")
    check_list(row.get("ranks"), "ranks", lambda item, field: _check_whole(item, field, None), length=count)
    if row.get("ratings") is not None:
        check_list(row["ratings"], "ratings", _check_rating, length=count)
    if row.get("flags") is not None:
        check_list(row["flags"], "flags", _check_response_flags, length=count)
    if row.get("sources") is not None:
        check_list(row["sources"], "sources", lambda item, field: None, length=count)


def _check_rating(value: Any, field: str) -> None:
    if value is not None:  # other programs need not ask for all
        _check_whole(value, field, MAX_RATING)


def _check_response_flags(value: Any, field: str) -> None:
    check_list(value, field, lambda flag, name: _check_flag(flag, name, RESPONSE_FLAGS))


def _check_whole(value: Any, field: str, most: int | None) -> None:
    if type(value) is not int or value < 1 or (most is not None and value > most):  # True is an int to Python
        raise FormError(field, f"got {short(value)}; need a whole number from 1{f' to {most}' if most else ''}")


def _check_flag(value: Any, field: str, known: Mapping[str, str]) -> None:
    if not isinstance(value, str) or value not in known:
        raise FormError(field, f"got {short(value)}; need one of {', '.join(known)}")


def _check_about(row: Columns) -> None:
    for name in ("labeler", "id"):
        value = row.get(name)
        if value is not None and type(value) not in (str, int):
            raise FormError(name, f"got {short(value)}; need a text or a whole number")
    for name in ("note", "instruction"):
        if row.get(name) is not None:
            check_text(row[name], name, filled=False)
    for name in ("seconds", "at"):
        value = row.get(name)
        if value is not None and (type(value) not in (int, float) or not math.isfinite(value) or value < 0):
            raise FormError(name, f"got {short(value)}; need a number of seconds")


# -- into files


class Written(NamedTuple):
    """What was written.

    Attributes:
        counts: rows by file name.
        blank: responses without any text that were left out of rankings, since nothing can be learnt from them.
        unranked: rankings that were left out, since fewer than two responses remained.
    """

    counts: dict[str, int]
    blank: int
    unranked: int


def write_label_rows(rows: LabelRows, out: Path, *, overwrite: bool = False) -> Written:
    """Write ``comparisons.jsonl``, ``demonstrations.jsonl`` and ``prompts.jsonl``, those that have rows.

    Args:
        rows: the labels.
        out: folder; made if it is not there.
        overwrite: replace files that are there.

    Raises:
        ConfigError: a file is there.
    """
    trained = [_without_blanks(row) for row in rows.comparisons]
    kept = [row for row in trained if len(row["responses"]) >= 2]
    blank = sum(len(row["responses"]) for row in rows.comparisons) - sum(len(row["responses"]) for row in trained)
    texts = {
        f"{name}.jsonl": "".join(json.dumps(row) + "\n" for row in found)
        for name, found in rows._replace(comparisons=kept)._asdict().items()
        if found
    }
    write_files(texts, out, overwrite=overwrite)
    return Written({name: text.count("\n") for name, text in texts.items()}, blank, len(trained) - len(kept))


def write_files(texts: Mapping[str, str], out: Path, *, overwrite: bool) -> None:
    """Write files, each whole or not at all.

    Args:
        texts: by file name.
        out: folder; made if it is not there.
        overwrite: replace files that are there.

    Raises:
        ConfigError: a file is there.
    """
    there = [str(out / name) for name in texts if (out / name).exists()]
    if there and not overwrite:
        raise ConfigError(f"--out: got {', '.join(there)}, which exist.\nDo: name another folder, or add --overwrite.")
    out.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        part = out / f".{name}.part"
        part.write_text(text, encoding="utf-8")
        os.replace(part, out / name)


def _without_blanks(row: Columns) -> Columns:
    """Leave out responses without text; ranks are counted anew, without gaps."""
    kept = [index for index, text in enumerate(row["responses"]) if text.strip()]
    if len(kept) == len(row["responses"]):
        return row
    lists = ("responses", "ranks", "ratings", "flags", "sources")
    shorter = {name: [row[name][index] for index in kept] for name in lists if row.get(name) is not None}
    return {**row, **shorter, "ranks": _without_gaps(shorter["ranks"])}


def _without_gaps(ranks: Sequence[int]) -> list[int]:
    places = {rank: place for place, rank in enumerate(sorted(set(ranks)), start=1)}
    return [places[rank] for rank in ranks]
