"""Packed rows and shared prompts against one sequence at a time, on models that know nothing of packing."""

from __future__ import annotations

import copy
import json
import logging
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lit_instruct.models import attention
from lit_instruct.models.attention import NAME, Segment, attention_forward
from lit_instruct.models.backbone import load_language_model
from lit_instruct.models.forward import demonstration_loss, response_logprobs, response_values
from lit_instruct.models.handover import write_handover
from lit_instruct.models.packing import admission, enable_packing, pack_rows, pack_shared, refuse_packing
from lit_instruct.models.scalar_head import ScalarModel
from lit_instruct.models.value_model import SharedValueHead, policy_and_values
from lit_instruct.types import DemonstrationBatch
from tests.helpers.numbers import assert_close
from tests.helpers.tiny import tiny_llama, tiny_tokenizer
from tests.unit.models.networks import EOS, VOCABULARY, left_padded, right_padded
from tests.unit.models.packing_families import (
    PACKING,
    RANKINGS,
    REFUSED,
    WAYS,
    assert_read,
    assert_same_gradients,
    build,
    demonstrations,
    gradients_of,
    hidden_alone,
    logits_alone,
    padded_pairs,
    pairs_alone,
    passes,
    prepared,
    rankings,
    weights_of,
)

families = pytest.mark.parametrize("family", PACKING)
refused = pytest.mark.parametrize("family", REFUSED)
ways = pytest.mark.parametrize("way", WAYS)
blocks = pytest.mark.usefixtures("block")


@pytest.fixture(params=[0, 128], ids=["by segment", "in a block"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real sequences are longer than the tests': attend them one by one too."""
    monkeypatch.setattr(attention, "BLOCK", request.param)


Need = tuple[Any, dict[str, Tensor]]
"""What the oracle found: outputs and gradients."""


def scalar_model(family: str, way: str | None = None) -> ScalarModel:
    """The same weights each time; without a way, a model as transformers made it."""
    language_model = build(family, seed=1)
    if way is not None:
        prepared(language_model, way)
    torch.manual_seed(2)
    model = ScalarModel.on_language_model(language_model)
    model.head.bias.data.fill_(0.5)
    model.score_bias.fill_(0.25)
    return model


def scalars_alone(model: ScalarModel, row: list[int]) -> Tensor:
    """``[T]``, from the parts of the model."""
    return hidden_alone(model.trunk, row) @ model.head.weight[0] + model.head.bias - model.score_bias


# -- the oracles: one sequence at a time, formulas written out. Kept, since all ways are compared with the same.


@lru_cache
def demonstrations_alone(family: str) -> Need:
    model = build(family)
    assert model.config._attn_implementation != NAME
    total, count, right = torch.zeros(()), 0, 0
    for prompt, response in zip(*pairs_alone(), strict=True):
        table = logits_alone(model, prompt + response).log_softmax(dim=-1)
        for column, token in enumerate(response, start=len(prompt)):
            total = total - table[column - 1, token]
            right += int(table[column - 1].argmax()) == token
            count += 1
    (total / count).backward()
    return (total.item() / count, right / count, count), gradients_of(model)


@lru_cache
def responses_alone(family: str, temperature: float) -> Need:
    """Log-probabilities, entropy, variance, and values of a head on the trunk: ``[4, B, R]``."""
    model = build(family)
    head = SharedValueHead(model)
    set_head(head)
    heard: list[Tensor] = []
    model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: heard.append(inputs[0]))
    prompts, responses = pairs_alone()
    need = torch.zeros(4, len(prompts), padded_pairs()[1].response_mask_BR.shape[1])
    objective = torch.zeros(())
    weights = weights_of(need.shape[1:])
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        table = (logits_alone(model, prompt + response) / temperature).log_softmax(dim=-1)
        for column, token in enumerate(response):
            at = len(prompt) + column - 1
            surprise, share = -table[at], table[at].exp()
            mean = (share * surprise).sum()
            value = heard[-1][0, at] @ head.head.weight[0] + head.head.bias[0]
            moments = (mean, (share * (surprise - mean) ** 2).sum())
            need[:, row, column] = torch.stack([table[at, token], *moments, value]).detach()
            objective = objective + weights[row, column] * (table[at, token] + value)
    objective.backward()
    return need, gradients_of(model) | {f"value.{name}": grad for name, grad in gradients_of(head).items()}


@lru_cache
def values_alone(family: str) -> Need:
    model = scalar_model(family)
    prompts, responses = pairs_alone()
    need = torch.zeros(len(prompts), padded_pairs()[1].response_mask_BR.shape[1])
    objective = torch.zeros(())
    weights = weights_of(need.shape)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        values = scalars_alone(model, prompt + response)[len(prompt) - 1 : -1]
        need[row, : len(response)] = values.detach()
        objective = objective + (weights[row, : len(response)] * values).sum()
    objective.backward()
    return need, gradients_of(model)


@lru_cache
def ranking_alone(family: str, kind: str) -> Need:
    model = scalar_model(family)
    scores = torch.stack([scalars_alone(model, row)[-1] for row in rankings(kind)[1]])
    (weights_of(scores.shape) * scores).sum().backward()
    return scores.detach(), gradients_of(model)


def set_head(head: SharedValueHead) -> None:
    with torch.no_grad():
        head.head.weight.copy_(weights_of(head.head.weight.shape, seed=7) / 4)
        head.head.bias.fill_(0.5)


# -- parity in fp32. scale: three layers, other kernels and other orders of sums


@blocks
@families
@ways
def test_demonstrations(family: str, way: str) -> None:
    (loss, accuracy, count), gradients = demonstrations_alone(family)
    model = prepared(build(family), way)
    batch = demonstrations()
    with passes(model) as seen:
        mine, metrics = demonstration_loss(model, batch)
        mine.backward()
    assert_read(seen, way, int(batch.attention_mask_BT.sum()))
    assert_close(mine, loss)
    assert_close(metrics["token_acc"], accuracy)
    assert int(metrics["tokens"]) == count
    assert_same_gradients(gradients_of(model), gradients)


@families
@ways
@pytest.mark.parametrize("temperature", [0.7])
def test_response_logprobs_their_surprise_and_values_of_a_shared_trunk(
    family: str, way: str, temperature: float
) -> None:
    need, gradients = responses_alone(family, temperature)
    model = prepared(build(family), way)
    head = SharedValueHead(model)
    set_head(head)
    batch = padded_pairs()
    weights = weights_of(need.shape[1:])
    with passes(model) as seen:
        logprobs, moments, values = policy_and_values(model, head, *batch, temperature=temperature, surprise=True)
        (weights * (logprobs + values)).sum().backward()
    assert_read(seen, way, int(batch[0].prompt_mask_BP.sum() + batch[1].response_mask_BR.sum()))
    assert moments is not None
    for mine, theirs in zip((logprobs, *moments, values), need, strict=True):
        assert mine.dtype == torch.float32
        assert_close(mine, theirs, scale=10)  # the padding, which is zero in both, is compared, too
    got = gradients_of(model) | {f"value.{name}": grad for name, grad in gradients_of(head).items()}
    assert_same_gradients(got, gradients)
    with torch.no_grad():
        again, none = response_logprobs(model, *batch, temperature=temperature)
    assert none is None
    assert torch.equal(again, logprobs)


@families
@ways
def test_response_values_and_scalars(family: str, way: str) -> None:
    need, gradients = values_alone(family)
    model = scalar_model(family, way)
    batch = padded_pairs()
    with passes(model.trunk) as seen:
        values = response_values(model, *batch)
        (weights_of(need.shape) * values).sum().backward()
    assert_read(seen, way, int(batch[0].prompt_mask_BP.sum() + batch[1].response_mask_BR.sum()))
    assert_close(values, need, scale=10)
    assert_same_gradients(gradients_of(model), gradients)

    plain, rows = scalar_model(family), [p + r for p, r in zip(*pairs_alone(), strict=True)]
    ids, mask, _ = right_padded(rows, extra=2)
    wanted = mask & (torch.arange(mask.shape[1]) % 3 != 1)
    with torch.no_grad():
        everywhere, some, scores = model(ids, mask), model.at(ids, mask, wanted), model.scores(ids, mask)
        alone = [scalars_alone(plain, row) for row in rows]
    assert_close(everywhere[mask], torch.cat(alone), scale=10)
    assert not everywhere[~mask].any()
    assert_close(some, torch.cat([scalars[torch.arange(len(scalars)) % 3 != 1] for scalars in alone]), scale=10)
    assert_close(scores, torch.stack([scalars[-1] for scalars in alone]), scale=10)


@blocks
@families
@ways
@pytest.mark.parametrize("kind", RANKINGS)
def test_rankings_read_each_prompt_once(family: str, way: str, kind: str) -> None:
    need, gradients = ranking_alone(family, kind)
    model = scalar_model(family, way)
    batch, _ = rankings(kind)
    with passes(model.trunk) as seen:
        scores = model.ranking_scores(batch)
        (weights_of(scores.shape) * scores).sum().backward()
    assert_read(seen, way, int(batch.prompt_mask_BP.sum() + batch.response_mask_NR.sum()))
    assert_close(scores, need, scale=10)
    assert_same_gradients(gradients_of(model), gradients)


# -- bf16: packed rows lose no more than padded ones do

BF16_FAMILIES = ["llama", "qwen2", "gpt2", "gemma2"]
LONG = pytest.mark.parametrize("longest", [384, 0], ids=["short", "long"])  # the two ways to attend on a CPU


def relative_error(got: dict[str, Tensor], need: dict[str, Tensor]) -> float:
    """Of all gradients as one vector."""
    difference = sum(float((got[name] - need[name]).square().sum()) for name in need)
    return (difference / sum(float(grad.square().sum()) for grad in need.values())) ** 0.5


def bf16_gradients(family: str, job: str, way: str, *, autocast: bool) -> dict[str, Tensor]:
    language_model = prepared(build(family, initializer_range=0.1), way)
    torch.manual_seed(2)
    network = language_model if job == "demonstrations" else ScalarModel.on_language_model(language_model)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        if job == "demonstrations":
            objective = demonstration_loss(network, demonstrations())[0]
        else:
            scores = network.ranking_scores(rankings("ragged")[0])
            objective = (weights_of(scores.shape) * scores).sum()
    objective.backward()
    return gradients_of(network)


@blocks
@pytest.mark.parametrize("family", BF16_FAMILIES)
@pytest.mark.parametrize("job", ["demonstrations", "rankings"])
@LONG
def test_bf16(monkeypatch: pytest.MonkeyPatch, family: str, job: str, longest: int) -> None:
    """Under autocast, as a Trainer with ``precision="bf16-mixed"`` runs it.

    Measured against fp32, relative, padded rows | packed ones: llama 7e-3 and 13e-3 (demonstrations, rankings) | 8e-3
    and 13e-3; qwen2 4e-3, 9e-3 | 5e-3, 10e-3; gpt2 3e-3, 11e-3 | the same; gemma2, whose unembedding amplifies it,
    22e-3, 24e-3 | the same. The bound is 3e-2; between packed and padded the two roundings add up, to less than that.
    """
    monkeypatch.setattr(attention, "SHORT", longest)
    exact = bf16_gradients(family, job, "padded", autocast=False)
    padded, packed, recomputed = (bf16_gradients(family, job, way, autocast=True) for way in ("padded", *WAYS[:2]))
    assert relative_error(packed, exact) > 1e-4  # it was bf16
    for got, need in ((packed, exact), (packed, padded)):
        assert_close(relative_error(got, need), 0.0, dtype=torch.bfloat16, scale=1.5)
    assert packed.keys() == recomputed.keys()
    assert all(torch.equal(packed[name], recomputed[name]) for name in packed)


# -- nobody sees another segment


def packed_logits(model: Any, batch: DemonstrationBatch) -> list[Tensor]:
    packed = pack_rows(*batch[:2])
    with torch.no_grad():
        return list(model(**packed.arguments()).logits[0].split(packed.segments.lengths))


@blocks
@families
@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
def test_a_token_of_another_sequence_changes_no_bit(family: str, half: bool) -> None:
    # All experts take all tokens of a row in one product, whose rounding may depend on how many there are.
    exact = family not in ("gpt_oss", "deepseek_v3")
    model = prepared(build(family), "packed").eval()
    batch = demonstrations()
    changed = batch._replace(input_ids_BT=batch.input_ids_BT.clone())
    changed.input_ids_BT[2, :3] = torch.tensor([30, 31, 32])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        before, after = packed_logits(model, batch), packed_logits(model, changed)
    for row, (mine, theirs) in enumerate(zip(before, after, strict=True)):
        if row == 2:
            assert (mine != theirs).any(dim=1).all()
        elif exact:
            assert torch.equal(mine, theirs)
        else:
            assert_close(mine, theirs, dtype=torch.bfloat16 if half else torch.float32)


@blocks
@families
@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
def test_a_token_of_another_response_changes_no_bit(family: str, half: bool) -> None:
    exact = family not in ("gpt_oss", "deepseek_v3")
    model = prepared(build(family), "packed").eval()
    batch, _ = rankings("ragged")

    def hidden(batch: Any) -> list[Tensor]:
        packed, _ = pack_shared(*batch[:4], batch.group_N)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            return list(model(**packed.arguments()).logits[0].split(packed.segments.lengths))

    before = hidden(batch)
    response, prompt = batch.response_ids_NR.clone(), batch.prompt_ids_BP.clone()
    response[1, 0] = 30  # segments: prompt, 3 responses, prompt, 2, prompt, 4
    prompt[1, -1] = 30
    for changed, moved in (
        (batch._replace(response_ids_NR=response), {2}),
        (batch._replace(prompt_ids_BP=prompt), {4, 5, 6}),
    ):
        for number, (mine, theirs) in enumerate(zip(before, hidden(changed), strict=True)):
            if number in moved:
                assert not torch.equal(mine, theirs)
            elif exact:
                assert torch.equal(mine, theirs)
            else:
                assert_close(mine, theirs, dtype=torch.bfloat16 if half else torch.float32)


@blocks
@families
def test_no_gradient_reaches_another_segment(family: str) -> None:
    model = prepared(build(family), "packed")
    batch, _ = rankings("ragged")
    packed, _ = pack_shared(*batch[:4], batch.group_N)
    embedded = model.get_input_embeddings()(packed.ids_T[None]).detach().requires_grad_()
    arguments = packed.arguments()
    del arguments["input_ids"]
    logits = model(inputs_embeds=embedded, **arguments).logits[0].split(packed.segments.lengths)
    (reached,) = torch.autograd.grad(logits[2].square().sum(), embedded)  # the second response of the first prompt
    by_segment = [bool(part.any()) for part in reached[0].split(packed.segments.lengths)]
    assert by_segment == [number in (0, 2) for number in range(len(by_segment))]


# -- positions


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_a_packed_row_may_be_longer_than_the_table_of_positions(family: str) -> None:
    """Only each sequence must fit. The table holds 64."""
    batch = DemonstrationBatch(*(torch.cat([x, x.roll(1, dims=0)]) for x in demonstrations()))
    assert batch.attention_mask_BT.sum() > 64
    (loss, _, _), gradients = demonstrations_alone(family)
    model = prepared(build(family), "packed")
    mine, _ = demonstration_loss(model, batch)
    mine.backward()
    assert_close(mine, loss)
    assert_same_gradients(gradients_of(model), gradients)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_positions_are_what_makes_it_right(family: str) -> None:
    """Where they run on over the row, the numbers are far off: the comparisons above would notice."""
    model, batch = prepared(build(family), "packed").eval(), demonstrations()
    packed = pack_rows(*batch[:2])
    running = packed._replace(positions_T=torch.arange(len(packed.ids_T)))
    with torch.no_grad():
        right, wrong = (model(**rows.arguments()).logits[0] for rows in (packed, running))
    with pytest.raises(AssertionError):
        assert_close(wrong, right, scale=1000)


# -- how rows are packed


def test_rows_are_laid_behind_one_another() -> None:
    ids = torch.tensor([[0, 5, 6, 7], [8, 9, 0, 0], [0, 0, 0, 0], [0, 4, 3, 0]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 1, 0]]).bool()
    packed = pack_rows(ids, mask)
    assert packed.ids_T.tolist() == [5, 6, 7, 8, 9, 4, 3]
    assert packed.positions_T.tolist() == [0, 1, 2, 0, 1, 0, 1]
    assert packed.segments.parts == (Segment(0, 3), Segment(3, 5), Segment(5, 7))
    arguments = packed.arguments()
    assert arguments["input_ids"].shape == arguments["position_ids"].shape == (1, 7)
    assert arguments["attention_mask"].shape == (1, 1, 0, 0)
    assert arguments["use_cache"] is False


def test_a_prompt_stands_before_all_its_responses() -> None:
    prompt_ids, prompt_mask, _ = left_padded([[5, 6], [7], [8, 9]])
    response_ids, response_mask, _ = right_padded([[11, 12, EOS], [13, EOS], [EOS]])
    packed, ends = pack_shared(prompt_ids, prompt_mask, response_ids, response_mask, torch.tensor([0, 0, 2]))
    assert packed.ids_T.tolist() == [5, 6, 11, 12, EOS, 13, EOS, 7, 8, 9, EOS]
    assert packed.positions_T.tolist() == [0, 1, 2, 3, 4, 2, 3, 0, 0, 1, 2]
    need = (
        Segment(0, 2),
        Segment(2, 5, 0, 2),
        Segment(5, 7, 0, 2),
        Segment(7, 8),
        Segment(8, 10),
        Segment(10, 11, 8, 10),
    )
    assert packed.segments.parts == need
    assert ends.tolist() == [4, 6, 10]


def test_responses_in_any_order_get_their_own_scores() -> None:
    model = scalar_model("llama", "packed")
    batch, _ = rankings("ragged")
    order = torch.tensor([4, 0, 8, 2, 6, 1, 7, 3, 5])
    mixed = batch._replace(
        **{name: getattr(batch, name)[order] for name in ("response_ids_NR", "response_mask_NR", "group_N")}
    )
    assert_close(model.ranking_scores(mixed), model.ranking_scores(batch)[order])


def test_only_wanted_places_reach_the_head_over_the_vocabulary() -> None:
    """It is the widest layer: neither prompts nor padding are unembedded."""
    model = prepared(build("llama"), "packed")
    seen: list[tuple[int, ...]] = []
    model.lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[:2])))
    prompts, responses = padded_pairs()
    response_logprobs(model, prompts, responses, temperature=1.0)
    demonstration_loss(model, demonstrations())
    assert seen == [(1, int(responses.response_mask_BR.sum()))] * 2


# -- admission


@refused
def test_refused_with_the_reason_and_left_alone(family: str, caplog: pytest.LogCaptureFixture) -> None:
    model = build(family)
    before, modes = model.config._attn_implementation, [module.training for module in model.modules()]
    with caplog.at_level(logging.WARNING, logger="lit_instruct"):
        found = enable_packing(model)
        demonstration_loss(model, demonstrations())
        demonstration_loss(model, demonstrations())
    assert not found.packs
    with pytest.raises(AssertionError, match=REFUSED[family][1]):
        raise AssertionError(found.reason)
    (record,) = (record for record in caplog.records if record.name.startswith("lit_instruct"))  # once, at load
    assert type(model).__name__ in record.getMessage()
    assert found.reason in record.getMessage()
    assert model.config._attn_implementation == before
    assert [module.training for module in model.modules()] == modes
    assert admission(model) == admission(model.base_model) == found


@refused
def test_padded_rows_are_exact_for_the_refused(family: str) -> None:
    (loss, accuracy, count), gradients = demonstrations_alone(family)
    model = build(family)
    enable_packing(model)
    mine, metrics = demonstration_loss(model, demonstrations())
    mine.backward()
    assert_close(mine, loss)
    assert_close(metrics["token_acc"], accuracy)
    assert int(metrics["tokens"]) == count
    assert_same_gradients(gradients_of(model), gradients)

    if family == "llama4_text":  # its decoder cannot be had apart from its head
        return
    need, gradients = ranking_alone(family, "ragged")
    language_model = build(family, seed=1)
    enable_packing(language_model)
    torch.manual_seed(2)
    scalars = ScalarModel.on_language_model(language_model)
    scalars.head.bias.data.fill_(0.5)
    scalars.score_bias.fill_(0.25)
    scores = scalars.ranking_scores(rankings("ragged")[0])
    (weights_of(scores.shape) * scores).sum().backward()
    assert_close(scores, need, scale=10)
    assert_same_gradients(gradients_of(scalars), gradients)


def test_a_wide_window_that_never_reaches_the_attention_is_found_out() -> None:
    """No probe of a few tokens notices a window of 4096 columns by its numbers."""
    found = enable_packing(build("qwen2_moe", sliding_window=4096))
    assert not found.packs
    assert "ask for the attention windows None in 3 layers" in found.reason
    assert "promises 4096 in 2 layers, None in 1 layers" in found.reason
    assert enable_packing(build("qwen2", sliding_window=4096)).packs


def test_a_leak_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that ignores the prefix, or sees the whole row, is refused by what it does."""

    def blind(*arguments: Any, segments: Any = None, **keywords: Any) -> Any:
        if segments is not None:
            segments = type(segments)([Segment(p.start, p.stop) for p in segments.parts])
        return attention_forward(*arguments, segments=segments, **keywords)

    def seeing(*arguments: Any, segments: Any = None, **keywords: Any) -> Any:
        if segments is not None:
            segments = type(segments)([Segment(0, segments.parts[-1].stop)])
        return attention_forward(*arguments, segments=segments, **keywords)

    for wrong in (blind, seeing):
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, NAME, wrong)
        assert ALL_ATTENTION_FUNCTIONS[NAME] is wrong
        # Fresh weights, of which attention makes little in so narrow a network: the least there is to see.
        for family in ("llama", "gpt2"):
            model = build(family, initializer_range=0.02)
            found = enable_packing(model)
            assert not found.packs
            assert "other logits" in found.reason
            assert model.config._attn_implementation == "sdpa"


def test_a_model_that_drops_the_keyword_raises_and_does_not_leak() -> None:
    packed = pack_rows(*demonstrations()[:2])
    for family, name in (("stablelm", NAME), ("llama", "sdpa"), ("llama", "eager"), ("opt", "sdpa"), ("gpt2", "eager")):
        model = build(family)
        model.set_attn_implementation(name)
        with pytest.raises(RuntimeError, match="size"):
            model(**packed.arguments())


@pytest.mark.parametrize("error", [AssertionError(), ValueError("many\nlines")])
def test_whatever_a_model_raises_means_no(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    model = build("llama")

    def fail(*_: Any) -> None:
        raise error

    model.model.layers[1].register_forward_hook(fail)
    found = enable_packing(model)
    assert not found.packs
    assert type(error).__name__ in found.reason
    assert "\n" not in found.reason


def test_a_table_of_positions_shorter_than_the_probe_is_no_error() -> None:
    found = enable_packing(build("gpt2", n_positions=8))
    assert not found.packs
    assert "IndexError" in found.reason


def test_what_is_found_out_stays_with_the_model() -> None:
    never = build("gpt2")
    assert not admission(never).packs
    assert "not enabled" in admission(never).reason
    model = never.train()
    model.lm_head.eval()  # a mixture, which must come back
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    assert enable_packing(model).packs
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not model.lm_head.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    for other in (model.base_model, copy.deepcopy(model), copy.deepcopy(model.base_model)):
        assert admission(other).packs
    refuse_packing(model, "a test")
    assert admission(model) == admission(model.base_model) == (False, "a test")


# -- how models come to be asked


def test_loading_asks(tmp_path: Any) -> None:
    small = {"vocab_size": VOCABULARY, "eos_token_id": EOS, "bos_token_id": None, "pad_token_id": EOS}
    model = load_language_model(tiny_llama(**small))
    assert admission(model).packs
    model.save_pretrained(tmp_path / "folder")
    assert NAME not in (tmp_path / "folder" / "config.json").read_text(encoding="utf-8")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "folder").config._attn_implementation == "sdpa"
    assert admission(load_language_model(tmp_path / "folder")).packs
    scalars = ScalarModel.on_language_model(model)
    for stage, network, weights in (("sft", "policy.", model), ("rm", "reward_model.", scalars)):
        checkpoint = {"state_dict": {f"{network}{name}": tensor for name, tensor in weights.state_dict().items()}}
        write_handover(checkpoint, stage=stage, network=network, config=model.config, tokenizer=tiny_tokenizer())
        assert NAME not in json.dumps(checkpoint["lit_instruct"])
        torch.save(checkpoint, tmp_path / f"{stage}.ckpt")
    assert admission(load_language_model(tmp_path / "sft.ckpt")).packs
    assert admission(ScalarModel.from_base(tmp_path / "rm.ckpt").trunk).packs
    assert admission(ScalarModel.from_base(tmp_path / "sft.ckpt").trunk).packs


@pytest.mark.parametrize("name", ["eager", "sdpa", None])
def test_an_attention_that_is_asked_for_is_left(name: str | None) -> None:
    model = load_language_model(tiny_llama(vocab_size=VOCABULARY, attn_implementation=name))
    if name is None:
        assert admission(model).packs
        assert model.config._attn_implementation == NAME
    else:
        assert model.config._attn_implementation == name
        assert admission(model) == (False, f"attn_implementation is set to {name!r}")
