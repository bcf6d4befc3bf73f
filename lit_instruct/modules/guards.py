"""What the modules check before anything is loaded or trained, each with an error that says what to do."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from lit_instruct.models.handover import is_stage_checkpoint, tokenizer_files
from lit_instruct.models.tokenizer import load_tokenizer, reads_alike
from lit_instruct.types import ConfigError

log = logging.getLogger(__name__)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a word that is none of the choices.

    Raises:
        ConfigError: it is not.
    """
    if value not in choices:
        raise ConfigError(f"{name}: got {value!r}; need one of {', '.join(choices)}.")


_NEVER_NULL = re.compile(r"(int|float|bool|str|list\[\w+\])( \| (int|float|bool|str|list\[\w+\]))*")


def check_not_null(section: str, kind: Callable[..., Any], settings: Mapping[str, Any]) -> None:
    """Refuse a null where a class takes numbers, words or true and false: the parser lets it through.

    Args:
        section: of the configuration, for the message.
        kind: the class that takes the settings.
        settings: by name.

    Raises:
        ConfigError: there is one.
    """
    for name, parameter in inspect.signature(kind).parameters.items():
        wanted = parameter.annotation
        wanted = wanted if isinstance(wanted, str) else getattr(wanted, "__name__", "")
        if _NEVER_NULL.fullmatch(wanted) and settings.get(name, "") is None:
            default = "" if parameter.default is parameter.empty else f" ({parameter.default} by default)"
            raise ConfigError(f"{section}.{name}: got null; need a value{default}. Do: give one, or leave it out.")


def check_ranges(**settings: tuple[float | None, float, float | None]) -> None:
    """Refuse settings that cannot work, before anything is loaded.

    Args:
        settings: name = (value, lowest, highest), the ends included; a highest of None is no bound, a value of None is
            allowed.

    Raises:
        ConfigError: a value lies outside, or is not a number.
    """
    for name, (value, lowest, highest) in settings.items():
        if value is None or (value >= lowest and (highest is None or value <= highest)):
            continue
        upper = "" if highest is None else f" and at most {highest:g}"
        raise ConfigError(f"{name}: got {value:g}; need at least {lowest:g}{upper}.")


def check_adapter(adapter: Any, quantization: str | None, **base: Any) -> None:
    """Refuse a base that an adapter cannot stand on, and a quantised one that would have to train itself.

    Args:
        adapter: the module's argument.
        quantization: of the base.
        base: name of the argument that says where the model comes from = what it says.

    Raises:
        ConfigError: the base is a bare configuration, or quantised without an adapter.
    """
    for name, source in base.items():
        if adapter is not None and isinstance(source, dict):
            raise ConfigError(
                f"adapter: got a bare configuration as {name}; need trained weights, for random ones cannot be found "
                "again when the adapter's checkpoint is loaded. Do: give a hub name, a folder, a GGUF file or a "
                "checkpoint."
            )
    if quantization is not None:
        check_choice("quantization", quantization, ("8bit", "4bit"))
    if quantization is not None and adapter is None:
        raise ConfigError(
            f"quantization: got {quantization} without an adapter; need one, for quantised weights do not train. Do: "
            "set model.adapter, for example --model.adapter.r 16, or leave quantization out."
        )


def check_memory(
    memory: str,
    adapter: Any,
    quantization: str | None,
    frozen_dtype: str,
    value_model: Any,
    reference: Any,
    rollout_dtype: str | None,
    offload_frozen: bool,
) -> None:
    """Refuse memory plans of PPO that cannot work together; the arguments are those of ``PPOModule``.

    Raises:
        ConfigError: they do not fit.
    """
    check_choice("memory", memory, ("separate", "shared_base", "shared_trunk"))
    check_choice("frozen_dtype", frozen_dtype, ("float32", "bfloat16", "8bit", "4bit"))
    if quantization is not None and rollout_dtype is not None:
        raise ConfigError(
            f"rollout_dtype: got {rollout_dtype} for a policy in {quantization}; need one in fp32, for rounded weights "
            "are not rounded again. Do: leave rollout_dtype or quantization out."
        )
    if memory == "shared_trunk" and value_model is not None:
        raise ConfigError(
            f"value_model: got {value_model!r} with memory: shared_trunk, where it is a head on the policy; need none. "
            "Do: leave it out, or set memory to separate."
        )
    if offload_frozen and "bit" in frozen_dtype:
        raise ConfigError(
            f"offload_frozen: got true with frozen_dtype {frozen_dtype}; need float32 or bfloat16, for quantised "
            "weights stay on their device. Do: use one of the two."
        )
    if memory != "shared_base":
        return
    if adapter is None:
        raise ConfigError(
            "memory: got shared_base without an adapter; need one, for policy and value model are adapters on the "
            "base. Do: set model.adapter, for example --model.adapter.r 16, or memory to separate."
        )
    for name, value, default in (
        ("reference", reference, None),
        ("frozen_dtype", frozen_dtype, "float32"),
        ("offload_frozen", offload_frozen, False),
    ):
        if value != default:
            hint = " For fewer bits set quantization." if name == "frozen_dtype" else ""
            raise ConfigError(
                f"{name}: got {value!r} with memory: shared_base, where the frozen networks are the policy's own base; "
                f"need {default}. Do: leave it out, or set memory to separate.{hint}"
            )


def settle_tokenizer(base: Any, tokenizer: Any, template: str) -> PreTrainedTokenizerBase:
    """Load a stage's tokenizer, and hold it against the one of the stage before.

    Args:
        base: where the model comes from.
        tokenizer: the module's ``tokenizer`` argument.
        template: its ``template``.

    Returns:
        The tokenizer with its template settled. Where that is another one than the checkpoint's, a warning says so.

    Raises:
        ConfigError: none can be loaded, or the model comes from a checkpoint and reads other tokens.
    """
    loaded = load_tokenizer(tokenizer_source(base, tokenizer), template=template)
    if isinstance(base, dict) or not is_stage_checkpoint(base):
        return loaded
    own = load_tokenizer(base)
    if not reads_alike(own, loaded):
        raise ConfigError(
            f"tokenizer: got {str(tokenizer)!r}, whose tokens are not those of {str(base)!r}; need the tokenizer that "
            "the model has learnt to read. Do: leave tokenizer out, for the checkpoint brings its own."
        )
    if own.chat_template != loaded.chat_template:
        log.warning(
            "template: %r was trained with another template than this run has (%s): what it has learnt of prompts "
            "stood in other words. Leave template out (auto) to keep the checkpoint's",
            str(base),
            template,
        )
    return loaded


def refuse_other_tokenizer(tokenizer: PreTrainedTokenizerBase, checkpoint: Mapping[str, Any]) -> None:
    """Refuse to go on with a run whose prompts would become other tokens from now on.

    Args:
        tokenizer: of this run.
        checkpoint: of a stage, to go on from.

    Raises:
        ConfigError: vocabulary or template differ.
    """
    with tokenizer_files(checkpoint) as folder:
        then = load_tokenizer(folder)
    differs = [] if reads_alike(then, tokenizer) and reads_alike(tokenizer, then) else ["tokenizer"]
    differs += [] if then.chat_template == tokenizer.chat_template else ["template"]
    if differs:
        raise ConfigError(
            f"ckpt_path: got a checkpoint of a run with another {' and '.join(differs)}; need the same, to go on as "
            f"that run would have. Do: give model.{differs[0]} as then, or start a new run from the checkpoint's model."
        )


def tokenizer_source(base: Any, tokenizer: Any) -> Any:
    """Where the tokenizer comes from: what was asked for, else from beside the model.

    Args:
        base: where the model comes from.
        tokenizer: the module's ``tokenizer`` argument.

    Returns:
        A source for :func:`lit_instruct.models.tokenizer.load_tokenizer`.

    Raises:
        ConfigError: the model is a bare configuration and no tokenizer was named.
    """
    if tokenizer is not None:
        return tokenizer
    if isinstance(base, dict):
        raise ConfigError(
            "tokenizer: got none, and a model made from a bare configuration brings none. Do: name one "
            "(model.tokenizer)."
        )
    return base
