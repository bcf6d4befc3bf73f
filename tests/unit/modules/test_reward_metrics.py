"""The measurement of a whole set of rankings against loops over prompts and pairs; names; the picture."""

from __future__ import annotations

import math
import random
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch

from lit_instruct.functional import calibration
from lit_instruct.modules import reward_metrics
from lit_instruct.modules.reward_metrics import (
    LABELER_CURVES,
    LABELER_PAIRS,
    Agreement,
    RankingMeter,
    RankingReport,
    named_values,
    reliability_picture,
    report,
)
from lit_instruct.types import ComparisonBatch
from tests.helpers.numbers import assert_close

Prompts = list[tuple[int, list[tuple[float, int, int]]]]
"""Labeler, and (score, rank, length) of each response."""


def some_prompts(count: int, *, seed: int = 0) -> Prompts:
    """K from 1 to 5, ties in ranks, scores and lengths; labelers -1, 0, 2, 3 (1 never ranks)."""
    stream = random.Random(seed)
    return [
        (
            stream.choice([-1, 0, 2, 3]),
            [
                (stream.randint(-4, 4) / 4, stream.randint(1, 3), stream.randint(1, 6))
                for _ in range(stream.randint(1, 5))
            ],
        )
        for _ in range(count)
    ]


def batch_of(prompts: Prompts, *, labelers: bool = True) -> tuple[torch.Tensor, ComparisonBatch]:
    """Scores, and a batch with such ranks and lengths; its tokens do not matter."""
    flat = [row for _, rows in prompts for row in rows]
    lengths = torch.tensor([length for _, _, length in flat])
    mask = torch.arange(6) < lengths[:, None]
    batch = ComparisonBatch(
        prompt_ids_BP=torch.zeros(len(prompts), 1, dtype=torch.long),
        prompt_mask_BP=torch.ones(len(prompts), 1, dtype=torch.bool),
        response_ids_NR=torch.zeros_like(mask, dtype=torch.long),
        response_mask_NR=mask,
        ranks_N=torch.tensor([rank for _, rank, _ in flat]),
        group_N=torch.tensor([number for number, (_, rows) in enumerate(prompts) for _ in rows]),
        labeler_B=torch.tensor([labeler for labeler, _ in prompts]) if labelers else None,
    )
    return torch.tensor([score for score, _, _ in flat]), batch


def measured(prompts: Prompts, *, cut: int | None = None, normalize: str = "retained") -> RankingReport:
    meter = RankingMeter(normalize)
    for start in range(0, len(prompts), cut or len(prompts)):
        meter.update(*batch_of(prompts[start : start + (cut or len(prompts))]))
    return meter.compute()


def pairs_of(prompt: tuple[int, list[tuple[float, int, int]]]) -> list[tuple[float, float]]:
    """(score difference, length difference), better minus worse."""
    ordered = [sorted(pair, key=lambda row: row[1]) for pair in combinations(prompt[1], 2)]
    return [(a[0] - b[0], a[2] - b[2]) for a, b in ordered if a[1] != b[1]]


def credit(difference: float) -> float:
    return 1.0 if difference > 0 else 0.5 if difference == 0 else 0.0


def agreement(prompts: Prompts) -> Agreement:
    pairs = [pair for prompt in prompts for pair in pairs_of(prompt)]
    return Agreement(sum(credit(d) for d, _ in pairs), sum(credit(l) for _, l in pairs), len(pairs))  # noqa: E741


@pytest.mark.parametrize("cut", [None, 1, 7])
@pytest.mark.parametrize("at_once", [2, 16])
def test_everything_against_loops(monkeypatch: pytest.MonkeyPatch, cut: int | None, at_once: int) -> None:
    monkeypatch.setattr(reward_metrics, "_PROMPTS_AT_ONCE", at_once)
    prompts = some_prompts(41)
    got = measured(prompts, cut=cut)
    differences = [d for prompt in prompts for d, _ in pairs_of(prompt)]
    with_pair = [prompt for prompt in prompts if pairs_of(prompt)]
    scores = [row[0] for _, rows in prompts for row in rows]
    mean = sum(scores) / len(scores)
    softplus = {d: math.log1p(math.exp(-d)) for d in differences}
    per_prompt = [agreement([prompt]) for prompt in with_pair]
    whole = agreement(prompts)
    need = {
        "loss": sum(np.mean([softplus[d] for d, _ in pairs_of(prompt)]) for prompt in with_pair) / len(with_pair),
        "log_loss": np.mean([softplus[d] for d in differences]),
        "acc": whole.correct / whole.pairs,
        "acc_len_baseline": whole.longer / whole.pairs,
        "acc_prompt_mean": np.mean([a.correct / a.pairs for a in per_prompt]),
        "acc_len_baseline_prompt_mean": np.mean([a.longer / a.pairs for a in per_prompt]),
        "margin": np.mean(differences),
        "brier": np.mean([(1 - 1 / (1 + math.exp(-d))) ** 2 for d in differences]),
        "score_mean": mean,
        "score_std": math.sqrt(sum((x - mean) ** 2 for x in scores) / len(scores)),
    }
    for name, value in need.items():
        assert_close(got.values[name], float(value), dtype=torch.float64)
    assert set(got.values) == {*need, "ece", "len_corr", "len_corr_within_prompts"}
    assert got.overall == whole
    assert got.rankings == 41
    assert sum(len(rows) == 1 for _, rows in prompts) > 2  # prompts with nothing to compare are among them
    assert len({round(x, 3) for x in need.values()}) == len(need)  # else one could stand for another
    assert got.by_labeler == {who: agreement([p for p in prompts if p[0] == who]) for who in (0, 2, 3)}
    assert got.by_size == {k: agreement([p for p in prompts if len(p[1]) == k]) for k in (2, 3, 4, 5)}


def test_calibration_and_length_are_those_of_the_whole_set() -> None:
    prompts = some_prompts(30, seed=1)
    got, alone = measured(prompts, cut=4), measured(prompts)
    differences = torch.tensor([d for prompt in prompts for d, _ in pairs_of(prompt)], dtype=torch.float64)
    assert_close(got.values["ece"], calibration(differences).ece, dtype=torch.float64)
    assert_close(got.calibration.bin_counts, calibration(differences).bin_counts)
    for name in ("len_corr", "len_corr_within_prompts"):
        assert_close(got.values[name], alone.values[name], dtype=torch.float64)
    longer = [(who, [(0.25 * length + number, rank, length) for _, rank, length in rows]) for number, (who, rows) in
              enumerate(prompts)]  # fmt: skip
    assert_close(measured(longer).values["len_corr_within_prompts"], 1.0, dtype=torch.float64)
    assert measured(longer).values["len_corr"] < 0.5  # most of the score is the prompt's


def test_the_loss_is_normalised_as_in_training_and_the_log_loss_never() -> None:
    prompts = some_prompts(30, seed=2)
    retained, literal = measured(prompts), measured(prompts, normalize="k_choose_2")
    need = np.mean(
        [
            sum(math.log1p(math.exp(-d)) for d, _ in pairs_of(p)) / math.comb(len(p[1]), 2)
            for p in prompts
            if pairs_of(p)
        ]
    )
    assert_close(literal.values["loss"], float(need), dtype=torch.float64)
    assert retained.values["loss"] - literal.values["loss"] > 0.05
    assert retained.values["log_loss"] == literal.values["log_loss"]


def test_without_a_pair_there_is_no_accuracy() -> None:
    got = measured([(0, [(1.0, 2, 3), (2.0, 2, 4)])])
    numbers = ("acc", "acc_len_baseline", "acc_prompt_mean", "loss", "log_loss", "margin", "ece", "brier")
    assert all(math.isnan(got.values[name]) for name in numbers)
    assert got.values["score_mean"] == 1.5
    assert (got.by_labeler, got.by_size, got.overall.pairs) == ({}, {}, 0)
    assert math.isnan(got.overall.length_baseline)


def test_a_batch_that_knows_no_labelers_and_a_new_start() -> None:
    prompts = some_prompts(20)
    meter = RankingMeter("retained")
    meter.update(*batch_of(some_prompts(5, seed=9)))
    meter.reset()
    meter.update(*batch_of(prompts, labelers=False))
    got = meter.compute()
    assert got.by_labeler == {}
    assert got.overall == agreement(prompts)


def with_labelers(by_labeler: dict[int, Agreement]) -> RankingReport:
    got = measured(some_prompts(20))
    return got._replace(by_labeler=by_labeler, by_size={2: Agreement(3, 1, 4)})


def test_names_in_the_log() -> None:
    enough = LABELER_PAIRS
    got = with_labelers(
        {
            0: Agreement(0.5 * enough, 0.25 * enough, enough),
            1: Agreement(0.75 * enough, 0, enough),
            2: Agreement(0, 1, enough - 1),  # the lowest, but of too few pairs to count as such
            3: Agreement(1, 0, 2),
            4: Agreement(0, 1, 1),
        }
    )
    values = named_values(got, ["ann", "b/o b", "", "b o/b"])
    assert values["acc_labeler/ann"] == 0.5
    assert values["acc_len_baseline_labeler/ann"] == 0.25
    assert values["acc_labeler/b_o_b"] == 0.75
    assert values["acc_labeler/b_o_b_2"] == 0.5  # another one, whose name would look the same
    assert values["acc_labeler/_"] == 0.0
    assert values["acc_len_baseline_labeler/4"] == 1.0  # no name known
    assert (values["acc_k/2"], values["acc_len_baseline_k/2"]) == (0.75, 0.25)
    assert (values["acc_labeler_min"], values["acc_labeler_spread"]) == (0.5, 0.125)
    assert got.values.items() <= values.items()


def test_not_every_labeler_gets_a_curve() -> None:
    many = {number: Agreement(0, 0, number + 1) for number in range(LABELER_CURVES + 5)}
    values = named_values(with_labelers(many), [f"n{number}" for number in range(1000)])
    curves = {name for name in values if name.startswith("acc_labeler/")}
    assert curves == {f"acc_labeler/n{number}" for number in range(5, LABELER_CURVES + 5)}
    few = named_values(with_labelers({0: Agreement(1, 1, LABELER_PAIRS - 1)}), ["ann"])
    assert "acc_labeler_min" not in few
    assert "acc_labeler/ann" in few


def test_the_picture_shows_a_bar_for_each_filled_bin() -> None:
    fit = calibration(torch.tensor([0.1, 0.2, 3.0, -0.1]))
    picture = reliability_picture(fit)
    assert picture.shape == (500, 500, 3)
    assert picture.dtype == np.uint8
    assert not np.array_equal(picture, reliability_picture(calibration(torch.tensor([0.1, 0.2, 3.0, 0.1]))))
    empty = reliability_picture(calibration(torch.zeros(0)))
    blue = [(x[..., 2].astype(int) - x[..., 0] > 60).sum() for x in (picture, empty)]
    assert blue[0] > 5_000 > 10 * blue[1]  # the legend alone


def test_drawing_leaves_no_window_system_behind() -> None:
    import sys

    reliability_picture(calibration(torch.ones(3)))
    pyplot: Any = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or pyplot.get_fignums() == []


def test_the_report_takes_a_set_as_it_is_gathered() -> None:
    got = report(
        torch.tensor([1.0, 0.0, 2.0, 3.0]),
        torch.tensor([1, 2, 1, 2]),
        torch.tensor([4, 5, 1, 2]),
        torch.tensor([2, 2]),
        torch.tensor([7, -1]),
        normalize="retained",
    )
    assert got.overall == Agreement(1.0, 0.0, 2)
    assert got.by_labeler == {7: Agreement(1.0, 0.0, 1)}
