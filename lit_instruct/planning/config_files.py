"""Stage configurations as plain YAML, and shapes from wherever a model is named; no stage is imported."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lit_instruct.planning.architecture import GPT3, Architecture, architecture
from lit_instruct.planning.refusal import refuse
from lit_instruct.planning.yaml_files import read_sections


def merged(files: Sequence[str], overrides: Sequence[str]) -> dict[str, Any]:
    """Read configuration files, later ones over earlier ones, then options of the command line over all.

    Args:
        files: YAML with the sections of a stage. A key that ends with ``+`` adds to a list.
        overrides: ``--model.minibatch_size 32`` or ``--model.minibatch_size=32``.

    Returns:
        The sections.

    Raises:
        ConfigError: a file is no mapping, or an option is none of a section.
    """
    config: dict[str, Any] = {}
    for name in files:
        _merge(config, read_sections(name))
    for key, value in _options(overrides):
        nested: Any = yaml.safe_load(value)
        for part in reversed(key.split(".")):
            nested = {part: nested}
        _merge(config, nested)
    return config


def shape_of(source: Any) -> Architecture:
    """Find the shape of a model.

    Args:
        source: ``1.3b``, ``6b`` or ``175b`` (GPT-3's), a folder or a file with a configuration, a bare configuration
            (a mapping, or YAML text), or a hub name, of which only ``config.json`` is fetched.

    Returns:
        The shape.

    Raises:
        ConfigError: nothing is found there.
    """
    if isinstance(source, Mapping):
        return architecture(source)
    name = str(source)
    if name.lower() in GPT3:
        return GPT3[name.lower()]
    if name.lstrip().startswith("{"):
        return architecture(yaml.safe_load(name))
    path = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
    if path.suffix in (".ckpt", ".gguf"):
        refuse("model", name, "a shape", "name the folder or hub name that it was made of, or write {model_type: ...}")
    if not path.is_file():
        path = _from_hub(name)
    return architecture(json.loads(path.read_text(encoding="utf-8")))


def _from_hub(name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, "config.json"))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        return refuse(
            "model",
            f"{name!r}, which is no folder here, and no configuration came from the hub ({type(error).__name__})",
            f"a folder with config.json, a hub name, one of {', '.join(GPT3)}, or {{model_type: llama, ...}}",
            "give one of these",
        )


def _merge(into: dict[str, Any], new: Mapping[str, Any]) -> None:
    for key, value in new.items():
        if key.endswith("+"):
            added = value if isinstance(value, list) else [value]
            into[key[:-1]] = [*(into.get(key[:-1]) or []), *added]
        elif isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        elif isinstance(value, Mapping) and isinstance(into.get(key), list) and into[key]:
            # --trainer.callbacks.ratio 8 is told to the last callback, as the stages do.
            last = {"init_args": {}, **into[key][-1]}
            last["init_args"] = {**last["init_args"], **value}
            into[key] = [*into[key][:-1], last]
        else:
            into[key] = dict(value) if isinstance(value, Mapping) else value


def _options(words: Sequence[str]) -> list[tuple[str, str]]:
    found, waiting = [], list(words)
    while waiting:
        word = waiting.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or key.split(".")[0] not in ("model", "data", "trainer") or "." not in key:
            refuse("options", repr(word), "options of plan, or --model.*, --data.*, --trainer.*", "see plan --help")
        if not equals:
            if not waiting:
                refuse("options", f"{word!r} without a value", "one", "write it behind")
            value = waiting.pop(0)
        found.append((key, value))
    return found
