"""Read a configuration file, and say in its own lines what is wrong with it before anything heavy is imported."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any, NoReturn

import yaml

from lit_instruct.planning.refusal import refuse

_MOST_BYTES = 1_000_000
_MOST_NESTED = 100
_MOST_VALUES = 100_000
"""Of a file with all its aliases written out: a few lines of aliases of aliases can stand for billions."""


def read_sections(name: str) -> dict[str, Any]:
    """Read a YAML or JSON file with the sections of a stage.

    Args:
        name: its path.

    Returns:
        The sections.

    Raises:
        ConfigError: it cannot be read, is no text, no YAML or no mapping, names a key twice, or is too large.
    """
    text = _read(name)
    root = _nodes(name, text)
    if not isinstance(root, yaml.MappingNode):
        got = "nothing" if root is None else "a list" if isinstance(root, yaml.SequenceNode) else "a single value"
        _refuse(name, f"which holds {got}", "sections such as model: and data:")
    _count(name, root, {})
    try:
        content: dict[str, Any] = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        _refuse(name, f"which is no plain YAML ({error.problem})", "text, numbers, lists and mappings", _line(error))
    except (ValueError, LookupError, AttributeError, TypeError) as error:  # a date that there is not, "!!int x"
        _refuse(name, f"with a value that cannot be read ({error})", "text, numbers, lists and mappings")
    return content


def _nodes(name: str, text: str) -> yaml.Node | None:
    """The file as it is written, aliases still in place."""
    if _deepest(text) > _MOST_NESTED:  # over these PyYAML takes minutes
        _refuse(name, "which is nested too deeply", "sections such as model: and data:")
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        _refuse(name, f"which is no YAML ({error.problem})", "YAML", _line(error))
    except yaml.YAMLError as error:
        _refuse(name, f"which is no YAML ({' '.join(str(error).split())})", "YAML")
    except RecursionError:
        _refuse(name, "which is nested too deeply", "sections such as model: and data:")


def _deepest(text: str) -> int:
    """How many brackets are open at once, those in quotes too."""
    steps = ({"[": 1, "{": 1, "]": -1, "}": -1}.get(character, 0) for character in text)
    return max(accumulate(steps, lambda depth, step: max(depth + step, 0)), default=0)


def _line(error: yaml.MarkedYAMLError) -> int | None:
    return error.problem_mark.line + 1 if error.problem_mark else None


def _read(name: str) -> str:
    try:
        with Path(name).open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except OSError as error:
        _refuse(name, f"which cannot be read ({error.strerror})", "a file that this user may read")
    if len(content) > _MOST_BYTES:
        _refuse(name, f"of more than {_MOST_BYTES:,} bytes", "a configuration, not data")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        _refuse(name, f"with the byte 0x{content[error.start]:02x}, which is no UTF-8", "UTF-8 text", line)


def _count(name: str, node: yaml.Node, known: dict[int, int | None]) -> int:
    """How many values a node stands for; keys are looked at by the way."""
    line = node.start_mark.line + 1
    if id(node) in known:
        count = known[id(node)]
        if count is None:
            _refuse(name, "with an alias inside of what it stands for", "aliases of other parts of the file", line)
        return count
    known[id(node)] = None
    parts: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        _check_keys(name, node)
        parts = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        parts = node.value
    total = 1 + sum(_count(name, part, known) for part in parts)
    if total > _MOST_VALUES:
        _refuse(name, f"which stands for more than {_MOST_VALUES:,} values", "fewer aliases", line)
    known[id(node)] = total
    return total


def _check_keys(name: str, node: yaml.MappingNode) -> None:
    seen: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            _refuse(name, "with a key that is no word", "words as keys", line)
        if key.value in seen:
            got = f"with the key {key.value!r}, which stands in line {seen[key.value]} already"
            _refuse(name, got, "each key once, for the first would be lost", line)
        seen[key.value] = line


def _refuse(name: str, got: str, need: str, line: int | None = None) -> NoReturn:
    place = repr(name) if line is None else f"{name!r} line {line}"
    refuse("--config", f"{place} {got}", need, "mend the file, or give another one")
