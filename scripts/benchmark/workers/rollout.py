"""Sampling alone, by our sampler or by transformers' ``generate``: in each step a response for every prompt."""

from __future__ import annotations

import itertools
import random
from typing import Any

import torch
from torch import Tensor

from lit_instruct.models.generation import sample_responses
from lit_instruct.models.packing import enable_packing
from lit_instruct.models.rms_norm import quicken_norms
from lit_instruct.models.rollout_copy import rollout_copy
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
    model: Any = language_model(told["config"], end_probability=1.0 / told["mean_response"]).eval()
    if told["side"] == "ours":  # as a loaded policy is, and as PPO samples with rollout_dtype: bfloat16
        quicken_norms(model)
        enable_packing(model)
        model = rollout_copy(model, "bfloat16") if told["precision"] == "bf16" else model
    elif told["peer_precision"] == "bf16":
        model = model.to(torch.bfloat16)
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
