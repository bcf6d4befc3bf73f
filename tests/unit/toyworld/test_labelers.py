import random
from itertools import islice

import pytest

from lit_instruct.toyworld import (
    ToyWorld,
    calibrate_noise,
    make_labelers,
    measure_agreement,
    write_demonstration,
)
from lit_instruct.toyworld.labelers import ranks_of


@pytest.fixture(scope="module")
def response_sets():
    world, rng = ToyWorld(3), random.Random(1)
    return [
        (task.prompt, [write_demonstration(world, task, rng) for _ in range(rng.randint(4, 9))])
        for task in islice(world.tasks("train"), 400)
    ]


def test_calibrated_labelers_agree_as_the_papers_did(world, response_sets):
    noise = calibrate_noise(world, response_sets[:200])
    labelers = make_labelers(world, 4, noise)
    assert 0.70 < measure_agreement(world, labelers, response_sets[200:]) < 0.75


def test_more_noise_means_less_agreement(world, response_sets):
    agreement = [measure_agreement(world, make_labelers(world, 3, noise), response_sets) for noise in (0.0, 0.1, 0.4)]
    assert agreement[0] == 1.0
    assert agreement[0] > agreement[1] > agreement[2] > 0.5


def test_calibration_is_deterministic_and_follows_the_target(world, response_sets):
    sets = response_sets[:60]
    noise = calibrate_noise(world, sets, seed=4)
    assert calibrate_noise(world, sets, seed=4) == noise
    assert calibrate_noise(world, sets, target=0.85, seed=4) < noise


def test_an_impossible_target_is_refused(world, response_sets):
    with pytest.raises(ValueError, match="No noise gives"):
        calibrate_noise(world, response_sets[:10], target=0.3)


def test_rankings_are_valid_and_have_ties(world, response_sets):
    labeler = make_labelers(world, 1, 0.15)[0]
    rankings = [labeler.rank(world, prompt, responses) for prompt, responses in response_sets]
    for ranks, (_, responses) in zip(rankings, response_sets, strict=True):
        assert len(ranks) == len(responses)
        assert set(ranks) == set(range(1, max(ranks) + 1))
    assert any(len(set(ranks)) < len(ranks) for ranks in rankings)
    assert sum(len(set(ranks)) > 1 for ranks in rankings) > 0.9 * len(rankings)


def test_a_text_that_occurs_twice_ties_with_itself(world):
    labeler = make_labelers(world, 1, 0.5)[0]
    ranks = labeler.rank(world, "name two foods .", ["bread .", "two foods are rice and cake .", "bread .", ""])
    assert ranks[0] == ranks[2]


def test_labelers_differ_and_repeat_themselves(world, response_sets):
    first, second = make_labelers(world, 2, 0.3)
    assert first.id != second.id
    prompt, responses = response_sets[0]
    assert first.utilities(world, prompt, responses) == first.utilities(world, prompt, responses)
    assert first.utilities(world, prompt, responses) != second.utilities(world, prompt, responses)


@pytest.mark.parametrize("count", [3, 10])
def test_a_labeler_ranks_four_to_nine(world, count):
    with pytest.raises(ValueError, match=f"Got {count} responses"):
        make_labelers(world, 1, 0.1)[0].rank(world, "name two foods .", ["bread ."] * count)


def test_ranks_of_close_utilities_are_tied():
    assert ranks_of([0.5, 0.9, 0.48, 0.1, 0.88], 0.05) == [2, 1, 2, 3, 1]
    assert ranks_of([0.0, 0.04, 0.08], 0.05) == [2, 1, 1]


def test_agreement_needs_a_strict_pair(world):
    same = [("name two foods .", ["bread ."] * 4)]
    with pytest.raises(ValueError, match="not defined"):
        measure_agreement(world, make_labelers(world, 2, 0.1), same)
