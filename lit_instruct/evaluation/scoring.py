"""Scores of any model's responses, whichever tokens the scorer reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from lit_instruct.data.bad_rows import data_error
from lit_instruct.data.collate import EncodedPrompt, collate_prompts
from lit_instruct.data.encoding import encode_prompts
from lit_instruct.evaluation.responses import Sampled, move_prompts, pad_responses
from lit_instruct.models.backbone import context_length
from lit_instruct.models.tokenizer import load_tokenizer, padding_id, reads_alike
from lit_instruct.rewards import RewardModelScorer, Scorer, WeightedSum
from lit_instruct.rewards.base import shortened
from lit_instruct.types import ConfigError, PromptBatch, Responses

_SCORED_ROWS = 512  # handed over at a time


def name_of(scorer: Scorer) -> str:
    """What the results call a scorer.

    Args:
        scorer: any.

    Returns:
        Its identity, and of a reward model the checkpoint.
    """
    checkpoint = scorer.checkpoint if isinstance(scorer, RewardModelScorer) else None
    return scorer.identity() if checkpoint is None else f"{scorer.identity()} {checkpoint}"


def check_scorer(scorer: Scorer) -> None:
    """Let a scorer look whether it can work.

    A reward model is not asked: it is given text in its own tokenizer here, whoever wrote it.

    Args:
        scorer: any.

    Raises:
        ConfigError: it cannot work.
    """
    if isinstance(scorer, WeightedSum):
        for part in scorer.scorers:
            assert isinstance(part, Scorer)
            check_scorer(part)
    elif not isinstance(scorer, RewardModelScorer):
        scorer.check(None)


def score(scorer: Scorer, sampled: Sampled) -> np.ndarray:
    """Score responses of any model.

    Reward models of this package read token ids. They are given prompts in their own template, so that all models'
    responses are seen in the same form, and responses as they were sampled if they have the policy's vocabulary, else
    written out and read anew.

    Args:
        scorer: any.
        sampled: responses to P prompts.

    Returns:
        fp64 ``[P]``.

    Raises:
        ConfigError: the scorer gives no usable scores.
        DataError: a prompt with its response is longer than a reward model reads.
    """
    if isinstance(scorer, WeightedSum):
        parts = [part for part in scorer.scorers if isinstance(part, Scorer)]
        return sum(
            (weight * score(part, sampled) for part, weight in zip(parts, scorer.weights, strict=True)),
            start=np.zeros(len(sampled.texts)),
        )
    if isinstance(scorer, RewardModelScorer) and scorer.checkpoint is not None:
        sampled = _in_tokens_of(scorer.checkpoint, sampled)
    return score_as_read(scorer, sampled)


def score_as_read(scorer: Scorer, sampled: Sampled) -> np.ndarray:
    """Score responses in the tokens in which they stand there.

    Args:
        scorer: any that reads these tokens, or text.
        sampled: responses to P prompts.

    Returns:
        fp64 ``[P]``.

    Raises:
        ConfigError: the scorer gives no usable scores.
        DataError: a prompt with its response is longer than a reward model reads.
    """
    if isinstance(scorer, RewardModelScorer):
        _refuse_long(scorer, sampled)
    device = _device_of(scorer)
    scores = []
    for start in range(0, len(sampled.texts), _SCORED_ROWS):
        some = select(sampled, range(start, min(start + _SCORED_ROWS, len(sampled.texts))))
        responses = Responses(*(part.to(device) for part in some.responses))
        found = scorer(move_prompts(some.prompts, device), responses, tokenizer=some.tokenizer)
        scores.append(found.double().cpu().numpy())
    scores_P = np.concatenate(scores)
    if (bad := np.flatnonzero(~np.isfinite(scores_P))).size:
        raise ConfigError(
            f"{scorer.identity()}: got {scores_P[bad[0]]} as the score of response {shortened(sampled.texts[bad[0]])}; "
            "need a finite number. Do: look at what gives the scores."
        )
    return scores_P


def select(sampled: Sampled, places: Sequence[int]) -> Sampled:
    """Some of the responses.

    Args:
        sampled: responses to P prompts.
        places: which.

    Returns:
        A record with these alone.
    """
    index = torch.tensor(list(places))
    prompts = PromptBatch(
        sampled.prompts.prompt_ids_BP[index],
        sampled.prompts.prompt_mask_BP[index],
        [sampled.prompts.rows[place] for place in places],
    )
    responses = Responses(*(part[index] for part in sampled.responses))
    return Sampled(prompts, responses, sampled.tokenizer, [sampled.texts[place] for place in places])


def _refuse_long(scorer: RewardModelScorer, sampled: Sampled) -> None:
    """Behind its context a model either fails or says something that it was never trained to say."""
    context = context_length(scorer.model.config)
    lengths_P = sampled.prompts.prompt_mask_BP.sum(dim=1) + sampled.responses.response_mask_BR.sum(dim=1)
    if context is not None and (long := (lengths_P > context).nonzero().flatten().tolist()):
        texts = [f"{shortened(sampled.texts[place])}: got {int(lengths_P[place])} tokens" for place in long]
        raise data_error(
            f"{len(long)} of {len(lengths_P)} responses are, with their prompts, too long for the reward model, which "
            f"reads at most {context} tokens:",
            texts,
            "leave these prompts out, take shorter responses, or a reward model with a longer context.",
        )


def _in_tokens_of(checkpoint: str, sampled: Sampled) -> Sampled:
    """The same prompts and responses as the reward model of a checkpoint reads them."""
    reader = load_tokenizer(checkpoint)
    encoded = encode_prompts(reader, [row["prompt"] for row in sampled.prompts.rows])
    pad_id = padding_id(reader)
    prompts = collate_prompts(
        [EncodedPrompt(ids, row) for ids, row in zip(encoded, sampled.prompts.rows, strict=True)], pad_id
    )
    responses = sampled.responses
    if not reads_alike(reader, sampled.tokenizer):
        ids = [
            _read_anew(reader, text, bool(ended))
            for text, ended in zip(sampled.texts, responses.finished_B, strict=True)
        ]
        responses = pad_responses(ids, responses.finished_B.tolist(), pad_id)
    return Sampled(prompts, responses, reader, sampled.texts)


def _read_anew(reader: Any, text: str, ended: bool) -> list[int]:
    """A response's tokens up to an end of text, and one end of text where the response ended by itself."""
    ids = reader(text, add_special_tokens=False)["input_ids"]
    end = reader.eos_token_id
    ids = ids[: ids.index(end)] if end in ids else ids
    return [*ids, end] if ended or not ids else ids


def _device_of(scorer: nn.Module) -> torch.device:
    return next((parameter.device for parameter in scorer.parameters()), torch.device("cpu"))
