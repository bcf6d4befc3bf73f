"""What a report says, section by section; ``build`` fills it in, ``page`` makes HTML of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from lit_instruct.reporting.charts import Chart
from lit_instruct.reporting.samples import SampledPrompt
from lit_instruct.reporting.settings import Difference


class Cell(NamedTuple):
    """One name in the head of a table, with the colour of its run (None: none)."""

    text: str
    run: int | None = None


class Overview(NamedTuple):
    """The runs, a row each.

    Attributes:
        head: names of the columns behind the run's.
        rows: run and cells; None where there is nothing to say.
    """

    head: list[str]
    rows: list[tuple[Cell, list[str | None]]]


class Table(NamedTuple):
    """Numbers, a column for each run or model.

    Attributes:
        head: names of the columns behind the label.
        rows: label and cells; None where there is nothing to say.
    """

    head: list[Cell]
    rows: list[tuple[str, list[str | None]]]


NO_TABLE = Table([], [])


class Finding(NamedTuple):
    """Something that Health reported, once or again and again.

    Attributes:
        run: name of the run.
        rule: its name.
        iterations: when it was reported, ascending.
        text: what was seen, the likely cause, what to do; as reported last.
    """

    run: str
    rule: str
    iterations: list[int]
    text: str


@dataclass(frozen=True)
class Section:
    """A stage, or an evaluation. What is empty is not shown.

    Attributes:
        anchor: for links.
        title: heading.
        table: numbers.
        charts: that everybody looks at.
        more: the others, folded.
        more_title: what is folded.
        flat: metrics that are no curve.
        findings: of Health.
        samples: side by side.
        samples_note: what is shown of them.
        names: of the runs with their places, for settings.
        differences: settings that differ.
        settings: name of each run -> all its settings.
    """

    anchor: str
    title: str
    table: Table
    charts: list[Chart]
    more: list[Chart] = field(default_factory=list)
    more_title: str = ""
    flat: Table = NO_TABLE
    findings: list[Finding] = field(default_factory=list)
    samples: list[SampledPrompt] = field(default_factory=list)
    samples_note: str = ""
    names: list[Cell] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    settings: dict[str, str] = field(default_factory=dict)


class Report(NamedTuple):
    """A whole page.

    Attributes:
        title: names the runs.
        overview: the runs, when they ran and how long.
        notes: what was left out, and how to read held-out numbers.
        sections: stages, then evaluations.
    """

    title: str
    overview: Overview
    notes: list[str]
    sections: list[Section]

    def charts(self) -> Iterator[Chart]:
        """All charts, in order."""
        for section in self.sections:
            yield from section.charts
            yield from section.more
