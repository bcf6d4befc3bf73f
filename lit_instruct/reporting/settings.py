"""The ``config.yaml`` that LightningCLI saves with a run: read, flattened, and compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lit_instruct.types import DataError

CONFIG_FILE = "config.yaml"


class Difference(NamedTuple):
    """A setting that is not the same in all runs.

    Attributes:
        key: dotted name.
        values: of each run, as YAML writes it; None where it is not set.
    """

    key: str
    values: list[str | None]


def read_settings(folder: Path) -> dict[str, Any]:
    """Read the settings that were saved in a log's folder.

    Args:
        folder: of the log.

    Returns:
        The settings; empty if none were saved.

    Raises:
        DataError: the file is damaged.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        return {}
    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: is no YAML ({error}). Do: mend it, or take it out of the folder.") from error
    if read is not None and not isinstance(read, dict):
        raise DataError(f"{path}: got a {type(read).__name__}; need the settings of a run. Do: take it out.")
    return read or {}


def flatten(settings: Any, prefix: str = "") -> dict[str, str]:
    """Give every setting a name of its own.

    A list of objects with a ``class_path``, such as callbacks, is keyed by the class and not by the place: one callback
    more does not make all that follow it look different.

    Args:
        settings: nested dictionaries and lists.
        prefix: of the names.

    Returns:
        Dotted name -> value, as YAML writes it on one line.
    """
    return dict(_leaves(settings, prefix))


def differences(settings: Sequence[dict[str, Any]]) -> list[Difference]:
    """Compare the settings of runs.

    Args:
        settings: of each run.

    Returns:
        What is not the same in all of them: the model's first, then the data's, then the rest.
    """
    flat = [flatten(one) for one in settings]
    keys = dict.fromkeys(key for one in flat for key in one)
    found = [Difference(key, [one.get(key) for one in flat]) for key in keys]
    found = [difference for difference in found if len(set(difference.values)) > 1]
    return sorted(found, key=lambda one: {"model": 0, "data": 1}.get(one.key.partition(".")[0], 2))


def as_yaml(settings: dict[str, Any]) -> str:
    """Settings as the text of a file."""
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=100)


def _leaves(node: Any, name: str) -> Iterator[tuple[str, str]]:
    dot = f"{name}." if name else ""
    if isinstance(node, dict) and node:
        if "class_path" in node:
            yield name, str(node["class_path"])
            yield from _leaves(node.get("init_args") or {}, name)
        else:
            for key, value in node.items():
                yield from _leaves(value, f"{dot}{key}")
    elif isinstance(node, list) and node and all(isinstance(item, dict) and "class_path" in item for item in node):
        counts: dict[str, int] = {}
        for item in node:
            short = str(item["class_path"]).rpartition(".")[2]
            counts[short] = counts.get(short, 0) + 1
            yield from _leaves(item, f"{dot}{short}" + (f" {counts[short]}" if counts[short] > 1 else ""))
    elif name and node != {}:
        yield name, _one_line(node)


def _one_line(value: Any) -> str:
    if isinstance(value, str):
        return value
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()
