from collections import Counter
from itertools import islice

import pytest

from lit_instruct.toyworld import build_tokenizer, write_demonstration, write_documents
from lit_instruct.toyworld.tokenizer import vocabulary


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_special_tokens_are_three_different_ones(tokenizer):
    specials = [tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id]
    assert len(set(specials)) == 3
    assert len(tokenizer) == len(vocabulary()) < 250


def test_everything_written_makes_the_round_trip(tokenizer, world, rng):
    texts = write_documents(world, 300)
    for task in islice(world.tasks("train"), 300):
        texts += [task.prompt, write_demonstration(world, task, rng)]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text.split())
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text


def test_every_word_occurs_in_documents(world):
    seen = Counter(word for text in write_documents(world, 3000) for word in text.split())
    assert [word for word in vocabulary()[3:] if seen[word] < 10] == []


def test_chat_template_is_made_of_known_words(tokenizer):
    messages = [{"role": "user", "content": "where does ben live ?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "user : where does ben live ? answer :"
    assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]


def test_chat_template_ends_an_answer_with_end_of_text(tokenizer):
    turns = [("user", "name two foods ."), ("assistant", "bread and rice ."), ("user", "where does ben live ?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text)["input_ids"]
    assert ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.unk_token_id not in ids


def test_an_unknown_word_is_unk(tokenizer):
    assert tokenizer("elephant")["input_ids"] == [tokenizer.unk_token_id]


def test_saving_and_loading_keeps_everything(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.eos_token == tokenizer.eos_token
    assert loaded.decode(loaded("the fox eats honey .")["input_ids"]) == "the fox eats honey ."
