"""Adapters in checkpoints: a stage that trained one saves it alone, and with it what it stands on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_instruct.models.adapters import (
    LoraSettings,
    adapter_of,
    add_adapter,
    base_of,
    digest_of,
    left_out,
    make_base,
)
from lit_instruct.models.handover import AdapterRecord, read_handover
from lit_instruct.models.quantisation import Quantization, dequantise
from lit_instruct.types import ConfigError

AnyNetwork = TypeVar("AnyNetwork", bound=nn.Module)


def record_of(network: nn.Module) -> AdapterRecord | None:
    """What the handover says about a network's adapter.

    Args:
        network: a model, or one with a model as a part.

    Returns:
        The record; None for a network without an adapter.
    """
    for part in network.modules():
        base, settings = base_of(part), adapter_of(part)
        if base is not None and settings is not None:
            return AdapterRecord(asdict(settings), list(base.sources), base.sha256, base.quantization)
    return None


def settings_of(record: AdapterRecord) -> LoraSettings:
    """The settings in a record, as those who train take them."""
    return LoraSettings(**record.settings)


def load_base(
    record: AdapterRecord,
    path: str | PathLike[str],
    load: Callable[[str], AnyNetwork],
    backbone: Callable[[AnyNetwork], PreTrainedModel],
) -> AnyNetwork:
    """Find the base of an adapter again.

    Args:
        record: from the checkpoint.
        path: the checkpoint, for the error.
        load: loads a network from one of the record's sources.
        backbone: the part of it that the adapter was on.

    Returns:
        The network, whose backbone has the very weights.

    Raises:
        ConfigError: no source can be loaded, or it holds other weights now.
    """
    problems = []
    for source in record.sources:
        if Path(source).resolve() == Path(path).resolve():
            problems.append(f"{source!r} is this checkpoint itself, written over its own base.")
            continue
        try:
            network = load(source)
        except ConfigError as error:
            problems.append(str(error))
            continue
        if digest_of(backbone(network).base_model) == record.sha256:
            return network
        problems.append(f"{source!r} holds other weights than it did then.")
    raise ConfigError(
        f"checkpoint {str(path)!r}: got an adapter alone, and the base that it was trained on cannot be had: "
        f"{' '.join(problems)} Need that base, {record.sources[0]!r}. Do: put it back where it was."
    )


def with_adapter(base: PreTrainedModel, record: AdapterRecord) -> PreTrainedModel:
    """Put a fresh adapter on a base as it was trained, for weights to be loaded and merged.

    Args:
        base: of :func:`load_base`.
        record: from the checkpoint.

    Returns:
        The model in fp32, rounded as the quantised base was: its adapter has learned to live with that.
    """
    model = make_base(base, source=record.sources[0], quantization=cast("Quantization | None", record.quantization))
    if record.quantization is not None:
        model = dequantise(model)
    add_adapter(model, settings_of(record))
    return model


def own_state(network: nn.Module) -> Mapping[str, Tensor]:
    """The tensors of a network's state that a checkpoint holds."""
    absent = set(left_out(network))
    return {name: tensor for name, tensor in network.state_dict().items() if name not in absent}


def save_adapter(checkpoint: str | PathLike[str], folder: str | PathLike[str], *, ema: bool = False) -> None:
    """Write the adapter of a policy in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``.

    ``load_language_model(checkpoint).save_pretrained(folder)`` writes the merged model instead.

    Args:
        checkpoint: a ``.ckpt`` of SFT or PPO.
        folder: made if it is not there.
        ema: take the averaged weights.

    Raises:
        ConfigError: the checkpoint holds no adapter of a language model, or no averaged weights.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    handed = read_handover(checkpoint)
    weights = handed.ema_weights if ema else handed.weights
    if handed.adapter is None or handed.stage == "rm" or not weights:
        what = "averaged weights of an adapter" if ema else "adapter"
        raise ConfigError(
            f"checkpoint {str(checkpoint)!r}: got a checkpoint of the stage {handed.stage} without an {what} of a "
            "language model; need one of SFT or PPO that was trained with model.adapter."
        )
    Path(folder).mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = handed.adapter.settings
    config = LoraConfig(**settings, task_type="CAUSAL_LM", base_model_name_or_path=handed.adapter.sources[0])
    config.inference_mode = True
    config.save_pretrained(str(folder))
    named = {f"base_model.model.{name.replace('.default.', '.')}": x.contiguous() for name, x in weights.items()}
    save_file(named, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})
