"""PPO learns what a Python function pays for, and unlearns it when the sign is turned."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_instruct import PPOModule, PromptDataModule
from lit_instruct.rewards import FunctionScorer
from tests.helpers.tiny import Record, prompts, quiet_trainer

WORD = "w7"
ITERATIONS = 30


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small gain nothing from two threads, and on a busy machine lose a minute waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pay(prompts: list[Any], responses: list[str]) -> list[float]:
    return [float(response.split().count(WORD)) for response in responses]


def charge(prompts: list[Any], responses: list[str]) -> list[float]:
    return [-amount for amount in pay(prompts, responses)]


def counts(policy: str, function: Any, path: str, checkpoint: Path) -> list[float]:
    """How often the word stands in a response, on average, at each iteration of a run."""
    module = PPOModule(
        policy,
        reward=FunctionScorer(function),
        episodes=ITERATIONS * 32,
        minibatch_size=16,
        max_response_tokens=6,
        learning_rate=0.01,
        value_learning_rate=0.01,
        warmup_iterations=0,
        kl_coef=0.02,
        missing_eos="none",
    )
    record = Record(after_iteration=lambda module, metrics: abs(float(metrics["objective/score_raw"])))
    run = quiet_trainer(max_epochs=-1, callbacks=[record])
    run.fit(module, datamodule=PromptDataModule(path, module.tokenizer, batch_size=32, val=0.0))
    run.save_checkpoint(checkpoint)
    assert len(record.seen["after_iteration"]) == ITERATIONS
    return record.seen["after_iteration"]


def test_a_word_that_is_paid_for_is_learnt_and_unlearnt(base: str, folder: Path) -> None:
    path = prompts(folder / "p.jsonl", 64)
    paid = counts(base, pay, path, folder / "paid.ckpt")
    assert paid[0] < 0.7
    assert sum(paid[-5:]) / 5 > 4.5  # of at most 6 words
    charged = counts(str(folder / "paid.ckpt"), charge, path, folder / "charged.ckpt")
    assert charged[0] > 4.5
    assert sum(charged[-5:]) / 5 < 0.5
