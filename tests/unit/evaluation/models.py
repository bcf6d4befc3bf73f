"""Small models as subjects of an evaluation, and responses of which only the texts matter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lit_instruct.data.collate import EncodedPrompt, collate_prompts
from lit_instruct.evaluation.responses import Asked, Sampled, pad_responses
from lit_instruct.evaluation.subjects import ModelSource, Subject, load_subject
from tests.helpers.tiny import ids, save_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def subject(folder: Path, name: str = "model", *, seed: int = 0, **about: Any) -> Subject:
    """A tiny Llama with one token a word."""
    source = about.pop("source", None) or save_model(folder / f"{name}-{seed}", seed=seed)
    return load_subject(ModelSource(name, source, **about), torch.device("cpu"))


def asked(prompts: Sequence[Any], **columns: Sequence[Any]) -> Asked:
    """Prompts with columns; each its own owner unless there is a column of owners."""
    rows = [
        {"prompt": prompt} | {name: values[place] for name, values in columns.items()}
        for place, prompt in enumerate(prompts)
    ]
    places = [f"p.jsonl:{place + 1}" for place in range(len(rows))]
    return Asked(rows, places, list(columns.get("owner", range(len(rows)))))


def written(
    prompts: Sequence[Any], texts: Sequence[str], *, finished: bool = True, **columns: Sequence[Any]
) -> Sampled:
    """Responses that somebody might have sampled."""
    rows = asked(prompts, **columns).rows
    batch = collate_prompts([EncodedPrompt(ids("w0 :"), row) for row in rows], pad_id=1)
    ended = [[*ids(text), TOKENIZER.eos_token_id] if finished else ids(text) for text in texts]
    return Sampled(batch, pad_responses(ended, [finished] * len(ended), pad_id=1), TOKENIZER, list(texts))
