"""Seven decoder families at toy size, ragged prompts and responses, and the plain ways to run them one by one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lit_instruct.models.scalar_head import ScalarModel
from lit_instruct.types import PromptBatch, Responses

VOCABULARY = 41
EOS = 2

_WINDOWED = {"sliding_window": 4}
_DECODER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # far from uniform, so that a wrong position or mask shows
}
_NEOX = {name: value for name, value in _DECODER.items() if name != "num_key_value_heads"}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _DECODER,
    "qwen2": _DECODER,
    "mistral": {**_DECODER, **_WINDOWED},
    "gemma2": {**_DECODER, **_WINDOWED, "head_dim": 8, "query_pre_attn_scalar": 8},
    "gpt_neox": _NEOX,
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.3},
    "opt": {
        "hidden_size": 16,
        "word_embed_proj_dim": 16,
        "ffn_dim": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "init_std": 0.3,
    },
}
"""gpt2 and opt have learned positions and catch position mistakes; mistral and gemma2 see 4 columns back."""


def tiny_config(family: str, **changes: Any) -> PretrainedConfig:
    fields = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": EOS}
    return AutoConfig.for_model(family, **fields | FAMILIES[family] | changes)


def tiny_model(family: str = "gpt2", *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(tiny_config(family, **changes), dtype=torch.float32).eval()


def tiny_scalar_model(family: str = "gpt2", *, seed: int = 1) -> ScalarModel:
    model = ScalarModel(tiny_model(family, seed=seed).base_model)
    model.score_bias.fill_(0.25)
    return model


def tokens(length: int, generator: torch.Generator) -> list[int]:
    return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()


def left_padded(rows: list[list[int]], *, extra: int = 0, pad: int = EOS) -> PromptBatch:
    width = max(map(len, rows)) + extra
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])
    return PromptBatch(ids, mask)


def right_padded(rows: list[list[int]], *, extra: int = 0, pad: int = EOS) -> Responses:
    width = max(map(len, rows)) + extra
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    return Responses(ids, mask, torch.tensor([row[-1] == EOS for row in rows]))


PROMPT_LENGTHS = (5, 1, 9, 3, 2)
RESPONSE_LENGTHS = (4, 7, 1, 2, 6)


def ragged_rows(seed: int = 0) -> tuple[list[list[int]], list[list[int]]]:
    """Five prompts and five responses; all but the second response end with an end of text (which pads, too)."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [tokens(length, generator) for length in PROMPT_LENGTHS]
    responses = [[*tokens(length - 1, generator), EOS] for length in RESPONSE_LENGTHS]
    responses[1][-1] = 7
    return prompts, responses


def ragged_batch(seed: int = 0) -> tuple[PromptBatch, Responses]:
    prompts, responses = ragged_rows(seed)
    return left_padded(prompts), right_padded(responses)


@torch.no_grad()
def logits_alone(model: PreTrainedModel, row: list[int]) -> Tensor:
    """Logits ``[T, V]`` of one unpadded row, in the plainest call there is: no mask, no positions."""
    return model(torch.tensor([row]), use_cache=False).logits[0].double()


@torch.no_grad()
def scalars_alone(model: ScalarModel, row: list[int]) -> Tensor:
    """Scalars ``[T]`` of one unpadded row, worked out from the parts of the model."""
    hidden = model.trunk(torch.tensor([row]), use_cache=False).last_hidden_state[0].double()
    return hidden @ model.head.weight[0].double() + model.head.bias.double() - model.score_bias.double()
