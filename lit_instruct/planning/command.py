"""``lit-instruct plan``: reads a stage's configuration and prints what the run will need."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import PurePath
from typing import NoReturn

from lit_instruct.planning.config_files import merged, shape_of
from lit_instruct.planning.hardware import parse_hardware
from lit_instruct.planning.paper import paper_tables
from lit_instruct.planning.refusal import refuse
from lit_instruct.planning.report import parameters, plan_text, plans
from lit_instruct.planning.settings import Reader, Settings, read_settings, read_strategy
from lit_instruct.planning.setup import Stage

_STAGES: dict[str, Stage] = {
    "pretrain": "sft",
    "sft": "sft",
    "ppo_init": "sft",
    "rm": "rm",
    "ppo": "ppo",
    "ppo_ptx": "ppo",
}

_ABOUT = """\
What a run needs before it is started: memory, communication and time, by arithmetic alone.

  lit-instruct plan --config ppo/default.yaml --config ppo/ptx.yaml --hardware 8xH100-80GB --model 1.3b
  lit-instruct plan --config sft/default.yaml --hardware A100-40GB --model Qwen/Qwen3-0.6B --data.batch_size 16
  lit-instruct plan --paper

It takes the stage's own files and options (--model.*, --data.*, --trainer.*) and says which keys it has read. Memory is
worked out for the longest rows that they allow, time for the mean lengths, by roofline: a run takes longer. Gradients,
state and activations follow docs/scaling.md.
"""

_FREED = (
    "glibc keeps much of what is freed: for these figures set MALLOC_MMAP_THRESHOLD_=65536 and "
    "MALLOC_TRIM_THRESHOLD_=65536 in the environment; without, a process may take three quarters more."
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        refuse("plan", message, "options as in lit-instruct plan --help", "see there")


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Args:
        arguments: behind ``plan``; the configuration files' paths already found.

    Raises:
        ConfigError: something cannot be planned.
    """
    parser = _parser()
    options, overrides = parser.parse_known_args(arguments)
    if options.paper:
        print(paper_tables())
        return
    if not options.config or not options.hardware:
        missing = "--hardware" if options.config else "--config"
        refuse(
            "plan",
            f"no {missing}",
            "--config FILE and --hardware",
            "try --config ppo/default.yaml --hardware 8xH100-80GB",
        )
    hardware = parse_hardware(options.hardware)
    reader = Reader(merged(options.config, overrides))
    settings, strategy = _settings(options, reader), read_strategy(reader)
    print(f"Read: {'; '.join(reader.read)}")
    lengths, work = settings.work.lengths, settings.work
    print(
        f"{settings.stage}, {parameters(settings.policy.parameters)} parameters, {work.rows} rows of "
        f"{lengths.prompt:,.0f} + {lengths.response:,.0f} tokens (at most {lengths.longest:,}) on {hardware.name}"
    )
    if hardware.on_cpu:
        print(_FREED)
    for plan in plans(settings):
        print(f"\n{plan_text(plan, hardware, strategy)}")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="lit-instruct plan",
        description=_ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", "-c", action="append", help="a stage's configuration; several are merged")
    add("--hardware", help="DEVICE, 8xDEVICE, 2x8xDEVICE (nodes x devices) or cpu:TFLOPS,GB/S,GIB")
    shapes = "folder, hub name, configuration, or GPT-3's shape 1.3b, 6b or 175b"
    add("--model", help=f"what is trained: {shapes}; default: the configuration's own")
    add("--reward-model", help="of PPO, and its value model; default: as --model")
    add("--stage", choices=sorted(set(_STAGES.values())), help="default: by the first configuration's name")
    add("--prompt-tokens", type=float, help="mean of the data; default: as long as they may be")
    add("--response-tokens", type=float, help="likewise")
    add("--paper", action="store_true", help="the tables of docs/scaling.md: the paper's own runs")
    return parser


def _settings(options: argparse.Namespace, reader: Reader) -> Settings:
    stage: Stage = options.stage or _stage_of(options.config[0])
    key = "model.policy" if stage == "ppo" else "model.base"
    source = options.model or reader.take(key, None)
    if source is None:
        refuse("model", "none", "the model that is to be trained", f"give --model, or {key} in the configuration")
    policy = shape_of(source)
    reward_model = shape_of(options.reward_model) if options.reward_model else policy
    return read_settings(
        reader,
        stage,
        policy,
        reward_model,
        prompt_tokens=options.prompt_tokens,
        response_tokens=options.response_tokens,
    )


def _stage_of(config: str) -> Stage:
    path = PurePath(config)
    stem = path.stem.removesuffix("_6b").removesuffix("_175b")
    for name in (stem, path.parent.name):
        if name in _STAGES:
            return _STAGES[name]
    return refuse("stage", f"a configuration named {config!r}", "its stage: sft, rm or ppo", "give --stage")
