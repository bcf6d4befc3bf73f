"""Our side: a stage under Lightning's Trainer, stopped between batches."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from lit_instruct import PPOModule, RewardModule, SFTModule
from lit_instruct.callbacks import Health, KLMonitor
from lit_instruct.models.scalar_head import ScalarModel
from lit_instruct.rewards import RewardModelScorer
from scripts.benchmark.cases import LEARNING_RATE, SEED
from scripts.benchmark.gate import Gate, spec
from scripts.benchmark.plain import head_weight
from scripts.benchmark.world import data_module


class Stops(pl.Callback):
    """The gate between two batches; in PPO a batch is an iteration."""

    def __init__(self, gate: Gate, stage: str) -> None:
        self.gate, self.stage = gate, stage
        self.lengths: list[float] = []
        self.last_loss: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.gate.begin()

    def on_experience(self, module: Any, rollout: Any, experience: Any) -> None:
        self.lengths.append(float(rollout.response_mask_BR.sum(dim=1).float().mean()))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = trainer.callback_metrics.get(f"{self.stage}/train/loss")
        if loss is not None and loss != self.last_loss:  # else the step did not log, and this is still the old one
            self.last_loss = loss
            self.gate.facts.setdefault("losses", {})[trainer.global_step] = float(loss)
        if self.lengths:
            self.gate.facts["mean_response"] = sum(self.lengths) / len(self.lengths)
        self.gate.step()


def build(told: dict[str, Any], folder: Path) -> pl.LightningModule:
    """The stage's module, all settings by public arguments."""
    model = str(folder / "model")
    shared: dict[str, Any] = {"template": "verbatim", **told["module"]}
    if told["stage"] == "sft":
        return SFTModule(model, learning_rate=LEARNING_RATE, final_lr_ratio=1.0, **shared)
    if told["stage"] == "rm":
        module = RewardModule(model, learning_rate=LEARNING_RATE, final_lr_ratio=1.0, **shared)
        head = module.reward_model.head
        head.weight.data.copy_(head_weight(head.in_features))  # so that its losses can be compared with the peer's
        return module
    torch.manual_seed(SEED)
    sizes = {"micro_batch_size": told["batch_size"], "rollout_batch_size": told["batch_size"]}
    settings: dict[str, Any] = sizes | shared
    return PPOModule(
        model,
        reward=RewardModelScorer(ScalarModel.from_base(model), batch_rows=settings["micro_batch_size"]),
        episodes=10**9,
        minibatch_size=told["batch_size"],
        inner_epochs=told["data"]["inner_epochs"],
        max_response_tokens=told["data"]["max_response"],
        temperature=1.0,
        learning_rate=1e-6,  # as the peer's: the policy must not move away from the length it starts with
        value_learning_rate=1e-6,
        warmup_iterations=0,
        seed=SEED,
        **settings,
    )


def main() -> None:
    """Build, then train from gate to gate."""
    told = spec()
    gate = Gate()
    torch.set_num_threads(told["threads"])
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    folder = Path(told["folder"])
    pl.seed_everything(SEED)
    module = build(told, folder)
    watchers = [Health(), KLMonitor()] if told["stage"] == "ppo" else []  # as shipped
    trainer = pl.Trainer(
        accelerator="cpu",
        precision=told["precision"],
        max_epochs=-1 if told["stage"] == "ppo" else 1,
        gradient_clip_val=None if told["stage"] == "ppo" else 1.0,
        log_every_n_steps=told["log_every"],
        logger=TensorBoardLogger(str(folder / "logs"), name=None),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[*watchers, Stops(gate, told["stage"])],
    )
    trainer.fit(module, datamodule=data_module(told["stage"], folder, told["batch_size"]))
    raise SystemExit("the run ended before it was told to: too few rows")


if __name__ == "__main__":
    main()
