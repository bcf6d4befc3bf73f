"""Measure models of the toy world: what they write, what the gold score says, what the reward model says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_instruct.data.collate import EncodedPrompt, collate_prompts
from lit_instruct.data.encoding import encode_prompts
from lit_instruct.models.generation import sample_responses
from lit_instruct.models.tokenizer import padding_id
from lit_instruct.rollouts import ScoreFunction
from lit_instruct.toyworld.gold import Assessment, assess
from lit_instruct.toyworld.world import ToyWorld
from lit_instruct.types import PromptBatch, Responses

MAX_RESPONSE_TOKENS = 40


class Samples(NamedTuple):
    """One response a prompt.

    Attributes:
        prompts: the prompts as text.
        texts: the responses as text.
        batch: the encoded prompts.
        responses: the encoded responses.
    """

    prompts: list[str]
    texts: list[str]
    batch: PromptBatch
    responses: Responses


def sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], *, seed: int) -> Samples:
    """Sample one response at temperature 1 for each prompt.

    Args:
        model: a policy.
        tokenizer: with its template.
        prompts: texts; one that stands there twice gets two responses.
        seed: of the sampling.

    Returns:
        The samples.
    """
    places = [f"prompt {number}" for number in range(len(prompts))]
    encoded = [EncodedPrompt(ids) for ids in encode_prompts(tokenizer, list(prompts), places)]
    batch = collate_prompts(encoded, pad_id=padding_id(tokenizer))
    responses = sample_responses(
        model,
        batch,
        max_tokens=MAX_RESPONSE_TOKENS,
        eos_ids=[tokenizer.eos_token_id],
        pad_id=padding_id(tokenizer),
        seed=seed,
    )
    rows = zip(responses.response_ids_BR, responses.response_mask_BR, strict=True)
    texts = tokenizer.batch_decode([ids[mask].tolist() for ids, mask in rows], skip_special_tokens=True)
    return Samples(list(prompts), texts, batch, responses)


def judge(world: ToyWorld, samples: Samples) -> list[Assessment]:
    """The gold score of each sample.

    Args:
        world: holds the facts.
        samples: of one model.

    Returns:
        One assessment a sample.
    """
    return [assess(world, prompt, text) for prompt, text in zip(samples.prompts, samples.texts, strict=True)]


def accuracy_against_gold(world: ToyWorld, scorer: ScoreFunction, sets: Sequence[Samples]) -> float:
    """Share of pairs of responses to one prompt that the scorer orders as the gold score does.

    Args:
        world: decides the gold score.
        scorer: a reward model.
        sets: several samples for the same prompts, in the same order.

    Returns:
        The share of pairs without a gold tie; scorer ties count one half.
    """
    scores = torch.stack([scorer(samples.batch, samples.responses) for samples in sets])
    gold = torch.tensor([[a.total for a in judge(world, samples)] for samples in sets])
    first, second = torch.triu_indices(len(sets), len(sets), offset=1)
    wanted = (gold[first] - gold[second]).sign()
    agrees = (wanted * (scores[first] - scores[second]).sign() + 1) / 2
    return float(agrees[wanted != 0].mean())
