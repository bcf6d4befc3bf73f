"""Operations, bytes and seconds of each phase of an iteration by roofline: as fast as the slowest resource.

A product of a token with a matrix is 2 operations a weight. The backward pass takes twice the forward pass: gradients
of the inputs and of the weights, of which adapters on a frozen base need the first alone. Checkpointing adds one
forward pass through the blocks. A causal row of n tokens has n * n / 2 pairs of query and key, each 4 operations a
query number (score and sum). The three resources work side by side in a phase, and nothing is lost: seconds are what no
run can be faster than.
"""

from __future__ import annotations

from typing import NamedTuple

from lit_instruct.planning.architecture import Architecture
from lit_instruct.planning.hardware import Hardware
from lit_instruct.planning.networks import Network, weight_bytes
from lit_instruct.planning.setup import Setup, key_value_bytes

PETAFLOP_DAY = 1e15 * 86400.0
"""Operations of a petaflop/s for a day."""


class Rows(NamedTuple):
    """Rows that are read.

    Attributes:
        tokens: of all.
        unembedded: positions with logits.
        pairs: of a query and a key that it sees.
    """

    tokens: float
    unembedded: float
    pairs: float

    def times(self, factor: float) -> Rows:
        """So many of them."""
        return Rows(*(part * factor for part in self))


class PhaseCost(NamedTuple):
    """What a phase of one iteration takes.

    Attributes:
        phase: rollout, scoring, text or update.
        flops: operations, over all devices.
        read: bytes between memory and processor, on each device.
        sent: bytes that each device sends.
        compute: seconds for the operations.
        memory: seconds for the bytes read.
        network: seconds for the bytes sent.
    """

    phase: str
    flops: float
    read: float
    sent: float
    compute: float
    memory: float
    network: float

    @property
    def seconds(self) -> float:
        """As long as the slowest."""
        return max(self.compute, self.memory, self.network)

    @property
    def limit(self) -> str:
        """Which one that is."""
        times = {"compute": self.compute, "memory bandwidth": self.memory, "communication": self.network}
        return max(times, key=times.__getitem__)


def rows_of(setup: Setup) -> Rows:
    """The rows of one iteration at their mean lengths."""
    lengths, count, rows = setup.work.lengths, setup.work.responses, setup.work.rows
    tokens = lengths.prompt + count * lengths.response
    pairs = lengths.prompt**2 / 2 + count * (lengths.response * lengths.prompt + lengths.response**2 / 2)
    return Rows(tokens, 0.0 if setup.stage == "rm" else count * lengths.response, pairs).times(rows)


def forward_flops(shape: Architecture, rows: Rows, *, unembeds: bool) -> float:
    """Operations of a forward pass over rows."""
    return _block_flops(shape, rows) + (2.0 * shape.unembedding_matrix * rows.unembedded if unembeds else 0.0)


def training_flops(network: Network, rows: Rows, *, checkpointing: bool) -> float:
    """Operations of a forward and a backward pass over rows."""
    adapters_only = network.trained < network.shape.decoder_parameters
    once = forward_flops(network.shape, rows, unembeds=network.unembeds)
    again = _block_flops(network.shape, rows) if checkpointing else 0.0
    return once * (2.0 if adapters_only else 3.0) + again


def costs(setup: Setup, hardware: Hardware) -> list[PhaseCost]:
    """What each phase of an iteration takes.

    Args:
        setup: the run.
        hardware: with as many devices as the setup has.

    Returns:
        One record a phase, in their order.
    """
    found = [_rollout(setup, hardware), _scoring(setup, hardware)] if setup.stage == "ppo" else []
    if setup.work.text is not None:
        found.append(_text(setup, hardware))
    found.append(_update(setup, hardware))
    return found


def decoding_steps(setup: Setup) -> float:
    """Steps of the rollout on each device: slots are filled again, but the longest response has to come to its end."""
    rows = setup.work.rows / setup.devices
    slots = max(min(setup.work.rollout_rows, rows), 1.0)
    return max(rows * setup.work.lengths.response / slots, setup.work.lengths.longest_response)


def _rollout(setup: Setup, hardware: Hardware) -> PhaseCost:
    policy, lengths = setup.networks[0], setup.work.lengths
    number = setup.numerics.parameter if setup.rollout_bytes is None else setup.rollout_bytes
    steps, rows = decoding_steps(setup), setup.work.rows / setup.devices
    whole = float(number * policy.passes_through)
    seen = rows * lengths.response * (lengths.prompt + lengths.response / 2)
    read = steps * whole + seen * key_value_bytes(policy.shape, number)
    flops = forward_flops(policy.shape, rows_of(setup), unembeds=True)
    times = steps if setup.rollout == "synced" and setup.rollout_bytes is None else 1.0
    sent = times * _gather(setup, policy) if setup.sharded else 0.0
    return _phase("rollout", {number == 4: flops}, read, sent, hardware)


def _scoring(setup: Setup, hardware: Hardware) -> PhaseCost:
    rows, flops = rows_of(setup), {True: 0.0, False: 0.0}
    passes = setup.passes(setup.work.rows / setup.devices, setup.work.lengths.mean)
    read = sent = 0.0
    for network in setup.networks:
        if network.name == "policy" and not setup.recompute_logprobs and setup.plan != "shared_trunk":
            continue
        in_fp32 = setup.numerics.compute == 4 and network.dtype != "bfloat16"
        flops[in_fp32] += forward_flops(network.shape, rows, unembeds=network.unembeds)
        read += passes * _weights(setup, network)
        sent += passes * _gather(setup, network)
    return _phase("scoring", flops, read, sent, hardware)


def _text(setup: Setup, hardware: Hardware) -> PhaseCost:
    text = setup.work.text
    assert text is not None
    steps = setup.work.rows / setup.work.step_rows * setup.work.inner_epochs
    chunks = max(round(text.ratio * setup.work.step_rows), 1) * steps
    rows = Rows(text.chunk_tokens, text.chunk_tokens, text.chunk_tokens**2 / 2).times(chunks)
    passes = max(chunks / setup.devices / text.micro_rows, steps)
    policy = setup.networks[0]
    flops = training_flops(policy, rows, checkpointing=setup.numerics.checkpointing)
    sent = passes * _training_traffic(setup, policy)
    return _phase("text", {setup.numerics.compute == 4: flops}, passes * _passes_read(setup, policy), sent, hardware)


def _update(setup: Setup, hardware: Hardware) -> PhaseCost:
    rows = rows_of(setup).times(setup.work.inner_epochs)
    steps = setup.work.rows / setup.work.step_rows * setup.work.inner_epochs
    passes = steps * setup.passes(setup.step_rows, setup.work.lengths.mean)
    flops = read = sent = 0.0
    for network in setup.trained:
        flops += training_flops(network, rows, checkpointing=setup.numerics.checkpointing)
        read += passes * _passes_read(setup, network)
        # The optimizer reads weight, gradient and state, and writes weight and state.
        numbers = 3.0 * setup.numerics.parameter * network.trained * setup.share
        read += steps * (numbers + 2.0 * setup.state_bytes(network))
        sent += passes * _training_traffic(setup, network)
        if setup.strategy == "replicated":
            sent += steps * 2.0 * network.trained * setup.numerics.parameter * _others(setup)
    return _phase("update", {setup.numerics.compute == 4: flops}, read, sent, hardware)


def _phase(phase: str, flops: dict[bool, float], read: float, sent: float, hardware: Hardware) -> PhaseCost:
    """``flops``: by whether they are done in fp32."""
    device = hardware.device
    rates = {True: device.flops_fp32, False: device.flops}
    compute = sum(count / rates[in_fp32] for in_fp32, count in flops.items()) / hardware.devices
    return PhaseCost(phase, sum(flops.values()), read, sent, compute, read / device.bandwidth, sent / hardware.ring)


def _block_flops(shape: Architecture, rows: Rows) -> float:
    products = 2.0 * shape.layers * shape.block_matrices * rows.tokens
    return products + 4.0 * shape.layers * shape.query_width * rows.pairs


def _weights(setup: Setup, network: Network) -> float:
    """Bytes of all weights that a pass reads, those shared with other networks too."""
    if network.trained:
        return float(network.passes_through * setup.numerics.parameter)
    return weight_bytes(network.shape, network.unembeds, network.dtype, setup.numerics.parameter)


def _passes_read(setup: Setup, network: Network) -> float:
    """Forward and backward pass read the weights, and the gradients are read and written."""
    return 2.0 * _weights(setup, network) + 2.0 * network.trained * setup.numerics.parameter


def _others(setup: Setup) -> float:
    return (setup.devices - 1) / setup.devices


def _gather(setup: Setup, network: Network) -> float:
    """Bytes that a device sends so that all have the whole network, block by block or at once."""
    return _weights(setup, network) * _others(setup) if setup.sharded else 0.0


def _training_traffic(setup: Setup, network: Network) -> float:
    """Sharded: weights are gathered on the way there and on the way back, gradients are summed and spread."""
    if not setup.sharded:
        return 0.0
    return 2.0 * _gather(setup, network) + network.trained * setup.numerics.parameter * _others(setup)
