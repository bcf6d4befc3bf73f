"""What the preparation of prompts did, step by step: for ``report.json`` and as a table."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

SPLITS = ("train", "val", "test")


@dataclass
class Step:
    """One step of the preparation.

    Attributes:
        name: of the setting that rules it.
        about: what it removes, for the table.
        removed: how many prompts it removed.
        left: how many were left.
        splits: how many of those in each split; None before they are split.
    """

    name: str
    about: str
    removed: int
    left: int
    splits: dict[str, int] | None = None


@dataclass
class Report:
    """What was asked for and what came of it; the same rows and settings give the same report.

    Attributes:
        settings: of the run.
        steps: in their order; each ``left`` is the one before less ``removed``.
        splits: prompts, owners (null without owners), prompts per owner and mean tokens of each file.
        personal_data: prompts of the training split with personal data, and places of each kind.
        notes: what a user should know.
    """

    settings: dict[str, Any]
    steps: list[Step] = field(default_factory=list)
    splits: dict[str, dict[str, float | int | None]] = field(default_factory=dict)
    personal_data: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, about: str, *, removed: int = 0, splits: Counter[str] | None = None) -> None:
        """Add the next step.

        Args:
            name: of the setting.
            about: what it removes.
            removed: how many prompts.
            splits: how many are left in each split, once there are splits.
        """
        left = self.steps[-1].left - removed
        parts = None if splits is None else {split: splits[split] for split in SPLITS}
        self.steps.append(Step(name, about, removed, left, parts))

    def to_json(self) -> str:
        """All of it."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    def table(self) -> str:
        """The steps with their counts, the splits, the notes."""
        rows = [["step", "removed", "left", *SPLITS]]
        for step in self.steps:
            parts = [""] * len(SPLITS) if step.splits is None else [f"{count:,}" for count in step.splits.values()]
            rows.append([step.about, f"{step.removed:,}", f"{step.left:,}", *parts])
        for name in ("owners", "prompts_per_owner", "mean_tokens"):
            values = [self.splits[split][name] for split in SPLITS]
            shown = ["-" if value is None else f"{value:,}" for value in values]
            rows.append([name.replace("_", " "), "", "", *shown])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for first, *others in rows:
            cells = [
                first.ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)),
            ]
            lines.append("  ".join(cells).rstrip())
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in self.personal_data["kinds"].items())
        if kinds:
            lines.append(f"Personal data found in train: {kinds}.")
        return "\n".join([*lines, *(f"Note: {note}" for note in self.notes)])
