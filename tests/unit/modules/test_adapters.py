"""The stages with adapters: what trains, what checkpoints hold, and that a shared base changes no number."""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_instruct import (
    ComparisonDataModule,
    DemonstrationDataModule,
    PPOModule,
    PromptDataModule,
    RewardModule,
    SFTModule,
)
from lit_instruct.callbacks import WeightEMA
from lit_instruct.models.adapter_checkpoints import own_state
from lit_instruct.models.adapters import LoraSettings, add_adapter, is_lora, make_base, trained_parameters
from lit_instruct.models.backbone import load_language_model
from lit_instruct.models.quantisation import is_quantised
from lit_instruct.models.scalar_head import ScalarModel
from lit_instruct.rollouts import assess
from lit_instruct.types import ConfigError, PromptBatch
from tests.helpers.numbers import assert_close
from tests.helpers.tiny import (
    Record,
    comparisons,
    demonstrations,
    prompts,
    quiet_trainer,
    save_model,
    save_stage,
    sgd,
)

LORA = LoraSettings(r=4, lora_alpha=8)
IDS = torch.arange(9)[None] + 3
ALL = torch.ones_like(IDS, dtype=torch.bool)
QUANTIZATIONS = pytest.mark.parametrize("quantization", [None, "4bit", "8bit"])


@torch.no_grad()
def stir(network: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        if is_lora(name):
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model ``base``, prompts, and reward models with an adapter on each kind of base."""
    place = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    save_model(place / "base", num_hidden_layers=2)
    prompts(place / "p.jsonl", 16)
    with contextlib.chdir(place):
        for quantization in (None, "4bit", "8bit"):
            module = RewardModule("base", adapter=LORA, quantization=quantization)
            stir(module.reward_model, seed=5)
            module.reward_model.score_bias.fill_(0.7)
            save_stage(module, place / f"rm_{quantization}.ckpt")
    return place


@pytest.fixture
def models(made: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str | None, str]:
    """Quantization -> reward model; the working directory is that of the models, ``folder`` another."""
    monkeypatch.chdir(made)
    return {quantization: f"rm_{quantization}.ckpt" for quantization in (None, "4bit", "8bit")}


def ppo(reward_model: str, **changes: Any) -> PPOModule:
    sizes = {
        "policy": "base",
        "reward_model": reward_model,
        "episodes": 16,
        "minibatch_size": 4,
        "micro_batch_size": 4,
        "max_response_tokens": 5,
        "learning_rate": 0.1,
        "value_learning_rate": 0.1,
        "warmup_iterations": 0,
        "optimizer": sgd,
        "missing_eos": "none",
        "adapter": LORA,
    }
    return PPOModule(**(sizes | changes))


def fit_ppo(module: PPOModule, *callbacks: Any, ckpt: str | None = None) -> Any:
    data = PromptDataModule("p.jsonl", module.tokenizer, batch_size=8, val=0.0)
    trainer = quiet_trainer(max_epochs=-1, callbacks=list(callbacks))
    trainer.fit(module, datamodule=data, ckpt_path=ckpt)
    return trainer


def a_batch(module: PPOModule) -> PromptBatch:
    data = PromptDataModule("p.jsonl", module.tokenizer, batch_size=8, val=0.0)
    data.setup()
    loader = data.train_dataloader()
    loader.sampler.set_epoch(0)
    return next(iter(loader))


def logits(model: Any) -> Tensor:
    return model.eval()(IDS, use_cache=False).logits.detach()


def frozen_weights(module: nn.Module) -> dict[str, Tensor]:
    """Of every network, each byte that must not change."""
    return {name: p.detach().clone() for name, p in module.named_parameters() if not p.requires_grad}


@QUANTIZATIONS
def test_sft_trains_the_adapter_alone(folder: Path, quantization: Any) -> None:
    save_model(folder / "base", num_hidden_layers=2, hidden_size=64, intermediate_size=96)
    path = demonstrations(folder / "d.jsonl", 8)
    torch.manual_seed(0)
    module = SFTModule("base", adapter=LORA, quantization=quantization, learning_rate=0.03, residual_dropout=0.1)
    assert is_quantised(module.policy) == (quantization is not None)
    before = frozen_weights(module)
    losses = Record(on_train_batch_end=lambda trainer, *_: float(trainer.callback_metrics["sft/train/loss"]))
    data = DemonstrationDataModule(path, module.tokenizer, batch_size=8, val=0.0)
    trainer = quiet_trainer(max_epochs=8, log_every_n_steps=1, callbacks=[losses, WeightEMA(decay=0.5)])
    trainer.fit(module, datamodule=data)
    assert losses.seen["on_train_batch_end"][-1] < losses.seen["on_train_batch_end"][0] - 0.2
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters() if name in before)
    assert len(before) == len(list(module.parameters())) - len(trained_parameters(module)) > 0
    assert {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]} == {
        id(p) for p in trained_parameters(module)
    }
    trainer.save_checkpoint(folder / "sft.ckpt")
    saved = torch.load(folder / "sft.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == {f"policy.{name}" for name in own_state(module.policy)}
    assert all(is_lora(name) for name in saved["state_dict"] | saved["ema_state_dict"])
    assert_close(logits(load_language_model(folder / "sft.ckpt")), logits(module.policy), scale=10.0)
    averaged = copy.deepcopy(module.policy)
    averaged.load_state_dict(dict(trainer.callbacks[1].average), strict=False)
    assert_close(logits(load_language_model(folder / "sft.ckpt", ema=True)), logits(averaged), scale=10.0)
    again = SFTModule.load_from_checkpoint(folder / "sft.ckpt")
    assert torch.equal(logits(again.policy), logits(module.policy))
    assert len(trained_parameters(again)) == len(trained_parameters(module))


@QUANTIZATIONS
def test_a_reward_model_trains_adapter_and_head(folder: Path, quantization: Any) -> None:
    save_model(folder / "base", num_hidden_layers=2)
    module = RewardModule("base", adapter=LORA, quantization=quantization, learning_rate=0.03)
    before, head = frozen_weights(module), module.reward_model.head.weight.detach().clone()
    path = comparisons(folder / "c.jsonl", 16)
    data = ComparisonDataModule(path, module.tokenizer, batch_size=8, val=0.0)
    trainer = quiet_trainer(max_epochs=2)
    trainer.fit(module, datamodule=data)
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters() if name in before)
    assert not torch.equal(module.reward_model.head.weight, head)
    module.reward_model.score_bias.fill_(0.3)
    trainer.save_checkpoint(folder / "rm.ckpt")
    names = torch.load(folder / "rm.ckpt", weights_only=True)["state_dict"].keys()
    others = {"reward_model.head.weight", "reward_model.head.bias", "reward_model.score_bias"}
    assert {name for name in names if not is_lora(name)} == others
    merged = ScalarModel.from_base(folder / "rm.ckpt")
    assert_close(merged.scores(IDS, ALL), module.reward_model.eval().scores(IDS, ALL), scale=10.0)
    assert all(parameter.requires_grad for parameter in merged.parameters())
    assert not is_quantised(merged)


def test_a_checkpoint_is_small(folder: Path) -> None:
    save_model(folder / "base", hidden_size=128, intermediate_size=512, num_hidden_layers=2)
    whole = save_stage(SFTModule("base"), folder / "whole.ckpt")
    adapter = save_stage(SFTModule("base", adapter=LoraSettings(r=1)), folder / "adapter.ckpt")
    assert os.path.getsize(adapter) < 0.1 * os.path.getsize(whole)


@QUANTIZATIONS
@pytest.mark.parametrize("memory", ["separate", "shared_base", "shared_trunk"])
def test_ppo_trains_and_goes_on(models: dict[Any, str], folder: Path, quantization: Any, memory: str) -> None:
    """All plans: only adapters and head change; the policy starts at its reference; a resumed run ends the same."""
    plan = {"memory": memory, "quantization": quantization}
    torch.manual_seed(0)
    module = ppo(models[quantization], **plan)
    before = frozen_weights(module)
    record = Record(after_iteration=lambda _, metrics: dict(metrics))
    keep = Record(
        on_train_batch_end=lambda trainer, *_: trainer.save_checkpoint(folder / f"{trainer.global_step}.ckpt")
    )
    fit_ppo(module, record, keep)
    first, second = record.seen["after_iteration"]
    assert float(first["objective/kl"]) == 0.0
    assert abs(float(second["objective/kl"])) > 1e-4
    for metrics in (first, second):
        assert abs(float(metrics["first_minibatch/ratio_mean"]) - 1) < 1e-5
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters() if name in before)
    names = torch.load(folder / "4.ckpt", weights_only=True)["state_dict"]
    heads = {"value_model.head.weight", "value_model.head.bias", "value_model.score_bias"}
    heads -= {"value_model.score_bias"} if memory == "shared_trunk" else set()
    assert {name for name in names if not is_lora(name)} == heads
    assert_close(logits(load_language_model(folder / "4.ckpt")), logits(module.policy), scale=10.0)
    resumed = ppo(models[quantization], **plan)
    fit_ppo(resumed, ckpt=str(folder / "2.ckpt"))
    for name, parameter in module.named_parameters():
        assert torch.equal(resumed.get_parameter(name), parameter)
    loaded = PPOModule.load_from_checkpoint(folder / "4.ckpt")
    assert torch.equal(logits(loaded.policy), logits(module.policy))


def addresses(network: nn.Module) -> set[int]:
    return {parameter.data_ptr() for parameter in network.parameters()}


def test_a_shared_base_is_there_once(models: dict[Any, str]) -> None:
    module = ppo(models[None], memory="shared_base")
    networks = [module.policy, module.reference, module.value_model, module.reward_model]
    bases = [{p.data_ptr() for n, p in net.named_parameters() if "proj" in n and not is_lora(n)} for net in networks]
    assert all(base == bases[0] for base in bases)
    own = [
        {p.data_ptr() for p in net.parameters()} - {p.data_ptr() for p in module.reference.parameters()}
        for net in networks
    ]
    assert len(set.union(*own)) == sum(map(len, own))  # adapters and heads serve one network each
    assert not own[1]
    apart = ppo(models[None])
    whole = [
        {p.data_ptr() for p in net.parameters()}
        for net in (apart.policy, apart.reference, apart.value_model, apart.scorer)
    ]
    assert len(set.union(*whole)) == sum(map(len, whole))


def built_apart(module: PPOModule, reward_model: str) -> PPOModule:
    """Four networks loaded one by one, the reward model merged, with copies of the adapters of ``module``."""
    other = ppo(reward_model)
    value_model = ScalarModel.on_language_model(load_language_model("base"))
    value_model.trunk = make_base(value_model.trunk, source="base")
    add_adapter(value_model.trunk, LORA)
    other.value_model = value_model
    for name in ("policy", "value_model"):
        state = {key: tensor.clone() for key, tensor in own_state(getattr(module, name)).items()}
        missing, unexpected = getattr(other, name).load_state_dict(state, strict=False)
        assert not unexpected
        assert not any(is_lora(key) or key.startswith("head.") for key in missing)
    return other


def test_a_shared_base_changes_no_number(models: dict[Any, str]) -> None:
    """KL, scores, values, losses and gradients, against four separate networks with the same adapters."""
    shared = ppo(models[None], memory="shared_base")
    stir(shared.policy, seed=1)
    stir(shared.value_model, seed=2)
    apart = built_apart(shared, models[None])
    found = []
    for module in (shared, apart):
        rollout = module.rollout(a_batch(module))
        experience = assess(rollout, kl_coef=0.1, discount=1.0, gae_lambda=0.95)
        loss, _ = module.loss(experience)
        loss.backward()
        grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        found.append((rollout, loss, grads))
    (one, loss, grads), (other, other_loss, other_grads) = found
    assert torch.equal(one.response_ids_BR, other.response_ids_BR)
    kl_BR = one.old_logprobs_BR - one.reference_logprobs_BR
    assert float(kl_BR.abs().sum()) > 0.1
    for name in ("old_logprobs_BR", "reference_logprobs_BR", "old_values_BR", "scores_B"):
        assert_close(getattr(one, name), getattr(other, name))
    assert float(one.scores_B.std()) > 0.05
    assert_close(loss, other_loss)
    assert grads.keys() == other_grads.keys()
    assert {name for name in grads if not is_lora(name)} == {"value_model.head.weight", "value_model.head.bias"}
    for name, gradient in grads.items():
        assert_close(gradient / gradient.abs().max(), other_grads[name] / gradient.abs().max())


def test_the_value_model_starts_as_the_reward_model(models: dict[Any, str]) -> None:
    for memory in ("shared_base", "separate"):
        module = ppo(models[None], memory=memory)
        assert_close(module.value_model.scores(IDS, ALL), module.reward_model.scores(IDS, ALL))
        assert_close(module.value_model.score_bias, 0.7)
    module = ppo(models[None], memory="shared_base", value_model="rm_None.ckpt")
    assert_close(module.value_model.scores(IDS, ALL), module.reward_model.scores(IDS, ALL))
    scorer = ppo(models[None]).scorer
    module = ppo(None, reward=scorer, memory="shared_base")
    assert {n for n, p in module.value_model.named_parameters() if p.requires_grad and not is_lora(n)} == {
        "head.weight",
        "head.bias",
    }


@pytest.mark.parametrize("frozen_dtype", ["8bit", "4bit"])
def test_frozen_networks_of_few_bits_beside_a_policy_that_trains_whole(
    models: dict[Any, str], folder: Path, frozen_dtype: str
) -> None:
    module = ppo(models[None], frozen_dtype=frozen_dtype, adapter=None)
    assert is_quantised(module.reference)
    assert is_quantised(module.reward_model)
    assert not is_quantised(nn.ModuleList([module.policy, module.value_model]))
    before = {name: p.detach().clone() for name, p in module.reference.named_parameters()}
    record = Record(after_iteration=lambda _, metrics: float(metrics["policy/grad_norm"]))
    trainer = fit_ppo(module, record)
    assert all(norm > 0 for norm in record.seen["after_iteration"])
    assert all(torch.equal(p, before[name]) for name, p in module.reference.named_parameters())
    trainer.save_checkpoint(folder / "ppo.ckpt")
    again = PPOModule.load_from_checkpoint(folder / "ppo.ckpt")
    assert torch.equal(logits(again.policy), logits(module.policy))
    fit_ppo(ppo(models[None], frozen_dtype=frozen_dtype, adapter=None, episodes=24), ckpt=str(folder / "ppo.ckpt"))


def test_frozen_networks_wait_on_the_cpu(models: dict[Any, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they are sent and when; on a CPU the numbers stay."""
    module, plain = ppo(models[None], offload_frozen=True), ppo(models[None])
    moves: list[tuple[str, str]] = []
    for name in ("reference", "scorer"):
        monkeypatch.setattr(getattr(module, name), "to", lambda device, name=name: moves.append((name, str(device))))
    # Another name for the CPU, so that going there and coming back can be told apart.
    monkeypatch.setattr(PPOModule, "device", property(lambda self: torch.device("cpu", 0)))
    rollout = module.rollout(a_batch(module))
    assert moves == [("reference", "cpu:0"), ("scorer", "cpu:0"), ("reference", "cpu"), ("scorer", "cpu")]
    assert_close(rollout.scores_B, plain.rollout(a_batch(plain)).scores_B)
    assert len(moves) == 4


def test_the_rollout_copy_is_that_of_the_merged_policy(models: dict[Any, str]) -> None:
    module = ppo(models[None], rollout_dtype="bfloat16", memory="shared_base")
    stir(module.policy)
    base = frozen_weights(module)
    module.rollout(a_batch(module))
    assert module._behaviour_gap()["rollout/behaviour_gap"] < 0.05
    stir(module.policy, seed=3)
    module.rollout(a_batch(module))
    assert module._behaviour_gap()["rollout/behaviour_gap"] < 0.05
    assert all(torch.equal(p, base[name]) for name, p in module.named_parameters() if name in base)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "shared base without adapter": (
        {"memory": "shared_base", "adapter": None},
        r"memory: got shared_base without an adapter; need one.*--model.adapter.r 16, or memory to separate",
    ),
    "quantised without adapter": (
        {"quantization": "4bit", "adapter": None},
        r"quantization: got 4bit without an adapter; need one.*--model.adapter.r 16",
    ),
    "no such number of bits": ({"quantization": "3bit"}, r"quantization: got '3bit'; need one of 8bit, 4bit"),
    "no such plan": ({"memory": "shared"}, r"memory: got 'shared'; need one of separate, shared_base, shared_trunk"),
    "rounded twice": (
        {"quantization": "8bit", "rollout_dtype": "bfloat16"},
        r"rollout_dtype: got bfloat16 for a policy in 8bit; need one in fp32",
    ),
    "two value models": (
        {"memory": "shared_trunk", "value_model": "rm_None.ckpt"},
        r"value_model: got 'rm_None.ckpt' with memory: shared_trunk.*leave it out, or set memory to separate",
    ),
    "a reference of its own": (
        {"memory": "shared_base", "reference": "base"},
        r"reference: got 'base' with memory: shared_base.*need None. Do: leave it out",
    ),
    "frozen bits on a shared base": (
        {"memory": "shared_base", "frozen_dtype": "bfloat16"},
        r"frozen_dtype: got 'bfloat16' with memory: shared_base.*For fewer bits set quantization",
    ),
    "a shared base cannot move": (
        {"memory": "shared_base", "offload_frozen": True},
        r"offload_frozen: got True with memory: shared_base.*leave it out",
    ),
    "quantised weights cannot move": (
        {"offload_frozen": True, "frozen_dtype": "8bit"},
        r"offload_frozen: got true with frozen_dtype 8bit; need float32 or bfloat16",
    ),
    "a policy of random weights": (
        {"policy": {"model_type": "llama"}, "tokenizer": "base"},
        r"adapter: got a bare configuration as policy; need trained weights",
    ),
    "a base in other bits": (
        {"memory": "shared_base", "quantization": "4bit"},
        r"reward_model: got 'rm_None.ckpt', which is no adapter on the policy's base as it is here "
        r"\(quantization: 4bit\).*Do: train it so, or set memory to separate",
    ),
    "a value model on another base": (
        {"memory": "shared_base", "value_model": "rm_4bit.ckpt"},
        r"value_model: got 'rm_4bit.ckpt', which is no adapter on the policy's base",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_plans_that_cannot_work(models: dict[Any, str], case: str) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        ppo("rm_None.ckpt", **changes)


def test_other_stages_refuse_too(folder: Path) -> None:
    save_model(folder / "base")
    for module in (SFTModule, RewardModule):
        with pytest.raises(ConfigError, match=r"quantization: got 8bit without an adapter"):
            module("base", quantization="8bit")
        with pytest.raises(ConfigError, match=r"adapter: got a bare configuration as base"):
            module({"model_type": "llama", "hidden_size": 16, "num_attention_heads": 2}, "base", adapter=LORA)


def test_a_reward_model_that_trained_whole_is_not_shared(models: dict[Any, str], folder: Path) -> None:
    whole = save_stage(RewardModule("base"), folder / "whole.ckpt")
    with pytest.raises(ConfigError, match=r"whole.ckpt', which is no adapter on the policy's base"):
        ppo(whole, memory="shared_base")
    ppo(whole)


def test_a_base_that_is_gone_or_other(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(folder / "base")
    sft = SFTModule("base", adapter=LORA)
    stir(sft.policy)
    path = save_stage(sft, folder / "sft.ckpt")
    rm = save_stage(RewardModule(path, adapter=LORA), folder / "rm.ckpt")
    (folder / "elsewhere").mkdir()
    with monkeypatch.context() as elsewhere:  # the absolute path is still good
        elsewhere.chdir(folder / "elsewhere")
        assert_close(logits(load_language_model(path)), logits(sft.policy), scale=10.0)
        SFTModule.load_from_checkpoint(path)
    shutil.move(folder / "base", folder / "moved")
    for load in (load_language_model, ScalarModel.from_base):
        with pytest.raises(
            ConfigError, match=r"sft.ckpt'?: got an adapter alone.*Need that base, 'base'. Do: put it back"
        ):
            load(path if load is load_language_model else rm)
    given = SFTModule.load_from_checkpoint(path, base="moved")
    assert torch.equal(logits(given.policy), logits(sft.policy))
    save_model(folder / "base", seed=1)
    with pytest.raises(ConfigError, match=r"'base' holds other weights than it did then"):
        load_language_model(path)
    with pytest.raises(
        ConfigError, match=r"has adapters on policy \(fp32 \w{8}\), and this run on policy \(fp32 \w{8}\)"
    ):
        SFTModule.load_from_checkpoint(path)
    with pytest.raises(ConfigError, match=r"has adapters on policy \(fp32 \w{8}\), and this run on nothing"):
        SFTModule.load_from_checkpoint(path, base="moved", adapter=None)


def test_a_checkpoint_written_over_its_own_base(folder: Path) -> None:
    save_stage(SFTModule(save_model(folder / "base"), adapter=LORA), folder / "sft.ckpt")
    save_stage(SFTModule("sft.ckpt", adapter=LORA), folder / "sft.ckpt")
    with pytest.raises(ConfigError, match=r"got an adapter alone.*'sft.ckpt' is this checkpoint itself, written over"):
        load_language_model("sft.ckpt")


def test_only_what_trains_is_averaged(folder: Path) -> None:
    save_model(folder / "base")
    module, average = SFTModule("base", adapter=LORA), WeightEMA(decay=0.5)
    average.start(module)
    assert average.average.keys() == own_state(module.policy).keys()
