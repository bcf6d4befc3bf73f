"""How long a run is, which the cosine must know before Lightning has built its loader; and the optimizer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_instruct import DemonstrationDataModule, SFTModule
from lit_instruct.modules import optimizers
from lit_instruct.modules.optimizers import paper_adam, power_of_two
from lit_instruct.types import ConfigError
from tests.helpers.numbers import assert_close
from tests.helpers.tiny import Record, demonstrations, quiet_trainer, sgd


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


@pytest.mark.parametrize("epochs", [1, 2])
def test_the_state_of_another_optimizer_is_refused(base: str, folder: Path, epochs: int) -> None:
    """Torch takes whatever has as many parameters: SGD would go on with the betas of Adam, and without its momentum."""
    data = demonstrations(folder / "d.jsonl", 24)

    def fit(optimizer: Any, epochs: int, resume: str | None) -> Any:
        module = SFTModule(base, optimizer=optimizer)
        run = quiet_trainer(max_epochs=epochs)
        run.fit(
            module, datamodule=DemonstrationDataModule(data, module.tokenizer, batch_size=8, val=0.0), ckpt_path=resume
        )
        return run

    checkpoint = str(folder / "adam.ckpt")
    fit(paper_adam, 1, None).save_checkpoint(checkpoint)
    with pytest.raises(ConfigError, match=r"optimizer: .* state of torch.AdamW, and this run has torch.SGD;"):
        fit(sgd, epochs, checkpoint)
    assert fit(paper_adam, epochs, checkpoint).global_step == 3 * epochs


@pytest.mark.parametrize(("count", "expected"), [(0, 1), (1, 1), (2, 2), (3, 4), (5, 4), (65_000, 65_536)])
def test_a_power_of_two_near_a_count(count: float, expected: float) -> None:
    assert power_of_two(count) == expected


@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_goes_backward_has_the_size_of_a_mean(base: str, folder: Path, accumulate: int) -> None:
    """Sums over a step would overflow fp16, whose loss scale then has to come down by as much, a skipped step each."""
    module = SFTModule(base)
    seen: list[float] = []
    step = module.training_step

    def spy(batch: Any, batch_idx: int) -> Any:
        loss = step(batch, batch_idx)
        seen.append(float(loss.detach()))
        return loss

    module.training_step = spy  # type: ignore[method-assign]
    data = DemonstrationDataModule(demonstrations(folder / "d.jsonl", 32), module.tokenizer, batch_size=16, val=0.0)
    quiet_trainer(max_epochs=1, accumulate_grad_batches=accumulate).fit(module, datamodule=data)
    mean = math.log(34)  # about: a random model over as many tokens
    assert all(mean / 4 < loss * accumulate < 4 * mean for loss in seen)


def test_the_papers_adam_is_fused_and_leaves_unscaling_to_lightning() -> None:
    """The same numbers as Adam step by step; Lightning must not take it for one that unscales gradients by itself."""
    torch.manual_seed(0)
    weight, twin = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    ours = paper_adam([{"params": [weight], "lr": 0.1}])
    plain = torch.optim.AdamW([twin], lr=0.1, betas=(0.9, 0.95), weight_decay=0.0, fused=False, foreach=False)
    assert ours.param_groups[0]["fused"] is True
    assert not getattr(ours, "_step_supports_amp_scaling", False)
    for _ in range(3):
        weight.grad = torch.randn(3)
        twin.grad = weight.grad.clone()
        ours.step()
        plain.step()
    assert_close(weight, twin)
