"""KL, loss on text and log-probabilities of choices, against loops over single tokens and against training."""

from __future__ import annotations

import math
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from lit_instruct.evaluation import likelihood
from lit_instruct.evaluation.likelihood import continuation_logprobs, kl_to_reference, pretraining_loss
from lit_instruct.models.backbone import fit_to_tokenizer, load_language_model
from lit_instruct.models.generation import stream_responses
from lit_instruct.models.scalar_head import ScalarModel
from lit_instruct.models.tokenizer import load_tokenizer
from lit_instruct.rollouts import assess, collect, describe
from lit_instruct.toyworld import ToyWorld, build_tokenizer, write_demonstration, write_jsonl
from lit_instruct.toyworld.measure import Samples, sample
from lit_instruct.types import ConfigError, Responses
from tests.helpers.numbers import assert_close
from tests.helpers.tiny import tiny_llama

WORLD = ToyWorld(3)
TOKENIZER = load_tokenizer(build_tokenizer())


def _model(seed: int, **changes: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    return load_language_model(fit_to_tokenizer(tiny_llama(initializer_range=0.3, **changes), TOKENIZER)).eval()


def _sample(policy: PreTrainedModel, count: int = 6) -> Samples:
    prompts = [task.prompt for task in islice(WORLD.tasks("train"), count)]
    return sample(policy, TOKENIZER, prompts, seed=1)


def _token_logprob(model: PreTrainedModel, before: list[int], token: int) -> float:
    return float(model(torch.tensor([before])).logits[0, -1].detach().log_softmax(-1)[token])


def test_kl_is_zero_to_itself_and_the_sum_over_each_row() -> None:
    policy, reference = _model(0), _model(1)
    samples = _sample(policy, 3)
    assert_close(kl_to_reference(policy, policy, samples.batch, samples.responses).k1_B, [0.0] * 3)
    k1, k3 = [], []
    for row in range(3):
        prompt = samples.batch.prompt_ids_BP[row][samples.batch.prompt_mask_BP[row]].tolist()
        response = samples.responses.response_ids_BR[row][samples.responses.response_mask_BR[row]].tolist()
        gaps = [
            _token_logprob(policy, prompt + response[:place], token)
            - _token_logprob(reference, prompt + response[:place], token)
            for place, token in enumerate(response)
        ]
        k1.append(sum(gaps))
        k3.append(sum(math.exp(-gap) - 1 + gap for gap in gaps))
    found = kl_to_reference(policy, reference, samples.batch, samples.responses, rows=2)
    assert_close(found.k1_B, k1, scale=10)  # sums of 40 differences of ~10
    assert_close(found.k3_B, k3, scale=100)  # and of their exponentials


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_kl_is_that_of_training(temperature: float) -> None:
    """``objective/kl`` of a rollout with the same responses."""
    policy, reference, value_model = _model(0), _model(1), ScalarModel.on_language_model(_model(2))
    samples = _sample(policy)
    blocks = stream_responses(
        policy, samples.batch, max_tokens=12, eos_ids=[TOKENIZER.eos_token_id], pad_id=0, temperature=temperature
    )
    rollout = collect(
        samples.batch,
        blocks,
        policy=policy,
        reference=reference,
        value_model=value_model,
        scorer=lambda prompts, responses: torch.zeros(len(responses.finished_B)),
        temperature=temperature,
        missing_eos="none",
        missing_eos_value=0.0,
        micro_batch_size=4,
    )
    logged = describe(assess(rollout, kl_coef=0.02, discount=1.0, gae_lambda=0.95), kl_coef=0.02)["objective/kl"]
    found = kl_to_reference(policy, reference, samples.batch, Responses(*rollout[2:5]), temperature=temperature)
    assert_close(found.k1_B.mean(), logged)
    assert float(logged) > 1.0


def test_continuations_of_unequal_lengths_and_contexts() -> None:
    model = _model(0)
    contexts, continuations = [[5], [6, 7, 8], [9, 10]], [[11, 12, 13], [14], [15, 16]]
    expected = [
        sum(_token_logprob(model, context + rest[:place], token) for place, token in enumerate(rest))
        for context, rest in zip(contexts, continuations, strict=True)
    ]
    assert_close(continuation_logprobs(model, contexts, continuations, rows=2), expected, scale=10)


def test_pretraining_loss_is_the_mean_over_all_predicted_tokens(tmp_path: Path) -> None:
    stream = WORLD.stream("measure")
    text = " ".join(write_demonstration(WORLD, task, stream) for task in islice(WORLD.tasks("train"), 6))
    write_jsonl(tmp_path / "text.jsonl", [{"text": text}])
    model = _model(0)
    ids = [*TOKENIZER(text)["input_ids"], TOKENIZER.eos_token_id]
    chunks = [ids[start : start + 8] for start in range(0, len(ids) - 7, 8)]
    assert len(chunks) >= 3
    losses = []
    for chunk in chunks:
        logprobs = model(torch.tensor([chunk])).logits[0].log_softmax(-1)
        losses += [-float(logprobs[place, chunk[place + 1]].detach()) for place in range(7)]
    found = pretraining_loss(model, TOKENIZER, str(tmp_path / "text.jsonl"), chunk_tokens=8, rows=2)
    assert_close(found.nats_per_token, sum(losses) / len(losses))
    written = sum(len(TOKENIZER.decode(chunk, skip_special_tokens=True).encode()) for chunk in chunks)
    assert_close(found.bits_per_byte, sum(losses) / math.log(2) / written)


def test_no_pass_is_longer_than_memory_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows are asked for: logits over a large vocabulary are what fills a machine."""
    write_jsonl(tmp_path / "text.jsonl", [{"text": " ".join(["the a"] * 200)}])
    model, reference = _model(0), _model(1)
    some = _sample(model, 12)
    read: list[int] = []
    model.base_model.register_forward_pre_hook(
        lambda _, __, given: read.append(given["input_ids"].numel()), with_kwargs=True
    )

    def measured() -> list[float]:
        text = pretraining_loss(model, TOKENIZER, str(tmp_path / "text.jsonl"), chunk_tokens=16)
        choices = continuation_logprobs(model, [[5, 6]] * 20, [[7, 8]] * 20)
        kl = kl_to_reference(model, reference, some.batch, some.responses)
        return [*text, *choices, *kl.k1_B.tolist()]

    whole = measured()
    assert max(read) > 64
    read.clear()
    monkeypatch.setattr(likelihood, "_PASS_TOKENS", 64)
    assert_close(measured(), whole)
    assert 32 < max(read) <= 64


def test_chunks_are_no_longer_than_the_model_reads(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "text.jsonl", [{"text": " ".join(["the"] * 200)}])
    model = _model(0, max_position_embeddings=16)
    with pytest.raises(ConfigError, match="chunk_tokens: got 17 for a model that reads 16"):
        pretraining_loss(model, TOKENIZER, str(tmp_path / "text.jsonl"), chunk_tokens=17)
    whole = pretraining_loss(model, TOKENIZER, str(tmp_path / "text.jsonl"))
    assert whole == pretraining_loss(model, TOKENIZER, str(tmp_path / "text.jsonl"), chunk_tokens=16)
