"""What a round finds out about prompts and texts before anybody labels."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from lit_instruct.data.bad_rows import Problem, data_error
from lit_instruct.data.records import stream_prompts
from lit_instruct.data.sources import Row, stream_rows
from lit_instruct.feedback.rows import read_label_rows, refuse
from lit_instruct.types import DataError


def check_text(source: str) -> None:
    """See that a source of pretraining text is one, by its first row.

    Args:
        source: as ``lit_instruct.data.sources`` takes it.

    Raises:
        DataError: it is not.
    """
    first = next(stream_rows(source))
    if not isinstance(first, Row) or not isinstance(first.columns.get("text"), str):
        got = f"the columns {', '.join(first.columns)}" if isinstance(first, Row) else str(first)
        raise DataError(f'--text: got {source} with {got}; need rows {{"text"}}.\nDo: check the file.')


def check_heldout(prompts: Sequence[str], heldout: Sequence[str], labels: Sequence[str] = ()) -> tuple[int, int]:
    """See that no model of the round learns from an owner on whose prompts the policies are compared.

    Args:
        prompts: sources of what is trained on.
        heldout: sources of what the policies are compared on.
        labels: databases or files of rankings that are trained on too.

    Returns:
        How many prompts there are to train on, and how many held-out rows.

    Raises:
        DataError: there is such an owner, or such a prompt, or rows cannot be used.
    """
    trained = [(prompt, owner) for _, prompt, owner in _prompts_of(prompts)]
    earlier = [(_key(row["prompt"]), row.get("owner")) for row in read_label_rows(labels).comparisons]
    known = {prompt for prompt, _ in [*trained, *earlier]}
    owners = {owner for _, owner in [*trained, *earlier] if owner is not None}
    asked = list(_prompts_of(heldout))
    shared = [
        f"{place}: field {field!r}: got {what}, which is trained on"
        for place, prompt, owner in asked
        for field, what, found in (("owner", repr(owner), owner in owners), ("prompt", "a prompt", prompt in known))
        if found
    ]
    if shared:
        raise data_error(
            f"{len(shared)} held-out prompts are not held out:",
            shared,
            "split prompts by owner (lit-instruct data prepare does), and give the one part as --prompts, the other as "
            "--heldout_prompts.",
        )
    if not any(owner is not None for *_, owner in asked):
        print("Note: held-out prompts name no owners (column owner); the interval takes each prompt for an owner's.")
    return len({prompt for prompt, _ in trained}), len(asked)


def _prompts_of(sources: Sequence[str]) -> Iterator[tuple[Any, str, Any]]:
    """Place, prompt and owner of each row."""
    problems = []
    for item in stream_prompts(sources):
        if isinstance(item, Problem):
            problems.append(str(item))
        else:
            yield item[0].place, _key(item[1].prompt), item[0].columns.get("owner")
    refuse(problems, "prompts")


def _key(prompt: Any) -> str:
    return json.dumps(prompt, sort_keys=True)
