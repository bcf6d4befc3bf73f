"""Draw tokens: each row from a random stream of its own, by one uniform number a token; and keep what was drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lit_instruct.types import Responses

_LARGE = 16384  # over a larger vocabulary the search in two levels is faster
_BLOCK = 64


def uniform_streams(rows: Sequence[int], draws: int, *, seed: int, iteration: int) -> Tensor:
    """Uniform numbers for each row, from a counter-based stream of its own.

    Args:
        rows: global row numbers.
        draws: how many numbers a row needs at most.
        seed: of the run.
        iteration: of PPO (0 elsewhere).

    Returns:
        fp32 ``[len(rows), draws]`` in [0, 1), on CPU. Entry (i, t) depends on (seed, iteration, rows[i], t) alone.
    """
    numbers = np.empty((len(rows), draws), dtype=np.float32)
    for row, into in zip(rows, numbers, strict=True):
        stream = np.random.Generator(np.random.Philox(key=[seed, iteration], counter=[0, 0, 0, row]))
        stream.random(dtype=np.float32, out=into)
    return torch.from_numpy(numbers)


def choose_tokens(logits_BV: Tensor, uniform_B: Tensor, *, temperature: float) -> Tensor:
    """Sample one token a row by inverting the distribution's cumulative sum at the row's uniform number.

    Args:
        logits_BV: ``[B, V]``, any float dtype.
        uniform_B: fp32 ``[B]`` in [0, 1).
        temperature: divides the logits; 0 takes the most probable token.

    Returns:
        int64 ``[B]``.
    """
    if temperature == 0:
        return logits_BV.argmax(dim=-1)
    logits_BV = logits_BV.float()
    if temperature != 1:
        logits_BV = logits_BV / temperature
    if logits_BV.shape[1] > _LARGE:
        weights_BV = (logits_BV - logits_BV.amax(dim=1, keepdim=True)).exp_()
        return _search_by_block(weights_BV, uniform_B)
    cumulative_BV = torch.softmax(logits_BV, dim=-1).cumsum(dim=-1)
    # The sum ends near 1, not at 1: scale the draw, so that the last token of non-zero probability bounds it.
    wanted_B1 = uniform_B.to(cumulative_BV).unsqueeze(1) * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, wanted_B1, right=True).squeeze(1).clamp_max(logits_BV.shape[-1] - 1)


def _search_by_block(weights_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The same search, without the cumulative sum of the whole row: first for the block of tokens, then inside it.

    Args:
        weights_BV: fp32 ``[B, V]``, the probabilities or any multiple of them.
        uniform_B: fp32 ``[B]``.

    Returns:
        int64 ``[B]``.
    """
    vocabulary = weights_BV.shape[1]
    whole = vocabulary // _BLOCK
    sums = weights_BV[:, : whole * _BLOCK].unflatten(1, (whole, _BLOCK)).sum(dim=-1)
    if vocabulary % _BLOCK:
        sums = torch.cat([sums, weights_BV[:, whole * _BLOCK :].sum(dim=1, keepdim=True)], dim=1)
    cumulative = sums.cumsum(dim=1)
    wanted_B1 = uniform_B.to(cumulative).unsqueeze(1) * cumulative[:, -1:]
    block_B1 = torch.searchsorted(cumulative, wanted_B1, right=True).clamp_max(sums.shape[1] - 1)
    before_B1 = torch.where(block_B1 > 0, cumulative.gather(1, (block_B1 - 1).clamp_min(0)), 0.0)
    columns = block_B1 * _BLOCK + torch.arange(_BLOCK, device=weights_BV.device)
    inside = weights_BV.gather(1, columns.clamp_max(vocabulary - 1)).masked_fill_(columns >= vocabulary, 0.0)
    inside = inside.cumsum(dim=1)
    # What is left may exceed the block's own sum by rounding: its last token of non-zero probability bounds it.
    last_B1 = torch.searchsorted(inside, inside[:, -1:].contiguous())
    place_B1 = torch.searchsorted(inside, wanted_B1 - before_B1, right=True)
    return (block_B1 * _BLOCK + torch.minimum(place_B1, last_B1)).squeeze(1)


def chosen_logprobs(logits_BV: Tensor, chosen_B: Tensor, *, temperature: float) -> Tensor:
    """Log-probabilities of sampled tokens.

    Args:
        logits_BV: ``[B, V]``, any float dtype.
        chosen_B: int64 ``[B]``.
        temperature: the one that sampled; at 0 nothing else could have been chosen.

    Returns:
        fp32 ``[B]``, nats.
    """
    if temperature == 0:
        return torch.zeros(len(chosen_B), device=logits_BV.device)
    logits_BV = logits_BV.float() / temperature
    return logits_BV.gather(1, chosen_B.unsqueeze(1)).squeeze(1) - logits_BV.logsumexp(dim=1)


class Finished(NamedTuple):
    """Responses that are complete, while others may still be decoding.

    Attributes:
        rows: which of the prompts they answer: indices into the batch.
        responses: b responses, padded to the longest of them.
        logprobs_BR: fp32 ``[b, R]``, the sampler's log pi of each token at its temperature, nats, 0 at padding; None
            if nobody asked.
    """

    rows: list[int]
    responses: Responses
    logprobs_BR: Tensor | None


class Draws:
    """The responses as they grow. A token's *place* is ``row * max_tokens + t``, in random numbers and ids alike.

    Attributes:
        total: rows.
        max_tokens: the most tokens of a response.
        device: where the model runs; shards of its weights may lie elsewhere.
    """

    def __init__(
        self,
        uniform_BR: Tensor,
        *,
        eos_ids: Sequence[int],
        pad_id: int,
        temperature: float,
        keep_logprobs: bool,
    ):
        """Start with none.

        Args:
            uniform_BR: fp32 ``[B, max_tokens]``, see :func:`uniform_streams`; on the model's device.
            eos_ids: tokens that end a response; the one that does belongs to it.
            pad_id: fills the columns after a response.
            temperature: divides the logits; 0 is greedy.
            keep_logprobs: keep the log-probabilities too.
        """
        self.total, self.max_tokens = uniform_BR.shape
        self._temperature, self._pad_id, self._eos_ids = temperature, pad_id, list(eos_ids)
        self._uniform = uniform_BR.flatten()
        device = self.device = uniform_BR.device
        self._ids_BR = torch.full((self.total, self.max_tokens), pad_id, dtype=torch.long, device=device)
        self._logprobs_BR = torch.zeros(self.total, self.max_tokens, device=device) if keep_logprobs else None
        self._lengths = [0] * self.total
        self._finished = [False] * self.total
        self._ends = torch.zeros(0, dtype=torch.bool, device=device)

    def draw(self, logits_AV: Tensor, places_A: Tensor) -> Tensor:
        """Draw the next token of some rows.

        Args:
            logits_AV: ``[A, V]``.
            places_A: int64 ``[A]``, where each goes.

        Returns:
            int64 ``[A]``, the tokens.
        """
        uniform_A = self._uniform.index_select(0, places_A)
        chosen_A = choose_tokens(logits_AV, uniform_A, temperature=self._temperature)
        self._ids_BR.view(-1).index_copy_(0, places_A, chosen_A)
        if self._logprobs_BR is not None:
            logprobs_A = chosen_logprobs(logits_AV, chosen_A, temperature=self._temperature)
            self._logprobs_BR.view(-1).index_copy_(0, places_A, logprobs_A)
        if not len(self._ends):
            self._ends = torch.zeros(logits_AV.shape[1], dtype=torch.bool, device=logits_AV.device)
            self._ends[[token for token in self._eos_ids if token < len(self._ends)]] = True
        return chosen_A

    def ending(self, chosen_A: Tensor) -> Tensor:
        """Which tokens end their response.

        Args:
            chosen_A: int64 ``[A]``, as :meth:`draw` gave them.

        Returns:
            bool ``[A]``.
        """
        return self._ends.index_select(0, chosen_A)

    def finish(self, row: int, length: int, *, by_itself: bool) -> None:
        """Close a response.

        Args:
            row: of the batch.
            length: its tokens, the end of text included.
            by_itself: it ends with an end of text, not at the limit.
        """
        self._lengths[row], self._finished[row] = length, by_itself

    def take(self, rows: Sequence[int]) -> Finished:
        """Hand out closed responses.

        Args:
            rows: of the batch.

        Returns:
            Them, in this order.
        """
        device = self._ids_BR.device
        width = max((self._lengths[row] for row in rows), default=0)
        lengths_b = torch.tensor([self._lengths[row] for row in rows], dtype=torch.long, device=device)
        finished_b = torch.tensor([self._finished[row] for row in rows], dtype=torch.bool, device=device)
        mask_bR = torch.arange(width, device=device) < lengths_b.unsqueeze(1)
        index = torch.tensor(rows, dtype=torch.long, device=device)
        ids_bR = self._ids_BR[index, :width].masked_fill(~mask_bR, self._pad_id)
        logprobs_bR = None if self._logprobs_BR is None else self._logprobs_BR[index, :width].where(mask_bR, 0.0)
        return Finished(list(rows), Responses(ids_bR, mask_bR, finished_b), logprobs_bR)
