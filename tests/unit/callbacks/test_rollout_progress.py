"""RolloutProgressBar: how many responses are finished, on standard output."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from lit_instruct.callbacks import RolloutProgressBar
from tests.helpers.tiny import prompts
from tests.unit.callbacks.runs import fit_ppo, tiny_ppo


def test_finished_and_wanted(sft_ckpt: str, rm_ckpt: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bar = RolloutProgressBar()
    module, path = tiny_ppo(sft_ckpt, rm_ckpt), prompts(folder / "p.jsonl", 8)
    fit_ppo(module, path, callbacks=[bar], enable_progress_bar=True)
    printed = capsys.readouterr().out
    assert "sampling" in printed
    assert "0/8" in printed
    assert "objective/score" in printed
    assert bar._rollout_bar is None  # nothing is left on the screen


def test_it_can_be_switched_off(sft_ckpt: str, rm_ckpt: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module, path = tiny_ppo(sft_ckpt, rm_ckpt, episodes=8), prompts(folder / "p.jsonl", 8)
    fit_ppo(module, path, callbacks=[RolloutProgressBar(refresh_rate=0)], enable_progress_bar=True)
    assert "sampling" not in capsys.readouterr().out


def test_progress_is_shown_now_and_then(sft_ckpt: str, rm_ckpt: str, capsys: pytest.CaptureFixture[str]) -> None:
    bar, module = RolloutProgressBar(), tiny_ppo(sft_ckpt, rm_ckpt)
    bar.on_rollout_progress(module, 0, 7)
    assert "0/7" in capsys.readouterr().out
    time.sleep(0.15)  # bars are redrawn ten times a second at most
    bar.on_rollout_progress(module, 3, 7)
    assert "3/7" in capsys.readouterr().out
    bar.on_rollout_progress(module, 7, 7)
    assert bar._rollout_bar is None
    bar.on_rollout_progress(module, 2, 9)  # the next rollout
    assert bar._rollout_bar is not None
    assert (bar._rollout_bar.n, bar._rollout_bar.total) == (2, 9)
    bar.teardown(None, module, "fit")  # type: ignore[arg-type]
    assert bar._rollout_bar is None
