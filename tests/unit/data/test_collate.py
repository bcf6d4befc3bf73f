"""Batches against slow loops over Python lists, for any lengths and any pad id."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_instruct.data.collate import (
    EncodedComparison,
    EncodedDemonstration,
    EncodedPrompt,
    collate_chunks,
    collate_comparisons,
    collate_demonstrations,
    collate_prompts,
)

TOKENS = st.lists(st.integers(0, 9), min_size=1, max_size=6)
PAD = st.integers(0, 9)  # often a real token: masks must not come from it


def padded(rows: list[list[int]], pad_id: int, *, left: bool) -> tuple[list[list[int]], list[list[bool]]]:
    width = max(len(row) for row in rows)
    ids, mask = [], []
    for row in rows:
        fill, real = [pad_id] * (width - len(row)), [True] * len(row)
        blank = [False] * len(fill)
        ids.append(fill + row if left else row + fill)
        mask.append(blank + real if left else real + blank)
    return ids, mask


@given(st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=5), PAD, st.booleans())
def test_demonstrations(rows: list[tuple[list[int], list[int]]], pad_id: int, loss_on_prompt: bool) -> None:
    samples = [EncodedDemonstration(*row) for row in rows]
    batch = collate_demonstrations(samples, pad_id, loss_on_prompt=loss_on_prompt)
    ids, mask = padded([prompt + response for prompt, response in rows], pad_id, left=False)
    assert batch.input_ids_BT.tolist() == ids
    assert batch.attention_mask_BT.tolist() == mask
    for (prompt, response), loss_mask in zip(rows, batch.loss_mask_BT.tolist(), strict=True):
        learnt = [loss_on_prompt] * len(prompt) + [True] * len(response)
        assert loss_mask == learnt + [False] * (len(loss_mask) - len(learnt))
    assert batch.input_ids_BT.dtype == torch.int64
    assert batch.loss_mask_BT.dtype == batch.attention_mask_BT.dtype == torch.bool


RANKED = st.lists(st.tuples(TOKENS, st.integers(1, 4)), min_size=2, max_size=5)


@given(st.lists(st.tuples(TOKENS, RANKED), min_size=1, max_size=4), PAD)
def test_comparisons(rows: list[tuple[list[int], list[tuple[list[int], int]]]], pad_id: int) -> None:
    samples = [EncodedComparison(p, [r for r, _ in ranked], [rank for _, rank in ranked]) for p, ranked in rows]
    batch = collate_comparisons(samples, pad_id)
    ids, mask = padded([prompt for prompt, _ in rows], pad_id, left=True)
    assert batch.prompt_ids_BP.tolist() == ids
    assert batch.prompt_mask_BP.tolist() == mask
    flat = [(r, rank, group) for group, (_, ranked) in enumerate(rows) for r, rank in ranked]
    ids, mask = padded([response for response, _, _ in flat], pad_id, left=False)
    assert batch.response_ids_NR.tolist() == ids
    assert batch.response_mask_NR.tolist() == mask
    assert batch.ranks_N.tolist() == [rank for _, rank, _ in flat]
    assert batch.group_N.tolist() == [group for _, _, group in flat]
    assert {t.dtype for t in batch} == {torch.int64, torch.bool}
    assert batch.labeler_B.tolist() == [-1] * len(rows)
    numbered = [sample._replace(labeler=3 * n) for n, sample in enumerate(samples)]
    assert collate_comparisons(numbered, pad_id).labeler_B.tolist() == [3 * n for n in range(len(rows))]


@given(st.lists(TOKENS, min_size=1, max_size=5), PAD)
def test_prompts(rows: list[list[int]], pad_id: int) -> None:
    batch = collate_prompts([EncodedPrompt(row) for row in rows], pad_id)
    ids, mask = padded(rows, pad_id, left=True)
    assert batch.prompt_ids_BP.tolist() == ids
    assert batch.prompt_mask_BP.tolist() == mask


def test_prompts_take_their_rows_along_if_all_have_one() -> None:
    samples = [EncodedPrompt([1], {"prompt": "a", "key": 3}), EncodedPrompt([2, 3], {"prompt": "b", "key": None})]
    assert collate_prompts(samples, 0).rows == [{"prompt": "a", "key": 3}, {"prompt": "b", "key": None}]
    assert collate_prompts([*samples, EncodedPrompt([4])], 0).rows == ()


def test_chunks_have_no_padding() -> None:
    chunks = np.arange(12, dtype=np.int32).reshape(3, 4)
    batch = collate_chunks([chunks[2], chunks[0]])
    assert batch.input_ids_BT.tolist() == [[8, 9, 10, 11], [0, 1, 2, 3]]
    assert batch.input_ids_BT.dtype == torch.int64
    assert batch.attention_mask_BT.all()
    assert batch.loss_mask_BT.all()


def test_nothing_is_mutated_and_masks_do_not_share_memory() -> None:
    sample = EncodedDemonstration([1, 2], [3])
    batch = collate_demonstrations([sample], 0, loss_on_prompt=True)
    batch.loss_mask_BT[0, 0] = False
    assert batch.attention_mask_BT.all()
    assert sample == EncodedDemonstration([1, 2], [3])


@pytest.mark.parametrize(("ids", "length"), [([[1], [2, 3]], 2), ([[4, 5, 6]], 3)])
def test_the_longest_response_decides_what_fits(ids: list[list[int]], length: int) -> None:
    assert EncodedComparison([1], ids, [1] * len(ids)).response_len == length
