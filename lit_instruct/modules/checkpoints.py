"""What every stage puts into its checkpoints and takes out of them: the base of the three modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

import lightning.pytorch as pl
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from lit_instruct.models.backbone import context_length
from lit_instruct.models.handover import write_handover


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
