from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lit_instruct.functional import lengths_to_mask, masked_mean, masked_moments, merge_moments, whiten
from tests.helpers.numbers import assert_close, assert_vector
from tests.unit.functional.vectors import VECTORS, f64, mask

WHITENING = VECTORS["masked_whitening_shift_mean_true"]
SCALING = VECTORS["masked_whitening_shift_mean_false_for_rewards"]

quick = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 2**31)
lengths = st.lists(st.integers(0, 6), min_size=1, max_size=5)


def random_rows(row_lengths: list[int], width: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(len(row_lengths), width, generator=generator, dtype=torch.float64) * 3 + 1
    return values, lengths_to_mask(torch.tensor(row_lengths), width)


def entries(values: Tensor, mask: Tensor) -> list[float]:
    return [
        float(value)
        for row, keeps in zip(values, mask, strict=True)
        for value, kept in zip(row, keeps, strict=True)
        if kept
    ]


def whiten_loop(values: Tensor, mask: Tensor, *, center: bool, eps: float) -> list[list[float]]:
    kept = entries(values, mask)
    mean = sum(kept) / max(len(kept), 1)
    sigma = math.sqrt(sum((value - mean) ** 2 for value in kept) / max(len(kept), 1) + eps)
    return [
        [((float(v) - mean) / sigma + (0.0 if center else mean)) if m else 0.0 for v, m in zip(row, keeps, strict=True)]
        for row, keeps in zip(values, mask, strict=True)
    ]


def test_lengths_to_mask_draws_its_picture():
    got = lengths_to_mask(torch.tensor([2, 4, 0]), 4)
    assert got.dtype == torch.bool
    assert got.tolist() == [[True, True, False, False], [True] * 4, [False] * 4]


def test_masked_mean_by_hand():
    values, keeps = f64([[1.0, 2.0, math.nan], [6.0, math.inf, -math.inf]]), mask([[1, 1, 0], [1, 0, 0]])
    assert_vector(masked_mean(values, keeps), 3.0)
    assert_vector(masked_mean(values, keeps, denominator=18), 0.5)
    assert_vector(masked_mean(values, keeps, denominator=torch.tensor(0.5)), 18.0)  # a global count over many ranks


def test_masked_mean_of_nothing_is_zero_with_zero_gradient():
    values = torch.full((2, 3), math.nan, requires_grad=True)
    loss = masked_mean(values, torch.zeros(2, 3, dtype=torch.bool))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert values.grad is not None
    assert values.grad.eq(0).all()
    assert float(masked_mean(values.detach(), torch.zeros(2, 3, dtype=torch.bool), denominator=0)) == 0.0


@pytest.mark.parametrize("function", [masked_mean, masked_moments, whiten])
def test_masks_must_be_bool_and_of_the_same_shape(function):
    with pytest.raises(ValueError, match=r"got dtype torch\.float32, need torch\.bool"):
        function(torch.zeros(2, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"got shape \[2, 1\], need the mask's \[2, 3\]"):
        function(torch.zeros(2, 1), torch.ones(2, 3, dtype=torch.bool))


def test_moments_vector():
    moments = masked_moments(f64(WHITENING["x"]), mask(WHITENING["mask"]))
    assert_vector(moments.count, 9)
    assert_vector(moments.mean, WHITENING["expected"]["mean"])
    assert_vector(moments.m2 / moments.count, WHITENING["expected"]["var_population"])


def test_moments_of_a_large_offset_keep_their_digits():
    values = torch.tensor([[10000.0, 10001.0, 10002.0, 1e30]])  # E[x^2] - E[x]^2 would be off by units in fp32
    moments = masked_moments(values, mask([[1, 1, 1, 0]]))
    assert_close(moments.m2, 2.0)


def test_moments_of_nothing_are_zero():
    moments = masked_moments(torch.full((2, 2), math.nan), torch.zeros(2, 2, dtype=torch.bool))
    assert [float(part) for part in moments] == [0.0, 0.0, 0.0]
    merged = merge_moments(moments, moments)
    assert [float(part) for part in merged] == [0.0, 0.0, 0.0]


@quick
@given(lengths, lengths, seeds)
def test_merged_moments_are_those_of_the_concatenation(left, right, seed):
    a_values, a_mask = random_rows(left, 6, seed)
    b_values, b_mask = random_rows(right, 6, seed + 1)
    a_values = a_values + 5  # two ranks with different means
    merged = merge_moments(masked_moments(a_values, a_mask), masked_moments(b_values, b_mask))
    whole = masked_moments(torch.cat([a_values, b_values]), torch.cat([a_mask, b_mask]))
    for got, need in zip(merged, whole, strict=True):
        assert_close(got, need, dtype=torch.float64)


def test_whitening_vector_and_its_two_mistakes():
    case = WHITENING
    whitened = whiten(f64(case["x"]), mask(case["mask"]), eps=case["eps"])
    assert_vector(whitened, case["expected"]["whitened"])
    for mistake in ("whitened_unbiased", "wrong_mask_ignored"):
        with pytest.raises(AssertionError):
            assert_vector(whitened, case["expected"][mistake])


def test_whitening_without_centering_vector_is_not_a_division_by_sigma():
    case = SCALING
    values, keeps = f64(case["x"]), mask(case["mask"])
    scaled = whiten(values, keeps, center=False, eps=case["eps"])
    assert_vector(scaled, case["expected"]["whitened"])
    assert_vector(masked_mean(scaled, keeps), case["expected"]["mean"])
    sigma = math.sqrt(case["expected"]["var_population"])
    with pytest.raises(AssertionError):
        assert_vector(scaled, values * keeps / sigma)


@quick
@given(lengths, seeds, st.booleans(), st.sampled_from([1e-8, 0.5]))
def test_whiten_against_a_loop_whatever_stands_at_padding(row_lengths, seed, center, eps):
    values, keeps = random_rows(row_lengths, 6, seed)
    need = whiten_loop(values, keeps, center=center, eps=eps)
    garbage = torch.where(keeps, values, torch.full_like(values, math.nan))
    assert_close(whiten(garbage, keeps, center=center, eps=eps), need, dtype=torch.float64)


@quick
@given(lengths, lengths, seeds)
def test_two_ranks_with_merged_moments_whiten_like_one(left, right, seed):
    a_values, a_mask = random_rows(left, 6, seed)
    b_values, b_mask = random_rows(right, 6, seed + 1)
    moments = merge_moments(masked_moments(a_values, a_mask), masked_moments(b_values, b_mask))
    parts = [whiten(a_values, a_mask, moments=moments), whiten(b_values, b_mask, moments=moments)]
    whole = whiten(torch.cat([a_values, b_values]), torch.cat([a_mask, b_mask]))
    # Entries that are equal have a variance of rounding errors only, which eps then does not hide completely.
    assert_close(torch.cat(parts), whole, dtype=torch.float64, scale=10)


def test_whiten_widens_bf16_and_leaves_its_input_alone():
    values = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.bfloat16)
    before = values.clone()
    assert whiten(values, mask([[1, 1, 1]])).dtype == torch.float32
    assert values.equal(before)
