"""Numbers of several seeds together: every prompt of every world counts once, owners are drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lit_instruct.evaluation.bootstrap import Interval, owner_interval
from lit_instruct.evaluation.win_rate import outcomes_of
from lit_instruct.toyworld.gold import Assessment, assess
from lit_instruct.toyworld.world import ToyWorld
from lit_instruct.toyworld.writing import read_jsonl
from scripts.reproduce_paper.jobs import Job

CLOSED_KINDS = frozenset({"closed_question", "classification", "extraction", "rewriting"})
"""The input holds all that a response may say."""


@dataclass(frozen=True)
class Reading:
    """The responses of one model in one world.

    Attributes:
        world: of the prompts.
        rows: of ``samples.jsonl``.
    """

    world: ToyWorld
    rows: list[dict[str, Any]]

    @property
    def owners(self) -> list[str]:
        """Who asked; owners of two worlds are not the same."""
        return [f"{self.world.seed}/{row['owner']}" for row in self.rows]

    @property
    def scores(self) -> list[float]:
        """Gold scores."""
        return [row["score"] for row in self.rows]

    @cached_property
    def assessed(self) -> list[Assessment]:
        """All that the gold score is made of."""
        return [assess(self.world, row["prompt"], row["response"]) for row in self.rows]

    @cached_property
    def kinds(self) -> list[str]:
        """Of the instructions."""
        return [self.world.task_of(row["prompt"]).kind for row in self.rows]


def read(root: Path, world: ToyWorld, measured: Job) -> Reading:
    """The responses that a ``measure`` job wrote."""
    return Reading(world, read_jsonl(root / measured.name / "samples.jsonl"))


def preferred(ours: Sequence[Reading], theirs: Sequence[Reading]) -> dict[str, float]:
    """How often one model is preferred to another, ties one half, over all worlds."""
    outcomes, owners = [], []
    for one, other in zip(ours, theirs, strict=True):
        if [row["prompt"] for row in one.rows] != [row["prompt"] for row in other.rows]:
            raise ValueError("the two models were not asked the same prompts")
        outcomes += outcomes_of(one.scores, other.scores).tolist()
        owners += one.owners
    return told(owner_interval(outcomes, owners))


def mean_of(
    readings: Sequence[Reading],
    value: Callable[[Assessment], float],
    kinds: frozenset[str] | None = None,
) -> dict[str, float]:
    """The mean of something over all responses (to instructions of some kinds) of all worlds."""
    values, owners = [], []
    for reading in readings:
        for kind, assessment, owner in zip(reading.kinds, reading.assessed, reading.owners, strict=True):
            if kinds is None or kind in kinds:
                values.append(float(value(assessment)))
                owners.append(owner)
    return told(owner_interval(values, owners))


def told(interval: Interval) -> dict[str, float]:
    """An interval for a file."""
    return {name: round(float(value), 4) for name, value in interval._asdict().items()}


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """The mean of one number a seed, with the smallest and the largest."""
    rounded = [round(float(value), 4) for value in values]
    return {"mean": round(float(np.mean(values)), 4), "low": min(rounded), "high": max(rounded), "seeds": rounded}


def shown(found: dict[str, Any], form: str = ".1%") -> str:
    """``70.4% [68.0%, 72.6%]``."""
    return f"{found['mean']:{form}} [{found['low']:{form}}, {found['high']:{form}}]"
