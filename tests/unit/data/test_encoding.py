"""One end of text, one template, one boundary; what does not fit is never cut in the response."""

from __future__ import annotations

import pytest

from lit_instruct.data.encoding import (
    Misfit,
    encode_prompt,
    encode_prompts,
    encode_response,
    encode_responses,
    encode_text,
    encode_texts,
    fit_prompt,
)
from lit_instruct.types import DataError
from tests.unit.data.worlds import EOS, ids, slow_tokenizer, word_tokenizer, words

CHAT = [
    {"role": "system", "content": "w9"},
    {"role": "user", "content": "w1"},
    {"role": "assistant", "content": "w2"},
    {"role": "user", "content": "w3"},
]


def test_a_text_is_one_message_of_the_user() -> None:
    tokenizer = word_tokenizer()
    assert encode_prompt(tokenizer, "w1 w2") == ids("<s> <user> w1 w2 <assistant>")
    assert encode_prompt(tokenizer, [{"role": "user", "content": "w1 w2"}]) == encode_prompt(tokenizer, "w1 w2")


def test_all_turns_of_a_chat_are_in_the_prompt() -> None:
    expected = ids("<s> <system> w9 <user> w1 <assistant> w2 <user> w3 <assistant>")
    assert encode_prompt(word_tokenizer(), CHAT) == expected


@pytest.mark.parametrize("pad", [None, "</s>", "<unk>"])
@pytest.mark.parametrize("text", ["w1 w2", "w1 w2 </s>", "w1 w2 </s> </s>"])
def test_a_response_ends_with_exactly_one_end_of_text(text: str, pad: str | None) -> None:
    assert encode_response(word_tokenizer(pad=pad), text) == [*ids("w1 w2"), EOS]
    assert encode_text(word_tokenizer(pad=pad), text) == [*ids("w1 w2"), EOS]


def test_an_end_of_text_inside_a_response_is_refused() -> None:
    with pytest.raises(DataError, match=r"^f:2: field 'response': got .* token 2 of 4"):
        encode_responses(word_tokenizer(), ["w1", "w1 </s> w2"], ["f:1", "f:2"])


def test_a_template_that_refuses_a_prompt_is_a_data_error() -> None:
    tokenizer = word_tokenizer(
        template="{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m.content }} {% endfor %}"
    )
    with pytest.raises(DataError, match=r"^f:2: field 'prompt': .*no system"):
        encode_prompts(tokenizer, ["w1", CHAT], ["f:1", "f:2"])


def test_a_prompt_without_tokens_is_a_data_error() -> None:
    with pytest.raises(DataError, match=r"^f:1: field 'prompt': got 0 tokens"):
        encode_prompts(word_tokenizer(template="{{ '' }}"), ["w1"], ["f:1"])


def test_many_at_once_are_what_one_by_one_is() -> None:
    tokenizer = word_tokenizer()
    texts = [words(n % 200, (n * 7) % 200) for n in range(2500)]  # more than two blocks
    assert encode_prompts(tokenizer, texts) == [encode_prompt(tokenizer, text) for text in texts]
    assert encode_responses(tokenizer, texts) == [encode_response(tokenizer, text) for text in texts]
    assert list(encode_texts(tokenizer, texts)) == [encode_text(tokenizer, text) for text in texts]
    assert encode_prompts(tokenizer, []) == []


def test_slow_tokenizers_work_too() -> None:
    tokenizer = slow_tokenizer()
    assert not tokenizer.is_fast
    as_bytes = [byte + 3 for byte in b" <user> hi <assistant>"]
    assert encode_prompts(tokenizer, ["hi", "hi"]) == [as_bytes, as_bytes]
    assert encode_response(tokenizer, "hi") == [*(byte + 3 for byte in b"hi"), tokenizer.eos_token_id]
    assert encode_response(tokenizer, "hi</s>") == encode_response(tokenizer, "hi")


@pytest.mark.parametrize("long_prompt", ["error", "drop", "truncate_left"])
@pytest.mark.parametrize("max_tokens", [None, 7, 8])
def test_what_fits_stays(long_prompt: str, max_tokens: int | None) -> None:
    assert fit_prompt([1, 2, 3, 4], 3, max_tokens=max_tokens, long_prompt=long_prompt) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("long_prompt", "response_len", "max_tokens", "expected"),
    [
        ("error", 3, 6, Misfit(4, 3, 6)),
        ("drop", 3, 6, Misfit(4, 3, 6)),
        ("truncate_left", 3, 6, [2, 3, 4]),
        ("truncate_left", 3, 4, [4]),
        ("truncate_left", 3, 3, Misfit(4, 3, 3)),
        ("truncate_left", 9, 3, Misfit(4, 9, 3)),
        ("truncate_left", 0, 2, [3, 4]),
    ],
)
def test_what_does_not_fit(long_prompt: str, response_len: int, max_tokens: int, expected: object) -> None:
    assert fit_prompt([1, 2, 3, 4], response_len, max_tokens=max_tokens, long_prompt=long_prompt) == expected


def test_a_misfit_says_its_lengths() -> None:
    assert str(Misfit(650, 50, 512)) == "got 700 tokens (prompt 650 + response 50); limit 512"
    assert str(Misfit(650, 0, 512)) == "got 650 tokens; limit 512"
