"""One bad input, and how to run into it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Case(NamedTuple):
    """A line of docs/errors.md.

    Attributes:
        title: what is wrong, in a few words.
        run: makes the input in an empty folder and gives it to the product, whose answer is shown.
    """

    title: str
    run: Callable[[Path], object]
