"""Gradients that are not finite never reach the weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lit_instruct.models.sharding import whole
from lit_instruct.types import NonFiniteError

log = logging.getLogger(__name__)


class StepGuard:
    """Leaves out an optimizer step whose gradients hold NaN or infinity, counts it, and ends a run that has too many.

    A step is left out by taking the gradients away: optimizers pass over a parameter without one, so that weights and
    moments stay as they were. One bad batch then costs a step and not the model. (With fp16 the first steps are
    often left out, until the loss scale fits.)

    Attributes:
        skipped: steps left out so far.
        in_a_row: of them, the last ones without a good step in between.
    """

    def __init__(self, limit: int):
        """Set how long to go on.

        Args:
            limit: that many steps in a row end the run.
        """
        self.limit = limit
        self.skipped = 0
        self.in_a_row = 0

    def check(self, networks: Iterable[nn.Module], norms: Iterable[Tensor] | None = None) -> bool:
        """Look at the gradients before the optimizer steps; take them away if any is not finite.

        Args:
            networks: that the optimizer trains.
            norms: the norms of their gradients, if they are known already.

        Returns:
            Whether the step may be taken.

        Raises:
            NonFiniteError: it is the last one of ``limit`` bad ones in a row. The weights are still good.
        """
        networks = list(networks)
        norms = [gradient_norm(network) for network in networks] if norms is None else list(norms)
        # The norms are those of gradients that all ranks share, so all ranks decide alike. Read together: each time
        # the process waits for the device.
        if all(math.isfinite(norm) for norm in (torch.stack(norms).tolist() if len(norms) > 1 else map(float, norms))):
            self.in_a_row = 0
            return True
        for network in networks:
            for parameter in network.parameters():
                parameter.grad = None
        self.skipped += 1
        self.in_a_row += 1
        log.warning(
            "the gradients of this step are not finite; the step is left out (%d so far, %d in a row)",
            self.skipped,
            self.in_a_row,
        )
        if self.in_a_row >= self.limit:
            raise NonFiniteError(
                f"got NaN or infinity in the gradients of {self.in_a_row} optimizer steps in a row; need finite ones. "
                "The weights are those of before, and the last checkpoint is good. Do: lower the learning rate, look "
                "at scores and data of these steps, train in bf16 or fp32 instead of fp16, then go on with "
                "--ckpt_path; max_nonfinite_steps says how many are borne."
            )
        return False

    def state_dict(self) -> dict[str, Any]:
        """The counts."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting."""
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]


def gradient_norm(network: nn.Module) -> Tensor:
    """The norm of all gradients of a network together.

    Args:
        network: parameters without a gradient count as 0.

    Returns:
        0-dim.
    """
    return total_norm([p.grad for p in network.parameters() if p.grad is not None])


def total_norm(gradients: list[Tensor]) -> Tensor:
    """The norm of gradients together.

    Args:
        gradients: of any shapes.

    Returns:
        0-dim.
    """
    return whole(nn.utils.get_total_norm(gradients))  # sharded: each rank holds a part of it
