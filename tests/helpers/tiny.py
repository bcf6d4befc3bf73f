"""A tiny world for tests: one token a word, a Llama of a few thousand parameters, small ragged data files."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from lit_instruct.models.sharding import whole
from lit_instruct.rewards import Scorer
from lit_instruct.types import PromptBatch, Responses

CONTEXT = 32
WORDS = [f"w{number}" for number in range(30)]
_VOCABULARY = {word: number for number, word in enumerate(["<eos>", "<pad>", "<unk>", ":", *WORDS])}
EOS = _VOCABULARY["<eos>"]
TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }} {% endfor %}{% if add_generation_prompt %}:{% endif %}"
)


def ids(text: str) -> list[int]:
    """Token ids of words."""
    return [_VOCABULARY[word] for word in text.split()]


def tiny_tokenizer(*, template: str = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token a word; the prompt ``w1 w2`` becomes ``w1 w2 :``."""
    core = Tokenizer(models.WordLevel(_VOCABULARY, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer


def tiny_llama(**changes: Any) -> dict[str, Any]:
    """A bare configuration, as ``model.base`` takes it."""
    fields = {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True,
        "initializer_range": 0.3,  # outputs that differ from token to token, so that mistakes show
    }
    return fields | changes


def save_tokenizer(folder: Path, *, template: str = TEMPLATE) -> str:
    """A folder with the tokenizer alone."""
    tiny_tokenizer(template=template).save_pretrained(folder)
    return str(folder)


def save_model(folder: Path, *, seed: int = 0, **changes: Any) -> str:
    """A folder with model and tokenizer, as ``save_pretrained`` writes it."""
    fields = tiny_llama(vocab_size=len(_VOCABULARY), eos_token_id=EOS, bos_token_id=None, pad_token_id=1, **changes)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))
    with torch.no_grad():
        model.get_input_embeddings().weight[EOS] *= 3.0  # often likely: some responses end, some run into the limit
    model.save_pretrained(folder)
    return save_tokenizer(folder)


def write_jsonl(path: Path, rows: Iterable[Any]) -> str:
    """One object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def some_words(stream: random.Random, fewest: int, most: int) -> str:
    """A text of ``fewest`` to ``most`` words."""
    return " ".join(stream.choices(WORDS, k=stream.randint(fewest, most)))


def demonstrations(path: Path, rows: int, *, seed: int = 0) -> str:
    """Prompts of 1 to 6 words, responses of 1 to 9."""
    stream = random.Random(seed)
    return write_jsonl(
        path, [{"prompt": some_words(stream, 1, 6), "response": some_words(stream, 1, 9)} for _ in range(rows)]
    )


def comparisons(path: Path, rows: int, *, seed: int = 0) -> str:
    """K from 2 to 5; some ties, and every fifth row nothing but ties."""
    stream = random.Random(seed)
    table = []
    for row in range(rows):
        count = stream.randint(2, 5)
        ranks = [1] * count if row % 5 == 4 else [1, *(stream.randint(1, count) for _ in range(count - 2)), 2]
        responses = [some_words(stream, 1, 7) for _ in range(count)]
        table.append({"prompt": some_words(stream, 1, 6), "responses": responses, "ranks": ranks})
    return write_jsonl(path, table)


def prompts(path: Path, rows: int, *, seed: int = 0) -> str:
    """Prompts of 1 to 6 words."""
    stream = random.Random(seed)
    return write_jsonl(path, [{"prompt": some_words(stream, 1, 6)} for _ in range(rows)])


def texts(path: Path, rows: int, *, seed: int = 0) -> str:
    """Documents of 5 to 20 words."""
    stream = random.Random(seed)
    return write_jsonl(path, [{"text": some_words(stream, 5, 20)} for _ in range(rows)])


def quiet_trainer(**arguments: Any) -> pl.Trainer:
    """A Trainer on the CPU that writes and prints nothing unless told to."""
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": any(
            isinstance(x, pl.callbacks.ModelCheckpoint) for x in arguments.get("callbacks", [])
        ),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(**(defaults | arguments))


def save_stage(module: pl.LightningModule, path: Path) -> str:
    """The checkpoint of a stage that has not trained."""
    trainer = quiet_trainer()
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)
    return str(path)


def sgd(groups: Iterable[Any]) -> torch.optim.Optimizer:
    """Plain gradient descent: a step shows the gradient itself. Each group brings its ``lr``."""
    return torch.optim.SGD(groups, lr=1.0)


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    """(step, value) of one metric, as TensorBoard reads them from a run's event files."""
    events = EventAccumulator(str(folder)).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def weights(network: nn.Module) -> torch.Tensor:
    """All parameters as one copied vector."""
    return torch.cat([whole(parameter.detach()).flatten() for parameter in network.parameters()]).clone()


def gradients(network: nn.Module) -> torch.Tensor:
    """All gradients as one copied vector, zero where there is none."""
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in network.parameters()]
    return torch.cat([part.detach().flatten() for part in parts]).clone()


class Scored(Scorer):
    """Scores by a function of the token ids."""

    def __init__(self, function: Callable[[PromptBatch, Responses], torch.Tensor]):
        super().__init__()
        self.function = function

    def forward(self, prompts: PromptBatch, responses: Responses, *, tokenizer: Any) -> torch.Tensor:
        return self.function(prompts, responses)


class Record(pl.Callback):
    """Calls a function at a hook, of Lightning or of PPO, and keeps what it returns: ``Record(after_iteration=f)``."""

    def __init__(self, **functions: Callable[..., Any]):
        self.seen: dict[str, list[Any]] = {name: [] for name in functions}
        for name, function in functions.items():
            setattr(self, name, self._recorder(name, function))

    def _recorder(self, name: str, function: Callable[..., Any]) -> Callable[..., None]:
        def record(*arguments: Any) -> None:
            self.seen[name].append(function(*arguments))

        return record
