"""Optimizer and schedule for ``configure_optimizers``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lit_instruct.functional import cosine_to_floor
from lit_instruct.models.adapters import trained_parameters
from lit_instruct.models.exact_embeddings import is_bitsandbytes, keep_embeddings_exact
from lit_instruct.types import ConfigError

_FUSED = {"cpu", "cuda"}

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]
"""Parameter groups -> optimizer; in YAML a ``class_path`` with ``init_args``."""


def paper_adam(groups: Iterable[Any]) -> Optimizer:
    """Adam with the paper's betas 0.9 and 0.95 (Ouyang et al. 2022, appendix C); no weight decay.

    Args:
        groups: parameters or parameter groups with their ``lr``.

    Returns:
        The optimizer; ``lr`` of a group wins over the default here.
    """
    optimizer = torch.optim.AdamW(groups, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0)
    kinds = {parameter.device.type for group in optimizer.param_groups for parameter in group["params"]}
    if kinds <= _FUSED:
        # One pass over weights and moments instead of ten. Set here and not in the constructor: there it also makes
        # Lightning leave the unscaling of fp16 gradients to the optimizer, and then nobody may clip them.
        for group in optimizer.param_groups:
            group["fused"] = True
    return optimizer


def make_optimizer(
    make: OptimizerFactory, networks: Sequence[tuple[nn.Module, float]], trainer: pl.Trainer | None
) -> Optimizer:
    """An optimizer with one parameter group a network.

    Args:
        make: what the user chose. Of bitsandbytes' optimizers embeddings keep a 32-bit state.
        networks: each with its peak rate.
        trainer: None in a loop without one.

    Returns:
        The optimizer.

    Raises:
        ConfigError: an optimizer of bitsandbytes, and a strategy that shards parameters.
    """
    optimizer = make([{"params": trained_parameters(network), "lr": rate} for network, rate in networks])
    if is_bitsandbytes(optimizer):
        if trainer is not None and isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy):
            raise ConfigError(
                f"optimizer: got {type(optimizer).__name__} of bitsandbytes with {type(trainer.strategy).__name__}; "
                "need whole parameters, which sharding cuts. Do: use the strategy ddp, or an optimizer of torch."
            )
        keep_embeddings_exact(optimizer, [network for network, _ in networks])
    return optimizer


def optimizer_names(trainer: pl.Trainer) -> list[str]:
    """What kind of optimizers a Trainer has.

    Args:
        trainer: before it begins it has none.

    Returns:
        Package and class of each, such as ``torch.AdamW``.
    """
    kinds = (type(optimizer) for optimizer in trainer.optimizers)
    return [f"{kind.__module__.partition('.')[0]}.{kind.__qualname__}" for kind in kinds]


def per_group_schedule(optimizer: Optimizer, multipliers: list[Callable[[int], float]]) -> LambdaLR:
    """A schedule with one multiplier a parameter group.

    Args:
        optimizer: its groups hold the peak rates.
        multipliers: one function a group, from the number of ``step()`` calls to the factor on the peak rate.

    Returns:
        The schedule.
    """
    return LambdaLR(optimizer, multipliers)


def cosine_optimizer(
    network: nn.Module,
    trainer: pl.Trainer,
    make: OptimizerFactory,
    *,
    learning_rate: float,
    final_lr_ratio: float,
    warmup_steps: int = 0,
) -> OptimizerLRScheduler:
    """One optimizer over a network, with a cosine to a floor over all steps of the run: SFT and reward model.

    Args:
        network: what is trained; of an adapted one the adapter.
        trainer: knows how long the run is.
        make: makes the optimizer.
        learning_rate: peak rate.
        final_lr_ratio: the rate ends at this share of its peak.
        warmup_steps: optimizer steps of linear warm-up.

    Returns:
        What ``configure_optimizers`` gives to Lightning.

    Raises:
        ConfigError: the run has no known end, or ends before the warm-up does.
    """
    total = total_steps(trainer)
    if not 0 <= warmup_steps < total:
        raise ConfigError(
            f"warmup_steps: got {warmup_steps} for a run of {total} optimizer steps; need fewer than those. Lower it, "
            "or train for longer."
        )
    optimizer = make_optimizer(make, [(network, learning_rate)], trainer)
    schedule = per_group_schedule(
        optimizer, [lambda step: cosine_to_floor(step, total, floor=final_lr_ratio, warmup_steps=warmup_steps)]
    )
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def power_of_two(count: float) -> float:
    """A power of two near ``count``: dividing by it changes the size of sums and, being exact, no digit of them.

    Sums over a whole optimizer step go backward before their number is known. Divided by about that number they have
    the size of means, which fp16 with its narrow range needs.

    Args:
        count: 0 or more.

    Returns:
        At least 1.
    """
    return 2.0 ** max(round(math.log2(count)), 0) if count > 1 else 1.0


def gradients_of(optimizer: Optimizer) -> list[Tensor]:
    """The gradients that an optimizer is about to step with.

    Args:
        optimizer: parameters without a gradient are left out.

    Returns:
        The gradients themselves, not copies.
    """
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def total_steps(trainer: pl.Trainer) -> int:
    """How many optimizer steps the run has, which a cosine must know beforehand.

    Args:
        trainer: of the run.

    Returns:
        At least 1.

    Raises:
        ConfigError: the run has no end that is known now.
    """
    steps = _estimated_steps(trainer)
    if steps == float("inf") or steps < 0:
        raise ConfigError(
            f"trainer: got max_epochs {trainer.max_epochs} and max_steps {trainer.max_steps}, but the learning rate "
            "falls along a cosine to the end of the run; set max_epochs or max_steps."
        )
    return max(int(steps), 1)


def _estimated_steps(trainer: pl.Trainer) -> float:
    """As ``trainer.estimated_stepping_batches``, but counted on a loader of its own where that can be resumed.

    Asked before a checkpoint's loops are restored, Lightning builds the loader for training and then never gives it its
    state (Lightning's issue 20550): a resumed run would see the rows of its epoch from the beginning again.
    """
    data: Any = getattr(trainer, "datamodule", None)
    if data is None or trainer.max_epochs == -1 or trainer.train_dataloader is not None:
        return trainer.estimated_stepping_batches
    loader = data.train_dataloader()
    if not hasattr(loader, "load_state_dict"):
        return trainer.estimated_stepping_batches
    try:
        batches = len(loader)
    except TypeError:  # a stream
        return trainer.estimated_stepping_batches
    limit = trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    steps = math.ceil(batches / trainer.accumulate_grad_batches) * max(trainer.max_epochs or 1, 1)
    return steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)
