"""Tokens are sent to where they belong, and stand in nothing that a run leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lit_instruct import SFTModule
from lit_instruct.cli import main
from tests.helpers.raw_server import RawServer, http
from tests.helpers.tiny import prompts, save_model, save_stage

REWARD, HUB = "r3ward-t0ken-aaaa", "hf_t0ken-bbbb"


def test_tokens_stand_in_no_file_and_no_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A run that trains, saves and logs, and then one that the server ends with an error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("REWARD_TOKEN", REWARD)
    monkeypatch.setenv("HF_TOKEN", HUB)
    save_model(tmp_path / "base")
    save_stage(SFTModule("base"), tmp_path / "sft.ckpt")
    prompts(tmp_path / "p.jsonl", 24)
    fixed: list[Any] = ["--config", "ppo/default.yaml", "--data.batch_size", 8, "--model.minibatch_size", 4]
    fixed += ["--model.max_response_tokens", 5, "--model.episodes", 8, "--data.val", 0]
    fixed += ["--trainer.accelerator", "cpu", "--trainer.devices", 1]
    fixed += ["--model.policy", "sft.ckpt", "--data.prompts", "p.jsonl", "--model.reward.retries", 0]
    scorer = ["--model.reward", "lit_instruct.rewards.HttpScorer", "--model.reward.token_variable", "REWARD_TOKEN"]
    sound, broken = http(json.dumps({"scores": list(range(8))}).encode()), http(b"no", status="500 Down")
    for answer in (sound, broken):
        with RawServer(lambda number, answer=answer: [sound if number == 1 else answer]) as server:
            words = ["ppo", "fit", *fixed[:2], *scorer, "--model.reward.url", server.url, *fixed[2:]]
            if answer is sound:
                main([str(word) for word in words])
            else:
                with pytest.raises(SystemExit):
                    main([str(word) for word in words])
            assert all(f"Authorization: Bearer {REWARD}".encode() in request for request in server.requests)
    printed = capfd.readouterr()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"config.yaml", "hparams.yaml", "last.ckpt"} <= {path.name for path in files}
    assert any(path.name.startswith("events.out") for path in files)
    assert "answered 500" in printed.err
    for secret in (REWARD, HUB):
        assert [path.name for path in files if secret.encode() in path.read_bytes()] == []
        assert secret not in printed.out + printed.err
