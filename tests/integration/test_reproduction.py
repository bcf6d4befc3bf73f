"""The paper's findings: the page that is committed, and the fast form of what wrote it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.reproduce_paper.page import write_page
from scripts.reproduce_paper.parts import PARTS

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "reproduction"


def test_the_page_says_what_the_results_say(tmp_path: Path) -> None:
    shutil.copytree(RESULTS, tmp_path / "reproduction")
    write_page(tmp_path / "reproduction", tmp_path / "page.md")
    written = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert written == (ROOT / "docs" / "reproduction.md").read_text(encoding="utf-8")
    assert {path.stem for path in RESULTS.glob("*.json")} == set(PARTS)
    assert sum(path.stat().st_size for path in RESULTS.glob("*.svg")) < 200_000


@pytest.mark.slow  # a quarter of an hour on two idle cores
def test_the_fast_form_finds_the_main_things(tmp_path: Path) -> None:
    command = [sys.executable, "scripts/reproduce_paper", "--fast", "--work", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = {
        finding["claim"]: finding
        for part in PARTS
        for finding in json.loads((tmp_path / "results" / f"{part}.json").read_text(encoding="utf-8"))["findings"]
    }
    wanted = (
        "A small aligned model is preferred to a base model",
        "SFT is preferred to the base model at every size",
        "PPO is preferred to SFT at every size",
        "PPO-ptx is preferred to SFT at every size",
        "Alignment raises the loss on pretraining text",
        "Pretraining gradients take away at least half of that rise",
        "The preference holds on prompts of owners that nobody trained on",
    )
    for beginning in wanted:
        (finding,) = (each for claim, each in found.items() if claim.startswith(beginning))
        assert finding["reproduced"], finding
    assert (tmp_path / "reproduction.md").read_text(encoding="utf-8").startswith("# The paper's findings")
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)  # nothing is left to do
    assert again.returncode == 0
    assert "jobs, " not in again.stdout
