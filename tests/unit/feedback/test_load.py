"""Many labelers at once, over real HTTP, against ``lit-instruct label`` in a process of its own."""

from __future__ import annotations

import statistics
import threading
import time
from pathlib import Path

import pytest

from lit_instruct.feedback.store import Store
from tests.helpers.labelling import Client, Command, key, rank_row, ranking, write_rows

CLIENTS = 20
ANSWERS = 2000


@pytest.mark.slow  # 2,000 answers, each on the disk before it is acknowledged
def test_twenty_clients_save_two_thousand_answers(tmp_path: Path) -> None:
    """Nothing is lost and nothing doubled; prints how long a save takes (run with -s to see it)."""
    tasks = write_rows(tmp_path / "tasks.jsonl", [rank_row(number) for number in range(ANSWERS)])
    names = [f"labeler{number}" for number in range(CLIENTS)]
    command = Command(
        tmp_path / "labels.sqlite",
        "--tasks",
        str(tasks),
        "--labelers",
        ",".join(names),
        "--overlap",
        "0",
        "--port",
        "0",
    )
    seconds: list[float] = []
    sent: dict[tuple[str, str], str] = {}

    def work(name: str, client: Client) -> None:
        while (task := client.ok("next")["task"]) is not None:
            event = key()
            began = time.perf_counter()
            assert client.answer(task["number"], ranking([2, 1, 3, 3]), key=event).json() == {"new": True}
            seconds.append(time.perf_counter() - began)
            sent[name, event] = task["shown"]["prompt"]

    threads = [threading.Thread(target=work, args=item) for item in command.clients().items()]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - began
    assert command.end() == 0, command.said
    with Store(tmp_path / "labels.sqlite") as store:
        kept = store.events()
        assert {(event.labeler, event.key): event.task.prompt for event in kept} == sent
        assert len(kept) == len(seconds) == len(set(sent.values())) == ANSWERS
        assert store.totals() == (ANSWERS, ANSWERS)
    centiles = statistics.quantiles(seconds, n=100)
    print(
        f"\n{CLIENTS} clients, {ANSWERS} answers in {took:.1f} s; a save takes {1000 * centiles[49]:.1f} ms (median), "
        f"{1000 * centiles[98]:.1f} ms (99th percentile)"
    )
