"""A tiny model, its data and its checkpoints, as a user's folder has them; and commands that run in it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from lit_instruct import PPOModule, RewardModule, SFTModule
from lit_instruct.cli import main
from tests.helpers.tiny import (
    comparisons,
    demonstrations,
    prompts,
    save_model,
    save_stage,
    texts,
)

Run = Callable[[Path], object]

_CPU = ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.enable_progress_bar", "false"]
_SFT = ["--config", "sft/default.yaml", "--data.batch_size", "8", "--trainer.max_epochs", "1", *_CPU]
_PPO = ["--config", "ppo/default.yaml", "--data.batch_size", "8", "--model.minibatch_size", "4", *_CPU]
_PPO_SIZES = ["--model.max_response_tokens", "5", "--model.episodes", "8"]


@lru_cache
def _made() -> tempfile.TemporaryDirectory[str]:
    kept = tempfile.TemporaryDirectory()
    folder = Path(kept.name)
    save_model(folder / "base")
    demonstrations(folder / "demos.jsonl", 24)
    comparisons(folder / "rankings.jsonl", 24)
    prompts(folder / "prompts.jsonl", 24)
    texts(folder / "text.jsonl", 20)
    save_stage(SFTModule(str(folder / "base")), folder / "sft.ckpt")
    save_stage(RewardModule(str(folder / "sft.ckpt")), folder / "rm.ckpt")
    models = {"policy": str(folder / "sft.ckpt"), "reward_model": str(folder / "rm.ckpt")}
    save_stage(PPOModule(**models, max_response_tokens=5), folder / "ppo.ckpt")
    return kept


def furnish(folder: Path) -> None:
    """Put ``base``, ``demos.jsonl``, ``rankings.jsonl``, ``prompts.jsonl``, ``text.jsonl`` and checkpoints there."""
    if not (folder / "base").exists():
        shutil.copytree(_made().name, folder, dirs_exist_ok=True)


def sft(*more: Any, stage: str = "sft") -> Run:
    """The first stage with sound settings, and then these."""

    def run(folder: Path) -> None:
        furnish(folder)
        main([stage, "fit", *_SFT, "--model.base", "base", "--data.demonstrations", "demos.jsonl", *map(str, more)])

    return run


def rm(*more: Any) -> Run:
    """The second stage."""

    def run(folder: Path) -> None:
        furnish(folder)
        fixed = ["--config", "rm/default.yaml", "--data.batch_size", "8", *_CPU]
        main(["rm", "fit", *fixed, "--model.base", "sft.ckpt", "--data.comparisons", "rankings.jsonl", *map(str, more)])

    return run


def ppo(*more: Any, scored_by: str | None = "rm.ckpt") -> Run:
    """The third stage."""

    def run(folder: Path) -> None:
        furnish(folder)
        models = ["--model.policy", "sft.ckpt", "--data.prompts", "prompts.jsonl"]
        models += [] if scored_by is None else ["--model.reward_model", scored_by]
        main(["ppo", "fit", *_PPO, *_PPO_SIZES, *models, *map(str, more)])

    return run


def command(*words: Any) -> Run:
    """Any other command."""

    def run(folder: Path) -> None:
        furnish(folder)
        main([str(word) for word in words])

    return run


def with_file(name: str, content: str | bytes, run: Run) -> Run:
    """A command in a folder where that file lies too."""

    def write_and_run(folder: Path) -> object:
        furnish(folder)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return run(folder)

    return write_and_run


def after(prepare: Callable[[Path], object], run: Run) -> Run:
    """A command in a folder to which something was done."""

    def prepare_and_run(folder: Path) -> object:
        furnish(folder)
        prepare(folder)
        return run(folder)

    return prepare_and_run
