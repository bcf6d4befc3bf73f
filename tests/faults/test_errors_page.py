"""docs/errors.md against what the bad inputs of scripts/bad_inputs are told now."""

from __future__ import annotations

import re
from typing import Any

import pytest

from scripts.bad_inputs.case import Case
from scripts.bad_inputs.run import PAGE, as_row, heading_of, sections, told

_EVERY = 9
"""Each ninth case is run here, all of them with ``-m slow``."""

CASES = [case for module in sections() for case in module.CASES]
ROWS = set(PAGE.read_text(encoding="utf-8").splitlines())


def test_the_page_has_a_row_for_each_case_and_no_other() -> None:
    expected = [
        line
        for module in sections()
        for line in (f"## {heading_of(module)}", *(f"| {case.title} |" for case in module.CASES))
    ]
    found = []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        title = re.match(r"(## .*|\| .*? \|)", line)
        if title and not line.startswith(("| what is wrong |", "|---")):
            found.append(title[1])
    assert found == expected
    assert len(CASES) >= 60
    assert len({case.title for case in CASES}) == len(CASES)


def test_each_message_says_what_is_needed_or_what_to_do() -> None:
    helpful = re.compile(
        r"Do: |\b[Nn]eed|[Gg]ive|[Dd]id you mean|[Ss]et |[Ll]ower|[Uu]se |[Aa]dd |[Rr]emove|[Tt]rain |update"
    )
    rows = [row for row in ROWS if row.startswith("| ") and not row.startswith("| what is wrong |")]
    assert [row for row in rows if not helpful.search(row.partition(" | ")[2])] == []
    assert [row for row in rows if "Traceback" in row] == []


@pytest.mark.parametrize("case", CASES[::_EVERY], ids=lambda case: case.title)
def test_the_page_says_what_is_printed(case: Case) -> None:
    assert as_row(case, told(case)) in ROWS


@pytest.mark.slow  # minutes: most cases load a model
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_the_page_says_what_is_printed_everywhere(case: Any) -> None:
    assert as_row(case, told(case)) in ROWS
