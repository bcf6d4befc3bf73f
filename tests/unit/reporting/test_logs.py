"""Logs are read as they were written: all values, the last of each step, and what a crash left whole."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.loggers import CSVLogger

from lit_instruct.reporting.logs import Session, has_log, read_logs
from lit_instruct.types import DataError
from tests.helpers.numbers import assert_close
from tests.unit.reporting.places import write_events


def test_every_value_and_text_is_read(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=50).tolist()
    text = "| a | <b> |\nß\u2028"
    write_events(tmp_path, {"rm/train/acc": dict(enumerate(values)), "rm/val/acc": {7: 0.25}}, {"health": {3: text}})
    log = read_logs([tmp_path])
    assert list(log.curves) == ["rm/train/acc", "rm/val/acc"]
    assert list(log.curves["rm/train/acc"]) == list(range(50))
    assert_close(list(log.curves["rm/train/acc"].values()), values)
    assert log.curves["rm/val/acc"] == {7: 0.25}
    assert log.texts == {"health": {3: text}}


def test_times_are_those_of_the_events(tmp_path: Path) -> None:
    write_events(tmp_path, {"rm/train/acc": dict.fromkeys(range(11), 0.5)}, start=1000.0)
    (session,) = read_logs([tmp_path]).sessions
    assert session.started == 1000.0
    assert session.seconds >= 10.0  # the file's own first event has the time of writing


def test_a_resumed_run_has_the_last_value_of_a_step(tmp_path: Path) -> None:
    write_events(tmp_path, {"ppo/train/objective/kl": {1: 1.0, 2: 2.0, 3: 3.0}})
    write_events(tmp_path, {"ppo/train/objective/kl": {3: 30.0, 2: 20.0, 0: 0.0}})
    log = read_logs([tmp_path])
    assert list(log.curves["ppo/train/objective/kl"].items()) == [(0, 0.0), (1, 1.0), (2, 20.0), (3, 30.0)]
    assert len(log.sessions) == 2


def test_so_it_is_over_several_folders(tmp_path: Path) -> None:
    write_events(tmp_path / "b", {"rm/train/acc": {1: 1.0, 2: 2.0}})
    write_events(tmp_path / "a", {"rm/train/acc": {2: 20.0, 3: 30.0}})
    assert read_logs([tmp_path / "b", tmp_path / "a"]).curves == {"rm/train/acc": {1: 1.0, 2: 20.0, 3: 30.0}}


def whole_records(data: bytes) -> int:
    """Each is its length, a check sum of 4 bytes, that many bytes, and a check sum again."""
    count = place = 0
    while place + 12 <= len(data):
        place += 12 + struct.unpack_from("<Q", data, place)[0] + 4
        count += place <= len(data)
    return count


@settings(max_examples=25, deadline=None)
@given(share=st.floats(0.0, 1.0))
def test_a_file_that_was_cut_off_gives_what_is_whole(share: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("cut")
    whole = write_events(folder / "whole", {"rm/train/acc": {step: float(step) for step in range(20)}}).read_bytes()
    cut = whole[: round(share * len(whole))]
    (folder / "cut").mkdir()
    (folder / "cut" / "events.out.tfevents.1.x").write_bytes(cut)
    steps = list(read_logs([folder / "cut"]).curves.get("rm/train/acc", {}))
    assert steps == list(range(len(steps)))
    assert len(steps) == max(whole_records(cut) - 1, 0)  # the first one is about the file


def test_a_damaged_record_ends_the_file_and_not_the_report(tmp_path: Path) -> None:
    path = write_events(tmp_path, {"rm/train/acc": {step: float(step) for step in range(20)}})
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    steps = list(read_logs([tmp_path]).curves["rm/train/acc"])
    assert 5 < len(steps) < 15
    assert steps == list(range(len(steps)))


def test_a_table_of_csv_logger(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    logger.log_metrics({"sft/train/loss": 2.5}, step=10)
    logger.log_metrics({"sft/train/loss": 1.5, "sft/val/loss": 1.75}, step=20)
    logger.log_metrics({"sft/val/ppl": float("nan")}, step=20)
    logger.save()
    assert has_log(tmp_path)
    log = read_logs([tmp_path])
    assert log.curves["sft/train/loss"] == {10: 2.5, 20: 1.5}
    assert log.curves["sft/val/loss"] == {20: 1.75}
    assert np.isnan(log.curves["sft/val/ppl"][20])
    assert log.sessions == []


def test_the_last_line_of_a_table_may_be_cut_off(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("sft/train/loss,step\n2.5,10\n1.2345,2", encoding="utf-8")
    assert read_logs([tmp_path]).curves == {"sft/train/loss": {10: 2.5}}
    (tmp_path / "metrics.csv").write_text("", encoding="utf-8")
    assert read_logs([tmp_path]).curves == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("loss,step\n1.0,1\nlow,2\n", r"metrics\.csv, line 3, loss: got 'low'; need a number"),
        ("loss,step\n1.0,\n", r"metrics\.csv, line 2, step: got ''; need a number"),
        ("loss,epoch\n1.0,1\n", r"metrics\.csv, line 1: got the columns loss, epoch; need a column step"),
    ],
)
def test_another_table_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_logs([tmp_path])


def test_nothing_is_not_a_log(tmp_path: Path) -> None:
    assert not has_log(tmp_path)
    assert read_logs([tmp_path]) == ({}, {}, [])
    assert Session(1.0, 2.0).seconds == 2.0
