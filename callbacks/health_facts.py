"""What ``Health`` measures by itself: facts about an iteration that no metric holds."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lit_instruct.functional import kl_estimates, last_token_index, masked_mean
from lit_instruct.models.adapters import is_lora
from lit_instruct.types import Experience

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_DROPOUT_SETTINGS = ("attention_dropout", "activation_dropout", "hidden_dropout", "attn_dropout", "dropout")


@torch.no_grad()
def experience_facts(
    experience: Experience, *, kl_coef: float, whiten_rewards: bool, eos_ids: list[int]
) -> dict[str, Tensor]:
    """Hold an experience against what it must be, whatever the models are.

    Args:
        experience: of this rank.
        kl_coef: the one that was charged.
        whiten_rewards: rewards were scaled, so that the score cannot be looked for.
        eos_ids: tokens that end a response.

    Returns:
        0-dim fp32, shares of the responses unless said: ``tokens_after_end`` (a token counts behind the first end of
        text), ``end_not_counted`` (finished, but the last token that counts is no end of text, or not finished with
        one), ``score_misplaced`` (rewards are not -kl_coef * KL everywhere and the score on top at the last token),
        ``padding_paid`` (a reward, advantage or return at padding); ``scores_equal`` and ``values_equal`` (1 if all are
        one number); ``kl_per_token`` (mean size of k1, nats).
    """
    rollout, rewards_BR, advantages_BR, returns_BR = experience
    mask_BR = rollout.response_mask_BR
    end_BR = torch.isin(rollout.response_ids_BR, torch.tensor(eos_ids, device=mask_BR.device)) & mask_BR
    after_end_BR = (end_BR.cumsum(dim=1) - end_BR.long() > 0) & mask_BR
    last_BR = torch.arange(mask_BR.shape[1], device=mask_BR.device) == last_token_index(mask_BR)[:, None]
    k1_BR = kl_estimates(rollout.old_logprobs_BR, rollout.reference_logprobs_BR).k1
    penalty_BR = (-kl_coef * k1_BR).where(mask_BR, 0.0)
    score_BR = rollout.scores_B[:, None].where(last_BR, 0.0)
    # The two may cancel, so the rounding is that of the larger one and not of their sum.
    room_BR = 1e-5 * (1.0 + penalty_BR.abs() + score_BR.abs())
    off_BR = (rewards_BR - (penalty_BR + score_BR)).abs() > room_BR
    paid_BR = sum(((x != 0) & ~mask_BR).long() for x in (rewards_BR, advantages_BR, returns_BR))
    facts = {
        "tokens_after_end": after_end_BR.any(dim=1),
        "end_not_counted": (end_BR & last_BR).any(dim=1) != rollout.finished_B,
        "score_misplaced": (off_BR & mask_BR).any(dim=1) & (not whiten_rewards),
        "padding_paid": torch.as_tensor(paid_BR).bool().any(dim=1),
        "scores_equal": _all_equal(rollout.scores_B),
        "values_equal": _all_equal(rollout.old_values_BR[mask_BR]),
    }
    return {name: fact.float().mean() for name, fact in facts.items()} | {
        "kl_per_token": masked_mean(k1_BR.abs(), mask_BR)
    }


def _all_equal(values: Tensor) -> Tensor:
    if len(values) < 2:
        return torch.zeros((), device=values.device)
    return (values == values[0]).all()


def active_dropouts(network: nn.Module) -> list[str]:
    """Which modules of a network would drop something if it ran now.

    Args:
        network: any.

    Returns:
        Names of modules in training mode that are a dropout with a probability above 0, keep such a probability for a
        functional dropout (attention layers do), or have it put on them from outside (``add_residual_dropout``).
    """
    found = []
    for name, module in network.named_modules():
        if not module.training:
            continue
        rates = [module.p] if isinstance(module, _DROPOUTS) else [getattr(module, s, 0.0) for s in _DROPOUT_SETTINGS]
        rates += [hook.keywords.get("p") for hook in module._forward_hooks.values() if isinstance(hook, partial)]
        if any(isinstance(rate, float) and rate > 0 for rate in rates):
            found.append(name or type(module).__name__)
    return found


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    """Whether two networks hold the same numbers; of sharded ones, in the shards of this rank.

    Args:
        one: a network. An adapter is not looked at: before it has learned it changes nothing.
        other: another; it may lie on another device (``offload_frozen``).

    Returns:
        False also where names, shapes or dtypes differ.
    """
    ones, others = (
        {name.replace(".base_layer.", "."): x for name, x in network.named_parameters() if not is_lora(name)}
        for network in (one, other)
    )
    return ones.keys() == others.keys() and all(_equal(tensor, others[name]) for name, tensor in ones.items())


def _equal(one: Any, other: Any) -> bool:
    one, other = (x.to_local() if hasattr(x, "to_local") else x for x in (one.detach(), other.detach()))
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other.to(one.device))


def computes_in_fp32(network: nn.Module, device: torch.device) -> bool:
    """Whether log-probabilities of two passes over the same rows agree to about seven digits.

    Args:
        network: the policy.
        device: that it is on.

    Returns:
        False under autocast, with narrower weights, and where the GPU may shorten fp32 products (TF32).
    """
    if torch.is_autocast_enabled(device.type):
        return False
    if device.type == "cuda" and torch.get_float32_matmul_precision() != "highest":
        return False
    return all(parameter.dtype in (torch.float32, torch.float64) for parameter in network.parameters())
