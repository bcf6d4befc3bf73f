"""Runs that are told to end: saved between two steps, the right exit status, and the same weights in the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_instruct import RewardModule, SFTModule
from tests.helpers.tiny import prompts, save_model, save_stage

_SAVED = "{class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: {dirpath: runs, filename: '{step}', "
_SAVED += "every_n_train_steps: 2, save_top_k: -1, save_last: true}}"
_LIMIT_S = 120


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    base = save_model(folder / "base")
    save_stage(SFTModule(base), folder / "sft.ckpt")
    save_stage(RewardModule(str(folder / "sft.ckpt")), folder / "rm.ckpt")
    prompts(folder / "p.jsonl", 64)
    return folder


def command(inputs: Path, *more: str) -> list[str]:
    """Twelve iterations of two updates; a checkpoint after each, which shows how far it is."""
    words = [sys.executable, "-m", "lit_instruct", "ppo", "fit", "--model.policy", str(inputs / "sft.ckpt")]
    words += ["--model.reward_model", str(inputs / "rm.ckpt"), "--data.prompts", str(inputs / "p.jsonl")]
    words += ["--data.batch_size", "8", "--data.val", "0", "--model.minibatch_size", "4", "--model.episodes", "96"]
    words += ["--model.max_response_tokens", "6", "--model.learning_rate", "0.01", "--trainer.max_epochs", "-1"]
    words += ["--trainer.accelerator", "cpu", "--trainer.logger", "false", "--trainer.callbacks", f"[{_SAVED}]"]
    return [*words, "--trainer.default_root_dir", "root", "--trainer.enable_progress_bar", "false", *more]


def start(where: Path, words: list[str], **environment: str) -> subprocess.Popen[str]:
    where.mkdir(exist_ok=True)
    root = str(Path(__file__).parents[2])
    full = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment
    return subprocess.Popen(words, cwd=where, env=full, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def tell(process: subprocess.Popen[str], where: Path, number: int) -> None:
    """Wait until the second iteration is saved, and send a signal."""
    until = time.monotonic() + _LIMIT_S
    while not list((where / "runs").glob("step=2*.ckpt")):
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(number)


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        said, _ = process.communicate(timeout=_LIMIT_S)
    finally:
        process.kill()
    return process.returncode, said


def final(where: Path) -> dict[str, Any]:
    loaded = torch.load(where / "runs" / "last.ckpt", weights_only=True)
    assert loaded["ppo"]["episodes_done"] == 96
    return loaded["state_dict"]


@pytest.fixture(scope="module")
def undisturbed(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    where = tmp_path_factory.mktemp("undisturbed")
    status, said = end(start(where, command(inputs)))
    assert status == 0, said[-3000:]
    return final(where)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_told_to_end_and_gone_on(
    inputs: Path, tmp_path: Path, undisturbed: dict[str, Any], number: int, status: int
) -> None:
    process = start(tmp_path, command(inputs))
    tell(process, tmp_path, number)
    got, said = end(process)
    assert got == status, said[-3000:]
    saved = tmp_path / "runs" / "interrupted.ckpt"
    assert f"--ckpt_path {saved.relative_to(tmp_path)}" in said or f"--ckpt_path {saved}" in said
    # Two iterations were over when it was told: what is saved is the third, whole, or a later one.
    assert 24 <= torch.load(saved, weights_only=True)["ppo"]["episodes_done"] < 96
    assert "Traceback" not in said
    status, said = end(start(tmp_path, command(inputs, "--ckpt_path", str(saved))))
    assert status == 0, said[-3000:]
    weights = final(tmp_path)
    assert weights.keys() == undisturbed.keys()
    assert all(torch.equal(weights[name], undisturbed[name]) for name in weights)


def test_all_processes_end(inputs: Path, tmp_path: Path) -> None:
    """Only the first is told; none is left behind."""
    process = start(tmp_path, command(inputs, "--trainer.devices", "2", "--trainer.strategy", "ddp"))
    tell(process, tmp_path, signal.SIGTERM)
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
    pids = [int(pid) for pid in children.stdout.split()]
    got, said = end(process)
    assert got == 143, said[-3000:]
    assert (tmp_path / "runs" / "interrupted.ckpt").is_file()
    until = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_slurm_requeues(inputs: Path, tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    """Its signal saves and asks for the job to be queued again; started again, the job goes on from there."""
    fake = tmp_path / "bin" / "scontrol"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path / "asked"}\n')
    fake.chmod(0o755)
    slurm = {"PATH": f"{fake.parent}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train"}
    slurm |= {"SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    slurm |= {"SLURM_NODEID": "0", "SLURM_NODELIST": "localhost"}
    process = start(tmp_path, command(inputs), **slurm)
    tell(process, tmp_path, signal.SIGUSR1)
    until = time.monotonic() + _LIMIT_S
    while not (tmp_path / "asked").exists() and time.monotonic() < until:
        time.sleep(0.02)
    process.kill()  # as SLURM does
    process.communicate()
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    (saved,) = (tmp_path / "root").glob("hpc_ckpt_*.ckpt")
    assert 24 <= torch.load(saved, weights_only=True)["ppo"]["episodes_done"] < 96
    status, said = end(start(tmp_path, command(inputs), **slurm))
    assert status == 0, said[-3000:]
    weights = final(tmp_path)
    assert all(torch.equal(weights[name], undisturbed[name]) for name in weights)
