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
    from lit_instruct.models.attention import Run, Segments

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
    """``softmax(scale * Q K' + bias) V``, one run of segments after the other.

    Queries of one key head are rows of one product, so that no key is repeated: with G queries a key head and n
    segments in the run the rows are ``[key heads * n, G * tokens, D]``.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float, window: int | None
    ) -> Tensor:
        _, heads, total, _ = query.shape
        groups = heads // key.shape[1]
        out = query.new_empty(1, total, heads, value.shape[-1])  # latent attention: values narrower than keys
        held = []
        for run in segments.runs:
            q = _rows(query[0, :, run.columns], groups, run.size)
            k, v = (_keys(tensor[0], run) for tensor in (key, value))
            bias = _bias(segments, run, window, groups, query)
            weights = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=scale).softmax(dim=-1)
            _put(out[0, run.columns], torch.bmm(weights, v), groups, run.size)
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
        for run, weights in zip(ctx.segments.runs, held, strict=True):
            own, prefix = run.columns, slice(run.part.left, run.part.right)
            q = _rows(query[0, :, own], groups, run.size)
            k, v = (_keys(tensor[0], run) for tensor in (key, value))
            g = _rows(grad_out[0, own].transpose(0, 1), groups, run.size)
            grad_weights = torch.bmm(g, v.transpose(1, 2))
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            _put(grad_query[0, own], torch.bmm(grad_scores, k).mul_(ctx.scale), groups, run.size)
            to_keys = torch.bmm(grad_scores.transpose(1, 2), q).mul_(ctx.scale)
            to_values = torch.bmm(weights.transpose(1, 2), g)
            behind = prefix.stop - prefix.start
            for into, new in ((grad_key[0], to_keys), (grad_value[0], to_values)):
                _put(into[own], new[:, behind:], 1, run.size)
                if behind:
                    into[prefix] += new[:, :behind].transpose(0, 1)
        return (*(grad.transpose(1, 2) for grad in (grad_query, grad_key, grad_value)), None, None, None)


def _rows(queries_HTD: Tensor, groups: int, count: int) -> Tensor:
    """``[heads, count * T, D]`` as ``[key heads * count, groups * T, D]``."""
    heads, tokens, width = queries_HTD.shape
    apart = queries_HTD.reshape(heads // groups, groups, count, tokens // count, width)
    return apart.transpose(1, 2).reshape(heads // groups * count, groups * tokens // count, width)


def _keys(tensor_HTD: Tensor, run: Run) -> Tensor:
    """``[key heads * count, prefix + T, D]``; only a run of one has a prefix."""
    own, part = tensor_HTD[:, run.columns], run.part
    if part.left != part.right:
        return torch.cat([tensor_HTD[:, part.left : part.right], own], dim=1)
    return own.reshape(len(own) * run.size, -1, own.shape[2])


def _put(into_THD: Tensor, rows: Tensor, groups: int, count: int) -> None:
    """Write ``[key heads * count, groups * T, D]`` into ``[count * T, heads, D]``."""
    tokens, heads, width = into_THD.shape
    apart = rows.reshape(heads // groups, count, groups, tokens // count, width)
    into_THD.view(count, tokens // count, heads // groups, groups, width).copy_(apart.permute(1, 3, 0, 2, 4))


def _bias(segments: Segments, run: Run, window: int | None, groups: int, like: Tensor) -> Tensor:
    bias = segments.bias(run, window, like)
    # The segments hold on to the bias, so its id is its own.
    return segments.shared(("rows", groups, id(bias)), lambda: bias.repeat(groups, 1))
