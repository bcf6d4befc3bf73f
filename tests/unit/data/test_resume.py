"""A run that stops and resumes sees exactly the rows of a run that does not, by hand and through Lightning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_instruct.data.modules import DemonstrationDataModule
from tests.unit.data.worlds import demonstrations, word_tokenizer

ROWS, BATCH, PER_EPOCH = 22, 4, 5  # two rows of each epoch are left over


def data(folder: Path, num_workers: int = 0, **kwargs: Any) -> DemonstrationDataModule:
    folder.mkdir(exist_ok=True)
    path = demonstrations(folder / "d.jsonl", ROWS)
    return DemonstrationDataModule(
        path, word_tokenizer(), batch_size=BATCH, val=kwargs.pop("val", 0.0), num_workers=num_workers, **kwargs
    )


def rows_of(batch: Any) -> list[int]:
    return batch.input_ids_BT[:, 2].tolist()


def loader_of(folder: Path, num_workers: int) -> Any:
    module = data(folder, num_workers)
    module.setup()
    return module.train_dataloader()


def run(loader: Any, epochs: range) -> list[list[int]]:
    seen = []
    for epoch in epochs:
        loader.sampler.set_epoch(epoch)
        seen += [rows_of(batch) for batch in loader]
    return seen


@pytest.mark.parametrize(("stop", "num_workers"), [(1, 0), (3, 0), (5, 0), (6, 0), (9, 0), (10, 0), (5, 2), (7, 2)])
def test_a_loader_continues_where_its_state_was_taken(tmp_path: Path, stop: int, num_workers: int) -> None:
    expected = run(loader_of(tmp_path, num_workers), range(3))
    assert len(expected) == 3 * PER_EPOCH
    loader = loader_of(tmp_path, num_workers)
    seen: list[list[int]] = []
    for epoch in range(3):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            seen.append(rows_of(batch))
            if len(seen) == stop:
                break
        if len(seen) == stop:
            break
    state = torch.load(_saved(loader.state_dict(), tmp_path), weights_only=True)
    del loader
    fresh = loader_of(tmp_path, num_workers)
    fresh.load_state_dict(state)
    seen += [rows_of(batch) for batch in fresh]  # the rest of that epoch, or all of the next one
    done = len(seen) // PER_EPOCH
    seen += run(fresh, range(done, 3))
    assert seen == expected


def test_state_taken_after_an_epoch_has_run_out(tmp_path: Path) -> None:
    expected = run(loader_of(tmp_path, 0), range(2))
    loader = loader_of(tmp_path, 0)
    run(loader, range(1))
    fresh = loader_of(tmp_path, 0)
    fresh.load_state_dict(loader.state_dict())
    assert [rows_of(batch) for batch in fresh] == expected[PER_EPOCH:]


def test_a_caller_with_its_own_count_of_epochs_sees_no_order_twice(tmp_path: Path) -> None:
    """An endless stream stops at the last batch of an epoch and does not know yet that the epoch is over."""
    expected = run(loader_of(tmp_path, 0), range(3))
    loader = loader_of(tmp_path, 0)
    stream = iter(loader)
    seen = [rows_of(next(stream)) for _ in range(PER_EPOCH)]
    fresh = loader_of(tmp_path, 0)
    fresh.load_state_dict(loader.state_dict())
    for epoch in range(2):
        fresh.sampler.set_epoch(epoch)
        seen += [rows_of(batch) for batch in fresh]
    assert seen == expected


def _saved(state: dict[str, Any], folder: Path) -> Path:
    torch.save(state, folder / "state.pt")
    return folder / "state.pt"


class Recorder(LightningModule):
    """Notes the rows of each step; validates too, since that moves where checkpoints are taken."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: list[list[int]] = []
        self.validated: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.seen.append(rows_of(batch))
        return self.layer(batch.input_ids_BT[:, 2:3].float()).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated += rows_of(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-9)


def fit(
    folder: Path, *, until: int, resume: str | None = None, num_workers: int = 0, **kwargs: Any
) -> tuple[list[list[int]], str]:
    checkpoints = ModelCheckpoint(folder / "checkpoints", save_top_k=-1, **kwargs)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=until,
        max_epochs=-1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[checkpoints],
        default_root_dir=folder,
        num_sanity_val_steps=0,
    )
    module = Recorder()
    trainer.fit(module, datamodule=data(folder, num_workers, val=2 / ROWS), ckpt_path=resume)
    return module.seen, checkpoints.best_model_path or checkpoints.last_model_path


@pytest.mark.parametrize(("stop", "num_workers"), [(2, 0), (5, 0), (7, 0), (10, 0), (13, 0), (5, 2), (7, 2)])
def test_lightning_resumes_to_the_row(tmp_path: Path, stop: int, num_workers: int) -> None:
    expected, _ = fit(tmp_path / "whole", until=14, num_workers=num_workers)
    assert len(expected) == 14
    first, path = fit(tmp_path / "a", until=stop, every_n_train_steps=stop, num_workers=num_workers)
    rest, _ = fit(tmp_path / "b", until=14, resume=path, num_workers=num_workers)
    assert first + rest == expected


@pytest.mark.parametrize("at_train_end", [True, False])
@pytest.mark.parametrize(("stop", "num_workers"), [(5, 0), (10, 0), (5, 2)])
def test_lightning_resumes_at_the_end_of_an_epoch(
    tmp_path: Path, stop: int, num_workers: int, at_train_end: bool
) -> None:
    """Lightning saves before or after it has counted the epoch; resumed, it then counts it twice or once."""
    expected, _ = fit(tmp_path / "whole", until=19, num_workers=num_workers)
    kwargs = {"every_n_epochs": 1, "save_on_train_epoch_end": at_train_end, "num_workers": num_workers}
    first, path = fit(tmp_path / "a", until=stop, **kwargs)
    second, path = fit(tmp_path / "b", until=stop + 5, resume=path, **kwargs)
    rest, _ = fit(tmp_path / "c", until=19, resume=path, num_workers=num_workers)
    assert first + second + rest == expected
