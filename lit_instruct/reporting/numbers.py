"""Numbers and times as people read them."""

from __future__ import annotations

import math
from datetime import UTC, datetime


def number(value: float, *, percent: bool = False) -> str:
    """Three significant digits, whole numbers whole.

    Args:
        value: any number.
        percent: it is a share; 0.5 is 50.0 %.

    Returns:
        For example 0.534, 12.3, 1,234, 9.65e-6 or 50.0 %; a real minus sign in front of negative ones.
    """
    shown_as_share = percent and math.isfinite(value)
    return _with_minus(f"{100 * value:.1f}\u00a0%" if shown_as_share else _three_digits(value))


def hundredths(value: float) -> str:
    """Two decimals, for numbers that are measured no finer."""
    return _with_minus(f"{value:,.2f}")


def duration(seconds: float) -> str:
    """Two units at most: 3 d 4 h, 2 h 05 min, 12 min 30 s, 7.4 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def moment(seconds: float) -> str:
    """A date and time of day, in UTC, of seconds since 1970."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _with_minus(text: str) -> str:
    return text.replace("-", "−", 1) if text.startswith("-") else text


def _three_digits(value: float) -> str:
    if not math.isfinite(value) or value == 0:
        return "0" if value == 0 else str(value)
    size = abs(value)
    if size < 1e7 and (size >= 100 or float(value).is_integer()):
        return f"{value:,.0f}"
    if size >= 1e7 or size < 1e-3:
        digits, _, power = f"{value:.2e}".partition("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"
    return f"{value:.{2 - math.floor(math.log10(size))}f}"
