"""Does PPO go where it is told to? Three runs on what a quickstart left behind.

The adaptive KL coefficient aims at a target for 80 iterations; a Python function pays for one word for 30; the same
with its sign flipped goes on from that policy and unlearns the word:

    scripts/quickstart.sh && python scripts/experiments/steering.py runs/quickstart

About five minutes on two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lit_instruct.cli import run_stage

EPISODES = 128  # an iteration, as configs/quickstart/ppo.yaml
WORD = "gladly"
START, TARGET = 0.1, 1.5  # KL coefficient at first; nats a sequence


def pay(prompts: list[Any], responses: list[str]) -> list[float]:
    """One point for each time that the word is written."""
    return [float(response.lower().split().count(WORD)) for response in responses]


def fine(prompts: list[Any], responses: list[str]) -> list[float]:
    """The same with its sign flipped."""
    return [-score for score in pay(prompts, responses)]


class Keep(pl.Callback):
    """Keeps the metrics of each iteration."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def after_iteration(self, module: Any, metrics: dict[str, Any]) -> None:
        """A hook of PPO."""
        self.seen.append({name: float(value) for name, value in metrics.items()})


def main() -> None:
    """Run all three and print what they did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a quickstart")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    run, here = options.run.resolve(), Path(__file__).resolve()
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        sft, rm = str(run / "sft/last.ckpt"), ["--model.reward_model", str(run / "rm/last.ckpt")]
        monitor = {"class_path": "lit_instruct.callbacks.KLMonitor", "init_args": {"target": TARGET, "horizon": 1280}}
        seen = ppo(run, sft, [*rm, "--model.kl_coef", str(START)], 80, "adaptive", monitor)
        print(f"\nadaptive KL, target {TARGET} nats, coefficient {START} at first\niterations   KL      kl_coef  score")
        table(seen, ("objective/kl", "objective/kl_coef", "objective/score"))
        last = sum(row["objective/kl"] for row in seen[-10:]) / 10
        print(f"mean KL of the last 10: {last:.3f}, {last / TARGET - 1:+.1%} off the target")
        policy = sft
        for name in ("pay", "fine"):
            reward = ["--model.reward_model", "null", "--model.reward", "lit_instruct.rewards.FunctionScorer"]
            reward += ["--model.reward.function", f"{here}:{name}", "--model.missing_eos", "none"]
            seen = ppo(run, policy, [*reward, "--model.kl_coef", "0.02"], 30, name)
            print(f"\n{name} for {WORD!r}: mean score\niterations   score    KL")
            table(seen, ("objective/score", "objective/kl"))
            policy = f"{name}/last.ckpt"


def ppo(
    run: Path, policy: str, more: list[str], iterations: int, name: str, monitor: dict[str, Any] | None = None
) -> list[dict[str, float]]:
    """``lit-instruct ppo fit`` as the quickstart runs it, into a folder of its own."""
    keep = Keep()
    saver = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"dirpath": name, "save_top_k": 0, "save_last": True, "enable_version_counter": False},
    }
    callbacks = [{"class_path": f"{__name__}.Keep"}, saver, *([monitor] if monitor else [])]
    arguments = ["fit", "--config", "quickstart/ppo.yaml", "--data.prompts", str(run / "data/prompts.jsonl")]
    arguments += ["--model.policy", policy, "--model.episodes", str(iterations * EPISODES), "--trainer.logger", "false"]
    arguments += ["--trainer.limit_val_batches", "0", "--trainer.enable_progress_bar", "false", *more]
    arguments += ["--trainer.callbacks", json.dumps(callbacks)]
    trainer = run_stage("ppo", arguments).trainer
    (keep,) = (callback for callback in trainer.callbacks if type(callback).__name__ == "Keep")
    return keep.seen


def table(seen: list[dict[str, float]], names: tuple[str, ...]) -> None:
    """Means over ten iterations."""
    for start in range(0, len(seen), 10):
        rows = seen[start : start + 10]
        means = "  ".join(f"{sum(row[name] for row in rows) / len(rows):7.3f}" for name in names)
        print(f"{start + 1:>3} to {start + len(rows):<4} {means}")


if __name__ == "__main__":
    main()
