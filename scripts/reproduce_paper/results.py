"""Runs parts and keeps what they found, a small file each."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from scripts.reproduce_paper.findings import FINDINGS, SETTINGS
from scripts.reproduce_paper.jobs import run_jobs, with_needs
from scripts.reproduce_paper.parts import PARTS
from scripts.reproduce_paper.plan import Scale, World
from scripts.reproduce_paper.work import prepare


def reproduce(
    scale: Scale, root: Path, out: Path, *, parts: Sequence[str], seeds: Sequence[int] | None, processes: int
) -> None:
    """Do the jobs of some parts, and write down and print what those found of which all is done.

    Args:
        scale: how much is computed.
        root: folder of all jobs.
        out: where the results go, PART.json each.
        parts: names.
        seeds: only these; None: all.
        processes: jobs side by side.
    """
    worlds = [World(seed, scale) for seed in scale.seeds]
    wanted = [world for world in worlds if seeds is None or world.seed in seeds]
    try:
        run_jobs(
            root,
            [job for part in parts for w in wanted for job in PARTS[part](w)],
            processes=processes,
            prepare=prepare,
        )
    finally:  # one that failed keeps back its own part alone
        for part in parts:
            if all(job.read(root) for world in worlds for job in PARTS[part](world)):
                found = summarise(part, worlds, root)
                out.mkdir(parents=True, exist_ok=True)
                (out / f"{part}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
                print_findings(found)


def summarise(part: str, worlds: Sequence[World], root: Path) -> dict[str, Any]:
    """What ``PART.json`` holds."""
    found = FINDINGS[part](root, worlds)
    return {
        "part": part,
        "seeds": [world.seed for world in worlds],
        "settings": SETTINGS,
        "findings": [finding._asdict() for finding in found.findings],
        "results": found.results,
        "core_seconds": {str(world.seed): round(core_seconds(part, world, root)) for world in worlds},
        "jobs": sum(len(own_jobs(part, world)) for world in worlds),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": f"{processor()}, torch {torch.__version__}",
    }


def own_jobs(part: str, world: World) -> list[str]:
    """Names of the jobs that no part before this one does."""
    names = list(PARTS)
    before = {job.name for name in names[: names.index(part)] for job in with_needs(PARTS[name](world))}
    return [job.name for job in with_needs(PARTS[part](world)) if job.name not in before]


def core_seconds(part: str, world: World, root: Path) -> float:
    """How long the part's own jobs took, one thread each."""
    own = set(own_jobs(part, world))
    return sum(job.seconds(root) for job in with_needs(PARTS[part](world)) if job.name in own)


def commit() -> str:
    """Of the checkout, with a plus where files differ from it."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    return git("rev-parse", "--short", "HEAD") + (
        "+" if git("status", "--porcelain", "lit_instruct", "scripts") else ""
    )


def processor() -> str:
    """What computes."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def print_findings(found: dict[str, Any]) -> None:
    """Each finding: the paper's, ours, reproduced or not."""
    print(f"\n{found['part']}")
    for finding in found["findings"]:
        print(f"  {finding['claim']}")
        print(f"    paper: {finding['paper']}")
        print(f"    ours:  {finding['ours']}")
        print(f"    reproduced: {'yes' if finding['reproduced'] else 'NO'}", flush=True)
