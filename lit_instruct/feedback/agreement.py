"""How far labelers agree, and which of them stand apart.

Everything is counted in pairs of responses to one prompt. Two labelers *agree* on a pair that both order strictly if
they order it alike (Ouyang et al. 2022: 72.6 +- 1.5 %); a pair that one of them ties is not counted there but under
ties. Intervals come from drawing whole tasks anew: they say how these labelers would agree on other prompts. How *other
people* would agree cannot be told from the few labelers that a project has.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from statistics import NormalDist
from typing import Any, NamedTuple

import krippendorff
import numpy as np
from scipy import stats

from lit_instruct.feedback.resampling import Share, resample
from lit_instruct.feedback.rows import Columns
from lit_instruct.types import DataError, Prompt

PERIODS = 4
"""Into so many parts of equal size each labeler's work is cut to look for drift."""

LEVEL = 0.05
"""Chance of naming anybody at all where all labelers are equally good."""


class Judged(NamedTuple):
    """The responses to one prompt, and how they were ranked.

    Attributes:
        prompt: what was responded to.
        responses: K different texts.
        ranks: labeler to K ranks, 1 is best.
        period: labeler to the period of their own work in which they did it, 0 to ``PERIODS - 1``.
    """

    prompt: Prompt
    responses: list[str]
    ranks: dict[str, list[int]]
    period: dict[str, int]


class LabelerFigures(NamedTuple):
    """One labeler.

    Attributes:
        tasks: that they ranked.
        agreement: with the others.
        ties: share of all their pairs that they tied; without an interval.
        longer: share of strictly ordered pairs of different length in which the longer response was preferred.
        change: their agreement in the second half of their work minus that in the first.
        by_period: their agreement in each quarter of their work; None: no pair.
        apart: agreement with the others minus the others' among themselves.
        p_value: of ``apart`` being below 0 by chance, one-sided, times the number of labelers tested as Holm does.
        outlier: ``p_value`` is below ``LEVEL``.
        reward_model: share of their pairs that the reward model orders as they do; its ties count one half.
    """

    tasks: int
    agreement: Share
    ties: float
    longer: Share
    change: Share
    by_period: list[float | None]
    apart: Share
    p_value: float | None
    outlier: bool
    reward_model: Share | None


class PairFigures(NamedTuple):
    """Two labelers.

    Attributes:
        one: a labeler.
        other: another.
        tasks: that both ranked.
        agreement: between them; None: no pair is ordered strictly by both.
        pairs: that both order strictly.
        tau_b: Kendall's, mean over tasks.
        tau_tasks: over how many: it is not defined where one of them tied all.
    """

    one: str
    other: str
    tasks: int
    agreement: float | None
    pairs: int
    tau_b: float | None
    tau_tasks: int


class Figures(NamedTuple):
    """All labelers.

    Attributes:
        tasks: that anybody ranked.
        shared_tasks: that two or more did.
        unnamed: rankings without a labeler, left out.
        agreement: pooled over pairs of labelers and tasks.
        alpha: Krippendorff's, of pairs on the interval scale first - tie - second; None: not defined.
        ties: share of pairs that were tied, over all rankings.
        by_period: agreement in each quarter of the labelers' work.
        reward_model: as of a labeler, over all.
        labelers: by name.
        pairs: of labelers.
    """

    tasks: int
    shared_tasks: int
    unnamed: int
    agreement: Share
    alpha: float | None
    ties: float
    by_period: list[float | None]
    reward_model: Share | None
    labelers: dict[str, LabelerFigures]
    pairs: list[PairFigures]

    @property
    def outliers(self) -> list[str]:
        """Labelers who agree with the others less than these do among themselves, beyond chance."""
        return [name for name, figures in self.labelers.items() if figures.outlier]

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return _plain(self) | {"outliers": self.outliers}


def judged_tasks(comparisons: Sequence[Columns]) -> tuple[list[Judged], int]:
    """Bring together how different labelers ranked the same responses to the same prompt.

    A response that is there twice counts once, by the better rank; of two rankings of one task by one labeler the last
    counts.

    Args:
        comparisons: rows, as ``rows.read_label_rows`` gives them; by ``at``, or in their order if times are missing.

    Returns:
        The tasks, and how many rankings have no labeler.

    Raises:
        DataError: no ranking has a labeler.
    """
    named = [row for row in comparisons if row.get("labeler") is not None]
    if not named:
        raise DataError(
            f"got {len(comparisons)} rankings, none with a labeler; need some.\n"
            "Do: give rows with the column 'labeler', or a database of lit-instruct label."
        )
    if all(row.get("at") is not None for row in named):
        named = sorted(named, key=lambda row: row["at"])
    count: dict[str, int] = defaultdict(int)
    total: dict[str, int] = defaultdict(int)
    for row in named:
        total[row["labeler"]] += 1
    tasks: dict[str, Judged] = {}
    for row in named:
        labeler = row["labeler"]
        rank_of: dict[str, int] = {}
        for text, rank in zip(row["responses"], row["ranks"], strict=True):
            rank_of[text] = min(rank, rank_of.get(text, rank))
        key = json.dumps([row["prompt"], sorted(rank_of)])
        task = tasks.setdefault(key, Judged(row["prompt"], list(rank_of), {}, {}))
        task.ranks[labeler] = [rank_of[text] for text in task.responses]
        task.period[labeler] = PERIODS * count[labeler] // total[labeler]
        count[labeler] += 1
    return list(tasks.values()), len(comparisons) - len(named)


def agreement_figures(
    tasks: Sequence[Judged], *, unnamed: int = 0, scores: Sequence[Sequence[float]] | None = None, seed: int = 0
) -> Figures:
    """Work out all figures.

    Args:
        tasks: as ``judged_tasks`` gives them.
        unnamed: rankings that were left out.
        scores: of a reward model, for each response of each task.
        seed: of the bootstrap.
    """
    names = sorted({name for task in tasks for name in task.ranks})
    table = _Table(names)
    for index, task in enumerate(tasks):
        table.begin()
        _count(table, task, None if scores is None else scores[index])
    counted = resample(table.counts(), seed=seed)

    def share(*name: Any, of: tuple[Any, ...]) -> Share:
        return counted.share(table.column(*name), table.column(*of))

    def agreement(*key: Any) -> Share:
        return share("alike", *key, of=("both", *key))

    apart = {
        name: counted.difference(
            (table.column("alike", name), table.column("both", name)),
            (table.column("alike rest", name), table.column("both rest", name)),
        )
        for name in names
    }
    p_values = _holm({name: _p_below(difference) for name, difference in apart.items()})
    labelers = {
        name: LabelerFigures(
            tasks=sum(name in task.ranks for task in tasks),
            agreement=agreement(name),
            ties=share("tied", name, of=("pairs", name)).share or 0.0,
            longer=share("longer", name, of=("unequal", name)),
            change=counted.difference(
                (table.column("alike late", name), table.column("both late", name)),
                (table.column("alike early", name), table.column("both early", name)),
            ),
            by_period=[agreement(name, period).share for period in range(PERIODS)],
            apart=apart[name],
            p_value=p_values[name],
            outlier=_below(p_values[name]),
            reward_model=None if scores is None else share("model", name, of=("strict", name)),
        )
        for name in names
    }
    return Figures(
        tasks=len(tasks),
        shared_tasks=sum(len(task.ranks) > 1 for task in tasks),
        unnamed=unnamed,
        agreement=agreement(),
        alpha=_alpha(tasks, names),
        ties=share("tied", of=("pairs",)).share or 0.0,
        by_period=[agreement("all", period).share for period in range(PERIODS)],
        reward_model=None if scores is None else share("model", of=("strict",)),
        labelers=labelers,
        pairs=[_pair_figures(tasks, one, other) for one, other in combinations(names, 2)],
    )


class _Table:
    """Counts by task and name of what is counted."""

    def __init__(self, labelers: Sequence[str]) -> None:
        self.labelers = labelers
        self._columns: dict[tuple[Any, ...], int] = {}
        self._rows: list[dict[int, float]] = []

    def begin(self) -> None:
        """The next task."""
        self._rows.append(defaultdict(float))

    def column(self, *name: Any) -> int:
        """The column of what is called so."""
        return self._columns.setdefault(name, len(self._columns))

    def add(self, amount: float, *name: Any) -> None:
        """Count for this task."""
        self._rows[-1][self.column(*name)] += amount

    def counts(self) -> np.ndarray:
        """Fp64 ``[T, C]``, with columns for all that can be asked for."""
        for what in ("alike", "both"):
            for period in range(PERIODS):
                self.column(what, "all", period)
            for name in self.labelers:
                for key in [(what, name), (f"{what} rest", name), (f"{what} early", name), (f"{what} late", name)]:
                    self.column(*key)
                for period in range(PERIODS):
                    self.column(what, name, period)
            self.column(what)
        for what in ("tied", "pairs", "longer", "unequal", "model", "strict"):
            self.column(what)
            for name in self.labelers:
                self.column(what, name)
        counts_TC = np.zeros((len(self._rows), len(self._columns)))
        for index, row in enumerate(self._rows):
            counts_TC[index, list(row)] = list(row.values())
        return counts_TC


def _count(table: _Table, task: Judged, scores: Sequence[float] | None) -> None:
    """Count one task: each labeler alone, then each two."""
    signs = {name: _signs(ranks) for name, ranks in task.ranks.items()}
    lengths_P = _signs([-len(text) for text in task.responses])
    model_P = None if scores is None else _signs([-score for score in scores])
    for name, signs_P in signs.items():
        strict_P = signs_P != 0
        keys: tuple[tuple[str, ...], ...] = ((), (name,))
        for key in keys:
            table.add(len(signs_P), "pairs", *key)
            table.add((~strict_P).sum(), "tied", *key)
            table.add((strict_P & (lengths_P != 0)).sum(), "unequal", *key)
            table.add((signs_P * lengths_P > 0).sum(), "longer", *key)
            table.add(strict_P.sum(), "strict", *key)
            if model_P is not None:
                table.add((signs_P * model_P > 0).sum() + (strict_P & (model_P == 0)).sum() / 2, "model", *key)
    for one, other in combinations(sorted(signs), 2):
        product_P = signs[one] * signs[other]
        for what, amount in (("alike", (product_P > 0).sum()), ("both", (product_P != 0).sum())):
            table.add(amount, what)
            for name in (one, other):
                period = task.period[name]
                table.add(amount, what, name)
                table.add(amount, what, name, period)
                table.add(amount / 2, what, "all", period)
                table.add(amount, f"{what} {'early' if period < PERIODS // 2 else 'late'}", name)
            for name in table.labelers:
                if name not in (one, other):
                    table.add(amount, f"{what} rest", name)


def _signs(ranks: Sequence[float]) -> np.ndarray:
    """For each pair of responses -1: the first is better, 1: the second, 0: tied."""
    ranks_K = np.asarray(ranks, dtype=float)
    first, second = np.triu_indices(len(ranks_K), k=1)
    return np.sign(ranks_K[first] - ranks_K[second])


def _alpha(tasks: Sequence[Judged], names: Sequence[str]) -> float | None:
    """Krippendorff's alpha; each pair is read both ways, so that it does not matter which response is called first."""
    columns = []
    for task in tasks:
        if len(task.ranks) < 2:
            continue
        absent_P = np.full(math.comb(len(task.responses), 2), np.nan)
        columns.append(np.stack([_signs(task.ranks[name]) if name in task.ranks else absent_P for name in names]))
    if not columns:
        return None
    signs_LU = np.concatenate(columns, axis=1)
    signs_LU = np.concatenate([signs_LU, -signs_LU], axis=1)
    if not np.nansum(np.abs(signs_LU)):
        return None  # all is tied
    return float(krippendorff.alpha(reliability_data=signs_LU, level_of_measurement="interval"))


def _pair_figures(tasks: Sequence[Judged], one: str, other: str) -> PairFigures:
    shared = [(task.ranks[one], task.ranks[other]) for task in tasks if one in task.ranks and other in task.ranks]
    products = [_signs(ours) * _signs(theirs) for ours, theirs in shared]
    alike, both = sum(int((p > 0).sum()) for p in products), sum(int((p != 0).sum()) for p in products)
    taus = [
        float(stats.kendalltau(ours, theirs, variant="b").statistic)
        for ours, theirs in shared
        if len(set(ours)) > 1 and len(set(theirs)) > 1
    ]
    mean = sum(taus) / len(taus) if taus else None
    return PairFigures(one, other, len(shared), alike / both if both else None, both, mean, len(taus))


def _p_below(difference: Share) -> float | None:
    """Chance of a difference as low as this one if there is none, by the normal distribution; None: not to be had."""
    if difference.share is None or difference.standard_error is None:
        return None
    if difference.standard_error == 0:  # the same in all tasks
        return 0.0 if difference.share < 0 else 1.0
    return NormalDist().cdf(difference.share / difference.standard_error)


def _holm(p_values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Adjust for the number of tests (Holm 1979)."""
    tested = sorted((value, name) for name, value in p_values.items() if value is not None)
    adjusted: dict[str, float | None] = dict.fromkeys(p_values)
    highest = 0.0
    for place, (value, name) in enumerate(tested):
        highest = max(highest, min(1.0, value * (len(tested) - place)))
        adjusted[name] = highest
    return adjusted


def _below(p_value: float | None) -> bool:
    return p_value is not None and p_value < LEVEL


def _plain(value: Any) -> Any:
    if hasattr(value, "_asdict"):
        return {name: _plain(part) for name, part in value._asdict().items()}
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_plain(part) for part in value]
    return value
