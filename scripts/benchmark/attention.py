"""Attention of packed rows, and norms, as this project has them on a CPU, against torch's and transformers' own.

usage: python scripts/benchmark/attention.py [--rounds N]

Forward and backward pass of one layer, one thread, CPU milliseconds, median of the rounds; all ways take turns.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lit_instruct.models import attention
from lit_instruct.models.attention import Segment, Segments, _by_segment
from lit_instruct.models.rms_norm import rms_norm
from lit_instruct.models.short_attention import short_attention

TOKENS = 1024
HEADS = {"6 heads of 32": (6, 32), "8 heads of 64": (8, 64)}


def rows_of(length: int) -> Segments:
    return Segments([Segment(start, start + length) for start in range(0, TOKENS // length * length, length)])


def shared(prompt: int, response: int, count: int) -> Segments:
    starts = range(prompt, prompt + count * response, response)
    return Segments([Segment(0, prompt), *(Segment(start, start + response, 0, prompt) for start in starts)])


def ragged(mean: int) -> list[Segment]:
    """Lengths from half the mean to one and a half times."""
    draw, parts, start = random.Random(0), [], 0
    while start < TOKENS:
        stop = min(start + draw.randint(mean // 2, mean * 3 // 2), TOKENS)
        parts.append(Segment(start, stop))
        start = stop
    return parts


CUTS = {f"segments of {length}": rows_of(length) for length in (32, 64, 112, 192, 256, 384, 512)}
BLOCKS = (0, 64, 128)
CUTS |= {f"prompt 256, {count} responses of 64": shared(256, 64, count) for count in (4, 9)}


def medians(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            start = time.process_time()
            way()
            if number:  # the first is a warm-up
                times[name].append(1000 * (time.process_time() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Attention and norms of packed rows on a CPU.")
    parser.add_argument("--rounds", type=int, default=9, help="counted rounds (default 9)")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print(f"{'':16}{'':32}{'':10}   fused, by segment   short attention")
    for kind, (heads, width) in HEADS.items():
        for cut, segments in CUTS.items():
            for dtype in (torch.bfloat16, torch.float32):
                total = segments.parts[-1].stop
                inputs = [torch.randn(1, total, heads, width, dtype=dtype, requires_grad=True) for _ in range(3)]
                scale = width**-0.5

                def fused(inputs: list[Tensor] = inputs, cut: Segments = segments, scale: float = scale) -> None:
                    out = _by_segment(*(x.transpose(1, 2) for x in inputs), cut, scale, None, None, None, 0.0)
                    out.sum().backward()

                def short(inputs: list[Tensor] = inputs, cut: Segments = segments, scale: float = scale) -> None:
                    out = short_attention(*(x.transpose(1, 2) for x in inputs), cut, scale=scale, window=None)
                    out.sum().backward()

                found = medians({"fused": fused, "short": short}, rounds)
                name = str(dtype).removeprefix("torch.")
                print(f"{kind:16}{cut:32}{name:10}{found['fused']:20.1f}{found['short']:18.1f}")
    print(f"\n{'ragged segments, short attention':48}{'bf16, blocks of':>15}{'':15}{'fp32 (fused), blocks of':>30}")
    print(f"{'':48}" + "".join(f"{block:>10}" for block in BLOCKS) * 2)
    for kind, (heads, width) in HEADS.items():
        for mean in (10, 20, 40, 80):
            ways = {}
            for dtype in (torch.bfloat16, torch.float32):
                inputs = [torch.randn(1, TOKENS, heads, width, dtype=dtype, requires_grad=True) for _ in range(3)]
                for block in BLOCKS:
                    attention.BLOCK = block
                    cut = Segments(ragged(mean))

                    def way(inputs: list[Tensor] = inputs, cut: Segments = cut, scale: float = width**-0.5) -> None:
                        q, k, v = (x.transpose(1, 2) for x in inputs)
                        if q.dtype == torch.bfloat16:
                            out = short_attention(q, k, v, cut, scale=scale, window=None)
                        else:
                            out = _by_segment(q, k, v, cut, scale, None, None, None, 0.0)
                        out.sum().backward()

                    ways[f"{dtype} {block}"] = way
            found = medians(ways, rounds)
            print(f"{kind:16}{f'about {mean} tokens':32}" + "".join(f"{value:10.1f}" for value in found.values()))
    print("\nnorm, fp32                 transformers   by blocks of rows")
    for width in (192, 512, 576):
        norm, rows = LlamaRMSNorm(width), torch.randn(1, 2048, width, requires_grad=True)
        found = medians(
            {
                "theirs": lambda norm=norm, rows=rows: norm(rows).sum().backward(),
                "ours": lambda norm=norm, rows=rows: rms_norm(rows, norm.weight, 1e-6).sum().backward(),
            },
            rounds,
        )
        print(f"2048 rows of {width:<10}{found['theirs']:16.1f}{found['ours']:20.1f}")


if __name__ == "__main__":
    main()
