"""Responses that a GPU samples are those of the CPU, in every family of decoders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.fabric.utilities import move_data_to_device

from lit_instruct.models.forward import response_logprobs
from lit_instruct.models.rollout_copy import rollout_copy
from tests.helpers.numbers import assert_close
from tests.unit.models.networks import left_padded
from tests.unit.models.test_slot_decoding import admitted, assert_same, families, plain_model, sample, some_prompts

GPU = torch.device("cuda")


@families
@pytest.mark.parametrize("make", [admitted, plain_model])
def test_tokens_and_their_log_probabilities(family: str, make: Callable[[str], Any]) -> None:
    prompts = left_padded(some_prompts())
    model = make(family)
    need = sample(model, prompts)
    with torch.no_grad():
        wanted, _ = response_logprobs(model, prompts, need, temperature=1.0)
    model.cuda()
    there = move_data_to_device(prompts, GPU)
    got = sample(model, there)
    assert_same(move_data_to_device(got, "cpu"), need)
    with torch.no_grad():
        logprobs, _ = response_logprobs(model, there, got, temperature=1.0)
    assert_close(logprobs, wanted, scale=10.0)  # logits of up to 30


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_copy_in_bf16(family: str) -> None:
    model, prompts = admitted(family).cuda(), move_data_to_device(left_padded(some_prompts()), GPU)
    twin = rollout_copy(model, "bfloat16")
    assert {p.dtype for p in twin.parameters()} == {torch.bfloat16}
    ids = prompts.prompt_ids_BP[:1, -3:]
    with torch.no_grad():
        assert_close(twin(ids).logits, model(ids).logits, dtype=torch.bfloat16, scale=10.0)
