"""Model folder, SFT checkpoint and reward checkpoint, each made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from lit_instruct import RewardModule, SFTModule
from tests.helpers.tiny import save_model, save_stage


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a model with its tokenizer."""
    return save_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def sft_ckpt(base: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_stage(SFTModule(base), tmp_path_factory.mktemp("sft") / "sft.ckpt")


@pytest.fixture(scope="session")
def rm_ckpt(sft_ckpt: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """With a bias that is not 0, as after training."""
    module = RewardModule(sft_ckpt)
    module.reward_model.score_bias.fill_(0.7)
    return save_stage(module, tmp_path_factory.mktemp("rm") / "rm.ckpt")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: whatever is written by the way lands here."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
