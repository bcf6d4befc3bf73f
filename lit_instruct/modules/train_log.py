"""Metrics that cost nothing between two lines of the log."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lit_instruct.modules.strategies import sum_over_ranks


class RunningMetrics:
    """Weighted means since they were last read, summed up on the device.

    A Trainer's log call costs about as much as a small optimizer step, and reading a number of the device makes the
    process wait for it. So numbers are only added up here, and read when Lightning writes its log. They are not part of
    a checkpoint: the first line that a resumed run writes is about the steps since it was resumed.

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

    def clear(self) -> None:
        """Forget what was added."""
        self.steps = self.counted = 0
        self._sums = {}
