"""Two processes that take turns: A, B, A, B ...; what is reported is the ratio of each turn."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Spread(NamedTuple):
    """Median and extremes of the turns."""

    median: float
    low: float
    high: float


def spread(values: list[float]) -> Spread:
    """Median and extremes.

    Raises:
        ValueError: there is no value.
    """
    if not values:
        raise ValueError("no values to summarise")
    return Spread(statistics.median(values), min(values), max(values))


class Turn(NamedTuple):
    """One measurement of one side: units done, and what it took."""

    units: float
    cpu_seconds: float
    wall_seconds: float
    peak_mib: float
    facts: dict[str, Any]

    def rate(self, measure: str) -> float:
        """Units a second of ``cpu`` or ``wall``."""
        return self.units / (self.cpu_seconds if measure == "cpu" else self.wall_seconds)


class Result(NamedTuple):
    """Our rate over theirs, turn by turn, and the rates themselves."""

    ratio: Spread
    ours: Spread
    theirs: Spread
    ours_mib: float
    theirs_mib: float
    ours_facts: dict[str, Any]
    theirs_facts: dict[str, Any]


def compare(ours: list[Turn], theirs: list[Turn], measure: str) -> Result:
    """Pair up the turns.

    Args:
        ours: one a turn.
        theirs: as many; entry i was measured right after ``ours[i]``.
        measure: ``cpu`` or ``wall``.

    Returns:
        Medians of the ratios of the pairs: a machine that gets slower in between moves both of a pair.
    """
    pairs = list(zip(ours, theirs, strict=True))
    return Result(
        ratio=spread([mine.rate(measure) / other.rate(measure) for mine, other in pairs]),
        ours=spread([turn.rate(measure) for turn in ours]),
        theirs=spread([turn.rate(measure) for turn in theirs]),
        ours_mib=ours[-1].peak_mib,
        theirs_mib=theirs[-1].peak_mib,
        ours_facts=ours[-1].facts,
        theirs_facts=theirs[-1].facts,
    )


class Worker:
    """A process that has built its model and its trainer and waits between steps."""

    def __init__(self, python: Path, module: str, spec: dict[str, Any], *, threads: int, log: Path) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w", encoding="utf-8") as stderr:
            self.process = subprocess.Popen(
                [str(python), "-m", f"scripts.benchmark.workers.{module}", json.dumps({**spec, "threads": threads})],
                cwd=ROOT,
                env=environment(threads) | spec.get("environment", {}),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        self._read()

    def go(self, steps: int) -> dict[str, Any]:
        """Let it take some steps; returns what they took."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"go {steps}\n")
        self.process.stdin.flush()
        return self._read()

    def stop(self) -> None:
        """End the process."""
        if self.process.poll() is None:
            assert self.process.stdin is not None
            self.process.stdin.close()  # as good as "stop", and a dead process does not mind
            try:
                self.process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            said = self.log.read_text(encoding="utf-8").strip().splitlines()[-15:]
            raise SystemExit("\n".join([*said, f"A worker ended with exit status {status}; all it said: {self.log}"]))
        return json.loads(line)


def environment(threads: int) -> dict[str, str]:
    """Variables of a worker: so many threads for every library, no download, no chatter."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {
        **os.environ,
        **dict.fromkeys(names, str(threads)),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
    }


def race(ours: Worker, theirs: Worker, units: list[float], *, warmup: int, steps: int, measure: str) -> Result:
    """Warm both up, then let them take turns over the same steps.

    Args:
        ours: our side.
        theirs: the other.
        units: what each optimizer step of the run holds (tokens, comparisons or episodes), the same on both sides.
        warmup: steps before the first turn.
        steps: of one turn.
        measure: ``cpu`` or ``wall``.

    Returns:
        The comparison.
    """
    turns: tuple[list[Turn], list[Turn]] = ([], [])
    for worker in (ours, theirs):
        worker.go(warmup)
    for start in range(warmup, len(units) - steps + 1, steps):
        for worker, seen in zip((ours, theirs), turns, strict=True):
            used = worker.go(steps)
            done = sum(units[start : start + steps])
            seen.append(Turn(done, used["cpu_seconds"], used["wall_seconds"], used["peak_mib"], used["facts"]))
    return compare(*turns, measure)
