"""``lit_instruct.rollouts``: collect on tiny networks, assess and describe by hand, minibatches dealt out."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
import torch

from lit_instruct.functional import merge_moments
from lit_instruct.models.generation import Finished, sample_responses
from lit_instruct.models.packing import enable_packing
from lit_instruct.rewards import RewardModelScorer
from lit_instruct.rollouts import BehaviourGap, assess, collect, describe, minibatches, passes, select
from lit_instruct.types import ConfigError, Experience, NonFiniteError, Responses, Rollout
from tests.helpers.numbers import assert_close
from tests.unit.models.networks import (
    left_padded,
    logits_alone,
    ragged_batch,
    ragged_rows,
    scalars_alone,
    tiny_model,
    tiny_scalar_model,
    tokens,
)

SETTINGS = {"temperature": 0.7, "missing_eos": "replace", "missing_eos_value": -1.0, "micro_batch_size": 2}


def at_once(responses):
    return [Finished(list(range(len(responses.finished_B))), responses, None)]


def gather(policy, reference, value_model, reward_model, prompts, responses, blocks=None, **changes):
    return collect(
        prompts,
        at_once(responses) if blocks is None else blocks,
        policy=policy,
        reference=reference,
        value_model=value_model,
        scorer=RewardModelScorer(reward_model),
        **SETTINGS | changes,
    )


@pytest.fixture(scope="module")
def networks():
    return tiny_model("gpt2"), tiny_model("gpt2", seed=8), tiny_scalar_model("gpt2"), tiny_scalar_model("gpt2", seed=6)


def test_collect_against_one_row_at_a_time(networks):
    policy, reference, value_model, reward_model = networks
    prompts, responses = ragged_batch()
    rollout = gather(*networks, prompts, responses)
    for index, (prompt, response) in enumerate(zip(*ragged_rows(), strict=True)):
        row, length = prompt + response, len(response)
        places = range(len(prompt) - 1, len(row) - 1)
        for model, got in ((policy, rollout.old_logprobs_BR), (reference, rollout.reference_logprobs_BR)):
            table = torch.log_softmax(logits_alone(model, row) / 0.7, dim=-1)
            need = [table[place, row[place + 1]].item() for place in places]
            assert_close(got[index, :length], need, scale=5)  # two layers of other kernel shapes
            assert not got[index, length:].any()
        assert_close(rollout.old_values_BR[index, :length], scalars_alone(value_model, row)[list(places)], scale=5)
        assert not rollout.old_values_BR[index, length:].any()
        assert_close(rollout.raw_scores_B[index], scalars_alone(reward_model, row)[-1], scale=5)
    assert rollout.finished_B.tolist() == [True, False, True, True, True]
    assert rollout.scores_B[1] == -1.0
    assert torch.equal(rollout.scores_B[rollout.finished_B], rollout.raw_scores_B[rollout.finished_B])


def test_a_rollout_has_no_gradient_and_is_fp32(networks):
    rollout = gather(*networks, *ragged_batch())
    for name, tensor in rollout._asdict().items():
        assert not tensor.requires_grad, name
        if tensor.is_floating_point():
            assert tensor.dtype == torch.float32, name
    assert networks[0].lm_head.weight.requires_grad  # frozen by the call, not for good


@pytest.mark.parametrize("micro_batch_size", [1, 3, 64])
def test_micro_batches_change_nothing(networks, micro_batch_size):
    got = gather(*networks, *ragged_batch(), micro_batch_size=micro_batch_size)
    for mine, theirs in zip(got, gather(*networks, *ragged_batch(), micro_batch_size=2), strict=True):
        assert mine.dtype == theirs.dtype
        assert_close(mine, theirs)


@pytest.mark.parametrize(("rule", "score"), [("none", 0.0), ("replace", -2.0), ("subtract", -2.0)])
def test_rule_for_a_missing_end_of_text(networks, rule, score):
    rollout = gather(*networks, *ragged_batch(), missing_eos=rule, missing_eos_value=-2.0)
    raw = rollout.raw_scores_B[1].item()
    assert_close(rollout.scores_B[1], score if rule == "replace" else raw + score)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_no_divergence_from_oneself(family):
    """Policy and reference alike, responses sampled by the policy: the KL at iteration 0 is 0."""
    policy, reference, value_model = tiny_model(family), tiny_model(family), tiny_scalar_model(family)
    prompts = left_padded(ragged_rows()[0])
    responses = sample_responses(policy, prompts, max_tokens=8, eos_ids=range(3, 11), pad_id=0, temperature=0.7)
    rollout = gather(policy, reference, value_model, tiny_scalar_model(family), prompts, responses)
    assert torch.equal(rollout.old_logprobs_BR, rollout.reference_logprobs_BR)
    metrics = describe(assess(rollout, kl_coef=0.1, discount=1.0, gae_lambda=0.95), kl_coef=0.1)
    for name in ("kl", "non_score_reward"):
        assert_close(metrics[f"objective/{name}"], 0.0)
    assert_close(metrics["objective/rlhf_reward"], rollout.scores_B.mean())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_reported_with_its_row(networks, value):
    prompts, responses = ragged_batch()
    rows = [{"prompt": f"prompt {row}"} for row in range(5)]
    scores = torch.tensor([1.0, 2.0, value, 3.0, value])
    settings = dict(zip(("policy", "reference", "value_model"), networks[:3], strict=True)) | SETTINGS
    for given, shown in ((prompts, "row 2 "), (prompts._replace(rows=rows), "row 2, prompt 'prompt 2' ")):
        with pytest.raises(NonFiniteError, match=rf"got {value} for the response in {shown}\(2 of 5 rows"):
            collect(given, at_once(responses), scorer=lambda *_: scores, **settings)


def test_rows_of_the_prompts_go_to_the_scorer_whole_and_not_into_the_rollout(networks):
    prompts, responses = ragged_batch()
    rows = [{"prompt": f"prompt {row}"} for row in range(5)]
    settings = dict(zip(("policy", "reference", "value_model"), networks[:3], strict=True)) | SETTINGS
    seen = []
    rollout = collect(
        prompts._replace(rows=rows),
        at_once(responses),
        scorer=lambda p, _: seen.append(p.rows) or torch.zeros(5),
        **settings,
    )
    assert seen == [rows]
    assert all(isinstance(value, torch.Tensor) for value in rollout)
    with pytest.raises(ConfigError, match=r"scores: got the shape \[5, 1\] for 5 responses"):
        collect(prompts, at_once(responses), scorer=lambda *_: torch.zeros(5, 1), **settings)


def parts_of(responses, *groups, logprobs=None):
    """The same responses as blocks, each no wider than it must be."""
    blocks = []
    for rows in groups:
        width = int(responses.response_mask_BR[rows].sum(dim=1).max())
        some = Responses(
            responses.response_ids_BR[rows, :width],
            responses.response_mask_BR[rows, :width],
            responses.finished_B[rows],
        )
        blocks.append(Finished(rows, some, None if logprobs is None else logprobs[rows, :width]))
    return blocks


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("passes_", [{"micro_batch_size": 5}, {"micro_batch_size": 2}, {"micro_batch_tokens": 14}])
def test_blocks_and_passes_change_nothing(packed, passes_):
    networks = [tiny_model("gpt2"), tiny_model("gpt2", seed=8)]
    for model in networks if packed else ():
        assert enable_packing(model).packs
    networks += [tiny_scalar_model("gpt2"), tiny_scalar_model("gpt2", seed=6)]
    prompts, responses = ragged_batch()
    prompts = prompts._replace(rows=[{"prompt": str(row)} for row in range(5)])
    need = gather(tiny_model("gpt2"), tiny_model("gpt2", seed=8), *networks[2:], prompts, responses)
    settings = dict(zip(("policy", "reference", "value_model"), networks[:3], strict=True)) | SETTINGS | passes_
    score = RewardModelScorer(networks[3])
    asked = []

    def scorer(some, of_them):
        asked.append([row["prompt"] for row in some.rows])
        return score(some, of_them)

    got = collect(prompts, parts_of(responses, [1, 4], [0, 2, 3]), scorer=scorer, **settings)
    assert asked == [["1", "4"], ["0", "2", "3"]]
    mask = responses.response_mask_BR
    assert torch.equal(got.response_mask_BR, mask)
    assert torch.equal(got.response_ids_BR[mask], responses.response_ids_BR[mask])
    assert torch.equal(got.finished_B, responses.finished_B)
    for name in ("old_logprobs_BR", "reference_logprobs_BR", "old_values_BR", "raw_scores_B", "scores_B"):
        assert_close(getattr(got, name), getattr(need, name))


def test_the_samplers_own_logprobs(networks):
    prompts, responses = ragged_batch()
    need = gather(*networks, prompts, responses)
    sampler = (need.old_logprobs_BR - 0.25).where(responses.response_mask_BR, 0.0)
    sampler[1, 3] -= 1.0
    blocks = parts_of(responses, [0, 3], [1, 2, 4], logprobs=sampler)
    gap = BehaviourGap()
    recomputed = gather(*networks, prompts, responses, blocks=blocks, gap=gap)
    assert_close(recomputed.old_logprobs_BR, need.old_logprobs_BR)
    tokens = int(responses.response_mask_BR.sum())
    assert gap.tokens == tokens
    assert_close(gap.total / gap.tokens, -0.25 - 1.0 / tokens)
    assert_close(gap.largest, 1.25)

    reads = []
    handle = networks[0].register_forward_pre_hook(lambda *_: reads.append(1))
    taken = gather(*networks, prompts, responses, blocks=blocks, recompute_logprobs=False)
    handle.remove()
    assert not reads, "the policy was asked although the sampler had said it"
    assert_close(taken.old_logprobs_BR, sampler)
    assert_close(taken.old_values_BR, need.old_values_BR)


@pytest.mark.parametrize("padded", [False, True])
def test_passes_keep_to_both_bounds(padded):
    lengths = [3, 9, 1, 7, 7, 2, 8, 4, 30]
    cut = passes(lengths, rows=3, tokens=16, padded=padded)
    assert sorted(torch.cat(cut).tolist()) == list(range(9))
    for rows in cut:
        cost = len(rows) * max(lengths[row] for row in rows) if padded else sum(lengths[row] for row in rows)
        assert len(rows) <= 3
        assert cost <= 16 or len(rows) == 1
    assert len(passes(lengths, rows=100, tokens=None, padded=padded)) == 1
    mixed = [1, 9, 1, 9]
    sizes = [{mixed[row] for row in rows} for rows in passes(mixed, rows=2, tokens=None, padded=padded)]
    assert sizes == ([{1}, {9}] if padded else [{1, 9}, {1, 9}])


# -- assess


def made_up(rows: int = 8, width: int = 6, *, seed: int = 0, garbage: float = 0.0) -> Rollout:
    """A rollout without networks; ``garbage`` stands in the padding."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    lengths[0] = width
    mask = torch.arange(width) < lengths[:, None]

    def numbers(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    old, reference, values = (numbers(rows, width).where(mask, garbage) for _ in range(3))
    prompts = left_padded([tokens(1 + index % 3, generator) for index in range(rows)])
    raw = numbers(rows)
    finished = torch.arange(rows) % 3 != 0
    responses = Responses(torch.arange(rows * width).view(rows, width), mask, finished)
    return Rollout(*prompts[:2], *responses, -old.abs(), -reference.abs(), values, raw, raw - 2.0 * ~finished)


def slow(rollout: Rollout, *, kl_coef, discount, gae_lambda, whiten_advantages=True, whiten_rewards=False):
    """The same from lists of numbers: rewards, advantages, returns, each ``[rows][length]``."""
    rewards, values = [], []
    for row, mask in enumerate(rollout.response_mask_BR.tolist()):
        length = sum(mask)
        old, ref = rollout.old_logprobs_BR[row].tolist(), rollout.reference_logprobs_BR[row].tolist()
        rewards.append([-kl_coef * (old[t] - ref[t]) for t in range(length)])
        rewards[-1][-1] += rollout.scores_B[row].item()
        values.append(rollout.old_values_BR[row, :length].tolist())

    def scaled(rows, *, keep_mean):
        flat = [x for row in rows for x in row]
        mean = sum(flat) / len(flat)
        sigma = math.sqrt(sum((x - mean) ** 2 for x in flat) / len(flat) + 1e-8)
        return [[(x - mean) / sigma + (mean if keep_mean else 0.0) for x in row] for row in rows]

    if whiten_rewards:
        rewards = scaled(rewards, keep_mean=True)
    advantages, returns = [], []
    for reward, value in zip(rewards, values, strict=True):
        later = [*value[1:], 0.0]
        surprise = [r + discount * n - v for r, n, v in zip(reward, later, value, strict=True)]
        advantage = [
            sum((discount * gae_lambda) ** (s - t) * surprise[s] for s in range(t, len(surprise)))
            for t in range(len(surprise))
        ]
        advantages.append(advantage)
        returns.append([a + v for a, v in zip(advantage, value, strict=True)])
    if whiten_advantages:
        advantages = scaled(advantages, keep_mean=False)
    return rewards, advantages, returns


COEFFICIENTS = {"kl_coef": 0.3, "discount": 0.9, "gae_lambda": 0.8}


@pytest.mark.parametrize("whiten_advantages", [True, False])
@pytest.mark.parametrize("whiten_rewards", [True, False])
@pytest.mark.parametrize("garbage", [0.0, float("nan")])
def test_assess_against_slow_loops(whiten_advantages, whiten_rewards, garbage):
    switches = {"whiten_advantages": whiten_advantages, "whiten_rewards": whiten_rewards}
    rollout = made_up(garbage=garbage)
    experience = assess(rollout, **COEFFICIENTS, **switches)
    assert experience.rollout is rollout
    for got, need in zip(experience[1:], slow(rollout, **COEFFICIENTS, **switches), strict=True):
        assert got.shape == rollout.response_mask_BR.shape
        for row, numbers in enumerate(need):
            assert_close(got[row, : len(numbers)], numbers, dtype=torch.float64)
            assert (got[row, len(numbers) :] == 0).all()


def rows_of(record, rows):
    return type(record)(*(x[rows] for x in record))


@pytest.mark.parametrize("whiten_rewards", [True, False])
def test_whitening_over_two_ranks_is_that_of_one(whiten_rewards):
    rollout = made_up(rows=10)
    whole = assess(rollout, **COEFFICIENTS, whiten_rewards=whiten_rewards)
    ranks = [rows_of(rollout, slice(0, 3)), rows_of(rollout, slice(3, 10))]
    told: list[list] = [[], []]  # what each rank hands to the collective, in order

    def assess_rank(rank, joined):
        answers = iter(joined)

        def reduce(moments):
            told[rank].append(moments)
            return next(answers, moments)

        return assess(ranks[rank], **COEFFICIENTS, whiten_rewards=whiten_rewards, reduce=reduce)

    calls, joined = 1 + whiten_rewards, []
    for _ in range(calls):  # one collective more is answered in each round
        told[:] = [[], []]
        for rank in range(2):
            assess_rank(rank, joined)
        joined.append(merge_moments(told[0][len(joined)], told[1][len(joined)]))
    parts = [assess_rank(rank, joined) for rank in range(2)]
    assert [len(x) % calls for x in told] == [0, 0]  # every rank calls as often: no deadlock
    for index in range(1, 4):
        assert_close(torch.cat([part[index] for part in parts]), whole[index], dtype=torch.float64)
    alone = assess(ranks[0], **COEFFICIENTS, whiten_rewards=whiten_rewards)
    assert not torch.allclose(alone.advantages_BR, whole.advantages_BR[:3])  # else the test would show nothing


def test_assess_changes_nothing_it_is_given():
    rollout = made_up()
    before = Rollout(*(x.clone() for x in rollout))
    assess(rollout, **COEFFICIENTS, whiten_rewards=True)
    for mine, theirs in zip(rollout, before, strict=True):
        assert torch.equal(mine, theirs)


# -- minibatches


def experience_of(rows: int) -> Experience:
    return assess(made_up(rows), **COEFFICIENTS)


def deal(experience, **changes):
    settings = {"count": 4, "seed": 7, "iteration": 2, "epoch": 0, **changes}
    return [rows_in(part) for part in minibatches(experience, **settings)]


def rows_in(experience: Experience) -> list[int]:
    width = experience.rollout.response_ids_BR.shape[1]
    return (experience.rollout.response_ids_BR[:, 0] // width).tolist()  # see made_up: ids number the rows


@pytest.mark.parametrize(("rows", "count"), [(16, 4), (16, 1), (16, 16), (12, 3)])
def test_every_row_comes_once_and_each_block_gives_one_to_each(rows, count):
    dealt = deal(experience_of(rows), count=count)
    assert len(dealt) == count
    assert {len(part) for part in dealt} == {rows // count}
    assert sorted(itertools.chain(*dealt)) == list(range(rows))
    for part in dealt:
        assert sorted(row // count for row in part) == list(range(rows // count))


def test_a_minibatch_is_the_same_rows_of_every_tensor():
    experience = experience_of(16)
    for part in minibatches(experience, count=4, seed=7, iteration=2, epoch=1):
        rows = rows_in(part)
        for mine, theirs in zip((*part.rollout, *part[1:]), (*experience.rollout, *experience[1:]), strict=True):
            assert torch.equal(mine, theirs[rows])


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_together_make_the_minibatch_of_one_process(ranks):
    experience, share = experience_of(16), 16 // ranks
    whole = deal(experience)
    parts = [
        deal(select(experience, slice(rank * share, (rank + 1) * share)), first_row=rank * share)
        for rank in range(ranks)
    ]
    for number, rows in enumerate(whole):
        assert sorted(rows) == sorted(itertools.chain(*(part[number] for part in parts)))
        assert {len(part[number]) for part in parts} == {16 // 4 // ranks}


def test_the_deal_depends_on_seed_iteration_and_epoch():
    experience = experience_of(16)
    deals = [deal(experience, **change) for change in ({}, {"seed": 8}, {"iteration": 3}, {"epoch": 1}, {"epoch": 2})]
    assert deal(experience) == deals[0]
    for one, other in itertools.combinations(deals, 2):
        assert one != other


def test_blocks_are_shuffled_each_for_itself_and_evenly():
    counts = torch.zeros(4, 4)
    experience = experience_of(16)
    orders = set()
    for iteration in range(200):
        dealt = deal(experience, iteration=iteration)
        orders.add(tuple(row % 4 for part in dealt for row in part))
        for number, part in enumerate(dealt):
            for row in part:
                counts[row % 4, number] += 1
    assert len(orders) == 200
    # 800 rows of each kind, 200 expected in each minibatch, standard deviation about 12: five of those.
    assert (counts - 200).abs().max() < 62


def test_select_takes_rows_by_slice_or_index():
    experience = experience_of(8)
    assert rows_in(select(experience, slice(2, 5))) == [2, 3, 4]
    assert rows_in(select(experience, torch.tensor([5, 1]))) == [5, 1]


# -- describe


@pytest.mark.parametrize("garbage", [0.0, float("nan")])
def test_describe_by_hand(garbage):
    mask = torch.tensor([[True, True, True], [True, False, False]])
    old = torch.tensor([[-1.0, -2.0, -0.5], [-1.5, 0.0, 0.0]])
    reference = torch.tensor([[-1.5, -1.0, -0.5], [-3.5, 0.0, 0.0]])
    values = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, 0.0]])
    returns = torch.tensor([[2.0, 1.0, 0.0], [5.0, 0.0, 0.0]])
    old, reference, values = (x.where(mask, garbage) for x in (old, reference, values))
    prompts = left_padded([[5, 6], [7]])
    responses = Responses(torch.tensor([[9, 9, 9], [2, 0, 0]]), mask, torch.tensor([False, True]))
    rollout = Rollout(
        *prompts[:2], *responses, old, reference, values, torch.tensor([3.0, 5.0]), torch.tensor([-1.0, 5.0])
    )
    rewards = torch.tensor([[-0.05, 0.1, -1.0], [4.8, 0.0, 0.0]])
    metrics = describe(Experience(rollout, rewards, torch.full((2, 3), 9.0), returns), kl_coef=0.1)
    need = {
        "objective/score": 2.0,
        "objective/score_raw": 4.0,
        "objective/score_std": 3.0,
        "objective/kl": (0.5 - 1.0 + 0.0 + 2.0) / 2,
        "objective/kl_std": 1.25,  # of -0.5 and 2.0
        "objective/non_score_reward": -0.075,
        "objective/rlhf_reward": (-0.95 + 4.8) / 2,
        "objective/entropy": 5.0 / 2,
        "objective/kl_coef": 0.1,
        "rollout/len_mean": 2.0,
        "rollout/len_std": 1.0,
        "rollout/eos_rate": 0.5,
        "rollout/score_length_corr": -1.0,
        "rollout/repeat_4gram": 0.0,
        "rollout/distinct_prompts": 1.0,
        "returns/mean": 2.0,
        "returns/std": math.sqrt((0 + 1 + 4 + 9) / 4),
        "advantage/mean": (1 + 1 + 1 + 3) / 4,
        "advantage/std": math.sqrt((0.25 * 3 + 2.25) / 4),
        "value/explained_var": 1 - (1 + 1 + 1 + 9) / (0 + 1 + 4 + 9),  # squared errors over squared deviations
    }
    assert metrics.keys() == need.keys()
    for name, value in need.items():
        assert_close(metrics[name], value)


def test_describe_what_was_written():
    """Correlation of length and RAW score, repetition in the responses, and prompts that are there twice."""
    lengths, raw = [6, 3, 5], [1.0, 0.5, 3.0]
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    responses = Responses(
        torch.tensor([[9, 9, 9, 9, 9, 9], [4, 5, 6, 0, 0, 0], [4, 5, 4, 5, 4, 0]]), mask, torch.ones(3).bool()
    )
    nothing = torch.zeros(3, 6)
    scores = torch.tensor([-1.0, 0.5, 3.0])
    prompts = left_padded([[5, 6], [6], [5, 6]])
    rollout = Rollout(*prompts[:2], *responses, nothing, nothing, nothing, torch.tensor(raw), scores)
    metrics = describe(Experience(rollout, nothing, nothing, nothing), kl_coef=0.1)
    assert_close(metrics["rollout/score_length_corr"], statistics.correlation(lengths, raw))
    assert_close(metrics["rollout/len_std"], statistics.pstdev(lengths))
    assert_close(metrics["rollout/repeat_4gram"], (2 / 3 + 0 / 2) / 2)  # 9999 three times; 4545, 5454; too short
    assert_close(metrics["rollout/distinct_prompts"], 2 / 3)
