"""The store: replaying events, keys, leases, shares and orders; several threads and processes; a kill in the middle."""

from __future__ import annotations

import json
import random
import signal
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lit_instruct.feedback.database import VERSION
from lit_instruct.feedback.forms import FormError
from lit_instruct.feedback.store import LONGEST_SECONDS, ConflictError, Given, NotGivenError, Store
from lit_instruct.feedback.tasks import read_task
from lit_instruct.types import DataError
from tests.helpers.labelling import ROOT, key, rank_row, rank_tasks, ranking
from tests.helpers.numbers import assert_close

SKIP = {"reason": "unclear", "note": ""}
LEASE = 100.0


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[Store]:
    with Store(tmp_path / "labels.sqlite", lease_seconds=LEASE, clock=clock) as opened:
        opened.add_labelers(["ann", "bob", "cat"])
        yield opened


def take(store: Store, labeler: str) -> Given:
    given = store.give_next(labeler)
    assert given is not None
    return given


def do(store: Store, labeler: str, content: Any = None, *, seconds: float = 0.0) -> Given:
    """Take the next task and answer it."""
    given = take(store, labeler)
    answer = content or ranking(range(1, len(given.shown["responses"]) + 1))
    assert store.save(labeler, given.number, "answer", answer, key=key(), seconds=seconds)
    return given


# -- what holds is what replaying gives


def replayed(store: Store) -> dict[tuple[str, str], tuple[int, str]]:
    """The oracle: go through the events by hand; for each labeler and task the event that holds, and its kind."""
    holds: dict[tuple[str, str], tuple[int, str]] = {}
    for event in store.events():
        if event.kind == "undo":
            del holds[event.labeler, event.task.id]
        else:
            assert (event.labeler, event.task.id) not in holds
            holds[event.labeler, event.task.id] = (event.number, event.kind)
    return holds


def test_what_holds_is_what_replaying_gives(store: Store, clock: Clock) -> None:
    store.add_tasks(rank_tasks(12, responses=3), overlap=0.5)
    stack: dict[str, list[tuple[str, str]]] = {name: [] for name in ("ann", "bob", "cat")}  # done and not taken back
    undos = 0
    for _ in range(300):
        labeler = random.choice(list(stack))
        clock.now += random.choice([1, 1, 1, 60])
        if random.random() < 0.3:
            undone = store.undo(labeler, key=key())
            assert (undone is None) == (not stack[labeler])
            if undone is not None:
                undos += 1
                stack[labeler].pop()
                assert take(store, labeler).number == undone
            continue
        given = store.give_next(labeler)
        if given is None:
            continue
        kind = random.choice(["answer", "answer", "skip"])
        content = ranking(random.sample([1, 2, 3], 3)) if kind == "answer" else SKIP
        store.save(labeler, given.number, kind, content, key=key(), seconds=0)
        stack[labeler].append((given.shown["prompt"], kind))
    holds = replayed(store)
    assert undos > 20
    assert {(label.labeler, label.task.id): (label.number, label.kind) for label in store.labels()} == holds
    answers = Counter(task for (_, task), (_, kind) in holds.items() if kind == "answer")
    counted = store._all("SELECT id, answers FROM tasks WHERE answers")
    assert {row["id"]: row["answers"] for row in counted} == answers
    for labeler, done in stack.items():
        kinds = Counter(kind for _, kind in done)
        assert store.progress(labeler)[:2] == (kinds["answer"], kinds["skip"])


def test_events_can_not_be_changed(store: Store) -> None:
    store.add_tasks(rank_tasks(1))
    do(store, "ann")
    other = sqlite3.connect(store.path)
    for statement in ("UPDATE events SET seconds = 1", "DELETE FROM events"):
        with pytest.raises(sqlite3.IntegrityError, match="never"):
            other.execute(statement)
    other.close()


# -- one event, one key


def test_the_same_event_sent_again_is_saved_once(store: Store) -> None:
    store.add_tasks(rank_tasks(2))
    given, name = take(store, "ann"), key()
    answer = ranking([1, 2, 3, 4])
    assert store.save("ann", given.number, "answer", answer, key=name, seconds=1)
    assert not store.save("ann", given.number, "answer", answer, key=name, seconds=5)
    assert len(store.events()) == 1
    with pytest.raises(ConflictError):  # another event under this key
        store.save("ann", given.number, "answer", ranking([4, 3, 2, 1]), key=name, seconds=1)
    with pytest.raises(ConflictError):
        store.undo("ann", key=name)
    bobs = take(store, "bob")
    assert store.save("bob", bobs.number, "answer", answer, key=name, seconds=1)  # keys are a labeler's own


def test_an_undo_sent_again_takes_back_one_task(store: Store) -> None:
    store.add_tasks(rank_tasks(3))
    first, second = do(store, "ann"), do(store, "ann")
    name = key()
    assert store.undo("ann", key=name) == second.number
    assert store.undo("ann", key=name) == second.number
    assert [label.task.id for label in store.labels()] == ["task-0"]
    assert store.undo("ann", key=key()) == first.number
    assert store.undo("ann", key=key()) is None


def test_a_late_copy_after_an_undo_does_not_come_back(store: Store) -> None:
    store.add_tasks(rank_tasks(1))
    given, name = take(store, "ann"), key()
    store.save("ann", given.number, "answer", ranking([1, 2, 3, 4]), key=name, seconds=0)
    store.undo("ann", key=key())
    assert not store.save("ann", given.number, "answer", ranking([1, 2, 3, 4]), key=name, seconds=0)
    assert store.labels() == []


def test_a_task_that_is_done_is_not_done_again(store: Store) -> None:
    store.add_tasks(rank_tasks(1))
    given = do(store, "ann")
    for kind, content in (("answer", ranking([1, 2, 3, 4])), ("skip", SKIP)):
        with pytest.raises(ConflictError, match="done already"):
            store.save("ann", given.number, kind, content, key=key(), seconds=0)
    assert len(store.events()) == 1


def test_only_what_was_given_can_be_answered(store: Store) -> None:
    store.add_tasks(rank_tasks(2))
    given = take(store, "ann")
    for number in (given.number, given.number + 1, 99):
        with pytest.raises(NotGivenError):
            store.save("bob", number, "answer", ranking([1, 2, 3, 4]), key=key(), seconds=0)
        with pytest.raises(NotGivenError):
            store.save_draft("bob", number, ranking([1, 2, 3, 4]), 0)
    assert store.events() == []


def test_a_bad_answer_leaves_nothing(store: Store) -> None:
    store.add_tasks(rank_tasks(1))
    given = take(store, "ann")
    with pytest.raises(FormError):
        store.save("ann", given.number, "answer", ranking([1, 2, 3, 9]), key=key(), seconds=0)
    with pytest.raises(FormError):
        store.save("ann", given.number, "skip", {"reason": "bored", "note": ""}, key=key(), seconds=0)
    assert store.events() == []
    do(store, "ann")  # and the store goes on


# -- leases


def test_a_closed_tab_loses_nothing(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "labels.sqlite"
    with Store(path, clock=clock) as store:
        store.add_labelers(["ann"])
        store.add_tasks(rank_tasks(3))
        given = take(store, "ann")
        draft = ranking([4, 3, 2, 1], note="half way")
        draft["responses"][0]["rank"] = None
        store.save_draft("ann", given.number, draft, 12.5)
    with Store(path, clock=clock) as store:
        assert take(store, "ann") == given._replace(draft=draft, seconds=12.5)


def test_a_lease_runs_out_and_a_late_answer_is_kept(store: Store, clock: Clock) -> None:
    store.add_tasks(rank_tasks(1))
    given = take(store, "ann")
    clock.now += LEASE - 1
    assert store.give_next("bob") is None
    store.save_draft("ann", given.number, ranking([1, 2, 3, 4]), 0)  # whoever types keeps it
    clock.now += LEASE - 1
    assert store.give_next("bob") is None
    clock.now += 2
    assert take(store, "bob").number == given.number
    assert store.give_next("ann") is None  # the place is bob's now
    assert store.save("ann", given.number, "answer", ranking([1, 2, 3, 4]), key=key(), seconds=0)
    do(store, "bob")
    assert sorted(label.labeler for label in store.labels()) == ["ann", "bob"]


def test_a_lease_that_ran_out_is_still_theirs_if_nobody_took_it(store: Store, clock: Clock) -> None:
    store.add_tasks(rank_tasks(2))
    given = take(store, "ann")
    clock.now += 10 * LEASE
    assert take(store, "ann").number == given.number


def test_a_skipped_task_goes_to_another(store: Store) -> None:
    store.add_tasks(rank_tasks(1))
    given = take(store, "ann")
    store.save("ann", given.number, "skip", SKIP, key=key(), seconds=0)
    assert store.give_next("ann") is None
    assert store.progress("ann") == (0, 1, 0)
    assert take(store, "bob").number == given.number


def test_undo_brings_back_what_was_answered_and_then_what_was_begun(store: Store) -> None:
    store.add_tasks(rank_tasks(3))
    answer = ranking([2, 1, 3, 3], rating=6, flags=["opinion"], note="n")
    done = do(store, "ann", answer)
    begun = take(store, "ann")
    store.save_draft("ann", begun.number, ranking([1, 1, 1, 1]), 3)
    assert store.undo("ann", key=key()) == done.number
    again = take(store, "ann")
    assert (again.number, again.draft) == (done.number, answer)
    do(store, "ann")
    assert take(store, "ann").draft == ranking([1, 1, 1, 1])


def test_undoing_a_skip_brings_back_the_draft(store: Store) -> None:
    store.add_tasks(rank_tasks(1))
    given = take(store, "ann")
    store.save_draft("ann", given.number, ranking([1, 1, 2, 3]), 4)
    store.save("ann", given.number, "skip", SKIP, key=key(), seconds=4)
    store.undo("ann", key=key())
    assert take(store, "ann").draft == ranking([1, 1, 2, 3])


def test_time_is_capped(store: Store, clock: Clock) -> None:
    store.add_tasks(rank_tasks(3))
    for claimed, wall in ((5.0, 10.0), (500.0, 10.0), (1e8, 1e6)):
        given = take(store, "ann")
        clock.now += wall
        store.save("ann", given.number, "answer", ranking([1, 2, 3, 4]), key=key(), seconds=claimed)
    assert_close([label.seconds for label in store.labels()], [5.0, 10.0, LONGEST_SECONDS])


# -- who gets what


def test_shares_are_exact(store: Store) -> None:
    store.add_tasks(rank_tasks(40), overlap=0.25, overlap_labelers=2)
    store.add_tasks([read_task(rank_row(99, labelers=3))], overlap=0.0)
    names = ["ann", "bob", "cat"]
    left = set(names)
    while left:
        labeler = random.choice(sorted(left))
        if store.give_next(labeler) is None:
            left.discard(labeler)
        else:
            do(store, labeler)
    counts = Counter(label.task.id for label in store.labels())
    assert Counter(counts.values()) == {1: 30, 2: 10, 3: 1}
    assert counts["task-99"] == 3
    assert len({(label.labeler, label.task.id) for label in store.labels()}) == 30 + 20 + 3
    assert store.totals() == (41, 41)


def test_overlap_is_drawn_by_the_seed(tmp_path: Path) -> None:
    def drawn(seed: int) -> set[str]:
        path = tmp_path / f"{seed}-{random.random()}.sqlite"
        with Store(path, seed=seed) as store:
            store.add_tasks(rank_tasks(40), overlap=0.3)
            rows = store._database.execute("SELECT id FROM tasks WHERE wanted = 2").fetchall()
        return {row["id"] for row in rows}

    assert drawn(1) == drawn(1) != drawn(2)
    assert len(drawn(2)) == 12


def test_each_labeler_has_an_order_and_answers_land_on_the_right_response(store: Store) -> None:
    """Both prefer responses by their text; whatever order they saw, the texts get these ranks."""
    store.add_tasks(rank_tasks(10, responses=5), overlap=1.0)
    seen: dict[str, list[list[str]]] = {"ann": [], "bob": []}
    for _ in range(10):
        for labeler, orders in seen.items():
            given = take(store, labeler)
            texts = given.shown["responses"]
            orders.append(texts)
            ranks = [sorted(texts, reverse=True).index(text) + 1 for text in texts]
            draft = ranking(ranks)
            store.save_draft(labeler, given.number, draft, 0)
            assert take(store, labeler) == given._replace(draft=draft)
            store.save(labeler, given.number, "answer", draft, key=key(), seconds=0)
    assert seen["ann"] != seen["bob"]
    assert all(Counter(a) == Counter(b) for a, b in zip(*seen.values(), strict=True))
    for label in store.labels():
        assert [judgement["rank"] for judgement in label.content["responses"]] == [5, 4, 3, 2, 1]
    anns = [label for label in store.labels() if label.labeler == "ann"]
    shown = [[label.task.responses[index] for index in label.response_order] for label in anns]
    assert shown == seen["ann"]
    assert len({tuple(label.response_order) for label in anns}) > 5


def test_what_is_hidden_is_not_given_and_comes_out_with_the_labels(store: Store) -> None:
    row = rank_row(1, owner="secret-owner", sources=["secret-a", "secret-b", None, "secret-c"])
    store.add_tasks([read_task(row)])
    assert "secret" not in json.dumps(do(store, "ann")._asdict())
    (label,) = store.labels()
    assert label.task == read_task(row)._replace(labelers=1)


# -- tasks and labelers are added once


def test_adding_again_adds_nothing(store: Store) -> None:
    assert store.add_tasks(rank_tasks(3)) == 3
    do(store, "ann")
    assert store.add_tasks(rank_tasks(5)) == 2
    assert store.add_labelers(["bob", "dan", "dan"]) == ["dan"]
    assert len(store.labels()) == 1
    assert store.totals() == (1, 5)


def test_a_changed_task_is_refused_and_nothing_added(store: Store) -> None:
    store.add_tasks(rank_tasks(2))
    for change in ({"prompt": "another"}, {"owner": "another"}, {"task": "demonstrate"}):
        changed = read_task(rank_row(1) | change)
        with pytest.raises(DataError, match=r"task-1[\s\S]*Do:"):
            store.add_tasks([*rank_tasks(5)[2:], changed])
    assert store.totals() == (0, 2)


# -- files that are no such database


def test_other_files_are_refused_and_stay_as_they_are(tmp_path: Path) -> None:
    text = tmp_path / "text.sqlite"
    text.write_text("not a database " * 100)
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE mine (a)")
    newer = tmp_path / "newer.sqlite"
    Store(newer).close()
    with sqlite3.connect(newer) as connection:
        connection.execute(f"PRAGMA user_version = {VERSION + 1}")
    for path, words in (
        (text, "not a database"),
        (other, "another program"),
        (newer, f"version {VERSION + 1}; need version {VERSION}"),
        (tmp_path / "nowhere" / "a.sqlite", "does not exist"),
        (tmp_path, "cannot be used"),
    ):
        with pytest.raises(DataError, match=rf"{words}[\s\S]*Do:"):
            Store(path)
    assert text.read_text() == "not a database " * 100
    tables = sqlite3.connect(other).execute("SELECT name FROM sqlite_master").fetchall()
    assert tables == [("mine",)]


def test_the_seed_is_the_databases_own(tmp_path: Path) -> None:
    path = tmp_path / "labels.sqlite"
    Store(path, seed=5).close()
    with Store(path, seed=6) as store:
        assert store._seed == "5"


# -- several at once


def test_threads_share_the_work(tmp_path: Path) -> None:
    with Store(tmp_path / "labels.sqlite") as store:
        names = [f"labeler {number}" for number in range(8)]
        store.add_labelers(names)
        store.add_tasks(rank_tasks(60), overlap=0.5)
        failures: list[BaseException] = []

        def work(name: str) -> None:
            try:
                while (given := store.give_next(name)) is not None:
                    store.save(name, given.number, "answer", ranking([1, 2, 3, 4]), key=key(), seconds=0)
            except BaseException as error:
                failures.append(error)
                raise

        threads = [threading.Thread(target=work, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        counts = Counter(label.task.id for label in store.labels())
    assert Counter(counts.values()) == {1: 30, 2: 30}


def test_nothing_is_left_when_all_is_answered_or_skipped_by_all(store: Store) -> None:
    assert not store.nothing_left()  # there are no tasks
    store.add_tasks(rank_tasks(2, labelers=2))
    for labeler in ("ann", "bob"):
        assert not store.nothing_left()
        do(store, labeler)
        do(store, labeler)
    assert store.nothing_left()
    store.undo("bob", key=key())
    assert not store.nothing_left()
    for labeler in ("bob", "cat"):
        assert not store.nothing_left()
        store.save(labeler, take(store, labeler).number, "skip", SKIP, key=key(), seconds=0)
    assert store.totals() == (1, 2)
    assert store.nothing_left()


def test_labelers_of_another_database_come_in_with_their_links(store: Store) -> None:
    store.set_token_hash("ann", b"own")
    store.take_labelers({"ann": b"other", "bob": b"other", "dan": b"dan's", "eve": None})
    assert store.token_hashes() == {"ann": b"own", "bob": b"other", "cat": None, "dan": b"dan's", "eve": None}


WORKER = """
import sys, pathlib
from lit_instruct.feedback.store import Store
from tests.helpers.labelling import key, ranking
store, name = Store(pathlib.Path(sys.argv[1])), sys.argv[2]
print("ready", flush=True)
sys.stdin.readline()
for _ in range(int(sys.argv[3])):
    given, event = store.give_next(name), key()
    assert store.save(name, given.number, "answer", ranking([1, 2, 3, 4]), key=event, seconds=0)
    print(event, flush=True)
print("end", flush=True)
"""


def start_worker(path: Path, name: str, answers: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, str(path), name, str(answers)],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def said(worker: subprocess.Popen[str]) -> str:
    assert worker.stdout is not None
    return worker.stdout.readline().strip()


def test_processes_share_the_work_and_a_kill_in_the_middle_loses_nothing(tmp_path: Path) -> None:
    """Two write at once; one is killed after some twenty of its 2,000 answers. What it had told of is there, once."""
    path = tmp_path / "labels.sqlite"
    with Store(path) as store:
        store.add_labelers(["ann", "bob"])
        store.add_tasks(rank_tasks(2500))
    ann, bob = start_worker(path, "ann", 2000), start_worker(path, "bob", 60)
    assert said(ann) == said(bob) == "ready"
    for worker in (ann, bob):
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    acknowledged = [said(ann) for _ in range(20)]
    ann.send_signal(signal.SIGKILL)
    acknowledged += ann.communicate()[0].split()
    assert ann.returncode == -signal.SIGKILL
    assert "end" not in acknowledged
    bobs = bob.communicate()[0].split()
    assert bobs.pop() == "end"
    assert len(bobs) == 60
    with Store(path) as store:
        assert store._database.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        events = [(event.labeler, event.key) for event in store.events()]
        assert len(set(events)) == len(events)
        assert {("ann", event) for event in acknowledged} <= set(events)
        assert {("bob", event) for event in bobs} <= set(events)
        assert len(events) - len(acknowledged) - len(bobs) in (0, 1)  # one may have been saved and not told of
        assert set(Counter(label.task.id for label in store.labels()).values()) == {1}
        do(store, "ann")  # who was killed goes on
