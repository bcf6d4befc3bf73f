"""The pair layout: every pair of a ranking as two whole rows, in a plain loop with nothing else around it.

This is what a reward model trainer does that knows pairs only, without its overhead: no Trainer, no logging.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification

from scripts.benchmark.cases import LEARNING_RATE, SEED
from scripts.benchmark.gate import Gate, spec
from scripts.benchmark.plain import pairs_backward


def main() -> None:
    """Train from gate to gate."""
    told = spec()
    gate = Gate()
    torch.set_num_threads(told["threads"])
    folder = Path(told["folder"])
    steps = json.loads((folder / "peer.json").read_text(encoding="utf-8"))
    torch.manual_seed(SEED)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model", dtype=torch.float32, num_labels=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    gate.begin()
    for pairs in steps:
        pairs_backward(model, pairs, rows=told["rows"], bf16=told["bf16"])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        gate.step()
    raise SystemExit("the run ended before it was told to: too few rows")


if __name__ == "__main__":
    main()
