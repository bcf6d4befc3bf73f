"""HttpScorer against servers that are broken or mean: it ends in bounded time and memory, with an error of ours."""

from __future__ import annotations

import gzip
import itertools
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lit_instruct.rewards import HttpScorer
from lit_instruct.types import ConfigError
from tests.helpers.numbers import assert_close
from tests.helpers.raw_server import RESET, Parts, RawServer, dripping, http
from tests.unit.rewards.batches import TOKENIZER, batch_of

GOOD = json.dumps({"scores": [1, 2]}).encode()


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")


def score(answer: Callable[[int], Parts], **settings: Any) -> Any:
    with RawServer(answer) as server:
        scorer = HttpScorer(server.url, **({"retries": 1, "backoff": 0.0, "timeout": 0.3} | settings))
        return scorer(*batch_of(["w1", "w2"], ["w3", "w4"]), tokenizer=TOKENIZER)


def chunked(*chunks: bytes) -> bytes:
    return http(b"", "Transfer-Encoding: chunked", length=False) + b"".join(chunks)


def endless(part: bytes) -> Iterator[bytes]:
    """Far more than is taken; bounded, so that a client without bounds fails the test and not the machine."""
    return itertools.repeat(part, 2000)


@pytest.mark.parametrize(
    "whole",
    [
        http(GOOD),
        http(GOOD, length=False),
        chunked(b"%x\r\n" % len(GOOD), GOOD, b"\r\n0\r\n\r\n"),
        http(GOOD, "Content-Type: text/html; charset=nonsense"),
        b"HTTP/1.1 100 Continue\r\n\r\n" + http(GOOD),
    ],
    ids=["length", "until closed", "chunked", "another type", "after a continue"],
)
def test_what_is_an_answer(whole: bytes) -> None:
    assert_close(score(lambda _: [whole]), [1.0, 2.0])


@pytest.mark.parametrize("broken", [b"", http(GOOD)[:-3], http(GOOD)[:20], chunked(b"5\r\nab")])
def test_an_answer_that_breaks_off_is_asked_for_again(broken: bytes) -> None:
    assert_close(score(lambda number: [http(GOOD)] if number > 1 else [broken, RESET]), [1.0, 2.0])
    with pytest.raises(ConfigError, match="got no answer in 2 tries"):
        score(lambda _: [broken, RESET])


@pytest.mark.parametrize(
    "parts",
    [
        lambda: dripping(http(GOOD), 0.1),
        lambda: itertools.chain([http(b"", "Content-Length: 40", length=False)], dripping(b" " * 40, 0.1)),
        lambda: itertools.chain([chunked()], dripping(b"1\r\n{\r\n" * 40, 0.1)),
        lambda: itertools.chain([chunked()], dripping(b"1" * 200, 0.1)),
    ],
    ids=["headers", "content", "chunks", "the length of a chunk"],
)
def test_one_that_drips_has_no_more_time_than_one_that_is_silent(parts: Callable[[], Parts]) -> None:
    started = time.monotonic()
    with pytest.raises(ConfigError, match=r"got no answer in 2 tries of at most 0.3 seconds: .*[Tt]imed out"):
        score(lambda _: parts())
    assert time.monotonic() - started < 2  # each try alone would drip for four seconds and more


@pytest.mark.parametrize(
    "parts",
    [
        lambda: [http(b" " * 200_000 + GOOD)],
        lambda: itertools.chain([http(b"", length=False)], endless(b" " * 100_000)),
        lambda: itertools.chain([chunked()], endless(b"186a0\r\n" + b" " * 100_000 + b"\r\n")),
        lambda: itertools.chain([chunked()], endless(b"1" * 100_000)),
        lambda: itertools.chain([b"HTTP/1.1 200 OK\r\n"], endless(b"X-Header: " + b"x" * 60_000 + b"\r\n")),
        lambda: endless(b"HTTP/1.1 100 Continue\r\n\r\n" * 1000),
    ],
    ids=["content", "without a length", "chunks", "the length of a chunk", "headers", "continue"],
)
def test_one_that_is_too_long_is_not_read(parts: Callable[[], Parts]) -> None:
    with pytest.raises(ConfigError, match=r"got an answer of more than 65,664 bytes for 2 rows; need 64 bytes a row"):
        score(lambda _: parts(), batch_rows=2, timeout=5.0)


def test_rows_have_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number of full length for each row of a request, however many there are."""
    rows = 3000
    content = json.dumps({"scores": [0.1234567890123456789e-300] * rows}).encode()
    assert len(content) > 65_536
    with RawServer(lambda _: [http(content)]) as server:
        scorer = HttpScorer(server.url, batch_rows=rows)
        assert len(scorer(*batch_of(["w1"] * rows, ["w2"] * rows), tokenizer=TOKENIZER)) == rows


def test_packed_answers_are_not_unpacked() -> None:
    bomb = gzip.compress(b" " * 50_000_000)
    assert len(bomb) < 60_000
    with pytest.raises(ConfigError, match=r"in the Content-Encoding 'gzip'; need plain JSON.* Do: "):
        score(lambda _: [http(bomb, "Content-Encoding: gzip")])
    with RawServer(lambda _: [http(GOOD)]) as server:
        HttpScorer(server.url)(*batch_of(["w1", "w2"], ["w3", "w4"]), tokenizer=TOKENIZER)
        assert b"Accept-Encoding: identity\r\n" in server.requests[0]  # nor asked for


@pytest.mark.parametrize("value", ["-1", "1e9", "9" * 5000, "soon", "Fri, 31 Dec 99999 23:59:59 GMT", "\xff"])
def test_a_wish_to_wait_that_means_nothing_is_passed_over(value: str) -> None:
    busy = http(b"", f"Retry-After: {value}", status="503 Busy")
    assert_close(score(lambda number: [http(GOOD) if number > 1 else busy]), [1.0, 2.0])


@pytest.mark.parametrize("target", ["http://[", "//", "\x00", "ftp://x", "http://x:99999999", "a" * 9000])
def test_where_a_redirect_leads_does_not_matter(target: str) -> None:
    with pytest.raises(ConfigError, match="the server answered 302 Found"):
        score(lambda _: [http(b"", f"Location: {target}", status="302 Found")])


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (http(b"", status="204 No Content", length=False), "the server answered 204"),
        (http(b"<!DOCTYPE html>", "Content-Type: text/html"), "got '<!DOCTYPE html>'; need JSON"),
        (http(b'{"scores": [true, false]}'), r"got \[True, False\]; need numbers"),
        (http(b'{"scores": ["1", 2]}'), "got '1' as the score"),
        (http(b'{"scores": [[1], 2]}'), r"got \[1\] as the score"),
        (http(b'{"scores": {"0": 1, "1": 2}}'), "got a dict; need a list"),
        (http(b'{"scores": [1e400, 2]}'), "got inf as the score"),
        (http(b'{"scores": [1' + b"0" * 400 + b", 2]}"), "got 10000.* as the score"),
        (http(b'{"scores": [1' + b"0" * 9000 + b", 2]}"), "need JSON"),
        (http(b"[" * 60_000), "need JSON"),
        (http(b"\xff\xfe\x00"), "need JSON"),
        (http(GOOD, "Content-Length: 1, 2", length=False), "got no answer"),
        (http(GOOD, "Content-Length: 99999999999999999999", length=False), "got no answer"),  # no size of an array
        (http(GOOD, "Content-Length: 99999999999999", length=False), "got no answer"),  # no memory of that size
        (chunked(b"fffffffffffffffffff\r\n", GOOD), "got no answer"),
        (chunked(b"fffffffffffff\r\n", GOOD), "got no answer"),
        (chunked(b"-5\r\n", GOOD), "got no answer"),
        (chunked(b"-8000000000000001\r\n", GOOD), "got no answer"),  # less than any number of 64 bits
        (b"\x16\x03\x01\x02\x00", "got no answer"),
        (http(b"", status="500 " + "x" * 2000), r"answered 500 x{300} \.\.\. after 2 tries"),
    ],
)
def test_nonsense_is_told(answer: bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        score(lambda _: [answer])
    assert "need" in str(caught.value) or "Do: " in str(caught.value)
    assert len(str(caught.value)) < 1500


def test_a_server_cannot_write_to_the_terminal() -> None:
    with pytest.raises(ConfigError, match="answered 404") as caught:
        score(lambda _: [http(b"\x1b[2Jgone", status="404 \x1b[31mNo")])
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://me:s3cret@host/score", "got a user name or password in the address of 'host'"),
        ("https://s3cret@host/score", "got a user name or password"),
        ("https://host/score?access_token=s3cret", "got the parameter 'access_token'"),
        ("https://host/score?a=1&API-KEY=s3cret&key=s3cret", "got the parameter"),
        ("https://host/score?Token=s3cret", "got the parameter 'Token'"),
        ("me:s3cret@host/score", "got 'host/score'; need one that begins with http"),
        ("https://me:s3cret@host:port/score?token=s3cret", "names a host"),
    ],
)
def test_a_secret_in_the_address_is_refused_without_showing_it(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        HttpScorer(url)
    assert "s3cret" not in str(caught.value)
    assert "Do: " in str(caught.value)


def test_an_address_may_have_parameters_and_errors_leave_them_out() -> None:
    with RawServer(lambda _: [http(GOOD)]) as server:
        url = f"{server.url}?model=small"
        scorer = HttpScorer(url, retries=0)
        assert_close(scorer(*batch_of(["w1", "w2"], ["w3", "w4"]), tokenizer=TOKENIZER), [1.0, 2.0])
    with pytest.raises(ConfigError, match="got no answer") as caught:
        HttpScorer(url, retries=0).check(TOKENIZER)
    assert "small" not in str(caught.value)
    told = HttpScorer(url)._why(ValueError("no room in url: /score?model=small."))  # as some of urllib3's errors do
    assert told == "no room in url: /score"


@pytest.mark.parametrize(
    "url", ["http://", "http://[::1", "http://host:port", "http://host:99999", "https:///x", "ftp://host"]
)
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(ConfigError, match=r"HttpScorer url: got .*; need one that begins with .* Do: "):
        HttpScorer(url)
