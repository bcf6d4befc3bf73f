"""Who decides which of two responses is better: scores, an answer to "which of the two?", or people."""

from __future__ import annotations

import inspect
import json
import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from lit_instruct.data.collate import EncodedPrompt, collate_prompts
from lit_instruct.data.encoding import encode_prompts
from lit_instruct.data.records import stream_prompts
from lit_instruct.data.sources import data_error
from lit_instruct.evaluation.responses import Sampled, pad_responses
from lit_instruct.evaluation.win_rate import outcomes_of
from lit_instruct.models.tokenizer import load_tokenizer, padding_id, reads_alike
from lit_instruct.rewards import (
    ClassifierScorer,
    FunctionScorer,
    HttpScorer,
    RewardModelScorer,
    Scorer,
    WeightedSum,
)
from lit_instruct.rewards.base import shortened
from lit_instruct.types import ConfigError, PromptBatch, Responses

OTHER = "other_response"
"""The column in which a :class:`PairJudge`'s scorer finds the response that a response is compared with."""

_SCORED_ROWS = 512


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
    """Choices of people between two responses, read from a file.

    Rows are ``{"prompt", "first", "second", "choice"}`` with the texts of the two responses and the choice ``first``,
    ``second`` or ``tie``; null where nobody has chosen yet. They are found again by their texts, so it does not matter
    which model was first, and the choices of a run whose responses have changed are not taken for its own. Of several
    choices about one pair the mean counts. An evaluation without a judge writes such a file, ``pairs.jsonl``.
    """

    def __init__(self, choices: str | list[str]):
        """Read the choices.

        Args:
            choices: file, or list of files, with the choices.
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
    counts = {"first": 1.0, "tie": 0.5, "second": 0.0}
    found: dict[str, list[float]] = defaultdict(list)
    problems = []
    for item in stream_prompts(sources):
        if isinstance(item, str):
            problems.append(item)
            continue
        row, record = item
        texts = [row.columns.get(name) for name in ("first", "second")]
        choice = row.columns.get("choice")
        bad = next(
            (name for name, text in zip(("first", "second"), texts, strict=True) if not isinstance(text, str)), None
        )
        if bad is not None:
            problems.append(
                f"{row.place}: field {bad!r}: got {shortened(row.columns.get(bad))}; need a response as text"
            )
        elif choice is not None and choice not in counts:
            problems.append(f"{row.place}: field 'choice': got {shortened(choice)}; need first, second, tie or null")
        elif choice is not None:
            found[_pair_key(record.prompt, *texts)].append(counts[choice])
    if problems:
        raise data_error(
            f"{len(problems)} rows cannot be used as choices:",
            problems,
            'mend or remove these rows. Rows of choices look like {"prompt", "first", "second", "choice"}.',
        )
    return dict(found)


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


def name_of(scorer: Scorer) -> str:
    """What the results call a scorer.

    Args:
        scorer: any.

    Returns:
        Its identity, and of a reward model the checkpoint.
    """
    checkpoint = scorer.checkpoint if isinstance(scorer, RewardModelScorer) else None
    return scorer.identity() if checkpoint is None else f"{scorer.identity()} {checkpoint}"


def check_scorer(scorer: Scorer) -> None:
    """Let a scorer look whether it can work.

    A reward model is not asked: it is given text in its own tokenizer here, whoever wrote it.

    Args:
        scorer: any.

    Raises:
        ConfigError: it cannot work.
    """
    if isinstance(scorer, WeightedSum):
        for part in scorer.scorers:
            assert isinstance(part, Scorer)
            check_scorer(part)
    elif not isinstance(scorer, RewardModelScorer):
        scorer.check(None)


def score(scorer: Scorer, sampled: Sampled) -> np.ndarray:
    """Score responses of any model.

    Reward models of this package read token ids. They are given prompts in their own template, so that all models'
    responses are seen in the same form, and responses as they were sampled if they have the policy's vocabulary, else
    written out and read anew.

    Args:
        scorer: any.
        sampled: responses to P prompts.

    Returns:
        fp64 ``[P]``.

    Raises:
        ConfigError: the scorer gives no usable scores.
    """
    if isinstance(scorer, WeightedSum):
        parts = [part for part in scorer.scorers if isinstance(part, Scorer)]
        return sum(
            (weight * score(part, sampled) for part, weight in zip(parts, scorer.weights, strict=True)),
            start=np.zeros(len(sampled.texts)),
        )
    if isinstance(scorer, RewardModelScorer) and scorer.checkpoint is not None:
        sampled = _in_tokens_of(scorer.checkpoint, sampled)
    device = _device_of(scorer)
    scores = []
    for start in range(0, len(sampled.texts), _SCORED_ROWS):
        some = select(sampled, range(start, min(start + _SCORED_ROWS, len(sampled.texts))))
        prompts = PromptBatch(some.prompts[0].to(device), some.prompts[1].to(device), some.prompts.rows)
        responses = Responses(*(part.to(device) for part in some.responses))
        scores.append(scorer(prompts, responses, tokenizer=some.tokenizer).double().cpu().numpy())
    scores_P = np.concatenate(scores)
    if (bad := np.flatnonzero(~np.isfinite(scores_P))).size:
        raise ConfigError(
            f"{scorer.identity()}: got {scores_P[bad[0]]} as the score of response {shortened(sampled.texts[bad[0]])}; "
            "need a finite number. Do: look at what gives the scores."
        )
    return scores_P


def select(sampled: Sampled, places: Sequence[int]) -> Sampled:
    """Some of the responses.

    Args:
        sampled: responses to P prompts.
        places: which.

    Returns:
        A record with these alone.
    """
    index = torch.tensor(list(places))
    prompts = PromptBatch(
        sampled.prompts.prompt_ids_BP[index],
        sampled.prompts.prompt_mask_BP[index],
        [sampled.prompts.rows[place] for place in places],
    )
    responses = Responses(*(part[index] for part in sampled.responses))
    return Sampled(prompts, responses, sampled.tokenizer, [sampled.texts[place] for place in places])


def _in_tokens_of(checkpoint: str, sampled: Sampled) -> Sampled:
    """The same prompts and responses as the reward model of a checkpoint reads them."""
    reader = load_tokenizer(checkpoint)
    encoded = encode_prompts(reader, [row["prompt"] for row in sampled.prompts.rows])
    pad_id = padding_id(reader)
    prompts = collate_prompts(
        [EncodedPrompt(ids, row) for ids, row in zip(encoded, sampled.prompts.rows, strict=True)], pad_id
    )
    responses = sampled.responses
    if not reads_alike(reader, sampled.tokenizer):
        ids = [
            _read_anew(reader, text, bool(ended))
            for text, ended in zip(sampled.texts, responses.finished_B, strict=True)
        ]
        responses = pad_responses(ids, responses.finished_B.tolist(), pad_id)
    return Sampled(prompts, responses, reader, sampled.texts)


def _read_anew(reader: Any, text: str, ended: bool) -> list[int]:
    """A response's tokens up to an end of text, and one end of text where the response ended by itself."""
    ids = reader(text, add_special_tokens=False)["input_ids"]
    end = reader.eos_token_id
    ids = ids[: ids.index(end)] if end in ids else ids
    return [*ids, end] if ended or not ids else ids


def _device_of(scorer: nn.Module) -> torch.device:
    return next((parameter.device for parameter in scorer.parameters()), torch.device("cpu"))
