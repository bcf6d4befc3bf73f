"""HttpScorer against random bytes, random JSON and mutated answers: an error of ours, or scores; no hang."""

from __future__ import annotations

import json
import queue
import time
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from lit_instruct.rewards import HttpScorer
from lit_instruct.types import ConfigError
from tests.helpers.raw_server import RESET, Parts, RawServer, http
from tests.unit.rewards.batches import TOKENIZER, batch_of

_FEW, _MANY = 150, 35_000
_TIMEOUT = 0.5
_HANGS = 60.0

BATCH = batch_of(["w1", "w2"], ["w3", "w4"])
GOOD = json.dumps({"scores": [1.5, -2]}).encode()

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
scored = st.one_of(
    st.lists(values, min_size=1, max_size=3).map(lambda scores: {"scores": scores}),
    st.lists(st.floats() | st.integers(), min_size=2, max_size=2).map(lambda scores: {"scores": scores}),
    values,
)
contents = st.one_of(scored.map(lambda value: json.dumps(value).encode()), st.binary(max_size=200))
statuses = st.sampled_from(
    ["200 OK", "200", "204 No", "302 Found", "404 X", "500 Y", "503 Z", "999 ?", "abc", "100 Go", ""]
)
headers = st.lists(
    st.sampled_from(
        [
            "Content-Type: application/json",
            "Content-Encoding: gzip",
            "Content-Encoding: br, deflate",
            "Content-Length: 3",
            "Content-Length: -1",
            "Content-Length: 1, 2",
            "Content-Length: 99999999999999",
            "Content-Length: 99999999999999999999",
            "Transfer-Encoding: chunked",
            "Retry-After: 0",
            "Retry-After: -1",
            "Location: http://[",
            "Set-Cookie: a=b; expires=never; domain=\0",
            "Connection: close",
            "Connection: keep-alive",
            "no colon",
            ": no name",
            " folded",
        ]
    )
    | st.text(st.characters(codec="latin-1"), max_size=30).map(lambda text: "X-Header: " + text),
    max_size=4,
)


def _head_and_content(status: str, lines: list[str], content: bytes, length: bool) -> bytes:
    head = "\r\n".join([f"HTTP/1.1 {status}", *lines, *([f"Content-Length: {len(content)}"] if length else []), "", ""])
    return head.encode("latin-1", "replace") + content


formed = st.builds(_head_and_content, statuses, headers, contents, st.booleans())


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A sound answer with some bytes put in, taken out or replaced."""
    whole = bytearray(http(GOOD, *draw(headers)))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(whole)))
        whole[place : place + draw(st.integers(0, 5))] = draw(st.binary(max_size=5))
    return bytes(whole)


answers = st.one_of(formed, mutated(), st.binary(max_size=300))
endings = st.sampled_from([[], [RESET]])


@pytest.fixture(scope="module")
def told() -> Iterator[tuple[RawServer, queue.SimpleQueue[Parts]]]:
    """A server that gives the answers of the queue, one a request, and then nothing."""
    parts: queue.SimpleQueue[Parts] = queue.SimpleQueue()
    with pytest.MonkeyPatch.context() as patch, RawServer(lambda _: [] if parts.empty() else parts.get()) as server:
        patch.setenv("NO_PROXY", "*")
        yield server, parts


def check(told: tuple[RawServer, queue.SimpleQueue[Parts]], answer: bytes, ending: list[bytes]) -> None:
    server, parts = told
    while not parts.empty():
        parts.get()
    parts.put([answer, *ending])
    started = time.monotonic()
    try:
        scores = HttpScorer(server.url, retries=0, timeout=_TIMEOUT)(*BATCH, tokenizer=TOKENIZER)
    except ConfigError as error:
        _check_error(str(error))
    else:
        assert scores.dtype == torch.float32
        assert scores.shape == (2,)
        assert bool(scores.isfinite().all())
    assert time.monotonic() - started < _HANGS  # one try takes half a second


def _check_error(message: str) -> None:
    assert message.startswith("reward at http://127.0.0.1:")
    assert len(message) < 2000


def fuzz(examples: int) -> settings:
    """Without shrinking in the long run: what is found there is looked at by hand."""
    return settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=examples == _FEW,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )


@fuzz(_FEW)
@given(answer=answers, ending=endings)
def test_answers(told: tuple[RawServer, queue.SimpleQueue[Parts]], answer: bytes, ending: list[bytes]) -> None:
    check(told, answer, ending)


@pytest.mark.slow  # minutes
@fuzz(_MANY)
@given(answer=answers, ending=endings)
def test_many_answers(told: tuple[RawServer, queue.SimpleQueue[Parts]], answer: bytes, ending: list[bytes]) -> None:
    check(told, answer, ending)
