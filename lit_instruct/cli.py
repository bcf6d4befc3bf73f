"""The ``lit-instruct`` command: picks the stage, then hands over to LightningCLI.

Nothing heavy is imported before the stage is known, so that ``lit-instruct --help`` answers at once.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from lightning.pytorch.cli import LightningCLI

_HELP = """\
usage: lit-instruct STAGE COMMAND [--config FILE ...] [--section.option VALUE ...]
       lit-instruct data prepare --prompts FILE ... --tokenizer NAME --out DIR [--option VALUE ...]
       lit-instruct evaluate --models NAME=SOURCE ... --out DIR [--prompts FILE] [--scorer CLASS] [--option VALUE ...]
       lit-instruct export CKPT OUT [--ema] [--adapter] [--dtype bfloat16]
       lit-instruct plan --config FILE ... --hardware 8xH100-80GB [--model NAME] [--section.option VALUE ...]
       lit-instruct sample --prompts FILE ... --models NAME=CKPT ... --out TASKS.jsonl [--option VALUE ...]
       lit-instruct label DB --tasks FILE --labelers NAME,NAME [--guidelines FILE.md] [--option VALUE ...]
       lit-instruct labels export|import DB|FILE ... --out DIR [--format argilla|label-studio]
       lit-instruct agreement DB|FILE ... [--reward_model CKPT] [--out DIR]
       lit-instruct round --policy CKPT --prompts FILE --heldout_prompts FILE --labelers NAME,NAME --out DIR [...]
       lit-instruct quickstart [--seed N] [--out DIR]
       lit-instruct report RUN ... [--out DIR]

Train a language model to follow instructions with human feedback (InstructGPT).

stages
  pretrain    train a base language model on plain text
  sft         1. imitate demonstrations
  rm          2. learn a reward model from rankings
  ppo         3. reinforcement learning against it; PPO-ptx with the callback PtxMixing

commands
  fit         train                      validate    measure on held-out data
  test        measure on test data
  cross-validate (rm alone)  accuracy on labelers of the training and on held-out labelers

  data prepare  clean prompts and split them by owner: length, duplicates, a cap for each owner, personal data

  evaluate    compare models on held-out prompts: win rates, KL, bias, multiple choice, loss on text

  export      write the model of a checkpoint as a Hugging Face folder: policies, averaged ones too, and reward models

  plan        what a run needs before it is started: memory, communication, time; for 1 or 1000 devices, on paper

  sample      responses for labelers to rank, of one or several models

  label       collect rankings, demonstrations and prompts from people, on a page in their browser

  labels      export them for training, or to and from other labelling programs

  agreement   how far labelers agree, with intervals, drift and outliers

  round       all of it: from a policy to a better one by a team's labels, judged by the team

  quickstart  all stages on a small made-up world, without a download: a few minutes on two cores

  report      one page about a run, or about several side by side: curves, samples, settings; and evaluations

Shipped configurations are found by name: --config sft/default.yaml, rm/default.yaml, ppo/default.yaml
Everything a stage can be told:  lit-instruct sft fit --help
"""

_COMMANDS = ("fit", "validate", "test")

# stage -> module class, data class, the module's argument that names the model, what comes next
_STAGES: dict[str, tuple[str, str, str, str]] = {
    "pretrain": (
        "SFTModule",
        "PretrainingDataModule",
        "base",
        "lit-instruct sft fit --config sft/default.yaml --model.base {ckpt} --data.demonstrations YOUR_DEMONSTRATIONS",
    ),
    "sft": (
        "SFTModule",
        "DemonstrationDataModule",
        "base",
        "lit-instruct rm fit --config rm/default.yaml --model.base {ckpt} --data.comparisons YOUR_RANKINGS "
        "--data.demonstrations YOUR_DEMONSTRATIONS",
    ),
    "rm": (
        "RewardModule",
        "ComparisonDataModule",
        "base",
        "lit-instruct ppo fit --config ppo/default.yaml --model.policy SFT_CKPT --model.reward_model {ckpt} "
        "--data.prompts YOUR_PROMPTS",
    ),
    "ppo": (
        "PPOModule",
        "PromptDataModule",
        "policy",
        "lit-instruct export {ckpt} FOLDER writes the policy for Hugging Face; --ema its average, if WeightEMA ran",
    ),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: default: those of the process.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_HELP, end="")
        return
    stage, rest = arguments[0], arguments[1:]
    if stage == "--version":
        from lit_instruct import __version__

        print(f"lit-instruct {__version__}")
    elif stage == "rm" and rest[:1] == ["cross-validate"]:
        _explain(f"{stage} {rest[0]}", lambda: _cross_validate(rest[1:]))
    elif stage == "data":
        _explain("data prepare", lambda: _prepare(rest))
    elif stage in _TOOLS:
        _explain(stage, lambda: _TOOLS[stage](rest))
    elif stage in _STAGES:
        _run_and_explain(stage, rest)
    else:
        known = [*_STAGES, "data", *_TOOLS]
        near = difflib.get_close_matches(stage, known, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        fail(f"got the stage {stage!r}; need one of {', '.join(known)}.{hint}")


def run_stage(stage: str, arguments: Sequence[str]) -> LightningCLI:
    """Run one stage as the command line does, errors as exceptions.

    Args:
        stage: ``pretrain``, ``sft``, ``rm`` or ``ppo``.
        arguments: what follows the stage, from the command on.

    Returns:
        The LightningCLI, with its ``trainer``, ``model`` and ``datamodule``.
    """
    import lit_instruct
    from lit_instruct.modules.stage_cli import StageCLI

    module, data, base, following = _STAGES[stage]
    return StageCLI(
        getattr(lit_instruct, module),
        getattr(lit_instruct, data),
        stage=stage,
        base_argument=base,
        following=following,
        args=resolve_configs(arguments),
    )


def resolve_configs(arguments: Sequence[str]) -> list[str]:
    """Find configuration files by name inside the package where no such file exists here.

    Args:
        arguments: of a stage.

    Returns:
        The arguments, with ``--config quickstart/ppo.yaml`` replaced by the shipped file's path.

    Raises:
        ConfigError: a file is not there, or is no YAML with sections.
    """
    resolved: list[str] = []
    expects_file = False
    for argument in arguments:
        if expects_file:
            argument = _find_config(argument)
        elif argument.startswith("--config="):
            argument = "--config=" + _find_config(argument.removeprefix("--config="))
        expects_file = argument in ("--config", "-c")
        resolved.append(argument)
    return resolved


def _find_config(name: str) -> str:
    from lit_instruct.planning.refusal import refuse
    from lit_instruct.planning.yaml_files import read_sections

    shipped = Path(str(files("lit_instruct"))) / "configs"
    for path in (Path(name), shipped / name):
        if path.is_file():
            read_sections(str(path))
            return str(path)
    names = sorted(path.relative_to(shipped).as_posix() for path in shipped.rglob("*.yaml"))
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]}? If not, check the name" if near else "check the name"
    what = "the folder" if Path(name).is_dir() else "no file"
    return refuse("--config", f"{what} {name!r}", f"a file here, or one of the shipped ones ({', '.join(names)})", hint)


def _run_and_explain(stage: str, arguments: list[str]) -> None:
    words = [argument for argument in arguments if not argument.startswith("-")]
    helps = any(argument in ("-h", "--help") for argument in arguments)
    if not helps and not any(word in _COMMANDS for word in words):
        fail(f"{stage}: need a command: {', '.join(_COMMANDS)}. For example: lit-instruct {stage} fit --help")

    _explain(stage, lambda: run_stage(stage, arguments))


def _label(arguments: list[str]) -> None:
    from lit_instruct.feedback.command import main as label

    label(arguments)


def _plan(arguments: list[str]) -> None:
    from lit_instruct.planning.command import main as plan

    plan(resolve_configs(arguments))


def _quickstart(arguments: list[str]) -> None:
    from lit_instruct.toyworld.quickstart import main as quickstart

    quickstart(arguments)


def _report(arguments: list[str]) -> None:
    from lit_instruct.reporting.report import main as report

    report(arguments)


def _cross_validate(arguments: list[str]) -> None:
    from lit_instruct.evaluation.cross_validation import main as cross_validate

    cross_validate(arguments)


def _labels(arguments: list[str]) -> None:
    from lit_instruct.feedback.exchange import main as labels

    labels(arguments)


def _round(arguments: list[str]) -> None:
    from lit_instruct.feedback.round import main as feedback_round

    feedback_round(arguments)


def _sample(arguments: list[str]) -> None:
    from lit_instruct.feedback.sample_command import main as sample

    sample(arguments)


def _agreement(arguments: list[str]) -> None:
    from lit_instruct.feedback.agreement_report import main as agreement

    agreement(arguments)


def _prepare(arguments: list[str]) -> None:
    from lit_instruct.commands import prepare

    prepare(arguments)


def _evaluate(arguments: list[str]) -> None:
    from lit_instruct.commands import evaluate

    evaluate(arguments)


def _export(arguments: list[str]) -> None:
    from lit_instruct.commands import export

    export(arguments)


def _explain(stage: str, run: Callable[[], object]) -> None:
    """Run it; what the user can mend is told in a sentence and not in a traceback."""
    try:
        run()
    except mendable() as error:  # evaluated only when something was raised: data prepare does without Lightning
        fail(f"{stage}: {error}")


def mendable() -> tuple[type[Exception], ...]:
    """Errors that the user can mend; Lightning's can only have been raised where it is loaded already."""
    from lit_instruct.types import ConfigError, DataError, NonFiniteError, SaveError

    ours = (ConfigError, DataError, NonFiniteError, SaveError)
    if "lightning" not in sys.modules:
        return ours
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    return (*ours, MisconfigurationException)


def fail(message: str) -> NoReturn:
    """Say what is wrong and end the process with status 2.

    Args:
        message: behind ``lit-instruct: error:``.
    """
    print(f"lit-instruct: error: {message}", file=sys.stderr)
    raise SystemExit(2)


_TOOLS: dict[str, Callable[[list[str]], None]] = {
    "agreement": _agreement,
    "evaluate": _evaluate,
    "export": _export,
    "label": _label,
    "labels": _labels,
    "plan": _plan,
    "quickstart": _quickstart,
    "report": _report,
    "round": _round,
    "sample": _sample,
}
