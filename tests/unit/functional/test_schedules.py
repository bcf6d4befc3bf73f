from __future__ import annotations

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler

from lit_instruct.functional import cosine_to_floor, linear_warmup
from tests.helpers.numbers import assert_close, assert_vector
from tests.unit.functional.vectors import VECTORS

WARMUP = VECTORS["lr_ppo_warmup_ten_iterations_from_one_tenth"]


def trace(scheduler: LRScheduler, steps: int) -> list[float]:
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    return rates


def optimizer() -> SGD:
    return SGD([torch.zeros(1, requires_grad=True)], lr=1.0)


@pytest.mark.parametrize("name", ["lr_sft_cosine_to_10_percent", "lr_rm_cosine_to_10_percent"])
def test_cosine_vectors(name):
    case = VECTORS[name]
    got = [cosine_to_floor(step, case["total_steps"], floor=case["floor_ratio"]) for step in case["steps"]]
    # As multipliers: the rates themselves are of the size of the tolerance.
    assert_vector(got, [rate / case["peak"] for rate in case["expected"]["lr"]])


@pytest.mark.parametrize("floor", [0.0, 0.1, 1.0])
def test_cosine_equals_torch(floor):
    need = trace(CosineAnnealingLR(optimizer(), T_max=37, eta_min=floor), 38)
    assert_close([cosine_to_floor(step, 37, floor=floor) for step in range(38)], need, dtype=torch.float64)


def test_cosine_stays_on_the_floor_after_the_end():
    assert cosine_to_floor(1000, 37) == pytest.approx(0.1)


def test_cosine_with_warmup_rises_to_one_and_then_is_the_cosine_of_the_rest():
    got = [cosine_to_floor(step, 14, warmup_steps=4) for step in range(15)]
    assert_close(got[:5], [0.2, 0.4, 0.6, 0.8, 1.0], dtype=torch.float64)
    assert_close(got[4:], [cosine_to_floor(step, 10) for step in range(11)], dtype=torch.float64)


def test_warmup_vector():
    got = [linear_warmup(iteration, 10) for iteration in WARMUP["iterations"]]
    assert_vector(got, WARMUP["expected"]["variant_A"])
    with pytest.raises(AssertionError):
        assert_vector(got, WARMUP["expected"]["variant_B"])


@pytest.mark.parametrize(("start", "length"), [(0.1, 10), (0.5, 3), (1.0, 1)])
def test_warmup_equals_torch(start, length):
    need = trace(LinearLR(optimizer(), start_factor=start, total_iters=length), 15)
    got = [linear_warmup(iteration, length, start=start) for iteration in range(15)]
    assert_close(got, need, dtype=torch.float64)


def test_no_warmup_is_the_full_rate_at_once():
    assert linear_warmup(0, 0) == 1.0


@pytest.mark.parametrize(
    ("total", "arguments"),
    [(0, {}), (10, {"warmup_steps": 10}), (10, {"warmup_steps": -1}), (10, {"floor": -0.1}), (10, {"floor": 1.1})],
)
def test_cosine_refuses_what_is_no_schedule(total, arguments):
    with pytest.raises(ValueError, match="cosine_to_floor: got"):
        cosine_to_floor(0, total, **arguments)


@pytest.mark.parametrize(("length", "start"), [(-1, 0.1), (10, -0.1), (10, 1.1)])
def test_warmup_refuses_what_is_no_schedule(length, start):
    with pytest.raises(ValueError, match="linear_warmup: got"):
        linear_warmup(0, length, start=start)
