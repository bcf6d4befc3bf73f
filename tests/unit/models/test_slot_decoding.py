from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lit_instruct.models import slot_decoding
from lit_instruct.models.forward import response_logprobs
from lit_instruct.models.generation import sample_responses, stream_responses, uniform_streams
from lit_instruct.models.packing import enable_packing
from lit_instruct.models.sampling import Draws
from lit_instruct.types import PromptBatch
from tests.helpers.numbers import assert_close
from tests.unit.models.networks import _DECODER, EOS, FAMILIES, VOCABULARY, left_padded, tiny_model, tokens

PAD = 0
ENDS = tuple(range(3, 11))  # many ends of text, so that untrained models end at all lengths

MORE = {
    "gemma3_text": {
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt_oss": {
        "head_dim": 8,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}
"""Windows in some layers only; attention sinks."""

families = pytest.mark.parametrize("family", [*FAMILIES, *MORE])


def plain_model(family: str, seed: int = 0):
    """A model that packing has not been enabled for."""
    if family in FAMILIES:
        return tiny_model(family, seed=seed)
    torch.manual_seed(seed)
    fields = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": EOS}
    config = AutoConfig.for_model(family, **fields | _DECODER | MORE[family])
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def admitted(family: str):
    model = plain_model(family)
    assert enable_packing(model).packs
    return model


def some_prompts(count: int = 17) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [tokens(1 + index % 7, generator) for index in range(count)]


def sample(model, prompts, **changes):
    return sample_responses(model, prompts, **{"max_tokens": 12, "eos_ids": ENDS, "pad_id": PAD, "seed": 1, **changes})


def assert_same(mine, theirs):
    for one, other in zip(mine, theirs, strict=True):
        assert torch.equal(one, other)


# -- what is sampled
# (Sums of another order may move a draw across the edge between two tokens: about once in a million draws. The seeds
# here are fixed and hold a few thousand.)


@families
def test_slots_give_what_padded_batches_give_whatever_their_number(family):
    prompts = left_padded(some_prompts())
    need = sample(plain_model(family), prompts)
    assert need.response_mask_BR.sum(dim=1).unique().numel() > 2  # ragged, else there is nothing to see
    model = admitted(family)
    for slots in (1, 4, 32):
        assert_same(sample(model, prompts, batch_rows=slots), need)


@families
def test_greedy_tokens_and_logits_are_those_of_generate(family, monkeypatch):
    rows, ends, drawn = some_prompts(9), [7, 8, 9, 10, 11, 12], {}
    draw = Draws.draw

    def watched(self, logits, places):
        for place, row in zip(places.tolist(), logits, strict=True):
            drawn[divmod(place, 14)] = row.clone()
        return draw(self, logits, places)

    monkeypatch.setattr(Draws, "draw", watched)
    options = {"max_tokens": 14, "eos_ids": ends, "temperature": 0.0, "batch_rows": 3}
    responses = sample(admitted(family), left_padded(rows, extra=2), **options)
    assert len(drawn) == int(responses.response_mask_BR.sum())
    plain = plain_model(family)
    for index, row in enumerate(rows):  # one at a time, without padding
        options = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": ends, "pad_token_id": PAD}
        need = plain.generate(torch.tensor([row]), return_dict_in_generate=True, output_logits=True, **options)
        written = need.sequences[0, len(row) :].tolist()
        assert responses.response_ids_BR[index][responses.response_mask_BR[index]].tolist() == written
        assert responses.finished_B[index].item() == (written[-1] in ends)
        for step, logits in enumerate(need.logits):
            assert_close(drawn[index, step], logits[0], scale=10)  # logits reach 20: ten layers' worth of roundings


@pytest.mark.parametrize("family", ["gpt2", "mistral"])
def test_the_order_of_prompts_does_not_matter(family):
    model, rows = admitted(family), some_prompts()
    whole = sample(model, left_padded(rows), batch_rows=5)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    permuted = sample(model, left_padded([rows[index] for index in order]), rows=order, batch_rows=5)
    for mine, theirs in zip(permuted, whole, strict=True):
        assert torch.equal(mine, theirs[order])


@pytest.mark.parametrize(("name", "value"), [("_REFILL", 0), ("_REFILL", 1.0), ("_PREFILL_TOKENS", 3)])
def test_nothing_depends_on_how_slots_are_refilled(monkeypatch, name, value):
    prompts = left_padded(some_prompts(40))
    need = sample(plain_model("gpt2"), prompts)
    monkeypatch.setattr(slot_decoding, name, value)
    assert_same(sample(admitted("gpt2"), prompts, batch_rows=8), need)


def test_the_cache_grows_with_the_responses(monkeypatch):
    prompts = left_padded(some_prompts())
    need = sample(plain_model("llama"), prompts, max_tokens=30, eos_ids=[3])
    monkeypatch.setattr(slot_decoding, "_FIRST_ROOM", 1)
    assert_same(sample(admitted("llama"), prompts, max_tokens=30, eos_ids=[3], batch_rows=6), need)


@pytest.mark.parametrize("max_tokens", [1, 2])
def test_short_limits(max_tokens):
    prompts = left_padded(some_prompts())
    need = sample(plain_model("gpt2"), prompts, max_tokens=max_tokens)
    assert_same(sample(admitted("gpt2"), prompts, max_tokens=max_tokens, batch_rows=4), need)
    assert need.response_ids_BR.shape[1] == max_tokens


def test_no_prompts_give_no_responses():
    nothing = PromptBatch(torch.zeros(0, 3, dtype=torch.long), torch.zeros(0, 3, dtype=torch.bool))
    assert [len(x) for x in sample(admitted("gpt2"), nothing)] == [0, 0, 0]


# -- what is computed


def watch(model):
    """Collect (prompt tokens read in a pass) and (rows of a step)."""
    read, steps = [], []

    def note(module, args, kwargs):
        if "segments" in kwargs:
            read.append(kwargs["input_ids"].shape[1])
        else:
            assert kwargs["input_ids"].shape[1] == 1
            steps.append(len(kwargs["input_ids"]))

    model.register_forward_pre_hook(note, with_kwargs=True)
    return read, steps


@pytest.mark.parametrize("batch_rows", [2, 4, 5, 32])
def test_equal_prompts_are_read_once(batch_rows):
    model, rows = admitted("mistral"), [[5, 6, 7], [9] * 5, [5, 6, 7], [8], [9] * 5, [5, 6, 7], [5, 6, 7], [9] * 5]
    need = sample(plain_model("mistral"), left_padded(rows), max_tokens=9, eos_ids=[])
    read, _ = watch(model)
    assert_same(sample(model, left_padded(rows), max_tokens=9, eos_ids=[], batch_rows=batch_rows), need)
    if batch_rows == 32:
        assert read == [3 + 5 + 1]
    assert sum(read) < sum(map(len, rows))


def test_a_late_sibling_copies_a_row_that_is_still_decoding(monkeypatch):
    """Rows of the same prompt end one by one, and each time another of them moves in."""
    monkeypatch.setattr(slot_decoding, "_REFILL", 0)
    model, rows = admitted("llama"), [[9, 9], *[[5, 6, 7, 8]] * 20]
    need = sample(plain_model("llama"), left_padded(rows))
    read, _ = watch(model)
    assert_same(sample(model, left_padded(rows), batch_rows=6), need)
    assert sum(read) == 2 + 4
    assert len({tuple(row) for row in need.response_ids_BR.tolist()}) > 10  # and yet no two rows draw alike


def test_slots_are_kept_busy():
    model = admitted("gpt2")
    _, steps = watch(model)
    lengths = sample(model, left_padded(some_prompts(60)), batch_rows=8).response_mask_BR.sum(dim=1)
    assert max(steps) == 8
    assert sum(steps) == int((lengths - 1).sum())  # not one row decodes beyond its end
    busy = steps[: len(steps) - 12]  # the last rows find no more prompts to share with
    assert min(busy) == 8


def test_refilling_waits_until_it_is_worth_a_pass(monkeypatch):
    model, prompts = admitted("gpt2"), left_padded(some_prompts(60))
    read, _ = watch(model)
    sample(model, prompts, batch_rows=8)
    often = len(read)
    monkeypatch.setattr(slot_decoding, "_REFILL", 1.0)  # only an empty cache is filled
    read.clear()
    sample(model, prompts, batch_rows=8)
    assert len(read) <= 60 / 8 + 1 < often


def test_a_pass_over_prompts_is_bounded(monkeypatch):
    monkeypatch.setattr(slot_decoding, "_PREFILL_TOKENS", 10)
    model, rows = admitted("gpt2"), [*some_prompts(), [5] * 11]
    read, _ = watch(model)
    sample(model, left_padded(rows), batch_rows=32)
    assert sum(read) == sum(map(len, rows))
    assert all(tokens <= 10 for tokens in read[:-1])
    assert read[-1] == 11  # a longer prompt is read alone


# -- blocks


def blocks_of(model, prompts, **changes):
    options = {"max_tokens": 12, "eos_ids": ENDS, "pad_id": PAD, "seed": 1, "batch_rows": 4, **changes}
    return stream_responses(model, prompts, **options)


@pytest.mark.parametrize("make", [admitted, plain_model])
@pytest.mark.parametrize("block_rows", [1, 5, 17, 100])
def test_blocks_hold_each_response_once(make, block_rows):
    model, prompts = make("gpt2"), left_padded(some_prompts())
    need, calls = sample(model, prompts), []
    blocks = list(
        blocks_of(model, prompts, block_rows=block_rows, progress=lambda done, wanted: calls.append((done, wanted)))
    )
    assert sorted(row for block in blocks for row in block.rows) == list(range(17))
    assert all(len(block.rows) >= block_rows for block in blocks[:-1])
    assert (len(blocks) > 2) == (block_rows < 10)
    for block in blocks:
        assert block.rows == sorted(block.rows)
        assert block.logprobs_BR is None
        width = int(block.responses.response_mask_BR.sum(dim=1).max())
        assert_same(block.responses[:2], (x[block.rows, :width] for x in need[:2]))
        assert torch.equal(block.responses.finished_B, need.finished_B[block.rows])
    assert calls[-1] == (17, 17)
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})


@pytest.mark.parametrize("make", [admitted, plain_model])
def test_a_block_is_handed_over_as_soon_as_it_is_full(make):
    blocks = list(blocks_of(make("gpt2"), left_padded(some_prompts()), batch_rows=1, block_rows=3))
    assert [len(block.rows) for block in blocks] == [3, 3, 3, 3, 3, 2]


@pytest.mark.parametrize("make", [admitted, plain_model])
def test_the_model_is_the_callers_between_blocks(make):
    model, prompts = make("gpt2").train(), left_padded(some_prompts())
    modes = []
    handle = model.register_forward_pre_hook(
        lambda module, args: modes.append((module.training, torch.is_grad_enabled()))
    )
    need = sample(model, prompts)
    stream = blocks_of(model, prompts, block_rows=3)
    for block in stream:
        assert model.training
        assert torch.is_grad_enabled()
        assert not block.responses.response_ids_BR.is_inference()
        handle.remove()
        model(block.responses.response_ids_BR).logits.sum().backward()  # learns while others decode
        assert_same((block.responses.finished_B,), (need.finished_B[block.rows],))
        handle = model.register_forward_pre_hook(
            lambda module, args: modes.append((module.training, torch.is_grad_enabled()))
        )
    assert set(modes) == {(False, False)}
    assert model.training


@pytest.mark.parametrize("make", [admitted, plain_model])
def test_a_stream_may_be_closed_early(make):
    model, prompts = make("gpt2").train(), left_padded(some_prompts())
    stream = blocks_of(model, prompts, block_rows=2)
    next(stream)
    stream.close()
    assert model.training
    assert torch.is_grad_enabled()

    def fail(done, wanted):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(blocks_of(model, prompts, progress=fail))
    assert model.training
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("make", [admitted, plain_model])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probabilities_are_those_of_the_policy(make, temperature):
    model, prompts = make("mistral"), left_padded(some_prompts())
    block = next(blocks_of(model, prompts, batch_rows=17, temperature=temperature, keep_logprobs=True))
    need, _ = response_logprobs(model, prompts, block.responses, temperature=temperature)
    assert_close(block.logprobs_BR, need, scale=10)  # of logits that reach 20
    assert (block.logprobs_BR != 0).equal(block.responses.response_mask_BR)
    assert next(blocks_of(model, prompts, temperature=0.0, keep_logprobs=True)).logprobs_BR.eq(0).all()


@pytest.mark.parametrize("make", [admitted, plain_model])
def test_autocast_does_not_reach_the_sampler(make):
    model, prompts = make("llama"), left_padded(some_prompts())
    need = next(blocks_of(model, prompts, keep_logprobs=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        block = next(blocks_of(model, prompts, keep_logprobs=True))
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(block.logprobs_BR, need.logprobs_BR)


def test_a_frozen_model_leaves_nothing_behind_that_could_not_be_trained_with():
    model, prompts = admitted("llama").requires_grad_(False), left_padded(some_prompts())
    need = sample(admitted("llama"), prompts)
    assert_same(sample(model, prompts), need)
    model.requires_grad_(True)
    model(need.response_ids_BR).logits.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_rows_draw_from_the_streams_of_their_numbers():
    """Uniform numbers of one row, at temperature so high that they alone decide."""
    model = admitted("gpt2")
    rows = [11, 3, 40, 7, 5]
    ids = sample(
        model, left_padded(some_prompts(5)), rows=rows, temperature=1e9, eos_ids=[], batch_rows=2, iteration=6
    ).response_ids_BR
    need = (uniform_streams(rows, 12, seed=1, iteration=6).double() * VOCABULARY).long()
    assert Counter((ids - need).abs().flatten().tolist()).keys() <= {0, 1}  # 1: on the edge, by rounding
    assert (ids == need).float().mean() > 0.98
