"""Models with random weights, and data of random words: what both sides of a race read. Token counts are exact.

The peer gets the very batches that our own data module makes, in its order, as token ids.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from lit_instruct import ComparisonDataModule, DemonstrationDataModule, PromptDataModule
from scripts.benchmark.cases import EOS, PAD, SEED, Case, llama

NEVER = 1e-12


def tokenizer(size: int) -> PreTrainedTokenizerFast:
    """One token a word: end of text, padding, and words ``w2``, ``w3``, ... up to ``size`` tokens."""
    vocabulary = {"<eos>": EOS, "<pad>": PAD, **{f"w{number}": number for number in range(2, size)}}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>", padding_side="left")


def language_model(config: dict[str, Any], *, end_probability: float | None = None) -> PreTrainedModel:
    """A model with random weights in fp32, the same ones every time.

    Args:
        config: fields of its configuration, with ``model_type``.
        end_probability: how probable the end of text is at every step, whatever the text; None: as it comes.
    """
    torch.manual_seed(SEED)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    if end_probability is not None:
        set_end_probability(made, end_probability)
    return made


@torch.no_grad()
def set_end_probability(model: PreTrainedModel, probability: float) -> None:
    """Change the weights so that the end of text has about this probability after any text.

    All embeddings get one vector in common, which shows in every last hidden state; the end of text's row of the
    unembedding then answers to it. So lengths are geometric for whoever samples from the model, without any option.

    Args:
        model: a decoder with random weights; changed in place.
        probability: of the end of text; ``NEVER``: no response ends by itself.
    """
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    shared = torch.randn(embedding.shape[1])
    embedding += 3.0 * embedding.norm(dim=1).mean() * shared / shared.norm()
    seen: list[Tensor] = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    was_training = model.training
    logits = model.eval()(torch.randint(2, len(head), (8, 64))).logits.flatten(0, 1).double()
    model.train(was_training)
    handle.remove()
    hidden = seen[0].flatten(0, 1).double()
    direction = hidden.mean(dim=0) / hidden.mean(dim=0).square().sum()
    # Padding too: nobody should sample it, and the peer takes it for the end of a response.
    for token, wanted in ((PAD, NEVER), (EOS, probability)):
        strength = _strength(logits, token, hidden @ direction, wanted)
        head[token] += (strength * direction).to(head)
        logits[:, token] += strength * (hidden @ direction)


def _strength(logits: Tensor, token: int, along: Tensor, probability: float) -> float:
    """How much of ``along`` [N] a token's logits must gain for that mean probability; logits ``[N, V]``, fp64."""
    own, others = logits[:, token], logits.clone()
    others[:, token] = -torch.inf
    others = others.logsumexp(dim=1)
    low, high = -1000.0, 1000.0
    for _ in range(100):
        middle = (low + high) / 2
        found = torch.sigmoid(own + middle * along - others).mean()
        low, high = (middle, high) if found < probability else (low, middle)
    return high


def write_case(case: Case, folder: Path, *, pairs: int) -> list[float]:
    """Write the model, our data (``rows.jsonl``) and the peer's (``peer.json``: one list of rows a step).

    Args:
        case: what is compared.
        folder: where to.
        pairs: turns of the race.

    Returns:
        What each step holds: tokens, comparisons or episodes.
    """
    transformers_logging.disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    steps = case.warmup + pairs * case.steps
    config = llama(case.size)
    words = tokenizer(config["vocab_size"])
    words.save_pretrained(folder / "model")
    end = None
    if case.stage == "ppo":
        mean = case.data["mean_response"]
        end = NEVER if mean is None else 1.0 / mean
    language_model(config, end_probability=end).save_pretrained(folder / "model")
    stream = random.Random(SEED)
    makers = {"sft": _demonstrations, "rm": _rankings, "ppo": _prompts}
    rows = itertools.islice(makers[case.stage](case.data, _Text(config["vocab_size"], stream)), steps * case.batch_size)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as handle:
        handle.writelines(json.dumps(row) + "\n" for row in rows)
    data = data_module(case.stage, folder, case.batch_size)
    data.setup()
    taken = list(itertools.islice(data.train_dataloader(), steps))
    readers = {"sft": _demonstration_ids, "rm": pair_rows, "ppo": _prompt_ids}
    peer = [readers[case.stage](batch) for batch in taken]
    (folder / "peer.json").write_text(json.dumps(peer), encoding="utf-8")
    if case.stage == "sft":
        return [float(sum(len(row["input_ids"]) for row in step)) for step in peer]
    return [float(len(step)) for step in peer]


def data_module(stage: str, folder: Path, batch_size: int) -> Any:
    """Our data module of a stage, as a user would make it."""
    kind = {"sft": DemonstrationDataModule, "rm": ComparisonDataModule, "ppo": PromptDataModule}[stage]
    return kind(
        str(folder / "rows.jsonl"),
        str(folder / "model"),
        template="verbatim",
        val=0.0,
        batch_size=batch_size,
        seed=SEED,
    )


class _Text:
    """Random words, the first ones of the vocabulary more often, as in a language."""

    def __init__(self, vocabulary: int, stream: random.Random) -> None:
        self.stream = stream
        self.words = [f"w{number}" for number in range(2, vocabulary)]
        self.cumulated = list(itertools.accumulate(1.0 / (number + 10) for number in range(2, vocabulary)))

    def words_of(self, count: int) -> str:
        return " ".join(self.stream.choices(self.words, cum_weights=self.cumulated, k=count))

    def length(self, mean: float, sigma: float, longest: int) -> int:
        median_log = math.log(mean) - sigma**2 / 2
        return min(max(round(self.stream.lognormvariate(median_log, sigma)), 2), longest)


def _demonstrations(data: dict[str, Any], text: _Text) -> Iterator[dict[str, Any]]:
    while True:
        means = (data["prompt_mean"], data["response_mean"])
        prompt, response = (text.length(mean, data["sigma"], data["longest"]) for mean in means)
        yield {"prompt": text.words_of(prompt), "response": text.words_of(response - 1)}


def _rankings(data: dict[str, Any], text: _Text) -> Iterator[dict[str, Any]]:
    while True:
        responses = [text.words_of(data["response"] - 1) for _ in range(data["k"])]
        ranks = text.stream.sample(range(1, data["k"] + 1), data["k"])
        yield {"prompt": text.words_of(data["prompt"]), "responses": responses, "ranks": ranks}


def _prompts(data: dict[str, Any], text: _Text) -> Iterator[dict[str, Any]]:
    while True:
        yield {"prompt": text.words_of(data["prompt"])}


def _demonstration_ids(batch: Any) -> list[dict[str, Any]]:
    return [
        {"input_ids": ids[mask].tolist(), "completion_mask": loss[mask].int().tolist()}
        for ids, mask, loss in zip(*batch[:3], strict=True)
    ]


def pair_rows(batch: Any) -> list[dict[str, Any]]:
    """All pairs of each prompt, as rows of their own."""
    whole = []
    for group, ids, mask in zip(batch.group_N.tolist(), batch.response_ids_NR, batch.response_mask_NR, strict=True):
        prompt = batch.prompt_ids_BP[group][batch.prompt_mask_BP[group]]
        whole.append(prompt.tolist() + ids[mask].tolist())
    numbered = list(zip(batch.group_N.tolist(), batch.ranks_N.tolist(), whole, strict=True))
    pairs = []
    for first, second in itertools.combinations(numbered, 2):
        if first[0] == second[0]:
            better, worse = sorted((first, second), key=lambda one: one[1])
            pairs.append({"chosen_ids": better[2], "rejected_ids": worse[2]})
    return pairs


def _prompt_ids(batch: Any) -> list[dict[str, Any]]:
    return [{"input_ids": ids[mask].tolist()} for ids, mask in zip(*batch[:2], strict=True)]
