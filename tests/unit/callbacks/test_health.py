"""Health as a callback: whom it tells, how often, and that it stops a run. What it finds is tested in tests/faults."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_instruct import PromptDataModule, SFTModule
from lit_instruct.callbacks import Health
from lit_instruct.callbacks.health_checks import FIRST, RECENT, Evidence
from lit_instruct.types import ConfigError
from tests.helpers.tiny import Record, prompts, quiet_trainer, scalars, sgd
from tests.unit.callbacks.runs import fit_ppo, tiny_ppo


@pytest.fixture
def path(folder: Path) -> str:
    return prompts(folder / "p.jsonl", 24)


def sober(sft_ckpt: str, rm_ckpt: str, **changes: Any) -> Any:
    return tiny_ppo(sft_ckpt, rm_ckpt, **({"learning_rate": 1e-3, "episodes": 40} | changes))


def scale_scores(module: Any) -> Any:
    """A fault that is seen at once and in every iteration."""
    module.scorer.register_forward_hook(lambda scorer, inputs, output: 100 * output)
    return module


def test_a_finding_is_told_once_counted_always_and_written_down(
    sft_ckpt: str, rm_ckpt: str, path: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = scale_scores(sober(sft_ckpt, rm_ckpt, missing_eos="none"))
    health = Health(ignore=["score_falls", "kl_runs_away"])
    logger = TensorBoardLogger(folder, name="", version="logs")
    with caplog.at_level(logging.WARNING):
        fit_ppo(module, path, callbacks=[health], logger=logger, log_every_n_steps=1)
    told = [finding.name for finding in health.findings]
    assert {"scores_too_wide", "value_clip_tight"} <= set(told)
    assert len(told) == len(set(told))
    assert caplog.text.count("scores_too_wide in iteration 1: scores have a standard deviation of") == 1
    assert "raise `model.kl_coef`" in caplog.text
    counts = scalars(folder / "logs", "ppo/train/health/findings")
    assert [step for step, _ in counts] == [1, 2, 3, 4, 5]
    assert all(count >= 2 for _, count in counts)
    events = EventAccumulator(str(folder / "logs")).Reload()
    texts = events.Tensors("health/text_summary")
    assert texts[0].step == 1
    assert b"scores_too_wide" in texts[0].tensor_proto.string_val[0]


def test_it_stops_after_the_iteration(sft_ckpt: str, rm_ckpt: str, path: str) -> None:
    module = scale_scores(sober(sft_ckpt, rm_ckpt))
    fit_ppo(module, path, callbacks=[Health(action="stop")])
    assert module.iterations_done == 1
    module = scale_scores(sober(sft_ckpt, rm_ckpt))
    fit_ppo(module, path, callbacks=[Health(action="warn")])
    assert module.iterations_done == 5


def test_what_is_ignored_neither_counts_nor_stops(sft_ckpt: str, rm_ckpt: str, path: str) -> None:
    module = scale_scores(sober(sft_ckpt, rm_ckpt, episodes=16))
    health, record = Health(action="stop", ignore=["scores_too_wide", "value_clip_tight"]), _counts()
    fit_ppo(module, path, callbacks=[health, record])
    assert health.findings == []
    assert record.seen["after_iteration"] == [0.0, 0.0]


def _counts() -> Record:
    return Record(after_iteration=lambda module, metrics: metrics["health/findings"])


def test_without_a_trainer_it_is_a_hook(sft_ckpt: str, rm_ckpt: str, path: str) -> None:
    module, health = scale_scores(sober(sft_ckpt, rm_ckpt)), Health(action="stop")
    data = PromptDataModule(path, module.tokenizer, batch_size=8, val=0.0)
    data.setup("fit")
    optimizer = module.configure_optimizers()["optimizer"]

    def step() -> None:
        module.clip_each_network()
        optimizer.step()
        optimizer.zero_grad()

    for batch in data.train_dataloader():
        metrics = module.iteration(batch, hooks=[health], backward=torch.Tensor.backward, step=step)
        assert metrics["health/findings"] >= 2
    assert {finding.name for finding in health.findings} >= {"scores_too_wide", "value_clip_tight"}


def news(health: Health, iteration: int, **sizes: float) -> list[str]:
    seen = {name: Evidence("seen", size) for name, size in sizes.items()}
    return [finding.name for finding in health._news(seen, iteration)]


def test_a_finding_is_told_again_when_it_is_worse_or_old() -> None:
    health = Health(repeat_every=10)
    assert news(health, 1, few_prompts=1.0, never_stops=3.0) == ["few_prompts", "never_stops"]
    assert news(health, 2, few_prompts=1.9, never_stops=1.0) == []
    assert news(health, 3, few_prompts=2.0, never_stops=3.0) == ["few_prompts"]
    assert news(health, 4, few_prompts=3.9) == []
    assert news(health, 10, few_prompts=3.9, never_stops=3.0) == []
    assert news(health, 11, few_prompts=3.9, never_stops=3.0) == ["never_stops"]
    assert news(health, 13, few_prompts=3.9) == ["few_prompts"]


def test_a_run_that_goes_on_compares_with_its_start(sft_ckpt: str, rm_ckpt: str, path: str, folder: Path) -> None:
    """The state after five iterations and after three, saved, read and two more is the same."""
    states = []
    for stops in ((5,), (3, 5)):
        health, ckpt = Health(), None
        for stop in stops:
            health = Health()
            saver = pl.callbacks.ModelCheckpoint(dirpath=folder / f"{stops}-{stop}", save_last=True, save_top_k=0)
            module = sober(sft_ckpt, rm_ckpt, episodes=8 * stop, optimizer=sgd)
            fit_ppo(module, path, callbacks=[health, saver], ckpt=ckpt)
            ckpt = folder / f"{stops}-{stop}" / "last.ckpt"
        states.append(health.state_dict())
    for name in ("first", "recent"):
        assert len(states[0][name]) == 5
        for mine, theirs in zip(states[0][name], states[1][name], strict=True):
            assert {key: value for key, value in mine.items() if not key.startswith("time/")} == {
                key: value for key, value in theirs.items() if not key.startswith("time/")
            }
    assert [row["fact/fresh"] for row in states[1]["first"]] == [1, 0, 0, 0, 0]
    assert states[0]["told"] == states[1]["told"]
    assert states[0]["findings"] == states[1]["findings"]


def test_the_first_iterations_are_those_in_which_the_policy_learns(sft_ckpt: str, rm_ckpt: str, path: str) -> None:
    health = Health()
    module = sober(sft_ckpt, rm_ckpt, episodes=8 * (RECENT + 3), value_warmup_iterations=2)
    fit_ppo(module, path, callbacks=[health])
    state = health.state_dict()
    assert [row["iteration"] for row in state["first"]] == [3 + i for i in range(FIRST)]
    assert [row["iteration"] for row in state["recent"]] == [4 + i for i in range(RECENT)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"action": "shout"}, "action: got 'shout'; need warn or stop"),
        ({"ignore": ["dropout_on", "nonsense"]}, "ignore: got nonsense; need names of rules: first_minibatch_differs"),
        ({"repeat_every": 0}, "repeat_every: got 0"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Health(**arguments)


def test_it_refuses_what_has_no_rollouts(base: str) -> None:
    with pytest.raises(ConfigError, match="Health: got a SFTModule; need a PPOModule"):
        Health().setup(SimpleNamespace(), SFTModule(base), "fit")  # type: ignore[arg-type]
    assert quiet_trainer(callbacks=[Health()]).callbacks
