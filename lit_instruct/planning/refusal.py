"""How planning refuses what it is given."""

from __future__ import annotations

from typing import NoReturn


def refuse(name: str, got: str, need: str, do: str) -> NoReturn:
    """Raise the project's ConfigError; its module imports torch, which only a mistake has to wait for.

    Args:
        name: of the setting.
        got: what it was.
        need: what it must be.
        do: how to mend it.

    Raises:
        ConfigError: always.
    """
    from lit_instruct.types import ConfigError

    raise ConfigError(f"{name}: got {got}; need {need}. Do: {do}.")
