"""Optimizer and schedule for ``configure_optimizers``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import lightning.pytorch as pl
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lit_instruct.types import ConfigError

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]
"""Parameter groups -> optimizer; in YAML a ``class_path`` with ``init_args``."""


def paper_adam(groups: Iterable[Any]) -> Optimizer:
    """Adam with the paper's betas 0.9 and 0.95 (Ouyang et al. 2022, appendix C); no weight decay.

    Args:
        groups: parameters or parameter groups with their ``lr``.

    Returns:
        The optimizer; ``lr`` of a group wins over the default here.
    """
    return torch.optim.AdamW(groups, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0)


def per_group_schedule(optimizer: Optimizer, multipliers: list[Callable[[int], float]]) -> LambdaLR:
    """A schedule with one multiplier a parameter group.

    Args:
        optimizer: its groups hold the peak rates.
        multipliers: one function a group, from the number of ``step()`` calls to the factor on the peak rate.

    Returns:
        The schedule.
    """
    return LambdaLR(optimizer, multipliers)


def total_steps(trainer: pl.Trainer) -> int:
    """How many optimizer steps the run has, which a cosine must know beforehand.

    Args:
        trainer: of the run.

    Returns:
        At least 1.

    Raises:
        ConfigError: the run has no end that is known now.
    """
    steps = trainer.estimated_stepping_batches
    if steps == float("inf") or steps < 0:
        raise ConfigError(
            f"trainer: got max_epochs {trainer.max_epochs} and max_steps {trainer.max_steps}, but the learning rate "
            "falls along a cosine to the end of the run; set max_epochs or max_steps."
        )
    return max(int(steps), 1)
