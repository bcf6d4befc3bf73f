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

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

_CACHED = 1 << 17  # numbers of a block, for each thread
_PARALLEL = 1 << 25


def gather_logprobs(logits_BTV: Tensor, ids_BT: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Look up log pi(ids[:, t]) in the logits that predict position t.

    Computed as the chosen logit minus the logsumexp, a block of rows at a time: no second ``[B, T, V]`` tensor is made,
    neither of log-probabilities nor of logits in fp32. Differentiable once.

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
    _check_temperature(temperature)
    flat: Tensor = _GatherLogprobs.apply(logits_BTV.flatten(0, -2), ids_BT.flatten(), temperature)
    return flat.view(ids_BT.shape)


class _GatherLogprobs(torch.autograd.Function):
    """A few rows at a time, so that what is as wide as the vocabulary stays in the processor's cache.

    Nothing of that width is kept for the backward pass but the logits themselves, as narrow as they came::

        log pi(i) = (x_i - shift) / T        with shift = max x + T log sum exp((x - max x) / T)
        gradient of x_j = (1[i = j] - exp((x_j - shift) / T)) / T
    """

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, ids_N: Tensor, temperature: float) -> Tensor:
        out_N = torch.empty(len(ids_N), dtype=_wide(logits_NV), device=logits_NV.device)
        shift_N1 = torch.empty_like(out_N).unsqueeze(1)
        for rows in _blocks(logits_NV):
            below, log_sum_N1 = _below_top(logits_NV[rows], temperature)
            out_N[rows] = (below.gather(1, ids_N[rows, None]) - log_sum_N1).squeeze(1)
            shift_N1[rows] = logits_NV[rows].amax(dim=1, keepdim=True) + temperature * log_sum_N1
        ctx.save_for_backward(logits_NV, ids_N, shift_N1)
        ctx.temperature = temperature
        return out_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Any, ...]:
        logits_NV, ids_N, shift_N1 = ctx.saved_tensors
        grad_NV = torch.empty_like(logits_NV, memory_format=torch.contiguous_format)
        scaled_N1 = grad_N.unsqueeze(1) / ctx.temperature
        for rows in _blocks(logits_NV):
            probabilities = torch.sub(logits_NV[rows], shift_N1[rows])
            probabilities = _tempered(probabilities, ctx.temperature).exp_().mul_(-scaled_N1[rows])
            grad_NV[rows] = probabilities.scatter_add_(1, ids_N[rows, None], scaled_N1[rows])
        return grad_NV, None, None


class Surprise(NamedTuple):
    """Mean and variance of ``-log p`` of a token that is drawn from a distribution, per position.

    Attributes:
        entropy: ``[...]`` nats, the mean.
        variance: ``[...]`` nats squared; 0 where one token has all of the probability, or all have the same.
    """

    entropy: Tensor
    variance: Tensor


@torch.no_grad()
def surprise_moments(logits_BTV: Tensor, *, temperature: float = 1.0) -> Surprise:
    """Compute how surprising a sample is on average, and how much that varies, over the whole vocabulary.

    Args:
        logits_BTV: float ``[..., V]``; -inf marks a token that cannot occur.
        temperature: logits are divided by it first.

    Returns:
        Entropy and variance, without gradient, fp32 or wider.

    Raises:
        ValueError: the temperature is not positive.
    """
    _check_temperature(temperature)
    logits_NV = logits_BTV.flatten(0, -2)
    entropy_N = torch.empty(len(logits_NV), dtype=_wide(logits_NV), device=logits_NV.device)
    variance_N = torch.empty_like(entropy_N)
    for rows in _blocks(logits_NV):
        below, log_sum_N1 = _below_top(logits_NV[rows], temperature)
        probabilities = (below - log_sum_N1).exp_()
        # p * 0 is 0 where p * -inf would be NaN: what cannot occur surprises nobody.
        below.clamp_(min=-(torch.finfo(below.dtype).max ** 0.5))
        mean_N1 = (probabilities * below).sum(dim=1, keepdim=True)
        entropy_N[rows] = (log_sum_N1 - mean_N1).squeeze(1)
        variance_N[rows] = below.sub_(mean_N1).square_().mul_(probabilities).sum(dim=1)
    shape = logits_BTV.shape[:-1]
    return Surprise(entropy_N.view(shape), variance_N.view(shape))


def _below_top(logits_NV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """How far each logit lies below the highest, over the temperature, and the log of the sum of their exponentials."""
    below_NV = _tempered(torch.sub(logits_NV, logits_NV.amax(dim=1, keepdim=True).to(_wide(logits_NV))), temperature)
    return below_NV, below_NV.exp().sum(dim=1, keepdim=True).log_()


def _blocks(logits_NV: Tensor) -> Iterator[slice]:
    """Slices of rows whose numbers fill a cache (or, on a GPU, its processors), not the memory."""
    numbers = _CACHED * torch.get_num_threads() if logits_NV.device.type == "cpu" else _PARALLEL
    rows = max(numbers // max(logits_NV.shape[1], 1), 1)
    return (slice(start, start + rows) for start in range(0, len(logits_NV), rows))


def _wide(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature: got {temperature}, need more than 0; greedy decoding is not a temperature")


def _tempered(fresh: Tensor, temperature: float) -> Tensor:
    """Divided in place: the argument belongs to nobody else."""
    return fresh if temperature == 1.0 else fresh.div_(temperature)
