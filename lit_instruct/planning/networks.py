"""What each network of a stage keeps all the time: weights, gradients, optimizer state, under a memory plan."""

from __future__ import annotations

from typing import Literal, NamedTuple

from lit_instruct.planning.architecture import Architecture

Plan = Literal["separate", "shared_trunk", "shared_base"]
FrozenDtype = Literal["float32", "bfloat16", "8bit", "4bit"]

PLANS: tuple[Plan, ...] = ("separate", "shared_trunk", "shared_base")

_QUANTISED = {"8bit": 1.0 + 4.0 / 4096, "4bit": 0.5 + 1.0 / 64 + 4.0 / (64 * 256)}
"""Bytes a weight: int8 with an fp32 scale a row (of some 4096); nf4 with an 8-bit scale for 64 weights, and one in fp32
for 256 of those (double quantisation)."""


class Network(NamedTuple):
    """One of the models.

    Attributes:
        name: policy, value model, reference or reward model.
        shape: its decoder.
        unembeds: has an unembedding; otherwise a scalar head.
        weights: bytes that are its own; what is another network's counts there.
        trained: parameters with gradient and optimizer state.
        passes_through: parameters that a forward pass reads, shared ones too.
        dtype: of what it computes with when it is frozen.
        rank: of its adapters; 0: none.
    """

    name: str
    shape: Architecture
    unembeds: bool
    weights: float
    trained: int
    passes_through: int
    dtype: FrozenDtype = "float32"
    rank: int = 0


class Adapter(NamedTuple):
    """How the trained networks learn.

    Attributes:
        rank: of LoRA; 0: all weights are trained.
        quantization: of the frozen base under the adapters.
    """

    rank: int = 0
    quantization: Literal["8bit", "4bit"] | None = None


def weight_bytes(shape: Architecture, unembeds: bool, dtype: FrozenDtype, parameter: int = 4) -> float:
    """Bytes of a network's weights; only the matrices of blocks are quantised.

    Args:
        shape: of its decoder.
        unembeds: it has an unembedding.
        dtype: float32 stands for the run's own.
        parameter: bytes of a weight in the run's own dtype.
    """
    total = shape.parameters if unembeds else shape.decoder_parameters + shape.hidden + 1
    if dtype in _QUANTISED:
        matrices = shape.layers * shape.block_matrices
        return matrices * _QUANTISED[dtype] + (total - matrices) * parameter
    return total * (2.0 if dtype == "bfloat16" else float(parameter))


def trained_network(name: str, shape: Architecture, *, unembeds: bool, adapter: Adapter, parameter: int) -> Network:
    """A network that learns, with weights of its own."""
    head = 0 if unembeds else shape.hidden + 1
    total = shape.parameters if unembeds else shape.decoder_parameters + head
    base = weight_bytes(shape, unembeds, adapter.quantization or "float32", parameter)
    if not adapter.rank:
        return Network(name, shape, unembeds, base, total, total)
    own = shape.adapter_parameters(adapter.rank)
    return Network(name, shape, unembeds, base + own * 4.0, own + head, total + own, rank=adapter.rank)


def frozen_network(name: str, shape: Architecture, *, unembeds: bool, dtype: FrozenDtype, parameter: int) -> Network:
    """A network that does not."""
    total = shape.parameters if unembeds else shape.decoder_parameters + shape.hidden + 1
    return Network(name, shape, unembeds, weight_bytes(shape, unembeds, dtype, parameter), 0, total, dtype)


def ppo_networks(
    policy: Architecture,
    reward_model: Architecture,
    *,
    plan: Plan,
    adapter: Adapter,
    frozen_dtype: FrozenDtype,
    parameter: int,
) -> tuple[Network, ...]:
    """PPO's models under a memory plan.

    Args:
        policy: its shape, and the reference's.
        reward_model: its shape, and that of a value model of its own.
        plan: ``separate``: four models; ``shared_trunk``: the value is a head on the policy; ``shared_base``: all are
            adapters on one frozen base, and the reference is that base itself.
        adapter: how policy and value model learn; shared_base needs a rank.
        frozen_dtype: of reference and reward model where they have weights of their own.
        parameter: bytes of a trained parameter.

    Returns:
        Policy, value model (not under shared_trunk), reference, reward model.
    """
    trains = trained_network("policy", policy, unembeds=True, adapter=adapter, parameter=parameter)
    reference = frozen_network("reference", policy, unembeds=True, dtype=frozen_dtype, parameter=parameter)
    reward = frozen_network("reward model", reward_model, unembeds=False, dtype=frozen_dtype, parameter=parameter)
    if plan == "shared_trunk":
        head = policy.hidden + 1
        trains = trains._replace(
            weights=trains.weights + 4.0 * head,
            trained=trains.trained + head,
            passes_through=trains.passes_through + head,
        )
        return trains, reference, reward
    value = trained_network("value model", reward_model, unembeds=False, adapter=adapter, parameter=parameter)
    if plan == "shared_base":
        own = 4.0 * (policy.adapter_parameters(adapter.rank) + policy.hidden + 1)
        value = trained_network("value model", policy, unembeds=False, adapter=adapter, parameter=parameter)
        value = value._replace(weights=own)
        reference = reference._replace(weights=0.0, dtype="float32")
        through = value.passes_through
        reward = Network("reward model", policy, False, own, 0, through)
    return trains, value, reference, reward
