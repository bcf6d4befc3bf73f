"""The peer's side of SFT and reward model: TRL's own trainers, on the token ids of our batches, in their order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from scripts.benchmark.cases import LEARNING_RATE, SEED
from scripts.benchmark.gate import Gate, spec
from scripts.benchmark.plain import head_weight


class Stops(TrainerCallback):
    """The gate between two optimizer steps."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.gate.begin()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **more: Any) -> None:
        if logs and "loss" in logs:
            self.gate.facts.setdefault("losses", {})[state.global_step] = float(logs["loss"])

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.gate.step()


def settings(told: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What both trainers are told: fast settings, and no work that ours does not do either."""
    rows = told["rows"]  # of a micro-batch
    rows_a_step = told["rows_a_step"]
    assert rows_a_step % rows == 0, f"{rows_a_step} rows a step are no multiple of {rows}"
    return {
        "output_dir": str(folder / "trl"),
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": rows_a_step // rows,
        "num_train_epochs": 1,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "adam_beta2": 0.95,
        "bf16": told["bf16"],
        "gradient_checkpointing": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": told["log_every"],
        "logging_first_step": True,
        "train_sampling_strategy": "sequential",
        "max_length": None,
        "seed": SEED,
    }


def main() -> None:
    """Build, then train from gate to gate."""
    told = spec()
    gate = Gate()
    torch.set_num_threads(told["threads"])
    folder = Path(told["folder"])
    steps = json.loads((folder / "peer.json").read_text(encoding="utf-8"))
    data = Dataset.from_list([row for step in steps for row in step])
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    shared: dict[str, Any] = {"processing_class": tokenizer, "train_dataset": data, "callbacks": [Stops(gate)]}
    trainer: Any
    if told["stage"] == "sft":
        model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        how = {"packing": True, "max_length": told["packing"]} if told.get("packing") else {"padding_free": True}
        arguments = SFTConfig(**settings(told, folder) | how | {"completion_only_loss": True})
        trainer = SFTTrainer(model=model, args=arguments, **shared)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(folder / "model", dtype=torch.float32, num_labels=1)
        model.score.weight.data.copy_(head_weight(model.config.hidden_size))
        trainer = RewardTrainer(model=model, args=RewardConfig(**settings(told, folder)), **shared)
    trainer.train()
    raise SystemExit("the run ended before it was told to: too few rows")


if __name__ == "__main__":
    main()
