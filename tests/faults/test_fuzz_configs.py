"""Configuration files of random YAML, and shipped ones with something changed: a screen of text and status 2, or none.

``parse`` goes through the parser of a stage; ``start`` on to a loaded model and a Trainer that is about to fit.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from lit_instruct.cli import main
from lit_instruct.modules.stage_cli import StageCLI
from tests.helpers.tiny import demonstrations, save_model

CONFIGS = Path(__file__).parents[2] / "configs"
_FEW, _MANY = 40, 4_000
_FEW_STARTS, _MANY_STARTS = 8, 1_000

_NEEDED = {
    "pretrain": ["--model.base", "x", "--data.text", "x"],
    "sft": ["--model.base", "x", "--data.demonstrations", "x"],
    "rm": ["--model.base", "x", "--data.comparisons", "x"],
    "ppo": ["--model.policy", "x", "--model.reward_model", "x", "--data.prompts", "x"],
}
SHIPPED = [
    (stage, yaml.safe_load((CONFIGS / name).read_text(encoding="utf-8")))
    for stage in _NEEDED
    for name in (f"{stage}/default.yaml", "strategy/fsdp.yaml")
] + [("ppo", yaml.safe_load((CONFIGS / "paper/ppo_ptx.yaml").read_text(encoding="utf-8")))]

words = st.sampled_from(
    [
        "",
        "x",
        "model",
        "auto",
        "null",
        "true",
        "1e-3",
        "-1",
        ".",
        "..",
        "/",
        "a.b",
        "lit_instruct.callbacks.WeightEMA",
        "lightning.pytorch.callbacks.ModelCheckpoint",
        "json.loads",
        "builtins.print",
        "torch.nn.Linear",
        "class_path",
        "{}",
        "[1",
    ]
) | st.text(max_size=8)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | words
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(words | st.sampled_from(["class_path", "init_args"]), inner, max_size=3)
    ),
    max_leaves=6,
)


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of everything in a document but the document itself."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in entries:
        yield (*path, key)
        yield from _places(part, (*path, key))


@st.composite
def changed(draw: st.DrawFn, documents: list[tuple[str, Any]]) -> tuple[str, str]:
    """A stage, and a configuration in which values were replaced and keys taken out or renamed."""
    stage, document = draw(st.sampled_from(documents))
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(document))
        if not places:
            break
        *way, key = draw(st.sampled_from(places))
        inside = document
        for part in way:
            inside = inside[part]
        action = draw(st.sampled_from(["replace", "delete", "rename"]))
        if action == "replace" or not isinstance(inside, dict):
            inside[key] = draw(values)
        elif action == "delete":
            del inside[key]
        else:
            inside[draw(words)] = inside.pop(key)
    return stage, _written(document)


def _written(value: Any) -> str:
    return yaml.safe_dump(value, allow_unicode=True)


text = st.one_of(
    values.map(_written),
    values.map(json.dumps),
    st.text(max_size=60),
    st.text(alphabet=":-[]{}&*!|>'\"%@`#,? \n\tab1", max_size=60),
)
parsed = st.one_of(changed(SHIPPED), st.tuples(st.sampled_from(sorted(_NEEDED)), text))

STARTED = [
    (
        "sft",
        yaml.safe_load(
            """
            trainer:
              {max_epochs: 1, max_steps: 2, gradient_clip_val: 1.0, accumulate_grad_batches: 1, precision: 32-true,
               log_every_n_steps: 1, val_check_interval: 1.0, limit_train_batches: 2, check_val_every_n_epoch: 1,
               num_sanity_val_steps: 0, enable_model_summary: false,
               callbacks: [{class_path: lit_instruct.callbacks.WeightEMA, init_args: {decay: 0.9}}]}
            model:
              {learning_rate: 0.001, final_lr_ratio: 0.1, residual_dropout: 0.2, warmup_steps: 0,
               micro_batch_tokens: 64, template: auto, max_nonfinite_steps: 10}
            data:
              {batch_size: 8, val: 0.1, max_length: 20, long_prompt: drop, num_workers: 0, seed: 1}
            """
        ),
    )
]


class _StartedError(Exception):
    """Training would begin now."""


def check(stage: str, content: str, path: Path, more: list[str]) -> None:
    """Whatever the file says, it is taken, or refused in one screen."""
    path.write_text(content, encoding="utf-8", errors="surrogatepass")
    printed, said = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(printed):
        try:
            main([stage, "fit", "--config", str(path), *more])
        except SystemExit as stop:
            status = stop.code
        except _StartedError:
            status = 0
        else:
            status = 0
    if status in (None, 0):
        return
    message = said.getvalue()
    message = message[message.index("lit-instruct") :]
    assert status == 2
    assert "error: " in message
    assert len(message.splitlines()) <= 15
    assert len(message) < 4000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """With a tiny model, and the current folder."""
    made = tmp_path_factory.mktemp("configs")
    save_model(made / "base")
    demonstrations(made / "d.jsonl", 24)
    with contextlib.chdir(made), pytest.MonkeyPatch.context() as patch:
        patch.setattr(pl.Trainer, "fit", _start)
        patch.setattr(StageCLI, "setup_parser", _remembered(StageCLI.setup_parser))
        yield made


def _remembered(setup: Callable[..., None]) -> Callable[..., None]:
    """A stage's parser is made once: that takes ten times as long as to parse."""
    made: dict[str, dict[str, Any]] = {}

    def setup_parser(cli: StageCLI, *arguments: Any) -> None:
        if cli.stage not in made:
            before = set(vars(cli))
            setup(cli, *arguments)
            made[cli.stage] = {name: value for name, value in vars(cli).items() if name not in before}
        vars(cli).update(made[cli.stage])

    return setup_parser


def _start(*_: Any, **__: Any) -> None:
    raise _StartedError


def fuzz(examples: int, *, short: bool) -> Callable[[Any], Any]:
    """The short run is the same every time."""
    return settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=short,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )


def parse(folder: Path, case: tuple[str, str]) -> None:
    stage, content = case
    check(stage, content, folder / "mine.yaml", [*_NEEDED[stage], "--print_config"])


def start(folder: Path, case: tuple[str, str]) -> None:
    stage, content = case
    cpu = ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--model.base", "base"]
    check(stage, content, folder / "mine.yaml", [*cpu, "--data.demonstrations", "d.jsonl"])


@fuzz(_FEW, short=True)
@given(case=parsed)
def test_files_are_parsed_or_refused(folder: Path, case: tuple[str, str]) -> None:
    parse(folder, case)


@fuzz(_FEW_STARTS, short=True)
@given(case=changed(STARTED))
def test_stages_start_or_say_why_not(folder: Path, case: tuple[str, str]) -> None:
    start(folder, case)


@pytest.mark.slow  # many minutes
@fuzz(_MANY, short=False)
@given(case=parsed)
def test_many_files(folder: Path, case: tuple[str, str]) -> None:
    parse(folder, case)


@pytest.mark.slow  # many minutes
@fuzz(_MANY_STARTS, short=False)
@given(case=changed(STARTED))
def test_many_starts(folder: Path, case: tuple[str, str]) -> None:
    start(folder, case)
