"""A tiny PPO-ptx through the command line, interrupted and resumed, and then reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lit_instruct import RewardModule, SFTModule
from lit_instruct.cli import main
from lit_instruct.reporting.runs import find
from tests.helpers.numbers import assert_close
from tests.helpers.tiny import comparisons, prompts, save_model, save_stage, scalars, texts
from tests.unit.reporting.pages import Page

PPO = """
trainer:
  accelerator: cpu
  devices: 1
  max_epochs: -1
  log_every_n_steps: 1
  val_check_interval: 1
  default_root_dir: runs/ppo
  enable_progress_bar: false
  callbacks:
    - class_path: lit_instruct.callbacks.KLMonitor
    - class_path: lit_instruct.callbacks.Health
    - class_path: lit_instruct.callbacks.SampleTable
      init_args: {prompts: 2}
    - class_path: lit_instruct.callbacks.PtxMixing
      init_args: {text: t.jsonl, micro_batch_size: 4, chunk_tokens: 8}
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {dirpath: runs/ppo, filename: last, save_on_train_epoch_end: true}
model: {policy: sft.ckpt, reward_model: rm.ckpt, minibatch_size: 4, max_response_tokens: 5, learning_rate: 0.01}
data: {prompts: p.jsonl, val: 0.25, batch_size: 8}
"""


def command(*parts: Any) -> None:
    main([str(part) for part in parts])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an SFT and a reward model, and data."""
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "base")
    save_stage(SFTModule("base"), tmp_path / "sft.ckpt")
    save_stage(RewardModule("sft.ckpt"), tmp_path / "rm.ckpt")
    comparisons(tmp_path / "c.jsonl", 40)
    prompts(tmp_path / "p.jsonl", 48)
    texts(tmp_path / "t.jsonl", 20)
    (tmp_path / "ppo.yaml").write_text(PPO, encoding="utf-8")
    return tmp_path


def test_runs_of_two_stages_become_a_page(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command("ppo", "fit", "--config", "ppo.yaml", "--model.episodes", 16)
    command("ppo", "fit", "--config", "ppo.yaml", "--model.episodes", 32, "--ckpt_path", "runs/ppo/last.ckpt")
    reward = ["--model.base", "sft.ckpt", "--data.comparisons", "c.jsonl", "--data.val", 0.3, "--data.batch_size", 8]
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu", "--trainer.log_every_n_steps", 1]
    command("rm", "fit", *reward, *quiet, "--trainer.max_epochs", 2, "--trainer.default_root_dir", "runs/rm")
    capsys.readouterr()
    command("report", "runs", "--out", "out")
    assert capsys.readouterr().out == f"Report: {Path('out/report.html')}\n"

    page = Page(here / "out" / "report.html")
    assert page.loads() == []
    assert page.runs_code() == []
    assert "averaged weights" not in page.text
    overview = {row[0]: row[1:] for row in page.tables[0]}
    assert overview["ppo"][:2] == ["Reinforcement learning", "4 iterations"]
    assert overview["ppo"][3].endswith(" in 2 sessions")
    (checkpoint,) = (here / "runs" / "rm").rglob("*.ckpt")
    assert overview["rm"][:2] == ["Reward model", f"{checkpoint.stem.rpartition('=')[2]} optimizer steps"]
    for heading in ("Score", "KL to the reference", "Score against root KL", "Response length", "Pretraining loss"):
        assert heading in page.headings
    assert {"Accuracy", "Reliability", "Accuracy by ranking size", "Samples", "Settings"} <= set(page.headings)
    assert "ppo · iteration 1 · score" in page.text
    assert "ppo · iteration 4 · score" in page.text
    assert "trainer:" in page.text

    run = next(run for run in find(["runs"]).runs if run.stage == "ppo")
    logs = here / "runs" / "ppo" / "lightning_logs"
    written = [point for n in (0, 1) for point in scalars(logs / f"version_{n}", "ppo/train/objective/score")]
    assert [step for step, _ in written] == [1, 2, 3, 4]
    assert_close(list(run.curves["ppo/train/objective/score"].values()), [value for _, value in written])
    score = next(image["alt"] for image in page.of("img") if image["alt"].startswith("Score: "))
    assert score.startswith("Score: score against iteration. ppo: from ")
    assert " at 1 to " in score
