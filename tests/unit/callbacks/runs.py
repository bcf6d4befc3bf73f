"""Small runs that the callbacks take part in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl

from lit_instruct import DemonstrationDataModule, PPOModule, PromptDataModule, SFTModule
from tests.helpers.tiny import quiet_trainer, sgd


def tiny_ppo(sft_ckpt: str, rm_ckpt: str, **changes: Any) -> PPOModule:
    sizes: dict[str, Any] = {
        "episodes": 16,
        "minibatch_size": 4,
        "micro_batch_size": 4,
        "rollout_batch_size": 8,
        "max_response_tokens": 5,
        "learning_rate": 0.5,
        "value_learning_rate": 0.05,
        "warmup_iterations": 0,
        "optimizer": sgd,
    }
    return PPOModule(policy=sft_ckpt, reward_model=rm_ckpt, **(sizes | changes))


def fit_ppo(
    module: PPOModule, path: str, *, callbacks: Sequence[Any], val: Any = 0.0, ckpt: Any = None, **trainer: Any
) -> pl.Trainer:
    """8 prompts an iteration."""
    data = PromptDataModule(path, module.tokenizer, batch_size=8, val_batch_size=3, val=val)
    run = quiet_trainer(**({"max_epochs": -1} | trainer), callbacks=list(callbacks))
    run.fit(module, datamodule=data, ckpt_path=ckpt)
    return run


def fit_sft(
    module: SFTModule, path: str, *, callbacks: Sequence[Any], val: Any = 0.0, ckpt: Any = None, **trainer: Any
) -> pl.Trainer:
    """8 demonstrations a step."""
    data = DemonstrationDataModule(path, module.tokenizer, batch_size=8, val=val)
    run = quiet_trainer(**trainer, callbacks=list(callbacks))
    run.fit(module, datamodule=data, ckpt_path=ckpt)
    return run
