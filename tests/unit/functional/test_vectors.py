"""No case of ``vectors.py`` may be forgotten: each must be read inside a test."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.functional.vectors import VECTORS

TESTS = Path(__file__).resolve().parents[2]


def cases_in(node: ast.AST) -> set[str]:
    """Names of cases that are written out under this node."""
    return {
        part.value
        for part in ast.walk(node)
        if isinstance(part, ast.Constant) and isinstance(part.value, str) and part.value in VECTORS
    }


def cases_read(source: str) -> set[str]:
    """Cases that a function (or its decorators) names, or reaches through a constant of the file."""
    tree = ast.parse(source)
    constants = {
        target.id: cases_in(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    found: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            found |= cases_in(node)
            for part in ast.walk(node):
                if isinstance(part, ast.Name):
                    found |= constants.get(part.id, set())
    return found


def files_with_tests() -> Iterator[Path]:
    return TESTS.rglob("test_*.py")


def test_every_case_is_read_by_a_test() -> None:
    found: set[str] = set()
    for path in files_with_tests():
        if path != Path(__file__).resolve():
            found |= cases_read(path.read_text(encoding="utf-8"))
    forgotten = sorted(set(VECTORS) - found)
    assert forgotten == []


@pytest.mark.parametrize(
    ("source", "read"),
    [
        ("def test(): VECTORS['missing_eos_score_rules']", True),
        ("CASE = VECTORS['missing_eos_score_rules']\ndef test(): CASE['scores']", True),
        ("CASE = VECTORS['missing_eos_score_rules']\n@parametrize('x', [CASE])\ndef test(x): x", True),
        ("CASE = VECTORS['missing_eos_score_rules']\ndef test(): pass", False),
        ("# missing_eos_score_rules\ndef test(): 'of missing_eos_score_rules'", False),
    ],
)
def test_what_counts_as_reading(source: str, read: bool) -> None:
    assert cases_read(source) == ({"missing_eos_score_rules"} if read else set())
