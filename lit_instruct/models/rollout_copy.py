"""A copy of the policy in lower precision, to sample with: weights are read once a token, so fewer bytes are less time.

Its distribution is not quite that of the policy. Log-probabilities that training compares with must therefore come from
the policy itself; ``stream_responses(..., keep_logprobs=True)`` gives the sampler's own, to measure the gap by.
"""

from __future__ import annotations

import copy
import warnings
from typing import Literal, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lit_instruct.models.adapters import adapted_layers, merged_weight
from lit_instruct.types import ConfigError

RolloutDtype = Literal["bfloat16", "int8"]

_LINEAR = (nn.Linear, Conv1D)  # and none of the classes derived from them, which may do more
_INT8_BOUND = 127


def _matrix(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weights ``[out, in]`` and bias ``[out]`` of a linear layer; GPT-2 has them the other way round.

    Of a layer with an adapter they are those of both together.
    """
    linear = cast(nn.Linear, getattr(layer, "base_layer", layer))
    weight = merged_weight(layer) if linear is not layer else linear.weight.detach()
    return weight.T if isinstance(linear, Conv1D) else weight, None if linear.bias is None else linear.bias.detach()


class _Linear(nn.Module):
    """A linear layer whose weights lie as a CPU's kernels want them; :meth:`pack` lays them out anew."""

    def __init__(self, source: nn.Module):
        super().__init__()
        self.pack(*_matrix(source))

    def pack(self, weight: Tensor, bias: Tensor | None) -> None:
        """Take over the weights of the policy's layer."""
        raise NotImplementedError


class _BFloat16Linear(_Linear):
    """``nn.Linear`` would bring the weights into the order of the matrix unit at every call."""

    def pack(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weights = torch.ops.mkldnn._reorder_linear_weight(weight.bfloat16().contiguous(), None)
        self.bias = None if bias is None else bias.bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weights, self.bias, "none", [], "")
        return result


class _Int8Linear(_Linear):
    """Weights in int8, with a scale for each output; inputs are quantised as they come, with one scale a call."""

    def pack(self, weight: Tensor, bias: Tensor | None) -> None:
        weight = weight.float().contiguous()
        scales = weight.abs().amax(dim=1).double().clamp_min(1e-12) / _INT8_BOUND
        zero_points = torch.zeros_like(scales, dtype=torch.long)
        with warnings.catch_warnings():  # torch is to drop these tensors some day; see _check_int8
            warnings.filterwarnings("ignore", message=".*quantized tensor creation functions", category=UserWarning)
            quantised = torch.quantize_per_channel(weight, scales, zero_points, 0, torch.qint8)
        self.weights = torch.ops.quantized.linear_prepack(quantised, None if bias is None else bias.float())
        self.reduce_range = not torch.cpu._is_vnni_supported()  # sums of products overflow there, else

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = torch.ops.quantized.linear_dynamic(x, self.weights, self.reduce_range)
        return result


@torch.no_grad()
def rollout_copy(model: nn.Module, dtype: RolloutDtype, device: torch.device | None = None) -> nn.Module:
    """Copy a policy into lower precision.

    Args:
        model: a causal language model; an adapter is merged in the copy.
        dtype: ``bfloat16``: all weights but those that the model itself keeps in fp32 (buffers too stay as they are);
            ``int8``: the weights of linear layers, on a CPU; the rest as it is.
        device: that the copy will be moved to before it samples; None: it stays with the model.

    Returns:
        The copy, in eval mode and without gradients or forward hooks: whoever listens to the policy must not hear it.

    Raises:
        ConfigError: int8 on another device than a CPU, or for a model without linear layers.
    """
    kind_of_device = (device or next(model.parameters()).device).type
    if dtype == "int8":
        _check_int8(model, kind_of_device)
    twin = copy.deepcopy(model, {id(p): _converted(n, p, model, dtype) for n, p in model.named_parameters()})
    for module in twin.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    adapted = list(adapted_layers(twin))
    for name, layer in adapted:
        twin.set_submodule(name, layer.base_layer)
    kind = _Int8Linear if dtype == "int8" else _BFloat16Linear
    if dtype == "int8" or _packs_bfloat16(kind_of_device):
        for name, module in list(twin.named_modules()):
            if type(module) in _LINEAR and (dtype == "int8" or _matrix(module)[0].dtype == torch.bfloat16):
                parent, _, own = name.rpartition(".")
                setattr(twin.get_submodule(parent), own, kind(module))
    if adapted:
        refresh(twin, model)
    return twin.eval().requires_grad_(False)


@torch.no_grad()
def refresh(twin: nn.Module, model: nn.Module) -> None:
    """Bring a copy up to date.

    Args:
        twin: of :func:`rollout_copy`, changed in place.
        model: the policy that it was made of.
    """
    # Not state_dict: asked for it, a network whose shards are gathered would give them back first.
    weights: dict[str, Tensor] = dict((*model.named_parameters(), *model.named_buffers()))
    # A layer with an adapter holds its own tensors one name deeper, and its weights there are not all of them.
    weights |= {name.replace(".base_layer.", "."): tensor for name, tensor in weights.items()}
    adapted = {f"{name}.weight": layer for name, layer in adapted_layers(model)}
    for name, tensor in (*twin.named_parameters(), *twin.named_buffers()):
        if name in adapted:
            tensor.copy_(merged_weight(adapted[name]))
        elif name in weights and tensor is not weights[name]:  # the others are shared, or made by the model itself
            tensor.copy_(weights[name])
    for name, module in twin.named_modules():
        if isinstance(module, _Linear):
            module.pack(*_matrix(model.get_submodule(name)))


def _converted(name: str, parameter: nn.Parameter, model: nn.Module, dtype: RolloutDtype) -> nn.Parameter:
    """The copy's parameter; the policy's own where it is frozen and would be no other."""
    kept: set[str] = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    target = parameter.dtype
    if dtype == "bfloat16" and target.is_floating_point and not any(part in kept for part in name.split(".")):
        target = torch.bfloat16
    if target == parameter.dtype and not parameter.requires_grad and ".base_layer." not in name:
        return parameter
    return nn.Parameter(parameter.detach().to(target, copy=True), requires_grad=False)


def _packs_bfloat16(device: str) -> bool:
    """Whether it is a CPU, which multiplies bf16, and this torch has the call that inductor uses for it."""
    known = hasattr(torch.ops.mkldnn, "_linear_pointwise") and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    return (
        device == "cpu"
        and known
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _check_int8(model: nn.Module, device: str) -> None:
    if device != "cpu":
        raise ConfigError(
            f"rollout in int8: got a policy on {device}; need one on a CPU, for which the kernels are. Do: sample in "
            "bfloat16."
        )
    if not any(type(module) in _LINEAR for module in model.modules()):
        raise ConfigError(
            f"rollout in int8: got {type(model).__name__}, which has no linear layer; need some, for nothing else is "
            "quantised. Do: sample in bfloat16."
        )
    if torch.backends.quantized.engine == "none" or not hasattr(torch, "quantize_per_channel"):
        raise ConfigError(
            "rollout in int8: got a torch without quantised kernels; need one with them. Do: sample in bfloat16."
        )
