"""The one place that owns tolerances. Every numeric comparison in the tests goes through here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def assert_close(actual: Any, expected: Any, *, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> None:
    """Compare to the tolerance that belongs to ``dtype`` (relative and absolute), times ``scale``.

    Args:
        actual: tensor, number or nested list; must not contain NaN.
        expected: the oracle's value, same shape.
        dtype: the precision in which ``actual`` was computed.
        scale: widens the tolerance; say why where it is used.
    """
    tolerance = _TOLERANCES[dtype] * scale
    torch.testing.assert_close(_tensor(actual), _tensor(expected), rtol=tolerance, atol=tolerance, check_dtype=False)


def assert_vector(actual: Any, expected: Any) -> None:
    """Compare an fp64 computation with a stored vector, which carries ten significant digits: 1e-6."""
    torch.testing.assert_close(_tensor(actual), _tensor(expected), rtol=1e-6, atol=1e-6, check_dtype=False)


def _tensor(value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().double()
    if isinstance(value, Sequence | float | int):
        return torch.tensor(value, dtype=torch.float64)
    raise TypeError(f"cannot compare a {type(value).__name__}")
