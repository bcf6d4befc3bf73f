"""``lit-instruct sample``: from prompts and models to the tasks file of ``lit-instruct label``."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from lit_instruct.data.bad_rows import Problem
from lit_instruct.data.records import stream_prompts
from lit_instruct.evaluation.subjects import read_sources
from lit_instruct.feedback.forms import MAX_RESPONSES
from lit_instruct.feedback.rows import OWN_COLUMNS, refuse, write_files
from lit_instruct.feedback.sampling import Asked, Drawn, Settings, by_uncertainty, sample
from lit_instruct.types import ConfigError

MIN_RESPONSES = 4

_ABOUT = """\
Sample responses for labelers to rank; docs/feedback.md says more.

  lit-instruct sample --prompts prompts.jsonl --models sft=runs/sft/last.ckpt --out tasks.jsonl
  lit-instruct sample --prompts prompts.jsonl --models sft=runs/sft/last.ckpt ppo=runs/ppo/last.ckpt \\
      --out tasks.jsonl --num_prompts 200 --select uncertain --reward_model runs/rm/last.ckpt
  lit-instruct label labels.sqlite --tasks tasks.jsonl --labelers ann,bob

A run that was killed goes on where it was when it is started again.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}.\nDo: see lit-instruct sample --help")


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Args:
        arguments: behind ``sample``.

    Raises:
        ConfigError: options that cannot work.
        DataError: prompts that cannot be used.
    """
    options = _parser().parse_args(arguments)
    settings = _settings(options)
    asked = _read(options.prompts)
    if options.select == "random" and options.num_prompts is not None:
        chosen = random.Random(options.seed).sample(range(len(asked)), min(options.num_prompts, len(asked)))
        asked = [asked[number] for number in sorted(chosen)]
    drawn = sample(asked, settings, options.out.with_name(f"{options.out.name}.samples"))
    order = list(range(len(asked)))
    if options.select == "uncertain":
        from lit_instruct.feedback.scoring import score_texts

        prompts = [one.prompt for one in asked]
        order = by_uncertainty(
            drawn,
            lambda numbers, texts: score_texts(options.reward_model, [prompts[n] for n in numbers], texts),
        )[: options.num_prompts]
    _write(options.out, [(asked[number], drawn[number]) for number in order])


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="lit-instruct sample",
        description=_ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--prompts", nargs="+", required=True, metavar="FILE", help="rows with a prompt; their owners go along")
    add(
        "--models", nargs="+", required=True, metavar="NAME=SOURCE", help="checkpoints, Hugging Face folders, hub names"
    )
    add("--out", type=Path, required=True, metavar="FILE.jsonl", help="the tasks; what is sampled is kept beside it")
    add("--responses", type=int, default=4, metavar="K", help="to each prompt, 4 to 9 (default 4)")
    add("--temperatures", nargs="+", type=float, default=[1.0], metavar="T", help="of each model (default 1)")
    add("--max_response_tokens", type=int, default=256, help="the most tokens of a response (default 256)")
    add("--num_prompts", type=int, metavar="N", help="of how many prompts to make tasks (default: of all)")
    about = "random: any N; uncertain: those, in order, whose responses a reward model scores most alike"
    add("--select", choices=("random", "uncertain"), default="random", help=about)
    add("--reward_model", metavar="CKPT", help="for --select uncertain: checkpoint or exported folder")
    add("--seed", type=int, default=1, help="of responses, their order and the choice of prompts (default 1)")
    add("--batch_rows", type=int, default=64, help="responses sampled at a time; changes none (default 64)")
    return parser


def _settings(options: argparse.Namespace) -> Settings:
    models = read_sources(options.models)
    if not MIN_RESPONSES <= options.responses <= MAX_RESPONSES:
        raise ConfigError(f"--responses: got {options.responses}; need {MIN_RESPONSES} to {MAX_RESPONSES}.")
    if any(not 0 <= temperature < float("inf") for temperature in options.temperatures):
        raise ConfigError(f"--temperatures: got {options.temperatures}; need numbers of at least 0.")
    if len(set(options.temperatures)) < len(options.temperatures):
        raise ConfigError(f"--temperatures: got {options.temperatures}; need each one once.")
    if len(models) == 1 and options.temperatures == [0.0]:
        raise ConfigError("--temperatures: got 0 alone, at which all responses are the same; need another one too.")
    for name, least in (("max_response_tokens", 1), ("num_prompts", 1), ("batch_rows", 1), ("seed", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name}: got {value}; need at least {least}.")
    if (options.select == "uncertain") != (options.reward_model is not None):
        raise ConfigError("--select uncertain and --reward_model: got one of them; need both or none.")
    if options.out.suffix != ".jsonl":
        raise ConfigError(f"--out: got {options.out}; need a name that ends in .jsonl.")
    if options.out.exists():
        raise ConfigError(f"--out: got {options.out}, which exists.\nDo: name another file, or remove it.")
    turns = len(models) * len(options.temperatures)
    if turns > options.responses:
        print(f"Note: {turns} models and temperatures take turns, so each prompt has responses of {options.responses}.")
    return Settings(
        models, options.temperatures, options.responses, options.max_response_tokens, options.seed, options.batch_rows
    )


def _read(sources: Sequence[str]) -> list[Asked]:
    """Read prompts, each once."""
    asked: dict[str, Asked] = {}
    problems: list[str] = []
    for item in stream_prompts(sources):
        if isinstance(item, Problem):
            problems.append(str(item))
            continue
        row, record = item
        columns = {name: value for name, value in row.columns.items() if name not in _NOT_KEPT}
        asked.setdefault(json.dumps(record.prompt), Asked(record.prompt, row.place, columns))
    refuse(problems, "prompts")
    return list(asked.values())


_NOT_KEPT = OWN_COLUMNS | {"messages", "chosen", "rejected", "completion", "task", "labelers"}
"""What a row says of other responses and other labels."""


def _write(path: Path, tasks: Sequence[tuple[Asked, list[Drawn]]]) -> None:
    """Write the tasks. Responses that are the same text stay here with their sources; ``label`` shows them once."""
    rows, alike = [], 0
    for asked, drawn in tasks:
        texts = [one.text for one in drawn]
        alike += len(set(texts)) == 1
        if len(set(texts)) > 1:
            sources = [one.source for one in drawn]
            rows.append(
                {"task": "rank", "prompt": asked.prompt, "responses": texts, "sources": sources, **asked.columns}
            )
    if alike:
        print(f"Left out, since all responses are the same text: {alike} prompts.")
    write_files({path.name: "".join(json.dumps(row) + "\n" for row in rows)}, path.parent, overwrite=False)
    same = sum(len(row["responses"]) - len(set(row["responses"])) for row in rows)
    print(
        f"{path}: {len(rows)} tasks. Responses that are the same text as another one: {same}; labelers see them once."
    )
