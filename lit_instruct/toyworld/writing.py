"""The files of one run: documents, demonstrations and prompts of a world as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from lit_instruct.toyworld.demonstrations import write_demonstration
from lit_instruct.toyworld.documents import write_documents
from lit_instruct.toyworld.world import ToyWorld


def write_jsonl(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Write one JSON object a line."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Read such a file."""
    with Path(path).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_world(
    world: ToyWorld,
    folder: str | Path,
    *,
    documents: int,
    demonstrations: int,
    prompts: int,
    heldout: int,
    heldout_documents: int = 0,
) -> dict[str, Path]:
    """Write the texts of a world into a folder, which is made if need be.

    No prompt text occurs twice in the three files with prompts, and no owner of ``heldout_prompts.jsonl`` in the
    other two.

    Args:
        world: what is written about.
        folder: where the files go.
        documents: rows of ``pretraining.jsonl``: ``{"text"}``.
        demonstrations: rows of ``demonstrations.jsonl``: ``{"prompt", "response", "owner"}``.
        prompts: rows of ``prompts.jsonl``: ``{"prompt", "owner", "kind"}``.
        heldout: rows of ``heldout_prompts.jsonl``, as the former.
        heldout_documents: rows of ``pretraining_heldout.jsonl``, which is not written for 0.

    Returns:
        The paths by the names ``pretraining``, ``demonstrations``, ``prompts``, ``heldout_prompts``, and perhaps
        ``pretraining_heldout``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = ("pretraining", "demonstrations", "prompts", "heldout_prompts")
    paths = {name: folder / f"{name}.jsonl" for name in names}
    texts = ({"text": text} for text in write_documents(world, documents + heldout_documents))
    write_jsonl(paths["pretraining"], islice(texts, documents))
    if heldout_documents:
        paths["pretraining_heldout"] = folder / "pretraining_heldout.jsonl"
        write_jsonl(paths["pretraining_heldout"], texts)
    train = list(islice(world.tasks("train"), demonstrations + prompts))
    rng = world.stream("demonstrations")
    write_jsonl(
        paths["demonstrations"],
        (
            {"prompt": task.prompt, "response": write_demonstration(world, task, rng), "owner": task.owner}
            for task in train[:demonstrations]
        ),
    )
    for name, chosen in (
        ("prompts", train[demonstrations:]),
        ("heldout_prompts", list(islice(world.tasks("heldout"), heldout))),
    ):
        write_jsonl(paths[name], ({"prompt": t.prompt, "owner": t.owner, "kind": t.kind} for t in chosen))
    return paths
