"""Runs that are killed again and again end, bit by bit, where an undisturbed run ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.faults.chains import Chain, assert_same, run_and_kill, run_to_the_end, spread
from tests.faults.stages import command, write_inputs

# Phase -> about how long it lasts, in seconds.
PHASES = {
    "sft": {"update": 0.02, "save": 0.15, "validation": 0.02},
    "rm": {"update": 0.02, "save": 0.15, "validation": 0.02},
    "ppo": {"rollout": 0.03, "update": 0.03, "save": 0.15, "validation": 0.03},
}
SLOW_DISK_S = 0.02  # so that kills fall between writing, flushing and renaming
SHARDS = {"class_path": "lit_instruct.modules.fsdp2.Fsdp2Strategy", "init_args": {"save_distributed_checkpoint": True}}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def chain(
    stage: str,
    inputs: Path,
    folder: Path,
    *,
    steps: int,
    every: int,
    kills: int,
    forked: bool = False,
    victims: tuple[str, ...] = ("all",),
    **trainer: Any,
) -> Chain:
    """An undisturbed run and one that is killed; both end with the same bits."""
    words = command(stage, inputs, folder, steps=steps, every=every, slow_disk_s=SLOW_DISK_S, **trainer)
    run_to_the_end(words, folder / "undisturbed", forked=forked)
    plan = spread(PHASES[stage], kills, steps, seed=kills, victims=victims)
    found = run_and_kill(words, folder / "killed", plan, forked=forked)
    print(f"{stage}: {found}")
    assert_same(folder / "killed", folder / "undisturbed")
    assert found.starts == sorted(found.starts)
    assert len(set(found.starts)) > kills / 2  # it went on from somewhere else most of the time
    return found


@pytest.mark.parametrize("stage", PHASES)
def test_killed_in_each_phase(stage: str, inputs: Path, tmp_path: Path) -> None:
    chain(stage, inputs, tmp_path, steps=32, every=4, kills=len(PHASES[stage]), forked=True)


@pytest.mark.slow  # a minute of training, and thirty starts: PPO's as commands, the others' forked
@pytest.mark.parametrize(("stage", "steps", "forked"), [("ppo", 150, False), ("sft", 240, True), ("rm", 240, True)])
def test_killed_thirty_times(stage: str, steps: int, forked: bool, inputs: Path, tmp_path: Path) -> None:
    found = chain(stage, inputs, tmp_path, steps=steps, every=4, kills=30, forked=forked)
    assert all(found.hit[phase] >= 3 for phase in PHASES[stage]), found


@pytest.mark.slow  # ten starts of two processes each
@pytest.mark.parametrize(
    ("stage", "strategy"),
    [("ppo", "ddp"), ("sft", "ddp"), ("ppo", "fsdp2"), ("ppo", SHARDS), ("sft", SHARDS)],
    ids=["ppo, ddp", "sft, ddp", "ppo, fsdp2", "ppo, shards", "sft, shards"],
)
def test_two_processes_killed_ten_times(stage: str, strategy: Any, inputs: Path, tmp_path: Path) -> None:
    """In two of three cases one of them alone: the other one must not wait for it for ever."""
    victims = ("all", "first", "other")
    found = chain(stage, inputs, tmp_path, steps=60, every=4, kills=10, victims=victims, devices=2, strategy=strategy)
    assert len(found.waited_s) >= 5
    assert max(found.waited_s) < 60, found
