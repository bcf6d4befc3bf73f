"""What every stage puts into its checkpoints and takes out of them: the base of the three modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

import lightning.pytorch as pl
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from lit_instruct.models.backbone import context_length
from lit_instruct.models.handover import write_handover
from lit_instruct.types import ConfigError


class StageCheckpoint(pl.LightningModule):
    """Writes the handover (see :mod:`lit_instruct.models.handover`) and keeps frozen networks out of checkpoints.

    Attributes:
        stage: ``sft``, ``rm`` or ``ppo``.
        handed_over: name of the attribute whose network the next stage takes.
        base_argument: name of the ``__init__`` argument that says where that network comes from, if the checkpoint
            itself can take that place; None for PPO, which needs its reference and reward model again anyway.
        frozen_networks: attributes whose weights are not saved.
        tokenizer: with its template settled.
    """

    stage: ClassVar[str]
    handed_over: ClassVar[str]
    base_argument: ClassVar[str | None]
    frozen_networks: ClassVar[tuple[str, ...]] = ()
    tokenizer: PreTrainedTokenizerBase

    @property
    def network_config(self) -> PretrainedConfig:
        """Configuration of the network that is handed over."""
        return getattr(self, self.handed_over).config

    @property
    def sample_token_limit(self) -> int | None:
        """How many tokens one sample of the data may have; None where the model sets no limit."""
        return context_length(self.network_config)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the frozen networks out; add the handover."""
        frozen = tuple(f"{name}." for name in self.frozen_networks)
        checkpoint["state_dict"] = {
            name: tensor for name, tensor in checkpoint["state_dict"].items() if not name.startswith(frozen)
        }
        write_handover(
            checkpoint,
            stage=self.stage,
            network=f"{self.handed_over}.",
            config=self.network_config,
            tokenizer=self.tokenizer,
        )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Fill in what was left out, so that loading stays strict about all the rest."""
        for name in self.frozen_networks:
            network: nn.Module = getattr(self, name)
            for key, tensor in network.state_dict(prefix=f"{name}.").items():
                checkpoint["state_dict"].setdefault(key, tensor)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, **arguments: Any) -> Self:  # type: ignore[override]
        """Build the module from its own checkpoint; the model folder it once came from is not needed.

        Args:
            checkpoint_path: a ``.ckpt`` of this stage.
            **arguments: as Lightning's; also constructor arguments that replace the saved ones.

        Returns:
            The module with its weights.
        """
        if cls.base_argument is not None:
            arguments.setdefault(cls.base_argument, str(checkpoint_path))
        arguments.setdefault("tokenizer", str(checkpoint_path))
        return super().load_from_checkpoint(checkpoint_path, **arguments)


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
