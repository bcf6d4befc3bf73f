"""Packed rows for tests: how they are cut, and attention inside their segments as a loop over queries."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_instruct.models.attention import Segment, Segments
from tests.helpers.numbers import assert_close

CUTS: dict[str, list[Segment]] = {
    "one": [Segment(0, 5)],
    "sequences": [Segment(0, 4), Segment(4, 5), Segment(5, 11)],
    "equal ones": [Segment(0, 2), Segment(2, 5), Segment(5, 8), Segment(8, 11), Segment(11, 12)],
    "shared prompt": [Segment(0, 4), Segment(4, 6, 0, 4), Segment(6, 11, 0, 4), Segment(11, 12, 0, 4)],
    "two prompts": [Segment(0, 3), Segment(3, 7, 0, 3), Segment(7, 9), Segment(9, 10, 7, 9), Segment(10, 13, 7, 9)],
}
HEADS = {"plain": (2, 2), "grouped": (4, 2), "one key head": (3, 1)}
SCALE = 0.37


def loop(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    window: int | None,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """``[1, T, heads, D]`` by the definition: for each query, list the keys it sees, and average their values."""
    _, count, total, _ = query.shape
    groups = count // key.shape[1]
    out = []
    for column in range(total):
        (part,) = (p for p in segments.parts if p.start <= column < p.stop)
        seen = [*range(part.left, part.right), *range(part.start, column + 1)]
        seen = seen if window is None else seen[-window:]
        for head in range(count):
            scores = SCALE * key[0, head // groups, seen] @ query[0, head, column]
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            weights = scores.exp()
            whole = weights.sum() + (0 if sinks is None else sinks[head].exp())
            out.append((weights / whole) @ value[0, head // groups, seen])
    return torch.stack(out).view(1, total, count, -1)


def assert_same(
    got: Tensor, need: Tensor, wanted: tuple[Tensor, ...], *, dtype: torch.dtype, scale: float = 1.0
) -> None:
    """Outputs, and the gradients of their weighted sum."""
    assert_close(got, need, dtype=dtype, scale=scale)
    weights = torch.randn(need.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    mine = torch.autograd.grad((weights * got).sum(), wanted)
    theirs = torch.autograd.grad((weights * need).sum(), wanted)
    for name, a, b in zip(("query", "key", "value", "sinks"), mine, theirs, strict=False):
        assert a.shape == b.shape, name
        assert_close(a, b, dtype=dtype, scale=scale)
