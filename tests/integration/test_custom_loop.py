"""``scripts/custom_loop.py``: plain Fabric ends where the Trainer ends."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric

from lit_instruct import PPOModule, PromptDataModule, RewardModule, SFTModule
from lit_instruct.callbacks import PtxMixing
from tests.helpers import tiny

SCRIPT = Path(__file__).parents[2] / "scripts" / "custom_loop.py"


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("custom_loop", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["custom_loop"] = module
    spec.loader.exec_module(module)
    return module


def test_script_is_short() -> None:
    assert len(SCRIPT.read_text(encoding="utf-8").splitlines()) < 120


def test_fabric_ends_with_the_trainers_weights(script: ModuleType, tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / "model")
    sft = tiny.save_stage(SFTModule(model), tmp_path / "sft.ckpt")
    torch.manual_seed(3)
    rm = tiny.save_stage(RewardModule(sft), tmp_path / "rm.ckpt")
    prompts = tiny.prompts(tmp_path / "prompts.jsonl", 20)
    text = tiny.texts(tmp_path / "text.jsonl", 40)

    def pieces() -> tuple[PPOModule, PromptDataModule, PtxMixing]:
        module = PPOModule(
            sft, rm, minibatch_size=4, micro_batch_size=2, max_response_tokens=6, episodes=24, learning_rate=1e-3
        )
        data = PromptDataModule(prompts, module.tokenizer, batch_size=8, val=0.0)
        return module, data, PtxMixing(text, coef=1.0, ratio=1, micro_batch_size=2, chunk_tokens=8)

    module, data, ptx = pieces()
    script.train(module, data, [ptx], Fabric(accelerator="cpu", devices=1), iterations=3)

    expected, data, ptx = pieces()
    trainer: Any = tiny.quiet_trainer(callbacks=[ptx], max_epochs=-1)
    trainer.fit(expected, data)

    assert expected.iterations_done == module.iterations_done == 3
    before = tiny.weights(PPOModule(sft, rm, max_response_tokens=6).policy)
    assert not torch.equal(tiny.weights(module.policy), before)
    assert torch.equal(tiny.weights(module.policy), tiny.weights(expected.policy))
    assert torch.equal(tiny.weights(module.value_model), tiny.weights(expected.value_model))
