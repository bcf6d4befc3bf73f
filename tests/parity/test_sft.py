"""The SFT loss and all its gradients against transformers' own loss and against TRL's SFTTrainer, on one batch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_instruct import DemonstrationDataModule, SFTModule
from lit_instruct.types import DemonstrationBatch
from tests.helpers.numbers import assert_close
from tests.helpers.tiny import gradients, save_model, write_jsonl

ROWS = [
    {"prompt": "w1 w2", "response": "w3 w4 w5"},
    {"prompt": "w6", "response": "w7"},
    {"prompt": "w8 w9 w10 w11 w12", "response": "w13 w14"},
    {"prompt": "w15 w16", "response": "w17 w18 w19 w20 w21 w22"},
]


@pytest.fixture
def module(tmp_path: Path) -> SFTModule:
    return SFTModule(save_model(tmp_path / "base", num_hidden_layers=2))


@pytest.fixture
def batch(module: SFTModule, tmp_path: Path) -> DemonstrationBatch:
    """All rows, ragged, in the order in which they are listed."""
    path = write_jsonl(tmp_path / "d.jsonl", ROWS)
    data = DemonstrationDataModule(path, module.tokenizer, batch_size=len(ROWS), val=path, val_batch_size=len(ROWS))
    data.setup("fit")
    (found,) = data.val_dataloader()
    assert len(set(found.loss_mask_BT.sum(dim=1).tolist())) > 2  # else a mean over rows would pass for one over tokens
    return found


def labels_of(batch: DemonstrationBatch) -> Tensor:
    return batch.input_ids_BT.where(batch.loss_mask_BT, -100)


def own(module: SFTModule, batch: DemonstrationBatch) -> tuple[Tensor, Tensor]:
    """Loss and gradients of this project."""
    loss, _ = module.loss(batch)
    loss.backward()
    return loss.detach(), gradients(module.policy)


def assert_parity(module: SFTModule, batch: DemonstrationBatch, loss: Tensor, network: nn.Module) -> None:
    loss.backward()
    mine, my_gradients = own(module, batch)
    assert_close(mine, loss)
    assert_close(my_gradients, gradients(network))
    assert float(my_gradients.norm()) > 0.1


def test_transformers_loss(module: SFTModule, batch: DemonstrationBatch) -> None:
    theirs: Any = copy.deepcopy(module.policy)
    output = theirs(
        input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT.long(), labels=labels_of(batch)
    )
    assert_parity(module, batch, output.loss, theirs)


def test_trl_sft_trainer(module: SFTModule, batch: DemonstrationBatch, tmp_path: Path) -> None:
    """Its own tokenisation and collation too: prompts in the form that the template gives them."""
    trl = pytest.importorskip("trl", minversion="1.16", reason="TRL is not installed: pip install -e '.[test]'")
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": f"{row['prompt']} :", "completion": f" {row['response']} "} for row in ROWS]
    theirs: Any = copy.deepcopy(module.policy)
    trainer = trl.SFTTrainer(
        model=theirs,
        args=trl.SFTConfig(
            output_dir=str(tmp_path / "trl"),
            completion_only_loss=True,
            shuffle_dataset=False,
            activation_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=module.tokenizer,
    )
    inputs = trainer.data_collator([trainer.train_dataset[number] for number in range(len(rows))])
    assert torch.equal(inputs["input_ids"], batch.input_ids_BT)
    assert torch.equal(inputs["attention_mask"].bool(), batch.attention_mask_BT)
    assert torch.equal(inputs["labels"], labels_of(batch))
    assert_parity(module, batch, trainer.compute_loss(trainer.model, inputs), theirs)


def test_with_prompt_tokens_it_is_another_number(module: SFTModule, batch: DemonstrationBatch) -> None:
    """The comparisons above would notice a loss mask that is ignored."""
    everything = batch._replace(loss_mask_BT=batch.attention_mask_BT)
    assert abs(float(module.loss(everything)[0].detach()) - float(module.loss(batch)[0].detach())) > 0.01
