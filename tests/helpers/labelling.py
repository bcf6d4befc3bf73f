"""Labelling in tests: tasks, answers, a server in this process or in one of its own, and a client over real HTTP."""

from __future__ import annotations

import atexit
import functools
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from lit_instruct.feedback.access import new_token, token_hash
from lit_instruct.feedback.server import make_app
from lit_instruct.feedback.store import Store
from lit_instruct.feedback.tasks import Task, read_task

ROOT = Path(__file__).resolve().parents[2]


def rank_row(number: int, responses: int = 4, **more: Any) -> dict[str, Any]:
    texts = [f"response {index} to {number}" for index in range(responses)]
    return {"task": "rank", "id": f"task-{number}", "prompt": f"prompt {number}", "responses": texts, **more}


def rank_tasks(count: int, responses: int = 4, **more: Any) -> list[Task]:
    return [read_task(rank_row(number, responses, **more)) for number in range(count)]


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def ranking(ranks: Sequence[int], *, rating: int = 4, flags: Sequence[str] = (), note: str = "") -> dict[str, Any]:
    """A complete answer with these ranks."""
    judgements = [{"rating": rating, "flags": list(flags), "rank": rank} for rank in ranks]
    return {"responses": judgements, "note": note}


def key() -> str:
    return secrets.token_hex(16)


class Client:
    """A labeler's program: every call is a request of its own, as the page makes them."""

    def __init__(self, page: str, token: str) -> None:
        self.page = page
        self.token = token
        self.session = requests.Session()
        self.session.trust_env = False

    def post(self, name: str, body: Any = None, **headers: str) -> requests.Response:
        sent = {"Authorization": f"Bearer {self.token}", **headers}
        return self.session.post(f"{self.page}api/{name}", json={} if body is None else body, headers=sent, timeout=30)

    def ok(self, name: str, body: Any = None) -> dict[str, Any]:
        response = self.post(name, body)
        assert response.status_code == 200, response.text
        return response.json()

    def answer(self, task: int, content: Any, *, key: str, seconds: float = 1.0) -> requests.Response:
        return self.post("answer", {"key": key, "task": task, "answer": content, "seconds": seconds})


class _Host:
    """One server for all tests of this process: to start and stop one for each takes longer than most tests."""

    def __init__(self) -> None:
        self.app: ASGIApp | None = None
        self.page = ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert self.app is not None
        await self.app(scope, receive, send)

    def start(self) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        self.page = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        config = uvicorn.Config(self, http="h11", ws="none", lifespan="off", log_level="critical")
        run = functools.partial(uvicorn.Server(config).run, sockets=[listener])
        threading.Thread(target=run, daemon=True).start()


_host = _Host()


@contextmanager
def serving(store: Store, labelers: Sequence[str], **options: Any) -> Iterator[dict[str, Client]]:
    """Serve a store from a thread of this process; yields a client for each labeler."""
    store.add_labelers(labelers)
    tokens = {name: new_token() for name in labelers}
    for name, token in tokens.items():
        store.set_token_hash(name, token_hash(token))
    if not _host.page:
        _host.start()
    _host.app = make_app(store, **options)
    try:
        yield {name: Client(_host.page, token) for name, token in tokens.items()}
    finally:
        _host.app = None


class Command:
    """``lit-instruct label`` in a process of its own."""

    def __init__(self, database: Path, *options: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        words = [sys.executable, "-m", "lit_instruct", "label", str(database), *options]
        self.process = subprocess.Popen(
            words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        atexit.register(self.process.kill)  # where a test fails before it ends the server
        self.said = ""
        assert self.process.stdout is not None
        for line in self.process.stdout:  # until it listens, or has ended
            self.said += line
            if "tasks are done" in line:
                break

    @property
    def page(self) -> str:
        found = re.search(r"Labelling at (\S+)", self.said)
        assert found, self.said
        return found[1]

    @property
    def links(self) -> dict[str, str]:
        return dict(re.findall(r"^  (\S+)  (http\S+#\S+)$", self.said, re.MULTILINE))

    def clients(self) -> dict[str, Client]:
        return {name: Client(self.page, link.partition("#")[2]) for name, link in self.links.items()}

    def end(self, number: signal.Signals = signal.SIGINT) -> int:
        """Send a signal and wait; returns the exit status, with all that was said in ``said``."""
        self.process.send_signal(number)
        self.said += self.process.communicate(timeout=30)[0]
        return self.process.returncode
