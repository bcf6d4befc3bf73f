"""Three stages with adapters from the command line, each standing on what the last one made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lit_instruct.cli import main, run_stage
from lit_instruct.models.adapters import is_lora
from lit_instruct.models.backbone import load_language_model
from tests.helpers.numbers import assert_close
from tests.helpers.tiny import comparisons, demonstrations, prompts, save_model

CPU = ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.enable_progress_bar", "false"]
ADAPTER = ["--model.adapter.r", "4", "--model.adapter.lora_alpha", "8", "--model.learning_rate", "0.01"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "base", num_hidden_layers=2)
    demonstrations(tmp_path / "d.jsonl", 24)
    comparisons(tmp_path / "c.jsonl", 24)
    prompts(tmp_path / "p.jsonl", 24)
    return tmp_path


def stage(name: str, *arguments: Any) -> Any:
    config = ["fit", "--config", f"{name}/default.yaml", "--data.batch_size", "8", *CPU, *ADAPTER]
    return run_stage(name, [*config, *map(str, arguments)])


@pytest.mark.parametrize("quantization", [[], ["--model.quantization", "4bit"]])
def test_sft_then_rm_then_ppo_on_one_base(here: Path, quantization: list[str]) -> None:
    sft = stage(
        "sft", "--model.base", "base", "--data.demonstrations", "d.jsonl", "--trainer.max_epochs", 1, *quantization
    )
    rm = stage("rm", "--model.base", "runs/sft/last.ckpt", "--data.comparisons", "c.jsonl", *quantization)
    plan = ["--model.memory", "shared_base", "--model.episodes", 16, "--model.max_response_tokens", 5, *quantization]
    models = ["--model.policy", "runs/sft/last.ckpt", "--model.reward_model", "runs/rm/last.ckpt"]
    ppo = ["--data.prompts", "p.jsonl", "--model.minibatch_size", 4, *models, *plan]
    first = stage("ppo", *ppo)
    saved = torch.load("runs/ppo/last.ckpt", weights_only=True)
    assert saved["ppo"]["episodes_done"] == 16
    assert all(is_lora(name) or name.startswith("value_model.") for name in saved["state_dict"])
    assert all(name.startswith("policy.") and is_lora(name) for name in saved.get("ema_state_dict", {}))
    ids = torch.arange(9)[None] + 3
    merged = load_language_model("runs/ppo/last.ckpt").eval()(ids).logits
    assert_close(merged, first.model.policy.eval()(ids).logits, scale=10.0)
    start = load_language_model("runs/sft/last.ckpt").eval()(ids).logits
    assert_close(start, sft.model.policy.eval()(ids).logits, scale=10.0)
    assert not torch.equal(merged, start)
    mask = torch.ones_like(ids, dtype=torch.bool)
    assert_close(first.model.reward_model.scores(ids, mask), rm.model.reward_model.eval().scores(ids, mask))
    longer = [*ppo, "--model.episodes", 24, "--ckpt_path", "runs/ppo/last.ckpt"]
    assert stage("ppo", *longer).model.episodes_done == 24


def test_what_the_command_line_says(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (["--model.quantization", "4bit"], "sft: quantization: got 4bit without an adapter; need one"),
        (["--model.adapter.r", "0"], "adapter.r: got 0; need at least 1"),
        (["--model.adapter.rank", "4"], "rank"),
    ):
        with pytest.raises(SystemExit):
            main(["sft", "fit", "--model.base", "base", "--data.demonstrations", "d.jsonl", *CPU, *arguments])
        assert said in capsys.readouterr().err
