"""Validate raw rows into typed records. Every error names the place, the field, what was got and what is needed.

Rows that are accepted (extra columns are ignored; prompts keep them, for scorers)::

    demonstrations   {"prompt", "response"}   {"prompt", "completion"}   {"messages"}
    comparisons      {"prompt", "responses", "ranks"}   {"prompt", "chosen", "rejected"}   {"chosen", "rejected"}
    prompts          {"prompt"}   or any row above: its prompt is taken
    text             {"text"}
    choices          {"prompt", "choices"}   {"choices"}, and {"correct"} where one of them is right

A prompt is text, or chat messages that end with the user's. ``responses`` are 2 to 1,000 texts and ``ranks`` as many
integers, 1 for the best, equal for ties. ``chosen``, ``rejected``, ``response`` and ``completion`` are texts, or
messages of which the last is the assistant's. In ``messages`` only the last turn is learnt; the turns before it are
the prompt. Comparisons may carry a ``labeler``, all rows an ``id``. docs/data_formats.md says more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from lit_instruct.data.bad_rows import Flaw, OnBadRow, Place, Problem, data_error
from lit_instruct.data.formats import Columns, short
from lit_instruct.data.sources import Row, stream_rows
from lit_instruct.types import Message, Prompt

_ROLES = ("system", "user", "assistant")
_MAX_RESPONSES = 1000
"""Of one prompt. All are in memory together, and their pairs, half a million for so many."""
_MAX_RANK = 2**31 - 1
_SHOWN_COLUMNS = 20


class DemonstrationRecord(NamedTuple):
    """A prompt and the response to imitate."""

    prompt: Prompt
    response: str


class ComparisonRecord(NamedTuple):
    """A prompt and its K >= 2 responses; ``ranks[k]`` belongs to ``responses[k]``: 1 is best, ties are equal."""

    prompt: Prompt
    responses: list[str]
    ranks: list[int]
    labeler: str | None


class PromptRecord(NamedTuple):
    """A prompt to sample responses for, and the row's other columns, for scorers that want them."""

    prompt: Prompt
    columns: Columns


class TextRecord(NamedTuple):
    """A document of pretraining text."""

    text: str


class ChoiceRecord(NamedTuple):
    """Texts to choose between, after a prompt or without one; ``correct`` is the index of the right one, if any is."""

    prompt: Prompt | None
    choices: list[str]
    correct: int | None
    columns: Columns


R = TypeVar("R")
S = TypeVar("S")


class Loaded(NamedTuple, Generic[R]):
    """Records, and what could not become one.

    Attributes:
        kind: what the records are, for messages.
        records: in the order of the sources.
        places: where each record came from.
        problems: the rows that cannot be used.
        repeated_ids: one sentence a row whose ``id`` stands in an earlier row too; such rows are records all the same.
    """

    kind: str
    records: list[R]
    places: list[Place]
    problems: list[Problem]
    repeated_ids: list[str]

    def then(self, results: Iterable[S | Flaw]) -> Loaded[S]:
        """Replace each record by what was made of it; a ``Flaw`` makes its row one that cannot be used."""
        records: list[S] = []
        places: list[Place] = []
        problems = list(self.problems)
        for place, result in zip(self.places, results, strict=True):
            if isinstance(result, Flaw):
                problems.append(Problem(place, result))
            else:
                records.append(result)
                places.append(place)
        return Loaded(self.kind, records, places, problems, self.repeated_ids)

    def check(self, on_bad_row: OnBadRow) -> None:
        """Decide about the rows that cannot be used.

        Args:
            on_bad_row: ``error``: there may be none. ``skip``: they are left out, but some row must be left.

        Raises:
            DataError: there are rows that cannot be used and may not be left out, or nothing is left.
        """
        total = len(self.records) + len(self.problems)
        if not total:
            raise data_error(f"got no sources of {self.kind}.", [], "name at least one file or data set.")
        if self.problems and (on_bad_row == "error" or not self.records):
            leave_out = ", or set on_bad_row to skip to leave them out" if self.records else ""
            raise data_error(
                f"{len(self.problems)} of {total} rows cannot be used as {self.kind}:",
                self.problems,
                f"mend or remove these rows{leave_out}. Rows of {self.kind} look like {_FORMATS[self.kind]}.",
            )


class _BadFieldError(Exception):
    """One field of one row cannot be used."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(field, problem)
        self.flaw = Flaw(field, problem)


def read_demonstrations(sources: str | Sequence[str], *, on_bad_row: OnBadRow = "error") -> Loaded[DemonstrationRecord]:
    """Read demonstrations from one or several sources (see ``sources.stream_rows``), in order.

    Args:
        sources: files or data sets.
        on_bad_row: ``error``: rows that cannot be used are an error. ``skip``: they are left out, and stand in
            ``problems`` of what is returned; ``Loaded.check`` has not been called.

    Raises:
        DataError: a source cannot be read, or rows cannot be used.
    """
    return _read(sources, _demonstration, "demonstrations", on_bad_row)


def read_comparisons(sources: str | Sequence[str], *, on_bad_row: OnBadRow = "error") -> Loaded[ComparisonRecord]:
    """Read comparisons from one or several sources, in order; at least one ranking must not be all ties.

    Args:
        sources: files or data sets.
        on_bad_row: as in ``read_demonstrations``.

    Raises:
        DataError: a source cannot be read, rows cannot be used, or all rankings are ties.
    """
    loaded = _read(sources, _comparison, "comparisons", on_bad_row)
    if loaded.records and all(len(set(record.ranks)) == 1 for record in loaded.records):
        raise data_error(
            f"{_names(sources)}: got {len(loaded.records)} rankings in which all responses are tied.",
            [],
            "give rankings that prefer some response (field 'ranks': 1 = best): ties alone teach nothing.",
        )
    return loaded


def read_prompts(sources: str | Sequence[str], *, on_bad_row: OnBadRow = "error") -> Loaded[PromptRecord]:
    """Read prompts from one or several sources, in order; rows with responses give their prompt.

    Args:
        sources: files or data sets.
        on_bad_row: as in ``read_demonstrations``.

    Raises:
        DataError: a source cannot be read, or rows cannot be used.
    """
    return _read(sources, _prompt_only, "prompts", on_bad_row)


def stream_prompts(sources: str | Sequence[str]) -> Iterator[tuple[Row, PromptRecord] | Problem]:
    """Read prompts one by one, in bounded memory (see ``sources.stream_rows``).

    Args:
        sources: as ``read_prompts`` takes them.

    Yields:
        A row with its prompt, or what is wrong with a row that cannot be used.
    """
    return _validated(sources, _prompt_only)


def prompt_of(columns: Columns) -> Prompt:
    """Take the prompt out of the columns of a row that ``stream_prompts`` gave."""
    return _prompt_only(columns).prompt


def read_texts(sources: str | Sequence[str], *, on_bad_row: OnBadRow = "error") -> Loaded[TextRecord]:
    """Read documents from one or several sources, in order.

    Args:
        sources: files or data sets.
        on_bad_row: as in ``read_demonstrations``.

    Raises:
        DataError: a source cannot be read, or rows cannot be used.
    """
    return _read(sources, _text, "text", on_bad_row)


def read_choices(sources: str | Sequence[str], *, correct: bool) -> Loaded[ChoiceRecord]:
    """Read texts to choose between from one or several sources, in order.

    Args:
        sources: as ``read_prompts`` takes them.
        correct: whether one of the texts is right; the rows then say which, and have a prompt.

    Raises:
        DataError: a source cannot be read, or rows cannot be used.
    """
    return _read(sources, _right_choice if correct else _choice, "questions" if correct else "choices", "error")


def _read(sources: str | Sequence[str], validate: Callable[[Columns], R], kind: str, on_bad_row: OnBadRow) -> Loaded[R]:
    loaded: Loaded[R] = Loaded(kind, [], [], [], [])
    first_with: dict[tuple[Any, str], Place] = {}
    for item in _validated(sources, validate):
        if isinstance(item, Problem):
            loaded.problems.append(item)
            continue
        row, record = item
        loaded.records.append(record)
        loaded.places.append(row.place)
        name = row.columns.get("id")
        who = (name, str(row.columns.get("labeler")))  # what two labelers say about one task was not added twice
        if isinstance(name, str | int) and first_with.setdefault(who, row.place) is not row.place:
            loaded.repeated_ids.append(f"{row.place}: id {short(name)} stands in {first_with[who]} too")
    if on_bad_row == "error":
        loaded.check(on_bad_row)
    return loaded


def _validated(sources: str | Sequence[str], validate: Callable[[Columns], R]) -> Iterator[tuple[Row, R] | Problem]:
    for source in [sources] if isinstance(sources, str) else sources:
        for item in stream_rows(source):
            if isinstance(item, Problem):
                yield item
                continue
            try:
                record = validate(item.columns)
            except _BadFieldError as error:
                yield Problem(item.place, error.flaw)
            else:
                yield item, record


def _demonstration(columns: Columns) -> DemonstrationRecord:
    for field in ("response", "completion"):
        if "prompt" in columns and field in columns:
            prompt = _prompt(columns["prompt"], "prompt")
            return DemonstrationRecord(prompt, _response(columns[field], field, prompt))
    if "messages" in columns:
        return DemonstrationRecord(*_conversation(columns["messages"], "messages"))
    raise _missing(columns, "demonstrations", "response" if "prompt" in columns else "prompt")


def _comparison(columns: Columns) -> ComparisonRecord:
    labeler = _labeler(columns.get("labeler"))
    if "prompt" in columns and "responses" in columns and "ranks" in columns:
        prompt = _prompt(columns["prompt"], "prompt")
        responses = _responses(columns["responses"])
        return ComparisonRecord(prompt, responses, _ranks(columns["ranks"], len(responses)), labeler)
    if "chosen" in columns and "rejected" in columns:
        if "prompt" in columns:
            prompt = _prompt(columns["prompt"], "prompt")
        elif isinstance(columns["chosen"], list) and isinstance(columns["rejected"], list):
            prompt = _conversation(columns["chosen"], "chosen")[0]
        else:
            raise _missing(columns, "comparisons", "prompt")
        pair = [_response(columns[field], field, prompt) for field in ("chosen", "rejected")]
        return ComparisonRecord(prompt, pair, [1, 2], labeler)
    needed = ("prompt", "responses", "ranks") if "rejected" not in columns else ("chosen",)
    raise _missing(columns, "comparisons", next(name for name in needed if name not in columns))


def _labeler(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise _BadFieldError("labeler", f"got {_shown(value)}; need a name or a number, or no such column")
    return _filled(str(value), "labeler", "a name")


def _prompt_only(columns: Columns) -> PromptRecord:
    if "prompt" in columns:
        return PromptRecord(_prompt(columns["prompt"], "prompt"), _without(columns, "prompt"))
    if "messages" in columns:
        turns = _messages(columns["messages"], "messages")
        ends_with_response = turns[-1]["role"] == "assistant" and len(turns) > 1
        prompt = _prompt(turns[:-1] if ends_with_response else turns, "messages")
        return PromptRecord(prompt, _without(columns, "messages"))
    if isinstance(columns.get("chosen"), list) and "rejected" in columns:
        return PromptRecord(_comparison(columns).prompt, _without(columns, "chosen", "rejected"))
    raise _missing(columns, "prompts", "prompt")


def _without(columns: Columns, *taken: str) -> Columns:
    return {name: value for name, value in columns.items() if name not in taken}


def _text(columns: Columns) -> TextRecord:
    if "text" not in columns:
        raise _missing(columns, "text", "text")
    return TextRecord(_filled(columns["text"], "text", "a document"))


def _choice(columns: Columns) -> ChoiceRecord:
    prompt = _prompt(columns["prompt"], "prompt") if "prompt" in columns else None
    if "choices" not in columns:
        raise _missing(columns, "choices", "choices")
    choices = columns["choices"]
    if not isinstance(choices, list) or len(choices) < 2:
        raise _BadFieldError("choices", f"got {_shown(choices)}; need a list of two or more texts")
    texts = [_filled(text, f"choices[{index}]", "a text") for index, text in enumerate(choices)]
    return ChoiceRecord(prompt, texts, None, _without(columns, "prompt", "choices"))


def _right_choice(columns: Columns) -> ChoiceRecord:
    for field in ("prompt", "correct"):
        if field not in columns:
            raise _missing(columns, "questions", field)
    record, correct = _choice(columns), columns["correct"]
    if isinstance(correct, bool) or not isinstance(correct, int) or not 0 <= correct < len(record.choices):
        last = len(record.choices) - 1
        raise _BadFieldError("correct", f"got {_shown(correct)}; need the index of the right choice, 0 to {last}")
    return record._replace(correct=correct, columns=_without(record.columns, "correct"))


def _missing(columns: Columns, kind: str, field: str) -> _BadFieldError:
    found = [short(name) for name in columns]
    names = ", ".join(found[:_SHOWN_COLUMNS]) or "none"
    more = f" and {len(found) - _SHOWN_COLUMNS} more" if len(found) > _SHOWN_COLUMNS else ""
    return _BadFieldError(field, f"got no such column (columns found: {names}{more}); need {_FORMATS[kind]}")


def _filled(value: Any, field: str, what: str) -> str:
    if not isinstance(value, str):
        raise _BadFieldError(field, f"got {_shown(value)}; need {what} as text")
    if not value.strip():
        raise _BadFieldError(field, f"got an empty text; need {what} that is not empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can write it (\ud800), no tokenizer reads it
        raise _BadFieldError(
            field, f"got half a surrogate pair at character {error.start + 1}; need {what} as Unicode text"
        ) from error
    return value


def _prompt(value: Any, field: str) -> Prompt:
    if not isinstance(value, list):
        return _filled(value, field, "a prompt")
    turns = _messages(value, field)
    if turns[-1]["role"] != "user":
        raise _BadFieldError(field, f"got a last message by {turns[-1]['role']!r}; need a prompt that ends with 'user'")
    return turns


def _messages(value: Any, field: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise _BadFieldError(field, f"got {_shown(value)}; need a list of messages that is not empty")
    turns: list[Message] = []
    for index, message in enumerate(value):
        here = f"{field}[{index}]"
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise _BadFieldError(here, f"got {_shown(message)}; need {{'role': ..., 'content': ...}}")
        if message["role"] not in _ROLES:
            raise _BadFieldError(f"{here}.role", f"got {_shown(message['role'])}; need one of {', '.join(_ROLES)}")
        content = _filled(message["content"], f"{here}.content", "a message")
        turns.append({"role": message["role"], "content": content})
    return turns


def _conversation(value: Any, field: str) -> tuple[Prompt, str]:
    """Split messages into the prompt and the last turn, the response."""
    turns = _messages(value, field)
    if turns[-1]["role"] != "assistant":
        raise _BadFieldError(
            field, f"got a last message by {turns[-1]['role']!r}; need one by 'assistant', the response"
        )
    if len(turns) == 1:
        raise _BadFieldError(field, "got only a response; need the user's message before it")
    return _prompt(turns[:-1], field), turns[-1]["content"]


def _response(value: Any, field: str, prompt: Prompt) -> str:
    """Read a response given as text, or as messages whose earlier turns, if any, repeat the prompt."""
    if not isinstance(value, list):
        return _filled(value, field, "a response")
    turns = _messages(value, field)
    if turns[-1]["role"] != "assistant":
        raise _BadFieldError(
            field, f"got a last message by {turns[-1]['role']!r}; need one by 'assistant', the response"
        )
    expected = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if turns[:-1] not in ([], expected):
        raise _BadFieldError(field, "got messages before the response that differ from the prompt; need the same ones")
    return turns[-1]["content"]


def _responses(value: Any) -> list[str]:
    if not isinstance(value, list):
        raise _BadFieldError("responses", f"got {_shown(value)}; need a list of texts")
    if len(value) < 2:
        raise _BadFieldError("responses", f"got {len(value)}; need at least 2 responses to rank")
    if len(value) > _MAX_RESPONSES:
        raise _BadFieldError(
            "responses", f"got {len(value):,}; need at most {_MAX_RESPONSES:,}, since all of a prompt are read together"
        )
    return [_filled(response, f"responses[{index}]", "a response") for index, response in enumerate(value)]


def _ranks(value: Any, count: int) -> list[int]:
    if not isinstance(value, list):
        raise _BadFieldError("ranks", f"got {_shown(value)}; need a list of integers")
    if len(value) != count:
        raise _BadFieldError(
            "ranks", f"got {len(value)} ranks for {count} responses; need one rank per response (1 = best)"
        )
    for index, rank in enumerate(value):
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:  # True is an int to Python
            raise _BadFieldError(f"ranks[{index}]", f"got {_shown(rank)}; need an integer of at least 1 (1 = best)")
        if rank > _MAX_RANK:
            raise _BadFieldError(f"ranks[{index}]", f"got {_shown(rank)}; need at most {_MAX_RANK:,} (1 = best)")
    return value


def _shown(value: Any) -> str:
    return "null" if value is None else f"{short(value)} ({type(value).__name__})"


def _names(sources: str | Sequence[str]) -> str:
    return sources if isinstance(sources, str) else ", ".join(sources)


_FORMATS = {
    "demonstrations": '{"prompt", "response"}, {"prompt", "completion"} or {"messages"}',
    "comparisons": (
        '{"prompt", "responses", "ranks"}, {"prompt", "chosen", "rejected"} or {"chosen", "rejected"} as messages '
        "that begin alike"
    ),
    "prompts": '{"prompt"}, or {"messages"} or {"chosen", "rejected"} whose prompt can be taken',
    "text": '{"text"}',
    "choices": '{"prompt", "choices"} or {"choices"}',
    "questions": '{"prompt", "choices", "correct"}',
}
