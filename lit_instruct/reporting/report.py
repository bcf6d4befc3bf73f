"""``lit-instruct report``: from folders to a page and pictures."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from lit_instruct.reporting.build import build
from lit_instruct.reporting.drawing import DARK, LIGHT, as_png
from lit_instruct.reporting.page import Picture, render
from lit_instruct.reporting.runs import find
from lit_instruct.types import ConfigError, SaveError

PAGE = "report.html"
PROMPTS = 12

_ABOUT = """\
One page about a run, or about several side by side: curves, samples, settings.

  lit-instruct report runs/ppo
  lit-instruct report runs/ppo runs/ppo_ptx --out report
  lit-instruct report small=runs/a/ppo large=runs/b/ppo evaluation/ --out report

A RUN is the folder of a run of any stage (with TensorBoard's event files or CSVLogger's metrics.csv), a folder above
several runs, or the output folder of lit-instruct evaluate. The page needs no network and no other file. docs/report.md
says what it shows.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}. Do: see lit-instruct report --help.")


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Args:
        arguments: behind ``report``.

    Raises:
        ConfigError: an option cannot be used, or there is nothing to report.
        DataError: a file of a run is damaged.
        SaveError: the report could not be written.
    """
    parser = _Parser(
        prog="lit-instruct report",
        description=_ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder, or NAME=FOLDER")
    parser.add_argument("--out", default="report", metavar="DIR", help="folder to write to (default: report)")
    parser.add_argument(
        "--prompts", type=int, default=PROMPTS, metavar="N", help=f"prompts with samples (default: {PROMPTS})"
    )
    options = parser.parse_args(arguments)
    print(f"Report: {write_report(options.runs, options.out, prompts=options.prompts)}")


def write_report(runs: Sequence[str | Path], out: str | Path, *, prompts: int = PROMPTS) -> Path:
    """Write a page about runs, and its figures as PNG files beside it.

    Args:
        runs: folders of runs or of evaluations, or folders above them; ``NAME=FOLDER`` gives a name.
        out: folder for ``report.html`` and ``figures/``, made if need be; files of the same name are replaced.
        prompts: at most so many prompts are shown with samples, of training and of each evaluation.

    Returns:
        The page.

    Raises:
        ConfigError: there is nothing to report, or too much.
        DataError: a file of a run is damaged.
        SaveError: the report could not be written.
    """
    if not runs:
        raise ConfigError("got no runs; need at least one folder. Do: give the folder of a run.")
    if prompts < 0:
        raise ConfigError(f"got prompts {prompts}; need 0 (no samples) or more.")
    report = build(find(runs), prompts=prompts)
    pictures = {chart.slug: Picture(as_png(chart, LIGHT), as_png(chart, DARK)) for chart in report.charts()}
    # Half a surrogate pair, as JSON may hold, cannot be written as UTF-8.
    page = render(report, pictures).encode("utf-8", errors="replace")
    out = Path(out)
    try:
        (out / "figures").mkdir(parents=True, exist_ok=True)
        for slug, picture in pictures.items():
            (out / "figures" / f"{slug}.png").write_bytes(picture.light)
        (out / PAGE).write_bytes(page)
    except OSError as error:
        raise SaveError(f"{out} could not be written ({error}). Do: give another folder with --out.") from error
    return out / PAGE
