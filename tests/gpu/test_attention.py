"""The kernels of a GPU for packed rows, against the loop over queries: outputs and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.utils import is_flash_attn_2_available

from lit_instruct.models import attention_kernels
from lit_instruct.models.attention import NO_MASK, Segment, Segments, _by_segment, attention_forward
from lit_instruct.models.attention_kernels import device_attention
from tests.unit.models.packed_rows import CUTS, SCALE, assert_same, loop

WIDTH = 32
HALVES = [torch.float16, torch.bfloat16]

cuts = pytest.mark.parametrize("cut", CUTS)
options = pytest.mark.parametrize(("window", "softcap"), [(None, None), (3, None), (None, 1.5), (3, 1.5)])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def leaves(total: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Queries of four heads, keys and values of two, in fp64 on the CPU, with numbers that ``dtype`` has too."""
    stream = torch.Generator().manual_seed(3)
    made = (torch.randn(1, heads, total, WIDTH, generator=stream) for heads in (4, 2, 2))
    return tuple(x.to(dtype).double().requires_grad_() for x in made)


def on_gpu(wanted: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    return [x.to("cuda", dtype) for x in wanted]


def assert_like_the_loop(
    cut: list[Segment], window: int | None, softcap: float | None, dtype: torch.dtype, scale: float
) -> None:
    wanted, segments = leaves(cut[-1].stop, dtype), Segments(cut)
    got = device_attention(*on_gpu(wanted, dtype), segments, scale=SCALE, window=window, softcap=softcap, sinks=None)
    assert got is not None
    need = loop(*wanted, segments, window, softcap=softcap)
    assert_same(got.cpu(), need, wanted, dtype=torch.bfloat16 if dtype in HALVES else dtype, scale=scale)


@cuts
@options
@dtypes
def test_flex_attention(
    monkeypatch: pytest.MonkeyPatch, cut: str, window: int | None, softcap: float | None, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(attention_kernels, "is_flash_attn_2_available", lambda: False)
    assert_like_the_loop(CUTS[cut], window, softcap, dtype, scale=2.0)


@pytest.mark.parametrize("window", [None, 60])
@dtypes
def test_flex_attention_over_more_than_one_block(
    monkeypatch: pytest.MonkeyPatch, window: int | None, dtype: torch.dtype
) -> None:
    """Blocks of 128 columns; a prefix far from some who see it, and a window that reaches into it."""
    monkeypatch.setattr(attention_kernels, "is_flash_attn_2_available", lambda: False)
    cut = [Segment(0, 80), Segment(80, 190, 0, 80), Segment(190, 200, 0, 80), Segment(200, 345)]
    assert_like_the_loop(cut, window, None, dtype, scale=4.0)  # sums of up to 190 terms


@cuts
@options
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.skipif(not is_flash_attn_2_available(), reason="the package flash-attn is not installed")
def test_flash_attention(cut: str, window: int | None, softcap: float | None, dtype: torch.dtype) -> None:
    assert_like_the_loop(CUTS[cut], window, softcap, dtype, scale=2.0)


@cuts
@options
@pytest.mark.parametrize("sinks", [False, True])
def test_segment_by_segment(cut: str, window: int | None, softcap: float | None, sinks: bool) -> None:
    """The way that is taken where no kernel knows what is asked."""
    wanted, segments = leaves(CUTS[cut][-1].stop, torch.float32), Segments(CUTS[cut])
    toward_nothing = torch.randn(4, generator=torch.Generator().manual_seed(5)) if sinks else None
    query, key, value = on_gpu(wanted, torch.float32)
    there = None if toward_nothing is None else toward_nothing.cuda()
    got = _by_segment(query, key, value, segments, SCALE, window, softcap, there, 0.0)
    need = loop(*wanted, segments, window, softcap=softcap, sinks=toward_nothing)
    assert_same(got.cpu(), need, wanted, dtype=torch.float32, scale=2.0)


def test_narrow_heads_under_autocast() -> None:
    """No kernel takes them; the formula that a CPU has for short segments has no gradient here."""
    segments = Segments(CUTS["shared prompt"])
    wanted = tuple(x[..., :8].detach().requires_grad_() for x in leaves(segments.parts[-1].stop, torch.bfloat16))
    with torch.autocast("cuda", torch.bfloat16):
        got, _ = attention_forward(
            torch.nn.Identity(), *on_gpu(wanted, torch.bfloat16), NO_MASK, scaling=SCALE, segments=segments
        )
    assert_same(got.cpu(), loop(*wanted, segments, None), wanted, dtype=torch.bfloat16, scale=2.0)


def test_narrow_heads_and_sinks_have_no_kernel() -> None:
    segments, sinks = Segments(CUTS["one"]), torch.zeros(2, device="cuda")
    for width, given in ((WIDTH, sinks), (8, None)):
        row = torch.randn(1, 2, 5, width, device="cuda")
        assert device_attention(row, row, row, segments, scale=SCALE, window=None, softcap=None, sinks=given) is None
