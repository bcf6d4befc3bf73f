"""Metrics that cost nothing between two lines of the log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_instruct.modules.strategies import rank, sum_over_ranks, world_size


class RunningMetrics:
    """Weighted means since they were last read, summed up on the device.

    A Trainer's log call costs about as much as a small optimizer step, and reading a number of the device makes the
    process wait for it. So numbers are only added up here, and read when Lightning writes its log. A checkpoint holds
    what has been added up: a resumed run writes the lines that it would have written.

    Held-out data are measured like this too: of weighted means over ranks Lightning rounds the sum of weights down.

    Attributes:
        steps: optimizer steps since the last log.
        counted: what they counted (tokens, prompts), on all ranks.
        learning_rate: of the last step.
    """

    def __init__(self) -> None:
        """Start with nothing."""
        self.steps = 0
        self.counted = 0
        self.learning_rate = 0.0
        self._sums: dict[tuple[str, ...], Tensor] = {}  # names -> fp32 [names + 1], the last one the sum of weights

    def add(self, weight: Tensor, values: Mapping[str, Tensor]) -> None:
        """Add means of this rank.

        Args:
            weight: 0-dim, what each of them is a mean over: so many tokens, prompts or pairs.
            values: names -> 0-dim, without gradient. The names that come together always come together.
        """
        parts = torch.stack([*values.values(), weight]).float()
        parts[:-1].mul_(parts[-1])
        names = tuple(values)
        if names in self._sums:
            self._sums[names].add_(parts)
        else:
            self._sums[names] = parts

    def end_step(self, counted: int, learning_rate: float) -> None:
        """An optimizer step is over.

        Args:
            counted: what it counted on all ranks.
            learning_rate: that it is taken with.
        """
        self.steps += 1
        self.counted += counted
        self.learning_rate = learning_rate

    def means(self) -> dict[str, float]:
        """Read the means over all that was added on all ranks, and start again; every process must call it.

        Returns:
            Names -> mean, 0 where all weights were 0. Empty if nothing was added.
        """
        if not self._sums:
            return {}
        flat = sum_over_ranks(torch.cat(list(self._sums.values()))).tolist()
        found: dict[str, float] = {}
        for names in self._sums:
            (*sums, weight), flat = flat[: len(names) + 1], flat[len(names) + 1 :]
            found |= {name: total / max(weight, 1.0) for name, total in zip(names, sums, strict=True)}
        self.clear()
        return found

    def state_dict(self) -> dict[str, Any]:
        """What this rank has added up, on the CPU."""
        return {
            "steps": self.steps,
            "counted": self.counted,
            "learning_rate": self.learning_rate,
            "sums": {names: sums.cpu().clone() for names, sums in self._sums.items()},
        }

    def load_state_dict(self, states: Sequence[dict[str, Any]], device: torch.device) -> None:
        """Go on adding up; every process must call it.

        Args:
            states: of all ranks. Where there were more or fewer of them, the first rank takes the sum.
            device: of what will be added.
        """
        self.clear()
        mine = states[rank()] if len(states) == world_size() else _joined(states, empty=rank() != 0)
        self.steps, self.counted, self.learning_rate = mine["steps"], mine["counted"], mine["learning_rate"]
        self._sums = {names: sums.to(device, copy=True) for names, sums in mine["sums"].items()}

    def clear(self) -> None:
        """Forget what was added."""
        self.steps = self.counted = 0
        self._sums = {}


def _joined(states: Sequence[dict[str, Any]], *, empty: bool) -> dict[str, Any]:
    """The sums of all ranks in one state, or zeros in their place: all ranks must have the same names."""
    sums = {names: torch.stack([state["sums"][names] for state in states]).sum(dim=0) for names in states[0]["sums"]}
    return states[0] | {"sums": {names: torch.zeros_like(total) if empty else total for names, total in sums.items()}}
