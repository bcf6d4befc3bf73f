"""What SFT and reward model log in training: means over the steps since the last log, and nothing is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lit_instruct import ComparisonDataModule, DemonstrationDataModule, RewardModule, SFTModule
from lit_instruct.modules.train_log import RunningMetrics
from tests.helpers.numbers import assert_close
from tests.helpers.tiny import Record, comparisons, demonstrations, quiet_trainer, scalars, sgd

NAMES = {"sft": ("loss", "token_acc", "tokens"), "rm": ("loss", "acc", "acc_len_baseline")}


def parts_of(stage: str, base: str, folder: Path) -> tuple[Any, Any]:
    """Seven batches of two rows of unequal weight, at a rate of nearly 0: each can be measured apart afterwards."""
    if stage == "sft":
        module: Any = SFTModule(base, learning_rate=1e-12, optimizer=sgd)
        path = demonstrations(folder / "d.jsonl", 14)
        return module, DemonstrationDataModule(path, module.tokenizer, batch_size=2, val=0.0)
    torch.manual_seed(0)
    module = RewardModule(base, learning_rate=1e-12, optimizer=sgd)
    path = comparisons(folder / "c.jsonl", 14)
    return module, ComparisonDataModule(path, module.tokenizer, batch_size=2, val=0.0)


def fit(module: Any, data: Any, folder: Path, **trainer: Any) -> tuple[pl.Trainer, dict[str, list[tuple[int, float]]]]:
    logger = pl.loggers.TensorBoardLogger(folder, name="", version="logs")
    run = quiet_trainer(**{"max_epochs": 1, "logger": logger} | trainer)
    run.fit(module, datamodule=data)
    names = [*NAMES[module.stage], "lr", "skipped_steps"]
    return run, {name: scalars(folder / "logs", f"{module.stage}/train/{name}") for name in names}


def expected_of(module: Any, batches: list[Any]) -> dict[str, float]:
    """Sums of the batches, each measured alone, over what they count."""
    with torch.no_grad():
        found = [module.loss(batch)[1] for batch in batches]
    if module.stage == "sft":
        weights = {"loss": "tokens", "token_acc": "tokens"}
    else:
        weights = {"loss": "prompts", "acc": "pairs", "acc_len_baseline": "pairs"}
    means = {
        name: sum(float(of[name]) * float(of[weight]) for of in found) / sum(float(of[weight]) for of in found)
        for name, weight in weights.items()
    }
    return means | ({"tokens": sum(float(of["tokens"]) for of in found)} if module.stage == "sft" else {})


@pytest.mark.parametrize("stage", ["sft", "rm"])
@pytest.mark.parametrize(
    ("every", "accumulate", "windows"),
    [
        (1, 1, [[0], [1], [2], [3], [4], [5], [6]]),
        (3, 1, [[0, 1, 2], [3, 4, 5], [6]]),
        (50, 1, [[0, 1, 2, 3, 4, 5, 6]]),
        (1, 2, [[0, 1], [2, 3], [4, 5], [6]]),
        (2, 2, [[0, 1, 2, 3], [4, 5, 6]]),
    ],
)
def test_each_line_is_about_the_steps_since_the_last(
    stage: str, every: int, accumulate: int, windows: list[list[int]], base: str, folder: Path
) -> None:
    module, data = parts_of(stage, base, folder)
    data.setup()
    batches = list(data.train_dataloader())
    assert len(batches) == 7
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    logger = pl.loggers.TensorBoardLogger(folder, name="", version="logs")
    run = quiet_trainer(max_epochs=1, logger=logger, log_every_n_steps=every, accumulate_grad_batches=accumulate)
    run.fit(module, train_dataloaders=loader)
    wanted = [expected_of(module, [batches[place] for place in window]) for window in windows]
    if stage == "sft":  # of a step, not of a window
        for measured, window in zip(wanted, windows, strict=True):
            measured["tokens"] /= -(-len(window) // accumulate)
    steps = [-(-(window[-1] + 1) // accumulate) - 1 for window in windows]  # counted from 0, as Lightning does
    for name in NAMES[stage]:
        got = scalars(folder / "logs", f"{stage}/train/{name}")
        assert [step for step, _ in got] == steps
        assert_close([value for _, value in got], [measured[name] for measured in wanted])
        assert_close(run.callback_metrics[f"{stage}/train/{name}"], wanted[-1][name])
    assert [step for step, _ in scalars(folder / "logs", f"{stage}/train/lr")] == steps


@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_batches_differ_in_weight_and_loss(stage: str, base: str, folder: Path) -> None:
    """Else a mean of means would pass the test above."""
    module, data = parts_of(stage, base, folder)
    data.setup()
    batches = list(data.train_dataloader())
    alone = [expected_of(module, [batch])["loss"] for batch in batches]
    assert abs(sum(alone) / 7 - expected_of(module, batches)["loss"]) > 1e-3


def test_rate_and_skipped_steps_are_those_of_the_last_step(base: str, folder: Path) -> None:
    module, data = parts_of("sft", base, folder)
    rates = Record(on_before_optimizer_step=lambda trainer, module, optimizer: optimizer.param_groups[0]["lr"])
    _, logged = fit(module, data, folder, log_every_n_steps=3, callbacks=[rates])
    seen = rates.seen["on_before_optimizer_step"]
    assert_close([value * 1e12 for _, value in logged["lr"]], [seen[step] * 1e12 for step in (2, 5, 6)])
    assert [value for _, value in logged["skipped_steps"]] == [0, 0, 0]


def test_a_callback_sees_the_numbers_of_its_own_step(base: str, folder: Path) -> None:
    module, data = parts_of("sft", base, folder)
    record = Record(on_train_batch_end=lambda trainer, *_: float(trainer.callback_metrics["sft/train/loss"]))
    _, logged = fit(module, data, folder, log_every_n_steps=1, callbacks=[record])
    assert_close(record.seen["on_train_batch_end"], [value for _, value in logged["loss"]])
    assert len(set(record.seen["on_train_batch_end"])) == 7


class Stop(pl.Callback):
    """Ends the run after the fifth batch."""

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.should_stop = batch_idx >= 4


@pytest.mark.parametrize(
    ("stop", "limits", "steps"),
    [
        (True, {}, [2, 4]),
        (True, {"min_steps": 7}, [2, 4, 5, 6]),  # asked to stop, but not allowed to: Lightning logs every step then
        (False, {"max_steps": 5}, [2, 4]),
    ],
)
def test_a_run_that_ends_early_logs_its_last_steps_once(
    stop: bool, limits: dict[str, int], steps: list[int], base: str, folder: Path
) -> None:
    module, data = parts_of("sft", base, folder)
    _, logged = fit(module, data, folder, log_every_n_steps=3, callbacks=[Stop()] if stop else [], **limits)
    assert [step for step, _ in logged["loss"]] == steps
    data.setup()
    batches = list(data.train_dataloader())
    starts = [0, *(step + 1 for step in steps)]
    windows = [batches[start : step + 1] for start, step in zip(starts, steps, strict=False)]
    assert_close([value for _, value in logged["loss"]], [expected_of(module, window)["loss"] for window in windows])


def test_windows_end_with_the_epoch(base: str, folder: Path) -> None:
    module, data = parts_of("sft", base, folder)
    _, logged = fit(module, data, folder, log_every_n_steps=5, max_epochs=2)
    assert [step for step, _ in logged["loss"]] == [4, 6, 9, 13]


@pytest.mark.parametrize(
    ("saved", "settings", "steps"),
    [
        ({"every_n_train_steps": 2}, {}, [2, 5, 6]),
        ({"every_n_train_steps": 3}, {}, [2, 5, 6]),  # saved after that step, and before its line was written
        # After a validation in the middle of the epoch, and at its end.
        ({"monitor": "sft/val/loss"}, {"val_check_interval": 2}, [2, 5, 6]),
        ({"save_on_train_epoch_end": True}, {}, [6, 8, 11, 13]),
    ],
    ids=["step", "step with a log", "validation", "epoch"],
)
def test_a_resumed_run_writes_the_lines_of_one_that_was_not_interrupted(
    saved: dict[str, Any], settings: dict[str, Any], steps: list[int], base: str, folder: Path
) -> None:
    """Bit by bit: what was added up before the checkpoint counts, and a line that was due then is not lost."""
    settings = {"log_every_n_steps": 3, "max_epochs": 2 if "save_on_train_epoch_end" in saved else 1} | settings
    module, data = parts_of("sft", base, folder)
    data.val = demonstrations(folder / "v.jsonl", 3, seed=5)
    saver = pl.callbacks.ModelCheckpoint(dirpath=folder, filename="{step}", save_top_k=-1, **saved)
    _, logged = fit(module, data, folder, callbacks=[saver], **settings)
    first = min(folder.glob("step=*.ckpt"), key=lambda path: int(path.stem.split("=")[1].split("-")[0]))
    again, data = parts_of("sft", base, folder)
    data.val = demonstrations(folder / "v.jsonl", 3, seed=5)
    logger = pl.loggers.TensorBoardLogger(folder, name="", version="again")
    quiet_trainer(logger=logger, **settings).fit(again, datamodule=data, ckpt_path=first)
    for name in ("loss", "token_acc", "tokens", "lr"):
        got = scalars(folder / "again", f"sft/train/{name}")
        assert [step for step, _ in got] == steps
        assert got == [line for line in logged[name] if line[0] >= steps[0]]


def test_sums_of_another_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first takes all of them; the others have the same names, or their sums would not fit together."""
    states = []
    for loss in (2.0, 4.0):
        running = RunningMetrics()
        running.add(torch.tensor(3), {"loss": torch.tensor(loss)})
        running.end_step(6, 0.5)
        states.append(running.state_dict())
    one = RunningMetrics()
    one.load_state_dict(states, torch.device("cpu"))
    assert (one.steps, one.counted, one.learning_rate) == (1, 6, 0.5)
    assert one.means() == {"loss": 3.0}
    monkeypatch.setattr("lit_instruct.modules.train_log.rank", lambda: 1)
    other = RunningMetrics()
    other.load_state_dict(states, torch.device("cpu"))
    assert other.means() == {"loss": 0.0}
    assert other.steps == 0


def test_a_run_that_broke_off_leaves_nothing_to_the_next(base: str, folder: Path) -> None:
    module, data = parts_of("sft", base, folder)

    class Break(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise RuntimeError("broken off")

    with pytest.raises(RuntimeError, match="broken off"):
        fit(module, data, folder, log_every_n_steps=50, callbacks=[Break()])
    _, logged = fit(module, data, folder / "second", log_every_n_steps=50)
    data.setup()
    assert_close([logged["loss"][0][1]], [expected_of(module, list(data.train_dataloader()))["loss"]])


def test_the_trainers_log_is_called_once_a_window(base: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A log call costs as much as a small step."""
    module, data = parts_of("sft", base, folder)
    calls: list[str] = []
    log = SFTModule.log
    monkeypatch.setattr(SFTModule, "log", lambda self, name, *a, **k: calls.append(name) or log(self, name, *a, **k))
    fit(module, data, folder, log_every_n_steps=3)
    assert len(calls) == 3 * 5


def test_running_means_are_weighted_and_start_again() -> None:
    running = RunningMetrics()
    assert running.means() == {}
    for weight, loss in ((3, 2.0), (1, 6.0), (0, 5.0)):
        running.add(torch.tensor(weight), {"loss": torch.tensor(loss), "acc": torch.tensor(loss / 8)})
    running.add(torch.tensor(0), {"other": torch.tensor(7.0)})
    running.end_step(4, 0.5)
    assert (running.steps, running.counted, running.learning_rate) == (1, 4, 0.5)
    assert running.means() == {"loss": 3.0, "acc": 0.375, "other": 0.0}
    assert (running.steps, running.counted) == (0, 0)
    assert running.means() == {}
