"""Decoders for the tests of packing: those that read packed rows, those that must not, and each sequence read alone.

Windows are shorter than the sequences, so that a window in the wrong place shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lit_instruct.models.packing import enable_packing, refuse_packing
from lit_instruct.models.recompute import recompute_activations
from lit_instruct.types import ComparisonBatch, DemonstrationBatch, PromptBatch, Responses
from tests.helpers.numbers import assert_close
from tests.unit.models.networks import EOS, VOCABULARY, left_padded, right_padded, tokens

_DECODER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,  # two queries a key head
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
_WINDOW = {"sliding_window": 4}
_ALTERNATING = {**_WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_HEADS = {"head_dim": 8, "query_pre_attn_scalar": 6}  # scores are scaled by another number than the width of a head
_UNGROUPED = {name: value for name, value in _DECODER.items() if name != "num_key_value_heads"}
_GPT = {"n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 64, "initializer_range": 0.3}
_EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 2}

PACKING: dict[str, dict[str, Any]] = {
    "llama": _DECODER,
    "qwen2": {**_DECODER, **_ALTERNATING, "use_sliding_window": True},
    "gpt2": _GPT,
    "gpt_neox": _UNGROUPED,
    "opt": {**_UNGROUPED, "word_embed_proj_dim": 16, "ffn_dim": 24, "init_std": 0.3},
    "mistral": {**_DECODER, **_WINDOW},
    "gemma2": {**_DECODER, **_ALTERNATING, **_HEADS, "attn_logit_softcapping": 2.0},  # low enough to bend the scores
    "gemma3_text": {**_DECODER, **_ALTERNATING, **_HEADS},
    "gpt_oss": {**_DECODER, **_ALTERNATING, **_EXPERTS, "head_dim": 8},
    "gptj": {**_GPT, "rotary_dim": 4},
    "deepseek_v3": {
        **_UNGROUPED,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 6,  # values narrower than keys
        "first_k_dense_replace": 1,
    },
}
"""gpt2 and opt have learned positions and catch position mistakes."""

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "lfm2": ({**_DECODER, "layer_types": ["conv", "full_attention", "conv"], "block_multiple_of": 8}, "type conv"),
    "mamba2": (
        {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_heads": 4,
            "head_dim": 8,
            "state_size": 8,
            "n_groups": 1,
            "chunk_size": 8,
            "initializer_range": 0.3,
        },
        "type linear_attention",
    ),
    "llama4_text": (
        {**_DECODER, **_EXPERTS, "head_dim": 8, "attention_chunk_size": 4, "intermediate_size_mlp": 24},
        "type chunked_attention",
    ),
    "stablelm": (_DECODER, r"cannot read the rows of the test \(RuntimeError"),
    "bloom": ({"hidden_size": 16, "n_layer": 3, "n_head": 4, "initializer_range": 0.3}, "cannot be replaced"),
    "qwen2_moe": (
        {
            **_DECODER,
            **_ALTERNATING,
            "use_sliding_window": True,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 8,
        },
        "other logits",
    ),
    "phimoe": ({**_DECODER, **_EXPERTS, **_WINDOW, "router_jitter_noise": 0.0}, "other logits"),
}
"""Configurations and why they are refused."""


def build(family: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model as transformers makes it; packing was not enabled."""
    fields = PACKING[family] if family in PACKING else REFUSED[family][0]
    common = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": EOS}
    config = AutoConfig.for_model(family, **{**common, **_no_dropout(family), **fields, **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # biases and sinks start at zero and would hide
            if name.endswith(("bias", "sinks")):
                parameter.normal_(std=0.3)
    return model


def _no_dropout(family: str) -> dict[str, float]:
    names = {"gpt2": ["resid_pdrop", "embd_pdrop", "attn_pdrop"], "opt": ["dropout", "attention_dropout"]}
    return dict.fromkeys(names.get(family, []), 0.0)


WAYS = ("packed", "recomputed", "padded")
"""How the model under test reads: packed rows, those under gradient checkpointing, or padded ones."""


def prepared(model: PreTrainedModel, way: str) -> PreTrainedModel:
    """A model that was built like the one it is compared with, ready for the way that is tested."""
    found = enable_packing(model)
    assert found.packs, found.reason
    if way == "padded":  # its attention stays replaced: ordinary calls go through the same function
        refuse_packing(model, "the padded way is compared")
    if way == "recomputed":
        recompute_activations(model)
    return model.train()


class Passes:
    """Every forward pass of a decoder by the shape of its ids, and how often its first block ran."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.blocks = 0


@contextmanager
def passes(model: PreTrainedModel) -> Iterator[Passes]:
    """Watch the passes of a language model, or of its decoder."""
    seen = Passes()
    trunk = model.base_model
    blocks = next(
        m for m in trunk.modules() if isinstance(m, nn.ModuleList) and len(m) == model.config.num_hidden_layers
    )

    # Not on the block itself: where checkpointing wraps its forward, hooks are not run again.
    leaf = next(
        m for m in blocks[0].modules() if next(m.children(), None) is None and next(m.parameters(), None) is not None
    )

    def count(*_: Any) -> None:
        seen.blocks += 1

    hooks = [
        trunk.get_input_embeddings().register_forward_pre_hook(lambda _, ids: seen.shapes.append(tuple(ids[0].shape))),
        leaf.register_forward_pre_hook(count),
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def assert_read(seen: Passes, way: str, real_tokens: int) -> None:
    """One pass, over one row without padding where the way is packed; its blocks run twice where recomputed."""
    assert len(seen.shapes) == 1
    (shape,) = seen.shapes
    assert shape == (1, real_tokens) if way != "padded" else shape[0] * shape[1] > real_tokens
    assert seen.blocks == (2 if way == "recomputed" else 1)


# -- batches

_PROMPTS = (5, 1, 9, 3, 2)
_ANSWERS = (4, 7, 1, 2, 6)


def rows_of(prompts: tuple[int, ...], responses: tuple[int, ...], seed: int) -> tuple[list[list[int]], list[list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    return [tokens(n, generator) for n in prompts], [[*tokens(n - 1, generator), EOS] for n in responses]


def pairs_alone(seed: int = 0) -> tuple[list[list[int]], list[list[int]]]:
    """Five prompts, and a response to each."""
    return rows_of(_PROMPTS, _ANSWERS, seed)


def padded_pairs(seed: int = 0) -> tuple[PromptBatch, Responses]:
    prompts, responses = pairs_alone(seed)
    return left_padded(prompts, extra=1), right_padded(responses, extra=2)


def demonstrations(seed: int = 0) -> DemonstrationBatch:
    """The same as whole sequences."""
    prompts, responses = pairs_alone(seed)
    ids, mask, _ = right_padded([p + r for p, r in zip(prompts, responses, strict=True)], extra=2)
    loss_mask = torch.zeros_like(mask)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        loss_mask[row, len(prompt) : len(prompt) + len(response)] = True
    return DemonstrationBatch(ids, mask, loss_mask)


RANKINGS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "ragged": ((6, 1, 9), (3, 2, 4)),
    "pairs": ((7, 3), (2, 2)),
    "one": ((8,), (9,)),
    "with a prompt that nobody answers": ((4, 6, 3), (2, 0, 3)),
}
"""Lengths of prompts, and how many responses each has."""


def rankings(kind: str, seed: int = 0) -> tuple[ComparisonBatch, list[list[int]]]:
    """A batch and its N sequences, prompt and response in one."""
    prompt_lengths, counts = RANKINGS[kind]
    lengths = tuple(1 + (3 * n) % 8 for n in range(sum(counts)))  # 1 to 8 tokens
    prompts, responses = rows_of(prompt_lengths, lengths, seed)
    group_N = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    prompt_ids, prompt_mask, _ = left_padded(prompts, extra=1)
    response_ids, response_mask, _ = right_padded(responses, extra=2)
    batch = ComparisonBatch(
        prompt_ids, prompt_mask, response_ids, response_mask, torch.ones(sum(counts), dtype=torch.int64), group_N
    )
    return batch, [prompts[prompt] + response for prompt, response in zip(group_N.tolist(), responses, strict=True)]


# -- one sequence at a time


def logits_alone(model: PreTrainedModel, row: list[int]) -> Tensor:
    """``[T, V]`` of one row, with its gradient, by the plainest call there is: no mask, no positions."""
    return model(torch.tensor([row]), use_cache=False).logits[0]


def hidden_alone(trunk: PreTrainedModel, row: list[int]) -> Tensor:
    """``[T, D]``, likewise."""
    return trunk(torch.tensor([row]), use_cache=False).last_hidden_state[0]


def weights_of(shape: torch.Size | tuple[int, ...], seed: int = 5) -> Tensor:
    """What outputs are multiplied by before they are summed: each counts, and each differently."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradients_of(network: nn.Module) -> dict[str, Tensor]:
    """All gradients by name; a parameter that nothing reached is left out."""
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None and p.grad.any()}


def assert_same_gradients(got: dict[str, Tensor], need: dict[str, Tensor], *, scale: float = 10.0) -> None:
    """Each parameter's gradient relative to its own largest entry: 1e-4, the order of sums of some hundred products.

    What is nothing but rounding (a key's bias moves no softmax) is measured by the largest gradient of all.
    """
    largest = max(float(grad.abs().max()) for grad in need.values())
    for name in got.keys() | need.keys():
        nothing = torch.zeros(())
        mine, theirs = got.get(name, nothing), need.get(name, nothing)
        size = float(theirs.abs().max())
        size = size if size > 1e-4 * largest else largest
        mine, theirs = torch.broadcast_tensors(mine / size, theirs / size)
        try:
            assert_close(mine, theirs, scale=scale)
        except AssertionError as error:
            raise AssertionError(f"gradient of {name}: {error}") from error
