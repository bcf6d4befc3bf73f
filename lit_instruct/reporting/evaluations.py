"""Read the output folder of ``lit-instruct evaluate``: results.json and samples.jsonl."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lit_instruct.reporting.samples import Sample, SampledPrompt, plain_prompt
from lit_instruct.types import DataError

RESULTS_FILE = "results.json"
SAMPLES_FILE = "samples.jsonl"
FORMAT_VERSION = 1


class Estimate(NamedTuple):
    """A number with its interval.

    Attributes:
        value: the estimate.
        low: lower end of the 95 % interval; None if there is no interval.
        high: upper end.
    """

    value: float
    low: float | None = None
    high: float | None = None


class BestOfN(NamedTuple):
    """The best of n responses.

    Attributes:
        n: responses drawn for each prompt.
        kl: nats that choosing the best moves the model's own distribution.
        score: of the best one.
    """

    n: int
    kl: float
    score: float


class ModelResult(NamedTuple):
    """What was measured of one model; None or empty where it was not.

    Attributes:
        source: the checkpoint or folder it came from.
        win_rate: against the baseline.
        win_rate_matched_length: the same, at equal length.
        score: mean of the scorer's scores.
        kl: nats a response, to the reference.
        mean_length: characters a response.
        finished: share of responses that ended by themselves.
        pretraining_loss: nats a token.
        pretraining_bits_per_byte: the same, to be compared between models with different tokenizers.
        best_of_n: by ascending n.
        protocols: protocol, measure and condition, if it has any -> estimate.
    """

    source: str | None
    win_rate: Estimate | None
    win_rate_matched_length: Estimate | None
    score: Estimate | None
    kl: float | None
    mean_length: float | None
    finished: float | None
    pretraining_loss: float | None
    pretraining_bits_per_byte: float | None
    best_of_n: list[BestOfN]
    protocols: dict[str, Estimate]


class Evaluation(NamedTuple):
    """Models measured on the same prompts by the same judge.

    Attributes:
        name: that tells it from others.
        folder: where it was read.
        baseline: name of the model that the others are compared with; None if there is none.
        reference: name of the model that KL is measured to; the baseline if none is named.
        models: by name, in the order of the file.
        settings: how it was measured, dotted name -> text.
    """

    name: str
    folder: Path
    baseline: str | None
    reference: str | None
    models: dict[str, ModelResult]
    settings: dict[str, str]


def is_evaluation(folder: Path) -> bool:
    """Whether ``lit-instruct evaluate`` wrote into this folder; others write a results.json too."""
    path = folder / RESULTS_FILE
    if not path.is_file():
        return False
    read = _load(path)
    return isinstance(read, dict) and "format_version" in read and "models" in read


def read_evaluation(folder: Path, name: str) -> Evaluation:
    """Read results.json.

    Args:
        folder: with the file.
        name: to call it.

    Returns:
        The evaluation.

    Raises:
        DataError: the file has another version, or a field of another kind than it should be.
    """
    path = folder / RESULTS_FILE
    read = _load(path)
    if read["format_version"] != FORMAT_VERSION:
        raise DataError(
            f"{path}, format_version: got {read['format_version']!r}; need {FORMAT_VERSION}. Do: evaluate again, or "
            "report with the version of lit-instruct that evaluated."
        )
    reader = _Reader(path)
    models = {
        str(model): reader.model(entry, f"models.{model}")
        for model, entry in reader.mapping(read["models"], "models").items()
    }
    shown = ("prompts", "scorer", "judge", "reference", "picker", "settings")
    settings = {key: read[key] for key in shown if read.get(key) is not None}
    described = {name.removeprefix("settings."): _short(value) for name, value in _leaves(settings)}
    baseline, reference = (None if read.get(key) is None else str(read[key]) for key in ("baseline", "reference"))
    return Evaluation(name, folder, baseline, reference or baseline, models, described)


def read_samples(evaluation: Evaluation, places: Mapping[str, int], most: int) -> list[SampledPrompt]:
    """Read what the models wrote for the first prompts.

    Args:
        evaluation: whose folder may have a samples.jsonl.
        places: of its models among all runs and models of the report.
        most: how many prompts.

    Returns:
        The prompts with the first response of each model, models in the order of the evaluation; empty without a file.

    Raises:
        DataError: a row is no JSON, lacks its model, prompt or response, or is of a model without results.
    """
    path = evaluation.folder / SAMPLES_FILE
    if not path.is_file():
        return []
    kept: dict[str, dict[str, Sample]] = {}
    for line, row in _rows(path):
        prompt, model = plain_prompt(row["prompt"]), str(row["model"])
        if model not in evaluation.models:
            raise DataError(f"{path}, line {line}, model: got {model!r}, which {RESULTS_FILE} has no results of.")
        if prompt in kept or len(kept) < most:
            sample = Sample(model, places[model], None, str(row["response"]), _score(row, path, line), None)
            kept.setdefault(prompt, {}).setdefault(model, sample)
    return [
        SampledPrompt(prompt, [[of_model[model] for model in evaluation.models if model in of_model]])
        for prompt, of_model in kept.items()
    ]


class _Reader:
    """Takes numbers out of results.json; errors name file and field."""

    def __init__(self, path: Path):
        self.path = path

    def mapping(self, value: Any, field: str) -> dict[Any, Any]:
        if not isinstance(value, dict):
            raise self._error(value, field, "an object")
        return value

    def number(self, value: Any, field: str) -> float | None:
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._error(value, field, "a number")
        return float(value)

    def needed(self, entry: dict[Any, Any], key: str, field: str) -> float:
        found = self.number(entry.get(key), f"{field}.{key}")
        if found is None:
            raise self._error(None, f"{field}.{key}", "a number")
        return found

    def estimate(self, value: Any, field: str, key: str) -> Estimate | None:
        if value is None:
            return None
        entry = self.mapping(value, field)
        low, high = (self.number(entry.get(end), f"{field}.{end}") for end in ("low", "high"))
        middle = self.number(entry.get(key), f"{field}.{key}")
        return None if middle is None else Estimate(middle, low, high)

    def model(self, value: Any, field: str) -> ModelResult:
        entry = self.mapping(value, field)
        best = entry.get("best_of_n") or []
        numbers = {
            key: self.number(entry.get(key), f"{field}.{key}")
            for key in ("kl", "mean_length", "finished", "pretraining_loss", "pretraining_bits_per_byte")
        }
        if not isinstance(best, list):
            raise self._error(best, f"{field}.best_of_n", "a list")
        return ModelResult(
            source=None if entry.get("source") is None else str(entry["source"]),
            win_rate=self.estimate(entry.get("win_rate"), f"{field}.win_rate", "rate"),
            win_rate_matched_length=self.estimate(
                entry.get("win_rate_matched_length"), f"{field}.win_rate_matched_length", "rate"
            ),
            score=self.estimate(entry.get("score"), f"{field}.score", "mean"),
            **numbers,
            best_of_n=sorted(self.best(one, f"{field}.best_of_n[{number}]") for number, one in enumerate(best)),
            protocols=dict(self.protocols(entry.get("protocols") or {}, f"{field}.protocols")),
        )

    def protocols(self, value: Any, field: str, *names: str) -> Iterator[tuple[str, Estimate]]:
        """Protocols hold measures, those conditions, those estimates. The condition all is no condition."""
        entry = self.mapping(value, field)
        found = self.estimate(entry, field, "mean") if "mean" in entry else None
        if found is not None:
            yield " ".join(name for name in names if name != "all"), found
        for key, below in entry.items():
            if isinstance(below, dict):
                yield from self.protocols(below, f"{field}.{key}", *names, str(key))

    def best(self, value: Any, field: str) -> BestOfN:
        entry = self.mapping(value, field)
        n, kl, score = (self.needed(entry, key, field) for key in ("n", "kl", "score"))
        return BestOfN(int(n), kl, score)

    def _error(self, got: Any, field: str, need: str) -> DataError:
        return DataError(f"{self.path}, {field}: got {got!r}; need {need}. Do: evaluate again.")


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: is no JSON ({error}). Do: evaluate again, or move the file away.") from error


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number}: is no JSON ({error}). Do: evaluate again.") from error
            missing = [key for key in ("model", "prompt", "response") if not isinstance(row, dict) or key not in row]
            if missing:
                raise DataError(f"{path}, line {number}, {missing[0]}: is missing. Do: evaluate again.")
            yield number, row


def _score(row: dict[str, Any], path: Path, line: int) -> float | None:
    score = row.get("score")
    if score is None or (isinstance(score, int | float) and not isinstance(score, bool)):
        return None if score is None else float(score)
    raise DataError(f"{path}, line {line}, score: got {score!r}; need a number or null.")


def _leaves(node: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(value, f"{name}.{key}" if name else str(key))
    else:
        yield name, node


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
