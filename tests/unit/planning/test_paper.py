"""The page's tables are what the command prints, and its operations those of the paper."""

from __future__ import annotations

from pathlib import Path

import pytest

from lit_instruct.planning.paper import paper_tables

PAGE = Path(__file__).parents[3] / "docs" / "scaling.md"


def cells(run: str) -> list[str]:
    line = next(line for line in paper_tables().splitlines() if line.startswith(f"| {run} "))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_page_shows_what_the_command_prints():
    page = PAGE.read_text(encoding="utf-8")
    for part in paper_tables().split("\n\n"):
        assert part in page, f"docs/scaling.md is not what lit-instruct plan --paper prints: {part[:40]!r} ..."


@pytest.mark.parametrize(("run", "printed"), [("SFT 175b", 4.9), ("PPO-ptx 175b", 60.0)])
def test_the_papers_figure_lies_between_packed_rows_and_whole_contexts(run, printed):
    *_, packed, whole, said = cells(run)
    assert float(said) == printed
    assert float(packed) < printed < float(whole)


def test_operations_of_175b_ppo_ptx_by_hand():
    """6 operations a parameter and token of text: 2,048,000 chunks of 2,048; attention comes on top."""
    text = 2_048_000 * 2048 * 6 * 174.6e9 / 8.64e19
    assert text < float(cells("PPO-ptx 175b")[4]) < 1.04 * text
