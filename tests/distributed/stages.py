"""The three stages as the distributed tests run them: alone in one process, or in several."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lit_instruct import (
    ComparisonDataModule,
    DemonstrationDataModule,
    PPOModule,
    PromptDataModule,
    RewardModule,
    SFTModule,
)
from lit_instruct.callbacks import Health, KLMonitor, PtxMixing, SampleTable, WeightEMA
from lit_instruct.functional import prompts_with_pair
from lit_instruct.models.adapters import LoraSettings
from lit_instruct.models.sharding import whole
from tests.helpers.numbers import assert_close
from tests.helpers.tiny import (
    Record,
    comparisons,
    demonstrations,
    prompts,
    quiet_trainer,
    save_model,
    save_stage,
    texts,
    weights,
    write_jsonl,
)

STAGES = ("sft", "rm", "ppo")
STEPS = 4  # training batches of a run; a checkpoint is written after half of them
_ADAPTER = LoraSettings(r=2, lora_alpha=4)
_QLORA = {"adapter": _ADAPTER, "quantization": "4bit"}
REPLICATED = {"shared base", "QLoRA", "frozen in 8 bits"}  # cases whose weights cannot be cut
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "sft": {
        "plain": {},
        "passes": {"micro_batch_tokens": 12},
        "ptx": {},
        "adapter": {"adapter": _ADAPTER},
        "QLoRA": _QLORA,
    },
    "rm": {"plain": {}, "passes": {"micro_batch_tokens": 24}, "adapter": {"adapter": _ADAPTER}, "QLoRA": _QLORA},
    "ppo": {
        "plain": {},
        "passes, recomputed": {"micro_batch_tokens": 30, "gradient_checkpointing": True},
        "value warm-up": {"value_warmup_iterations": 2},
        "shared trunk, value warm-up": {"memory": "shared_trunk", "value_warmup_iterations": 1},
        "bf16 sampler": {"rollout_dtype": "bfloat16"},
        "ptx": {},
        "adapter": {"adapter": _ADAPTER},
        "shared base": {"adapter": _ADAPTER, "memory": "shared_base"},
        "QLoRA": _QLORA,
        "frozen in 8 bits": {"frozen_dtype": "8bit"},
        "frozen on the CPU": {"offload_frozen": True},
    },
}
_OWN = ("time/",)


RATE = 3e-3  # a gradient that is rounded by 1e-8 moves a weight by RATE * 1e-8 / eps = 3e-6


def adam(groups: Iterable[Any]) -> torch.optim.Optimizer:
    """Adam whose steps do not blow up the rounding of gradients near 0."""
    return torch.optim.AdamW(groups, lr=RATE, eps=1e-5, weight_decay=0.0)


def write_inputs(folder: Path, **model: Any) -> Path:
    """Models and data that all processes read; ``model`` changes the configuration."""
    base = save_model(folder / "base", num_hidden_layers=2, **model)
    save_stage(SFTModule(base), folder / "sft.ckpt")
    torch.manual_seed(0)
    save_stage(RewardModule(str(folder / "sft.ckpt")), folder / "rm.ckpt")
    save_stage(RewardModule(str(folder / "sft.ckpt"), adapter=_ADAPTER), folder / "rm_adapter.ckpt")
    demonstrations(folder / "d.jsonl", 32)
    demonstrations(folder / "dv.jsonl", 7, seed=3)  # unequal shares
    comparisons(folder / "c.jsonl", 12)
    ties = [{"prompt": f"w{row}", "responses": ["w1 w2", "w3"], "ranks": [1, 1]} for row in range(12)]
    write_jsonl(folder / "ties.jsonl", ties)
    comparisons(folder / "cv.jsonl", 7, seed=3)
    prompts(folder / "p.jsonl", 32)
    prompts(folder / "pv.jsonl", 7, seed=3)
    texts(folder / "t.jsonl", 40)
    return folder


def fit(
    stage: str, case: str, inputs: Path, out: Path, *, resume: Path | None = None, bare: bool = False, **trainer: Any
) -> dict[str, Any]:
    """Train for ``STEPS`` batches with validation in between.

    Args:
        stage: of ``STAGES``.
        case: of ``CASES[stage]``.
        inputs: of :func:`write_inputs`.
        out: the folder of the checkpoints; one is written half-way, see :func:`half_way`.
        resume: a checkpoint to go on from.
        bare: without callbacks and clipping, which Lightning's FSDP does not know.
        **trainer: devices and strategy.

    Returns:
        ``weights`` after each batch, ``average`` of the policy at the end, ``metrics`` at the end.
    """
    torch.manual_seed(0)
    module, data, callbacks, limits = _BUILD[stage](inputs, case)
    if bare:
        callbacks = []
        limits.pop("gradient_clip_val", None)
    watch = Record(
        on_train_batch_end=lambda trainer, module, *_: torch.cat([weights(x) for x in _trained(module)]),
        after_iteration=lambda module, metrics: {k: float(v) for k, v in metrics.items() if not k.startswith(_OWN)},
    )
    averages = [callback for callback in callbacks if isinstance(callback, WeightEMA)]
    half = ModelCheckpoint(out, "{step}", every_n_train_steps=limits.pop("half"), save_top_k=-1)
    run = quiet_trainer(
        callbacks=[*callbacks, watch, half],
        max_epochs=-1,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        **limits,
        **trainer,
    )
    run.fit(module, datamodule=data, ckpt_path=None if resume is None else str(resume), weights_only=True)
    return {
        "weights": watch.seen["on_train_batch_end"],
        "iterations": watch.seen["after_iteration"],
        "average": [torch.cat([whole(x).flatten() for x in one.average.values()]) for one in averages],
        "metrics": {name: float(value) for name, value in run.callback_metrics.items() if "time/" not in name},
    }


def half_way(out: Path) -> Path:
    """The checkpoint that :func:`fit` has written half-way."""
    return out / f"step={STEPS // 2}.ckpt"


def measure(stage: str, inputs: Path, checkpoint: Path, **trainer: Any) -> dict[str, float]:
    """Validate a checkpoint, and train on with the same networks.

    Args:
        stage: of ``STAGES``.
        inputs: of :func:`write_inputs`.
        checkpoint: of the case ``plain``.
        **trainer: devices and strategy.

    Returns:
        The metrics of the validation.
    """
    torch.manual_seed(0)
    module, data, callbacks, limits = _BUILD[stage](inputs, "plain")
    limits.pop("half")
    run = quiet_trainer(callbacks=callbacks, max_epochs=-1, **limits, **trainer)
    (found,) = run.validate(module, datamodule=data, ckpt_path=str(checkpoint), weights_only=True, verbose=False)
    run.fit(module, datamodule=data)
    return dict(found)


def _trained(module: pl.LightningModule) -> list[torch.nn.Module]:
    if isinstance(module, PPOModule):
        return [module.policy, module.value_model]
    return [module.policy if isinstance(module, SFTModule) else module.reward_model]  # type: ignore[list-item]


Built = tuple[pl.LightningModule, pl.LightningDataModule, list[pl.Callback], dict[str, Any]]


def _sft(inputs: Path, case: str) -> Built:
    module = SFTModule(str(inputs / "base"), learning_rate=RATE, optimizer=adam, **CASES["sft"][case])
    data = DemonstrationDataModule(
        str(inputs / "d.jsonl"), module.tokenizer, batch_size=8, val=str(inputs / "dv.jsonl"), val_batch_size=4
    )
    callbacks: list[pl.Callback] = [WeightEMA(0.5)]
    if case == "ptx":
        mixing = PtxMixing(
            str(inputs / "t.jsonl"), coef=0.3, ratio=1, mode="fraction", micro_batch_size=1, chunk_tokens=8
        )
        callbacks.append(mixing)
    return module, data, callbacks, {"max_steps": STEPS, "half": STEPS // 2, "gradient_clip_val": 1.0}


def _rm(inputs: Path, case: str) -> Built:
    module = RewardModule(str(inputs / "sft.ckpt"), learning_rate=RATE, optimizer=adam, **CASES["rm"][case])
    data = ComparisonDataModule(
        [str(inputs / "c.jsonl"), str(inputs / "ties.jsonl")],
        module.tokenizer,
        demonstrations=str(inputs / "dv.jsonl"),
        batch_size=4,
        val=str(inputs / "cv.jsonl"),
        val_batch_size=4,
    )
    return module, data, [], {"max_steps": STEPS, "half": STEPS // 2, "gradient_clip_val": 1.0}


def _ppo(inputs: Path, case: str) -> Built:
    module = PPOModule(
        str(inputs / "sft.ckpt"),
        str(inputs / ("rm_adapter.ckpt" if case == "shared base" else "rm.ckpt")),
        episodes=8 * STEPS,
        minibatch_size=4,
        max_response_tokens=5,
        learning_rate=RATE,
        value_learning_rate=RATE,
        warmup_iterations=0,
        optimizer=adam,
        missing_eos="none",
        **({"micro_batch_size": 2} | CASES["ppo"][case]),
    )
    data = PromptDataModule(
        str(inputs / "p.jsonl"), module.tokenizer, batch_size=8, val=str(inputs / "pv.jsonl"), val_batch_size=4
    )
    callbacks: list[pl.Callback] = [SampleTable(2), KLMonitor(), Health(), WeightEMA(0.5)]
    if case == "ptx":
        callbacks.insert(0, PtxMixing(str(inputs / "t.jsonl"), coef=2.0, ratio=1, micro_batch_size=1, chunk_tokens=8))
    return module, data, callbacks, {"half": STEPS}  # two optimizer steps a batch; files are named after batches


_BUILD: dict[str, Callable[[Path, str], Built]] = {"sft": _sft, "rm": _rm, "ppo": _ppo}


def enter_process(rank: int, port: int) -> None:
    """What a launcher would tell this process."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}


def prompts_with_a_pair(inputs: Path, ranks: int) -> list[list[int]]:
    """Of the reward model's data: how many each rank has, of each step."""
    _, data, *_ = _rm(inputs, "plain")
    data.setup("fit")
    loader: Any = data.train_dataloader()
    found = []
    for batch in list(loader)[:STEPS]:
        shares = torch.arange(len(batch.prompt_ids_BP)).chunk(ranks)
        mine = [torch.isin(batch.group_N, share) for share in shares]
        found.append(
            [int(prompts_with_pair(batch.ranks_N[of], batch.group_N[of] - batch.group_N[of].min())) for of in mine]
        )
    return found


def same_on_all_ranks(results: list[dict[str, Any]], name: str) -> list[Tensor]:
    """A list of tensors that all ranks must have alike, bit by bit."""
    first, *others = (result[name] for result in results)
    for other in others:
        assert len(first) == len(other)
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    return first


def compare(
    name: str, results: list[dict[str, Any]], need: dict[str, Any], *, resumed: bool, scale: float = 1.0
) -> None:
    """The results of all ranks with those of one process.

    Args:
        name: of the run, for the message.
        results: of :func:`fit`, of each rank.
        need: of one process.
        resumed: they have gone on from the checkpoint half-way.
        scale: widens the tolerance of all.
    """
    half = STEPS // 2 if resumed else 0

    def close(what: str, mine: Any, theirs: Any, wider: float) -> None:
        try:
            assert_close(mine, theirs, scale=scale * wider)
        except AssertionError as error:
            raise AssertionError(f"{name}: {what}") from error

    steps = same_on_all_ranks(results, "weights")
    assert len(steps) == STEPS - half, name
    if name == "bf16 sampler":  # products of other shapes round otherwise, and a draw may fall on the other side
        close("weights after the first", steps[0], need["weights"][0], 1.0)
        for metrics in results[0]["iterations"]:
            assert 0.0 < metrics["rollout/behaviour_gap_max"] < 1.0
        return
    for step, (mine, theirs) in enumerate(zip(steps, need["weights"][half:], strict=True)):
        close(f"weights after {step}", mine, theirs, 1.0)
    for mine, theirs in zip(same_on_all_ranks(results, "average"), need["average"], strict=True):
        close("average", mine, theirs, 1.0)
    for step, metrics in enumerate(need["iterations"][half:]):
        for key, value in metrics.items():
            shared = sum(result["iterations"][step][key] for result in results) / len(results)  # as Lightning logs them
            close(f"{key} after {step}", shared, value, 100.0)  # ratios of small numbers among them
    for key, value in need["metrics"].items():
        if not resumed or "/val/" in key:  # those of training are means since the run began
            close(key, results[0]["metrics"][key], value, 100.0)
