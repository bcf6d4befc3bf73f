"""From prompts to experience: sample, let the frozen networks speak, work out rewards and advantages.

``collect`` runs networks and no formula; ``assess`` runs formulas and no network; ``minibatches`` shuffles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

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
from lit_instruct.models.batching import token_groups
from lit_instruct.models.forward import response_logprobs, response_values
from lit_instruct.models.packing import admission
from lit_instruct.models.sampling import Finished
from lit_instruct.models.scalar_head import ScalarModel
from lit_instruct.models.sharding import in_step
from lit_instruct.models.value_model import SharedValueHead, policy_and_values
from lit_instruct.rewards.base import shortened
from lit_instruct.types import ConfigError, Experience, Metrics, NonFiniteError, PromptBatch, Responses, Rollout

ScoreFunction = Callable[[PromptBatch, Responses], Tensor]
"""(prompts, responses) -> ``[B]``: a ``lit_instruct.rewards.Scorer`` that has its tokenizer, or any function."""


class BehaviourGap:
    """How far the network that sampled (rounded, quantised) is from the one that learns, over response tokens.

    With ``gap = log pi_sampler - log pi_trained`` of each token: its mean estimates KL(sampler || policy) a token, and
    the largest size says how wrong a single importance ratio can be.
    """

    def __init__(self) -> None:
        """Nothing seen."""
        self.tokens = 0.0
        self.total = 0.0
        self.largest = 0.0

    def add(self, sampler_BR: Tensor, trained_BR: Tensor, mask_BR: Tensor) -> None:
        """Count some responses.

        Args:
            sampler_BR: fp32 ``[B, R]``, nats.
            trained_BR: fp32 ``[B, R]``, nats.
            mask_BR: bool ``[B, R]``.
        """
        gap_N = (sampler_BR - trained_BR)[mask_BR].double()
        self.tokens += len(gap_N)
        self.total += float(gap_N.sum())
        self.largest = max(self.largest, float(gap_N.abs().max())) if len(gap_N) else self.largest


@torch.no_grad()
def collect(
    prompts: PromptBatch,
    blocks: Iterable[Finished],
    *,
    policy: nn.Module,
    reference: nn.Module,
    value_model: ScalarModel | SharedValueHead,
    scorer: ScoreFunction,
    temperature: float,
    missing_eos: str,
    missing_eos_value: float,
    micro_batch_size: int,
    micro_batch_tokens: int | None = None,
    recompute_logprobs: bool = True,
    gap: BehaviourGap | None = None,
) -> Rollout:
    """Let all networks read the sampled responses, block by block as these finish.

    Args:
        prompts: B prompts.
        blocks: what the policy sampled for them, each prompt answered once; see
            :func:`~lit_instruct.models.generation.stream_responses`.
        policy: the network that sampled, or that the sampler was made from.
        reference: the frozen policy that the KL penalty holds on to.
        value_model: its values are kept as they were at sampling time.
        scorer: gives one score a response; called once a block.
        temperature: the one that sampled.
        missing_eos: rule for responses without an end of text: ``none``, ``replace`` or ``subtract``.
        missing_eos_value: the score that replaces, or whose size is subtracted.
        micro_batch_size: most rows of a forward pass.
        micro_batch_tokens: most tokens of a forward pass; None: any number.
        recompute_logprobs: the policy reads its responses anew for its log-probabilities, because those of the sampler
            come from another kernel, cache layout and maybe precision. False takes the sampler's, unless the value head
            needs that pass anyway.
        gap: is told the difference between the two, where both are known.

    Returns:
        The rollout, without gradients, rows as the prompts.

    Raises:
        NonFiniteError: a score is NaN or infinite.
        ConfigError: the scorer does not give one number a response.
    """
    read = []
    for rows, responses, sampler_BR in blocks:
        asked = _select_prompts(prompts, rows)
        places = passes(
            _lengths(asked, responses),
            rows=micro_batch_size,
            tokens=micro_batch_tokens,
            padded=not admission(policy).packs,
        )
        parts = []
        for some, counts in in_step(places, policy):
            some_prompts = PromptBatch(asked.prompt_ids_BP[some], asked.prompt_mask_BP[some])
            some_responses = Responses(*(x[some] for x in responses))
            given_BR = None if sampler_BR is None else sampler_BR[some]
            if given_BR is not None and not recompute_logprobs and isinstance(value_model, ScalarModel):
                old_BR, values_BR = given_BR, response_values(value_model, some_prompts, some_responses)
            else:
                old_BR, _, values_BR = policy_and_values(
                    policy, value_model, some_prompts, some_responses, temperature=temperature
                )
                if given_BR is not None and gap is not None and counts:
                    gap.add(given_BR, old_BR, some_responses.response_mask_BR)
            reference_BR, _ = response_logprobs(reference, some_prompts, some_responses, temperature=temperature)
            if counts:
                parts.append((old_BR, reference_BR, values_BR))
        order = torch.cat(places).argsort()
        scores_B = scorer(asked, responses).float()
        _check_scores(scores_B, asked, responses, rows)
        read.append((rows, responses, *(torch.cat(part)[order] for part in zip(*parts, strict=True)), scores_B))
    return _join_blocks(prompts, read, missing_eos, missing_eos_value)


def passes(lengths: Sequence[int], *, rows: int, tokens: int | None, padded: bool) -> list[Tensor]:
    """Cut rows into forward passes.

    Args:
        lengths: real tokens of each row.
        rows: most rows of a pass.
        tokens: most tokens of a pass, padding included; None: any number.
        padded: short rows are padded to the longest of their pass, so those of similar length go together.

    Returns:
        int64 row numbers of each pass; all together each row once.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__) if padded else list(range(len(lengths)))
    cut = []
    for start in range(0, len(order), rows):
        some = order[start : start + rows]
        groups = token_groups([lengths[row] for row in some], tokens, padded=padded)
        cut += [torch.tensor([some[place] for place in group]) for group in groups]
    return cut


def row_lengths(experience: Experience) -> list[int]:
    """Real tokens of each row, prompt and response.

    Args:
        experience: B rows.

    Returns:
        B numbers.
    """
    rollout = experience.rollout
    return _lengths(PromptBatch(*rollout[:2]), Responses(*rollout[2:5]))


def _lengths(prompts: PromptBatch, responses: Responses) -> list[int]:
    return (prompts.prompt_mask_BP.sum(dim=1) + responses.response_mask_BR.sum(dim=1)).tolist()


def _select_prompts(prompts: PromptBatch, rows: list[int]) -> PromptBatch:
    index = torch.tensor(rows, device=prompts.prompt_ids_BP.device)
    texts = [prompts.rows[row] for row in rows] if len(prompts.rows) else ()
    return PromptBatch(prompts.prompt_ids_BP[index], prompts.prompt_mask_BP[index], texts)


def _join_blocks(
    prompts: PromptBatch, read: Sequence[tuple[Any, ...]], missing_eos: str, missing_eos_value: float
) -> Rollout:
    """All blocks as one record: rows in the order of the prompts, responses padded to the longest."""
    rows, responses, *others = zip(*read, strict=True)
    place = torch.tensor([row for block in rows for row in block]).argsort().to(prompts.prompt_ids_BP.device)
    width = max(part.response_ids_BR.shape[1] for part in responses)

    def joined(parts: Sequence[Tensor]) -> Tensor:
        if parts[0].dim() == 2:
            parts = [nn.functional.pad(part, (0, width - part.shape[1])) for part in parts]
        return torch.cat(list(parts))[place]

    ids_BR, mask_BR, finished_B = (joined(parts) for parts in zip(*responses, strict=True))
    old_BR, reference_BR, values_BR, raw_B = (joined(parts) for parts in others)
    return Rollout(
        *prompts[:2],
        ids_BR,
        mask_BR,
        finished_B,
        old_logprobs_BR=old_BR,
        reference_logprobs_BR=reference_BR,
        old_values_BR=values_BR,
        raw_scores_B=raw_B,
        scores_B=missing_eos_scores(raw_B, finished_B, rule=missing_eos, value=missing_eos_value),
    )


def _check_scores(scores_B: Tensor, prompts: PromptBatch, responses: Responses, rows: Sequence[int]) -> None:
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
            f"scores: got {float(scores_B[row])} for the response in row {rows[row]}{prompt} ({len(bad)} of "
            f"{len(scores_B)} rows are not finite); need finite numbers. Do: look at what gives the scores: the "
            "weights of a reward model may be damaged, or its numbers too large for fp16."
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
