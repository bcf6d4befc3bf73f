"""The rows of a step do not depend on how many ranks and accumulation steps share them."""

from __future__ import annotations

import multiprocessing
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DistributedSampler

from lit_instruct.data import sampling
from lit_instruct.data.sampling import (
    GlobalBatchSampler,
    OrderedBatchSampler,
    OrderedLoader,
    ResumableLoader,
    split_rows,
)
from lit_instruct.types import ConfigError

LAYOUTS = [(1, 1), (1, 4), (2, 1), (2, 2), (4, 1), (8, 1), (1, 8)]


def steps(rows: int, batch_size: int, world_size: int, accumulate: int, *, epoch: int = 0) -> list[list[int]]:
    """The rows of each optimizer step, over all ranks and accumulation steps."""
    size = batch_size // (world_size * accumulate)
    of_ranks = []
    for rank in range(world_size):
        sampler = GlobalBatchSampler(
            rows, batch_size=batch_size, loader_batch_size=size, world_size=world_size, rank=rank, seed=3
        )
        sampler.set_epoch(epoch)
        drawn = list(sampler)
        assert len(drawn) == len(sampler)
        of_ranks.append(drawn)
    share = size * accumulate
    count = len(of_ranks[0]) // share
    return [[row for drawn in of_ranks for row in drawn[k * share : (k + 1) * share]] for k in range(count)]


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize(("world_size", "accumulate"), LAYOUTS)
def test_a_step_has_the_same_rows_in_every_layout(world_size: int, accumulate: int, epoch: int) -> None:
    alone = steps(37, 8, 1, 1, epoch=epoch)
    shared = steps(37, 8, world_size, accumulate, epoch=epoch)
    assert [sorted(step) for step in shared] == [sorted(step) for step in alone]
    assert len(shared) == 4  # the five rows left over do not make a step
    assert len({row for step in shared for row in step}) == 32


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = GlobalBatchSampler(32, batch_size=4, loader_batch_size=4, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    orders = [order(1, 0), order(1, 1), order(2, 0), order(2, 1)]
    assert len({tuple(o) for o in orders}) == 4
    assert order(1, 1) == orders[1]


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (4, 2), (2, 2)])
def test_state_survives_a_change_of_world_size(before: int, after: int) -> None:
    """The first rank's state is the one that is saved; every rank continues from it."""

    def iterators(world_size: int, epoch: int) -> list[Any]:
        samplers = [
            GlobalBatchSampler(32, batch_size=8, loader_batch_size=8 // world_size, world_size=world_size, rank=rank)
            for rank in range(world_size)
        ]
        for sampler in samplers:
            sampler.set_epoch(epoch)
        return [iter(sampler) for sampler in samplers]

    expected = [next(iterator) for iterator in iterators(1, epoch=2) for _ in range(32)]
    old = iterators(before, epoch=2)
    first = [next(iterator) for iterator in old for _ in range(8 // before)]
    new = iterators(after, epoch=0)
    for iterator in new:
        iterator.load_state_dict(old[0].state_dict())
    second = [next(iterator) for iterator in new for _ in range(8 // after)]
    assert [sorted(first), sorted(second)] == [sorted(expected[:8]), sorted(expected[8:16])]


@pytest.mark.parametrize(("rows", "seed"), [(33, 1), (32, 2)])
def test_state_of_other_data_is_refused(rows: int, seed: int) -> None:
    state = iter(GlobalBatchSampler(32, batch_size=8, loader_batch_size=8)).state_dict()
    with pytest.raises(ConfigError, match="cannot resume"):
        iter(GlobalBatchSampler(rows, batch_size=8, loader_batch_size=8, seed=seed)).load_state_dict(state)


@given(st.integers(1, 60), st.integers(1, 6), st.integers(1, 5))
def test_in_order_every_row_comes_once(rows: int, size: int, world_size: int) -> None:
    if rows < world_size:
        with pytest.raises(ConfigError, match=rf"got {rows} rows .* for {world_size} ranks"):
            OrderedBatchSampler(rows, loader_batch_size=size, world_size=world_size)
        return
    of_ranks = [
        list(OrderedBatchSampler(rows, loader_batch_size=size, world_size=world_size, rank=rank))
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in of_ranks}) == 1, "ranks must run together"
    together = [row for round_ in zip(*of_ranks, strict=True) for batch in round_ for row in batch]
    assert together == list(range(rows))
    for round_ in zip(*of_ranks, strict=True):
        lengths = [len(batch) for batch in round_]
        assert 1 <= min(lengths) <= max(lengths) <= min(lengths) + 1
        assert max(lengths) <= size + (world_size > 1 and rows % world_size > 0)


def test_lightning_keeps_samplers_of_this_kind() -> None:
    assert issubclass(GlobalBatchSampler, DistributedSampler)
    assert issubclass(OrderedBatchSampler, DistributedSampler)


@pytest.mark.parametrize(
    ("rows", "fraction", "held_out"), [(100, 0.05, 5), (3, 0.05, 1), (2, 0.9, 1), (1, 0.5, 0), (10, 0.0, 0)]
)
def test_splits(rows: int, fraction: float, held_out: int) -> None:
    train, val = split_rows(rows, fraction, seed=1)
    assert len(val) == held_out
    assert sorted(train + val) == list(range(rows))
    assert (train, val) == (sorted(train), sorted(val))
    assert split_rows(rows, fraction, seed=1) == (train, val)


def test_another_seed_splits_otherwise() -> None:
    assert split_rows(100, 0.1, seed=1) != split_rows(100, 0.1, seed=2)


@pytest.mark.parametrize("kind", ["training", "validation"])
@pytest.mark.parametrize(("workers", "ranks", "waits"), [(1, True, True), (1, False, False), (0, True, False)])
def test_workers_are_forked_when_collectives_have_ended(
    monkeypatch: pytest.MonkeyPatch, kind: str, workers: int, ranks: bool, waits: bool
) -> None:
    """What it prevents came once in twenty thousand forks; here that it waits, and before there is a worker."""
    slept: list[int] = []
    group = SimpleNamespace(is_available=lambda: True, is_initialized=lambda: ranks)
    monkeypatch.setattr(sampling, "distributed", group)
    sleep = SimpleNamespace(sleep=lambda _: slept.append(len(multiprocessing.active_children())))
    monkeypatch.setattr(sampling, "time", sleep)
    monkeypatch.setattr(sampling, "sys", SimpleNamespace(version_info=(3, 11, 7)))
    rows = list(range(6))
    if kind == "training":
        order = GlobalBatchSampler(6, batch_size=2, loader_batch_size=2, world_size=1, rank=0, seed=1)
        loader: Any = ResumableLoader(rows, batch_size=2, sampler=order, num_workers=workers)
    else:
        loader = OrderedLoader(rows, batch_size=2, num_workers=workers)
    before = len(multiprocessing.active_children())
    assert len(list(loader)) == 3
    assert slept == ([before] if waits else [])
