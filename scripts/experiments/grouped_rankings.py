"""Grouped rankings against shuffled pairs: which reward model predicts held-out rankings better?

InstructGPT (Ouyang et al. 2022, 3.5) trains on all pairs of a prompt as one batch element: pairs that are shuffled
into a data set overfit within an epoch. This trains reward models both ways on the rankings that quickstarts left
behind, each for one and for two epochs, with the same pairs, the same number of optimizer steps and the same rate, and
measures accuracy and log loss on the same held-out rankings:

    for seed in 1 2 3; do scripts/quickstart.sh --seed $seed --out runs/world$seed; done
    python scripts/experiments/grouped_rankings.py runs/world1 runs/world2 runs/world3

About six minutes a world on two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import logging
import random
import tempfile
import time
import warnings
from pathlib import Path

from lit_instruct.cli import run_stage
from lit_instruct.toyworld.quickstart import fast_bf16

HELD_OUT = 0.1
PROMPTS_A_STEP = 8  # as configs/quickstart/rm.yaml


def main() -> None:
    """Train and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of quickstarts, one a seed")
    parser.add_argument("--epochs", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--first_seed", type=int, default=1, help="of the first run; the next ones follow")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    results: dict[tuple[str, int], list[dict[str, float]]] = {}
    for seed, run in enumerate(options.runs, start=options.first_seed):
        with tempfile.TemporaryDirectory() as scratch:
            files = write_files(run, Path(scratch))
            for form, epochs in itertools.product(("grouped", "pairs"), options.epochs):
                found = train(run, seed, Path(scratch), files, form, epochs)
                results.setdefault((form, epochs), []).append(found)
                print(f"{run} {form} {epochs}: {found}", flush=True)
    print("\ntraining set     epochs   held-out log loss              accuracy                     seconds")
    for (form, epochs), rows in results.items():
        losses, accuracies = ([row[name] for row in rows] for name in ("log_loss", "acc"))
        print(
            f"{form:<17}{epochs:<9}{mean(losses):.4f} ({listed(losses)}) {mean(accuracies):.3f} ({listed(accuracies)})"
            f"  {mean([row['seconds'] for row in rows]):.0f}"
        )


def write_files(run: Path, scratch: Path) -> dict[str, int]:
    """Split by prompt; write the training rankings whole and as shuffled pairs. Returns the batch size of each."""
    rows = [json.loads(line) for line in (run / "data/comparisons.jsonl").read_text(encoding="utf-8").splitlines()]
    stream = random.Random(0)
    stream.shuffle(rows)
    held_out = round(HELD_OUT * len(rows))
    train_rows = rows[held_out:]
    pairs = [
        {"prompt": row["prompt"], "chosen": better[1], "rejected": worse[1]}
        for row in train_rows
        for better, worse in itertools.permutations(zip(row["ranks"], row["responses"], strict=True), 2)
        if better[0] < worse[0]
    ]
    stream.shuffle(pairs)
    for name, content in (("grouped", train_rows), ("pairs", pairs), ("held_out", rows[:held_out])):
        (scratch / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    steps = len(train_rows) // PROMPTS_A_STEP
    return {"grouped": PROMPTS_A_STEP, "pairs": len(pairs) // steps}


def train(run: Path, seed: int, scratch: Path, batch_sizes: dict[str, int], form: str, epochs: int) -> dict[str, float]:
    """One reward model as the quickstart trains it, but for data and epochs; its last validation."""
    arguments = ["fit", "--config", "quickstart/rm.yaml", "--seed_everything", str(seed), "--data.seed", str(seed)]
    arguments += ["--trainer.precision", "bf16-mixed"] if fast_bf16() else []
    arguments += [
        "--model.base",
        str((run / "sft/last.ckpt").resolve()),
        "--data.comparisons",
        f"{form}.jsonl",
        "--data.val",
        "held_out.jsonl",
    ]
    arguments += ["--data.demonstrations", "null", "--data.batch_size", str(batch_sizes[form])]
    arguments += ["--data.val_batch_size", "8", "--trainer.max_epochs", str(epochs), "--trainer.logger", "false"]
    arguments += ["--trainer.enable_progress_bar", "false", "--trainer.num_sanity_val_steps", "0"]
    started = time.perf_counter()
    with contextlib.chdir(scratch):
        metrics = run_stage("rm", arguments).trainer.callback_metrics
    return {
        "log_loss": float(metrics["rm/val/log_loss"]),
        "acc": float(metrics["rm/val/acc"]),
        "seconds": time.perf_counter() - started,
    }


def mean(values: list[float]) -> float:
    """Of a few numbers."""
    return sum(values) / len(values)


def listed(values: list[float]) -> str:
    """Each of them."""
    return ", ".join(f"{value:.3f}" for value in values)


if __name__ == "__main__":
    main()
