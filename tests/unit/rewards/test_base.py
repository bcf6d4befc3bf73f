"""What all sources of scores share: words out of ids, scores out of anything, sums, and that they never learn."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lit_instruct import PPOModule, PromptDataModule
from lit_instruct.rewards import FunctionScorer, RewardModelScorer, Scorer, WeightedSum
from lit_instruct.rewards.base import Texts, as_scores, texts_of
from lit_instruct.types import ConfigError, PromptBatch, Responses
from tests.helpers.numbers import assert_close
from tests.helpers.tiny import TEMPLATE, quiet_trainer, tiny_tokenizer
from tests.helpers.tiny import prompts as write_prompts
from tests.unit.models.networks import ragged_batch, ragged_rows, scalars_alone, tiny_scalar_model
from tests.unit.rewards.batches import TOKENIZER, batch_of

CHAT = [{"role": "system", "content": "w9"}, {"role": "user", "content": "w1"}]


class Constant(Scorer):
    """Gives every response one number, and keeps the tokenizer that it was checked with."""

    def __init__(self, value: float):
        super().__init__()
        self.value = value
        self.noise = nn.Dropout(0.9)
        self.checked: list[Any] = []

    def forward(self, prompts: PromptBatch, responses: Responses, *, tokenizer: Any) -> Tensor:
        assert tokenizer is TOKENIZER
        return self.noise(torch.full((len(responses.finished_B),), self.value, dtype=torch.float64))

    def check(self, tokenizer: Any) -> None:
        self.checked.append(tokenizer)


def test_texts_are_what_the_data_had_and_what_was_written() -> None:
    prompts, responses = batch_of(["w1 w2", CHAT], ["w3 w4", "w5."], {"key": [7, None]})
    texts = texts_of(prompts, responses, TOKENIZER)
    assert texts == Texts(["w1 w2", CHAT], ["w3 w4", "w5"], {"key": [7, None]})


def test_a_column_that_some_rows_lack_is_none_there() -> None:
    prompts, responses = batch_of(["w1", "w2"], ["w3", "w4"])
    prompts.rows[1]["late"] = 3
    assert texts_of(prompts, responses, TOKENIZER).columns == {"late": [None, 3]}


@pytest.mark.parametrize("rows", [(), [{"prompt": "w1"}]])
def test_prompts_without_their_rows_have_no_text(rows: Any) -> None:
    prompts, responses = batch_of(["w1", "w2"], ["w3", "w4"])
    with pytest.raises(ConfigError, match=rf"got {len(rows)} rows for 2 prompts.*PromptDataModule"):
        texts_of(prompts._replace(rows=rows), responses, TOKENIZER)


TEXTS = Texts(["first", "second"], ["one", "two"], {})


@pytest.mark.parametrize(
    "values",
    [
        [0.5, -2],
        (0.5, -2),
        np.array([0.5, -2.0]),
        torch.tensor([0.5, -2.0], dtype=torch.bfloat16),
        [np.float32(0.5), np.int64(-2)],
        [torch.tensor(0.5), torch.tensor(-2.0)],
    ],
)
def test_numbers_of_any_kind_are_scores(values: Any) -> None:
    scores = as_scores(values, source="it", texts=TEXTS, device=torch.device("cpu"))
    assert scores.dtype == torch.float32
    assert_close(scores, [0.5, -2.0])


def test_true_is_one() -> None:
    scores = as_scores([True, np.bool_(False)], source="it", texts=TEXTS, device=torch.device("cpu"))
    assert_close(scores, [1.0, 0.0])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (0.5, "it: got a float; need a list of 2 numbers"),
        (None, "it: got a NoneType; need a list"),
        ("12", "it: got a str; need a list"),
        ([1.0], "it: got 1 scores for 2 responses"),
        ([1.0, 2.0, 3.0], "it: got 3 scores for 2 responses"),
        ([1.0, math.nan], "it: got nan as the score of response 'two' to the prompt 'second'; need a finite number"),
        ([math.inf, 1.0], "it: got inf as the score of response 'one' to the prompt 'first'"),
        ([1.0, 1e39], "it: got 1e.39 as the score"),
        ([1.0, "2"], "it: got '2' as the score"),
        ([1.0, None], "it: got None as the score"),
        ([[1.0], [2.0]], r"it: got \[1.0\] as the score"),
        (np.ones((2, 1)), r"it: got \[1.0\] as the score"),
    ],
)
def test_anything_else_is_refused_with_the_row(values: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        as_scores(values, source="it", texts=TEXTS, device=torch.device("cpu"))


def test_long_texts_are_shortened_in_errors() -> None:
    texts = Texts(["p" * 500], ["r" * 500], {})
    with pytest.raises(ConfigError) as caught:
        as_scores([math.nan], source="it", texts=texts, device=torch.device("cpu"))
    assert len(str(caught.value)) < 300


def test_a_sum_weighs_its_parts_and_checks_them_all() -> None:
    parts = [Constant(2.0), Constant(3.0), Constant(1.0)]
    both = WeightedSum([parts[0], WeightedSum([parts[1], parts[2]], [10.0, -1.0])], [0.5, 0.1])
    prompts, responses = batch_of(["w1", "w2"], ["w3", "w4"])
    scores = both(prompts, responses, tokenizer=TOKENIZER)
    assert scores.dtype == torch.float32
    assert_close(scores, [0.5 * 2 + 0.1 * (30 - 1)] * 2)
    both.check(TOKENIZER)
    assert [part.checked for part in parts] == [[TOKENIZER]] * 3


@pytest.mark.parametrize(
    ("scorers", "weights", "message"),
    [
        ([], [], "got 0 scorers and 0 weights"),
        ([Constant(1.0)], [1.0, 2.0], "got 1 scorers and 2 weights"),
        ([Constant(1.0)], [math.nan], "weights: got nan"),
    ],
)
def test_a_sum_of_the_wrong_size_is_refused(scorers: Any, weights: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WeightedSum(scorers, weights)


def test_a_scorer_stays_in_eval_mode() -> None:
    scorer = WeightedSum([Constant(2.0)], [1.0])
    holder = nn.ModuleList([scorer, nn.Dropout(0.5)])
    holder.train()
    assert holder[1].training
    assert not any(module.training for module in scorer.modules())
    prompts, responses = batch_of(["w1"] * 20, ["w3"] * 20)
    assert_close(scorer(prompts, responses, tokenizer=TOKENIZER), [2.0] * 20)


@pytest.mark.parametrize("batch_rows", [1, 3, 64])
def test_a_reward_model_is_read_at_the_last_token(batch_rows: int) -> None:
    model = tiny_scalar_model("gpt2").train().requires_grad_(True)
    scorer = RewardModelScorer(model, batch_rows=batch_rows)
    scores = scorer(*ragged_batch())  # no text, no tokenizer
    alone = [scalars_alone(model, prompt + response)[-1] for prompt, response in zip(*ragged_rows(), strict=True)]
    assert_close(scores, torch.stack(alone), scale=5)
    assert not scores.requires_grad
    assert not any(parameter.requires_grad for parameter in scorer.parameters())
    assert not model.training
    scorer.check(TOKENIZER)  # a loaded model is taken as it is


def test_a_reward_model_comes_from_its_checkpoint(rm_ckpt: str, sft_ckpt: str, base: str) -> None:
    scorer = RewardModelScorer(rm_ckpt)
    scorer.check(TOKENIZER)
    prompts, responses = batch_of(["w1 w2", "w3"], ["w4 w5", "w6"])
    row = torch.cat([prompts.prompt_ids_BP[1][prompts.prompt_mask_BP[1]], responses.response_ids_BR[1, :2]])
    assert_close(scorer(prompts, responses)[1], scalars_alone(scorer.model, row.tolist())[-1], scale=5)
    assert_close(scorer.model.score_bias, 0.7)
    for wrong, words in ((sft_ckpt, "comes from the stage 'sft'"), (base, "need the .ckpt of a reward stage")):
        with pytest.raises(ConfigError, match=words):
            RewardModelScorer(wrong)
    with pytest.raises(ConfigError, match="batch_rows: got 0"):
        RewardModelScorer(rm_ckpt, batch_rows=0)


def test_a_reward_model_with_another_template_is_refused(rm_ckpt: str) -> None:
    with pytest.raises(ConfigError, match="another tokenizer or template"):
        RewardModelScorer(rm_ckpt).check(tiny_tokenizer(template=TEMPLATE + " "))
    larger = tiny_tokenizer()
    larger.add_tokens(["w99"])
    with pytest.raises(ConfigError, match="another tokenizer or template"):
        RewardModelScorer(rm_ckpt).check(larger)


def test_scores_carry_no_gradient() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    scorer = FunctionScorer(lambda prompts, responses: weight * 2)
    scores = scorer(*batch_of(["w1", "w2"], ["w3", "w4"]), tokenizer=TOKENIZER)
    assert_close(scores, [2.0, 4.0])
    assert not scores.requires_grad


def test_every_part_of_a_sum_names_the_columns_that_it_misses() -> None:
    both = WeightedSum([Constant(1.0), FunctionScorer(answered)], [1.0, 1.0])
    both.check_columns(["answer"])
    with pytest.raises(ConfigError, match=r"needs 'answer', and the data have no such column \(found: 'key'\)"):
        both.check_columns(["key"])


def answered(prompts: Any, responses: Any, answer: Any) -> list[float]:
    return [0.0 for _ in responses]


def long(prompts: Any, responses: Any) -> list[float]:
    return [float(len(response)) for response in responses]


def short(prompts: Any, responses: Any) -> list[float]:
    return [-score for score in long(prompts, responses)]


def test_what_makes_the_scores_is_part_of_the_identity(sft_ckpt: str, rm_ckpt: str, folder: Path) -> None:
    """A run must not go on towards another goal, also where no weight tells."""
    sources = [
        FunctionScorer(long),
        FunctionScorer(short),
        WeightedSum([FunctionScorer(long)], [1.0]),
        WeightedSum([FunctionScorer(long)], [-1.0]),
        WeightedSum([FunctionScorer(short)], [1.0]),
    ]
    identities = [source.identity() for source in sources]
    assert len(set(identities)) == len(identities)
    assert FunctionScorer(long).identity() == identities[0]

    def module(reward: Scorer) -> PPOModule:
        sizes = {"episodes": 4, "minibatch_size": 4, "max_response_tokens": 5, "warmup_iterations": 0}
        return PPOModule(sft_ckpt, reward=reward, **sizes)

    first = module(WeightedSum([FunctionScorer(long)], [1.0]))
    data = PromptDataModule(write_prompts(folder / "p.jsonl", 4), first.tokenizer, batch_size=4, val=0.0)
    run = quiet_trainer(max_epochs=-1)
    run.fit(first, datamodule=data)
    run.save_checkpoint(folder / "ppo.ckpt")
    other = module(WeightedSum([FunctionScorer(long)], [-1.0]))
    with pytest.raises(ConfigError, match="reward: it is not the one that this run began with"):
        quiet_trainer(max_epochs=-1).fit(other, datamodule=data, ckpt_path=folder / "ppo.ckpt")
    same = module(WeightedSum([FunctionScorer(long)], [1.0]))
    quiet_trainer(max_epochs=-1).fit(same, datamodule=data, ckpt_path=folder / "ppo.ckpt")
