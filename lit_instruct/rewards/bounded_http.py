"""HTTP answers of bounded length that are there whole in bounded time, whatever the server does.

The timeouts of ``requests`` are those of one read: a server that sends a byte a second keeps a client for ever. Here
all reads of an answer, its headers included, share one clock and one allowance of bytes. The answer is read where
urllib3 can still try again, so that one that breaks off is asked for anew.
"""

from __future__ import annotations

import io
import socket
import time
from functools import partial
from typing import Any

from requests.adapters import HTTPAdapter
from urllib3 import HTTPResponse
from urllib3.connection import HTTPConnection, HTTPSConnection


class AnswerTooLongError(Exception):
    """The server sends more than it may.

    Attributes:
        most: bytes it may send.
    """

    def __init__(self, most: int) -> None:
        super().__init__(f"more than {most} bytes")
        self.most = most


class BoundedAdapter(HTTPAdapter):
    """For ``requests.Session.mount``: the content of its answers is read already, and not unpacked."""

    def __init__(self, *, most_bytes: int, **settings: Any) -> None:
        """As ``HTTPAdapter``.

        Args:
            most_bytes: of an answer, with its headers.
            **settings: of ``HTTPAdapter``.
        """
        super().__init__(**settings)
        self.most_bytes = most_bytes

    def get_connection_with_tls_context(self, *arguments: Any, **more: Any) -> Any:
        """The pool of connections to a host, which are bounded ones.

        Raises:
            AnswerTooLongError: by requests over its connections.
        """
        pool: Any = super().get_connection_with_tls_context(*arguments, **more)
        kind = _BoundedHTTPS if pool.scheme == "https" else _BoundedHTTP
        pool.ConnectionCls = partial(kind, most_bytes=self.most_bytes)
        return pool


class _BoundedHTTP(HTTPConnection):
    def __init__(self, *arguments: Any, most_bytes: int, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.most_bytes = most_bytes

    def getresponse(self) -> HTTPResponse:  # type: ignore[override]
        self.sock = _BoundedSocket(self.sock, self.most_bytes)
        try:
            answer = super().getresponse()
            # In pieces: http.client makes room for as many bytes as a header or a chunk promises.
            content = b"".join(iter(lambda: answer.read(self.most_bytes, decode_content=False), b""))
        finally:
            if self.sock is not None:
                self.sock = self.sock.own  # the next answer has bounds of its own
                self.sock.settimeout(self.timeout)
        return HTTPResponse(
            body=content, headers=answer.headers, status=answer.status, reason=answer.reason, decode_content=False
        )


class _BoundedHTTPS(_BoundedHTTP, HTTPSConnection):
    pass


class _BoundedSocket:
    """A connected socket whose reads, all together, end with its timeout and after so many bytes."""

    def __init__(self, own: socket.socket, most: int) -> None:
        self.own, self.most = own, most

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)

    def makefile(self, *arguments: Any, **more: Any) -> io.BufferedReader:
        """What ``http.client`` reads from."""
        return io.BufferedReader(_BoundedReads(self.own, self.most))


class _BoundedReads(io.RawIOBase):
    def __init__(self, own: socket.socket, most: int) -> None:
        super().__init__()
        self.own, self.most, self.got = own, most, 0
        self.timeout = own.gettimeout()
        self.end = None if self.timeout is None else time.monotonic() + self.timeout
        self.reads = own.makefile("rb", buffering=0)  # keeps the socket open for as long as it is read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if self.end is not None:
            left = self.end - time.monotonic()
            if left <= 0:
                raise TimeoutError("timed out")
            self.own.settimeout(left)
        count = self.reads.readinto(buffer)
        self.got += count or 0
        if self.got > self.most:
            raise AnswerTooLongError(self.most)
        return count

    def close(self) -> None:
        self.reads.close()
        super().close()
