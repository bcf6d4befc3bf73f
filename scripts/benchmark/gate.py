"""A worker's side of a race: it stops at the boundary of a step until it is told to go on, and says what that took.

Standard library only: it runs in the environments of both sides. Lines on stdin are ``go N`` (take N steps) and
``stop``; for each ``go`` one line of JSON goes to what was stdout, and prints of libraries go to stderr.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any


class Gate:
    """Counts steps and holds the worker between them.

    Attributes:
        facts: numbers that the worker wants to report besides (a loss, a mean length); sent along with each line.
    """

    def __init__(self) -> None:
        self._replies = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.facts: dict[str, Any] = {}
        self._left = 0
        self._asked = 0
        self._cpu = self._wall = 0.0

    def begin(self) -> None:
        """Everything is built: say so, and wait for the first ``go``."""
        self._send({"ready": True, "peak_mib": peak_mib(), "cpu_seconds": time.process_time()})
        self._wait()

    def step(self) -> None:
        """A step is done; the last one of a ``go`` reports and waits."""
        self._left -= 1
        if self._left:
            return
        cpu, wall = time.process_time() - self._cpu, time.perf_counter() - self._wall
        used = {"steps": self._asked, "cpu_seconds": cpu, "wall_seconds": wall, "peak_mib": peak_mib()}
        self._send({**used, "facts": self.facts})
        self._wait()

    def _send(self, line: dict[str, Any]) -> None:
        self._replies.write(json.dumps(line) + "\n")
        self._replies.flush()

    def _wait(self) -> None:
        command = sys.stdin.readline().split()
        if not command or command[0] == "stop":
            sys.stderr.flush()
            os._exit(0)  # nothing of a training run that is broken off here is worth keeping
        self._asked = self._left = int(command[1])
        self._cpu, self._wall = time.process_time(), time.perf_counter()


def peak_mib() -> float:
    """Peak of this process's resident memory."""
    status = Path("/proc/self/status")
    if status.is_file():  # on Linux ru_maxrss begins with the size of the process that started this one
        (line,) = (line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 2**10
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def spec() -> dict[str, Any]:
    """What this worker was told on its command line."""
    return json.loads(sys.argv[1])
