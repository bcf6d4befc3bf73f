"""One attention function for packed rows, slots of a rollout and ordinary calls, on any decoder that has the hook.

It is registered with transformers under one name for a model's whole life. What is to be seen is told by keyword:

- ``segments``: one packed row, cut into parts that see themselves and, maybe, a prefix (:class:`Segments`);
- ``slots``: one new token a row against a cache in which every row has a length of its own
  (:mod:`lit_instruct.models.slot_cache`);
- neither: the mask that transformers made, as in any other model.

Keywords and not a global: under gradient checkpointing the forward pass is repeated in the backward pass, when a
context would be gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from lit_instruct.models.attention_kernels import device_attention
from lit_instruct.models.short_attention import SHORT, short_attention

NAME = "lit_segments"

NO_MASK = torch.zeros(1, 1, 0, 0, dtype=torch.bool)
"""What a model is given as its mask together with ``segments`` or ``slots``.

Transformers hands a 4-D mask on as it is, so no ``T x T`` mask is built. And it fits no attention scores: where a model
drops the keyword, attention raises instead of looking across segments without a word.
"""


class Segment(NamedTuple):
    """Columns ``start`` to ``stop`` of a row: they see themselves, causally, and all of ``left`` to ``right``."""

    start: int
    stop: int
    left: int = 0
    right: int = 0


BLOCK = 64
"""Neighbours that have together at most so many columns are attended under one mask: most of their scores are then
worked out in vain, but for a few tokens a call costs more than its numbers do (``scripts/benchmark/attention.py``)."""


class Run(NamedTuple):
    """Neighbouring segments from number ``first`` on that one call attends.

    Either ``size`` of one length, of which ``part`` is the first; or ``mixed`` of any lengths under one mask, of which
    ``part`` holds all columns.
    """

    first: int
    size: int
    part: Segment
    mixed: int = 0

    @property
    def columns(self) -> slice:
        """Of all of them."""
        return slice(self.part.start, self.part.start + self.size * (self.part.stop - self.part.start))


class Segments:
    """How one packed row is cut; every column belongs to one segment, in order.

    ::

        SFT            a a a b b          (0, 3) (3, 5)
        shared prompt  p p r r r s        (0, 2) (2, 5, 0, 2) (5, 6, 0, 2)

    It also keeps what all layers of one forward pass share: masks, and what the kernels of a GPU want to know.

    Attributes:
        parts: the segments.
        prefixes: of each segment, the number of the one that is its prefix; -1: none.
        runs: the segments, those together that one call attends.
        windows: the sliding window that each layer asked for, in order; None unless somebody wants to know.
    """

    def __init__(self, parts: Sequence[Segment], *, watch_windows: bool = False):
        """Keep them.

        Args:
            parts: the segments.
            watch_windows: note the windows down.

        Raises:
            ValueError: a prefix is no whole segment before the one that sees it.
        """
        self.parts = tuple(parts)
        whole = {(0, 0): -1}
        self.prefixes: list[int] = []
        for number, part in enumerate(self.parts):
            if (part.left, part.right) not in whole:
                raise ValueError(
                    f"segments: got the prefix {part.left} to {part.right} for {part.start} to {part.stop}; need one "
                    "whole segment that stands before"
                )
            self.prefixes.append(whole[part.left, part.right])
            whole[part.start, part.stop] = number
        self.runs = self._find_runs()
        self.windows: list[int | None] | None = [] if watch_windows else None
        self._shared: dict[Any, Any] = {}

    def _find_runs(self) -> list[Run]:
        """Small families that stand side by side share a block; in large ones each run stays by itself."""
        runs: list[Run] = []
        pending: list[Run] = []
        for family in self._families():
            if pending and family[-1].columns.stop - pending[0].columns.start > BLOCK:
                runs += self._joined(pending)
                pending = []
            pending += family
        return runs + self._joined(pending)

    def _joined(self, runs: list[Run]) -> list[Run]:
        if len(runs) < 2:
            return runs
        first, whole = runs[0].first, Segment(runs[0].part.start, runs[-1].columns.stop)
        if whole.stop - whole.start > BLOCK:
            return runs
        return [Run(first, 1, whole, mixed=runs[-1].first + runs[-1].size - first)]

    def _families(self) -> list[list[Run]]:
        """Runs that no prefix ties to others outside; a run are neighbours of one length that see only themselves."""
        alone = [prefix < 0 for prefix in self.prefixes]
        for prefix in self.prefixes:
            if prefix >= 0:
                alone[prefix] = False
        families: list[list[Run]] = []
        earliest = len(self.parts)  # of all that segments from here on see
        begins = [False] * len(self.parts)
        for number in range(len(self.parts) - 1, -1, -1):
            earliest = min(earliest, self.prefixes[number] if self.prefixes[number] >= 0 else number)
            begins[number] = earliest == number
        for number, length in enumerate(self.lengths):
            if number and alone[number] and alone[number - 1] and length == self.lengths[number - 1]:
                last = families[-1][-1]
                families[-1][-1] = last._replace(size=last.size + 1)
            elif begins[number]:
                families.append([Run(number, 1, self.parts[number])])
            else:
                families[-1].append(Run(number, 1, self.parts[number]))
        return families

    @property
    def lengths(self) -> list[int]:
        """Columns of each segment."""
        return [part.stop - part.start for part in self.parts]

    def shared(self, key: Any, make: Any) -> Any:
        """What ``make()`` gives, made once.

        Args:
            key: what it depends on.
            make: makes it.
        """
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def bias(self, run: Run, window: int | None, like: Tensor) -> Tensor:
        """The mask of a run as numbers to add: 0 where a query sees a key, else -inf.

        Args:
            run: one of ``runs``.
            window: of a sliding window, or None.
            like: has the dtype and the device.

        Returns:
            ``[queries, keys]`` of one of its segments, the keys of the prefix first; of a block all columns.
        """
        part = run.part
        queries = part.stop - part.start
        keys = queries + part.right - part.left
        cut = window if window is not None and keys > window else None

        def make() -> Tensor:
            seen = self._seen_in_block(run, cut) if run.mixed else visible(queries, keys, cut, torch.device("cpu"))
            bias = torch.zeros(queries, keys, dtype=like.dtype).masked_fill_(~seen, -torch.inf)
            return bias.to(like.device)

        return self.shared((run.first if run.mixed else -1, queries, keys, cut, like.dtype, like.device), make)

    def _seen_in_block(self, run: Run, window: int | None) -> Tensor:
        """Bool ``[columns, columns]``.

        ::

            p p r r s        p sees p; r sees p and r; s sees p and s
            0 1 0 1 0        places in the own segment; after a prefix of 2 tokens, those of r and s are 2 3 and 2
        """
        numbers = range(run.first, run.first + run.mixed)
        lengths = torch.tensor([self.lengths[number] for number in numbers])

        def by_column(values: list[int]) -> Tensor:
            return torch.tensor(values).repeat_interleave(lengths)

        segment = by_column(list(numbers))
        prefix = by_column([self.prefixes[number] for number in numbers])
        ahead = by_column([self.parts[number].right - self.parts[number].left for number in numbers])
        place = torch.arange(len(segment)) + run.part.start - by_column([self.parts[n].start for n in numbers])
        same = segment[:, None] == segment[None]
        back = place[:, None] - place[None] + torch.where(same, 0, ahead[:, None])
        seen = (same | (prefix[:, None] == segment[None])) & (back >= 0)
        return seen if window is None else seen & (back < window)


def visible(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Which key each query sees; the last query sits on the last key.

    ::

        queries 2, keys 4, window None        window 2
              T T T F                          F T T F
              T T T T                          F F T T

    Args:
        queries: how many.
        keys: how many, at least as many.
        window: a query sees so many keys, its own included; None: all before it.
        device: where the result lies.

    Returns:
        bool ``[queries, keys]``.
    """
    query = torch.arange(keys - queries, keys, device=device)[:, None]
    key = torch.arange(keys, device=device)[None]
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    segments: Segments | None = None,
    slots: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it.

    Args:
        module: the attention layer.
        query: ``[B, heads, T, D]``.
        key: ``[B, key heads, S, D]``; each serves ``heads / key heads`` neighbouring queries.
        value: as ``key``.
        attention_mask: of transformers; not read with ``segments`` or ``slots``.
        scaling: of the scores; None: one over the root of D.
        dropout: share of the weights that is dropped.
        sliding_window: how many keys a query sees, or None.
        softcap: bound of the scores (Gemma 2), or None.
        s_aux: a score each head gives to nothing at all (attention sinks of gpt-oss), or None.
        segments: of a packed row (B is 1).
        slots: the step of a rollout, see :class:`lit_instruct.models.slot_cache.SlotStep`.
        **kwargs: more that a model hands down; read by ordinary calls only.

    Returns:
        ``[B, T, heads, D]`` and no weights.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = sliding_window or None
    if slots is not None:
        return slots.attend(query, key, value, scale=scale, window=window, softcap=softcap, sinks=s_aux), None
    if segments is None:
        if softcap is None and s_aux is None:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
            )
        seen = attention_mask
        if seen is None:
            seen = visible(query.shape[2], key.shape[2], window, query.device)
        weighted = attend(query, key, value, seen, scale=scale, softcap=softcap, sinks=s_aux, dropout=dropout)
        return weighted.transpose(1, 2).contiguous(), None
    if segments.windows is not None:
        segments.windows.append(window)
    if torch.is_autocast_enabled(query.device.type):
        # Rotary positions come in fp32 and leave queries so; torch's own attention casts them down like a product's.
        half = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(half), key.to(half), value.to(half)
    if query.device.type != "cpu":
        by_kernel = device_attention(
            query, key, value, segments, scale=scale, window=window, softcap=softcap, sinks=s_aux
        )
        if by_kernel is not None:
            return by_kernel, None
    # On a CPU alone: under a GPU's autocast a softmax is in fp32, and its gradient refuses one in bf16.
    simple = query.device.type == "cpu" and softcap is None and s_aux is None and dropout == 0.0
    # Also without gradients, where torch's kernel is faster: PPO's ratio is 1 at first only if both passes round alike.
    if simple and query.dtype != torch.float32 and max(segments.lengths) <= SHORT:
        return short_attention(query, key, value, segments, scale=scale, window=window), None
    return _by_segment(query, key, value, segments, scale, window, softcap, s_aux, dropout), None


def _by_segment(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    dropout: float,
) -> Tensor:
    """One call of torch's fused attention a segment, or of the plain formula where a model wants more than that."""
    # Split, not sliced: the backward pass of a slice writes a whole row of zeros, that of a split joins the parts.
    sizes = [run.columns.stop - run.columns.start for run in segments.runs]
    queries, keys, values = (tensor.split(sizes, dim=2) for tensor in (query, key, value))
    at = {run.first: number for number, run in enumerate(segments.runs)}  # a prefix from outside is a run of its own
    outputs = []
    for run, q, k, v in zip(segments.runs, queries, keys, values, strict=True):
        prefix = segments.prefixes[run.first]
        if prefix >= 0:
            k, v = torch.cat([keys[at[prefix]], k], dim=2), torch.cat([values[at[prefix]], v], dim=2)
        elif run.size > 1:
            q, k, v = (tensor[0].unflatten(1, (run.size, -1)).transpose(0, 1) for tensor in (q, k, v))
        if softcap is not None or sinks is not None:
            seen = segments.bias(run, window, q)
            out = attend(q, k, v, seen, scale=scale, softcap=softcap, sinks=sinks, dropout=dropout)
        else:
            square = prefix < 0 and not run.mixed and (window is None or k.shape[2] <= window)
            out = nn.functional.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=None if square else segments.bias(run, window, q),
                dropout_p=dropout,
                is_causal=square,
                scale=scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        outputs.append(out.transpose(1, 2).reshape(1, -1, *out.shape[1::2]))
    return torch.cat(outputs, dim=1)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention by its formula, for what fused kernels do not know: bounded scores and sinks.

    Args:
        query: ``[B, heads, T, D]``.
        key: ``[B, key heads, S, D]``.
        value: as ``key``.
        seen: bool or a float that is added, broadcast to ``[B, heads, T, S]``.
        scale: of the scores.
        softcap: scores become ``softcap * tanh(score / softcap)`` (Gemma 2).
        sinks: ``[heads]``, a score each head gives to nothing at all (gpt-oss).
        dropout: share of the weights that is dropped.

    Returns:
        ``[B, heads, T, D]``.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) if groups > 1 else tensor for tensor in (key, value))
    scores = torch.matmul(query, key.transpose(2, 3)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.float()
    # Not -inf: a query in the padding sees nothing, and its NaN would reach everybody through keys of weight zero.
    hidden = torch.finfo(scores.dtype).min
    scores = scores.masked_fill(~seen, hidden) if seen.dtype == torch.bool else scores + seen
    if sinks is not None:
        column = sinks.float().view(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        weights = torch.cat([scores, column], dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights = scores.softmax(dim=-1)
    weights = nn.functional.dropout(weights.to(query.dtype), dropout)
    return torch.matmul(weights, value)


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)  # ordinary calls keep their usual masks
