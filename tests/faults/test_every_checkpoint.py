"""Resumed from whatever checkpoint, a run logs, validates and ends as the one that was not interrupted.

A checkpoint of the end of a step (``step=...``) is written before what the step still has to do: write the log,
validate, end the epoch. One that a metric chooses (``best-step=...``) is written at the end of a validation or epoch.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from lit_instruct.cli import run_stage
from tests.faults.chains import difference, journal, read_checkpoint
from tests.faults.stages import command, write_inputs

# Stage -> optimizer steps, and checkpoints. PPO takes two steps an iteration, and names files after iterations.
RUNS = {
    "sft": (
        14,
        {
            "nothing": "step=4",
            "log and validate": "step=5",
            "end the epoch": "step=6",
            "chosen": "best-step=10",
            "end": "step=14",
        },
    ),
    "rm": (14, {"log": "step=10", "validate and end the epoch": "step=6", "chosen": "best-step=12", "end": "step=14"}),
    "ppo": (
        26,
        {
            "nothing": "step=5",
            "validate": "step=8",
            "end the epoch": "step=9",
            "both": "step=12",
            "chosen": "best-step=*",
            "end": "step=13",
        },
    ),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize("stage", RUNS)
def test_resumed_from_each(stage: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, checkpoints = RUNS[stage]
    words = command(stage, inputs, tmp_path, steps=steps, every=1 if stage != "ppo" else 2, keep=-1)

    def run(name: str, *more: str) -> Path:
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        run_stage(words[0], [*words[1:], *more, "--auto_resume", "false"])
        return tmp_path / name

    whole = run("whole")
    expected, end = journal(whole), read_checkpoint(whole / "runs" / "last.ckpt")
    for still_to_do, name in checkpoints.items():
        path = min((whole / "runs").glob(f"{name}.ckpt"))
        resumed = run(still_to_do, "--ckpt_path", str(path))
        found = journal(resumed)
        # From that step on. PPO logs over iterations from 1, the others over steps from 0.
        since = (
            read_checkpoint(path)["global_step"] // 2 if stage == "ppo" else read_checkpoint(path)["global_step"] - 1
        )
        since += 2 * name.startswith("best")  # all that the step had to do was done
        assert {key: value for key, value in expected.items() if found.get(key, value) != value} == {}, path.name
        missing = [key for key in expected if key not in found and int(key.split()[1].rstrip(",")) >= since]
        assert (path.name, missing, found.keys() - expected.keys()) == (path.name, [], set())
        roots, last = (str(resumed.resolve()), str(whole.resolve())), read_checkpoint(resumed / "runs" / "last.ckpt")
        parts = ["state_dict", "optimizer_states", "lr_schedulers"]
        if read_checkpoint(path)["global_step"] < steps:  # a run that was over writes its last one after its end
            parts.append("loops")
        for part in parts:
            assert difference(last[part], end[part], roots, part) is None, path.name


@pytest.mark.parametrize("stage", RUNS)
def test_the_last_one_of_a_finished_run_stays(
    stage: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the validation after its last step, a run has it already; written again it would be an epoch older."""
    steps, _ = RUNS[stage]
    words = command(stage, inputs, tmp_path, steps=steps, every=1 if stage != "ppo" else 2)
    monkeypatch.chdir(tmp_path)
    run_stage(words[0], [*words[1:], "--auto_resume", "false"])
    before = (tmp_path / "runs" / "last.ckpt").read_bytes()
    run_stage(words[0], [*words[1:], "--auto_resume", "false", "--ckpt_path", "runs/last.ckpt"])
    assert (tmp_path / "runs" / "last.ckpt").read_bytes() == before
