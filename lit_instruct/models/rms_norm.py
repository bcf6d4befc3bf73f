"""Root-mean-square norms of a decoder, on a CPU, in half the time (``scripts/benchmark/attention.py`` measures it).

Written as a chain of tensor operations, as models have it, a norm reads and writes its rows a dozen times there and
back; with two of them a block that is a sixth of a small model's training step. Here a few rows at a time stay in the
processor's cache, and the backward pass is written out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_CACHED = 1 << 16  # numbers of a block of rows, for each thread
_ROUNDING = 1e-5


def quicken_norms(model: nn.Module) -> int:
    """Let the norms of a model work by :func:`rms_norm` where they compute that, as is seen on random rows.

    Only fp32 on a CPU goes that way; whatever else a norm is given it does as before. Names and weights stay.

    Args:
        model: changed in place: its norms get a class of their own under the same name.

    Returns:
        How many norms there were to quicken.
    """
    found = [module for module in model.modules() if _is_rms_norm(module)]
    for module in found:
        module.__class__ = _quick(type(module))
    return len(found)


def rms_norm(rows: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight * x / sqrt(mean(x ** 2) + eps)`` of each row x.

    Args:
        rows: fp32 ``[..., D]``.
        weight: fp32 ``[D]``.
        eps: of the norm.

    Returns:
        fp32 ``[..., D]``; differentiable once.
    """
    flat: Tensor = _RMSNorm.apply(rows.flatten(0, -2), weight, eps)
    return flat.view(rows.shape)


class _RMSNorm(torch.autograd.Function):
    """The norm and its gradients.

    In these ``r = 1 / sqrt(mean(x ** 2) + eps)``, and g is the gradient of the output::

        x:       r g w - x r ** 3 / D * sum(g w x)
        weight:  sum over rows of r g x
    """

    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        out_ND = torch.empty_like(rows_ND)
        factor_N1 = rows_ND.new_empty(len(rows_ND), 1)
        for x, out, factor in zip(*_blocks(rows_ND, out_ND, factor_N1), strict=True):
            torch.linalg.vector_norm(x, dim=1, keepdim=True, out=factor)
            factor.square_().div_(x.shape[1]).add_(eps).rsqrt_()
            torch.mul(x, factor, out=out).mul_(weight_D)
        ctx.save_for_backward(rows_ND, weight_D, factor_N1)
        return out_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Any, ...]:
        rows_ND, weight_D, factor_N1 = ctx.saved_tensors
        into_ND, into_D = torch.empty_like(rows_ND), torch.zeros_like(weight_D)
        for x, g, factor, into in zip(*_blocks(rows_ND, grad_ND, factor_N1, into_ND), strict=True):
            product = g * x
            into_D.addmv_(product.t(), factor.squeeze(1))
            pull = torch.mv(product, weight_D).unsqueeze(1).mul_(factor.pow(3).div_(-x.shape[1]))
            torch.mul(g, weight_D, out=into).mul_(factor).addcmul_(x, pull)
        return into_ND, into_D, None


def _blocks(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    rows = max(_CACHED * torch.get_num_threads() // tensors[0].shape[1], 1)
    return [tensor.split(rows) for tensor in tensors]


_QUICK: dict[type[nn.Module], type[nn.Module]] = {}


def _quick(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a norm's class, one for each, with the same name: models look for it in their own code."""
    if kind not in _QUICK:
        _QUICK[kind] = _subclass(kind)
    return _QUICK[kind]


def _subclass(kind: type[nn.Module]) -> type[nn.Module]:

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        weight = self.weight
        if hidden_states.device.type == "cpu" and hidden_states.dtype == weight.dtype == torch.float32:
            return rms_norm(hidden_states, weight, _eps(self))
        result: Tensor = kind.forward(self, hidden_states)
        return result

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__, "quickened": True})


def _eps(module: nn.Module) -> Any:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


@torch.no_grad()
def _is_rms_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    named = type(module).__name__.endswith("RMSNorm") and not hasattr(module, "quickened")
    if not named or not isinstance(weight, nn.Parameter) or len(list(module.parameters())) != 1 or weight.dim() != 1:
        return False
    if not isinstance(_eps(module), float) or weight.dtype != torch.float32 or weight.device.type != "cpu":
        return False
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 3, len(weight), generator=generator)
    need = module(rows)
    if not isinstance(need, Tensor):
        return False
    return bool((rms_norm(rows, weight, _eps(module)) - need).norm() <= _ROUNDING * need.norm())
