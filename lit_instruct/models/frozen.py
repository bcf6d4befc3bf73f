"""The networks of PPO that do not train: where the reference comes from, and how many bits they have."""

from __future__ import annotations

import copy
from typing import Literal, TypeVar

import torch
from transformers import PreTrainedModel

from lit_instruct.models.adapters import shared_twin
from lit_instruct.models.backbone import Base, load_language_model
from lit_instruct.models.quantisation import is_quantised, quantise
from lit_instruct.models.value_model import Memory

FrozenDtype = Literal["float32", "bfloat16", "8bit", "4bit"]

AnyModel = TypeVar("AnyModel", bound=PreTrainedModel)


def make_reference(source: Base | None, *, policy: PreTrainedModel, memory: Memory) -> PreTrainedModel:
    """The model that the KL penalty holds on to.

    Args:
        source: None: the policy as it starts; else a model to load.
        policy: without its adapter.
        memory: with ``shared_base`` the weights are the policy's own tensors.

    Returns:
        The model in eval mode, frozen.
    """
    if source is not None:
        reference = load_language_model(source)
    elif memory == "shared_base":
        reference = shared_twin(policy, policy)
    else:
        reference = copy.deepcopy(policy)
    return reference.eval().requires_grad_(False)


def narrow(model: AnyModel, dtype: FrozenDtype) -> AnyModel:
    """Give a frozen model fewer bits.

    Args:
        model: in fp32, or quantised already: then it stays as it is.
        dtype: what for.

    Returns:
        The model, changed in place where that is possible.
    """
    if dtype == "float32" or is_quantised(model):
        return model
    if dtype == "bfloat16":
        kept: set[str] = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
        for name, parameter in model.named_parameters():  # and not the buffers: a long row's positions need all digits
            if kept.isdisjoint(name.split(".")):
                parameter.data = parameter.data.to(torch.bfloat16)
        return model
    return quantise(model, dtype)
