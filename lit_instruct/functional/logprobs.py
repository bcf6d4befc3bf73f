"""What a distribution over the vocabulary says: log-probabilities of chosen tokens, and entropy.

Nothing here shifts. Column t of the logits must be the one that *predicts* column t of the ids. For responses
behind prompts of padded length P, with a network that reads ``cat([prompt, response])``::

    column of the network's output    0   1  ...  P-1   P    P+1  ...  P+R-1
    token read there                  p   p  ...   p    r0   r1   ...  r(R-1)
    token predicted there             p   p  ...   r0   r1   r2   ...  (nothing)
                                                   ^----------------^
                                                   logits[:, P-1 : -1] go with ids[:, P:]
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lit_instruct.functional.masking import at_least_fp32


def gather_logprobs(logits_BTV: Tensor, ids_BT: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Look up log pi(ids[:, t]) in the logits that predict position t.

    Computed as the chosen logit minus the logsumexp, so that no second ``[B, T, V]`` tensor of log-probabilities
    is made and kept for the backward pass.

    Args:
        logits_BTV: float ``[..., V]``, already aligned with the ids (see the picture above).
        ids_BT: int64 ``[...]``; every id must be in the vocabulary, at padding too (pad ids are).
        temperature: logits are divided by it first. A policy that samples at one temperature must be scored, as
            must its reference, at the same.

    Returns:
        ``[...]`` nats, fp32 or wider.

    Raises:
        ValueError: shapes do not fit, or the temperature is not positive.
    """
    if ids_BT.shape != logits_BTV.shape[:-1]:
        raise ValueError(f"ids: got shape {list(ids_BT.shape)}, need {list(logits_BTV.shape[:-1])} as in the logits")
    logits = _tempered(logits_BTV, temperature)
    return logits.gather(-1, ids_BT.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def entropy_from_logits(logits_BTV: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Compute the entropy over the whole vocabulary, per position.

    Args:
        logits_BTV: float ``[..., V]``; -inf marks a token that cannot occur.
        temperature: logits are divided by it first.

    Returns:
        ``[...]`` nats, fp32 or wider, between 0 and log V.

    Raises:
        ValueError: the temperature is not positive.
    """
    return surprise_moments(logits_BTV, temperature=temperature).entropy


class Surprise(NamedTuple):
    """Mean and variance of ``-log p`` of a token that is drawn from a distribution, per position.

    Attributes:
        entropy: ``[...]`` nats, the mean.
        variance: ``[...]`` nats squared; 0 where one token has all of the probability, or all have the same.
    """

    entropy: Tensor
    variance: Tensor


def surprise_moments(logits_BTV: Tensor, *, temperature: float = 1.0) -> Surprise:
    """Compute how surprising a sample is on average, and how much that varies, over the whole vocabulary.

    Args:
        logits_BTV: float ``[..., V]``; -inf marks a token that cannot occur.
        temperature: logits are divided by it first.

    Returns:
        Entropy and variance, fp32 or wider.

    Raises:
        ValueError: the temperature is not positive.
    """
    logprobs = torch.log_softmax(_tempered(logits_BTV, temperature), dim=-1)
    probabilities = logprobs.exp()
    # p log p is 0 at p = 0; a finite floor keeps 0 * -inf, which is NaN, out of it (its root, as it is squared).
    bounded = logprobs.clamp(min=-(torch.finfo(logprobs.dtype).max ** 0.5))
    entropy = -(probabilities * bounded).sum(-1)
    return Surprise(entropy, (probabilities * (bounded + entropy.unsqueeze(-1)).square()).sum(-1))


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    if not temperature > 0:
        raise ValueError(f"temperature: got {temperature}, need more than 0; greedy decoding is not a temperature")
    logits = at_least_fp32(logits)
    return logits if temperature == 1.0 else logits / temperature
