"""A model's last step by itself: from hidden states to logits, for a loss that does not hold all logits at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_instruct.types import ConfigError

_ROUNDING = 1e-4


def unembedding(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """What a causal language model does to the hidden states of its decoder.

    Beside the linear map these are the scales and the bound that configurations know (Granite, Cohere, Gemma). Whether
    that is all can be seen in numbers: :func:`check_unembedding`.

    Args:
        model: a causal language model.

    Returns:
        ``[..., D]`` -> logits ``[..., V]``.
    """
    head = model.get_output_embeddings()
    config = model.config.get_text_config()
    divisor = getattr(config, "logits_scaling", None) or 1.0
    factor = (getattr(config, "logit_scale", None) or 1.0) / divisor
    bound = getattr(config, "final_logit_softcapping", None)

    def logits_of(hidden: Tensor) -> Tensor:
        logits: Tensor = head(hidden)
        if factor != 1.0:
            logits = logits * factor
        return logits if bound is None else torch.tanh(logits / bound) * bound

    return logits_of


@torch.no_grad()
def check_unembedding(model: PreTrainedModel) -> None:
    """Refuse a model whose logits are made otherwise.

    Args:
        model: a causal language model with its weights; it reads four tokens.

    Raises:
        ConfigError: they are.
    """
    tokens = torch.arange(4, device=model.device) % model.get_input_embeddings().weight.shape[0]
    training = model.training
    model.eval()
    try:
        need = model(input_ids=tokens[None], use_cache=False).logits
        hidden = model.base_model(input_ids=tokens[None], use_cache=False).last_hidden_state
    finally:
        model.train(training)
    got = unembedding(model)(hidden) if model.get_output_embeddings() is not None else torch.zeros_like(need)
    if got.shape != need.shape or not (got - need).norm() <= _ROUNDING * need.norm():
        raise ConfigError(
            f"loss_chunk_tokens: the logits of {type(model).__name__} are not its unembedding of the decoder's hidden "
            "states, as far as can be seen, so they cannot be worked out piece by piece; need a model where they are. "
            "Do: set loss_chunk_tokens to null, and save memory with micro_batch_tokens."
        )
