"""The peer's side of PPO: the trainer of TRL 1.10, the last release that we know to have one."""

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
from trl.experimental.ppo import PPOConfig, PPOTrainer

from scripts.benchmark.cases import SEED
from scripts.benchmark.gate import Gate, spec


class Stops(TrainerCallback):
    """The gate between two iterations."""

    def __init__(self, gate: Gate, lengths: list[float]) -> None:
        self.gate, self.lengths = gate, lengths

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.gate.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if self.lengths:
            self.gate.facts["mean_response"] = sum(self.lengths) / len(self.lengths)
        self.gate.step()


def main() -> None:
    """Build, then train from gate to gate."""
    told = spec()
    gate = Gate()
    torch.set_num_threads(told["threads"])
    folder = Path(told["folder"])
    steps = json.loads((folder / "peer.json").read_text(encoding="utf-8"))
    data = Dataset.from_list([row for step in steps for row in step])
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    frozen = torch.bfloat16 if told["bf16"] else torch.float32

    def network(kind: Any, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
        torch.manual_seed(SEED)
        return kind.from_pretrained(folder / "model", dtype=dtype, **more)

    lengths: list[float] = []
    arguments = PPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=told["rows"],
        gradient_accumulation_steps=told["batch_size"] // told["rows"],
        num_mini_batches=1,
        num_ppo_epochs=told["data"]["inner_epochs"],
        total_episodes=told["batch_size"] * len(steps),
        response_length=told["data"]["max_response"],
        local_rollout_forward_batch_size=told["batch_size"],
        temperature=1.0,
        stop_token="eos",
        learning_rate=1e-6,
        num_sample_generations=0,
        gradient_checkpointing=False,
        bf16=told["bf16"],
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=told["log_every"],
        seed=SEED,
    )
    trainer = PPOTrainer(
        args=arguments,
        processing_class=tokenizer,
        model=network(AutoModelForCausalLM),
        ref_model=network(AutoModelForCausalLM, frozen),
        reward_model=network(AutoModelForSequenceClassification, frozen, num_labels=1),
        value_model=network(AutoModelForSequenceClassification, num_labels=1),
        train_dataset=data,
        eval_dataset=data.select(range(1)),
        callbacks=[Stops(gate, lengths)],
    )
    _note_lengths(trainer, tokenizer.pad_token_id, lengths)
    trainer.train()
    raise SystemExit("the run ended before it was told to: too few episodes")


def _note_lengths(trainer: Any, pad: int, lengths: list[float]) -> None:
    """Keep the mean length of each rollout: what the reward model reads behind the prompts."""
    generate = trainer.policy_model.generate

    def noting(*arguments: Any, **named: Any) -> Any:
        output = generate(*arguments, **named)
        responses = output.sequences[:, named["input_ids"].shape[1] :]
        lengths.append(float((responses != pad).sum(dim=1).float().mean()))
        return output

    trainer.policy_model.generate = noting


if __name__ == "__main__":
    main()
