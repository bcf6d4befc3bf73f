"""Small tokenizers and files for the tests of this folder; nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %} <{{ m.role }}> {{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %} <assistant>{% endif %}"
)
_SPECIAL = ["<unk>", "<s>", "</s>", "<system>", "<user>", "<assistant>"]
VOCABULARY = {word: number for number, word in enumerate([*_SPECIAL, *(f"w{n}" for n in range(200))])}
EOS = VOCABULARY["</s>"]


def word_tokenizer(*, pad: str | None = None, template: str = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token a word; ``w7`` has id ``VOCABULARY["w7"]``. Without a pad token, end of text pads."""
    core = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # As real ones do, it puts a beginning of text first unless told otherwise; the template has one already.
    core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", VOCABULARY["<s>"])])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token=pad
    )
    tokenizer.chat_template = template
    return tokenizer


def slow_tokenizer() -> ByT5Tokenizer:
    """A tokenizer in plain Python: one token a byte, no files."""
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("{{ bos_token }}", "")
    return tokenizer


def words(*numbers: int) -> str:
    return " ".join(f"w{n}" for n in numbers)


def ids(text: str) -> list[int]:
    return [VOCABULARY[word] for word in text.split()]


def write_jsonl(path: Path, rows: list[Any]) -> str:
    """Write rows as JSON lines; a string is written as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def demonstrations(path: Path, count: int) -> str:
    """Row n has prompt ``wn`` (twice for odd n) and response ``wn``."""
    return write_jsonl(path, [{"prompt": words(*[n] * (1 + n % 2)), "response": words(n)} for n in range(count)])


def trainer_stub(*, world_size: int = 1, rank: int = 0, accumulate: int = 1, limit: int | None = None) -> Any:
    """What a DataModule reads of a Trainer."""
    module = SFTStub()
    module.sample_token_limit = limit
    return SimpleNamespace(
        world_size=world_size, global_rank=rank, accumulate_grad_batches=accumulate, lightning_module=module
    )


class SFTStub:
    sample_token_limit: int | None = None
