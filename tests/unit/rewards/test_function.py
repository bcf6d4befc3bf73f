"""FunctionScorer: how functions are named, what they are given, and what is said when they are not right."""

from __future__ import annotations

import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lit_instruct.rewards import FunctionScorer
from lit_instruct.types import ConfigError
from tests.helpers.numbers import assert_close
from tests.unit.rewards.batches import TOKENIZER, batch_of

SOURCE = """
import dataclasses
from neighbour_of_rewards import bonus

@dataclasses.dataclass
class Weighing:
    weight: float = 3.0
    def __call__(self, prompts, responses):
        return [self.weight * len(text.split()) for text in responses]

weighing = Weighing()
class Held:
    @staticmethod
    def constant(prompts, responses):
        return [4.0] * len(responses)
number = 5
def pay(prompts, responses, key=0):
    return [bonus + len(text.split()) for text in responses]
"""


@pytest.fixture
def source(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of reward functions and a file beside it, in the current folder."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (folder / "neighbour_of_rewards.py").write_text("bonus = 10\n")
    (folder / "made_up_rewards.py").write_text(SOURCE)
    monkeypatch.delitem(sys.modules, "made_up_rewards", raising=False)
    monkeypatch.delitem(sys.modules, "neighbour_of_rewards", raising=False)
    return folder / "made_up_rewards.py"


def score(function: Any, **columns: Any) -> Any:
    return FunctionScorer(function)(*batch_of(["w0", "w1"], ["w3 w4", "w5."], columns), tokenizer=TOKENIZER)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("made_up_rewards.py:pay", [12.0, 11.0]),
        ("{folder}/made_up_rewards.py:pay", [12.0, 11.0]),
        ("made_up_rewards:pay", [12.0, 11.0]),
        ("made_up_rewards.pay", [12.0, 11.0]),
        ("made_up_rewards.py:weighing", [6.0, 3.0]),
        ("made_up_rewards.py:Held.constant", [4.0, 4.0]),
        ("made_up_rewards:Held.constant", [4.0, 4.0]),
    ],
)
def test_a_function_is_found_by_its_name(source: Path, name: str, expected: list[float]) -> None:
    assert_close(score(name.format(folder=source.parent)), expected)


def test_a_file_is_run_once_and_again_when_it_has_changed(source: Path) -> None:
    assert FunctionScorer(f"{source}:pay").function is FunctionScorer("made_up_rewards.py:pay").function
    source.write_text(SOURCE.replace("bonus + ", "bonus * "))
    assert_close(score(f"{source}:pay"), [20.0, 10.0])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pay", "need a file or module and the function in it"),
        ("made_up_rewards.py", "need a file or module and the function in it"),
        ("missing.py:pay", r"there is no file '.*missing.py'"),
        ("made_up_rewards.py:play", r"has no 'play'; functions there: pay"),
        ("made_up_rewards.play", r"has no 'play'; functions there: pay"),
        ("no_such_package.rewards:pay", "there is no module 'no_such_package'"),
        ("made_up_rewards.deeper.pay", "there is no module 'made_up_rewards.deeper'"),
        ("made_up_rewards.py:number", "got a int; need a function"),
        ("not a module:pay", "is no name of a module"),
    ],
)
def test_a_name_that_leads_nowhere(source: Path, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        FunctionScorer(name)
    assert str(caught.value).startswith(f"reward function {name}: ")


def test_errors_inside_the_users_file_are_shown_as_they_are(source: Path) -> None:
    source.write_text("import a_library_that_is_not_there\n")
    for name in ("made_up_rewards.py:pay", "made_up_rewards:pay"):
        with pytest.raises(ModuleNotFoundError, match="a_library_that_is_not_there"):
            FunctionScorer(name)
    assert not [name for name, module in sys.modules.items() if str(source) == getattr(module, "__file__", None)]


def test_columns_go_to_the_functions_that_want_them() -> None:
    seen: list[Any] = []

    def none(prompts: Any, responses: Any) -> list[float]:
        return [1.0] * len(prompts)

    def one(prompts: Any, responses: Any, answer: Any, *, level: Any = "default") -> list[float]:
        seen.append((answer, level))
        return [1.0] * len(prompts)

    def every(prompts: Any, responses: Any, **columns: Any) -> list[float]:
        seen.append(columns)
        return [1.0] * len(prompts)

    for function in (none, one, every):
        score(function, answer=["a", "b"], source=[1, 2])
    assert seen == [(["a", "b"], "default"), {"answer": ["a", "b"], "source": [1, 2]}]


def test_prompts_and_responses_come_by_position_and_no_column_takes_their_place() -> None:
    seen: list[Any] = []

    def strange(questions: Any, texts: Any, **columns: Any) -> list[float]:
        seen.extend([questions, texts, columns])
        return [0.0] * len(texts)

    score(strange, prompts=[1, 2], responses=[3, 4], texts=[5, 6], more=[7, 8])
    assert seen == [["w0", "w1"], ["w3 w4", "w5"], {"more": [7, 8]}]


def test_partial_functions_and_varargs_are_functions() -> None:
    def weighted(weight: float, prompts: Any, responses: Any) -> list[float]:
        return [weight] * len(responses)

    assert_close(score(partial(weighted, 2.5)), [2.5, 2.5])
    assert_close(score(lambda *both: [float(len(both))] * 2), [2.0, 2.0])


def test_a_missing_column_is_named() -> None:
    def needs(prompts: Any, responses: Any, reference: Any) -> list[float]:
        return [0.0] * len(prompts)

    with pytest.raises(ConfigError, match=r"needs 'reference'.*found: 'answer', 'level'"):
        score(needs, answer=["a", "b"], level=[1, 2])


async def later(prompts: Any, responses: Any) -> list[float]:
    return [0.0] * len(prompts)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda prompts: [0.0], "need one that takes prompts and responses first"),
        (lambda responses, prompts: [0.0], "takes responses before prompts"),
        (later, "got an async function"),
    ],
)
def test_a_signature_that_cannot_work_is_refused_at_once(function: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FunctionScorer(function)


def test_a_bad_score_is_reported_with_function_prompt_and_value() -> None:
    def broken(prompts: Any, responses: Any) -> list[float]:
        return [1.0, math.nan]

    with pytest.raises(ConfigError, match=r"reward function .*broken: got nan as the score of response 'w5' to .*'w1'"):
        score(broken)


def test_an_error_inside_the_function_keeps_its_traceback() -> None:
    def failing(prompts: Any, responses: Any) -> list[float]:
        raise KeyError("the user's own")

    with pytest.raises(KeyError, match="the user's own") as caught:
        score(failing)
    assert "failing for 2 responses" in caught.value.__notes__[0]
