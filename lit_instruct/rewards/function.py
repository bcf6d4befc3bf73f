"""Scores of a Python function that the user writes."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Callable, Collection
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_instruct.rewards.base import Scorer, as_scores, texts_of
from lit_instruct.types import ConfigError, PromptBatch, Responses


class FunctionScorer(Scorer):
    """Scores by a Python function ``f(prompts, responses, **columns) -> list[float]``.

    ``prompts`` are as the data had them (text or chat messages), ``responses`` are texts without special tokens, and
    every other column of the data that the function has a parameter for comes as a list of as many values; with
    ``**columns`` it gets all of them. A required parameter that is no column is an error.
    """

    def __init__(self, function: str | Callable[..., Any]):
        """Find the function.

        Args:
            function: path/to/file.py:name, package.module:name or package.module.name; in Python also the function.
        """
        super().__init__()
        self.name = function if isinstance(function, str) else getattr(function, "__qualname__", repr(function))
        self.function = _find(function) if isinstance(function, str) else function
        self._wanted = _read_parameters(self.function, self.name)

    @torch.no_grad()
    def forward(self, prompts: PromptBatch, responses: Responses, *, tokenizer: Any) -> Tensor:
        """Call the function once for the whole batch.

        Args:
            prompts: B prompts with their rows.
            responses: their responses.
            tokenizer: the policy's.

        Returns:
            fp32 ``[B]``.

        Raises:
            ConfigError: a column that it needs is not there, or it does not give B finite numbers.
        """
        texts = texts_of(prompts, responses, tokenizer)
        self.check_columns(texts.columns)
        columns = {
            name: values
            for name, values in texts.columns.items()
            if name not in self._wanted.taken and (self._wanted.takes_all or name in self._wanted.names)
        }
        try:
            scores = self.function(texts.prompts, texts.responses, **columns)
        except Exception as error:
            error.add_note(f"raised by the reward function {self.name} for {len(texts.responses)} responses")
            raise
        device = responses.response_ids_BR.device
        return as_scores(scores, source=f"reward function {self.name}", texts=texts, device=device)

    def check_columns(self, columns: Collection[str]) -> None:
        """Every parameter without a default must be a column.

        Args:
            columns: of the prompts' rows.

        Raises:
            ConfigError: one is not.
        """
        missing = [name for name in self._wanted.required if name not in columns]
        if missing:
            found = ", ".join(map(repr, columns)) or "none"
            raise ConfigError(
                f"reward function {self.name}: needs {missing[0]!r}, and the data have no such column (found: "
                f"{found}). Do: add the column to every prompt, or give the parameter a default."
            )

    def identity(self) -> str:
        """The function's own name, wherever its file lies now."""
        return f"{super().identity()} {getattr(self.function, '__qualname__', self.name)}"


class _Parameters(NamedTuple):
    """What a function can be given beside prompts and responses, its first two parameters.

    Attributes:
        names: of its other parameters.
        required: those of them without a default.
        taken: names that no column may have, since the call has them already.
        takes_all: it has ``**columns``.
    """

    names: set[str]
    required: list[str]
    taken: set[str]
    takes_all: bool


def _read_parameters(function: Callable[..., Any], name: str) -> _Parameters:
    if not callable(function):
        raise ConfigError(f"reward function {name}: got a {type(function).__name__}; need a function.")
    if inspect.iscoroutinefunction(function):
        raise ConfigError(f"reward function {name}: got an async function; need an ordinary one that returns a list.")
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError as error:
        raise ConfigError(
            f"reward function {name}: its parameters cannot be read ({error}). Do: wrap it in a function of Python."
        ) from error
    by_position = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(by_position) < 2 and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
        raise ConfigError(
            f"reward function {name}: got the signature {inspect.signature(function)}; need one that takes prompts and "
            "responses first: f(prompts, responses, **columns)."
        )
    first, rest = by_position[:2], [*by_position[2:], *(p for p in parameters if p.kind is p.KEYWORD_ONLY)]
    if [p.name for p in first] == ["responses", "prompts"]:
        raise ConfigError(f"reward function {name}: takes responses before prompts; need f(prompts, responses, ...).")
    return _Parameters(
        names={p.name for p in rest},
        required=[p.name for p in rest if p.default is p.empty],
        taken={p.name for p in first} | {"prompts", "responses"},
        takes_all=any(p.kind is p.VAR_KEYWORD for p in parameters),
    )


def _find(name: str) -> Callable[..., Any]:
    """The function of that name: in a file, or in a module that can be imported, also from the current folder."""
    place, colon, attribute = name.rpartition(":")
    if name.endswith(".py") or not (colon or "." in name):
        raise ConfigError(
            f"reward function {name}: need a file or module and the function in it: path/to/file.py:name, "
            "package.module:name or package.module.name."
        )
    if place.endswith(".py"):
        module = _run_file(place, name)
    else:
        place, _, attribute = (place, "", attribute) if colon else name.rpartition(".")
        module = _import(place, name)
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            functions = [key for key, value in vars(module).items() if inspect.isfunction(value)]
            raise ConfigError(
                f"reward function {name}: {place!r} has no {attribute!r}; functions there: "
                f"{', '.join(functions) or 'none'}. Do: check the name."
            )
        found = getattr(found, part)
    return found


def _import(place: str, name: str) -> ModuleType:
    _importable(Path.cwd())  # an installed command, unlike `python -m`, does not look into the current folder
    try:
        return pkgutil.resolve_name(f"{place}:")
    except ModuleNotFoundError as error:
        if error.name is None or not f"{place}.".startswith(f"{error.name}."):
            raise  # something that the user's module imports
        raise ConfigError(
            f"reward function {name}: there is no module {error.name!r}, installed or in {Path.cwd()}. Do: check the "
            "name, or give the file: path/to/file.py:name."
        ) from error
    except ValueError as error:
        raise ConfigError(f"reward function {name}: {place!r} is no name of a module. Do: check it.") from error


def _run_file(place: str, name: str) -> ModuleType:
    path = Path(place).expanduser().resolve()
    if not path.is_file():
        raise ConfigError(f"reward function {name}: there is no file {str(path)!r}. Do: check the path.")
    return _loaded_file(str(path), path.stat().st_mtime_ns)


@lru_cache(maxsize=16)
def _loaded_file(path: str, modified: int) -> ModuleType:
    # Run once, however many functions are named in it. Its name is made up, so that it hides no installed module.
    unique = f"_reward_file_{hashlib.sha256(f'{path}:{modified}'.encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(unique, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    _importable(Path(path).parent)
    sys.modules[unique] = module  # dataclasses and pickle look their module up here
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[unique]
        error.add_note(f"raised while the reward functions in {path} were loaded")
        raise
    return module


def _importable(folder: Path) -> None:
    """Let files import their neighbours, as scripts do; last in the list, so that nothing installed is hidden."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
