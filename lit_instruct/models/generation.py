"""Sample responses with a KV cache; finished rows leave the batch.

Each row draws from its own random stream, so a response depends on its prompt and its stream and on nothing else: not
on its neighbours, not on the batch it sits in, not on the number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from lit_instruct.models.forward import position_ids
from lit_instruct.types import PromptBatch, Responses

Progress = Callable[[int, int], None]
"""Called with (responses finished, responses wanted)."""

_COMPACT_AT = 0.85  # rows leave when fewer than this share of the batch is still open: each removal copies the cache


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
    streams = [np.random.Generator(np.random.Philox(key=[seed, iteration], counter=[0, 0, 0, row])) for row in rows]
    return torch.from_numpy(np.stack([stream.random(draws, dtype=np.float32) for stream in streams]))


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
    cumulative_BV = torch.softmax(logits_BV.float() / temperature, dim=-1).cumsum(dim=-1)
    # The sum ends near 1, not at 1: scale the draw, so that the last token of non-zero probability bounds it.
    wanted_B1 = uniform_B.to(cumulative_BV).unsqueeze(1) * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, wanted_B1, right=True).squeeze(1).clamp_max(logits_BV.shape[-1] - 1)


@torch.no_grad()
def sample_responses(
    model: PreTrainedModel,
    prompts: PromptBatch,
    *,
    max_tokens: int,
    eos_ids: Sequence[int],
    pad_id: int,
    temperature: float = 1.0,
    rows: Sequence[int] | None = None,
    seed: int = 0,
    iteration: int = 0,
    batch_rows: int = 256,
    progress: Progress | None = None,
) -> Responses:
    """Sample one response for each prompt.

    Args:
        model: a Hugging Face causal language model; used in eval mode and put back afterwards.
        prompts: B prompts, padded on the left.
        max_tokens: the most tokens that a response may have.
        eos_ids: tokens that end a response; the one that does belongs to it.
        pad_id: fills the columns after a response.
        temperature: divides the logits; 1 samples the policy itself, 0 is greedy.
        rows: global row number of each prompt, the key of its random stream; default 0, 1, ...
        seed: key of all streams.
        iteration: second key of all streams.
        batch_rows: rows decoded together; more take more memory, and change no response.
        progress: called as responses finish.

    Returns:
        The responses, in the order of the prompts, padded to the longest.
    """
    total = len(prompts.prompt_ids_BP)
    device = prompts.prompt_ids_BP.device
    keys = list(range(total)) if rows is None else list(rows)
    ids_BR = torch.full((total, max_tokens), pad_id, dtype=torch.long, device=device)
    lengths_B = torch.zeros(total, dtype=torch.long, device=device)
    finished_B = torch.zeros(total, dtype=torch.bool, device=device)
    eos = torch.tensor(list(eos_ids), device=device)
    was_training = model.training
    model.eval()
    done = 0

    def report(now_finished: int) -> None:
        nonlocal done
        done += now_finished
        if progress is not None:
            progress(done, total)

    try:
        for start in range(0, total, batch_rows):
            part = slice(start, min(start + batch_rows, total))
            uniform_BR = uniform_streams(keys[part], max_tokens, seed=seed, iteration=iteration).to(device)
            batch = PromptBatch(prompts.prompt_ids_BP[part], prompts.prompt_mask_BP[part])
            _decode(model, batch, uniform_BR, eos, temperature, ids_BR[part], lengths_B[part], finished_B[part], report)
    finally:
        model.train(was_training)
    width = max(int(lengths_B.max()), 1) if total else 0
    mask_BR = torch.arange(width, device=device) < lengths_B.unsqueeze(1)
    return Responses(ids_BR[:, :width].contiguous(), mask_BR, finished_B)


def _decode(
    model: PreTrainedModel,
    prompts: PromptBatch,
    uniform_BR: Tensor,
    eos: Tensor,
    temperature: float,
    ids_BR: Tensor,
    lengths_B: Tensor,
    finished_B: Tensor,
    report: Callable[[int], None],
) -> None:
    """Decode one batch; fills ``ids_BR``, ``lengths_B`` and ``finished_B`` (views of the caller's tensors)."""
    prompt_mask_BP = prompts.prompt_mask_BP
    # Columns that are padding in every row of this batch cost time and say nothing.
    first = int(prompt_mask_BP.any(dim=0).long().argmax())
    step_ids, mask = prompts.prompt_ids_BP[:, first:], prompt_mask_BP[:, first:]
    positions = position_ids(mask)
    cache = DynamicCache()  # plain layers also for window models: the mask applies the window, rows can be taken out
    row_A = torch.arange(len(step_ids), device=step_ids.device)  # rows of the batch that are still in it
    open_A = torch.ones_like(row_A, dtype=torch.bool)
    max_tokens = uniform_BR.shape[1]
    for step in range(max_tokens):
        logits_AV = model(
            input_ids=step_ids,
            attention_mask=mask.long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        chosen_A = choose_tokens(logits_AV, uniform_BR[row_A, step], temperature=temperature)
        rows_open, chosen_open = row_A[open_A], chosen_A[open_A]
        ids_BR[rows_open, step] = chosen_open
        lengths_B[rows_open] = step + 1
        ends = torch.isin(chosen_open, eos)
        finished_B[rows_open[ends]] = True
        ended = int(ends.sum())
        if ended:
            open_A[open_A.clone()] = ~ends
            report(ended)
        still_open = int(open_A.sum())
        if still_open == 0:
            return
        if step + 1 == max_tokens:
            report(still_open)
            return
        if still_open < _COMPACT_AT * len(row_A):
            kept = open_A.nonzero().squeeze(1)
            cache.batch_select_indices(kept)
            row_A, chosen_A, mask, positions, open_A = (x[kept] for x in (row_A, chosen_A, mask, positions, open_A))
        step_ids = chosen_A.unsqueeze(1)
        mask = torch.cat([mask, torch.ones_like(step_ids, dtype=torch.bool)], dim=1)
        positions = positions[:, -1:] + 1
