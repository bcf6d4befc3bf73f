"""Frozen networks in 8 or 4 bits, by bitsandbytes through transformers: less memory for weights that do not train."""

from __future__ import annotations

import copy
import logging
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from lit_instruct.models.packing import take_admission
from lit_instruct.models.rms_norm import quicken_norms
from lit_instruct.types import ConfigError

Quantization = Literal["8bit", "4bit"]

AnyModel = TypeVar("AnyModel", bound=PreTrainedModel)

_QUANTISED = {"Params4bit", "Int8Params"}  # of bitsandbytes, which is not imported to look at a name
_STEADY: dict[type[nn.Module], type[nn.Module]] = {}


def quantise(model: AnyModel, kind: Quantization) -> AnyModel:
    """Give a model's linear layers 8 or 4 bits; embeddings, unembedding, norms and biases stay as they are.

    It works on a loaded model, so that every source has the same way: files, checkpoints of a stage, configurations.
    The same weights always give the same numbers.

    Args:
        model: a language model or its decoder in fp32, on the CPU. It is not changed.
        kind: ``8bit``: LLM.int8, which on a GPU rounds activations too; ``4bit``: nf4 with quantised scales. Products
            are in fp32 (on a GPU 8 bits are multiplied in int8 and fp16), or less under autocast.

    Returns:
        A frozen model of the same class, in the same mode, which reads rows as ``model`` does. Weights that are not
        quantised are copies: nothing of it keeps ``model`` in memory.

    Raises:
        ConfigError: bitsandbytes is not installed, or it cannot quantise this model.
    """
    _require_bitsandbytes(kind)
    settings: dict[str, Any] = {"load_in_8bit": True}
    if kind == "4bit":
        settings = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.float32,
        }
    small: AnyModel = type(model).from_pretrained(
        None,
        config=copy.deepcopy(model.config),
        state_dict=model.state_dict(),
        quantization_config=BitsAndBytesConfig(**settings),
        dtype=torch.float32,
        device_map={"": "cpu"},
    )
    if not is_quantised(small):
        raise ConfigError(
            f"quantization: got {kind} for {type(model).__name__}, of which no layer could be quantised; need a "
            "decoder made of linear layers. Do: leave quantization out."
        )
    for parameter in small.parameters():
        if type(parameter).__name__ not in _QUANTISED:
            # transformers took over the tensors themselves, and one tensor of a mapped file keeps all of it mapped.
            parameter.data = parameter.data.clone()
    for layer in small.modules():
        _steady(layer)
    quicken_norms(small)
    take_admission(small, model)
    return small.train(model.training).requires_grad_(False)


def _steady(layer: Any) -> None:
    """On a CPU bitsandbytes rounds activations in evaluation, and in training not: a policy would be two functions.

    Args:
        layer: if it is one of bitsandbytes', it will compute as in training always.
    """
    if type(layer).__name__ == "Linear4bit":
        layer.support_avx512bf16_for_cpu = False  # else its weights are laid out for a bf16 kernel in evaluation
    elif type(layer).__name__ == "Linear8bitLt":
        layer.__class__ = _always_training(type(layer))
        layer.train()


def _always_training(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a layer's class, with the same name: its own mode does not change with the model's.

    And it moves whole: a model that is moved asks its layers for their parameters only, and beside these lie scales.
    """

    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        return kind.train(self, True)

    def _apply(self: Any, fn: Any, recurse: bool = True) -> nn.Module:
        kind._apply(self, fn, recurse)
        for kept in (self.weight, self.state):  # before the first pass, and from then on
            if kept.CB is not None:
                kept.CB, kept.SCB = self.weight.data, kept.SCB.to(self.weight.device)
        return self

    if kind not in _STEADY:
        own = {"train": train, "_apply": _apply, "__module__": kind.__module__}
        _STEADY[kind] = type(kind.__name__, (kind,), own)
    return _STEADY[kind]


def dequantise(model: AnyModel) -> AnyModel:
    """Bring a quantised model back to fp32, rounded as it is.

    Args:
        model: of :func:`quantise`, changed in place.

    Returns:
        The same model, of plain layers again.
    """
    plain: AnyModel = model.dequantize(dtype=torch.float32)
    return plain.float()


def is_quantised(network: nn.Module) -> bool:
    """Whether any weight of a network is one of bitsandbytes' 8 or 4 bits."""
    return any(type(parameter).__name__ in _QUANTISED for parameter in network.parameters())


def _require_bitsandbytes(kind: Quantization) -> None:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"quantization: got {kind}, but bitsandbytes is not installed. Do: pip install 'lit-instruct[quant]'."
        ) from error
    # It says at every layer and every pass that LLM.int8 multiplies in fp16, which is what it does.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
