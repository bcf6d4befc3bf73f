"""Agreement figures against loops, hand-made tables, and the noise that made-up labelers were given."""

from __future__ import annotations

import json
import random
from itertools import combinations, islice
from math import comb

import pytest

from lit_instruct.feedback import agreement_report
from lit_instruct.feedback.agreement import PERIODS, Judged, _holm, agreement_figures, judged_tasks
from lit_instruct.feedback.agreement_report import main
from lit_instruct.toyworld import ToyWorld, calibrate_noise, make_labelers, measure_agreement, write_demonstration
from lit_instruct.toyworld.labelers import PAPER_AGREEMENT, Labeler
from lit_instruct.types import ConfigError, DataError
from tests.helpers.labelling import write_rows
from tests.helpers.numbers import assert_close


def task(ranks: dict[str, list[int]], *, prompt: str = "p", period: int = 0, texts: list[str] | None = None) -> Judged:
    count = len(next(iter(ranks.values())))
    return Judged(prompt, texts or [f"response {k}" for k in range(count)], ranks, dict.fromkeys(ranks, period))


KNOWN = [
    task({"ann": [1, 2, 3], "bob": [1, 3, 2], "eve": [3, 2, 1]}, texts=["a", "bb", "ccc"]),
    task({"ann": [1, 1, 2], "bob": [1, 2, 3]}, texts=["aaa", "bb", "bb"], period=3),
]
"""Counted by hand below."""


def test_a_table_counted_by_hand():
    figures = agreement_figures(KNOWN)
    # ann-bob: 12 and 13 alike, 23 not; then 13 and 23 alike, 12 is ann's tie. ann-eve: 3 not. bob-eve: 12, 13 not, 23.
    pairs = {(pair.one, pair.other): pair for pair in figures.pairs}
    assert {names: (pair.agreement, pair.pairs, pair.tasks) for names, pair in pairs.items()} == {
        ("ann", "bob"): (4 / 5, 5, 2),
        ("ann", "eve"): (0.0, 3, 1),
        ("bob", "eve"): (1 / 3, 3, 1),
    }
    assert figures.agreement.share == 5 / 11
    assert figures.labelers["ann"].agreement.share == 4 / 8
    assert figures.labelers["eve"].agreement.share == 1 / 6
    assert_close(figures.labelers["eve"].apart.share, 1 / 6 - 4 / 5)
    assert figures.ties == 1 / 15  # one of ann's six, none of bob's six and eve's three
    assert figures.labelers["ann"].ties == 1 / 6
    # lengths 1, 2, 3: ann prefers the shorter in all three; then of 3, 2, 2 the pairs 12 (tied by ann) and 13 differ.
    assert (figures.labelers["ann"].longer.share, figures.labelers["ann"].longer.pairs) == (1 / 4, 4)
    assert (figures.labelers["eve"].longer.share, figures.labelers["eve"].longer.pairs) == (1.0, 3)
    assert figures.labelers["bob"].by_period == [3 / 6, None, None, 2 / 2]
    assert figures.by_period == [3 / 9, None, None, 1.0]
    assert_close(figures.labelers["bob"].change.share, 1.0 - 3 / 6)
    # tau-b: ann-bob (2-1)/3, then (2-0)/sqrt(2*3); bob-eve (1-2)/3.
    assert_close(pairs["ann", "bob"].tau_b, (1 / 3 + 2 / 6**0.5) / 2)
    assert_close(pairs["bob", "eve"].tau_b, -1 / 3)
    assert (figures.tasks, figures.shared_tasks) == (2, 2)


def test_a_reward_models_ties_count_one_half():
    figures = agreement_figures(KNOWN, scores=[[3.0, 2.0, 2.0], [0.0, 0.0, -1.0]])
    # ann: 12, 13 alike, 23 half; then 13, 23 alike (12 is her tie). eve: 12, 13 against, 23 half.
    assert figures.labelers["ann"].reward_model.share == 4.5 / 5
    assert figures.labelers["eve"].reward_model.share == 0.5 / 3
    assert figures.reward_model.pairs == 5 + 6 + 3


def alpha_by_loops(tasks):
    """Krippendorff's alpha of pairs, 1 - observed / expected squared difference, straight from its definition."""
    units = []
    for one in tasks:
        for first, second in combinations(range(len(one.responses)), 2):
            signs = [(r[first] > r[second]) - (r[first] < r[second]) for r in one.ranks.values()]
            if len(signs) > 1:
                units += [signs, [-sign for sign in signs]]
    values = [value for unit in units for value in unit]
    observed = sum(
        sum((a - b) ** 2 for i, a in enumerate(unit) for j, b in enumerate(unit) if i != j) / (len(unit) - 1)
        for unit in units
    ) / len(values)
    expected = sum((a - b) ** 2 for i, a in enumerate(values) for j, b in enumerate(values) if i != j)
    return 1 - observed / (expected / (len(values) * (len(values) - 1)))


def random_tasks(count: int, labelers: str = "abcd", seed: int = 0) -> list[Judged]:
    stream = random.Random(seed)
    tasks = []
    for number in range(count):
        size = stream.randint(2, 5)
        there = stream.sample(labelers, stream.randint(1, len(labelers)))
        ranks = {name: [stream.randint(1, size) for _ in range(size)] for name in there}
        tasks.append(task(ranks, prompt=str(number), period=number * PERIODS // count))
    return tasks


def test_alpha_is_its_definition_whichever_response_comes_first():
    tasks = [*random_tasks(12), *KNOWN]
    alpha = agreement_figures(tasks).alpha
    assert_close(alpha, alpha_by_loops(tasks))
    turned = [
        one._replace(responses=one.responses[::-1], ranks={name: ranks[::-1] for name, ranks in one.ranks.items()})
        for one in tasks
    ]
    assert_close(agreement_figures(turned).alpha, alpha)
    alike = [task({"a": [1, 2, 2], "b": [1, 2, 2]})]
    assert_close(agreement_figures(alike).alpha, 1.0)


def test_labelers_who_do_not_meet_have_no_agreement():
    figures = agreement_figures([task({"a": [1, 2]}), task({"b": [1, 2]}, prompt="q")])
    assert figures.agreement.share is None
    assert figures.alpha is None
    assert figures.outliers == []
    assert list(agreement_report.table(figures))
    tied = agreement_figures([task({"a": [1, 1], "b": [1, 1]})])
    assert (tied.agreement.share, tied.alpha, tied.pairs[0].tau_b, tied.ties) == (None, None, None, 1.0)


def test_the_interval_covers_what_tasks_vary_by():
    """Of tasks with one pair each, agreement is a binomial share; its standard error is known."""
    stream = random.Random(4)
    tasks = [task({"a": [1, 2], "b": [1, 2] if stream.random() < 0.7 else [2, 1]}, prompt=str(n)) for n in range(400)]
    share = agreement_figures(tasks).agreement
    expected = (share.share * (1 - share.share) / 400) ** 0.5
    assert_close(share.standard_error / expected, 1.0, scale=5e3)  # 2000 resamples: within 5 %
    assert share.low < share.share < share.high
    assert_close((share.high - share.low) / (2 * 1.96 * expected), 1.0, scale=1e4)


def test_labelers_of_known_noise_come_out_at_what_theory_says():
    """Utility and each labeler's noise are standard normal, so two orders of a pair correlate by 1/2.

    They are then alike with probability 1/2 + asin(1/2) / pi = 2/3.
    """
    stream = random.Random(0)
    tasks = []
    for number in range(400):
        truth = [stream.gauss(0, 1) for _ in range(5)]
        ranks = {}
        for name in stream.sample("abcde", 3):
            seen = [value + stream.gauss(0, 1) for value in truth]
            ranks[name] = [1 + sum(other > value for other in seen) for value in seen]
        tasks.append(task(ranks, prompt=str(number)))
    figures = agreement_figures(tasks)
    assert figures.agreement.low < 2 / 3 < figures.agreement.high
    assert figures.agreement.high - figures.agreement.low < 0.04
    values = 2 * 3 * figures.tasks * comb(5, 2)  # without ties, chance is one half of all but the value itself
    assert_close(figures.alpha, 1 - 2 * (1 - figures.agreement.share) * (values - 1) / values)
    assert figures.outliers == []


def test_holms_adjustment():
    """0.01 x 3, 0.03 x 2, and 0.04, which may not come before its predecessor."""
    adjusted = _holm({"a": 0.04, "b": 0.01, "c": None, "d": 0.03})
    assert adjusted["c"] is None
    assert_close([adjusted["b"], adjusted["d"], adjusted["a"]], [0.03, 0.06, 0.06])


# -- made-up labelers


@pytest.fixture(scope="module")
def world():
    return ToyWorld(3)


@pytest.fixture(scope="module")
def response_sets(world):
    stream = random.Random(1)
    return [
        (one.prompt, [write_demonstration(world, one, stream) for _ in range(stream.randint(4, 6))])
        for one in islice(world.tasks("train"), 300)
    ]


def rows_of(world, labelers, response_sets):
    return [
        {"prompt": prompt, "responses": texts, "ranks": labeler.rank(world, prompt, texts), "labeler": labeler.id}
        for labeler in labelers
        for prompt, texts in response_sets
    ]


def test_made_up_labelers_come_out_at_their_noise(world, response_sets):
    """Noise that gives simulated labelers the paper's agreement on these responses gives it to others too."""
    sets = [(prompt, list(dict.fromkeys(texts))) for prompt, texts in response_sets]
    sets = [(prompt, texts) for prompt, texts in sets if len(texts) >= 4]
    labelers = make_labelers(world, 4, calibrate_noise(world, sets))
    tasks, unnamed = judged_tasks(rows_of(world, labelers, sets))
    figures = agreement_figures(tasks, unnamed=unnamed)
    assert_close(figures.agreement.share, measure_agreement(world, labelers, sets))
    assert figures.agreement.low < PAPER_AGREEMENT < figures.agreement.high
    assert figures.outliers == []
    assert all(one.change.low < 0 < one.change.high for one in figures.labelers.values())


def test_a_careless_labeler_is_named_and_nobody_else(world, response_sets):
    noise = calibrate_noise(world, response_sets[:100], max_sets=100)
    labelers = [*make_labelers(world, 4, noise), Labeler("careless", 9, 4 * noise)]
    figures = agreement_figures(judged_tasks(rows_of(world, labelers, response_sets[:150]))[0])
    assert figures.outliers == ["careless"]
    assert figures.labelers["careless"].apart.high < 0


def test_a_labeler_who_grows_tired_is_seen(world, response_sets):
    noise = calibrate_noise(world, response_sets[:100], max_sets=100)
    awake, tired = (Labeler("tired", 9, factor * noise) for factor in (1, 8))
    others = make_labelers(world, 3, noise)
    rows = rows_of(world, [*others], response_sets)
    rows += rows_of(world, [awake], response_sets[:150]) + rows_of(world, [tired], response_sets[150:])
    figures = agreement_figures(judged_tasks(rows)[0])
    assert figures.labelers["tired"].change.high < 0
    assert figures.labelers["tired"].by_period[0] > figures.labelers["tired"].by_period[3]


# -- rows and the command


def test_times_decide_what_came_first_and_the_last_ranking_holds():
    row = {"prompt": "p", "responses": ["a", "b"], "labeler": "x"}
    tasks, unnamed = judged_tasks(
        [
            {**row, "ranks": [1, 2], "at": 9.0},
            {**row, "ranks": [2, 1], "at": 3.0},
            {**row, "prompt": "q", "responses": ["b", "a", "b"], "ranks": [1, 2, 3], "at": 5.0},
            {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 2], "labeler": None},
        ]
    )
    assert unnamed == 1
    assert [one.ranks["x"] for one in tasks] == [[1, 2], [1, 2]]
    assert [one.responses for one in tasks] == [["a", "b"], ["b", "a"]]
    with pytest.raises(DataError, match="labeler"):
        judged_tasks([{"prompt": "p", "responses": ["a", "b"], "ranks": [1, 2]}])


def test_the_same_responses_in_another_order_are_the_same_task():
    rows = [
        {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [1, 2, 3], "labeler": "x"},
        {"prompt": "p", "responses": ["c", "a", "b"], "ranks": [3, 1, 2], "labeler": "y"},
    ]
    tasks, _ = judged_tasks(rows)
    assert len(tasks) == 1
    assert agreement_figures(tasks).agreement.share == 1.0


def test_the_command_prints_a_table_and_writes_json_and_a_picture(tmp_path, capsys):
    rows = [
        {"prompt": one.prompt, "responses": one.responses, "ranks": ranks, "labeler": name}
        for one in random_tasks(40, "ab$")
        for name, ranks in one.ranks.items()
    ]
    source = write_rows(tmp_path / "comparisons.jsonl", rows)
    main([str(source), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "agreement.json").read_text(encoding="utf-8"))
    assert f"{found['agreement']['share']:.1%} +- " in said
    assert set(found["labelers"]) == {"a", "b", "$"}
    assert len(found["pairs"]) == comb(3, 2)
    assert found["outliers"] == []
    assert (tmp_path / "out" / "agreement.png").read_bytes().startswith(b"\x89PNG")


def test_a_missing_package_is_told(monkeypatch):
    monkeypatch.setattr(agreement_report.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'lit-instruct\[label\]'"):
        main(["any"])
