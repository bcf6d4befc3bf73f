"""ClassifierScorer: classifiers with tokenizers of their own, against the plain call on one unpadded row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from lit_instruct.rewards import ClassifierScorer
from lit_instruct.types import ConfigError
from tests.helpers.numbers import assert_close
from tests.helpers.tiny import WORDS, save_model
from tests.unit.rewards.batches import TOKENIZER, batch_of

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
WIDE = {"initializer_range": 0.5}  # outputs that differ, so that a wrong token or type shows
ENCODER = {"special": ["[PAD]", "[UNK]", "[CLS]", "[SEP]"], "cls_token": "[CLS]", "sep_token": "[SEP]"}
GPT = ["w29", "<unk>", "<eos>"]
CHAT_TEMPLATE = (
    "{{ bos_token }} {% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ raise_exception('no system messages') }}{% endif %}{{ message['role'] }} {{ message['content'] | trim }} <end> "
    "{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)


def vocabulary(special: Sequence[str]) -> dict[str, int]:
    """Other ids than the policy's: first these, then the words the other way round."""
    return {word: number for number, word in enumerate(dict.fromkeys([*special, *reversed(WORDS)]))}


def tokenizer_of(special: Sequence[str], **settings: Any) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel(vocabulary(special), unk_token=special[1]))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if "sep_token" in settings:
        core.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", special.index("[CLS]")), ("[SEP]", special.index("[SEP]"))],
        )
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token=special[1], **settings)


def save(folder: Path, tokenizer: PreTrainedTokenizerFast, family: str, **fields: Any) -> str:
    torch.manual_seed(3)
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **fields)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An encoder with pairs, types, dropout and three labels."""
    labels = {"id2label": {0: "bad", 1: "fair", 2: "good"}, "label2id": {"bad": 0, "fair": 1, "good": 2}}
    tokenizer = tokenizer_of(**ENCODER, pad_token="[PAD]")
    return save(
        tmp_path_factory.mktemp("bert"), tokenizer, "bert", max_position_embeddings=12, **SIZES, **WIDE, **labels
    )


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A decoder with one output and no pad token."""
    tokenizer = tokenizer_of(GPT, eos_token="<eos>")
    shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "num_labels": 1, **WIDE}
    return save(tmp_path_factory.mktemp("gpt2"), tokenizer, "gpt2", **shape, bos_token_id=2, eos_token_id=2)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A decoder with a chat template, and with its end of text as the pad token."""
    tokenizer = tokenizer_of(
        ["<s>", "<unk>", "<end>", "user", "assistant"], bos_token="<s>", eos_token="<end>", pad_token="<end>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return save(
        tmp_path_factory.mktemp("llama"),
        tokenizer,
        "llama",
        num_labels=1,
        max_position_embeddings=24,
        pad_token_id=2,
        **SIZES,
        **WIDE,
    )


PROMPTS: list[Any] = ["w1 w2", "w3", "w4 w5 w6"]
RESPONSES = ["w7", "w8 w9 w10", "w29"]


def score(scorer: ClassifierScorer, prompts: Sequence[Any] = PROMPTS, responses: Sequence[str] = RESPONSES) -> Tensor:
    return scorer(*batch_of(prompts, responses), tokenizer=TOKENIZER)


def ids_of(special: Sequence[str], text: str) -> list[int]:
    return [vocabulary(special)[word] for word in text.split()]


@torch.no_grad()
def alone(scorer: ClassifierScorer, ids: list[int], types: list[int] | None = None) -> Tensor:
    """Outputs ``[labels]`` of one row as transformers gives them, nothing padded."""
    given = {} if types is None else {"token_type_ids": torch.tensor([types])}
    return scorer.model(input_ids=torch.tensor([ids]), **given).logits[0]


def pairs(scorer: ClassifierScorer) -> Tensor:
    rows = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        first = ids_of(ENCODER["special"], f"[CLS] {prompt} [SEP]")
        second = ids_of(ENCODER["special"], f"{response} [SEP]")
        rows.append(alone(scorer, first + second, [0] * len(first) + [1] * len(second)))
    return torch.stack(rows)


@pytest.mark.parametrize("batch_rows", [1, 2, 32])
def test_an_encoder_reads_pairs(bert: str, batch_rows: int) -> None:
    scorer = ClassifierScorer(bert, output="good", batch_rows=batch_rows)
    scores = score(scorer)
    assert scores.dtype == torch.float32
    assert_close(scores, pairs(scorer)[:, 2], scale=5)  # two layers of other kernel shapes
    assert float(scores.std()) > 0.01
    assert not any(parameter.requires_grad for parameter in scorer.parameters())


def test_types_tell_the_response_from_the_prompt(bert: str) -> None:
    scorer = ClassifierScorer(bert, output=0)
    ids = ids_of(ENCODER["special"], "[CLS] w1 w2 [SEP] w7 [SEP]")
    assert float((alone(scorer, ids, [0] * 6) - alone(scorer, ids, [0, 0, 0, 0, 1, 1])).abs().max()) > 0.01
    assert_close(score(scorer)[0], alone(scorer, ids, [0, 0, 0, 0, 1, 1])[0], scale=5)


@pytest.mark.parametrize("output", ["fair", 1])
def test_the_output_is_chosen_by_label_or_number(bert: str, output: Any) -> None:
    scorer = ClassifierScorer(bert, output=output)
    assert_close(score(scorer), pairs(scorer)[:, 1], scale=5)


def test_log_probabilities(bert: str, gpt2: str) -> None:
    scorer = ClassifierScorer(bert, output=1, read="logprob")
    assert_close(score(scorer), pairs(scorer).softmax(dim=1)[:, 1].log(), scale=5)
    scorer.model.config.problem_type = "multi_label_classification"
    assert_close(score(scorer), pairs(scorer).sigmoid()[:, 1].log(), scale=5)
    logits, logprobs = (score(ClassifierScorer(gpt2, read=read)) for read in ("logit", "logprob"))
    assert_close(logprobs, logits.sigmoid().log(), scale=5)


@pytest.mark.parametrize("batch_rows", [1, 2, 32])
def test_a_decoder_without_a_pad_token_is_read_at_the_last_token_of_each_row(gpt2: str, batch_rows: int) -> None:
    scorer = ClassifierScorer(gpt2, batch_rows=batch_rows)
    responses = ["w7", "w8 w9 w10", "w29"]  # w29 is id 0, which would come to mind as padding
    expected = [
        alone(scorer, ids_of(GPT, f"{prompt} {response}"))[0]
        for prompt, response in zip(PROMPTS, responses, strict=True)
    ]
    assert_close(score(scorer, PROMPTS, responses), torch.stack(expected), scale=5)
    assert scorer.model.config.pad_token_id is None


def test_every_word_may_end_a_row(gpt2: str) -> None:
    scorer = ClassifierScorer(gpt2)
    prompts = ["w1" if row % 2 else "w1 w2 w3" for row in range(30)]
    expected = [alone(scorer, ids_of(GPT, f"{prompt} {word}"))[0] for prompt, word in zip(prompts, WORDS, strict=True)]
    assert_close(score(scorer, prompts, WORDS), torch.stack(expected), scale=5)


@pytest.mark.parametrize("form", ["response", "joined"])
def test_an_empty_response_has_a_score(gpt2: str, form: Any) -> None:
    scorer = ClassifierScorer(gpt2, form=form)
    expected = alone(scorer, ids_of(GPT, "<eos>" if form == "response" else "w1"))
    assert_close(score(scorer, ["w1", "w1"], ["", "w2 w3"])[0], expected[0], scale=5)


def test_token_types_are_kept_from_models_that_would_take_them_for_tokens(gpt2: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(GPT, eos_token="<eos>", model_input_names=["input_ids", "token_type_ids"])
    folder = save(tmp_path, tokenizer, "gpt2", n_embd=16, n_layer=1, n_head=2, num_labels=1, **WIDE)
    scorer = ClassifierScorer(folder)
    assert_close(score(scorer)[0], alone(scorer, ids_of(GPT, "w1 w2 w7"))[0], scale=5)


CHAT = ["<s>", "<unk>", "<end>", "user", "assistant"]


@pytest.mark.parametrize("batch_rows", [1, 32])
def test_a_chat_model_reads_a_conversation(llama: str, batch_rows: int) -> None:
    """Its pad token is the end of text, which transformers then steps over: alone or in a batch, the same token."""
    scorer = ClassifierScorer(llama, batch_rows=batch_rows)
    turns = [
        {"role": "user", "content": "w1"},
        {"role": "assistant", "content": "w2 w3"},
        {"role": "user", "content": "w4"},
    ]
    conversation = "<s> user w1 <end> assistant w2 w3 <end> user w4 <end> assistant w9 w8 <end>"
    scores = score(scorer, ["w1 w2", turns], ["w7", "w9 w8"])
    expected = [alone(scorer, ids_of(CHAT, text)) for text in ("<s> user w1 w2 <end> assistant w7 <end>", conversation)]
    assert_close(scores, torch.cat(expected), scale=5)


def inputs(scorer: ClassifierScorer, prompt: Any, response: str) -> str:
    """What the model is given, in words."""
    row = scorer.reader.encode([prompt], [response])[0]
    words = {number: word for word, number in scorer.reader.tokenizer.get_vocab().items()}
    return " ".join(words[token] for token in row.ids)


LONG = "w1 w2 w3 w4 w5 w6 w7 w8 w9"


@pytest.mark.parametrize(
    ("model", "settings", "prompt", "expected"),
    [
        ("bert", {"max_length": 8}, "w1", "[CLS] w1 [SEP] w10 w11 [SEP]"),
        ("bert", {"max_length": 8}, LONG, "[CLS] w7 w8 w9 [SEP] w10 w11 [SEP]"),
        ("bert", {}, LONG, "[CLS] w3 w4 w5 w6 w7 w8 w9 [SEP] w10 w11 [SEP]"),  # 12 positions; its own limit
        ("bert", {"form": "response"}, LONG, "[CLS] w10 w11 [SEP]"),
        ("bert", {"form": "joined", "max_length": 6}, LONG, "[CLS] w8 w9 w10 w11 [SEP]"),
        ("bert", {"form": "joined", "separator": " w0 "}, "w1", "[CLS] w1 w0 w10 w11 [SEP]"),
        ("bert", {"form": "joined", "separator": " w0 ", "max_length": 5}, "w1", "[CLS] w0 w10 w11 [SEP]"),
        ("gpt2", {"max_length": 4}, LONG, "w8 w9 w10 w11"),
        ("gpt2", {"max_length": 2}, LONG, "w10 w11"),
        ("gpt2", {}, [{"role": "system", "content": "w1"}, {"role": "user", "content": "w2"}], "w1 w2 w10 w11"),
        ("llama", {"max_length": 8}, LONG, "<s> w8 w9 <end> assistant w10 w11 <end>"),
        ("llama", {"max_length": 5}, LONG, "<s> assistant w10 w11 <end>"),
        ("llama", {"form": "joined", "max_length": 3}, LONG, "w9 w10 w11"),
    ],
)
def test_forms_and_where_they_are_cut(
    model: str, settings: dict[str, Any], prompt: Any, expected: str, request: pytest.FixtureRequest
) -> None:
    scorer = ClassifierScorer(request.getfixturevalue(model), output=0, **settings)
    assert inputs(scorer, prompt, "w10 w11") == expected


def test_types_are_cut_with_their_tokens(bert: str) -> None:
    row = ClassifierScorer(bert, output=0, max_length=7).reader.encode([LONG], ["w10 w11"])[0]
    assert row.types == [0, 0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("bert", "[CLS] [SEP] w1 w2 w3 [SEP]"),
        ("gpt2", "w1 w2 w3 w4 w5 w6"),
        ("llama", "<s> assistant w1 w2 w3 <end>"),
    ],
)
def test_a_response_that_is_too_long_loses_its_end_or_is_an_error(
    model: str, expected: str, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    """Lost by default: an error would end a run at the first such sample, however late."""
    folder = request.getfixturevalue(model)
    strict = ClassifierScorer(folder, output=0, max_length=6, long_response="error")
    with pytest.raises(ConfigError, match=r"a response needs \d+ tokens .* even without its prompt; need at most 6"):
        inputs(strict, "w0", LONG)
    cutting = ClassifierScorer(folder, output=0, max_length=6)
    for _ in range(2):
        assert inputs(cutting, "w0", LONG) == expected
    assert caplog.text.count("responses are longer than the classifier reads (max_length 6)") == 1


def test_no_room_at_all_is_found_before_training(llama: str) -> None:
    with pytest.raises(ConfigError, match="need at most 2"):
        ClassifierScorer(llama, max_length=2)


def test_roberta_counts_positions_from_the_padding_on(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(
        ["[CLS]", "[UNK]", "[PAD]", "[SEP]"], cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]"
    )
    shape = {**SIZES, "max_position_embeddings": 11, "pad_token_id": 2, "num_labels": 1, "type_vocab_size": 1}
    scorer = ClassifierScorer(save(tmp_path, tokenizer, "roberta", **shape, **WIDE))
    assert len(inputs(scorer, LONG, "w10 w11").split()) == 8
    assert score(scorer, [LONG, "w1"], ["w10 w11", "w2"]).isfinite().all()


def test_a_template_that_refuses_the_prompt(llama: str) -> None:
    with pytest.raises(ConfigError, match=r"chat template refuses a conversation \(no system messages\).*form"):
        score(
            ClassifierScorer(llama), [[{"role": "system", "content": "w1"}, {"role": "user", "content": "w2"}]], ["w3"]
        )


def test_weights_of_another_dtype_and_autocast(gpt2: str) -> None:
    exact = ClassifierScorer(gpt2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(score(exact), score(ClassifierScorer(gpt2)))
        inside = score(exact)
    assert torch.equal(inside, score(exact))
    half = ClassifierScorer(gpt2, dtype="bfloat16")
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    scores = score(half)
    assert scores.dtype == torch.float32
    assert 0 < float((scores - inside).abs().max()) < 0.1


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ("bert", {}, "output: got None; need the number or label .* 3: 0 = bad, 1 = fair, 2 = good"),
        ("bert", {"output": "great"}, "output: got 'great'"),
        ("bert", {"output": 3}, "output: got 3"),
        ("bert", {"output": -1}, "output: got -1"),
        ("bert", {"output": 0, "form": "chat"}, "got 'chat', and the classifier's tokenizer has no chat template"),
        ("gpt2", {"form": "pair"}, "got 'pair', and the classifier's tokenizer has no separator"),
        ("gpt2", {"form": "both"}, "form: got 'both'; need one of auto, chat, pair, joined, response"),
        ("gpt2", {"read": "probability"}, "read: got 'probability'"),
        ("gpt2", {"long_response": "drop"}, "long_response: got 'drop'"),
        ("gpt2", {"dtype": "int8"}, "dtype: got 'int8'"),
        ("gpt2", {"max_length": 17}, "max_length: got 17; the model takes at most 16"),
        ("gpt2", {"max_length": 0}, "max_length: got 0"),
        ("gpt2", {"batch_rows": 0}, "batch_rows: got 0"),
    ],
)
def test_settings_that_cannot_work(
    model: str, settings: dict[str, Any], message: str, request: pytest.FixtureRequest
) -> None:
    with pytest.raises(ConfigError, match=message):
        ClassifierScorer(request.getfixturevalue(model), **settings)


def test_models_that_are_no_classifiers(tmp_path: Path, rm_ckpt: str) -> None:
    with pytest.raises(ConfigError, match=r"brings no weights for score.weight, so its scores would be random"):
        ClassifierScorer(save_model(tmp_path / "lm"))
    with pytest.raises(ConfigError, match="no sequence classifier with its tokenizer could be loaded from"):
        ClassifierScorer(str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match=r"use lit_instruct\.rewards\.RewardModelScorer"):
        ClassifierScorer(rm_ckpt)
