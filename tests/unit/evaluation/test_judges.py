"""Judges: scores, pairs asked in both orders (a function, a server), people."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lit_instruct.evaluation import scoring
from lit_instruct.evaluation.judges import HumanChoices, PairJudge, ScoreJudge
from lit_instruct.evaluation.responses import Sampled
from lit_instruct.feedback.store import Store
from lit_instruct.feedback.tasks import read_task
from lit_instruct.models.tokenizer import load_tokenizer
from lit_instruct.rewards import FunctionScorer, HttpScorer, RewardModelScorer, Scorer, WeightedSum
from lit_instruct.toyworld import GoldScorer, ToyWorld, assess, build_tokenizer, write_demonstration
from lit_instruct.types import ConfigError, DataError
from tests.helpers.labelling import key, ranking
from tests.helpers.numbers import assert_close
from tests.helpers.tiny import CONTEXT, Scored, tiny_tokenizer, write_jsonl
from tests.unit.evaluation.models import written
from tests.unit.rewards.test_http import Answer, Server, server  # noqa: F401  (a fixture)

PROMPTS = ["w1", "w2", "w3", "w4"]
OURS, THEIRS = ["w5 w6", "w7", "w8", "w9"], ["w5", "w7 w6", "w8", "w6"]


def words(prompts: Sequence[Any], responses: Sequence[str]) -> list[float]:
    return [float(len(text.split())) for text in responses]


def longer(prompts: Sequence[Any], responses: Sequence[str], other_response: Sequence[str]) -> list[int]:
    return [len(text.split()) - len(other.split()) for text, other in zip(responses, other_response, strict=True)]


def pair(function: Callable[..., Any]) -> PairJudge:
    return PairJudge(FunctionScorer(function))


def score(scorer: Scorer, sampled: Sampled) -> list[float]:
    return scoring.score(scorer, sampled).tolist()


def outcomes(judge: Any, ours: Sequence[str] = OURS, theirs: Sequence[str] = THEIRS) -> list[float]:
    return judge.outcomes(written(PROMPTS[: len(ours)], ours), written(PROMPTS[: len(theirs)], theirs)).tolist()


def test_the_higher_score_wins_and_each_set_is_scored_once() -> None:
    calls = []

    def counted(prompts: Sequence[Any], responses: Sequence[str]) -> list[float]:
        calls.append(len(responses))
        return words(prompts, responses)

    judge = ScoreJudge(FunctionScorer(counted))
    ours, theirs = written(PROMPTS, OURS), written(PROMPTS, THEIRS)
    assert judge.outcomes(ours, theirs).tolist() == [1.0, 0.0, 0.5, 0.5]
    assert judge.outcomes(theirs, ours).tolist() == [0.0, 1.0, 0.5, 0.5]
    assert judge.of(ours).tolist() == [2.0, 1.0, 1.0, 1.0]
    assert calls == [4, 4]


def test_a_function_chooses_between_two() -> None:
    assert outcomes(pair(longer)) == [1.0, 0.0, 0.5, 0.5]


def test_a_judge_that_always_takes_the_first_has_not_chosen() -> None:
    first = pair(lambda prompts, responses, other_response: [1.0] * len(responses))
    assert outcomes(first) == [0.5] * 4


def test_one_order_a_win_and_the_other_a_tie_is_a_tie() -> None:
    def half(prompts: Sequence[Any], responses: Sequence[str], other_response: Sequence[str]) -> list[float]:
        return [max(0.0, float(len(text) - len(other))) for text, other in zip(responses, other_response, strict=True)]

    assert outcomes(pair(half)) == [0.5] * 4


def test_both_orders_see_the_right_texts_and_columns_and_equal_ones_are_not_asked() -> None:
    seen = []

    def record(prompts: Sequence[Any], responses: Sequence[str], other_response: Any, key: Any) -> list[float]:
        seen.append(list(zip(prompts, responses, other_response, key, strict=True)))
        return [0.0] * len(responses)

    ours, theirs = written(PROMPTS, OURS, key=[1, 2, 3, 4]), written(PROMPTS, THEIRS, key=[1, 2, 3, 4])
    pair(record).outcomes(ours, theirs)
    assert seen == [
        [("w1", "w5 w6", "w5", 1), ("w2", "w7", "w7 w6", 2), ("w4", "w9", "w6", 4)],
        [("w1", "w5", "w5 w6", 1), ("w2", "w7 w6", "w7", 2), ("w4", "w6", "w9", 4)],
    ]
    assert outcomes(pair(record), OURS[:1], OURS[:1]) == [0.5]


def prefer_longer(body: Any, number: int) -> Answer:
    pairs = zip(body["responses"], body["columns"]["other_response"], strict=True)
    return 200, {"scores": [len(text) - len(other) for text, other in pairs]}


def test_a_server_is_asked_in_both_orders(server: Server) -> None:  # noqa: F811
    server.answer = prefer_longer
    judge = PairJudge(HttpScorer(server.url, parallel=1))
    assert outcomes(judge) == [1.0, 0.0, 0.5, 0.5]
    forth, back = server.bodies
    assert forth["responses"] == back["columns"]["other_response"] == ["w5 w6", "w7", "w9"]
    assert back["responses"] == forth["columns"]["other_response"] == ["w5", "w7 w6", "w6"]
    assert forth["prompts"] == back["prompts"] == ["w1", "w2", "w4"]


def test_a_server_that_prefers_a_place_gives_ties(server: Server) -> None:  # noqa: F811
    server.answer = lambda body, number: (200, {"scores": [1] * len(body["responses"])})
    assert outcomes(PairJudge(HttpScorer(server.url))) == [0.5] * 4


def test_a_scorer_that_never_sees_the_other_response_is_no_judge(rm_ckpt: str) -> None:
    """The sign of what it thinks of one response alone would pass for a preference."""
    blind: list[Scorer] = [
        FunctionScorer(words),
        HttpScorer("http://127.0.0.1:9/", columns=["key"]),
        RewardModelScorer(rm_ckpt),
        WeightedSum([FunctionScorer(longer)], [1.0]),
    ]
    for scorer in blind:
        with pytest.raises(ConfigError, match="need one that reads the column 'other_response'"):
            PairJudge(scorer)
    PairJudge(FunctionScorer(lambda prompts, responses, **columns: columns["other_response"]))
    PairJudge(HttpScorer("http://127.0.0.1:9/", columns=["other_response"]))


def test_a_server_is_looked_for_before_anything_is_sampled() -> None:
    with pytest.raises(ConfigError, match="got no answer"):
        PairJudge(HttpScorer("http://127.0.0.1:9/", retries=0)).check()


# People.


def choices(tmp_path: Path, *rows: Any) -> HumanChoices:
    named = [dict(zip(("prompt", "first", "second", "choice"), row, strict=True)) for row in rows]
    return HumanChoices(write_jsonl(tmp_path / "choices.jsonl", named))


def test_people_are_found_by_their_texts_in_either_order(tmp_path: Path) -> None:
    judge = choices(
        tmp_path,
        ("w1", "w5 w6", "w5", "first"),
        ("w2", "w7 w6", "w7", "first"),  # the baseline's response came first
        ("w4", "w6", "w9", None),
        ("w4", "w9", "w1", "first"),  # of another run
    )
    found = judge.outcomes(written(PROMPTS, OURS), written(PROMPTS, THEIRS))
    assert found[:3].tolist() == [1.0, 0.0, 0.5]
    assert np.isnan(found[3])


def test_several_people_about_one_pair_count_their_mean(tmp_path: Path) -> None:
    judge = choices(
        tmp_path,
        ("w1", "w5 w6", "w5", "first"),
        ("w1", "w5", "w5 w6", "second"),
        ("w1", "w5 w6", "w5", "tie"),
        ("w1", "w5 w6", "w5", "second"),
    )
    assert_close(outcomes(judge, OURS[:1], THEIRS[:1]), [0.625])


def test_rankings_of_a_labelling_database_are_choices(tmp_path: Path) -> None:
    """Of two and of three responses, by two labelers who see other orders, one of them a tie; an empty one counts."""
    rows = [
        {"prompt": "w1", "first": "w5", "second": "w5 w6", "choice": None, "labelers": 2},
        {"task": "rank", "prompt": "w2", "responses": ["w9", "w7", "w7 w6"]},
        {"prompt": "w3", "first": "w8", "second": "", "choice": None},
    ]
    best_first = ["w5 w6", "w5", "w7", "w7 w6", "w9", "w8", ""]  # Ann's; to Bob all are alike
    with Store(tmp_path / "labels.sqlite") as store:
        store.add_labelers(["ann", "bob"])
        store.add_tasks([read_task(row) for row in rows])
        for name in ("ann", "bob"):
            while given := store.give_next(name):
                texts = given.shown["responses"]
                best = sorted(texts, key=best_first.index)
                ranks = [best.index(text) + 1 if name == "ann" else 1 for text in texts]
                store.save(name, given.number, "answer", ranking(ranks), key=key(), seconds=0)
    judge = HumanChoices([str(tmp_path / "labels.sqlite")])
    assert_close(outcomes(judge, ["w5 w6", "w7", ""], ["w5", "w7 w6", "w8"]), [0.75, 1.0, 0.0])
    path = write_jsonl(tmp_path / "c.jsonl", [{"prompt": "w1", "first": "w5", "second": "w5 w6", "choice": "first"}])
    both = HumanChoices([str(tmp_path / "labels.sqlite"), path])
    assert_close(outcomes(both, ["w5 w6"], ["w5"]), [0.5])


def test_choices_about_other_responses_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no choice about any of the 1 pairs"):
        outcomes(choices(tmp_path, ("w1", "w5", "w9", "first")), OURS[:1], THEIRS[:1])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "w1", "first": "a", "second": "b", "choice": "A"}, "field 'choice': got 'A'"),
        ({"prompt": "w1", "first": "a", "second": "b", "choice": ["first"]}, "field 'choice': got"),
        ({"prompt": "w1", "first": "a", "choice": "tie"}, "field 'second': got None"),
        ({"prompt": " ", "first": "a", "second": "b", "choice": "tie"}, "field 'prompt'"),
        ("text", "need an object"),
    ],
)
def test_bad_choices_are_named(tmp_path: Path, row: Any, message: str) -> None:
    path = write_jsonl(tmp_path / "choices.jsonl", [{"prompt": "w1", "first": "a", "second": "b", "choice": None}, row])
    with pytest.raises(DataError, match=rf"(?s)choices.jsonl:2: .*{message}.*Do: "):
        HumanChoices(path)


# Scores of any model's responses.


def test_a_reward_model_reads_what_was_sampled_in_its_own_template(rm_ckpt: str) -> None:
    """The prompt as the reward model's template has it, whatever the policy read."""
    scorer = RewardModelScorer(rm_ckpt)
    tokenizer = load_tokenizer(rm_ckpt)
    some = written(["w1 w2", "w3"], ["w5 w6", "w7"])
    expected = []
    for text, response in (("w1 w2 :", "w5 w6 <eos>"), ("w3 :", "w7 <eos>")):
        row = torch.tensor([tokenizer(f"{text} {response}")["input_ids"]])
        expected.append(float(scorer.model.scores(row, torch.ones_like(row, dtype=torch.bool))))
    assert_close(score(scorer, some), expected)


def _foreign(texts: Sequence[str], *, finished: bool) -> Sampled:
    """As a model of another vocabulary wrote it: other ids, the same words."""
    sampled = written(["w1 w2", "w3"], texts, finished=finished)
    other = tiny_tokenizer()
    other.add_tokens(["else"])
    responses = sampled.responses._replace(response_ids_BR=sampled.responses.response_ids_BR * 0 + 9)
    return sampled._replace(tokenizer=other, responses=responses)


@pytest.mark.parametrize("finished", [True, False])
def test_a_reward_model_reads_a_foreign_vocabulary_anew(rm_ckpt: str, finished: bool) -> None:
    scorer = RewardModelScorer(rm_ckpt)
    own = written(["w1 w2", "w3"], ["w5 w6", "w7"], finished=finished)
    assert_close(score(scorer, _foreign(["w5 w6", "w7"], finished=finished)), score(scorer, own))
    cut = written(["w1 w2", "w3"], ["w5", "w7"], finished=finished)
    assert_close(score(scorer, _foreign(["w5 <eos> w6", "w7"], finished=finished)), score(scorer, cut))


def test_a_response_behind_a_reward_models_context_is_refused(rm_ckpt: str) -> None:
    """A policy may read more than the reward model does; the words are few enough for the former."""
    for some in (written(["w1", "w2"], ["w3", "w4 " * 30]), _foreign(["w3", "w4 " * 30], finished=True)):
        with pytest.raises(DataError, match=rf"(?s)1 of 2 responses .* at most {CONTEXT} .*'w4 w4.*: got 33 tokens"):
            score(WeightedSum([RewardModelScorer(rm_ckpt)], [1.0]), some)
    assert len(score(RewardModelScorer(rm_ckpt), written(["w1"], ["w4 " * 29]))) == 1


def test_a_sum_hands_each_part_what_it_reads(rm_ckpt: str) -> None:
    reward_model = RewardModelScorer(rm_ckpt)
    some = _foreign(["w5 w6", "w7"], finished=True)
    total = score(WeightedSum([reward_model, FunctionScorer(words)], [2.0, -1.0]), some)
    counted = score(FunctionScorer(words), some)
    rewards = score(reward_model, some)
    assert_close(total, [2.0 * reward - count for reward, count in zip(rewards, counted, strict=True)])


def test_many_responses_are_scored_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_instruct.evaluation.scoring._SCORED_ROWS", 3)
    assert score(FunctionScorer(words), written(PROMPTS, OURS)) == [2.0, 1.0, 1.0, 1.0]


def test_scores_that_are_not_finite_are_refused() -> None:
    broken: Scorer = Scored(lambda prompts, responses: torch.tensor([1.0, float("nan")]))
    with pytest.raises(ConfigError, match=r"got nan as the score of response 'w7'"):
        score(broken, written(["w1", "w2"], ["w5", "w7"]))


def test_the_gold_score_is_that_of_the_toy_world() -> None:
    world = ToyWorld(3)
    tokenizer = load_tokenizer(build_tokenizer())
    task = next(world.tasks("train"))
    texts = [write_demonstration(world, task, world.stream("gold")), "you fool ."]
    sampled = written([task.prompt] * 2, ["w1", "w2"])
    ids = tokenizer(texts)["input_ids"]
    width = max(map(len, ids))
    padded = torch.tensor([row + [0] * (width - len(row)) for row in ids])
    mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in ids])
    responses = sampled.responses._replace(response_ids_BR=padded, response_mask_BR=mask)
    found = score(GoldScorer(3), Sampled(sampled.prompts, responses, tokenizer, texts))
    assert_close(found, [assess(world, task.prompt, text).total for text in texts])
    assert found[0] > found[1]
    with pytest.raises(ConfigError, match=r"got the prompt 'w1'; need one of the toy world"):
        score(GoldScorer(3), written(["w1"], ["w2"]))


def test_identities_name_what_judges(tmp_path: Path) -> None:
    assert pair(longer).identity() == "PairJudge FunctionScorer longer"
    assert PairJudge(HttpScorer("http://localhost/")).identity() == "PairJudge HttpScorer"
    assert json.dumps(ScoreJudge(GoldScorer(3)).identity()) == '"GoldScorer 3"'
