"""Sample responses with a KV cache; rows leave when they have finished, and waiting prompts take their places.

Each row draws from its own random stream, so a response depends on its prompt and its stream and on nothing else: not
on its neighbours, not on the batch it sits in, not on the number of processes. (To the rounding of fp32: where a draw
falls on the very edge between two tokens, sums that were added up in another order may decide otherwise.)

Models that read packed rows decode in slots (:mod:`lit_instruct.models.slot_decoding`); all others in batches, padded
on the left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import DynamicCache, PreTrainedModel

from lit_instruct.models.forward import position_ids
from lit_instruct.models.packing import admission
from lit_instruct.models.sampling import Draws, Finished, choose_tokens, uniform_streams
from lit_instruct.models.slot_cache import cache_keyword
from lit_instruct.models.slot_decoding import decode_slots
from lit_instruct.types import PromptBatch, Responses

__all__ = ["Finished", "Progress", "choose_tokens", "sample_responses", "stream_responses", "uniform_streams"]

Progress = Callable[[int, int], None]
"""Called with (responses finished, responses wanted)."""

_COMPACT_AT = 0.85  # rows leave when fewer than this share of the batch is still open: each removal copies the cache


def stream_responses(
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
    block_rows: int | None = None,
    keep_logprobs: bool = False,
    progress: Progress | None = None,
) -> Iterator[Finished]:
    """Sample one response for each prompt, and hand over what has finished while the rest is still decoding.

    The model decodes in eval mode and in the precision of its own weights, without autocast; between blocks it is as
    the caller had it.

    Args:
        model: a Hugging Face causal language model.
        prompts: B prompts, padded on the left.
        max_tokens: the most tokens that a response may have.
        eos_ids: tokens that end a response; the one that does belongs to it.
        pad_id: fills the columns after a response.
        temperature: divides the logits; 1 samples the policy itself, 0 is greedy.
        rows: global row number of each prompt, the key of its random stream; default 0, 1, ...
        seed: key of all streams.
        iteration: second key of all streams.
        batch_rows: rows decoded together; more take more memory, and change no response.
        block_rows: least number of responses to hand over at a time (the last block takes what remains); None: all.
        keep_logprobs: hand over the sampler's log-probabilities too.
        progress: called as responses finish.

    Yields:
        Blocks, in which each prompt is answered once; rows ascend within a block. One empty block if there are no
        prompts.
    """
    total = len(prompts.prompt_ids_BP)
    keys = list(range(total)) if rows is None else list(rows)
    uniform_BR = uniform_streams(keys, max_tokens, seed=seed, iteration=iteration).to(prompts.prompt_ids_BP.device)
    draws = Draws(uniform_BR, eos_ids=eos_ids, pad_id=pad_id, temperature=temperature, keep_logprobs=keep_logprobs)
    decode = decode_slots if admission(model).packs else _decode_batches
    decoder = decode(model, prompts, draws, batch_rows)
    wanted = total if block_rows is None else block_rows
    done, handed = 0, 0
    while True:
        block: list[int] = []
        with _sampling(model, uniform_BR.device):
            for finished in decoder:
                block += finished
                done += len(finished)
                if progress is not None:
                    progress(done, total)
                if len(block) >= wanted:
                    break
        handed += len(block)
        yield draws.take(sorted(block))
        if handed == total:
            return


@contextmanager
def _sampling(model: PreTrainedModel, device: torch.device) -> Iterator[None]:
    was_training = model.training
    # Inference mode saves a twelfth of a small model's time, but what a model keeps from it cannot be trained with.
    trained = any(parameter.requires_grad for parameter in model.parameters())
    try:
        if was_training:
            model.eval()
        without_gradients = torch.no_grad() if trained else torch.inference_mode()
        with without_gradients, torch.autocast(device.type, enabled=False):
            yield
    finally:
        if was_training:
            model.train()


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
    """Sample one response for each prompt; see :func:`stream_responses`.

    Args:
        model: a Hugging Face causal language model.
        prompts: B prompts, padded on the left.
        max_tokens: the most tokens that a response may have.
        eos_ids: tokens that end a response.
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
    blocks = stream_responses(
        model,
        prompts,
        max_tokens=max_tokens,
        eos_ids=eos_ids,
        pad_id=pad_id,
        temperature=temperature,
        rows=rows,
        seed=seed,
        iteration=iteration,
        batch_rows=batch_rows,
        progress=progress,
    )
    return next(blocks).responses  # all of them in one


def _decode_batches(model: PreTrainedModel, prompts: PromptBatch, draws: Draws, batch_rows: int) -> Iterator[list[int]]:
    """Decode ``batch_rows`` prompts after the other, padded on the left; yields rows that have just finished."""
    for start in range(0, draws.total, batch_rows):
        part = slice(start, start + batch_rows)
        batch = PromptBatch(prompts.prompt_ids_BP[part], prompts.prompt_mask_BP[part])
        yield from _decode(model, batch, draws, start)


def _decode(model: PreTrainedModel, prompts: PromptBatch, draws: Draws, first_row: int) -> Iterator[list[int]]:
    prompt_mask_BP = prompts.prompt_mask_BP
    # Columns that are padding in every row of this batch cost time and say nothing.
    first = int(prompt_mask_BP.any(dim=0).long().argmax())
    step_ids, mask = prompts.prompt_ids_BP[:, first:], prompt_mask_BP[:, first:]
    positions = position_ids(mask)
    # Plain layers also for window models: the mask applies the window, and rows can be taken out.
    cache = {cache_keyword(model): DynamicCache()}
    row_A = torch.arange(first_row, first_row + len(step_ids), device=step_ids.device)  # rows still in the batch
    open_A = torch.ones_like(row_A, dtype=torch.bool)
    for step in range(draws.max_tokens):
        logits_AV = model(
            input_ids=step_ids,
            attention_mask=mask.long(),
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **cache,
        ).logits[:, -1]
        chosen_A = draws.draw(logits_AV, row_A * draws.max_tokens + step)
        ending_A = draws.ending(chosen_A)
        leaving_A = open_A if step + 1 == draws.max_tokens else open_A & ending_A
        leaving = row_A[leaving_A].tolist()
        for row, by_itself in zip(leaving, ending_A[leaving_A].tolist(), strict=True):
            draws.finish(row, step + 1, by_itself=by_itself)
        if leaving:
            open_A = open_A & ~leaving_A
            yield leaving
        still_open = int(open_A.sum())
        if still_open == 0:
            return
        if still_open < _COMPACT_AT * len(row_A):
            kept = open_A.nonzero().squeeze(1)
            for layers in cache.values():
                layers.batch_select_indices(kept)
            row_A, chosen_A, mask, positions, open_A = (x[kept] for x in (row_A, chosen_A, mask, positions, open_A))
        step_ids = chosen_A.unsqueeze(1)
        mask = torch.cat([mask, torch.ones_like(step_ids, dtype=torch.bool)], dim=1)
        positions = positions[:, -1:] + 1
