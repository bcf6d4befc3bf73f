"""Frozen networks with fewer bits."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from lit_instruct.models.backbone import load_language_model
from lit_instruct.models.frozen import narrow
from lit_instruct.models.sharding import buffers_to
from tests.helpers.numbers import assert_close
from tests.helpers.tiny import save_model


def test_in_bfloat16_a_model_is_what_transformers_loads(tmp_path: Path) -> None:
    """Its rotary frequencies keep fp32: rounded they turn the far tokens of a long row to other angles."""
    path = save_model(tmp_path / "base", hidden_size=64, max_position_embeddings=600)
    model = narrow(load_language_model(path), "bfloat16").eval()
    need = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    mine, theirs = (dict((*x.named_parameters(), *x.named_buffers())) for x in (model, need))
    assert mine.keys() == theirs.keys()
    assert all(mine[name].dtype == x.dtype and torch.equal(mine[name], x) for name, x in theirs.items())
    assert {x.dtype for x in model.parameters()} == {torch.bfloat16}
    ids = torch.randint(0, 30, (1, 600), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got, wanted = (x(input_ids=ids, use_cache=False).logits for x in (model, need))
    assert_close(got, wanted, dtype=torch.bfloat16, scale=4)


def test_what_is_kept_in_fp32_stays(tmp_path: Path) -> None:
    model = load_language_model(save_model(tmp_path / "base"))
    model._keep_in_fp32_modules_strict = {"input_layernorm"}
    narrow(model, "bfloat16")
    assert model.model.layers[0].input_layernorm.weight.dtype == torch.float32
    assert model.model.norm.weight.dtype == torch.bfloat16


def test_buffers_stay_where_a_network_runs(tmp_path: Path) -> None:
    model = load_language_model(save_model(tmp_path / "base"))
    buffers_to(model, torch.device("meta"))
    assert {x.device.type for x in model.buffers()} == {"meta"}
    assert {x.device.type for x in model.parameters()} == {"cpu"}
