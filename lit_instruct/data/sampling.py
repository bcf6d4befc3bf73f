"""Which rank sees which rows, and when: independent of the number of ranks, and resumable to the row.

Both samplers are ``DistributedSampler`` subclasses for one reason: Lightning leaves those in place, and would wrap or
replace any other sampler in a distributed run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DistributedSampler

from lit_instruct.types import ConfigError


class GlobalBatchSampler(DistributedSampler[int]):
    """Row indices of one rank, such that step k sees the same rows whatever the world size and the accumulation.

    There is one seeded permutation of all rows an epoch. Step k takes its rows ``[k * batch_size, (k + 1) *
    batch_size)``, which are dealt out in slices of ``loader_batch_size``: rank 0, rank 1, ..., then the next
    accumulation step. What does not fill a whole batch at the end of an epoch waits for another permutation.

    Args:
        rows: how many rows there are.
        batch_size: rows a step, over all ranks and accumulation steps.
        loader_batch_size: rows that one rank takes at once; ``world_size * loader_batch_size`` divides ``batch_size``.
        world_size: ranks.
        rank: this one.
        seed: of the permutations.
    """

    def __init__(
        self, rows: int, *, batch_size: int, loader_batch_size: int, world_size: int = 1, rank: int = 0, seed: int = 1
    ) -> None:
        super().__init__(range(rows), num_replicas=world_size, rank=rank, shuffle=True, seed=seed)  # type: ignore[arg-type]
        self.rows = rows
        self.used = rows // batch_size * batch_size
        self.loader_batch_size = loader_batch_size

    def __len__(self) -> int:
        return self.used // self.num_replicas

    def __iter__(self) -> GlobalBatchIterator:
        return GlobalBatchIterator(self)

    def indices(self, epoch: int) -> list[int]:
        """List this rank's rows of one epoch, in order."""
        generator = torch.Generator().manual_seed(_mix(self.seed, epoch))
        order = torch.randperm(self.rows, generator=generator)[: self.used]
        return order.view(-1, self.num_replicas, self.loader_batch_size)[:, self.rank].flatten().tolist()


class GlobalBatchIterator(Iterator[int]):
    """Position in a ``GlobalBatchSampler``; its state is the same on every rank and survives a change of world size."""

    def __init__(self, sampler: GlobalBatchSampler) -> None:
        self._sampler = sampler
        self._indices: list[int] | None = None
        self._epoch = sampler.epoch
        self._yielded = 0

    def __next__(self) -> int:
        if self._indices is None:
            # Not before the first draw: Lightning makes the iterator first and tells the sampler the epoch after.
            self._epoch = self._sampler.epoch
            self._indices = self._sampler.indices(self._epoch)
        if self._yielded == len(self._indices):
            raise StopIteration
        self._yielded += 1
        return self._indices[self._yielded - 1]

    def state_dict(self) -> dict[str, Any]:
        """Give the epoch and how many rows of it all ranks together have drawn."""
        drawn = self._yielded * self._sampler.num_replicas
        epoch = self._sampler.epoch if self._indices is None else self._epoch
        return {"epoch": epoch, "drawn": drawn, "rows": self._sampler.rows, "seed": self._sampler.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue behind the last row drawn; behind the last of an epoch that is the beginning of the next.

        Raises:
            ConfigError: the state belongs to a data set of another size or to another seed.
        """
        for name, here in (("rows", self._sampler.rows), ("seed", self._sampler.seed)):
            if state[name] != here:
                raise ConfigError(
                    f"cannot resume inside the data: got {name}={here}, the checkpoint has {name}={state[name]}. "
                    "Do: resume with the same data, val and seed, or start from the checkpoint's weights only."
                )
        epoch, drawn = state["epoch"], state["drawn"]
        if drawn >= self._sampler.used:
            epoch, drawn = epoch + 1, 0
        self._sampler.set_epoch(epoch)
        self._epoch = epoch
        self._indices = self._sampler.indices(epoch)
        self._yielded = drawn // self._sampler.num_replicas


class OrderedBatchSampler(DistributedSampler[list[int]]):
    """Batches of row indices of one rank: every row once over all ranks, in order, nothing repeated or left out.

    Every rank has the same number of batches, so that sharded models, in which all ranks must run together, do not
    wait for a rank that has finished. To that end sizes give way: batches are as even as they can be, ranks differ by
    at most one row in a batch, and a batch may have one row more than ``loader_batch_size`` where there are only a
    few rows too many for another round.

    Args:
        rows: how many rows there are, at least one a rank.
        loader_batch_size: rows that one rank takes at once.
        world_size: ranks.
        rank: this one.
    """

    def __init__(self, rows: int, *, loader_batch_size: int, world_size: int = 1, rank: int = 0) -> None:
        if rows < world_size:
            raise ConfigError(
                f"got {rows} rows (validation, or demonstrations for the score bias) for {world_size} ranks; need at "
                "least one row a rank, since all ranks must run together. Do: give more such rows or use fewer ranks."
            )
        super().__init__(range(rows), num_replicas=world_size, rank=rank, shuffle=False)  # type: ignore[arg-type]
        rounds = max(1, -(-(rows // world_size) // loader_batch_size))
        self._batches = [
            np.array_split(of_all_ranks, world_size)[rank].tolist()
            for of_all_ranks in np.array_split(np.arange(rows), rounds)
        ]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches)


def split_rows(rows: int, fraction: float, *, seed: int) -> tuple[list[int], list[int]]:
    """Split row numbers at random, each part in its old order.

    Args:
        rows: how many there are.
        fraction: of them to hold out; if above 0, at least one is, unless it is the only one.
        seed: the same seed, fraction and number of rows give the same split.

    Returns:
        The rows to train on and those held out.
    """
    held_out = min(max(round(rows * fraction), 1), rows - 1) if fraction > 0 else 0
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[held_out:]), sorted(order[:held_out])


def _mix(seed: int, epoch: int) -> int:
    """Derive one seed from two, so that epoch 1 of seed 1 is not epoch 0 of seed 2."""
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0] >> 1)
