"""Two labelers side by side through twenty tasks, a closed tab, and a server that is killed and comes back."""

from __future__ import annotations

import random
import signal
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lit_instruct.feedback.store import Store
from tests.helpers.labelling import Command, write_rows

pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
from playwright.sync_api import expect

from tests.browser.labeler import KeyboardLabeler, Labeler, MouseLabeler, wanted_ranks

if TYPE_CHECKING:
    from playwright.sync_api import Browser


def row(number: int) -> dict[str, Any]:
    """A task with ties in two of three."""
    size = 3 + number % 3
    levels = size if number % 3 == 0 else size - 1
    qualities = [1 + index % levels for index in range(size)]
    random.Random(number).shuffle(qualities)
    texts = [f"text {index}: quality {value}" for index, value in enumerate(qualities)]
    return {"task": "rank", "id": str(number), "prompt": f"prompt {number}", "responses": texts}


def label(labeler: Labeler) -> list[list[int]]:
    """Do the task on the page; returns the order as it was saved."""
    labeler.rate()
    labeler.order()
    ladder = labeler.ladder()
    labeler.save()
    return ladder


def test_two_labelers_a_closed_tab_and_a_killed_server(browser: Browser, tmp_path: Path) -> None:
    tasks = write_rows(tmp_path / "tasks.jsonl", [row(number) for number in range(20)])
    database = tmp_path / "labels.sqlite"
    command = Command(
        database, "--tasks", str(tasks), "--labelers", "ann,bob", "--overlap", "0.5", "--port", "0", "--seed", "3"
    )
    port = command.page.rstrip("/").rpartition(":")[2]
    ann, bob = MouseLabeler(browser, command.links["ann"]), KeyboardLabeler(browser, command.links["bob"])
    assert ann.page.url == command.page  # the token is out of the address

    ladders = []
    for _ in range(4):
        label(ann)
        ladders.append((bob.prompt, label(bob)))

    # ann closes her tab half way and opens her link again
    ann.rate()
    prompt, texts = ann.prompt, ann.texts
    ann.close_tab()
    ann.open()
    assert (ann.prompt, ann.texts) == (prompt, texts)
    assert ann.page.locator(".scale input:checked").count() == len(texts)
    ann.order()
    ann.save()

    # bob takes back his last two, finds them as he left them, and saves them again: the older one comes first
    for prompt, ladder in reversed(ladders[-2:]):
        done = bob.done
        bob.press("u")
        expect(bob.page.locator("#progress-text")).to_contain_text(f"{done - 1} done")
        assert (bob.prompt, bob.ladder()) == (prompt, ladder)
    for prompt, _ in ladders[-2:]:
        assert bob.prompt == prompt
        bob.save()

    # the server is killed while both have work on the page; saving waits for it
    for labeler in (ann, bob):
        labeler.rate()
        labeler.order()
    assert command.end(signal.SIGKILL) == -signal.SIGKILL
    done = ann.done, bob.done
    ann.press_save()
    bob.press_save()
    for labeler in (ann, bob):
        expect(labeler.page.locator("#problem")).to_contain_text("cannot be reached")
    command = Command(database, "--port", port)
    for labeler, before_kill in zip((ann, bob), done, strict=True):
        expect(labeler.page.locator("#progress-text")).to_contain_text(f"{before_kill + 1} done", timeout=30_000)

    # to the end; once more the server is killed, right behind a save
    working = [ann, bob]
    while working:
        for labeler in list(working):
            if labeler.title == "Nothing left for you":
                working.remove(labeler)
                continue
            label(labeler)
            if labeler is ann and ann.done == 11:
                command.end(signal.SIGKILL)
                command = Command(database, "--port", port)
    assert command.end(signal.SIGINT) == 0
    assert not ann.errors
    assert not bob.errors

    with Store(database) as store:
        labels, events = store.labels(), [event for event in store.events() if event.kind != "undo"]
        assert Counter(event.key for event in events) == Counter(ann.acknowledged + bob.acknowledged)
        assert store.totals() == (20, 20)
    counts = Counter(label.task.id for label in labels)
    assert Counter(counts.values()) == {1: 10, 2: 10}
    assert Counter(label.labeler for label in labels) == {"ann": ann.done, "bob": bob.done}
    for one in labels:
        assert [judgement["rank"] for judgement in one.content["responses"]] == wanted_ranks(one.task.responses)
        assert one.seconds > 0
