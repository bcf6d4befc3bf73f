"""FSDP2 put on a network from outside: what is cut, whole weights for sampling, and ranks that stay in step.

A sharded network is whole only while it runs: each forward pass of a block first gathers its weights from all ranks. So
all ranks must run the same networks in the same order, equally often. Training and scoring see to it with
:func:`in_step`; sampling, in which ranks finish at different lengths, with :func:`sampling_weights`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from lit_instruct.models.scalar_head import ScalarModel

RolloutWeights = Literal["gathered", "synced"]
"""``gathered``: each rank holds the whole policy while it samples, and ranks need not wait for one another; ``synced``:
it stays sharded, and all ranks decode until the last one has finished."""

Part = TypeVar("Part")


def shard_network(network: nn.Module, mesh: DeviceMesh, *, offload: bool = False) -> None:
    """Cut the weights of a network over the ranks of a mesh: each transformer block by itself, and what is left over.

    Tied embeddings stay tied: they are cut together.

    Args:
        network: a language model, a scalar model or a head, with its weights; changed in place.
        mesh: of one dimension.
        offload: keep the shards in the memory of the CPU and bring them to the device only while they are needed.
    """
    policy = CPUOffloadPolicy() if offload else OffloadPolicy()
    for module in (*_blocks(network), *_roots(network)):
        fully_shard(module, mesh=mesh, reshard_after_forward=True, offload_policy=policy)


def _blocks(network: nn.Module) -> list[nn.Module]:
    """The transformer blocks: the modules of the list that holds most of the weights."""
    lists = [module for module in network.modules() if isinstance(module, nn.ModuleList) and len(module)]
    sizes = [sum(parameter.numel() for parameter in module.parameters()) for module in lists]
    return list(lists[sizes.index(max(sizes))]) if lists else []


def _roots(network: nn.Module) -> list[nn.Module]:
    """What is called as a whole; of a scalar model that is the trunk, and then the head."""
    return [network.trunk, network.head] if isinstance(network, ScalarModel) else [network]


def is_sharded(network: nn.Module) -> bool:
    """Whether some part of a network is cut over ranks."""
    return any(isinstance(module, FSDPModule) for module in network.modules())


def whole(tensor: Tensor) -> Tensor:
    """A tensor with the shards of all ranks, if it is sharded; every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def buffers_to(network: nn.Module, device: torch.device) -> None:
    """Bring the buffers of a network to a device, wherever its weights are.

    Args:
        network: changed in place.
        device: on which it runs.
    """
    for module in network.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)


def cut_like(tensor: Tensor, other: Tensor) -> Tensor:
    """Cut a whole tensor, the same on all ranks, as another one is cut.

    Args:
        tensor: the same on all ranks.
        other: of its shape; sharded or not.

    Returns:
        This rank's part, on the device of the other; the tensor itself where nothing is cut.
    """
    if isinstance(tensor, DTensor) or not isinstance(other, DTensor):
        return tensor.to(other.device)
    # The ranks talk through the mesh's device; shards that are offloaded lie elsewhere.
    return distribute_tensor(tensor, other.device_mesh, other.placements).to(other.device)


def sampling_weights(network: nn.Module, how: RolloutWeights) -> AbstractContextManager[None]:
    """Let a network sample in this context, whatever the lengths of the responses on other ranks.

    Args:
        network: the policy; a network that is not sharded is left as it is.
        how: see :data:`RolloutWeights`.

    Returns:
        A context; every process must enter and leave it.
    """
    if not is_sharded(network):
        return nullcontext()
    return _gathered(network) if how == "gathered" else _synced(network)


@contextmanager
def _gathered(network: nn.Module) -> Iterator[None]:
    parts = [module for module in network.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(True, recurse=False)


@contextmanager
def _synced(network: nn.Module) -> Iterator[None]:
    """Before each pass the ranks count who makes one; who has finished goes on with a token that nobody reads."""
    device = _compute_device(network)

    def running(mine: bool) -> bool:
        votes = torch.tensor(int(mine), device=device)
        dist.all_reduce(votes)
        return bool(votes)

    # Before FSDP's own hook: on all ranks the vote comes first and the gathering of weights second.
    hook = network.register_forward_pre_hook(lambda *_: running(True) and None, prepend=True)
    try:
        yield
    finally:
        hook.remove()
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    with torch.no_grad():
        while running(False):
            network(input_ids=token, use_cache=False)


def _compute_device(network: nn.Module) -> torch.device:
    """Where a sharded network runs; its shards may lie elsewhere."""
    parameter = next(p for p in network.parameters() if isinstance(p, DTensor))
    kind = parameter.device_mesh.device_type
    return torch.device(kind) if kind == "cpu" else torch.device(kind, torch.get_device_module(kind).current_device())


class InStep(NamedTuple):
    """A part that a rank works on, and whether it counts; if not, it only keeps the other ranks company."""

    part: Any
    counts: bool


def in_step(parts: Sequence[Part], network: nn.Module) -> list[InStep]:
    """As many parts on each rank as the one with the most has, if a network is sharded; every process must call it.

    Args:
        parts: what this rank has to do, one pass each; at least one.
        network: that all passes run.

    Returns:
        The parts; on ranks with fewer the first one again, before them all, marked as not counting.
    """
    missing = 0
    if is_sharded(network):
        most = torch.tensor(len(parts), device=_compute_device(network))
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        missing = int(most) - len(parts)
    return [InStep(parts[0], False)] * missing + [InStep(part, True) for part in parts]
