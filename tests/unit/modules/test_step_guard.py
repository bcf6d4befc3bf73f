"""Gradients that are not finite cost a step and not the model; too many in a row end the run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lit_instruct import (
    ComparisonDataModule,
    DemonstrationDataModule,
    PPOModule,
    PromptDataModule,
    RewardModule,
    SFTModule,
)
from lit_instruct.modules.step_guard import StepGuard, gradient_norm
from lit_instruct.types import NonFiniteError
from tests.helpers.numbers import assert_close
from tests.helpers.tiny import Record, comparisons, demonstrations, prompts, quiet_trainer, save_stage, scalars, weights


def linear(value: float) -> nn.Linear:
    network = nn.Linear(2, 1)
    for parameter in network.parameters():
        parameter.grad = torch.full_like(parameter, value)
    return network


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_step_is_taken_from_all_networks(bad: float, caplog: pytest.LogCaptureFixture) -> None:
    guard, good, spoilt = StepGuard(3), linear(1.0), linear(1.0)
    assert guard.check([good, spoilt])
    assert_close(gradient_norm(good), 3**0.5)
    assert spoilt.bias.grad is not None
    spoilt.bias.grad[0] = bad
    with caplog.at_level(logging.WARNING):
        assert not guard.check([good, spoilt])
    assert "not finite; the step is left out (1 so far" in caplog.text
    assert all(p.grad is None for network in (good, spoilt) for p in network.parameters())
    assert (guard.skipped, guard.in_a_row) == (1, 1)


def test_only_steps_in_a_row_count() -> None:
    guard = StepGuard(3)
    for bad in (True, True, False, True, True):
        guard.check([linear(float("nan") if bad else 1.0)])
    assert (guard.skipped, guard.in_a_row) == (4, 2)
    other = StepGuard(3)
    other.load_state_dict(guard.state_dict())
    with pytest.raises(NonFiniteError, match=r"3 optimizer steps in a row.*Do: lower the learning rate"):
        other.check([linear(float("inf"))])


class Poison(pl.Callback):
    """Makes the gradients of some optimizer steps NaN, as an overflow in the backward pass would."""

    def __init__(self, *steps: int):
        self.steps, self.seen = steps, -1

    def on_after_backward(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.seen += 1
        if self.seen in self.steps:
            network = pl_module.policy if hasattr(pl_module, "policy") else pl_module.reward_model
            next(network.parameters()).grad[0] = float("nan")


def run_of(stage: str, base: str, folder: Path, **arguments: Any) -> tuple[pl.LightningModule, pl.LightningDataModule]:
    """Four steps of 4 rows."""
    if stage == "sft":
        module: pl.LightningModule = SFTModule(base, learning_rate=0.05, **arguments)
        path = demonstrations(folder / "d.jsonl", 16)
        return module, DemonstrationDataModule(path, module.tokenizer, batch_size=4, val=0.0)
    torch.manual_seed(0)
    module = RewardModule(base, learning_rate=0.05, **arguments)
    path = comparisons(folder / "c.jsonl", 16)
    return module, ComparisonDataModule(path, module.tokenizer, batch_size=4, val=0.0)


@pytest.mark.parametrize("stage", ["sft", "rm"])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_the_trainer_goes_on_after_a_bad_step(stage: str, clip: float | None, base: str, folder: Path) -> None:
    module, data = run_of(stage, base, folder)
    network = module.policy if stage == "sft" else module.reward_model
    after = Record(on_train_batch_end=lambda *_: weights(network))
    trainer = quiet_trainer(max_epochs=1, gradient_clip_val=clip, callbacks=[Poison(1), after], log_every_n_steps=1,
                            logger=pl.loggers.TensorBoardLogger(folder))  # fmt: skip
    trainer.fit(module, datamodule=data)
    first, second, third, fourth = after.seen["on_train_batch_end"]
    assert torch.equal(first, second)
    assert not torch.equal(second, third)
    assert torch.isfinite(fourth).all()
    counted = [value for _, value in scalars(Path(trainer.logger.log_dir), f"{stage}/train/skipped_steps")]
    assert counted == [0, 1, 1, 1]


@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_too_many_end_the_run_and_the_checkpoint_is_good(stage: str, base: str, folder: Path) -> None:
    module, data = run_of(stage, base, folder, max_nonfinite_steps=2)
    saver = pl.callbacks.ModelCheckpoint(dirpath=folder, every_n_train_steps=1, save_last=True, save_top_k=0)
    trainer = quiet_trainer(max_epochs=1, callbacks=[Poison(1, 2, 3), saver])
    with pytest.raises(NonFiniteError, match="2 optimizer steps in a row"):
        trainer.fit(module, datamodule=data)
    saved = torch.load(folder / "last.ckpt", weights_only=True)
    assert all(torch.isfinite(tensor).all() for tensor in saved["state_dict"].values())
    assert saved["step_guard"] == {"skipped": 1, "in_a_row": 1}
    again, data = run_of(stage, base, folder, max_nonfinite_steps=2)
    quiet_trainer(max_epochs=1).fit(again, datamodule=data, ckpt_path=folder / "last.ckpt")
    assert again.step_guard.state_dict() == {"skipped": 1, "in_a_row": 0}


def ppo(sft_ckpt: str, rm_ckpt: str, **arguments: Any) -> PPOModule:
    sizes: dict[str, Any] = {
        "minibatch_size": 4,
        "micro_batch_size": 4,
        "max_response_tokens": 5,
        "learning_rate": 0.01,
    }
    return PPOModule(sft_ckpt, rm_ckpt, **(sizes | {"warmup_iterations": 0, "episodes": 16} | arguments))


def test_ppo_leaves_a_step_out_of_both_networks(sft_ckpt: str, rm_ckpt: str, folder: Path) -> None:
    module = ppo(sft_ckpt, rm_ckpt)
    record = Record(
        after_update=lambda module, _: (weights(module.policy), weights(module.value_model)),
        after_iteration=lambda _, metrics: metrics["skipped_steps"],
    )
    data = PromptDataModule(prompts(folder / "p.jsonl", 16), module.tokenizer, batch_size=8, val=0.0)
    quiet_trainer(max_epochs=-1, callbacks=[Poison(1), record]).fit(module, datamodule=data)
    first, second, third, _ = record.seen["after_update"]
    for network in (0, 1):
        assert torch.equal(first[network], second[network])
        assert not torch.equal(second[network], third[network])
    assert record.seen["after_iteration"] == [1, 0]
    assert torch.isfinite(weights(module.policy)).all()


def test_ppo_stops_after_too_many(sft_ckpt: str, rm_ckpt: str, folder: Path) -> None:
    module = ppo(sft_ckpt, rm_ckpt, max_nonfinite_steps=2)
    data = PromptDataModule(prompts(folder / "p.jsonl", 16), module.tokenizer, batch_size=8, val=0.0)
    with pytest.raises(NonFiniteError):
        quiet_trainer(max_epochs=-1, callbacks=[Poison(0, 1, 2)]).fit(module, datamodule=data)
    assert torch.equal(weights(module.policy), weights(module.reference))


def test_a_checkpoint_of_an_earlier_version_loads(base: str, folder: Path) -> None:
    module, _ = run_of("sft", base, folder)
    path = Path(save_stage(module, folder / "new.ckpt"))
    saved = torch.load(path, weights_only=True)
    del saved["step_guard"]
    torch.save(saved, folder / "old.ckpt")
    loaded = SFTModule.load_from_checkpoint(folder / "old.ckpt")
    assert_close(weights(loaded.policy), weights(module.policy))
