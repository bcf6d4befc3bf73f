"""LoRA in place: against weights added up by hand, against PEFT's own loader, and what twins share."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from lit_instruct.models.adapter_checkpoints import own_state, record_of
from lit_instruct.models.adapters import (
    LoraSettings,
    adapter_of,
    add_adapter,
    base_of,
    digest_of,
    is_lora,
    left_out,
    make_base,
    merge_adapter,
    sharding_refusal,
    shared_twin,
    train_adapter,
    trained_parameters,
)
from lit_instruct.models.backbone import load_language_model
from lit_instruct.models.export import export_checkpoint
from lit_instruct.models.packing import admission
from lit_instruct.models.quantisation import quantise
from lit_instruct.models.recompute import recompute_activations
from lit_instruct.models.residual_dropout import add_residual_dropout, residual_branches
from lit_instruct.models.scalar_head import ScalarModel
from lit_instruct.types import ConfigError
from tests.helpers.numbers import assert_close
from tests.helpers.tiny import gradients
from tests.unit.models.networks import FAMILIES, logits_alone, ragged_batch, ragged_rows, tiny_config

SETTINGS = LoraSettings(r=3, lora_alpha=6)


def loaded(family="llama", seed=0):
    torch.manual_seed(seed)
    return load_language_model(tiny_config(family))


@torch.no_grad()
def stir(network, seed=0):
    """Give an adapter numbers: a fresh one changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        if is_lora(name):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def adapted(family="llama", settings=SETTINGS, seed=0):
    model = make_base(loaded(family, seed), source="nowhere")
    add_adapter(model, settings)
    stir(model)
    return model


@torch.no_grad()
def added_by_hand(model, scale):
    """A plain model of the same family whose weights are W + scale B A, from the names in the state alone."""
    plain, state = loaded(model.config.model_type), model.state_dict()
    for name, parameter in plain.named_parameters():
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_A.default.weight" not in state:
            continue
        product = scale * state[f"{layer}.lora_B.default.weight"] @ state[f"{layer}.lora_A.default.weight"]
        gpt2 = type(plain.get_submodule(layer)).__name__ == "Conv1D"
        parameter += product.T if gpt2 else product
    return plain


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rslora", [False, True])
def test_the_adapter_is_a_product_added_to_every_linear_layer(family, rslora):
    settings = LoraSettings(r=3, lora_alpha=6, use_rslora=rslora)
    model = adapted(family, settings).eval()
    by_hand = added_by_hand(model, 6 / math.sqrt(3) if rslora else 2.0).eval()
    linear = {n for n, m in loaded(family).named_modules() if type(m).__name__ in ("Linear", "Conv1D")} - {
        "lm_head",
        "embed_out",
    }
    assert {name.split(".lora_A")[0] for name in model.state_dict() if ".lora_A" in name} == linear
    prompts, _ = ragged_rows()
    for row in prompts:
        assert_close(logits_alone(model, row), logits_alone(by_hand, row), scale=10.0)  # logits of size 10
    assert type(model) is type(loaded(family))
    merge_adapter(model)
    assert model.state_dict().keys() == by_hand.state_dict().keys()
    assert_close(logits_alone(model, prompts[0]), logits_alone(by_hand, prompts[0]), scale=10.0)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert adapter_of(model) is None
    assert base_of(model) is None


def test_a_fresh_adapter_changes_nothing_and_trains_alone_in_fp32():
    plain, model = loaded(), make_base(loaded(), source="nowhere")
    add_adapter(model, SETTINGS)
    row = ragged_rows()[0][0]
    assert torch.equal(logits_alone(model, row), logits_alone(plain, row))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".lora_A." in name or ".lora_B." in name}
    assert len(trained_parameters(model)) == len(trained)
    assert {parameter.dtype for parameter in trained_parameters(model)} == {torch.float32}
    assert set(own_state(model)) == trained
    assert set(left_out(model)) == set(model.state_dict()) - trained
    assert left_out(plain) == ()


def test_only_the_named_layers():
    model = make_base(loaded(), source="nowhere")
    add_adapter(model, LoraSettings(r=2, target_modules=["q_proj", "down_proj"]))
    assert {name.split(".")[-4] for name in own_state(model)} == {"q_proj", "down_proj"}


def test_packed_rows_are_read_with_the_adapter():
    """Scores of padded batches, which are packed, against the plain model of added weights, one row at a time."""
    model = ScalarModel.on_language_model(loaded())
    model.trunk = make_base(model.trunk, source="nowhere")
    add_adapter(model.trunk, SETTINGS)
    stir(model)
    assert admission(model.trunk).packs
    plain = loaded()
    with torch.no_grad():
        state = model.trunk.state_dict()
        for name, parameter in plain.base_model.named_parameters():
            layer = name.removesuffix(".weight")
            if f"{layer}.lora_A.default.weight" in state:
                parameter += 2 * state[f"{layer}.lora_B.default.weight"] @ state[f"{layer}.lora_A.default.weight"]
    prompts, _ = ragged_batch()
    scores = model.scores(*prompts[:2])
    for row, score in zip(ragged_rows()[0], scores, strict=True):
        hidden = plain.base_model(torch.tensor([row]), use_cache=False).last_hidden_state[0, -1]
        assert_close(score, model.head(hidden), scale=10.0)


def test_checkpointing_gives_the_adapter_the_same_gradients():
    ids = torch.arange(12).view(2, 6) + 3
    found = []
    for checkpointing in (False, True):
        model = adapted().train()
        if checkpointing:
            recompute_activations(model)
        model(ids, labels=ids).loss.backward()
        found.append(gradients(model))
        assert all(parameter.grad is not None for parameter in trained_parameters(model))
    assert_close(found[1], found[0])


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2"])
def test_residual_dropout_finds_the_same_branches(family):
    model = adapted(family)
    names = {module: name for name, module in model.named_modules()}
    plain = loaded(family)
    plain_names = {module: name for name, module in plain.named_modules()}
    found = [[names[branch] for branch in block] for block in residual_branches(model)]
    assert found == [[plain_names[branch] for branch in block] for block in residual_branches(plain)]
    add_residual_dropout(model, 0.5)
    ids = torch.arange(6)[None] + 3
    assert not torch.equal(model(ids).logits, model(ids).logits)


def test_a_twin_shares_the_base_and_nothing_else():
    base = make_base(loaded(), source="nowhere")
    reference = shared_twin(base, base)
    add_adapter(base, SETTINGS)
    stir(base)
    second = shared_twin(base, base)
    row = ragged_rows()[0][0]
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if is_lora(name):
                parameter.zero_()
    assert torch.equal(logits_alone(base, row), logits_alone(reference, row))  # of which nothing is adapted
    assert not torch.equal(logits_alone(second, row), logits_alone(reference, row))  # its adapter is a copy
    ours = {name.replace(".base_layer", ""): p for name, p in base.named_parameters() if not is_lora(name)}
    theirs = dict(reference.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(ours[name] is theirs[name] for name in ours)
    assert base_of(second) == base_of(base) == base_of(reference)
    assert adapter_of(second) == SETTINGS
    assert adapter_of(reference) is None


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
@pytest.mark.parametrize("used_before", [False, True])
def test_quantised_twins_share_too(kind, used_before):
    base = make_base(loaded(), source="nowhere", quantization=kind)
    row = ragged_rows()[0][0]
    if used_before:
        logits_alone(base, row)
    twin = shared_twin(base, base)
    apart = copy.deepcopy(base)
    assert torch.equal(logits_alone(twin, row), logits_alone(base, row))
    assert torch.equal(logits_alone(apart, row), logits_alone(base, row))
    ours = {p.data_ptr() for p in base.parameters()}
    assert ours == {p.data_ptr() for p in twin.parameters()}
    assert not ours & {p.data_ptr() for p in apart.parameters()}
    if kind == "8bit":
        states = [module.state.CB.data_ptr() for module in twin.modules() if hasattr(module, "state")]
        assert states
        assert set(states) <= ours


def test_what_trains_around_a_backbone():
    model = ScalarModel.on_language_model(loaded()).requires_grad_(False)
    model.trunk = make_base(model.trunk, source=None)
    add_adapter(model.trunk, SETTINGS)
    model.requires_grad_(False)
    train_adapter(model, model.trunk)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if is_lora(name) or name.startswith("head.")}
    assert set(own_state(model)) == trained | {"score_bias"}


def test_the_record_says_what_it_stands_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    model = loaded()
    digest = digest_of(model.base_model)
    model = make_base(model, source="base", quantization="4bit")
    assert record_of(model) is None
    add_adapter(model, SETTINGS)
    record = record_of(nn.ModuleDict({"policy": model}))
    assert (record.sha256, record.quantization) == (digest, "4bit")
    assert record.sources == ["base", str(tmp_path / "base")]
    assert LoraSettings(**record.settings) == SETTINGS
    assert digest_of(loaded(seed=1).base_model) != digest == digest_of(loaded().base_model)


def test_why_a_network_cannot_be_sharded():
    plain = nn.ModuleDict({"policy": loaded(), "reference": loaded()})
    assert sharding_refusal(plain) is None
    base = make_base(loaded(), source="nowhere")
    shared = nn.ModuleDict({"policy": base, "reference": shared_twin(base, base)})
    assert "policy and reference share the tensors" in sharding_refusal(shared)
    rounded = nn.ModuleDict({"policy": loaded(), "scorer": nn.ModuleDict({"model": quantise(loaded(), "8bit")})})
    assert "the weights of scorer are quantised" in sharding_refusal(rounded)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, r"adapter.r: got 0; need at least 1"),
        ({"lora_alpha": -1}, r"adapter.lora_alpha: got -1; need at least 1"),
        ({"target_modules": []}, r"adapter.target_modules: got none; need names of layers"),
    ],
)
def test_settings_that_mean_nothing(fields, message):
    with pytest.raises(ConfigError, match=message):
        LoraSettings(**fields)


def test_what_cannot_be_adapted(monkeypatch):
    with pytest.raises(
        ConfigError, match=r"target_modules 'nothing_like_it' for LlamaForCausalLM.*leave target_modules"
    ):
        add_adapter(make_base(loaded(), source="nowhere"), LoraSettings(target_modules="nothing_like_it"))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"peft is not installed. Do: pip install 'lit-instruct\[peft\]'"):
        add_adapter(loaded(), SETTINGS)


_READ_BACK = """
import sys, torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
base, folder, out = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
ids = torch.arange(9)[None] + 3
with torch.no_grad():
    text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    save_file({"logits": model(ids).logits, "text": text}, out)
assert "lit_instruct" not in sys.modules
"""


def test_peft_reads_what_we_write(tmp_path):
    """The exported adapter on the base, as PEFT itself loads it in a process of its own; and the merged model."""
    from lit_instruct import SFTModule
    from tests.helpers.tiny import save_model, save_stage

    base = save_model(tmp_path / "base")
    module = SFTModule(base, adapter=SETTINGS)
    stir(module.policy)
    path = save_stage(module, tmp_path / "sft.ckpt")
    folder, out = export_checkpoint(path, str(tmp_path / "adapter"), adapter=True), tmp_path / "numbers.safetensors"
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= {x.name for x in folder.iterdir()}
    words = [sys.executable, "-c", _READ_BACK, base, str(folder), str(out)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs, ids = load_file(out), torch.arange(9)[None] + 3
    policy = module.policy.eval()
    assert_close(theirs["logits"], policy(ids).logits, scale=10.0)
    row = ids[0].tolist()
    for token in theirs["text"][0, 9:].tolist():
        assert token == int(policy(torch.tensor([row])).logits[0, -1].argmax())
        row.append(token)
    merged = AutoModelForCausalLM.from_pretrained(export_checkpoint(path, str(tmp_path / "merged"))).eval()
    assert_close(merged(ids).logits, policy(ids).logits, scale=10.0)
    for stage, ema in ((save_stage(SFTModule(base), tmp_path / "plain.ckpt"), False), (path, True)):
        with pytest.raises(ConfigError, match=r"need one of SFT or PPO that was trained with model.adapter"):
            export_checkpoint(stage, str(tmp_path / "other"), adapter=True, ema=ema)
    with pytest.raises(ConfigError, match=r"dtype: got bfloat16 for an adapter"):
        export_checkpoint(path, str(tmp_path / "other"), adapter=True, dtype="bfloat16")
