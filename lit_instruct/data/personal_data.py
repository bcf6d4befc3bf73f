"""Find personal data in text: e-mail and postal addresses, phone, card, bank account and identity numbers.

The patterns here need nothing but Python. They know formats and not names: "Jane Smith of Leeds" passes. Where a
format has a checksum (cards, bank accounts) it must hold. A filter of training prompts that takes one prompt too many
costs little, so patterns are chosen to miss little; what is common in prompts and harmless (years, dates, decimals,
prices, versions, addresses of local networks) is left alone.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

from lit_instruct.types import ConfigError

PersonalData = Literal["regex", "presidio", "off"]

TEXT_COLUMNS = ("prompt", "messages", "response", "completion", "responses", "chosen", "rejected", "text")
"""The columns that a model reads, wherever rows are used; others (owner, date, source) are not looked into."""


class Span(NamedTuple):
    """A stretch of text, ``text[start:end]``, and the kind of personal data it looks like."""

    start: int
    end: int
    kind: str


Finder = Callable[[str], list[Span]]
"""Gives the personal data in a text, in order, without overlaps."""


def load_finder(personal_data: PersonalData, model: str | None = None) -> Finder | None:
    """Get what finds personal data.

    Args:
        personal_data: ``regex``: the patterns of this file; ``presidio``: these and the library; ``off``: nothing.
        model: of Presidio: an installed spaCy model that finds names of persons and places; None: no model.

    Returns:
        The finder; None for ``off``.

    Raises:
        ConfigError: Presidio or the model is not installed, or a model is named where none is used.
    """
    if model is not None and personal_data != "presidio":
        raise ConfigError(
            f"personal_data_model: got {model!r} with personal_data={personal_data!r}; need personal_data='presidio'. "
            "Do: set it, or leave the model out."
        )
    if personal_data == "off":
        return None
    if personal_data == "regex":
        return find_personal_data
    from lit_instruct.data.presidio import PresidioFinder

    library = PresidioFinder(model)
    return lambda text: without_overlaps([*find_personal_data(text), *library(text)])


def find_personal_data(text: str) -> list[Span]:
    """Find what the patterns of this file know.

    Args:
        text: any text.

    Returns:
        Spans, in order, without overlaps; their kinds are ``email``, ``iban``, ``card``, ``ssn``, ``ip``, ``phone`` and
        ``address``.
    """
    if not _WORTH_A_LOOK(text):
        return []
    found: list[Span] = []
    for kind, pattern, check in _PATTERNS:
        for match in pattern.finditer(text):
            part = match.lastgroup or 0  # the part that is personal data, where a pattern needs more to know it
            length = check(match[part])
            if length:
                found.append(Span(match.start(part), match.start(part) + length, kind))
    return without_overlaps(found)


def without_overlaps(spans: Iterable[Span]) -> list[Span]:
    """Merge spans that overlap into one of the kind that begins first; among those, of the longest."""
    merged: list[Span] = []
    for span in sorted(spans, key=lambda span: (span.start, -span.end)):
        if merged and span.start < merged[-1].end:
            merged[-1] = merged[-1]._replace(end=max(merged[-1].end, span.end))
        else:
            merged.append(span)
    return merged


def masked(text: str, spans: Sequence[Span]) -> str:
    """Put ``[KIND]`` in the place of each span; spans are in order and do not overlap."""
    parts, end = [], 0
    for span in spans:
        parts += [text[end : span.start], f"[{span.kind.upper()}]"]
        end = span.end
    return "".join([*parts, text[end:]])


def mask_row(columns: dict[str, Any], finder: Finder) -> tuple[dict[str, Any], list[str]]:
    """Mask the personal data in every text of a row that a model would read.

    Args:
        columns: the row; texts may be strings, lists of them, or chat messages.
        finder: what finds personal data.

    Returns:
        The row with ``[KIND]`` where personal data stood, and the kind of each place.
    """
    kinds: list[str] = []

    def clean(value: Any) -> Any:
        if isinstance(value, str):
            spans = finder(value)
            kinds.extend(span.kind for span in spans)
            return masked(value, spans) if spans else value
        if isinstance(value, list):
            return [clean(item) for item in value]
        if isinstance(value, dict):
            return {name: clean(item) for name, item in value.items()}
        return value

    cleaned = {name: clean(value) if name in TEXT_COLUMNS else value for name, value in columns.items()}
    return cleaned, kinds


def _whole(found: str) -> int:
    return len(found)


def _digits(found: str) -> str:
    return "".join(filter(str.isdecimal, found))


def _luhn(found: str) -> int:
    """Card numbers: from the right, every second digit doubled, digits of the sum added: a multiple of ten."""
    total = 0
    for place, digit in enumerate(map(int, reversed(_digits(found)))):
        doubled = digit * 2 if place % 2 else digit
        total += doubled - 9 if doubled > 9 else doubled
    return len(found) if total % 10 == 0 else 0


def _iban(found: str) -> int:
    """Bank accounts (ISO 13616): country and check digits moved to the end, letters as 10 to 35, modulo 97 is 1.

    The pattern may have run into words behind the number: the longest beginning that holds is taken.
    """
    for end in (match.end() for match in reversed(list(re.finditer(r"\w+", found)))):
        plain = found[:end].replace(" ", "")
        if len(plain) >= 15 and int("".join(str(int(c, 36)) for c in plain[4:] + plain[:4])) % 97 == 1:
            return end
    return 0


def _public_ip(found: str) -> int:
    try:
        return len(found) if ipaddress.ip_address(found).is_global else 0
    except ValueError:
        return 0


def _phone_length(found: str) -> int:
    """At most the 15 digits of an international number (ITU E.164), at least nine, or those of a name's own number."""
    return len(found) if 9 <= len(_digits(found)) <= 15 else 0


_WORTH_A_LOOK = re.compile(r"[\d@]").search  # every pattern below needs one of these

_NAME = r"(?:[A-Z][\w'’.-]{0,30}|\d{1,3}(?:st|nd|rd|th))"
_STREET = (
    r"(?:Street|Str|St|Avenue|Ave|Road|Rd|Boulevard|Blvd|Lane|Ln|Drive|Dr|Court|Ct|Place|Pl|Square|Sq|Terrace|Way"
    r"|Highway|Hwy|Parkway|Pkwy|Close|Crescent)"
)
_STREET_FR = r"(?:rue|avenue|boulevard|place|chemin|allée|impasse|quai)"
_LINK_FR = r"(?:(?:de la|de l['’]|des?|du|d['’])\s?)?"
_ADDRESSES = "|".join(
    [
        rf"(?<!\w)\d{{1,5}}[A-Za-z]?,?[ \t]+(?:{_NAME}[ \t]+){{1,4}}{_STREET}\b",  # 12 Old Mill Road
        r"(?<!\w)P\.?[ \t]?O\.?[ \t]?Box[ \t]+\d{1,7}",
        r"(?<!\w)[A-Z][a-z]{2,20},?[ \t]+[A-Z]{2}[ \t]+\d{5}(?:-\d{4})?(?!\w)",  # Springfield, IL 62704
        r"(?<!\w)[A-Z]{1,2}\d[A-Z\d]?[ \t]\d[A-Z]{2}(?!\w)",  # SW1A 1AA
        r"(?<!\w)[A-ZÄÖÜ][\wß-]{1,40}(?:stra(?:ß|ss)e|str\.|weg|platz|allee|gasse)[ \t]+\d{1,4}[a-z]?(?!\w)",
        rf"(?<!\w)\d{{1,4}}(?:[ \t]?(?:bis|ter))?,?[ \t]+{_STREET_FR}[ \t]+{_LINK_FR}[A-ZÉÈÀ]\w{{1,40}}",
    ]
)
_PHONES = "|".join(
    [
        r"(?<![\w+])\+\d{1,3}(?:[ \t./-]?(?:\(\d{1,5}\)|\d{1,5})){1,6}(?!\d)",  # +44 (0)20 7946 0958
        r"(?<![\w.+-])(?:1[ .-])?(?:\(\d{3}\)[ ]?|\d{3}[ .-])\d{3}[ .-]\d{4}(?![\w-])",  # (212) 555-0198
        # 020 7946 0958, 01 23 45 67 89, 030/1234567; not 01.02.2023 12:00
        r"(?<![\w.,+:/-])\(?0(?!\d?[./-]\d{1,2}[./-]\d{4}(?!\d))\d{1,5}\)?[ ./-]\d{2,8}(?:[ .-]\d{2,4}){0,4}(?![\w:])",
        # A bare number only behind a word that says what it is.
        r"(?i:\b(?:(?:tele)?phone|mobile|cell|fax|tel|whatsapp|number|call me (?:at|on))(?: number)?(?: is)?[ .:]{0,3})"
        r"(?P<bare>\d{7,15})(?!\w)",
    ]
)
_PATTERNS: list[tuple[str, re.Pattern[str], Callable[[str], int]]] = [
    ("email", re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[\w-]{1,63}\.){1,8}[^\W\d_]{2,24}(?![\w-])"), _whole),
    ("iban", re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?:[ ]?[A-Z\d]){11,30}(?!\w)"), _iban),
    ("card", re.compile(r"(?<![\w.,-])[2-6]\d{3}(?:[ -]?\d){9,15}(?![\w-])"), _luhn),
    ("ssn", re.compile(r"(?<![\w-])(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-])"), _whole),
    ("ip", re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?!\.?\w)"), _public_ip),
    ("ip", re.compile(r"(?<![\w:])[23][0-9A-Fa-f]{3}(?::[0-9A-Fa-f]{0,4}){2,7}(?![\w:])"), _public_ip),
    ("phone", re.compile(_PHONES), _phone_length),
    ("address", re.compile(_ADDRESSES), _whole),
]
"""Kind, pattern, and a check that says how many characters of the match are the thing itself (0: it is none)."""
