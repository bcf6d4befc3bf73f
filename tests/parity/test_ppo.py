"""One iteration of PPOModule against the numbers of TRL 1.10, the last release of that library with a PPO trainer.

``make_trl_ppo_numbers.py`` drove the real trainer and wrote them down, so this test needs no TRL. Two conversions:

- TRL whitens advantages with the unbiased variance (n - 1), this project with the population's (n). The policy loss and
  its gradient are proportional to the advantages, so one factor turns the one into the other.
- Where a response is padded, TRL pays the score one column later than this project. No stored response is padded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from lit_instruct import PPOModule, RewardModule
from lit_instruct.models.generation import Finished
from lit_instruct.types import PromptBatch, Responses
from tests.helpers.numbers import assert_close
from tests.helpers.tiny import EOS, Record, save_stage, save_tokenizer
from tests.parity.reference_weights import fill, flat_gradients

TRL: dict[str, Any] = json.loads(Path(__file__).with_name("trl_ppo_numbers.json").read_text(encoding="utf-8"))
SETTINGS, ROLLOUT, UPDATES = TRL["settings"], TRL["rollout"], TRL["updates"]
TOKENS = sum(map(len, TRL["response_ids"]))
UNBIASED = (1 - 1 / TOKENS) ** 0.5
"""What turns advantages of population variance 1 into such of unbiased variance 1."""


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> PPOModule:
    """The four networks with TRL's weights; TRL's heads have no bias, so this one takes the score bias off again."""
    folder = tmp_path_factory.mktemp("trl")
    fields = dict(TRL["model"])
    AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields)).save_pretrained(folder)
    made = PPOModule(
        policy=save_tokenizer(folder),
        reward_model=save_stage(RewardModule(str(folder)), folder / "rm.ckpt"),
        minibatch_size=len(TRL["response_ids"]),
        micro_batch_size=4,
        inner_epochs=SETTINGS["num_ppo_epochs"],
        max_response_tokens=SETTINGS["response_length"],
        temperature=SETTINGS["temperature"],
        kl_coef=SETTINGS["kl_coef"],
        discount=SETTINGS["gamma"],
        gae_lambda=SETTINGS["lam"],
        clip_range=SETTINGS["cliprange"],
        value_clip_range=SETTINGS["cliprange_value"],
        value_coef=SETTINGS["vf_coef"],
        missing_eos="subtract",
        missing_eos_value=SETTINGS["missing_eos_penalty"],
    )
    reward_model = made.reward_model
    assert reward_model is not None
    for network, key in (
        (made.policy, "policy"),
        (made.reference, "reference"),
        (reward_model, "reward"),
        (made.value_model, "value"),
    ):
        fill(network, key)
    for scalar in (reward_model, made.value_model):
        scalar.head.bias.data.fill_(0.7)
        scalar.score_bias.fill_(0.7)
    return made


def stored_batch() -> tuple[PromptBatch, Responses]:
    prompt_ids_BP, response_ids_BR = torch.tensor(TRL["prompt_ids"]), torch.tensor(TRL["response_ids"])
    lengths_B = torch.tensor(TRL["prompt_lengths"])
    width = prompt_ids_BP.shape[1]
    prompt_mask_BP = torch.arange(width) >= width - lengths_B[:, None]
    everywhere_BR = torch.ones_like(response_ids_BR, dtype=torch.bool)
    return (
        PromptBatch(prompt_ids_BP, prompt_mask_BP),
        Responses(response_ids_BR, everywhere_BR, response_ids_BR[:, -1] == EOS),
    )


@pytest.fixture(scope="module")
def iteration(module: PPOModule) -> dict[str, list[Any]]:
    """Run one iteration on the stored responses; what its hooks saw, and the gradients of its steps."""
    prompts, responses = stored_batch()
    record = Record(
        on_experience=lambda module, rollout, experience: experience,
        after_update=lambda module, metrics: dict(metrics),
    )
    seen: dict[str, list[Any]] = record.seen | {"gradients": []}

    @torch.no_grad()
    def step() -> None:
        networks = {"policy": module.policy, "value_model": module.value_model}
        for parameter in module.policy.parameters():
            assert parameter.grad is not None
            parameter.grad *= UNBIASED
        seen["gradients"].append({name: flat_gradients(network) for name, network in networks.items()})
        for name, network in networks.items():
            for parameter in network.parameters():
                assert parameter.grad is not None
                parameter -= TRL["learning_rates"][name] * parameter.grad
        module.value_model.head.bias.fill_(0.7)  # which TRL's head does not have
        module.zero_grad()

    with pytest.MonkeyPatch.context() as patch:
        block = Finished(list(range(len(responses.finished_B))), responses, None)
        patch.setattr("lit_instruct.modules.ppo.stream_responses", lambda *_, **__: [block])
        module.iteration(prompts, hooks=[record], backward=lambda loss: loss.backward(), step=step)
    return seen


@pytest.fixture(scope="module")
def experience(iteration: dict[str, list[Any]]) -> Any:
    return iteration["on_experience"][0]


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        ("old_logprobs_BR", "logprobs"),
        ("reference_logprobs_BR", "ref_logprobs"),
        ("old_values_BR", "values"),
        ("scores_B", "scores"),
    ],
)
def test_rollout(experience: Any, mine: str, theirs: str) -> None:
    assert_close(getattr(experience.rollout, mine), ROLLOUT[theirs])


def test_token_rewards(experience: Any) -> None:
    assert_close(experience.rewards_BR, ROLLOUT["rewards"])


def test_advantages_and_returns(experience: Any) -> None:
    assert_close(experience.returns_BR, ROLLOUT["returns"])
    assert_close(experience.returns_BR - experience.rollout.old_values_BR, ROLLOUT["advantages"])
    assert_close(experience.advantages_BR * UNBIASED, ROLLOUT["whitened"])


@pytest.mark.parametrize("update", range(len(UPDATES)))
def test_losses_and_diagnostics(iteration: dict[str, list[Any]], update: int) -> None:
    mine, theirs = iteration["after_update"][update], UPDATES[update]
    assert_close(float(mine["policy/loss"]) * UNBIASED, theirs["pg_loss"])
    assert_close(mine["value/loss"], theirs["vf_loss"])
    assert_close(mine["policy/clip_fraction"], theirs["pg_clipfrac"])
    assert_close(mine["value/clip_fraction"], theirs["vf_clipfrac"])
    assert_close(mine["policy/approx_kl_k2"], theirs["approxkl"])
    assert_close(mine["policy/ratio_mean"], theirs["ratio"])
    assert_close(mine["policy/entropy"], theirs["entropy"])
    combined = float(mine["policy/loss"]) * UNBIASED + SETTINGS["vf_coef"] * float(mine["value/loss"])
    assert_close(combined, theirs["loss"])


@pytest.mark.parametrize("network", ["policy", "value_model"])
@pytest.mark.parametrize("update", range(len(UPDATES)))
def test_gradients(iteration: dict[str, list[Any]], update: int, network: str) -> None:
    mine: Tensor = iteration["gradients"][update][network]
    assert_close(mine, UPDATES[update]["gradients"][network])
    assert float(mine.norm()) > 0.1


def test_the_second_update_is_a_case_that_tells() -> None:
    """The first one has ratio 1 and old values, whatever the clipping."""
    assert 0.1 < UPDATES[1]["pg_clipfrac"] < 0.9
    assert 0.1 < UPDATES[1]["vf_clipfrac"] < 0.9
    assert abs(UPDATES[1]["ratio"] - 1) > 0.01
