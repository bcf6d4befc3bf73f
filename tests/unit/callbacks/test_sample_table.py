"""SampleTable: what stands in the table and where it goes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_instruct import SFTModule
from lit_instruct.callbacks import SampleTable, WeightEMA
from lit_instruct.types import ConfigError, Rollout
from tests.helpers.tiny import EOS, demonstrations, ids, prompts
from tests.unit.callbacks.runs import fit_ppo, fit_sft, tiny_ppo


def test_the_table(sft_ckpt: str, rm_ckpt: str) -> None:
    module = tiny_ppo(sft_ckpt, rm_ckpt)
    rollout = Rollout(
        prompt_ids_BP=torch.tensor([[1, 1, *ids("w1 :")], ids("w2 w3 w4 :")]),
        prompt_mask_BP=torch.tensor([[False, False, True, True], [True] * 4]),
        response_ids_BR=torch.tensor([[*ids("w5"), EOS, 9], ids("w6 w7 w8")]),
        response_mask_BR=torch.tensor([[True, True, False], [True] * 3]),
        finished_B=torch.tensor([True, False]),
        old_logprobs_BR=torch.tensor([[-1.0, -1.0, 50.0], [-1.0, -2.0, -3.0]]),
        reference_logprobs_BR=torch.tensor([[-1.25, -1.25, 0.0], [-1.0, -2.0, -2.0]]),
        old_values_BR=torch.zeros(2, 3),
        raw_scores_B=torch.tensor([9.0, 9.0]),
        scores_B=torch.tensor([1.234, -1.0]),
    )
    assert SampleTable.table(module, rollout).splitlines() == [
        "| prompt | response | score | KL (nats) |",
        "|---|---|---|---|",
        "| w1 : | w5 | 1.23 | 0.50 |",
        "| w2 w3 w4 : | w6 w7 w8 … | -1.00 | -1.00 |",
    ]


def test_it_goes_to_tensorboard_after_each_validation(sft_ckpt: str, rm_ckpt: str, folder: Path) -> None:
    module = tiny_ppo(sft_ckpt, rm_ckpt, episodes=16)
    fit_ppo(
        module,
        prompts(folder / "p.jsonl", 24),
        val=prompts(folder / "v.jsonl", 7, seed=3),
        callbacks=[SampleTable(prompts=2), WeightEMA()],
        logger=TensorBoardLogger(folder, name="", version="logs"),
        val_check_interval=1,
        num_sanity_val_steps=1,
    )
    events = EventAccumulator(str(folder / "logs"), size_guidance={"tensors": 0})
    events.Reload()
    shown = events.Tensors("ppo/val/samples/text_summary")
    assert [event.step for event in shown] == [1, 2]  # iterations; nothing of the sanity check
    tables = [event.tensor_proto.string_val[0].decode().splitlines() for event in shown]
    for table in tables:
        assert table[0] == "| prompt | response | score | KL (nats) |"
        assert len(table) == 2 + 2
    first_column = [[row.split("|")[1] for row in table] for table in tables]
    assert first_column[0] == first_column[1]  # the same prompts each time


def test_modules_that_write_nothing_are_refused(base: str, folder: Path) -> None:
    module, path = SFTModule(base), demonstrations(folder / "d.jsonl", 8)
    with pytest.raises(ConfigError, match="got a SFTModule; need a PPOModule"):
        fit_sft(module, path, callbacks=[SampleTable()], max_steps=1)


def test_bad_arguments() -> None:
    with pytest.raises(ConfigError, match="prompts: got 0"):
        SampleTable(prompts=0)
