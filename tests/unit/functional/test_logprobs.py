from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_instruct.functional import gather_logprobs, surprise_moments
from tests.helpers.numbers import assert_close, assert_vector
from tests.unit.functional.vectors import VECTORS, f64

CASE = VECTORS["logprob_gather_off_by_one"]


def test_gather_and_entropy_vector():
    logits, ids, start = f64(CASE["logits"]), torch.tensor(CASE["tokens"]), CASE["prompt_length"]
    predicting, response = logits[start - 1 : -1], ids[start:]
    need = CASE["expected"]
    assert_vector(gather_logprobs(predicting, response), need["response_logprobs"])
    assert_vector(gather_logprobs(predicting, response, temperature=0.7), need["response_logprobs_temperature_0p7"])
    assert_vector(surprise_moments(predicting).entropy, need["entropy"])


def test_gather_does_not_shift_by_itself():
    logits, ids, start = f64(CASE["logits"]), torch.tensor(CASE["tokens"]), CASE["prompt_length"]
    assert_vector(gather_logprobs(logits[start:], ids[start:]), CASE["expected"]["wrong_unshifted"])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(0, 4), st.integers(1, 9), st.floats(0.2, 3.0))
def test_against_log_softmax(seed, rows, columns, vocabulary, temperature):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, columns, vocabulary, generator=generator, dtype=torch.float64) * 5
    ids = torch.randint(vocabulary, (rows, columns), generator=generator)
    table = torch.log_softmax(logits / temperature, dim=-1)
    need = torch.stack([table[b, t, ids[b, t]] for b in range(rows) for t in range(columns)] or [table.new_zeros(())])
    got = gather_logprobs(logits, ids, temperature=temperature)
    assert got.shape == (rows, columns)
    if columns:
        assert_close(got.flatten(), need, dtype=torch.float64)
    need_entropy = -(table.exp() * table).sum(-1)
    assert_close(surprise_moments(logits, temperature=temperature).entropy, need_entropy, dtype=torch.float64)


def test_bf16_logits_are_widened_before_the_softmax():
    logits = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    got = gather_logprobs(logits, ids)
    assert got.dtype == surprise_moments(logits).entropy.dtype == torch.float32
    assert_close(got, gather_logprobs(logits.double(), ids))  # only the input is rounded, not the arithmetic


def test_gradients():
    logits = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    ids = torch.tensor([1, 4])
    assert torch.autograd.gradcheck(lambda x: gather_logprobs(x, ids, temperature=0.7), (logits,))


def test_entropy_with_impossible_tokens():
    logits = torch.tensor([[0.0, 0.0, -math.inf], [0.0, -math.inf, -math.inf]], requires_grad=True)
    assert_close(surprise_moments(logits).entropy, [math.log(2.0), 0.0])
    gather_logprobs(logits, torch.tensor([1, 0])).sum().backward()
    assert_close(logits.grad, [[-0.5, 0.5, 0.0], [0.0, 0.0, 0.0]])


def test_refuses_what_cannot_be_meant():
    with pytest.raises(ValueError, match=r"got shape \[2, 4\], need \[2, 3\]"):
        gather_logprobs(torch.zeros(2, 3, 5), torch.zeros(2, 4, dtype=torch.long))
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="temperature: got"):
            gather_logprobs(torch.zeros(2, 5), torch.zeros(2, dtype=torch.long), temperature=temperature)
        with pytest.raises(ValueError, match="temperature: got"):
            surprise_moments(torch.zeros(2, 5), temperature=temperature)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_surprise_against_draws_of_every_token(temperature: float) -> None:
    """Mean and variance of -log p by their definition, token by token; a token that cannot occur adds nothing."""
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits[1, 2] = -torch.inf
    got = surprise_moments(logits, temperature=temperature)
    for row in range(3):
        weights = [math.exp(float(x) / temperature) for x in logits[row]]
        p = [weight / sum(weights) for weight in weights]
        mean = sum(-x * math.log(x) for x in p if x)
        assert_close(got.entropy[row], mean, dtype=torch.float64)
        variance = sum(x * (-math.log(x) - mean) ** 2 for x in p if x)
        assert_close(got.variance[row], variance, dtype=torch.float64)


def test_certainty_does_not_vary() -> None:
    certain = surprise_moments(torch.tensor([[0.0, -torch.inf, -torch.inf], [2.0, 2.0, 2.0]]))
    assert_close(certain.variance, [0.0, 0.0])
    assert_close(certain.entropy, [0.0, math.log(3)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [7, 70_000])
def test_blocks_join_up(dtype: torch.dtype, vocabulary: int) -> None:
    """More rows than a block holds, a row wider than a block: value and gradient as torch has them."""
    generator = torch.Generator().manual_seed(0)
    rows = 3 if vocabulary > 7 else 20_000
    logits = (torch.randn(rows, vocabulary, generator=generator) * 4).to(dtype).requires_grad_()
    ids = torch.randint(vocabulary, (rows,), generator=generator)
    weights = torch.randn(rows, generator=generator)
    got = gather_logprobs(logits, ids, temperature=0.8)
    (got * weights).sum().backward()
    wide = logits.detach().double().requires_grad_()
    need = torch.log_softmax(wide / 0.8, dim=-1).gather(1, ids[:, None]).squeeze(1)
    (need * weights).sum().backward()
    assert_close(got, need)
    assert logits.grad is not None
    assert wide.grad is not None
    assert logits.grad.dtype == dtype
    assert_close(logits.grad, wide.grad, dtype=dtype)
