"""Decoding with slots: a row that has finished makes room at once, and waiting prompts move in while others go on."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_instruct.models.attention import NO_MASK, Segment, Segments
from lit_instruct.models.sampling import Draws
from lit_instruct.models.slot_cache import SlotCache, SlotStep, cache_keyword
from lit_instruct.types import PromptBatch

_REFILL = 1 / 8  # prompts move in when so large a share of the slots is free: a pass over few tokens is a waste
_PREFILL_TOKENS = 4096  # prompts that are read in one pass; more would only take more memory
_FIRST_ROOM = 64  # response tokens that have room before the cache has to grow


def decode_slots(model: PreTrainedModel, prompts: PromptBatch, draws: Draws, slots: int) -> Iterator[list[int]]:
    """Decode all prompts, at most ``slots`` at a time.

    Args:
        model: in eval mode; it reads packed rows (:func:`lit_instruct.models.packing.admission`).
        prompts: padded on the left.
        draws: takes the tokens.
        slots: most rows at a time.

    Yields:
        Rows that have just finished.
    """
    ids_of_rows = zip(prompts.prompt_ids_BP.cpu(), prompts.prompt_mask_BP.cpu(), strict=True)
    ids = [ids_P[mask_P].tolist() for ids_P, mask_P in ids_of_rows]
    yield from _SlotDecoder(model, ids, draws, min(slots, len(ids))).run()


class _Arrivals(NamedTuple):
    """Waiting rows that move in together: ``rows[i]`` goes to ``slots[i]``.

    Of those, ``read`` are the (row, slot) whose prompts must be read; the others copy a slot, (source, target).
    """

    rows: list[int]
    slots: list[int]
    read: list[tuple[int, int]]
    copies: list[tuple[int, int]]


class _SlotDecoder:
    """Rows sit in slots 0 to ``active - 1``, some of which may be holes between two steps.

    What a step needs of all slots lies on the device, ``state`` and ``tokens`` (the last draw, which the next step
    reads). What says who comes and goes lies on the host: ``row`` (-1 in a hole) and ``offset``, a row's tokens in the
    cache less the steps done, which stays the same while it decodes.
    """

    def __init__(self, model: PreTrainedModel, prompts: list[list[int]], draws: Draws, slots: int):
        self._model, self._prompts, self._draws, self._slots = model, prompts, draws, slots
        self._device = draws.device
        numbers: dict[tuple[int, ...], int] = {}
        self._number = [numbers.setdefault(tuple(prompt), len(numbers)) for prompt in prompts]
        # Equal prompts wait behind one another: they are read once.
        self._waiting = deque(sorted(range(len(prompts)), key=lambda row: (self._number[row], row)))
        room = max(map(len, prompts), default=0) + min(draws.max_tokens, _FIRST_ROOM)
        self._cache = SlotCache(slots, room, self._device)
        self._arguments: dict[str, Any] = {
            "attention_mask": NO_MASK.to(self._device),
            cache_keyword(model): self._cache,
            "use_cache": True,
        }
        # Of each slot: tokens in the cache (column and position of the next one), place of the last draw, draws left.
        self._state = torch.zeros(3, slots, dtype=torch.long, device=self._device)
        self._change = torch.tensor([[1], [1], [-1]], device=self._device)
        self._tokens = torch.zeros(slots, dtype=torch.long, device=self._device)
        self._numbers = torch.arange(slots, device=self._device)
        self._row, self._offset = [-1] * slots, [0] * slots
        self._active = self._steps = self._longest = 0  # the last one: the largest offset
        self._last_read: tuple[int, Tensor] | None = None  # number of a prompt with more rows waiting, and its logits

    def run(self) -> Iterator[list[int]]:
        """Decode everything; yields rows that have just finished."""
        refill = max(1, int(self._slots * _REFILL))
        while self._active or self._waiting:
            while self._waiting and self._row.count(-1) >= min(refill, len(self._waiting)):
                yield from self._settle(self._admit())
            self._close_holes()
            if self._active:
                yield from self._settle(self._step())

    def _admit(self) -> Tensor:
        """Let waiting rows move in and draw their first tokens; their slots, int64 ``[k]``."""
        arrivals = self._choose_arrivals()
        logits_kV = self._read_prompts(arrivals)
        lengths = [len(self._prompts[row]) for row in arrivals.rows]
        if arrivals.copies:
            sources, targets = zip(*arrivals.copies, strict=True)
            self._cache.copy_slots(sources, targets, max(lengths))
        for row, slot, length in zip(arrivals.rows, arrivals.slots, lengths, strict=True):
            self._row[slot], self._offset[slot] = row, length - self._steps
        self._recount()
        slots_k = self._tensor(arrivals.slots)
        places_k = self._tensor(arrivals.rows) * self._draws.max_tokens
        left_k = torch.full_like(places_k, self._draws.max_tokens - 1)
        self._state.index_copy_(1, slots_k, torch.stack([self._tensor(lengths), places_k, left_k]))
        self._tokens.index_copy_(0, slots_k, self._draws.draw(logits_kV, places_k))
        return slots_k

    def _choose_arrivals(self) -> _Arrivals:
        """Take from the queue what has room."""
        arrivals, tokens = _Arrivals([], [], [], []), 0
        source: dict[int, int] = {}  # number of a prompt -> slot that holds it
        if self._last_read is not None:
            read = self._last_read[0]
            source |= {read: slot for slot, row in self._occupied() if self._number[row] == read}  # noqa: B035 - any one
        for slot in [slot for slot, row in enumerate(self._row) if row < 0]:
            if not self._waiting:
                break
            row = self._waiting[0]
            number = self._number[row]
            if number in source:
                arrivals.copies.append((source[number], slot))
            else:
                tokens += len(self._prompts[row])
                if arrivals.read and tokens > _PREFILL_TOKENS:
                    break
                source[number] = slot
                arrivals.read.append((row, slot))
            arrivals.rows.append(self._waiting.popleft())
            arrivals.slots.append(slot)
        return arrivals

    def _read_prompts(self, arrivals: _Arrivals) -> Tensor:
        """Read prompts, each into its slot, in one packed row; the logits ``[k, V]`` behind all rows' prompts."""
        logits = {} if self._last_read is None else {self._last_read[0]: self._last_read[1]}
        if arrivals.read:
            prompts = [self._prompts[row] for row, _ in arrivals.read]
            stops = list(itertools.accumulate(map(len, prompts)))
            positions_T = self._tensor([position for prompt in prompts for position in range(len(prompt))])
            lengths = self._tensor([len(prompt) for prompt in prompts])
            slots_T = self._tensor([slot for _, slot in arrivals.read]).repeat_interleave(lengths)
            self._cache.write_at(slots_T, positions_T, read=None)
            read = self._model(
                input_ids=self._tensor([list(itertools.chain(*prompts))]),
                position_ids=positions_T[None],
                segments=Segments([Segment(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]),
                logits_to_keep=self._tensor(stops) - 1,
                **self._arguments,
            ).logits[0]
            logits |= {self._number[row]: read[place] for place, (row, _) in enumerate(arrivals.read)}
        numbers = [self._number[row] for row in arrivals.rows]
        more = bool(self._waiting) and self._number[self._waiting[0]] == numbers[-1]
        self._last_read = (numbers[-1], logits[numbers[-1]].clone()) if more else None
        return torch.stack([logits[number] for number in numbers]) if arrivals.copies else read

    def _step(self) -> Tensor:
        """Feed every row its last token and draw the next; their slots, int64 ``[n]``."""
        n, longest = self._active, self._longest + self._steps + 1
        self._cache.make_room(longest)
        columns_n, tokens_n, slots_n = self._state[0, :n], self._tokens[:n], self._numbers[:n]
        self._cache.write_at(slots_n, columns_n, read=(n, longest))
        logits_nV = self._model(
            input_ids=tokens_n[:, None],
            position_ids=columns_n[:, None],
            slots=SlotStep(columns_n + 1, longest),
            logits_to_keep=1,
            **self._arguments,
        ).logits[:, -1]
        self._steps += 1
        self._state[:, :n] += self._change
        tokens_n.copy_(self._draws.draw(logits_nV, self._state[1, :n]))
        return slots_n

    def _settle(self, slots_k: Tensor) -> Iterator[list[int]]:
        """Let those rows leave that have just drawn their last token; yields them."""
        ending_k = self._draws.ending(self._tokens.index_select(0, slots_k))
        left_k = self._state[2].index_select(0, slots_k)
        over = (ending_k | (left_k == 0)).nonzero().squeeze(1)
        if not len(over):
            return
        slots, ended, left = (x.index_select(0, over).tolist() for x in (slots_k, ending_k, left_k))
        rows = [self._row[slot] for slot in slots]
        for row, slot, by_itself, rest in zip(rows, slots, ended, left, strict=True):
            self._draws.finish(row, self._draws.max_tokens - rest, by_itself=by_itself)
            self._row[slot] = -1
        self._recount()
        yield rows

    def _close_holes(self) -> None:
        """Move the rows that sit last into the holes."""
        occupied = self._occupied()
        self._active = len(occupied)
        targets = [slot for slot, row in enumerate(self._row[: self._active]) if row < 0]
        if not targets:
            return
        sources = [slot for slot, _ in occupied if slot >= self._active]
        self._cache.copy_slots(sources, targets, self._longest + self._steps)
        source, target = self._tensor(sources), self._tensor(targets)
        self._state.index_copy_(1, target, self._state.index_select(1, source))
        self._tokens.index_copy_(0, target, self._tokens.index_select(0, source))
        for old, new in zip(sources, targets, strict=True):
            self._row[new], self._offset[new], self._row[old] = self._row[old], self._offset[old], -1

    def _occupied(self) -> list[tuple[int, int]]:
        return [(slot, row) for slot, row in enumerate(self._row) if row >= 0]

    def _recount(self) -> None:
        occupied = self._occupied()
        self._active = occupied[-1][0] + 1 if occupied else 0
        self._longest = max((self._offset[slot] for slot, _ in occupied), default=0)

    def _tensor(self, numbers: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(numbers, device=self._device)
