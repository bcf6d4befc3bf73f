"""Where the value model comes from, and that a shared trunk gives the numbers of two separate passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lit_instruct.models.backbone import load_language_model
from lit_instruct.models.forward import response_logprobs
from lit_instruct.models.scalar_head import ScalarModel
from lit_instruct.models.value_model import SharedValueHead, make_value_model, policy_and_values
from lit_instruct.types import ConfigError, PromptBatch, Responses
from tests.helpers.numbers import assert_close
from tests.helpers.tiny import gradients, tiny_llama, tiny_tokenizer, weights

SMALL = {"vocab_size": 40, "eos_token_id": 0, "bos_token_id": None, "pad_token_id": 1}
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "initializer_range": 0.3}
OPT = {
    "model_type": "opt",
    "hidden_size": 16,
    "ffn_dim": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "word_embed_proj_dim": 8,  # the unembedding is fed something narrower than the hidden states
    "init_std": 0.3,
}


def ragged() -> tuple[PromptBatch, Responses]:
    """Two rows: prompts of 2 and 4 tokens, responses of 3 and 2, in 5 columns."""
    generator = torch.Generator().manual_seed(0)
    prompt_mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]).bool()
    response_mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]]).bool()
    prompt_ids = torch.randint(4, 40, (2, 4), generator=generator)
    response_ids = torch.randint(4, 40, (2, 5), generator=generator)
    return PromptBatch(prompt_ids, prompt_mask), Responses(response_ids, response_mask, torch.tensor([True, True]))


@pytest.mark.parametrize("config", [tiny_llama(), GPT2, OPT], ids=lambda config: config["model_type"])
def test_a_shared_head_reads_the_state_before_each_token(config: dict[str, Any]) -> None:
    """Against the policy's own hidden states, one row at a time and without padding."""
    torch.manual_seed(0)
    policy = load_language_model(config | SMALL).eval()
    head = SharedValueHead(policy)
    head.head.bias.data.fill_(0.25)
    prompts, responses = ragged()
    logprobs_BR, moments, values_BR = policy_and_values(
        policy, head, prompts, responses, temperature=0.7, surprise=True
    )
    alone, alone_moments = response_logprobs(policy, prompts, responses, temperature=0.7, surprise=True)
    assert_close(logprobs_BR, alone)
    assert alone_moments is not None
    assert moments is not None
    for mine, theirs in zip(moments, alone_moments, strict=True):
        assert_close(mine, theirs)
    heard: list[torch.Tensor] = []
    policy.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: heard.append(inputs[0]))
    for row in range(2):
        prompt = prompts.prompt_ids_BP[row][prompts.prompt_mask_BP[row]]
        response = responses.response_ids_BR[row][responses.response_mask_BR[row]]
        policy(input_ids=torch.cat([prompt, response])[None])  # all columns
        for t in range(len(response)):
            hidden = heard[-1][0, len(prompt) + t - 1]
            assert_close(values_BR[row, t], hidden @ head.head.weight[0] + 0.25, scale=10.0)  # other mask, kernel
    assert not values_BR[~responses.response_mask_BR].any()


def test_one_pass_serves_both() -> None:
    policy = load_language_model(tiny_llama(**SMALL))
    passes: list[int] = []
    policy.base_model.register_forward_pre_hook(lambda *_: passes.append(1))
    policy_and_values(policy, SharedValueHead(policy), *ragged(), temperature=1.0)
    assert len(passes) == 1


def test_values_reach_the_trunk_only_if_the_policy_learns() -> None:
    policy = load_language_model(tiny_llama(**SMALL))
    head = SharedValueHead(policy)
    for learns in (True, False):
        policy.zero_grad()
        head.zero_grad()
        _, _, values_BR = policy_and_values(policy, head, *ragged(), temperature=1.0, train_policy=learns)
        values_BR.sum().backward()
        assert bool(gradients(policy).any()) == learns
        assert bool(gradients(head).any())


def test_a_separate_value_model_learns_while_the_policy_stands() -> None:
    policy = load_language_model(tiny_llama(**SMALL))
    value_model = ScalarModel.on_language_model(load_language_model(tiny_llama(**SMALL)))
    logprobs_BR, _, values_BR = policy_and_values(policy, value_model, *ragged(), temperature=1.0, train_policy=False)
    assert not logprobs_BR.requires_grad
    values_BR.sum().backward()
    assert gradients(value_model).any()


def test_where_it_starts() -> None:
    policy = load_language_model(tiny_llama(**SMALL))
    reward_model = ScalarModel.on_language_model(load_language_model(tiny_llama(**SMALL))).eval().requires_grad_(False)
    reward_model.score_bias.fill_(0.7)
    copied = make_value_model(None, policy=policy, reward_model=reward_model, tokenizer=tiny_tokenizer())
    assert isinstance(copied, ScalarModel)
    assert_close(weights(copied), weights(reward_model))
    assert_close(copied.score_bias, 0.7)
    assert all(parameter.requires_grad for parameter in copied.parameters())
    assert copied.training
    fresh = make_value_model(None, policy=policy, reward_model=None, tokenizer=tiny_tokenizer())
    assert isinstance(fresh, ScalarModel)
    assert_close(weights(fresh.trunk), weights(policy.base_model))
    for made in (copied, fresh):
        theirs = {p.data_ptr() for network in (policy, reward_model) for p in network.parameters()}
        assert not theirs & {p.data_ptr() for p in made.parameters()}
    given = {"reward_model": None, "tokenizer": tiny_tokenizer(), "memory": "shared_trunk"}
    shared = make_value_model(None, policy=policy, **given)
    assert isinstance(shared, SharedValueHead)
    assert {name for name, _ in shared.named_parameters()} == {"head.weight", "head.bias"}
    std = float(make_value_model(None, policy=load_language_model(tiny_llama(**SMALL, hidden_size=400)),
                                 **given).head.weight.std())  # fmt: skip
    assert abs(std * 401**0.5 - 1) < 0.15


def test_a_policy_without_unembedding_cannot_share() -> None:
    policy = load_language_model(tiny_llama(**SMALL))
    policy.get_output_embeddings = lambda: None
    with pytest.raises(ConfigError, match=r"has no unembedding.*Set memory to separate"):
        SharedValueHead(policy)
