"""Folders as runs and evaluations leave them, made by hand."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from torch.utils.tensorboard import SummaryWriter


def write_events(
    folder: Path,
    curves: Mapping[str, Mapping[int, float]],
    texts: Mapping[str, Mapping[int, str]] | None = None,
    *,
    start: float = 1_700_000_000.0,
) -> Path:
    """An event file whose n-th event happens n seconds after ``start``; its path."""
    before = set(folder.glob("events*"))
    with SummaryWriter(str(folder), filename_suffix=f".{len(before)}") as writer:
        clock = iter(range(10**6))
        for name, points in curves.items():
            for step, value in points.items():
                writer.add_scalar(name, value, step, walltime=start + next(clock))
        for name, entries in (texts or {}).items():
            for step, text in entries.items():
                writer.add_text(name, text, step, walltime=start + next(clock))
    (made,) = set(folder.glob("events*")) - before
    return made


def write_config(folder: Path, settings: Any) -> None:
    """As LightningCLI saves it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")


def ppo_curves(*, iterations: int = 5, lift: float = 0.0) -> dict[str, dict[int, float]]:
    """A few metrics of PPO: the score is the root of KL, and ``lift`` more."""
    steps = range(1, iterations + 1)
    return {
        "ppo/train/objective/score": {step: 0.5 * step + lift for step in steps},
        "ppo/train/objective/kl": {step: 0.25 * step**2 for step in steps},
        "ppo/train/rollout/len_mean": {step: 10.0 + step for step in steps},
        "ppo/train/objective/kl_coef": dict.fromkeys(steps, 0.02),
    }


def write_evaluation(folder: Path, models: Any, samples: Iterable[Any] = (), **more: Any) -> Path:
    """The output of ``lit-instruct evaluate``."""
    folder.mkdir(parents=True, exist_ok=True)
    results = {"format_version": 1, "baseline": "sft", "models": models} | more
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    if samples:
        lines = [json.dumps(row) + "\n" for row in samples]
        (folder / "samples.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder
