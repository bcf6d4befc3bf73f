"""Sampling alone, by our sampler or by transformers' ``generate``: in each step a response for every prompt."""

from __future__ import annotations

import itertools
import random
from typing import Any

import torch
from torch import Tensor

from lit_instruct.models.generation import sample_responses
from lit_instruct.types import PromptBatch
from scripts.benchmark.cases import EOS, PAD, SEED
from scripts.benchmark.gate import Gate, spec
from scripts.benchmark.plain import generated_lengths
from scripts.benchmark.world import language_model


def main() -> None:
    """Sample from gate to gate; facts say how many tokens the last step gave."""
    told = spec()
    gate = Gate()
    torch.set_num_threads(told["threads"])
    dtype = torch.bfloat16 if told["precision"] == "bf16" else torch.float32
    model = language_model(told["config"], end_probability=1.0 / told["mean_response"]).to(dtype).eval()
    stream = random.Random(SEED)
    words = range(2, model.config.vocab_size)
    ids = torch.tensor([stream.choices(words, k=told["prompt_length"]) for _ in range(told["prompts"])])
    torch.manual_seed(SEED)
    gate.begin()
    for turn in itertools.count():
        if told["side"] == "ours":
            lengths = sampled_lengths(model, ids, told, turn)
        else:
            lengths = generated_lengths(model, ids, rows=told["rows"], max_tokens=told["max_response"])
        gate.facts = {"tokens": int(lengths.sum()), "mean_response": float(lengths.float().mean())}
        gate.step()


def sampled_lengths(model: Any, prompt_ids: Tensor, told: dict[str, Any], turn: int) -> Tensor:
    """Tokens of each response of our sampler, int64 ``[B]``."""
    responses = sample_responses(
        model,
        PromptBatch(prompt_ids, torch.ones_like(prompt_ids, dtype=torch.bool)),
        max_tokens=told["max_response"],
        eos_ids=[EOS],
        pad_id=PAD,
        seed=SEED,
        iteration=turn,
        batch_rows=told["rows"],
    )
    return responses.response_mask_BR.sum(dim=1)


if __name__ == "__main__":
    main()
