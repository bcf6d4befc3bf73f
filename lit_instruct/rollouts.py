"""From prompts to experience: sample, let the frozen networks speak, work out rewards and advantages.

``collect`` runs networks and no formula; ``assess`` runs formulas and no network; ``minibatches`` shuffles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from lit_instruct.functional import (
    correlation,
    distinct_rows,
    explained_variance,
    generalized_advantages,
    kl_estimates,
    masked_moments,
    missing_eos_scores,
    repeated_ngrams,
    token_rewards,
    whiten,
)
from lit_instruct.functional.masking import Moments
from lit_instruct.models.forward import response_logprobs
from lit_instruct.models.scalar_head import ScalarModel
from lit_instruct.models.value_model import SharedValueHead, policy_and_values
from lit_instruct.rewards.base import shortened
from lit_instruct.types import ConfigError, Experience, Metrics, NonFiniteError, PromptBatch, Responses, Rollout

ScoreFunction = Callable[[PromptBatch, Responses], Tensor]
"""(prompts, responses) -> ``[B]``: a ``lit_instruct.rewards.Scorer`` that has its tokenizer, or any function."""


@torch.no_grad()
def collect(
    prompts: PromptBatch,
    responses: Responses,
    *,
    policy: nn.Module,
    reference: nn.Module,
    value_model: ScalarModel | SharedValueHead,
    scorer: ScoreFunction,
    temperature: float,
    missing_eos: str,
    missing_eos_value: float,
    micro_batch_size: int,
) -> Rollout:
    """Let all networks read the sampled responses.

    Args:
        prompts: B prompts.
        responses: what the policy sampled for them.
        policy: the network that sampled; its log-probabilities are computed anew, because those of the sampler come
            from another kernel and cache layout.
        reference: the frozen policy that the KL penalty holds on to.
        value_model: its values are kept as they were at sampling time.
        scorer: gives one score a response.
        temperature: the one that sampled.
        missing_eos: rule for responses without an end of text: ``none``, ``replace`` or ``subtract``.
        missing_eos_value: the score that replaces, or whose size is subtracted.
        micro_batch_size: rows a forward pass.

    Returns:
        The rollout, without gradients.

    Raises:
        NonFiniteError: a score is NaN or infinite.
        ConfigError: the scorer does not give one number a response.
    """
    old, ref, values = [], [], []
    for start in range(0, len(responses.finished_B), micro_batch_size):
        rows = slice(start, start + micro_batch_size)
        some_prompts = PromptBatch(prompts.prompt_ids_BP[rows], prompts.prompt_mask_BP[rows])
        some_responses = Responses(*(x[rows] for x in responses))
        logprobs_BR, _, values_BR = policy_and_values(
            policy, value_model, some_prompts, some_responses, temperature=temperature
        )
        old.append(logprobs_BR)
        values.append(values_BR)
        ref.append(response_logprobs(reference, some_prompts, some_responses, temperature=temperature)[0])
    raw_scores_B = scorer(prompts, responses).float()
    _check_scores(raw_scores_B, prompts, responses)
    return Rollout(
        *prompts[:2],
        *responses,
        old_logprobs_BR=torch.cat(old),
        reference_logprobs_BR=torch.cat(ref),
        old_values_BR=torch.cat(values),
        raw_scores_B=raw_scores_B,
        scores_B=missing_eos_scores(raw_scores_B, responses.finished_B, rule=missing_eos, value=missing_eos_value),
    )


def _check_scores(scores_B: Tensor, prompts: PromptBatch, responses: Responses) -> None:
    if scores_B.shape != responses.finished_B.shape:
        raise ConfigError(
            f"scores: got the shape {list(scores_B.shape)} for {len(responses.finished_B)} responses; need one number "
            "each. Do: mend the scorer."
        )
    bad = (~scores_B.isfinite()).nonzero().flatten().tolist()
    if bad:
        row = bad[0]
        prompt = f", prompt {shortened(prompts.rows[row]['prompt'])}" if len(prompts.rows) > row else ""
        raise NonFiniteError(
            f"scores: got {float(scores_B[row])} for the response in row {row}{prompt} ({len(bad)} of {len(scores_B)} "
            "rows are not finite); need finite numbers. Do: look at what gives the scores: the weights of a reward "
            "model may be damaged, or its numbers too large for fp16."
        )


def _alone(moments: Moments) -> Moments:
    return moments


@torch.no_grad()
def assess(
    rollout: Rollout,
    *,
    kl_coef: float,
    discount: float,
    gae_lambda: float,
    whiten_advantages: bool = True,
    whiten_rewards: bool = False,
    reduce: Callable[[Moments], Moments] = _alone,
) -> Experience:
    """Work out rewards, advantages and returns; constants for the whole iteration.

    Args:
        rollout: of this rank.
        kl_coef: price of one nat of KL to the reference.
        discount: of later rewards; 1 in the paper.
        gae_lambda: bias against variance in the advantages.
        whiten_advantages: shift and scale them to mean 0 and variance 1 over the tokens of all ranks.
        whiten_rewards: scale the rewards to variance 1 first, keeping their mean.
        reduce: joins this rank's moments with those of the other ranks.

    Returns:
        The experience; returns belong to the advantages before whitening.
    """
    mask_BR = rollout.response_mask_BR
    rewards_BR = token_rewards(
        rollout.scores_B, rollout.old_logprobs_BR, rollout.reference_logprobs_BR, mask_BR, kl_coef=kl_coef
    )
    if whiten_rewards:
        rewards_BR = whiten(rewards_BR, mask_BR, center=False, moments=reduce(masked_moments(rewards_BR, mask_BR)))
    advantages_BR, returns_BR = generalized_advantages(
        rewards_BR, rollout.old_values_BR, mask_BR, discount=discount, gae_lambda=gae_lambda
    )
    if whiten_advantages:
        advantages_BR = whiten(advantages_BR, mask_BR, moments=reduce(masked_moments(advantages_BR, mask_BR)))
    return Experience(rollout, rewards_BR, advantages_BR, returns_BR)


def select(experience: Experience, rows: Tensor | slice) -> Experience:
    """The same record with some of its rows.

    Args:
        experience: B rows.
        rows: int64 ``[b]`` or a slice.

    Returns:
        An experience of b rows.
    """
    rollout, *rest = experience
    return Experience(Rollout(*(x[rows] for x in rollout)), *(x[rows] for x in rest))


def minibatches(
    experience: Experience, *, count: int, seed: int, iteration: int, epoch: int, first_row: int = 0
) -> Iterator[Experience]:
    """Deal the rows out into minibatches, each row once.

    Rows come in blocks of ``count`` neighbours; each block is shuffled and gives one row to every minibatch::

        rows    0 1 2 3 | 4 5 6 7 | 8 9 ...      count = 4
        dealt   2 0 3 1 | 7 6 4 5 |
                ^ first minibatch takes 2, 7, ...

    The shuffle of a block depends on (seed, iteration, epoch, number of the block over all ranks), so a minibatch
    holds the same prompts whether one process has all rows or several have a share of them.

    Args:
        experience: of this rank; its rows must be a multiple of ``count``.
        count: how many minibatches.
        seed: of the run.
        iteration: of PPO.
        epoch: inner epoch.
        first_row: number of this rank's first row over all ranks.

    Yields:
        Minibatches of ``rows / count`` rows each.
    """
    rows = len(experience.rollout.scores_B)
    blocks = range(first_row // count, (first_row + rows) // count)
    dealt = np.stack(
        [
            np.random.Generator(np.random.Philox(key=[seed, iteration], counter=[0, 0, epoch + 1, block])).permutation(
                count
            )
            for block in blocks
        ]
    )  # [blocks, count]
    starts = np.arange(0, rows, count)[:, None]
    for column in torch.from_numpy(dealt + starts).T:
        yield select(experience, column.to(experience.rollout.scores_B.device))


@torch.no_grad()
def describe(experience: Experience, *, kl_coef: float) -> Metrics:
    """What an experience says about the policy, before any update.

    Args:
        experience: of this rank.
        kl_coef: the one in force.

    Returns:
        Metrics ``objective/...`` (KL in nats a sequence unless said), ``rollout/...``, ``returns/...``,
        ``advantage/...`` (before whitening) and ``value/explained_var``. Each ``_std`` is over responses or tokens
        (divided by their number); ``rollout/score_length_corr`` is of the raw score, since the rule for a missing end
        of text ties the other one to length by itself.
    """
    rollout, rewards_BR, _, returns_BR = experience
    mask_BR = rollout.response_mask_BR
    k1_BR = kl_estimates(rollout.old_logprobs_BR, rollout.reference_logprobs_BR).k1.where(mask_BR, 0.0)
    kl_B, lengths_B = k1_BR.sum(dim=1), mask_BR.sum(dim=1).float()
    returns, advantages = (masked_moments(x, mask_BR) for x in (returns_BR, returns_BR - rollout.old_values_BR))
    return {
        "objective/score": rollout.scores_B.mean(),
        "objective/score_raw": rollout.raw_scores_B.mean(),
        "objective/score_std": rollout.scores_B.std(unbiased=False),
        "objective/kl": kl_B.mean(),
        "objective/kl_std": kl_B.std(unbiased=False),
        "objective/non_score_reward": -kl_coef * kl_B.mean(),
        "objective/rlhf_reward": rewards_BR.sum(dim=1).mean(),
        "objective/entropy": -rollout.old_logprobs_BR.where(mask_BR, 0.0).sum(dim=1).mean(),
        "objective/kl_coef": kl_coef,
        "rollout/len_mean": lengths_B.mean(),
        "rollout/len_std": lengths_B.std(unbiased=False),
        "rollout/eos_rate": rollout.finished_B.float().mean(),
        "rollout/score_length_corr": correlation(rollout.raw_scores_B, lengths_B),
        "rollout/repeat_4gram": repeated_ngrams(rollout.response_ids_BR, mask_BR, size=4),
        "rollout/distinct_prompts": distinct_rows(rollout.prompt_ids_BP, rollout.prompt_mask_BP),
        "returns/mean": returns.mean,
        "returns/std": (returns.m2 / returns.count).sqrt(),
        "advantage/mean": advantages.mean,
        "advantage/std": (advantages.m2 / advantages.count).sqrt(),
        "value/explained_var": explained_variance(rollout.old_values_BR, returns_BR, mask_BR),
    }
