"""``lit-instruct labels``: out of the database into files that train, and to and from other labelling programs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from lit_instruct.feedback import argilla, label_studio
from lit_instruct.feedback.foreign import Fields, by_task, read_foreign
from lit_instruct.feedback.rows import LabelRows, read_label_rows, write_files, write_label_rows
from lit_instruct.types import ConfigError

_ABOUT = """\
Labels out of databases and files; docs/feedback.md says more.

  lit-instruct labels export labels.sqlite --out labels
      comparisons.jsonl, demonstrations.jsonl and prompts.jsonl, which the stages read
  lit-instruct labels export labels.sqlite --out labels --format argilla         (or label-studio)
  lit-instruct labels import argilla.json --out labels --format argilla          (or label-studio)
"""

_FORMATS = ("jsonl", "argilla", "label-studio")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}.\nDo: see lit-instruct labels --help")


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Args:
        arguments: behind ``labels``.

    Raises:
        ConfigError: options that cannot work.
        DataError: labels that cannot be used.
    """
    options = _parser().parse_args(arguments)
    if options.command == "export":
        _write(read_label_rows(options.sources), options)
        return
    fields = Fields(options.prompt_field, options.response_field, tuple(options.buckets))
    read = argilla.from_record if options.format == "argilla" else label_studio.from_task
    rows, left_out = read_foreign(options.sources, lambda record: read(record, fields))
    if left_out:
        print(f"Left out, since they were drafts, discarded or cancelled: {left_out} answers.")
    options.format = "jsonl"
    _write(rows, options)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="lit-instruct labels",
        description=_ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="export | import")
    export = commands.add_parser("export", allow_abbrev=False)
    export.add_argument("sources", nargs="+", metavar="DB|FILE", help="databases of labels, or files of rows")
    export.add_argument("--format", choices=_FORMATS, default="jsonl", help="(default: what the stages read)")
    imports = commands.add_parser("import", allow_abbrev=False)
    imports.add_argument(
        "sources", nargs="+", metavar="FILE", help="what the other program has exported (.json, .jsonl)"
    )
    imports.add_argument("--format", choices=_FORMATS[1:], required=True, help="whose format it is")
    imports.add_argument(
        "--prompt_field", default="prompt", metavar="NAME", help="field of the prompt (default prompt)"
    )
    about = "text question or text area with a demonstration (default response)"
    imports.add_argument("--response_field", default="response", metavar="NAME", help=about)
    about = "Label Studio's buckets, the best first, where their names do not end in numbers"
    imports.add_argument(
        "--buckets", type=lambda text: text.split(","), default=[], metavar="BEST,...,WORST", help=about
    )
    for command in (export, imports):
        command.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder; made if it is not there")
        command.add_argument("--overwrite", action="store_true", help="replace files that are there")
    return parser


def _write(rows: LabelRows, options: argparse.Namespace) -> None:
    if options.format == "jsonl":
        written = write_label_rows(rows, options.out, overwrite=options.overwrite)
        counts = written.counts
        if written.blank:
            print(f"Left out of rankings, since they have no text: {written.blank} responses.")
        if written.unranked:
            print(f"Left out, since fewer than two responses remained: {written.unranked} rankings.")
    else:
        tasks = by_task(rows)
        if options.format == "argilla":
            records = [argilla.to_record(task) for task in tasks]
        else:
            labelers = dict.fromkeys(row.get("labeler") for task in tasks for row in task.rows)
            numbers = {labeler: number for number, labeler in enumerate(labelers, start=1)}
            records = [label_studio.to_task(task, numbers) for task in tasks]
        counts = {f"{options.format}.json": len(records)} if records else {}
        write_files(
            dict.fromkeys(counts, json.dumps(records, indent=1) + "\n"), options.out, overwrite=options.overwrite
        )
    for name, count in counts.items():
        print(f"{options.out / name}: {count} {'rows' if options.format == 'jsonl' else 'tasks'}")
    if not counts:
        print("There are no labels; nothing was written.")
