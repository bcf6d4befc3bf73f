"""Jobs with a folder each: done once, in the order of their needs, several side by side.

A job that has ended leaves ``done.json`` in its folder. It is done again only where its function, its arguments or a
job that it needs has changed; so a run that was stopped goes on where it stood.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any

DONE = "done.json"


@dataclass(frozen=True)
class Job:
    """One piece of work.

    Attributes:
        name: its folder, relative to the folder of all jobs.
        work: called in that folder with ``arguments``; what it returns is kept in ``done.json``.
        arguments: JSON values; paths are relative to the job's folder.
        needs: jobs that must be done before.
    """

    name: str
    work: Callable[..., Mapping[str, Any]]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[Job, ...] = ()

    @cached_property
    def key(self) -> str:
        """Stands for what is done, and for all that it is done with."""
        told = [self.name, self.work.__qualname__, self.arguments, [job.key for job in self.needs]]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    def read(self, root: Path) -> dict[str, Any] | None:
        """What ``done.json`` holds (``key``, ``seconds``, ``result``), or None where the job is still to be done."""
        try:
            done: dict[str, Any] = json.loads((root / self.name / DONE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return done if done["key"] == self.key else None

    def result(self, root: Path) -> dict[str, Any]:
        """What the work returned.

        Raises:
            KeyError: it is not done.
        """
        done = self.read(root)
        if done is None:
            raise KeyError(f"{self.name} is not done")
        return dict(done["result"])

    def seconds(self, root: Path) -> float:
        """How long it took; 0 where it is not done."""
        done = self.read(root)
        return 0.0 if done is None else float(done["seconds"])

    def to(self, other: Job) -> str:
        """The path from this job's folder to another's."""
        return os.path.relpath(other.name, self.name)


class JobError(RuntimeError):
    """Some jobs failed; what they printed is in their folders."""


def with_needs(jobs: Sequence[Job]) -> list[Job]:
    """The jobs and all that they need, each once, needs first."""
    ordered: dict[str, Job] = {}

    def add(job: Job) -> None:
        if job.name in ordered:
            return
        for need in job.needs:
            add(need)
        ordered[job.name] = job

    for job in jobs:
        add(job)
    return list(ordered.values())


def run_jobs(root: Path, jobs: Sequence[Job], *, processes: int, prepare: Callable[[], None] | None = None) -> None:
    """Do what is still to be done.

    Args:
        root: folder of all jobs.
        jobs: wanted; what they need is done too.
        processes: how many jobs side by side.
        prepare: called once in each process.

    Raises:
        JobError: a job failed. All others whose needs are met are done before.
    """
    waiting = [job for job in with_needs(jobs) if job.read(root) is None]
    total, failed, running = len(waiting), set[str](), dict[Future[float], Job]()
    if not waiting:
        return
    print(f"{total} jobs, {processes} side by side", flush=True)
    spawn = get_context("spawn")
    with _alone(root), ProcessPoolExecutor(processes, spawn, initializer=_begin, initargs=(prepare,)) as pool:
        while waiting or running:
            blocked = {job.name for job in waiting} | {job.name for job in running.values()}
            for job in list(waiting):
                needs = {need.name for need in job.needs}
                if needs & failed:
                    failed.add(job.name)
                    waiting.remove(job)
                elif not needs & blocked and len(running) < processes:
                    waiting.remove(job)
                    running[pool.submit(_do, root, job)] = job
            if not running:
                continue
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                try:
                    seconds = future.result()
                except (JobError, BrokenExecutor) as error:
                    failed.add(job.name)
                    print(f"{job.name}: failed: {error}; see {root / job.name / 'log.txt'}", flush=True)
                else:
                    left = len(waiting) + len(running)
                    print(f"{job.name}: {seconds:.0f} s ({total - left} of {total})", flush=True)
    if failed:
        raise JobError(f"{len(failed)} jobs failed or wait for one that did: {', '.join(sorted(failed))}.")


def _begin(prepare: Callable[[], None] | None) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if prepare is not None:
        prepare()


def _end_with_parent() -> None:
    """A job whose parent was killed would go on in a folder that the next call empties."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Keep a second call out of the folder.

    Raises:
        JobError: there is one.
    """
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise JobError(f"{root}: another call works in this folder; give one of your own (--work).") from error
        yield


def _do(root: Path, job: Job) -> float:
    folder = root / job.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    start = time.perf_counter()
    with (
        (folder / "log.txt").open("w", encoding="utf-8", buffering=1) as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
        contextlib.chdir(folder),
    ):
        try:
            result = job.work(**job.arguments)
        except BaseException as error:
            traceback.print_exc(file=log)
            if isinstance(error, Exception):
                raise JobError(f"{type(error).__name__}: {error}") from None  # all of it can be sent to the parent
            raise
    seconds = time.perf_counter() - start
    done = {"key": job.key, "seconds": round(seconds, 1), "result": result}
    part = folder / f"{DONE}.part"
    part.write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
    part.replace(folder / DONE)
    return seconds
