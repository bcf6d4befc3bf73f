"""Each check of ``Health`` alone: silent on healthy numbers, and loud on those that it is for and on no others."""

from __future__ import annotations

import inspect
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest

from lit_instruct import PPOModule, PromptDataModule
from lit_instruct.callbacks import PtxMixing
from lit_instruct.callbacks.health_checks import Limits, enough_z, negative_kl, other_sampler
from lit_instruct.callbacks.health_rules import RULES, check_all, table
from lit_instruct.types import ConfigError
from tests.helpers.numbers import assert_close
from tests.unit.callbacks.health_runs import observe, row, rows

NAMES = [rule.name for rule in RULES]


def found(*arguments: Any, **changes: Any) -> set[str]:
    return set(check_all(observe(rows(*arguments, **changes))))


@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_run_is_left_alone_from_start_to_end(seed: int) -> None:
    run = rows(80, seed=seed)
    for length in range(1, 81):
        assert check_all(observe(run[:length])) == {}


SPOILED: list[tuple[str, dict[str, float], int, int]] = [
    # finding, what is changed, from which iteration on, seen after how many
    ("first_minibatch_differs", {"first_minibatch/approx_kl": 2e-4}, 1, 1),
    ("first_minibatch_differs", {"first_minibatch/ratio_mean": 0.9995}, 7, 7),
    ("first_minibatch_differs", {"first_minibatch/approx_kl": 6e-3, "fact/fp32": 0.0}, 1, 1),
    ("reference_is_another_model", {"fact/kl_per_token": 0.02, "fact/reference_is_policy": 0.0}, 1, 1),
    ("reference_reads_differently", {"fact/kl_per_token": 0.02}, 1, 1),
    ("kl_negative", {"objective/kl": -0.04}, 1, 10),
    ("sampler_differs", {"first_minibatch/surprise_z": 3.0}, 1, 10),
    ("sampler_differs", {"first_minibatch/surprise_z": -6.0}, 1, 1),
    ("tokens_after_end", {"fact/tokens_after_end": 0.01}, 3, 3),
    ("end_not_counted", {"fact/end_not_counted": 0.01}, 3, 3),
    ("never_stops", {"rollout/eos_rate": 0.05}, 1, 1),
    ("few_prompts", {"rollout/distinct_prompts": 0.25}, 1, 1),
    ("score_misplaced", {"fact/score_misplaced": 1.0}, 1, 1),
    ("padding_paid", {"fact/padding_paid": 0.5}, 1, 1),
    ("scores_equal", {"fact/scores_equal": 1.0}, 1, 3),
    ("scores_too_wide", {"objective/score_std": 8.0}, 1, 1),
    ("score_follows_length", {"rollout/score_length_corr": 0.96}, 1, 3),
    ("score_falls", {"objective/score": -0.8}, 20, 30),
    ("nothing_learned", {"objective/score": 0.0, "objective/kl": 0.01}, 1, 40),
    ("steps_too_large", {"policy/approx_kl": 0.15}, 1, 3),
    ("steps_too_large", {"policy/clip_fraction": 0.4}, 1, 3),
    ("steps_too_large", {"policy/approx_kl": 1.1}, 1, 1),
    ("kl_runs_away", {"objective/kl": 60.0}, 5, 10),
    ("entropy_collapsed", {"policy/entropy": 0.1}, 5, 9),
    ("text_repeats", {"rollout/repeat_4gram": 0.5}, 10, 20),
    ("length_drifts", {"rollout/len_mean": 120.0}, 10, 20),
    ("length_drifts", {"rollout/len_mean": 20.0}, 10, 20),
    ("not_finite", {"policy/grad_norm": math.nan}, 4, 4),
    ("not_finite", {"value/grad_norm": math.inf}, 4, 4),
    ("not_finite", {"skipped_steps": 1.0}, 4, 4),
    ("values_equal", {"fact/values_equal": 1.0}, 1, 3),
    ("value_clip_tight", {"returns/std": 6.0}, 1, 1),
    ("values_explain_nothing", {"value/explained_var": -0.5}, 1, 30),
    ("ptx_loss_rises", {"ptx/nll": 2.4}, 10, 20),
    ("ptx_loss_rises", {"ptx/nll": -2.0}, 1, 1),
    ("ptx_drowns_ppo", {"objective/score": 0.0, "objective/kl": 0.01, "ptx/grad_norm": 30.0}, 1, 40),
]


@pytest.mark.parametrize(("name", "changes", "since", "iterations"), SPOILED)
def test_each_check_finds_what_it_is_for(name: str, changes: dict[str, float], since: int, iterations: int) -> None:
    assert found(iterations, since=since, **changes) == {name}
    evidence = check_all(observe(rows(iterations, since=since, **changes)))[name]
    assert evidence.size > 0
    assert re.search(r"\d|nan|inf|all states", evidence.seen)


def test_every_rule_is_tried() -> None:
    assert {name for name, *_ in SPOILED} | {"dropout_on"} == set(NAMES)
    assert set(check_all(observe(rows(1))._replace(dropouts=["policy.norm"]))) == {"dropout_on"}


@pytest.mark.parametrize(
    ("changes", "since", "iterations"),
    [
        ({"first_minibatch/approx_kl": 6e-5, "first_minibatch/ratio_mean": 1.00005}, 1, 3),
        ({"first_minibatch/approx_kl": 2e-3, "first_minibatch/ratio_mean": 0.99, "fact/fp32": 0.0}, 1, 3),
        ({"fact/kl_per_token": 0.02, "fact/fresh": 0.0}, 1, 1),  # a run that goes on
        ({"objective/kl": -1e-6, "objective/kl_std": 0.0}, 1, 10),  # rounding
        ({"objective/kl": -0.02}, 1, 10),  # chance: 2.9 standard errors
        ({"objective/kl": -0.4, "fact/episodes": 4.0}, 1, 10),  # too few to tell
        ({"first_minibatch/surprise_z": 3.0}, 1, 2),
        ({"rollout/eos_rate": 0.0, "fact/episodes": 8.0}, 1, 5),
        ({"fact/scores_equal": 1.0, "fact/episodes": 8.0}, 1, 3),
        ({"fact/scores_equal": 1.0}, 9, 10),
        ({"objective/score_std": 8.0, "objective/kl_coef": 0.1}, 1, 5),
        ({"objective/score_std": 8.0, "objective/kl_coef": 0.0}, 1, 5),  # no penalty is wanted
        ({"rollout/score_length_corr": 0.8}, 1, 20),
        ({"rollout/score_length_corr": -0.99}, 1, 20),
        ({"rollout/score_length_corr": 0.93, "fact/episodes": 12.0}, 1, 10),  # may be 0.8 as well
        ({"objective/score": -0.2}, 20, 30),
        ({"objective/score": 0.0, "objective/kl": 0.01}, 1, 39),
        ({"objective/score": 0.0}, 1, 45),  # flat, but the policy moves
        ({"policy/approx_kl": 0.9}, 2, 2),
        ({"rollout/repeat_4gram": 0.5}, 1, 20),  # from the start: the text is like that
        ({"rollout/len_mean": 80.0}, 10, 20),
        ({"value/explained_var": -0.1}, 1, 60),
        ({"ptx/nll": 2.15}, 10, 20),
        ({"ptx/grad_norm": 30.0}, 1, 40),  # as long as PPO learns all the same
    ],
)
def test_no_check_cries_wolf(changes: dict[str, float], since: int, iterations: int) -> None:
    assert found(iterations, since=since, **changes) == set()


def test_length_and_score_rising_together_are_found_earlier() -> None:
    hacked = {"rollout/score_length_corr": 0.7}
    assert found(20, since=10, **hacked) == set()
    assert found(20, since=10, **hacked, **{"rollout/len_mean": 70.0}) == {"score_follows_length"}


def test_two_faults_are_two_findings_and_the_sampler_is_not_blamed_for_the_update() -> None:
    changes = {"first_minibatch/approx_kl": 0.1, "first_minibatch/surprise_z": 9.0, "objective/score_std": 8.0}
    assert found(3, **changes) == {"first_minibatch_differs", "scores_too_wide"}


def test_settings_matter() -> None:
    run = rows(40, **{"returns/std": 6.0, "objective/score": 0.0, "objective/kl": 0.01})
    assert set(check_all(observe(run))) == {"value_clip_tight", "nothing_learned"}
    assert set(check_all(observe(run, value_clip_range=None))) == {"nothing_learned"}
    assert set(check_all(observe(run, value_clip_range=1.0, value_warmup_iterations=1))) == set()


def test_limits_move_the_findings() -> None:
    run = rows(12, **{"policy/approx_kl": 0.05, "objective/kl": -0.02})
    assert set(check_all(observe(run))) == set()
    strict = Limits(max_approx_kl=0.02, z=2.5)
    assert set(check_all(observe(run, limits=strict))) >= {"steps_too_large", "kl_negative"}


@pytest.mark.parametrize("bad", [{"z": -1.0}, {"max_approx_kl": math.nan}, {"patience": -1}])
def test_limits_that_are_none_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"limits.{next(iter(bad))}: got"):
        Limits(**bad)


def test_false_alarms_are_as_rare_as_promised() -> None:
    """Windows of ten small iterations in which nothing is wrong: none at z = 5, the due share at z = 2."""
    stream = random.Random(0)
    loose, windows, alarms = Limits(z=2.0), 2_000, 0
    for _ in range(windows):
        run = []
        for _ in range(10):
            kls = [stream.gauss(0, 0.3) for _ in range(8)]
            mean = sum(kls) / 8
            std = math.sqrt(sum((kl - mean) ** 2 for kl in kls) / 8)
            run.append(row(9, stream, **{"objective/kl": mean, "objective/kl_std": std, "fact/episodes": 8.0}))
        assert negative_kl(observe(run)) is None
        assert other_sampler(observe(run)) is None
        alarms += negative_kl(observe(run, limits=loose)) is not None
        alarms += other_sampler(observe(run, limits=loose)) is not None
    # 2.3 % on one side for the one, 4.6 % on two for the other (a few more: 8 episodes understate their spread).
    assert 0.03 < alarms / windows < 0.14


def test_the_quantile_of_small_samples() -> None:
    """Tables of Student's t at 60 degrees of freedom, and of the normal distribution: 2.5 % and 0.5 % on one side."""
    assert_close(enough_z(1.959964, 60), 2.000298, scale=100)  # the expansion's first term gives three digits
    assert_close(enough_z(2.575829, 60), 2.660283, scale=100)
    assert_close(enough_z(5.0, 1e9), 5.0)


def test_a_trend_needs_five_iterations_on_either_side() -> None:
    """Welch's error of a difference of means, of 1 2 3 4 5 and of 11 12 13 14 15: 10 / sqrt(2.5 / 5 + 2.5 / 5)."""
    run = [now | {"ptx/nll": number} for now, number in zip(rows(10), [1, 2, 3, 4, 5, 11, 12, 13, 14, 15], strict=True)]
    assert observe(run[:9]).trend("ptx/nll") is None
    trend = observe(run).trend("ptx/nll")
    assert trend is not None
    assert_close(list(trend), [3.0, 13.0, 10.0])
    assert observe(run).trend("no/such") is None


# -- the table


def test_names_are_unique_and_every_rule_says_something() -> None:
    assert len(set(NAMES)) == len(NAMES)
    for rule in RULES:
        assert rule.name.isidentifier()
        assert all(len(text) > 10 and not text.endswith(".") for text in (rule.symptom, rule.cause, rule.setting))


def test_settings_that_are_named_exist() -> None:
    """What the table tells to change can be changed."""
    model, data, ptx = (set(inspect.signature(c).parameters) for c in (PPOModule, PromptDataModule, PtxMixing))
    for rule in RULES:
        for place, name in re.findall(r"`(model|data)\.(\w+)`", rule.setting + rule.cause):
            assert name in {"model": model, "data": data}[place], f"{rule.name}: {place}.{name}"
        for name in re.findall(r"`(\w+)`", rule.setting):
            assert name in ptx, f"{rule.name}: PtxMixing {name}"


def test_the_page_shows_the_table() -> None:
    page = (Path(__file__).parents[3] / "docs" / "health.md").read_text(encoding="utf-8")
    assert table() in page, "docs/health.md: replace its table by lit_instruct.callbacks.health_rules.table()"
    shown = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `") and "|" in line}
    for limit, value in vars(Limits()).items():
        assert f"| {value:g} |" in shown[limit], f"docs/health.md: limit {limit} is {value:g}"
