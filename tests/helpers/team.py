"""A team of simulated labelers: each one works at the labelling page's own interface, over HTTP, as a browser would.

The team outlives the server: while it is away the labelers wait, and what was not acknowledged is sent again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import requests

from tests.helpers.labelling import Client, key, ranking

Rank = Callable[[str, str, list[str]], list[int]]
"""Labeler, prompt and responses in the order shown to ranks."""


class Team:
    """Works in threads of its own while it is entered.

    Args:
        links: name to personal link.
        rank: what a labeler thinks.
        pause_s: that a labeler takes for a task.
    """

    def __init__(self, links: Mapping[str, str], rank: Rank, *, pause_s: float = 0.0) -> None:
        self.links, self.rank, self.pause_s = dict(links), rank, pause_s
        self.acknowledged: list[str] = []
        self.shown: list[dict[str, Any]] = []
        self.errors: list[str] = []
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._work, args=item, daemon=True) for item in links.items()]

    def __enter__(self) -> Team:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()
        assert not self.errors, self.errors

    def _work(self, name: str, link: str) -> None:
        page, _, token = link.partition("#")
        client = Client(page, token)
        while not self._ended.is_set():
            found = self._until_heard(client, "next", {})
            if found is None:
                return
            task = found.json().get("task") if self._accepted(found) else None
            if task is None:
                self._ended.wait(0.2)
                continue
            self.shown.append(task["shown"])
            self._ended.wait(self.pause_s)
            ranks = self.rank(name, task["shown"]["prompt"], task["shown"]["responses"])
            answer = {"key": key(), "task": task["number"], "answer": ranking(ranks), "seconds": 1.0}
            heard = self._until_heard(client, "answer", answer)
            # It was saved, and the server went before it could say so; its next one has other tasks.
            if heard is not None and heard.status_code not in (404, 409) and self._accepted(heard):
                self.acknowledged.append(answer["key"])

    def _until_heard(self, client: Client, name: str, body: dict[str, Any]) -> requests.Response | None:
        while not self._ended.is_set():
            try:
                return client.post(name, body)
            except requests.ConnectionError:
                time.sleep(0.05)
        return None

    def _accepted(self, response: requests.Response) -> bool:
        if response.status_code != 200:
            self.errors.append(response.text)
            self._ended.set()
        return response.status_code == 200
