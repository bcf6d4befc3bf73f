"""The value model of PPO: a network of its own, or a head on the policy's trunk; and how both read a response."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_instruct.functional import Surprise
from lit_instruct.models.adapters import (
    LoraSettings,
    adapter_of,
    add_adapter,
    base_of,
    make_base,
    shared_twin,
    train_adapter,
)
from lit_instruct.models.forward import response_logprobs, response_values, spread
from lit_instruct.models.packing import admission
from lit_instruct.models.quantisation import Quantization
from lit_instruct.models.scalar_head import ScalarHead, ScalarModel
from lit_instruct.models.tokenizer import load_tokenizer, reads_alike
from lit_instruct.types import ConfigError, PromptBatch, Responses

Memory = Literal["separate", "shared_base", "shared_trunk"]
"""How the networks of PPO lie in memory; see :class:`~lit_instruct.modules.ppo.PPOModule`."""


class SharedValueHead(nn.Module):
    """One scalar per token, read off the policy's last hidden states (Ziegler et al. 2019, 2.1).

    It saves a network and a forward pass; the value loss then moves the policy's trunk too, which is why InstructGPT
    has a separate one. The head listens to what the policy's unembedding is fed, so it needs no second pass and fits
    any decoder.
    """

    def __init__(self, policy: PreTrainedModel):
        """Put a fresh head beside the unembedding.

        Args:
            policy: read from at construction only; it stays out of this module's parameters.

        Raises:
            ConfigError: the policy has no unembedding to listen to.
        """
        super().__init__()
        unembedding = policy.get_output_embeddings()
        if unembedding is None:
            raise ConfigError(
                f"memory: {type(policy).__name__} has no unembedding, so a head cannot share its trunk. Set memory to "
                "separate."
            )
        self.head = ScalarHead(unembedding.weight.shape[1])

    def forward(self, hidden: Tensor) -> Tensor:
        """The value at each position.

        Args:
            hidden: ``[..., D]``, what the policy's unembedding was fed.

        Returns:
            fp32 ``[...]``.
        """
        values: Tensor = self.head(hidden)
        return values


def make_value_model(
    source: str | None,
    *,
    policy: PreTrainedModel,
    reward_model: ScalarModel | None,
    tokenizer: PreTrainedTokenizerBase,
    memory: Memory = "separate",
    adapter: LoraSettings | None = None,
    quantization: Quantization | None = None,
) -> ScalarModel | SharedValueHead:
    """The value model as PPO starts with it.

    Args:
        source: None: a copy of the reward model, head and bias included (Ouyang et al. 2022, C.4), or, where there is
            none, of the policy with a fresh head; else a model to load, as for :meth:`ScalarModel.from_base`.
        policy: as it starts, without its adapter.
        reward_model: if scores come from one.
        tokenizer: the policy's; a value model reads the policy's tokens.
        memory: ``shared_trunk``: a fresh head on the policy's own trunk; ``shared_base``: an adapter and a head on the
            policy's frozen base; ``separate``: weights of its own.
        adapter: that trains in place of the weights; of one that is copied the settings are kept.
        quantization: of the base below the adapter.

    Returns:
        The network, of which all that is its own trains.

    Raises:
        ConfigError: the model to load has another vocabulary, or cannot share the base.
    """
    if memory == "shared_trunk":
        return SharedValueHead(policy)
    shared = memory == "shared_base"
    if source is not None:
        if not reads_alike(load_tokenizer(source), tokenizer):
            raise ConfigError(
                f"value_model: {source!r} has another tokenizer than the policy, so it would read other tokens than "
                "the policy writes. Give a model with the policy's vocabulary, or leave value_model out."
            )
        model = ScalarModel.sharing(policy, source, "value_model") if shared else ScalarModel.from_base(source)
    elif reward_model is not None:
        model = shared_twin(reward_model, reward_model.trunk) if shared else copy.deepcopy(reward_model)
    else:
        model = ScalarModel.on_language_model(shared_twin(policy, policy) if shared else copy.deepcopy(policy))
    if adapter is None:
        return model.requires_grad_(True).train()
    if adapter_of(model.trunk) is None:
        if base_of(model.trunk) is None:
            model.trunk = make_base(model.trunk, source=None, quantization=quantization)
        add_adapter(model.trunk, adapter)
    train_adapter(model, model.trunk)
    return model.train()


def policy_and_values(
    policy: nn.Module,
    value_model: ScalarModel | SharedValueHead,
    prompts: PromptBatch,
    responses: Responses,
    *,
    temperature: float,
    surprise: bool = False,
    train_policy: bool = True,
) -> tuple[Tensor, Surprise | None, Tensor]:
    """What policy and value model say about each response token; one pass where they share the trunk.

    Args:
        policy: a causal language model.
        value_model: separate, or a head on the policy's trunk.
        prompts: B prompts.
        responses: their responses.
        temperature: the one that sampled.
        surprise: work out entropy and variance of the full distribution's surprise too.
        train_policy: False keeps gradients out of the policy, also those of the values.

    Returns:
        Log-probabilities fp32 ``[B, R]`` in nats, moments of the surprise fp32 ``[B, R]`` or None, values fp32
        ``[B, R]`` of the state before each token. Zero at padding.
    """
    policy_gradients = torch.is_grad_enabled() and train_policy
    if not isinstance(value_model, SharedValueHead):
        with torch.set_grad_enabled(policy_gradients):
            logprobs_BR, moments = response_logprobs(
                policy, prompts, responses, temperature=temperature, surprise=surprise
            )
        return logprobs_BR, moments, response_values(value_model, prompts, responses)
    with _unembedding_input(policy) as heard, torch.set_grad_enabled(policy_gradients):
        logprobs_BR, moments = response_logprobs(policy, prompts, responses, temperature=temperature, surprise=surprise)
    # The policy works out logits only at the columns before response tokens, where the values stand too.
    (hidden,) = heard
    mask_BR = responses.response_mask_BR
    if admission(policy).packs:
        return logprobs_BR, moments, spread(value_model(hidden[0]), mask_BR)
    values_BR = value_model(hidden)
    values_BR = nn.functional.pad(values_BR, (0, mask_BR.shape[1] - values_BR.shape[1]))
    return logprobs_BR, moments, values_BR.where(mask_BR, 0.0)


@contextmanager
def _unembedding_input(policy: Any) -> Iterator[list[Tensor]]:
    heard: list[Tensor] = []
    hook = policy.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: heard.append(inputs[0]))
    try:
        yield heard
    finally:
        hook.remove()
