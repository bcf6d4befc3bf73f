"""What the modules check before anything is loaded or trained, each with an error that says what to do."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

from lit_instruct.types import ConfigError


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a word that is none of the choices.

    Raises:
        ConfigError: it is not.
    """
    if value not in choices:
        raise ConfigError(f"{name}: got {value!r}; need one of {', '.join(choices)}.")


def check_ranges(**settings: tuple[float | None, float, float | None]) -> None:
    """Refuse settings that cannot work, before anything is loaded.

    Args:
        settings: name = (value, lowest, highest), the ends included; a highest of None is no bound, a value of None is
            allowed.

    Raises:
        ConfigError: a value lies outside, or is not a number.
    """
    for name, (value, lowest, highest) in settings.items():
        if value is None or (value >= lowest and (highest is None or value <= highest)):
            continue
        upper = "" if highest is None else f" and at most {highest:g}"
        raise ConfigError(f"{name}: got {value:g}; need at least {lowest:g}{upper}.")


def tokenizer_source(base: Any, tokenizer: Any) -> Any:
    """Where the tokenizer comes from: what was asked for, else from beside the model.

    Args:
        base: where the model comes from.
        tokenizer: the module's ``tokenizer`` argument.

    Returns:
        A source for :func:`lit_instruct.models.tokenizer.load_tokenizer`.

    Raises:
        ConfigError: the model is a bare configuration and no tokenizer was named.
    """
    if tokenizer is not None:
        return tokenizer
    if isinstance(base, dict):
        raise ConfigError("tokenizer: got none, and a model made from a bare configuration brings none; name one.")
    return base


def digest_of(network: nn.Module, also: str = "") -> str:
    """The sha256 of a network's weights and their names, and of what else makes it what it is."""
    digest = hashlib.sha256(also.encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
