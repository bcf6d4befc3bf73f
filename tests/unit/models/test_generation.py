from __future__ import annotations

import pytest
import torch

from lit_instruct.models.forward import response_logprobs
from lit_instruct.models.generation import choose_tokens, sample_responses, uniform_streams
from lit_instruct.types import PromptBatch
from tests.helpers.numbers import assert_close
from tests.unit.models.networks import EOS, FAMILIES, VOCABULARY, left_padded, ragged_rows, tiny_model, tokens

families = pytest.mark.parametrize("family", FAMILIES)
BELOW_ONE = 1 - 2**-24  # the largest fp32 number below 1, and the largest that a stream can give
PAD = 0
ENDS = tuple(range(3, 11))  # many ends of text, so that untrained models end at all lengths


# -- streams


def test_streams_depend_on_their_keys_alone():
    whole = uniform_streams(range(6), 5, seed=3, iteration=2)
    assert whole.shape == (6, 5)
    assert whole.dtype == torch.float32
    assert torch.equal(uniform_streams([4, 1], 5, seed=3, iteration=2), whole[[4, 1]])
    assert torch.equal(uniform_streams(range(6), 3, seed=3, iteration=2), whole[:, :3])  # fewer draws: a prefix
    for seed, iteration in ((4, 2), (3, 3), (2, 3)):
        assert not (uniform_streams(range(6), 5, seed=seed, iteration=iteration) == whole).any()
    many = uniform_streams(range(6), 40, seed=3, iteration=2)  # longer than a block of the generator:
    assert many.unique().numel() == many.numel()  # the stream of one row does not run into that of the next


def test_streams_are_uniform_and_uncorrelated():
    numbers = uniform_streams(range(400), 25, seed=0, iteration=0).double()
    assert ((numbers >= 0) & (numbers < 1)).all()
    # 10,000 draws: the standard error of the mean is 0.0029, of each decile's share 0.003; bounds are about five.
    assert abs(numbers.mean().item() - 0.5) < 0.015
    shares = torch.histc(numbers.flatten(), bins=10, min=0, max=1) / numbers.numel()
    assert (shares - 0.1).abs().max() < 0.015
    neighbours = torch.corrcoef(torch.stack([numbers[:-1].flatten(), numbers[1:].flatten()]))[0, 1]
    later = torch.corrcoef(torch.stack([numbers[:, :-1].flatten(), numbers[:, 1:].flatten()]))[0, 1]
    assert max(abs(neighbours.item()), abs(later.item())) < 0.05


# -- one token


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_tokens_follow_the_distribution(temperature):
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, -float("inf"), 1.2])
    draws = 20_000
    uniform = uniform_streams([0], draws, seed=1, iteration=0)[0]
    chosen = choose_tokens(logits.expand(draws, -1), uniform, temperature=temperature)
    expected = torch.softmax(logits.double() / temperature, dim=0) * draws
    counts = torch.bincount(chosen, minlength=6).double()
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_square = ((counts - expected)[possible].square() / expected[possible]).sum().item()
    assert chi_square < 18.5  # 4 degrees of freedom: exceeded once in 1,000 seeds


def test_tokens_invert_the_cumulative_sum():
    logits = torch.tensor([0.2, 0.5, 0.3]).log().repeat(6, 1)
    uniform = torch.tensor([0.0, 0.19, 0.21, 0.69, 0.71, BELOW_ONE])
    assert choose_tokens(logits, uniform, temperature=1.0).tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ends_of_the_interval_never_reach_an_impossible_token(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 37, generator=generator).mul(4).to(dtype)
    logits[:, :3] = logits[:, -5:] = -float("inf")  # cannot occur, at both ends and
    logits[:, 20] = -1e30  # in the middle: underflows to 0
    possible = torch.softmax(logits.float(), dim=-1) > 0
    for end in (0.0, BELOW_ONE):
        chosen = choose_tokens(logits, torch.full((500,), end), temperature=1.0)
        assert possible[torch.arange(500), chosen].all()
    first = choose_tokens(logits, torch.zeros(500), temperature=1.0)
    assert torch.equal(first, possible.long().argmax(dim=1))


def test_one_certain_token_is_always_chosen():
    logits = torch.full((3, 9), -float("inf"))
    logits[torch.arange(3), torch.tensor([0, 4, 8])] = 5.0
    for uniform in (0.0, 0.5, BELOW_ONE):
        assert choose_tokens(logits, torch.full((3,), uniform), temperature=1.0).tolist() == [0, 4, 8]


@pytest.mark.parametrize("vocabulary", [16384, 16385, 50257, 50304])
def test_a_large_vocabulary_is_searched_to_the_same_token(vocabulary):
    """Over 16384 tokens the search is in two levels; against the cumulative sum in fp64."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, vocabulary, generator=generator).mul(3)
    logits[:, 100:900] = -float("inf")  # whole blocks that cannot occur
    logits[:8, 60:] = -float("inf")  # everything in the first block
    logits[8:16, :-20] = -float("inf")  # everything in the last
    uniform = uniform_streams(range(64), 1, seed=0, iteration=0)[:, 0]
    chosen = choose_tokens(logits, uniform, temperature=0.7)
    cumulative = (logits.double() / 0.7).softmax(dim=1).cumsum(dim=1)
    before = torch.where(chosen > 0, cumulative.gather(1, (chosen[:, None] - 1).clamp_min(0)).squeeze(1), 0.0)
    behind = cumulative.gather(1, chosen[:, None]).squeeze(1)
    rounding = 1e-5  # of a cumulative sum in fp32
    assert ((before - rounding <= uniform) & (uniform <= behind + rounding)).all()
    exact = torch.searchsorted(cumulative, uniform[:, None].double(), right=True).squeeze(1)
    assert (chosen == exact).float().mean() > 0.9
    for end in (0.0, BELOW_ONE):
        last = choose_tokens(logits, torch.full((64,), end), temperature=0.7)
        assert logits[torch.arange(64), last].isfinite().all()
    assert torch.equal(choose_tokens(logits, torch.zeros(64), temperature=0.7), logits.isfinite().long().argmax(dim=1))


def test_temperature_zero_takes_the_most_probable():
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 1.0, -1.0]])
    for uniform in (0.0, 0.9):
        assert choose_tokens(logits, torch.full((2,), uniform), temperature=0).tolist() == [1, 0]


# -- whole responses


def seventeen_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [tokens(1 + index % 7, generator) for index in range(17)]


def sample(model, prompts, **changes):
    return sample_responses(model, prompts, **{"max_tokens": 12, "eos_ids": ENDS, "pad_id": PAD, **changes})


@families
def test_greedy_equals_generate_token_for_token(family):
    model, rows = tiny_model(family), ragged_rows()[0] + seventeen_prompts()[:4]
    ends = [7, 8, 9, 10, 11, 12]
    responses = sample_responses(
        model, left_padded(rows, extra=2), max_tokens=14, eos_ids=ends, pad_id=PAD, temperature=0.0
    )
    for index, row in enumerate(rows):  # one at a time, without padding
        need = model.generate(
            torch.tensor([row]), max_new_tokens=14, do_sample=False, eos_token_id=ends, pad_token_id=PAD
        )[0, len(row) :].tolist()
        assert responses.response_ids_BR[index][responses.response_mask_BR[index]].tolist() == need
        assert responses.finished_B[index].item() == (need[-1] in ends)


@families
def test_tokens_are_those_that_the_training_forward_would_choose(family):
    """What was sampled, scored anew without a cache, is what inverting the same uniform numbers gives."""
    model = tiny_model(family)
    prompts = left_padded(seventeen_prompts()[:6])
    responses = sample(model, prompts, temperature=0.8, seed=4, iteration=3)
    ids, mask = responses.response_ids_BR, responses.response_mask_BR
    streams = uniform_streams(range(6), 12, seed=4, iteration=3)
    for index, row in enumerate(seventeen_prompts()[:6]):
        written = ids[index][mask[index]].tolist()
        with torch.no_grad():
            logits = model(torch.tensor([row + written])).logits[0, len(row) - 1 : -1]
        assert choose_tokens(logits, streams[index, : len(written)], temperature=0.8).tolist() == written
    logprobs, _ = response_logprobs(model, prompts, responses, temperature=0.8)
    assert logprobs.isfinite().all()


@pytest.mark.parametrize("family", ["gpt2", "mistral", "llama"])
def test_responses_do_not_depend_on_the_batch_they_sit_in(family):
    model, rows = tiny_model(family), seventeen_prompts()
    whole = sample(model, left_padded(rows), batch_rows=32, seed=1)
    assert whole.response_mask_BR.sum(dim=1).unique().numel() > 2  # ragged, else there is nothing to see
    for batch_rows in (1, 3):
        parts = sample(model, left_padded(rows, extra=3), batch_rows=batch_rows, seed=1)
        for mine, theirs in zip(parts, whole, strict=True):
            assert torch.equal(mine, theirs)


def test_responses_do_not_depend_on_the_order_of_rows():
    model, rows = tiny_model("gpt2"), seventeen_prompts()
    whole = sample(model, left_padded(rows), seed=1)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    permuted = sample(model, left_padded([rows[index] for index in order]), rows=order, batch_rows=5, seed=1)
    for mine, theirs in zip(permuted, whole, strict=True):
        assert torch.equal(mine, theirs[order])
    tail = sample(model, left_padded(rows[11:]), rows=range(11, 17), seed=1)  # as a second process would
    for index in range(6):
        mine = tail.response_ids_BR[index][tail.response_mask_BR[index]]
        assert torch.equal(mine, whole.response_ids_BR[11 + index][whole.response_mask_BR[11 + index]])


def test_one_prompt_in_several_rows_gives_several_responses():
    model = tiny_model("gpt2")
    prompts = left_padded([[5, 6, 7]] * 8)
    ids = sample(model, prompts, eos_ids=[EOS]).response_ids_BR
    assert len({tuple(row) for row in ids.tolist()}) == 8
    again = sample(model, prompts, eos_ids=[EOS], iteration=1).response_ids_BR
    assert not any(tuple(row) in {tuple(other) for other in ids.tolist()} for row in again.tolist())


@pytest.mark.parametrize("share", [0.0, 2.0])
def test_responses_do_not_depend_on_compaction(monkeypatch, share):
    model, prompts = tiny_model("mistral"), left_padded(seventeen_prompts())
    usual = sample(model, prompts, seed=2)
    monkeypatch.setattr("lit_instruct.models.generation._COMPACT_AT", share)  # never, and at every single end
    for mine, theirs in zip(sample(model, prompts, seed=2), usual, strict=True):
        assert torch.equal(mine, theirs)


def test_finished_rows_leave_the_batch(monkeypatch):
    monkeypatch.setattr("lit_instruct.models.generation._COMPACT_AT", 2.0)
    model, prompts = tiny_model("gpt2"), left_padded(seventeen_prompts())
    seen = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    responses = sample(model, prompts, seed=2)
    lengths = responses.response_mask_BR.sum(dim=1)
    assert seen == [int((lengths > step).sum()) for step in range(int(lengths.max()))]
    assert seen[-1] < seen[0] == 17


def test_rows_leave_when_enough_have_finished():
    model, prompts = tiny_model("gpt2"), left_padded(seventeen_prompts())
    seen = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    lengths = sample(model, prompts, seed=2).response_mask_BR.sum(dim=1)
    for step, rows in enumerate(seen):
        still_open = int((lengths > step).sum())
        assert still_open <= rows <= still_open / 0.85


def test_the_end_of_text_is_kept_and_everything_after_is_padding():
    model = tiny_model("gpt2")
    responses = sample(model, left_padded(seventeen_prompts()), max_tokens=5)
    ids, mask, finished = responses
    assert mask.dtype == finished.dtype == torch.bool
    assert ids.shape == mask.shape
    assert finished.any()
    assert not finished.all()
    for row, real, done in zip(ids.tolist(), mask.tolist(), finished.tolist(), strict=True):
        length = sum(real)
        assert real == [True] * length + [False] * (len(real) - length)
        assert [token in ENDS for token in row[:length]] == [False] * (length - 1) + [done]
        assert row[length:] == [PAD] * (len(row) - length)
        assert done or length == 5


def test_the_width_is_that_of_the_longest():
    model = tiny_model("gpt2")
    responses = sample(model, left_padded(seventeen_prompts()), eos_ids=range(VOCABULARY))
    assert responses.response_ids_BR.shape == (17, 1)
    assert responses.finished_B.all()
    unending = sample(model, left_padded(seventeen_prompts()), eos_ids=[])
    assert unending.response_ids_BR.shape == (17, 12)
    assert unending.response_mask_BR.all()
    assert not unending.finished_B.any()


def test_no_prompts_give_no_responses():
    nothing = PromptBatch(torch.zeros(0, 3, dtype=torch.long), torch.zeros(0, 3, dtype=torch.bool))
    assert [len(x) for x in sample(tiny_model("gpt2"), nothing)] == [0, 0, 0]


def test_padding_of_the_prompts_is_never_read():
    model, prompts = tiny_model("gpt2"), left_padded(seventeen_prompts(), extra=2)
    other = prompts._replace(prompt_ids_BP=prompts.prompt_ids_BP.where(prompts.prompt_mask_BP, 13))
    for mine, theirs in zip(sample(model, other), sample(model, prompts), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("batch_rows", [4, 256])
def test_progress_ends_when_all_are_done(batch_rows):
    calls = []
    sample(
        tiny_model("gpt2"),
        left_padded(seventeen_prompts()),
        max_tokens=4,
        batch_rows=batch_rows,
        progress=lambda done, wanted: calls.append((done, wanted)),
    )
    done = [finished for finished, _ in calls]
    assert calls[-1] == (17, 17)
    assert done == sorted(set(done))  # every call brings news
    assert {wanted for _, wanted in calls} == {17}


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_put_back_also_after_an_error(training):
    model, prompts = tiny_model("gpt2").train(training), left_padded(seventeen_prompts())
    modes = []
    handle = model.register_forward_pre_hook(lambda module, args: modes.append(module.training))
    responses = sample(model, prompts)
    assert model.training == training
    assert not any(modes)
    assert not responses.response_ids_BR.requires_grad

    def fail(done, wanted):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(model, prompts, progress=fail)
    assert model.training == training
    handle.remove()


def test_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    model, prompts = tiny_model("gpt2"), left_padded(seventeen_prompts())
    before = torch.get_rng_state()
    sample(model, prompts)
    assert torch.equal(torch.get_rng_state(), before)


def test_samples_follow_the_model():
    """Two tokens deep, over all responses: frequencies against the model's own probabilities."""
    model = tiny_model("gpt2", vocab_size=5, eos_token_id=2, initializer_range=0.5)
    draws = 3000
    prompts = PromptBatch(torch.full((draws, 2), 3), torch.ones(draws, 2, dtype=torch.bool))
    ids = sample(model, prompts, max_tokens=2, eos_ids=[], batch_rows=draws).response_ids_BR
    with torch.no_grad():
        first = model(torch.tensor([[3, 3]])).logits[0, -1].double().softmax(0)
        second = model(torch.tensor([[3, 3, token] for token in range(5)])).logits[:, -1].double().softmax(1)
    expected = first[:, None] * second * draws
    counts = torch.bincount(ids[:, 0] * 5 + ids[:, 1], minlength=25).view(5, 5).double()
    often = expected > 5
    chi_square = ((counts - expected)[often].square() / expected[often]).sum().item()
    assert chi_square < 51.2  # 24 degrees of freedom at most: exceeded once in 1,000 seeds
    assert_close(expected.sum(), float(draws))
