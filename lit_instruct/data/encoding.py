"""Text to token ids: the one place where prompts, responses and documents are tokenised.

Prompt and response are tokenised apart and joined by ids, so that the boundary between them is the same wherever
they meet: when a response is imitated, when it is scored and when it is sampled. A prompt goes through the
tokenizer's chat template, which carries the special tokens; a response and a document end with one end of text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lit_instruct.data.bad_rows import Flaw
from lit_instruct.types import DataError, Prompt

Tokenizer: TypeAlias = PreTrainedTokenizerBase
LongPrompt = Literal["error", "drop", "truncate_left"]

_BLOCK = 1024
"""Texts tokenised in one call: enough to keep a fast tokenizer busy, few enough to keep memory flat."""

_TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
"""A template is a program: it refuses messages with an error of its own, or stumbles over them like any program."""


class Misfit(NamedTuple):
    """Why a sample does not fit: its lengths in tokens."""

    prompt_len: int
    response_len: int
    max_tokens: int

    def __str__(self) -> str:
        total = self.prompt_len + self.response_len
        parts = f" (prompt {self.prompt_len} + response {self.response_len})" if self.response_len else ""
        return f"got {total} tokens{parts}; limit {self.max_tokens}"


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """Encode one prompt: through the chat template, up to where the response begins."""
    return encode_prompts(tokenizer, [prompt])[0]


def encode_prompts(tokenizer: Tokenizer, prompts: Sequence[Prompt], places: Sequence[str] = ()) -> list[list[int]]:
    """Encode prompts; a plain text is one message of the user.

    Args:
        tokenizer: one with a ``chat_template``.
        prompts: texts or chat messages.
        places: where each prompt came from, for errors.

    Raises:
        DataError: a prompt has a flaw that ``try_encode_prompts`` names.
    """
    advice = "change such prompts, or choose another template (template: plain takes any)."
    return _without_flaws(try_encode_prompts(tokenizer, prompts), places, advice)


def try_encode_prompts(tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> list[list[int] | Flaw]:
    """Encode the prompts that can be, and say of each other one why not.

    Args:
        tokenizer: one with a ``chat_template``.
        prompts: texts or chat messages.

    Returns:
        For each prompt its ids, or its flaw: the template refuses it (some take no system message, or want the roles
        to alternate), or makes nothing of it.
    """
    texts = [_through_template(tokenizer, prompt) for prompt in prompts]
    encoded = iter(_tokenise(tokenizer, [text for text in texts if isinstance(text, str)]))
    results: list[list[int] | Flaw] = []
    for text in texts:
        ids = next(encoded) if isinstance(text, str) else text
        results.append(ids or Flaw("prompt", "got 0 tokens; need at least one, from template and tokenizer"))
    return results


def _through_template(tokenizer: Tokenizer, prompt: Prompt) -> str | Flaw:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    try:
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    except _TEMPLATE_ERRORS as error:
        return Flaw("prompt", f"the chat template refuses these messages ({error}); need others, or another template")


def encode_response(tokenizer: Tokenizer, response: str) -> list[int]:
    """Encode one response, ended by exactly one end of text."""
    return encode_responses(tokenizer, [response])[0]


def encode_responses(tokenizer: Tokenizer, responses: Sequence[str], places: Sequence[str] = ()) -> list[list[int]]:
    """Encode responses, each ended by exactly one end of text, also where the text already brings some.

    Args:
        tokenizer: one with an end-of-text token.
        responses: texts.
        places: where each response came from, for errors.

    Raises:
        DataError: a response has a flaw that ``try_encode_responses`` names.
    """
    return _without_flaws(try_encode_responses(tokenizer, responses), places, "take it out of the text.")


def try_encode_responses(tokenizer: Tokenizer, responses: Sequence[str]) -> list[list[int] | Flaw]:
    """Encode the responses that can be, and say of each other one why not.

    Args:
        tokenizer: one with an end-of-text token.
        responses: texts.

    Returns:
        For each response its ids with one end of text, or its flaw: an end of text stands inside it, and what follows
        could never be sampled.
    """
    results: list[list[int] | Flaw] = []
    for ids in _tokenise(tokenizer, responses):
        ids = _end(ids, tokenizer.eos_token_id)
        inside = tokenizer.eos_token_id in ids[:-1]
        results.append(_end_inside(tokenizer, ids) if inside else ids)
    return results


def _end_inside(tokenizer: Tokenizer, ids: list[int]) -> Flaw:
    place = ids.index(tokenizer.eos_token_id) + 1
    return Flaw(
        "response",
        f"got the end-of-text token {tokenizer.eos_token!r} as token {place} of {len(ids)}; need it at the end only",
    )


def _without_flaws(results: Sequence[list[int] | Flaw], places: Sequence[str], advice: str) -> list[list[int]]:
    for index, result in enumerate(results):
        if isinstance(result, Flaw):
            place = f"{places[index]}: " if places else ""
            raise DataError(f"{place}{result}.\nDo: {advice}")
    return [result for result in results if not isinstance(result, Flaw)]


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encode one document, ended by exactly one end of text."""
    return next(iter(encode_texts(tokenizer, [text])))


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[list[int]]:
    """Encode documents one block after the other, each ended by exactly one end of text."""
    for start in range(0, len(texts), _BLOCK):
        for ids in _tokenise(tokenizer, texts[start : start + _BLOCK]):
            yield _end(ids, tokenizer.eos_token_id)


def fit_prompt(
    prompt_ids: list[int], response_len: int, *, max_tokens: int | None, long_prompt: LongPrompt
) -> list[int] | Misfit:
    """Make prompt + response fit; the response is never cut.

    Args:
        prompt_ids: the prompt.
        response_len: tokens of the (longest) response that follows it; 0 where responses are sampled later.
        max_tokens: how many tokens both may have together; None: no limit.
        long_prompt: ``truncate_left`` takes tokens from the beginning of the prompt, and leaves at least one;
            otherwise nothing is cut.

    Returns:
        The prompt that fits, or the lengths that do not.
    """
    length = len(prompt_ids) + response_len
    if max_tokens is None or length <= max_tokens:
        return prompt_ids
    room = max_tokens - response_len
    if long_prompt == "truncate_left" and room >= 1:
        return prompt_ids[-room:]
    return Misfit(len(prompt_ids), response_len, max_tokens)


def _tokenise(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Tokenise without special tokens, many texts a call: fast tokenizers then work in parallel."""
    encoded: list[list[int]] = []
    for start in range(0, len(texts), _BLOCK):
        block: Any = tokenizer(
            list(texts[start : start + _BLOCK]),
            add_special_tokens=False,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            verbose=False,
        )
        encoded += block["input_ids"]
    return encoded


def _end(ids: list[int], eos_id: int) -> list[int]:
    end = len(ids)
    while end and ids[end - 1] == eos_id:
        end -= 1
    return [*ids[:end], eos_id]
