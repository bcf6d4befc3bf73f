"""RewardScoreSelection: its numbers against single rows, what it chooses, and what it leaves alone."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lit_instruct import DemonstrationDataModule, PretrainingDataModule, RewardModule, SFTModule
from lit_instruct.callbacks import RewardScoreSelection, WeightEMA
from lit_instruct.models.backbone import load_language_model
from lit_instruct.models.generation import uniform_streams
from lit_instruct.models.scalar_head import ScalarModel
from lit_instruct.types import ConfigError, DataError
from tests.helpers.numbers import assert_close
from tests.helpers.tiny import (
    EOS,
    TEMPLATE,
    Record,
    demonstrations,
    ids,
    prompts,
    quiet_trainer,
    save_model,
    save_stage,
    texts,
    weights,
    write_jsonl,
)
from tests.unit.callbacks.runs import fit_ppo, fit_sft, tiny_ppo

LIMIT = 6
NAMES = ("rm_score", "response_len", "eos_rate")


def selection(rm_ckpt: str, **changes: Any) -> RewardScoreSelection:
    return RewardScoreSelection(rm_ckpt, **{"max_response_tokens": LIMIT} | changes)


@torch.no_grad()
def by_hand(policy: nn.Module, rm_ckpt: str, path: str, *, seed: int = 1) -> dict[str, float]:
    """The oracle: one prompt at a time, no cache, no padding; a token for each number of the row's stream."""
    policy.eval()
    reward, rows = ScalarModel.from_base(rm_ckpt).eval(), list(map(json.loads, Path(path).read_text().splitlines()))
    scores, lengths, ends = [], [], []
    for number, row in enumerate(rows):
        prompt = ids(f"{row['prompt']} :")
        tokens = list(prompt)
        for uniform in uniform_streams([number], LIMIT, seed=seed, iteration=0)[0].tolist():
            probabilities = policy(torch.tensor([tokens])).logits[0, -1].softmax(dim=-1)
            tokens.append(int((probabilities.cumsum(dim=0) <= uniform).sum()))
            if tokens[-1] == EOS:
                break
        hidden = reward.trunk(torch.tensor([tokens])).last_hidden_state[0, -1]
        scores.append(float(reward.head(hidden) - reward.score_bias))
        lengths.append(len(tokens) - len(prompt))
        ends.append(tokens[-1] == EOS)
    policy.train()
    return {name: sum(values) / len(rows) for name, values in zip(NAMES, (scores, lengths, ends), strict=True)}


def logged(run: pl.Trainer) -> dict[str, float]:
    return {name: float(run.callback_metrics[f"sft/val/{name}"]) for name in NAMES}


def same(found: dict[str, float], expected: dict[str, float]) -> None:
    assert_close([found[name] for name in NAMES], [expected[name] for name in NAMES])


def validate(module: SFTModule, path: str, callback: RewardScoreSelection, **trainer: Any) -> pl.Trainer:
    data = DemonstrationDataModule(path, module.tokenizer, batch_size=8, val_batch_size=4, val=path)
    run = quiet_trainer(callbacks=[callback], **trainer)
    run.validate(module, datamodule=data, verbose=False)
    return run


@pytest.mark.parametrize("rows_together", [1, 3, 256])
def test_the_numbers(base: str, rm_ckpt: str, folder: Path, rows_together: int) -> None:
    path, module = demonstrations(folder / "v.jsonl", 13), SFTModule(base)
    sizes = {"rollout_batch_size": rows_together, "micro_batch_size": rows_together}
    found = logged(validate(module, path, selection(rm_ckpt, **sizes)))
    expected = by_hand(module.policy, rm_ckpt, path)
    same(found, expected)
    assert 0 < expected["eos_rate"] < 1  # some end, some run into the limit
    assert ScalarModel.from_base(rm_ckpt).score_bias != 0


def test_prompts_of_a_source_of_their_own(base: str, rm_ckpt: str, folder: Path) -> None:
    path, module = demonstrations(folder / "v.jsonl", 5), SFTModule(base)
    own = prompts(folder / "p.jsonl", 9, seed=4)
    same(logged(validate(module, path, selection(rm_ckpt, prompts=own))), by_hand(module.policy, rm_ckpt, own))
    rows = Path(own).read_text().splitlines(keepends=True)
    (folder / "few.jsonl").write_text("".join(rows[:4]))
    few = by_hand(module.policy, rm_ckpt, str(folder / "few.jsonl"))
    same(logged(validate(module, path, selection(rm_ckpt, prompts=own, max_prompts=4))), few)
    same(
        logged(validate(module, path, selection(rm_ckpt, prompts=[own], seed=7, max_prompts=4))),
        by_hand(module.policy, rm_ckpt, str(folder / "few.jsonl"), seed=7),
    )


def test_prompts_that_cannot_be_used_may_be_left_out(base: str, rm_ckpt: str, folder: Path) -> None:
    path, module = demonstrations(folder / "v.jsonl", 5), SFTModule(base)
    own = prompts(folder / "p.jsonl", 4, seed=4)
    expected = by_hand(module.policy, rm_ckpt, own)
    rows = Path(own).read_text().splitlines(keepends=True)
    Path(own).write_text("".join([rows[0], '{"prompt": ""}\n', *rows[1:]]))
    with pytest.raises(DataError, match=r"p.jsonl:2: field 'prompt': got an empty text"):
        validate(module, path, selection(rm_ckpt, prompts=own))
    callback = selection(rm_ckpt, prompts=own, on_bad_row="skip")
    same(logged(validate(module, path, callback, default_root_dir=folder / "run")), expected)
    (listed,) = (folder / "run/reward_score_selection/skipped_rows.jsonl").read_text().splitlines()
    assert json.loads(listed)["place"] == f"{own}:2"


def runs(base: str, rm_ckpt: str, folder: Path, *callbacks: Any, **changes: Any) -> tuple[SFTModule, list[Any], Any]:
    """Six epochs with a validation each; what was logged, and the weights that were validated."""
    module = SFTModule(base, learning_rate=0.1, **changes)
    seen = Record(
        on_validation_end=lambda run, _: logged(run) | {"loss": float(run.callback_metrics["sft/val/loss"])},
        on_validation_batch_start=lambda *_: weights(module.policy),
    )
    torch.manual_seed(3)
    path, held_out = demonstrations(folder / "d.jsonl", 16), demonstrations(folder / "v.jsonl", 8, seed=9)
    fit_sft(module, path, val=held_out, callbacks=[*callbacks, seen], max_epochs=6)
    return module, seen.seen["on_validation_end"], seen.seen["on_validation_batch_start"]


def test_the_checkpoint_with_the_highest_score_is_chosen_and_not_the_lowest_loss(
    base: str, rm_ckpt: str, folder: Path
) -> None:
    best = ModelCheckpoint(folder / "best", monitor="sft/val/rm_score", mode="max", filename="{epoch}")
    module, seen, validated = runs(base, rm_ckpt, folder, selection(rm_ckpt), best)
    scores, losses = [entry["rm_score"] for entry in seen], [entry["loss"] for entry in seen]
    assert len(set(scores)) == 6
    chosen = scores.index(max(scores))
    assert chosen not in (losses.index(min(losses)), 5)  # neither the lowest loss nor simply the last one
    assert [path.name for path in (folder / "best").iterdir()] == [f"epoch={chosen}.ckpt"]
    policy = load_language_model(best.best_model_path)
    assert torch.equal(weights(policy), validated[chosen])
    expected = by_hand(policy, rm_ckpt, str(folder / "v.jsonl"))
    same(seen[chosen], expected)
    assert_close(float(best.best_model_score), expected["rm_score"])
    saved = torch.load(best.best_model_path, weights_only=True)
    assert not [name for name in saved["state_dict"] if not name.startswith("policy.")]  # no reward model
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_the_same_weights_have_the_same_score_every_time(base: str, rm_ckpt: str, folder: Path) -> None:
    path, module, callback = demonstrations(folder / "v.jsonl", 8), SFTModule(base), selection(rm_ckpt)
    torch.manual_seed(1)
    first = logged(validate(module, path, callback))
    torch.manual_seed(2)
    assert logged(validate(module, path, callback)) == first


def test_training_is_the_same_with_and_without(base: str, rm_ckpt: str, folder: Path) -> None:
    """Also with dropout: sampling has random numbers of its own."""
    path, held_out = demonstrations(folder / "d.jsonl", 16), demonstrations(folder / "v.jsonl", 8, seed=9)
    results = []
    for callbacks in ([], [selection(rm_ckpt)]):
        module = SFTModule(base, learning_rate=0.1, residual_dropout=0.2)
        torch.manual_seed(3)
        fit_sft(module, path, val=held_out, callbacks=callbacks, max_epochs=3)
        results.append(weights(module.policy))
    assert torch.equal(*results)


def test_averaged_weights_are_what_is_sampled(base: str, rm_ckpt: str, folder: Path) -> None:
    ema = WeightEMA(decay=0.5)
    module, seen, validated = runs(base, rm_ckpt, folder, ema, selection(rm_ckpt))
    averaged = load_language_model(base)
    torch.nn.utils.vector_to_parameters(validated[-1], averaged.parameters())
    assert not torch.equal(validated[-1], weights(module.policy))
    same(seen[-1], by_hand(averaged, rm_ckpt, str(folder / "v.jsonl")))


def test_a_sanity_check_samples_nothing(base: str, rm_ckpt: str, folder: Path, monkeypatch: Any) -> None:
    callback, calls = selection(rm_ckpt), []
    monkeypatch.setattr(callback, "measure", lambda module: calls.append(module) or dict.fromkeys(NAMES, 0.0))
    path = demonstrations(folder / "d.jsonl", 16)
    fit_sft(SFTModule(base), path, val=path, callbacks=[callback], max_epochs=2, num_sanity_val_steps=1)
    assert len(calls) == 2


def measure_on(rank: int, port: int, out: str, base: str, rm_ckpt: str, path: str) -> None:
    """Validate as one process of two; each writes down what it has at the end."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    run = validate(SFTModule(base), path, selection(rm_ckpt), devices=2, strategy="ddp")
    Path(f"{out}/{rank}.json").write_text(json.dumps(logged(run)))


def test_two_processes_measure_what_one_does(base: str, rm_ckpt: str, folder: Path) -> None:
    """Seven prompts: one has four of them, the other three."""
    path = demonstrations(folder / "v.jsonl", 7)
    arguments = (find_free_network_port(), str(folder), base, rm_ckpt, path)
    torch.multiprocessing.spawn(measure_on, args=arguments, nprocs=2)
    expected = by_hand(SFTModule(base).policy, rm_ckpt, path)
    for rank in range(2):
        same(json.loads((folder / f"{rank}.json").read_text()), expected)


class TestRefused:
    """Before training starts, each with what to do."""

    @pytest.fixture
    def path(self, folder: Path) -> str:
        return demonstrations(folder / "d.jsonl", 16)

    def test_no_validation(self, base: str, rm_ckpt: str, path: str) -> None:
        for arguments in ({"val": 0.0}, {"val": path, "limit_val_batches": 0}):
            with pytest.raises(ConfigError, match=r"got no validation data.*set data.val"):
                fit_sft(SFTModule(base), path, callbacks=[selection(rm_ckpt)], max_epochs=1, **arguments)

    def test_no_prompts(self, base: str, rm_ckpt: str, folder: Path) -> None:
        module = SFTModule(base)
        source = texts(folder / "t.jsonl", 30)
        data = PretrainingDataModule(source, module.tokenizer, chunk_tokens=8, batch_size=2, val=0.5)
        with pytest.raises(ConfigError, match=r"prompts: got none.*Do: name a source"):
            quiet_trainer(max_epochs=1, callbacks=[selection(rm_ckpt)]).fit(module, datamodule=data)
        own = prompts(folder / "p.jsonl", 3)
        run = quiet_trainer(max_epochs=1, callbacks=[selection(rm_ckpt, prompts=own)])
        run.fit(module, datamodule=data)
        assert "sft/val/rm_score" in run.callback_metrics

    def test_another_tokenizer(self, base: str, folder: Path, path: str) -> None:
        other = save_model(folder / "other")
        module = RewardModule(other)
        module.tokenizer.chat_template = TEMPLATE + " "
        rm = save_stage(module, folder / "rm.ckpt")
        with pytest.raises(ConfigError, match="another tokenizer or template"):
            fit_sft(SFTModule(base), path, val=path, callbacks=[selection(rm)], max_epochs=1)

    def test_no_reward_model(self, base: str, sft_ckpt: str, path: str) -> None:
        for wrong, reason in ((sft_ckpt, "stage 'sft'"), (base, "need the .ckpt of a reward stage")):
            with pytest.raises(ConfigError, match=reason):
                fit_sft(SFTModule(base), path, val=path, callbacks=[selection(wrong)], max_epochs=1)

    def test_no_room(self, base: str, rm_ckpt: str, path: str) -> None:
        callback = selection(rm_ckpt, max_response_tokens=32)
        with pytest.raises(ConfigError, match=r"max_response_tokens: got 32.*context of 32 tokens.*lower it"):
            fit_sft(SFTModule(base), path, val=path, callbacks=[callback], max_epochs=1)

    def test_the_reward_model_s_context_counts_too(self, base: str, folder: Path, path: str) -> None:
        short = save_model(folder / "short", max_position_embeddings=8)
        rm = save_stage(RewardModule(short), folder / "rm.ckpt")
        with pytest.raises(ConfigError, match=r"max_response_tokens: got 8.*context of 8 tokens"):
            fit_sft(SFTModule(base), path, val=path, callbacks=[selection(rm, max_response_tokens=8)], max_epochs=1)

    def test_long_prompts(self, base: str, rm_ckpt: str, folder: Path) -> None:
        rows = [{"prompt": "w1 " * length, "response": "w2"} for length in (3, 11, 14)]
        path = write_jsonl(folder / "long.jsonl", rows)  # 4, 12 and 15 tokens for 32 - 20 = 12
        module, room = SFTModule(base), {"max_response_tokens": 20}
        with pytest.raises(ConfigError, match=r"1 of 3 validation prompts with more than 12 tokens \(the longest 15\)"):
            validate(module, path, selection(rm_ckpt, **room))
        kept = {}
        for choice in ("drop", "truncate_left"):
            callback = selection(rm_ckpt, long_prompt=choice, **room)
            validate(module, path, callback)
            kept[choice] = [sample.prompt_ids for sample in callback._samples]
        assert kept["drop"] == [ids("w1 " * 3 + ":"), ids("w1 " * 11 + ":")]
        assert kept["truncate_left"] == [*kept["drop"], ids("w1 " * 11 + ":")]

    def test_ppo(self, sft_ckpt: str, rm_ckpt: str, folder: Path) -> None:
        with pytest.raises(ConfigError, match="got a PPOModule; need an SFTModule"):
            fit_ppo(tiny_ppo(sft_ckpt, rm_ckpt), prompts(folder / "p.jsonl", 8), callbacks=[selection(rm_ckpt)])

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"max_prompts": 0}, "max_prompts: got 0"),
            ({"max_response_tokens": 0}, "max_response_tokens: got 0"),
            ({"rollout_batch_size": 0}, "rollout_batch_size: got 0"),
            ({"micro_batch_size": -1}, "micro_batch_size: got -1"),
            ({"temperature": -1.0}, "temperature -1.0"),
            ({"seed": -1}, "seed -1"),
            ({"on_bad_row": "no"}, "on_bad_row: got 'no'; need one of error, skip"),
            ({"long_prompt": "cut"}, "long_prompt: got 'cut'; need one of error, drop, truncate_left"),
        ],
    )
    def test_arguments(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            RewardScoreSelection("rm.ckpt", **arguments)


def test_the_reward_model_waits_on_the_cpu(base: str, rm_ckpt: str, folder: Path) -> None:
    """On the device it would take the room that training needs; after a validation its weights are as they were."""
    path, module, callback = demonstrations(folder / "v.jsonl", 4), SFTModule(base), selection(rm_ckpt)
    validate(module, path, callback)
    model = callback._scorer.model  # type: ignore[union-attr]
    vector: Tensor = weights(model)
    assert torch.equal(vector, weights(ScalarModel.from_base(rm_ckpt)))
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert not any(parameter.is_inference() or parameter.requires_grad for parameter in model.parameters())
    assert not module.policy.get_input_embeddings().weight.is_inference()
