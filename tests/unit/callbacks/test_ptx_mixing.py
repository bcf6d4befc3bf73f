"""PtxMixing: its stream of text, micro-batches and arguments. Its effect on gradients is tested with the modules."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lit_instruct import PromptDataModule, RewardModule
from lit_instruct.callbacks import PtxMixing, WeightEMA
from lit_instruct.models.backbone import load_language_model
from lit_instruct.types import ConfigError, DataError
from tests.helpers.numbers import assert_close
from tests.helpers.tiny import Scored, prompts, quiet_trainer, texts, tiny_tokenizer, weights, write_jsonl
from tests.unit.callbacks.runs import fit_ppo, tiny_ppo


class Spy(nn.Module):
    """A policy that keeps the ids it reads."""

    def __init__(self, policy: nn.Module):
        super().__init__()
        self.policy, self.config, self.seen = policy, policy.config, []

    def forward(self, **arguments: Any) -> Any:
        self.seen.append(arguments["input_ids"].clone())
        return self.policy(**arguments)


@pytest.fixture
def module(base: str) -> Any:
    return SimpleNamespace(
        policy=Spy(load_language_model(base)), tokenizer=tiny_tokenizer(), update_rows=4, device=torch.device("cpu")
    )


@pytest.fixture
def text(folder: Path) -> str:
    return texts(folder / "t.jsonl", 10)


def draw(mixing: PtxMixing, module: Any, steps: int) -> list[list[int]]:
    """The chunks of some optimizer steps."""
    module.policy.seen.clear()
    for _ in range(steps):
        list(mixing.auxiliary_losses(module, None))
    return torch.cat(module.policy.seen).tolist()


@pytest.mark.parametrize("stop", [0, 1, 2, 3, 4, 5, 7])
def test_the_stream_goes_on_where_it_stopped(module: Any, text: str, folder: Path, stop: int) -> None:
    """Two chunks a step, a little more than three steps an epoch: stops inside, at the end of and behind an epoch."""

    def fresh() -> PtxMixing:
        return PtxMixing(text, coef=1.0, ratio=0.5, micro_batch_size=1, chunk_tokens=20)

    whole = fresh()
    expected = draw(whole, module, 9)
    assert whole.data is not None
    assert 2 * 2 < len(whole.data.samples.train) < 9  # several epochs
    first = fresh()
    seen = draw(first, module, stop) if stop else []
    torch.save(first.state_dict(), folder / "state.pt")
    resumed = fresh()
    resumed.load_state_dict(torch.load(folder / "state.pt", weights_only=True))
    assert resumed.state_dict() == torch.load(folder / "state.pt", weights_only=True)  # also before the first draw
    assert seen + draw(resumed, module, 9 - stop) == expected


@pytest.mark.parametrize("stops", [(1, 1), (2, 3), (4, 4), (4, 5), (5, 7), (8, 12)])
def test_the_stream_goes_on_through_two_stops(module: Any, text: str, stops: tuple[int, int]) -> None:
    """A resumed stream counts its epochs anew: only the orders that were really drawn say where it stands."""

    def fresh() -> PtxMixing:
        return PtxMixing(text, coef=1.0, ratio=0.5, micro_batch_size=1, chunk_tokens=20)

    expected = draw(fresh(), module, 16)
    mixing, seen, done = fresh(), [], 0
    for stop in (*stops, 16):
        if stop > done:
            seen += draw(mixing, module, stop - done)
        done, state = stop, mixing.state_dict()
        mixing = fresh()
        mixing.load_state_dict(state)
    assert seen == expected


def test_a_state_loaded_later_counts_too(module: Any, text: str) -> None:
    mixing = PtxMixing(text, coef=1.0, ratio=0.5, micro_batch_size=1, chunk_tokens=20)
    draw(mixing, module, 1)
    state = mixing.state_dict()
    expected = draw(mixing, module, 2)
    mixing.load_state_dict(state)
    assert draw(mixing, module, 2) == expected


def test_every_chunk_comes_once_an_epoch_in_another_order(module: Any, text: str) -> None:
    mixing = PtxMixing(text, coef=1.0, ratio=0.25, micro_batch_size=1, chunk_tokens=20)
    mixing.prepare(module)
    assert mixing.data is not None
    chunks = len(mixing.data.samples.train)
    first, second = draw(mixing, module, chunks), draw(mixing, module, chunks)
    assert sorted(first) == sorted(second) == sorted(mixing.data.samples.train.tolist())
    assert first != second


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_losses_sum_to_the_weighted_mean_over_tokens(module: Any, text: str, micro_batch_size: int) -> None:
    mixing = PtxMixing(text, coef=27.8, ratio=1, micro_batch_size=micro_batch_size, chunk_tokens=9)
    losses = list(mixing.auxiliary_losses(module, None))
    assert len(losses) == 4 // micro_batch_size
    ids_BT = torch.cat(module.policy.seen)
    assert ids_BT.shape == (4, 9)
    logits = module.policy.policy(input_ids=ids_BT).logits
    nll = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())
    assert_close(sum(losses), 27.8 * nll)
    metrics: dict[str, Any] = {}
    mixing.after_update(module, metrics)
    assert_close(metrics["ptx/nll"], float(nll))


def test_losses_come_one_at_a_time(module: Any, text: str) -> None:
    """So that the activations of one micro-batch are freed before the next one is read."""
    losses = PtxMixing(text, ratio=1, micro_batch_size=1, chunk_tokens=9).auxiliary_losses(module, None)
    for count in range(1, 5):
        assert isinstance(next(iter(losses)), Tensor)
        assert len(module.policy.seen) == count


def test_no_coefficient_no_forward(module: Any, text: str) -> None:
    mixing = PtxMixing(text, coef=0.0)
    assert draw_nothing(mixing, module) == 0
    metrics: dict[str, Any] = {}
    mixing.after_update(module, metrics)
    assert metrics == {}


def draw_nothing(mixing: PtxMixing, module: Any) -> int:
    list(mixing.auxiliary_losses(module, None))
    return len(module.policy.seen)


def test_chunks_default_to_the_models_context(module: Any, text: str) -> None:
    mixing = PtxMixing(text, ratio=1, micro_batch_size=1)
    list(mixing.auxiliary_losses(module, None))
    assert {ids_BT.shape[1] for ids_BT in module.policy.seen} == {32}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "both"}, "mode: got 'both'; need add or fraction"),
        ({"coef": -1.0}, "coef: got -1.0"),
        ({"coef": 1.0, "mode": "fraction"}, "coef: got 1.0 in mode fraction"),
        ({"coef": float("nan")}, "coef: got nan"),
        ({"ratio": 0.0}, "PtxMixing ratio: got 0.0"),
        ({"ratio": float("nan")}, "PtxMixing ratio: got nan"),
        ({"micro_batch_size": 0}, "PtxMixing micro_batch_size: got 0"),
        ({"grad_norms_every": 0}, "PtxMixing grad_norms_every: got 0"),
        ({"on_bad_row": "ignore"}, "on_bad_row: got 'ignore'; need one of error, skip"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PtxMixing("t.jsonl", **arguments)


def test_too_little_text_for_a_micro_batch(module: Any, text: str) -> None:
    mixing = PtxMixing(text, ratio=1, micro_batch_size=1000, chunk_tokens=9)
    with pytest.raises(ConfigError, match=r"PtxMixing micro_batch_size: got \d+ chunks of 9 tokens in .*1000 x 1"):
        mixing.prepare(module)


def test_micro_batches_must_divide(sft_ckpt: str, rm_ckpt: str, text: str, folder: Path) -> None:
    mixing = PtxMixing(text, ratio=1, micro_batch_size=3, chunk_tokens=9)
    module = tiny_ppo(sft_ckpt, rm_ckpt)
    sampled: list[int] = []
    module.scorer = Scored(lambda _, responses: sampled.append(1) or torch.zeros(len(responses.finished_B)))
    with pytest.raises(ConfigError, match=r"1 chunks for each of 4 rows = 4.*micro_batch_size 3.*Change ratio"):
        fit_ppo(module, prompts(folder / "p.jsonl", 8), callbacks=[mixing])
    assert not sampled  # said before the first rollout


def test_bad_text_is_found_before_training(sft_ckpt: str, rm_ckpt: str, folder: Path) -> None:
    module = tiny_ppo(sft_ckpt, rm_ckpt)
    module.scorer = Scored(lambda *_: pytest.fail("sampled"))
    path = write_jsonl(folder / "t.jsonl", [{"body": "w1"}])
    with pytest.raises(DataError, match=r"t\.jsonl:1: field 'text'"):
        fit_ppo(module, prompts(folder / "p.jsonl", 8), callbacks=[PtxMixing(path)])


def test_rows_of_text_that_cannot_be_used_may_be_left_out(
    module: Any, sft_ckpt: str, rm_ckpt: str, text: str, folder: Path
) -> None:
    """They are listed apart from those of the run's own data; in a custom loop, below the current folder."""
    settings: dict[str, Any] = {"ratio": 0.5, "micro_batch_size": 1, "chunk_tokens": 20, "on_bad_row": "skip"}
    sound = draw(PtxMixing(text, **settings), module, 3)
    rows = Path(text).read_text().splitlines(keepends=True)
    Path(text).write_text("".join([rows[0], "{\n", *rows[1:]]))
    with pytest.raises(DataError, match=r"t.jsonl:2: got invalid JSON"):
        PtxMixing(text, **settings | {"on_bad_row": "error"}).prepare(module)
    assert draw(PtxMixing(text, **settings), module, 3) == sound
    own = prompts(folder / "p.jsonl", 8)
    Path(own).write_text(Path(own).read_text() + "[]\n")
    data = PromptDataModule(own, module.tokenizer, batch_size=8, val=0.0, on_bad_row="skip")
    run = quiet_trainer(max_epochs=-1, callbacks=[PtxMixing(text, **settings)], default_root_dir=folder / "run")
    run.fit(tiny_ppo(sft_ckpt, rm_ckpt), datamodule=data)
    listed = {
        place: [json.loads(line)["place"] for line in (folder / place / "skipped_rows.jsonl").read_text().splitlines()]
        for place in ("ptx_mixing", "run/ptx_mixing", "run")
    }
    assert listed == {"ptx_mixing": [f"{text}:2"], "run/ptx_mixing": [f"{text}:2"], "run": [f"{own}:9"]}


def test_a_module_without_a_policy_is_refused(sft_ckpt: str, text: str, folder: Path) -> None:
    for callback in (PtxMixing(text), WeightEMA()):
        with pytest.raises(ConfigError, match=r"got a RewardModule; need an SFTModule or a PPOModule.* Do: remove it"):
            quiet_trainer(max_epochs=1, callbacks=[callback]).fit(RewardModule(sft_ckpt), [])


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_resumed_run_mixes_the_same_text(sft_ckpt: str, rm_ckpt: str, text: str, folder: Path, stop: int) -> None:
    def mixing() -> PtxMixing:
        return PtxMixing(text, coef=2.0, ratio=0.5, micro_batch_size=1, chunk_tokens=20)

    path = prompts(folder / "p.jsonl", 24)
    saver = pl.callbacks.ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    whole = tiny_ppo(sft_ckpt, rm_ckpt, episodes=32)
    fit_ppo(whole, path, callbacks=[mixing(), saver])
    resumed = tiny_ppo(sft_ckpt, rm_ckpt, episodes=32)
    fit_ppo(resumed, path, callbacks=[mixing()], ckpt=folder / f"step={stop}.ckpt")
    assert torch.equal(weights(resumed.policy), weights(whole.policy))


def test_chunks_longer_than_the_context_are_refused(sft_ckpt: str, rm_ckpt: str, text: str, folder: Path) -> None:
    """Some models fail at positions that they do not have, others read them without a word."""
    mixing = PtxMixing(text, ratio=1, micro_batch_size=4, chunk_tokens=33)
    with pytest.raises(ConfigError, match="chunk_tokens: got 33, but the policy's context is 32 tokens; lower it"):
        fit_ppo(tiny_ppo(sft_ckpt, rm_ckpt), prompts(folder / "p.jsonl", 8), callbacks=[mixing])


def test_no_coefficient_no_text(sft_ckpt: str, rm_ckpt: str, folder: Path) -> None:
    module = tiny_ppo(sft_ckpt, rm_ckpt, episodes=8)
    fit_ppo(module, prompts(folder / "p.jsonl", 8), callbacks=[PtxMixing("missing.jsonl", coef=0.0)])
    assert module.iterations_done == 1
