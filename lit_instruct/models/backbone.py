"""Load or build a causal language model."""

from __future__ import annotations

import copy
import difflib
import inspect
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lit_instruct.models.adapter_checkpoints import load_base, own_state, with_adapter
from lit_instruct.models.adapters import merge_adapter
from lit_instruct.models.attention import NAME as PACKED_ATTENTION
from lit_instruct.models.gguf_cache import forget_quantisation, gguf_source
from lit_instruct.models.handover import (
    UNREADABLE,
    AdapterRecord,
    Handover,
    first_line,
    is_stage_checkpoint,
    read_handover,
    why_unreadable,
)
from lit_instruct.models.packing import enable_packing, refuse_packing
from lit_instruct.models.reward_folder import is_reward_folder
from lit_instruct.models.rms_norm import quicken_norms
from lit_instruct.types import ConfigError

Base = str | dict[str, Any]
"""Where a language model comes from; see :func:`load_language_model`."""

_NOISES = (
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
    "router_jitter_noise",
    "input_jitter_noise",
)

_CONTEXT_LENGTHS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")

_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # what fit_to_tokenizer adds to any configuration


def load_language_model(base: Base | PathLike[str] | PretrainedConfig, *, ema: bool = False) -> PreTrainedModel:
    """Load (or build) a causal language model in fp32, ready to train.

    Args:
        base: one of

            - a Hugging Face hub name or a folder (``save_pretrained`` format);
            - a ``.gguf`` file (extra ``gguf``), which the first load converts into a cache (see ``gguf_cache``);
            - a ``.ckpt`` file of an earlier stage: its policy, with its own configuration; where the stage trained an
              adapter, this is merged into the base, which must still be where it was;
            - a bare configuration, ``{"model_type": "llama", "hidden_size": 128, ...}``: random weights.
        ema: take the averaged weights of a ``.ckpt`` (see ``WeightEMA``) instead of the last ones.

    Returns:
        The model, in training mode and fp32, with every dropout and other noise of its configuration off: a policy must
        see the same network in rollout and update. It reads packed rows if it can
        (:mod:`lit_instruct.models.packing`), unless the bare configuration names an ``attn_implementation``.

    Raises:
        ConfigError: nothing can be loaded from ``base``.
    """
    if isinstance(base, dict):
        base = _config_from_fields(base)
    asked = None
    if isinstance(base, PretrainedConfig):
        base = copy.deepcopy(base)  # building a model sets the attention of its configuration
        asked = base._attn_implementation
    if not isinstance(base, PretrainedConfig) and is_stage_checkpoint(base):
        handed = _read_policy(Path(base))
        if handed.adapter is not None:
            return _load_merged(handed, handed.adapter, Path(base), ema=ema)
    model = _load(base, ema=ema)
    _check_finite(model, base)
    quicken_norms(model)
    if asked not in (None, PACKED_ATTENTION):
        refuse_packing(model, f"attn_implementation is set to {asked!r}")
    else:
        enable_packing(model)
    return model


def _load(base: str | PathLike[str] | PretrainedConfig, *, ema: bool) -> PreTrainedModel:
    if isinstance(base, PretrainedConfig):
        return _build(base)
    path = Path(base)
    if is_stage_checkpoint(path):
        handed = _read_policy(path)
        model = _build(handed.config)
        load_weights(model.state_dict(), handed.weights, path)
        if ema:
            load_weights(dict(model.named_parameters()), _averaged(handed, path), path)  # tied ones are named once
        return model
    if ema:
        raise ConfigError(f"averaged weights were asked for, but {str(base)!r} is no .ckpt of a stage.")
    if is_reward_folder(base):
        raise _is_reward_model(base)
    try:
        where, gguf = gguf_source(path, "model") if path.suffix == ".gguf" else (str(base), {})
        config = AutoConfig.from_pretrained(where, trust_remote_code=False, **gguf)
        _switch_noise_off(config)
        model, report = AutoModelForCausalLM.from_pretrained(
            where, config=config, dtype=torch.float32, trust_remote_code=False, output_loading_info=True, **gguf
        )
        if gguf:
            forget_quantisation(model)
    except UNREADABLE as error:
        raise ConfigError(
            f"no language model could be loaded from {str(base)!r}: {why_unreadable(error)} Give a hub name, a "
            "folder, a .gguf file, the .ckpt of an earlier stage, or a configuration such as {model_type: llama, ...}."
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise ConfigError(
            f"base: {str(base)!r} brings no weights for {', '.join(missing[:3])}, which would be random; need a "
            "language model that is whole. Do: check that config.json and weights are of one model, or give a "
            "configuration in place of the folder to train a new one."
        )
    return model.train()


def _check_finite(model: PreTrainedModel, base: Any) -> None:
    """Weights that a run which diverged has left behind.

    Raises:
        ConfigError: some are not finite.
    """
    for name, parameter in model.named_parameters():
        if not parameter.detach().sum().isfinite():
            raise ConfigError(
                f"base: {str(base)!r} has weights that are not finite ({name}); need numbers, or nothing can be "
                "trained. Do: give another checkpoint of the run that it comes from."
            )


def _is_reward_model(base: str | PathLike[str]) -> ConfigError:
    return ConfigError(f"{str(base)!r} is a reward model; a language model is needed: give an SFT or PPO checkpoint.")


def _read_policy(path: Path) -> Handover:
    handed = read_handover(path)
    if handed.stage == "rm":
        raise _is_reward_model(path)
    return handed


def _load_merged(handed: Handover, adapter: AdapterRecord, path: Path, *, ema: bool) -> PreTrainedModel:
    base = load_base(adapter, path, load_language_model, lambda model: model)
    model = with_adapter(base, adapter)
    load_weights(own_state(model), _averaged(handed, path) if ema else handed.weights, path)
    merge_adapter(model)
    return model.train()


@torch.no_grad()
def load_weights(into: Mapping[str, Tensor], weights: Mapping[str, Tensor], path: Path) -> None:
    """Copy a checkpoint's weights into the network that its own configuration describes.

    Args:
        into: the network's tensors by name (its ``state_dict()``), changed in place.
        weights: those of the checkpoint.
        path: the checkpoint, for the error.

    Raises:
        ConfigError: weights are missing, belong nowhere or have another shape.
    """
    problems = [f"{name} is missing" for name in into if name not in weights]
    problems += [f"{name} belongs nowhere" for name in weights if name not in into]
    problems += [
        f"{name} has the shape {list(weights[name].shape)} instead of {list(tensor.shape)}"
        for name, tensor in into.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ConfigError(
            f"checkpoint {str(path)!r}: got weights that do not fit the configuration beside them: "
            f"{', '.join(problems[:3])}{more}. Need exactly the weights of that network. Do: give the file as the "
            "stage wrote it."
        )
    for name, tensor in into.items():
        tensor.copy_(weights[name])


def _averaged(handed: Handover, path: Path) -> dict[str, Tensor]:
    if not handed.ema_weights:
        raise ConfigError(
            f"checkpoint {str(path)!r} holds no averaged weights; train with the WeightEMA callback, or leave ema off."
        )
    return handed.ema_weights


def _config_from_fields(fields: dict[str, Any]) -> PretrainedConfig:
    fields = dict(fields)
    kind = fields.pop("model_type", None)
    if kind is None:
        raise ConfigError("base: got a configuration without model_type; add for example `model_type: llama`.")
    try:
        config = AutoConfig.for_model(kind, **fields)
    except (ValueError, TypeError, AttributeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"base: no configuration of type {kind!r} can be made: {reason[:300]}") from error
    _refuse_unknown(fields, config)
    return config


def _refuse_unknown(fields: dict[str, Any], config: PretrainedConfig) -> None:
    """A field that is none of its own a configuration keeps without a word, and the model has its default size."""
    kind = type(config)
    known = {*inspect.signature(kind).parameters, *kind.attribute_map, *PretrainedConfig().to_dict(), *_TOKEN_IDS}
    stored = config.to_dict()  # names of old that transformers still understands (torch_dtype, ...) have become others
    old_names = {"attn_implementation", "torch_dtype"}
    if "rope_parameters" in known:
        old_names |= {"rope_scaling", "rope_theta"}
    for name, value in fields.items():
        limits_context = name in _CONTEXT_LENGTHS and context_length(config) == value  # read by nobody but us
        if name in known or name not in stored or limits_context:
            continue
        near = difflib.get_close_matches(name, sorted((known | old_names) - {name}), n=1, cutoff=0.8)
        hint = f"did you mean {near[0]}?" if near else "leave it out, or look up its name in the model's documentation."
        raise ConfigError(
            f"base: got the field {name!r}, which a configuration of type {config.model_type!r} does not have; the "
            f"model would silently do without it. Need one of that type's own fields. Do: {hint}"
        )


def _build(config: PretrainedConfig) -> PreTrainedModel:
    _switch_noise_off(config)
    try:
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    except ValueError as error:
        raise ConfigError(
            f"base: no language model can be built from a configuration of type {config.model_type!r}: "
            f"{first_line(error)} Give a decoder's, such as {{model_type: llama, ...}}."
        ) from error


def _switch_noise_off(config: PretrainedConfig) -> None:
    for name in _NOISES:
        if getattr(config, name, None):
            setattr(config, name, 0.0)


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


def check_vocabulary(name: str, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that gives ids for which the model has no embedding.

    Args:
        name: the setting that names the model.
        network: the model.
        tokenizer: of the data.

    Raises:
        ConfigError: the model has fewer embeddings than the tokenizer has tokens.
    """
    rows = network.get_input_embeddings().weight.shape[0]
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= rows:
        raise ConfigError(
            f"{name}: got a model with embeddings for {rows} tokens and a tokenizer whose ids go up to {largest}; need "
            "the tokenizer that the model was made for. Do: leave tokenizer out, or give the folder of the model's own."
        )


def context_length(config: PretrainedConfig) -> int | None:
    """How many tokens the model can attend to, or None where its configuration sets no limit."""
    for name in _CONTEXT_LENGTHS:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None
