"""Simulated labelers: the gold score seen through noise of their own.

Each response gets a utility, the gold score plus noise of this labeler for this very text, and the ranking follows
the utilities. So a labeler never contradicts itself within a ranking, as flipping single pairs would.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from lit_instruct.toyworld.gold import assess
from lit_instruct.toyworld.world import ToyWorld

PAPER_AGREEMENT = 0.726
"""Share of pairs on which two of the paper's training labelers agree."""

TIE_WIDTH = 0.04
"""Responses whose utilities lie within this of the best of a group share its rank."""

MIN_RESPONSES, MAX_RESPONSES = 4, 9

ResponseSet = tuple[str, Sequence[str]]
"""A prompt and K responses to it."""


@dataclass(frozen=True)
class Labeler:
    """One contractor.

    Attributes:
        id: the name in the data.
        seed: two labelers of the same id and seed judge alike.
        noise: standard deviation of the noise, in units of the gold score.
        tie_width: how close utilities must be to be called equal.
    """

    id: str
    seed: int
    noise: float
    tie_width: float = TIE_WIDTH

    def utilities(self, world: ToyWorld, prompt: str, responses: Sequence[str]) -> list[float]:
        """What this labeler thinks of each response. The same text gets the same."""
        return [
            assess(world, prompt, response).total + self.noise * self._deviate(prompt, response)
            for response in responses
        ]

    def rank(self, world: ToyWorld, prompt: str, responses: Sequence[str]) -> list[int]:
        """Ranks from 1 (best) in the order of the responses; equal ranks are ties, no rank is left out.

        Raises:
            ValueError: there are not 4 to 9 responses.
        """
        if not MIN_RESPONSES <= len(responses) <= MAX_RESPONSES:
            raise ValueError(
                f"Got {len(responses)} responses to rank, a labeler ranks {MIN_RESPONSES} to {MAX_RESPONSES}."
            )
        return ranks_of(self.utilities(world, prompt, responses), self.tie_width)

    def _deviate(self, prompt: str, response: str) -> float:
        """A standard normal number, fixed by labeler, prompt and response."""
        text = f"{self.seed}/{self.id}/{prompt}/{response}"
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        first, second = (int.from_bytes(digest[half : half + 8], "big") / 2**64 for half in (0, 8))
        return math.sqrt(-2.0 * math.log(1.0 - first)) * math.cos(2.0 * math.pi * second)


def make_labelers(world: ToyWorld, count: int, noise: float) -> list[Labeler]:
    """Labelers with ids of their own and the same amount of noise."""
    return [Labeler(f"labeler-{number:02d}", world.seed, noise) for number in range(count)]


def ranks_of(utilities: Sequence[float], tie_width: float) -> list[int]:
    """Ranks from 1; a new rank begins where a utility lies more than ``tie_width`` below the best of the last one."""
    order = sorted(range(len(utilities)), key=lambda index: -utilities[index])
    ranks = [0] * len(utilities)
    rank, best = 0, math.inf
    for index in order:
        if rank == 0 or best - utilities[index] > tie_width:
            rank, best = rank + 1, utilities[index]
        ranks[index] = rank
    return ranks


def measure_agreement(world: ToyWorld, labelers: Sequence[Labeler], response_sets: Sequence[ResponseSet]) -> float:
    """Of the pairs of responses that two labelers both put in a strict order, the share ordered alike.

    Pooled over all pairs of labelers and all prompts.

    Raises:
        ValueError: no pair of responses was strictly ordered by any two labelers.
    """
    return _agreement(
        [[labeler.rank(world, prompt, responses) for labeler in labelers] for prompt, responses in response_sets]
    )


def _agreement(rankings: Sequence[Sequence[Sequence[int]]]) -> float:
    alike = ordered = 0
    for rankings_of_prompt in rankings:
        ranks_LK = np.asarray(rankings_of_prompt)
        first, second = np.triu_indices(ranks_LK.shape[1], k=1)
        signs_LP = np.sign(ranks_LK[:, first] - ranks_LK[:, second])
        for one, other in combinations(signs_LP, 2):
            product = one * other
            alike += int((product > 0).sum())
            ordered += int((product != 0).sum())
    if ordered == 0:
        raise ValueError("No pair of responses is strictly ordered by two labelers: agreement is not defined.")
    return alike / ordered


def calibrate_noise(
    world: ToyWorld,
    response_sets: Sequence[ResponseSet],
    target: float = PAPER_AGREEMENT,
    seed: int = 0,
    *,
    labelers: int = 5,
    max_sets: int = 300,
    steps: int = 14,
) -> float:
    """The noise with which labelers agree as often as wanted on such responses.

    Labelers of a seed of their own rank the response sets under one and the same draw of noise, scaled up and
    down until the agreement meets the target. The labelers that are made later draw afresh.

    Args:
        world: decides the gold score.
        response_sets: prompts with the responses that are going to be ranked, or such as these.
        target: agreement wanted, above one half.
        seed: seed of the simulated labelers.
        labelers: how many to simulate.
        max_sets: use the first so many response sets.
        steps: halvings of the interval.

    Raises:
        ValueError: the target is out of reach.
    """
    simulated = [Labeler(f"calibration-{number}", seed, 1.0) for number in range(labelers)]
    sets = response_sets[:max_sets]
    gold = [np.array([assess(world, prompt, response).total for response in responses]) for prompt, responses in sets]
    seen = [[labeler.utilities(world, prompt, responses) for labeler in simulated] for prompt, responses in sets]
    deviates = [np.asarray(utilities) - gold_K for utilities, gold_K in zip(seen, gold, strict=True)]

    def agreement(noise: float) -> float:
        return _agreement(
            [
                [ranks_of(list(utilities), TIE_WIDTH) for utilities in gold_K + noise * deviates_LK]
                for gold_K, deviates_LK in zip(gold, deviates, strict=True)
            ]
        )

    low, high = 0.0, 4.0
    if not agreement(high) < target < agreement(low):
        raise ValueError(
            f"No noise gives an agreement of {target}: it runs from {agreement(high):.3f} to {agreement(low):.3f} "
            "on these responses. Use more response sets, or such as differ more."
        )
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if agreement(middle) > target else (low, middle)
    return (low + high) / 2
