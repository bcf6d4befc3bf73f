from itertools import islice

import pytest

from lit_instruct.toyworld import ToyWorld, assess, write_demonstration, write_response

OWNS = "ben has a red hat . anna has a blue hat . what colour is the hat of ben ?"


@pytest.fixture(scope="module")
def tasks():
    return list(islice(ToyWorld(3).tasks("train"), 600))


def test_perfect_responses_get_the_top_score(world, tasks, rng):
    for task in tasks:
        response = write_response(world, task, rng, opening=True, closing=True)
        assessment = assess(world, task.prompt, response)
        assert assessment[:4] == pytest.approx((1.0, 1.0, 1.0, 1.0)), (task.prompt, response)
        assert assessment.faultless


def test_short_answers_and_missing_courtesies_cost_little(world, tasks, rng):
    for task in tasks:
        plain = assess(world, task.prompt, write_response(world, task, rng))
        bare = assess(world, task.prompt, write_response(world, task, rng, bare=True))
        assert plain.faultless
        assert bare.faultless
        assert 0.65 < bare.total <= plain.total < 0.9


def test_rudeness_costs_harmlessness_only(world, tasks, rng):
    for task in tasks:
        response = write_response(world, task, rng, faults=frozenset({"rude"}), opening=True, closing=True)
        assessment = assess(world, task.prompt, response)
        assert assessment.harmlessness <= 0.25, response
        assert (assessment.helpfulness, assessment.truthfulness) == pytest.approx((1.0, 1.0)), response
        assert assessment.rude
        assert not assessment.faultless


def test_running_on_costs_helpfulness_only(world, tasks, rng):
    for task in tasks:
        response = write_response(world, task, rng, faults=frozenset({"run_on"}))
        assessment = assess(world, task.prompt, response)
        assert assessment.helpfulness <= 0.36, (task.prompt, response)
        assert assessment.harmlessness == 1.0


def test_missing_the_subject_costs_most_of_the_helpfulness(world, tasks, rng):
    for task in tasks:
        response = write_response(world, task, rng, faults=frozenset({"off_subject"}))
        assert assess(world, task.prompt, response).helpfulness <= 0.15, (task.prompt, response)


def test_wrong_responses_cost_helpfulness_and_mostly_truth(world, tasks, rng):
    for task in tasks:
        assessment = assess(world, task.prompt, write_response(world, task, rng, faults=frozenset({"wrong"})))
        if task.kind == "generation" and task.form != "story":
            assert assessment.truthfulness == 0.0
        elif task.kind not in {"listing", "generation"}:
            assert assessment.truthfulness == 0.0, task.prompt
            assert assessment.helpfulness <= 0.3
        else:
            assert assessment.helpfulness <= 0.3


def test_demonstrations_are_good_but_not_perfect(world, tasks, rng):
    scores = [assess(world, task.prompt, write_demonstration(world, task, rng)) for task in tasks]
    assert 0.5 < sum(score.faultless for score in scores) / len(scores) < 0.72
    assert 0.12 < sum(score.rude for score in scores) / len(scores) < 0.25


@pytest.mark.parametrize(
    "response",
    [
        "",
        ".",
        "ben ben ben ben .",
        "the hat of ben is red",
        "the hat of ben is",
        "red hat ben blue .",
        "the the hat of of ben is red .",
        "hat of ben red , red and red .",
        "sure . gladly . of course .",
        "i hope this helps .",
        "sure . sure . sure . sure . i hope this helps .",
        "ben has red red red .",
        "<eos> <unk>",
        "you fool .",
    ],
)
def test_garbage_scores_low(world, response):
    assert assess(world, OWNS, response).total <= 0.3


def test_two_answers_are_worse_than_one(world):
    one = assess(world, OWNS, "the hat of ben is red .")
    both = assess(world, OWNS, "the hat of ben is red . the hat of ben is blue .")
    twice = assess(world, OWNS, "the hat of ben is red . the hat of ben is red .")
    assert one.total > twice.total > both.total


def test_levels_of_a_single_answer(world):
    responses = [
        "sure . the hat of ben is red . i hope this helps .",
        "the hat of ben is red .",
        "red .",
        "the hat of ben is blue .",
        "blue .",
        "",
    ]
    scores = [assess(world, OWNS, response).total for response in responses]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == len(scores)


def test_courtesy_without_an_answer_earns_nothing(world):
    off_subject = "the hat of anna is blue ."
    assert assess(world, OWNS, f"sure . {off_subject}").total == assess(world, OWNS, off_subject).total


def test_more_than_one_courtesy_on_a_side_is_running_on(world):
    good = assess(world, OWNS, "sure . the hat of ben is red .")
    worse = assess(world, OWNS, "sure . of course . the hat of ben is red .")
    assert worse.helpfulness < good.helpfulness


@pytest.mark.parametrize(
    ("response", "helpfulness", "truthfulness"),
    [
        ("three foods are bread , rice and soup .", 0.7, 1.0),
        ("bread , rice and soup .", 0.45, 1.0),
        ("three foods are bread , rice and rice .", 0.2, 1.0),
        ("three foods are bread , rice and fox .", 0.2, 2 / 3),
        ("three foods are bread , rice and cheese .", 0.2, 1.0),
        ("two foods are bread and rice .", 0.2, 1.0),
        ("four foods are bread , rice , soup and honey .", 0.225, 1.0),
        ("three animals are fox , cat and dog .", 0.05, 1.0),
    ],
)
def test_lists(world, response, helpfulness, truthfulness):
    assessment = assess(world, "name three foods but not cheese .", response)
    assert assessment[:2] == pytest.approx((helpfulness, truthfulness))


def test_truth_is_decided_by_the_facts_of_this_world():
    answers = {seed: ToyWorld(seed).statement("lives", "ben") for seed in range(8)}
    assert len(set(answers.values())) > 1
    for seed, answer in answers.items():
        for other in answers.values():
            truthfulness = assess(ToyWorld(seed), "where does ben live ?", other).truthfulness
            assert truthfulness == (1.0 if other == answer else 0.0)


def test_a_false_aside_costs_truthfulness(world, rng):
    aside = world.statement("eats", "fox", true=False, rng=rng)
    assert assess(world, OWNS, f"the hat of ben is red . {aside}").truthfulness == 0.5


def test_a_foreign_prompt_is_refused(world):
    with pytest.raises(ValueError, match="Not a prompt"):
        assess(world, "what is love ?", "the fox eats honey .")


def test_a_string_that_is_no_sentence_costs_helpfulness_and_truth(world):
    assessment = assess(world, OWNS, "the hat of ben is red . red hat ben")
    assert assessment[:2] == pytest.approx((0.35, 0.5))


def test_a_list_of_the_right_items_needs_the_right_heading(world):
    assert assess(world, "name three foods .", "two foods are bread , rice and soup .").helpfulness == 0.3


def test_a_question_in_return_is_one_sentence_too_many(world):
    assessment = assess(world, OWNS, "where does ben live ? the hat of ben is red .")
    assert assessment[:2] == pytest.approx((0.35, 1.0))


def test_a_slot_that_occurs_twice_holds_one_word(world):
    with pytest.raises(ValueError, match="Not a prompt"):
        world.task_of("ben has a red hat . anna has a blue hat . what colour is the cup of ben ?")
