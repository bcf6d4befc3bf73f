"""The server behind the labelling page: its files, and a small JSON interface over the store.

Every request under ``/api/`` carries a labeler's token (see ``access``). Errors are
``{"error": {"code", "message", "field"}}`` and tell nothing of the inside.
"""

from __future__ import annotations

import json
import logging
import re
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.resources import files
from typing import Any, NoReturn

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from lit_instruct.feedback import forms
from lit_instruct.feedback.access import MAX_BODY, Gate, Refusal, labeler_of
from lit_instruct.feedback.forms import FormError
from lit_instruct.feedback.guidelines import Node
from lit_instruct.feedback.store import ConflictError, NotGivenError, Store

log = logging.getLogger(__name__)

_PAGE = {
    "/": ("index.html", "text/html"),
    "/style.css": ("style.css", "text/css"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
    **{f"/{name}.js": (f"{name}.js", "text/javascript") for name in ("app", "api", "dom", "rank", "ladder", "write")},
}
"""Path to file and type. Nothing else is served, whatever a path looks like."""

_KEY = re.compile(r"[A-Za-z0-9_-]{16,64}")
_MOST_SECONDS = 1e9

Body = dict[str, Any]
Action = Callable[[Store, str, Body], Body]
"""What a request does: store, labeler, body to answer."""


def make_app(store: Store, *, host: str = "127.0.0.1", guidelines: Sequence[Node] = ()) -> ASGIApp:
    """Build the application.

    Args:
        store: of the project.
        host: where the server will listen.
        guidelines: as ``guidelines.read_guidelines`` gives them.

    Returns:
        An ASGI application.
    """
    routes = [_page_route(path, *file) for path, file in _PAGE.items()]
    actions: dict[str, Action] = {
        "hello": partial(_hello, guidelines),
        "next": _next,
        "draft": _draft,
        "answer": _answer,
        "skip": _skip,
        "undo": _undo,
    }
    routes += [_api_route(name, action, store) for name, action in actions.items()]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _http_error, Exception: _failure})
    app.router.redirect_slashes = False
    return Gate(app, host)


# -- what the requests do


def _hello(guidelines: Sequence[Node], store: Store, labeler: str, body: Body) -> Body:
    """All that the page must know before the first task."""
    _fields(body)
    return {
        "labeler": labeler,
        "guidelines": list(guidelines),
        "response_flags": forms.RESPONSE_FLAGS,
        "prompt_flags": forms.PROMPT_FLAGS,
        "skip_reasons": forms.SKIP_REASONS,
        "max_rating": forms.MAX_RATING,
        "max_text": forms.MAX_TEXT,
        "max_note": forms.MAX_NOTE,
        "progress": store.progress(labeler)._asdict(),
    }


def _next(store: Store, labeler: str, body: Body) -> Body:
    _fields(body)
    given = store.give_next(labeler)
    return {"task": given and given._asdict(), "progress": store.progress(labeler)._asdict()}


def _draft(store: Store, labeler: str, body: Body) -> Body:
    _fields(body, "task", "draft", "seconds")
    store.save_draft(labeler, _number(body, "task"), body["draft"], _seconds(body))
    return {}


def _answer(store: Store, labeler: str, body: Body) -> Body:
    _fields(body, "key", "task", "answer", "seconds")
    new = store.save(labeler, _number(body, "task"), "answer", body["answer"], key=_key(body), seconds=_seconds(body))
    return {"new": new}


def _skip(store: Store, labeler: str, body: Body) -> Body:
    _fields(body, "key", "task", "skip", "seconds")
    new = store.save(labeler, _number(body, "task"), "skip", body["skip"], key=_key(body), seconds=_seconds(body))
    return {"new": new}


def _undo(store: Store, labeler: str, body: Body) -> Body:
    _fields(body, "key")
    return {"task": store.undo(labeler, key=_key(body))}


# -- reading requests


def _fields(body: Body, *names: str) -> None:
    if body.keys() != set(names):
        raise FormError("request", f"need the fields {', '.join(names) or '(none)'} and no others")


def _number(body: Body, name: str) -> int:
    value = body[name]
    if type(value) is not int or not 0 < value < 2**63:
        raise FormError(name, "need a whole number above 0")
    return value


def _seconds(body: Body) -> float:
    value = body["seconds"]
    if type(value) not in (int, float) or not 0 <= value <= _MOST_SECONDS:
        raise FormError("seconds", f"need a number from 0 to {_MOST_SECONDS:g}")
    return float(value)


def _key(body: Body) -> str:
    value = body["key"]
    if not isinstance(value, str) or not _KEY.fullmatch(value):
        raise FormError("key", "need 16 to 64 letters, digits, - or _")
    return value


async def _read_body(request: Request) -> Body:
    """The JSON object of a request; its length is counted while it comes in, whatever the header says."""
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > MAX_BODY:
            raise _Refused(Refusal(413, "too_large", f"Need a body of at most {MAX_BODY:,} bytes."))
    try:
        body = json.loads(content.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise _Refused(Refusal(400, "json", "Need one JSON object in UTF-8.")) from error
    if not isinstance(body, dict):
        raise _Refused(Refusal(400, "json", "Need one JSON object in UTF-8."))
    return body


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


# -- routes and errors


class _Refused(Exception):
    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.code)
        self.refusal = refusal


def _page_route(path: str, name: str, media_type: str) -> Route:
    content = (files("lit_instruct.feedback") / "page" / name).read_bytes()

    def serve(_: Request) -> Response:
        return Response(content, media_type=media_type)

    return Route(path, serve, methods=["GET"])


def _api_route(name: str, action: Action, store: Store) -> Route:
    async def serve(request: Request) -> Response:
        hashes = await run_in_threadpool(store.token_hashes)
        labeler = labeler_of(request.headers.get("authorization"), hashes)
        if labeler is None:
            return Refusal(401, "token", "This link is not valid (any more). Ask for your personal link.").response()
        try:
            body = await _read_body(request)
            return JSONResponse(await run_in_threadpool(action, store, labeler, body))
        except _Refused as error:
            return error.refusal.response()
        except FormError as error:
            content = {"code": "form", "message": str(error), "field": error.field}
            return JSONResponse({"error": content}, 422)
        except NotGivenError as error:
            return Refusal(404, "not_given", f"{error}.").response()
        except ConflictError as error:
            return Refusal(409, "conflict", f"{error}.").response()
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it
        except sqlite3.OperationalError as error:
            # The disk is full, or another process holds the database: nothing of this request was written.
            log.error("could not write to %s: %s", store.path, error)
            return Refusal(503, "storage", "It could not be saved. It is tried again.").response()

    return Route(f"/api/{name}", serve, methods=["POST"])


def _http_error(_: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    headers: Mapping[str, str] | None = getattr(error, "headers", None)
    answer = Refusal(status, "http", "There is nothing here that answers this request.").response()
    answer.headers.update(headers or {})
    return answer


def _failure(_: Request, error: Exception) -> Response:
    return Refusal(500, "failure", "The server failed at this request; its log says why.").response()
