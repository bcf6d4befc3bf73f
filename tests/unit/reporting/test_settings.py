"""What differs between the settings of runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from lit_instruct.reporting.settings import Difference, as_yaml, differences, flatten, read_settings
from lit_instruct.types import DataError
from tests.unit.reporting.places import write_config

MIXING = {"class_path": "lit_instruct.callbacks.PtxMixing", "init_args": {"coef": 0.3}}
HEALTH = {"class_path": "lit_instruct.callbacks.Health", "init_args": {"action": "warn"}}


def test_only_what_differs_the_model_first() -> None:
    first = {"seed_everything": 1, "trainer": {"callbacks": [HEALTH]}, "data": {"val": 0.1}, "model": {"kl_coef": 0.02}}
    second = {"seed_everything": 2, "trainer": {"callbacks": [MIXING, HEALTH]}, "data": {"val": None}}
    second["model"] = {"kl_coef": 0.02, "episodes": 100}
    assert differences([first, second]) == [
        Difference("model.episodes", [None, "100"]),
        Difference("data.val", ["0.1", "null"]),
        Difference("seed_everything", ["1", "2"]),
        Difference("trainer.callbacks.PtxMixing", [None, "lit_instruct.callbacks.PtxMixing"]),
        Difference("trainer.callbacks.PtxMixing.coef", [None, "0.3"]),
    ]


def test_one_run_differs_from_nothing() -> None:
    assert differences([{"model": {"kl_coef": 0.02}}]) == []
    assert differences([]) == []


def test_names_of_settings() -> None:
    settings = {
        "trainer": {"callbacks": [HEALTH, MIXING, HEALTH], "devices": [0, 1], "plugins": [], "logger": True},
        "model": {"base": {"hidden_size": 16}, "peft": None, "text": "a: b", "empty": {}},
    }
    assert flatten(settings) == {
        "trainer.callbacks.Health": "lit_instruct.callbacks.Health",
        "trainer.callbacks.Health.action": "warn",
        "trainer.callbacks.PtxMixing": "lit_instruct.callbacks.PtxMixing",
        "trainer.callbacks.PtxMixing.coef": "0.3",
        "trainer.callbacks.Health 2": "lit_instruct.callbacks.Health",
        "trainer.callbacks.Health 2.action": "warn",
        "trainer.devices": "[0, 1]",
        "trainer.plugins": "[]",
        "trainer.logger": "true",
        "model.base.hidden_size": "16",
        "model.peft": "null",
        "model.text": "a: b",
    }


def test_a_saved_file_is_read_and_written_again(tmp_path: Path) -> None:
    settings = {"model": {"kl_coef": 0.02, "peft": None}, "data": {"prompts": "ä.jsonl"}}
    write_config(tmp_path, settings)
    assert read_settings(tmp_path) == settings
    assert as_yaml(settings) == "model:\n  kl_coef: 0.02\n  peft: null\ndata:\n  prompts: ä.jsonl\n"


def test_no_file_is_no_settings(tmp_path: Path) -> None:
    assert read_settings(tmp_path) == {}
    (tmp_path / "config.yaml").touch()
    assert read_settings(tmp_path) == {}


@pytest.mark.parametrize("text", ["model: [", "- 1\n", "model: !!python/object/apply:os.getcwd []\n"])
def test_a_damaged_file_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"config\.yaml: "):
        read_settings(tmp_path)
