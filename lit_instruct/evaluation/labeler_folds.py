"""Rankings dealt into folds for a cross-validation over labelers."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

from lit_instruct.data.bad_rows import data_error
from lit_instruct.data.records import ComparisonRecord
from lit_instruct.types import Prompt


class Fold(NamedTuple):
    """Who is left out, and the rankings to train and to measure on. No prompt of ``train`` is in the other two.

    Attributes:
        labelers: the group that is left out.
        train: rankings by all others.
        own: rankings by all others, of prompts that were kept for this.
        heldout: rankings by the group.
        left_out: how many more the group has, of prompts that are in ``train`` by the hand of others.
    """

    labelers: list[str]
    train: list[ComparisonRecord]
    own: list[ComparisonRecord]
    heldout: list[ComparisonRecord]
    left_out: int


def labeler_groups(volumes: Mapping[str, int], folds: int) -> list[list[str]]:
    """Split labelers into groups of similar volume: the largest first, each into the group that has the least so far.

    Args:
        volumes: labeler -> amount of data.
        folds: how many groups.

    Returns:
        The groups; the same for the same volumes.
    """
    groups: list[list[str]] = [[] for _ in range(folds)]
    filled = [0] * folds
    for name in sorted(volumes, key=lambda name: (-volumes[name], name)):
        smallest = min(range(folds), key=lambda number: (filled[number], len(groups[number])))
        groups[smallest].append(name)
        filled[smallest] += volumes[name]
    return groups


def make_folds(records: Sequence[ComparisonRecord], *, folds: int, own_share: float, seed: int) -> list[Fold]:
    """Deal rankings into folds; those without a labeler are left out.

    Args:
        records: rankings.
        folds: groups of labelers, of similar numbers of pairs.
        own_share: share of all prompts that is kept from training, to measure a model on its own labelers with;
            another part of the prompts in each fold.
        seed: decides which prompts.

    Returns:
        One fold a group.

    Raises:
        DataError: nobody is known as a labeler, there are fewer labelers than folds, there is one prompt alone, or a
            part of a fold has no pair.
    """
    known = [(record, _key(record.prompt)) for record in records if record.labeler is not None]
    pairs: Counter[str] = Counter()
    for record, _ in known:
        pairs[str(record.labeler)] += _pairs(record)
    if not known:
        advice = 'give each row a column "labeler": a name or a number.'
        raise data_error(f"got {len(records)} rankings without a labeler; need to know who ranked.", [], advice)
    if len(pairs) < folds:
        raise data_error(f"got {len(pairs)} labelers; need at least {folds}, one a fold.", [], "lower --folds.")
    prompts = sorted({key for _, key in known})
    if len(prompts) == 1:
        advice = "give rankings of more prompts."
        needs = "need several, for a model is measured on prompts that it was not trained on."
        raise data_error(f"got {len(known)} rankings of one prompt; {needs}", [], advice)
    random.Random(seed).shuffle(prompts)
    size = max(1, round(own_share * len(prompts)))
    made = []
    for number, group in enumerate(labeler_groups(pairs, folds)):
        kept = {prompts[index % len(prompts)] for index in range(number * size, (number + 1) * size)}
        others = [(record, key) for record, key in known if record.labeler not in group]
        theirs = [(record, key) for record, key in known if record.labeler in group]
        trained = {key for _, key in others} - kept
        fold = Fold(
            labelers=group,
            train=[record for record, key in others if key not in kept],
            own=[record for record, key in others if key in kept],
            heldout=[record for record, key in theirs if key not in trained],
            left_out=sum(key in trained for _, key in theirs),
        )
        _check(fold, number + 1)
        made.append(fold)
    return made


def _pairs(record: ComparisonRecord) -> int:
    return sum(one != other for one, other in combinations(record.ranks, 2))


def _key(prompt: Prompt) -> str:
    """Prompts that differ in white space alone, or as text and as a single message, are one."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return json.dumps([[turn["role"], " ".join(turn["content"].split())] for turn in turns])


def _check(fold: Fold, number: int) -> None:
    """Every part needs a pair: without one there is nothing to learn, or no accuracy."""
    parts = (
        (
            "the held-out group",
            fold.heldout,
            "lower --folds, raise --own_share, or give more rankings by these labelers.",
        ),
        ("the others, on prompts kept for measuring", fold.own, "raise --own_share, or give more rankings."),
        ("training", fold.train, "lower --own_share, or give more rankings."),
    )
    for what, records, advice in parts:
        if not any(map(_pairs, records)):
            shared = f" ({fold.left_out} rankings by them are of prompts that others train on)" if fold.left_out else ""
            raise data_error(
                f"fold {number}, held-out labelers {', '.join(fold.labelers)}{shared}: got {len(records)} rankings for "
                f"{what} and no pair among them; need at least one pair.",
                [],
                advice,
            )
