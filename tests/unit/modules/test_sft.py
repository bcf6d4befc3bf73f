"""SFTModule under a real Trainer against plain loops over single, unpadded sequences."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_instruct import DemonstrationDataModule, PretrainingDataModule, RewardModule, SFTModule
from lit_instruct.callbacks import PtxMixing
from lit_instruct.functional import cosine_to_floor
from lit_instruct.types import ConfigError, DemonstrationBatch
from tests.helpers.numbers import assert_close
from tests.helpers.tiny import (
    Record,
    demonstrations,
    gradients,
    quiet_trainer,
    save_model,
    save_stage,
    scalars,
    sgd,
    texts,
    weights,
)

RATE = 0.5


def fit(
    base: str, path: str, *, steps: int = 3, rate: float = RATE, callbacks: Any = (), val: Any = 0.0, **trainer: Any
) -> tuple[SFTModule, pl.Trainer]:
    module = SFTModule(base, learning_rate=rate, optimizer=sgd)
    data = DemonstrationDataModule(path, module.tokenizer, batch_size=8, val_batch_size=3, val=val)
    run = quiet_trainer(max_steps=steps, callbacks=list(callbacks), **trainer)
    run.fit(module, datamodule=data)
    return module, run


def rows_of(batch: DemonstrationBatch) -> list[tuple[Tensor, Tensor]]:
    """Unpadded (ids, loss mask) of each sequence."""
    return [
        (ids[mask], loss[mask])
        for ids, mask, loss in zip(batch.input_ids_BT, batch.attention_mask_BT, batch.loss_mask_BT, strict=True)
    ]


def summed_nll(model: nn.Module, batch: DemonstrationBatch) -> tuple[Tensor, int]:
    """The oracle: a forward pass a sequence, a term a token."""
    total, tokens = torch.zeros(()), 0
    for ids, loss_mask in rows_of(batch):
        logprobs = model(input_ids=ids[None]).logits[0].log_softmax(dim=-1)
        for position in range(1, len(ids)):
            if loss_mask[position]:
                total = total - logprobs[position - 1, ids[position]]
                tokens += 1
    return total, tokens


def plain_loop(base: str, path: str, *, steps: int, rate: float = RATE, clip: float | None = None) -> nn.Module:
    """What training means, without Trainer, accumulation and library."""
    module = SFTModule(base)
    data = DemonstrationDataModule(path, module.tokenizer, batch_size=8, val=0.0)
    data.setup()
    batches = list(data.train_dataloader())[:steps]
    model = module.policy
    for step, batch in enumerate(batches):
        model.zero_grad()
        total, tokens = summed_nll(model, batch)
        (total / tokens).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= rate * cosine_to_floor(step, steps) * parameter.grad
    return model


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_three_steps_equal_a_plain_loop_whatever_the_accumulation(
    base: str, folder: Path, accumulate: int, clip: float | None
) -> None:
    path = demonstrations(folder / "d.jsonl", 24)
    module, run = fit(base, path, accumulate_grad_batches=accumulate, gradient_clip_val=clip)
    assert run.global_step == 3
    expected = plain_loop(base, path, steps=3, clip=clip)
    assert_close(weights(module.policy), weights(expected))
    assert float((weights(module.policy) - weights(SFTModule(base).policy)).norm()) > 0.01


def test_ragged_micro_batches_would_show_a_mean_of_means(base: str, folder: Path) -> None:
    """The case above separates right from wrong only if micro-batches have different numbers of tokens."""
    data = DemonstrationDataModule(
        demonstrations(folder / "d.jsonl", 24), SFTModule(base).tokenizer, batch_size=2, val=0.0
    )
    data.setup()
    counts = [int(batch.loss_mask_BT.sum()) for batch in data.train_dataloader()]
    assert len(set(counts)) > 3


def test_an_epoch_that_ends_inside_an_accumulation_is_exact_too(base: str, folder: Path) -> None:
    """Loaders that are not ours may leave a rest: Lightning steps at the last batch, and so must the division."""
    module = SFTModule(base, learning_rate=RATE, optimizer=sgd)
    data = DemonstrationDataModule(demonstrations(folder / "d.jsonl", 24), module.tokenizer, batch_size=2, val=0.0)
    data.setup()
    loader = list(data.train_dataloader())[:5]
    run = quiet_trainer(max_epochs=1, accumulate_grad_batches=3)
    run.fit(module, train_dataloaders=DataLoader(loader, batch_size=None))
    assert run.global_step == 2
    model = SFTModule(base).policy
    for step, group in enumerate([loader[:3], loader[3:]]):
        model.zero_grad()
        parts = [summed_nll(model, batch) for batch in group]
        (sum(total for total, _ in parts) / sum(tokens for _, tokens in parts)).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= RATE * cosine_to_floor(step, 2) * parameter.grad
    assert_close(weights(module.policy), weights(model))


def test_the_rate_starts_at_its_peak_and_ends_at_the_floor(base: str, folder: Path) -> None:
    rates = Record(on_train_batch_start=lambda trainer, *_: trainer.optimizers[0].param_groups[0]["lr"])
    path = demonstrations(folder / "d.jsonl", 24)
    _, run = fit(base, path, steps=6, rate=1e-3, callbacks=[rates], accumulate_grad_batches=2)
    seen = rates.seen["on_train_batch_start"][::2]  # two micro-batches a step
    assert_close(seen, [1e-3 * cosine_to_floor(step, 6, floor=0.1) for step in range(6)])
    assert_close(seen[0], 1e-3)
    assert_close(run.optimizers[0].param_groups[0]["lr"], 1e-4)


def test_warm_up_comes_before_the_cosine(base: str, folder: Path) -> None:
    rates = Record(on_train_batch_start=lambda trainer, *_: trainer.optimizers[0].param_groups[0]["lr"])
    module = SFTModule(base, learning_rate=1.0, warmup_steps=2, final_lr_ratio=0.5, optimizer=sgd)
    data = DemonstrationDataModule(demonstrations(folder / "d.jsonl", 24), module.tokenizer, batch_size=8, val=0.0)
    quiet_trainer(max_steps=6, callbacks=[rates]).fit(module, datamodule=data)
    seen = rates.seen["on_train_batch_start"]
    assert_close(seen, [cosine_to_floor(step, 6, floor=0.5, warmup_steps=2) for step in range(6)])
    assert seen[0] < seen[1] < seen[2] == max(seen)


def test_a_run_without_an_end_is_refused(base: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_epochs -1 and max_steps -1.*set max_epochs"):
        fit(base, demonstrations(folder / "d.jsonl", 24), steps=-1, max_epochs=-1)


def test_validation_metrics_are_means_over_tokens(base: str, folder: Path) -> None:
    path = demonstrations(folder / "d.jsonl", 8)
    held_out = demonstrations(folder / "v.jsonl", 7, seed=5)
    module = SFTModule(base)
    data = DemonstrationDataModule(path, module.tokenizer, batch_size=8, val_batch_size=3, val=held_out)
    run = quiet_trainer()
    run.validate(module, datamodule=data, verbose=False)
    batches = list(data.val_dataloader())
    assert len({len(batch.input_ids_BT) for batch in batches}) > 1 or len(batches) > 1
    with torch.no_grad():
        parts = [summed_nll(module.policy, batch) for batch in batches]
    tokens = sum(count for _, count in parts)
    assert_close(run.callback_metrics["sft/val/loss"], float(sum(total for total, _ in parts)) / tokens)
    assert_close(
        run.callback_metrics["sft/val/ppl"], math.exp(float(sum(total for total, _ in parts)) / tokens), scale=5.0
    )  # its size is that of the vocabulary
    means = [float(total) / count for total, count in parts]
    mixed = sum(math.exp(mean) for mean in means) / len(means)
    assert abs(mixed - float(run.callback_metrics["sft/val/ppl"])) > 1e-2  # a mean of perplexities differs
    assert abs(sum(means) / len(means) - float(run.callback_metrics["sft/val/loss"])) > 1e-3  # a mean of means differs
    correct = 0
    for batch in batches:
        for ids, loss_mask in rows_of(batch):
            guesses = module.policy(input_ids=ids[None]).logits[0].argmax(dim=-1)
            correct += int(((guesses[:-1] == ids[1:]) & loss_mask[1:]).sum())
    assert_close(run.callback_metrics["sft/val/token_acc"], correct / tokens)


@pytest.mark.parametrize("rows_a_batch", [1, 3, 7])
def test_a_test_run_measures_as_validation_does(base: str, folder: Path, rows_a_batch: int) -> None:
    path, held_out = demonstrations(folder / "d.jsonl", 8), demonstrations(folder / "v.jsonl", 7, seed=5)
    module = SFTModule(base)
    data = DemonstrationDataModule(
        path, module.tokenizer, batch_size=8, val_batch_size=rows_a_batch, val=0.0, test=held_out
    )
    run = quiet_trainer()
    run.test(module, datamodule=data, verbose=False)
    with torch.no_grad():
        parts = [summed_nll(module.policy, batch) for batch in data.test_dataloader()]
    loss = sum(float(total) for total, _ in parts) / sum(count for _, count in parts)
    assert set(run.callback_metrics) == {"sft/test/loss", "sft/test/ppl", "sft/test/token_acc"}
    assert_close(run.callback_metrics["sft/test/loss"], loss)
    assert_close(run.callback_metrics["sft/test/ppl"], math.exp(loss), scale=5.0)


def test_two_validations_in_one_fit_do_not_mix(base: str, folder: Path) -> None:
    """The perplexity belongs to the loss of the same validation, also after a sanity check."""
    record = Record(
        on_validation_end=lambda run, _: [float(run.callback_metrics[f"sft/val/{name}"]) for name in ("loss", "ppl")]
    )
    path, held_out = demonstrations(folder / "d.jsonl", 24), demonstrations(folder / "v.jsonl", 7, seed=5)
    fit(base, path, steps=-1, max_epochs=2, val=held_out, callbacks=[record], num_sanity_val_steps=1)
    (_, *seen) = record.seen["on_validation_end"]
    assert abs(seen[0][0] - seen[1][0]) > 1e-3
    for loss, perplexity in seen:
        assert_close(perplexity, math.exp(loss), scale=5.0)


def measured(base: str, path: str, held_out: str, **trainer: Any) -> list[float]:
    data = DemonstrationDataModule(path, base, batch_size=8, val_batch_size=2, val=held_out)
    run = quiet_trainer(**trainer)
    run.validate(SFTModule(base), datamodule=data, verbose=False)
    return [float(run.callback_metrics[f"sft/val/{name}"]) for name in ("loss", "ppl", "token_acc")]


def measure_on(rank: int, port: int, out: str, *arguments: str) -> None:
    """Validate as one process of two; each writes down what it has at the end."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    values = measured(*arguments, devices=2, strategy="ddp")
    Path(f"{out}/{rank}.json").write_text(json.dumps(values))


def test_the_perplexity_is_that_of_all_ranks(base: str, folder: Path) -> None:
    """Two processes with different numbers of tokens give the numbers that one process gives."""
    path, held_out = demonstrations(folder / "d.jsonl", 8), demonstrations(folder / "v.jsonl", 7, seed=5)
    alone = measured(base, path, held_out)
    arguments = (find_free_network_port(), str(folder), base, path, held_out)
    torch.multiprocessing.spawn(measure_on, args=arguments, nprocs=2)
    for rank in range(2):
        assert_close(json.loads((folder / f"{rank}.json").read_text()), alone, scale=5.0)


def test_the_checkpoint_lives_without_the_folder_it_came_from(folder: Path) -> None:
    base = save_model(folder / "base", seed=3)
    module, run = fit(base, demonstrations(folder / "d.jsonl", 24), steps=2)
    path = folder / "sft.ckpt"
    run.save_checkpoint(path)
    shutil.rmtree(base)
    loaded = SFTModule.load_from_checkpoint(path)
    assert_close(weights(loaded.policy), weights(module.policy))
    assert loaded.tokenizer.get_vocab() == module.tokenizer.get_vocab()
    assert loaded.tokenizer.chat_template == module.tokenizer.chat_template
    reward = RewardModule(str(path))
    assert_close(weights(reward.reward_model.trunk), weights(module.policy.base_model))
    again = SFTModule.load_from_checkpoint(save_stage(loaded, folder / "again.ckpt"), learning_rate=0.25)
    assert again.learning_rate == 0.25
    assert_close(weights(again.policy), weights(module.policy))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_fraction_of_pretraining_text(base: str, folder: Path, accumulate: int) -> None:
    """One step of SGD at rate 1 shows the gradient of 0.7 * demonstrations + 0.3 * text."""
    path, text = demonstrations(folder / "d.jsonl", 8), texts(folder / "t.jsonl", 12)
    mixing = PtxMixing(text, mode="fraction", coef=0.3, ratio=0.5, micro_batch_size=2, chunk_tokens=11)
    module, _ = fit(base, path, steps=1, rate=1.0, callbacks=[mixing], accumulate_grad_batches=accumulate)
    start = SFTModule(base)
    demos = DemonstrationDataModule(path, start.tokenizer, batch_size=8, val=0.0)
    demos.setup()
    chunks = PretrainingDataModule(text, start.tokenizer, chunk_tokens=11, batch_size=4, val=0.0)  # 0.5 x 8 rows
    chunks.setup()
    before = weights(start.policy)
    demo_total, demo_tokens = summed_nll(start.policy, next(iter(demos.train_dataloader())))
    text_total, text_tokens = summed_nll(start.policy, next(iter(chunks.train_dataloader())))
    assert text_tokens == 4 * 10
    (0.7 * demo_total / demo_tokens + 0.3 * text_total / text_tokens).backward()
    with torch.no_grad():
        for parameter in start.policy.parameters():
            parameter -= parameter.grad
    assert_close(weights(module.policy), weights(start.policy))
    assert float((weights(module.policy) - before).norm()) > 0.1


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_loss_on_text_is_logged_once_a_step(base: str, folder: Path, accumulate: int) -> None:
    text = texts(folder / "t.jsonl", 30)
    mixing = PtxMixing(text, mode="fraction", coef=0.3, ratio=0.5, micro_batch_size=2, chunk_tokens=11)
    logger = pl.loggers.TensorBoardLogger(folder, name="", version="logs")
    _, run = fit(
        base,
        demonstrations(folder / "d.jsonl", 24),
        rate=0.0,
        callbacks=[mixing],
        accumulate_grad_batches=accumulate,
        logger=logger,
        log_every_n_steps=1,
    )
    start = SFTModule(base)
    chunks = PretrainingDataModule(text, start.tokenizer, chunk_tokens=11, batch_size=4, val=0.0)  # 0.5 x 8 rows
    chunks.setup()
    with torch.no_grad():
        parts = [summed_nll(start.policy, batch) for batch, _ in zip(chunks.train_dataloader(), range(3), strict=False)]
    logged = scalars(folder / "logs", "sft/train/ptx/nll")
    assert [step for step, _ in logged] == [step for step, _ in scalars(folder / "logs", "sft/train/loss")]
    assert_close([value for _, value in logged], [float(total) / tokens for total, tokens in parts])
    assert_close(run.callback_metrics["sft/train/ptx/nll"], logged[-1][1])


class Pull(pl.Callback):
    """Adds 10 times the squared weights; nothing of the protocol but the losses."""

    def __init__(self) -> None:
        self.calls = 0

    def auxiliary_losses(self, module: SFTModule, minibatch: Any) -> Any:
        self.calls += 1
        yield 10 * sum(p.square().sum() for p in module.policy.parameters())


def test_a_hook_needs_nothing_but_its_losses(base: str, folder: Path) -> None:
    path = demonstrations(folder / "d.jsonl", 8)
    pulled, _ = fit(base, path, steps=1, rate=0.01, callbacks=[Pull()])
    free, _ = fit(base, path, steps=1, rate=0.01)
    assert_close(weights(pulled.policy) - weights(free.policy), -0.01 * 20 * weights(SFTModule(base).policy))


def test_hooks_are_asked_once_a_step(base: str, folder: Path) -> None:
    """Also in the step that the end of the epoch cuts short."""
    module, pull = SFTModule(base, learning_rate=0.01, optimizer=sgd), Pull()
    data = DemonstrationDataModule(demonstrations(folder / "d.jsonl", 24), module.tokenizer, batch_size=2, val=0.0)
    data.setup()
    loader = DataLoader(list(data.train_dataloader())[:5], batch_size=None)
    run = quiet_trainer(max_epochs=1, accumulate_grad_batches=3, callbacks=[pull])
    run.fit(module, train_dataloaders=loader)
    assert pull.calls == run.global_step == 2


def test_the_loss_works_without_a_trainer(base: str, folder: Path) -> None:
    module = SFTModule(base)
    data = DemonstrationDataModule(demonstrations(folder / "d.jsonl", 8), module.tokenizer, batch_size=8, val=0.0)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    total, tokens = summed_nll(module.policy, batch)
    loss, metrics = module.loss(batch)
    assert_close(loss, total / tokens)
    assert int(metrics["tokens"]) == tokens
    assert_close(module.loss(batch, denominator=5.0)[0], total / 5.0)


def test_a_loss_in_chunks_is_asked_for_by_an_option(folder: Path) -> None:
    path = demonstrations(folder / "d.jsonl", 16)
    whole, pieces = (SFTModule(save_model(folder / "m"), loss_chunk_tokens=chunk) for chunk in (None, 3))
    for module in (whole, pieces):
        data = DemonstrationDataModule(path, module.tokenizer, batch_size=8, val=0.0)
        data.setup()
        module.loss(next(iter(data.train_dataloader())))[0].backward()
    assert_close(gradients(pieces.policy), gradients(whole.policy))
    with pytest.raises(ConfigError, match="loss_chunk_tokens: got 0; need at least 1"):
        SFTModule(save_model(folder / "m"), loss_chunk_tokens=0)
