"""Jobs of the reproduction: done once, in order, kept, and not by two calls at a time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from scripts.reproduce_paper.jobs import Job, JobError, run_jobs, with_needs

ROOT = Path(__file__).resolve().parents[3]


def add(*, number: int, before: str | None = None) -> dict[str, Any]:
    """A number, plus that of another job; each call leaves a mark."""
    with Path("../calls").open("a", encoding="utf-8") as calls:
        calls.write(f"{Path.cwd().name}\n")
    if before is not None:
        number += json.loads(Path(before, "done.json").read_text(encoding="utf-8"))["result"]["sum"]
    return {"sum": number}


def fail() -> dict[str, Any]:
    """Prints something and ends badly."""
    print("half of it was done")
    raise ValueError("no more paper")


def linger(*, seconds: float) -> dict[str, Any]:
    """Begins, and is still there later."""
    Path("begun").touch()
    time.sleep(seconds)
    Path("ended").touch()
    return {}


def chain(first: int = 1) -> Job:
    one = Job("one", add, {"number": first})
    two = Job("two", add, {"number": 2, "before": "../one"}, (one,))
    return Job("three", add, {"number": 3, "before": "../two"}, (two, one))


def calls(root: Path) -> list[str]:
    return (root / "calls").read_text(encoding="utf-8").split()


def test_needs_come_first_and_once() -> None:
    assert [job.name for job in with_needs([chain(), chain().needs[0]])] == ["one", "two", "three"]


def test_what_is_done_is_not_done_again_and_what_changed_is(tmp_path: Path) -> None:
    run_jobs(tmp_path, [chain()], processes=2)
    assert chain().result(tmp_path) == {"sum": 6}
    assert calls(tmp_path) == ["one", "two", "three"]
    run_jobs(tmp_path, [chain()], processes=2)
    assert calls(tmp_path) == ["one", "two", "three"]
    # The last one's folder is lost, as if it had been killed.
    (tmp_path / "three" / "done.json").unlink()
    (tmp_path / "three" / "rest").touch()
    run_jobs(tmp_path, [chain()], processes=1)
    assert calls(tmp_path) == ["one", "two", "three", "three"]
    assert not (tmp_path / "three" / "rest").exists()  # nothing of the killed one is left
    # Another first job changes all that come after it.
    run_jobs(tmp_path, [chain(first=10)], processes=1)
    assert chain(first=10).result(tmp_path) == {"sum": 15}
    assert calls(tmp_path)[4:] == ["one", "two", "three"]
    with pytest.raises(KeyError, match="three is not done"):
        chain().result(tmp_path)


def test_a_failure_keeps_back_what_needs_it_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = Job("bad", fail)
    after = Job("after", add, {"number": 1}, (bad,))
    good = Job("good", add, {"number": 5})
    with pytest.raises(JobError, match=r"2 jobs .*: after, bad\."):
        run_jobs(tmp_path, [after, good], processes=1)
    assert good.result(tmp_path) == {"sum": 5}
    assert not (tmp_path / "after").exists()
    assert "bad: failed: ValueError: no more paper" in capsys.readouterr().out
    log = (tmp_path / "bad" / "log.txt").read_text(encoding="utf-8")
    assert log.startswith("half of it was done\n")
    assert "no more paper" in log


def wait_for(path: Path) -> None:
    for _ in range(600):
        if path.exists():
            return
        time.sleep(0.1)
    raise AssertionError(f"{path} never came")


@pytest.fixture
def begun(tmp_path: Path) -> Any:
    """A call in a process of its own, in the middle of a job."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom tests.unit.reproduction.test_jobs import linger\n"
        "from scripts.reproduce_paper.jobs import Job, run_jobs\n"
        "if __name__ == '__main__':\n"
        f"    run_jobs(Path({str(tmp_path)!r}), [Job('long', linger, {{'seconds': 5}})], processes=1)\n"
    )
    script = tmp_path / "call.py"
    script.write_text(code, encoding="utf-8")
    process = subprocess.Popen([sys.executable, str(script)], env={**os.environ, "PYTHONPATH": str(ROOT)})
    wait_for(tmp_path / "long" / "begun")
    yield process
    process.kill()
    process.wait()


def test_a_killed_call_leaves_nobody_behind_in_its_folders(tmp_path: Path, begun: subprocess.Popen[bytes]) -> None:
    begun.send_signal(signal.SIGKILL)
    begun.wait()
    time.sleep(7)  # longer than the job would have taken
    assert not (tmp_path / "long" / "ended").exists()


def test_two_calls_do_not_work_in_one_folder(tmp_path: Path, begun: subprocess.Popen[bytes]) -> None:
    assert begun.poll() is None
    with pytest.raises(JobError, match="another call works in this folder"):
        run_jobs(tmp_path, [chain()], processes=1)
