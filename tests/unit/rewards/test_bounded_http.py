"""The parts of BoundedAdapter that HttpScorer alone does not show: one clock, plain sockets, packed bytes, TLS."""

from __future__ import annotations

import gzip
import io
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from urllib3.connection import HTTPSConnection

from lit_instruct.rewards import bounded_http
from lit_instruct.rewards.bounded_http import BoundedAdapter
from tests.helpers.raw_server import RawServer, http

MOST = 10_000


@pytest.fixture
def session() -> Iterator[requests.Session]:
    with requests.Session() as made:
        made.trust_env = False  # no proxy
        made.mount("http://", BoundedAdapter(most_bytes=MOST))
        yield made


class Slow:
    """A socket with a clock of its own: each read takes so many seconds."""

    def __init__(self, timeout: float, *reads: float) -> None:
        self.timeout, self.reads, self.now = timeout, iter(reads), 0.0
        self.timeouts: list[float] = []

    def gettimeout(self) -> float:
        return self.timeout

    def settimeout(self, seconds: float) -> None:
        self.timeouts.append(seconds)

    def makefile(self, *_: Any, **__: Any) -> io.RawIOBase:
        return self  # type: ignore[return-value]

    def readinto(self, buffer: Any) -> int:
        self.now += next(self.reads)
        buffer[:1] = b"x"
        return 1

    def close(self) -> None:
        """There is nothing to close."""


def test_all_reads_share_one_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Slow(8.0, 2.0, 5.0, 1.0)  # seconds that are whole in binary
    monkeypatch.setattr(bounded_http.time, "monotonic", lambda: own.now)
    reads = bounded_http._BoundedSocket(own, MOST).makefile("rb").raw  # type: ignore[arg-type]
    for _ in range(3):
        assert reads.read(1) == b"x"
    assert own.timeouts == [8.0, 6.0, 1.0]  # what is left before each
    with pytest.raises(TimeoutError):
        reads.read(1)
    assert len(own.timeouts) == 3


def test_a_connection_that_is_used_again_is_as_it_was(session: requests.Session) -> None:
    with RawServer(lambda _: [http(b"answer")]) as server:
        session.post(server.url, data=b"", timeout=5.0, stream=True).raw.release_conn()
        pools = session.get_adapter(server.url).poolmanager.pools  # type: ignore[attr-defined]
        (host,) = pools.keys()
        connection = pools[host].pool.get(block=False)
        assert type(connection.sock) is socket.socket
        assert connection.sock.gettimeout() == 5.0
        connection.close()


def test_what_is_packed_stays_packed(session: requests.Session) -> None:
    packed = gzip.compress(b" " * 1_000_000)
    with RawServer(lambda _: [http(packed, "Content-Encoding: gzip")]) as server:
        assert session.post(server.url, data=b"", stream=True).raw.data == packed


def test_answers_over_tls_are_bounded_too() -> None:
    adapter = BoundedAdapter(most_bytes=MOST)
    request = requests.Request("POST", "https://localhost/score").prepare()
    connection = adapter.get_connection_with_tls_context(request, verify=True).ConnectionCls("localhost")
    assert isinstance(connection, HTTPSConnection)
    assert isinstance(connection, bounded_http._BoundedHTTP)
    assert connection.most_bytes == MOST
