from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lit_instruct.functional import next_token_loss, token_accuracy
from tests.helpers.numbers import assert_close, assert_vector
from tests.unit.functional.vectors import VECTORS, f64, mask

CASE = VECTORS["sft_loss_completion_mask_token_mean"]

quick = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 2**31)


def vector_rows() -> tuple[Tensor, Tensor, Tensor]:
    """Turn the target probabilities of the case into logits over two tokens, of which 0 is always the target."""
    chosen = f64(CASE["target_probs"])
    predictions = torch.stack([chosen, 1 - chosen], dim=-1).log()
    last = torch.full_like(predictions[:, :1], math.nan)  # the last column predicts nothing
    loss_mask = torch.cat([torch.ones(2, 1, dtype=torch.bool), mask(CASE["completion_mask"])], dim=1)
    return torch.cat([predictions, last], dim=1), torch.zeros(2, 5, dtype=torch.long), loss_mask


def random_rows(rows: int, columns: int, seed: int, vocabulary: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, columns, vocabulary, generator=generator, dtype=torch.float64)
    ids = torch.randint(vocabulary, (rows, columns), generator=generator)
    return logits, ids, torch.rand(rows, columns, generator=generator) < 0.6


def loss_loop(logits: Tensor, ids: Tensor, loss_mask: Tensor, reduction: str) -> float:
    rows = []
    for b in range(ids.shape[0]):
        row = []
        for t in range(1, ids.shape[1]):
            if loss_mask[b, t]:
                row.append(-float(torch.log_softmax(logits[b, t - 1], dim=-1)[ids[b, t]]))
        rows.append(row)
    if reduction == "token_mean":
        flat = [value for row in rows for value in row]
        return sum(flat) / max(len(flat), 1)
    means = [sum(row) / len(row) for row in rows if row]
    return sum(means) / max(len(means), 1)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_vector(reduction):
    logits, ids, loss_mask = vector_rows()
    assert_vector(next_token_loss(logits, ids, loss_mask, reduction=reduction), CASE["expected"][reduction])
    everything = torch.ones_like(loss_mask)
    assert_vector(next_token_loss(logits, ids, everything), CASE["expected"]["with_prompt"])


@quick
@given(seeds, st.integers(1, 4), st.integers(1, 6), st.sampled_from(["token_mean", "sequence_mean"]))
def test_against_a_loop(seed, rows, columns, reduction):
    logits, ids, loss_mask = random_rows(rows, columns, seed)
    got = next_token_loss(logits, ids, loss_mask, reduction=reduction)
    assert_close(got, loss_loop(logits, ids, loss_mask, reduction), dtype=torch.float64)


def test_token_mean_equals_torch_cross_entropy():
    logits, ids, loss_mask = random_rows(3, 6, seed=1)
    targets = torch.where(loss_mask, ids, torch.full_like(ids, -100))[:, 1:]
    need = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100)
    assert_close(next_token_loss(logits, ids, loss_mask), need, dtype=torch.float64)


def test_a_flat_selection_is_aligned_and_gives_the_same_loss():
    logits, ids, loss_mask = random_rows(3, 6, seed=2)
    picked = loss_mask[:, 1:]
    flat = (logits[:, :-1][picked], ids[:, 1:][picked], torch.ones(int(picked.sum()), dtype=torch.bool))
    assert_close(next_token_loss(*flat), next_token_loss(logits, ids, loss_mask), dtype=torch.float64)
    assert_close(token_accuracy(*flat), token_accuracy(logits, ids, loss_mask), dtype=torch.float64)


@quick
@given(seeds, st.integers(1, 3), st.sampled_from(["token_mean", "sequence_mean"]))
def test_padding_changes_nothing(seed, extra, reduction):
    logits, ids, loss_mask = random_rows(3, 5, seed)
    padded = (
        F.pad(logits, (0, 0, 0, extra), value=math.nan).requires_grad_(),
        F.pad(ids, (0, extra)),
        F.pad(loss_mask, (0, extra), value=False),
    )
    loss = next_token_loss(*padded, reduction=reduction)
    assert_close(loss, next_token_loss(logits, ids, loss_mask, reduction=reduction), dtype=torch.float64)
    loss.backward()
    assert padded[0].grad is not None
    assert padded[0].grad[:, 5:].eq(0).all()
    assert padded[0].grad[:, :-1][~padded[2][:, 1:]].eq(0).all()


@quick
@given(seeds, st.sampled_from(["token_mean", "sequence_mean"]))
def test_micro_batches_add_up(seed, reduction):
    logits, ids, loss_mask = random_rows(5, 6, seed)
    counted = loss_mask[:, 1:]
    count = counted.sum() if reduction == "token_mean" else counted.any(1).sum()
    whole, parts = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = next_token_loss(whole, ids, loss_mask, reduction=reduction)
    loss.backward()
    total = 0.0
    for rows in (slice(0, 1), slice(1, 4), slice(4, 5)):
        part = next_token_loss(parts[rows], ids[rows], loss_mask[rows], reduction=reduction, denominator=count)
        part.backward()
        total += float(part.detach())
    assert_close(total, loss, dtype=torch.float64)
    assert whole.grad is not None
    assert_close(parts.grad, whole.grad, dtype=torch.float64)


def test_token_accuracy_by_hand():
    ids = torch.tensor([[0, 1, 2, 1]])
    logits = F.one_hot(torch.tensor([[1, 0, 1, 2]]), 3).float()  # right at columns 1 and 3, wrong at column 2
    assert_close(token_accuracy(logits, ids, mask([[1, 1, 1, 1]])), 2 / 3)
    assert_close(token_accuracy(logits, ids, mask([[1, 0, 0, 1]])), 1.0)
    assert_close(token_accuracy(logits, ids, mask([[1, 1, 1, 1]]), denominator=8), 0.25)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_nothing_to_learn_is_zero_with_zero_gradients(reduction):
    logits = torch.zeros(2, 3, 4, requires_grad=True)
    ids, nothing = torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3, dtype=torch.bool)
    loss = next_token_loss(logits, ids, nothing, reduction=reduction)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert logits.grad is not None
    assert logits.grad.eq(0).all()
    assert float(token_accuracy(logits, ids, nothing)) == 0.0


def test_bf16_logits_give_an_fp32_loss():
    logits, ids, loss_mask = random_rows(2, 5, seed=3)
    loss = next_token_loss(logits.bfloat16(), ids, loss_mask)
    assert loss.dtype == torch.float32
    assert_close(loss, next_token_loss(logits.bfloat16().double(), ids, loss_mask))


def test_refuses_what_cannot_be_meant():
    logits, ids, loss_mask = random_rows(2, 5, seed=4)
    with pytest.raises(ValueError, match="reduction: got 'mean'"):
        next_token_loss(logits, ids, loss_mask, reduction="mean")
    with pytest.raises(ValueError, match="'sequence_mean' for flat logits"):
        next_token_loss(logits[0], ids[0], loss_mask[0], reduction="sequence_mean")
    with pytest.raises(ValueError, match=r"loss_mask: got dtype torch\.int64"):
        next_token_loss(logits, ids, loss_mask.long())
    with pytest.raises(ValueError, match="logits, ids, loss_mask: got shapes"):
        next_token_loss(logits[:, :-1], ids[:, 1:], loss_mask)
    with pytest.raises(ValueError, match="logits, ids, loss_mask: got shapes"):
        token_accuracy(logits[None], ids[None], loss_mask[None])
