"""Optimizers of bitsandbytes, named by their class: a state of 8 bit, but for embeddings, in every stage."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import nn

from lit_instruct import (
    ComparisonDataModule,
    DemonstrationDataModule,
    PPOModule,
    PromptDataModule,
    RewardModule,
    SFTModule,
)
from lit_instruct.cli import main, run_stage
from lit_instruct.models.exact_embeddings import embedding_parameters
from lit_instruct.modules.optimizers import make_optimizer, paper_adam
from lit_instruct.types import ConfigError
from tests.helpers.numbers import assert_close
from tests.helpers.tiny import (
    comparisons,
    demonstrations,
    prompts,
    quiet_trainer,
    save_stage,
    save_tokenizer,
    tiny_llama,
    weights,
)

bitsandbytes = pytest.importorskip("bitsandbytes")

# The smallest with an 8-bit state have 4096 numbers; the embedding has 6400, so that its size does not spare it.
BASE = tiny_llama(hidden_size=64, intermediate_size=128, vocab_size=100, tie_word_embeddings=False)
EIGHT_BIT = ["AdamW8bit", "Adam8bit", "Lion8bit", "PagedAdamW8bit"]


@pytest.fixture
def tokenizer(folder: Path) -> str:
    return save_tokenizer(folder / "tokenizer")


def of(name: str, **settings: Any) -> Callable[[Iterable[Any]], torch.optim.Optimizer]:
    return lambda groups: getattr(bitsandbytes.optim, name)(groups, **settings)


def sft(tokenizer: str, optimizer: Any, **more: Any) -> SFTModule:
    torch.manual_seed(0)
    return SFTModule(BASE, tokenizer, optimizer=optimizer, **{"learning_rate": 0.01, **more})


def fit(module: SFTModule, *, epochs: int = 1, resume: str | None = None, **settings: Any) -> pl.Trainer:
    rows = demonstrations(Path("d.jsonl"), 24)
    data = DemonstrationDataModule(rows, module.tokenizer, batch_size=8, val=0.0)
    trainer = quiet_trainer(max_epochs=epochs, **settings)
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return trainer


def assert_states(optimizer: Any, networks: Iterable[nn.Module]) -> None:
    """8 bit for all matrices that are large enough and stand for no tokens; both occur."""
    networks = list(networks)
    exact = {id(p) for network in networks for p in embedding_parameters(network)}
    large = {p: optimizer.state[p]["state1"].dtype for n in networks for p in n.parameters() if p.numel() >= 4096}
    assert {dtype for p, dtype in large.items() if id(p) in exact} == {torch.float32}
    assert {dtype for p, dtype in large.items() if id(p) not in exact} == {torch.uint8}
    small = [p for network in networks for p in network.parameters() if p.numel() < 4096 and p in optimizer.state]
    assert {optimizer.state[p]["state1"].dtype for p in small} == {torch.float32}


@pytest.mark.parametrize("name", EIGHT_BIT)
def test_sft_with_each_of_them(folder: Path, tokenizer: str, name: str) -> None:
    rate = 0.001 if name == "Lion8bit" else 0.01  # a step of Lion has the size of its rate everywhere
    module = sft(tokenizer, of(name, betas=(0.9, 0.95)), learning_rate=rate)
    first = float(fit(module).callback_metrics["sft/train/loss"])
    trainer = fit(module, epochs=6)
    assert float(trainer.callback_metrics["sft/train/loss"]) < first - 0.5
    (optimizer,) = trainer.optimizers
    assert type(optimizer).__name__ == name
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)
    assert optimizer.param_groups[0]["initial_lr"] == rate
    assert_states(optimizer, [module.policy])


def test_reward_model_and_ppo(folder: Path, tokenizer: str) -> None:
    policy = save_stage(SFTModule(BASE, tokenizer), folder / "sft.ckpt")
    reward = RewardModule(policy, optimizer=of("AdamW8bit"), learning_rate=0.01)
    data: Any = ComparisonDataModule(comparisons(folder / "c.jsonl", 24), reward.tokenizer, batch_size=8, val=0.0)
    before = weights(reward.reward_model)
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(reward, datamodule=data)
    assert not torch.equal(weights(reward.reward_model), before)
    assert_states(trainer.optimizers[0], [reward.reward_model])
    path = save_stage(reward, folder / "rm.ckpt")
    module = PPOModule(policy, path, optimizer=of("AdamW8bit"), minibatch_size=4, max_response_tokens=4, episodes=16)
    data = PromptDataModule(prompts(folder / "p.jsonl", 16), module.tokenizer, batch_size=8, val=0.0)
    before = weights(module.policy)
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(module, datamodule=data)
    assert not torch.equal(weights(module.policy), before)
    assert_states(trainer.optimizers[0], [module.policy, module.value_model])
    rates = [group["initial_lr"] for group in trainer.optimizers[0].param_groups]
    assert rates == [5e-6, 9e-6]


@pytest.mark.parametrize("name", ["AdamW8bit", "Lion8bit", "PagedAdamW32bit"])
def test_a_resumed_run_ends_with_the_same_weights(folder: Path, tokenizer: str, name: str) -> None:
    """From a checkpoint that is read without running anything in it."""
    saver = ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1, every_n_epochs=1)
    whole = sft(tokenizer, of(name))
    fit(whole, epochs=2, callbacks=[saver])
    resumed = sft(tokenizer, of(name))
    trainer = fit(resumed, epochs=2, resume=str(folder / "epoch=0.ckpt"))
    assert torch.equal(weights(resumed.policy), weights(whole.policy))
    if name != "PagedAdamW32bit":
        assert_states(trainer.optimizers[0], [resumed.policy])


@pytest.mark.parametrize("name", ["AdamW", "PagedAdamW32bit", "AdamW8bit"])
def test_near_adam_of_torch(name: str) -> None:
    """Twenty steps with noise for gradients, the worst case: as near as the state's precision."""
    settings = {"betas": (0.9, 0.95), "weight_decay": 0.0}
    generator = torch.Generator().manual_seed(0)
    pair = [nn.Linear(96, 64, bias=False) for _ in range(2)]
    pair[1].load_state_dict(pair[0].state_dict())
    ours = make_optimizer(of(name, **settings), [(pair[0], 0.01)], None)
    theirs = torch.optim.AdamW(pair[1].parameters(), lr=0.01, **settings)
    start = weights(pair[0])
    for _ in range(20):
        gradient = torch.randn(64, 96, generator=generator)
        for layer, optimizer in zip(pair, (ours, theirs), strict=True):
            layer.weight.grad = gradient.clone()
            optimizer.step()
    moved = (weights(pair[1]) - start).abs().mean()
    gap = (weights(pair[0]) - weights(pair[1])).abs()
    if name == "AdamW8bit":
        assert 0 < gap.max() < 0.026
        assert gap.mean() < 0.1 * moved
    else:
        assert_close(weights(pair[0]), weights(pair[1]))


def test_nothing_is_left_behind_for_the_next_run(folder: Path, tokenizer: str) -> None:
    """Overrides go by address; those of a run that is over would hit other parameters."""
    shared = bitsandbytes.optim.GlobalOptimManager.get_instance()
    module = sft(tokenizer, of("AdamW8bit"))
    fit(module)
    assert not shared.pid2config
    assert not shared.index2config


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy])
def test_sharded_parameters_are_refused(strategy: Any) -> None:
    trainer: Any = SimpleNamespace(strategy=strategy())
    layer = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=f"got AdamW8bit of bitsandbytes with {strategy.__name__}; need whole"):
        make_optimizer(of("AdamW8bit"), [(layer, 0.1)], trainer)
    assert make_optimizer(paper_adam, [(layer, 0.1)], trainer).param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("where", ["command line", "file"])
def test_by_class_path(folder: Path, tokenizer: str, where: str) -> None:
    demonstrations(folder / "d.jsonl", 24)
    chosen = ["--model.optimizer", "bitsandbytes.optim.AdamW8bit", "--model.optimizer.betas", "[0.8, 0.95]"]
    if where == "file":
        (folder / "eight.yaml").write_text(
            "model:\n  optimizer:\n    class_path: bitsandbytes.optim.AdamW8bit\n    init_args: {betas: [0.8, 0.95]}\n"
        )
        chosen = ["--config", "eight.yaml"]
    model = ["--model.base", str(BASE), "--model.tokenizer", tokenizer, "--model.learning_rate", "0.01"]
    data = ["--data.demonstrations", "d.jsonl", "--data.batch_size", "8", "--trainer.max_epochs", "1"]
    cpu = ["--trainer.accelerator", "cpu", "--trainer.devices", "1"]
    cli = run_stage("sft", ["fit", "--config", "sft/default.yaml", *model, *data, *cpu, *chosen])
    (optimizer,) = cli.trainer.optimizers
    assert type(optimizer) is bitsandbytes.optim.AdamW8bit
    assert list(optimizer.param_groups[0]["betas"]) == [0.8, 0.95]
    assert optimizer.param_groups[0]["initial_lr"] == 0.01
    assert_states(optimizer, [cli.model.policy])


def test_without_the_package(
    base: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    demonstrations(folder / "d.jsonl", 24)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.delitem(sys.modules, "bitsandbytes.optim")
    command = ["sft", "fit", "--config", "sft/default.yaml", "--model.base", base, "--data.demonstrations", "d.jsonl"]
    with pytest.raises(SystemExit):
        main([*command, "--model.optimizer", "bitsandbytes.optim.AdamW8bit"])
    message = capsys.readouterr().err
    assert "--model.optimizer: bitsandbytes is not installed. Do: pip install 'lit-instruct[quant]'." in message
