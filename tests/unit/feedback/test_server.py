"""The JSON interface over real HTTP: what it does, and that nothing hostile changes or runs anything."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_instruct.feedback.access import MAX_BODY, PAGE_POLICY
from lit_instruct.feedback.store import Store
from lit_instruct.feedback.tasks import read_task
from tests.helpers.labelling import Client, key, rank_row, rank_tasks, ranking, serving

HOSTILE = [
    "<script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "\u202egnp.exe \u2066isolate\u2069 \u200f right to left \u05d0\u05d1",
    "nul \0 and bell \x07",
    "x" * 1_000_000,
    "'; DROP TABLE events; --",
]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "labels.sqlite") as opened:
        yield opened


@pytest.fixture
def ann(store: Store) -> Iterator[Client]:
    store.add_tasks(rank_tasks(3))
    with serving(store, ["ann", "bob"]) as clients:
        yield clients["ann"]


def saved(store: Store) -> list[Any]:
    return [(label.labeler, label.kind, label.content) for label in store.labels()]


def error_of(response: requests.Response, status: int) -> dict[str, Any]:
    """The error that a refusal carries; it tells nothing of the inside."""
    assert response.status_code == status, (response.status_code, response.text)
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) <= {"code", "message", "field"}
    assert not any(word in response.text for word in ("Traceback", "sqlite", "SELECT", "/lit_instruct", ".py"))
    return body["error"]


# -- what it does


def test_a_labeler_works(store: Store, ann: Client) -> None:
    hello = ann.ok("hello")
    assert hello["labeler"] == "ann"
    assert len(hello["response_flags"]) == 11
    task = ann.ok("next")["task"]
    assert set(task) == {"number", "kind", "shown", "draft", "seconds"}
    draft = ranking([2, 1, 3, 4], flags=["opinion"])
    assert ann.ok("draft", {"task": task["number"], "draft": draft, "seconds": 2.5}) == {}
    assert ann.ok("next")["task"] == {**task, "draft": draft, "seconds": 2.5}
    name = key()
    assert ann.answer(task["number"], draft, key=name).json() == {"new": True}
    assert ann.answer(task["number"], draft, key=name).json() == {"new": False}
    again = ann.ok("next")
    assert again["progress"] == {"answered": 1, "skipped": 0, "left": 2}
    skip = {"reason": "other", "note": "two prompts in one"}
    assert ann.ok("skip", {"key": key(), "task": again["task"]["number"], "skip": skip, "seconds": 1}) == {"new": True}
    assert ann.ok("undo", {"key": key()}) == {"task": again["task"]["number"]}
    assert ann.ok("undo", {"key": key()}) == {"task": task["number"]}
    assert ann.ok("undo", {"key": key()}) == {"task": None}
    assert ann.ok("next")["task"]["draft"] == draft
    assert [event.kind for event in store.events()] == ["answer", "skip", "undo", "undo"]


def test_the_last_task_is_followed_by_none(ann: Client) -> None:
    for _ in range(3):
        task = ann.ok("next")["task"]
        assert ann.answer(task["number"], ranking([1, 1, 1, 1]), key=key()).ok
    assert ann.ok("next") == {"task": None, "progress": {"answered": 3, "skipped": 0, "left": 0}}


def test_conflicts_are_told(store: Store, ann: Client) -> None:
    number = ann.ok("next")["task"]["number"]
    assert ann.answer(number, ranking([1, 2, 3, 4]), key=key()).ok
    assert error_of(ann.answer(number, ranking([4, 3, 2, 1]), key=key()), 409)["code"] == "conflict"
    assert error_of(ann.answer(number + 1, ranking([1, 2, 3, 4]), key=key()), 404)["code"] == "not_given"
    assert len(saved(store)) == 1


# -- who may not


@pytest.mark.parametrize(
    "authorization", ["", "Bearer", "Bearer x", "Bearer " + "A" * 43, "Basic YW5uOng=", "Bearer \xff"]
)
def test_forged_and_missing_tokens(store: Store, ann: Client, authorization: str) -> None:
    number = ann.ok("next")["task"]["number"]
    body = {"key": key(), "task": number, "answer": ranking([1, 2, 3, 4]), "seconds": 1}
    for name, content in (("hello", {}), ("next", {}), ("answer", body), ("undo", {"key": key()})):
        response = ann.session.post(
            f"{ann.page}api/{name}", json=content, headers={"Authorization": authorization.encode("latin-1")}
        )
        assert error_of(response, 401)["code"] == "token"
    assert store.events() == []


def test_a_labeler_cannot_act_for_another(store: Store, ann: Client) -> None:
    number = ann.ok("next")["task"]["number"]
    body = {"key": key(), "task": number, "answer": ranking([1, 2, 3, 4]), "seconds": 1}
    assert error_of(ann.post("answer", {**body, "labeler": "bob"}), 422)["field"] == "request"
    assert error_of(ann.post("answer", {**body, "key": "short"}), 422)["field"] == "key"
    assert store.events() == []


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "none"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Host": "evil.example"}, 403),
        ({"Host": ""}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": "multipart/form-data; boundary=application/json"}, 415),
    ],
)
def test_requests_of_other_sites(store: Store, ann: Client, headers: dict[str, str], status: int) -> None:
    """With the right token even, which another site does not have."""
    number = ann.ok("next")["task"]["number"]
    body = {"key": key(), "task": number, "answer": ranking([1, 2, 3, 4]), "seconds": 1}
    error_of(ann.post("answer", body, **headers), status)
    assert store.events() == []
    own = {"Sec-Fetch-Site": "same-origin", "Origin": ann.page.rstrip("/")}
    assert ann.post("answer", body, **own).status_code == 200  # what the page itself sends


def test_other_sites_are_not_allowed_to_ask(ann: Client) -> None:
    response = ann.session.options(f"{ann.page}api/next", headers={"Origin": "http://evil.example"})
    assert response.status_code in (403, 405)
    assert not any(name.lower().startswith("access-control") for name in response.headers)


# -- what may not be sent


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'"x"',
        b"null",
        b'{"key": NaN}',
        b'{"a": Infinity}',
        b"\xff\xfe{}",
        b"{" * 100_000,
        b'{"a":' * 100_000,
        b"[" * 500_000,
        b'{"a": ' + b"9" * 10_000 + b"}",
    ],
)
def test_bodies_that_are_no_json_object(ann: Client, content: bytes) -> None:
    headers = {"Authorization": f"Bearer {ann.token}", "Content-Type": "application/json"}
    response = ann.session.post(f"{ann.page}api/next", data=content, headers=headers, timeout=30)
    assert error_of(response, 400)["code"] == "json"


def raw(page: str, request: bytes) -> bytes:
    """What the server answers to these bytes."""
    host, port = page.removeprefix("http://").rstrip("/").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(request)
        answer = b""
        while b"\r\n\r\n" not in answer and (part := connection.recv(65536)):
            answer += part
        return answer


def test_large_bodies_are_refused_before_they_are_read(ann: Client) -> None:
    head = "POST /api/next HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    head += f"Authorization: Bearer {ann.token}\r\n"
    for length in (str(MAX_BODY + 1), "9" * 15):
        answer = raw(ann.page, f"{head}Content-Length: {length}\r\n\r\n".encode())  # and not a byte of it
        assert b" 413 " in answer.splitlines()[0]
    chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    answer = raw(ann.page, f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + chunk * (MAX_BODY // 0x10000 + 1))
    assert b" 413 " in answer.splitlines()[0]
    assert ann.ok("next")["task"]


def test_texts_that_no_file_could_hold_are_refused(store: Store) -> None:
    store.add_tasks([read_task({"task": "demonstrate", "prompt": "p"})])
    with serving(store, ["ann"]) as clients:
        number = clients["ann"].ok("next")["task"]["number"]
        for text in ("a\0b", "\ud800", "\udfff\ud800", " \n\t", "x" * 100_001):
            error = error_of(clients["ann"].answer(number, {"response": text, "note": ""}, key=key()), 422)
            assert error["field"] == "response"
        for text in HOSTILE[:3] + HOSTILE[5:]:
            name = key()
            assert clients["ann"].answer(number, {"response": text, "note": text}, key=name).ok
            assert saved(store)[0][2] == {"response": text, "note": text}  # to the letter
            clients["ann"].ok("undo", {"key": key()})


def test_hostile_tasks_arrive_as_they_are(store: Store) -> None:
    store.add_tasks([read_task(rank_row(1) | {"prompt": HOSTILE[0], "responses": HOSTILE})])
    with serving(store, ["ann"]) as clients:
        response = clients["ann"].post("next")
    assert response.headers["content-type"] == "application/json"
    shown = response.json()["task"]["shown"]
    assert shown["prompt"] == HOSTILE[0]
    assert sorted(shown["responses"]) == sorted(HOSTILE)


# -- files


@pytest.mark.parametrize(
    "path",
    [
        "/../store.py",
        "/..%2fstore.py",
        "/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "//etc/passwd",
        "/page/../app.js",
        "/app.js/",
        "/app.js%00",
        "/app.js%00.html",
        "/./app.js",
        "/style.css/../../access.py",
        "/index.html",
        "/__init__.py",
        "/labels.sqlite",
        "/api/",
        "/api/next/..",
        "/api/../app.js",
        "/API/next",
        "/%5c..%5cstore.py",
    ],
)
def test_path_tricks(ann: Client, path: str) -> None:
    answer = raw(ann.page, f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
    assert b" 404 " in answer.splitlines()[0], answer


def test_requests_that_are_no_http(ann: Client) -> None:
    for request in (
        b"\0\xff\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET /\r\n\r\n",
        b"X" * 200_000,
    ):
        try:
            answer = raw(ann.page, request)
        except ConnectionError:
            continue
        assert b" 400 " in answer.splitlines()[0] or b" 403 " in answer.splitlines()[0]
    assert ann.ok("next")["task"]


def test_the_page_and_all_it_loads(ann: Client) -> None:
    """Every file that the page names is there, from this server, with the headers that keep it to itself."""
    index = ann.session.get(ann.page)
    assert index.headers["content-type"].startswith("text/html")
    for path, kind in (
        ("", "text/html"),
        ("style.css", "text/css"),
        ("icon.svg", "image/svg+xml"),
        *((f"{name}.js", "text/javascript") for name in ("app", "api", "dom", "rank", "ladder", "write")),
    ):
        response = ann.session.get(ann.page + path)
        assert response.status_code == 200
        assert response.headers["content-type"].startswith(kind)
        assert response.headers["content-security-policy"] == PAGE_POLICY
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["cache-control"] == "no-store"
        assert "set-cookie" not in response.headers
        text = response.text.replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text.replace("(https?:\\/\\/|mailto:)", "")
        assert not any(word in text for word in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval("))
        assert not any(word in text for word in ("@import", "url(", "https://", "//cdn", " style=", " onclick="))


def test_errors_carry_the_headers_too(ann: Client) -> None:
    for response in (ann.session.get(f"{ann.page}nothing"), ann.post("next", Host="evil.example")):
        assert response.headers["content-security-policy"] == PAGE_POLICY
        assert response.headers["cache-control"] == "no-store"


def test_a_failure_of_the_server_tells_nothing(store: Store, ann: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("SELECT secret FROM /lit_instruct/store.py")

    monkeypatch.setattr(store, "give_next", fail)
    assert error_of(ann.post("next"), 500)["code"] == "failure"


def test_a_database_that_cannot_be_written(store: Store, ann: Client) -> None:
    """As if the disk were full: the labeler is told to wait, and the same event goes through afterwards."""
    number = ann.ok("next")["task"]["number"]
    store._database.execute("PRAGMA query_only = ON")
    name = key()
    assert error_of(ann.answer(number, ranking([1, 2, 3, 4]), key=name), 503)["code"] == "storage"
    store._database.execute("PRAGMA query_only = OFF")
    assert ann.answer(number, ranking([1, 2, 3, 4]), key=name).json() == {"new": True}
    assert len(saved(store)) == 1


# -- anything at all

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=5), children, max_size=4),
    max_leaves=10,
)
JUDGEMENT = st.fixed_dictionaries(
    {
        "rating": st.sampled_from([1, 2, 3, 4, 5, 6, 7, 7, 7, 0, 8, None, True]),
        "flags": st.lists(st.sampled_from(["opinion", "sexual", "sexual", "unknown"]), max_size=1),
        "rank": st.integers(1, 3),
    }
)
JUDGEMENTS = st.lists(JUDGEMENT, min_size=4, max_size=4)
RANKINGS = st.fixed_dictionaries({"responses": JUDGEMENTS, "note": st.text(max_size=5)})
CAREFUL = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def is_valid(answer: Any) -> bool:
    """The rules of a ranking of four, written down a second time."""
    if not isinstance(answer, dict) or answer.keys() != {"responses", "note"}:
        return False
    judgements = answer["responses"]
    ranks = {judgement["rank"] for judgement in judgements}
    return (
        "\0" not in answer["note"]
        and all(judgement["rating"] in range(1, 8) for judgement in judgements)
        and not any(judgement["rating"] is True or "unknown" in judgement["flags"] for judgement in judgements)
        and ranks == set(range(1, max(ranks) + 1))
    )


@CAREFUL
@given(answer=RANKINGS | RANKINGS | JSON)
def test_an_answer_is_saved_if_and_only_if_it_keeps_the_rules(store: Store, ann: Client, answer: Any) -> None:
    number, before = ann.ok("next")["task"]["number"], len(store.events())
    response = ann.answer(number, answer, key=key())
    if is_valid(answer):
        assert response.ok, response.text
        assert len(store.events()) == before + 1
        ann.ok("undo", {"key": key()})
    else:
        error_of(response, 422)
        assert len(store.events()) == before


@CAREFUL
@given(name=st.sampled_from(["answer", "draft", "skip", "undo", "next", "hello"]), junk=JSON)
def test_junk_is_refused_in_order(store: Store, ann: Client, name: str, junk: Any) -> None:
    headers = {"Authorization": f"Bearer {ann.token}", "Content-Type": "application/json"}
    response = ann.session.post(f"{ann.page}api/{name}", data=json.dumps(junk), headers=headers)
    if not isinstance(junk, dict):
        error_of(response, 400)
    elif junk or name not in ("next", "hello"):
        error_of(response, 422)
    assert store.events() == []
