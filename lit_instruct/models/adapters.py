"""LoRA adapters on a frozen base, put into the model in place: it keeps its class and reads rows as before.

There is no adapter to switch: a network has one or none. Networks that stand on the same base are modules of their own
whose frozen parameters are the same tensors (:func:`shared_twin`), so that the order in which they are called, and what
is worked out again in the backward pass, cannot matter::

    base            W of every layer, frozen, once in memory
    reference       W
    policy          W + B A        its own A and B
    value model     W + B A        its own A, B and head
    reward model    W + B A        its own A, B and head, frozen
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_instruct.models.quantisation import Quantization, is_quantised, quantise
from lit_instruct.types import ConfigError

AnyModule = TypeVar("AnyModule", bound=nn.Module)

_NAME = "default"  # what PEFT calls an adapter that has no other name
_BASE, _ADAPTER = "lit_base", "lit_adapter"  # attributes of a model that stands on a frozen base


@dataclass
class LoraSettings:
    """A LoRA adapter: what is added to the frozen weights of a linear layer is a product B A of two thin matrices.

    The names are PEFT's. There is no dropout among them: a policy must see the same network in rollout and update.

    Args:
        r: rank: columns of B and rows of A.
        lora_alpha: the product is scaled by lora_alpha / r.
        target_modules: names of the layers that get one, or a regular expression; all-linear: all linear layers but the
            unembedding.
        use_rslora: scale by lora_alpha / sqrt(r) instead, which suits large ranks.
    """

    r: int = 16
    lora_alpha: int = 32
    target_modules: str | list[str] = "all-linear"
    use_rslora: bool = False

    def __post_init__(self) -> None:
        """Refuse sizes that mean nothing.

        Raises:
            ConfigError: r or lora_alpha is less than 1, or no layer is named.
        """
        for name in ("r", "lora_alpha"):
            if getattr(self, name) < 1:
                raise ConfigError(f"adapter.{name}: got {getattr(self, name)}; need at least 1.")
        if not self.target_modules:
            raise ConfigError("adapter.target_modules: got none; need names of layers. Do: leave it out for all.")


class FrozenBase(NamedTuple):
    """The weights that an adapter stands on.

    Attributes:
        sources: where they came from: as the setting named it, and, for a file or folder, its absolute path.
        sha256: of the decoder's weights in fp32, before they were quantised.
        quantization: ``8bit``, ``4bit`` or None.
    """

    sources: tuple[str, ...]
    sha256: str
    quantization: Quantization | None


def make_base(
    model: PreTrainedModel, *, source: str | None, quantization: Quantization | None = None
) -> PreTrainedModel:
    """Freeze a model, so that adapters can be put on it or on its twins.

    Args:
        model: a language model or its decoder in fp32.
        source: what it was loaded from; None: nobody will look for it.
        quantization: of its linear layers.

    Returns:
        ``model`` itself, or a quantised one in its place.

    Raises:
        ConfigError: bitsandbytes is missing.
    """
    digest = digest_of(model.base_model)
    base = model.requires_grad_(False) if quantization is None else quantise(model, quantization)
    sources = [] if source is None else [source]
    sources += [str(Path(there).resolve()) for there in sources if Path(there).exists()]
    for part in (base, base.base_model):
        setattr(part, _BASE, FrozenBase(tuple(dict.fromkeys(sources)), digest, quantization))
    return base


def base_of(model: nn.Module) -> FrozenBase | None:
    """What :func:`make_base` wrote down about a model or the one it is a twin of."""
    return getattr(model, _BASE, None)


def adapter_of(model: nn.Module) -> LoraSettings | None:
    """The settings of a model's adapter; None for one without."""
    return getattr(model, _ADAPTER, None)


def add_adapter(model: PreTrainedModel, settings: LoraSettings) -> None:
    """Put a fresh adapter on a frozen model; B is 0 at first, so that nothing changes yet.

    Args:
        model: changed in place. The adapter trains in fp32, the rest stays frozen.
        settings: of the adapter.

    Raises:
        ConfigError: PEFT is not installed, or the model has no such layers.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError(
            "adapter: got LoRA settings, but peft is not installed. Do: pip install 'lit-instruct[peft]'."
        ) from error
    try:
        inject_adapter_in_model(LoraConfig(**asdict(settings), lora_dropout=0.0, bias="none"), model, _NAME)
    except ValueError as error:
        raise ConfigError(
            f"adapter: got target_modules {settings.target_modules!r} for {type(model).__name__}: "
            f"{str(error).splitlines()[0][:200]} Do: leave target_modules out, or name layers of this model."
        ) from error
    setattr(model, _ADAPTER, settings)


@torch.no_grad()
def merge_adapter(model: PreTrainedModel) -> None:
    """Add an adapter's product to the weights below it; what is left is a plain model that trains as a whole.

    Args:
        model: of :func:`add_adapter`, its base in fp32; changed in place.
    """
    for name, layer in adapted_layers(model):
        layer.base_layer.weight += layer.get_delta_weight(_NAME)
        model.set_submodule(name, layer.base_layer)
    for part in {model, model.base_model}:
        delattr(part, _BASE)
    delattr(model, _ADAPTER)
    del model.peft_config  # with it PEFT would take the next adapter for a second one
    model.requires_grad_(True)


def adapted_layers(network: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers that have an adapter, each with its name."""
    for name, module in list(network.named_modules()):
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            yield name, module


def merged_weight(layer: Any) -> Tensor:
    """The weights of an adapted layer with its product added, as a new tensor.

    Args:
        layer: of :func:`adapted_layers`, its base not quantised.

    Returns:
        In the dtype of the base.
    """
    weight: Tensor = layer.base_layer.weight.detach()
    return weight + layer.get_delta_weight(_NAME).detach().to(weight.dtype)


def left_out(network: nn.Module) -> tuple[str, ...]:
    """Which names of a network's state its checkpoint leaves out: those of the bases below its adapters.

    Args:
        network: any.

    Returns:
        Names in ``state_dict``, what bitsandbytes keeps beside its weights included.
    """
    adapted = tuple(f"{name}." if name else "" for name, part in network.named_modules() if adapter_of(part))
    return tuple(name for name in network.state_dict() if name.startswith(adapted) and not is_lora(name))


def is_lora(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return ".lora_" in name


def shared_twin(network: AnyModule, backbone: PreTrainedModel) -> AnyModule:
    """Copy a network, but not its frozen base: the same tensors serve both.

    Args:
        network: a model, or one that has ``backbone`` as a part.
        backbone: frozen, up to an adapter. That, and all of ``network`` around the backbone, is copied.

    Returns:
        The copy, in the same mode.
    """
    same: list[Any] = [parameter for name, parameter in backbone.named_parameters() if not is_lora(name)]
    for module in backbone.modules():
        # bitsandbytes keeps 8-bit weights and scales in a state beside the parameter, from the first pass on.
        same += [getattr(module, kept) for kept in ("state", "quant_state") if kept in vars(module)]
    return copy.deepcopy(network, {id(kept): kept for kept in same if kept is not None})


def train_adapter(network: nn.Module, backbone: PreTrainedModel) -> None:
    """Let a network's adapter and what lies around its backbone train, and nothing else.

    Args:
        network: any, with ``backbone`` as a part.
        backbone: with an adapter.
    """
    base = {id(parameter) for name, parameter in backbone.named_parameters() if not is_lora(name)}
    for parameter in network.parameters():
        if id(parameter) not in base:
            parameter.requires_grad_(True)


def trained_parameters(network: nn.Module) -> list[nn.Parameter]:
    """The parameters that train, for an optimizer."""
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def sharding_refusal(module: nn.Module) -> str | None:
    """Why the networks of a module cannot be sharded.

    Args:
        module: its direct children are the networks.

    Returns:
        The reason: weights are quantised, or serve two networks; None if there is none.
    """
    owner: dict[int, str] = {}
    for name, network in module.named_children():
        if is_quantised(network):
            return f"the weights of {name} are quantised, and bitsandbytes' layouts cannot be cut"
        for parameter in network.parameters():
            other = owner.setdefault(id(parameter), name)
            if other != name:
                return f"{other} and {name} share the tensors of one base (memory: shared_base)"
    return None


def digest_of(network: nn.Module, also: str = "") -> str:
    """The sha256 of a network's weights and their names, and of what else makes it what it is."""
    digest = hashlib.sha256(also.encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
