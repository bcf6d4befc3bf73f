"""What stands in the documents, and what must not."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from itertools import islice

from lit_instruct.toyworld import ToyWorld, split_of_owner, write_documents
from lit_instruct.toyworld.tasks import task_of


def test_no_document_holds_a_request_of_a_heldout_owner() -> None:
    """Read every question in the documents back: whatever its wording, its owner is a training owner."""
    asked = [task_of(prompt) for document in write_documents(ToyWorld(7), 2_000) for prompt in _prompts_in(document)]
    assert len(asked) > 1_000
    assert {split_of_owner(task.owner) for task in asked} == {"train"}
    heldout = {(task.form, *sorted(task.slots.items())) for task in islice(ToyWorld(7).tasks("heldout"), 1_000)}
    assert not heldout & {(task.form, *sorted(task.slots.items())) for task in asked}


def _prompts_in(document: str) -> Iterator[str]:
    """Every prompt of the world that starts at a sentence of a document and is at most three sentences long."""
    sentences = re.findall(r"[^.?]+[.?]", document)
    for start in range(len(sentences)):
        for stop in range(start + 1, min(start + 4, len(sentences) + 1)):
            text = " ".join(sentence.strip() for sentence in sentences[start:stop])
            with contextlib.suppress(ValueError):
                yield task_of(text.removeprefix("user : ")).prompt
