"""How fast this machine multiplies matrices, and what share of that a training step reaches.

Measured are the products of one layer in bf16 at the model's own shapes: forward (x W), gradient of the input (dy W)
and gradient of the weight (dy x), each warm and alone. The ideal time of a step is what its useful tokens would take at
those rates: three products of every linear layer for every token, and of the unembedding for every token that is
predicted. Attention, norms, the softmax, the optimizer, casts and padding are work beyond it: nobody reaches 100 %.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from scripts.benchmark.cases import MODELS

ROWS = 2048  # tokens of a product: enough for the full rate
SECONDS = 0.4  # of each measurement


def linear_layers(size: str) -> list[tuple[int, int, int]]:
    """(inputs, outputs, how many of them) of all linear layers but the unembedding."""
    shape = MODELS[size]
    width, inner, layers = shape.width, shape.inner, shape.layers
    narrow = width // shape.heads * shape.kv_heads
    return [(width, width, 2 * layers), (width, narrow, 2 * layers), (width, inner, 2 * layers), (inner, width, layers)]


def unembedding(size: str) -> tuple[int, int]:
    """(inputs, outputs)."""
    return MODELS[size].width, MODELS[size].vocabulary


def product_seconds(inputs: int, outputs: int, rows: int = ROWS) -> float:
    """CPU seconds of the three products of a linear layer on ``rows`` tokens in bf16: the fastest of several runs."""
    x, weight, gradient = (
        torch.randn(shape).bfloat16() for shape in ((rows, inputs), (outputs, inputs), (rows, outputs))
    )
    products = [
        lambda: torch.nn.functional.linear(x, weight),
        lambda: gradient @ weight,
        lambda: gradient.T @ x,
    ]
    return sum(_seconds(product) for product in products)


def ideal_seconds(size: str, tokens: float, predicted: float) -> tuple[float, dict[str, Any]]:
    """What the matrix products of a step would take at the measured rates.

    Args:
        size: of the model.
        tokens: useful tokens.
        predicted: those whose successor is predicted.

    Returns:
        CPU seconds, and the rates in GF/s by shape (all three products together).
    """
    total, rates = 0.0, {}
    for inputs, outputs, count in linear_layers(size):
        seconds = product_seconds(inputs, outputs)
        rates[f"{inputs}x{outputs}"] = round(3 * 2 * ROWS * inputs * outputs / seconds / 1e9)
        total += seconds * count * tokens / ROWS
    inputs, outputs = unembedding(size)
    seconds = product_seconds(inputs, outputs)
    rates[f"{inputs}x{outputs}"] = round(3 * 2 * ROWS * inputs * outputs / seconds / 1e9)
    return total + seconds * predicted / ROWS, rates


def _seconds(product: Any) -> float:
    product()
    fastest, begun = float("inf"), time.perf_counter()
    while time.perf_counter() - begun < SECONDS:
        start = time.process_time()
        product()
        fastest = min(fastest, time.process_time() - start)
    return fastest
