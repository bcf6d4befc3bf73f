"""A tokenizer whose tokens are the words of the toy world."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lit_instruct.toyworld import lexicon
from lit_instruct.toyworld.answers import bare_texts
from lit_instruct.toyworld.grammar import SENTENCES, SLOT_WORDS
from lit_instruct.toyworld.tasks import FORMS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

EOS, PAD, UNK = "<eos>", "<pad>", "<unk>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}answer : {{ message['content'] }}" + EOS + " "
    "{% elif message['role'] == 'user' %}user : {{ message['content'] }} "
    "{% else %}{{ message['content'] }} {% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}answer :{% endif %}"
)
"""``user : where does ben live ? answer :``"""


def vocabulary() -> list[str]:
    """All words of the toy world in a fixed order, the special tokens first."""
    words: set[str] = {"user", "answer", "said", ":", ".", "?", ",", "and"}
    texts = [template.text for template in SENTENCES.values()]
    texts += [template.text for _, templates in FORMS.values() for template in templates]
    texts += bare_texts()
    texts += [*lexicon.INSULTS, *lexicon.TAUNTS, *lexicon.OPENINGS, *lexicon.CLOSINGS]
    texts += [*lexicon.GREETINGS, *lexicon.THANKS]
    for text in texts:
        words.update(word for word in text.split() if not word.startswith("{"))
    for slot_words in SLOT_WORDS.values():
        words.update(word for text in slot_words for word in text.split())
    return [EOS, PAD, UNK, *sorted(words)]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, ``<eos>`` at the end of documents and responses, decoding gives the text back.

    The vocabulary is the same in every world: it does not depend on the facts.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = {word: index for index, word in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
        model_input_names=["input_ids", "attention_mask"],
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
