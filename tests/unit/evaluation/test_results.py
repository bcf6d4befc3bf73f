"""Files and the table that an evaluation ends with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from lit_instruct.evaluation.results import table, write_pairs, write_samples
from tests.unit.evaluation.models import asked, written

PROMPTS = [f"w{number}" for number in range(24)]
OURS = ["w1 w2"] * 23 + ["w4"]
THEIRS = ["w3"] * 23 + ["w4"]


def rows_of(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_samples_stand_prompt_by_prompt(tmp_path: Path) -> None:
    sampled = {"ours": written(PROMPTS[:2], OURS[:2]), "theirs": written(PROMPTS[:2], THEIRS[:2])}
    write_samples(
        tmp_path,
        asked(PROMPTS[:2], owner=["ann", "bob"]),
        sampled,
        {"ours": np.array([0.5, 1.0]), "theirs": np.array([0.0, 2.0])},
    )
    rows = rows_of(tmp_path / "samples.jsonl")
    assert rows[1] == {"model": "theirs", "prompt": "w0", "response": "w3", "owner": "ann", "score": 0.0}
    assert [(row["model"], row["owner"], row["score"]) for row in rows[2:]] == [
        ("ours", "bob", 1.0),
        ("theirs", "bob", 2.0),
    ]


def test_no_owner_and_no_score_are_null(tmp_path: Path) -> None:
    write_samples(tmp_path, asked(PROMPTS[:1]), {"ours": written(PROMPTS[:1], OURS[:1])}, {})
    (row,) = rows_of(tmp_path / "samples.jsonl")
    assert (row["owner"], row["score"]) == (None, None)


def test_pairs_do_not_say_who_wrote_what(tmp_path: Path) -> None:
    sampled = {"theirs": written(PROMPTS, THEIRS), "ours": written(PROMPTS, OURS), "twin": written(PROMPTS, OURS)}
    write_pairs(tmp_path, sampled, "theirs", seed=1)
    rows = rows_of(tmp_path / "pairs.jsonl")
    assert [row["prompt"] for row in rows] == PROMPTS[:23]  # equal responses need no judge, equal pairs only one
    assert {(row["first"], row["second"]) for row in rows} == {("w1 w2", "w3"), ("w3", "w1 w2")}
    assert all(row["choice"] is None for row in rows)
    first = (tmp_path / "pairs.jsonl").read_bytes()
    write_pairs(tmp_path, sampled, "theirs", seed=1)
    assert (tmp_path / "pairs.jsonl").read_bytes() == first


def test_the_table_has_columns_for_what_was_measured() -> None:
    best = [{"n": 4, "kl": 0.636, "score": 1.5, "low": 1.25, "high": 1.75}]
    toxicity = {"score": {"respectful": {"mean": 0.1, "low": 0.0, "high": 0.25, "n": 8}}}
    models = {
        "sft": {"kl": 0.0, "mean_length": 31.4},
        "ppo": {
            "kl": 3.456,
            "mean_length": 40.0,
            "win_rate": {"rate": 0.75, "low": 0.7, "high": 0.8, "n": 40},
            "win_rate_matched_length": None,
            "best_of_n": best,
            "protocols": {"toxicity": toxicity},
        },
    }
    shown = table({"baseline": "sft", "models": models})
    lines = shown.splitlines()
    assert lines[0].endswith(" best of 4 (KL 0.64)")
    assert "toxicity score (respectful)" in lines[0]
    assert "75.0% [70.0%, 80.0%]" in lines[2]
    assert lines[2].split()[0] == "ppo"
    for missing in ("matched", "pretraining", "bits", "finished"):
        assert missing not in shown
    assert all(len(line) <= 120 for line in lines)
