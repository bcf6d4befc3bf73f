"""Read the tasks of labelers from files.

Rows (docs/labelling.md says more)::

    {"task": "rank", "prompt", "responses": [2 to 9 texts], "sources": [where each one came from]}
    {"task": "demonstrate", "prompt"}
    {"task": "write_prompt", "instruction"}
    {"task": "flag_prompt", "prompt"}
    {"prompt", "first", "second"}: a pair of ``pairs.jsonl`` (docs/evaluation.md), two responses to rank

All may carry ``id``, ``owner`` (of the prompt) and ``labelers`` (how many shall do it). Labelers see the prompt or the
instruction and the responses; all other columns are kept for the export and hidden.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from lit_instruct.data.bad_rows import data_error
from lit_instruct.data.sources import Row, stream_rows
from lit_instruct.feedback.forms import KINDS, MAX_RESPONSES, FormError
from lit_instruct.types import Prompt

MAX_SHOWN = 1_000_000
"""Characters of one prompt or response: what a browser can still show."""

_ROLES = ("system", "user", "assistant")
_PAIR = ("first", "second")
_OWN = ("task", "id", "prompt", "instruction", "responses", "sources", "labelers")


class Task(NamedTuple):
    """Something for labelers to do.

    Attributes:
        id: the file's, or a digest of what is shown.
        kind: one of ``forms.KINDS``.
        prompt: what is to be responded to or flagged; None where a prompt is to be written.
        instruction: what kind of prompt is to be written; may be empty for other kinds.
        responses: K different texts, for ``rank``; else empty.
        sources: ``sources[k]`` lists where ``responses[k]`` came from: several, where samples were the same text.
        labelers: how many shall do it; None: as the command says.
        columns: the row's other columns, such as ``owner``.
    """

    id: str
    kind: str
    prompt: Prompt | None
    instruction: str
    responses: list[str]
    sources: list[list[Any]]
    labelers: int | None
    columns: dict[str, Any]

    @property
    def shown(self) -> dict[str, Any]:
        """What a labeler may see."""
        return {"prompt": self.prompt, "instruction": self.instruction, "responses": self.responses}

    @property
    def hidden(self) -> dict[str, Any]:
        """What is kept from labelers."""
        return {"sources": self.sources, "columns": self.columns}


class LoadedTasks(NamedTuple):
    """Tasks of files.

    Attributes:
        tasks: in the order of the files.
        alike: places of rows that are left out, since all their responses are the same text.
    """

    tasks: list[Task]
    alike: list[str]


def read_tasks(sources: Sequence[str]) -> LoadedTasks:
    """Read tasks from one or several files or data sets (see ``lit_instruct.data.sources``).

    Args:
        sources: read in order.

    Raises:
        DataError: rows that cannot be used, with place and field, or two rows with one ``id``.
    """
    tasks: dict[str, Task] = {}
    problems: list[str] = []
    alike: list[str] = []
    for item in _rows(sources):
        if not isinstance(item, Row):
            problems.append(str(item))
            continue
        try:
            task = read_task(item.columns)
        except FormError as error:
            problems.append(f"{item.place}: field {error.field!r}: {error.problem}")
            continue
        if task.kind == "rank" and len(task.responses) == 1:
            alike.append(str(item.place))
        elif task.id in tasks:
            problems.append(f"{item.place}: field 'id': got the id, or without ids the whole task, of an earlier row")
        else:
            tasks[task.id] = task
    if problems:
        raise data_error(
            f"{len(problems)} rows cannot be used as tasks:", problems, "mend or remove them; see docs/labelling.md."
        )
    return LoadedTasks(list(tasks.values()), alike)


def _rows(sources: Sequence[str]) -> Iterator[object]:
    for source in sources:
        yield from stream_rows(source)


def read_task(columns: dict[str, Any]) -> Task:
    """Make a task of the columns of a row; responses that are the same text become one.

    Raises:
        FormError: a field is missing, or cannot be used.
    """
    if "task" not in columns and "first" in columns:
        columns = _of_pair(columns)
    kind = columns.get("task")
    if kind not in KINDS:
        raise FormError("task", f"got {_short(kind)}; need one of {', '.join(KINDS)}")
    writes = kind == "write_prompt"
    prompt = None if writes else _prompt(columns.get("prompt"))
    instruction = _text(columns.get("instruction"), "instruction") if writes or columns.get("instruction") else ""
    responses, origins = _responses(columns) if kind == "rank" else ([], [])
    labelers = columns.get("labelers")
    if labelers is not None and (type(labelers) is not int or labelers < 1):
        raise FormError("labelers", f"got {_short(labelers)}; need a whole number of at least 1")
    others = {name: value for name, value in columns.items() if name not in _OWN}
    name = columns.get("id")
    if name is not None and type(name) not in (str, int):
        raise FormError("id", f"got {_short(name)}; need a text or a whole number")
    if name is None:
        name = _digest([kind, prompt, instruction, responses])
    return Task(str(name), str(kind), prompt, instruction, responses, origins, labelers, others)


def _of_pair(columns: dict[str, Any]) -> dict[str, Any]:
    """The columns of a ranking of two; what somebody may have chosen already is not told."""
    others = {name: value for name, value in columns.items() if name not in (*_PAIR, "choice")}
    return {**others, "task": "rank", "responses": [_text(columns.get(name), name, filled=False) for name in _PAIR]}


def _responses(columns: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """The different texts in the order of the row, and for each the sources of all samples that are this text."""
    texts = columns.get("responses")
    if not isinstance(texts, list) or len(texts) < 2:
        raise FormError("responses", f"got {_short(texts)}; need a list of at least 2 texts")
    sources = columns.get("sources")
    if sources is None:
        sources = [None] * len(texts)
    if not isinstance(sources, list) or len(sources) != len(texts):
        raise FormError("sources", f"got {_short(sources)}; need a list of {len(texts)}, one for each response")
    merged: dict[str, list[Any]] = {}
    for index, (text, source) in enumerate(zip(texts, sources, strict=True)):
        # Nothing at all is a response that a model can give, and to be ranked like others.
        merged.setdefault(_text(text, f"responses[{index}]", filled=False), []).append(source)
    if len(merged) > MAX_RESPONSES:
        raise FormError("responses", f"got {len(merged)} different ones; need at most {MAX_RESPONSES} to rank")
    return list(merged), list(merged.values())


def _prompt(value: Any) -> Prompt:
    """Text, or chat messages that end with the user's."""
    if not isinstance(value, list):
        return _text(value, "prompt")
    if not value or not all(isinstance(turn, dict) and turn.keys() == {"role", "content"} for turn in value):
        raise FormError("prompt", "need a text, or a list of messages {'role', 'content'}")
    for index, turn in enumerate(value):
        if turn["role"] not in _ROLES:
            raise FormError(f"prompt[{index}].role", f"got {_short(turn['role'])}; need one of {', '.join(_ROLES)}")
        _text(turn["content"], f"prompt[{index}].content")
    if value[-1]["role"] != "user":
        raise FormError("prompt", "need a last message by the user")
    return value


def _text(value: Any, field: str, *, filled: bool = True) -> str:
    if not isinstance(value, str) or (filled and not value.strip()):
        raise FormError(field, f"got {_short(value)}; need a text{' that is not empty' if filled else ''}")
    if len(value) > MAX_SHOWN:
        raise FormError(field, f"got {len(value):,} characters; need at most {MAX_SHOWN:,}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise FormError(field, f"got half of a surrogate pair at character {error.start + 1}; need UTF-8") from error
    return value


def _digest(shown: Any) -> str:
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()[:16]


def _short(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
