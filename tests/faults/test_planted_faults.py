"""Faults planted into real tiny PPO runs, as they would be written, and named by ``Health``; healthy runs: silence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lit_instruct.modules.ppo as ppo
import lit_instruct.rollouts as rollouts
from lit_instruct import PPOModule, PromptDataModule, SFTModule
from lit_instruct.callbacks import Health, PtxMixing
from lit_instruct.callbacks.health_checks import Limits
from lit_instruct.functional import kl_estimates
from lit_instruct.models import sampling
from lit_instruct.models.residual_dropout import add_residual_dropout
from lit_instruct.types import Responses
from tests.helpers.tiny import EOS, Record, ids, prompts, quiet_trainer, save_model, save_stage, texts, write_jsonl


@pytest.fixture
def make(sft_ckpt: str, rm_ckpt: str) -> Callable[..., PPOModule]:
    """A module that learns soberly: two updates of 16 responses an iteration."""

    def build(**changes: Any) -> PPOModule:
        sizes: dict[str, Any] = {
            "minibatch_size": 16,
            "micro_batch_size": 16,
            "rollout_batch_size": 32,
            "max_response_tokens": 6,
            "kl_coef": 0.2,
            "learning_rate": 1e-3,
            "value_learning_rate": 3e-3,
            "warmup_iterations": 3,
        }
        return PPOModule(policy=sft_ckpt, reward_model=rm_ckpt, **(sizes | changes))

    return build


@pytest.fixture
def text(folder: Path) -> str:
    return texts(folder / "t.jsonl", 60)


def diagnose(
    module: PPOModule,
    folder: Path,
    *,
    until: str | None = None,
    iterations: int = 24,
    callbacks: Any = (),
    data: str | None = None,
    **health: Any,
) -> set[str]:
    """Run until the finding is there, at most some iterations, and say what was found."""
    doctor = Health(**health)

    def enough(module: PPOModule, metrics: Any) -> None:
        if module.iterations_done == iterations or until in {finding.name for finding in doctor.findings}:
            module.trainer.should_stop = True

    path = prompts(folder / "p.jsonl", 128) if data is None else data
    loader = PromptDataModule(path, module.tokenizer, batch_size=32, val=0.0, seed=module.hparams["seed"])
    run = quiet_trainer(max_epochs=-1, callbacks=[*callbacks, doctor, Record(after_iteration=enough)])
    run.fit(module, datamodule=loader)
    return {finding.name for finding in doctor.findings}


def with_arguments(function: Callable[..., Any], **changes: Any) -> Callable[..., Any]:
    """The function, called with other arguments than the caller gives."""
    return lambda *args, **kwargs: function(*args, **(kwargs | changes))


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_a_healthy_run_has_no_finding(make: Any, folder: Path, text: str, seed: int) -> None:
    ptx = PtxMixing(text, coef=0.3, ratio=0.5, micro_batch_size=8, chunk_tokens=20)
    assert diagnose(make(seed=seed), folder, callbacks=[ptx] if seed % 2 else []) == set()


@pytest.mark.parametrize(
    "changes", [{"temperature": 0.7}, {"whiten_rewards": True}, {"kl_coef": 0.0, "inner_epochs": 2}]
)
def test_other_healthy_settings_have_none_either(make: Any, folder: Path, changes: dict[str, Any]) -> None:
    assert diagnose(make(**changes), folder, iterations=14) == set()


# -- the update reads otherwise than the rollout


def test_residual_dropout_left_on(make: Any, folder: Path) -> None:
    module = make()
    add_residual_dropout(module.policy, 0.1)
    found = diagnose(module, folder, until="dropout_on", iterations=2)
    assert found == {"dropout_on", "first_minibatch_differs"} | (found & {"reference_reads_differently"})


def test_attention_dropout_left_on(make: Any, folder: Path) -> None:
    module = make()
    for layer in module.policy.model.layers:
        layer.self_attn.attention_dropout = 0.3
    assert diagnose(module, folder, until="dropout_on", iterations=1) >= {"dropout_on", "first_minibatch_differs"}


def test_a_dropout_that_no_module_shows(make: Any, folder: Path) -> None:
    module = make()
    module.policy.model.norm.register_forward_hook(
        lambda layer, inputs, output: nn.functional.dropout(output, 0.1, training=layer.training)
    )
    found = diagnose(module, folder, iterations=1)
    assert "first_minibatch_differs" in found
    assert "dropout_on" not in found


def test_temperature_in_the_update_only(make: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ppo, "policy_and_values", with_arguments(ppo.policy_and_values, temperature=0.7))
    found = diagnose(make(), folder, iterations=3)
    assert "first_minibatch_differs" in found
    assert not found & {"reference_is_another_model", "reference_reads_differently", "dropout_on"}


# -- the reference


def test_temperature_in_the_reference_only(make: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollouts, "response_logprobs", with_arguments(rollouts.response_logprobs, temperature=1.0))
    assert diagnose(make(temperature=0.7), folder, iterations=1) == {"reference_reads_differently"}


def test_reference_from_another_checkpoint(make: Any, folder: Path) -> None:
    other = save_stage(SFTModule(save_model(folder / "other", seed=3)), folder / "other.ckpt")
    found = diagnose(make(reference=other), folder, iterations=1)
    assert found >= {"reference_is_another_model"}
    assert "reference_reads_differently" not in found
    again = diagnose(make(reference=other), folder, iterations=1, ignore=["reference_is_another_model"])
    assert again == found - {"reference_is_another_model"}


# -- the sampler


def with_responses(stream: Any, change: Any) -> Any:
    """The same stream, each block's responses changed."""

    def changed(*args: Any, **kwargs: Any) -> Any:
        return (block._replace(responses=change(*block.responses)) for block in stream(*args, **kwargs))

    return changed


@pytest.mark.parametrize("temperature", [0.7, 1.4])
def test_temperature_in_the_sampler_only(
    make: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    monkeypatch.setattr(ppo, "stream_responses", with_arguments(ppo.stream_responses, temperature=temperature))
    found = diagnose(make(), folder, until="sampler_differs")
    assert "sampler_differs" in found
    assert not found & {"first_minibatch_differs", "reference_reads_differently"}


def test_top_k_in_the_sampler(make: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choose = sampling.choose_tokens

    def top_k(logits: Tensor, uniform: Tensor, *, temperature: float) -> Tensor:
        lowest = logits.topk(8, dim=-1).values[:, -1:]
        return choose(logits.where(logits >= lowest, float("-inf")), uniform, temperature=temperature)

    monkeypatch.setattr(sampling, "choose_tokens", top_k)
    assert "sampler_differs" in diagnose(make(), folder, until="sampler_differs")


def test_padding_counted_as_response(make: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def everything(ids_BR: Tensor, mask_BR: Tensor, finished_B: Tensor) -> Responses:
        return Responses(ids_BR, torch.ones_like(mask_BR), finished_B)

    monkeypatch.setattr(ppo, "stream_responses", with_responses(ppo.stream_responses, everything))
    found = diagnose(make(), folder, iterations=1)
    assert found >= {"tokens_after_end"}
    assert found <= {"tokens_after_end", "end_not_counted"}


def test_the_end_of_text_not_counted(make: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_end(ids_BR: Tensor, mask_BR: Tensor, finished_B: Tensor) -> Responses:
        mask_BR = mask_BR & ((ids_BR != EOS) | (torch.arange(mask_BR.shape[1]) == 0))
        return Responses(ids_BR, mask_BR, finished_B)

    monkeypatch.setattr(ppo, "stream_responses", with_responses(ppo.stream_responses, without_end))
    assert "end_not_counted" in diagnose(make(), folder, iterations=1)


def test_a_model_that_never_learned_to_stop(make: Any, folder: Path) -> None:
    """What demonstrations without an end of text leave behind."""
    module = make()
    for network in (module.policy, module.reference):
        network.register_forward_hook(_never_ends)
    found = diagnose(module, folder, until="never_stops")
    assert found >= {"never_stops"}
    assert found <= {"never_stops", "scores_equal"}  # all replaced by the rule for a missing end


def _never_ends(network: nn.Module, inputs: Any, output: Any) -> Any:
    forbidden = torch.zeros(output.logits.shape[-1])
    forbidden[EOS] = 1e4
    output.logits = output.logits - forbidden
    return output


def test_prompts_that_repeat(make: Any, folder: Path) -> None:
    path = write_jsonl(folder / "same.jsonl", [{"prompt": f"w1 w{row % 4}"} for row in range(64)])
    assert diagnose(make(), folder, data=path, iterations=1) == {"few_prompts"}


# -- rewards


def _last_column(scores: Tensor, logprobs: Tensor, reference: Tensor, mask: Tensor, *, kl_coef: float) -> Tensor:
    rewards = -kl_coef * kl_estimates(logprobs, reference).k1
    rewards[:, -1] += scores
    return rewards.where(mask, 0.0)


def _one_behind(scores: Tensor, logprobs: Tensor, reference: Tensor, mask: Tensor, *, kl_coef: float) -> Tensor:
    rewards = -kl_coef * kl_estimates(logprobs, reference).k1
    columns = mask.sum(dim=1).clamp_max(mask.shape[1] - 1)
    rewards[torch.arange(len(mask)), columns] += scores
    return rewards


def _one_ahead(scores: Tensor, logprobs: Tensor, reference: Tensor, mask: Tensor, *, kl_coef: float) -> Tensor:
    rewards = -kl_coef * kl_estimates(logprobs, reference).k1
    rewards[torch.arange(len(mask)), (mask.sum(dim=1) - 2).clamp_min(0)] += scores
    return rewards.where(mask, 0.0)


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        (_last_column, {"score_misplaced"}),
        (_one_behind, {"score_misplaced", "padding_paid"}),
        (_one_ahead, {"score_misplaced"}),
    ],
)
def test_score_at_the_wrong_column(
    make: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, rewards: Any, expected: set[str]
) -> None:
    monkeypatch.setattr(rollouts, "token_rewards", rewards)
    assert diagnose(make(), folder, iterations=1) == expected


def test_whitening_without_the_mask(make: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollouts, "whiten", lambda values, mask, **_: (values - values.mean()) / values.std())
    assert diagnose(make(), folder, iterations=1) == {"padding_paid"}


def _scored_by(module: PPOModule, score: Callable[[Responses, Tensor], Tensor]) -> None:
    """Replace the scores: ``score(responses, those of the reward model)``."""
    module.scorer.register_forward_hook(lambda scorer, inputs, output: score(inputs[1], output))


def test_rewards_scaled_by_100(make: Any, folder: Path) -> None:
    module = make(kl_coef=0.02)
    _scored_by(module, lambda responses, scores: 100 * scores)
    assert diagnose(module, folder, iterations=1) >= {"scores_too_wide", "value_clip_tight"}


def test_a_reward_for_length(make: Any, folder: Path) -> None:
    module = make(missing_eos="none")
    _scored_by(module, lambda responses, scores: responses.response_mask_BR.sum(dim=1).float() / 4)
    assert "score_follows_length" in diagnose(module, folder, until="score_follows_length")


def test_a_reward_that_says_nothing(make: Any, folder: Path) -> None:
    module = make(missing_eos="none")
    _scored_by(module, lambda responses, scores: torch.full_like(scores, 0.5))
    assert "scores_equal" in diagnose(module, folder, until="scores_equal")


def test_collapse_to_a_repeated_token(make: Any, folder: Path) -> None:
    """A reward for one word, no price on the KL, and steps that are large."""
    module = make(missing_eos="none", kl_coef=0.0, learning_rate=0.02)
    word = ids("w5")[0]
    _scored_by(module, lambda responses, scores: (responses.response_ids_BR == word).sum(dim=1).float())
    found = diagnose(module, folder, until="text_repeats", iterations=40)
    assert {"text_repeats", "kl_runs_away"} <= found


def test_advantages_with_the_wrong_sign(make: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    estimate = rollouts.generalized_advantages

    def flipped(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        advantages, returns = estimate(*args, **kwargs)
        return -advantages, returns

    monkeypatch.setattr(rollouts, "generalized_advantages", flipped)
    module = make(missing_eos="none", kl_coef=0.0, learning_rate=3e-3)
    assert "score_falls" in diagnose(module, folder, until="score_falls", iterations=60)


# -- updates


def test_learning_rate_100_times_too_high(make: Any, folder: Path) -> None:
    assert "steps_too_large" in diagnose(make(learning_rate=0.1), folder, until="steps_too_large")


def test_a_policy_that_cannot_move(make: Any, folder: Path) -> None:
    hurried: dict[str, Any] = {"limits": Limits(patience=9), "ignore": ["values_explain_nothing"]}
    assert diagnose(make(learning_rate=1e-9), folder, until="nothing_learned", **hurried) == {"nothing_learned"}


def test_a_value_model_that_does_not_learn(make: Any, folder: Path) -> None:
    module = make(value_learning_rate=0.0)
    nn.init.zeros_(module.value_model.head.weight)
    assert "values_equal" in diagnose(module, folder, until="values_equal")


def test_gradients_that_are_not_a_number(make: Any, folder: Path) -> None:
    module, updates = make(), 0

    def spoil(gradient: Tensor) -> Tensor:
        nonlocal updates
        updates += 1
        return gradient * float("nan") if updates == 3 else gradient

    module.policy.model.norm.weight.register_hook(spoil)
    found = diagnose(module, folder, until="not_finite", iterations=4)
    assert found == {"not_finite"}


# -- pretraining gradients


def test_pretraining_loss_with_the_wrong_sign(make: Any, folder: Path, text: str, monkeypatch: Any) -> None:
    losses = PtxMixing.auxiliary_losses

    def flipped(self: PtxMixing, *args: Any) -> Iterator[Tensor]:
        return (-loss for loss in losses(self, *args))

    monkeypatch.setattr(PtxMixing, "auxiliary_losses", flipped)
    ptx = PtxMixing(text, coef=1.0, ratio=0.5, micro_batch_size=8, chunk_tokens=20)
    module = make(learning_rate=5e-3)
    assert "ptx_loss_rises" in diagnose(module, folder, callbacks=[ptx], until="ptx_loss_rises", iterations=40)


def test_a_pretraining_gradient_that_leaves_ppo_nothing(make: Any, folder: Path, text: str) -> None:
    """Like a loss that is summed over tokens instead of averaged. Adam would undo the clip; plain descent does not."""
    ptx = PtxMixing(text, coef=2000.0, ratio=0.5, micro_batch_size=8, chunk_tokens=20)
    module = make(learning_rate=1e-5, optimizer=lambda groups: torch.optim.SGD(groups))
    hurried: dict[str, Any] = {"limits": Limits(patience=9), "ignore": ["values_explain_nothing"]}
    assert diagnose(module, folder, callbacks=[ptx], until="ptx_drowns_ppo", **hurried) == {"ptx_drowns_ppo"}
