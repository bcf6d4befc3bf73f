"""Samples side by side; the tables of SampleTable are read back as they were written."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any, cast

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_instruct.callbacks import SampleTable
from lit_instruct.reporting.samples import parse_table, plain_prompt, side_by_side
from lit_instruct.types import Rollout

# SampleTable escapes < and not &, so a text that has "&lt;" already is not told from one with "<".
texts = st.text(st.characters(codec="utf-8"), max_size=30).filter(lambda text: "&lt;" not in text)


def table_of(prompt: str, response: str) -> str:
    """As the callback writes it."""
    true = torch.ones(1, 1, dtype=torch.bool)
    rollout = Rollout(
        prompt_ids_BP=torch.tensor([[0]]),
        prompt_mask_BP=true,
        response_ids_BR=torch.tensor([[1]]),
        response_mask_BR=true,
        finished_B=true[0],
        old_logprobs_BR=torch.tensor([[-1.0]]),
        reference_logprobs_BR=torch.tensor([[-1.5]]),
        old_values_BR=torch.zeros(1, 1),
        raw_scores_B=torch.zeros(1),
        scores_B=torch.tensor([-2.25]),
    )
    decoded = [prompt, response]
    tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: decoded[ids[0]])
    return SampleTable.table(cast(Any, SimpleNamespace(tokenizer=tokenizer)), rollout)


@settings(max_examples=200, deadline=None)
@given(prompt=texts, response=texts)
def test_tables_are_read_back(prompt: str, response: str) -> None:
    ((read_prompt, read_response, score, kl),) = parse_table(table_of(prompt, response))
    assert (read_prompt, read_response) == (prompt.strip(" "), response.strip(" "))
    assert (score, kl) == (-2.25, 0.5)


def test_markup_and_bars_are_text() -> None:
    hostile = "<script>alert('|')</script>\n| x | <br> \\"
    ((prompt, response, *_),) = parse_table(table_of(hostile, "a|b"))
    assert prompt == hostile
    assert response == "a|b"


def table(*rows: tuple[str, str]) -> str:
    lines = [f"| {prompt} | {response} | 1.00 | 0.50 |" for prompt, response in rows]
    return "\n".join(["| prompt | response | score | KL (nats) |", "|---|---|---|---|", *lines])


def test_runs_stand_beside_each_other_and_iterations_below() -> None:
    first = {10: table(("p", "a10"), ("q", "b10")), 20: table(("p", "a20"), ("q", "b20"))}
    second = {10: table(("q", "d10")), 20: table(("q", "d20"))}
    shown = side_by_side([("one", 4, first), ("two", 7, second)], most=9)
    assert [sampled.prompt for sampled in shown] == ["p", "q"]
    assert [[(s.author, s.run, s.iteration, s.response) for s in row] for row in shown[1].rows] == [
        [("one", 4, 10, "b10"), ("two", 7, 10, "d10")],
        [("one", 4, 20, "b20"), ("two", 7, 20, "d20")],
    ]
    assert [[s.response for s in row] for row in shown[0].rows] == [["a10"], ["a20"]]
    assert (shown[0].rows[0][0].score, shown[0].rows[0][0].kl) == (1.0, 0.5)


def test_iterations_of_a_single_run_are_one_row() -> None:
    (shown,) = side_by_side([("one", 0, {step: table(("p", str(step))) for step in range(100)})], most=9)
    assert [[sample.iteration for sample in row] for row in shown.rows] == [[0, 33, 66, 99]]


def test_there_are_no_more_prompts_than_asked_for() -> None:
    tables = {1: table(*((f"p{number}", "r") for number in range(9)))}
    assert [sampled.prompt for sampled in side_by_side([("one", 0, tables)], most=2)] == ["p0", "p1"]
    assert side_by_side([("one", 0, tables)], most=0) == []
    assert side_by_side([], most=3) == []


def test_a_chat_as_text() -> None:
    assert plain_prompt([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]) == (
        "user: hi\nassistant: ho"
    )
    assert plain_prompt("hi") == "hi"
    assert re.fullmatch(r"\[.*\]", plain_prompt([1, 2]))
