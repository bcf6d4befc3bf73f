"""Parameters against models of several families, built without memory, and adapters against PEFT's."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lit_instruct.planning.architecture import GPT3, architecture
from lit_instruct.types import ConfigError

_LLAMA = {"hidden_size": 96, "intermediate_size": 200, "num_hidden_layers": 3, "num_attention_heads": 6}
FAMILIES = {
    "llama": {"model_type": "llama", **_LLAMA, "num_key_value_heads": 2, "tie_word_embeddings": False},
    "llama-tied": {"model_type": "llama", **_LLAMA, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", **_LLAMA, "num_key_value_heads": 3, "head_dim": 24},
    "qwen2": {"model_type": "qwen2", **_LLAMA, "num_key_value_heads": 2},
    "qwen3": {"model_type": "qwen3", **_LLAMA, "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True},
    "gpt2": {"model_type": "gpt2", "n_embd": 96, "n_layer": 3, "n_head": 6, "n_positions": 80},
    "gpt2-wide": {"model_type": "gpt2", "n_embd": 96, "n_layer": 2, "n_head": 6, "n_positions": 80, "n_inner": 100},
    "gpt_neox": {"model_type": "gpt_neox", **_LLAMA},
}


def on_meta(fields: dict[str, object]) -> torch.nn.Module:
    rest = {"vocab_size": 331, "max_position_embeddings": 80} | fields
    config = AutoConfig.for_model(rest.pop("model_type"), **rest)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("whole", [True, False], ids=["whole-config", "bare"])
def test_parameters_are_those_of_the_model(name, whole):
    model = on_meta(FAMILIES[name])
    bare = {"vocab_size": 331, "max_position_embeddings": 80, **FAMILIES[name]}
    shape = architecture(model.config.to_dict() if whole else bare)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.decoder_parameters == sum(p.numel() for p in model.base_model.parameters())
    matrices = [p for n, p in model.base_model.named_parameters() if p.dim() == 2 and "emb" not in n and n[0] != "w"]
    assert shape.layers * shape.block_matrices == sum(p.numel() for p in matrices)


@pytest.mark.parametrize("name", FAMILIES)
def test_adapters_are_those_of_peft(name):
    from peft import LoraConfig, inject_adapter_in_model

    model = inject_adapter_in_model(
        LoraConfig(r=5, target_modules="all-linear", task_type="CAUSAL_LM"), on_meta(FAMILIES[name])
    )
    shape = architecture({"vocab_size": 331, "max_position_embeddings": 80, **FAMILIES[name]})
    assert shape.adapter_parameters(5) == sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert shape.adapter_parameters(0) == 0


@pytest.mark.parametrize(("name", "billions"), [("1.3b", 1.3), ("6b", 6.7), ("175b", 175)])
def test_gpt3_has_the_size_of_its_name(name, billions):
    assert abs(GPT3[name].parameters / 1e9 / billions - 1) < 0.02


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model_type": "mamba"}, "mamba"),
        ({}, "None"),
        ({**FAMILIES["llama"], "max_position_embeddings": 8}, "vocab_size"),
        ({"model_type": "llama", "vocab_size": 8, "max_position_embeddings": 8, "hidden_size": 8}, "num_hidden_layers"),
    ],
)
def test_what_is_not_known_is_refused(fields, said):
    with pytest.raises(ConfigError, match=said):
        architecture(fields)
