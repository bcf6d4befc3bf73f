"""A round of feedback in a process of its own whose steps are forked off it: most of a start's seconds are imports."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

LIMIT_S = 120.0


class Forked:
    """A command, with as much of ``subprocess.Popen`` as the round asks for."""

    def __init__(self, words: Sequence[str], *, stdout: int | None = None, stderr: int | None = None, **_: Any) -> None:
        self.returncode: int | None = None
        self._told, write = os.pipe() if stderr == subprocess.PIPE else (None, None)
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # as exec leaves them
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            if stdout == subprocess.DEVNULL:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            if write is not None:
                os.dup2(write, 2)
            _become(words)
        if write is not None:
            os.close(write)

    def wait(self) -> int:
        self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def communicate(self) -> tuple[None, str]:
        assert self._told is not None
        with os.fdopen(self._told, encoding="utf-8") as told:
            said = told.read()
        self.wait()
        return None, said

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def _become(words: Sequence[str]) -> None:
    """Run a command to its end and leave, whatever happens."""
    from lit_instruct.cli import main

    status = 1
    try:
        sys.argv = ["lit-instruct", *words]
        main(words)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001  (the last frame of a process)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _enter(words: Sequence[str], where: str, output: str) -> None:
    from lit_instruct.feedback import round as feedback_round

    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # as in a command: for the loader's processes
    os.chdir(where)
    with open(output, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    torch.set_num_threads(1)
    feedback_round.start = Forked  # type: ignore[assignment]
    _become(["round", *words])


class ForkedRound:
    """``lit-instruct round`` in a group of its own; what it prints is read from a file."""

    def __init__(self, words: Sequence[Any], where: Path) -> None:
        self.output = where / f"output{len(list(where.glob('output*')))}.txt"
        self.output.touch()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.faults.imported"])
        self._process = context.Process(
            target=_enter, args=([str(word) for word in words], str(where), self.output.name)
        )
        self._process.start()
        atexit.register(self._end)  # where a test fails before it is over: the interpreter would wait for it

    def _end(self) -> None:
        if self._process.exitcode is None:
            self.kill()

    @property
    def said(self) -> str:
        return self.output.read_text(encoding="utf-8")

    def until(self, holds: Callable[[], object]) -> None:
        """Wait for something to become true while it runs."""
        end = time.monotonic() + LIMIT_S
        while not holds():
            assert self._process.exitcode is None, self.said
            assert time.monotonic() < end, self.said
            time.sleep(0.01)

    def kill(self) -> None:
        """SIGKILL, to it and the step that it runs."""
        assert self._process.pid is not None
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.join(LIMIT_S)

    def tell(self, number: int, *, group: bool) -> None:
        """Send it a signal; to the whole group, as a terminal does with Ctrl-C, or to it alone."""
        assert self._process.pid is not None
        (os.killpg if group else os.kill)(self._process.pid, number)

    def wait(self) -> int:
        """Its exit status."""
        self._process.join(LIMIT_S)
        assert self._process.exitcode is not None, self.said
        return self._process.exitcode
