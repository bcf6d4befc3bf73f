"""Callbacks, one a file; imported on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_instruct.callbacks.health import Health
    from lit_instruct.callbacks.kl_monitor import KLMonitor
    from lit_instruct.callbacks.ptx_mixing import PtxMixing
    from lit_instruct.callbacks.reward_score_selection import RewardScoreSelection
    from lit_instruct.callbacks.rollout_progress import RolloutProgressBar
    from lit_instruct.callbacks.sample_table import SampleTable
    from lit_instruct.callbacks.weight_ema import WeightEMA

_HOMES = {
    "Health": "health",
    "KLMonitor": "kl_monitor",
    "PtxMixing": "ptx_mixing",
    "RewardScoreSelection": "reward_score_selection",
    "RolloutProgressBar": "rollout_progress",
    "SampleTable": "sample_table",
    "WeightEMA": "weight_ema",
}

__all__ = ["Health", "KLMonitor", "PtxMixing", "RewardScoreSelection", "RolloutProgressBar", "SampleTable", "WeightEMA"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"lit_instruct.callbacks.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'lit_instruct.callbacks' has no attribute {name!r}")
