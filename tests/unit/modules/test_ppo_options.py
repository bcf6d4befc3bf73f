"""PPOModule's options: where scores and values come from, value warm-up, what each part's gradient measures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_instruct import PPOModule, PromptDataModule, RewardModule
from lit_instruct.callbacks import PtxMixing
from lit_instruct.models.scalar_head import ScalarModel
from lit_instruct.models.value_model import SharedValueHead
from lit_instruct.rewards import RewardModelScorer, WeightedSum
from lit_instruct.rollouts import assess, minibatches
from lit_instruct.types import ConfigError, Experience, PromptBatch, Responses
from tests.helpers.numbers import assert_close
from tests.helpers.tiny import (
    Record,
    Scored,
    gradients,
    ids,
    prompts,
    quiet_trainer,
    save_model,
    save_stage,
    sgd,
    texts,
    tiny_llama,
    tiny_tokenizer,
    weights,
)

(PAID,) = ids("w7")


def pay(_: PromptBatch, responses: Responses) -> Tensor:
    return ((responses.response_ids_BR == PAID) & responses.response_mask_BR).sum(dim=1).float()


@pytest.fixture
def make(sft_ckpt: str, rm_ckpt: str) -> Any:
    def build(**changes: Any) -> PPOModule:
        sizes = {
            "policy": sft_ckpt,
            "reward_model": None if "reward" in changes else rm_ckpt,
            "episodes": 32,
            "minibatch_size": 4,
            "micro_batch_size": 4,
            "max_response_tokens": 5,
            "learning_rate": 0.5,
            "value_learning_rate": 0.05,
            "warmup_iterations": 0,
            "optimizer": sgd,
            "missing_eos": "none",
        }
        return PPOModule(**(sizes | changes))

    return build


@pytest.fixture
def path(folder: Path) -> str:
    return prompts(folder / "p.jsonl", 16)


def fit(module: PPOModule, path: str, *callbacks: Any) -> None:
    data = PromptDataModule(path, module.tokenizer, batch_size=8, val=0.0)
    quiet_trainer(max_epochs=-1, callbacks=list(callbacks)).fit(module, datamodule=data)


def first_batch(module: PPOModule, path: str) -> PromptBatch:
    data = PromptDataModule(path, module.tokenizer, batch_size=8, val=0.0)
    data.setup()
    loader = data.train_dataloader()
    loader.sampler.set_epoch(0)
    return next(iter(loader))


def iterate(module: PPOModule, batch: PromptBatch, step: Any, *hooks: Any) -> dict[str, Any]:
    return module.iteration(batch, hooks=hooks, backward=lambda loss: loss.backward(), step=step)


@pytest.mark.parametrize(
    ("changes", "got"), [({"reward_model": None}, "neither"), ({"reward": Scored(pay), "reward_model": "x"}, "both")]
)
def test_scores_come_from_one_place(make: Any, changes: dict[str, Any], got: str) -> None:
    with pytest.raises(ConfigError, match=f"reward_model, reward: got {got}; need one of them"):
        make(**changes)


def test_without_a_reward_model_values_start_from_the_policy(make: Any, path: str, folder: Path) -> None:
    module = make(reward=Scored(pay))
    assert module.reward_model is None
    assert isinstance(module.value_model, ScalarModel)
    assert_close(weights(module.value_model.trunk), weights(module.policy.base_model))
    record = Record(after_iteration=lambda _, metrics: float(metrics["objective/score"]))
    data = PromptDataModule(path, module.tokenizer, batch_size=8, val=0.0)
    run = quiet_trainer(max_epochs=-1, callbacks=[record])
    run.fit(module, datamodule=data)
    assert len(record.seen["after_iteration"]) == 4
    run.save_checkpoint(folder / "ppo.ckpt")
    loaded = PPOModule.load_from_checkpoint(folder / "ppo.ckpt", reward=Scored(pay))
    assert_close(weights(loaded.policy), weights(module.policy))
    with pytest.raises(ConfigError, match="got neither"):
        PPOModule.load_from_checkpoint(folder / "ppo.ckpt")


def test_the_context_of_a_reward_model_in_a_sum_counts(make: Any, folder: Path) -> None:
    """Else it would read positions that it has never seen, without a word."""
    short = save_model(folder / "short", max_position_embeddings=8)
    scorer = RewardModelScorer(save_stage(RewardModule(short), folder / "short.ckpt"))
    with pytest.raises(ConfigError, match="must fit into the reward_model's context of 8 tokens"):
        make(reward=WeightedSum([scorer, Scored(pay)], [1.0, 0.5]), max_response_tokens=8)


def test_a_value_model_of_its_own(make: Any, rm_ckpt: str, sft_ckpt: str) -> None:
    module = make(reward=Scored(pay), value_model=rm_ckpt)
    assert_close(module.value_model.score_bias, 0.7)
    fresh = make(value_model=sft_ckpt).value_model
    assert_close(fresh.score_bias, 0.0)


def test_a_value_model_that_reads_other_tokens_is_refused(make: Any, folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["w99"])
    tokenizer.save_pretrained(folder / "tokenizer")
    other = save_stage(RewardModule(tiny_llama(), tokenizer=str(folder / "tokenizer")), folder / "rm.ckpt")
    with pytest.raises(ConfigError, match=r"value_model: .*another tokenizer"):
        make(value_model=other)


def test_the_shared_trunk_gets_both_gradients(make: Any, path: str) -> None:
    """One minibatch against two plain backward passes over the same policy."""
    torch.manual_seed(0)
    module = make(memory="shared_trunk", minibatch_size=8, micro_batch_size=3)
    assert isinstance(module.value_model, SharedValueHead)
    assert module.value_coef == 0.1
    torch.manual_seed(0)
    plain = make(memory="shared_trunk", minibatch_size=8)
    plain.value_model.load_state_dict(module.value_model.state_dict())
    batch = first_batch(module, path)
    seen: list[tuple[Tensor, Tensor]] = []
    iterate(module, batch, lambda: seen.append((gradients(module.policy), gradients(module.value_model))))
    experience = assess(plain.rollout(batch), kl_coef=0.02, discount=1.0, gae_lambda=0.95)
    terms = [term for row in range(8) for term in row_terms(plain, experience, row)]
    policy_terms, value_terms = (torch.stack(column) for column in zip(*terms, strict=True))
    (policy_terms.mean() + 0.1 * 0.5 * value_terms.mean()).backward()
    assert_close(seen[0][0], gradients(plain.policy), scale=10.0)  # the plain pass has no padding: another kernel
    assert_close(seen[0][1], gradients(plain.value_model), scale=10.0)


def row_terms(module: PPOModule, experience: Experience, row: int) -> list[tuple[Tensor, Tensor]]:
    """At the first step: ratio 1 and values unchanged, so nothing is clipped."""
    rollout = experience.rollout
    prompt = rollout.prompt_ids_BP[row][rollout.prompt_mask_BP[row]]
    response = rollout.response_ids_BR[row][rollout.response_mask_BR[row]]
    output = module.policy(input_ids=torch.cat([prompt, response])[None], output_hidden_states=True)
    logprobs, hidden = output.logits[0].log_softmax(dim=-1), output.hidden_states[-1][0]
    head = module.value_model.head
    found = []
    for t, token in enumerate(response):
        before = len(prompt) + t - 1
        ratio = (logprobs[before, token] - rollout.old_logprobs_BR[row, t]).exp()
        value = hidden[before] @ head.weight[0] + head.bias[0]
        found.append((-experience.advantages_BR[row, t] * ratio, (value - experience.returns_BR[row, t]) ** 2))
    return found


def test_value_coefficient(make: Any) -> None:
    assert make().value_coef == 1.0
    assert make(value_coef=0.3).value_coef == make(value_coef=0.3, memory="shared_trunk").value_coef == 0.3


def test_a_shared_trunk_learns(make: Any, folder: Path) -> None:
    torch.manual_seed(0)
    module = make(
        reward=Scored(pay),
        memory="shared_trunk",
        episodes=15 * 16,
        minibatch_size=8,
        learning_rate=0.03,
        value_learning_rate=0.03,
        value_clip_range=None,
        kl_coef=0.0,
        optimizer=lambda groups: torch.optim.Adam(groups),
    )
    record = Record(after_iteration=lambda _, metrics: dict(metrics))
    data = PromptDataModule(prompts(folder / "many.jsonl", 48), module.tokenizer, batch_size=16, val=0.0)
    quiet_trainer(max_epochs=-1, callbacks=[record]).fit(module, datamodule=data)
    scores = [float(metrics["objective/score"]) for metrics in record.seen["after_iteration"]]
    assert sum(scores[:2]) / 2 < 1.0
    assert sum(scores[-3:]) / 3 > 2.0  # of at most 5 tokens


@pytest.mark.parametrize("memory", ["separate", "shared_trunk"])
def test_at_first_only_the_value_model_learns(make: Any, path: str, folder: Path, memory: str) -> None:
    module = make(memory=memory, value_warmup_iterations=2, warmup_iterations=10)
    record = Record(
        after_iteration=lambda module, metrics: (weights(module.policy), weights(module.value_model), dict(metrics)),
        after_update=lambda module, _: [group["lr"] for group in module.optimizers().param_groups],
    )
    mixing = PtxMixing(texts(folder / "t.jsonl", 20), coef=1.0, ratio=1, micro_batch_size=4, chunk_tokens=8)
    start = weights(module.policy)
    fit(module, path, mixing, record)
    policies, values, metrics = zip(*record.seen["after_iteration"], strict=True)
    assert [torch.equal(policy, start) for policy in policies] == [True, True, False, False]
    assert not torch.equal(values[0], values[1])
    assert ["ptx/nll" in entry for entry in metrics] == [False, False, True, True]
    assert [float(entry["policy/grad_norm"]) > 0 for entry in metrics] == [False, False, True, True]
    assert all(float(entry["value/grad_norm"]) > 0 for entry in metrics)
    rates = [policy for policy, _ in record.seen["after_update"]]
    assert_close(rates, [0.5 * share for share in (0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.19, 0.19)])


def test_each_parts_gradient_norm_every_so_often(make: Any, path: str, folder: Path) -> None:
    """Against two backward passes apart; the second iteration is not measured."""
    module = make(micro_batch_size=3)
    mixing = PtxMixing(
        texts(folder / "t.jsonl", 20), coef=5.0, ratio=2, micro_batch_size=2, chunk_tokens=8, grad_norms_every=2
    )
    mixing.prepare(module)
    batch = first_batch(module, path)
    found: list[dict[str, Any]] = []
    kept: list[Tensor] = []

    def step() -> None:
        kept.append(gradients(module.policy))
        module.clip_each_network()
        module.zero_grad()  # and no update

    record = Record(after_update=lambda _, metrics: found.append(dict(metrics)))
    first = iterate(module, batch, step, mixing, record)
    second = iterate(module, batch, step, mixing, record)
    third = iterate(module, batch, step, mixing, record)
    plain = make()
    experience = assess(plain.rollout(batch), kl_coef=0.02, discount=1.0, gae_lambda=0.95)
    for number, minibatch in enumerate(minibatches(experience, count=2, seed=1, iteration=0, epoch=0)):
        plain.zero_grad()
        plain.loss(minibatch)[0].backward()
        own = gradients(plain.policy)
        assert_close(found[number]["policy/own_grad_norm"], float(own.norm()), scale=10.0)
        assert_close(found[number]["ptx/grad_norm"], float((kept[number] - own).norm()), scale=10.0)
        assert_close(found[number]["policy/grad_norm"], float(kept[number].norm()))
    names = {"ptx/grad_norm", "policy/own_grad_norm"}
    assert names <= first.keys()
    assert names <= third.keys()
    assert not names & second.keys()


def test_norms_are_in_the_unit_of_the_clipped_ones(make: Any, path: str, folder: Path) -> None:
    """Under fp16 the backward pass sees a scaled loss, and gradients are unscaled only before clipping."""
    module = make()
    mixing = PtxMixing(texts(folder / "t.jsonl", 20), coef=5.0, ratio=2, micro_batch_size=2, chunk_tokens=8)
    mixing.prepare(module)
    results = []
    for scale in (1.0, 1024.0):

        def step(scale: float = scale) -> None:
            for network in (module.policy, module.value_model):
                for parameter in network.parameters():
                    parameter.grad /= scale
            module.clip_each_network()
            module.zero_grad()

        module.iterations_done = 0
        mixing.load_state_dict({"loader": None})
        metrics = module.iteration(
            first_batch(module, path), hooks=[mixing], backward=lambda loss, s=scale: (loss * s).backward(), step=step
        )
        results.append([metrics[name] for name in ("ptx/grad_norm", "policy/own_grad_norm")])
    assert_close(results[0], results[1], scale=10.0)


def test_surprise_is_entropy_up_to_chance(make: Any, path: str) -> None:
    """The oracle walks over the tokens of the first minibatch; sampling at another temperature shows at once."""
    module = make(temperature=0.8)
    batch = first_batch(module, path)
    metrics = iterate(module, batch, module.zero_grad)
    rollout = module.rollout(batch, iteration=0)
    experience = assess(rollout, kl_coef=0.02, discount=1.0, gae_lambda=0.95)
    minibatch = next(minibatches(experience, count=2, seed=1, iteration=0, epoch=0)).rollout
    gaps, variances = [], []
    for row in range(4):
        prompt = minibatch.prompt_ids_BP[row][minibatch.prompt_mask_BP[row]]
        response = minibatch.response_ids_BR[row][minibatch.response_mask_BR[row]]
        with torch.no_grad():
            logits = module.policy(input_ids=torch.cat([prompt, response])[None]).logits[0] / 0.8
        for t, token in enumerate(response):
            p = nn.functional.softmax(logits[len(prompt) + t - 1], dim=-1)
            entropy = -(p * p.log()).sum()
            gaps.append(float(-p[token].log() - entropy))
            variances.append(float((p * (-p.log() - entropy) ** 2).sum()))
    expected = sum(gaps) / (sum(gap**2 for gap in gaps) / 3 + 2 * sum(variances) / 3) ** 0.5
    assert_close(metrics["first_minibatch/surprise_z"], expected, scale=10.0)


@pytest.mark.parametrize(("sampled_at", "wrong"), [(1.0, False), (0.5, True), (2.0, True)])
def test_another_sampling_temperature_shows(
    make: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, sampled_at: float, wrong: bool
) -> None:
    import lit_instruct.modules.ppo as ppo

    def stream(*arguments: Any, temperature: float, **more: Any) -> Any:
        return ppo_stream(*arguments, temperature=sampled_at, **more)

    ppo_stream = ppo.stream_responses
    monkeypatch.setattr(ppo, "stream_responses", stream)
    module = make(minibatch_size=64, micro_batch_size=64, episodes=64)
    data = PromptDataModule(prompts(folder / "many.jsonl", 64), module.tokenizer, batch_size=64, val=0.0)
    record = Record(after_iteration=lambda _, metrics: metrics["first_minibatch/surprise_z"])
    quiet_trainer(max_epochs=-1, callbacks=[record]).fit(module, datamodule=data)
    assert (abs(record.seen["after_iteration"][0]) > 4) == wrong


@pytest.mark.parametrize(
    "changes",
    [
        {"micro_batch_tokens": 1},
        {"micro_batch_tokens": 17},
        {"rollout_batch_size": 3},
        {"gradient_checkpointing": True},
    ],
    ids=str,
)
def test_what_saves_memory_changes_no_number(make: Any, path: str, changes: dict[str, Any]) -> None:
    """Passes by tokens, blocks of responses that are scored while others decode, activations worked out again."""
    rate = {"learning_rate": 0.1}  # at higher ones, differences of rounding grow with each of the 16 steps
    plain, saving = make(inner_epochs=2, **rate), make(inner_epochs=2, **rate, **changes)
    told = []
    for module in (plain, saving):
        seen = Record(after_iteration=lambda _, metrics: dict(metrics))
        fit(module, path, seen)
        told.append(seen.seen["after_iteration"])
    for name in ("policy", "value_model"):  # 16 steps on sums in another order
        assert_close(weights(getattr(saving, name)), weights(getattr(plain, name)), scale=5)
    for ours, need in zip(*told, strict=True):
        for name in ("objective/score", "objective/kl", "policy/entropy", "policy/loss", "value/loss"):
            assert_close(ours[name], need[name], scale=5)  # sums in another order
        assert "rollout/behaviour_gap" not in ours


def test_checkpointing_really_works_again(make: Any, path: str) -> None:
    """Each block of the policy runs forward twice in an update, and once where no gradient is asked for."""
    calls = {}
    for on in (False, True):
        module = make(gradient_checkpointing=on)
        counted = []
        block = module.policy.base_model.layers[0]
        block.mlp.register_forward_pre_hook(lambda *_, into=counted: into.append(1))
        batch = first_batch(module, path)
        rollout = module.rollout(batch)
        before = len(counted)
        experience = assess(rollout, kl_coef=0.0, discount=1.0, gae_lambda=1.0)
        module.loss(experience)[0].backward()
        calls[on] = (before, len(counted) - before)
    assert calls[False][0] == calls[True][0]
    assert (calls[False][1], calls[True][1]) == (1, 2)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_rounded_sampler_is_measured_and_never_saved(make: Any, path: str, dtype: str) -> None:
    """The gap is between the sampler's own log-probabilities and the policy's; the ratio starts at 1 all the same."""
    module = make(rollout_dtype=dtype, learning_rate=0.0, value_learning_rate=0.0)
    names = set(module.state_dict())
    seen = Record(after_iteration=lambda _, metrics: dict(metrics))
    fit(module, path, seen)
    assert set(module.state_dict()) == names
    for metrics in seen.seen["after_iteration"]:
        assert_close(metrics["first_minibatch/ratio_mean"], 1.0)
        assert_close(metrics["objective/kl"], 0.0)
        assert 0.0 < metrics["rollout/behaviour_gap_max"] < 0.5
        assert abs(metrics["rollout/behaviour_gap"]) < 0.05


def test_a_rounded_sampler_follows_the_policy(make: Any, path: str) -> None:
    module = make(rollout_dtype="bfloat16")
    batch = first_batch(module, path)
    module.rollout(batch)
    with torch.no_grad():  # now it says one word and nothing else
        module.policy.get_input_embeddings().weight.zero_()
        module.policy.get_output_embeddings().weight[PAID] = 100.0
        module.policy.base_model.norm.weight.fill_(1.0)
        module.policy.get_input_embeddings().weight[:] += 1.0
    again = module.rollout(batch)
    likeliest = make(rollout_dtype=None)
    likeliest.policy.load_state_dict(module.policy.state_dict())
    assert torch.equal(again.response_ids_BR, likeliest.rollout(batch).response_ids_BR)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_rounded_sampler_made_in_a_validation_serves_a_training(make: Any, path: str, dtype: str) -> None:
    module = make(rollout_dtype=dtype)
    batch = first_batch(module, path)
    with torch.inference_mode():
        first = module.rollout(batch)
    assert torch.equal(module.rollout(batch).response_ids_BR, first.response_ids_BR)


def test_the_samplers_logprobs_are_taken_if_asked_for(make: Any, path: str) -> None:
    module = make(recompute_logprobs=False, learning_rate=0.0, value_learning_rate=0.0)
    need = make().rollout(first_batch(module, path))
    got = module.rollout(first_batch(module, path))
    assert torch.equal(got.response_ids_BR, need.response_ids_BR)
    assert_close(got.old_logprobs_BR, need.old_logprobs_BR)
    assert_close(got.old_values_BR, need.old_values_BR)
    calls = []
    module.policy.register_forward_hook(lambda _m, arguments, keywords, _o: calls.append(keywords), with_kwargs=True)
    module.rollout(first_batch(module, path))
    assert all(call["use_cache"] for call in calls), "a pass that no sampling needs"


def test_frozen_networks_in_bfloat16(make: Any, path: str) -> None:
    module = make(frozen_dtype="bfloat16")
    assert {p.dtype for p in module.reference.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in module.reward_model.trunk.parameters()} == {torch.bfloat16}
    trained = [*module.policy.parameters(), *module.value_model.parameters(), *module.reward_model.head.parameters()]
    assert {p.dtype for p in trained} == {torch.float32}
    got, need = (one.rollout(first_batch(one, path)) for one in (module, make()))
    assert torch.equal(got.response_ids_BR, need.response_ids_BR)
    assert torch.equal(got.old_logprobs_BR, need.old_logprobs_BR)
    for name in ("reference_logprobs_BR", "raw_scores_B"):
        assert not torch.equal(getattr(got, name), getattr(need, name))
        assert_close(getattr(got, name), getattr(need, name), dtype=torch.bfloat16, scale=2)  # one block's rounding
    fit(module, path)


def test_precisions_that_are_none_are_refused(make: Any) -> None:
    with pytest.raises(ConfigError, match="rollout_dtype: got 'float16'; need one of bfloat16, int8"):
        make(rollout_dtype="float16")
    with pytest.raises(ConfigError, match="frozen_dtype: got 'int8'; need one of float32, bfloat16"):
        make(frozen_dtype="int8")
    with pytest.raises(ConfigError, match="micro_batch_tokens: got 0; need more than 0"):
        make(micro_batch_tokens=0)
