"""What a reward model thinks of texts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch

from lit_instruct.data.collate import EncodedPrompt, collate_prompts
from lit_instruct.data.encoding import encode_prompts, encode_responses
from lit_instruct.evaluation.responses import Sampled, pad_responses
from lit_instruct.evaluation.scoring import score_as_read
from lit_instruct.models.tokenizer import load_tokenizer, padding_id
from lit_instruct.rewards.reward_model import RewardModelScorer
from lit_instruct.types import Prompt


def score_texts(source: str, prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]) -> list[list[float]]:
    """Score responses by a reward model.

    Args:
        source: checkpoint of the reward stage, or the folder into which it was exported.
        prompts: one for each list of responses.
        responses: to each prompt.

    Returns:
        A score for each response.

    Raises:
        ConfigError: it is no reward model.
        DataError: a prompt with a response is longer than its context.
    """
    scorer = RewardModelScorer(source).to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    reader = load_tokenizer(source)
    flat = [text for texts in responses for text in texts]
    if not flat:
        return [[] for _ in responses]
    pairs = zip(prompts, encode_prompts(reader, prompts), responses, strict=True)
    asked = [EncodedPrompt(ids, {"prompt": prompt}) for prompt, ids, texts in pairs for _ in texts]
    sampled = Sampled(
        collate_prompts(asked, padding_id(reader)),
        pad_responses(encode_responses(reader, flat), [True] * len(flat), padding_id(reader)),
        reader,
        flat,
    )
    scores = iter(score_as_read(scorer, sampled).tolist())
    return [list(islice(scores, len(texts))) for texts in responses]
