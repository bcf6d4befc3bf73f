"""Run into every bad input and write down what is printed: docs/errors.md.

    python scripts/bad_inputs/run.py           # writes the page
    python scripts/bad_inputs/run.py --check   # exit status 1 where the page is out of date

Every file in this folder with a list ``CASES`` is a section; the first line of its docstring is the heading.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import logging
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # as a script, this file's folder stands there instead

from lit_instruct.types import ConfigError, DataError, NonFiniteError, SaveError  # noqa: E402
from scripts.bad_inputs.case import Case  # noqa: E402

PAGE = ROOT / "docs" / "errors.md"

_INTRODUCTION = """\
# What a wrong input is told

Written by `python scripts/bad_inputs/run.py`, which runs into every one of these; a test keeps the page true. On the
command line each ends with exit status 2 before training starts; from Python the same text comes as an exception of
`lit_instruct.types`. Where nothing has to end, what is shown is a warning.
"""

_OURS = (ConfigError, DataError, NonFiniteError, SaveError)

_UNSTABLE = (
    (re.compile(r"(127\.0\.0\.1|localhost):\d+"), r"\1:PORT"),
    (re.compile(r"\bport=\d+"), "port=PORT"),
    (re.compile(r"\b0x[0-9a-f]{8,}"), "0x..."),
)
"""What differs from run to run."""


class NotToldError(AssertionError):
    """A bad input ended in something else than a message for the user."""


def sections() -> Iterator[ModuleType]:
    """The modules of this folder that hold cases."""
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.stem != "run":
            module = importlib.import_module(f"scripts.bad_inputs.{path.stem}")
            if hasattr(module, "CASES"):
                yield module


def told(case: Case) -> str:
    """Run into a bad input.

    Args:
        case: the input.

    Returns:
        What the user reads, with names that are the same in every run.

    Raises:
        NotToldError: nothing was said, or the error is none of ours.
    """
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made).resolve()
        with _overheard() as heard, contextlib.chdir(folder):
            message = _answer(case, folder, heard)
    return _stable(message, folder)


def _answer(case: Case, folder: Path, heard: io.StringIO) -> str:
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
            case.run(folder)
    except _OURS as error:
        return str(error)
    except SystemExit as stop:
        printed = stderr.getvalue()
        start = re.search(r"^lit-instruct.*?: error: ", printed, flags=re.MULTILINE)
        if stop.code != 2 or start is None:
            raise NotToldError(f"{case.title}: ended with status {stop.code} and {printed!r}") from stop
        return printed[start.end() :]
    except Exception as error:
        raise NotToldError(f"{case.title}: ended with {type(error).__name__}: {error}") from error
    if not heard.getvalue():
        raise NotToldError(f"{case.title}: nothing was said")
    return heard.getvalue()


@contextlib.contextmanager
def _overheard() -> Iterator[io.StringIO]:
    """The warnings of the package, logged or of Python's kind."""
    heard = io.StringIO()
    handler = logging.StreamHandler(heard)
    handler.setLevel(logging.WARNING)
    logger = logging.getLogger("lit_instruct")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield heard
    finally:
        logger.removeHandler(handler)


def _stable(message: str, folder: Path) -> str:
    """With the names of temporary folders and of this checkout taken off."""
    for path in (folder, ROOT):
        message = message.replace(f"{path}{os.sep}", "").replace(str(path), ".")
    for pattern, name in _UNSTABLE:
        message = pattern.sub(name, message)
    return message.strip()


def page() -> str:
    """The whole of docs/errors.md."""
    parts = [_INTRODUCTION]
    for module in sections():
        rows = "\n".join(as_row(case, told(case)) for case in module.CASES)
        parts.append(f"## {heading_of(module)}\n\n| what is wrong | what is printed |\n|---|---|\n{rows}\n")
    return "\n".join(parts)


def heading_of(module: ModuleType) -> str:
    """Of the section with the cases of a module."""
    return (module.__doc__ or module.__name__).splitlines()[0].rstrip(".")


def as_row(case: Case, message: str) -> str:
    """A line of the page."""
    return f"| {case.title} | {_cell(message)} |"


def _cell(message: str) -> str:
    """A message as the cell of a table: code, line by line."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return "<br>".join(f"`` {line} ``" if "`" in line else f"`{line}`" for line in lines).replace("|", "\\|")


def main() -> None:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    made = page()
    if not check:
        PAGE.write_text(made, encoding="utf-8")
    elif made != PAGE.read_text(encoding="utf-8"):
        raise SystemExit(f"{PAGE.relative_to(ROOT)} is out of date. Do: python scripts/bad_inputs/run.py")


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"  # a name that is looked for in vain is not asked for on the network
    main()
