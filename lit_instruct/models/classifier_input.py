"""How prompt and response become the input of a classifier that has a tokenizer of its own."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

from jinja2 import TemplateError
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_instruct.models.backbone import context_length
from lit_instruct.types import ConfigError, Message, Prompt

log = logging.getLogger(__name__)

_UNLIMITED = 1_000_000  # tokenizers without a limit say so by a number far beyond


class ClassifierInput(NamedTuple):
    """One prompt with its response as token ids; ``types`` tells the two apart for models that want that."""

    ids: list[int]
    types: list[int] | None


class _Tokens(NamedTuple):
    """A tokenised row, nothing cut yet.

    Attributes:
        ids: all tokens.
        types: token types, if the model takes them.
        prompt: places of tokens that belong to the prompt and may be cut.
        response: places of tokens that belong to the response's own text.
    """

    ids: list[int]
    types: list[int] | None
    prompt: list[int]
    response: list[int]


class ClassifierReader:
    """Turns prompts and responses into a classifier's input."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        form: str,
        separator: str,
        max_length: int | None,
        cut_responses: bool,
    ):
        """Settle form and length.

        Args:
            model: the classifier.
            tokenizer: its own.
            form: ``auto``, ``chat``, ``pair``, ``joined`` or ``response``.
            separator: between prompt and response where they are joined.
            max_length: most tokens; None: as many as model and tokenizer allow.
            cut_responses: a response that alone is too long loses its end; else it is an error.

        Raises:
            ConfigError: the form does not suit the tokenizer, or the model takes less than ``max_length``.
        """
        self.tokenizer = tokenizer
        self.separator = separator
        self.cut_responses = cut_responses
        self._told = False
        self.form = _settled_form(form, tokenizer)
        # A GPT-2 adds the embedding of token 0 where types are given: only for those that have embeddings of types.
        self.typed = (getattr(model.config, "type_vocab_size", None) or 0) > 1
        limit = _length_limit(model, tokenizer)
        if max_length is not None and limit is not None and max_length > limit:
            raise ConfigError(f"ClassifierScorer max_length: got {max_length}; the model takes at most {limit} tokens.")
        self.max_length = limit if max_length is None else max_length

    def encode(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[ClassifierInput]:
        """Encode rows; a row that is too long loses the beginning of its prompt.

        Args:
            prompts: texts or chat messages.
            responses: texts.

        Returns:
            Token ids, and types where the model wants them.

        Raises:
            ConfigError: the template refuses a prompt, or a response is too long.
        """
        encode = self._chats if self.form == "chat" else self._pairs if self.form == "pair" else self._texts
        return [self._fit(tokens) for tokens in encode(prompts, responses)]

    def _pairs(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[_Tokens]:
        texts = [as_plain_text(prompt) for prompt in prompts]
        encoded: Any = self.tokenizer(texts, list(responses), return_token_type_ids=self.typed, verbose=False)
        rows = []
        for row, ids in enumerate(encoded["input_ids"]):
            whose = encoded.sequence_ids(row)
            rows.append(
                _Tokens(
                    ids,
                    encoded["token_type_ids"][row] if self.typed else None,
                    [place for place, part in enumerate(whose) if part == 0],
                    [place for place, part in enumerate(whose) if part == 1],
                )
            )
        return rows

    def _texts(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[_Tokens]:
        before = ["" if self.form == "response" else as_plain_text(prompt) + self.separator for prompt in prompts]
        texts = [prompt + response for prompt, response in zip(before, responses, strict=True)]
        spans = [(len(prompt), len(text)) for prompt, text in zip(before, texts, strict=True)]
        return self._tokenised(texts, [len(prompt) for prompt in before], spans, special=True)

    def _chats(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[_Tokens]:
        texts, ends, spans = [], [], []
        for prompt, response in zip(prompts, responses, strict=True):
            turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            text = self._rendered([*turns, {"role": "assistant", "content": response}])
            # What follows the prompt's turns (the head of the response's turn, too) is never cut.
            end = _common_length(text, self._rendered(turns))
            start = text.find(response.strip(), end)  # some templates strip; those that change more: up to the end
            texts.append(text)
            ends.append(end)
            spans.append((end, len(text)) if start < 0 else (start, start + len(response.strip())))
        return self._tokenised(texts, ends, spans, special=False)  # the template brings the special tokens

    def _rendered(self, turns: list[Message]) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(turns, tokenize=False))
        except TemplateError as error:
            raise ConfigError(
                f"ClassifierScorer form: the classifier's chat template refuses a conversation ({error}). Do: choose "
                "the form pair, joined or response."
            ) from error

    def _tokenised(
        self, texts: list[str], prompt_ends: list[int], spans: list[tuple[int, int]], *, special: bool
    ) -> list[_Tokens]:
        """Tokenise; ``prompt_ends`` and ``spans`` (of the responses) count characters."""
        encoded: Any = self.tokenizer(
            texts,
            add_special_tokens=special,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            return_token_type_ids=self.typed,
            verbose=False,
        )
        rows = []
        for row, ids in enumerate(encoded["input_ids"]):
            places = [
                (place, first, last)
                for place, (first, last) in enumerate(encoded["offset_mapping"][row])
                if not encoded["special_tokens_mask"][row][place]
            ]
            if not special and ids and ids[0] == self.tokenizer.bos_token_id:
                places = places[1:]
            begin, end = spans[row]
            rows.append(
                _Tokens(
                    ids,
                    encoded["token_type_ids"][row] if self.typed else None,
                    [place for place, _, last in places if last <= prompt_ends[row]],
                    [place for place, first, last in places if last > begin and first < end],
                )
            )
        return rows

    def _fit(self, tokens: _Tokens) -> ClassifierInput:
        if not tokens.ids:  # an empty response alone, and a tokenizer that adds nothing: a row needs one token
            special = (self.tokenizer.eos_token_id, self.tokenizer.bos_token_id, self.tokenizer.pad_token_id, 0)
            return ClassifierInput([next(token for token in special if token is not None)], [0] if self.typed else None)
        excess = 0 if self.max_length is None else max(len(tokens.ids) - self.max_length, 0)
        dropped = set(tokens.prompt[:excess])
        if len(dropped) < excess:
            more = excess - len(dropped)
            if not self.cut_responses or more > len(tokens.response):
                raise ConfigError(
                    f"ClassifierScorer max_length: a response needs {len(tokens.ids) - len(dropped)} tokens of the "
                    f"classifier even without its prompt; need at most {self.max_length}. Do: lower the policy's "
                    "max_response_tokens, raise max_length, or let such responses lose their end (long_response: cut)."
                )
            if not self._told:
                log.warning(
                    "responses are longer than the classifier reads (max_length %s); they lose their end",
                    self.max_length,
                )
                self._told = True
            dropped |= set(tokens.response[-more:])
        kept = [place for place in range(len(tokens.ids)) if place not in dropped]
        types = None if tokens.types is None else [tokens.types[place] for place in kept]
        return ClassifierInput([tokens.ids[place] for place in kept], types)


def _common_length(one: str, other: str) -> int:
    """How many characters two texts have in common at their beginning."""
    for place, (mine, theirs) in enumerate(zip(one, other, strict=False)):
        if mine != theirs:
            return place
    return min(len(one), len(other))


def as_plain_text(prompt: Prompt) -> str:
    """A prompt as one text: chat messages are joined by blank lines.

    Args:
        prompt: text or chat messages.

    Returns:
        The text.
    """
    return prompt if isinstance(prompt, str) else "\n\n".join(message["content"] for message in prompt)


def _settled_form(form: str, tokenizer: PreTrainedTokenizerBase) -> str:
    if form == "auto":
        return "chat" if tokenizer.chat_template else "pair" if tokenizer.sep_token_id is not None else "joined"
    if form == "chat" and not tokenizer.chat_template:
        raise ConfigError("ClassifierScorer form: got 'chat', and the classifier's tokenizer has no chat template.")
    if form == "pair" and tokenizer.sep_token_id is None:
        raise ConfigError(
            "ClassifierScorer form: got 'pair', and the classifier's tokenizer has no separator token. Do: use joined."
        )
    return form


def _length_limit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    limits = [tokenizer.model_max_length] if tokenizer.model_max_length < _UNLIMITED else []
    context = context_length(model.config.get_text_config())
    if context is not None:
        # RoBERTa and its kin count positions from the padding's on, so that the last ones are never reached.
        offsets = [
            module.padding_idx + 1
            for name, module in model.named_modules()
            if name.endswith("position_embeddings")
            and isinstance(module, nn.Embedding)
            and module.padding_idx is not None
        ]
        limits.append(context - max(offsets, default=0))
    return min(limits, default=None)
