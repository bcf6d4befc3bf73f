"""Which rank sees which rows, and when: the same for any number of ranks, and resumable to the row.

Both samplers are ``DistributedSampler`` subclasses for one reason: Lightning leaves those in place, and would wrap or
replace any other sampler in a distributed run.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import distributed
from torch.utils.data import DataLoader, DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader

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
        self.restored = (0, False)
        self._offset = 0
        self.rows = rows
        self.used = rows // batch_size * batch_size
        self.loader_batch_size = loader_batch_size

    def __len__(self) -> int:
        return self.used // self.num_replicas

    def __iter__(self) -> GlobalBatchIterator:
        return GlobalBatchIterator(self)

    @property
    def order(self) -> int:
        """The permutation that a new iterator takes: the one numbered by ``set_epoch``, unless ``follow`` shifts it."""
        return self.epoch + self._offset

    def follow(self, order: int) -> None:
        """Take permutation ``order`` in the present epoch, and count on from there with each ``set_epoch``."""
        self._offset = order - self.epoch

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
        self._order = 0
        self._yielded = 0

    def __next__(self) -> int:
        if self._indices is None:
            # Not before the first draw: Lightning makes the iterator first and tells the sampler the epoch after.
            self._order = self._sampler.order
            self._indices = self._sampler.indices(self._order)
        if self._yielded == len(self._indices):
            raise StopIteration
        self._yielded += 1
        return self._indices[self._yielded - 1]

    def state_dict(self) -> dict[str, Any]:
        """Give the permutation and how many of its rows all ranks together have drawn."""
        drawn = self._yielded * self._sampler.num_replicas
        order = self._sampler.order if self._indices is None else self._order
        return {"order": order, "drawn": drawn, "rows": self._sampler.rows, "seed": self._sampler.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue behind the last row drawn; behind the last of a permutation that is the beginning of the next.

        Raises:
            ConfigError: the state belongs to a data set of another size or to another seed.
        """
        for name, here in (("rows", self._sampler.rows), ("seed", self._sampler.seed)):
            if state[name] != here:
                raise ConfigError(
                    f"cannot resume inside the data: got {name}={here}, the checkpoint has {name}={state[name]}. "
                    "Do: resume with the same data, val and seed, or start from the checkpoint's weights only."
                )
        self._order, drawn = state["order"], state["drawn"]
        if drawn >= self._sampler.used:
            self._order, drawn = self._order + 1, 0
        self._indices = self._sampler.indices(self._order)
        self._yielded = drawn // self._sampler.num_replicas
        # The epoch after this one is the next order, or this one if the loader throws the iterator away unused.
        self._sampler.restored = (self._order, drawn > 0)


_LET_GO_S = 0.02


def let_collectives_end() -> None:
    """Wait until the threads of the last collective have let go of the interpreter; called before processes are forked.

    Before 3.12 a Python that is forked while another thread holds the lock of its list of threads waits for that lock
    in the new process, for ever. Gloo's threads take it for an instant to release a collective's tensors, just when
    this thread goes on; and only this thread begins collectives.
    """
    if sys.version_info < (3, 12) and distributed.is_available() and distributed.is_initialized():
        time.sleep(_LET_GO_S)


class OrderedLoader(DataLoader):
    """A ``DataLoader`` that forks its workers safely beside other ranks."""

    def _get_iterator(self) -> Any:
        if self.num_workers:
            let_collectives_end()
        return super()._get_iterator()


class ResumableLoader(StatefulDataLoader):
    """A ``StatefulDataLoader`` over a ``GlobalBatchSampler`` that neither repeats nor skips a permutation on resuming.

    A restored run does not always number its epochs as before: Lightning, resumed from a checkpoint of the end of an
    epoch, makes an iterator that it never uses and counts one epoch too many. What counts here is therefore which
    permutation was really drawn from; after a restore, ``set_epoch`` only says that another epoch begins.
    """

    _restored: tuple[Any, int] | None = None

    def _get_iterator(self) -> Any:
        if self.num_workers:
            let_collectives_end()
        if self.next_iter_state is not None:
            iterator = super()._get_iterator()
            self._restored = (iterator, iterator._num_yielded)
            return iterator
        if self._restored is not None:
            restored, yielded_before = self._restored
            order, begun = self.sampler.restored
            self.sampler.follow(order + int(begun or restored._num_yielded > yielded_before))
            self._restored = None
        return super()._get_iterator()


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
                f"got {rows} rows (validation, test, or demonstrations for the score bias) for {world_size} ranks; "
                "need at least one row a rank, since all ranks must run together. Do: give more such rows or use fewer "
                "ranks."
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
