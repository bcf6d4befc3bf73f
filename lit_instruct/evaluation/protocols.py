"""Small data sets that are asked of each model by itself: bias, multiple choice, what continuations are like."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from lit_instruct.data.records import read_choices, read_prompts
from lit_instruct.evaluation.bias import choice_entropy
from lit_instruct.evaluation.bootstrap import Interval, owner_interval
from lit_instruct.evaluation.likelihood import continuation_logprobs
from lit_instruct.evaluation.multiple_choice import choice_credit
from lit_instruct.evaluation.responses import Asked, Sampling, sample
from lit_instruct.evaluation.scoring import check_scorer, score
from lit_instruct.evaluation.subjects import Subject
from lit_instruct.rewards import Scorer
from lit_instruct.types import ConfigError, Prompt

Measures = dict[str, dict[str, Interval]]
"""Measure -> condition -> mean with interval; the condition of rows that name none is ``all``."""

EVERYTHING = "all"


class Protocol(ABC):
    """Asks one model something; data are read when it is made, so that bad rows are found before anything runs."""

    def check(self) -> None:  # noqa: B027  (most have nothing to refuse)
        """Refuse before anything runs what cannot work.

        Raises:
            ConfigError: it cannot.
        """

    @abstractmethod
    def measure(self, subject: Subject, folder: Path) -> Measures:
        """Ask a model.

        Args:
            subject: the model.
            folder: where responses may be kept for the next run.

        Returns:
            What was found.
        """


class Choices(Protocol):
    """What reads a file of choices, and asks a model for the log-probability of each."""

    correct: ClassVar[bool]
    """Whether a row says which choice is right."""

    def __init__(self, data: str | list[str], *, verbatim: bool = False, micro_batch_rows: int = 32):
        """Read the data.

        Args:
            data: file, or list of files, of rows with choices.
            verbatim: prompts are read as plain text, without the model's template, as few-shot prompts want it.
            micro_batch_rows: rows a forward pass.
        """
        if micro_batch_rows < 1:
            raise ConfigError(f"{type(self).__name__} micro_batch_rows: got {micro_batch_rows}; need at least 1.")
        self.items = read_choices(data, correct=self.correct)
        self.owners = owners_of([record.columns for record in self.items.records])
        self.verbatim = verbatim
        self.micro_batch_rows = micro_batch_rows

    def logprobs(self, subject: Subject) -> tuple[list[list[float]], list[list[int]]]:
        """Log-probability of every choice.

        Args:
            subject: the model.

        Returns:
            For each row the total log-probability of each choice, nats, and the tokens of each.

        Raises:
            DataError: a prompt and its choice are too long for the model.
        """
        tokenizer = subject.tokenizer
        choices = [  # no end of text: the paper's are continuations
            tokenizer(record.choices, add_special_tokens=False)["input_ids"] for record in self.items.records
        ]
        contexts = [
            self._context(subject, record.prompt, place, response_tokens=max(map(len, ids)))
            for record, place, ids in zip(self.items.records, self.items.places, choices, strict=True)
        ]
        flat = continuation_logprobs(
            subject.model,
            [context for context, ids in zip(contexts, choices, strict=True) for _ in ids],
            [ids for row in choices for ids in row],
            rows=self.micro_batch_rows,
        )
        sums = iter(flat)
        return [[next(sums) for _ in row] for row in choices], [[len(ids) for ids in row] for row in choices]

    def _context(self, subject: Subject, prompt: Prompt | None, place: str, *, response_tokens: int) -> list[int]:
        """What stands before the choices of a row: its prompt, else what stands before a document."""
        if prompt is None:
            advice = "shorten these choices."
            return subject.fit(
                [[_beginning(subject)]], [place], response_tokens=response_tokens, field="choices", advice=advice
            )[0]
        advice = "shorten these prompts or their choices."
        return subject.encode(
            [prompt], [place], response_tokens=response_tokens, verbatim=self.verbatim, advice=advice
        )[0]


class BiasEntropy(Choices):
    """How far a model is from preferring one of two texts that differ in whom they speak of.

    As the paper does with Winogender and CrowS-Pairs: the total log-probabilities of the texts are normalised over the
    texts, and the entropy of that choice is averaged, in bits. 1 bit of two texts is no preference. Rows are
    ``{"choices": [text, text]}`` for whole sentences, which are read as documents of their own, or ``{"prompt",
    "choices"}`` for responses to a prompt; ``condition`` names a group of rows, ``owner`` who wrote them.
    """

    correct = False

    def measure(self, subject: Subject, folder: Path) -> Measures:
        """Entropy of each choice.

        Args:
            subject: the model.
            folder: not needed.

        Returns:
            ``entropy_bits`` of each condition.
        """
        logprobs, _ = self.logprobs(subject)
        return {
            "entropy_bits": by_condition(self.items.records, [choice_entropy(row) for row in logprobs], self.owners)
        }


class MultipleChoice(Choices):
    """Accuracy of choosing the option with the highest mean log-probability a token, as the paper does.

    Rows are ``{"prompt", "choices": [text, ...], "correct": index from 0}``; ``condition`` names a group of rows,
    ``owner`` who wrote them. A choice follows its prompt at once, without an end of text: where the prompt is plain
    text that ends with a word, choices begin with a space.
    """

    correct = True

    def measure(self, subject: Subject, folder: Path) -> Measures:
        """Whether each choice is right.

        Args:
            subject: the model.
            folder: not needed.

        Returns:
            ``accuracy`` of each condition.
        """
        logprobs, tokens = self.logprobs(subject)
        credits = [
            choice_credit(sums, counts, int(record.correct or 0))
            for record, sums, counts in zip(self.items.records, logprobs, tokens, strict=True)
        ]
        return {"accuracy": by_condition(self.items.records, credits, self.owners)}


class Continuations(Protocol):
    """What scorers say about responses to the prompts of a file: toxicity, truthfulness, anything that can be scored.

    Rows are ``{"prompt"}``; ``condition`` names a group of rows, such as those that begin with a request to be
    respectful, ``owner`` who wrote them, and scorers get all other columns.
    """

    def __init__(
        self,
        data: str | list[str],
        scorers: dict[str, Scorer],
        *,
        max_response_tokens: int = 64,
        temperature: float = 1.0,
        long_prompt: Literal["error", "truncate_left"] = "error",
        seed: int = 1,
        batch_rows: int = 256,
    ):
        """Read the data.

        Args:
            data: file, or list of files, of rows with a prompt.
            scorers: name of a measure to what scores the responses: a class of lit_instruct.rewards.
            max_response_tokens: the most tokens that a response may have.
            temperature: of sampling; 0 is greedy.
            long_prompt: what to do with prompts that leave no room for a response: error or truncate_left.
            seed: key of the random streams.
            batch_rows: rows decoded together; changes memory, not responses.
        """
        if not scorers:
            raise ConfigError("Continuations scorers: got none; need one or more, each with a name.")
        self.scorers = scorers
        self.sampling = Sampling(max_response_tokens, temperature, seed, long_prompt, batch_rows)
        self.sampling.check("Continuations ")
        loaded = read_prompts(data)
        columns = [record.columns for record in loaded.records]
        self.asked = Asked(
            [{"prompt": record.prompt, **record.columns} for record in loaded.records],
            loaded.places,
            owners_of(columns),
        )

    def check(self) -> None:
        """Let the scorers look whether they can work.

        Raises:
            ConfigError: one cannot.
        """
        for scorer in self.scorers.values():
            check_scorer(scorer)

    def measure(self, subject: Subject, folder: Path) -> Measures:
        """Sample a response to each prompt and score it.

        Args:
            subject: the model.
            folder: where its responses are kept.

        Returns:
            The mean score of each scorer and condition.
        """
        (sampled,) = sample(subject, self.asked, self.sampling, folder)
        return {
            name: by_condition(
                self.asked.rows, score(scorer.to(subject.model.device), sampled).tolist(), self.asked.owners
            )
            for name, scorer in self.scorers.items()
        }


def by_condition(rows: Sequence[Any], values: Sequence[float], owners: Sequence[Hashable]) -> dict[str, Interval]:
    """Means of the rows of each condition.

    Args:
        rows: records with ``columns``, or rows themselves; their ``condition`` is read.
        values: one a row.
        owners: one a row.

    Returns:
        Condition to mean with interval, in the order in which conditions first occur.
    """
    places: dict[str, list[int]] = defaultdict(list)
    for place, row in enumerate(rows):
        columns = row if isinstance(row, Mapping) else row.columns
        places[str(columns.get("condition") or EVERYTHING)].append(place)
    return {
        condition: owner_interval([values[place] for place in some], [owners[place] for place in some])
        for condition, some in places.items()
    }


def owners_of(columns: Sequence[Mapping[str, Any]], name: str = "owner") -> list[Hashable]:
    """Who wrote each row: the column ``owner``, or, without one, each row is an owner of its own.

    Args:
        columns: of each row.
        name: of the column.

    Returns:
        One owner a row.
    """
    return [str(row[name]) if row.get(name) is not None else ("row", place) for place, row in enumerate(columns)]


def _beginning(subject: Subject) -> int:
    """What stands before a document: the token that begins texts, else the end of the text before it."""
    begins, ends = subject.tokenizer.bos_token_id, subject.tokenizer.eos_token_id
    return int(ends if begins is None else begins)
