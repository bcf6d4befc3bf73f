from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lit_instruct.functional import (
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
    generalized_advantages,
    kl_estimates,
    lengths_to_mask,
    masked_mean,
    missing_eos_scores,
    token_rewards,
)
from tests.helpers.numbers import assert_close, assert_vector
from tests.unit.functional.vectors import VECTORS, f64, mask

REWARDS = VECTORS["token_rewards_with_kl_and_terminal_score"]
MISSING = VECTORS["missing_eos_score_rules"]
GAE = VECTORS["gae_masked_unequal_lengths_lambda_0p95"]
GAE_1 = VECTORS["gae_lambda_1_equals_reward_to_go_minus_value"]
POLICY = VECTORS["ppo_policy_loss_clipped_masked"]
SIGNS = VECTORS["ppo_clip_sign_table"]
VALUE = VECTORS["ppo_value_loss_clipped_masked"]

quick = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 2**31)
lengths = st.lists(st.integers(0, 6), min_size=1, max_size=5)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spoil(values: Tensor, keeps: Tensor, extra: int, garbage: float) -> Tensor:
    """Overwrite the padding with garbage and append more padded columns of it."""
    return F.pad(torch.where(keeps, values, torch.full_like(values, garbage)), (0, extra), value=garbage)


# Scores and rewards


def test_missing_eos_vector():
    scores, finished = f64(MISSING["scores"]), mask(MISSING["contains_eos"])
    for rule, key in (("none", "paper"), ("replace", "replace"), ("subtract", "subtract")):
        assert_vector(missing_eos_scores(scores, finished, rule=rule), MISSING["expected"][key])
    assert_vector(missing_eos_scores(scores, finished, rule="subtract", value=1.0), MISSING["expected"]["subtract"])
    assert_vector(missing_eos_scores(scores, finished, rule="replace", value=-3.0), [1.5, -3.0, -3.0])
    assert_vector(scores, MISSING["scores"])  # not mutated


def test_missing_eos_rules_for_scores_that_are_worse_than_the_value():
    scores, finished = f64([-5.0, -5.0]), mask([1, 0])
    assert_vector(missing_eos_scores(scores, finished, rule="replace"), [-5.0, -1.0])  # also upwards
    assert_vector(missing_eos_scores(scores, finished, rule="subtract"), [-5.0, -6.0])


def test_missing_eos_refuses_an_unknown_rule():
    with pytest.raises(ValueError, match="rule: got 'paper', need 'none', 'replace' or 'subtract'"):
        missing_eos_scores(torch.zeros(1), mask([1]), rule="paper")
    with pytest.raises(ValueError, match=r"scores: got shape \[2\]"):
        missing_eos_scores(torch.zeros(2), mask([1]), rule="none")


def test_token_rewards_vector():
    logprobs, reference, keeps = f64(REWARDS["logprobs"]), f64(REWARDS["ref_logprobs"]), mask(REWARDS["mask"])
    scores, kl_coef, need = f64(REWARDS["scores"]), REWARDS["beta"], REWARDS["expected"]
    rewards = token_rewards(scores, logprobs, reference, keeps, kl_coef=kl_coef)
    assert_vector(rewards, need["rewards"])
    assert_vector(rewards.sum(1), need["rlhf_reward"])
    assert_vector(rewards.sum(1).mean(), need["mean_rlhf_reward"])
    without_score = token_rewards(torch.zeros(2).double(), logprobs, reference, keeps, kl_coef=kl_coef)
    assert_vector(without_score, need["non_score_reward"])
    assert_vector(token_rewards(scores, logprobs, reference, keeps, kl_coef=0.0).sum(1), scores)
    k1 = kl_estimates(logprobs, reference).k1
    assert_vector(k1, need["kl_k1_per_token"])
    assert_vector(k1.sum(1), need["sequence_kl"])
    assert_vector(k1.sum(1).mean(), need["objective_kl"])


@quick
@given(lengths, seeds, st.integers(0, 3), st.sampled_from([math.nan, math.inf, -math.inf, 1e30]))
def test_token_rewards_do_not_see_padding(row_lengths, seed, extra, garbage):
    keeps = lengths_to_mask(torch.tensor(row_lengths), 6)
    logprobs, reference = randn(2, len(row_lengths), 6, seed=seed)
    scores = randn(len(row_lengths), seed=seed + 1)
    need = torch.zeros(len(row_lengths), 6 + extra, dtype=torch.float64)
    for row, length in enumerate(row_lengths):
        for column in range(length):
            need[row, column] = -0.3 * (logprobs[row, column] - reference[row, column])
        if length:
            need[row, length - 1] += scores[row]
    spoiled = [spoil(part, keeps, extra, garbage) for part in (logprobs, reference)]
    got = token_rewards(scores, *spoiled, F.pad(keeps, (0, extra)), kl_coef=0.3)
    assert_close(got, need, dtype=torch.float64)


def test_token_rewards_are_constants_in_fp32():
    logprobs = torch.zeros(2, 3, dtype=torch.bfloat16, requires_grad=True)
    rewards = token_rewards(torch.ones(2).bfloat16(), logprobs, logprobs, mask([[1, 1, 1]] * 2), kl_coef=0.1)
    assert rewards.dtype == torch.float32
    assert not rewards.requires_grad


def test_token_rewards_refuse_shapes_that_would_broadcast():
    keeps = mask([[1, 1], [1, 1]])
    with pytest.raises(ValueError, match=r"scores: got shape \[2, 1\], need one per row, \[2\]"):
        token_rewards(torch.zeros(2, 1), torch.zeros(2, 2), torch.zeros(2, 2), keeps, kl_coef=0.1)
    with pytest.raises(ValueError, match=r"reference_logprobs: got shape \[1, 2\]"):
        token_rewards(torch.zeros(2), torch.zeros(2, 2), torch.zeros(1, 2), keeps, kl_coef=0.1)


# Advantages


def advantages_loop(rewards: Tensor, values: Tensor, row_lengths: list[int], discount: float, lam: float) -> Tensor:
    """Write out the definition: a sum over all later surprises, no recursion."""
    advantages = torch.zeros_like(rewards)
    for row, length in enumerate(row_lengths):
        for t in range(length):
            for k in range(t, length):
                following = values[row, k + 1] if k + 1 < length else 0.0
                surprise = rewards[row, k] + discount * following - values[row, k]
                advantages[row, t] += (discount * lam) ** (k - t) * surprise
    return advantages


@pytest.mark.parametrize("case", [GAE, GAE_1], ids=["lambda_0p95", "lambda_1"])
def test_gae_vectors(case):
    advantages, returns = generalized_advantages(
        f64(case["rewards"]), f64(case["values"]), mask(case["mask"]), discount=case["gamma"], gae_lambda=case["lam"]
    )
    assert_vector(advantages, case["expected"]["advantages"])
    assert_vector(returns, case["expected"]["returns"])


@quick
@given(lengths, seeds, st.floats(0, 1), st.floats(0, 1), st.integers(0, 3), st.sampled_from([math.nan, math.inf, 9.9]))
def test_gae_against_the_definition_whatever_stands_at_padding(row_lengths, seed, discount, lam, extra, garbage):
    keeps = lengths_to_mask(torch.tensor(row_lengths), 6)
    rewards, values = randn(2, len(row_lengths), 6, seed=seed)
    need = advantages_loop(rewards, values, row_lengths, discount, lam)
    advantages, returns = generalized_advantages(
        spoil(rewards, keeps, extra, garbage),
        spoil(values, keeps, extra, garbage),
        F.pad(keeps, (0, extra)),
        discount=discount,
        gae_lambda=lam,
    )
    assert_close(advantages, F.pad(need, (0, extra)), dtype=torch.float64)
    assert_close(returns, F.pad(need + values * keeps, (0, extra)), dtype=torch.float64)


@quick
@given(lengths, seeds)
def test_lambda_one_returns_are_the_rewards_to_go(row_lengths, seed):
    keeps = lengths_to_mask(torch.tensor(row_lengths), 6)
    rewards, values = randn(2, len(row_lengths), 6, seed=seed)
    advantages, returns = generalized_advantages(rewards, values, keeps, discount=1.0, gae_lambda=1.0)
    to_go = (rewards * keeps).flip(1).cumsum(1).flip(1) * keeps
    assert_close(returns, to_go, dtype=torch.float64)
    assert_close(advantages, (to_go - values) * keeps, dtype=torch.float64)


def test_gae_is_a_constant_in_fp32_and_mutates_nothing():
    rewards = torch.ones(2, 3, dtype=torch.bfloat16, requires_grad=True)
    values, keeps = torch.ones(2, 3, dtype=torch.bfloat16), mask([[1, 1, 0], [1, 1, 1]])
    advantages, returns = generalized_advantages(rewards, values, keeps, discount=1.0, gae_lambda=0.95)
    assert advantages.dtype == returns.dtype == torch.float32
    assert not advantages.requires_grad
    assert rewards.eq(1).all()
    assert values.eq(1).all()


@pytest.mark.parametrize(("discount", "lam"), [(1.1, 0.9), (-0.1, 0.9), (1.0, 1.1), (1.0, -0.1)])
def test_gae_refuses_coefficients_outside_zero_to_one(discount, lam):
    with pytest.raises(ValueError, match="need both between 0 and 1"):
        generalized_advantages(torch.zeros(1, 1), torch.zeros(1, 1), mask([[1]]), discount=discount, gae_lambda=lam)


# Policy loss


def policy_case() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        f64(POLICY["new_logprobs"]).requires_grad_(),
        f64(POLICY["old_logprobs"]),
        f64(POLICY["advantages"]),
        mask(POLICY["mask"]),
    )


def test_policy_loss_vector():
    logprobs, old, advantages, keeps = policy_case()
    loss, metrics = clipped_policy_loss(logprobs, old, advantages, keeps, clip_range=POLICY["clip"])
    need = POLICY["expected"]
    assert_vector(loss, need["loss"])
    assert_vector(metrics["clip_fraction"], need["clipfrac"])
    assert_vector(metrics["ratio_mean"], need["ratio_mean"])
    assert_vector(metrics["ratio_max"], f64(need["ratio"]).max())
    assert_vector(metrics["approx_kl"], need["approx_kl_k3"])
    assert_vector(metrics["approx_kl_k1"], need["approx_kl_k1"])
    assert_vector(metrics["approx_kl_k2"], need["approx_kl_k2"])
    assert len(metrics) == 6
    assert not any(value.requires_grad for value in metrics.values())
    loss.backward()
    assert logprobs.grad is not None
    assert_vector(logprobs.grad, need["grad_new_logprobs"])
    silent = f64(need["grad_new_logprobs"]) == 0
    assert logprobs.grad[silent].eq(0).all()  # exactly, not to a tolerance


@pytest.mark.parametrize(("advantage", "ratio", "need_loss", "need_gradient"), SIGNS["expected"]["rows"])
def test_clip_sign_table(advantage, ratio, need_loss, need_gradient):
    logprobs = f64([math.log(ratio)]).requires_grad_()
    loss, _ = clipped_policy_loss(logprobs, f64([0.0]), f64([advantage]), mask([1]), clip_range=SIGNS["clip"])
    loss.backward()
    assert_vector(loss, need_loss)
    assert logprobs.grad is not None
    assert_vector(logprobs.grad, [need_gradient])


def test_first_minibatch_is_minus_the_mean_advantage():
    _, old, advantages, keeps = policy_case()
    loss, metrics = clipped_policy_loss(old, old, advantages, keeps, clip_range=0.2)
    assert_vector(loss, -masked_mean(advantages, keeps))
    assert_vector(metrics["ratio_mean"], 1.0)
    assert [float(metrics[name]) for name in ("clip_fraction", "approx_kl", "approx_kl_k1")] == [0.0] * 3


def test_no_gradient_reaches_the_constants():
    inputs = [part.detach().clone().requires_grad_() for part in policy_case()[:3]]
    clipped_policy_loss(*inputs, mask(POLICY["mask"]), clip_range=0.2)[0].backward()
    assert [part.grad is None for part in inputs] == [False, True, True]
    inputs = [f64(VALUE[name]).requires_grad_() for name in ("new_values", "old_values", "returns")]
    clipped_value_loss(*inputs, mask(VALUE["mask"]), clip_range=0.2)[0].backward()
    assert [part.grad is None for part in inputs] == [False, True, True]


# Value loss


def value_case() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        f64(VALUE["new_values"]).requires_grad_(),
        f64(VALUE["old_values"]),
        f64(VALUE["returns"]),
        mask(VALUE["mask"]),
    )


def test_value_loss_vector():
    loss, metrics = clipped_value_loss(*value_case(), clip_range=VALUE["clip"])
    assert_vector(loss, VALUE["expected"]["loss"])
    assert_vector(metrics["clip_fraction"], VALUE["expected"]["clipfrac"])
    assert not metrics["clip_fraction"].requires_grad
    loss, metrics = clipped_value_loss(*value_case(), clip_range=None)
    assert_vector(loss, VALUE["expected"]["loss_unclipped"])
    assert_vector(metrics["clip_fraction"], 0.0)


def test_value_gradient_against_the_cases_written_out():
    values, old, returns, keeps = value_case()
    clipped_value_loss(values, old, returns, keeps, clip_range=0.2)[0].backward()
    need = torch.zeros_like(old)
    for row, column in keeps.nonzero().tolist():
        v, o, g = (float(part[row, column].detach()) for part in (values, old, returns))
        near = min(max(v, o - 0.2), o + 0.2)
        need[row, column] = 0.0 if (near - g) ** 2 > (v - g) ** 2 else (v - g) / 9
    assert values.grad is not None
    assert_vector(values.grad, need)
    assert values.grad[need == 0].eq(0).all()
    assert (need[keeps] == 0).any()


def test_explained_variance_vector():
    _, old, returns, keeps = value_case()
    spoiled = torch.where(keeps, old, torch.full_like(old, math.nan))
    assert_vector(explained_variance(spoiled, returns, keeps), VALUE["expected"]["explained_variance"])
    assert_vector(explained_variance(returns, returns, keeps), 1.0)


def test_explained_variance_of_constant_returns_or_nothing_is_zero():
    assert float(explained_variance(torch.zeros(1, 3), torch.ones(1, 3), mask([[1, 1, 1]]))) == 0.0
    assert float(explained_variance(torch.zeros(1, 3), torch.ones(1, 3), mask([[0, 0, 0]]))) == 0.0


# What both losses have in common

Loss = Callable[..., tuple[Tensor, dict[str, Tensor]]]
both = pytest.mark.parametrize("loss_function", [clipped_policy_loss, clipped_value_loss])


def loss_inputs(row_lengths: list[int], seed: int) -> tuple[list[Tensor], Tensor]:
    return list(randn(3, len(row_lengths), 6, seed=seed) * 0.4), lengths_to_mask(torch.tensor(row_lengths), 6)


@both
@quick
@given(lengths, seeds, st.integers(0, 3), st.sampled_from([math.nan, math.inf, -math.inf, 1e30]))
def test_padding_reaches_neither_loss_nor_gradient(loss_function: Loss, row_lengths, seed, extra, garbage):
    inputs, keeps = loss_inputs(row_lengths, seed)
    clean = inputs[0].clone().requires_grad_()
    need_loss, need_metrics = loss_function(clean, *inputs[1:], keeps, clip_range=0.2)
    need_loss.backward()
    spoiled = [spoil(part, keeps, extra, garbage) for part in inputs]
    spoiled[0].requires_grad_()
    loss, metrics = loss_function(*spoiled, F.pad(keeps, (0, extra)), clip_range=0.2)
    loss.backward()
    assert_close(loss, need_loss, dtype=torch.float64)
    for name, value in metrics.items():
        assert_close(value, need_metrics[name], dtype=torch.float64)
    assert clean.grad is not None
    assert spoiled[0].grad is not None
    assert spoiled[0].grad[~F.pad(keeps, (0, extra))].eq(0).all()
    assert_close(spoiled[0].grad, F.pad(clean.grad, (0, extra)), dtype=torch.float64)


@both
@quick
@given(st.lists(st.integers(0, 6), min_size=4, max_size=4), seeds)
def test_micro_batches_add_up(loss_function: Loss, row_lengths, seed):
    inputs, keeps = loss_inputs(row_lengths, seed)
    whole, parts = inputs[0].clone().requires_grad_(), inputs[0].clone().requires_grad_()
    loss, metrics = loss_function(whole, *inputs[1:], keeps, clip_range=0.2)
    loss.backward()
    totals = dict.fromkeys(metrics, 0.0)
    total = 0.0
    for rows in (slice(0, 1), slice(1, 3), slice(3, 4)):
        part, part_metrics = loss_function(
            parts[rows], inputs[1][rows], inputs[2][rows], keeps[rows], clip_range=0.2, denominator=keeps.sum()
        )
        part.backward()
        total += float(part.detach())
        for name, value in part_metrics.items():
            totals[name] = max(totals[name], float(value)) if name.endswith("_max") else totals[name] + float(value)
    assert_close(total, loss, dtype=torch.float64)
    for name, value in metrics.items():
        assert_close(totals[name], value, dtype=torch.float64)
    assert whole.grad is not None
    assert_close(parts.grad, whole.grad, dtype=torch.float64)


@both
def test_an_empty_mask_is_zero_with_zero_gradients(loss_function: Loss):
    for columns in (3, 0):
        new = torch.full((2, columns), math.nan, requires_grad=True)
        nothing = torch.zeros(2, columns, dtype=torch.bool)
        loss, metrics = loss_function(new, new.detach(), new.detach(), nothing, clip_range=0.2)
        loss.backward()
        assert [float(value) for value in (loss.detach(), *metrics.values())] == [0.0] * (1 + len(metrics))
        assert new.grad is not None
        assert new.grad.eq(0).all()


@both
def test_bf16_gives_an_fp32_loss(loss_function: Loss):
    inputs, keeps = loss_inputs([3, 6], seed=0)
    loss, metrics = loss_function(*[part.bfloat16() for part in inputs], keeps, clip_range=0.2)
    assert {loss.dtype, *(value.dtype for value in metrics.values())} == {torch.float32}
    need, _ = loss_function(*[part.bfloat16().double() for part in inputs], keeps, clip_range=0.2)
    assert_close(loss, need)


@both
def test_refuses_what_cannot_be_meant(loss_function: Loss):
    rows, keeps = torch.zeros(2, 3), mask([[1, 1, 1]] * 2)
    with pytest.raises(ValueError, match=r"got shape \[2, 1\], need the mask's \[2, 3\]"):
        loss_function(rows, rows, rows[:, :1], keeps, clip_range=0.2)
    with pytest.raises(ValueError, match=r"mask: got dtype torch\.int64"):
        loss_function(rows, rows, rows, keeps.long(), clip_range=0.2)
    with pytest.raises(ValueError, match=r"clip_range: got -0\.2"):
        loss_function(rows, rows, rows, keeps, clip_range=-0.2)


def test_values_within_the_range_do_not_count_as_clipped() -> None:
    """Adding a difference back to the old value rounds, which is no clipping."""
    generator = torch.Generator().manual_seed(0)
    old, returns = torch.randn(2, 4, 50, generator=generator)
    values = old + 0.19 * torch.rand(4, 50, generator=generator)
    mask = torch.ones(4, 50, dtype=torch.bool)
    loss, metrics = clipped_value_loss(values, old, returns, mask, clip_range=0.2)
    assert float(metrics["clip_fraction"]) == 0.0
    assert torch.equal(loss, clipped_value_loss(values, old, returns, mask, clip_range=None)[0])
