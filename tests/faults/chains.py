"""Kill a run again and again, resume it each time, and hold what is left against a run that nobody disturbed."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lit_instruct.models.sharded_checkpoint import DataReader, read_shards
from tests.faults.witness import JOURNAL, PHASES

ROOT = Path(__file__).parents[2]
OUTPUT = "output.txt"
LIMIT_S = 600.0  # for one start; a run that hangs ends the test
_ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class Kill(NamedTuple):
    """Kill when ``phase`` begins at optimizer step ``step`` or later, after ``delay_s`` more.

    ``victim``: ``all`` processes at once; or the ``first`` or the ``other`` of two: the one left must end by itself.
    """

    phase: str
    step: int
    delay_s: float
    victim: str = "all"


def spread(
    phases: dict[str, float], kills: int, steps: int, *, seed: int, victims: tuple[str, ...] = ("all",)
) -> list[Kill]:
    """Kills over a whole run, the phases in turn.

    Args:
        phases: name -> about how long it lasts in seconds, within which the moment is drawn.
        kills: how many.
        steps: optimizer steps of the run.
        seed: of the moments.
        victims: in turn.

    Returns:
        The kills, in the order of their steps.
    """
    stream, names = random.Random(seed), list(phases)
    return [
        Kill(
            name := names[number % len(names)],
            round(steps * (number + 1) / (kills + 1)),
            stream.uniform(0.0, phases[name]),
            victims[number // len(names) % len(victims)],
        )
        for number in range(kills)
    ]


class Process:
    """A start of a command, in a process group of its own: as a command, or forked off one that has imported it all."""

    def __init__(self, words: list[str], where: Path, *, forked: bool):
        self._forked: Any = None
        if forked:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["tests.faults.imported"])
            self._forked = context.Process(target=_enter, args=(words, str(where)))
            self._forked.start()
            self.pid = int(self._forked.pid)
            return
        with (where / OUTPUT).open("ab") as output:
            self._started = subprocess.Popen(
                [sys.executable, "-m", "lit_instruct", *words],
                cwd=where,
                env=os.environ | _ENVIRONMENT,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.pid = self._started.pid

    def status(self) -> int | None:
        return self._forked.exitcode if self._forked else self._started.poll()

    def kill(self, victim: str = "all") -> None:
        """SIGKILL, to the whole group or to one rank."""
        if victim == "all":
            os.killpg(self.pid, signal.SIGKILL)
        else:
            os.kill(self.pid if victim == "first" else self._others()[0], signal.SIGKILL)

    def tell(self, number: int) -> None:
        """Send it a signal that it can serve."""
        os.kill(self.pid, number)

    def wait(self, limit_s: float) -> int:
        """Until it and all that it has started are gone."""
        until = time.monotonic() + limit_s
        while (status := self.status()) is None or _group_lives(self.pid):
            if time.monotonic() > until:
                os.killpg(self.pid, signal.SIGKILL)
                raise AssertionError(f"still there after {limit_s} s")
            time.sleep(0.01)
        return status

    def _others(self) -> list[int]:
        listed = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(self.pid)], capture_output=True, text=True)
        return [int(line.split()[0]) for line in listed.stdout.splitlines() if "lit_instruct" in line]


def _group_lives(group: int) -> bool:
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # gone meanwhile
        if int(fields[2]) == group and fields[0] != "Z":
            return True
    return False


def _enter(words: list[str], where: str) -> None:
    """Become the command."""
    from lit_instruct.cli import main

    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # as in a command: for the loader's processes
    os.chdir(where)
    os.environ |= _ENVIRONMENT
    with open(OUTPUT, "ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    torch.set_num_threads(1)
    sys.argv = ["lit-instruct", *words]
    main(words)


@dataclass
class Chain:
    """What happened.

    Attributes:
        hit: phase that a kill really fell into -> how often.
        starts: optimizer step that each start went on from.
        waited_s: how long the ranks that were left took to end, of each kill of one rank alone.
    """

    hit: Counter[str] = field(default_factory=Counter)
    starts: list[int] = field(default_factory=list)
    waited_s: list[float] = field(default_factory=list)


def run_to_the_end(words: list[str], where: Path, *, forked: bool = False) -> None:
    """Undisturbed."""
    where.mkdir(parents=True, exist_ok=True)
    status = Process(words, where, forked=forked).wait(LIMIT_S)
    assert status == 0, said(where)


def start_until(kill: Kill, words: list[str], where: Path, *, forked: bool = False) -> Process:
    """Start and wait for the moment of a kill."""
    where.mkdir(parents=True, exist_ok=True)
    seen = len(_phases(where))
    process = Process(words, where, forked=forked)
    until = time.monotonic() + LIMIT_S
    while not any(name == kill.phase and step >= kill.step for name, step in _phases(where)[seen:]):
        assert process.status() is None, f"it ended before {kill}:\n{said(where)}"
        if time.monotonic() > until:
            process.kill()
            raise AssertionError(f"no {kill} within {LIMIT_S} s:\n{said(where)}")
        time.sleep(0.002)
    time.sleep(kill.delay_s)
    return process


def run_and_kill(words: list[str], where: Path, kills: list[Kill], *, forked: bool = False) -> Chain:
    """Start, kill, start again ... and let the last one end.

    Args:
        words: of the command; it must resume by itself.
        where: its folder.
        kills: in the order of their steps.
        forked: see :class:`Process`.

    Returns:
        What happened.
    """
    where.mkdir(parents=True, exist_ok=True)
    chain = Chain()
    for kill in kills:
        seen = len(_phases(where))
        process = start_until(kill, words, where, forked=forked)
        process.kill(kill.victim)
        killed = time.monotonic()
        process.wait(120.0)
        if kill.victim != "all":
            chain.waited_s.append(time.monotonic() - killed)
        phases = _phases(where)[seen:]
        chain.hit[phases[-1][0]] += 1
        chain.starts += [step for name, step in phases if name == "start"]
    run_to_the_end(words, where, forked=forked)
    chain.starts.append([step for name, step in _phases(where) if name == "start"][-1])
    return chain


def _phases(where: Path) -> list[tuple[str, int]]:
    path = where / PHASES
    lines = path.read_text().splitlines() if path.exists() else []
    return [(name, int(step)) for name, step in map(str.split, lines)]


def said(where: Path) -> str:
    return (where / OUTPUT).read_text(errors="replace")[-3000:]


_NOT_COMPARED = {
    "_base_seed",  # for the loader's processes, which draw nothing
    # What a loader has given since it was made or restored; the sampler's own position, beside it, is compared.
    *("samples_yielded", "_sampler_iter_yielded", "_num_yielded", "_snapshot_step", "_last_yielded_worker_id"),
    *("steps_since_snapshot", "_steps_since_snapshot", "fetcher_ended"),
    "current_score",  # Lightning saves it and does not take it up again; only best_model_score decides
}


def journal(where: Path) -> dict[str, Any]:
    """What was logged: ``step, kind, name`` -> value. A step that was taken twice must have said the same twice."""
    found: dict[str, Any] = {}
    path = where / JOURNAL
    for line in path.read_text().splitlines() if path.exists() else []:
        entry = json.loads(line)
        step = entry.pop("step")
        ((kind, values),) = entry.items()
        for name, value in values.items() if isinstance(values, dict) else [("", values)]:
            if "time/" in name:
                continue
            key, said = f"step {step}, {kind} {name}", repr(value)
            assert found.setdefault(key, said) == said, f"{key}: {found[key]}, and {said} when it was done again"
    return found


def difference(mine: Any, theirs: Any, roots: tuple[str, str], name: str = "") -> str | None:
    """The first difference between two checkpoints, bit by bit, or None.

    Args:
        mine: part of the one.
        theirs: the same part of the other.
        roots: where the two runs lay; paths are compared below them.
        name: of the part.

    Returns:
        Its name and both values.
    """
    if isinstance(mine, torch.Tensor) and isinstance(theirs, torch.Tensor):
        same = mine.shape == theirs.shape and mine.dtype == theirs.dtype and torch.equal(mine, theirs)
        return None if same else f"{name}: {_few(mine)}, not {_few(theirs)}"
    if name.rpartition(".")[2] in _NOT_COMPARED or "time/" in name:
        return None
    if isinstance(mine, dict) and isinstance(theirs, dict):
        here, there = (
            {str(key).replace(root, ""): value for key, value in part.items()}
            for part, root in zip((mine, theirs), roots, strict=True)
        )
        if here.keys() != there.keys():
            return (
                f"{name}: got {sorted(here.keys() - there.keys())} more and {sorted(there.keys() - here.keys())} less"
            )
        return next(
            (found for key in here if (found := difference(here[key], there[key], roots, f"{name}.{key}"))), None
        )
    if isinstance(mine, list | tuple) and isinstance(theirs, list | tuple):
        if len(mine) != len(theirs):
            return f"{name}: {len(mine)} items, not {len(theirs)}"
        pairs = enumerate(zip(mine, theirs, strict=True))
        return next((found for key, (a, b) in pairs if (found := difference(a, b, roots, f"{name}.{key}"))), None)
    here, there = (repr(part).replace(root, "") for part, root in zip((mine, theirs), roots, strict=True))
    return None if here == there else f"{name}: {here}, not {there}"


def _few(tensor: torch.Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.flatten()[:3].tolist()}"


def assert_same(chain: Path, undisturbed: Path) -> None:
    """The two runs logged the same and ended with the same checkpoint.

    Raises:
        AssertionError: names the first difference.
    """
    mine, theirs = journal(chain), journal(undisturbed)
    assert mine.keys() == theirs.keys(), (
        f"logged by the killed run alone: {sorted(mine.keys() - theirs.keys())[:3]}; "
        f"by the other alone: {sorted(theirs.keys() - mine.keys())[:3]}"
    )
    for key, value in theirs.items():
        assert mine[key] == value, f"{key}: {mine[key]}, not {value}"
    ends = [read_checkpoint(where / "runs" / "last.ckpt") for where in (chain, undisturbed)]
    roots = (str(chain.resolve()), str(undisturbed.resolve()))
    found = difference(*ends, roots)
    assert found is None, f"last.ckpt: {found}"


def read_checkpoint(path: Path) -> Any:
    """A file, or a folder of shards with their tensors put together."""
    if path.is_file():
        return torch.load(path, weights_only=True)
    about = DataReader(path).read_metadata().state_dict_metadata
    state: dict[str, Any] = {
        name: torch.empty(tuple(one.size), dtype=one.properties.dtype)
        if isinstance(one, TensorStorageMetadata)
        else None
        for name, one in about.items()
    }
    read_shards(state, path)
    return state | torch.load(path / "meta.pt", weights_only=True)
