"""Find the runs in folders, and put together what each of them left."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from lit_instruct.reporting.evaluations import RESULTS_FILE, Evaluation, is_evaluation, read_evaluation
from lit_instruct.reporting.logs import CSV_FILE, EVENT_FILES, Curve, Log, Session, has_log, read_logs
from lit_instruct.reporting.settings import CONFIG_FILE, read_settings
from lit_instruct.types import ConfigError

MOST_RUNS = 16

STAGES = ("pretrain", "sft", "rm", "ppo")
"""In the order in which a report shows them."""

_VERSION = re.compile(r"version_(\d+)")
_TRIVIAL = re.compile(r"version_\d+|logs|lightning_logs")  # parts of a path that name no run


class Run(NamedTuple):
    """The training of one model at one stage.

    Attributes:
        name: that tells it from the others.
        folder: where it was read.
        stage: one of ``STAGES``.
        curves: metric, as logged (``ppo/train/objective/kl``), -> step -> value. Steps are iterations in PPO.
        texts: name -> step -> text.
        sessions: the processes that wrote; empty where times are not known.
        settings: as LightningCLI saved them; empty if it did not.
        left_out: log folders of earlier runs in the same place, which this one does not continue.
    """

    name: str
    folder: Path
    stage: str
    curves: dict[str, Curve]
    texts: dict[str, dict[int, str]]
    sessions: list[Session]
    settings: dict[str, Any]
    left_out: list[Path]


_Named = TypeVar("_Named", Run, Evaluation)


class Found(NamedTuple):
    """What lies in the given folders.

    Attributes:
        runs: trainings, by stage.
        evaluations: results of ``lit-instruct evaluate``.
    """

    runs: list[Run]
    evaluations: list[Evaluation]


def find(given: Sequence[str | Path]) -> Found:
    """Find and read all runs in or below folders.

    Args:
        given: folders, or files in them; ``NAME=FOLDER`` gives the run a name.

    Returns:
        What was found, with names that differ.

    Raises:
        ConfigError: a folder is missing or holds nothing, or there are too many runs to tell apart.
        DataError: a file is damaged.
    """
    runs: dict[Path, Run] = {}
    evaluations: dict[Path, Evaluation] = {}
    for one in given:
        name, folder = _named(one)
        logs, results = _below(folder)
        read = [_read_run(_call(name, folder, parent), versions) for parent, versions in logs.items()]
        known = [run for run in read if run is not None]
        if not known and not results:
            _refuse(folder, logs=len(logs))
        runs |= {run.folder.resolve(): run for run in known}
        for place in results:
            evaluations[place.resolve()] = read_evaluation(place, _call(name, folder, place))
    if len(runs) + len(evaluations) > MOST_RUNS:
        raise ConfigError(
            f"got {len(runs) + len(evaluations)} runs; need at most {MOST_RUNS}: more cannot be told apart "
            "in a figure. Do: name the folders of those to compare."
        )
    ordered = sorted(runs.values(), key=lambda run: STAGES.index(run.stage))
    return Found(_apart(ordered), _apart(list(evaluations.values())))


def _named(given: str | Path) -> tuple[str | None, Path]:
    """Name and folder of an argument; a path that is there is never taken apart."""
    name, path = None, Path(given)
    before, equals, behind = str(given).partition("=")
    if equals and not path.exists():
        name, path = before or None, Path(behind)
    if not path.exists():
        raise ConfigError(f"there is no folder {str(path)!r}. Do: give the folder of a run, or NAME=FOLDER.")
    return name, path.parent if path.is_file() else path


def _below(folder: Path) -> tuple[dict[Path, list[Path]], list[Path]]:
    """Folders with logs, grouped by run, and folders with results."""
    logs: dict[Path, list[Path]] = {}
    results = []
    for place, subfolders, _ in os.walk(folder):
        subfolders.sort()
        path = Path(place)
        if has_log(path):
            # Versions side by side were started in one place: the newest counts. One that was named stands for itself.
            group = path.parent if _VERSION.fullmatch(path.name) and path != folder else path
            logs.setdefault(group, []).append(path)
        if is_evaluation(path):
            results.append(path)
    return logs, results


def _read_run(name: str, versions: list[Path]) -> Run | None:
    """Read the newest run of a place and what it continues; None if its metrics are of no known stage."""
    versions = sorted(versions, key=_version_number)
    first = newest = _newest_training(versions)
    while first > 0 and read_settings(versions[first]).get("ckpt_path"):
        first -= 1
    log, settings = read_logs(versions[first : newest + 1]), read_settings(versions[newest])
    stage = _stage(log, settings)
    if stage is None:
        return None
    others = versions[:first] + versions[newest + 1 :]
    return Run(name, versions[newest], stage, log.curves, log.texts, log.sessions, settings, others)


def _newest_training(versions: list[Path]) -> int:
    """The place of the last one that did not only validate; of the last one if all did."""
    last = len(versions) - 1
    if last == 0:  # and need not be read for this
        return 0
    return next((place for place in range(last, -1, -1) if _trained(versions[place])), last)


def _trained(folder: Path) -> bool:
    return any("/train/" in metric for metric in read_logs([folder]).curves)


def _version_number(folder: Path) -> int:
    match = _VERSION.fullmatch(folder.name)
    return int(match[1]) if match else 0


def _stage(log: Log, settings: dict[str, Any]) -> str | None:
    """By the names of the metrics; a base model is trained by the module of SFT, and told from it by its data."""
    tops = {metric.partition("/")[0] for metric in log.curves}
    stage = next((stage for stage in STAGES if stage in tops), None)
    return "pretrain" if stage == "sft" and "text" in (settings.get("data") or {}) else stage


def _call(name: str | None, given: Path, folder: Path) -> str:
    """A short name for what lies in ``folder``, found below ``given``."""
    parts = [part for part in folder.relative_to(given).parts if not _TRIVIAL.fullmatch(part)]
    if name is not None:
        return "/".join([name, *parts])
    if parts:
        return "/".join(parts)
    own = [part for part in given.resolve().parts if not _TRIVIAL.fullmatch(part)]
    return own[-1]


def _apart(items: list[_Named]) -> list[_Named]:
    """Those with the same name are called by their paths."""
    names = [item.name for item in items]
    return [item if names.count(item.name) == 1 else item._replace(name=str(item.folder)) for item in items]


def _refuse(folder: Path, *, logs: int) -> None:
    if logs:
        raise ConfigError(
            f"the logs in {str(folder)!r} have no metrics of a stage, which begin with sft/, rm/ or ppo/. "
            "Do: give the folder of a run of lit-instruct."
        )
    raise ConfigError(
        f"found nothing in {str(folder)!r}; looked in it and below for {EVENT_FILES} (TensorBoard), {CSV_FILE} "
        f"(CSVLogger) and {RESULTS_FILE} (lit-instruct evaluate). Do: give the folder that a run logs to, where its "
        f"{CONFIG_FILE} lies too, or one above it."
    )
