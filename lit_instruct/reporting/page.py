"""A report as one HTML page that needs nothing else: no script, no network, pictures inside."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from lit_instruct.reporting.charts import alt_text
from lit_instruct.reporting.drawing import DARK, LIGHT
from lit_instruct.reporting.numbers import hundredths, number
from lit_instruct.reporting.sections import Report

_LONG = 700
"""Texts of more characters are folded."""

# Not to be seen, or making other text seen in another order: control characters but tab and line feed; overrides of the
# direction of writing.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202d\u202e]")


class Picture(NamedTuple):
    """A chart, drawn.

    Attributes:
        light: PNG file for light pages.
        dark: and for dark ones.
    """

    light: bytes
    dark: bytes


def render(report: Report, pictures: Mapping[str, Picture]) -> str:
    """Write the page.

    Args:
        report: what it says. Texts in it are data: what looks like HTML in them is shown as it stands.
        pictures: of its charts, by ``slug``.

    Returns:
        HTML.
    """
    environment = Environment(
        loader=PackageLoader("lit_instruct.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    environment.filters |= {"number": number, "hundredths": hundredths, "alt": alt_text, "data_uri": _data_uri}
    template = environment.get_template("report.html.jinja")
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return template.render(
        report=report, pictures=pictures, written=written, long=_LONG, light_theme=LIGHT, dark_theme=DARK
    )


def visible(text: str) -> str:
    """Replace control characters by the pictures that Unicode has for them, or by a question mark in a diamond."""
    return _CONTROL.sub(lambda match: chr(0x2400 + ord(match[0])) if match[0] < " " else "\ufffd", text)


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
