"""The quickstart keeps its promises; minutes a seed, so not in the default suite."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lit_instruct.cli import main
from lit_instruct.toyworld.quickstart import print_summary


def _summary() -> dict[str, object]:
    row = {"gold": 0.5, "faultless": 0.25, "rude": 0.1, "words": 11.0, "win_rate_vs_sft": 0.5, "kl": 0.0}
    row |= {"win_rate_ci95": [0.45, 0.55], "pretraining_loss": 0.9}
    return {
        "seed": 1,
        "win_rate_ppo_ptx_vs_sft": 0.625,
        "win_rate_ci95": [0.6, 0.65],
        "reward_model_accuracy": 0.75,
        "labeler_agreement": 0.726,
        "heldout_prompts": 1500,
        "models": dict.fromkeys(("base", "sft", "ppo", "ppo_ptx"), row),
        "seconds": {"data": 1.0, "base": 60.4},
    }


def test_the_last_lines_say_who_is_preferred(capsys: pytest.CaptureFixture[str]) -> None:
    print_summary(_summary())
    said = capsys.readouterr().out
    assert "On 1500 held-out prompts PPO-ptx is preferred to SFT in 62.5% [60.0%, 65.0%]." in said
    assert "base 60; together 61." in said
    assert [line.split()[0] for line in said.splitlines()[2:6]] == ["base", "SFT", "PPO", "PPO-ptx"]


@pytest.mark.slow  # five minutes a seed
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_ppo_ptx_is_preferred_and_pretraining_is_kept(seed: int, tmp_path: Path) -> None:
    main(["quickstart", "--seed", str(seed), "--out", str(tmp_path)])
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    losses = summary["pretraining_loss"]
    assert summary["heldout_prompts"] >= 1000
    assert summary["win_rate_ppo_ptx_vs_sft"] >= 0.60
    assert summary["win_rate_ci95"][0] > 0.5
    assert summary["reward_model_accuracy"] >= 0.70
    assert 0.68 <= summary["labeler_agreement"] <= 0.78
    assert losses["ppo_ptx"] <= losses["sft"] + 0.02
    assert losses["ppo_ptx"] < losses["ppo"]
