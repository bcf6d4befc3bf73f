"""What counts as personal data, what does not, and what happens to it."""

from __future__ import annotations

import itertools
import random
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_instruct.data.personal_data import (
    Span,
    find_personal_data,
    load_finder,
    mask_row,
    masked,
    without_overlaps,
)
from lit_instruct.types import ConfigError

FOUND = [
    ("email", "jane.doe+news@mail.example.co.uk"),
    ("email", "müller@büro.de"),
    ("phone", "+1 (212) 555-0198"),
    ("phone", "+1-202-555-0143"),
    ("phone", "+44 20 7946 0958"),
    ("phone", "+44 (0)20 7946 0958"),
    ("phone", "(212) 555-0198"),
    ("phone", "212.555.0198"),
    ("phone", "1-800-555-0199"),
    ("phone", "020 7946 0958"),
    ("phone", "01 23 45 67 89"),
    ("phone", "030/1234567"),
    ("card", "4111 1111 1111 1111"),
    ("card", "5500-0000-0000-0004"),
    ("card", "378282246310005"),
    ("iban", "GB82 WEST 1234 5698 7654 32"),
    ("iban", "DE89370400440532013000"),
    ("ssn", "536-90-4399"),
    ("ip", "8.8.8.8"),
    ("ip", "2001:4860:4860::8888"),
    ("address", "12 High Street"),
    ("address", "221B Baker Street"),
    ("address", "350 5th Ave"),
    ("address", "45 Old Mill Road"),
    ("address", "P.O. Box 123"),
    ("address", "Springfield, IL 62704"),
    ("address", "SW1A 1AA"),
    ("address", "Hauptstraße 12"),
    ("address", "Lindenstr. 5b"),
    ("address", "12 rue de la Paix"),
]

HARMLESS = [
    "In 2019-2020 we sold 1,234,567 units at $1,299.99 each.",
    "Pi is 3.14159265358979 and e is 2.71828182845905.",
    "Ping 10.0.0.1, 127.0.0.1 and 192.168.1.1; upgrade to 1.2.3 or 1.2.3.4.5.",
    "The meeting is on 01.02.2023 12:30, or 2023-01-02 03:04:05.",
    "1 2 3 4 5 6 7 8 9 10, 11 12 13",
    "card 4111 1111 1111 1112",  # the checksum does not hold
    "account GB82 WEST 1234 5698 7654 33",
    "12345678901234567890 is a large number",
    "Walk 2 miles down the road, take 5 more ways.",
    "@mention a@b user@localhost",
    "ISBN 978-3-16-148410-0",
    "std::vector<int> a::b 12:30:45 00:1A:2B",
    "Windows 10 has 3 Main Points",
    "call him 12 times; phone 3 people",
    "x = 1000000007; y = 0x1F; 0.001 0.002",
    "",
]


@pytest.mark.parametrize(("kind", "text"), FOUND)
def test_what_is_found(kind: str, text: str) -> None:
    for before, after in (("", ""), ("Write to ", "."), ("(it is ", ")"), ("see\n", "\nplease")):
        spans = find_personal_data(before + text + after)
        assert [(before + text + after)[span.start : span.end] for span in spans] == [text]
        assert [span.kind for span in spans] == [kind]


@pytest.mark.parametrize("text", HARMLESS)
def test_what_is_not(text: str) -> None:
    assert find_personal_data(text) == []


@pytest.mark.parametrize("before", ["phone: ", "my number is ", "Tel ", "call me at "])
def test_a_bare_number_needs_a_word_that_says_what_it_is(before: str) -> None:
    assert find_personal_data(f"{before}2125550198") == [Span(len(before), len(before) + 10, "phone")]
    assert find_personal_data("order 2125550198") == []


def test_words_behind_an_account_number_are_not_part_of_it() -> None:
    text = "GB82 WEST 1234 5698 7654 32 AND MORE"
    assert masked(text, find_personal_data(text)) == "[IBAN] AND MORE"


@given(st.integers(0, 10**14 - 1))
def test_card_numbers_by_their_check_digit(number: int) -> None:
    """Of the ten numbers that differ in the last digit exactly one is a card number: the tables of Luhn's patent."""
    digits = f"4{number:014d}"
    folded = [0, 2, 4, 6, 8, 1, 3, 5, 7, 9]  # twice the digit, its digits added
    total = sum(folded[int(d)] if place % 2 == 0 else int(d) for place, d in enumerate(reversed(digits)))
    right = f"{digits}{-total % 10}"
    for last in "0123456789":
        spans = [span for span in find_personal_data(f"x {digits}{last} x") if span.kind == "card"]
        assert bool(spans) == (digits + last == right)


def test_several_in_one_text_are_masked() -> None:
    text = "Jane (jane@example.com, 212-555-0198) lives at 12 High Street, London."
    assert masked(text, find_personal_data(text)) == "Jane ([EMAIL], [PHONE]) lives at [ADDRESS], London."
    assert masked("nothing", []) == "nothing"


def test_overlaps_are_merged() -> None:
    spans = [Span(8, 9, "d"), Span(2, 5, "b"), Span(0, 3, "a"), Span(0, 2, "c"), Span(5, 6, "e")]
    assert without_overlaps(spans) == [Span(0, 5, "a"), Span(5, 6, "e"), Span(8, 9, "d")]


def test_rows_are_masked_where_a_model_reads() -> None:
    row: dict[str, Any] = {
        "prompt": [{"role": "user", "content": "a@b.com"}],
        "responses": ["x", "8.8.8.8 and a@b.com"],
        "ranks": [1, 2],
        "owner": "a@b.com",
        "text": None,
    }
    cleaned, kinds = mask_row(row, find_personal_data)
    assert cleaned == {
        **row,
        "prompt": [{"role": "user", "content": "[EMAIL]"}],
        "responses": ["x", "[IP] and [EMAIL]"],
    }
    assert kinds == ["email", "ip", "email"]
    assert row["prompt"][0]["content"] == "a@b.com"


HOSTILE = [
    *("a", "1", "1 ", "A ", "Aa ", "a@", "a.", "+1", "1.", "::", "1:", "AB12 ", "0 12 ", "(212) ", "+12(", "a-"),
    *("Astr", "phone ", "12 Aa ", "Ab, AB 1234 ", "4 ", "12 rue de ", "tel 12345", "aaaa-"),
]


@pytest.mark.parametrize("piece", HOSTILE)
def test_no_text_takes_longer_than_its_length(piece: str) -> None:
    """A pattern that backtracks would need minutes for 40,000 characters."""
    text = (piece * 40_000)[:40_000]
    begun = time.process_time()
    find_personal_data(f"1 {text}")
    find_personal_data(f"1 {text}@")
    assert time.process_time() - begun < 2.0


def test_off_finds_nothing_and_is_told_apart() -> None:
    assert load_finder("off") is None
    assert load_finder("regex") is find_personal_data


# -- Presidio


def test_presidio_must_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "presidio_analyzer", None)
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(ConfigError, match=r"personal_data: got 'presidio'.*lit-instruct\[pii\]"):
        load_finder("presidio")


@pytest.fixture
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be fetched."""
    pytest.importorskip("presidio_analyzer", reason="presidio-analyzer is not installed (pip install '.[pii]')")

    def refuse(*arguments: Any, **more: Any) -> None:
        raise AssertionError("tried to reach the network")

    import tldextract

    # Presidio's own recognizer of e-mail uses this one, which fetches a list unless an earlier run has stored it.
    monkeypatch.setattr("tldextract.tldextract.TLD_EXTRACTOR", tldextract.TLDExtract(cache_dir=None))
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.usefixtures("_offline")
def test_presidio_adds_to_the_patterns() -> None:
    find = load_finder("presidio")
    assert find is not None
    for kind, text in FOUND:
        assert find(f"Write to {text} now")[0].kind == kind
    crypto = "Pay to 16Yeky6GMjeNkAiNcBY7ZhrLoMSgg1BoyZ please"  # a bitcoin address, from Presidio's documentation
    assert find_personal_data(crypto) == []
    assert masked(crypto, find(crypto)) == "Pay to [CRYPTO] please"
    assert find("Visit www.example.com in May 2020, it costs 12 dollars.") == []
    assert find("My name is David.") == []  # formats only


@pytest.mark.usefixtures("_offline")
def test_a_spacy_model_finds_names(tmp_path: Path) -> None:
    import spacy

    model = spacy.blank("en")
    ruler = model.add_pipe("entity_ruler")
    ruler.add_patterns([{"label": "PERSON", "pattern": "David Johnson"}, {"label": "GPE", "pattern": "Maine"}])
    model.to_disk(tmp_path / "model")
    find = load_finder("presidio", str(tmp_path / "model"))
    assert find is not None
    text = "I am David Johnson of Maine, d@example.com."
    assert masked(text, find(text)) == "I am [PERSON] of [LOCATION], [EMAIL]."


@pytest.mark.usefixtures("_offline")
def test_a_model_that_is_not_there_is_not_fetched() -> None:
    with pytest.raises(ConfigError, match="personal_data_model: got 'en_core_web_xxl', which is not installed"):
        load_finder("presidio", "en_core_web_xxl")


def test_random_text_is_handled() -> None:
    """Whatever the text, spans are in order, inside of it, and masking them leaves the rest."""
    stream = random.Random(0)
    for _ in range(300):
        text = "".join(stream.choices("01289+-. ()@:/aAGBstrve", k=stream.randint(0, 80)))
        spans = find_personal_data(text)
        assert all(0 <= span.start < span.end <= len(text) for span in spans)
        assert all(a.end <= b.start for a, b in itertools.pairwise(spans))
