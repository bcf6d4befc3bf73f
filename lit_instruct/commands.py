"""Commands whose options are the arguments of a function: ``data prepare``, ``evaluate`` and ``export``.

They stand above their rooms, which do not know the parser; other commands parse their options where they are.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from lit_instruct.cli import fail, mendable


def prepare(arguments: list[str]) -> None:
    """Run ``lit-instruct data prepare`` and print what each step did.

    Args:
        arguments: behind ``data``.
    """
    from lit_instruct.data import preparation

    if arguments[:1] != ["prepare"]:
        if not set(arguments) & {"-h", "--help"}:
            fail("data: need a command: prepare. For example: lit-instruct data prepare --help")
        arguments = ["prepare", "--help"]
    parser = _parser("data prepare")
    parser.add_argument("-c", "--config", action="config", help="YAML file with options; later ones win.")
    about = "Files of rows with a prompt (.jsonl, .json, .csv, .parquet), dataset folders, or names on the hub."
    parser.add_argument("--prompts", nargs="+", required=True, metavar="FILE", help=about)
    parser.add_function_arguments(preparation.prepare, skip={"prompts"})
    options = parser.parse_args(arguments[1:]).as_dict()
    del options["config"]
    logging.basicConfig(format="%(message)s")
    logging.getLogger("lit_instruct.data.preparation").setLevel(logging.INFO)
    print(preparation.prepare(**options).table())


def evaluate(arguments: list[str]) -> None:
    """Run ``lit-instruct evaluate`` and print the table.

    Args:
        arguments: behind ``evaluate``.
    """
    from lit_instruct import evaluation
    from lit_instruct.evaluation.results import table

    options = _instantiated(evaluation_parser(), arguments)
    del options["config"]
    logging.basicConfig(format="%(message)s")
    logging.getLogger("lit_instruct.evaluation").setLevel(logging.INFO)
    print(table(evaluation.evaluate(**options)))
    written = sorted(path.name for path in Path(options["out"]).iterdir())
    print(f"\nEverything is in {options['out']}: {', '.join(written)}")


def evaluation_parser() -> ArgumentParser:
    """What ``lit-instruct evaluate`` understands."""
    import lit_instruct.toyworld  # noqa: F401 - so that its GoldScorer is known by its short name
    from lit_instruct import evaluation

    parser = _parser("evaluate")
    parser.add_argument("-c", "--config", action="config", help="YAML file with options; later ones win.")
    about = "NAME=SOURCE for each model: a checkpoint, a Hugging Face folder or hub name, a GGUF file."
    parser.add_argument(
        "--models", nargs="+", type=str | evaluation.ModelSource, required=True, metavar="MODEL", help=about
    )
    parser.add_function_arguments(evaluation.evaluate, skip={"models"})
    return parser


def _instantiated(parser: ArgumentParser, arguments: list[str]) -> dict[str, Any]:
    """All options, those that name classes as objects; what these raise comes out as it was raised."""
    try:
        return parser.instantiate_classes(parser.parse_args(arguments)).as_dict()
    except ValueError as error:
        reason: BaseException | None = error
        while reason is not None and not isinstance(reason, mendable()):
            reason = reason.__cause__  # the parser's own words stand around it
        raise (reason or error) from None


def export(arguments: list[str]) -> None:
    """Run ``lit-instruct export`` and say what was written.

    Args:
        arguments: behind ``export``.
    """
    from lit_instruct.models.export import export_checkpoint

    parser = _parser("export")
    parser.add_function_arguments(export_checkpoint, as_positional=True, skip={"ema", "adapter"})
    parser.add_argument("--adapter", action="store_true", help="write the adapter alone, in the format of PEFT")
    parser.add_argument(
        "--ema", action="store_true", help="take the average that WeightEMA keeps, not the last weights"
    )
    options = parser.parse_args(arguments).as_dict()
    print(f"Exported: {export_checkpoint(**options)}")


def _parser(command: str) -> ArgumentParser:
    """A parser whose errors are one line."""

    class Parser(ArgumentParser):
        def error(self, message: str, *arguments: object, **more: object) -> NoReturn:
            fail(f"{command}: {message}\nAll options: lit-instruct {command} --help")

    return Parser(prog=f"lit-instruct {command}", allow_abbrev=False)
