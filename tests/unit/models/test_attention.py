"""Every way to attend inside segments against a loop over queries; what kernels of a GPU are told, on a stand-in."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from lit_instruct.models import attention, attention_kernels
from lit_instruct.models.attention import (
    NO_MASK,
    Run,
    Segment,
    Segments,
    _by_segment,
    attend,
    attention_forward,
    visible,
)
from lit_instruct.models.attention_kernels import KeyRuns, device_attention, flex, key_runs
from lit_instruct.models.short_attention import short_attention
from tests.helpers.numbers import assert_close
from tests.unit.models.packed_rows import CUTS, HEADS, SCALE, assert_same, loop

cuts = pytest.mark.parametrize("cut", CUTS)
windows = pytest.mark.parametrize("window", [None, 1, 3, 50])
heads = pytest.mark.parametrize("head", HEADS)
WIDTH, VALUE_WIDTH = 4, 3


@pytest.fixture(params=[0, 6, 128], ids=["no blocks", "small blocks", "one block"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments one by one, some of them under one mask, or all of them."""
    monkeypatch.setattr(attention, "BLOCK", request.param)


blocks = pytest.mark.usefixtures("block")


def inputs(
    cut: str, head: str, *, dtype: torch.dtype = torch.float64, value_width: int = VALUE_WIDTH
) -> tuple[Tensor, Tensor, Tensor, Segments]:
    """Queries, keys, values with their gradients wanted, and the segments. Values are narrower than keys."""
    segments = Segments(CUTS[cut])
    queries, keys = HEADS[head]
    total = segments.parts[-1].stop
    generator = torch.Generator().manual_seed(3)
    shapes = ((queries, WIDTH), (keys, WIDTH), (keys, value_width))
    q, k, v = (torch.randn(1, n, total, width, generator=generator, dtype=torch.float64) for n, width in shapes)
    return *((2 * x).to(dtype).requires_grad_() for x in (q, k, v)), segments  # type: ignore[return-value]


# -- the picture


def test_who_sees_whom() -> None:
    cpu = torch.device("cpu")
    assert visible(2, 4, None, cpu).long().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert visible(2, 4, 2, cpu).long().tolist() == [[0, 1, 1, 0], [0, 0, 1, 1]]
    assert visible(3, 3, 1, cpu).long().tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_a_bias_is_made_once_for_what_it_depends_on() -> None:
    segments = Segments([Segment(0, 4)])
    inf = torch.inf
    run, one = Run(1, 1, Segment(4, 6, 0, 2)), torch.zeros(1)
    bias = segments.bias(run, 2, one)
    assert bias.tolist() == [[-inf, 0, 0, -inf], [-inf, -inf, 0, 0]]
    assert bias.dtype == torch.float32
    assert segments.bias(run, 2, one) is bias
    assert segments.bias(run, None, one).tolist() == [[0, 0, 0, -inf], [0, 0, 0, 0]]
    assert segments.bias(run, 4, one) is segments.bias(run, None, one)
    assert segments.bias(run, 2, one.bfloat16()).dtype == torch.bfloat16
    assert segments.bias(Run(1, 1, Segment(4, 5, 0, 3)), 2, one).tolist() == [[-inf, -inf, 0, 0]]


def test_in_a_block_segments_see_their_prefix_and_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """``p p r r s t``: r and s after p, t by itself; and what a window of two leaves of it."""
    monkeypatch.setattr(attention, "BLOCK", 6)
    segments = Segments([Segment(0, 2), Segment(2, 4, 0, 2), Segment(4, 5, 0, 2), Segment(5, 6)])
    (run,) = segments.runs
    assert run == Run(0, 1, Segment(0, 6), mixed=4)
    whole, cut = (segments.bias(run, window, torch.zeros(1)).exp().long().tolist() for window in (None, 2))
    assert whole == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    assert cut == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


def test_segments_know_their_lengths() -> None:
    segments = Segments(CUTS["two prompts"])
    assert segments.lengths == [3, 4, 2, 1, 3]
    assert segments.windows is None
    assert Segments([Segment(0, 1)], watch_windows=True).windows == []


# -- short segments, by hand


@blocks
@cuts
@heads
@windows
def test_short_attention(cut: str, head: str, window: int | None) -> None:
    *wanted, segments = inputs(cut, head)
    got = short_attention(*wanted, segments, scale=SCALE, window=window)
    assert_same(got, loop(*wanted, segments, window), tuple(wanted), dtype=torch.float64)


@blocks
@pytest.mark.parametrize("cut", ["sequences", "equal ones", "shared prompt"])
def test_gradients_of_short_attention_by_differences(cut: str) -> None:
    *wanted, segments = inputs(cut, "grouped")
    assert torch.autograd.gradcheck(lambda *x: short_attention(*x, segments, scale=SCALE, window=4), wanted)


def test_short_attention_has_no_second_derivative_and_says_so() -> None:
    *wanted, segments = inputs("one", "plain")
    out = short_attention(*wanted, segments, scale=SCALE, window=None)
    (first,) = torch.autograd.grad(out.square().sum(), wanted[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


# -- one fused call a segment, and the formula that knows bounded scores and sinks


@blocks
@cuts
@heads
@windows
def test_segment_by_segment(cut: str, head: str, window: int | None) -> None:
    *wanted, segments = inputs(cut, head)
    got = _by_segment(*wanted, segments, SCALE, window, None, None, 0.0)
    assert_same(got, loop(*wanted, segments, window), tuple(wanted), dtype=torch.float64)


@blocks
@cuts
@windows
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_bounded_scores_and_sinks(cut: str, window: int | None, softcap: float | None, with_sinks: bool) -> None:
    *wanted, segments = inputs(cut, "grouped", dtype=torch.float32)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], requires_grad=True) if with_sinks else None
    got = _by_segment(*wanted, segments, SCALE, window, softcap, sinks, 0.0)
    need = loop(*wanted, segments, window, softcap=softcap, sinks=sinks)
    inputs_of = (*wanted, sinks) if sinks is not None else tuple(wanted)
    assert_same(got, need, inputs_of, dtype=torch.float32, scale=2)  # fp32 on both sides


@pytest.mark.parametrize("prefix", [(0, 3), (1, 4), (4, 6), (6, 8), (0, 6)])
def test_a_prefix_that_is_no_earlier_segment_is_refused(prefix: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"got the prefix {prefix[0]} to {prefix[1]} for 4 to 6; need one whole"):
        Segments([Segment(0, 4), Segment(4, 6, *prefix), Segment(6, 8)])


def test_dropout_of_weights_keeps_the_mean() -> None:
    """Each weight is dropped or doubled: values of one average to one, and single outputs do not stay."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 8, 64, 4)
    out = attend(q, k, torch.ones(1, 8, 64, 1), visible(64, 64, None, q.device), scale=SCALE, dropout=0.5)
    assert (out - 1).abs().max() > 0.5
    # Standard error of the mean of 512 outputs whose variance is at most 1 (all weight on one key): 0.044; three of it.
    assert abs(float(out.mean()) - 1) < 0.135


# -- which of them attention_forward takes


class Called(Exception):
    """Raised by a stand-in."""


def refuse(*_: Any, **__: Any) -> Tensor:
    raise Called


@blocks
@cuts
@windows
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("short", [0, 384])
def test_a_packed_row(
    monkeypatch: pytest.MonkeyPatch, cut: str, window: int | None, dtype: torch.dtype, short: int
) -> None:
    monkeypatch.setattr(attention, "SHORT", short)
    *wanted, segments = inputs(cut, "grouped", dtype=dtype)
    module = torch.nn.Identity()
    got, none = attention_forward(module, *wanted, NO_MASK, scaling=SCALE, sliding_window=window, segments=segments)
    assert none is None
    assert got.dtype == dtype
    exact = [x.detach().double() for x in wanted]
    # bf16 keeps 8 bits of scores up to 10: weights are off by a few percent
    scale = 5 if dtype == torch.bfloat16 else 1
    assert_close(got, loop(*exact, segments, window), dtype=dtype, scale=scale)


@blocks
def test_half_precision_and_short_segments_are_attended_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    module = torch.nn.Identity()
    monkeypatch.setattr(attention, "short_attention", refuse)
    for dtype, short, by_hand in (
        (torch.float32, 384, False),
        (torch.bfloat16, 384, True),
        (torch.bfloat16, 5, False),  # the longest has 6
        (torch.bfloat16, 6, True),
    ):
        monkeypatch.setattr(attention, "SHORT", short)
        *wanted, segments = inputs("sequences", "plain", dtype=dtype)
        if by_hand:
            with pytest.raises(Called):
                attention_forward(module, *wanted, NO_MASK, segments=segments)
        else:
            attention_forward(module, *wanted, NO_MASK, segments=segments)
    monkeypatch.setattr(attention, "SHORT", 384)
    *wanted, segments = inputs("sequences", "plain", dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(Called):  # what comes in is fp32 still
        attention_forward(module, *wanted, NO_MASK, segments=segments)


@pytest.mark.parametrize("short", [0, 384])
def test_under_autocast_mixed_inputs_become_half(monkeypatch: pytest.MonkeyPatch, short: int) -> None:
    """Rotary positions leave queries and keys in fp32, values are half."""
    monkeypatch.setattr(attention, "SHORT", short)
    q, k, v, segments = inputs("shared prompt", "grouped", dtype=torch.float32)
    v = v.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, _ = attention_forward(torch.nn.Identity(), q, k, v, NO_MASK, scaling=SCALE, segments=segments)
    assert got.dtype == torch.bfloat16
    weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(4))
    grads = torch.autograd.grad((weights * got).sum(), (q, k, v))
    assert [grad.dtype for grad in grads] == [torch.float32, torch.float32, torch.bfloat16]
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    need = torch.autograd.grad((weights * loop(*exact, segments, None)).sum(), exact)
    for mine, theirs in zip(grads, need, strict=True):
        size = theirs.norm()
        assert_close((mine - theirs).norm() / size, 0.0, dtype=torch.bfloat16)  # measured: 4e-3 to 8e-3


def test_the_scale_of_a_model_that_gives_none() -> None:
    *wanted, segments = inputs("sequences", "plain")
    got, _ = attention_forward(torch.nn.Identity(), *wanted, NO_MASK, segments=segments)
    need, _ = attention_forward(torch.nn.Identity(), *wanted, NO_MASK, segments=segments, scaling=WIDTH**-0.5)
    assert torch.equal(got, need)


def test_windows_are_noted_down_for_who_asks() -> None:
    *wanted, _ = inputs("sequences", "plain")
    segments = Segments(CUTS["sequences"], watch_windows=True)
    for window in (3, None, 0):
        attention_forward(torch.nn.Identity(), *wanted, NO_MASK, segments=segments, sliding_window=window)
    assert segments.windows == [3, None, None]


# -- ordinary calls


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize(
    ("mask", "window"), [("bool", None), ("bool", 3), ("float", None), ("float", 3), ("none", None)]
)
def test_an_ordinary_call(softcap: float | None, with_sinks: bool, window: int | None, mask: str) -> None:
    *wanted, segments = inputs("one", "grouped", dtype=torch.float32)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0]) if with_sinks else None
    seen: Tensor | None = visible(5, 5, window, torch.device("cpu"))[None, None]
    if mask == "float":
        seen = torch.zeros(1, 1, 5, 5).masked_fill(~seen, torch.finfo(torch.float32).min)  # type: ignore[operator]
    module = torch.nn.Identity()
    module.num_key_value_groups, module.is_causal = 2, True
    got, none = attention_forward(
        module,
        *wanted,
        None if mask == "none" else seen,
        scaling=SCALE,
        sliding_window=window,
        softcap=softcap,
        s_aux=sinks,
    )
    assert none is None
    assert_close(got, loop(*wanted, segments, window, softcap=softcap, sinks=sinks))


def test_a_query_in_the_padding_does_no_harm() -> None:
    """It sees nothing; as NaN it would come back in the next layer, as a value of weight zero."""
    *wanted, _ = inputs("one", "grouped", dtype=torch.float32)
    seen = visible(5, 5, None, torch.device("cpu")) & torch.tensor([False, False, True, True, True])
    for softcap, sinks in ((1.5, None), (None, torch.zeros(4)), (1.5, torch.zeros(4))):
        out, _ = attention_forward(
            torch.nn.Identity(), *wanted, seen[None, None], scaling=SCALE, softcap=softcap, s_aux=sinks
        )
        assert out.isfinite().all()
        alone = [x[:, :, 2:] for x in wanted]
        assert_close(out[:, 2:], loop(*alone, Segments([Segment(0, 3)]), None, softcap=softcap, sinks=sinks))


# -- what the kernels of a GPU are told


def test_key_runs() -> None:
    cpu = torch.device("cpu")
    segments = Segments([Segment(0, 2), Segment(2, 5, 0, 2)])
    runs = key_runs(segments, cpu)
    assert runs.columns is not None
    assert runs.columns.tolist() == [0, 1, 0, 1, 2, 3, 4]
    assert runs.query_ends.tolist() == [0, 2, 5]
    assert runs.key_ends.tolist() == [0, 2, 7]
    assert (runs.most_queries, runs.most_keys) == (3, 5)
    assert runs.query_ends.dtype == runs.key_ends.dtype == torch.int32
    assert key_runs(segments, cpu) is runs
    plain = key_runs(Segments(CUTS["sequences"]), cpu)
    assert plain.columns is None
    assert plain.query_ends.tolist() == plain.key_ends.tolist() == [0, 4, 5, 11]
    assert isinstance(plain, KeyRuns)


def slow_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
) -> Tensor:
    """What FlashAttention's function of this signature computes, by its documentation.

    ``[T, heads, D]``; causal and windows count from the lower right corner of each sequence's square: with ``offset =
    keys - queries``, query i sees key j where ``i + offset - left <= j <= i + offset + right``.
    """
    assert causal
    assert dropout_p == 0.0
    assert softmax_scale is not None
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert q.shape[0] == cu_seqlens_q[-1]
    assert k.shape[0] == v.shape[0] == cu_seqlens_k[-1]
    queries, keys = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    assert (max(queries), max(keys)) == (max_seqlen_q, max_seqlen_k)
    out = []
    for n, (many, seen) in enumerate(zip(queries, keys, strict=True)):
        for i in range(many):
            last = i + seen - many
            first = 0 if window_size[0] < 0 else max(0, last - window_size[0])
            assert window_size[1] in (-1, 0)
            span = slice(int(cu_seqlens_k[n]) + first, int(cu_seqlens_k[n]) + last + 1)
            for head in range(q.shape[1]):
                group = head // (q.shape[1] // k.shape[1])
                scores = softmax_scale * k[span, group] @ q[int(cu_seqlens_q[n]) + i, head]
                scores = softcap * torch.tanh(scores / softcap) if softcap else scores
                out.append(scores.softmax(0) @ v[span, group])
    return torch.stack(out).view(q.shape[0], q.shape[1], -1)


@cuts
@heads
@windows
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_what_flash_attention_is_told(
    monkeypatch: pytest.MonkeyPatch, cut: str, head: str, window: int | None, softcap: float | None
) -> None:
    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = slow_varlen  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    *wanted, segments = inputs(cut, head, value_width=WIDTH)  # its heads are all of one width
    got = attention_kernels._flash(*wanted, segments, SCALE, window, softcap)
    assert_same(got, loop(*wanted, segments, window, softcap=softcap), tuple(wanted), dtype=torch.float64)


@cuts
@windows
@pytest.mark.parametrize("softcap", [None, 1.5])
@torch.no_grad()
def test_what_flex_attention_is_told(cut: str, window: int | None, softcap: float | None) -> None:
    """By torch's own function, uncompiled, which works out the whole square of scores."""
    *wanted, segments = inputs(cut, "grouped", dtype=torch.float32)
    fixed = [x.detach() for x in wanted]  # it refuses what wants a gradient, even here
    got = flex(*fixed, segments, scale=SCALE, window=window, softcap=softcap, kernel=flex_attention)
    assert_close(got, loop(*wanted, segments, window, softcap=softcap))


@torch.no_grad()
def test_flex_attention_over_more_than_one_block() -> None:
    """Blocks of 128 columns; a prefix far from those who see it, and a window that reaches into it."""
    segments = Segments([Segment(0, 80), Segment(80, 190, 0, 80), Segment(190, 200, 0, 80), Segment(200, 205)])
    q, k, v = torch.randn(3, 1, 1, 205, 4, generator=torch.Generator().manual_seed(0))
    for window in (None, 60):
        got = flex(q, k, v, segments, scale=SCALE, window=window)
        assert_close(got, loop(q, k, v, segments, window))


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_flex_attention_is_traced_whole(monkeypatch: pytest.MonkeyPatch, softcap: float | None) -> None:
    """As for a GPU, with gradients, but run by torch's own functions: what cannot be traced would be an error there."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)  # it refuses a CPU
    kernel = torch.compile(flex_attention, dynamic=True, fullgraph=True, backend="eager")
    for cut, window in (("one", None), ("shared prompt", 3), ("two prompts", 3)):
        *wanted, segments = inputs(cut, "grouped", dtype=torch.float32)
        got = flex(*wanted, segments, scale=SCALE, window=window, softcap=softcap, kernel=kernel)
        need = loop(*wanted, segments, window, softcap=softcap)
        assert_same(got, need, tuple(wanted), dtype=torch.float32, scale=2.0)


def test_no_kernel_knows_sinks_and_none_runs_on_a_cpu() -> None:
    *wanted, segments = inputs("one", "plain", dtype=torch.float32)
    meta = [x.detach().to("meta") for x in wanted]
    common: dict[str, Any] = {"scale": SCALE, "window": None, "softcap": None}
    assert device_attention(*meta, segments, **common, sinks=torch.zeros(2)) is None
    assert device_attention(*wanted, segments, **common, sinks=torch.zeros(2)) is None
    assert device_attention(*wanted, segments, **common, sinks=None) is None


@blocks
def test_where_no_kernel_helps_segments_are_attended_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """On another device than the CPU; meta tensors have no numbers, but a device and shapes."""
    asked = []
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _device: False)  # not to be asked of a meta device
    monkeypatch.setattr(attention, "device_attention", lambda *_, **keywords: asked.append(keywords))
    *wanted, _ = inputs("shared prompt", "grouped", dtype=torch.bfloat16)
    meta = [x.detach().to("meta") for x in wanted]
    sinks = torch.zeros(4, device="meta")
    out, _ = attention_forward(
        torch.nn.Identity(), *meta, NO_MASK, sliding_window=3, s_aux=sinks, segments=Segments(CUTS["shared prompt"])
    )
    assert out.shape == (1, 12, 4, VALUE_WIDTH)
    (keywords,) = asked
    assert keywords == {"scale": WIDTH**-0.5, "window": 3, "softcap": None, "sinks": sinks}


def test_the_short_formula_stays_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a GPU's autocast its softmax is in fp32, and the gradient refuses one in bf16."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _device: False)
    monkeypatch.setattr(attention, "device_attention", lambda *_, **__: None)
    monkeypatch.setattr(attention, "short_attention", lambda *_, **__: pytest.fail("on a meta device"))
    *wanted, segments = inputs("sequences", "plain", dtype=torch.bfloat16)
    meta = [x.detach().to("meta") for x in wanted]
    out, _ = attention_forward(torch.nn.Identity(), *meta, NO_MASK, segments=segments)
    assert out.shape == (1, 11, 2, VALUE_WIDTH)


def runs_with_blocks_of(monkeypatch: pytest.MonkeyPatch, block: int, cut: list[tuple[int, ...]]) -> list[Any]:
    """First segment, how many, columns; of each run."""
    monkeypatch.setattr(attention, "BLOCK", block)
    runs = Segments([Segment(*part) for part in cut]).runs
    return [(run.first, run.mixed or run.size, run.columns.start, run.columns.stop) for run in runs]


def test_families_share_a_block_and_are_never_torn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two short ones, a prompt with two responses, a short one; equal neighbours longer than a block stay a run."""
    cut = [(0, 2), (2, 5), (5, 8), (8, 10, 5, 8), (10, 11, 5, 8), (11, 12), (12, 16), (16, 20), (20, 24), (24, 25)]
    assert runs_with_blocks_of(monkeypatch, 5, cut) == [
        (0, 2, 0, 5),
        (2, 1, 5, 8),
        (3, 1, 8, 10),
        (4, 1, 10, 11),
        (5, 1, 11, 12),
        (6, 3, 12, 24),
        (9, 1, 24, 25),
    ]
    assert runs_with_blocks_of(monkeypatch, 7, cut) == [(0, 2, 0, 5), (2, 4, 5, 12), (6, 3, 12, 24), (9, 1, 24, 25)]
    assert runs_with_blocks_of(monkeypatch, 25, cut) == [(0, 10, 0, 25)]


def test_a_prefix_that_is_seen_from_afar_holds_its_family_together(monkeypatch: pytest.MonkeyPatch) -> None:
    cut = [(0, 2), (2, 4), (4, 6), (6, 8, 0, 2), (8, 9)]
    assert runs_with_blocks_of(monkeypatch, 4, cut) == [(0, 1, 0, 2), (1, 2, 2, 6), (3, 1, 6, 8), (4, 1, 8, 9)]
    assert runs_with_blocks_of(monkeypatch, 8, cut) == [(0, 4, 0, 8), (4, 1, 8, 9)]


def test_equal_neighbours_are_one_run_and_prefixes_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only segments that see nothing but themselves, and that nobody else sees."""
    monkeypatch.setattr(attention, "BLOCK", 0)
    cut = [(0, 3), (3, 6), (6, 8), (8, 10), (10, 12, 8, 10), (12, 14), (14, 16), (16, 18, 14, 16)]
    runs = Segments([Segment(*part) for part in cut]).runs
    assert [(run.first, run.size, run.columns) for run in runs] == [
        (0, 2, slice(0, 6)),
        (2, 1, slice(6, 8)),
        (3, 1, slice(8, 10)),
        (4, 1, slice(10, 12)),
        (5, 1, slice(12, 14)),
        (6, 1, slice(14, 16)),
        (7, 1, slice(16, 18)),
    ]
