"""Drive the real PPO trainer of TRL 1.10 for one iteration and write its numbers to ``trl_ppo_numbers.json``.

TRL removed its PPO trainer after this release, so the numbers are made once, in an environment of their own, and kept::

    python -m venv trl && trl/bin/pip install "torch==2.13.0" "trl==1.10.0" "transformers==5.23.0"
    trl/bin/python -m tests.parity.make_trl_ppo_numbers        # from the root of the repository

No formula stands in here. ``PPOTrainer.train`` works inline, so its local variables are read from its own frame: when
it goes to whiten the advantages, when it hands the loss to ``accelerator.backward``, and when it logs; gradients are
kept as the optimizer steps. Everything runs in fp64: the numbers are as good as exact for a test in fp32.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from tests.parity.reference_weights import fill, flat_gradients

TARGET = Path(__file__).with_name("trl_ppo_numbers.json")
EOS, PAD, WORDS = 0, 1, 32
MODEL = {
    "model_type": "llama",
    "vocab_size": 2 + WORDS,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15], [16, 17, 18, 19], [20]]
SETTINGS = {
    "temperature": 0.7,
    "kl_coef": 0.3,
    "gamma": 0.9,
    "lam": 0.95,
    "cliprange": 0.2,
    "cliprange_value": 0.3,
    "vf_coef": 0.37,
    "missing_eos_penalty": 1.0,
    "num_ppo_epochs": 2,
    "response_length": 6,
}
LEARNING_RATES = {"policy": 0.05, "value_model": 0.08}
SEED = 37  # found by trying: responses without padding, of which some end by themselves


class Recorder(torch.optim.SGD):
    """Plain gradient descent that keeps the gradients of each step."""

    def __init__(self, networks: dict[str, torch.nn.Module]):
        self.networks, self.seen = networks, []
        super().__init__([{"params": list(n.parameters()), "lr": LEARNING_RATES[k]} for k, n in networks.items()])

    def step(self, closure: Any = None) -> None:
        self.seen.append({name: flat_gradients(network) for name, network in self.networks.items()})
        super().step(closure)


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<eos>": EOS, "<pad>": PAD, **{f"w{number}": 2 + number for number in range(WORDS)}}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<eos>",
        pad_token="<pad>",
        padding_side="left",
        model_input_names=["input_ids"],
    )


def network(kind: Any, key: str, **more: Any) -> Any:
    fields = MODEL | more
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    made = kind.from_config(config).double()
    fill(made, key)
    return made


def spying(function: Callable[..., Any], keep: Callable[[dict[str, Any]], None]) -> Callable[..., Any]:
    """Call ``function``; first show ``keep`` the local variables of whoever calls it, if that is ``train``."""

    def wrapped(*arguments: Any, **named: Any) -> Any:
        caller = sys._getframe(1)
        if caller.f_code is PPOTrainer.train.__code__:
            keep(caller.f_locals)
        return function(*arguments, **named)

    return wrapped


def picked(source: dict[str, Any], names: str) -> dict[str, Any]:
    return {name: source[name].detach().clone() for name in names.split()}


def drive() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One iteration of the trainer: what it made of the rollout, and what each of its two updates computed."""
    transformers.set_seed(SEED)  # the trainer shuffles with numpy and does not seed it
    policy = network(AutoModelForCausalLM, "policy")
    reward, value = (network(AutoModelForSequenceClassification, key, num_labels=1) for key in ("reward", "value"))
    optimizer = Recorder({"policy": policy, "value_model": value})
    data = Dataset.from_dict({"input_ids": PROMPTS})
    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(
            args=PPOConfig(
                output_dir=folder,
                per_device_train_batch_size=len(PROMPTS),
                gradient_accumulation_steps=1,
                num_mini_batches=1,
                total_episodes=len(PROMPTS),
                num_sample_generations=0,
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=True,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                seed=SEED,
                **SETTINGS,
            ),
            processing_class=tokenizer(),
            model=policy,
            ref_model=network(AutoModelForCausalLM, "reference"),
            reward_model=reward,
            value_model=value,
            train_dataset=data,
            eval_dataset=data,
            optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)),
        )
        rollout: dict[str, Any] = {}
        updates: list[dict[str, Any]] = []

        def keep_rollout(seen: dict[str, Any]) -> None:
            names = "queries query_responses logprobs ref_logprobs values scores kl rewards advantages returns"
            rollout.update(picked(seen, names), width=seen["context_length"])
            assert not seen["padding_mask"].any(), "a response is padded: try another seed"

        def keep_update(seen: dict[str, Any]) -> None:
            updates.append(picked(seen, "pg_loss vf_loss loss"))
            # Here, and not from the frame at the whitening: there the result does not exist yet.
            rollout["whitened"] = seen["advantages"].detach().clone()

        def keep_statistics(seen: dict[str, Any]) -> None:
            for epoch, update in enumerate(updates):
                for name in ("approxkl", "pg_clipfrac", "vf_clipfrac", "entropy", "ratio"):
                    update[name] = seen[f"{name}_stats"][epoch, 0, 0]

        whiten = ppo_trainer.masked_whiten
        ppo_trainer.masked_whiten = spying(whiten, keep_rollout)
        trainer.accelerator.backward = spying(trainer.accelerator.backward, keep_update)
        trainer.log = spying(trainer.log, keep_statistics)
        try:
            trainer.train()
        finally:
            ppo_trainer.masked_whiten = whiten
    for update, gradients in zip(updates, optimizer.seen, strict=True):
        update["gradients"] = gradients
    return rollout, updates


def plain(value: Any) -> Any:
    """Tensors as lists of eight significant digits."""
    if isinstance(value, dict):
        return {name: plain(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [plain(entry) for entry in value]
    if isinstance(value, torch.Tensor):
        return plain(value.tolist())
    return float(f"{value:.8g}") if isinstance(value, float) else value


def main() -> None:
    rollout, updates = drive()
    width = rollout.pop("width")
    responses = rollout["query_responses"][:, width:]
    assert not (responses == PAD).any()
    assert not (responses[:, :-1] == EOS).any(), "a response goes on behind its end of text: try another seed"
    ends = (responses[:, -1] == EOS).sum()
    assert 0 < ends < len(responses), f"{ends} responses end by themselves; need some and not all: try another seed"
    numbers = {
        "made_with": {"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__},
        "model": MODEL,
        "settings": SETTINGS,
        "learning_rates": LEARNING_RATES,
        "prompt_lengths": (rollout.pop("queries") != PAD).sum(dim=1).tolist(),
        "response_ids": responses,
        "prompt_ids": rollout.pop("query_responses")[:, :width],
        "rollout": rollout,
        "updates": updates,
    }
    TARGET.write_text(json.dumps(plain(numbers), separators=(",", ":")).replace(',"', ',\n"') + "\n", encoding="utf-8")
    statistics = {name: [float(update[name]) for update in updates] for name in ("pg_clipfrac", "vf_clipfrac", "ratio")}
    print(f"{TARGET}: {TARGET.stat().st_size} bytes, {statistics}")


if __name__ == "__main__":
    main()
