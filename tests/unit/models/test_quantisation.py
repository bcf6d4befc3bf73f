"""8 and 4 bits: against weights rounded by hand, and the same function in training and evaluation."""

from __future__ import annotations

import sys

import bitsandbytes
import pytest
import torch
from torch import nn

from lit_instruct.models.backbone import load_language_model
from lit_instruct.models.frozen import make_reference, narrow
from lit_instruct.models.packing import admission, refuse_packing
from lit_instruct.models.quantisation import dequantise, is_quantised, quantise
from lit_instruct.models.scalar_head import ScalarModel
from lit_instruct.types import ConfigError
from tests.helpers.numbers import assert_close
from tests.unit.models.networks import logits_alone, ragged_batch, ragged_rows, scalars_alone, tiny_config

KINDS = pytest.mark.parametrize("kind", ["8bit", "4bit"])
ROW = ragged_rows()[0][2]


def loaded(**changes):
    torch.manual_seed(0)
    return load_language_model(tiny_config("llama", **changes))


def places(model):
    return {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}


def rounded(weight, kind):
    """Each row by its largest number to 255 steps; or blocks of 64 to the 16 values of nf4, their scales to 8 bits."""
    if kind == "8bit":
        half = weight.half().float()
        steps = half.abs().amax(dim=1, keepdim=True) / 127
        return (half / steps).round() * steps
    packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return bitsandbytes.functional.dequantize_4bit(packed, state).float()


@torch.no_grad()
def by_hand(kind, **changes):
    model = loaded(**changes)
    for name, module in model.named_modules():
        if type(module) is nn.Linear and name != "lm_head":
            module.weight.copy_(rounded(module.weight, kind))
    return model.eval()


@KINDS
@pytest.mark.parametrize("tied", [True, False])
def test_linear_layers_are_rounded_and_nothing_else(kind, tied):
    plain = loaded(tie_word_embeddings=tied)
    model = quantise(plain, kind)
    assert is_quantised(model)
    assert not is_quantised(plain)
    need = by_hand(kind, tie_word_embeddings=tied)
    assert_close(logits_alone(model.eval(), ROW), logits_alone(need, ROW), scale=20.0)  # fp16 scales, logits of size 10
    assert float((logits_alone(model, ROW) - logits_alone(plain, ROW)).norm()) > 0.01
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(model.state_dict()[name], plain.state_dict()[name])
    assert not places(model) & places(plain)  # one tensor would keep the whole file mapped that it was loaded from
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in plain.parameters())
    assert torch.equal(logits_alone(quantise(loaded(tie_word_embeddings=tied), kind), ROW), logits_alone(model, ROW))


@KINDS
def test_training_and_evaluation_are_one_function(kind):
    """Else a policy would not be the network that sampled; also in a first pass without gradients."""
    model = quantise(loaded(), kind).eval()
    first = logits_alone(model, ROW)
    ids = torch.tensor([ROW])
    for mode in (True, False):
        model.train(mode)
        assert torch.equal(model(ids, use_cache=False).logits[0].double(), first)
    assert not model.training


@pytest.mark.parametrize("ran", [False, True])
def test_eight_bits_move_with_their_scales(ran):
    """A model that is moved to a GPU asks each layer for its parameters only. Copies stand for another device here."""
    model = quantise(loaded(), "8bit")
    need = logits_alone(model, ROW) if ran else logits_alone(quantise(loaded(), "8bit"), ROW)
    layers = [layer for layer in model.modules() if type(layer).__name__ == "Linear8bitLt"]
    nn.Sequential(model)._apply(lambda x: x.detach().clone())
    for layer in layers:
        kept = layer.state if ran else layer.weight
        assert kept.CB.data_ptr() == layer.weight.data_ptr()
        assert kept.SCB.shape == (layer.out_features,)
    assert layers
    assert torch.equal(logits_alone(model, ROW), need)


@KINDS
def test_it_reads_rows_as_its_source_does(kind):
    model = quantise(loaded(), kind)
    assert admission(model) == admission(model.base_model) == (True, "")
    scalar = ScalarModel.on_language_model(model).eval()
    prompts, _ = ragged_batch()
    for row, score in zip(ragged_rows()[0], scalar.scores(*prompts[:2]), strict=True):
        assert_close(score, scalars_alone(scalar, row)[-1], scale=10.0)
    plain = loaded()
    refuse_packing(plain, "why not")
    assert admission(quantise(plain, kind)) == (False, "why not")


@KINDS
def test_back_to_plain_layers(kind):
    model = quantise(loaded(), kind).eval()
    kept = logits_alone(model, ROW)
    plain = dequantise(model)
    assert not is_quantised(plain)
    assert_close(logits_alone(plain, ROW), kept, scale=10.0)
    assert {parameter.dtype for parameter in plain.parameters()} == {torch.float32}
    assert plain.state_dict().keys() == loaded().state_dict().keys()


@KINDS
def test_gradients_pass_through(kind):
    """Those of the embeddings, against the plain model of rounded weights."""
    model, need = quantise(loaded(), kind), by_hand(kind)
    found = []
    for network in (model, need):
        embedded = network.get_input_embeddings()(torch.tensor([ROW])).detach().requires_grad_()
        network(inputs_embeds=embedded, use_cache=False).logits.square().sum().backward()
        found.append(embedded.grad / embedded.grad.abs().max())
    assert_close(found[0], found[1], scale=20.0)


def test_the_bits_of_frozen_networks():
    policy = loaded()
    for dtype in ("8bit", "4bit"):
        reference = make_reference(None, policy=policy, memory="separate")
        assert_close(logits_alone(reference, ROW), logits_alone(policy.eval(), ROW))
        assert not reference.training
        small = narrow(reference, dtype)
        assert is_quantised(small)
        assert not small.training
        assert narrow(small, "8bit") is small
    half = narrow(make_reference(None, policy=policy, memory="separate"), "bfloat16")
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    same = make_reference(None, policy=policy, memory="separate")
    assert narrow(same, "float32") is same
    assert not {p.data_ptr() for p in same.parameters()} & {p.data_ptr() for p in policy.parameters()}


def test_where_it_cannot_be(monkeypatch):
    gpt2 = load_language_model(tiny_config("gpt2"))
    monkeypatch.setattr("lit_instruct.models.quantisation.is_quantised", lambda network: False)
    with pytest.raises(ConfigError, match=r"quantization: got 4bit for GPT2LMHeadModel, of which no layer"):
        quantise(gpt2, "4bit")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"bitsandbytes is not installed. Do: pip install 'lit-instruct\[quant\]'"):
        quantise(loaded(), "8bit")
