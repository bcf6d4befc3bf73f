"""What an answer may hold."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest

from lit_instruct.feedback.forms import (
    MAX_NOTE,
    MAX_TEXT,
    PROMPT_FLAGS,
    RESPONSE_FLAGS,
    Form,
    FormError,
    inverse,
    read_skip,
    rearranged,
)
from tests.helpers.labelling import ranking

PAPER = "fails_instruction unfit_for_assistant hallucination violates_constraint sexual violent encourages_harm"


def test_the_flags_are_those_of_the_paper() -> None:
    assert " ".join(RESPONSE_FLAGS) == f"{PAPER} denigrates harmful_advice opinion moral_judgment"


@pytest.mark.parametrize("ranks", [[1, 2, 3], [3, 1, 2], [1, 1, 1], [2, 1, 2], [1, 1, 2]])
def test_a_complete_ranking_is_kept(ranks: list[int]) -> None:
    content = ranking(ranks, rating=7, flags=["opinion", "sexual"], note="close")
    read = Form("rank", 3).answer(content)
    assert [judgement["rank"] for judgement in read["responses"]] == ranks
    assert read["responses"][0] == {"rating": 7, "flags": ["sexual", "opinion"], "rank": ranks[0]}
    assert read["note"] == "close"


def with_(path: str, value: Any) -> dict[str, Any]:
    """A valid ranking of three responses in which one place holds another value."""
    content: Any = copy.deepcopy(ranking([1, 2, 3]))
    place = content
    *parents, last = [int(name) if name.isdigit() else name for name in path.split(".")]
    for name in parents:
        place = place[name]
    place[last] = value
    return content


@pytest.mark.parametrize(
    ("content", "field"),
    [
        (None, "answer"),
        ([], "answer"),
        ({}, "answer"),
        ({**ranking([1, 2, 3]), "labeler": "bob"}, "answer"),
        (ranking([1, 2]), "responses"),
        (ranking([1, 2, 3, 4]), "responses"),
        (ranking([1, 3, 3]), "responses"),
        (ranking([2, 2, 3]), "responses"),
        (with_("responses.1", {"rating": 1, "rank": 2}), "responses[1]"),
        (with_("responses.1.rating", 0), "responses[1].rating"),
        (with_("responses.1.rating", 8), "responses[1].rating"),
        (with_("responses.1.rating", 4.0), "responses[1].rating"),
        (with_("responses.1.rating", "4"), "responses[1].rating"),
        (with_("responses.1.rating", True), "responses[1].rating"),
        (with_("responses.1.rating", None), "responses[1].rating"),
        (with_("responses.2.rank", 4), "responses[2].rank"),
        (with_("responses.2.rank", None), "responses[2].rank"),
        (with_("responses.0.flags", "sexual"), "responses[0].flags"),
        (with_("responses.0.flags", ["sexual", "no_such"]), "responses[0].flags"),
        (with_("responses.0.flags", [["sexual"]]), "responses[0].flags"),
        (with_("note", None), "note"),
        (with_("note", "x" * (MAX_NOTE + 1)), "note"),
        (with_("note", "a\0b"), "note"),
        (with_("note", "a\ud800b"), "note"),
    ],
)
def test_other_rankings_are_refused(content: Any, field: str) -> None:
    with pytest.raises(FormError) as raised:
        Form("rank", 3).answer(content)
    assert raised.value.field == field


def test_a_draft_may_be_unfinished_but_not_wrong() -> None:
    form = Form("rank", 2)
    empty = {"rating": None, "flags": [], "rank": None}
    draft = {"responses": [empty, {**empty, "rating": 3}], "note": ""}
    assert form.draft(draft) == draft
    with pytest.raises(FormError):
        form.answer(draft)
    with pytest.raises(FormError):
        form.draft({"responses": [empty, {**empty, "rating": 9}], "note": ""})
    assert Form("demonstrate").draft({"response": "", "note": ""}) == {"response": "", "note": ""}


@pytest.mark.parametrize(("kind", "field"), [("demonstrate", "response"), ("write_prompt", "prompt")])
def test_written_texts(kind: str, field: str) -> None:
    form = Form(kind)
    assert form.answer({field: " a\n\u202eb ", "note": ""})[field] == " a\n\u202eb "  # kept to the letter
    for bad in ("", " \n", "x" * (MAX_TEXT + 1), "a\0", "\udfff", 3, None, ["a"]):
        with pytest.raises(FormError) as raised:
            form.answer({field: bad, "note": ""})
        assert raised.value.field == field


def test_flags_of_a_prompt() -> None:
    flags = list(PROMPT_FLAGS)
    assert Form("flag_prompt").answer({"flags": [flags[1], flags[0], flags[1]], "note": ""})["flags"] == flags[:2]
    with pytest.raises(FormError):
        Form("flag_prompt").answer({"flags": ["hallucination"], "note": ""})  # one of responses


def test_a_skip_needs_a_known_reason() -> None:
    assert read_skip({"reason": "unclear", "note": ""}) == {"reason": "unclear", "note": ""}
    assert read_skip({"reason": "other", "note": "why"})["note"] == "why"
    for bad in ({"reason": "bored", "note": ""}, {"reason": "other", "note": " "}, {"reason": ["other"], "note": ""}):
        with pytest.raises(FormError):
            read_skip(bad)


def test_rearranging_can_be_undone() -> None:
    order = random.sample(range(9), 9)
    content = {"responses": list("abcdefghi"), "note": ""}
    shown = rearranged(content, order)
    assert [content["responses"][index] for index in order] == shown["responses"]
    assert rearranged(shown, inverse(order)) == content
    assert rearranged({"response": "a", "note": ""}, []) == {"response": "a", "note": ""}
