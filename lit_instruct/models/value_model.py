"""The value model of PPO: a network of its own, or a head on the policy's trunk; and how both read a response."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_instruct.functional import Surprise
from lit_instruct.models.forward import response_logprobs, response_values, spread
from lit_instruct.models.packing import admission
from lit_instruct.models.scalar_head import ScalarHead, ScalarModel
from lit_instruct.models.tokenizer import load_tokenizer, reads_alike
from lit_instruct.types import ConfigError, PromptBatch, Responses

SHARED = "shared"
"""The ``value_model`` that is a head on the policy's trunk."""


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
                f"value_model: {type(policy).__name__} has no unembedding, so a head cannot share its trunk. Leave "
                "value_model out to have a separate one."
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
    source: str | None, *, policy: PreTrainedModel, reward_model: ScalarModel | None, tokenizer: PreTrainedTokenizerBase
) -> ScalarModel | SharedValueHead:
    """The value model as PPO starts with it.

    Args:
        source: None: a copy of the reward model, head and bias included (Ouyang et al. 2022, C.4), or, where there is
            none, of the policy with a fresh head; ``shared``: a fresh head on the policy's own trunk; else a model to
            load, as for :meth:`ScalarModel.from_base`.
        policy: as it starts.
        reward_model: if scores come from one.
        tokenizer: the policy's; a value model reads the policy's tokens.

    Returns:
        The network, trainable.

    Raises:
        ConfigError: the model to load has another vocabulary.
    """
    if source == SHARED:
        return SharedValueHead(policy)
    if source is not None:
        if not reads_alike(load_tokenizer(source), tokenizer):
            raise ConfigError(
                f"value_model: {source!r} has another tokenizer than the policy, so it would read other tokens than "
                "the policy writes. Give a model with the policy's vocabulary, or leave value_model out."
            )
        return ScalarModel.from_base(source)
    if reward_model is not None:
        return copy.deepcopy(reward_model).requires_grad_(True).train()
    return ScalarModel.on_language_model(copy.deepcopy(policy))


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
