"""What labelers fill in, and its validation: an answer is saved only if it has exactly the fields of its kind of task.

Answers, as the page sends them and as they are stored (``note`` is free text, may be empty)::

    rank          {"responses": [{"rating": 1..7, "flags": [...], "rank": 1..K}, ...], "note"}
    demonstrate   {"response", "note"}
    write_prompt  {"prompt", "note"}
    flag_prompt   {"flags": [...], "note"}
    a skip        {"reason", "note"}

``responses[k]`` judges response k; rank 1 is best, equal ranks are ties, and no rank is left out between the best and
the worst. A draft has the same fields; its ratings and ranks may be null and its texts empty.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

Content = dict[str, Any]

KINDS = ("rank", "demonstrate", "write_prompt", "flag_prompt")

MAX_RATING = 7
MAX_RESPONSES = 9
MAX_TEXT = 100_000
MAX_NOTE = 2_000

RESPONSE_FLAGS = {
    "fails_instruction": "Fails to follow the instruction or task",
    "unfit_for_assistant": "Unfit for a customer's assistant",
    "hallucination": "Hallucination: made-up facts",
    "violates_constraint": "Violates a constraint in the prompt",
    "sexual": "Sexual content",
    "violent": "Violent content",
    "encourages_harm": "Encourages violence, abuse, terrorism or self-harm",
    "denigrates": "Denigrates a protected group",
    "harmful_advice": "Gives harmful advice",
    "opinion": "Expresses an opinion",
    "moral_judgment": "Expresses a moral judgment",
}
"""What InstructGPT's labelers marked in each response (table 3 of the paper): stored name to shown text."""

PROMPT_FLAGS = {
    "unclear": "Unclear: I cannot tell what is wanted",
    "no_task": "Not a task for an assistant",
    "personal_data": "Holds personal data",
    "sexual": "Sexual content",
    "violent": "Violent content",
    "asks_for_harm": "Asks for something harmful",
    "denigrates": "Denigrates a protected group",
    "foreign_language": "In a language I do not speak",
}

SKIP_REASONS = {
    "unclear": "The prompt is unclear",
    "cannot_judge": "I lack the knowledge to judge",
    "language": "I do not speak the language",
    "distressing": "The content distresses me",
    "personal_data": "It holds personal data",
    "broken": "Something is broken here",
    "other": "Another reason (see the note)",
}


class FormError(ValueError):
    """A field cannot be saved as it is.

    Attributes:
        field: where, such as ``responses[2].rating``.
        problem: what was got and what is needed, for the labeler.
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


class Form(NamedTuple):
    """What an answer to one task must look like.

    Attributes:
        kind: of the task, one of ``KINDS``.
        responses: K, how many there are to rank; 0 for other kinds.
    """

    kind: str
    responses: int = 0

    def answer(self, content: object) -> Content:
        """Check a complete answer; returns it with the flags in their order and without doubles.

        Raises:
            FormError: it is not complete, or holds something that does not belong there.
        """
        return self._read(content, complete=True)

    def draft(self, content: object) -> Content:
        """Check what has been filled in so far, as ``answer`` does; fields may still be empty."""
        return self._read(content, complete=False)

    def _read(self, content: object, *, complete: bool) -> Content:
        if self.kind == "rank":
            fields = _fields(content, "answer", ("responses", "note"))
            read: Content = {"responses": _judgements(fields["responses"], self.responses, complete=complete)}
        elif self.kind == "flag_prompt":
            fields = _fields(content, "answer", ("flags", "note"))
            read = {"flags": _flags(fields["flags"], "flags", PROMPT_FLAGS)}
        else:
            name = "response" if self.kind == "demonstrate" else "prompt"
            fields = _fields(content, "answer", (name, "note"))
            read = {name: _text(fields[name], name, MAX_TEXT, filled=complete)}
        return {**read, "note": _text(fields["note"], "note", MAX_NOTE)}


def read_skip(content: object) -> Content:
    """Check the reason that a labeler gives for a skip.

    Raises:
        FormError: there is no such reason, or it needs a note and has none.
    """
    fields = _fields(content, "skip", ("reason", "note"))
    reason = fields["reason"]
    if not isinstance(reason, str) or reason not in SKIP_REASONS:
        raise FormError("reason", f"need one of {', '.join(SKIP_REASONS)}")
    return {"reason": reason, "note": _text(fields["note"], "note", MAX_NOTE, filled=reason == "other")}


def rearranged(content: Content, order: Sequence[int]) -> Content:
    """Put the judgements of responses into another order: number i of the result is number ``order[i]`` before.

    Args:
        content: an answer or a draft; kinds without responses come back as they are.
        order: a permutation of K positions.
    """
    if "responses" not in content:
        return content
    return {**content, "responses": [content["responses"][index] for index in order]}


def inverse(order: Sequence[int]) -> list[int]:
    """The permutation that undoes ``order``."""
    return sorted(range(len(order)), key=order.__getitem__)


def check_text(value: str, field: str) -> None:
    """Refuse characters that cannot be written into a file of UTF-8 text, or end a text early in other programs.

    Raises:
        FormError: there is a NUL or half of a surrogate pair.
    """
    for character in value:
        if character == "\0" or "\ud800" <= character <= "\udfff":
            raise FormError(field, f"got the character U+{ord(character):04X}, which is no text; take it out")


def _judgements(value: object, count: int, *, complete: bool) -> list[Content]:
    if not isinstance(value, list) or len(value) != count:
        raise FormError("responses", f"need a list of {count} judgements, one for each response")
    read = [_judgement(item, f"responses[{index}]", count, complete=complete) for index, item in enumerate(value)]
    ranks = {judgement["rank"] for judgement in read}
    if complete and ranks != set(range(1, len(ranks) + 1)):
        raise FormError("responses", f"got the ranks {sorted(ranks)}; need 1 for the best and no rank left out")
    return read


def _judgement(value: object, place: str, count: int, *, complete: bool) -> Content:
    fields = _fields(value, place, ("rating", "flags", "rank"))
    return {
        "rating": _number(fields["rating"], f"{place}.rating", MAX_RATING, complete=complete),
        "flags": _flags(fields["flags"], f"{place}.flags", RESPONSE_FLAGS),
        "rank": _number(fields["rank"], f"{place}.rank", count, complete=complete),
    }


def _fields(value: object, place: str, names: Collection[str]) -> Mapping[str, Any]:
    if not isinstance(value, dict) or value.keys() != set(names):
        raise FormError(place, f"need an object with the fields {', '.join(names)} and no others")
    return value


def _number(value: object, place: str, most: int, *, complete: bool) -> int | None:
    if value is None and not complete:
        return None
    if type(value) is not int or not 1 <= value <= most:  # True is an int to Python
        raise FormError(place, f"need a whole number from 1 to {most}")
    return value


def _flags(value: object, place: str, known: Mapping[str, str]) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(flag, str) and flag in known for flag in value):
        raise FormError(place, f"need a list of flags out of {', '.join(known)}")
    return [flag for flag in known if flag in value]


def _text(value: object, place: str, most: int, *, filled: bool = False) -> str:
    if not isinstance(value, str):
        raise FormError(place, "need a text")
    if len(value) > most:
        raise FormError(place, f"got {len(value):,} characters; at most {most:,} can be saved")
    if filled and not value.strip():
        raise FormError(place, "is empty; write something, or skip the task")
    check_text(value, place)
    return value
