"""Ratios of the fast paths to the plain ones on a tiny model, and the least that each must be.

In one process and by turns, so that a busy machine moves both. Under two minutes; a ratio under its floor means that
something has become slower.
"""

from __future__ import annotations

import copy
import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging as transformers_logging

from lit_instruct import RewardModule, SFTModule
from lit_instruct.models.packing import enable_packing
from scripts.benchmark.cases import CASES, SEED, Case, RolloutCase, llama
from scripts.benchmark.plain import demonstration_backward, generated_lengths, pairs_backward
from scripts.benchmark.race import Spread, spread
from scripts.benchmark.workers.rollout import sampled_lengths
from scripts.benchmark.world import data_module, language_model, pair_rows, write_case

FLOORS = {"sft packed / padded": 1.4, "rm shared / pairs": 5.0, "rollout slots / generate": 1.6}
"""Well under what a quiet machine gives (docs/benchmarks.md), well over what the plain path gives (1)."""

PAIRS = 3


def ratios() -> dict[str, Spread]:
    """Speed of each fast path over its plain one, units per CPU second at one thread."""
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()  # a fresh head is what is wanted
    with tempfile.TemporaryDirectory() as scratch:
        return {
            "sft packed / padded": _sft(Path(scratch) / "sft"),
            "rm shared / pairs": _rm(Path(scratch) / "rm"),
            "rollout slots / generate": _rollout(),
        }


def check() -> int:
    """Print the ratios; 1 if one is under its floor, else 0."""
    failed = 0
    for name, found in ratios().items():
        low = found.median < FLOORS[name]
        failed |= low
        said = "  UNDER ITS FLOOR" if low else ""
        print(f"{name:<26} {found.median:.2f}x ({found.low:.2f} to {found.high:.2f}), floor {FLOORS[name]:g}{said}")
    return int(failed)


def _turns(ours: Callable[[int], float], plain: Callable[[int], float]) -> Spread:
    """Median ratio of units per CPU second; each side is called once to warm up."""
    found = []
    for turn in range(PAIRS + 1):
        rates = []
        for side in (ours, plain):
            begun = time.process_time()
            units = side(turn)
            rates.append(units / (time.process_time() - begun))
        found.append(rates[0] / rates[1])
    return spread(found[1:])


def _case(name: str, **changes: Any) -> Case:
    return next(case for case in CASES if case.name == name)._replace(steps=1, warmup=1, **changes)


def _sft(folder: Path) -> Spread:
    case = _case("sft:tiny")
    write_case(case, folder, pairs=PAIRS)
    data = data_module("sft", folder, case.batch_size)
    data.setup()
    batches = list(itertools.islice(data.train_dataloader(), PAIRS + 1))
    module = SFTModule(str(folder / "model"), template="verbatim")
    model = language_model(llama("tiny"))

    def ours(turn: int) -> float:
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = module.loss(batches[turn])
        loss.backward()
        return float(batches[turn].attention_mask_BT.sum())

    def plain(turn: int) -> float:
        demonstration_backward(model, batches[turn], bf16=True)
        return float(batches[turn].attention_mask_BT.sum())

    return _turns(ours, plain)


def _rm(folder: Path) -> Spread:
    case = _case("rm:tiny:256-64:k4:fp32", batch_size=2)
    write_case(case, folder, pairs=PAIRS)
    data = data_module("rm", folder, case.batch_size)
    data.setup()
    batches = list(itertools.islice(data.train_dataloader(), PAIRS + 1))
    module = RewardModule(str(folder / "model"), template="verbatim")
    torch.manual_seed(SEED)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder / "model", dtype=torch.float32, num_labels=1)

    def ours(turn: int) -> float:
        loss, metrics = module.loss(batches[turn])
        loss.backward()
        return float(metrics["pairs"])

    def plain(turn: int) -> float:
        pairs = pair_rows(batches[turn])
        pairs_backward(classifier, pairs, rows=case.peer["rows"], bf16=False)
        return float(len(pairs))

    return _turns(ours, plain)


def _rollout() -> Spread:
    case = RolloutCase("quick", llama("tiny"), "fp32", prompts=64, rows=16)
    model = language_model(case.config, end_probability=1.0 / case.mean_response).eval()
    slots = copy.deepcopy(model)
    enable_packing(slots)
    torch.manual_seed(SEED)
    ids = torch.randint(2, model.config.vocab_size, (case.prompts, case.prompt_length))
    told = case._asdict()
    return _turns(
        lambda turn: float(sampled_lengths(slots, ids, told, turn).sum()),
        lambda turn: float(generated_lengths(model, ids, rows=case.rows, max_tokens=case.max_response).sum()),
    )
