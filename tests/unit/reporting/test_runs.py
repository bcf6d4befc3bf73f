"""Which folders are runs, what they are called, and what belongs together."""

from __future__ import annotations

from pathlib import Path

import pytest

from lit_instruct.reporting.runs import MOST_RUNS, find
from lit_instruct.types import ConfigError
from tests.helpers.numbers import assert_close
from tests.unit.reporting.places import ppo_curves, write_config, write_evaluation, write_events

SFT = {"sft/train/loss": {10: 2.0, 20: 1.5}}
RM = {"rm/train/acc": {10: 0.5, 20: 0.6}}


def names(*given: str | Path) -> list[tuple[str, str]]:
    return [(run.name, run.stage) for run in find(given).runs]


def test_a_folder_above_several_runs_gives_all_by_stage(tmp_path: Path) -> None:
    write_events(tmp_path / "a" / "logs", ppo_curves())
    write_events(tmp_path / "rm" / "logs", RM)
    write_events(tmp_path / "sft" / "lightning_logs" / "version_0", SFT)
    write_events(tmp_path / "base" / "logs", SFT)
    write_config(tmp_path / "base" / "logs", {"data": {"text": "corpus.jsonl"}})
    assert names(tmp_path) == [("base", "pretrain"), ("sft", "sft"), ("rm", "rm"), ("a", "ppo")]


def test_any_folder_of_a_run_will_do(tmp_path: Path) -> None:
    place = tmp_path / "sft" / "lightning_logs" / "version_3"
    path = write_events(place, SFT)
    for given in (tmp_path / "sft", place.parent, place, path):
        assert names(given) == [("sft", "sft")]
    assert names(tmp_path / "sft", place) == [("sft", "sft")]  # once


def test_names_that_are_given_and_names_that_would_be_the_same(tmp_path: Path) -> None:
    first, second = tmp_path / "a" / "ppo", tmp_path / "b" / "ppo"
    write_events(first / "logs", ppo_curves())
    write_events(second / "logs", ppo_curves())
    assert names(f"small={first}", f"large={second}") == [("small", "ppo"), ("large", "ppo")]
    assert names(first, second) == [(str(first / "logs"), "ppo"), (str(second / "logs"), "ppo")]
    assert names(f"mine={tmp_path}") == [("mine/a/ppo", "ppo"), ("mine/b/ppo", "ppo")]
    odd = tmp_path / "coef=0.1"
    write_events(odd, SFT)
    assert names(odd) == [("coef=0.1", "sft")]


def test_the_newest_version_counts(tmp_path: Path) -> None:
    logs = tmp_path / "rm" / "lightning_logs"
    for version, value in ((2, 0.2), (9, 0.9), (10, 1.0)):
        write_events(logs / f"version_{version}", {"rm/train/acc": {1: value}})
    (run,) = find([tmp_path / "rm"]).runs
    assert run.curves == {"rm/train/acc": {1: 1.0}}
    assert [folder.name for folder in run.left_out] == ["version_2", "version_9"]
    (older,) = find([logs / "version_9"]).runs
    assert_close(older.curves["rm/train/acc"][1], 0.9)
    assert older.left_out == []


def test_with_what_it_continues(tmp_path: Path) -> None:
    logs = tmp_path / "rm" / "lightning_logs"
    for version, ckpt in ((0, None), (1, None), (2, "x.ckpt"), (3, "y.ckpt")):
        write_events(logs / f"version_{version}", {"rm/train/acc": {version: 1.0, version + 1: 0.0}})
        write_config(logs / f"version_{version}", {"ckpt_path": ckpt, "seed_everything": version})
    (run,) = find([tmp_path]).runs
    assert run.curves == {"rm/train/acc": {1: 1.0, 2: 1.0, 3: 1.0, 4: 0.0}}
    assert len(run.sessions) == 3
    assert run.settings["seed_everything"] == 3
    assert [folder.name for folder in run.left_out] == ["version_0"]


def test_a_later_validation_does_not_hide_the_training(tmp_path: Path) -> None:
    logs = tmp_path / "rm" / "lightning_logs"
    write_events(logs / "version_0", RM)
    write_events(logs / "version_1", {"rm/val/acc": {0: 0.5}})
    (run,) = find([tmp_path]).runs
    assert list(run.curves) == ["rm/train/acc"]
    assert [folder.name for folder in run.left_out] == ["version_1"]


def test_a_validation_alone_is_a_run_too(tmp_path: Path) -> None:
    write_events(tmp_path / "version_0", {"rm/val/acc": {0: 0.5}})
    (run,) = find([tmp_path]).runs
    assert run.curves == {"rm/val/acc": {0: 0.5}}


def test_evaluations_stand_beside_runs(tmp_path: Path) -> None:
    write_events(tmp_path / "ppo" / "logs", ppo_curves())
    write_evaluation(tmp_path / "judged", {"sft": {}, "ppo": {}})
    found = find([tmp_path])
    assert [run.name for run in found.runs] == ["ppo"]
    assert [(evaluation.name, list(evaluation.models)) for evaluation in found.evaluations] == [
        ("judged", ["sft", "ppo"])
    ]


def test_a_results_json_of_others_is_none(tmp_path: Path) -> None:
    write_events(tmp_path, SFT)
    (tmp_path / "results.json").write_text('{"accuracy": 1}', encoding="utf-8")
    assert find([tmp_path]).evaluations == []


def test_what_cannot_be_reported(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no folder '.*gone'\. Do: "):
        find([tmp_path / "gone"])
    with pytest.raises(ConfigError, match=r"there is no folder 'nowhere'\. Do: "):
        find(["x=nowhere"])
    with pytest.raises(
        ConfigError, match=r"found nothing in .*events\.out\.tfevents.*metrics\.csv.*results\.json.*Do: "
    ):
        find([tmp_path])
    write_events(tmp_path / "other", {"loss": {1: 1.0}})
    with pytest.raises(ConfigError, match=r"no metrics of a stage.*Do: "):
        find([tmp_path / "other"])
    for number in range(MOST_RUNS + 1):
        (tmp_path / "many" / str(number)).mkdir(parents=True)
        (tmp_path / "many" / str(number) / "metrics.csv").write_text("sft/train/loss,step\n1,1\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"got {MOST_RUNS + 1} runs; need at most {MOST_RUNS}.*Do: "):
        find([tmp_path / "many"])
