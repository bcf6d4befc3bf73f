"""Facts about an experience that is right, and about ones that are wrong in one place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lit_instruct.callbacks.health_facts import active_dropouts, computes_in_fp32, experience_facts, same_weights
from lit_instruct.functional import lengths_to_mask
from lit_instruct.models.adapters import LoraSettings, add_adapter, make_base
from lit_instruct.models.backbone import load_language_model
from lit_instruct.models.residual_dropout import add_residual_dropout
from lit_instruct.rollouts import assess
from lit_instruct.types import Experience, Rollout
from tests.helpers.numbers import assert_close

END, PAD = 2, 0
SHARES = ("tokens_after_end", "end_not_counted", "score_misplaced", "padding_paid", "scores_equal", "values_equal")


def right(*, whiten_rewards: bool = False, scores: list[float] | None = None) -> Experience:
    """Four responses: two that end, one that is cut at the limit, one of the end of text alone."""
    lengths = torch.tensor([3, 5, 4, 1])
    mask = lengths_to_mask(lengths, 5)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 9, (4, 5), generator=generator).where(mask, PAD)
    finished = torch.tensor([True, False, True, True])
    ids[finished, lengths[finished] - 1] = END
    old, reference, values = (torch.randn(4, 5, generator=generator).where(mask, 0.0) for _ in range(3))
    score = torch.tensor(scores or [1.0, -2.0, 300.0, 0.5])
    rollout = Rollout(
        torch.ones(4, 2, dtype=torch.long),
        torch.ones(4, 2, dtype=torch.bool),
        ids,
        mask,
        finished,
        -old.abs(),
        -reference.abs(),
        values,
        score,
        score,
    )
    return assess(rollout, kl_coef=0.3, discount=1.0, gae_lambda=0.95, whiten_rewards=whiten_rewards)


def facts(experience: Experience, **changes: Any) -> dict[str, float]:
    settings = {"kl_coef": 0.3, "whiten_rewards": False, "eos_ids": [END]} | changes
    return {name: float(value) for name, value in experience_facts(experience, **settings).items()}


def wrong(**changes: Any) -> Experience:
    """The right experience with some tensors of the rollout or its own replaced."""
    experience = right()
    own = {name: changes.pop(name) for name in ("rewards_BR", "advantages_BR", "returns_BR") if name in changes}
    return experience._replace(rollout=experience.rollout._replace(**changes), **own)


def test_what_is_right() -> None:
    found = facts(right())
    assert {name: found[name] for name in SHARES} == dict.fromkeys(SHARES, 0.0)
    rollout = right().rollout
    k1 = (rollout.old_logprobs_BR - rollout.reference_logprobs_BR)[rollout.response_mask_BR]
    assert_close(found["kl_per_token"], float(k1.abs().sum()) / 13)


@pytest.mark.parametrize(("scale", "kl_coef"), [(1e-3, 0.3), (1e4, 0.3), (1.0, 0.29)])
def test_rounding_is_told_from_another_coefficient(scale: float, kl_coef: float) -> None:
    experience = right(scores=[1.0 * scale, -2.0 * scale, 3.0 * scale, scale])
    rounded = experience._replace(rewards_BR=experience.rewards_BR * (1 + 3e-7))
    assert facts(rounded, kl_coef=kl_coef)["score_misplaced"] == (kl_coef != 0.3)


def test_tokens_after_the_end() -> None:
    rollout = right().rollout
    mask = rollout.response_mask_BR.clone()
    mask[0, 3] = True
    found = facts(wrong(response_mask_BR=mask))
    assert found["tokens_after_end"] == 0.25
    ids = rollout.response_ids_BR.clone()
    ids[0, 0] = END  # sampling went on
    assert facts(wrong(response_ids_BR=ids))["tokens_after_end"] == 0.25
    ids[0, 0] = 7
    ids[~rollout.response_mask_BR] = END  # padding may be the end of text: only what counts is looked at
    assert facts(wrong(response_ids_BR=ids))["tokens_after_end"] == 0.0


def test_the_end_that_does_not_count() -> None:
    rollout = right().rollout
    mask = rollout.response_mask_BR & (rollout.response_ids_BR != END)
    assert facts(wrong(response_mask_BR=mask))["end_not_counted"] == 0.75
    assert facts(wrong(finished_B=torch.tensor([True, True, True, True])))["end_not_counted"] == 0.25
    assert facts(wrong(finished_B=torch.tensor([False, False, True, True])))["end_not_counted"] == 0.25
    assert facts(right(), eos_ids=[END, 77])["end_not_counted"] == 0.0
    assert facts(right(), eos_ids=[77])["end_not_counted"] == 0.75


def test_the_score_elsewhere() -> None:
    rewards = right().rewards_BR.clone()
    rewards[0, 2] -= 1.0
    rewards[0, 1] += 1.0
    assert facts(wrong(rewards_BR=rewards))["score_misplaced"] == 0.25
    assert facts(wrong(rewards_BR=rewards), whiten_rewards=True)["score_misplaced"] == 0.0
    whitened = right(whiten_rewards=True)
    assert facts(whitened)["score_misplaced"] == 1.0
    assert facts(whitened, whiten_rewards=True)["score_misplaced"] == 0.0


@pytest.mark.parametrize("name", ["rewards_BR", "advantages_BR", "returns_BR"])
@pytest.mark.parametrize("value", [1e-6, float("nan")])
def test_padding_that_is_paid(name: str, value: float) -> None:
    tensor = getattr(right(), name).clone()
    tensor[2, 4] = value
    found = facts(wrong(**{name: tensor}))
    assert found["padding_paid"] == 0.25
    assert found["score_misplaced"] == 0.0


def test_all_equal() -> None:
    assert facts(right(scores=[0.1] * 4))["scores_equal"] == 1.0
    assert facts(right(scores=[0.1] * 3 + [0.1001]))["scores_equal"] == 0.0
    mask = right().rollout.response_mask_BR
    values = torch.full((4, 5), 0.1).where(mask, 0.0)
    assert facts(wrong(old_values_BR=values))["values_equal"] == 1.0
    values[1, 1] = 0.2
    assert facts(wrong(old_values_BR=values))["values_equal"] == 0.0


# -- networks


def test_dropouts_that_act(base: str) -> None:
    model = load_language_model(base)
    assert model.training
    assert active_dropouts(model) == []
    model.model.layers[0].self_attn.attention_dropout = 0.1
    assert active_dropouts(model) == ["model.layers.0.self_attn"]
    assert active_dropouts(model.eval()) == []


@pytest.mark.parametrize("layer", [nn.Dropout, nn.AlphaDropout])
def test_dropout_modules(layer: Any) -> None:
    network = nn.Sequential(nn.Linear(2, 2), layer(0.1), layer(0.0))
    assert active_dropouts(network) == ["1"]
    network[1].eval()
    assert active_dropouts(network) == []
    assert active_dropouts(nn.Dropout(0.5)) == ["Dropout"]


def test_dropout_put_on_from_outside(base: str) -> None:
    model = load_language_model(base)
    handles = add_residual_dropout(model, 0.2)
    assert sorted(active_dropouts(model)) == ["model.layers.0.mlp", "model.layers.0.self_attn"]
    assert active_dropouts(model.eval()) == []
    for handle in handles:
        handle.remove()
    assert active_dropouts(model.train()) == []


def test_same_weights(base: str) -> None:
    one, other = load_language_model(base), load_language_model(base)
    assert same_weights(one, other)
    add_adapter(make_base(one, source=None), LoraSettings(r=2))  # B is 0
    assert same_weights(one, other)
    with torch.no_grad():
        other.model.norm.weight[3] += 1e-6
    assert not same_weights(one, other)
    assert not same_weights(one, load_language_model(base).bfloat16())
    assert not same_weights(nn.Linear(2, 3), nn.Linear(3, 2))
    assert not same_weights(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))


def test_the_precision(base: str) -> None:
    model, cpu = load_language_model(base), torch.device("cpu")
    assert computes_in_fp32(model, cpu)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not computes_in_fp32(model, cpu)
    assert not computes_in_fp32(model.bfloat16(), cpu)
