"""Cut a batch into parts that fit one forward and backward pass each, by the tokens that the pass computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lit_instruct.types import ComparisonBatch, DemonstrationBatch


class _Element(NamedTuple):
    """What stays together: so many rows, none wider than a prompt and a response of these lengths."""

    place: int
    rows: int
    prompt: int
    response: int


def token_groups(lengths: Sequence[int], budget: int | None, *, padded: bool) -> list[list[int]]:
    """Cut rows into groups of at most ``budget`` tokens: as few groups as are found, of about equal size.

    Args:
        lengths: tokens of each row.
        budget: most tokens of a group; a row that has more is a group of its own. None: all rows in one group.
        padded: a group costs its rows times its longest one (rows are sorted by length); else the sum of its rows,
            as when they are packed (they are spread evenly).

    Returns:
        Indices, each once and ascending within its group. The same for the same lengths.
    """
    if not padded:
        return _balanced(lengths, budget)
    return _padded([_Element(index, 1, length, 0) for index, length in enumerate(lengths)], budget)


def comparison_groups(
    prompts: Sequence[int], responses: Sequence[Sequence[int]], budget: int | None, *, padded: bool
) -> list[list[int]]:
    """As :func:`token_groups`, for prompts that stay together with all their responses.

    Args:
        prompts: tokens of each prompt.
        responses: of each prompt, the tokens of its responses (at least one).
        budget: most tokens of a group; a prompt that needs more with its responses is a group of its own. None: one
            group.
        padded: a group costs its responses, each a row, times the longest prompt and the longest response together;
            else each prompt costs its tokens once and those of its responses.

    Returns:
        Indices of prompts, each once and ascending within its group.
    """
    if not padded:
        return _balanced([own + sum(of_it) for own, of_it in zip(prompts, responses, strict=True)], budget)
    pairs = enumerate(zip(prompts, responses, strict=True))
    return _padded([_Element(index, len(of_it), own, max(of_it)) for index, (own, of_it) in pairs], budget)


def split_demonstrations(batch: DemonstrationBatch, budget: int | None, *, padded: bool) -> list[DemonstrationBatch]:
    """Cut a batch into parts of at most ``budget`` tokens, each no wider than its longest row.

    Args:
        batch: B sequences.
        budget: see :func:`token_groups`. None: the batch itself.
        padded: see :func:`token_groups`.

    Returns:
        The parts; together all rows of the batch.
    """
    if budget is None:
        return [batch]
    lengths = batch.attention_mask_BT.sum(dim=1).tolist()
    groups = token_groups(lengths, budget, padded=padded)
    if len(groups) == 1:
        return [batch]
    parts = []
    for group in groups:
        rows = torch.tensor(group, device=batch.input_ids_BT.device)
        width = max(lengths[row] for row in group)
        parts.append(DemonstrationBatch(*(tensor_BT[rows, :width] for tensor_BT in batch)))
    return parts


def split_comparisons(batch: ComparisonBatch, budget: int | None, *, padded: bool) -> list[ComparisonBatch]:
    """Cut a batch into parts of at most ``budget`` tokens; a prompt stays together with its responses.

    Args:
        batch: B prompts with N responses.
        budget: see :func:`comparison_groups`. None: the batch itself.
        padded: see :func:`comparison_groups`.

    Returns:
        The parts; together all prompts and responses of the batch.
    """
    if budget is None:
        return [batch]
    group_N: list[int] = batch.group_N.tolist()
    of_prompt: list[list[int]] = [[] for _ in range(len(batch.prompt_ids_BP))]
    for row, length in enumerate(batch.response_mask_NR.sum(dim=1).tolist()):
        of_prompt[group_N[row]].append(length)
    groups = comparison_groups(batch.prompt_mask_BP.sum(dim=1).tolist(), of_prompt, budget, padded=padded)
    return [batch] if len(groups) == 1 else [_prompts_of(batch, group, group_N) for group in groups]


def _prompts_of(batch: ComparisonBatch, group: list[int], group_N: list[int]) -> ComparisonBatch:
    """Some prompts of a batch, with their responses; the prompts are numbered anew."""
    number = {prompt: new for new, prompt in enumerate(group)}
    members = [row for row, prompt in enumerate(group_N) if prompt in number]
    device = batch.group_N.device
    prompts_b, rows_n = torch.tensor(group, device=device), torch.tensor(members, device=device)
    return ComparisonBatch(
        prompt_ids_BP=batch.prompt_ids_BP[prompts_b],
        prompt_mask_BP=batch.prompt_mask_BP[prompts_b],
        response_ids_NR=batch.response_ids_NR[rows_n],
        response_mask_NR=batch.response_mask_NR[rows_n],
        ranks_N=batch.ranks_N[rows_n],
        group_N=torch.tensor([number[group_N[row]] for row in members], device=device),
        labeler_B=_rows(batch.labeler_B, prompts_b),
    )


def _rows(tensor: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if tensor is None else tensor[rows]


def _balanced(costs: Sequence[int], budget: int | None) -> list[list[int]]:
    """Groups whose sums stay within the budget: the longest first, each to the group that has least."""
    if budget is None:
        return [list(range(len(costs)))] if costs else []
    order = sorted(range(len(costs)), key=lambda index: (-costs[index], index))
    alone = [[index] for index in order if costs[index] >= budget]
    rest = order[len(alone) :]
    if not rest:
        return alone
    count = -(-sum(costs[index] for index in rest) // budget)
    while True:  # ends: as many groups as rows always fit
        groups: list[list[int]] = [[] for _ in range(max(count, 1))]
        sums = [0] * len(groups)
        for index in rest:
            least = sums.index(min(sums))
            groups[least].append(index)
            sums[least] += costs[index]
        if max(sums) <= budget:
            return alone + [sorted(group) for group in groups]
        count += 1


def _padded(elements: list[_Element], budget: int | None) -> list[list[int]]:
    """Groups of neighbours in length: the fewest that the budget allows, and then the smallest such ones."""
    order = sorted(elements, key=lambda element: (-(element.prompt + element.response), element.place))
    if budget is None:
        return [list(range(len(elements)))] if elements else []
    fewest = len(_filled(order, budget))
    # The same number of groups under a lower limit has no group that is much smaller than the others.
    limit = _lowest(1, budget, lambda lower: len(_filled(order, lower)) == fewest)
    return [sorted(element.place for element in group) for group in _filled(order, limit)]


def _filled(order: Iterable[_Element], limit: int) -> list[list[_Element]]:
    """Fill one group after the other up to the limit; a group always takes in one element."""
    groups: list[list[_Element]] = []
    rows, prompt, response = 0, 0, 0
    for element in order:
        joined = rows + element.rows, max(prompt, element.prompt), max(response, element.response)
        if not groups or joined[0] * (joined[1] + joined[2]) > limit:
            groups.append([])
            joined = element.rows, element.prompt, element.response
        groups[-1].append(element)
        rows, prompt, response = joined
    return groups


def _lowest(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """The lowest number from ``low`` to ``high`` for which it holds, as it does from there to ``high``."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low
