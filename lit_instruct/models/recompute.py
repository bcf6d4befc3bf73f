"""Less memory for activations, for more time."""

from __future__ import annotations

from transformers import PreTrainedModel

from lit_instruct.types import ConfigError


def recompute_activations(model: PreTrainedModel) -> None:
    """Keep only the input of each block for the backward pass and work out the rest again there (checkpointing).

    Args:
        model: a language model or its decoder. It acts in training mode only, and dropout drops the same again.

    Raises:
        ConfigError: the model does not support it.
    """
    # The second name is that of transformers before 5.24.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise ConfigError(
            f"gradient_checkpointing: got true for {type(model).__name__}, which does not support it ({error}); set it "
            "to false, and save memory with micro_batch_tokens."
        ) from error
