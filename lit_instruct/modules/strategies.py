"""What the modules need to know about the processes they run in."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lit_instruct.functional import merge_moments
from lit_instruct.functional.masking import Moments
from lit_instruct.types import ConfigError

T = TypeVar("T")


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of a tensor over all processes; every process must call it."""
    if world_size() == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total


def max_over_ranks(value: float, device: torch.device) -> float:
    """The largest of a number over all processes; every process must call it."""
    if world_size() == 1:
        return value
    largest = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return float(largest)


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of a tensor over all processes, as a new one; every process must call it."""
    summed = sum_over_ranks(value)
    return (summed.clone() if summed is value else summed).div_(world_size())


def average_gradients(network: nn.Module) -> None:
    """Average gradients that were accumulated without communication; every process must call it.

    Args:
        network: each of its parameters has a gradient on all processes or on none.
    """
    if world_size() > 1:
        for parameter in network.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad.div_(world_size())


def gather_rows(rows: Tensor, *, left: bool = False) -> Tensor:
    """The rows of all processes, in the order of their ranks; every process must call it.

    Args:
        rows: ``[B]`` or ``[B, T]``; both sizes may differ between processes.
        left: narrower ones are padded on the left instead of the right, with zeros (False).

    Returns:
        ``[sum of B]`` or ``[sum of B, largest T]``.
    """
    if world_size() == 1:
        return rows
    sizes = torch.zeros(world_size(), 2, dtype=torch.long, device=rows.device)
    sizes[rank()] = torch.tensor([len(rows), rows[:1].numel()], device=rows.device)
    dist.all_reduce(sizes)
    most, width = (int(largest) for largest in sizes.max(dim=0).values)
    table = rows.reshape(len(rows), -1)
    across = width - table.shape[1]
    padded = nn.functional.pad(table, (across, 0, 0, most - len(rows)) if left else (0, across, 0, most - len(rows)))
    sent = padded.to(torch.uint8) if rows.dtype == torch.bool else padded
    received = [torch.empty_like(sent) for _ in range(world_size())]
    dist.all_gather(received, sent.contiguous())
    joined = torch.cat([part[:count] for part, count in zip(received, sizes[:, 0].tolist(), strict=True)])
    return (joined if rows.dim() == 2 else joined.squeeze(1)).to(rows.dtype)


def numbers_over_ranks(*values: float, device: torch.device) -> list[float]:
    """The sums of plain numbers over all processes; every process must call it.

    Args:
        values: of this rank.
        device: that the processes talk through.

    Returns:
        One sum a value, in double precision.
    """
    if world_size() == 1:  # no tensor: not every device knows 64 bit numbers
        return list(values)
    return sum_over_ranks(torch.tensor(values, dtype=torch.float64, device=device)).tolist()


def gather_objects(mine: T) -> list[T]:
    """What each process has, in the order of their ranks; every process must call it.

    Args:
        mine: anything that can be pickled; for small things that are rarely sent.

    Returns:
        One object a rank.
    """
    found = [mine] * world_size()
    if world_size() > 1:
        dist.all_gather_object(found, mine)
    return found


def rows_before(rows: int, device: torch.device) -> int:
    """How many rows the processes before this one hold; every process must call it.

    Args:
        rows: of this rank.
        device: that the processes talk through.

    Returns:
        The number of this rank's first row over all ranks.
    """
    if world_size() == 1:
        return 0
    held = [torch.zeros((), dtype=torch.long, device=device) for _ in range(world_size())]
    dist.all_gather(held, torch.tensor(rows, device=device))
    return int(torch.stack(held)[: rank()].sum())


def moments_over_ranks(moments: Moments) -> Moments:
    """Join the moments of all processes; every process must call it."""
    if world_size() == 1:
        return moments
    mine = torch.stack([part.double() for part in moments])
    gathered = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(gathered, mine)
    joined = Moments(*gathered[0])
    for other in gathered[1:]:
        joined = merge_moments(joined, Moments(*other))
    return joined


def exact_share(total: int, name: str) -> int:
    """This rank's share of a number that counts over all ranks.

    Args:
        total: over all ranks.
        name: of the setting, for the message.

    Returns:
        ``total / world_size()``.

    Raises:
        ConfigError: it does not divide.
    """
    if total % world_size():
        raise ConfigError(
            f"{name}: got {total} for {world_size()} processes; it counts over all processes, so it must be a multiple "
            "of their number. Change it or the number of devices."
        )
    return total // world_size()
