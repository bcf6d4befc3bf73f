"""The models that are evaluated: stage checkpoints, Hugging Face folders, hub names, GGUF files."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_instruct.data.bad_rows import data_error
from lit_instruct.data.encoding import encode_prompts, fit_prompt
from lit_instruct.models.adapters import digest_of
from lit_instruct.models.backbone import context_length, load_language_model
from lit_instruct.models.handover import is_stage_checkpoint
from lit_instruct.models.tokenizer import load_tokenizer
from lit_instruct.rewards.base import shortened
from lit_instruct.types import ConfigError, Prompt


@dataclass(frozen=True)
class ModelSource:
    """A model to evaluate.

    Attributes:
        name: what the results call it; its responses are drawn from random streams of that name.
        source: checkpoint of a stage, Hugging Face folder, hub name or GGUF file.
        template: how prompts become text: auto (its own chat template, else plain), plain, verbatim, or a Jinja file.
        ema: take the averaged weights of a checkpoint.
        prefix: text before each prompt, such as a few examples of prompts and responses.
    """

    name: str
    source: str
    template: str = "auto"
    ema: bool = False
    prefix: str = ""

    def __post_init__(self) -> None:
        """Refuse a name that cannot be that of a file."""
        if (
            not self.name
            or self.name.startswith(".")
            or not all(sign.isalnum() or sign in "-_.+" for sign in self.name)
        ):
            raise ConfigError(
                f"models: got the name {self.name!r}; need letters, digits and - _ . + in the NAME of NAME=SOURCE, "
                "since files are called so."
            )


def read_sources(models: Sequence[str | ModelSource]) -> list[ModelSource]:
    """Read the models that the command line or a configuration names.

    Args:
        models: ``NAME=SOURCE``, with defaults for all else, or the model as it is.

    Returns:
        The models, at least one, each of another name.

    Raises:
        ConfigError: one is not of that form, a name stands there twice, or there is none.
    """
    sources = [_read_source(model) if isinstance(model, str) else model for model in models]
    if not sources:
        raise ConfigError("models: got none; need one or more. Do: give NAME=SOURCE for each.")
    names = [source.name for source in sources]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ConfigError(f"models: got the name {shortened(twice[0])} twice; need a name of its own for each model.")
    return sources


def _read_source(text: str) -> ModelSource:
    name, equals, source = text.partition("=")
    if not (name and equals and source):
        raise ConfigError(
            f"models: got {text!r}; need NAME=SOURCE, for example sft=runs/sft/last.ckpt. Do: give each model a name."
        )
    return ModelSource(name, source)


@dataclass(frozen=True)
class Subject:
    """A loaded model.

    Attributes:
        about: where it came from.
        model: frozen, in eval mode and fp32.
        tokenizer: with its template.
        sha256: of its weights.
        eos_ids: tokens that end a response.
    """

    about: ModelSource
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sha256: str
    eos_ids: tuple[int, ...]

    @property
    def name(self) -> str:
        """What the results call it."""
        return self.about.name

    def stream_seed(self, seed: int) -> int:
        """Key of its random streams.

        Models draw from streams of their own: with shared ones, models that hardly differ would write the same
        responses, and all of them would be ties.

        Args:
            seed: of the evaluation.
        """
        return int.from_bytes(hashlib.blake2b(f"{seed}/{self.name}".encode(), digest_size=8).digest(), "little")

    def encode(
        self,
        prompts: Sequence[Prompt],
        places: Sequence[str],
        *,
        response_tokens: int,
        long_prompt: Literal["error", "truncate_left"] = "error",
        verbatim: bool = False,
        advice: str = "shorten these prompts.",
    ) -> list[list[int]]:
        """Encode prompts as this model reads them.

        Args:
            prompts: texts or chat messages.
            places: where each came from, for errors.
            response_tokens: room to leave in the context.
            long_prompt: ``error``, or ``truncate_left`` to cut the beginning of what is too long.
            verbatim: as plain text, whatever the template.
            advice: what to do where prompts are too long.

        Returns:
            Token ids.

        Raises:
            DataError: a prompt is too long, or the template refuses it.
        """
        tokenizer = self.verbatim_tokenizer() if verbatim else self.tokenizer
        encoded = encode_prompts(tokenizer, [_with_prefix(prompt, self.about.prefix) for prompt in prompts], places)
        return self.fit(
            encoded, places, response_tokens=response_tokens, long_prompt=long_prompt, field="prompt", advice=advice
        )

    def fit(
        self,
        encoded: Sequence[list[int]],
        places: Sequence[str],
        *,
        response_tokens: int,
        long_prompt: Literal["error", "truncate_left"] = "error",
        field: str,
        advice: str,
    ) -> list[list[int]]:
        """Make what a model reads, with the response behind it, fit its context.

        Args:
            encoded: token ids.
            places: where each came from, for errors.
            response_tokens: room to leave.
            long_prompt: ``error``, or ``truncate_left`` to cut the beginning of what is too long.
            field: of the row that is too long, for errors.
            advice: what to do then.

        Returns:
            Token ids.

        Raises:
            DataError: some are too long.
        """
        context = context_length(self.model.config)
        fitted = [fit_prompt(ids, response_tokens, max_tokens=context, long_prompt=long_prompt) for ids in encoded]
        misfits = [
            f"{place}: field {field!r}: {ids}"
            for place, ids in zip(places, fitted, strict=True)
            if type(ids) is not list
        ]
        if misfits:
            raise data_error(
                f"{len(misfits)} of {len(fitted)} rows leave the model {self.name!r} too little room in its context of "
                f"{context} tokens:",
                misfits,
                advice,
            )
        return [ids for ids in fitted if isinstance(ids, list)]

    def verbatim_tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer, with a template that adds nothing to a prompt."""
        return load_tokenizer(copy.deepcopy(self.tokenizer), template="verbatim")


def load_subject(about: ModelSource, device: torch.device) -> Subject:
    """Load a model and its tokenizer.

    Args:
        about: which.
        device: where it shall lie.

    Returns:
        The subject.

    Raises:
        ConfigError: it cannot be loaded.
    """
    model = load_language_model(about.source, ema=about.ema).eval().requires_grad_(False)
    tokenizer = load_tokenizer(about.source, template=about.template)
    eos_ids = {int(tokenizer.eos_token_id)}
    if not is_stage_checkpoint(about.source):  # what a stage has trained ends with the tokenizer's alone
        configured = model.generation_config.eos_token_id if model.generation_config is not None else None
        eos_ids.update(configured if isinstance(configured, list) else [] if configured is None else [configured])
    return Subject(about, model.to(device), tokenizer, digest_of(model), tuple(sorted(eos_ids)))


def _with_prefix(prompt: Prompt, prefix: str) -> Prompt:
    """Put the prefix before a prompt; in a conversation, before what the user says first."""
    if not prefix:
        return prompt
    if isinstance(prompt, str):
        return prefix + prompt
    first = next(index for index, message in enumerate(prompt) if message["role"] == "user")
    turn = {**prompt[first], "content": prefix + prompt[first]["content"]}
    return [*prompt[:first], turn, *prompt[first + 1 :]]
