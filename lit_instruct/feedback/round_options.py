"""What ``lit-instruct round`` is told: its own options, and those that it hands on to its steps."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from lit_instruct.types import ConfigError

_ABOUT = """\
One round of human feedback on one machine; docs/feedback_round.md walks through one.

  lit-instruct round --policy runs/sft/last.ckpt --prompts prompts.jsonl --heldout_prompts heldout.jsonl \\
      --text pretraining.jsonl --labelers ann,bob,cat --out runs/round1

samples responses, serves the labelling page until all are ranked, says how far the labelers agree, trains a reward
model and PPO-ptx, and lets the same labelers compare the new policy with the old one without knowing which is which.
The same command goes on where it was stopped.

Options of a step are given behind its name, as --STEP.OPTION VALUE: sample, label, rm, ppo, evaluate. For example
  --sample.num_prompts 200   --label.port 8700   --label.guidelines guidelines.md   --label.overlap 0.3
  --rm.model.learning_rate 1e-4   --ppo.config mine.yaml   --ppo.model.episodes 4096   --evaluate.max_prompts 100
"""

_PASSED = ("sample", "label", "rm", "ppo", "evaluate")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}.\nDo: see lit-instruct round --help")


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the round's own options."""
    parser = _Parser(
        prog="lit-instruct round",
        description=_ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    about = "the model to improve: an SFT checkpoint, or the policy of the round before"
    add("--policy", required=True, metavar="CKPT", help=about)
    about = "prompts to sample responses for, and to train on; with owners"
    add("--prompts", nargs="+", required=True, metavar="FILE", help=about)
    about = "prompts of other owners, on which the labelers compare the two models"
    add("--heldout_prompts", nargs="+", required=True, metavar="FILE", help=about)
    add("--text", nargs="+", default=[], metavar="FILE", help="pretraining text: PPO-ptx; without it plain PPO")
    add("--labelers", required=True, metavar="NAME,NAME", help="who ranks and compares")
    about = "make new personal links for these; their old ones end"
    add("--new_links", metavar="NAME,NAME", help=about)
    about = "rankings of earlier rounds, from which the reward model learns too"
    add("--add_labels", nargs="+", default=[], metavar="DB|FILE", help=about)
    about = "the most tokens of a response, in all steps (default 256)"
    add("--max_response_tokens", type=int, default=256, metavar="N", help=about)
    about = "do not wait for the rest of a labelling that was stopped: go on with the answers that there are"
    add("--enough", action="store_true", help=about)
    add("--out", type=Path, required=True, metavar="DIR", help="everything of this round; made if it is not there")
    return parser


def split_options(arguments: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Tell the round's own options from those of its steps.

    Args:
        arguments: all of them.

    Returns:
        The round's, and by step the others, without its name.
    """
    own: list[str] = []
    passed: dict[str, list[str]] = {name: [] for name in _PASSED}
    into = own
    for word in arguments:
        if word.startswith("--"):
            step, _, rest = word[2:].partition(".")
            into = passed.get(step, own) if rest else own
            word = word if into is own else f"--{rest}"
        into.append(word)
    return own, passed


def one_or_list(sources: Sequence[str]) -> str:
    """Write sources as one word, as the stages and evaluate take them.

    Args:
        sources: at least one.

    Returns:
        The one source itself, or a JSON list.
    """
    return sources[0] if len(sources) == 1 else json.dumps(sources)


def configs_first(options: Sequence[str]) -> tuple[list[str], list[str]]:
    """Tell configurations from other options: they come before what the round sets, all else after it.

    Args:
        options: of the user, for a stage.

    Returns:
        ``--config FILE ...`` and the others, each in the order given.
    """
    configs: list[str] = []
    others: list[str] = []
    into = others
    for word in options:
        if word.startswith("-"):
            into = configs if word.partition("=")[0] == "--config" else others
        into.append(word)
    return configs, others


def value_of(options: Sequence[str], name: str) -> str | None:
    """Find what an option was given, as ``--NAME VALUE`` or ``--NAME=VALUE``.

    Args:
        options: of a step.
        name: with its dashes.

    Returns:
        The last value, or None where the option is not given.
    """
    found = None
    for place, word in enumerate(options):
        if word == name:
            found = next(iter(options[place + 1 : place + 2]), None)
        elif word.startswith(f"{name}="):
            found = word.partition("=")[2]
    return found
