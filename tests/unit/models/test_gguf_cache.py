"""GGUF files converted once: the same model and tokenizer, whatever happens to the cache."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lit_instruct.models import gguf_cache
from lit_instruct.models.backbone import load_language_model
from lit_instruct.models.gguf_cache import cache_folder, gguf_source
from lit_instruct.models.tokenizer import load_tokenizer
from lit_instruct.types import ConfigError
from tests.unit.models.networks import tiny_model
from tests.unit.models.test_backbone import write_gguf

pytest.importorskip("accelerate", reason="the extra gguf is not installed")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the test's own."""
    monkeypatch.setenv("LIT_INSTRUCT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_model("qwen2"))
    return path


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which parts were taken out of a GGUF file."""
    seen: list[str] = []
    load = gguf_cache._load

    def counted(path: Path, part: Any) -> Any:
        seen.append(part)
        return load(path, part)

    monkeypatch.setattr(gguf_cache, "_load", counted)
    return seen


def as_transformers_loads_it(file: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)


def assert_bitwise_same(one: PreTrainedModel, other: PreTrainedModel) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype == torch.float32
        assert torch.equal(tensor, second[name]), name


def left(root: Path) -> list[str]:
    """What lies in the cache beside whole folders and lock files."""
    whole = (path for path in root.iterdir() if path.suffix != ".lock")
    return [path.name for path in whole if not path.name.endswith(("-model", "-tokenizer"))]


# -- the same model


def test_the_model_is_converted_once_and_stays_bitwise_the_same(
    file: Path, root: Path, conversions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    directly = as_transformers_loads_it(file)
    first, second = load_language_model(file), load_language_model(file)
    assert conversions == ["model"]
    (folder,) = root.glob("tiny-*-model")
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".json", ".safetensors"]
    monkeypatch.setenv("LIT_INSTRUCT_CACHE", "")
    without_cache = load_language_model(file)
    for model in (first, second, without_cache):
        assert_bitwise_same(model, directly)
        assert model.training
        ours, theirs = model.config.to_dict(), directly.config.to_dict()
        for config in (ours, theirs):
            for name in ("_name_or_path", "architectures", "quantization_config"):
                config.pop(name, None)
        assert ours == theirs
        assert model.generation_config.to_dict() == directly.generation_config.to_dict()
    assert list(root.glob("tiny-*-model")) == [folder]  # nothing was written where nothing is kept


def test_so_is_the_tokenizer_and_by_itself(file: Path, root: Path, conversions: list[str]) -> None:
    directly = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    first, second = load_tokenizer(file), load_tokenizer(file)
    assert conversions == ["tokenizer"]
    assert not list(root.glob("*-model"))  # whoever wants the tokenizer does not wait for the weights
    for tokenizer in (first, second):
        assert tokenizer("abca")["input_ids"] == directly("abca")["input_ids"]
        assert tokenizer.get_vocab() == directly.get_vocab()
        assert tokenizer.special_tokens_map == directly.special_tokens_map


def test_whoever_may_read_the_file_may_read_what_it_became(file: Path, root: Path) -> None:
    for mode in (0o644, 0o600):
        file.chmod(mode)
        shutil.rmtree(root, ignore_errors=True)
        folder, _ = gguf_source(file, "model")
        assert {path.stat().st_mode & 0o777 for path in Path(folder).iterdir()} == {mode}


# -- the right one


@pytest.mark.parametrize("change", ["weights", "time"])
def test_a_changed_file_is_converted_again(file: Path, root: Path, conversions: list[str], change: str) -> None:
    before, state = load_language_model(file), file.stat()
    if change == "weights":  # of the same size and, as a copying program may set it, of the same time
        write_gguf(file, tiny_model("qwen2", seed=1))
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
        assert file.stat().st_size == state.st_size
        assert file.stat().st_mtime_ns == state.st_mtime_ns
    else:
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns + 1_000_000_000))
    after = load_language_model(file)
    assert conversions == ["model", "model"]
    assert_bitwise_same(after, as_transformers_loads_it(file))
    same = all(torch.equal(tensor, after.state_dict()[name]) for name, tensor in before.state_dict().items())
    assert same == (change == "time")


def test_another_version_of_transformers_converts_for_itself(
    file: Path, root: Path, conversions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = gguf_source(file, "tokenizer")
    monkeypatch.setattr(gguf_cache.transformers, "__version__", "5.99.0")
    second, _ = gguf_source(file, "tokenizer")
    assert first != second
    assert conversions == ["tokenizer"] * 2


# -- what can go wrong


def test_a_cache_that_cannot_be_made(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "occupied").write_text("a file where the folder would be")
    monkeypatch.setenv("LIT_INSTRUCT_CACHE", str(tmp_path / "occupied"))
    model = load_language_model(file)
    assert_bitwise_same(model, as_transformers_loads_it(file))
    (message,) = [record.getMessage() for record in caplog.records if record.name == gguf_cache.__name__]
    assert str(tmp_path / "occupied" / "gguf") in message
    assert "Set LIT_INSTRUCT_CACHE" in message
    model.save_pretrained(tmp_path / "folder")  # a quantised model would refuse


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Writing more than that into one file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_room_for_the_weights(file: Path, root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with files_of_at_most(5000):
        model = load_language_model(file)
    assert_bitwise_same(model, as_transformers_loads_it(file))
    (message,) = [record.getMessage() for record in caplog.records if record.name == gguf_cache.__name__]
    assert str(root) in message
    assert not left(root)
    assert not list(root.glob("*-model"))
    caplog.clear()
    load_language_model(file)  # and with room again
    assert list(root.glob("*-model"))
    assert not caplog.records


KILLED = """
import os, signal, sys
from pathlib import Path
from lit_instruct.models import gguf_cache

class Half:
    def save_pretrained(self, folder):
        Path(folder).mkdir()
        (Path(folder) / "tokenizer.json").write_text('{"version": "1.0", "trunc')
        os.kill(os.getpid(), signal.SIGKILL)

gguf_cache._load = lambda path, part: Half()
gguf_cache.gguf_source(Path(sys.argv[1]), "tokenizer")
"""


def test_a_killed_process_leaves_nothing_half(file: Path, root: Path, conversions: list[str]) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, str(file)], timeout=120, cwd=Path(__file__).parents[3])
    assert killed.returncode == -signal.SIGKILL
    assert len(left(root)) == 1
    assert load_tokenizer(file)("abca")["input_ids"] == [4, 3, 1]
    assert conversions == ["tokenizer"]
    assert not left(root)


def test_several_at_once(file: Path, root: Path, conversions: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    load = gguf_cache._load

    def slowly(path: Path, part: Any) -> Any:
        time.sleep(0.5)  # long enough for the others to come to the lock
        return load(path, part)

    monkeypatch.setattr(gguf_cache, "_load", slowly)
    with ThreadPoolExecutor(4) as pool:  # each takes the lock with a file handle of its own, as processes do
        places = list(pool.map(lambda _: gguf_source(file, "model"), range(4)))
    assert conversions == ["model"]
    assert places == [(str(next(root.glob("*-model"))), {})] * 4


def test_a_damaged_file_leaves_nothing(tmp_path: Path, root: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF nonsense")
    with pytest.raises(ConfigError, match="no language model could be loaded"):
        load_language_model(path)
    with pytest.raises(ConfigError, match="no tokenizer could be loaded"):
        load_tokenizer(path)
    assert not left(root)
    assert not [path for path in root.iterdir() if path.is_dir()]
    assert not [record for record in caplog.records if record.name == gguf_cache.__name__]


def test_a_file_that_is_not_there_makes_no_cache(tmp_path: Path, root: Path) -> None:
    assert gguf_source(tmp_path / "none.gguf", "model") == (str(tmp_path), {"gguf_file": "none.gguf"})
    assert not root.exists()


# -- where it lies


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({}, "HOME/.cache/lit_instruct/gguf"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/lit_instruct/gguf"),
        ({"XDG_CACHE_HOME": "/x", "HF_HOME": "/h"}, "/h/lit_instruct/gguf"),
        ({"HF_HOME": "/h", "LIT_INSTRUCT_CACHE": "/l"}, "/l/gguf"),
        ({"LIT_INSTRUCT_CACHE": "~/l"}, "HOME/l/gguf"),
        ({"HF_HOME": "/h", "LIT_INSTRUCT_CACHE": ""}, None),
    ],
)
def test_the_folder(
    variables: dict[str, str], folder: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_CACHE_HOME", "HF_HOME", "LIT_INSTRUCT_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == (None if folder is None else Path(folder.replace("HOME", str(tmp_path))))
