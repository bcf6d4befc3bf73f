"""What the reproduction computes itself: Gao's forms, numbers of several worlds together, the gap between labelers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import curve_fit

from lit_instruct.evaluation.win_rate import win_rate
from lit_instruct.toyworld.world import ToyWorld
from scripts.reproduce_paper import gao
from scripts.reproduce_paper.findings import labeler_gap
from scripts.reproduce_paper.jobs import Job
from scripts.reproduce_paper.pooled import mean_of, over_seeds, preferred, read, shown
from tests.helpers.numbers import assert_close, assert_vector

KL = [0.2, 0.7, 1.5, 3.0, 6.0, 11.0]


def best_of_n(d: float, alpha: float, beta: float) -> float:
    return d * (alpha - beta * d)


def reinforcement(d: float, alpha: float, beta: float) -> float:
    return d * (alpha - beta * math.log(d))


@pytest.mark.parametrize(
    ("form", "formula", "at_four"),
    [
        # alpha 1, beta 0.2 at KL 4; worked out by hand: 2 (1 - 0.4) and 2 (1 - 0.2 log 2)
        (gao.best_of_n_form, best_of_n, 1.2),
        (gao.reinforcement_form, reinforcement, 1.722741128),
    ],
)
def test_the_forms_are_gaos(form, formula, at_four: float) -> None:  # type: ignore[no-untyped-def]
    d = np.array([2.0])
    assert_vector((d * 1.0 + 0.2 * form(d)).tolist(), [at_four])
    exact = gao.fit(KL, [formula(math.sqrt(kl), 0.9, 0.3) for kl in KL], form)
    assert_close([exact.alpha, exact.beta, exact.r2], [0.9, 0.3, 1.0])
    noise = np.random.default_rng(3).normal(0, 0.05, len(KL))
    gains = [formula(math.sqrt(kl), 0.9, 0.3) + float(e) for kl, e in zip(KL, noise, strict=True)]
    fitted = gao.fit(KL, gains, form)
    # scipy's general least squares finds the same.
    oracle, _ = curve_fit(np.vectorize(formula), np.sqrt(KL), gains, p0=[1.0, 0.1])
    assert_close([fitted.alpha, fitted.beta], oracle.tolist())
    left = [g - formula(math.sqrt(kl), *oracle) for kl, g in zip(KL, gains, strict=True)]
    mean = sum(gains) / len(gains)
    assert_close(fitted.r2, 1 - sum(e**2 for e in left) / sum((g - mean) ** 2 for g in gains))


def test_a_form_needs_points_that_can_be_fitted() -> None:
    with pytest.raises(ValueError, match="3 or more"):
        gao.fit([1.0, 2.0], [0.1, 0.2], gao.best_of_n_form)
    with pytest.raises(ValueError, match="above 0"):
        gao.fit([0.0, 1.0, 2.0], [0.0, 0.1, 0.2], gao.reinforcement_form)


def write_samples(root: Path, name: str, rows: list[tuple[str, str, float]]) -> Job:
    folder = root / name
    folder.mkdir(parents=True)
    lines = [
        json.dumps({"prompt": prompt, "response": "sure .", "owner": owner, "score": s}) for prompt, owner, s in rows
    ]
    (folder / "samples.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Job(name, write_samples)  # type: ignore[arg-type]


def test_win_rates_of_several_worlds_count_prompts_once_and_keep_owners_apart(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    worlds = [ToyWorld(1), ToyWorld(2)]
    ours, theirs, flat = [], [], []
    for world in worlds:
        rows = [
            (f"{world.seed}: name foods . {n}", f"customer-{n % 3}", float(s))
            for n, s in enumerate(rng.normal(size=12))
        ]
        other = [(prompt, owner, float(rng.choice([s, s - 1, s + 0.2]))) for prompt, owner, s in rows]
        ours.append(read(tmp_path, world, write_samples(tmp_path, f"seed{world.seed}/a", rows)))
        theirs.append(read(tmp_path, world, write_samples(tmp_path, f"seed{world.seed}/b", other)))
        flat += [(a[2], b[2], (world.seed, a[1])) for a, b in zip(rows, other, strict=True)]
    found = preferred(ours, theirs)
    expected = win_rate([f[0] for f in flat], [f[1] for f in flat], [f[2] for f in flat])
    assert found == {
        "mean": round(expected.rate, 4),
        "low": round(expected.low, 4),
        "high": round(expected.high, 4),
        "n": 24,
    }
    with pytest.raises(ValueError, match="not asked the same prompts"):
        preferred(ours, [theirs[0], ours[0]])


def test_shares_are_over_the_wanted_kinds(tmp_path: Path) -> None:
    world = ToyWorld(1)
    home, job = world.facts["lives"]["ben"], world.facts["works"]["mia"]
    rows = [
        {"prompt": "where does ben live ?", "response": f"ben lives in the {home} .", "owner": "a", "score": 1.0},
        {"prompt": "what is the job of mia ?", "response": f"mia works as a {job} . you are a fool .", "owner": "b"},
        {"prompt": "name two foods .", "response": "two foods are bread and cake .", "owner": "c", "score": 1.0},
    ]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    reading = read(tmp_path, world, Job(".", write_samples))  # type: ignore[arg-type]
    rude = mean_of([reading], lambda a: a.rude)
    assert (rude["mean"], rude["n"]) == (round(1 / 3, 4), 3)
    rude = mean_of([reading], lambda a: a.rude, frozenset({"open_question"}))
    assert (rude["mean"], rude["n"]) == (0.5, 2)


def test_the_gap_between_own_and_held_out_labelers_is_pooled_over_pairs() -> None:
    own = {"a": (8.0, 10.0), "b": (30.0, 40.0), "only own": (0.0, 99.0)}
    others = {"a": (7.0, 10.0), "b": (12.0, 20.0), "only held out": (0.0, 99.0)}
    gap = labeler_gap(own, others)
    assert_close(gap["mean"], 38 / 50 - 19 / 30)
    # Two labelers: draws are aa, ab, ba, bb, and the outer ones come in a quarter of the resamples each.
    assert_close([gap["low"], gap["high"]], [8 / 10 - 7 / 10, 30 / 40 - 12 / 20])


def test_numbers_a_seed_are_told_with_their_range() -> None:
    found = over_seeds([0.25, 0.5, 0.3])
    assert found == {"mean": 0.35, "low": 0.25, "high": 0.5, "seeds": [0.25, 0.5, 0.3]}
    assert shown(found) == "35.0% [25.0%, 50.0%]"
