from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lit_instruct.models.adapters import LoraSettings, add_adapter, make_base, merge_adapter
from lit_instruct.models.generation import stream_responses
from lit_instruct.models.packing import admission, enable_packing
from lit_instruct.models.rollout_copy import refresh, rollout_copy
from lit_instruct.models.value_model import SharedValueHead
from lit_instruct.types import ConfigError
from tests.helpers.numbers import assert_close
from tests.unit.models.networks import FAMILIES, left_padded, tiny_model, tokens

WIDE = {"hidden_size": 64, "intermediate_size": 96, "initializer_range": 0.1}
DTYPES = pytest.mark.parametrize("dtype", ["bfloat16", "int8"])


def some_ids():
    return torch.randint(3, 41, (3, 9), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def stirred(family):
    """A model whose biases are not the zeros that they start with."""
    model = tiny_model(family)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@torch.no_grad()
def logits_of(model):
    return model(some_ids()).logits.float()


def distance(mine, theirs):
    return float((mine - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bfloat16_copy_is_what_transformers_makes_of_the_weights(family):
    model = stirred(family)
    twin = rollout_copy(model, "bfloat16")
    need = copy.deepcopy(model)
    for parameter in need.parameters():  # parameters, not buffers: rotary frequencies stay in fp32
        parameter.data = parameter.data.bfloat16()
    assert_close(logits_of(twin), logits_of(need), dtype=torch.bfloat16, scale=4)  # logits reach 20
    assert twin(some_ids()).logits.dtype == torch.bfloat16
    assert distance(logits_of(twin), logits_of(model)) < 0.05
    assert logits_of(model).dtype == next(model.parameters()).dtype == torch.float32


def test_a_copy_for_a_gpu_has_none_of_a_cpus_layers():
    """A policy that is to be sharded is copied before it is moved."""
    twin = rollout_copy(tiny_model("llama"), "bfloat16", torch.device("cuda"))
    assert all(type(layer) is nn.Linear for layer in twin.modules() if hasattr(layer, "bias"))
    assert len([layer for layer in twin.modules() if type(layer) is nn.Linear]) > 7


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "opt", "gpt2"])
def test_an_int8_copy_is_close(family):
    """Against weights rounded to 255 steps an output by hand; inputs are rounded as well, to 256 steps each."""
    model = stirred(family)
    twin = rollout_copy(model, "int8")
    need = copy.deepcopy(model)
    changed = 0
    for module in need.modules():
        if isinstance(module, nn.Linear | Conv1D):
            by_output = 1 if isinstance(module, nn.Linear) else 0
            steps = module.weight.data.abs().amax(dim=by_output, keepdim=True).clamp_min(1e-12) / 127
            module.weight = nn.Parameter((module.weight.data / steps).round() * steps)  # no longer tied
            changed += 1
    assert changed == sum(type(module).__name__ == "_Int8Linear" for module in twin.modules()) > 8
    assert distance(logits_of(twin), logits_of(need)) < 0.05
    assert 0 < distance(logits_of(twin), logits_of(model)) < 0.1


@DTYPES
def test_refresh_brings_every_weight_over(dtype):
    model, other = tiny_model("qwen2", seed=0), tiny_model("qwen2", seed=1)
    twin, kept = rollout_copy(model, dtype), logits_of(other)
    before = logits_of(twin)
    model.load_state_dict(other.state_dict())
    assert torch.equal(logits_of(twin), before)  # a copy, not a view
    refresh(twin, model)
    assert torch.equal(logits_of(twin), logits_of(rollout_copy(other, dtype)))
    assert distance(logits_of(twin), kept) < 0.1
    # also after it has been sampled from, in inference mode
    next(stream_responses(twin, left_padded([[5, 6]]), max_tokens=3, eos_ids=[], pad_id=0))
    refresh(twin, model)
    assert torch.equal(logits_of(twin), logits_of(rollout_copy(other, dtype)))


@DTYPES
def test_tied_weights_are_brought_over_on_both_sides(dtype):
    model = tiny_model("llama", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    twin = rollout_copy(model, dtype)
    with torch.no_grad():
        model.lm_head.weight.mul_(-2.0)
    refresh(twin, model)
    assert distance(logits_of(twin), logits_of(model)) < 0.1


@DTYPES
def test_nobody_who_listens_to_the_policy_hears_its_copy(dtype):
    model = tiny_model("llama").train()
    SharedValueHead(model)
    heard = []
    model.get_output_embeddings().register_forward_pre_hook(lambda module, args: heard.append(args))
    model.model.norm.register_forward_pre_hook(lambda module, args: heard.append(args))
    model.model.layers[0].register_forward_hook(lambda module, args, output: heard.append(args))
    twin = rollout_copy(model, dtype)
    logits_of(twin)
    assert heard == []
    logits_of(model)
    assert len(heard) == 3
    assert model.training
    assert not twin.training
    assert not any(parameter.requires_grad for parameter in twin.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_frozen_weights_in_the_copys_precision_are_shared():
    model = tiny_model("llama")
    embedding = model.get_input_embeddings()
    embedding.weight.requires_grad_(False)
    embedding.to(torch.bfloat16)
    twin = rollout_copy(model, "bfloat16")
    assert twin.get_input_embeddings().weight is embedding.weight
    assert twin.model.norm.weight is not model.model.norm.weight


def test_what_a_model_keeps_in_fp32_stays_there():
    model = tiny_model("llama")
    model._keep_in_fp32_modules_strict = {"input_layernorm"}
    twin = rollout_copy(model, "bfloat16")
    assert twin.model.layers[0].input_layernorm.weight.dtype == torch.float32
    assert twin.model.layers[0].post_attention_layernorm.weight.dtype == torch.bfloat16


@DTYPES
def test_a_copy_samples_as_its_policy_nearly_does(dtype):
    """Slots, blocks and log-probabilities work on it, and its distribution is near."""
    model = tiny_model("llama", **WIDE)
    enable_packing(model)
    twin = rollout_copy(model, dtype)
    assert admission(twin) == admission(model)
    assert admission(twin.base_model).packs
    generator = torch.Generator().manual_seed(5)
    prompts = left_padded([tokens(1 + index % 7, generator) for index in range(40)])
    options = {"max_tokens": 12, "eos_ids": [2], "pad_id": 0, "batch_rows": 8, "keep_logprobs": True}
    mine, theirs = (next(stream_responses(network, prompts, **options)) for network in (twin, model))
    same = mine.responses.response_ids_BR[:, 0] == theirs.responses.response_ids_BR[:, 0]
    assert same.float().mean() > 0.8
    gap = (mine.logprobs_BR - theirs.logprobs_BR)[:, 0][same].abs()
    assert 0 < gap.mean() < 0.05
    assert not mine.logprobs_BR.is_inference()


def test_where_int8_cannot_be():
    with pytest.raises(ConfigError, match=r"got a policy on meta; need one on a CPU.*Do: sample in bfloat16"):
        rollout_copy(tiny_model("llama").to("meta"), "int8")
    with pytest.raises(ConfigError, match="got a policy on cuda"):  # to which it has not been moved yet
        rollout_copy(tiny_model("llama"), "int8", torch.device("cuda"))
    with pytest.raises(ConfigError, match=r"got Embedding, which has no linear layer; need some.*Do: sample"):
        rollout_copy(nn.Embedding(3, 3), "int8")


@DTYPES
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_an_adapter_is_merged_in_the_copy_and_brought_up_to_date(dtype, family):
    """Against a copy of a plain model of the merged weights; the policy's own base stays."""
    model = make_base(stirred(family), source=None)
    add_adapter(model, LoraSettings(r=3, lora_alpha=6))
    names = [name for name, _ in model.named_parameters()]
    twin = rollout_copy(model, dtype)
    for seed in (1, 2):
        before = logits_of(twin)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_" in name:
                    parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        base = {name: p.detach().clone() for name, p in model.named_parameters()}
        merged = copy.deepcopy(model)
        merge_adapter(merged)
        assert torch.equal(logits_of(twin), before)
        refresh(twin, model)
        assert torch.equal(logits_of(twin), logits_of(rollout_copy(merged, dtype)))
        assert torch.equal(logits_of(twin), logits_of(rollout_copy(model, dtype)))
        assert distance(logits_of(twin), logits_of(model)) < 0.1
        assert all(torch.equal(p, base[name]) for name, p in model.named_parameters())
    assert [name for name, _ in model.named_parameters()] == names
    assert not any(".lora_" in name for name in twin.state_dict())
