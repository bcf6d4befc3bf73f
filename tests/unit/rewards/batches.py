"""Prompts and responses of the tiny world as PPO hands them to a scorer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lit_instruct.data.collate import EncodedPrompt, collate_prompts
from lit_instruct.data.encoding import encode_prompts
from lit_instruct.types import Prompt, PromptBatch, Responses
from tests.helpers.tiny import EOS, ids, tiny_tokenizer
from tests.unit.models.networks import right_padded

TOKENIZER = tiny_tokenizer()


def batch_of(
    prompts: Sequence[Prompt], responses: Sequence[str], columns: dict[str, Sequence[Any]] | None = None
) -> tuple[PromptBatch, Responses]:
    """Responses are words of the tiny world; those that end with a full stop ran into the length limit."""
    encoded = encode_prompts(TOKENIZER, list(prompts))
    table = [
        {"prompt": prompt} | {name: values[row] for name, values in (columns or {}).items()}
        for row, prompt in enumerate(prompts)
    ]
    samples = [EncodedPrompt(tokens, row) for tokens, row in zip(encoded, table, strict=True)]
    ended = [ids(text.rstrip(".")) + ([] if text.endswith(".") else [EOS]) for text in responses]
    word = ids("w0")[0]  # as padding, so that padding that is read shows
    return collate_prompts(samples, pad_id=1), right_padded(ended, extra=2, pad=word)
