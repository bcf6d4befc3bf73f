"""SIGTERM in each phase of a run: it saves between two steps, says where, ends with 143, and loses nothing."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.faults.chains import Kill, assert_same, run_to_the_end, said, start_until
from tests.faults.stages import command, write_inputs

MOMENTS = [
    Kill("sanity", 0, 0.0),
    Kill("update", 3, 0.005),  # two micro-batches a step: it must not be saved after the first
    Kill("save", 4, 0.03),
    Kill("validation", 5, 0.005),
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.slow  # nine starts; the default suite tells PPO to end in tests/integration/test_signals.py
def test_told_to_end_in_each_phase(inputs: Path, tmp_path: Path) -> None:
    words = command("sft", inputs, tmp_path, steps=16, every=4, slow_disk_s=0.02)
    run_to_the_end(words, tmp_path / "undisturbed", forked=True)
    for moment in MOMENTS:
        where = tmp_path / moment.phase
        process = start_until(moment, words, where, forked=True)
        process.tell(signal.SIGTERM)
        assert process.wait(120.0) == 143, (moment, said(where))
        assert "Traceback" not in said(where)
        if (where / "runs" / "interrupted.ckpt").exists():
            assert "SIGTERM: saved between two steps. Go on with --ckpt_path" in said(where)
            assert "runs/interrupted.ckpt" in said(where)
        else:
            assert moment.phase == "sanity"  # nothing has been trained
            assert "SIGTERM: ended without saving" in said(where)
        run_to_the_end(words, where, forked=True)
        assert_same(where, tmp_path / "undisturbed")
