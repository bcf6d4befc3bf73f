"""Who decides which of two responses is better: scores, an answer to "which of the two?", or people."""

from __future__ import annotations

import inspect
import json
import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from lit_instruct.data.bad_rows import Flaw, Problem, data_error
from lit_instruct.data.records import PromptRecord, stream_prompts
from lit_instruct.data.sources import Row
from lit_instruct.evaluation.responses import Sampled
from lit_instruct.evaluation.scoring import check_scorer, name_of, score, select
from lit_instruct.evaluation.win_rate import outcomes_of
from lit_instruct.feedback.rows import is_database, read_label_rows
from lit_instruct.rewards import (
    ClassifierScorer,
    FunctionScorer,
    HttpScorer,
    RewardModelScorer,
    Scorer,
    WeightedSum,
)
from lit_instruct.rewards.base import shortened
from lit_instruct.types import ConfigError

OTHER = "other_response"
"""The column in which a :class:`PairJudge`'s scorer finds the response that a response is compared with."""


class Judge(ABC):
    """Compares two models' responses to the same prompts."""

    def check(self) -> None:  # noqa: B027  (most have nothing to refuse)
        """Refuse before anything is sampled what cannot work.

        Raises:
            ConfigError: it cannot.
        """

    @abstractmethod
    def outcomes(self, ours: Sampled, theirs: Sampled) -> np.ndarray:
        """Judge P pairs of responses.

        Args:
            ours: responses of the model in question.
            theirs: responses of the baseline to the same prompts.

        Returns:
            fp64 ``[P]``: 1 ours is better, one half a tie, 0 theirs is; NaN where nobody judged.

        Raises:
            ConfigError: the judge gave no usable answer.
        """

    def identity(self) -> str:
        """What the results say about it."""
        return type(self).__qualname__


class PairJudge(Judge):
    """A scorer that is asked for a preference between two responses, in both orders.

    The scorer is given a response as always, and the one that it is compared with in the column ``other_response``. It
    says by the sign of its score which of the two is better: above 0 the response, below 0 the other one, 0 a tie.
    Each pair is asked as (A, B) and as (B, A); where the two answers differ the pair is a tie, since a judge whose
    choice depends on the order has not chosen. Equal responses are ties without being asked.
    """

    def __init__(self, scorer: Scorer):
        """Take the scorer.

        Args:
            scorer: a Python function f(prompts, responses, other_response) (lit_instruct.rewards.FunctionScorer), a
                server (lit_instruct.rewards.HttpScorer), or one of your own.
        """
        if problem := _cannot_compare(scorer):
            raise ConfigError(
                f"PairJudge scorer: got {problem}; need one that reads the column {OTHER!r}, with which its score says "
                "which of two responses is better. Do: give what scores one response as scorer, not as judge."
            )
        self.scorer = scorer

    def check(self) -> None:
        """Let the scorer look whether it can work.

        Raises:
            ConfigError: it cannot.
        """
        check_scorer(self.scorer)

    def identity(self) -> str:
        """Its name and its scorer."""
        return f"{super().identity()} {name_of(self.scorer)}"

    def outcomes(self, ours: Sampled, theirs: Sampled) -> np.ndarray:
        """Ask for each pair whose texts differ in both orders.

        Args:
            ours: responses of the model in question.
            theirs: responses of the baseline.

        Returns:
            fp64 ``[P]``.

        Raises:
            ConfigError: the scorer gives no usable answer.
        """
        outcomes_P = np.full(len(ours.texts), 0.5)
        places = [row for row, text in enumerate(ours.texts) if text != theirs.texts[row]]
        if not places:
            return outcomes_P
        forth = np.sign(self._ask(ours, theirs, places))
        back = np.sign(self._ask(theirs, ours, places))
        outcomes_P[places] = np.where(forth == -back, (forth + 1.0) / 2.0, 0.5)
        return outcomes_P

    def _ask(self, first: Sampled, second: Sampled, places: Sequence[int]) -> np.ndarray:
        rows = [{**first.prompts.rows[place], OTHER: second.texts[place]} for place in places]
        some = select(first, places)
        return score(self.scorer, some._replace(prompts=some.prompts._replace(rows=rows)))


def _cannot_compare(scorer: Scorer) -> str | None:
    """What keeps a scorer from seeing the other response; its scores would pass for preferences."""
    if isinstance(scorer, RewardModelScorer | ClassifierScorer | WeightedSum):
        return f"a {type(scorer).__name__}"
    if isinstance(scorer, HttpScorer) and scorer.columns is not None and OTHER not in scorer.columns:
        return f"a server that is sent the columns {', '.join(map(repr, scorer.columns)) or 'none'}"
    if isinstance(scorer, FunctionScorer):
        parameters = inspect.signature(scorer.function).parameters
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        if OTHER not in parameters and not takes_all:
            return f"the function {scorer.name} without such a parameter"
    return None


class HumanChoices(Judge):
    """Choices of people between two responses, read from files and from databases of ``lit-instruct label``.

    Rows are ``{"prompt", "first", "second", "choice"}`` with the texts of the two responses and the choice ``first``,
    ``second`` or ``tie``; null where nobody has chosen yet. They are found again by their texts, so it does not matter
    which model was first, and the choices of a run whose responses have changed are not taken for its own. Of several
    choices about one pair the mean counts. An evaluation without a judge writes such a file, ``pairs.jsonl``, which
    ``lit-instruct label --tasks`` takes too. In a database each ranking is a choice about each pair of its responses.
    """

    def __init__(self, choices: str | list[str]):
        """Read the choices.

        Args:
            choices: file or labelling database, or list of them, with the choices.
        """
        self.choices = [choices] if isinstance(choices, str) else list(choices)
        self._found = _read_choices(self.choices)

    def outcomes(self, ours: Sampled, theirs: Sampled) -> np.ndarray:
        """Look the choices up.

        Args:
            ours: responses of the model in question.
            theirs: responses of the baseline.

        Returns:
            fp64 ``[P]``, NaN where nobody has chosen.

        Raises:
            ConfigError: there is no choice about any of the pairs.
        """
        outcomes_P = np.full(len(ours.texts), math.nan)
        for place, (row, first, second) in enumerate(zip(ours.prompts.rows, ours.texts, theirs.texts, strict=True)):
            found = list(self._found.get(_pair_key(row["prompt"], first, second), ()))
            if first != second:
                found += [1.0 - outcome for outcome in self._found.get(_pair_key(row["prompt"], second, first), ())]
            if first == second or found:
                outcomes_P[place] = float(np.mean(found)) if first != second else 0.5
        if np.isnan(outcomes_P).all():
            raise ConfigError(
                f"HumanChoices: got no choice about any of the {len(ours.texts)} pairs of responses in "
                f"{', '.join(self.choices)}; need rows with these prompts and responses. Do: take the pairs from the "
                "pairs.jsonl of an evaluation with the same models, prompts and settings."
            )
        return outcomes_P


def _read_choices(sources: Sequence[str]) -> dict[str, list[float]]:
    databases = [source for source in sources if is_database(source)]
    found: dict[str, list[float]] = defaultdict(list)
    problems = [_add_choice(found, item) for item in stream_prompts([s for s in sources if s not in databases])]
    if wrong := [problem for problem in problems if problem]:
        raise data_error(
            f"{len(wrong)} rows cannot be used as choices:",
            wrong,
            'mend or remove these rows. Rows of choices look like {"prompt", "first", "second", "choice"}.',
        )
    for row in read_label_rows(databases).comparisons:
        judged = zip(row["responses"], row["ranks"], strict=True)
        for (first, rank), (second, other) in combinations(judged, 2):
            found[_pair_key(row["prompt"], first, second)].append(0.5 + 0.5 * ((rank < other) - (rank > other)))
    return dict(found)


def _add_choice(found: dict[str, list[float]], item: tuple[Row, PromptRecord] | Problem) -> Problem | None:
    """Add the choice of a row, if it holds one; returns what is wrong with it."""
    if isinstance(item, Problem):
        return item
    row, record = item
    counts = {"first": 1.0, "tie": 0.5, "second": 0.0}
    texts = {name: row.columns.get(name) for name in ("first", "second")}
    choice = row.columns.get("choice")
    for name, text in texts.items():
        if not isinstance(text, str):
            return Problem(row.place, Flaw(name, f"got {shortened(text)}; need a response as text"))
    if choice is not None and (not isinstance(choice, str) or choice not in counts):
        return Problem(row.place, Flaw("choice", f"got {shortened(choice)}; need first, second, tie or null"))
    if choice is not None:
        found[_pair_key(record.prompt, *texts.values())].append(counts[choice])
    return None


def _pair_key(prompt: Any, first: Any, second: Any) -> str:
    return json.dumps([prompt, first, second], sort_keys=True)


class ScoreJudge(Judge):
    """The response with the higher score is better; equal scores tie."""

    def __init__(self, scorer: Scorer):
        """Take the scorer.

        Args:
            scorer: gives each response a score.
        """
        self.scorer = scorer
        self._known: dict[int, tuple[Sampled, np.ndarray]] = {}

    def check(self) -> None:
        """Let the scorer look whether it can work.

        Raises:
            ConfigError: it cannot.
        """
        check_scorer(self.scorer)

    def identity(self) -> str:
        """Its scorer."""
        return name_of(self.scorer)

    def of(self, sampled: Sampled) -> np.ndarray:
        """Score responses, each set once.

        Args:
            sampled: responses to P prompts.

        Returns:
            fp64 ``[P]``.
        """
        if id(sampled) not in self._known:  # kept with the set, whose id is then nobody else's
            self._known[id(sampled)] = (sampled, score(self.scorer, sampled))
        return self._known[id(sampled)][1]

    def outcomes(self, ours: Sampled, theirs: Sampled) -> np.ndarray:
        """Compare scores.

        Args:
            ours: responses of the model in question.
            theirs: responses of the baseline.

        Returns:
            fp64 ``[P]``.
        """
        return outcomes_of(self.of(ours), self.of(theirs))
