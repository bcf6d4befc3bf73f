"""KLMonitor on rollouts written by hand, and once in a real run."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lit_instruct import PPOModule, PromptDataModule
from lit_instruct.callbacks import KLMonitor
from lit_instruct.types import ConfigError, Experience, PromptBatch, Responses, Rollout
from tests.helpers.numbers import assert_close, assert_vector
from tests.helpers.tiny import Record, Scored, ids, prompts, quiet_trainer
from tests.unit.functional.vectors import VECTORS

LOGPROBS = torch.tensor([[-1.0, -0.5, -2.0, -0.3, 7.0], [-0.7, -1.1, -0.2, -0.9, -1.4]])
REFERENCE = torch.tensor([[-1.2, -0.4, -2.5, -0.3, -7.0], [-0.9, -1.0, -0.6, -1.3, -1.0]])
MASK = torch.tensor([[True, True, True, True, False], [True] * 5])  # the garbage at padding must not count


def rollout_of(logprobs: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor) -> Rollout:
    rows, nothing = len(mask), torch.zeros(len(mask))
    return Rollout(
        torch.zeros(rows, 1, dtype=torch.long),
        torch.ones(rows, 1, dtype=torch.bool),
        torch.zeros_like(mask, dtype=torch.long),
        mask,
        nothing.bool(),
        logprobs,
        reference,
        torch.zeros_like(logprobs),
        nothing,
        nothing,
    )


def observe(monitor: KLMonitor, module: Any, rollout: Rollout) -> dict[str, Any]:
    empty = torch.zeros_like(rollout.old_logprobs_BR)
    metrics: dict[str, Any] = {"kept": 1}
    monitor.on_experience(module, rollout, Experience(rollout, empty, empty, empty))
    monitor.after_iteration(module, metrics)
    assert metrics.pop("kept") == 1
    return metrics


def with_kl(nats: float, episodes: int) -> Rollout:
    """Episodes of two tokens whose sequence KL is ``nats``."""
    half = torch.full((episodes, 2), nats / 2)
    return rollout_of(half, torch.zeros_like(half), torch.ones(episodes, 2, dtype=torch.bool))


def module_with(kl_coef: float = 0.02) -> Any:
    return SimpleNamespace(kl_coef=kl_coef)


def test_the_estimates() -> None:
    metrics = observe(KLMonitor(), module_with(), rollout_of(LOGPROBS, REFERENCE, MASK))
    assert_close(metrics["objective/kl_per_token"], (0.6 + 0.5) / 9)
    assert_close(metrics["objective/kl_max"], 0.6)
    differences = (REFERENCE - LOGPROBS)[MASK]
    assert_close(metrics["objective/kl_k3"], float((differences.exp() - 1 - differences).sum()) / 2)


def test_the_controller_follows_the_formula() -> None:
    vector = VECTORS["adaptive_kl_controller_steps"]
    monitor = KLMonitor(target=vector["target"], horizon=vector["horizon"])
    module = module_with(vector["beta0"])
    seen = []
    for kl in vector["kl_sequence"]:
        observe(monitor, module, with_kl(kl, vector["n_episodes"]))
        seen.append(module.kl_coef)
    assert_vector(seen, vector["expected"]["beta_after_each_step_code"])


def test_without_a_target_the_coefficient_stays() -> None:
    module = module_with(0.02)
    observe(KLMonitor(), module, with_kl(100.0, 4))
    assert module.kl_coef == 0.02


@pytest.mark.parametrize(("kl", "stops"), [(4.9, False), (5.1, True)])
def test_the_ceiling_stops(kl: float, stops: bool, caplog: pytest.LogCaptureFixture) -> None:
    trainer: Any = SimpleNamespace(should_stop=False)
    with caplog.at_level(logging.WARNING):
        monitor = KLMonitor(ceiling=5.0, action="stop")
        monitor.setup(trainer, module_with(), "fit")
        observe(monitor, module_with(), with_kl(kl, 4))
    assert trainer.should_stop is stops
    assert ("5.10 nats a sequence, above 5.00" in caplog.text) is stops


def test_the_ceiling_warns(caplog: pytest.LogCaptureFixture) -> None:
    trainer: Any = SimpleNamespace(should_stop=False)
    with caplog.at_level(logging.WARNING):
        monitor = KLMonitor(ceiling=5.0)
        monitor.setup(trainer, module_with(), "fit")
        observe(monitor, module_with(), with_kl(6.0, 4))
    assert not trainer.should_stop
    assert "raise kl_coef" in caplog.text


def test_stopping_without_a_trainer_is_not_an_error() -> None:
    observe(KLMonitor(ceiling=5.0, action="stop"), SimpleNamespace(kl_coef=0.1), with_kl(6.0, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"action": "panic"}, "action: got 'panic'; need warn or stop"),
        ({"ceiling": 0.0}, "ceiling: got 0.0"),
        ({"target": -1.0}, "target: got -1.0"),
        ({"horizon": 0}, "horizon: got 0"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        KLMonitor(**arguments)


@pytest.mark.parametrize("start", [0.35, 1.4])
def test_the_controller_brings_kl_to_its_target(sft_ckpt: str, folder: Path, start: float) -> None:
    """Against a reward that pays for leaving the reference, from a coefficient that is too low or too high."""
    (paid,) = ids("w7")

    def pay(_: PromptBatch, responses: Responses) -> torch.Tensor:
        return ((responses.response_ids_BR == paid) & responses.response_mask_BR).sum(dim=1).float()

    module = PPOModule(
        sft_ckpt,
        reward=Scored(pay),
        episodes=80 * 32,
        minibatch_size=16,
        micro_batch_size=16,
        max_response_tokens=5,
        learning_rate=0.02,
        value_learning_rate=0.01,
        value_clip_range=None,
        warmup_iterations=0,
        kl_coef=start,
        missing_eos="none",
        optimizer=lambda groups: torch.optim.Adam(groups),
    )
    record = Record(after_iteration=lambda _, metrics: float(metrics["objective/kl"]))
    data = PromptDataModule(prompts(folder / "p.jsonl", 96), module.tokenizer, batch_size=32, val=0.0)
    monitor = KLMonitor(target=6.0, horizon=10 * 32)
    quiet_trainer(max_epochs=-1, callbacks=[monitor, record]).fit(module, datamodule=data)
    seen = record.seen["after_iteration"]
    assert len(seen) == 80
    assert abs(sum(seen[-10:]) / 10 - 6.0) < 0.2 * 6.0
    assert abs(sum(seen[10:20]) / 10 - 6.0) > 0.2 * 6.0  # it was not there from the start
