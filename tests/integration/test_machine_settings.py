"""Settings of the machine on the command line: when they hold, what is said, and what is kept."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from transformers import PreTrainedModel

from lit_instruct.cli import main
from lit_instruct.modules import machine, sft
from lit_instruct.modules.machine import usable_cores
from tests.helpers.tiny import demonstrations, save_model

SFT = ["sft", "fit", "--config", "sft/default.yaml", "--data.batch_size", "8", "--trainer.max_epochs", "1"]
SOURCES = ["--model.base", "base", "--data.demonstrations", "d.jsonl"]
CPU = ["--trainer.accelerator", "cpu", "--trainer.devices", "1"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "base")
    demonstrations(tmp_path / "d.jsonl", 16)
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    monkeypatch.setattr(machine, "_GIVEN", {})
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # what a run sets is taken back
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


def reports(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "fp32 matrix products" in record.getMessage()]


def test_they_hold_before_the_model_is_built(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, load = [], sft.load_language_model

    def watched(base: str) -> PreTrainedModel:
        seen.append((torch.get_num_threads(), torch.get_float32_matmul_precision()))
        return load(base)

    monkeypatch.setattr(sft, "load_language_model", watched)
    caplog.set_level(logging.INFO)
    threads = usable_cores() + 1  # what nobody would take by himself
    main([*SFT, *SOURCES, *CPU, "--machine.threads", str(threads), "--machine.float32_matmul", "high"])
    assert seen == [(threads, "high")]
    (line,) = reports(caplog)
    assert line.startswith(f"threads {threads} of ")
    assert "(machine.threads); fp32 matrix products: high (error " in line
    (kept,) = Path("runs/sft").rglob("config.yaml")
    assert yaml.safe_load(kept.read_text())["machine"] == {"threads": threads, "float32_matmul": "high"}


def test_by_themselves(caplog: pytest.LogCaptureFixture) -> None:
    torch.set_float32_matmul_precision("medium")  # as an earlier run in the same process may leave it
    caplog.set_level(logging.INFO)
    main([*SFT, *SOURCES, *CPU])
    (line,) = reports(caplog)
    assert line.startswith(f"threads {usable_cores()} of {usable_cores()} core")
    assert "; fp32 matrix products: highest (error " in line
    assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_num_threads() == usable_cores()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("threads", "0", "sft: machine.threads: got 0; need 1 or more. Do: leave it out to use every core."),
        ("float32_matmul", "fast", "--machine.float32_matmul: got 'fast'; need one of highest, high, medium."),
    ],
)
def test_what_cannot_be(option: str, value: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*SFT, *SOURCES, *CPU, f"--machine.{option}", value])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_the_help_explains_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["sft", "fit", "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "--machine.threads THREADS" in printed
    assert "--machine.float32_matmul {highest,high,medium}" in printed
    assert "MachineReport" not in printed  # the stage's own callback is nothing to choose
