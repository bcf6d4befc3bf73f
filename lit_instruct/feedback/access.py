"""Who may call the server: personal tokens, and requests that only the page itself can have sent.

A labeler's link carries the token behind ``#``, which browsers send to no server. The page takes it out of the address,
keeps it for its tab, and sends it in the header ``Authorization`` of every request. There is no cookie: cookies of
127.0.0.1 go to the servers of all its ports, and are added to requests that other sites make.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
from collections.abc import Mapping
from typing import NamedTuple

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY = 1_000_000
"""Bytes of a request; more is refused before it is parsed."""

PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
"""Only the page's own files are loaded or run; no text can become HTML or a script, not even by a mistake in them."""

_HEADERS = {
    "Content-Security-Policy": PAGE_POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def new_token() -> str:
    """A token that cannot be guessed: 256 random bits in 43 characters."""
    return secrets.token_urlsafe(32)


def token_hash(token: str) -> bytes:
    """What is stored of a token: a plain hash suffices for 256 random bits."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def labeler_of(authorization: str | None, hashes: Mapping[str, bytes | None]) -> str | None:
    """Find whose token a request carries; takes as long whether and where it matches.

    Args:
        authorization: the header, ``Bearer TOKEN``.
        hashes: the hash of each labeler's token.
    """
    scheme, _, token = (authorization or "").partition(" ")
    sent = token_hash(token.strip())
    found = None
    for labeler, kept in hashes.items():
        if hmac.compare_digest(sent, kept or b"") and scheme.lower() == "bearer":
            found = labeler
    return found


class Refusal(NamedTuple):
    """Why a request is turned away: HTTP status, a word for programs, a sentence for people."""

    status: int
    code: str
    message: str

    def response(self) -> JSONResponse:
        """The answer that says so."""
        return JSONResponse({"error": {"code": self.code, "message": self.message}}, self.status)


class Gate:
    """Looks at requests before the application does, and puts the headers of safety on all answers.

    Args:
        app: the application.
        host: the name or address that the server was told to listen at.
    """

    def __init__(self, app: ASGIApp, host: str) -> None:
        self.app = app
        self.host = host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
            await send(message)

        refusal = self._refusal(scope)
        if refusal:
            await refusal.response()(scope, receive, send_with_headers)
        else:
            await self.app(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> Refusal | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not is_own_host(host, self.host):
            return Refusal(403, "host", "This server is not known under that name. Open your personal link again.")
        if not scope["path"].startswith("/api/"):
            return None
        # Browsers say where a request comes from; programs say nothing, and need the token as everybody does.
        site, origin = headers.get("sec-fetch-site"), headers.get("origin")
        if site not in (None, "same-origin") or origin not in (None, f"http://{host}", f"https://{host}"):
            return Refusal(403, "origin", "Requests from other sites are refused.")
        if scope["method"] == "POST":
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                return Refusal(415, "content_type", "Need a body of application/json.")
            length = headers.get("content-length", "0")
            if not length.isascii() or not length.isdigit() or int(length[:20]) > MAX_BODY:
                return Refusal(413, "too_large", f"Need a body of at most {MAX_BODY:,} bytes.")
        return None


def is_own_host(header: str, listening: str) -> bool:
    """Whether a request was meant for this server, and not for a site whose name was made to lead here (DNS rebinding).

    Args:
        header: ``Host`` of the request, with or without a port.
        listening: where the server listens.
    """
    name, _, port = header.rpartition(":")
    name = (name if port.isdigit() else header).strip("[]").lower()
    return name == listening.lower() or is_loopback(name)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens at ``host``."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
