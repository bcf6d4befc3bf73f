from __future__ import annotations

import math
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lit_instruct.functional import (
    calibration,
    last_token_index,
    masked_mean,
    pair_differences,
    prompts_with_pair,
    ranking_accuracy,
    ranking_loss,
)
from tests.helpers.numbers import assert_close, assert_vector
from tests.unit.functional.vectors import VECTORS, f64, mask

NO_TIES = VECTORS["rm_ranking_loss_K4_no_ties"]
ONE_TIE = VECTORS["rm_ranking_loss_K4_one_tie_dropped"]
MIXED = VECTORS["rm_batch_loss_mixed_K_prompt_weighting"]
EQUAL = VECTORS["rm_equal_scores_loss_and_accuracy"]
BIAS = VECTORS["rm_bias_normalisation_on_demonstrations"]
CALIBRATION = VECTORS["rm_calibration_ece_brier"]
LAST = VECTORS["rm_last_token_index_right_padding"]

quick = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 2**31)
rankings = st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=5), min_size=1, max_size=5)
Flat = tuple[Tensor, Tensor, Tensor]


def one_prompt(case: dict) -> Flat:
    ranks = torch.tensor(case["ranks"])
    return f64(case["scores"]), ranks, torch.zeros_like(ranks)


def flatten(ranks: list[list[int]], seed: int) -> Flat:
    """Lay out one list of ranks per prompt, with random scores and group ids that skip values."""
    flat = torch.tensor([rank for prompt in ranks for rank in prompt])
    groups = torch.tensor([3 * index + 1 for index, prompt in enumerate(ranks) for _ in prompt])
    scores = torch.randn(len(flat), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return scores, flat, groups


def loss_loop(scores: Tensor, ranks: Tensor, groups: Tensor, normalize: str) -> float:
    means = []
    for group in sorted({int(group) for group in groups}):
        members = [i for i in range(len(groups)) if int(groups[i]) == group]
        losses = [
            math.log1p(math.exp(-(float(scores[i]) - float(scores[j]))))
            for i in members
            for j in members
            if ranks[i] < ranks[j]
        ]
        if losses:
            size = len(losses) if normalize == "retained" else math.comb(len(members), 2)
            means.append(sum(losses) / size)
    return sum(means) / max(len(means), 1)


def test_no_ties_vector():
    scores, ranks, groups = one_prompt(NO_TIES)
    need = NO_TIES["expected"]
    differences, prompts = pair_differences(scores, ranks, groups)
    assert_vector(differences, [scores[w] - scores[l] for w, l in need["pair_order"]])  # noqa: E741
    assert prompts.tolist() == [0] * need["n_pairs"]
    assert_vector(F.softplus(-differences), need["pair_losses"])
    scores.requires_grad_()
    for normalize in ("retained", "k_choose_2"):
        loss = ranking_loss(scores, ranks, groups, normalize=normalize)
        assert_vector(loss, need["loss"])
        assert_vector(torch.autograd.grad(loss, scores)[0], need["grad_scores"])
    correct, total = ranking_accuracy(scores, ranks, groups)
    assert_vector(correct / total, need["accuracy"])
    assert not correct.requires_grad


def test_one_tie_vector():
    flat, need = one_prompt(ONE_TIE), ONE_TIE["expected"]
    assert pair_differences(*flat)[0].numel() == need["n_pairs_retained"]
    assert_vector(ranking_loss(*flat), need["loss_default_mean_over_retained"])
    assert_vector(ranking_loss(*flat, normalize="k_choose_2"), need["loss_literal_divide_by_K_choose_2"])
    correct, total = ranking_accuracy(*flat)
    assert_vector(correct / total, need["accuracy"])


def test_mixed_batch_vector_weighs_prompts_and_not_pairs():
    scores = f64([score for prompt in MIXED["scores"] for score in prompt])
    ranks = torch.tensor([rank for prompt in MIXED["ranks"] for rank in prompt])
    groups = torch.tensor([0, 0, 0, 0, 5, 5, 2, 2, 2])
    need = MIXED["expected"]
    loss = ranking_loss(scores, ranks, groups)
    assert_vector(loss, need["loss"])
    assert float(loss) != pytest.approx(need["wrong_flat_pair_mean"], abs=1e-3)
    assert int(prompts_with_pair(ranks, groups)) == 2
    for group, prompt_loss in zip((0, 5, 2), need["per_prompt_loss"], strict=True):
        rows = groups == group
        assert_vector(ranking_loss(scores[rows], ranks[rows], groups[rows]), prompt_loss or 0.0)
    correct, total = ranking_accuracy(scores, ranks, groups)
    assert_vector(correct / total, need["accuracy_pair_pooled"])
    differences, prompts = pair_differences(scores, ranks, groups)
    means = [(differences[prompts == group] > 0).double().mean() for group in prompts.unique()]
    assert_vector(torch.stack(means).mean(), need["accuracy_prompt_mean"])


def test_equal_scores_vector():
    flat, need = one_prompt(EQUAL), EQUAL["expected"]
    assert_vector(ranking_loss(*flat), need["loss"])
    correct, total = ranking_accuracy(*flat)
    assert_vector(correct / total, need["accuracy_half_credit"])


def test_bias_vector_leaves_the_loss_alone():
    demonstrations, scores, need = f64(BIAS["raw_demo_scores"]), f64(BIAS["raw_scores"]), BIAS["expected"]
    bias = masked_mean(demonstrations, torch.ones(4, dtype=torch.bool))
    assert_vector(bias, need["bias"])
    assert_vector(scores - bias, need["normalised_scores"])
    ranks, groups = torch.tensor([2, 1, 3]), torch.zeros(3, dtype=torch.long)
    assert_vector(ranking_loss(scores - bias, ranks, groups), ranking_loss(scores, ranks, groups))


def test_calibration_vector():
    differences, need = f64(CALIBRATION["score_differences"]), CALIBRATION["expected"]
    got = calibration(differences)
    assert_vector(got.bin_edges, CALIBRATION["bin_edges"])
    assert_vector(differences.sigmoid(), need["p_preferred"])
    for name in ("log_loss", "brier", "accuracy", "ece"):
        assert_vector(getattr(got, name), need[name])
    columns = (got.bin_edges[:-1], got.bin_edges[1:], got.bin_counts, got.bin_confidences, got.bin_accuracies)
    table = torch.stack(columns, dim=1)
    assert_vector(table[got.bin_counts > 0], need["bins_lo_hi_count_conf_acc"])


def test_calibration_at_the_edges():
    got = calibration(f64([0.0, 1000.0, -1000.0]))  # confidence exactly 0.5, 1 and 1
    assert got.bin_counts.tolist() == [1, 0, 0, 0, 2]
    assert_vector(got.bin_accuracies, [0.5, 0, 0, 0, 0.5])
    assert_vector(got.ece, 1 / 3)
    assert_vector(got.accuracy, 0.5)
    assert calibration(f64([math.log(3.0)]), bins=2).bin_counts.tolist() == [0, 1]  # 0.75 opens the upper bin
    nothing = calibration(torch.zeros(0))
    assert [float(part) for part in nothing[:4]] == [0.0] * 4
    with pytest.raises(ValueError, match="bins: got 0"):
        calibration(torch.zeros(3), bins=0)


def test_last_token_index_vector_counts_the_end_of_text():
    keeps = mask(LAST["attention_mask"])
    assert last_token_index(keeps).tolist() == LAST["expected"]["index"]
    ids = torch.tensor(LAST["input_ids"])
    naive = (ids != LAST["pad_id"]) & (ids != LAST["eos_id"])  # what a mask from ids does if the two are one id
    assert last_token_index(naive).tolist() == LAST["expected"]["wrong_index_if_eos_counted_as_pad"]


def test_last_token_index_under_left_padding_and_in_an_empty_row():
    assert last_token_index(mask([[0, 1, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]])).tolist() == [2, 3, -1]


@quick
@given(rankings, seeds, st.sampled_from(["retained", "k_choose_2"]))
def test_loss_against_a_loop(ranks, seed, normalize):
    flat = flatten(ranks, seed)
    assert_close(ranking_loss(*flat, normalize=normalize), loss_loop(*flat, normalize), dtype=torch.float64)
    assert int(prompts_with_pair(*flat[1:])) == sum(len(set(prompt)) > 1 for prompt in ranks)


@quick
@given(rankings, seeds)
def test_accuracy_against_a_loop(ranks, seed):
    scores, flat, groups = flatten(ranks, seed)
    scores = scores.round()  # gives ties in the scores too
    need_correct, need_total = 0.0, 0
    for i in range(len(flat)):
        for j in range(len(flat)):
            if groups[i] == groups[j] and flat[i] < flat[j]:
                need_total += 1
                need_correct += 1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0
    correct, total = ranking_accuracy(scores, flat, groups)
    assert (float(correct), int(total)) == (need_correct, need_total)


@quick
@given(rankings, seeds, st.randoms())
def test_order_of_responses_and_prompts_is_of_no_account(ranks, seed, random):
    flat = flatten(ranks, seed)
    order = list(range(len(flat[0])))
    random.shuffle(order)
    shuffled = [part[order] for part in flat]
    assert_close(ranking_loss(*shuffled), ranking_loss(*flat), dtype=torch.float64)
    assert_close(torch.stack(ranking_accuracy(*shuffled)), torch.stack(ranking_accuracy(*flat)), dtype=torch.float64)


@quick
@given(st.integers(1, 6), seeds)
def test_two_responses_are_the_pairwise_loss(prompts, seed):
    scores, ranks, groups = flatten([[1, 2]] * prompts, seed)
    need = -F.logsigmoid(scores[0::2] - scores[1::2]).mean()
    assert_close(ranking_loss(scores, ranks, groups), need, dtype=torch.float64)


@quick
@given(rankings, seeds, st.sampled_from(["retained", "k_choose_2"]))
def test_micro_batches_of_prompts_add_up(ranks, seed, normalize):
    scores, flat, groups = flatten(ranks, seed)
    count = prompts_with_pair(flat, groups)
    whole, parts = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    loss = ranking_loss(whole, flat, groups, normalize=normalize)
    loss.backward()
    total, ends = 0.0, list(accumulate(len(prompt) for prompt in ranks))
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        rows = slice(start, end)
        part = ranking_loss(parts[rows], flat[rows], groups[rows], normalize=normalize, denominator=count)
        part.backward()
        total += float(part.detach())
    assert_close(total, loss, dtype=torch.float64)
    assert whole.grad is not None
    assert_close(parts.grad, whole.grad, dtype=torch.float64)


@pytest.mark.parametrize("denominator", [None, 0, 4])
@pytest.mark.parametrize("normalize", ["retained", "k_choose_2"])
def test_no_pair_anywhere_is_a_zero_that_backpropagates_zeros(normalize, denominator):
    scores = torch.tensor([1.0, 2.0, math.nan], requires_grad=True)
    ranks, groups = torch.tensor([1, 1, 1]), torch.tensor([0, 0, 7])
    loss = ranking_loss(scores, ranks, groups, normalize=normalize, denominator=denominator)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert scores.grad is not None
    assert scores.grad.eq(0).all()
    assert int(prompts_with_pair(ranks, groups)) == 0
    correct, total = ranking_accuracy(scores, ranks, groups)
    assert (float(correct), int(total)) == (0.0, 0)


def test_large_differences_do_not_overflow_and_bf16_gives_fp32():
    ranks, groups = torch.tensor([1, 2]), torch.zeros(2, dtype=torch.long)
    assert_close(ranking_loss(torch.tensor([-500.0, 500.0]), ranks, groups), 1000.0)
    assert ranking_loss(torch.zeros(2, dtype=torch.bfloat16), ranks, groups).dtype == torch.float32


def test_large_prompts_are_counted_exactly_under_autocast():
    ranks = torch.arange(1, 31)  # 435 pairs; bf16 counts to 256
    scores, groups = torch.zeros(30), torch.zeros(30, dtype=torch.long)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ranking_loss(scores, ranks, groups)
    assert_close(loss, math.log(2.0))


def test_refuses_what_cannot_be_meant():
    scores, ranks, groups = one_prompt(NO_TIES)
    with pytest.raises(ValueError, match="normalize: got 'pairs', need 'retained' or 'k_choose_2'"):
        ranking_loss(scores, ranks, groups, normalize="pairs")
    for function in (ranking_loss, ranking_accuracy, pair_differences):
        with pytest.raises(ValueError, match=r"got shapes \[\[4, 1\], \[4\], \[4\]\]"):
            function(scores[:, None], ranks, groups)
    with pytest.raises(ValueError, match="need one flat shape"):
        prompts_with_pair(ranks, groups[:2])
