"""Groups of rows against a search over all ways to group them, and parts of batches against the batch."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import pytest
import torch

from lit_instruct.data.collate import (
    EncodedComparison,
    EncodedDemonstration,
    collate_comparisons,
    collate_demonstrations,
)
from lit_instruct.models.batching import comparison_groups, split_comparisons, split_demonstrations, token_groups

Rows = Sequence[tuple[int, Sequence[int]]]
"""Of each prompt its tokens and those of its responses."""


def partitions(places: list[int]) -> Iterator[list[list[int]]]:
    """All ways to put them into groups."""
    if not places:
        yield []
        return
    first, *rest = places
    for groups in partitions(rest):
        yield [[first], *groups]
        for number, group in enumerate(groups):
            yield [*groups[:number], [first, *group], *groups[number + 1 :]]


def cost(group: list[int], lengths: Sequence[int], *, padded: bool) -> int:
    found = [lengths[place] for place in group]
    return len(found) * max(found) if padded else sum(found)


def random_lengths(seed: int, count: int) -> list[int]:
    stream = random.Random(seed)
    return [stream.randint(1, 12) for _ in range(count)]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_groups_of_tokens(seed: int, padded: bool) -> None:
    lengths = random_lengths(seed, 7)
    for budget in (1, 9, 12, 20, 31, 200):
        groups = token_groups(lengths, budget, padded=padded)
        assert sorted(place for group in groups for place in group) == list(range(7))
        assert all(group == sorted(group) for group in groups)
        assert all(cost(group, lengths, padded=padded) <= budget or len(group) == 1 for group in groups)
        assert groups == token_groups(tuple(lengths), budget, padded=padded)
        allowed = [
            found
            for found in partitions(list(range(7)))
            if all(cost(group, lengths, padded=padded) <= budget or len(group) == 1 for group in found)
        ]
        fewest = min(map(len, allowed))
        if padded:
            # No other way has fewer groups, and no cut of the sorted rows into as many has a smaller largest one.
            assert len(groups) == fewest
            order = sorted(range(7), key=lambda place: -lengths[place])
            cuts = [
                found
                for found in allowed
                if len(found) == fewest
                and all(max(map(order.index, group)) - min(map(order.index, group)) < len(group) for group in found)
            ]
            best = min(max(cost(group, lengths, padded=True) for group in found) for found in cuts)
            assert max(cost(group, lengths, padded=True) for group in groups) == best
        else:
            assert fewest <= len(groups) <= fewest + 1


@pytest.mark.parametrize("seed", range(4))
def test_packed_groups_are_of_about_equal_size(seed: int) -> None:
    """The longest first to the group with least: no two differ by more than one row."""
    lengths = random_lengths(seed, 60)
    for budget in (40, 75, 150):
        sums = [sum(lengths[place] for place in group) for group in token_groups(lengths, budget, padded=False)]
        assert max(sums) - min(sums) <= max(lengths)
        assert len(sums) <= sum(lengths) / budget + 2


def test_without_a_budget_all_go_together() -> None:
    assert token_groups([3, 1, 2], None, padded=True) == token_groups([3, 1, 2], None, padded=False) == [[0, 1, 2]]
    assert comparison_groups([3, 1], [[1, 2], [4]], None, padded=True) == [[0, 1]]
    assert token_groups([], 5, padded=True) == token_groups([], 5, padded=False) == []


def test_a_row_above_the_budget_is_a_group_of_its_own() -> None:
    assert token_groups([2, 9, 2, 2], 6, padded=False) == [[1], [0, 2, 3]]
    assert token_groups([2, 9, 2, 2], 6, padded=True) == [[1], [0, 2, 3]]
    assert token_groups([1, 0, 7], 1, padded=False) == [[2], [0], [1]]


def padded_cost(group: list[int], rows: Rows) -> int:
    found = [rows[place] for place in group]
    longest = max(own for own, _ in found) + max(max(responses) for _, responses in found)
    return sum(len(responses) for _, responses in found) * longest


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("budget", [1, 200, 300, 5000])
def test_groups_of_comparisons(seed: int, budget: int) -> None:
    stream = random.Random(seed)
    rows = [(stream.randint(1, 20), [stream.randint(1, 20) for _ in range(stream.randint(2, 5))]) for _ in range(9)]
    prompts, responses = [own for own, _ in rows], [of_it for _, of_it in rows]
    packed = comparison_groups(prompts, responses, budget, padded=False)
    assert packed == token_groups([own + sum(of_it) for own, of_it in rows], budget, padded=False)
    padded = comparison_groups(prompts, responses, budget, padded=True)
    assert sorted(place for group in padded for place in group) == list(range(9))
    assert all(padded_cost(group, rows) <= budget or len(group) == 1 for group in padded)
    assert len(padded) == {1: 9, 5000: 1}.get(budget, len(padded))
    assert (1 < len(padded) < 9) == (budget in (200, 300))


DEMONSTRATIONS = [
    EncodedDemonstration([4, 5], [6, 0]),
    EncodedDemonstration([7], [0]),
    EncodedDemonstration([8, 9, 10], [11, 12, 0]),
    EncodedDemonstration([13], [14, 15, 0]),
]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("budget", [None, 1, 8, 1000])
def test_parts_of_demonstrations(budget: int | None, padded: bool) -> None:
    """Each part is what the collator makes of some of the rows."""
    batch = collate_demonstrations(DEMONSTRATIONS, pad_id=1)
    parts = split_demonstrations(batch, budget, padded=padded)
    lengths = [len(sample.prompt_ids) + len(sample.response_ids) for sample in DEMONSTRATIONS]
    groups = token_groups(lengths, budget, padded=padded)
    assert len(parts) == len(groups) == {None: 1, 1: 4, 8: 3 if padded else 2, 1000: 1}[budget]
    for part, group in zip(parts, groups, strict=True):
        expected = collate_demonstrations([DEMONSTRATIONS[place] for place in group], pad_id=1)
        for got, wanted in zip(part, expected, strict=True):
            assert torch.equal(got, wanted)


COMPARISONS = [
    EncodedComparison([4, 5], [[6, 0], [0]], [1, 2], labeler=3),
    EncodedComparison([7], [[8, 0], [9, 10, 0], [0]], [2, 1, 2], labeler=5),
    EncodedComparison([11, 12, 13], [[14, 0], [15, 0]], [1, 1]),
]


@pytest.mark.parametrize("budget", [None, 1, 12, 1000])
def test_parts_of_comparisons(budget: int | None) -> None:
    """Each part has the rows that the collator would have put there; only the padding may be wider."""
    batch = collate_comparisons(COMPARISONS, pad_id=1)
    parts = split_comparisons(batch, budget, padded=False)
    lengths = [len(sample.prompt_ids) + sum(map(len, sample.responses_ids)) for sample in COMPARISONS]
    groups = token_groups(lengths, budget, padded=False)
    assert len(parts) == len(groups) == {None: 1, 1: 3, 12: 2, 1000: 1}[budget]
    for part, group in zip(parts, groups, strict=True):
        expected = collate_comparisons([COMPARISONS[place] for place in group], pad_id=1)
        assert torch.equal(part.prompt_ids_BP[part.prompt_mask_BP], expected.prompt_ids_BP[expected.prompt_mask_BP])
        assert torch.equal(
            part.response_ids_NR[part.response_mask_NR], expected.response_ids_NR[expected.response_mask_NR]
        )
        assert torch.equal(part.response_mask_NR.sum(dim=1), expected.response_mask_NR.sum(dim=1))
        for name in ("ranks_N", "group_N", "labeler_B"):
            assert torch.equal(getattr(part, name), getattr(expected, name))


def test_parts_of_comparisons_by_unknown_labelers() -> None:
    batch = collate_comparisons(COMPARISONS, pad_id=1)._replace(labeler_B=None)
    assert [part.labeler_B for part in split_comparisons(batch, 1, padded=True)] == [None, None, None]
