"""Attention of a packed row by the kernels of a GPU: FlashAttention where it is installed, else FlexAttention.

Both are exact for segments with and without a prefix. Neither trains on a CPU; there segments are attended one by one
(:mod:`lit_instruct.models.attention`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers.utils import is_flash_attn_2_available

if TYPE_CHECKING:
    from lit_instruct.models.attention import Segments

_BLOCK = 128
_NARROWEST = 16  # heads, in numbers: FlexAttention refuses narrower ones
_WIDEST = 256  # FlashAttention refuses wider ones
_HALF = (torch.float16, torch.bfloat16)


class KeyRuns(NamedTuple):
    """A packed row as kernels for sequences of unequal length want it.

    Attributes:
        columns: int64 ``[S]``, the key columns of all segments behind one another, each one's prefix before its own;
            None where no segment has a prefix: all columns in order.
        query_ends: int32 ``[segments + 1]``, where each segment's queries end; begins with 0.
        key_ends: int32 ``[segments + 1]``, where each segment's keys end.
        most_queries: of one segment.
        most_keys: of one segment.
    """

    columns: Tensor | None
    query_ends: Tensor
    key_ends: Tensor
    most_queries: int
    most_keys: int


def device_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor | None:
    """Attention inside the segments of a packed row, on a GPU.

    Args:
        query: ``[1, heads, T, D]``.
        key: ``[1, key heads, T, D]``.
        value: as ``key``.
        segments: how the row is cut.
        scale: of the scores.
        window: how many keys a query sees, or None.
        softcap: bound of the scores, or None.
        sinks: a score each head gives to nothing, or None.

    Returns:
        ``[1, T, heads, D]``, or None where no kernel knows all of this and the caller attends segment by segment.
    """
    width = query.shape[-1]
    if sinks is not None or width < _NARROWEST:
        return None
    flash_knows = query.dtype in _HALF and width == value.shape[-1] <= _WIDEST
    if flash_knows and query.is_cuda and is_flash_attn_2_available():
        return _flash(query, key, value, segments, scale, window, softcap)
    if query.is_cuda:
        return flex(query, key, value, segments, scale=scale, window=window, softcap=softcap, kernel=_compiled_flex())
    return None


def key_runs(segments: Segments, device: torch.device) -> KeyRuns:
    """Lay the keys of all segments behind one another.

    ::

        segments   (0, 2) (2, 5, 0, 2)       p p r r r
        columns    0 1 | 0 1 2 3 4           queries end at 0 2 5, keys at 0 2 7

    Args:
        segments: how the row is cut.
        device: of the row.

    Returns:
        The runs.
    """

    def make() -> KeyRuns:
        queries = segments.lengths
        keys = [part.right - part.left + part.stop - part.start for part in segments.parts]
        columns = None
        if queries != keys:
            spans = [span for p in segments.parts for span in ((p.left, p.right), (p.start, p.stop))]
            columns = torch.cat([torch.arange(*span) for span in spans]).to(device)
        query_ends, key_ends = (
            torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device) for lengths in (queries, keys)
        )
        return KeyRuns(columns, query_ends, key_ends, max(queries), max(keys))

    runs: KeyRuns = segments.shared(("runs", device), make)
    return runs


def _flash(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float, window: int | None, cap: float | None
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    runs = key_runs(segments, query.device)
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if runs.columns is not None:
        k, v = k[runs.columns], v[runs.columns]
    out: Tensor = flash_attn_varlen_func(
        q,
        k,
        v,
        runs.query_ends,
        runs.key_ends,
        runs.most_queries,
        runs.most_keys,
        softmax_scale=scale,
        causal=True,  # the last query sits on the last key
        window_size=(-1, -1) if window is None else (window - 1, 0),
        softcap=cap or 0.0,
    )
    return out[None]


def flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    *,
    scale: float,
    window: int | None,
    softcap: float | None = None,
    kernel: Callable[..., Any] = flex_attention,
) -> Tensor:
    """The same by FlexAttention.

    Args:
        query: ``[1, heads, T, D]``.
        key: ``[1, key heads, T, D]``.
        value: as ``key``.
        segments: how the row is cut.
        scale: of the scores.
        window: how many keys a query sees, or None.
        softcap: bound of the scores, or None.
        kernel: torch's function, compiled or (slow) not.

    Returns:
        ``[1, T, heads, D]``.
    """
    # A tensor: a number in a function is to the compiler one that may change, which it cannot read inside a kernel.
    cap = None if softcap is None else torch.full((), softcap, device=query.device)

    def bounded(score: Tensor, *_: Tensor) -> Tensor:
        assert cap is not None
        return cap * torch.tanh(score / cap)

    out: Tensor = kernel(
        query,
        key,
        value,
        score_mod=None if cap is None else bounded,
        block_mask=_block_mask(segments, query.shape[2], window, query.device),
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2).contiguous()


def _block_mask(segments: Segments, total: int, window: int | None, device: torch.device) -> BlockMask:
    def make() -> BlockMask:
        lengths = torch.tensor(segments.lengths)
        number, left, right, start = (
            torch.repeat_interleave(torch.tensor(column), lengths).to(device)
            for column in zip(*((n, p.left, p.right, p.start) for n, p in enumerate(segments.parts)), strict=True)
        )

        def seen(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            own = (number[query] == number[key]) & (key <= query)
            prefix = (key >= left[query]) & (key < right[query])
            if window is None:
                return own | prefix
            # How far back: keys between the prefix and the segment are not there for this query.
            back = query - key - torch.where(prefix, start[query] - right[query], 0)
            return (own | prefix) & (back < window)

        return create_block_mask(seen, None, None, total, total, device=str(device), BLOCK_SIZE=_BLOCK)

    mask: BlockMask = segments.shared(("blocks", total, window, device), make)
    return mask


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Any]:
    # One for each dtype, with and without gradient, window and bound. Torch's eight are few, and with fullgraph one
    # more is an error (without, a slow path that nobody would notice). The limit is that of the whole process.
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 64)
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)
