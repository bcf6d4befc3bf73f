"""What autograd really saves in a block, tensor by tensor, against the formula.

A model of two blocks saves so much more than one of a single block; parameters and what all blocks share drop out.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

from lit_instruct.models.adapters import LoraSettings, add_adapter, make_base
from lit_instruct.models.backbone import load_language_model
from lit_instruct.models.packing import pack_rows
from lit_instruct.models.recompute import recompute_activations
from lit_instruct.planning.activations import Numerics, Pass, kept, kept_in_block, logits
from lit_instruct.planning.architecture import architecture
from tests.helpers.numbers import assert_close

_COMMON = {"hidden_size": 64, "num_attention_heads": 4, "vocab_size": 100, "max_position_embeddings": 1024}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "intermediate_size": 160, "num_key_value_heads": 2, **_COMMON},
    "mistral": {"model_type": "mistral", "intermediate_size": 96, "num_key_value_heads": 4, **_COMMON},
    "qwen3": {"model_type": "qwen3", "intermediate_size": 160, "num_key_value_heads": 2, "head_dim": 32, **_COMMON},
    "gpt2": {"model_type": "gpt2", "n_embd": 64, "n_head": 4, "vocab_size": 100, "n_positions": 1024, "n_inner": 128},
    "gpt_neox": {"model_type": "gpt_neox", "intermediate_size": 128, **_COMMON},
}
SHORT, LONG = [100, 100], [500, 400]  # below and above models.short_attention.SHORT


def fields(family: str, layers: int) -> dict[str, Any]:
    name = "n_layer" if family == "gpt2" else "num_hidden_layers"
    return {**FAMILIES[family], name: layers, "eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 1}


def saved_bytes(model: torch.nn.Module, lengths: list[int], autocast: bool) -> float:
    """Bytes of all storages that the graph of one packed row holds, parameters left out."""
    mask_BT = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    arguments = pack_rows(torch.randint(0, 100, mask_BT.shape), mask_BT).arguments()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own:
            held.setdefault(place, tensor)
        return tensor

    context = torch.autocast("cpu", torch.bfloat16, cache_enabled=False) if autocast else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), context:
        model(**arguments, logits_to_keep=torch.arange(3))
    return float(sum(tensor.untyped_storage().nbytes() for tensor in held.values()))


def one_block(
    family: str, lengths: list[int], precision: str, *, rank: int = 0, base: Any = None, checkpointing: bool = False
) -> float:
    found = []
    for layers in (1, 2):
        model = load_language_model(fields(family, layers))
        if rank:
            model = make_base(model, source=None, quantization=base)
            add_adapter(model, LoraSettings(r=rank))
        if checkpointing:
            recompute_activations(model)
        if precision == "bf16-true":
            model = model.to(torch.bfloat16)
        found.append(saved_bytes(model, lengths, precision == "bf16-mixed"))
    return found[1] - found[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lengths", [SHORT, LONG], ids=["short", "long"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_a_block_keeps_what_autograd_saves(family, lengths, precision):
    shape = architecture(fields(family, 1))
    one = Pass(sum(lengths), len(lengths), 3)
    plan = kept_in_block(shape, Numerics(precision, on_cpu=True), one)
    assert_close(plan, one_block(family, lengths, precision))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("lengths", [SHORT, LONG], ids=["short", "long"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_with_adapters_a_block_keeps_what_stands_between_their_matrices(family, lengths, precision):
    shape = architecture(fields(family, 1))
    plan = kept_in_block(shape, Numerics(precision, on_cpu=True), Pass(sum(lengths), len(lengths), 3), 4)
    assert_close(plan, one_block(family, lengths, precision, rank=4))


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_a_quantised_base_keeps_no_more_than_a_frozen_one(quantization):
    plan = kept_in_block(architecture(fields("llama", 1)), Numerics("32-true", True), Pass(200, 2, 3), 4)
    assert_close(plan, one_block("llama", SHORT, "32-true", rank=4, base=quantization))


def test_with_checkpointing_a_block_keeps_its_input():
    shape = architecture(fields("llama", 1))
    numerics, one = Numerics("32-true", True, checkpointing=True), Pass(200, 2, 0)
    deeper = shape._replace(layers=2)
    need = one_block("llama", SHORT, "32-true", checkpointing=True)
    assert_close(kept(deeper, numerics, one) - kept(shape, numerics, one), need)
    assert need == 200 * 64 * 4


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_whole_model_keeps_its_blocks_and_little_more(family):
    model = load_language_model(fields(family, 2))
    plan = kept(architecture(fields(family, 2)), Numerics("32-true", True), Pass(900, 2, 3))
    # Token ids, positions and rotary tables are what the plan leaves out.
    assert 0 <= saved_bytes(model, LONG, False) - plan < 0.02 * plan


def test_logits_are_as_narrow_as_products():
    shape = architecture(fields("llama", 1))
    assert logits(shape, Numerics("32-true", True), Pass(10, 1, 7)) == 7 * 100 * 4
    assert logits(shape, Numerics("bf16-mixed", True), Pass(10, 1, 7)) == 7 * 100 * 2


def test_a_gpu_has_norms_and_powers_of_its_own():
    """By hand, from the models' code and torch's list of what autocast takes in fp32."""
    llama, gpt2 = architecture(fields("llama", 1)), architecture(fields("gpt2", 1))
    mixed = [Numerics("bf16-mixed", on_cpu) for on_cpu in (True, False)]
    one = Pass(500, 1, 0)
    cpu, gpu = (kept_in_block(llama, numerics, one) for numerics in mixed)
    assert_close(gpu - cpu, 500 * (2 * 64 * 4 - 64 * 2))  # two x / rms in fp32; the joined result of segments is gone
    cpu, gpu = (kept_in_block(gpt2, numerics, one) for numerics in mixed)
    assert_close(gpu - cpu, 500 * (128 * (16 - 10) - 64 * 2))
