"""``lit-instruct label`` as a user runs it."""

from __future__ import annotations

import re
import signal
import socket
import sqlite3
import time
from pathlib import Path

import pytest

from lit_instruct.cli import main
from tests.helpers.labelling import Client, Command, key, rank_row, ranking, write_rows


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    rows = [rank_row(1), rank_row(2) | {"responses": ["a", "a"]}, {"task": "demonstrate", "prompt": "p"}]
    return write_rows(tmp_path / "tasks.jsonl", rows)


def test_a_session_and_the_next(tmp_path: Path, tasks: Path) -> None:
    """Links, an answer, Ctrl-C; then the same database goes on with the old links and one new labeler."""
    database, guidelines = tmp_path / "labels.sqlite", tmp_path / "guidelines.md"
    guidelines.write_text("# Be kind\n")
    first = Command(
        database, "--tasks", str(tasks), "--labelers", "ann, bob", "--guidelines", str(guidelines), "--port", "0"
    )
    clients = first.clients()
    assert set(clients) == {"ann", "bob"}
    assert clients["ann"].ok("hello")["guidelines"] == [{"tag": "h1", "children": ["Be kind"]}]
    task = clients["ann"].ok("next")["task"]
    assert clients["ann"].answer(task["number"], ranking([1, 2, 3, 4]), key=key()).ok
    assert first.end(signal.SIGINT) == 0, first.said
    assert "Tasks: 2 added, 0 known already." in first.said
    assert f"the first {tasks}:2." in first.said
    assert "Stopped. 1 of 2 tasks are done; answers: ann 1, bob 0." in first.said
    assert "Traceback" not in first.said

    second = Command(database, "--tasks", str(tasks), "--labelers", "ann,cat", "--new_links", "bob", "--port", "0")
    assert set(second.links) == {"bob", "cat"}
    assert "Tasks: 0 added, 2 known already." in second.said
    assert Client(second.page, clients["ann"].token).ok("next")["progress"]["answered"] == 1
    assert Client(second.page, clients["bob"].token).post("next").status_code == 401
    assert second.clients()["bob"].ok("next")["progress"]["answered"] == 0
    assert second.end() == 0


def test_it_ends_by_itself_when_nothing_is_left_to_do(tmp_path: Path, tasks: Path) -> None:
    """Ann does one task, Bob answers the other, takes it back and answers it again; then it has run for long enough."""
    options = ["--tasks", str(tasks), "--labelers", "ann,bob", "--port", "0", "--until_done", "1.5"]
    command = Command(tmp_path / "labels.sqlite", *options)
    clients = command.clients()
    answers = {"rank": ranking([1, 2, 3, 4]), "demonstrate": {"response": "r", "note": ""}}
    for name in ("ann", "bob"):
        task = clients[name].ok("next")["task"]
        assert clients[name].answer(task["number"], answers[task["kind"]], key=key()).ok
    time.sleep(0.7)
    clients["bob"].ok("undo", {"key": key()})
    time.sleep(2.2)  # more than it would have waited
    assert command.process.poll() is None
    assert clients["bob"].answer(task["number"], answers[task["kind"]], key=key()).ok
    since = time.monotonic()
    assert command.process.wait(30) == 0
    assert time.monotonic() - since > 1.4
    assert "Stopped. 2 of 2 tasks are done; answers: ann 1, bob 1." in command.process.communicate()[0]


def test_links_of_another_database_open_this_one(tmp_path: Path, tasks: Path) -> None:
    first = Command(tmp_path / "one.sqlite", "--tasks", str(tasks), "--labelers", "ann,bob", "--port", "0")
    first.end()
    more = ["--labelers_from", str(tmp_path / "one.sqlite"), "--labelers", "bob,cat", "--port", "0"]
    second = Command(tmp_path / "two.sqlite", "--tasks", str(tasks), *more)
    assert set(second.links) == {"cat"}
    for name, link in first.links.items():
        assert Client(second.page, link.partition("#")[2]).ok("hello")["labeler"] == name
    second.end()


@pytest.mark.parametrize("ignored", [False, True], ids=["in the foreground", "started in the background"])
def test_ctrl_c_ends_it_as_soon_as_the_links_are_out(tmp_path: Path, tasks: Path, ignored: bool) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if ignored else signal.getsignal(signal.SIGINT)
    try:
        command = Command(tmp_path / "labels.sqlite", "--tasks", str(tasks), "--labelers", "ann", "--port", "0")
    finally:
        signal.signal(signal.SIGINT, before)
    assert command.end() == 0
    assert "Traceback" not in command.said
    assert "Stopped. 0 of" in command.said


def test_tokens_are_in_no_file_and_no_log(tmp_path: Path, tasks: Path) -> None:
    command = Command(tmp_path / "labels.sqlite", "--tasks", str(tasks), "--labelers", "ann", "--port", "0")
    before = len(command.said)
    ann = command.clients()["ann"]
    ann.ok("next")
    ann.session.get(ann.page, params={"token": ann.token})
    ann.session.get(f"{ann.page}{ann.token}")
    ann.session.post(f"{ann.page}api/next", headers={"Authorization": f"Bearer {ann.token}x"})
    files = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    command.end()
    assert ann.token not in command.said[before:]
    assert ann.token.encode() not in files
    assert len(files) > 1000


def test_a_port_that_is_taken(tmp_path: Path, tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        options = ["--tasks", str(tasks), "--labelers", "ann", "--port", str(other.getsockname()[1])]
        with pytest.raises(SystemExit):
            main(["label", str(tmp_path / "labels.sqlite"), *options])
    said = capsys.readouterr()
    assert re.search(r"error: label: --host, --port: got 127\.0\.0\.1, \d+.*\nDo: ", said.err)
    assert said.out == ""
    assert not (tmp_path / "labels.sqlite").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--host", "0.0.0.0"], "need the one name or address"),
        (["--host", "192.0.2.1"], "need --allow_remote"),
        (["--host", "192.0.2.1", "--allow_remote"], "nothing can listen"),
        (["--host", "no-such-host.invalid", "--allow_remote"], "nothing can listen"),
        (["--port", "70000"], "need 0 to 65535"),
        (["--port", "x"], "invalid int value"),
        (["--overlap", "1.5"], "need a share from 0 to 1"),
        (["--overlap_labelers", "1"], "need at least 2"),
        (["--until_done", "-1"], "--until_done: got -1; need a number of seconds"),
        (["--until_done", "nan"], "--until_done: got nan; need a number of seconds"),
        (["--labelers_from", "nowhere.sqlite"], "--labelers_from: got nowhere.sqlite, which is no file"),
        (["--lease_minutes", "0"], "need more than 0"),
        (["--lease_minutes", "nan"], "need more than 0"),
        (["--labelers", "ann,,bob"], "got the name ''"),
        (["--labelers", "a\nb"], "need 1 to 64 printable"),
        (["--new_links", "zoe"], "got zoe; need some of ann"),
        (["--guidelines", "nowhere.md"], "--guidelines: got nowhere.md"),
        (["--tasks", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--frobnicate"], "unrecognized arguments"),
    ],
)
def test_settings_that_cannot_work(
    tmp_path: Path, tasks: Path, options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--tasks", str(tasks), "--labelers", "ann", "--port", "0"]
    with pytest.raises(SystemExit) as raised:
        main(["label", str(tmp_path / "labels.sqlite"), *given, *options])
    assert raised.value.code == 2
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("options", "words"), [([], "--labelers: got none"), (["--labelers", "ann"], "--tasks: got none")]
)
def test_what_a_new_database_needs(
    tmp_path: Path, options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["label", str(tmp_path / "labels.sqlite"), "--port", "0", *options])
    assert words in capsys.readouterr().err


def test_missing_packages_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(["label", str(tmp_path / "labels.sqlite")])
    assert "starlette, uvicorn, markdown-it-py" in (said := capsys.readouterr().err)
    assert "pip install 'lit-instruct[label]'" in said


def test_other_machines_are_warned_of(tmp_path: Path, tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lit_instruct.feedback.command import _parser, _print_links
    from lit_instruct.feedback.store import Store

    with Store(tmp_path / "labels.sqlite") as store:
        store.add_labelers(["ann"])
        _print_links(store, _parser().parse_args(["x", "--host", "192.0.2.1"]), 8642)
        said = capsys.readouterr().out
        assert "WARNING: other machines reach this server at 192.0.2.1" in said
        assert "http://192.0.2.1:8642/#" in said
        _print_links(store, _parser().parse_args(["x"]), 8642)
        assert "WARNING" not in capsys.readouterr().out


def test_the_database_of_another_program(tmp_path: Path, tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with sqlite3.connect(tmp_path / "other.sqlite") as connection:
        connection.execute("CREATE TABLE mine (a)")
    with pytest.raises(SystemExit):
        main(["label", str(tmp_path / "other.sqlite"), "--tasks", str(tasks), "--labelers", "ann", "--port", "0"])
    assert "another program" in capsys.readouterr().err
