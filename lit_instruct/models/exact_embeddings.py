"""Optimizers with an 8-bit state keep that of embeddings in 32 bit.

A row of an embedding gets gradients of very different sizes from step to step, since most tokens are rare, and with an
8-bit state training becomes unstable there first (Dettmers et al. 2022, 8-bit optimizers, section 2.3).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel


def embedding_parameters(network: nn.Module) -> list[nn.Parameter]:
    """The parameters of a network that stand for tokens or positions.

    Args:
        network: with embeddings anywhere inside, and maybe with language models that have an unembedding.

    Returns:
        Each once, also where input and output are tied.
    """
    found: dict[int, nn.Parameter] = {}
    for module in network.modules():
        parts = [module] if isinstance(module, nn.Embedding) else []
        if isinstance(module, PreTrainedModel) and (unembedding := module.get_output_embeddings()) is not None:
            parts.append(unembedding)
        found |= {id(parameter): parameter for part in parts for parameter in part.parameters()}
    return list(found.values())


def is_bitsandbytes(optimizer: Optimizer) -> bool:
    """Whether an optimizer is one of bitsandbytes.

    Args:
        optimizer: any.
    """
    if "bitsandbytes" not in sys.modules:  # nobody has made one; importing it takes seconds
        return False
    from bitsandbytes.optim.optimizer import Optimizer8bit

    return isinstance(optimizer, Optimizer8bit)


def keep_embeddings_exact(optimizer: Any, networks: Iterable[nn.Module]) -> None:
    """Tell an optimizer of bitsandbytes to keep the state of embeddings in 32 bit.

    Args:
        optimizer: for which :func:`is_bitsandbytes` holds, before its first step; changed in place.
        networks: that it trains.
    """
    from bitsandbytes.optim import GlobalOptimManager

    exact = {id(parameter) for network in networks for parameter in embedding_parameters(network)}
    # One of its own: the shared one goes by the addresses of parameters, at which others lie in the next run.
    manager = GlobalOptimManager.__new__(GlobalOptimManager)
    manager.initialize()
    manager.index2config = {
        (group, place): {"optim_bits": 32}
        for group, settings in enumerate(optimizer.param_groups)
        for place, parameter in enumerate(settings["params"])
        if id(parameter) in exact
    }
    optimizer.mng = manager
