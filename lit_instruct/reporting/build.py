"""From runs and evaluations to what a report says."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import count

from lit_instruct.reporting.charts import Chart
from lit_instruct.reporting.evaluation_charts import evaluation_charts, protocol_charts
from lit_instruct.reporting.evaluations import Estimate, Evaluation, read_samples
from lit_instruct.reporting.numbers import duration, moment, number
from lit_instruct.reporting.runs import STAGES, Found, Run
from lit_instruct.reporting.samples import SAMPLE_TEXTS, side_by_side
from lit_instruct.reporting.sections import Cell, Finding, Overview, Report, Section, Table
from lit_instruct.reporting.settings import as_yaml, differences, flatten
from lit_instruct.reporting.stage_charts import (
    course_charts,
    flat_metrics,
    frontier_charts,
    last_value,
    reward_charts,
    x_label,
)
from lit_instruct.reporting.stages import ROWS, TITLES

HEALTH = "health"
"""The name under which the callback Health logs its findings."""

AVERAGE = "WeightEMA"
"""The callback that puts averaged weights in place of the trained ones for validation."""

_NAMED = 5  # with more runs the title does not name all

_FINDING = re.compile(r"^- \*\*(\w+)\*\*: (.*)$", flags=re.MULTILINE)


def build(found: Found, *, prompts: int) -> Report:
    """Put a report together.

    Args:
        found: runs and evaluations.
        prompts: how many prompts with samples, at most.

    Returns:
        The report.

    Raises:
        DataError: the samples of an evaluation are damaged.
    """
    placed = list(enumerate(found.runs))
    sections = []
    for stage in STAGES:
        of_stage = [(place, run) for place, run in placed if run.stage == stage]
        if of_stage:
            sections.append(_stage_section(stage, of_stage, prompts))
    places = {run.name: place for place, run in placed}
    for position, evaluation in enumerate(found.evaluations, start=1):
        slug = "evaluation" if len(found.evaluations) == 1 else f"evaluation-{position}"
        sections.append(_evaluation_section(evaluation, places, slug, prompts))
    names = [run.name for run in found.runs] + [evaluation.name for evaluation in found.evaluations]
    notes = [
        f"{run.name}: other runs in its place are not shown ({', '.join(folder.name for folder in run.left_out)}). "
        "To see one, name its folder."
        for run in found.runs
        if run.left_out
    ]
    notes += [
        f"{run.name}: held-out numbers are those of the averaged weights ({AVERAGE}), which lag behind training."
        for run in found.runs
        if f"trainer.callbacks.{AVERAGE}" in flatten(run.settings) and any("/val/" in name for name in run.curves)
    ]
    title = ", ".join(names) if len(names) <= _NAMED else f"{', '.join(names[:2])} and {len(names) - 2} more"
    return Report(title, _overview(placed), notes, sections)


def _overview(placed: Sequence[tuple[int, Run]]) -> Overview:
    columns: dict[str, Callable[[Run], str | None]] = {
        "Stage": lambda run: TITLES[run.stage],
        "Length": _length,
        "Started": lambda run: moment(run.sessions[0].started) if run.sessions else None,
        "Time": _time,
        "Log": lambda run: str(run.folder),
    }
    used = [name for name, cell in columns.items() if any(cell(run) is not None for _, run in placed)]
    return Overview(used, [(Cell(run.name, place), [columns[name](run) for name in used]) for place, run in placed])


def _length(run: Run) -> str | None:
    last = [max(values) for name, values in run.curves.items() if "/train/" in name]
    if not last:
        return None
    length = max(last) + (run.stage != "ppo")  # Lightning numbers optimizer steps from 0, PPO its iterations from 1
    return f"{number(length)} {x_label(run.stage)}{'s' * (length != 1)}"


def _time(run: Run) -> str | None:
    """Between the first and the last entry of each session."""
    if not run.sessions:
        return None
    total = duration(sum(session.seconds for session in run.sessions))
    return total if len(run.sessions) == 1 else f"{total} in {len(run.sessions)} sessions"


def _stage_section(stage: str, runs: list[tuple[int, Run]], prompts: int) -> Section:
    charts: list[Chart] = [*course_charts(stage, runs, main=True)]
    if stage == "ppo":
        charts[2:2] = frontier_charts(runs)
    if stage == "rm":
        charts += reward_charts(runs)
    samples = side_by_side(
        [(run.name, place, run.texts[SAMPLE_TEXTS]) for place, run in runs if SAMPLE_TEXTS in run.texts], prompts
    )
    known = [(place, run) for place, run in runs if run.settings]
    return Section(
        anchor=stage,
        title=TITLES[stage],
        table=_last_values(stage, runs),
        charts=charts,
        more=list(course_charts(stage, runs, main=False)),
        more_title="More metrics",
        flat=Table([Cell(run.name, place) for place, run in runs], flat_metrics(stage, runs)),
        findings=[finding for _, run in runs for finding in findings(run)],
        samples=samples,
        samples_note="Held-out prompts during training, as the callback SampleTable logged them.",
        names=[Cell(run.name, place) for place, run in known],
        differences=differences([run.settings for _, run in known]),
        settings={run.name: as_yaml(run.settings) for _, run in known},
    )


def _last_values(stage: str, runs: Sequence[tuple[int, Run]]) -> Table:
    rows = [(row.label, [last_value(run, row.metric, percent=row.percent) for _, run in runs]) for row in ROWS[stage]]
    return _without_empty(Table([Cell(run.name, place) for place, run in runs], rows))


def findings(run: Run) -> list[Finding]:
    """What the callback Health reported in a run.

    Args:
        run: of PPO.

    Returns:
        A finding for each rule, in the order in which they were first reported.
    """
    found: dict[str, Finding] = {}
    for iteration, report in run.texts.get(HEALTH, {}).items():
        for rule, text in _FINDING.findall(report):
            before = found[rule].iterations if rule in found else []
            found[rule] = Finding(run.name, rule, [*before, iteration], text)
    return list(found.values())


def _evaluation_section(evaluation: Evaluation, runs: Mapping[str, int], slug: str, prompts: int) -> Section:
    places = _places(evaluation, runs)
    how = "\n".join(f"{key}: {value}" for key, value in evaluation.settings.items())
    return Section(
        anchor=slug,
        title=f"Evaluation: {evaluation.name}",
        table=_results(evaluation, places),
        charts=evaluation_charts(evaluation, places, slug),
        more=protocol_charts(evaluation, places, slug),
        more_title="Protocols",
        samples=read_samples(evaluation, places, prompts) if prompts else [],
        samples_note="The first prompts of the evaluation; all are in samples.jsonl.",
        settings={"How it was measured": how} if how else {},
    )


def _places(evaluation: Evaluation, runs: Mapping[str, int]) -> dict[str, int]:
    """A model that has the name of a run has its colour, another one a colour of its own."""
    free = count(len(runs))
    return {model: runs[model] if model in runs else next(free) for model in evaluation.models}


def _results(evaluation: Evaluation, places: Mapping[str, int]) -> Table:
    models = list(evaluation.models.values())
    against = f"Preferred to {evaluation.baseline}" if evaluation.baseline else "Preferred"
    rows: list[tuple[str, list[str | None]]] = [
        (against, [_with_interval(model.win_rate, percent=True) for model in models]),
        (
            f"{against}, at equal length",
            [_with_interval(model.win_rate_matched_length, percent=True) for model in models],
        ),
        ("Score", [_with_interval(model.score) for model in models]),
        ("KL to the reference (nats a response)", [_number(model.kl) for model in models]),
        ("Response length (characters)", [_number(model.mean_length) for model in models]),
        ("Finished responses", [_number(model.finished, percent=True) for model in models]),
        ("Pretraining loss (nats a token)", [_number(model.pretraining_loss) for model in models]),
        ("Pretraining loss (bits a byte)", [_number(model.pretraining_bits_per_byte) for model in models]),
    ]
    protocols = dict.fromkeys(name for model in models for name in model.protocols)
    rows += [(name, [_with_interval(model.protocols.get(name)) for model in models]) for name in protocols]
    rows.append(("Source", [model.source for model in models]))
    return _without_empty(Table([Cell(name, places[name]) for name in evaluation.models], rows))


def _with_interval(estimate: Estimate | None, *, percent: bool = False) -> str | None:
    if estimate is None:
        return None
    middle = number(estimate.value, percent=percent)
    if estimate.low is None or estimate.high is None:
        return middle
    return f"{middle} [{number(estimate.low, percent=percent)}, {number(estimate.high, percent=percent)}]"


def _number(value: float | None, *, percent: bool = False) -> str | None:
    return None if value is None else number(value, percent=percent)


def _without_empty(table: Table) -> Table:
    return table._replace(
        rows=[(label, cells) for label, cells in table.rows if any(cell is not None for cell in cells)]
    )
