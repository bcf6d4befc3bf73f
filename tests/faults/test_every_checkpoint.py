"""Resumed from any checkpoint of a run, a run logs, validates and ends as the one that was not interrupted.

Checkpoints are written after each step, whatever it still has to do then: log, validate, end an epoch, end the run.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from lit_instruct.cli import run_stage
from tests.faults.chains import difference, journal, read_checkpoint
from tests.faults.stages import command, write_inputs

STEPS = {"sft": 14, "rm": 14, "ppo": 24}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize("stage", STEPS)
def test_resumed_from_each(stage: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = command(stage, inputs, tmp_path, steps=STEPS[stage], every=1 if stage != "ppo" else 2, keep=-1)

    def run(name: str, *more: str) -> Path:
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        run_stage(words[0], [*words[1:], *more, "--auto_resume", "false"])
        return tmp_path / name

    whole = run("whole")
    expected, end = journal(whole), read_checkpoint(whole / "runs" / "last.ckpt")
    checkpoints = sorted((whole / "runs").glob("*.ckpt"), key=lambda path: path.name)
    assert len(checkpoints) > 12
    for path in checkpoints:
        resumed = run(path.stem, "--ckpt_path", str(path))
        found = journal(resumed)
        since = read_checkpoint(path)["global_step"] // (2 if stage == "ppo" else 1)  # PPO counts iterations
        assert {key: value for key, value in expected.items() if found.get(key, value) != value} == {}, path.name
        missing = [key for key in expected if key not in found and int(key.split()[1].rstrip(",")) > since]
        assert (path.name, missing, found.keys() - expected.keys()) == (path.name, [], set())
        if (resumed / "runs" / "last.ckpt").exists():
            roots = (str(resumed.resolve()), str(whole.resolve()))
            last = read_checkpoint(resumed / "runs" / "last.ckpt")
            for part in ("state_dict", "optimizer_states", "lr_schedulers", "loops"):
                assert difference(last[part], end[part], roots, part) is None, path.name
