"""How long a run is, which the cosine must know before Lightning has built its loader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lit_instruct import DemonstrationDataModule, SFTModule
from lit_instruct.modules import optimizers
from tests.helpers.tiny import Record, demonstrations, quiet_trainer


@pytest.mark.parametrize(
    "settings",
    [
        {"max_epochs": 2},
        {"max_epochs": 2, "accumulate_grad_batches": 3},
        {"max_epochs": 3, "limit_train_batches": 3, "accumulate_grad_batches": 2},
        {"max_epochs": 2, "limit_train_batches": 0.5},
        {"max_epochs": 2, "overfit_batches": 2},
        {"max_epochs": 5, "max_steps": 7},
        {"max_epochs": -1, "max_steps": 3},
        {"max_steps": 3},
        {"fast_dev_run": 2},
    ],
)
def test_the_length_of_a_run_is_lightning_s(
    base: str, folder: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    counted = []
    real = optimizers.total_steps
    monkeypatch.setattr(optimizers, "total_steps", lambda trainer: counted.append(real(trainer)) or counted[-1])
    # Once training has begun, Lightning counts on the loader that it trains on.
    record = Record(on_train_start=lambda trainer, _: trainer.estimated_stepping_batches)
    module = SFTModule(base)
    batch = 6 * settings.get("accumulate_grad_batches", 1)
    data = DemonstrationDataModule(demonstrations(folder / "d.jsonl", 24), module.tokenizer, batch_size=batch, val=0.0)
    run = quiet_trainer(**settings, callbacks=[record])
    run.fit(module, datamodule=data)
    assert counted == record.seen["on_train_start"]
    assert run.global_step == counted[0]
