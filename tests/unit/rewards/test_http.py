"""HttpScorer against a real server on this machine: what it sends, when it tries again, what it says in the end."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import date
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lit_instruct.rewards import HttpScorer
from lit_instruct.types import ConfigError
from tests.helpers.numbers import assert_close
from tests.unit.rewards.batches import TOKENIZER, batch_of

Answer = tuple[int, Any]


class Server(ThreadingHTTPServer):
    """Answers as ``answer(body, number of the request)`` says: status and what becomes JSON, or bytes as they are."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer: Callable[[Any, int], Answer] = count_words
        self.bodies: list[Any] = []
        self.headers: list[dict[str, str]] = []
        self.reply_headers: dict[str, str] = {}
        self.lock = threading.Lock()
        self.under_way = self.most_under_way = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/score"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.headers.append(dict(self.headers))
            number = len(self.server.bodies)
            self.server.under_way += 1
            self.server.most_under_way = max(self.server.most_under_way, self.server.under_way)
        status, answer = self.server.answer(body, number)
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        with self.server.lock:
            self.server.under_way -= 1
        with suppress(BrokenPipeError):  # nobody waits any more
            self.send_response(status)
            for name, value in self.server.reply_headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None:
        """Keep quiet."""


def count_words(body: Any, number: int) -> Answer:
    return 200, {"scores": [len(text.split()) for text in body["responses"]]}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "*")
    running = Server()
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield running
    running.shutdown()
    running.server_close()
    thread.join()


CHAT = [{"role": "user", "content": "w1"}]
PROMPTS: list[Any] = ["w0", CHAT, "w2"]
RESPONSES = ["w3", "w4 w5", "w6 w7 w8"]


def score(server: Server, data: Any = None, **settings: Any) -> Any:
    scorer = HttpScorer(server.url, **({"retries": 2, "backoff": 0.01, "timeout": 5.0} | settings))
    return scorer(*batch_of(PROMPTS, RESPONSES, data), tokenizer=TOKENIZER)


def test_the_contract(server: Server) -> None:
    assert_close(score(server, {"key": [1, None, "c"]}), [1.0, 2.0, 3.0])
    assert server.bodies == [{"prompts": PROMPTS, "responses": RESPONSES, "columns": {"key": [1, None, "c"]}}]
    assert server.headers[0]["Content-Type"] == "application/json"
    assert "Authorization" not in server.headers[0]


def test_rows_are_shared_out_over_parallel_requests_and_come_back_in_order(server: Server) -> None:
    def slower_first(body: Any, number: int) -> Answer:
        time.sleep(0.1 * (4 - len(body["responses"][0].split())))
        return count_words(body, number)

    server.answer = slower_first
    assert_close(score(server, {"key": [1, 2, 3]}, batch_rows=1, parallel=2), [1.0, 2.0, 3.0])
    asked = sorted(server.bodies, key=lambda body: body["columns"]["key"])
    assert asked == [
        {"prompts": [prompt], "responses": [response], "columns": {"key": [key]}}
        for prompt, response, key in zip(PROMPTS, RESPONSES, [1, 2, 3], strict=True)
    ]
    assert server.most_under_way == 2


def test_only_the_named_columns_are_sent(server: Server) -> None:
    score(server, {"key": [1, 2, 3], "private": ["a", "b", "c"]}, columns=["key"])
    assert server.bodies[0]["columns"] == {"key": [1, 2, 3]}
    with pytest.raises(ConfigError, match=r"columns: got 'level'.*found: 'key'"):
        score(server, {"key": [1, 2, 3]}, columns=["level"])


@pytest.mark.parametrize("value", [date(2020, 1, 1), float("nan")])
def test_a_column_that_is_no_json_is_named(server: Server, value: Any) -> None:
    with pytest.raises(ConfigError, match="the column 'day' cannot be written as JSON"):
        score(server, {"key": [1, 2, 3], "day": [value] * 3})


def test_the_token_comes_from_the_environment_and_not_from_netrc(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login somebody password else\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(ConfigError, match="environment variable 'REWARD_TOKEN' is not set"):
        score(server, token_variable="REWARD_TOKEN")
    monkeypatch.setenv("REWARD_TOKEN", "t0ken")
    score(server, token_variable="REWARD_TOKEN")
    assert server.headers[-1]["Authorization"] == "Bearer t0ken"


@pytest.mark.parametrize("status", [429, 500, 502, 503, 599])
def test_a_server_that_stumbles_is_asked_again(server: Server, status: int) -> None:
    server.answer = lambda body, number: (status, {}) if number <= 2 else count_words(body, number)
    assert_close(score(server), [1.0, 2.0, 3.0])
    assert len(server.bodies) == 3


def test_waits_between_tries_grow(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("urllib3.util.retry.time.sleep", waits.append)
    server.answer = lambda body, number: (503, {"detail": "still loading"})
    with pytest.raises(
        ConfigError, match=r"answered 503 Service Unavailable after 10 tries: '\{\"detail\": \"still loading\"\}'"
    ):
        score(server, retries=9, backoff=1.0)
    assert len(server.bodies) == 10
    for wait, least in zip(waits, [1, 2, 4, 8, 16, 32, 60, 60], strict=True):  # the second try follows at once
        assert least <= wait <= min(least + 1, 60)
    assert len({wait % 1 for wait in waits}) > 5  # processes that were refused together do not come back together


def test_retry_after_is_obeyed_within_reason(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("urllib3.util.retry.time.sleep", waits.append)
    server.answer = lambda body, number: (429, {}) if number <= 2 else count_words(body, number)
    server.reply_headers = {"Retry-After": "7"}
    score(server)
    server.bodies.clear()
    server.reply_headers = {"Retry-After": "86400"}
    score(server)
    assert waits == [7, 7, 60, 60]


@pytest.mark.parametrize("status", [400, 401, 404, 302])
def test_what_will_not_change_is_not_asked_again(server: Server, status: int) -> None:
    server.answer = lambda body, number: (status, b"the reason")
    server.reply_headers = {"Location": "/elsewhere"}
    with pytest.raises(ConfigError, match=rf"{server.url}: the server answered {status} .*: 'the reason'"):
        score(server)
    assert len(server.bodies) == 1


def test_no_answer_in_time(server: Server) -> None:
    release = threading.Event()

    def asleep(body: Any, number: int) -> Answer:
        release.wait(5)
        return count_words(body, number)

    server.answer = asleep
    started = time.monotonic()
    with pytest.raises(ConfigError, match=r"got no answer in 3 tries of at most 0.1 seconds: .*[Tt]imed out"):
        score(server, timeout=0.1)
    release.set()
    assert time.monotonic() - started < 4
    assert len(server.bodies) == 3


def test_one_slow_answer_is_not_the_end(server: Server) -> None:
    def slow_once(body: Any, number: int) -> Answer:
        time.sleep(1.0 if number == 1 else 0)
        return count_words(body, number)

    server.answer = slow_once
    assert_close(score(server, timeout=0.5), [1.0, 2.0, 3.0])


def test_nobody_there(server: Server) -> None:
    server.server_close()
    scorer = HttpScorer(server.url, retries=1, backoff=0.0)
    for ask in (lambda: scorer.check(TOKENIZER), lambda: scorer(*batch_of(["w1"], ["w2"]), tokenizer=TOKENIZER)):
        with pytest.raises(ConfigError, match=rf"{server.url}: got no answer in 2 tries"):
            ask()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"<html>", "got '<html>'; need JSON"),
        (b"[1, 2, 3]", r"got \[1, 2, 3\]; need \{\"scores\""),
        ({"rewards": [1, 2, 3]}, "got {'rewards'"),
        ({"scores": [1, 2]}, "got 2 scores for 3 responses"),
        ({"scores": 1}, "got a int; need a list of 3 numbers"),
        (b'{"scores": [1, NaN, 3]}', "got nan as the score of response 'w4 w5' to the prompt .*'w1'"),
        ({"scores": [1, 2, "3"]}, "got '3' as the score of response 'w6 w7 w8' to the prompt 'w2'"),
    ],
)
def test_an_answer_that_is_no_scores(server: Server, answer: Any, message: str) -> None:
    server.answer = lambda body, number: (200, answer)
    with pytest.raises(ConfigError, match=message) as caught:
        score(server)
    assert server.url in str(caught.value)
    assert len(server.bodies) == 1


def test_after_an_error_the_rest_is_not_asked(server: Server) -> None:
    server.answer = lambda body, number: (400, {})
    with pytest.raises(ConfigError, match="answered 400"):
        HttpScorer(server.url, batch_rows=1, parallel=1)(*batch_of(["w1"] * 30, ["w2"] * 30), tokenizer=TOKENIZER)
    assert len(server.bodies) < 30


@pytest.mark.parametrize(("status", "fits"), [(200, True), (400, True), (500, True), (401, False), (404, False)])
def test_the_address_is_tried_once_before_training(server: Server, status: int, fits: bool) -> None:
    server.answer = lambda body, number: (status, {})
    scorer = HttpScorer(server.url)
    if fits:
        scorer.check(TOKENIZER)
    else:
        with pytest.raises(ConfigError, match=f"answered {status}"):
            scorer.check(TOKENIZER)
    assert server.bodies == [{"prompts": [], "responses": [], "columns": {}}]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "localhost:80"}, "url: got 'localhost:80'; need one that begins with http"),
        ({"batch_rows": 0}, "batch_rows: got 0"),
        ({"parallel": 0}, "parallel: got 0"),
        ({"retries": -1}, "retries: got -1"),
        ({"backoff": -0.1}, "backoff: got -0.1"),
        ({"timeout": 0.0}, "timeout: got 0.0"),
        ({"timeout": float("nan")}, "timeout: got nan"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HttpScorer(**({"url": "http://127.0.0.1:9/score"} | settings))
