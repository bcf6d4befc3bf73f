"""PPO on two processes: the weights and the logged numbers of one, whatever the options; and nobody waits for ever."""

from __future__ import annotations

import faulthandler
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port

from lit_instruct import PPOModule, PromptDataModule, RewardModule, SFTModule
from lit_instruct.callbacks import Health, KLMonitor, PtxMixing, SampleTable
from tests.helpers.numbers import assert_close
from tests.helpers.tiny import (
    Record,
    prompts,
    quiet_trainer,
    save_model,
    save_stage,
    sgd,
    texts,
    weights,
)

CASES: dict[str, dict[str, Any]] = {
    "ptx and validation": {},
    "value warm-up": {"value_warmup_iterations": 2},
    "shared trunk, value warm-up": {"memory": "shared_trunk", "value_warmup_iterations": 1},
}
_OWN = ("time/",)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and data that all processes read."""
    folder = tmp_path_factory.mktemp("inputs")
    base = save_model(folder / "base")
    save_stage(SFTModule(base), folder / "sft.ckpt")
    torch.manual_seed(0)
    save_stage(RewardModule(str(folder / "sft.ckpt")), folder / "rm.ckpt")
    prompts(folder / "p.jsonl", 32)
    prompts(folder / "v.jsonl", 7, seed=3)  # unequal shares
    texts(folder / "t.jsonl", 40)
    return folder


def train(folder: Path, name: str, trainer: dict[str, Any]) -> list[Any]:
    """Three iterations of 8 prompts; weights and metrics after each."""
    torch.manual_seed(0)
    module = PPOModule(
        str(folder / "sft.ckpt"),
        str(folder / "rm.ckpt"),
        episodes=24,
        minibatch_size=4,
        micro_batch_size=2,
        max_response_tokens=5,
        learning_rate=0.5,
        value_learning_rate=0.05,
        warmup_iterations=0,
        optimizer=sgd,
        missing_eos="none",
        **CASES[name],
    )
    record = Record(
        after_iteration=lambda module, metrics: (
            weights(module.policy),
            weights(module.value_model),
            {key: float(value) for key, value in metrics.items() if not key.startswith(_OWN)},
        )
    )
    mixing = PtxMixing(str(folder / "t.jsonl"), coef=2.0, ratio=1, micro_batch_size=1, chunk_tokens=8)
    data = PromptDataModule(
        str(folder / "p.jsonl"), module.tokenizer, batch_size=8, val=str(folder / "v.jsonl"), val_batch_size=4
    )
    run = quiet_trainer(
        max_epochs=-1,
        check_val_every_n_epoch=None,
        val_check_interval=2,
        callbacks=[mixing, SampleTable(2), KLMonitor(), Health(), record],
        **trainer,
    )
    run.fit(module, datamodule=data)
    return record.seen["after_iteration"]


def process(rank: int, port: int, folder: str, out: str) -> None:
    faulthandler.dump_traceback_later(240, exit=True)  # a rank that waits for ever ends the test
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    found = {name: train(Path(folder), name, {"devices": 2, "strategy": "ddp"}) for name in CASES}
    torch.save(found, Path(out) / f"{rank}.pt")


def test_two_processes_do_what_one_does(inputs: Path, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(process, args=(find_free_network_port(), str(inputs), str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for name in CASES:
        alone = train(inputs, name, {})
        assert len(alone) == len(first[name]) == 3
        for one, of_first, of_second in zip(alone, first[name], second[name], strict=True):
            for network in (0, 1):
                assert torch.equal(of_first[network], of_second[network])
                assert_close(of_first[network], one[network], scale=10.0)  # sums in another order, three steps on
            shared = {key: (of_first[2][key] + of_second[2][key]) / 2 for key in one[2]}  # as Lightning logs them
            for key, value in one[2].items():
                assert_close(shared[key], value, scale=100.0)  # ratios of small numbers among them
    moved = [float((entry[0] - weights(SFTModule(str(inputs / "sft.ckpt")).policy)).norm()) for entry in alone]
    assert moved[0] == 0 < moved[1]  # the warm-up holds on all ranks
