"""WeightEMA: the recurrence, what validation sees, and what the checkpoint keeps."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lit_instruct import SFTModule
from lit_instruct.callbacks import WeightEMA
from lit_instruct.models.backbone import load_language_model
from lit_instruct.types import ConfigError
from tests.helpers.numbers import assert_close
from tests.helpers.tiny import Record, demonstrations, prompts, sgd, weights
from tests.unit.callbacks.runs import fit_ppo, fit_sft, tiny_ppo
from tests.unit.functional.vectors import VECTORS

CASE = VECTORS["ema_weights_decay_0p992"]


class One(nn.Module):
    """A policy with one weight."""

    def __init__(self, value: float, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([value], dtype=dtype))


def averaged(ema: WeightEMA) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in ema.average.values()]).clone()


def recurrence(history: list[Tensor], decay: float) -> Tensor:
    """The oracle: a plain loop; the first entry is where the average begins."""
    average = history[0].double()
    for entry in history[1:]:
        average = decay * average + (1 - decay) * entry.double()
    return average


def test_the_recurrence_vector() -> None:
    module = SimpleNamespace(policy=One(CASE["ema0"]))
    ema = WeightEMA(decay=CASE["decay"])
    ema.start(module)
    seen = []
    for weight in CASE["weights"]:
        module.policy.weight.data.fill_(weight)
        ema.after_update(module, {})
        seen.append(float(ema.average["weight"]))
    assert_close(seen, CASE["expected"]["ema"])


def test_what_is_left_of_the_initial_weights_vector() -> None:
    """One update a PPO step: after a run of 4,000 nothing. The default decay is the paper's."""
    need, ema = CASE["expected"], WeightEMA()
    assert ema.decay == CASE["decay"]
    module = SimpleNamespace(policy=One(1.0))
    ema.start(module)
    module.policy.weight.data.fill_(0.0)
    left = {0: 1.0}
    for update in range(1, 4001):
        ema.update(module)
        left[update] = float(ema.average["weight"])
    for updates in (125, 500):
        assert_close(left[updates], need[f"residual_initial_after_{updates}"])
    assert left[4000] == pytest.approx(need["residual_initial_after_4000"], rel=1e-2)  # of fp32, 4,000 times rounded
    half = int(need["half_life_updates"])
    assert left[half] > 0.5 > left[half + 1]


def test_the_average_is_kept_in_fp32() -> None:
    module = SimpleNamespace(policy=One(1.0, torch.bfloat16))
    ema = WeightEMA(decay=0.999)
    ema.start(module)
    module.policy.weight.data.fill_(1.5)
    for _ in range(4):
        ema.update(module)
    assert ema.average["weight"].dtype == torch.float32
    assert_close(ema.average["weight"], [1.5 - 0.5 * 0.999**4])  # steps of 0.0005 vanish in bf16


@pytest.mark.parametrize(("unit", "hook"), [("step", "after_update"), ("iteration", "after_iteration")])
def test_the_unit(sft_ckpt: str, rm_ckpt: str, folder: Path, unit: Any, hook: str) -> None:
    module, ema = tiny_ppo(sft_ckpt, rm_ckpt), WeightEMA(decay=0.9, unit=unit)
    history = [weights(module.policy)]
    record = Record(**{hook: lambda module, _: history.append(weights(module.policy))})
    fit_ppo(module, prompts(folder / "p.jsonl", 16), callbacks=[ema, record])
    assert len(history) == 1 + (4 if unit == "step" else 2)
    assert_close(averaged(ema), recurrence(history, 0.9))
    assert float((averaged(ema) - history[-1]).norm()) > 1e-3


@pytest.mark.parametrize("accumulate", [1, 2])
def test_supervised_steps_count_and_micro_batches_do_not(base: str, folder: Path, accumulate: int) -> None:
    module, ema = SFTModule(base, learning_rate=0.5, optimizer=sgd), WeightEMA(decay=0.9)
    history = [weights(module.policy)]

    def watch(trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == len(history):
            history.append(weights(module.policy))

    path = demonstrations(folder / "d.jsonl", 24)
    record = Record(on_train_batch_end=watch)
    fit_sft(module, path, callbacks=[ema, record], max_steps=3, accumulate_grad_batches=accumulate)
    assert len(history) == 4
    assert_close(averaged(ema), recurrence(history, 0.9))


def test_validation_sees_the_average_and_training_does_not(base: str, folder: Path) -> None:
    module, ema = SFTModule(base, learning_rate=0.5, optimizer=sgd), WeightEMA(decay=0.9)
    record = Record(
        on_train_batch_end=lambda *_: weights(module.policy),
        on_validation_batch_end=lambda *_: weights(module.policy),
        on_train_batch_start=lambda *_: weights(module.policy),
    )
    path, held_out = demonstrations(folder / "d.jsonl", 24), demonstrations(folder / "v.jsonl", 8, seed=2)
    fit_sft(module, path, val=held_out, callbacks=[ema, record], max_steps=3, val_check_interval=1)
    trained, validated = record.seen["on_train_batch_end"], record.seen["on_validation_batch_end"]
    started = record.seen["on_train_batch_start"]
    for step in range(3):
        assert_close(validated[step], recurrence([started[0], *trained[: step + 1]], 0.9))
        assert float((validated[step] - trained[step]).norm()) > 1e-3
    assert torch.equal(started[1], trained[0])
    assert torch.equal(started[2], trained[1])
    assert torch.equal(weights(module.policy), trained[2])


def test_training_is_the_same_with_and_without(sft_ckpt: str, rm_ckpt: str, folder: Path) -> None:
    path = prompts(folder / "p.jsonl", 16)
    results = []
    for callbacks in ([], [WeightEMA()]):
        module = tiny_ppo(sft_ckpt, rm_ckpt)
        fit_ppo(module, path, val=prompts(folder / "v.jsonl", 4), callbacks=callbacks, val_check_interval=1)
        results.append(weights(module.policy))
    assert torch.equal(*results)


def test_an_exception_inside_validation_gives_the_weights_back(base: str, folder: Path) -> None:
    module, ema = SFTModule(base, learning_rate=0.5, optimizer=sgd), WeightEMA(decay=0.9)

    def fail(*_: Any) -> None:
        raise RuntimeError("lost power")

    record = Record(on_train_batch_end=lambda *_: weights(module.policy), on_validation_batch_end=fail)
    path, held_out = demonstrations(folder / "d.jsonl", 24), demonstrations(folder / "v.jsonl", 8, seed=2)
    with pytest.raises(RuntimeError, match="lost power"):
        fit_sft(module, path, val=held_out, callbacks=[ema, record], max_steps=3, val_check_interval=1)
    assert torch.equal(weights(module.policy), record.seen["on_train_batch_end"][-1])


def test_the_checkpoint_holds_both(sft_ckpt: str, rm_ckpt: str, folder: Path) -> None:
    module, ema = tiny_ppo(sft_ckpt, rm_ckpt), WeightEMA(decay=0.9)
    run = fit_ppo(module, prompts(folder / "p.jsonl", 16), callbacks=[ema])
    run.save_checkpoint(folder / "ppo.ckpt")
    names = [name for name, _ in module.policy.named_parameters()]
    exported = dict(load_language_model(folder / "ppo.ckpt", ema=True).named_parameters())
    for name in names:
        assert_close(exported[name], ema.average[name])
    assert set(ema.average) == set(names)  # of the policy only
    plain = load_language_model(folder / "ppo.ckpt")
    assert_close(weights(plain), weights(module.policy))


def test_a_checkpoint_without_average_says_so(sft_ckpt: str) -> None:
    with pytest.raises(ConfigError, match="holds no averaged weights; train with the WeightEMA callback"):
        load_language_model(sft_ckpt, ema=True)


def test_a_resumed_run_goes_on_with_the_saved_average(sft_ckpt: str, rm_ckpt: str, folder: Path) -> None:
    path = prompts(folder / "p.jsonl", 32)
    whole = WeightEMA(decay=0.9)
    saver = pl.callbacks.ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    fit_ppo(tiny_ppo(sft_ckpt, rm_ckpt, episodes=24), path, callbacks=[whole, saver])
    resumed = WeightEMA(decay=0.9)
    fit_ppo(tiny_ppo(sft_ckpt, rm_ckpt, episodes=24), path, callbacks=[resumed], ckpt=folder / "step=2.ckpt")
    assert torch.equal(averaged(resumed), averaged(whole))


@pytest.mark.parametrize("stop", [1, 2])
def test_a_resumed_supervised_run_too(base: str, folder: Path, stop: int) -> None:
    path = demonstrations(folder / "d.jsonl", 24)
    whole = WeightEMA(decay=0.9)
    saver = pl.callbacks.ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit_sft(SFTModule(base, learning_rate=0.5, optimizer=sgd), path, callbacks=[whole, saver], max_steps=3)
    resumed = WeightEMA(decay=0.9)
    module = SFTModule(base, learning_rate=0.5, optimizer=sgd)
    fit_sft(module, path, callbacks=[resumed], max_steps=3, ckpt=folder / f"step={stop}.ckpt")
    assert torch.equal(averaged(resumed), averaged(whole))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decay": 1.0}, "decay: got 1.0"),
        ({"decay": -0.1}, "decay: got -0.1"),
        ({"unit": "epoch"}, "unit: got 'epoch'"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WeightEMA(**arguments)
