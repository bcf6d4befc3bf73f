"""Results as files and as a table; docs/evaluation.md describes the formats."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lit_instruct.evaluation.responses import Asked, Sampled

FORMAT_VERSION = 1
RESULTS, SAMPLES, PAIRS = "results.json", "samples.jsonl", "pairs.jsonl"


def write_results(out: Path, results: Mapping[str, Any]) -> None:
    """Write ``results.json``.

    Args:
        out: the folder.
        results: what was found.
    """
    _write(out / RESULTS, [json.dumps(results, indent=2)])


def write_samples(out: Path, asked: Asked, sampled: Mapping[str, Sampled], scores: Mapping[str, np.ndarray]) -> None:
    """Write ``samples.jsonl``: every model's (first) response to every prompt, prompt by prompt.

    Args:
        out: the folder.
        asked: the prompts.
        sampled: name of the model to its responses.
        scores: name of the model to its scores, where there is a scorer.
    """
    lines = []
    for place, (row, owner) in enumerate(zip(asked.rows, asked.owners, strict=True)):
        for name, some in sampled.items():
            line = {
                "model": name,
                "prompt": row["prompt"],
                "response": some.texts[place],
                "owner": owner if isinstance(owner, str) else None,
                "score": float(scores[name][place]) if name in scores else None,
            }
            lines.append(json.dumps(line, ensure_ascii=False))
    _write(out / SAMPLES, lines)


def write_pairs(out: Path, sampled: Mapping[str, Sampled], baseline: str, *, seed: int) -> None:
    """Write ``pairs.jsonl``, for people to judge: which model wrote what is not said, and its place is random.

    Args:
        out: the folder.
        sampled: name of the model to its responses.
        baseline: name of the model that the others are compared with.
        seed: decides which response comes first.
    """
    theirs = sampled[baseline]
    lines: dict[str, None] = {}  # a pair that occurs twice is judged once
    for name, ours in sampled.items():
        for row, *texts in zip(ours.prompts.rows, ours.texts, theirs.texts, strict=True):
            if name == baseline or texts[0] == texts[1]:
                continue
            key = json.dumps([seed, row["prompt"], sorted(texts)]).encode()
            first, second = sorted(texts, reverse=bool(hashlib.blake2b(key, digest_size=1).digest()[0] & 1))
            pair = {"prompt": row["prompt"], "first": first, "second": second, "choice": None}
            lines[json.dumps(pair, ensure_ascii=False)] = None
    _write(out / PAIRS, lines)


def table(results: Mapping[str, Any]) -> str:
    """The results as text, a line a model; what was not measured has no column.

    Args:
        results: as in ``results.json``.
    """
    rows: Mapping[str, Mapping[str, Any]] = results["models"]
    columns = {
        "score [95 %]": {name: _interval(row.get("score"), "mean", "{:.3f}") for name, row in rows.items()},
        f"wins against {results['baseline']}": {
            name: _interval(row.get("win_rate"), "rate", "{:.1%}") for name, row in rows.items()
        },
        "at matched length": {
            name: _interval(row.get("win_rate_matched_length"), "rate", "{:.1%}") for name, row in rows.items()
        },
        "KL": {name: _number(row.get("kl"), "{:.2f}") for name, row in rows.items()},
        "characters": {name: _number(row.get("mean_length"), "{:.0f}") for name, row in rows.items()},
        "finished": {name: _number(row.get("finished"), "{:.0%}") for name, row in rows.items()},
        "pretraining loss": {name: _number(row.get("pretraining_loss"), "{:.3f}") for name, row in rows.items()},
        "bits a byte": {name: _number(row.get("pretraining_bits_per_byte"), "{:.3f}") for name, row in rows.items()},
    }
    for title, shown in _of_protocols(rows):
        columns[title] = shown
    for title, shown in _of_best_of_n(rows):
        columns[title] = shown
    return _blocks(list(rows), {title: shown for title, shown in columns.items() if any(shown.values())})


def _of_protocols(rows: Mapping[str, Mapping[str, Any]]) -> Iterable[tuple[str, dict[str, str]]]:
    titles: dict[tuple[str, str, str], None] = {}
    for row in rows.values():
        for protocol, measures in row.get("protocols", {}).items():
            titles |= {
                (protocol, measure, condition): None for measure, found in measures.items() for condition in found
            }
    for protocol, measure, condition in titles:
        title = f"{protocol} {measure}" + ("" if condition == "all" else f" ({condition})")
        yield (
            title,
            {
                name: _interval(
                    row.get("protocols", {}).get(protocol, {}).get(measure, {}).get(condition), "mean", "{:.3f}"
                )
                for name, row in rows.items()
            },
        )


def _of_best_of_n(rows: Mapping[str, Mapping[str, Any]]) -> Iterable[tuple[str, dict[str, str]]]:
    sizes = {(best["n"], best["kl"]): None for row in rows.values() for best in row.get("best_of_n", ())}
    for n, kl in sizes:
        yield (
            f"best of {n} (KL {kl:.2f})",
            {
                name: _interval(next((b for b in row.get("best_of_n", ()) if b["n"] == n), None), "score", "{:.3f}")
                for name, row in rows.items()
            },
        )


def _blocks(names: list[str], columns: Mapping[str, Mapping[str, str]], *, width: int = 120) -> str:
    """Columns side by side; those that do not fit the width stand below, under the names again."""
    margin = max(map(len, names)) + 2
    blocks: list[dict[str, Mapping[str, str]]] = [{}]
    for title, shown in columns.items():
        used = margin + sum(_width(other, values) for other, values in blocks[-1].items())
        if blocks[-1] and used + _width(title, shown) > width:
            blocks.append({})
        blocks[-1][title] = shown
    texts = []
    for block in blocks:
        lines = [" " * margin + "".join(title.rjust(_width(title, shown)) for title, shown in block.items())]
        for name in names:
            cells = "".join(shown[name].rjust(_width(title, shown)) for title, shown in block.items())
            lines.append((name.ljust(margin) + cells).rstrip())
        texts.append("\n".join(lines))
    return "\n\n".join(texts)


def _width(title: str, shown: Mapping[str, str]) -> int:
    return max(len(title), *map(len, shown.values())) + 3


def _interval(found: Mapping[str, Any] | None, name: str, form: str) -> str:
    if found is None:
        return ""
    return "{} [{}, {}]".format(*(form.format(found[key]) for key in (name, "low", "high")))


def _number(found: float | None, form: str) -> str:
    return "" if found is None else form.format(found)


def _write(path: Path, lines: Iterable[str]) -> None:
    """At one stroke, so that a run that is killed leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    part.replace(path)
