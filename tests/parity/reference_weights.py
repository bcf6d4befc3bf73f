"""Weights that two implementations can each make for themselves: pseudo-random numbers keyed by parameter name."""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
from torch import nn

_BODIES = ("model.", "trunk.")
_HEADS = {"score.weight": "head.weight"}


def named(network: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters under the names that both sides understand, sorted; the bias of a scalar head is left out.

    ``model.norm.weight`` of a Hugging Face model and ``trunk.norm.weight`` of a scalar model are ``norm.weight``.
    """
    found = {}
    for name, parameter in network.named_parameters():
        for body in _BODIES:
            name = name.removeprefix(body)
        found[_HEADS.get(name, name)] = parameter
    found.pop("head.bias", None)
    yield from sorted(found.items())


@torch.no_grad()
def fill(network: nn.Module, key: str) -> None:
    """Overwrite all parameters with numbers of fp32 precision that depend on ``key`` and the names alone."""
    for name, parameter in named(network):
        stream = random.Random(f"{key}/{name}")  # the same numbers in every version and on every machine
        numbers = torch.tensor([stream.gauss(0.0, 0.4) for _ in range(parameter.numel())], dtype=torch.float32)
        if parameter.dim() == 1:  # the scale of a norm
            numbers = 1.0 + numbers / 4
        parameter.copy_(numbers.view_as(parameter))


def flat_gradients(network: nn.Module) -> torch.Tensor:
    """All gradients as one vector, in the order of :func:`named`."""
    return torch.cat([p.grad.flatten() for _, p in named(network) if p.grad is not None]).clone()
