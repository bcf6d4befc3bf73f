from __future__ import annotations

import pytest
import torch

from lit_instruct.models.forward import (
    demonstration_loss,
    join,
    language_model_logits,
    position_ids,
    response_columns,
    response_logprobs,
    response_values,
)
from lit_instruct.types import DemonstrationBatch, PromptBatch
from tests.helpers.numbers import assert_close
from tests.unit.models.networks import (
    EOS,
    FAMILIES,
    PROMPT_LENGTHS,
    RESPONSE_LENGTHS,
    left_padded,
    logits_alone,
    ragged_batch,
    ragged_rows,
    right_padded,
    scalars_alone,
    tiny_model,
    tiny_scalar_model,
)

families = pytest.mark.parametrize("family", FAMILIES)


def test_position_ids_count_real_tokens():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()
    need = [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2], [0, 1, 2, 3, 4], [0, 0, 0, 0, 0]]
    got = position_ids(mask)
    assert got.dtype == torch.int64
    assert got.tolist() == need


def test_response_columns_picture():
    assert response_columns(3, 3, torch.device("cpu")).tolist() == [2, 3, 4]
    assert response_columns(1, 2, torch.device("cpu")).tolist() == [0, 1]
    assert response_columns(4, 0, torch.device("cpu")).tolist() == []


@families
def test_logits_at_columns_are_those_of_the_full_forward(family):
    model = tiny_model(family)
    ids, mask, _ = join(*ragged_batch())
    columns = torch.tensor([0, 3, 8, ids.shape[1] - 1])
    full = language_model_logits(model, ids, mask)
    assert full.shape == (*ids.shape, model.config.vocab_size)
    assert_close(language_model_logits(model, ids, mask, columns), full[:, columns])


@families
@pytest.mark.parametrize("extra", [0, 5])
def test_left_padding_changes_no_logit(family, extra):
    model, rows = tiny_model(family), ragged_rows()[0]
    prompts = left_padded(rows, extra=extra)
    logits = language_model_logits(model, *prompts[:2])
    for index, row in enumerate(rows):
        assert_close(logits[index, -len(row) :], logits_alone(model, row), scale=5)  # two layers of other kernel shapes


@families
def test_left_padding_changes_no_scalar(family):
    model, rows = tiny_scalar_model(family), ragged_rows()[0]
    scalars = model(*left_padded(rows, extra=3)[:2])
    for index, row in enumerate(rows):
        assert_close(scalars[index, -len(row) :], scalars_alone(model, row), scale=5)


def test_join_leaves_out_columns_that_are_padding_everywhere():
    prompts = PromptBatch(*left_padded([[5], [6, 7]], extra=2))
    responses = right_padded([[8, 9, EOS], [EOS]], extra=4)
    ids, mask, width = join(prompts, responses)
    assert width == 3
    assert ids.tolist() == [[EOS, 5, 8, 9, EOS], [6, 7, EOS, EOS, EOS]]
    assert mask.long().tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 0, 0]]


def test_join_keeps_everything_where_one_row_is_full():
    prompts, responses = ragged_batch()
    ids, mask, width = join(prompts, responses)
    assert width == max(RESPONSE_LENGTHS)
    assert ids.shape[1] == max(PROMPT_LENGTHS) + max(RESPONSE_LENGTHS)
    assert mask.sum(dim=1).tolist() == [p + r for p, r in zip(PROMPT_LENGTHS, RESPONSE_LENGTHS, strict=True)]


@families
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_response_logprobs_against_a_slow_loop(family, temperature):
    model = tiny_model(family)
    prompt_rows, response_rows = ragged_rows()
    prompts, responses = left_padded(prompt_rows, extra=2), right_padded(response_rows, extra=3)
    logprobs, moments = response_logprobs(model, prompts, responses, temperature=temperature, surprise=True)
    assert moments is not None
    entropy = moments.entropy
    assert logprobs.shape == entropy.shape == responses.response_ids_BR.shape
    need, need_entropy = torch.zeros(logprobs.shape).double(), torch.zeros(logprobs.shape).double()
    for index, (prompt, response) in enumerate(zip(prompt_rows, response_rows, strict=True)):
        table = torch.log_softmax(logits_alone(model, prompt + response) / temperature, dim=-1)
        for column, token in enumerate(response):
            before = len(prompt) + column - 1
            need[index, column] = table[before, token]
            need_entropy[index, column] = -(table[before].exp() * table[before]).sum()
    assert_close(logprobs, need, scale=5)  # two layers of other kernel shapes
    assert_close(entropy, need_entropy, scale=5)


@pytest.mark.parametrize("speak", ["logprobs", "values"])
def test_zeros_at_padding_and_gradient_only_for_real_tokens(speak):
    prompts, responses = ragged_batch()
    if speak == "logprobs":
        network = tiny_model("llama")
        out, moments = response_logprobs(network, prompts, responses, temperature=1.0, surprise=True)
        assert moments is not None
        entropy = moments.entropy
        assert not entropy.requires_grad
        assert (entropy[~responses.response_mask_BR] == 0).all()
        table = network.get_input_embeddings().weight
    else:
        network = tiny_scalar_model("llama")
        out = response_values(network, prompts, responses)
        table = network.trunk.get_input_embeddings().weight
    assert (out[~responses.response_mask_BR] == 0).all()
    assert (out[responses.response_mask_BR] != 0).all()
    out[2].sum().backward()  # a row with a response of one token: the end of text
    read = table.grad.abs().sum(dim=1).nonzero().flatten().tolist()
    assert read == sorted(set(ragged_rows()[0][2]))  # its prompt, and neither padding, end of text nor other rows
    for parameter in network.parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all()


def test_garbage_under_padding_changes_nothing():
    model, value_model = tiny_model("gpt2"), tiny_scalar_model("gpt2")
    prompts, responses = ragged_batch()
    other_prompts = prompts._replace(prompt_ids_BP=prompts.prompt_ids_BP.where(prompts.prompt_mask_BP, 11))
    other = responses._replace(response_ids_BR=responses.response_ids_BR.where(responses.response_mask_BR, 13))
    for speak in (
        lambda p, r: response_logprobs(model, p, r, temperature=1.0)[0],
        lambda p, r: response_values(value_model, p, r),
    ):
        assert_close(speak(other_prompts, other), speak(prompts, responses))


@families
def test_response_values_stand_before_each_token(family):
    model = tiny_scalar_model(family)
    prompt_rows, response_rows = ragged_rows()
    values = response_values(model, left_padded(prompt_rows), right_padded(response_rows, extra=2))
    need = torch.zeros(values.shape).double()
    for index, (prompt, response) in enumerate(zip(prompt_rows, response_rows, strict=True)):
        alone = scalars_alone(model, prompt + response)
        need[index, : len(response)] = alone[len(prompt) - 1 : len(prompt) + len(response) - 1]
    assert_close(values, need, scale=5)


def demonstrations() -> tuple[list[list[int]], list[list[int]], DemonstrationBatch]:
    prompts, responses = ragged_rows(3)
    rows = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    ids, mask, _ = right_padded(rows)
    loss_mask = torch.zeros_like(mask)
    for index, prompt in enumerate(prompts):
        loss_mask[index, len(prompt) : len(rows[index])] = True
    return prompts, responses, DemonstrationBatch(ids, mask, loss_mask)


@families
def test_demonstration_loss_against_a_slow_loop(family):
    model = tiny_model(family)
    prompts, responses, batch = demonstrations()
    total, count, right = 0.0, 0, 0
    for prompt, response in zip(prompts, responses, strict=True):
        table = torch.log_softmax(logits_alone(model, prompt + response), dim=-1)
        for column, token in enumerate(response):
            before = table[len(prompt) + column - 1]
            total -= before[token].item()
            right += int(before.argmax()) == token
            count += 1
    loss, metrics = demonstration_loss(model, batch)
    assert_close(loss, total / count)
    assert_close(metrics["loss"], total / count)
    assert_close(metrics["token_acc"], right / count)
    assert int(metrics["tokens"]) == count
    assert not metrics["loss"].requires_grad


@families
def test_demonstration_loss_against_transformers_own(family):
    model = tiny_model(family)
    _, _, batch = demonstrations()
    loss, _ = demonstration_loss(model, batch)
    labels = batch.input_ids_BT.where(batch.loss_mask_BT, -100)
    need = model(
        input_ids=batch.input_ids_BT,
        attention_mask=batch.attention_mask_BT.long(),
        position_ids=position_ids(batch.attention_mask_BT),
        labels=labels,
    ).loss
    assert_close(loss, need)
    parameters = [p for p in model.parameters() if p.requires_grad]
    got = torch.autograd.grad(loss, parameters, allow_unused=True)
    for mine, theirs in zip(got, torch.autograd.grad(need, parameters, allow_unused=True), strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert_close(mine, theirs, scale=5)  # sums over tokens in another order


def test_loss_mask_on_the_first_column_counts_for_nothing():
    model = tiny_model("llama")
    _, _, batch = demonstrations()
    everything = batch._replace(loss_mask_BT=batch.attention_mask_BT)
    loss, metrics = demonstration_loss(model, everything)
    assert int(metrics["tokens"]) == int(batch.attention_mask_BT.sum()) - len(batch.input_ids_BT)
    assert_close(loss, model(batch.input_ids_BT, labels=batch.input_ids_BT.where(batch.attention_mask_BT, -100)).loss)


def test_micro_batches_with_the_denominator_of_the_step_add_up():
    model = tiny_model("llama")
    _, _, batch = demonstrations()
    whole, metrics = demonstration_loss(model, batch)
    parts = [
        demonstration_loss(model, DemonstrationBatch(*(x[row : row + 1] for x in batch)), denominator=metrics["tokens"])
        for row in range(len(batch.input_ids_BT))
    ]
    assert_close(sum(loss for loss, _ in parts), whole)
    assert sum(int(some["tokens"]) for _, some in parts) == int(metrics["tokens"])
    assert_close(demonstration_loss(model, batch, denominator=2.0)[0], whole * metrics["tokens"] / 2)
    assert_close(demonstration_loss(model, batch, denominator=2.0)[1]["loss"], whole)  # the metric stays a mean


@pytest.mark.parametrize("denominator", [None, 3.0])
def test_nothing_to_predict_is_a_zero_that_backpropagates(denominator):
    model = tiny_model("llama")
    _, _, batch = demonstrations()
    empty = batch._replace(loss_mask_BT=torch.zeros_like(batch.loss_mask_BT))
    loss, metrics = demonstration_loss(model, empty, denominator=denominator)
    loss.backward()
    assert loss.item() == metrics["loss"].item() == 0
    assert int(metrics["tokens"]) == 0


def test_only_response_columns_reach_the_head():
    """The head over the vocabulary is the widest layer: it must not run on the prompt."""
    model = tiny_model("llama")
    seen = []
    model.lm_head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[1]))
    prompts, responses = ragged_batch()
    response_logprobs(model, prompts, responses, temperature=1.0)
    assert seen == [max(RESPONSE_LENGTHS)]
