from __future__ import annotations

import copy

import pytest
import torch

from lit_instruct.models.forward import join
from lit_instruct.models.handover import write_handover
from lit_instruct.models.scalar_head import ScalarModel, _decoder
from lit_instruct.rewards import RewardModelScorer
from lit_instruct.types import ConfigError
from tests.helpers.numbers import assert_close
from tests.helpers.tiny import tiny_tokenizer
from tests.unit.models.networks import (
    EOS,
    FAMILIES,
    left_padded,
    ragged_batch,
    ragged_rows,
    right_padded,
    scalars_alone,
    tiny_model,
    tiny_scalar_model,
)

families = pytest.mark.parametrize("family", FAMILIES)


@families
def test_the_score_is_read_at_the_last_real_token(family):
    """The pad id is the end of text here: whoever looks for the last id that is no padding reads one token early."""
    model = tiny_scalar_model(family)
    prompt_rows, response_rows = ragged_rows()
    ids, mask, _ = join(left_padded(prompt_rows), right_padded(response_rows))
    need = [scalars_alone(model, p + r)[-1].item() for p, r in zip(prompt_rows, response_rows, strict=True)]
    assert_close(model.scores(ids, mask), need, scale=5)  # two layers of other kernel shapes
    whole, whole_mask, _ = right_padded([p + r for p, r in zip(prompt_rows, response_rows, strict=True)], extra=2)
    assert_close(model.scores(whole, whole_mask), need, scale=5)  # padded on the right only


@families
def test_scores_depend_on_neither_padding_nor_neighbours(family):
    model = tiny_scalar_model(family)
    prompt_rows, response_rows = ragged_rows()
    ids, mask, _ = join(left_padded(prompt_rows), right_padded(response_rows))
    scores = model.scores(ids, mask)
    wide = [torch.nn.functional.pad(x, (4, 3), value=value) for x, value in ((ids, 9), (mask, False))]
    assert_close(model.scores(*wide), scores)
    order = torch.tensor([3, 0, 4, 2, 1])
    assert_close(model.scores(ids[order], mask[order]), scores[order])
    assert_close(model.scores(ids[1:3], mask[1:3]), scores[1:3])
    other = ids.clone()
    other[0] = 5
    assert_close(model.scores(other, mask)[1:], scores[1:])


def test_values_are_aligned_one_before_each_token_and_the_score_is_not():
    model = tiny_scalar_model("opt")
    prompt, response = [5, 6, 7], [8, 9, EOS]
    ids, mask = torch.tensor([prompt + response]), torch.ones(1, 6, dtype=torch.bool)
    alone = scalars_alone(model, prompt + response)
    assert_close(model(ids, mask)[0], alone)
    before = torch.tensor([[False, False, True, True, True, False]])
    assert_close(model.at(ids, mask, before), alone[2:5])
    assert_close(model.scores(ids, mask)[0], alone[5])


def test_the_bias_is_subtracted_everywhere_and_survives_the_state_dict():
    model = tiny_scalar_model("llama")
    prompts, responses = ragged_batch()
    ids, mask, _ = join(prompts, responses)
    other = copy.deepcopy(model)
    other.score_bias.fill_(2.25)
    for speak in (
        lambda m: m.scores(ids, mask),
        lambda m: m(ids, mask)[mask],  # zero at padding
        lambda m: m.at(ids, mask, mask),
    ):
        assert_close(speak(model) - speak(other), torch.full_like(speak(model), 2.0))
    fresh = ScalarModel(tiny_model("llama", seed=5).base_model)
    fresh.load_state_dict(other.state_dict())
    assert fresh.score_bias.item() == 2.25
    assert_close(fresh.scores(ids, mask), other.scores(ids, mask))
    assert "score_bias" not in dict(model.named_parameters())


def test_head_starts_at_one_over_the_root_of_width_plus_one():
    torch.manual_seed(0)
    width = 255
    trunk = tiny_model("llama", hidden_size=width + 1, num_hidden_layers=1, num_attention_heads=2).base_model
    heads = torch.stack([ScalarModel(trunk).head.weight[0] for _ in range(40)])
    need = (width + 2) ** -0.5
    assert heads.numel() == 40 * 256
    # The sample's std of n normal numbers has a relative error of 1/sqrt(2n) = 0.7 %; the bound is five of those.
    assert abs(heads.std().item() / need - 1) < 0.035
    assert abs(heads.mean().item()) < 5 * need / heads.numel() ** 0.5
    assert ScalarModel(trunk).head.bias.item() == 0
    assert ScalarModel(trunk).score_bias.item() == 0


def test_score_is_fp32_and_exact_under_autocast():
    model = tiny_scalar_model("llama")
    ids, mask, _ = join(*ragged_batch())
    heard = []
    model.trunk.register_forward_hook(lambda _, inputs, out: heard.append(out.last_hidden_state))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = model.scores(ids, mask)
    (hidden,) = heard
    assert scores.dtype == torch.float32
    last = mask.long().cumsum(1).argmax(1)
    picked = hidden[torch.arange(len(ids)), last].double()
    assert_close(scores, picked @ model.head.weight[0].double() + model.head.bias.double() - model.score_bias)


def test_a_decoder_that_projects_its_last_states_down_gets_a_head_that_fits():
    """OPT-350m: hidden_size 1024, but its last hidden states are as wide as its embeddings, 512."""
    model = ScalarModel(tiny_model("opt", hidden_size=32, do_layer_norm_before=False).base_model)
    assert model.head.in_features == 16
    ids, mask, _ = join(*ragged_batch())
    assert model.scores(ids, mask).shape == (len(ids),)


def test_from_base_takes_the_decoder_of_a_language_model_and_a_reward_model_whole(tmp_path):
    language = tiny_model("llama", seed=3)
    language.save_pretrained(tmp_path / "folder")
    fresh = ScalarModel.from_base(str(tmp_path / "folder"))
    for name, tensor in language.base_model.state_dict().items():
        assert torch.equal(fresh.trunk.state_dict()[name], tensor)
    assert fresh.score_bias.item() == 0

    with torch.no_grad():
        fresh.head.bias.fill_(0.5)
    fresh.score_bias.fill_(-1.5)
    for stage, network in (("rm", "model."), ("sft", "policy.")):
        weights = fresh if stage == "rm" else language
        checkpoint = {"state_dict": {f"{network}{name}": tensor for name, tensor in weights.state_dict().items()}}
        write_handover(checkpoint, stage=stage, network=network, config=language.config, tokenizer=tiny_tokenizer())
        torch.save(checkpoint, tmp_path / f"{stage}.ckpt")
    ids, mask, _ = join(*ragged_batch())
    again = ScalarModel.from_base(tmp_path / "rm.ckpt")
    assert again.score_bias.item() == -1.5
    assert_close(again.scores(ids, mask), fresh.scores(ids, mask))
    from_policy = ScalarModel.from_base(tmp_path / "sft.ckpt")
    assert torch.equal(from_policy.trunk.state_dict()["norm.weight"], language.model.state_dict()["norm.weight"])
    assert from_policy.score_bias.item() == 0  # a fresh head


@pytest.mark.parametrize(
    ("name", "tensor", "text"),
    [
        ("head.bias", None, "head.bias is missing"),
        ("trunk.norm.weight", None, "trunk.norm.weight is missing"),
        ("head.weight", torch.zeros(1, 3), "head.weight has the shape [1, 3] instead of [1, 16]"),
    ],
)
def test_a_reward_model_whose_weights_do_not_fit(tmp_path, name, tensor, text):
    model = tiny_scalar_model("llama")
    weights = model.state_dict()
    if tensor is None:
        del weights[name]
    else:
        weights[name] = tensor
    checkpoint = {"state_dict": {f"reward_model.{name}": tensor for name, tensor in weights.items()}}
    write_handover(checkpoint, stage="rm", network="reward_model.", config=model.config, tokenizer=tiny_tokenizer())
    torch.save(checkpoint, tmp_path / "rm.ckpt")
    with pytest.raises(ConfigError) as error:
        ScalarModel.from_base(tmp_path / "rm.ckpt")
    for part in ("rm.ckpt", text, "Do: "):
        assert part in str(error.value)


def test_a_model_without_a_decoder_of_its_own_is_refused():
    language = tiny_model("llama")
    language.base_model_prefix = "nothing"  # what base_model looks up: absent, it gives the model itself
    with pytest.raises(ConfigError, match="no decoder apart from its head"):
        _decoder(language)


@pytest.mark.parametrize("batch_rows", [1, 2, 64])
def test_scorer_does_not_depend_on_batch_rows(batch_rows):
    model = tiny_scalar_model("gpt2")
    prompt_rows, response_rows = ragged_rows()
    prompts, responses = left_padded(prompt_rows), right_padded(response_rows, extra=1)
    need = [scalars_alone(model, p + r)[-1].item() for p, r in zip(prompt_rows, response_rows, strict=True)]
    scores = RewardModelScorer(model, batch_rows=batch_rows)(prompts, responses)
    assert_close(scores, need, scale=5)
    assert not scores.requires_grad
    assert scores.dtype == torch.float32


def test_scorer_freezes_its_model_and_splits_the_rows():
    model = tiny_scalar_model("gpt2").train()
    scorer = RewardModelScorer(model, batch_rows=2)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    rows = []
    model.trunk.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    scorer(*ragged_batch())
    assert rows == [2, 2, 1]
