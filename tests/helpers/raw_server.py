"""A server that answers with bytes as they come: not everything that serves HTTP speaks it."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import TracebackType
from typing import Self

RESET = b"\0RESET"
"""In place of a part of an answer: the connection is broken off."""

Parts = Iterable[bytes]


def http(content: bytes, *headers: str, status: str = "200 OK", length: bool = True) -> bytes:
    """A well-formed answer."""
    lines = [f"HTTP/1.1 {status}", *headers, *([f"Content-Length: {len(content)}"] if length else [])]
    return "\r\n".join([*lines, "", ""]).encode() + content


class RawServer:
    """``with RawServer(answer) as server``: ``answer(number of the request)`` gives the parts of an answer.

    After each answer the connection is closed, so that one without a length has an end.
    """

    def __init__(self, answer: Callable[[int], Parts]) -> None:
        self.answer = answer
        self.asked = 0
        self.requests: list[bytes] = []
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._threads = [threading.Thread(target=self._serve, daemon=True)]

    @property
    def url(self) -> str:
        """Where it is reached."""
        return f"http://127.0.0.1:{self._listening.getsockname()[1]}/score"

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *raised: type[BaseException] | BaseException | TracebackType | None) -> None:
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            self.asked += 1
            threading.Thread(target=self._reply, args=(connection, self.asked), daemon=True).start()

    def _reply(self, connection: socket.socket, number: int) -> None:
        with connection, suppress(OSError):  # nobody waits any more
            self.requests.append(_read_request(connection))
            for part in self.answer(number):
                if part == RESET:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    return
                connection.sendall(part)


def dripping(content: bytes, pause: float) -> Parts:
    """A byte at a time."""
    for byte in content:
        time.sleep(pause)
        yield bytes([byte])


def _read_request(connection: socket.socket) -> bytes:
    got = b""
    while b"\r\n\r\n" not in got:
        got += connection.recv(65536)
    head, _, body = got.partition(b"\r\n\r\n")
    length = next(
        int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")
    )
    while len(body) < length:
        body += connection.recv(65536)
    return head + b"\r\n\r\n" + body
