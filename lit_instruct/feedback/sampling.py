"""Responses to rank: K to each prompt, of one or several models and temperatures.

Response k to prompt p is drawn from a random stream of its own, keyed by (seed, k, p): it depends on nothing that was
sampled with it. Every block that has finished is written down, so that a run that was killed goes on behind it and ends
with the same file.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lit_instruct.evaluation.responses import ResponseFile, Sampling, texts_of_ids
from lit_instruct.evaluation.subjects import ModelSource, Subject, load_subject
from lit_instruct.feedback.rows import Columns
from lit_instruct.types import Prompt


class Settings(NamedTuple):
    """How responses are sampled.

    Attributes:
        models: checkpoints of stages, Hugging Face folders, hub names or GGUF files, by name.
        temperatures: each model is sampled at each; 0 is greedy.
        responses: K, to each prompt; models and temperatures take turns.
        max_response_tokens: the most tokens that a response may have.
        seed: of all random streams.
        batch_rows: rows decoded together; changes no response.
    """

    models: Sequence[ModelSource]
    temperatures: Sequence[float]
    responses: int
    max_response_tokens: int
    seed: int
    batch_rows: int = 64


class Asked(NamedTuple):
    """A prompt.

    Attributes:
        prompt: text or messages.
        place: where it came from.
        columns: what else its row holds.
    """

    prompt: Prompt
    place: str
    columns: Columns


class Drawn(NamedTuple):
    """A response and where it came from, which labelers do not see."""

    text: str
    source: dict[str, Any]


def sample(asked: Sequence[Asked], settings: Settings, folder: Path) -> list[list[Drawn]]:
    """Sample K responses to each prompt, or read those that an earlier run has written down.

    Args:
        asked: the prompts.
        settings: how.
        folder: keeps what has been sampled; made if it is not there.

    Returns:
        For each prompt its responses, in an order drawn by the seed.

    Raises:
        ConfigError: a model cannot be loaded.
        DataError: a prompt is too long.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    turns = len(settings.models) * len(settings.temperatures)
    drawn: list[list[Drawn]] = [[] for _ in asked]
    for index, about in enumerate(settings.models):
        subject = load_subject(about, device)
        encoded = subject.encode(
            [one.prompt for one in asked],
            [one.place for one in asked],
            response_tokens=settings.max_response_tokens,
            advice="leave these prompts out, or lower --max_response_tokens.",
        )
        for turn, temperature in enumerate(settings.temperatures, start=index * len(settings.temperatures)):
            mine = [
                [prompt for prompt in range(len(asked)) if (prompt + number) % turns == turn]
                for number in range(settings.responses)
            ]
            for prompt, one in _draw(subject, encoded, settings, temperature, mine, folder):
                drawn[prompt].append(one)
    for number, responses in enumerate(drawn):
        responses.sort(key=lambda one: one.source["sample"])
        random.Random(f"{settings.seed}/{number}").shuffle(responses)
    return drawn


def _draw(
    subject: Subject,
    encoded: Sequence[list[int]],
    settings: Settings,
    temperature: float,
    mine: Sequence[Sequence[int]],
    folder: Path,
) -> Iterator[tuple[int, Drawn]]:
    """Draw those responses whose turn it is: (prompt, response).

    Args:
        subject: the model.
        encoded: token ids of all prompts.
        settings: how.
        temperature: the one of this turn.
        mine: for each response number the prompts that it answers.
        folder: keeps what has been sampled.
    """
    sampling = Sampling(settings.max_response_tokens, temperature, settings.seed, batch_rows=settings.batch_rows)
    record = ResponseFile(folder, subject, encoded, sampling, stream=settings.seed)
    for number, prompts in enumerate(mine):
        if missing := record.missing(number, prompts):
            print(f"{subject.name}, temperature {temperature:g}: sampling {len(missing)} responses", flush=True)
            record.draw(number, missing)
        found = [record.known[number, prompt] for prompt in prompts]
        texts = texts_of_ids(subject.tokenizer, [ids for ids, _ in found])
        for prompt, text, (_, finished) in zip(prompts, texts, found, strict=True):
            source = {
                "model": subject.name,
                "source": subject.about.source,
                "weights_sha256": subject.sha256,
                "temperature": temperature,
                "max_response_tokens": settings.max_response_tokens,
                "seed": settings.seed,
                "sample": number,
                "finished": finished,
            }
            yield prompt, Drawn(text, source)


def by_uncertainty(
    drawn: Sequence[Sequence[Drawn]], score: Callable[[Sequence[int], Sequence[Sequence[str]]], list[list[float]]]
) -> list[int]:
    """Numbers of the prompts, first those on which a reward model is least sure which response is better.

    How sure it is: the mean of |P(one is better) - 1/2| over pairs of different responses, P by the scores' difference.
    Prompts whose responses are all the same text come last.

    Args:
        drawn: responses to each prompt.
        score: scores of the responses to the prompts of these numbers.
    """
    texts = [list(dict.fromkeys(one.text for one in found)) for found in drawn]
    several = [number for number, found in enumerate(texts) if len(found) > 1]
    sure = [math.inf] * len(texts)
    scores = score(several, [texts[number] for number in several]) if several else []
    for number, found in zip(several, scores, strict=True):
        pairs = [abs(math.tanh((one - other) / 2)) / 2 for one, other in combinations(found, 2)]
        sure[number] = sum(pairs) / len(pairs)
    return sorted(range(len(texts)), key=sure.__getitem__)
