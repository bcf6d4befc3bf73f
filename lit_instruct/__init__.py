"""lit_instruct: InstructGPT's three stages as thin LightningModules over pure PyTorch functions.

Public names are imported on first use (PEP 562), so that ``import lit_instruct`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_instruct.data.modules import (
        ComparisonDataModule,
        DemonstrationDataModule,
        PretrainingDataModule,
        PromptDataModule,
    )
    from lit_instruct.modules.ppo import PPOModule
    from lit_instruct.modules.reward import RewardModule
    from lit_instruct.modules.sft import SFTModule

__version__ = "0.1.0"

_HOMES = {
    "SFTModule": "lit_instruct.modules.sft",
    "RewardModule": "lit_instruct.modules.reward",
    "PPOModule": "lit_instruct.modules.ppo",
    "DemonstrationDataModule": "lit_instruct.data.modules",
    "ComparisonDataModule": "lit_instruct.data.modules",
    "PromptDataModule": "lit_instruct.data.modules",
    "PretrainingDataModule": "lit_instruct.data.modules",
}

__all__ = [
    "ComparisonDataModule",
    "DemonstrationDataModule",
    "PPOModule",
    "PretrainingDataModule",
    "PromptDataModule",
    "RewardModule",
    "SFTModule",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'lit_instruct' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
