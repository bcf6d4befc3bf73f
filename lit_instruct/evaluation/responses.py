"""Sample each model's responses once, write them down as they finish, and go on from there when run again."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from lit_instruct.data.collate import EncodedPrompt, collate_prompts
from lit_instruct.evaluation.subjects import Subject
from lit_instruct.models.generation import stream_responses
from lit_instruct.models.tokenizer import padding_id
from lit_instruct.types import ConfigError, Prompt, PromptBatch, Responses

log = logging.getLogger(__name__)

_BLOCK_ROWS = 32  # responses are written down in blocks of at least so many


class Sampling(NamedTuple):
    """How responses are sampled.

    Attributes:
        max_response_tokens: the most tokens that a response may have.
        temperature: divides the logits; 0 is greedy.
        seed: of the evaluation.
        long_prompt: what to do with prompts that are too long: ``error`` or ``truncate_left``.
        batch_rows: rows decoded together; changes no response.
    """

    max_response_tokens: int
    temperature: float
    seed: int
    long_prompt: Literal["error", "truncate_left"] = "error"
    batch_rows: int = 256

    def check(self, where: str) -> None:
        """Refuse settings that cannot work.

        Args:
            where: whose settings they are, for the error.

        Raises:
            ConfigError: one of them cannot.
        """
        for name, value, least in (
            ("max_response_tokens", self.max_response_tokens, 1),
            ("temperature", self.temperature, 0),
            ("seed", self.seed, 0),
            ("batch_rows", self.batch_rows, 1),
        ):
            if not value >= least:
                raise ConfigError(f"{where}{name}: got {value}; need at least {least}.")
        if self.long_prompt not in ("error", "truncate_left"):
            raise ConfigError(f"{where}long_prompt: got {self.long_prompt!r}; need error or truncate_left.")


class Asked(NamedTuple):
    """P prompts of a data set.

    Attributes:
        rows: ``prompt`` and the row's other columns, for scorers.
        places: where each came from, for errors.
        owners: who wrote each.
    """

    rows: list[dict[str, Any]]
    places: Sequence[str]
    owners: list[Any]

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts alone."""
        return [row["prompt"] for row in self.rows]


class Sampled(NamedTuple):
    """One model's responses to P prompts, in the order of the prompts.

    Attributes:
        prompts: as the model read them, with their rows.
        responses: its responses.
        tokenizer: its tokenizer.
        texts: the responses as text, without special tokens.
    """

    prompts: PromptBatch
    responses: Responses
    tokenizer: PreTrainedTokenizerBase
    texts: list[str]


def sample(subject: Subject, asked: Asked, sampling: Sampling, folder: Path, *, samples: int = 1) -> list[Sampled]:
    """Sample responses, or read those that an earlier run has written down.

    A run that was killed ends with the same responses.

    Args:
        subject: the model.
        asked: the prompts.
        sampling: how.
        folder: ``NAME-DIGEST.jsonl`` is kept here; the digest is that of model, prompts and settings.
        samples: how many responses a prompt.

    Returns:
        ``samples`` sets of one response a prompt.

    Raises:
        DataError: a prompt is too long.
    """
    encoded = subject.encode(
        asked.prompts,
        asked.places,
        response_tokens=sampling.max_response_tokens,
        long_prompt=sampling.long_prompt,
        advice="shorten these prompts, lower max_response_tokens, or set long_prompt to truncate_left.",
    )
    record = ResponseFile(folder, subject, encoded, sampling, stream=subject.stream_seed(sampling.seed))
    for number in range(samples):
        missing = record.missing(number, range(len(encoded)))
        if missing:
            log.info(
                "%s: sampling %d of %d responses (set %d of %d)",
                subject.name,
                len(missing),
                len(encoded),
                number + 1,
                samples,
            )
            record.draw(number, missing)
    pad_id = padding_id(subject.tokenizer)
    prompts = collate_prompts([EncodedPrompt(ids, row) for ids, row in zip(encoded, asked.rows, strict=True)], pad_id)
    return [_set(record, number, prompts, subject.tokenizer) for number in range(samples)]


class ResponseFile:
    """One model's responses to P prompts, a line each, appended as they finish.

    The random stream of a response is keyed by the number of its set and its prompt's row, so it depends on nothing
    that is sampled with it, and what is missing can be drawn later. The first line says what decides the responses.

    Attributes:
        path: the file.
        known: (number, row) to token ids and whether the response ended by itself.
    """

    def __init__(
        self, folder: Path, subject: Subject, prompts: Sequence[list[int]], sampling: Sampling, *, stream: int
    ) -> None:
        """Open the file, and read what it holds; a last line that was cut off by a kill is taken away.

        Args:
            folder: is made if it is not there.
            subject: the model.
            prompts: token ids of each prompt.
            sampling: how.
            stream: seed of the random streams.
        """
        self._subject, self._prompts, self._sampling, self._stream = subject, prompts, sampling, stream
        made_by = {  # in token ids: template, prefix and vocabulary are in the prompts
            "weights": subject.sha256,
            "eos_ids": subject.eos_ids,
            "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
            "stream": stream,
            "max_response_tokens": sampling.max_response_tokens,
            "temperature": sampling.temperature,
        }
        digest = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{subject.name}-{digest[:12]}.jsonl"
        self.known: dict[tuple[int, int], tuple[list[int], bool]] = {}
        if not self.path.is_file() or b"\n" not in (content := self.path.read_bytes()):
            self.path.write_text(json.dumps({"made_by": made_by}) + "\n", encoding="utf-8")
            return
        whole = content[: content.rindex(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))
        for line in whole.splitlines()[1:]:
            found = json.loads(line)
            self.known[found["sample"], found["row"]] = (found["ids"], found["finished"])

    def missing(self, number: int, rows: Iterable[int]) -> list[int]:
        """Rows whose response is still to be drawn.

        Args:
            number: of the set.
            rows: those that shall have one.
        """
        return [row for row in rows if (number, row) not in self.known]

    def draw(self, number: int, rows: Sequence[int]) -> None:
        """Sample responses, and write them down as they finish.

        Args:
            number: of the set.
            rows: of the prompts, at least one; none of them has a response of this set.
        """
        model, pad_id = self._subject.model, padding_id(self._subject.tokenizer)
        blocks = stream_responses(
            model,
            move_prompts(collate_prompts([EncodedPrompt(self._prompts[row]) for row in rows], pad_id), model.device),
            max_tokens=self._sampling.max_response_tokens,
            eos_ids=self._subject.eos_ids,
            pad_id=pad_id,
            temperature=self._sampling.temperature,
            rows=rows,
            seed=self._stream,
            iteration=number,
            batch_rows=self._sampling.batch_rows,
            block_rows=_BLOCK_ROWS,
        )
        for block in blocks:
            self._add(number, [rows[row] for row in block.rows], block.responses)

    def _add(self, number: int, rows: Sequence[int], responses: Responses) -> None:
        lines = []
        for row, ids, mask, finished in zip(rows, *(part.cpu() for part in responses), strict=True):
            found, ended = self.known[number, row] = (ids[mask].tolist(), bool(finished))
            lines.append(json.dumps({"sample": number, "row": row, "ids": found, "finished": ended}) + "\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))


def texts_of_ids(tokenizer: PreTrainedTokenizerBase, ids: Sequence[list[int]]) -> list[str]:
    """Decode responses as scorers do: as written, without special tokens.

    Args:
        tokenizer: of the model.
        ids: of each response.
    """
    return tokenizer.batch_decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def pad_responses(ids: Sequence[list[int]], finished: Sequence[bool], pad_id: int) -> Responses:
    """Pad responses on the right.

    Args:
        ids: of each response.
        finished: whether it ended by itself.
        pad_id: fills the padding.

    Returns:
        The responses, on the CPU.
    """
    lengths_B = torch.tensor([len(row) for row in ids])
    mask_BR = torch.arange(int(lengths_B.max())) < lengths_B[:, None]
    ids_BR = torch.full(mask_BR.shape, pad_id, dtype=torch.int64)
    ids_BR[mask_BR] = torch.tensor([token for row in ids for token in row], dtype=torch.int64)
    return Responses(ids_BR, mask_BR, torch.tensor(list(finished)))


def move_prompts(prompts: PromptBatch, device: torch.device) -> PromptBatch:
    """Move the ids of prompts to where a model is.

    Args:
        prompts: B prompts; their rows stay with them.
        device: the model's.
    """
    return PromptBatch(prompts.prompt_ids_BP.to(device), prompts.prompt_mask_BP.to(device), prompts.rows)


def _set(record: ResponseFile, number: int, prompts: PromptBatch, tokenizer: PreTrainedTokenizerBase) -> Sampled:
    found = [record.known[number, row] for row in range(len(prompts.prompt_ids_BP))]
    ids = [row for row, _ in found]
    responses = pad_responses(ids, [finished for _, finished in found], padding_id(tokenizer))
    return Sampled(prompts, responses, tokenizer, texts_of_ids(tokenizer, ids))
