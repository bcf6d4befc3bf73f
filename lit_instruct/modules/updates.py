"""One optimizer step of PPO on one minibatch, and what the steps of an iteration say together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_instruct.models.packing import admission
from lit_instruct.models.sharding import in_step, is_sharded
from lit_instruct.modules.step_guard import gradient_norm, total_norm
from lit_instruct.modules.strategies import (
    average_gradients,
    max_over_ranks,
    mean_over_ranks,
    sum_over_ranks,
    world_size,
)
from lit_instruct.rollouts import passes, row_lengths, select
from lit_instruct.types import Experience, Metrics

if TYPE_CHECKING:
    from lit_instruct.modules.ppo import PPOModule

Backward = Callable[[Tensor], Any]
Step = Callable[[], Any]
NoSync = Callable[[], AbstractContextManager[Any]]

_SURPRISE = ("policy/surprise_gap", "policy/surprise_variation")


def update(
    module: PPOModule, minibatch: Experience, hooks: Sequence[Any], backward: Backward, step: Step, no_sync: NoSync
) -> Metrics:
    """Accumulate all gradients of one minibatch, then take one step of the one optimizer.

    Args:
        module: whose loss it is.
        minibatch: this rank's rows.
        hooks: those with ``auxiliary_losses`` add theirs, before the module's own; ``measures_gradients(module)`` True
            asks for the gradient norm of each part.
        backward: takes a loss.
        step: clips, steps, clears the gradients.
        no_sync: context in which gradients are only accumulated on this rank.

    Returns:
        Metrics of the minibatch on this rank.
    """
    # While only the value model learns there is nothing that the auxiliary losses would have to hold against.
    auxiliary = [] if module.warms_up_value_model else [h for h in hooks if hasattr(h, "auxiliary_losses")]
    own_weight = 1.0
    with no_sync():
        for hook in auxiliary:
            own_weight *= getattr(hook, "own_weight", 1.0)
            for loss in hook.auxiliary_losses(module, minibatch):
                backward(loss)
    asked = any(getattr(hook, "measures_gradients", _never)(module) for hook in auxiliary)
    parts = GradientParts(module.policy) if asked else None
    metrics = _own_backward(module, minibatch, own_weight, backward, no_sync)
    apart = None if parts is None else parts.measure(module.policy)
    step()
    norms = module.last_grad_norms
    return metrics | norms | ({} if apart is None else apart.scaled_to(norms.get("policy/grad_norm")))


def _own_backward(
    module: PPOModule, minibatch: Experience, own_weight: float, backward: Backward, no_sync: NoSync
) -> Metrics:
    tokens = minibatch.rollout.response_mask_BR.sum().to(torch.float32)
    denominator = sum_over_ranks(tokens) / world_size()  # DDP averages gradients: sums over ranks / this = the mean
    cut = passes(
        row_lengths(minibatch),
        rows=module.hparams["micro_batch_size"],
        tokens=module.hparams["micro_batch_tokens"],
        padded=not admission(module.policy).packs,
    )
    parts = []
    # DDP waits for a gradient of every parameter, and while only the value model learns the policy has none. (FSDP
    # averages each network's gradients in its own backward pass.)
    by_hand = module.warms_up_value_model
    together = in_step(cut, module.policy)
    for number, (rows, counts) in enumerate(together, start=1):
        with nullcontext() if number == len(together) and not by_hand else no_sync():
            loss, metrics = module.loss(select(minibatch, rows), denominator=denominator)
            backward(loss * (own_weight if counts else 0.0))
        if counts:
            parts.append(metrics)
    if by_hand and not is_sharded(module.value_model):
        average_gradients(module.value_model)
    joined = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
    return {name: values.max() if name.endswith("ratio_max") else values.sum() for name, values in joined.items()}


class GradientParts:
    """The gradient norms of what was accumulated before now and of what comes after, as all ranks have them together.

    It costs one copy of the gradients. Their ratio says which of the two an optimizer step obeys: gradients are clipped
    together, so a large text gradient leaves the rest little.
    """

    def __init__(self, network: nn.Module):
        """Copy the gradients as they are.

        Args:
            network: with the first part's gradients, of this rank alone.
        """
        sharded = is_sharded(network)  # its gradients are averaged already
        self._first = {
            name: parameter.grad.clone() if sharded else mean_over_ranks(parameter.grad)
            for name, parameter in network.named_parameters()
            if parameter.grad is not None
        }

    def measure(self, network: nn.Module) -> PartNorms:
        """Take the first part off what is there now.

        Args:
            network: with the gradients of both parts, averaged over ranks.

        Returns:
            The norms.
        """
        first = float(total_norm(list(self._first.values())))
        rest = []  # of the copies, in whose place the differences stand: nothing more is held
        for name, parameter in network.named_parameters():
            if parameter.grad is not None:
                copied = self._first.pop(name, None)
                rest.append(parameter.grad if copied is None else copied.sub_(parameter.grad))
        return PartNorms(first, float(total_norm(rest)), float(gradient_norm(network)))


class PartNorms:
    """Norms of the two parts and of their sum, all in one unknown unit: under fp16 gradients are scaled."""

    def __init__(self, first: float, second: float, total: float):
        """Keep them."""
        self._first, self._second, self._total = first, second, total

    def scaled_to(self, total: Tensor | None) -> Metrics:
        """In the unit in which the sum's norm is ``total``.

        Args:
            total: as it was when gradients were clipped; None (a loop that does not clip): the unit stays.

        Returns:
            ``ptx/grad_norm`` (auxiliary losses) and ``policy/own_grad_norm`` (PPO's own).
        """
        unit = float(total) / self._total if total is not None and self._total else 1.0
        return {"ptx/grad_norm": self._first * unit, "policy/own_grad_norm": self._second * unit}


def summarise(updates: Sequence[Metrics], first_tokens: Tensor) -> Metrics:
    """Join the metrics of an iteration's updates.

    Args:
        updates: one record each.
        first_tokens: 0-dim, response tokens of the first minibatch over all ranks.

    Returns:
        Their means (of ``ratio_max`` the maximum), and ``first_minibatch/...``: before any update the policy is the one
        that sampled, so its ratio must be 1, its KL 0, and what it finds surprising in its own samples must be its
        entropy, up to chance: ``surprise_z`` is the gap in standard deviations.
    """
    metrics: Metrics = {}
    for name in updates[0]:
        values = [float(entry[name]) for entry in updates]
        if name not in _SURPRISE:
            is_max = name.endswith("ratio_max")
            metrics[name] = max_over_ranks(max(values), first_tokens.device) if is_max else sum(values) / len(values)
    first = updates[0]
    for name in ("approx_kl", "ratio_mean", "clip_fraction"):
        metrics[f"first_minibatch/{name}"] = float(first[f"policy/{name}"])
    # Given the tokens before it, a token's surprise less the entropy has mean 0: the sum is a martingale. Squares alone
    # would call a nearly certain policy's samples too certain, for what is rare is not among them; with two parts of
    # the variance that was to be expected the tails are bounded like the normal distribution's (Delyon 2009).
    gap, variation = (float(sum_over_ranks(first[name]) / world_size()) for name in _SURPRISE)
    metrics["first_minibatch/surprise_z"] = gap * (float(first_tokens) / variation) ** 0.5 if variation > 0 else 0.0
    return metrics


def _never(module: Any) -> bool:
    return False


def tell(hooks: Iterable[Any], name: str, *arguments: Any) -> None:
    """Call a hook of PPO's protocol on those callbacks that have it.

    Args:
        hooks: callbacks.
        name: of the hook.
        arguments: for it.
    """
    for hook in hooks:
        method = getattr(hook, name, None)
        if method is not None:
            method(*arguments)
