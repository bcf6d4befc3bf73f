"""Bias, multiple choice and continuations on tiny models, against loops; bad rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_instruct.evaluation import BiasEntropy, Continuations, MultipleChoice
from lit_instruct.evaluation.bias import choice_entropy
from lit_instruct.evaluation.subjects import Subject
from lit_instruct.rewards import FunctionScorer
from lit_instruct.types import ConfigError, DataError
from tests.helpers.numbers import assert_close
from tests.helpers.tiny import EOS, ids, write_jsonl
from tests.unit.evaluation.models import subject


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return subject(tmp_path_factory.mktemp("models"))


def logprob(model: Subject, before: list[int], text: str) -> float:
    """One forward pass for the whole text, one token after the other added up."""
    tokens = ids(text)
    logprobs = model.model(torch.tensor([before + tokens])).logits[0].detach().log_softmax(-1)
    return sum(float(logprobs[len(before) - 1 + place, token]) for place, token in enumerate(tokens))


def test_bias_of_sentences_and_of_responses(model: Subject, tmp_path: Path) -> None:
    rows = [
        {"choices": ["w1 w2 w3", "w1 w4 w3"], "condition": "basic"},  # a document: it begins behind an end of text
        {"prompt": "w9", "choices": ["w5", "w6 w7"], "condition": "respectful"},
        {"prompt": "w8 w9", "choices": ["w7 w7", "w2"], "condition": "basic"},
    ]
    befores = [[EOS], ids("w9 :"), ids("w8 w9 :")]
    entropies = [
        choice_entropy([logprob(model, before, text) for text in row["choices"]])
        for before, row in zip(befores, rows, strict=True)
    ]
    protocol = BiasEntropy(write_jsonl(tmp_path / "bias.jsonl", rows), micro_batch_rows=2)
    found = protocol.measure(model, tmp_path)["entropy_bits"]
    assert list(found) == ["basic", "respectful"]
    assert_close(found["basic"].mean, (entropies[0] + entropies[2]) / 2)
    assert_close(found["respectful"].mean, entropies[1])
    assert [interval.n for interval in found.values()] == [2, 1]


@pytest.mark.parametrize("verbatim", [False, True])
def test_multiple_choice_by_the_mean_a_token(model: Subject, tmp_path: Path, verbatim: bool) -> None:
    prompts = ["w1", "w2 w3", "w4", "w5 w6", "w7", "w8"]
    choices = ["w9", "w1 w2", "w3 w4 w5"]
    right = []
    for prompt in prompts:
        before = ids(prompt if verbatim else f"{prompt} :")
        means = [logprob(model, before, text) / len(ids(text)) for text in choices]
        right.append(means.index(max(means)))
    rows = [{"prompt": prompt, "choices": choices, "correct": 1, "owner": "o"} for prompt in prompts]
    protocol = MultipleChoice(write_jsonl(tmp_path / "mc.jsonl", rows), verbatim=verbatim)
    found = protocol.measure(model, tmp_path)["accuracy"]["all"]
    assert_close(found.mean, right.count(1) / 6)
    assert (found.low, found.high) == (found.mean, found.mean)  # one owner: nothing to draw


def polite(prompts: Sequence[Any], responses: Sequence[str], wanted: Sequence[str]) -> list[float]:
    return [float(word in text.split()) for text, word in zip(responses, wanted, strict=True)]


def words(prompts: Sequence[Any], responses: Sequence[str]) -> list[float]:
    return [float(len(text.split())) for text in responses]


def test_continuations_by_condition_and_scorer(model: Subject, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"{prefix}w{n}", "condition": condition, "wanted": "w7"}
        for condition, prefix in (("none", ""), ("respectful", "w20 w21 "))
        for n in range(8)
    ]
    scorers = {"polite": FunctionScorer(polite), "words": FunctionScorer(words)}
    protocol = Continuations(write_jsonl(tmp_path / "c.jsonl", rows), scorers, max_response_tokens=5)
    found = protocol.measure(model, tmp_path / "responses")
    assert [(name, list(by)) for name, by in found.items()] == [(name, ["none", "respectful"]) for name in scorers]
    assert found["words"]["none"].n == 8
    from lit_instruct.evaluation.responses import sample  # the same responses, read again

    (some,) = sample(model, protocol.asked, protocol.sampling, tmp_path / "responses")
    counts = [len(text.split()) for text in some.texts]
    assert_close(found["words"]["respectful"].mean, sum(counts[8:]) / 8)
    assert_close(found["polite"]["none"].mean, sum("w7" in text.split() for text in some.texts[:8]) / 8)


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        (BiasEntropy, {"choices": ["w1"]}, "field 'choices': got .* need a list of two or more texts"),
        (BiasEntropy, {"choices": ["w1", 3]}, r"field 'choices\[1\]': got 3 \(int\)"),
        (BiasEntropy, {"prompt": "w1"}, "field 'choices': got no such column"),
        (BiasEntropy, {"prompt": 3, "choices": ["w1", "w2"]}, "field 'prompt': got 3"),
        (MultipleChoice, {"choices": ["w1", "w2"], "correct": 0}, "field 'prompt': got no such column"),
        (MultipleChoice, {"prompt": "w1", "choices": ["w1", "w2"]}, "field 'correct': got no such column"),
        (MultipleChoice, {"prompt": "w1", "choices": ["w1", "w2"], "correct": 2}, "field 'correct': got 2 .* 0 to 1"),
        (MultipleChoice, {"prompt": "w1", "choices": ["w1", "w2"], "correct": True}, "field 'correct': got True"),
    ],
)
def test_bad_rows_are_named_before_anything_runs(tmp_path: Path, kind: Any, row: Any, message: str) -> None:
    good = {"prompt": "w1", "choices": ["w1", "w2"], "correct": 0}
    with pytest.raises(DataError, match=rf"(?s)rows.jsonl:2: {message}.*Do: "):
        kind(write_jsonl(tmp_path / "rows.jsonl", [good, row]))


def test_a_choice_without_room_is_named(model: Subject, tmp_path: Path) -> None:
    rows = [{"prompt": "w1", "choices": [" ".join(["w1"] * 31), "w2"], "correct": 0}]
    with pytest.raises(DataError, match=r"rows.jsonl:1: field 'prompt': got 33 tokens"):
        MultipleChoice(write_jsonl(tmp_path / "rows.jsonl", rows)).measure(model, tmp_path)


def test_a_sentence_longer_than_the_context_is_named(model: Subject, tmp_path: Path) -> None:
    """It would be read behind the last position that the model has learnt."""
    rows = [{"choices": [" ".join(["w1"] * words), "w2"]} for words in (31, 32)]
    BiasEntropy(write_jsonl(tmp_path / "rows.jsonl", rows[:1])).measure(model, tmp_path)
    with pytest.raises(DataError, match=r"rows.jsonl:2: field 'choices': got 33 tokens"):
        BiasEntropy(write_jsonl(tmp_path / "rows.jsonl", rows)).measure(model, tmp_path)


def test_settings_that_cannot_work(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "c.jsonl", [{"prompt": "w1"}])
    with pytest.raises(ConfigError, match="scorers: got none"):
        Continuations(path, {})
    with pytest.raises(ConfigError, match="Continuations max_response_tokens: got 0"):
        Continuations(path, {"words": FunctionScorer(words)}, max_response_tokens=0)
    with pytest.raises(ConfigError, match="micro_batch_rows: got 0"):
        BiasEntropy(path, micro_batch_rows=0)
