"""One optimizer step of SFT and of the reward model, whatever the passes: against loops over single sequences."""

from __future__ import annotations

import faulthandler
import os
from itertools import combinations
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaPreTrainedModel

from lit_instruct import ComparisonDataModule, DemonstrationDataModule, RewardModule, SFTModule
from lit_instruct.callbacks import PtxMixing
from lit_instruct.models.packing import admission, refuse_packing
from lit_instruct.modules.summed_steps import SummedSteps
from lit_instruct.types import ComparisonBatch, ConfigError, DemonstrationBatch
from tests.helpers.numbers import assert_close
from tests.helpers.tiny import (
    Record,
    comparisons,
    demonstrations,
    gradients,
    quiet_trainer,
    save_model,
    sgd,
    texts,
    weights,
)

STAGES = ["sft", "rm"]


def make(stage: str, base: str, **arguments: Any) -> Any:
    torch.manual_seed(4)
    arguments = {"learning_rate": 0.5, "optimizer": sgd} | arguments
    return SFTModule(base, **arguments) if stage == "sft" else RewardModule(base, **arguments)


def data_of(module: Any, folder: Path, rows: int = 24, batch_size: int = 12) -> Any:
    if module.stage == "sft":
        path = demonstrations(folder / "d.jsonl", rows)
        return DemonstrationDataModule(path, module.tokenizer, batch_size=batch_size, val=0.0)
    path = comparisons(folder / "c.jsonl", rows)
    return ComparisonDataModule(path, module.tokenizer, batch_size=batch_size, val=0.0)


def network(module: Any) -> nn.Module:
    return module.policy if module.stage == "sft" else module.reward_model


def summed(module: Any, batch: Any) -> tuple[Tensor, int]:
    """The oracle: a forward pass a sequence, a term a token or a pair; the sum, and what it counts."""
    total, count = torch.zeros(()), 0
    if isinstance(batch, DemonstrationBatch):
        for ids, mask, loss_mask in zip(*batch, strict=True):
            logprobs = module.policy(input_ids=ids[mask][None]).logits[0].log_softmax(dim=-1)
            for position in range(1, int(mask.sum())):
                if loss_mask[position]:
                    total, count = total - logprobs[position - 1, ids[position]], count + 1
        return total, count
    assert isinstance(batch, ComparisonBatch)
    model = module.reward_model
    for number, (prompt, prompt_mask) in enumerate(zip(batch.prompt_ids_BP, batch.prompt_mask_BP, strict=True)):
        members = (batch.group_N == number).nonzero().flatten().tolist()
        scores = {}
        for row in members:
            ids = torch.cat([prompt[prompt_mask], batch.response_ids_NR[row][batch.response_mask_NR[row]]])
            hidden = model.trunk(input_ids=ids[None]).last_hidden_state[0, -1]
            scores[row] = hidden @ model.head.weight[0] + model.head.bias[0]
        ranks = batch.ranks_N.tolist()
        pairs = [(a, b) if ranks[a] < ranks[b] else (b, a) for a, b in combinations(members, 2) if ranks[a] != ranks[b]]
        if pairs:
            losses = [torch.log1p(torch.exp(scores[worse] - scores[better])) for better, worse in pairs]
            total, count = total + sum(losses) / len(losses), count + 1
    return total, count


def stepped(stage: str, base: str, batches: list[Any]) -> Tensor:
    """The weights after one step of plain gradient descent over these micro-batches."""
    module = make(stage, base)
    parts = [summed(module, batch) for batch in batches]
    (sum(total for total, _ in parts) / sum(count for _, count in parts)).backward()
    return weights(network(module)) - 0.5 * gradients(network(module))


def loader_of(module: Any, folder: Path, count: int) -> list[Any]:
    data = data_of(module, folder)
    data.setup()
    return list(data.train_dataloader())[:count]


def run(module: Any, batches: list[Any], **trainer: Any) -> pl.Trainer:
    made = quiet_trainer(**{"max_epochs": 1} | trainer)
    made.fit(module, train_dataloaders=DataLoader(batches, batch_size=None))
    return made


class Passes(pl.Callback):
    """The tokens of each forward pass, padding included."""

    def __init__(self, module: Any) -> None:
        self.tokens: list[int] = []
        trunk = module.policy if module.stage == "sft" else module.reward_model.trunk
        trunk.register_forward_pre_hook(
            lambda _, args, kwargs: self.tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
        )


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("budget", [1, 80, 10_000])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_in_passes_is_the_step(
    stage: str, packs: bool, budget: int, accumulate: int, base: str, folder: Path
) -> None:
    module = make(stage, base, micro_batch_tokens=budget)
    trunk = module.policy if stage == "sft" else module.reward_model.trunk
    if not packs:
        refuse_packing(trunk, "the test says so")
    assert admission(trunk).packs == packs
    batches = loader_of(module, folder, accumulate)
    passes = Passes(module)
    trainer = run(module, batches, accumulate_grad_batches=accumulate)
    assert trainer.global_step == 1
    assert_close(weights(network(module)), stepped(stage, base, batches))
    rows = sum(len(batch[0]) for batch in batches)
    if budget == 80:  # more than any prompt with its responses has here
        assert max(passes.tokens) <= 80
        assert accumulate < len(passes.tokens) < rows
    else:
        assert len(passes.tokens) == (rows if budget == 1 else accumulate)


@pytest.mark.parametrize("stage", STAGES)
def test_the_step_moves_the_weights(stage: str, base: str, folder: Path) -> None:
    """The comparison above can tell a wrong step from a right one: micro-batches count differently."""
    module = make(stage, base)
    batches = loader_of(module, folder, 2)
    counts = [summed(module, batch)[1] for batch in batches]
    assert counts[0] != counts[1]
    assert float((stepped(stage, base, batches) - weights(network(module))).norm()) > 0.01
    other = sum(stepped(stage, base, [batch]) for batch in batches) / 2  # a mean of means
    assert float((stepped(stage, base, batches) - other).norm()) > 1e-4


def saved_at_most(module: Any, batches: list[Any], **trainer: Any) -> int:
    """The most numbers that autograd keeps for backward passes at one time."""
    now, most = 0, 0

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal now, most
            self.tensor = tensor
            now += tensor.numel()
            most = max(most, now)

        def __del__(self) -> None:
            nonlocal now
            now -= self.tensor.numel()

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        run(module, batches, **trainer)
    assert now == 0
    return most


@pytest.mark.parametrize("stage", STAGES)
def test_one_pass_is_in_memory_at_a_time(stage: str, base: str, folder: Path) -> None:
    whole = make(stage, base)
    batches = loader_of(whole, folder, 1)
    passes = Passes(whole)
    at_once = saved_at_most(whole, batches)
    cut = make(stage, base, micro_batch_tokens=max(sum(passes.tokens) // 3, 60))
    assert saved_at_most(cut, batches) < 0.75 * at_once


def mixing(folder: Path, **arguments: Any) -> PtxMixing:
    arguments = {"coef": 0.3, "ratio": 1.0, "micro_batch_size": 2, "chunk_tokens": 24} | arguments
    return PtxMixing(texts(folder / "t.jsonl", 40), mode="fraction", **arguments)


def test_text_goes_backward_a_micro_batch_at_a_time(base: str, folder: Path) -> None:
    """Six micro-batches of text need no more memory than one, and the weights are the same."""
    batches = loader_of(make("sft", base), folder, 1)
    found = []
    for size in (2, 12):
        module = make("sft", base)
        hook = mixing(folder, micro_batch_size=size)
        found.append((saved_at_most(module, batches, callbacks=[hook]), weights(module.policy)))
    (small, stepped_small), (large, stepped_large) = found
    assert small < 0.5 * large
    assert_close(stepped_small, stepped_large)


@pytest.mark.parametrize("budget", [None, 60])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_other_losses_join_where_no_early_pass_is_allowed(
    budget: int | None, accumulate: int, base: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under FSDP: their losses wait for the pass that Lightning makes."""
    early = make("sft", base, micro_batch_tokens=budget)
    batches = loader_of(early, folder, accumulate)
    run(early, batches, accumulate_grad_batches=accumulate, callbacks=[mixing(folder)])
    monkeypatch.setattr(SummedSteps, "_may_go_backward", lambda self: False)
    joined = make("sft", base)
    run(joined, batches, accumulate_grad_batches=accumulate, callbacks=[mixing(folder)])
    assert_close(weights(early.policy), weights(joined.policy))
    assert float((weights(early.policy) - stepped("sft", base, batches)).norm()) > 0.01


@pytest.mark.parametrize("stage", STAGES)
def test_a_strategy_that_allows_one_backward_pass(
    stage: str, base: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pl.strategies.SingleDeviceStrategy, "handles_gradient_accumulation", True)
    module = make(stage, base, micro_batch_tokens=7)
    with pytest.raises(ConfigError, match=r"micro_batch_tokens: got 7 with SingleDeviceStrategy.*need.*ddp"):
        run(module, loader_of(module, folder, 1))


@pytest.mark.parametrize("stage", STAGES)
def test_the_budget_is_checked(stage: str, base: str) -> None:
    with pytest.raises(ConfigError, match="micro_batch_tokens: got 0; need at least 1"):
        make(stage, base, micro_batch_tokens=0)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_passes_under_mixed_precision(stage: str, precision: Any, base: str, folder: Path) -> None:
    """Each pass goes through the loss scale: without it, a pass would weigh 1/1024 of the last."""
    moved = []
    for budget in (None, 60):
        module = make(stage, base, micro_batch_tokens=budget)
        batches = loader_of(module, folder, 1)
        before = weights(network(module))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if precision == "16-mixed" else None
        passes = Passes(module)
        run(module, batches, plugins=[MixedPrecision(precision, "cpu", scaler)])
        assert (len(passes.tokens) > 1) == (budget is not None)
        assert module.step_guard.skipped == 0
        moved.append(weights(network(module)) - before)
    assert float(moved[0].norm()) > 0.01
    assert float((moved[1] - moved[0]).norm()) < 0.02 * float(moved[0].norm())


class Watch(pl.Callback):
    """Gradients when an optimizer step begins, and how often Lightning's hook for clearing them comes."""

    def __init__(self) -> None:
        self.cleared = 0

    def on_before_zero_grad(self, *_: Any) -> None:
        self.cleared += 1


@pytest.mark.parametrize("budget", [None, 60])
def test_gradients_of_the_step_before_are_cleared(budget: int | None, base: str, folder: Path) -> None:
    """Three steps of two micro-batches: the last one's gradients are those of its micro-batches alone."""
    module, watch = make("sft", base, micro_batch_tokens=budget, learning_rate=1e-12), Watch()
    batches = loader_of(module, folder, 2)
    again = [*batches, *batches, *batches]
    record = Record(on_before_optimizer_step=lambda trainer, module, _: gradients(module.policy) * module._unit)
    run(module, again, accumulate_grad_batches=2, callbacks=[watch, record])
    assert watch.cleared == 3
    first, *later = record.seen["on_before_optimizer_step"]
    assert len(later) == 2
    oracle = make("sft", base)
    sum(summed(oracle, batch)[0] for batch in batches).backward()
    for seen in (first, *later):
        assert_close(seen * 2, gradients(oracle.policy), scale=10.0)  # of sums: some hundred times a mean


@pytest.mark.parametrize("stage", STAGES)
def test_a_batch_without_anything_to_learn_changes_nothing(stage: str, base: str, folder: Path) -> None:
    module = make(stage, base, micro_batch_tokens=60)
    (batch,) = loader_of(module, folder, 1)
    if stage == "sft":
        batch = batch._replace(loss_mask_BT=torch.zeros_like(batch.loss_mask_BT))
    else:
        batch = batch._replace(ranks_N=torch.ones_like(batch.ranks_N))
    before = weights(network(module))
    run(module, [batch])
    assert torch.equal(weights(network(module)), before)
    assert module.step_guard.skipped == 0


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("budget", [None, 60])
def test_recomputed_activations_have_the_same_gradients(
    stage: str, budget: int | None, base: str, folder: Path
) -> None:
    found, kept = [], []
    dropout = {"residual_dropout": 0.3} if stage == "sft" else {}  # must drop the same again
    for recompute in (False, True):
        module = make(stage, base, gradient_checkpointing=recompute, micro_batch_tokens=budget, **dropout)
        batches = loader_of(module, folder, 1)
        block = (module.policy.model if stage == "sft" else module.reward_model.trunk).layers[0].self_attn
        calls: list[int] = []
        block.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        passes = Passes(module)
        torch.manual_seed(9)
        kept.append(saved_at_most(module, batches))
        assert len(calls) == (2 if recompute else 1) * len(passes.tokens)
        found.append(weights(network(module)))
    assert_close(found[0], found[1])
    assert kept[1] < kept[0]


@pytest.mark.parametrize("stage", STAGES)
def test_a_model_that_cannot_recompute_is_refused(stage: str, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaPreTrainedModel, "supports_gradient_checkpointing", False)
    with pytest.raises(ConfigError, match=r"gradient_checkpointing: got true for Llama\w+, which does not support it"):
        make(stage, base, gradient_checkpointing=True)
    make(stage, base)


def train_on(inputs: str, stage: str, **trainer: Any) -> tuple[Tensor, list[float]]:
    """Three steps; the weights, and what this process has logged after the second and after the last."""
    folder = Path(inputs)
    module = make(stage, str(folder / "base"), micro_batch_tokens=30)
    data = (DemonstrationDataModule if stage == "sft" else ComparisonDataModule)(
        str(folder / ("d.jsonl" if stage == "sft" else "c.jsonl")), module.tokenizer, batch_size=16, val=0.0
    )
    hook = PtxMixing(str(folder / "t.jsonl"), mode="fraction", coef=0.3, ratio=0.5, micro_batch_size=2, chunk_tokens=11)
    names = {"sft": ("loss", "token_acc", "tokens"), "rm": ("loss", "acc", "acc_len_baseline")}[stage]

    def logged(trainer: pl.Trainer, *_: Any) -> list[float]:
        return [float(trainer.callback_metrics.get(f"{stage}/train/{name}", -1.0)) for name in names]

    record = Record(on_train_batch_end=logged, on_train_end=logged)
    made = quiet_trainer(
        max_steps=3,
        accumulate_grad_batches=2,
        log_every_n_steps=2,
        callbacks=[record, *([hook] if stage == "sft" else [])],
        **trainer,
    )
    made.fit(module, datamodule=data)
    return weights(network(module)), [*record.seen["on_train_batch_end"][3], *record.seen["on_train_end"][0]]


def process(rank: int, port: int, inputs: str, out: str) -> None:
    faulthandler.dump_traceback_later(240, exit=True)  # a rank that waits for ever ends the test
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    found = {stage: train_on(inputs, stage, devices=2, strategy="ddp") for stage in STAGES}
    torch.save(found, Path(out) / f"{rank}.pt")


def test_two_processes_take_the_steps_of_one(folder: Path) -> None:
    """Passes of their own number in each, two micro-batches a step, text in between: the weights and the log of one."""
    inputs = folder / "inputs"
    inputs.mkdir()
    save_model(inputs / "base")
    demonstrations(inputs / "d.jsonl", 48)
    comparisons(inputs / "c.jsonl", 48, seed=1)  # no response twice to a prompt: rounding decides between equals
    texts(inputs / "t.jsonl", 60)
    torch.multiprocessing.spawn(process, args=(find_free_network_port(), str(inputs), str(folder)), nprocs=2)
    first, second = (torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2))
    for stage in STAGES:
        alone, values = train_on(str(inputs), stage)
        assert torch.equal(first[stage][0], second[stage][0])
        assert_close(first[stage][0], alone, scale=10.0)  # sums in another order, three steps on
        assert len(set(values)) == 6  # two windows of three metrics
        for logged in (first[stage][1], second[stage][1]):
            assert_close(logged, values, scale=10.0)
        start = weights(network(make(stage, str(inputs / "base"))))
        assert float((alone - start).norm()) > 0.01
