"""The peak of each phase on one device: what is there all the time, and what a phase adds at its worst moment.

An update has three moments, since what was kept shrinks as fast as the gradients grow::

    turn      both graphs stand, logits too                 gradients: of earlier passes of the step only
    logits    the value model has its gradients, its graph is gone; the gradient of the logits stands beside them
    end       no graph; all gradients, and the one of the embedding once more before it is added

The value model comes first on the way back, because it came last on the way there.
"""

from __future__ import annotations

from typing import NamedTuple

from lit_instruct.planning.activations import (
    Numerics,
    Pass,
    backward_workspace,
    forward_workspace,
    kept,
    logits,
)
from lit_instruct.planning.networks import Network
from lit_instruct.planning.setup import Setup, key_value_bytes

_FIRST_ROOM = 64  # of models/slot_decoding.py
_GROW = 1.5  # of models/slot_cache.py
_PREFILL_TOKENS = 4096  # of models/slot_decoding.py


class Standing(NamedTuple):
    """What a network keeps on each device all the time, in bytes."""

    name: str
    weights: float
    gradients: float  # from the first backward pass of a step to its end
    optimizer: float


class Moment(NamedTuple):
    """What a device holds at the worst moment of a phase, in bytes.

    Attributes:
        phase: rollout, scoring, text or update.
        weights: of all networks, with the average and the rounded copy.
        gradients: of trained networks, with copies of them.
        optimizer: state.
        gathered: parameters and gradients that are not spread at that moment.
        activations: what was kept, and what is being worked out.
        logits: and their gradient.
        cache: keys and values.
    """

    phase: str
    weights: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float
    logits: float
    cache: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self[1:])


def standing(setup: Setup) -> list[Standing]:
    """What each network keeps.

    Args:
        setup: the run.

    Returns:
        One record a network; the average of the weights and the copy that samples have records of their own.
    """
    share, parameter = setup.share, setup.numerics.parameter
    found = []
    for network in setup.networks:
        weights, count = network.weights * share, network.trained * share
        found.append(Standing(network.name, weights, count * _gradient(network, parameter), setup.state_bytes(network)))
    policy = setup.networks[0]
    if setup.averages:
        found.append(Standing("average", policy.trained * share * 4.0, 0.0, 0.0))
    if setup.rollout_bytes is not None:
        copied = policy.shape.parameters
        if setup.numerics.on_cpu and policy.shape.tied:
            copied += policy.shape.unembedding_matrix  # laid out for the processor, apart from the embedding
        # The copy is made of whole weights: nothing in it is spread.
        found.append(Standing("rollout copy", float(copied * setup.rollout_bytes), 0.0, 0.0))
    return found


def peaks(setup: Setup) -> list[Moment]:
    """The worst moment of each phase.

    Args:
        setup: the run.

    Returns:
        In the order in which they come: PPO rollout, scoring, text (if any) and update; else text and update.
    """
    found = [_rollout(setup), _scoring(setup)] if setup.stage == "ppo" else []
    if setup.work.text is not None:
        one = setup.text_pass()
        passes = setup.work.text.ratio * setup.step_rows / one.rows
        found.append(_worst(_backward(setup, "text", one, setup.trained[:1], again=passes > 1)))
    again = setup.backward_passes() > 1 or setup.work.text is not None
    found.append(_worst(_backward(setup, "update", setup.largest_pass(), setup.trained, again=again)))
    return found


def peak(setup: Setup) -> Moment:
    """The worst moment of all."""
    return _worst(peaks(setup))


def _worst(moments: list[Moment]) -> Moment:
    return max(moments, key=lambda moment: moment.total)


def _base(setup: Setup, phase: str) -> Moment:
    kept_always = standing(setup)
    weights = sum(one.weights for one in kept_always)
    if setup.offload_frozen and not setup.numerics.on_cpu and phase in ("text", "update"):
        weights -= sum(network.weights * setup.share for network in setup.networks if not network.trained)
    return Moment(phase, weights, 0.0, sum(one.optimizer for one in kept_always), 0.0, 0.0, 0.0, 0.0)


def _backward(setup: Setup, phase: str, one: Pass, networks: list[Network], *, again: bool) -> list[Moment]:
    """The three moments of a backward pass; ``again``: gradients are there before it already."""
    numerics, base = setup.numerics, _base(setup, phase)
    everything = {network.name: _gradients(setup, network) for network in setup.trained}
    first, *others = networks
    there = sum(everything[network.name] for network in networks) if again else 0.0
    if phase == "update" and setup.work.text is not None and setup.backward_passes() == 1:
        there = everything[first.name]  # the text's; the others have none yet
    copies = everything[first.name] if phase == "update" and setup.work.text and setup.work.text.measured else 0.0
    copies += _buckets(setup)
    graph = kept(first.shape, numerics, one, first.rank)
    values = sum(kept(other.shape, numerics, one._replace(logits=0.0), other.rank) for other in others)
    chunk = setup.work.logit_tokens if phase == "update" else None
    together = one._replace(logits=min(one.logits, chunk or one.logits))
    own = logits(first.shape, numerics, together) if first.unembeds else 0.0
    done = there if again and setup.backward_passes() > 1 else there + sum(everything[o.name] for o in others)
    last = sum(everything[network.name] for network in networks)
    shape = first.shape
    embedding = shape.unembedding_matrix * numerics.parameter if first.trained >= shape.decoder_parameters else 0.0
    twice = embedding if again and shape.tied and first.unembeds else 0.0
    widest = (others or [first])[0]
    return [
        base._replace(
            gradients=there + copies,
            gathered=_gathered(setup, networks, backward=True),
            activations=graph + values + backward_workspace(widest.shape, numerics, one, widest.rank),
            logits=own,
        ),
        base._replace(
            gradients=done + copies,
            gathered=_gathered(setup, [first], backward=True),
            activations=graph + backward_workspace(shape, numerics, one, first.rank) * (own == 0.0),
            logits=2 * own,
        ),
        base._replace(
            gradients=last + copies + embedding + twice,
            gathered=_gathered(setup, networks, backward=True),
            activations=one.tokens * shape.hidden * numerics.stream,
        ),
    ]


def _scoring(setup: Setup) -> Moment:
    """Each network reads some rows and nothing is kept; the widest one counts."""
    lengths = setup.work.lengths
    rows = max(min(setup.rows_together(lengths.longest), setup.work.rows / setup.devices), 1.0)
    one = Pass(rows * lengths.longest, rows, rows * lengths.longest_response)
    moments = []
    for network in setup.networks:
        numerics = _numerics(setup, network)
        moments.append(
            _base(setup, "scoring")._replace(
                gathered=_gathered(setup, [network], backward=False),
                activations=forward_workspace(network.shape, numerics, one),
                logits=logits(network.shape, numerics, one) if network.unembeds else 0.0,
            )
        )
    return _worst(moments)


def _rollout(setup: Setup) -> Moment:
    """All slots are taken by the longest rows; prompts of a few more are being read."""
    policy, lengths = setup.networks[0], setup.work.lengths
    number = setup.numerics.parameter if setup.rollout_bytes is None else setup.rollout_bytes
    slots = max(min(setup.work.rollout_rows, setup.work.rows / setup.devices), 1.0)
    token = key_value_bytes(policy.shape, number)
    columns, before = cache_columns(lengths.longest_prompt, lengths.longest_response)
    # Layer by layer the wider cache takes the narrower one's place.
    cache = slots * token * (columns + before / policy.shape.layers)
    sampler = Numerics("32-true" if number == 4 else "bf16-true", setup.numerics.on_cpu)
    prompts = max(min(slots * lengths.longest_prompt, _PREFILL_TOKENS), lengths.longest_prompt)
    one = Pass(prompts, max(prompts / lengths.longest_prompt, 1.0), 0.0)
    gathered = 0.0
    if setup.sharded and setup.rollout_bytes is None:
        whole = policy.passes_through * float(setup.numerics.parameter)
        gathered = whole if setup.rollout == "gathered" else _gathered(setup, [policy], backward=False)
    return _base(setup, "rollout")._replace(
        gathered=gathered,
        activations=forward_workspace(policy.shape, sampler, one),
        logits=slots * policy.shape.vocabulary * float(number),
        cache=cache,
    )


def cache_columns(longest_prompt: int, longest_response: int) -> tuple[int, int]:
    """How wide the rollout's cache becomes.

    Args:
        longest_prompt: tokens.
        longest_response: tokens; the last one is not read any more.

    Returns:
        Columns at the end, and those before the last time it grew.
    """
    columns, before = longest_prompt + min(longest_response, _FIRST_ROOM), 0
    needed = longest_prompt + longest_response - 1
    while columns < needed:
        columns, before = max(columns + 1, int(columns * _GROW)), columns
    return columns, before


def _gathered(setup: Setup, networks: list[Network], *, backward: bool) -> float:
    """Sharded: two blocks of a network are whole at a time, its embeddings during a pass; gradients on the way back."""
    if not setup.sharded:
        return 0.0
    found = []
    for network in networks:
        shape, number = network.shape, float(setup.numerics.parameter)
        embeddings = shape.embedding_parameters
        embeddings += 0 if shape.tied or not network.unembeds else shape.unembedding_matrix
        whole = embeddings + 2 * shape.block_parameters
        found.append(whole * number * (2 if backward and network.trained else 1))
    return max(found)


def _buckets(setup: Setup) -> float:
    """DDP sends gradients out of buckets, which are a copy of them all."""
    if setup.strategy == "sharded" or setup.devices == 1:
        return 0.0
    return sum(_gradients(setup, network) for network in setup.trained)


def _gradients(setup: Setup, network: Network) -> float:
    return network.trained * setup.share * _gradient(network, setup.numerics.parameter)


def _gradient(network: Network, parameter: int) -> int:
    adapters_only = network.trained < network.shape.decoder_parameters
    return 4 if adapters_only else parameter


def _numerics(setup: Setup, network: Network) -> Numerics:
    """A frozen network in bf16 computes in bf16; 8 and 4 bit are unpacked into the run's own dtype."""
    if network.dtype == "bfloat16":
        return Numerics("bf16-true", setup.numerics.on_cpu)
    return setup.numerics._replace(checkpointing=False)
