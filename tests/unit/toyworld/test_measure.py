"""What the quickstart measures models with."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_instruct.models.backbone import fit_to_tokenizer, load_language_model
from lit_instruct.models.tokenizer import load_tokenizer
from lit_instruct.toyworld import ToyWorld, build_tokenizer, write_demonstration
from lit_instruct.toyworld.measure import (
    Samples,
    accuracy_against_gold,
    judge,
    sample,
)
from lit_instruct.types import PromptBatch, Responses
from tests.helpers.tiny import tiny_llama

WORLD = ToyWorld(3)
TOKENIZER = load_tokenizer(build_tokenizer())


def _model(seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    return load_language_model(fit_to_tokenizer(tiny_llama(initializer_range=0.3), TOKENIZER)).eval()


def _prompts(count: int) -> list[str]:
    tasks = WORLD.tasks("train")
    return [next(tasks).prompt for _ in range(count)]


def test_samples_are_texts_of_their_ids_and_repeat_with_the_seed() -> None:
    prompts = _prompts(5)
    one, again, other = (sample(_model(0), TOKENIZER, prompts, seed=seed) for seed in (1, 1, 2))
    assert one.texts == again.texts != other.texts
    for text, ids, mask in zip(one.texts, one.responses.response_ids_BR, one.responses.response_mask_BR, strict=True):
        words = [TOKENIZER.convert_ids_to_tokens(int(token)) for token in ids[mask]]
        assert text.split() == [word for word in words if word not in TOKENIZER.all_special_tokens]


def test_the_same_prompt_twice_gets_two_responses() -> None:
    twice = sample(_model(0), TOKENIZER, _prompts(1) * 2, seed=1)
    assert twice.texts[0] != twice.texts[1]


def _sets() -> list[Samples]:
    """Three hand-made responses a prompt: a demonstration, one for another prompt, a rude one."""
    tasks = list(islice(WORLD.tasks("train"), 12))
    prompts = [task.prompt for task in tasks]
    stream = WORLD.stream("measure")
    good = [write_demonstration(WORLD, task, stream) for task in tasks]
    empty = PromptBatch(torch.zeros(12, 1, dtype=torch.long), torch.ones(12, 1, dtype=torch.bool))

    def packed(texts: list[str], number: int) -> Samples:
        ids = torch.arange(12)[:, None] + 100 * number  # a scorer below looks its score up by this id
        filled = torch.ones(12, 1, dtype=torch.bool)
        return Samples(prompts, texts, empty, Responses(ids, filled, filled[:, 0]))

    return [packed(texts, number) for number, texts in enumerate((good, good[1:] + good[:1], ["you fool ."] * 12))]


@pytest.mark.parametrize(("sign", "expected"), [(1.0, 1.0), (-1.0, 0.0), (0.0, 0.5)])
def test_accuracy_against_gold(sign: float, expected: float) -> None:
    sets = _sets()
    gold = {
        int(ids): assessment.total
        for samples in sets
        for ids, assessment in zip(samples.responses.response_ids_BR[:, 0], judge(WORLD, samples), strict=True)
    }

    def scorer(prompts: PromptBatch, responses: Responses) -> Tensor:
        return torch.tensor([sign * gold[int(ids)] for ids in responses.response_ids_BR[:, 0]])

    assert accuracy_against_gold(WORLD, scorer, sets) == expected
