"""What models wrote for the same prompts, to be read side by side."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

SAMPLE_TEXTS = "ppo/val/samples"
"""The name under which the callback SampleTable logs its tables."""

MOST_ITERATIONS = 4

_CELL_BORDER = re.compile(r"(?<!\\)\|")


class Sample(NamedTuple):
    """One response.

    Attributes:
        author: name of the run or model.
        run: its place among them, for the colour.
        iteration: of PPO when it was drawn; None for a finished model.
        response: the text.
        score: of the scorer or reward model; None if there is none.
        kl: nats, to the reference; None if not measured.
    """

    author: str
    run: int
    iteration: int | None
    response: str
    score: float | None
    kl: float | None


class SampledPrompt(NamedTuple):
    """A prompt and what was written for it.

    Attributes:
        prompt: the text.
        rows: samples that stand in one row, such as those of one iteration.
    """

    prompt: str
    rows: list[list[Sample]]


class _TableRow(NamedTuple):
    prompt: str
    response: str
    score: float
    kl: float


def parse_table(table: str) -> list[_TableRow]:
    """Read a table of the callback SampleTable back.

    Args:
        table: Markdown.

    Returns:
        Its rows, with the texts as the policy's tokenizer decoded them.
    """
    rows = []
    for line in table.split("\n")[2:]:
        cells = [cell.strip(" ") for cell in _CELL_BORDER.split(line)[1:-1]]
        if len(cells) == 4:
            prompt, response = (_unescaped(cell) for cell in cells[:2])
            rows.append(_TableRow(prompt, response, float(cells[2]), float(cells[3])))
    return rows


def side_by_side(tables: Sequence[tuple[str, int, dict[int, str]]], most: int) -> list[SampledPrompt]:
    """Put the tables of several runs and iterations together, prompt by prompt.

    Args:
        tables: of each run its name, its place among the runs, and its tables by iteration.
        most: how many prompts.

    Returns:
        The first prompts of the first run, then those that only others have. Of many iterations the first, the last and
        some between are shown. With several runs a row is an iteration; those of a single run are one row.
    """
    shown = _spread(sorted({iteration for _, _, texts in tables for iteration in texts}), MOST_ITERATIONS)
    found: dict[str, dict[int, dict[int, Sample]]] = {}  # prompt -> iteration -> run -> sample
    for name, place, texts in tables:
        for iteration in shown:
            for row in parse_table(texts.get(iteration, "")):
                sample = Sample(name, place, iteration, row.response, row.score, row.kl)
                found.setdefault(row.prompt, {}).setdefault(iteration, {})[place] = sample
    prompts = []
    for prompt, by_iteration in list(found.items())[:most]:
        rows = [list(by_iteration[iteration].values()) for iteration in sorted(by_iteration)]
        prompts.append(SampledPrompt(prompt, rows if len(tables) > 1 else [[row[0] for row in rows]]))
    return prompts


def plain_prompt(prompt: Any) -> str:
    """A prompt as text; turns of a chat one after another, each with its role."""
    if isinstance(prompt, list) and all(isinstance(turn, dict) for turn in prompt):
        return "\n".join(f"{turn.get('role', '')}: {turn.get('content', '')}" for turn in prompt)
    return str(prompt)


def _unescaped(cell: str) -> str:
    return cell.replace("<br>", "\n").replace("&lt;", "<").replace("\\|", "|")


def _spread(values: Sequence[int], most: int) -> list[int]:
    """At most so many of ascending values: the first, the last, and between them at even steps."""
    if len(values) <= most:
        return list(values)
    return [values[round(place * (len(values) - 1) / (most - 1))] for place in range(most)]
