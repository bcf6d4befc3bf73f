"""Does anything grow in a long run? 500 iterations of PPO-ptx on what a quickstart left behind.

Validation, a table of samples and a checkpoint every 25 iterations, averaged weights, Health and TensorBoard, as a
user has them. Every 50 iterations: memory of the process, open files, threads, objects that Python's collector knows,
and tensors among them:

    scripts/quickstart.sh && python scripts/experiments/long_run.py runs/quickstart

About a quarter of an hour on two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import os
import tempfile
import threading
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lit_instruct.cli import run_stage

PROMPTS, MINIBATCH = 64, 32  # two updates an iteration
EVERY = 50


class Watch(pl.Callback):
    """Prints a line of the table every few iterations."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The head of the table."""
        print("iterations  resident MiB  open files  threads  objects  tensors")

    def after_iteration(self, module: Any, metrics: dict[str, Any]) -> None:
        """A hook of PPO."""
        if module.iterations_done % EVERY == 0:
            gc.collect()
            known = gc.get_objects()
            print(
                f"{module.iterations_done:>10}{resident_mib():>14.1f}{len(os.listdir('/proc/self/fd')):>12}"
                f"{threading.active_count():>9}{len(known):>9}{sum(isinstance(one, torch.Tensor) for one in known):>9}",
                flush=True,
            )


def resident_mib() -> float:
    """Memory of this process that is in RAM."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a quickstart")
    parser.add_argument("--iterations", type=int, default=500)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    run = options.run.resolve()
    arguments = ["fit", "--config", "quickstart/ppo_ptx.yaml", "--seed_everything", "1"]
    arguments += ["--model.policy", str(run / "sft/last.ckpt"), "--model.reward_model", str(run / "rm/last.ckpt")]
    arguments += ["--model.episodes", str(options.iterations * PROMPTS), "--model.minibatch_size", str(MINIBATCH)]
    arguments += ["--model.learning_rate", "1e-5", "--data.prompts", str(run / "data/prompts.jsonl")]
    arguments += ["--data.batch_size", str(PROMPTS), "--trainer.val_check_interval", "25"]
    arguments += ["--trainer.enable_progress_bar", "false"]
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        Path("data").symlink_to(run / "data")
        for class_path, settings in (
            (f"{__name__}.Watch", {}),
            ("lit_instruct.callbacks.WeightEMA", {}),
            ("ModelCheckpoint", {"dirpath": "kept", "every_n_train_steps": "50", "save_top_k": "1"}),
        ):
            arguments += ["--trainer.callbacks+", class_path]
            for name, value in settings.items():
                arguments += [f"--trainer.callbacks.{name}", value]
        run_stage("ppo", arguments)


if __name__ == "__main__":
    main()
