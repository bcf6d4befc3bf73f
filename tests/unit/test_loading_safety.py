"""Nothing that is loaded runs code, unless its owner was asked: pickles, models with code of their own, data sets."""

from __future__ import annotations

import ast
import json
import logging
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_instruct import SFTModule
from lit_instruct.data.records import read_prompts
from lit_instruct.models.backbone import load_language_model
from lit_instruct.models.classifier import load_classifier
from lit_instruct.models.handover import KEY, read_handover
from lit_instruct.models.scalar_head import ScalarModel
from lit_instruct.models.tokenizer import load_tokenizer
from lit_instruct.types import ConfigError, DataError
from tests.helpers.tiny import save_model, save_stage, weights

PACKAGE = Path(__file__).parents[2] / "lit_instruct"


class _RunsCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("it-ran",)


@lru_cache
def _calls() -> list[tuple[str, str, ast.Call]]:
    """Where something is called, what, and the call."""
    calls = []
    for path in sorted([*PACKAGE.rglob("*.py"), *(PACKAGE / "callbacks").resolve().rglob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                calls.append((f"{path.name}:{node.lineno}", ast.unparse(node.func), node))
    return calls


def _keyword(call: ast.Call, name: str) -> ast.expr | None:
    return next((keyword.value for keyword in call.keywords if keyword.arg == name), None)


def test_every_file_of_torch_is_read_as_data() -> None:
    found = [(place, _keyword(call, "weights_only")) for place, name, call in _calls() if name.endswith("torch.load")]
    found += [
        (place, _keyword(call, "weights_only")) for place, name, call in _calls() if name == "super().load_checkpoint"
    ]
    assert len(found) > 3
    assert [place for place, value in found if not (isinstance(value, ast.Constant) and value.value is True)] == []


def test_every_model_is_asked_for_without_its_own_code() -> None:
    """Left out, transformers would ask whoever sits at the terminal, and wait."""
    found = [
        (place, _keyword(call, "trust_remote_code"))
        for place, name, call in _calls()
        if name.startswith("Auto") and name.endswith(".from_pretrained")
    ]
    assert len(found) > 8
    asked = [place.partition(":")[0] for place, value in found if not isinstance(value, ast.Constant)]
    assert asked == ["classifier.py", "classifier.py"]  # by a setting of its own
    assert all(value.value is False for _, value in found if isinstance(value, ast.Constant))


def test_nothing_else_evaluates_or_unpickles() -> None:
    forbidden = {
        "eval",
        "exec",
        "pickle.load",
        "pickle.loads",
        "yaml.load",
        "yaml.unsafe_load",
        "joblib.load",
        "np.load",
    }
    assert [(place, name) for place, name, _ in _calls() if name in forbidden] == []


def test_pickled_weights_run_nothing(folder: Path) -> None:
    save_model(folder / "base")
    (folder / "base/model.safetensors").unlink()
    torch.save({"lm_head.weight": _RunsCode()}, folder / "base/pytorch_model.bin")
    for load in (load_language_model, ScalarModel.from_base):
        with pytest.raises(ConfigError, match=r"a pickle that holds more than tensors"):
            load("base")
    assert not (folder / "it-ran").exists()


def test_safetensors_are_preferred(folder: Path) -> None:
    save_model(folder / "base")
    model = AutoModelForCausalLM.from_pretrained("base")
    torch.save(
        {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}, "base/pytorch_model.bin"
    )
    assert torch.equal(weights(load_language_model("base")), weights(model))
    (folder / "base/model.safetensors").unlink()
    assert not weights(load_language_model("base")).any()  # sound ones are still taken where there is no choice


def _brings_code(place: Path, kind: str) -> None:
    """A folder whose classes are in a file of its own, which leaves a trace when it is imported."""
    config = {"model_type": "foreign", "auto_map": {"AutoConfig": "code.Config", kind: "code.Model"}}
    (place / "config.json").write_text(json.dumps(config))
    source = (
        "import os\nfrom transformers import LlamaConfig, LlamaForSequenceClassification\n"
        f"os.makedirs({str(place.parent / 'it-ran')!r}, exist_ok=True)\n"
        "class Config(LlamaConfig):\n    model_type = 'foreign'\n"
        "class Model(LlamaForSequenceClassification):\n    config_class = Config\n"
    )
    (place / "code.py").write_text(source)


@pytest.mark.parametrize(
    "load",
    [load_language_model, ScalarModel.from_base, load_tokenizer, lambda place: load_classifier(place, dtype="float32")],
    ids=["language model", "reward model", "tokenizer", "classifier"],
)
def test_code_of_a_model_is_not_run_and_nobody_is_asked(
    folder: Path, load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    save_model(folder / "base")
    _brings_code(folder / "base", "AutoModelForCausalLM")
    fields = json.loads((folder / "base/tokenizer_config.json").read_text())
    fields["auto_map"] = {"AutoTokenizer": ["code.Slow", None]}
    fields["tokenizer_class"] = "Foreign"
    (folder / "base/tokenizer_config.json").write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match=r"it brings Python code of its own .* which is not run"):
        load("base")
    assert not (folder / "it-ran").exists()


def test_a_classifier_s_code_is_run_if_asked_for_and_said_aloud(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(folder / "modules"))
    save_model(folder / "base")
    _brings_code(folder / "base", "AutoModelForSequenceClassification")
    with pytest.raises(ConfigError, match="set trust_remote_code of ClassifierScorer to true"):
        load_classifier("base", dtype="float32")
    assert not (folder / "it-ran").exists()
    with caplog.at_level(logging.WARNING), pytest.raises(ConfigError):  # it is no useful one
        load_classifier("base", dtype="float32", trust_remote_code=True)
    assert "Python code that 'base' brings is run" in caplog.text
    assert (folder / "it-ran").exists()


def test_a_checkpoint_that_runs_code_is_refused(folder: Path) -> None:
    torch.save({KEY: {"stage": "sft"}, "hyper_parameters": {"optimizer": _RunsCode()}}, folder / "x.ckpt")
    for read in (read_handover, load_tokenizer, SFTModule.load_from_checkpoint):
        with pytest.raises(ConfigError, match="it holds Python objects"):
            read("x.ckpt")
    assert not (folder / "it-ran").exists()


def test_what_a_checkpoint_says_of_classes_is_not_imported(folder: Path) -> None:
    """Settings are data: a class path among them stays a text."""
    save_model(folder / "base")
    save_stage(SFTModule("base"), folder / "sft.ckpt")
    (folder / "planted.py").write_text("import os\nos.mkdir('it-ran')\n")
    checkpoint = torch.load("sft.ckpt", weights_only=True)
    checkpoint["hyper_parameters"]["_class_path"] = checkpoint["hyper_parameters"]["optimizer"] = "planted.Thing"
    checkpoint["hyper_parameters"]["_instantiator"] = "planted.make"
    torch.save(checkpoint, "sft.ckpt")
    load_language_model("sft.ckpt")
    assert not (folder / "it-ran").exists()


def test_a_script_in_a_data_folder_is_not_run(folder: Path) -> None:
    (folder / "data").mkdir()
    (folder / "data/data.py").write_text("import os\nos.mkdir('it-ran')\n")
    with pytest.raises(DataError):
        read_prompts("data")
    assert not (folder / "it-ran").exists()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path
