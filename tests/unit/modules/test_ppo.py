"""PPOModule: one iteration is what section 4 of the algorithm says, with a Trainer and without one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lit_instruct import PPOModule, PretrainingDataModule, PromptDataModule, RewardModule
from lit_instruct.callbacks import PtxMixing
from lit_instruct.functional import linear_warmup
from lit_instruct.rollouts import assess, minibatches
from lit_instruct.types import ConfigError, Experience, PromptBatch, Responses
from tests.helpers.numbers import assert_close
from tests.helpers.tiny import (
    TEMPLATE,
    Record,
    Scored,
    gradients,
    ids,
    prompts,
    quiet_trainer,
    save_stage,
    scalars,
    sgd,
    texts,
    tiny_llama,
    tiny_tokenizer,
    weights,
)


@pytest.fixture
def make(sft_ckpt: str, rm_ckpt: str) -> Any:
    """A module of tiny sizes."""

    def build(**changes: Any) -> PPOModule:
        sizes = {
            "policy": sft_ckpt,
            "reward_model": rm_ckpt,
            "episodes": 16,
            "minibatch_size": 4,
            "micro_batch_size": 4,
            "rollout_batch_size": 8,
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
    """24 prompts: an epoch is 3 iterations of 8."""
    return prompts(folder / "p.jsonl", 24)


def fit(
    module: PPOModule, path: str, *, callbacks: Sequence[Any] = (), ckpt: Any = None, batch_size: int = 8, **more: Any
) -> pl.Trainer:
    data = PromptDataModule(path, module.tokenizer, batch_size=batch_size, val=0.0)
    run = quiet_trainer(max_epochs=-1, callbacks=list(callbacks), **more)
    run.fit(module, datamodule=data, ckpt_path=ckpt)
    return run


def prompt_batches(module: PPOModule, path: str, epochs: int = 1) -> list[PromptBatch]:
    data = PromptDataModule(path, module.tokenizer, batch_size=8, val=0.0)
    data.setup()
    loader = data.train_dataloader()
    found = []
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        found += list(loader)
    return found


def metrics_of(callback: Record) -> list[dict[str, Any]]:
    return callback.seen["after_iteration"]


def record_metrics() -> Record:
    return Record(after_iteration=lambda module, metrics: dict(metrics))


def test_the_value_model_starts_as_a_copy_of_the_reward_model(make: Any) -> None:
    module = make()
    value, reward = module.value_model.state_dict(), module.reward_model.state_dict()
    assert value.keys() == reward.keys()
    assert all(torch.equal(value[name], reward[name]) for name in value)
    assert_close(module.value_model.score_bias, 0.7)
    assert {"head.weight", "head.bias", "score_bias"} <= value.keys()
    addresses = [
        {p.data_ptr() for p in network.parameters()}
        for network in (module.policy, module.reference, module.reward_model, module.value_model)
    ]
    assert len(set.union(*addresses)) == sum(map(len, addresses))  # no parameter serves two networks
    assert_close(weights(module.policy), weights(module.reference))


def test_the_first_minibatch_of_the_first_iteration_sees_no_change(make: Any, path: str) -> None:
    record = record_metrics()
    fit(make(episodes=24, temperature=0.7), path, callbacks=[record])
    first, *later = metrics_of(record)
    assert abs(float(first["objective/kl"])) < 1e-4
    for metrics in [first, *later]:
        assert abs(float(metrics["first_minibatch/ratio_mean"]) - 1) < 1e-4
        assert abs(float(metrics["first_minibatch/approx_kl"])) < 1e-4
    assert all(abs(float(metrics["objective/kl"])) > 1e-3 for metrics in later)
    assert float(first["policy/ratio_max"]) > 1.001  # the second minibatch meets a changed policy


def test_counters_and_the_end_of_the_run(make: Any, path: str) -> None:
    module, record = make(episodes=20), record_metrics()
    run = fit(module, path, callbacks=[record])
    assert module.iterations_done == 3  # 8, 16, 24: the iteration that reaches 20 is the last
    assert module.episodes_done == 24
    assert run.global_step == 3 * 2
    assert [metrics["episodes"] for metrics in metrics_of(record)] == [8, 16, 24]
    assert [metrics["iteration"] for metrics in metrics_of(record)] == [1, 2, 3]


def test_inner_epochs_multiply_the_updates(make: Any, path: str) -> None:
    updates = Record(after_update=lambda *_: None)
    run = fit(make(episodes=8, inner_epochs=2), path, callbacks=[updates])
    assert run.global_step == len(updates.seen["after_update"]) == 2 * 2


def test_micro_batches_change_no_number(make: Any, path: str) -> None:
    results = []
    for size in (1, 3, 4):
        module, record = make(episodes=8, micro_batch_size=size), record_metrics()
        fit(module, path, callbacks=[record])
        results.append((weights(module.policy), weights(module.value_model), metrics_of(record)[0]))
    lengths = {int(x) for x in make().rollout(prompt_batches(make(), path)[0]).response_mask_BR.sum(dim=1)}
    assert len(lengths) > 1  # else a mean of means would pass
    for policy, value, metrics in results[:-1]:
        assert_close(policy, results[-1][0])
        assert_close(value, results[-1][1])
        for name in ("policy/loss", "value/loss", "policy/approx_kl", "policy/entropy", "policy/clip_fraction"):
            assert_close(float(metrics[name]), float(results[-1][2][name]))
    assert float((results[-1][0] - weights(make().policy)).norm()) > 1e-3


@pytest.mark.parametrize("max_grad_norm", [0.3, 1000.0])
def test_an_iteration_equals_a_plain_loop(make: Any, path: str, max_grad_norm: float) -> None:
    """The update written again: one pass a row over the unpadded sequence, sums over tokens, one step a minibatch."""
    module = make(episodes=8, max_grad_norm=max_grad_norm, value_coef=0.37)
    fit(module, path)
    plain = make()
    batch = prompt_batches(plain, path)[0]
    experience = assess(plain.rollout(batch), kl_coef=0.02, discount=1.0, gae_lambda=0.95)
    for minibatch in minibatches(experience, count=2, seed=1, iteration=0, epoch=0):
        policy_terms, value_terms = [], []
        for row in range(4):
            policy_row, value_row = row_terms(plain, minibatch, row)
            policy_terms += policy_row
            value_terms += value_row
        plain.zero_grad()
        (torch.stack(policy_terms).mean() + 0.37 * 0.5 * torch.stack(value_terms).mean()).backward()
        for network, rate in ((plain.policy, 0.5), (plain.value_model, 0.05)):
            nn.utils.clip_grad_norm_(network.parameters(), max_grad_norm)
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter -= rate * parameter.grad
    assert_close(weights(module.policy), weights(plain.policy))
    assert_close(weights(module.value_model), weights(plain.value_model))


def row_terms(module: PPOModule, minibatch: Experience, row: int) -> tuple[list[Tensor], list[Tensor]]:
    rollout = minibatch.rollout
    prompt = rollout.prompt_ids_BP[row][rollout.prompt_mask_BP[row]]
    response = rollout.response_ids_BR[row][rollout.response_mask_BR[row]]
    sequence = torch.cat([prompt, response])[None]
    logprobs = module.policy(input_ids=sequence).logits[0].log_softmax(dim=-1)
    model = module.value_model
    hidden = model.trunk(input_ids=sequence).last_hidden_state[0]
    values = hidden @ model.head.weight[0] + model.head.bias[0] - model.score_bias
    policy_terms, value_terms = [], []
    for t, token in enumerate(response):
        before = len(prompt) + t - 1
        ratio = (logprobs[before, token] - rollout.old_logprobs_BR[row, t]).exp()
        advantage, wanted = minibatch.advantages_BR[row, t], minibatch.returns_BR[row, t]
        policy_terms.append(torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2)))
        old = rollout.old_values_BR[row, t]
        near = old + (values[before] - old).clamp(-0.2, 0.2)
        value_terms.append(torch.maximum((values[before] - wanted) ** 2, (near - wanted) ** 2))
    return policy_terms, value_terms


def test_no_ptx_and_ptx_with_coefficient_zero_are_the_same(make: Any, path: str, folder: Path) -> None:
    text = texts(folder / "t.jsonl", 20)
    results = {}
    for name, coef in (("none", None), ("zero", 0.0), ("none again", None), ("some", 1.0)):
        module = make(episodes=16)
        hooks = [] if coef is None else [PtxMixing(text, coef=coef, ratio=1, micro_batch_size=4, chunk_tokens=8)]
        fit(module, path, callbacks=hooks)
        results[name] = torch.cat([weights(module.policy), weights(module.value_model)])
    assert torch.equal(results["none"], results["zero"])
    assert torch.equal(results["none"], results["none again"])
    assert float((results["some"] - results["none"]).norm()) > 1e-3


def test_ptx_gradients_are_those_of_the_summed_loss(make: Any, path: str, folder: Path) -> None:
    text = texts(folder / "t.jsonl", 20)
    mixing = PtxMixing(text, coef=27.8, ratio=2, micro_batch_size=2, chunk_tokens=8)
    module = make(micro_batch_size=3)
    mixing.prepare(module)
    batch = prompt_batches(module, path)[0]
    seen: list[tuple[Tensor, Tensor]] = []
    norms: list[Tensor] = []

    def step() -> None:
        seen.append((gradients(module.policy), gradients(module.value_model)))
        module.zero_grad()  # and no update: both minibatches are at the first weights

    record = SimpleNamespace(after_update=lambda _, metrics: norms.append(metrics["ptx/grad_norm"]))
    module.iteration(batch, hooks=[mixing, record], backward=lambda loss: loss.backward(), step=step)
    plain = make()
    experience = assess(plain.rollout(batch), kl_coef=0.02, discount=1.0, gae_lambda=0.95)
    data = PretrainingDataModule(text, plain.tokenizer, chunk_tokens=8, batch_size=8, val=0.0)  # 2 x 4 rows
    data.setup()
    chunks = iter(data.train_dataloader())
    dealt = minibatches(experience, count=2, seed=1, iteration=0, epoch=0)
    for minibatch, (policy, value), norm in zip(dealt, seen, norms, strict=True):
        plain.zero_grad()
        ids_BT = next(chunks).input_ids_BT
        logits = plain.policy(input_ids=ids_BT).logits
        nll = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())
        (27.8 * nll).backward()
        assert_close(norm, gradients(plain.policy).norm(), scale=10.0)
        plain.loss(minibatch)[0].backward()
        assert_close(policy, gradients(plain.policy), scale=10.0)  # gradients of size 30: sums of 27.8 times a loss
        assert_close(value, gradients(plain.value_model))


def test_the_text_loss_falls_with_a_large_coefficient(make: Any, path: str, folder: Path) -> None:
    mixing = PtxMixing(texts(folder / "t.jsonl", 20), coef=27.8, ratio=2, micro_batch_size=8, chunk_tokens=8)
    record = record_metrics()
    fit(make(episodes=80), path, callbacks=[mixing, record])
    losses = [float(metrics["ptx/nll"]) for metrics in metrics_of(record)]
    assert len(losses) == 10
    assert sum(losses[-3:]) < sum(losses[:3]) - 0.3


def test_each_network_is_clipped_by_its_own_norm(make: Any, path: str) -> None:
    module = make(max_grad_norm=0.1, missing_eos="replace", missing_eos_value=-50.0)  # a large value loss
    before = weights(module.policy), weights(module.value_model)
    raw: list[tuple[Tensor, Tensor]] = []

    def step() -> None:
        raw.append((gradients(module.policy), gradients(module.value_model)))
        norms = module.clip_each_network()
        clipped = gradients(module.policy), gradients(module.value_model)
        for name, old, new in zip(("policy", "value"), raw[-1], clipped, strict=True):
            assert_close(norms[f"{name}/grad_norm"], float(old.norm()))
            assert_close(new, old * min(1.0, 0.1 / (float(old.norm()) + 1e-6)))
        module.zero_grad()

    metrics = module.iteration(prompt_batches(module, path)[0], backward=lambda loss: loss.backward(), step=step)
    assert float(raw[0][1].norm()) > 10 * float(raw[0][0].norm()) > 1.0  # one norm for both would crush the policy's
    assert_close(metrics["value/grad_norm"], sum(float(value.norm()) for _, value in raw) / len(raw))
    assert torch.equal(before[0], weights(module.policy))


def test_the_trainer_clips_too(make: Any, path: str) -> None:
    module = make(episodes=4, max_grad_norm=0.01, learning_rate=1.0, value_learning_rate=1.0)
    before = weights(module.policy), weights(module.value_model)
    fit(module, path, batch_size=4)
    for old, network in zip(before, (module.policy, module.value_model), strict=True):
        assert_close(float((weights(network) - old).norm()), 0.01)


def test_the_policy_warms_up_over_iterations(make: Any, path: str) -> None:
    rates = Record(
        after_update=lambda module, _: [group["lr"] for group in module.optimizers().param_groups],
    )
    module = make(episodes=32, warmup_iterations=10, learning_rate=2.0, value_learning_rate=0.25)
    fit(module, path, callbacks=[rates])
    seen = rates.seen["after_update"]
    assert_close([policy for policy, _ in seen], [2 * x for x in (0.1, 0.1, 0.19, 0.19, 0.28, 0.28, 0.37, 0.37)])
    assert_close([value for _, value in seen], [0.25] * 8)
    assert_close(linear_warmup(3, 10), 0.37)


def test_frozen_networks_stay_and_are_not_saved(make: Any, path: str, folder: Path) -> None:
    module = make()
    frozen = {name: weights(getattr(module, name)) for name in ("reference", "reward_model")}
    run = fit(module, path)
    run.save_checkpoint(folder / "ppo.ckpt")
    for name, before in frozen.items():
        network = getattr(module, name)
        assert torch.equal(weights(network), before)
        assert not any(p.requires_grad or p.grad is not None for p in network.parameters())
        assert not network.training
    names = torch.load(folder / "ppo.ckpt", weights_only=True)["state_dict"]
    assert {name.split(".")[0] for name in names} == {"policy", "value_model"}
    assert float((weights(module.policy) - frozen["reference"]).norm()) > 1e-3


def test_a_checkpoint_loads_with_its_frozen_networks(make: Any, path: str, folder: Path) -> None:
    module = make()
    run = fit(module, path)
    run.save_checkpoint(folder / "ppo.ckpt")
    loaded = PPOModule.load_from_checkpoint(folder / "ppo.ckpt")
    assert_close(weights(loaded.policy), weights(module.policy))
    assert_close(weights(loaded.reference), weights(module.reference))
    assert loaded.iterations_done == 2


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_resumed_run_ends_with_the_same_weights(make: Any, path: str, folder: Path, stop: int) -> None:
    """An epoch is three iterations: checkpoints from its middle, from its end and from the next one.

    The names of PPO's checkpoints count iterations, as the logger's x-axis does, and not optimizer steps.
    """
    whole = make(episodes=40, warmup_iterations=4)
    saver = pl.callbacks.ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    fit(whole, path, callbacks=[saver])
    resumed = make(episodes=40, warmup_iterations=4)
    run = fit(resumed, path, ckpt=folder / f"step={stop}.ckpt")
    assert resumed.iterations_done == 5
    assert resumed.episodes_done == 40
    assert run.global_step == 10
    assert torch.equal(weights(resumed.policy), weights(whole.policy))
    assert torch.equal(weights(resumed.value_model), weights(whole.value_model))


def test_a_finished_run_goes_on_with_more_episodes(make: Any, path: str, folder: Path) -> None:
    """It ended inside an epoch, which Lightning takes for a whole one: the run goes on with the next order."""
    saver = pl.callbacks.ModelCheckpoint(dirpath=folder, save_top_k=0, save_last=True)
    fit(make(episodes=16, warmup_iterations=10), path, callbacks=[saver])
    rates = Record(after_update=lambda module, _: module.optimizers().param_groups[0]["lr"])
    seen = Record(on_train_batch_start=lambda trainer, module, batch, number: batch.prompt_ids_BP)
    resumed = make(episodes=40, warmup_iterations=10)
    run = fit(resumed, path, ckpt=folder / "last.ckpt", callbacks=[rates, seen])
    assert (resumed.iterations_done, resumed.episodes_done, run.global_step) == (5, 40, 10)
    assert_close(rates.seen["after_update"][::2], [0.5 * x for x in (0.28, 0.37, 0.46)])
    expected = prompt_batches(resumed, path, epochs=2)[3:]
    assert all(
        torch.equal(mine, batch.prompt_ids_BP)
        for mine, batch in zip(seen.seen["on_train_batch_start"], expected, strict=True)
    )


def test_the_kl_coefficient_is_part_of_the_state(make: Any, path: str, folder: Path) -> None:
    first = make(episodes=8)
    first.kl_coef = 0.31
    run = fit(first, path)
    run.save_checkpoint(folder / "ppo.ckpt")
    record = record_metrics()
    resumed = make(episodes=16)
    fit(resumed, path, ckpt=folder / "ppo.ckpt", callbacks=[record])
    assert resumed.kl_coef == 0.31
    assert metrics_of(record)[0]["objective/kl_coef"] == 0.31


def test_a_finished_run_that_is_resumed_does_nothing(make: Any, path: str, folder: Path) -> None:
    first = make(episodes=16)
    run = fit(first, path)
    run.save_checkpoint(folder / "ppo.ckpt")
    again = make(episodes=16)
    run = fit(again, path, ckpt=folder / "ppo.ckpt")
    assert again.iterations_done == 2
    assert torch.equal(weights(again.policy), weights(first.policy))


@pytest.mark.parametrize("changed", ["reward_model", "reference"])
def test_resuming_towards_another_goal_is_refused(make: Any, path: str, folder: Path, changed: str) -> None:
    run = fit(make(episodes=8), path)
    run.save_checkpoint(folder / "ppo.ckpt")
    other = make(episodes=16)
    next(getattr(other, changed).parameters()).data[0, 0] += 1e-3
    with pytest.raises(ConfigError, match=f"{changed}: it is not the one"):
        fit(other, path, ckpt=folder / "ppo.ckpt")


def test_a_minibatch_that_does_not_divide_is_refused_before_sampling(make: Any, path: str) -> None:
    module = make(minibatch_size=3)
    module.scorer = Scored(lambda *_: pytest.fail("sampled"))
    data = PromptDataModule(path, module.tokenizer, batch_size=8, val=0.3)
    with pytest.raises(ConfigError, match=r"minibatch_size: got 3 for 8 prompts"):  # nor for the sanity check
        quiet_trainer(max_epochs=-1, num_sanity_val_steps=1).fit(module, datamodule=data)
    with pytest.raises(ConfigError, match=r"minibatch_size: got 3 for 8 prompts"):
        module.iteration(prompt_batches(module, path)[0], backward=lambda loss: None, step=lambda: None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"episodes": 0}, "episodes: got 0"),
        ({"temperature": 0.0}, "temperature: got 0.0"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"temperature": float("inf")}, "temperature: got inf"),
        ({"micro_batch_size": -1}, "micro_batch_size: got -1"),
        ({"max_response_tokens": 32}, "max_response_tokens: got 32.*context of 32 tokens; lower it"),
        ({"reward_model": "somewhere"}, "reward_model: got 'somewhere'; need the .ckpt of a reward stage"),
        ({"missing_eos": "punish"}, "missing_eos: got 'punish'.*none, replace, subtract"),
    ],
)
def test_bad_settings_are_refused_at_construction(make: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**changes)


def test_an_sft_checkpoint_is_no_reward_model(make: Any, sft_ckpt: str) -> None:
    """It would score with a head of random numbers."""
    with pytest.raises(ConfigError, match=r"comes from the stage 'sft'.*lit-instruct rm fit"):
        make(reward_model=sft_ckpt)


@pytest.mark.parametrize("what", ["vocabulary", "template"])
def test_a_reward_model_with_another_tokenizer_is_refused(make: Any, folder: Path, what: str) -> None:
    tokenizer = tiny_tokenizer(template=TEMPLATE if what == "vocabulary" else "{{ messages[0].content }}")
    if what == "vocabulary":
        tokenizer.add_tokens(["w99"])
    tokenizer.save_pretrained(folder / "tokenizer")
    other = RewardModule(tiny_llama(), tokenizer=str(folder / "tokenizer"))
    with pytest.raises(ConfigError, match="another tokenizer or template"):
        make(reward_model=save_stage(other, folder / "rm.ckpt"))


def test_learning_works(make: Any, folder: Path) -> None:
    """One point for each ``w7``: it must be written far more often after 25 iterations."""
    module = make(
        episodes=25 * 16,
        minibatch_size=8,
        micro_batch_size=8,
        learning_rate=0.01,
        value_learning_rate=0.01,
        value_clip_range=None,
        kl_coef=0.0,
        optimizer=lambda groups: torch.optim.Adam(groups),
    )
    (paid,) = ids("w7")

    def scorer(_: PromptBatch, responses: Responses) -> Tensor:
        return ((responses.response_ids_BR == paid) & responses.response_mask_BR).sum(dim=1).float()

    module.scorer = Scored(scorer)
    record = record_metrics()
    fit(module, prompts(folder / "many.jsonl", 48), callbacks=[record], batch_size=16)
    scores = [float(metrics["objective/score"]) for metrics in metrics_of(record)]
    assert len(scores) == 25
    assert scores[0] < 1.0
    assert sum(scores[-3:]) / 3 > 3.0  # of at most 5 tokens
    last = metrics_of(record)[-1]
    assert float(last["returns/mean"]) > 4.0
    assert abs(float(last["advantage/mean"])) < 1.0  # the value model has come to expect it


def test_validation_is_the_same_every_time_and_leaves_training_alone(make: Any, path: str, folder: Path) -> None:
    held_out = prompts(folder / "v.jsonl", 7, seed=3)
    names = ("objective/score", "objective/kl", "rollout/len_mean", "rollout/eos_rate")

    def values(trainer: pl.Trainer, _: Any = None) -> list[float]:
        return [float(trainer.callback_metrics[f"ppo/val/{name}"]) for name in names]

    with_validation, without = make(), make()
    fit(without, path)
    data = PromptDataModule(path, without.tokenizer, batch_size=8, val_batch_size=3, val=held_out)
    record = Record(on_validation_end=values)
    run = quiet_trainer(max_epochs=-1, val_check_interval=1, callbacks=[record])
    run.fit(with_validation, datamodule=data)
    assert torch.equal(weights(with_validation.policy), weights(without.policy))
    again = quiet_trainer()
    again.validate(without, datamodule=data, verbose=False)
    assert_close(values(again), record.seen["on_validation_end"][-1])
    rollouts, first_row = [], 0
    for batch in data.val_dataloader():
        rollouts.append(without.validation_rollout(batch, first_row))
        first_row += len(batch.prompt_ids_BP)
    assert [len(rollout.scores_B) for rollout in rollouts] != [len(rollouts[0].scores_B)] * len(rollouts)
    scores = torch.cat([rollout.scores_B for rollout in rollouts])
    lengths = torch.cat([rollout.response_mask_BR.sum(dim=1) for rollout in rollouts])
    finished = torch.cat([rollout.finished_B for rollout in rollouts])
    kl = torch.cat([(rollout.old_logprobs_BR - rollout.reference_logprobs_BR).sum(dim=1) for rollout in rollouts])
    expected = [scores.mean(), kl.mean(), lengths.float().mean(), finished.float().mean()]
    assert_close(values(again), [float(value) for value in expected])
    whole = PromptDataModule(path, without.tokenizer, batch_size=8, val_batch_size=7, val=held_out)
    again.validate(without, datamodule=whole, verbose=False)  # all in one batch: streams go by prompt
    assert_close(values(again), [float(value) for value in expected])


def test_a_test_run_measures_as_validation_does(make: Any, path: str, folder: Path) -> None:
    """The same prompts give the same numbers under another name, and the same ones every time."""
    held_out = prompts(folder / "v.jsonl", 7, seed=3)
    module = make()
    data = PromptDataModule(path, module.tokenizer, batch_size=8, val_batch_size=3, val=held_out, test=held_out)
    run = quiet_trainer()
    measured = []
    for measure, split in ((run.validate, "val"), (run.test, "test"), (run.test, "test")):
        measure(module, datamodule=data, verbose=False)
        assert all(name == "step" or name.startswith(f"ppo/{split}/") for name in run.callback_metrics)
        measured.append({name.split("/", 2)[-1]: float(value) for name, value in run.callback_metrics.items()})
    assert measured[0] == measured[1] == measured[2]
    assert {"objective/score", "objective/kl", "rollout/len_mean", "rollout/eos_rate"} < measured[0].keys()


def test_training_and_validation_share_the_x_axis(make: Any, path: str, folder: Path) -> None:
    """Read back as TensorBoard reads it: iterations done, for both."""
    module = make(episodes=40)  # five iterations, three an epoch
    data = PromptDataModule(path, module.tokenizer, batch_size=8, val_batch_size=3, val=path, test=path)
    logger = pl.loggers.TensorBoardLogger(folder, name="", version="fit")
    arguments = {"logger": logger, "log_every_n_steps": 1, "val_check_interval": 1, "num_sanity_val_steps": 1}
    record = Record(on_validation_end=lambda trainer, module: module.iterations_done)
    quiet_trainer(max_epochs=-1, callbacks=[record], **arguments).fit(module, datamodule=data)
    assert record.seen["on_validation_end"] == [0, 1, 2, 3, 4, 5]  # the first is the sanity check, which logs nothing
    for name in ("ppo/train/objective/score", "ppo/val/objective/score"):
        assert [step for step, _ in scalars(folder / "fit", name)] == [1, 2, 3, 4, 5]
    iterations = scalars(folder / "fit", "ppo/train/iteration")
    assert [step for step, _ in iterations] == [int(value) for _, value in iterations]
    later = pl.loggers.TensorBoardLogger(folder, name="", version="test")
    quiet_trainer(logger=later).test(module, datamodule=data, verbose=False)
    assert [step for step, _ in scalars(folder / "test", "ppo/test/objective/score")] == [5]


def test_iteration_by_hand_ends_with_the_trainers_weights(make: Any, path: str, folder: Path) -> None:
    text = texts(folder / "t.jsonl", 20)

    def mixing() -> PtxMixing:
        return PtxMixing(text, coef=0.5, ratio=1, micro_batch_size=4, chunk_tokens=8)

    trained = make(episodes=32, warmup_iterations=3, inner_epochs=2)
    fit(trained, path, callbacks=[mixing()])
    module, hook = make(episodes=32, warmup_iterations=3, inner_epochs=2), mixing()
    hook.prepare(module)
    made = module.configure_optimizers()
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]

    def step() -> None:
        module.clip_each_network()
        optimizer.step()
        optimizer.zero_grad()

    for batch in prompt_batches(module, path, epochs=2)[:4]:
        module.iteration(batch, hooks=[hook], backward=lambda loss: loss.backward(), step=step)
        schedule.step()
    assert torch.equal(weights(module.policy), weights(trained.policy))
    assert torch.equal(weights(module.value_model), weights(trained.value_model))


def test_a_hook_needs_nothing_but_what_it_implements(make: Any, path: str) -> None:
    """Every part of the protocol is optional: auxiliary losses alone are enough."""

    class Pull(pl.Callback):
        def auxiliary_losses(self, module: PPOModule, minibatch: Experience) -> Any:
            yield sum(p.square().sum() for p in module.policy.parameters())

    pulled, free = make(episodes=8), make(episodes=8)
    fit(pulled, path, callbacks=[Pull()])
    fit(free, path)
    assert float(weights(pulled.policy).norm()) < float(weights(free.policy).norm()) - 1e-3
