"""Responses to rank: K to each prompt, of one or several models and temperatures.

Response k to prompt p is drawn from a random stream of its own, keyed by (seed, k, p): it depends on nothing that was
sampled with it. Every block that has finished is written down, so that a run that was killed goes on behind it and ends
with the same file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_instruct.data.bad_rows import data_error
from lit_instruct.data.collate import EncodedPrompt, collate_prompts
from lit_instruct.data.encoding import encode_prompts, fit_prompt
from lit_instruct.feedback.rows import Columns
from lit_instruct.models.adapters import digest_of
from lit_instruct.models.backbone import context_length, load_language_model
from lit_instruct.models.generation import stream_responses
from lit_instruct.models.handover import is_stage_checkpoint
from lit_instruct.models.sampling import Finished
from lit_instruct.models.tokenizer import load_tokenizer, padding_id
from lit_instruct.types import Prompt

_BLOCK_ROWS = 16  # responses are written down in blocks of at least so many


class Settings(NamedTuple):
    """How responses are sampled.

    Attributes:
        models: name to checkpoint of a stage, Hugging Face folder, hub name or GGUF file.
        temperatures: each model is sampled at each; 0 is greedy.
        responses: K, to each prompt; models and temperatures take turns.
        max_response_tokens: the most tokens that a response may have.
        seed: of all random streams.
        batch_rows: rows decoded together; changes no response.
    """

    models: Mapping[str, str]
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
    drawn: list[list[Drawn]] = [[] for _ in asked]
    for index, (name, source) in enumerate(settings.models.items()):
        with_model = _Sampler(name, source, settings)
        encoded = with_model.encode(asked)
        for which, temperature in enumerate(settings.temperatures):
            turn = index * len(settings.temperatures) + which
            for prompt, one in with_model.draw(encoded, temperature, turn, folder):
                drawn[prompt].append(one)
    for number, responses in enumerate(drawn):
        responses.sort(key=lambda one: one.source["sample"])
        random.Random(f"{settings.seed}/{number}").shuffle(responses)
    return drawn


class _Sampler:
    """One model."""

    def __init__(self, name: str, source: str, settings: Settings) -> None:
        self.name, self.source, self.settings = name, source, settings
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load_language_model(source).eval().requires_grad_(False).to(self.device)
        self.tokenizer = load_tokenizer(source)
        self.weights = digest_of(self.model)
        self.eos_ids = _eos_ids(self.model, self.tokenizer, source)

    def encode(self, asked: Sequence[Asked]) -> list[list[int]]:
        """Token ids of the prompts; all must leave room for a response."""
        encoded = encode_prompts(self.tokenizer, [one.prompt for one in asked], [one.place for one in asked])
        context, room = context_length(self.model.config), self.settings.max_response_tokens
        fitted = [fit_prompt(ids, room, max_tokens=context, long_prompt="error") for ids in encoded]
        misfits = [
            f"{one.place}: field 'prompt': {fit}"
            for one, fit in zip(asked, fitted, strict=True)
            if not isinstance(fit, list)
        ]
        if misfits:
            raise data_error(
                f"{len(misfits)} prompts leave {self.name!r} no room for a response in its {context} tokens:",
                misfits,
                "leave these prompts out, or lower --max_response_tokens.",
            )
        return encoded

    def draw(
        self, encoded: Sequence[list[int]], temperature: float, turn: int, folder: Path
    ) -> Iterator[tuple[int, Drawn]]:
        """Draw those responses whose turn it is: (prompt, response)."""
        turns = len(self.settings.models) * len(self.settings.temperatures)
        made_by = {
            "model": self.name,
            "weights": self.weights,
            "eos_ids": self.eos_ids,
            "prompts": hashlib.sha256(json.dumps(encoded).encode()).hexdigest(),
            "max_response_tokens": self.settings.max_response_tokens,
            "temperature": temperature,
            "seed": self.settings.seed,
        }
        kept = _Kept(folder, self.name, made_by)
        for number in range(self.settings.responses):
            mine = [prompt for prompt in range(len(encoded)) if (prompt + number) % turns == turn]
            missing = [prompt for prompt in mine if (number, prompt) not in kept.known]
            for block in self._blocks(encoded, missing, temperature, number):
                rows = [missing[row] for row in block.rows]
                ids = [row[mask].tolist() for row, mask in zip(*block.responses[:2], strict=True)]
                texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                kept.add(number, rows, texts, block.responses.finished_B.tolist())
            for prompt in mine:
                yield prompt, self._drawn(*kept.known[number, prompt], number, temperature)

    def _blocks(
        self, encoded: Sequence[list[int]], rows: Sequence[int], temperature: float, number: int
    ) -> Iterator[Finished]:
        if not rows:
            return
        print(f"{self.name}, temperature {temperature:g}: sampling {len(rows)} responses", flush=True)
        pad_id = padding_id(self.tokenizer)
        prompts = collate_prompts([EncodedPrompt(encoded[row]) for row in rows], pad_id)
        yield from stream_responses(
            self.model,
            prompts._replace(
                prompt_ids_BP=prompts.prompt_ids_BP.to(self.device),
                prompt_mask_BP=prompts.prompt_mask_BP.to(self.device),
            ),
            max_tokens=self.settings.max_response_tokens,
            eos_ids=self.eos_ids,
            pad_id=pad_id,
            temperature=temperature,
            rows=rows,
            seed=self.settings.seed,
            iteration=number,
            batch_rows=self.settings.batch_rows,
            block_rows=_BLOCK_ROWS,
        )

    def _drawn(self, text: str, finished: bool, number: int, temperature: float) -> Drawn:
        source = {
            "model": self.name,
            "source": self.source,
            "weights_sha256": self.weights,
            "temperature": temperature,
            "max_response_tokens": self.settings.max_response_tokens,
            "seed": self.settings.seed,
            "sample": number,
            "finished": finished,
        }
        return Drawn(text, source)


def _eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str) -> list[int]:
    """Tokens that end a response; what a stage has trained ends with the tokenizer's alone."""
    found = {int(tokenizer.eos_token_id)}
    if not is_stage_checkpoint(source) and model.generation_config is not None:
        configured = model.generation_config.eos_token_id
        found.update(configured if isinstance(configured, list) else [] if configured is None else [configured])
    return sorted(found)


class _Kept:
    """Responses of one model at one temperature, a line each, appended as they finish.

    ``known`` maps (sample, prompt) to the text and whether the response ended by itself.
    """

    def __init__(self, folder: Path, name: str, made_by: Mapping[str, Any]) -> None:
        digest = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{name}-{digest[:16]}.jsonl"
        self.known: dict[tuple[int, int], tuple[str, bool]] = {}
        if not self.path.is_file():
            return
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))  # a kill has cut off the last line
        for line in whole.splitlines():
            row = json.loads(line)
            self.known[row["sample"], row["prompt"]] = (row["text"], row["finished"])

    def add(self, sample: int, prompts: Sequence[int], texts: Sequence[str], finished: Sequence[bool]) -> None:
        """Write down responses."""
        lines = []
        for prompt, text, ended in zip(prompts, texts, finished, strict=True):
            self.known[sample, prompt] = (text, ended)
            lines.append(json.dumps({"sample": sample, "prompt": prompt, "text": text, "finished": ended}) + "\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))


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
