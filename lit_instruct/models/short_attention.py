"""Attention of short segments on a CPU, with the weights held and the backward pass written out.

Torch's fused kernel is made for long rows: in bf16 a segment of 100 tokens takes it two to three times as long as a
few plain matrix products do (``scripts/benchmark/attention.py``). Left to autograd, those products would each copy
their slices; here every result is written where it belongs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from lit_instruct.models.attention import Segments

SHORT = 384
"""Longest segment, in tokens, that is attended here: the weights held are ``heads * tokens * keys``."""


def short_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, *, scale: float, window: int | None
) -> Tensor:
    """Attention inside segments.

    Args:
        query: ``[1, heads, T, D]``.
        key: ``[1, key heads, T, D]``.
        value: as ``key``.
        segments: how the row is cut.
        scale: of the scores.
        window: how many keys a query sees, or None.

    Returns:
        ``[1, T, heads, D]``.
    """
    out: Tensor = _ShortAttention.apply(query, key, value, segments, scale, window)
    return out


class _ShortAttention(torch.autograd.Function):
    """``softmax(scale * Q K' + bias) V``, one segment after the other.

    Queries of one key head are rows of one product, so that no key is repeated: with G queries a key head the rows are
    ``[key heads, G * tokens, D]``.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float, window: int | None
    ) -> Tensor:
        _, heads, total, _ = query.shape
        groups = heads // key.shape[1]
        out = query.new_empty(1, total, heads, value.shape[-1])  # latent attention: values narrower than keys
        held = []
        for part in segments.parts:
            q = _rows(query[0, :, part.start : part.stop], groups)
            k, v = (_keys(tensor[0], part) for tensor in (key, value))
            bias = _bias(segments, part, window, groups, query)
            weights = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=scale).softmax(dim=-1)
            _put(out[0, part.start : part.stop], torch.bmm(weights, v), groups)
            held.append(weights)
        ctx.save_for_backward(query, key, value, *held)
        ctx.segments, ctx.scale = segments, scale
        return out

    @staticmethod
    @once_differentiable  # the weights held are constants to autograd
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
        query, key, value, *held = ctx.saved_tensors
        groups = query.shape[1] // key.shape[1]
        # A prefix collects from everybody who looks at it, and so adds; its own segment comes first and sets.
        grad_query, grad_key, grad_value = (
            torch.empty_like(tensor.transpose(1, 2), memory_format=torch.contiguous_format)
            for tensor in (query, key, value)
        )
        for part, weights in zip(ctx.segments.parts, held, strict=True):
            own = slice(part.start, part.stop)
            prefix, behind = slice(part.left, part.right), part.right - part.left
            q = _rows(query[0, :, own], groups)
            k, v = (_keys(tensor[0], part) for tensor in (key, value))
            g = _rows(grad_out[0, own].transpose(0, 1), groups)
            grad_weights = torch.bmm(g, v.transpose(1, 2))
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            _put(grad_query[0, own], torch.bmm(grad_scores, k).mul_(ctx.scale), groups)
            to_keys = torch.bmm(grad_scores.transpose(1, 2), q).mul_(ctx.scale).transpose(0, 1)
            to_values = torch.bmm(weights.transpose(1, 2), g).transpose(0, 1)
            for into, new in ((grad_key[0], to_keys), (grad_value[0], to_values)):
                into[own] = new[behind:]
                if behind:
                    into[prefix] += new[:behind]
        return (*(grad.transpose(1, 2) for grad in (grad_query, grad_key, grad_value)), None, None, None)


def _rows(queries_HTD: Tensor, groups: int) -> Tensor:
    """``[heads, T, D]`` as ``[key heads, groups * T, D]``."""
    heads, tokens, width = queries_HTD.shape
    return queries_HTD.reshape(heads // groups, groups * tokens, width)


def _keys(tensor_HTD: Tensor, part: Any) -> Tensor:
    own = tensor_HTD[:, part.start : part.stop]
    return own if part.left == part.right else torch.cat([tensor_HTD[:, part.left : part.right], own], dim=1)


def _put(into_THD: Tensor, rows: Tensor, groups: int) -> None:
    """Write ``[key heads, groups * T, D]`` into ``[T, heads, D]``."""
    tokens, heads, width = into_THD.shape
    into_THD.copy_(rows.view(heads, tokens, width).transpose(0, 1))


def _bias(segments: Segments, part: Any, window: int | None, groups: int, like: Tensor) -> Tensor:
    tokens = part.stop - part.start
    keys = tokens + part.right - part.left
    cut = window if window is not None and keys > window else None

    def repeated() -> Tensor:
        return segments.bias(tokens, keys, cut, like).repeat(groups, 1)

    return segments.shared(("rows", groups, tokens, keys, cut, like.dtype), repeated)
