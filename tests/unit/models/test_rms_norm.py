"""Norms by blocks of rows against their formula, and which norms of a model are taken."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_instruct.models import rms_norm as file
from lit_instruct.models.forward import demonstration_loss
from lit_instruct.models.rms_norm import quicken_norms, rms_norm
from lit_instruct.types import DemonstrationBatch
from tests.helpers.numbers import assert_close
from tests.helpers.tiny import gradients
from tests.unit.models.networks import tiny_model


def by_formula(row: Tensor, weight: Tensor, eps: float) -> Tensor:
    mean = sum(float(x) ** 2 for x in row) / len(row)
    return torch.stack([w * x / (mean + eps) ** 0.5 for w, x in zip(weight, row, strict=True)])


@pytest.mark.parametrize("width", [1, 5])
def test_by_the_formula(width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, weight = torch.randn(2, 3, width, generator=generator), torch.randn(width, generator=generator)
    got = rms_norm(rows, weight, 0.3)
    for place in range(6):
        assert_close(got.flatten(0, 1)[place], by_formula(rows.flatten(0, 1)[place], weight, 0.3))


def test_gradients_by_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 0.1), (rows, weight))


def test_blocks_join_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven rows in blocks of two: the same as in one."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    told = []
    for numbers in (8, 1 << 16):
        monkeypatch.setattr(file, "_CACHED", numbers)
        rows = torch.randn(7, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
        weight = torch.linspace(-1, 2, 4).requires_grad_()
        out = rms_norm(rows, weight, 1e-6)
        (out * torch.arange(28.0).view(7, 4)).sum().backward()
        told.append((out, rows.grad, weight.grad))
    for got, need in zip(*told, strict=True):
        assert_close(got, need, scale=5)  # a gradient of the weight of some 50


@pytest.mark.parametrize(
    ("family", "norms"), [("llama", 5), ("qwen2", 5), ("mistral", 5), ("gemma2", 0), ("gpt2", 0), ("opt", 0)]
)
def test_a_model_with_quick_norms(family: str, norms: int) -> None:
    """Gemma's norm multiplies by 1 + weight, GPT-2's and OPT's take the mean off: left alone."""
    plain = tiny_model(family)
    with torch.no_grad():
        for parameter in plain.parameters():
            if parameter.dim() == 1:
                parameter += torch.linspace(-0.5, 0.5, len(parameter))
    quick = copy.deepcopy(plain)
    assert quicken_norms(quick) == norms
    assert quicken_norms(quick) == 0
    assert quick.state_dict().keys() == plain.state_dict().keys()
    quick = copy.deepcopy(quick)
    ids = torch.tensor([[5, 9, 4, 30, 7], [8, 8, 3, 1, 1]])
    mask = ids != 1
    told: list[Any] = []
    for model in (plain, quick):
        loss, _ = demonstration_loss(model, DemonstrationBatch(ids, mask, mask))
        loss.backward()
        told.append((loss, gradients(model)))
    for got, need in zip(*told, strict=True):
        assert_close(got, need)
    names = [type(module).__name__ for module in plain.modules()]
    assert [type(module).__name__ for module in quick.modules()] == names


def test_other_precisions_go_the_models_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    norm = model.base_model.norm
    rows = torch.randn(2, 16).bfloat16()
    need = norm(rows)
    quicken_norms(model)
    monkeypatch.setattr(file, "rms_norm", lambda *_: pytest.fail("only fp32 is quickened"))
    assert torch.equal(norm(rows), need)


def test_what_only_has_the_name_is_left_alone() -> None:
    class AnotherRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))
            self.eps = 1e-6

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * x

    assert quicken_norms(nn.Sequential(AnotherRMSNorm())) == 0
