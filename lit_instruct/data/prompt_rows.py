"""Single rows of the prompt preparation: what is read of them, which split they go to, what begins alike."""

from __future__ import annotations

import datetime
import decimal
import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lit_instruct.data.bad_rows import Flaw, Place
from lit_instruct.data.encoding import Tokenizer
from lit_instruct.data.formats import Columns, short
from lit_instruct.data.sources import Row
from lit_instruct.types import Prompt

_LINE_BREAKS = {ord(mark): f"\\u{ord(mark):04x}" for mark in "\u0085\u2028\u2029"}
"""JSON allows them inside texts, but ``str.splitlines`` of some reader would break the line there."""


class Entry(NamedTuple):
    """A row that can be used, before it is measured."""

    place: Place
    prompt: Prompt
    owner: str | None
    wanted: bool
    line: str


def split_of(owner: str, *, val: float, test: float) -> str:
    """Say which split an owner belongs to: by a hash of the id alone, whatever other owners there are.

    Args:
        owner: the id.
        val: share of the owners in val; a larger one takes owners from train only.
        test: share of the owners in test; likewise.

    Returns:
        ``train``, ``val`` or ``test``.
    """
    position = (int.from_bytes(digest("split", owner, size=8), "big") >> 11) / 2**53  # in [0, 1)
    if position < test:
        return "test"
    return "val" if position >= 1 - val else "train"


def plain_text(prompt: Prompt) -> str:
    """The words of a prompt, one space between any two; chat messages follow each other, without their roles."""
    whole = prompt if isinstance(prompt, str) else " ".join(message["content"] for message in prompt)
    return " ".join(whole.split())


def prefix_keys(tokenizer: Tokenizer, texts: Sequence[str], prefix_tokens: int) -> list[bytes]:
    """Digests of the first tokens of texts: equal for texts that share a prefix.

    Args:
        tokenizer: any.
        texts: from ``plain_text``.
        prefix_tokens: how many tokens count; of a shorter text all do.

    Returns:
        16 bytes for each text.
    """
    encoded: Any = tokenizer(
        list(texts), add_special_tokens=False, padding=False, return_attention_mask=False, verbose=False
    )
    return [
        hashlib.blake2b(np.asarray(ids[:prefix_tokens], dtype="<u4").tobytes(), digest_size=16).digest()
        for ids in encoded["input_ids"]
    ]


def read_entry(row: Row, prompt: Prompt, *, owner_column: str | None, only: str | None) -> Entry | Flaw:
    """Take what is needed of a row.

    Args:
        row: as it was read.
        prompt: its prompt.
        owner_column: the column with the owner; None: there is none.
        only: ``COLUMN=VALUE`` that rows must have to be wanted; None: all are.

    Returns:
        The entry, or what is wrong with the row.
    """
    owner = None
    if owner_column is not None:
        value = row.columns.get(owner_column)
        owner = str(value).strip()
        if isinstance(value, bool) or not isinstance(value, str | int) or not owner:
            found = f"got {short(value)}" if owner_column in row.columns else f"got no such column ({_names(row)})"
            return Flaw(owner_column, f"{found}; need the prompt's owner as text or integer")
    wanted = True
    if only is not None:
        column, _, wish = only.partition("=")
        if column not in row.columns:
            return Flaw(column, f"got no such column ({_names(row)}); need it for only={only}")
        wanted = as_option(row.columns[column]) == wish
    try:
        line = as_json(row.columns)
        line.encode("utf-8")
    except (TypeError, UnicodeEncodeError) as error:
        return Flaw(None, f"got what cannot be written as JSON in UTF-8 ({error})")
    return Entry(row.place, prompt, owner, wanted, line)


def as_option(value: Any) -> str:
    """A value of a column as it is written behind ``only=COLUMN=``."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _names(row: Row) -> str:
    return f"columns found: {', '.join(map(repr, row.columns))}"


def as_json(columns: Columns) -> str:
    """Write a row as one line; dates become text, and numbers that are none (NaN) null.

    Raises:
        TypeError: it holds something else that JSON does not know.
    """
    try:
        line = json.dumps(columns, ensure_ascii=False, allow_nan=False, default=_plain)
    except ValueError:
        line = json.dumps(_finite(columns), ensure_ascii=False, allow_nan=False, default=_plain)
    return line.translate(_LINE_BREAKS)


def _plain(value: Any) -> str:
    if isinstance(value, datetime.date | datetime.time | decimal.Decimal):
        return str(value)
    raise TypeError(f"a {type(value).__name__}")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def digest(*parts: str, size: int = 16) -> bytes:
    """Hash texts, the same on every machine and in every run.

    Args:
        parts: the texts; where one ends and the next begins counts.
        size: bytes of the hash.
    """
    state = hashlib.blake2b(digest_size=size)
    for part in parts:
        content = part.encode("utf-8")
        state.update(len(content).to_bytes(8, "little") + content)
    return state.digest()
