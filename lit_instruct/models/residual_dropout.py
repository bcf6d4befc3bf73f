"""Dropout on what each branch of a decoder adds to its residual stream, for any decoder and from outside.

GPT-3 is trained with it, while most of today's configurations have none. So it is not a setting of the model here but a
hook on the modules whose output is added: where these are is found by watching one small forward pass, not by names.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from lit_instruct.types import ConfigError

_PROBE_TOKENS = 3


def add_residual_dropout(model: PreTrainedModel, p: float) -> list[RemovableHandle]:
    """Let ``model`` drop a share ``p`` of what attention and feed-forward add to the residual stream.

    Ouyang et al. 2022, C.1: SFT trains with a residual dropout of 0.2. Survivors are scaled by ``1 / (1 - p)``, so that
    the expectation stays. It acts in training mode only, and leaves no trace in weights and configuration: whatever
    is loaded from a checkpoint runs without it.

    Args:
        model: a causal language model whose own residual dropout is off (as
            :func:`~lit_instruct.models.backbone.load_language_model` leaves it); else there would be two.
        p: the share, from 0 (nothing happens) to below 1.

    Returns:
        Handles that take it off again.

    Raises:
        ConfigError: ``p`` is out of range, or it cannot be seen where the model's branches are added.
    """
    if not 0 <= p < 1:
        raise ConfigError(f"residual_dropout: got {p}; need at least 0 and less than 1.")
    if p == 0:
        return []
    branches = [branch for block in residual_branches(model) for branch in block]
    # A module may serve twice (a dropout of the model's own, a block that is shared): one hook acts at each call.
    return [branch.register_forward_hook(partial(_drop, p=p)) for branch in dict.fromkeys(branches)]


def residual_branches(model: PreTrainedModel) -> list[list[nn.Module]]:
    """Find the modules whose outputs the blocks of a decoder add to their residual stream.

    Of the parts of a block (its children; where a child adds the stream itself, their children) a branch ends with the
    one whose output no other part takes in: attention or feed-forward, or the norm that follows it (OLMo 2,
    Gemma 2), or a dropout of the model's own. It then must be seen in numbers that the stream from the block's input to
    its output grows by multiples of these outputs and by nothing else (norms of the sum itself allowed: OPT-350m).

    Args:
        model: a causal language model with its weights; it reads three tokens.

    Returns:
        For each block its branches, in the order of their calls.

    Raises:
        ConfigError: they cannot be found.
    """
    blocks = _blocks(model)
    for depth in (1, 2, 3):
        parts = [list(_parts(block, depth)) for block in blocks]
        traces = _watch(model, blocks, parts)
        found = [_added(trace) for trace in traces]
        if found and all(found):
            return found
    raise ConfigError(
        f"residual_dropout: in {type(model).__name__} it cannot be seen where the outputs of attention and "
        "feed-forward are added to the residual stream; need blocks in a ModuleList whose output is their input plus "
        "what their parts give. Do: set residual_dropout to 0, or put dropout into the model's own code."
    )


def _drop(module: nn.Module, inputs: Any, output: Any, *, p: float) -> Any:
    if not module.training:
        return None
    if isinstance(output, Tensor):
        return nn.functional.dropout(output, p)
    dropped = [nn.functional.dropout(output[0], p), *output[1:]]  # attention gives its weights too
    return dropped if isinstance(output, list) else tuple(dropped)


def _blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The largest ModuleList that stands in no other one: experts and the like are inside blocks."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    inside = {id(inner) for outer in lists for inner in outer.modules() if inner is not outer}
    outermost = [module for module in lists if id(module) not in inside]
    return list(max(outermost, key=lambda blocks: sum(p.numel() for p in blocks.parameters()), default=[]))


def _parts(block: nn.Module, depth: int) -> Iterator[nn.Module]:
    for child in block.children():
        if depth > 1 and next(child.children(), None) is not None:
            yield from _parts(child, depth - 1)
        else:
            yield child


@dataclass
class _Call:
    """What one part of a block took in and gave out."""

    part: nn.Module
    inputs: list[Tensor]
    output: Tensor


@dataclass
class _Trace:
    """What happened inside one block, in order."""

    calls: list[_Call] = field(default_factory=list)
    entered: Tensor | None = None
    left: Tensor | None = None


def _watch(model: PreTrainedModel, blocks: Sequence[nn.Module], parts: Sequence[Sequence[nn.Module]]) -> list[_Trace]:
    """Run a few tokens through the model in eval mode and take notes."""
    traces = [_Trace() for _ in blocks]

    def part_ran(part: nn.Module, args: Any, kwargs: Any, output: Any, *, trace: _Trace) -> None:
        if (given := _first(output)) is not None:
            trace.calls.append(_Call(part, _tensors([*args, *kwargs.values()]), given))

    def block_ran(block: nn.Module, args: Any, kwargs: Any, output: Any, *, trace: _Trace) -> None:
        trace.entered, trace.left = next(iter(_tensors([*args, *kwargs.values()])), None), _first(output)

    handles = []
    for block, inner, trace in zip(blocks, parts, traces, strict=True):
        handles.append(block.register_forward_hook(partial(block_ran, trace=trace), with_kwargs=True))
        for part in inner:
            handles.append(part.register_forward_hook(partial(part_ran, trace=trace), with_kwargs=True))
    modes = {module: module.training for module in model.modules()}
    tokens = torch.arange(_PROBE_TOKENS, device=model.device) % model.get_input_embeddings().weight.shape[0]
    try:
        with torch.no_grad():
            model.eval()(input_ids=tokens[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    return traces


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    """Copies, since some blocks add in place; flat, since some reshape between their parts."""
    found = [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]
    return [value.detach().flatten().clone().cpu() for value in found]


def _first(output: Any) -> Tensor | None:
    """The output itself, or the first of several."""
    first = output[0] if isinstance(output, tuple | list) and output else output
    return next(iter(_tensors([first])), None)


def _added(trace: _Trace) -> list[nn.Module]:
    """The parts whose outputs the block adds to its stream; empty if that is not what it does."""
    if trace.entered is None or trace.left is None:
        return []
    size = len(trace.entered)
    calls, ends = [], []
    for number, call in enumerate(trace.calls):
        if len(call.output) == size:
            calls.append(call)
            later = [tensor for other in trace.calls[number + 1 :] for tensor in other.inputs]
            if not any(_same(call.output, tensor) for tensor in [*later, trace.left]):
                ends.append(call)
    if not ends:
        return []
    outputs = torch.stack([call.output for call in ends], dim=1)
    stream = [trace.entered]  # what it holds, from the block's start to its end
    seen: set[int] = set()

    def on_stream(tensor: Tensor) -> bool:
        if not any(_same(tensor, place) for place in stream):
            shares = [_explained(tensor, place, outputs) for place in stream]
            if not any(shares):
                return False
            seen.update(*shares)
            stream.append(tensor)
        return True

    for call in calls:
        taken = [on_stream(tensor) for tensor in call.inputs]
        if any(taken) and _is_norm(call.part):  # of the sum itself, where norms come after it
            stream.append(call.output)
    return [call.part for call in ends] if on_stream(trace.left) and len(seen) == len(ends) else []


def _explained(goal: Tensor, start: Tensor, outputs: Tensor) -> set[int]:
    """Which columns of ``outputs`` have a part in ``goal - start``; none if they do not make up all of it."""
    if goal.shape != start.shape:
        return set()
    rounding = 8 * torch.finfo(goal.dtype).eps * (goal.norm() + start.norm())
    difference, outputs = goal.double() - start.double(), outputs.double()
    shares = torch.linalg.lstsq(outputs, difference[:, None]).solution[:, 0]
    rest = (difference - outputs @ shares).norm()
    if rest > 1e-3 * difference.norm() + rounding:
        return set()
    return {column for column, share in enumerate(shares.tolist()) if abs(share) > 1e-3}


def _is_norm(part: nn.Module) -> bool:
    return all(parameter.dim() <= 1 for parameter in part.parameters())


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)
