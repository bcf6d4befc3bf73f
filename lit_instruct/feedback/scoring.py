"""What a reward model thinks of texts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch

from lit_instruct.data.collate import EncodedPrompt, collate_prompts
from lit_instruct.data.encoding import encode_prompts, encode_responses
from lit_instruct.models.backbone import context_length
from lit_instruct.models.tokenizer import load_tokenizer, padding_id
from lit_instruct.rewards.reward_model import RewardModelScorer
from lit_instruct.types import DataError, Prompt, Responses


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
    scorer = RewardModelScorer(source)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scorer.to(device)
    tokenizer = load_tokenizer(source)
    pad_id = padding_id(tokenizer)
    counts = [len(texts) for texts in responses]
    prompt_ids = [ids for ids, n in zip(encode_prompts(tokenizer, prompts), counts, strict=True) for _ in range(n)]
    response_ids = encode_responses(tokenizer, [text for texts in responses for text in texts])
    _refuse_long(prompt_ids, response_ids, context_length(scorer.model.config))
    scores: list[float] = []
    for start in range(0, len(response_ids), scorer.batch_rows):
        rows = slice(start, start + scorer.batch_rows)
        batch = collate_prompts([EncodedPrompt(ids) for ids in prompt_ids[rows]], pad_id)
        found = scorer(
            batch._replace(
                prompt_ids_BP=batch.prompt_ids_BP.to(device), prompt_mask_BP=batch.prompt_mask_BP.to(device)
            ),
            Responses(*(part.to(device) for part in _padded(response_ids[rows], pad_id))),
            tokenizer=tokenizer,
        )
        scores += found.tolist()
    rest = iter(scores)
    return [list(islice(rest, count)) for count in counts]


def _padded(ids: Sequence[list[int]], pad_id: int) -> Responses:
    lengths_B = torch.tensor([len(row) for row in ids])
    mask_BR = torch.arange(int(lengths_B.max())) < lengths_B[:, None]
    ids_BR = torch.full(mask_BR.shape, pad_id, dtype=torch.int64)
    ids_BR[mask_BR] = torch.tensor([token for row in ids for token in row], dtype=torch.int64)
    return Responses(ids_BR, mask_BR, torch.ones(len(ids), dtype=torch.bool))


def _refuse_long(prompts: Sequence[list[int]], responses: Sequence[list[int]], context: int | None) -> None:
    longest = max((len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)), default=0)
    if context is not None and longest > context:
        raise DataError(
            f"got a prompt with a response of {longest} tokens; the reward model reads at most {context}.\n"
            "Do: leave out such rows, or use a reward model with a longer context."
        )
