"""The ranking loss at K = 2 and all its gradients against TRL's RewardTrainer, on one batch with the same weights."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from lit_instruct import ComparisonDataModule, RewardModule
from lit_instruct.types import ComparisonBatch
from tests.helpers.numbers import assert_close
from tests.helpers.tiny import save_model, some_words, write_jsonl
from tests.parity.reference_weights import fill, flat_gradients

PROMPTS = 5


def ranked_rows() -> list[dict[str, Any]]:
    """Pairs; the preferred response stands now first, now second."""
    stream = random.Random(4)
    return [
        {
            "prompt": some_words(stream, 1, 6),
            "responses": [some_words(stream, 1, 7), some_words(stream, 1, 7)],
            "ranks": [1, 2] if number % 2 else [2, 1],
        }
        for number in range(PROMPTS)
    ]


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return save_model(tmp_path / "base", num_hidden_layers=2)


@pytest.fixture
def module(folder: str) -> RewardModule:
    """Its head has a bias, and a score bias comes off: both cancel in differences."""
    made = RewardModule(folder)
    fill(made.reward_model, "rm")
    made.reward_model.head.bias.data.fill_(0.9)
    made.reward_model.score_bias.fill_(0.3)
    return made


@pytest.fixture
def batch(module: RewardModule, tmp_path: Path) -> ComparisonBatch:
    path = write_jsonl(tmp_path / "c.jsonl", ranked_rows())
    data = ComparisonDataModule(path, module.tokenizer, batch_size=PROMPTS, val=path, val_batch_size=PROMPTS)
    data.setup("fit")
    (found,) = data.val_dataloader()
    return found


def test_trl_reward_trainer(module: RewardModule, batch: ComparisonBatch, folder: str, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", minversion="1.16", reason="TRL is not installed: pip install -e '.[test]'")
    datasets = pytest.importorskip("datasets")
    rows = []
    for row in ranked_rows():
        chosen, rejected = (row["responses"][row["ranks"].index(rank)] for rank in (1, 2))
        rows.append({"prompt": f"{row['prompt']} :", "chosen": f" {chosen} ", "rejected": f" {rejected} "})
    theirs: Any = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    fill(theirs, "rm")
    trainer = trl.RewardTrainer(
        model=theirs,
        args=trl.RewardConfig(
            output_dir=str(tmp_path / "trl"), activation_checkpointing=False, bf16=False, use_cpu=True, report_to="none"
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=module.tokenizer,
    )
    inputs = trainer.data_collator([trainer.train_dataset[number] for number in range(len(rows))])
    their_ids = [
        ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]
    my_ids = own_ids(batch)
    loss, outputs = trainer.compute_loss(trainer.model, inputs, return_outputs=True)
    loss.backward()
    mine, metrics = module.loss(batch)
    mine.backward()
    assert_close(mine, loss)
    order = [my_ids.index(ids) for ids in their_ids]  # theirs: all chosen, then all rejected
    assert sorted(order) == list(range(2 * PROMPTS))
    their_scores = outputs.logits.squeeze(-1)
    assert_close(module.scores(batch)[order], their_scores + 0.9 - 0.3)
    chosen, rejected = their_scores.chunk(2)
    assert_close(metrics["acc"], (chosen > rejected).float().mean())
    assert 0 < float(metrics["acc"]) < 1
    my_gradients = flat_gradients(module.reward_model)
    assert_close(my_gradients, flat_gradients(theirs))
    assert float(my_gradients.norm()) > 0.1
    assert_close(module.reward_model.head.bias.grad, [0.0])


def own_ids(batch: ComparisonBatch) -> list[list[int]]:
    """Prompt and response of each row, unpadded."""
    prompts = [ids[mask] for ids, mask in zip(batch.prompt_ids_BP, batch.prompt_mask_BP, strict=True)]
    responses = zip(batch.group_N, batch.response_ids_NR, batch.response_mask_NR, strict=True)
    return [torch.cat([prompts[group], ids[mask]]).tolist() for group, ids, mask in responses]
