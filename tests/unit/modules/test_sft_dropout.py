"""SFT with residual dropout, and with loss on the prompt: exact means, exact resume, nothing handed over."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_instruct import DemonstrationDataModule, PPOModule, RewardModule, SFTModule
from lit_instruct.functional import cosine_to_floor
from lit_instruct.models.backbone import load_language_model
from lit_instruct.types import ConfigError, DemonstrationBatch
from tests.helpers.numbers import assert_close
from tests.helpers.tiny import demonstrations, ids, quiet_trainer, save_stage, sgd, weights, write_jsonl

RATE, P = 0.5, 0.2


def module_of(base: str, **changes: Any) -> SFTModule:
    return SFTModule(base, learning_rate=RATE, optimizer=sgd, **{"residual_dropout": P} | changes)


def fit(module: SFTModule, path: str, *, ckpt: Any = None, data: Any = None, **trainer: Any) -> Any:
    source = DemonstrationDataModule(path, module.tokenizer, batch_size=8, val=0.0, **data or {})
    run = quiet_trainer(**{"max_epochs": 2} | trainer)
    run.fit(module, datamodule=source, ckpt_path=ckpt)
    return run


def nll(model: nn.Module, batch: DemonstrationBatch) -> tuple[Tensor, int]:
    """The oracle: one term a token.

    The rows lie as they are trained on, behind one another, so that dropout draws the same; who sees whom is a square
    mask here.
    """
    ids_BT, mask_BT, loss_BT = batch
    places = mask_BT.nonzero().tolist()
    seen = torch.tensor([[row == other and at <= column for other, at in places] for row, column in places])
    positions = torch.tensor([[column for _, column in places]])  # padded on the right
    logits = model(
        input_ids=ids_BT[mask_BT][None], attention_mask=seen[None, None], position_ids=positions, use_cache=False
    ).logits
    logprobs = logits[0].log_softmax(dim=-1)
    total, tokens = torch.zeros(()), 0
    for number, (row, column) in enumerate(places):
        if column and loss_BT[row, column]:
            total = total - logprobs[number - 1, ids_BT[row, column]]
            tokens += 1
    return total, tokens


def plain_step(base: str, batches: list[DemonstrationBatch], *, seed: int) -> nn.Module:
    """One step of gradient descent on the mean over all tokens of all micro-batches, drawn in their order."""
    model = module_of(base).policy
    torch.manual_seed(seed)
    parts = [nll(model, batch) for batch in batches]
    (sum(total for total, _ in parts) / sum(tokens for _, tokens in parts)).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= RATE * cosine_to_floor(0, 1) * parameter.grad
    return model


@pytest.mark.parametrize("loss_on_prompt", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_a_step_is_the_mean_over_its_tokens(base: str, folder: Path, accumulate: int, loss_on_prompt: bool) -> None:
    path, module = demonstrations(folder / "d.jsonl", 8), module_of(base)
    data = {"loss_on_prompt": loss_on_prompt}
    source = DemonstrationDataModule(path, module.tokenizer, batch_size=8 // accumulate, val=0.0, **data)
    source.setup()
    batches = list(source.train_dataloader())
    torch.manual_seed(7)
    fit(module, path, data=data, max_epochs=1, accumulate_grad_batches=accumulate)
    expected = plain_step(base, batches, seed=7)
    assert_close(weights(module.policy), weights(expected))
    other = plain_step(base, batches, seed=8)
    assert float((weights(other) - weights(expected)).norm()) > 1e-3  # dropout was on


def test_loss_on_the_prompt_counts_every_token_but_the_first(base: str, folder: Path) -> None:
    path = write_jsonl(folder / "d.jsonl", [{"prompt": "w1 w2", "response": "w3"}])
    whole = ids("w1 w2 : w3 <eos>")
    module = SFTModule(base)
    with torch.no_grad():
        logprobs = module.policy(input_ids=torch.tensor([whole])).logits[0].log_softmax(dim=-1)
    terms = [-float(logprobs[place - 1, token]) for place, token in enumerate(whole) if place]
    expected = {True: terms, False: terms[2:]}
    for loss_on_prompt, kept in expected.items():
        data = DemonstrationDataModule(path, module.tokenizer, batch_size=1, val=0.0, loss_on_prompt=loss_on_prompt)
        data.setup()
        loss, metrics = module.loss(next(iter(data.train_dataloader())))
        assert int(metrics["tokens"]) == len(kept)
        assert_close(loss, sum(kept) / len(kept))


def test_validation_and_later_stages_run_without_it(base: str, folder: Path) -> None:
    path = demonstrations(folder / "d.jsonl", 24)
    module = module_of(base)
    run = fit(module, path, max_epochs=1)
    run.save_checkpoint(folder / "sft.ckpt")
    saved = torch.load(folder / "sft.ckpt", weights_only=True)
    plain_keys = torch.load(save_stage(SFTModule(base), folder / "plain.ckpt"), weights_only=True)["state_dict"].keys()
    assert saved["state_dict"].keys() == plain_keys
    assert "dropout" not in str({k: v for k, v in saved["lit_instruct"]["config"].items() if v})
    tokens = torch.tensor([ids("w1 w2 : w3")])

    def draws(model: nn.Module) -> bool:
        """Whether two passes in training mode differ."""
        model.train()
        with torch.no_grad():
            return not torch.equal(model(input_ids=tokens)[0], model(input_ids=tokens)[0])

    reward = RewardModule(str(folder / "sft.ckpt"))
    rm = save_stage(reward, folder / "rm.ckpt")
    ppo = PPOModule(policy=str(folder / "sft.ckpt"), reward_model=rm, max_response_tokens=4)
    assert draws(module.policy)
    assert draws(SFTModule.load_from_checkpoint(folder / "sft.ckpt").policy)  # the same stage goes on as it was
    for network in (load_language_model(folder / "sft.ckpt"), reward.reward_model.trunk, ppo.policy, ppo.reference):
        assert not draws(network)
    losses = []
    for _ in range(2):
        source = DemonstrationDataModule(path, module.tokenizer, batch_size=8, val=path)
        run = quiet_trainer()
        run.validate(module, datamodule=source, verbose=False)
        losses.append(float(run.callback_metrics["sft/val/loss"]))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("p", [-0.1, 1.0, float("nan")])
def test_the_range_is_checked_before_anything_is_loaded(p: float) -> None:
    with pytest.raises(ConfigError, match=r"residual_dropout: got .*; need at least 0 and at most 0.99"):
        SFTModule("there is no such model", residual_dropout=p)


def checkpoints(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_resumed_run_draws_on(base: str, folder: Path, stop: int) -> None:
    """Two epochs of three steps, stopped inside, at and after the first epoch's end; accumulation on."""
    path = demonstrations(folder / "d.jsonl", 24)
    more = {"accumulate_grad_batches": 2}
    whole = module_of(base)
    torch.manual_seed(5)
    fit(whole, path, callbacks=[checkpoints(folder)], **more)
    torch.manual_seed(6)  # another process would be anywhere
    resumed = module_of(base)
    run = fit(resumed, path, ckpt=folder / f"step={stop}.ckpt", **more)
    assert run.global_step == 6
    assert torch.equal(weights(resumed.policy), weights(whole.policy))
    other = module_of(base)
    torch.manual_seed(6)
    fit(other, path, **more)
    assert not torch.equal(weights(other.policy), weights(whole.policy))  # the seed does matter


def test_a_resumed_run_that_is_saved_at_once_keeps_its_place(base: str, folder: Path) -> None:
    """Between resuming and the first batch the generator stands anywhere."""
    path = demonstrations(folder / "d.jsonl", 24)
    torch.manual_seed(5)
    fit(module_of(base), path, callbacks=[checkpoints(folder)])
    before = torch.load(folder / "step=2.ckpt", weights_only=True)["random_states"]
    torch.manual_seed(6)

    class Save(ModelCheckpoint):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            trainer.save_checkpoint(folder / "again.ckpt")

    fit(module_of(base), path, ckpt=folder / "step=2.ckpt", callbacks=[Save(folder, save_top_k=0)])
    after = torch.load(folder / "again.ckpt", weights_only=True)["random_states"]
    assert len(before) == len(after) == 1
    assert torch.equal(before[0]["cpu"], after[0]["cpu"])


def test_a_loader_that_draws_does_not_move_the_resumed_run(base: str, folder: Path) -> None:
    """Loaders of others take a seed from torch's generator when they are iterated, so also before the first batch."""
    module = module_of(base)
    source = DemonstrationDataModule(demonstrations(folder / "d.jsonl", 24), module.tokenizer, batch_size=8, val=0.0)
    source.setup()
    batches = DataLoader(list(source.train_dataloader()), batch_size=None)
    torch.manual_seed(5)
    quiet_trainer(max_epochs=1, callbacks=[checkpoints(folder)]).fit(module, train_dataloaders=batches)
    saved = torch.load(folder / "step=2.ckpt", weights_only=True)["random_states"][0]["cpu"]
    seen = []

    class Watch(SFTModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            seen.append(torch.get_rng_state())
            return super().training_step(batch, batch_idx)

    torch.manual_seed(6)
    resumed = Watch(base, learning_rate=RATE, residual_dropout=P, optimizer=sgd)
    quiet_trainer(max_epochs=1).fit(resumed, train_dataloaders=batches, ckpt_path=folder / "step=2.ckpt")
    assert torch.equal(seen[0], saved)


def test_a_loaded_module_trained_anew_has_the_seed_it_is_given(base: str, folder: Path) -> None:
    path = demonstrations(folder / "d.jsonl", 24)
    torch.manual_seed(5)
    fit(module_of(base), path, max_epochs=1).save_checkpoint(folder / "sft.ckpt")
    results = []
    for seed in (1, 1, 2):
        module = SFTModule.load_from_checkpoint(folder / "sft.ckpt", optimizer=sgd)
        torch.manual_seed(seed)
        fit(module, path, max_epochs=1)
        results.append(weights(module.policy))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_another_number_of_processes_is_told(base: str, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = demonstrations(folder / "d.jsonl", 24)
    fit(module_of(base), path, max_epochs=1).save_checkpoint(folder / "sft.ckpt")
    saved = torch.load(folder / "sft.ckpt", weights_only=True)
    saved["random_states"] *= 2
    torch.save(saved, folder / "two.ckpt")
    with caplog.at_level(logging.WARNING):
        fit(module_of(base), path, ckpt=folder / "two.ckpt")
    assert "a run with 2 processes and this one has 1" in caplog.text


def train_on(rank: int, port: int, base: str, path: str, out: str) -> None:
    """Train as one process of two, each with draws of its own; once through, and once resumed after the second step."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    for name, seed, ckpt in (("whole", 100, None), ("resumed", 200, f"{out}/step=2.ckpt")):
        torch.manual_seed(seed + rank)
        module = module_of(base)
        callbacks = [] if ckpt else [checkpoints(Path(out))]
        fit(module, path, ckpt=ckpt, devices=2, strategy="ddp", callbacks=callbacks)
        torch.save(weights(module.policy), f"{out}/{name}-{rank}.pt")


def test_every_rank_draws_on(base: str, folder: Path) -> None:
    path = demonstrations(folder / "d.jsonl", 24)
    arguments = (find_free_network_port(), base, path, str(folder))
    torch.multiprocessing.spawn(train_on, args=arguments, nprocs=2)
    states = torch.load(folder / "step=2.ckpt", weights_only=True)["random_states"]
    assert len(states) == 2
    assert not torch.equal(states[0]["cpu"], states[1]["cpu"])
    whole, *others = (
        torch.load(folder / f"{name}.pt", weights_only=True) for name in ("whole-0", "whole-1", "resumed-0")
    )
    for other in others:
        assert torch.equal(other, whole)
