"""Mistakes in configuration files and in settings of the Trainer, each by itself; see also test_errors_page."""

from __future__ import annotations

import errno
import itertools
import os
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lit_instruct.modules.parser_errors import plainly, why_not_made
from lit_instruct.modules.trainer_checks import ValidationInterval, check_trainer, made_by_lightning
from lit_instruct.planning.yaml_files import read_sections
from lit_instruct.types import ConfigError
from tests.helpers.tiny import quiet_trainer


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "which holds nothing"),
        (b"# nothing\n", "which holds nothing"),
        (b"- 1\n", "which holds a list"),
        (b"word\n", "which holds a single value"),
        (b"a:\n\tb: 1\n", "line 2 which is no YAML"),
        (b"a: [1\n", "which is no YAML"),
        (b"a: 1\nb: 2\na: 3\n", "line 3 with the key 'a', which stands in line 1 already"),
        (b"a:\n  b: {c: 1, d: {e: 1, e: 2}}\n", "line 2 with the key 'e', which stands in line 2 already"),
        (b"a: caf\xe9\n", "line 1 with the byte 0xe9, which is no UTF-8"),
        (b"a: 1\nb: \xff\n", "line 2 with the byte 0xff"),
        (b"a: \x00\n", "which is no YAML"),
        (b"a: !!python/object/apply:os.getcwd []\n", "which is no plain YAML"),
        (b"a: !mine 1\n", "which is no plain YAML"),
        (b"a: 2001-99-99\n", "a value that cannot be read"),
        (b"a: !!int x\n", "a value that cannot be read"),
        (b"a: *b\n", "which is no YAML"),
        (b"a: &a [*a]\n", "an alias inside of what it stands for"),
        (b"? [1]\n: 2\n", "a key that is no word"),
        (b"{a: " + b"[" * 900_000, "nested too deeply"),
        (b"a: " + b"- " * 5000, "which is no YAML"),
        (b"- " * 5000, "nested too deeply"),
        (b"a: 1\n" + b"#" * 1_000_000, "of more than 1,000,000 bytes"),
        (b"a: 1\n---\nb: 2\n", "which is no YAML"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_sections(str(path))
    told = str(caught.value)
    assert told.startswith(f"--config: got {str(path)!r}")
    assert message in told
    assert "; need " in told
    assert " Do: mend the file" in told
    assert "\n" not in told


def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"which cannot be read \(Is a directory\)"):
        read_sections(str(tmp_path))


def test_what_is_a_configuration(tmp_path: Path) -> None:
    """A byte order mark, aliases, merged mappings and JSON are all right."""
    path = tmp_path / "mine.yaml"
    path.write_text("\ufeffa: &a {b: 1e-3, c: [x, x]}\nd: {<<: *a, b: 2}\n", encoding="utf-8")
    assert read_sections(str(path)) == {"a": {"b": "1e-3", "c": ["x", "x"]}, "d": {"b": 2, "c": ["x", "x"]}}
    path.write_text('{"a": {"b": [1, 2]}}')
    assert read_sections(str(path)) == {"a": {"b": [1, 2]}}


def test_aliases_are_counted_by_what_they_stand_for(tmp_path: Path) -> None:
    def nested(levels: int) -> str:
        names = "abcdefgh"[: levels + 1]
        lines = [f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]" for a, b in itertools.pairwise(names)]
        return "\n".join(["a: &a [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]", *lines])

    path = tmp_path / "mine.yaml"
    path.write_text(nested(3))  # some ten thousand values
    assert read_sections(str(path)) == yaml.safe_load(nested(3))
    path.write_text(nested(7))
    with pytest.raises(ConfigError, match=r"line 5 which stands for more than 100,000 values"):
        read_sections(str(path))


OPTIONS = ["--model.learning_rate", "--model.base", "--trainer.max_epochs", "--data.val"]


@pytest.mark.parametrize(
    ("message", "told"),
    [
        (
            "Unrecognized arguments: --model.learningrate 1",
            "there is no option --model.learningrate. Do: did you mean --model.learning_rate?",
        ),
        ("unrecognized arguments: --learning_rate=1", "there is no option --learning_rate. Do: did you mean --model."),
        ("unrecognized arguments: --base x", "there is no option --base. Do: did you mean --model.base?"),
        ("unrecognized arguments: --zzz", "there is no option --zzz. Do: check the name."),
        ("unrecognized arguments: extra", "got 'extra', which belongs to no option. Do: "),
        ("Subcommand 'fit' does not accept option 'data.vall'", "mean --data.val? Is a file of --config for another"),
        ("Option 'dekay' is not accepted", "--trainer.callbacks.dekay reaches the last callback named so far"),
        ('Parser key "model.base":\n  whatever\nGiven value: None', "--model.base is missing; it has no default."),
        (
            "Parser key \"data.val\":\n  Does not validate against any of the Union subtypes\n"
            "  Subtypes: [<class 'float'>, <class 'str'>, typing.Literal['a', 'b'], <class 'NoneType'>]\n"
            "  Errors:\n    - Expected a <class 'float'>\n  Given value type: <class 'list'>\n  Given value: [1]",
            "--data.val: got '[1]'; need one of a, b or a number or text or null.",
        ),
        ("Parser key \"a.b\":\n  Expected a <class 'int'>. Got value: x", "--a.b: got 'x'; need an integer."),
        (
            "Parser key \"a\":\n Errors:\n    - Problem with given class_path 'lit_instruct.callbacks.WeightEMAA':\n"
            "        module 'lit_instruct.callbacks' has no attribute 'WeightEMAA'\n  Given value: x",
            "there is no class 'lit_instruct.callbacks.WeightEMAA'. Do: did you mean lit_instruct.callbacks.WeightEMA?",
        ),
        (
            "Parser key \"a\":\n Errors:\n    - Problem with given class_path 'lit_instrct.callbacks.WeightEMA':\n"
            "        No module named 'lit_instrct'\n  Given value: x",
            "there is no class 'lit_instrct.callbacks.WeightEMA', for there is no module 'lit_instrct.callbacks'. Do: ",
        ),
        (
            'Parser key "a":\n  Not a valid subclass of Callback.\n  Given value: torch.nn.Linear',
            "--a: got 'torch.nn.Linear'; need a Callback: class_path with the class, init_args with",
        ),
        (
            'Parser key "a":\n  Type expects a function or a callable class: module \'json\' has no attribute \'laods\''
            ". Got value: json.laods",
            "--a: there is no class 'json.laods'. Do: did you mean json.loads?",
        ),
        (
            f"Parser key \"a.b\":\n  Expected a <class 'int'>. Got value: {'x' * 81}",
            f"--a.b: got '{'x' * 77}...'; need an integer.",
        ),
        ('Parser key "model.quantization":\n No module named \'bitsandbytes\'', "pip install 'lit-instruct[quant]'"),
    ],
)  # fmt: skip
def test_the_parser_is_put_into_words(message: str, told: str) -> None:
    assert told in plainly(message, OPTIONS, ["fit", "--trainer.callbacks.dekay", "1"])


def test_arguments_of_a_class_are_known_to_its_own_parser() -> None:
    told = plainly("Option 'dekay' is not accepted", ["--decay", "--unit"], ["fit"], of_class=True)
    assert told.startswith("init_args: 'dekay' is not accepted")
    assert told.endswith("Do: did you mean decay?")


def test_what_is_not_known_is_cut_to_a_screen() -> None:
    long = plainly("\n".join(["some other message " * 100] * 100), OPTIONS, [])
    assert long.startswith("some other message")
    assert len(long.splitlines()) <= 12
    assert len(long) < 8000
    assert why_not_made("another one") == "another one"


def test_why_a_class_could_not_be_made_is_told_without_the_types_that_were_tried() -> None:
    tried = "Does not validate against any of the Union subtypes\n  Errors:\n    - Expected a <class 'bool'>\n"
    reason = "    - Problem with given class_path 'lit_instruct.callbacks.WeightEMA':\n        decay: got 5\n"
    assert why_not_made(f"{tried}{reason}  Given value: 1") == "lit_instruct.callbacks.WeightEMA: decay: got 5"


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"max_steps": 0}, "trainer.max_steps: got 0"),
        ({"max_epochs": 0}, "trainer.max_epochs: got 0"),
        ({"limit_train_batches": 0}, "trainer.limit_train_batches: got 0"),
        ({"accumulate_grad_batches": 0}, "trainer.accumulate_grad_batches: got 0"),
        ({"check_val_every_n_epoch": 0}, "trainer.check_val_every_n_epoch: got 0"),
        ({"gradient_clip_val": -1.0}, "trainer.gradient_clip_val: got -1.0"),
        ({"gradient_clip_val": float("nan")}, "trainer.gradient_clip_val: got nan"),
        ({"num_nodes": 2, "strategy": "ddp"}, "trainer.num_nodes: got 2"),
        ({"default_root_dir": __file__}, "trainer.default_root_dir: got"),
        ({"default_root_dir": "/proc/nothing/here"}, "where nothing can be written"),
        ({"log_every_n_steps": -1}, "trainer.log_every_n_steps: got -1"),
        ({"callbacks": [ModelCheckpoint("/proc/nothing/here")]}, "dirpath of ModelCheckpoint: got"),
        ({"logger": CSVLogger("/proc/nothing/here")}, "save_dir of the logger: got"),
    ],
)
def test_a_trainer_that_would_not_train(settings: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("MASTER_ADDR", "NODE_RANK", "LOCAL_RANK"):
        monkeypatch.delenv(variable, raising=False)
    trainer = quiet_trainer(**({"max_epochs": 1} | settings))
    with pytest.raises(ConfigError, match=r"need .* Do: ") as caught:
        check_trainer(trainer)
    assert name in str(caught.value)


def test_a_trainer_that_trains(tmp_path: Path) -> None:
    """Also into a folder that is yet to be made, of which nothing is left behind by looking."""
    for settings in ({"max_epochs": -1}, {"max_epochs": 1, "max_steps": 3, "gradient_clip_val": 0.0}):
        check_trainer(quiet_trainer(default_root_dir=tmp_path / "new" / "folder", **settings))
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room_is_found_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On it a file can be made, and nothing be written into it."""

    def no_room(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    check_trainer(quiet_trainer(max_epochs=1, default_root_dir=tmp_path))
    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(ConfigError, match=r"default_root_dir: got .* No space left on device.* Do: .* make room"):
        check_trainer(quiet_trainer(max_epochs=1, default_root_dir=tmp_path))


def test_two_nodes_that_know_of_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    check_trainer(quiet_trainer(max_epochs=1, num_nodes=2, strategy="ddp"))


@pytest.mark.parametrize(("interval", "batches", "told"), [(3, 3, False), (4, 3, True), (0.5, 3, False)])
def test_a_validation_interval_must_fit_into_an_epoch(interval: float, batches: int, told: bool) -> None:
    trainer = SimpleNamespace(
        val_check_interval=interval,
        check_val_every_n_epoch=1,
        limit_val_batches=1.0,
        datamodule=SimpleNamespace(train_dataloader=lambda: range(batches)),
    )
    context: Any = pytest.raises(ConfigError, match="got 4 for an epoch of 3 batches") if told else nullcontext()
    with context:
        ValidationInterval().on_fit_start(trainer, None)  # type: ignore[arg-type]


def test_what_lightning_refuses_is_a_mistake_in_the_configuration_and_a_bug_is_not() -> None:
    with (
        pytest.raises(ConfigError, match=r"trainer: .*invalid strategy name.* Do: change that setting"),
        made_by_lightning("trainer"),
    ):
        quiet_trainer(strategy="nonsense")
    with pytest.raises(ValueError, match="Does not validate") as caught, made_by_lightning("trainer"):
        raise ValueError("Does not validate against any of the Union subtypes")
    assert not isinstance(caught.value, ConfigError)  # of a class, over which stage_cli has more to say
    with pytest.raises(ZeroDivisionError), made_by_lightning("trainer"):
        _ = 1 / 0
