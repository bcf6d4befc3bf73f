"""What a stage's run starts from: a model folder with its tokenizer, and reward models that were trained on it.

They are written by a process of their own, so that whoever measures memory afterwards loads them as a user's run does,
adapters included: an adapter needs saved weights to stand on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write_base(folder: Path, config: dict[str, Any]) -> None:
    """Write a language model with random weights, and a tokenizer of one token a word.

    Args:
        folder: made if it is not there.
        config: fields of the model's configuration, with ``model_type`` and ``vocab_size``.
    """
    from scripts.benchmark.world import language_model, tokenizer

    tokenizer(config["vocab_size"]).save_pretrained(folder)
    model = language_model(config)
    model.get_output_embeddings().weight.data[0] = 0.0  # the end of text is no likelier than any other token
    model.save_pretrained(folder)


def write_reward_model(checkpoint: Path, base: Path, *, rank: int = 0, quantization: str | None = None) -> None:
    """Write the checkpoint of an untrained reward model.

    Args:
        checkpoint: the file.
        base: of :func:`write_base`.
        rank: of its adapter; 0: none.
        quantization: of the base below the adapter.
    """
    import lightning.pytorch as pl

    from lit_instruct import RewardModule
    from lit_instruct.models.adapters import LoraSettings

    adapter = LoraSettings(r=rank) if rank else None
    module = RewardModule(str(base), template="verbatim", adapter=adapter, quantization=quantization)  # type: ignore[arg-type]
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(checkpoint)
