"""Templates and special tokens: what a prompt becomes, and which tokenizers are refused."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lit_instruct.models.tokenizer import load_tokenizer, padding_id
from lit_instruct.types import ConfigError
from tests.unit.models.networks import tiny_model

WORDS = ["<eos>", "<bos>", "<pad>", "<unk>", "User:", "Assistant:", "System:", "x", "w1", "w2", "w3"]
TALK = [{"role": "user", "content": "w1 w2"}]


def make(*, words=WORDS, adds_bos=False, **special):
    special = {"eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>", "pad_token": "<pad>", **special}
    core = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=special["unk_token"])
    )
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_bos:
        bos = special["bos_token"]
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, words.index(bos))]
        )
    kept = {name: token for name, token in special.items() if token is not None}
    return PreTrainedTokenizerFast(tokenizer_object=core, **kept)


def text_of(tokenizer, messages=TALK):
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def words_of(tokenizer, messages=TALK):
    ids = tokenizer(text_of(tokenizer, messages), add_special_tokens=False)["input_ids"]
    return [WORDS[index] for index in ids]


def test_auto_keeps_the_tokenizers_own_template():
    tokenizer = make()
    tokenizer.chat_template = own = "{% for m in messages %}{{ m['content'] }} ?{% endfor %}"
    assert load_tokenizer(tokenizer) is tokenizer
    assert tokenizer.chat_template == own
    assert text_of(tokenizer) == "w1 w2 ?"


def test_auto_is_plain_where_there_is_none():
    assert load_tokenizer(make()).chat_template == load_tokenizer(make(), template="plain").chat_template


def test_plain():
    tokenizer = make()
    tokenizer.chat_template = "something else"
    load_tokenizer(tokenizer, template="plain")
    assert text_of(tokenizer) == "User:\nw1 w2\n\nAssistant:\n"
    talk = [{"role": "system", "content": "w3"}, *TALK, {"role": "assistant", "content": "w3"}, *TALK]
    assert text_of(tokenizer, talk) == "System:\nw3\n\nUser:\nw1 w2\n\nAssistant:\nw3\n\nUser:\nw1 w2\n\nAssistant:\n"
    assert words_of(tokenizer) == ["User:", "w1", "w2", "Assistant:"]


def test_verbatim():
    assert text_of(load_tokenizer(make(), template="verbatim")) == "w1 w2"


def test_a_jinja_file(tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text("<<{{ messages[0]['content'] }}>>{% if add_generation_prompt %} ü{% endif %}", encoding="utf-8")
    assert text_of(load_tokenizer(make(), template=str(path))) == "<<w1 w2>> ü"


@pytest.mark.parametrize("template", ["plain", "verbatim", "auto"])
def test_the_beginning_of_text_is_placed_once_where_the_tokenizer_places_it(template):
    assert words_of(load_tokenizer(make(adds_bos=True), template=template))[:2] in (["<bos>", "User:"], ["<bos>", "w1"])
    assert words_of(load_tokenizer(make(adds_bos=True), template=template)).count("<bos>") == 1
    assert "<bos>" not in words_of(load_tokenizer(make(), template=template))


@pytest.mark.parametrize("adds_bos", [True, False])
def test_an_unknown_word_is_not_mistaken_for_the_beginning_of_text(adds_bos):
    """GPT-2's special tokens are all one and the same, and a small vocabulary may lack any word."""
    one = {"eos_token": "<eos>", "bos_token": "<eos>", "unk_token": "<eos>", "pad_token": None}
    tokenizer = load_tokenizer(make(words=["<eos>", "w1", "w2"], adds_bos=adds_bos, **one), template="verbatim")
    assert text_of(tokenizer) == ("<eos>w1 w2" if adds_bos else "w1 w2")


def test_the_template_survives_a_save(tmp_path):
    load_tokenizer(make(adds_bos=True), template="verbatim").save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert words_of(again) == ["<bos>", "w1", "w2"]
    assert text_of(load_tokenizer(str(tmp_path), template="plain")).startswith("<bos>User:")


def test_padding_id():
    assert padding_id(make()) == WORDS.index("<pad>")
    assert padding_id(make(pad_token=None)) == WORDS.index("<eos>")
    assert padding_id(make(words=["<pad>", "<eos>", "<unk>", "<bos>"])) == 0  # an id of 0 is an id


def test_a_tokenizer_without_an_end_of_text_is_refused():
    with pytest.raises(ConfigError, match=r"has no end-of-text token; .* Set eos_token in its tokenizer_config\.json"):
        load_tokenizer(make(eos_token=None))


@pytest.mark.parametrize("template", ["nowhere.jinja", "Plain", "{{ messages }}", "."])
def test_a_template_that_is_not_there(template):
    with pytest.raises(ConfigError) as error:
        load_tokenizer(make(), template=template)
    assert f"template: got {template!r}, which is no file; need auto, plain, verbatim or the path" in str(error.value)


@pytest.mark.parametrize("source", ["nowhere", "nobody/nothing", "x.gguf", "model"])
def test_no_tokenizer_there(tmp_path, source):
    tiny_model("llama").save_pretrained(tmp_path / "model")  # a model alone
    for place in (source, tmp_path / source):
        with pytest.raises(ConfigError, match="no tokenizer could be loaded from") as error:
            load_tokenizer(place)
        assert "Give a hub name, a folder with tokenizer files" in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_files_of_another_form(tmp_path, name):
    make().save_pretrained(tmp_path)
    (tmp_path / name).write_text("[]")
    with pytest.raises(ConfigError, match=r"no tokenizer could be loaded from .* one of its files has another form"):
        load_tokenizer(tmp_path)


def test_no_checkpoint_there(tmp_path):
    with pytest.raises(ConfigError, match=r"x\.ckpt' does not exist"):
        load_tokenizer(tmp_path / "x.ckpt")


_LOOP = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{% for m in messages %}{{ m['content'] }}", "TemplateSyntaxError in line 1"),
        (b"{{ messages.__class__.__mro__ }}" + _LOOP.encode(), "SecurityError"),
        (b"{{ '{0}'.format() }}" + _LOOP.encode(), "IndexError"),
        (b"{% for i in range(10**9) %}{% endfor %}" + _LOOP.encode(), "OverflowError"),
        (b"{{ raise_exception('no users') }}", "no users"),
        (b"{{ messages[7]['content'] }}", "UndefinedError"),
        (b"{{ 1 / 0 }}", "ZeroDivisionError"),
        (b"User: %s", "makes 'User: %s' of every prompt"),
        (_LOOP.replace("messages", "mesages").encode(), "makes '' of every prompt"),
        (b"\xff\xfe", "need a Jinja file in UTF-8"),
    ],
)
def test_a_template_that_is_none_is_refused(tmp_path, content, message):
    (tmp_path / "mine.jinja").write_bytes(content)
    with pytest.raises(ConfigError, match=r"^template: .* Do: ") as error:
        load_tokenizer(make(), template=str(tmp_path / "mine.jinja"))
    assert message in str(error.value)


def test_a_tokenizer_s_own_template_is_tried_too():
    tokenizer = make()
    tokenizer.chat_template = "User:"
    with pytest.raises(ConfigError, match="the tokenizer's own chat template, which makes 'User:' of every prompt"):
        load_tokenizer(tokenizer)
