"""The three stages as the kill chains run them: small, and with everything that a checkpoint has to carry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from lit_instruct import RewardModule, SFTModule
from tests.helpers.tiny import comparisons, demonstrations, prompts, save_model, save_stage, texts

CALLBACKS = "lightning.pytorch.callbacks"
OURS = "lit_instruct.callbacks"


def write_inputs(folder: Path) -> Path:
    """Models and data of all stages."""
    base = save_model(folder / "base", num_hidden_layers=2)
    save_stage(SFTModule(base), folder / "sft.ckpt")
    save_stage(RewardModule(str(folder / "sft.ckpt")), folder / "rm.ckpt")
    demonstrations(folder / "d.jsonl", 52)
    demonstrations(folder / "dv.jsonl", 12, seed=3)
    comparisons(folder / "c.jsonl", 26)
    comparisons(folder / "cv.jsonl", 9, seed=3)
    prompts(folder / "p.jsonl", 52)
    prompts(folder / "pv.jsonl", 9, seed=3)
    texts(folder / "t.jsonl", 40)
    return folder


def command(
    stage: str,
    inputs: Path,
    folder: Path,
    *,
    steps: int,
    every: int,
    slow_disk_s: float = 0.0,
    keep: int = 1,
    **trainer: Any,
) -> list[str]:
    """The words of a run that resumes by itself.

    Args:
        stage: sft, rm or ppo.
        inputs: of :func:`write_inputs`.
        folder: where the configuration is written.
        steps: optimizer steps.
        every: between two checkpoints; for PPO a multiple of 2, its steps in an iteration.
        slow_disk_s: see ``Witness``.
        keep: how many of the checkpoints; -1: all.
        **trainer: devices and strategy.

    Returns:
        What follows ``lit-instruct``.
    """
    settings = _STAGES[stage](inputs, steps)
    settings["trainer"] |= {
        "accelerator": "cpu",
        "devices": 1,
        "gradient_clip_val": None if stage == "ppo" else 1.0,
        "max_epochs": -1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": {"class_path": "tests.faults.witness.Journal"},
        **trainer,
    }
    settings["trainer"]["callbacks"] += [
        _one("tests.faults.witness.Witness", slow_disk_s=slow_disk_s),
        _one(
            f"{CALLBACKS}.ModelCheckpoint",
            dirpath="runs",
            filename="{step}",
            every_n_train_steps=every,
            save_last=True,
            save_top_k=keep,
        ),
    ]
    file = folder / f"{stage}.yaml"
    file.write_text(yaml.safe_dump({"seed_everything": 1, **settings}, sort_keys=False))
    return [stage, "fit", "--config", str(file), "--auto_resume", "true"]


def _one(path: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": path, "init_args": arguments}


def _best(metric: str, mode: str) -> dict[str, Any]:
    return _one(
        f"{CALLBACKS}.ModelCheckpoint", dirpath="runs", filename="best-{step}", monitor=metric, mode=mode, save_top_k=2
    )


def _sft(inputs: Path, steps: int) -> dict[str, Any]:
    """Six and a half steps of two micro-batches an epoch, validated across its end; dropout; two loader processes."""
    return {
        "trainer": {
            "max_steps": steps,
            "accumulate_grad_batches": 2,
            "log_every_n_steps": 5,
            "val_check_interval": 10,
            "check_val_every_n_epoch": None,
            "callbacks": [
                _one(
                    f"{OURS}.PtxMixing",
                    text=str(inputs / "t.jsonl"),
                    coef=0.3,
                    ratio=1,
                    mode="fraction",
                    micro_batch_size=2,
                    chunk_tokens=8,
                ),
                _one(f"{OURS}.WeightEMA", decay=0.9),
                _best("sft/val/loss", "min"),
            ],
        },
        "model": {
            "base": str(inputs / "base"),
            "learning_rate": 3e-3,
            "residual_dropout": 0.2,
            "micro_batch_tokens": 40,
        },
        "data": {
            "demonstrations": str(inputs / "d.jsonl"),
            "batch_size": 8,
            "val": str(inputs / "dv.jsonl"),
            "num_workers": 2,
        },
    }


def _rm(inputs: Path, steps: int) -> dict[str, Any]:
    """Validated, and its scores shifted, at the end of each epoch of six steps of two micro-batches."""
    return {
        "trainer": {
            "max_steps": steps,
            "accumulate_grad_batches": 2,
            "log_every_n_steps": 5,
            "callbacks": [_best("rm/val/acc", "max")],
        },
        "model": {"base": str(inputs / "sft.ckpt"), "learning_rate": 3e-3},
        "data": {
            "comparisons": str(inputs / "c.jsonl"),
            "demonstrations": str(inputs / "dv.jsonl"),
            "batch_size": 4,
            "val": str(inputs / "cv.jsonl"),
        },
    }


def _ppo(inputs: Path, steps: int) -> dict[str, Any]:
    """PPO-ptx with an adaptive KL coefficient; two updates an iteration, three iterations an epoch."""
    return {
        "trainer": {
            "log_every_n_steps": 1,
            "val_check_interval": 4,
            "check_val_every_n_epoch": None,
            "callbacks": [
                _one(
                    f"{OURS}.PtxMixing",
                    text=str(inputs / "t.jsonl"),
                    coef=2.0,
                    ratio=1,
                    micro_batch_size=4,
                    chunk_tokens=8,
                    grad_norms_every=1,  # of rarer ones Lightning repeats the last number up to the end of the epoch
                ),
                _one(f"{OURS}.WeightEMA", decay=0.9),
                _one(f"{OURS}.SampleTable", prompts=4),
                _one(f"{OURS}.KLMonitor", target=0.5, horizon=200),
                _one(f"{OURS}.Health"),
                _best("ppo/val/objective/score", "max"),
            ],
        },
        "model": {
            "policy": str(inputs / "sft.ckpt"),
            "reward_model": str(inputs / "rm.ckpt"),
            "episodes": 8 * steps,
            "minibatch_size": 8,
            "micro_batch_size": 4,
            "max_response_tokens": 8,
            "learning_rate": 3e-3,
            "value_learning_rate": 3e-3,
            "warmup_iterations": steps // 4,
            "kl_coef": 0.1,
        },
        "data": {"prompts": str(inputs / "p.jsonl"), "batch_size": 16, "val": str(inputs / "pv.jsonl")},
    }


_STAGES = {"sft": _sft, "rm": _rm, "ppo": _ppo}
