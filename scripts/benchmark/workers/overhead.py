"""A micro model under Lightning's Trainer, or in a plain loop with the same loss, optimizer and clipping.

The model is so small that what the Trainer adds can be seen; both take the same batch again and again.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

from lit_instruct import SFTModule
from lit_instruct.modules.optimizers import paper_adam
from lit_instruct.types import DemonstrationBatch
from scripts.benchmark.cases import LEARNING_RATE, SEED, llama
from scripts.benchmark.gate import Gate, spec
from scripts.benchmark.world import tokenizer


class Stops(pl.Callback):
    """The gate between two steps."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.gate.begin()

    def on_train_batch_end(self, *arguments: Any) -> None:
        self.gate.step()


def main() -> None:
    """Train from gate to gate."""
    told = spec()
    gate = Gate()
    torch.set_num_threads(told["threads"])
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    folder = Path(told["folder"])
    tokenizer(llama("micro")["vocab_size"]).save_pretrained(folder / "tokenizer")
    pl.seed_everything(SEED)
    module = SFTModule(llama("micro"), str(folder / "tokenizer"), learning_rate=LEARNING_RATE, final_lr_ratio=1.0)
    ids = torch.randint(2, 64, (4, 16))
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    batch = DemonstrationBatch(ids, everywhere, everywhere)
    if told["side"] == "trainer":
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=1,
            gradient_clip_val=1.0,
            log_every_n_steps=told["log_every"],
            logger=TensorBoardLogger(str(folder / "logs"), name=None),
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            callbacks=[Stops(gate)],
        )
        batches: Any = [batch] * told["steps"]
        trainer.fit(module, DataLoader(batches, batch_size=None))
    else:
        loop(module, batch, gate)
    raise SystemExit("the run ended before it was told to")


def loop(module: SFTModule, batch: DemonstrationBatch, gate: Gate) -> None:
    """The same loss, backward pass, clipping and optimizer, and nothing else."""
    optimizer = paper_adam([{"params": list(module.policy.parameters()), "lr": LEARNING_RATE}])
    gate.begin()
    while True:
        loss, _ = module.loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        gate.step()


if __name__ == "__main__":
    main()
