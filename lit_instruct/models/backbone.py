"""Load or build a causal language model."""

from __future__ import annotations

import struct
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lit_instruct.models.handover import Handover, first_line, is_stage_checkpoint, read_handover
from lit_instruct.types import ConfigError

Base = str | dict[str, Any]
"""Where a language model comes from; see :func:`load_language_model`."""

_DROPOUTS = (
    "attention_dropout",
    "attn_pdrop",
    "embd_pdrop",
    "resid_pdrop",
    "dropout",
    "hidden_dropout",
    "activation_dropout",
    "residual_dropout",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "embed_dropout",
    "embedding_dropout",
    "emb_pdrop",
    "mlp_dropout",
    "resid_dropout",
    "layerdrop",
    "decoder_layerdrop",
)

_UNREADABLE = (OSError, ValueError, ImportError, RuntimeError, SafetensorError, struct.error, StrictDataclassError)
"""What Hugging Face raises over files that are not there, cut off or of another shape."""


def load_language_model(base: Base | PathLike[str] | PretrainedConfig, *, ema: bool = False) -> PreTrainedModel:
    """Load (or build) a causal language model in fp32, ready to train.

    Args:
        base: one of

            - a Hugging Face hub name or a folder (``save_pretrained`` format);
            - a ``.gguf`` file (extra ``gguf``);
            - a ``.ckpt`` file of an earlier stage: its policy, with its own configuration;
            - a bare configuration, ``{"model_type": "llama", "hidden_size": 128, ...}``: random weights.
        ema: take the averaged weights of a ``.ckpt`` (see ``WeightEMA``) instead of the last ones.

    Returns:
        The model, in training mode and fp32, with every dropout of its configuration off: the stages that want
        dropout switch it on themselves, since a policy must see the same network in rollout and update.

    Raises:
        ConfigError: nothing can be loaded from ``base``.
    """
    if isinstance(base, dict):
        base = _config_from_fields(base)
    if isinstance(base, PretrainedConfig):
        return _build(base)
    path = Path(base)
    if is_stage_checkpoint(path):
        handed = read_handover(path)
        if handed.stage == "rm":
            raise ConfigError(
                f"{str(base)!r} is a reward model; a language model is needed: give an SFT or PPO checkpoint."
            )
        model = _build(handed.config)
        model.load_state_dict(handed.weights)
        if ema:
            _take_average(model, handed, path)
        return model
    if ema:
        raise ConfigError(f"averaged weights were asked for, but {str(base)!r} is no .ckpt of a stage.")
    try:
        if path.suffix == ".gguf":
            model = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)
            _forget_quantisation(model)
        else:
            config = AutoConfig.from_pretrained(str(base))
            _switch_dropout_off(config)
            model = AutoModelForCausalLM.from_pretrained(str(base), config=config, dtype=torch.float32)
    except _UNREADABLE as error:
        raise ConfigError(
            f"no language model could be loaded from {str(base)!r}: {first_line(error)} Give a hub name, a "
            "folder, a .gguf file, the .ckpt of an earlier stage, or a configuration such as {model_type: llama, ...}."
        ) from error
    return model.train()


@torch.no_grad()
def _take_average(model: PreTrainedModel, handed: Handover, path: Path) -> None:
    if not handed.ema_weights:
        raise ConfigError(
            f"checkpoint {str(path)!r} holds no averaged weights; train with the WeightEMA callback, or leave ema off."
        )
    for name, parameter in model.named_parameters():  # tied weights are named once
        parameter.copy_(handed.ema_weights[name])


def _config_from_fields(fields: dict[str, Any]) -> PretrainedConfig:
    fields = dict(fields)
    kind = fields.pop("model_type", None)
    if kind is None:
        raise ConfigError("base: got a configuration without model_type; add for example `model_type: llama`.")
    try:
        return AutoConfig.for_model(kind, **fields)
    except (ValueError, TypeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"base: no configuration of type {kind!r} can be made: {reason[:300]}") from error


def _build(config: PretrainedConfig) -> PreTrainedModel:
    _switch_dropout_off(config)
    try:
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    except ValueError as error:
        raise ConfigError(
            f"base: no language model can be built from a configuration of type {config.model_type!r}: "
            f"{first_line(error)} Give a decoder's, such as {{model_type: llama, ...}}."
        ) from error


def _switch_dropout_off(config: PretrainedConfig) -> None:
    for name in _DROPOUTS:
        if getattr(config, name, None):
            setattr(config, name, 0.0)


def _forget_quantisation(model: PreTrainedModel) -> None:
    # GGUF weights arrive dequantised, but the model keeps the mark of its file and then refuses to be saved.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def fit_to_tokenizer(base: Base, tokenizer: PreTrainedTokenizerBase) -> Base:
    """Fill in what a bare configuration must share with its tokenizer: vocabulary size and end of text.

    Args:
        base: only a bare configuration is changed (a copy is returned).
        tokenizer: of the model.

    Returns:
        The base, ready for :func:`load_language_model`.

    Raises:
        ConfigError: the configuration's vocabulary is smaller than the tokenizer's.
    """
    if not isinstance(base, dict):
        return base
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    fitted = {"vocab_size": len(tokenizer)} | ends | {"pad_token_id": tokenizer.pad_token_id} | base
    if fitted["vocab_size"] < len(tokenizer):
        raise ConfigError(
            f"base: got vocab_size {fitted['vocab_size']} for a tokenizer of {len(tokenizer)} tokens; leave it out to "
            "take the tokenizer's, or give a larger one."
        )
    return fitted


def context_length(config: PretrainedConfig) -> int | None:
    """How many tokens the model can attend to, or None where its configuration sets no limit."""
    for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None
