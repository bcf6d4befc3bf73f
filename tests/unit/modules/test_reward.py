"""RewardModule against loops over prompts, pairs and single, unpadded sequences."""

from __future__ import annotations

import json
import logging
import math
import os
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from lit_instruct import ComparisonDataModule, RewardModule
from lit_instruct.data.collate import EncodedComparison, collate_comparisons
from lit_instruct.functional import cosine_to_floor
from lit_instruct.types import ComparisonBatch, DataError
from tests.helpers.numbers import assert_close
from tests.helpers.tiny import (
    EOS,
    Record,
    comparisons,
    demonstrations,
    gradients,
    ids,
    quiet_trainer,
    save_stage,
    sgd,
    weights,
    write_jsonl,
)

# Ragged K, ties, and a prompt that has nothing but ties.
ROWS = [
    EncodedComparison(ids("w1 w2 :"), [[*ids("w3 w4"), EOS], [*ids("w5"), EOS], [EOS]], [2, 1, 3]),
    EncodedComparison(ids("w9 :"), [[*ids("w3"), EOS], [*ids("w6 w7 w8"), EOS]], [2, 1]),
    EncodedComparison(ids("w4 w4 w4 :"), [[*ids("w1"), EOS], [*ids("w2"), EOS]], [1, 1]),
    EncodedComparison(ids("w7 :"), [[*ids(f"w{n} w{n + 1}"), EOS] for n in range(5)], [1, 2, 2, 1, 4]),
]


def batch_of(rows: list[EncodedComparison]) -> ComparisonBatch:
    return collate_comparisons(rows, pad_id=1)


def score(module: RewardModule, prompt: list[int], response: list[int]) -> Tensor:
    model = module.reward_model
    hidden = model.trunk(input_ids=torch.tensor([prompt + response])).last_hidden_state[0, -1]
    return hidden @ model.head.weight[0] + model.head.bias[0] - model.score_bias


def strict_pairs(row: EncodedComparison) -> list[tuple[int, int]]:
    """(better, worse), ties left out."""
    return [
        (a, b) if row.ranks[a] < row.ranks[b] else (b, a)
        for a, b in combinations(range(len(row.ranks)), 2)
        if row.ranks[a] != row.ranks[b]
    ]


def loop_loss(module: RewardModule, rows: list[EncodedComparison], *, normalize: str = "retained") -> Tensor:
    per_prompt = []
    for row in rows:
        pairs = strict_pairs(row)
        if not pairs:
            continue
        scores = [score(module, row.prompt_ids, response) for response in row.responses_ids]
        total = sum(torch.log1p(torch.exp(scores[worse] - scores[better])) for better, worse in pairs)
        count = len(pairs) if normalize == "retained" else math.comb(len(row.ranks), 2)
        per_prompt.append(total / count)
    return torch.stack(per_prompt).mean()


@pytest.fixture
def module(base: str) -> RewardModule:
    torch.manual_seed(4)
    made = RewardModule(base, optimizer=sgd)
    made.reward_model.head.weight.data.mul_(4.0)  # scores of a size that tells right from wrong
    made.reward_model.score_bias.fill_(0.3)
    return made


@pytest.mark.parametrize("normalize", ["retained", "k_choose_2"])
def test_the_loss_is_the_mean_over_prompts_of_the_mean_over_pairs(module: RewardModule, normalize: str) -> None:
    module.normalize = normalize
    loss, metrics = module.loss(batch_of(ROWS))
    assert_close(loss, loop_loss(module, ROWS, normalize=normalize))
    assert float(metrics["prompts"]) == 3
    assert float(metrics["pairs"]) == sum(len(strict_pairs(row)) for row in ROWS) == 12
    flat = [
        float(
            torch.nn.functional.softplus(
                score(module, row.prompt_ids, row.responses_ids[worse]) - better_score
            ).detach()
        )
        for row in ROWS
        for better, worse in strict_pairs(row)
        for better_score in [score(module, row.prompt_ids, row.responses_ids[better])]
    ]
    assert abs(sum(flat) / len(flat) - float(loss)) > 1e-3  # pooling all pairs would be another number


def test_a_batch_of_ties_alone_has_loss_zero_and_still_goes_backward(module: RewardModule) -> None:
    loss, metrics = module.loss(batch_of([ROWS[2]]))
    assert float(loss) == 0
    assert float(metrics["loss"]) == 0
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in module.reward_model.parameters())


def test_every_prompt_and_every_response_is_read_once(module: RewardModule) -> None:
    """12 responses to 4 prompts; with 30 pairs as examples each response would be read once a pair."""
    seen: list[int] = []
    module.reward_model.trunk.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    module.loss(batch_of(ROWS))
    assert sum(seen) == sum(len(row.prompt_ids) + sum(map(len, row.responses_ids)) for row in ROWS) == 42


def test_the_order_of_responses_and_prompts_does_not_matter(module: RewardModule) -> None:
    shuffled = [
        EncodedComparison(row.prompt_ids, [row.responses_ids[i] for i in order], [row.ranks[i] for i in order])
        for row, order in zip(
            [ROWS[3], ROWS[2], ROWS[0], ROWS[1]], [[4, 2, 0, 1, 3], [1, 0], [1, 2, 0], [1, 0]], strict=True
        )
    ]
    assert_close(module.loss(batch_of(shuffled))[0], module.loss(batch_of(ROWS))[0])


@torch.no_grad()
def test_scores_depend_on_neither_padding_nor_company(module: RewardModule) -> None:
    """Each response alone, unpadded; all together in two orders; and the same with more padding on both sides."""
    alone = torch.stack([score(module, row.prompt_ids, response) for row in ROWS for response in row.responses_ids])
    batch = batch_of(ROWS)
    assert_close(module.scores(batch), alone)
    turned = [row._replace(responses_ids=row.responses_ids[::-1], ranks=row.ranks[::-1]) for row in ROWS[::-1]]
    assert_close(module.scores(batch_of(turned)), alone.flip(0))
    wider = batch._replace(
        prompt_ids_BP=torch.nn.functional.pad(batch.prompt_ids_BP, (3, 0), value=EOS),
        prompt_mask_BP=torch.nn.functional.pad(batch.prompt_mask_BP, (3, 0)),
        response_ids_NR=torch.nn.functional.pad(batch.response_ids_NR, (0, 4), value=EOS),
        response_mask_NR=torch.nn.functional.pad(batch.response_mask_NR, (0, 4)),
    )
    assert_close(module.scores(wider), alone)


def test_chosen_and_rejected_are_the_pairwise_loss(module: RewardModule, folder: Path) -> None:
    """Rows of two responses: loss and gradient of -log sigmoid(chosen - rejected), each pair scored alone."""
    table = [{"prompt": f"w{n}", "chosen": f"w{n + 1} w{n + 2}", "rejected": f"w{2 * n}"} for n in range(1, 6)]
    path = write_jsonl(folder / "c.jsonl", table)
    data = ComparisonDataModule(path, module.tokenizer, batch_size=5, val=0.0)
    data.setup()
    module.loss(next(iter(data.train_dataloader())))[0].backward()
    got = gradients(module.reward_model)
    module.zero_grad()
    prompts, chosen, rejected = ([ids(row[key]) for row in table] for key in ("prompt", "chosen", "rejected"))
    differences = torch.stack(
        [
            score(module, [*prompt, *ids(":")], [*better, EOS]) - score(module, [*prompt, *ids(":")], [*worse, EOS])
            for prompt, better, worse in zip(prompts, chosen, rejected, strict=True)
        ]
    )
    (-torch.nn.functional.logsigmoid(differences).mean()).backward()
    assert_close(got, gradients(module.reward_model))
    assert float(got.norm()) > 0.01


def fit(module: RewardModule, data: ComparisonDataModule, **trainer: Any) -> pl.Trainer:
    run = quiet_trainer(**({"max_steps": 3} | trainer))
    run.fit(module, datamodule=data)
    return run


@pytest.mark.parametrize(("accumulate", "normalize"), [(1, "retained"), (2, "k_choose_2"), (4, "retained")])
def test_three_steps_equal_a_plain_loop_whatever_the_accumulation(
    base: str, folder: Path, accumulate: int, normalize: Literal["retained", "k_choose_2"]
) -> None:
    path = comparisons(folder / "c.jsonl", 24)

    def fresh() -> RewardModule:
        torch.manual_seed(4)
        return RewardModule(base, learning_rate=0.3, normalize=normalize, optimizer=sgd)

    trained = fresh()
    data = ComparisonDataModule(path, trained.tokenizer, batch_size=8, val=0.0)
    run = fit(trained, data, accumulate_grad_batches=accumulate)
    assert run.global_step == 3
    expected = fresh()
    plain = ComparisonDataModule(path, trained.tokenizer, batch_size=8, val=0.0)
    plain.setup()
    for step, batch in enumerate(plain.train_dataloader()):
        loss = loop_loss(expected, rows_of(batch), normalize=normalize)
        expected.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in expected.reward_model.parameters():
                parameter -= 0.3 * cosine_to_floor(step, 3) * parameter.grad
    assert_close(weights(trained.reward_model), weights(expected.reward_model))
    assert float((weights(trained.reward_model) - weights(fresh().reward_model)).norm()) > 0.01


def rows_of(batch: ComparisonBatch) -> list[EncodedComparison]:
    """The batch's prompts with their responses, unpadded."""
    rows = []
    for number, (prompt, mask) in enumerate(zip(batch.prompt_ids_BP, batch.prompt_mask_BP, strict=True)):
        chosen = batch.group_N == number
        responses = [
            ids_R[mask_R].tolist()
            for ids_R, mask_R in zip(batch.response_ids_NR[chosen], batch.response_mask_NR[chosen], strict=True)
        ]
        rows.append(EncodedComparison(prompt[mask].tolist(), responses, batch.ranks_N[chosen].tolist()))
    return rows


def demonstration_scores(module: RewardModule, data: ComparisonDataModule) -> list[float]:
    loader = data.demonstration_dataloader()
    assert loader is not None
    return [
        float(score(module, row[mask].tolist(), []))
        for batch in loader
        for row, mask in zip(batch.input_ids_BT, batch.attention_mask_BT, strict=True)
    ]


@pytest.mark.parametrize(
    "checkpoint",
    [
        {},
        {"every_n_train_steps": 1, "save_top_k": -1},
        {"save_top_k": 0, "save_last": True},
        {"monitor": "rm/val/log_loss"},
    ],
    ids=["epoch", "step", "last", "monitored"],
)
@torch.no_grad()
def test_demonstrations_score_zero_on_average_in_every_checkpoint(
    base: str, folder: Path, checkpoint: dict[str, Any]
) -> None:
    with torch.enable_grad():
        torch.manual_seed(4)
        trained = RewardModule(base, learning_rate=0.3, optimizer=sgd)
        trained.reward_model.head.bias.data.fill_(2.0)
        data = ComparisonDataModule(
            comparisons(folder / "c.jsonl", 24),
            trained.tokenizer,
            demonstrations=demonstrations(folder / "d.jsonl", 7),
            batch_size=8,
            val_batch_size=3,
            val=comparisons(folder / "v.jsonl", 5, seed=3),
        )
        saver = ModelCheckpoint(dirpath=folder, **checkpoint)
        fit(trained, data, max_steps=-1, max_epochs=1, callbacks=[saver])
    paths = sorted(folder.glob("*.ckpt"))
    assert paths
    for path in paths:
        loaded = RewardModule.load_from_checkpoint(path)
        scores = demonstration_scores(loaded, data)
        assert abs(sum(scores) / len(scores)) < 1e-4
        assert abs(float(loaded.reward_model.score_bias)) > 0.1
    assert_close(loaded.reward_model.score_bias, trained.reward_model.score_bias)
    batch = next(iter(data.val_dataloader()))
    normalised = loaded.scores(batch)
    loaded.reward_model.score_bias.zero_()
    raw = loaded.scores(batch)
    assert raw.argsort().tolist() == normalised.argsort().tolist()
    assert_close(raw - normalised, [float(trained.reward_model.score_bias)] * len(raw))


def test_without_demonstrations_the_bias_stays(base: str, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    trained = RewardModule(base, learning_rate=0.1, optimizer=sgd)
    data = ComparisonDataModule(comparisons(folder / "c.jsonl", 24), trained.tokenizer, batch_size=8, val=0.2)
    with caplog.at_level(logging.WARNING, logger="lit_instruct"):
        fit(trained, data, max_steps=4)
    assert float(trained.reward_model.score_bias) == 0
    (message,) = [record.getMessage() for record in caplog.records]  # once, although there are two epochs
    assert "scores are not shifted (bias 0)" in message
    assert "data.demonstrations" in message


def test_with_demonstrations_nothing_is_said(base: str, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    trained = RewardModule(base, learning_rate=0.1, optimizer=sgd)
    data = ComparisonDataModule(
        comparisons(folder / "c.jsonl", 24),
        trained.tokenizer,
        demonstrations=demonstrations(folder / "d.jsonl", 3),
        batch_size=8,
        val=0.0,
    )
    with caplog.at_level(logging.WARNING, logger="lit_instruct"):
        fit(trained, data)
    assert not caplog.records


def test_a_test_run_measures_as_validation_does(module: RewardModule, folder: Path) -> None:
    train, held_out = comparisons(folder / "c.jsonl", 12), comparisons(folder / "v.jsonl", 11, seed=8)
    data = ComparisonDataModule(train, module.tokenizer, batch_size=12, val_batch_size=3, val=held_out, test=held_out)
    run = quiet_trainer()
    measured = []
    for measure, split in ((run.validate, "val"), (run.test, "test")):
        measure(module, datamodule=data, verbose=False)
        assert all(name.startswith(f"rm/{split}/") for name in run.callback_metrics)
        measured.append({name.split("/")[-1]: float(value) for name, value in run.callback_metrics.items()})
    assert measured[0] == measured[1]
    assert measured[0].keys() >= {"acc", "acc_len_baseline", "log_loss", "ece", "brier", "len_corr", "score_std"}


LABELERS = ["ann", "b/o b", None]


def with_labelers(path: str) -> str:
    """Row n of the same file was ranked by labeler n % 3, who is not known for every third row."""
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return write_jsonl(Path(path), [row | {"labeler": LABELERS[n % 3]} for n, row in enumerate(rows)])


def ranked_scores(module: RewardModule, row: EncodedComparison) -> list[tuple[float, float]]:
    """(difference of scores, difference of lengths) of each pair; equal responses have equal scores, to the bit."""
    mine = [float(score(module, row.prompt_ids, response)) for response in row.responses_ids]
    texts = row.responses_ids
    return [
        (0.0 if texts[a] == texts[b] else mine[a] - mine[b], float(len(texts[a]) - len(texts[b])))
        for a, b in strict_pairs(row)
    ]


def share(differences: list[float]) -> float:
    return sum(1.0 if d > 0 else 0.5 if d == 0 else 0.0 for d in differences) / len(differences)


@pytest.mark.parametrize("rows_a_batch", [1, 3, 11])
@torch.no_grad()
def test_validation_metrics_do_not_depend_on_the_batches(module: RewardModule, folder: Path, rows_a_batch: int) -> None:
    train = with_labelers(comparisons(folder / "c.jsonl", 12))
    held_out = with_labelers(comparisons(folder / "v.jsonl", 11, seed=8))
    data = ComparisonDataModule(train, module.tokenizer, batch_size=12, val_batch_size=rows_a_batch, val=held_out)
    run = quiet_trainer()
    run.validate(module, datamodule=data, verbose=False)
    rows = [row for batch in data.val_dataloader() for row in rows_of(batch)]
    assert len(rows) == 11
    assert any(not strict_pairs(row) for row in rows)
    of_rows = [ranked_scores(module, row) for row in rows]
    pairs = [pair for of_row in of_rows for pair in of_row]
    losses = [[math.log1p(math.exp(-d)) for d, _ in of_row] for of_row in of_rows]
    scores = [float(score(module, row.prompt_ids, response)) for row in rows for response in row.responses_ids]
    mean = sum(scores) / len(scores)
    expected = {
        "loss": loop_loss(module, rows),
        "log_loss": sum(map(sum, losses)) / len(pairs),
        "acc": share([d for d, _ in pairs]),
        "acc_len_baseline": share([length for _, length in pairs]),
        "margin": sum(d for d, _ in pairs) / len(pairs),
        "score_mean": mean,
        "score_std": math.sqrt(sum((x - mean) ** 2 for x in scores) / len(scores)),
        "acc_labeler/ann": share([d for of_row in of_rows[0::3] for d, _ in of_row]),
        "acc_len_baseline_labeler/ann": share([length for of_row in of_rows[0::3] for _, length in of_row]),
        "acc_labeler/b_o_b": share([d for of_row in of_rows[1::3] for d, _ in of_row]),
        "acc_k/3": share(
            [d for row, of_row in zip(rows, of_rows, strict=True) if len(row.ranks) == 3 for d, _ in of_row]
        ),
    }
    for name, value in expected.items():
        assert_close(run.callback_metrics[f"rm/val/{name}"], value)
    for one, other in (("loss", "log_loss"), ("acc", "acc_len_baseline"), ("acc_labeler/ann", "acc_labeler/b_o_b")):
        assert abs(float(expected[one]) - float(expected[other])) > 0.01  # else one could stand for the other
    assert module.reports["val"].overall.pairs == len(pairs)


def measured(base: str, path: str, held_out: str, **trainer: Any) -> dict[str, float]:
    torch.manual_seed(4)  # the head is fresh
    module = RewardModule(base)
    run = quiet_trainer(**trainer)
    data = ComparisonDataModule(path, module.tokenizer, batch_size=8, val_batch_size=2, val=held_out)
    run.validate(module, datamodule=data, verbose=False)
    return {name: float(value) for name, value in run.callback_metrics.items()}


def measure_on(rank: int, port: int, out: str, *arguments: str) -> None:
    """Validate as one process of two; each writes down what it has at the end."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    values = measured(*arguments, devices=2, strategy="ddp")
    Path(f"{out}/{rank}.json").write_text(json.dumps(values))


def test_two_processes_measure_what_one_does(base: str, folder: Path) -> None:
    """An odd number of rankings, so that the processes have unequal shares; one labeler is seen by one of them only."""
    path = with_labelers(comparisons(folder / "c.jsonl", 8))
    held_out = with_labelers(comparisons(folder / "v.jsonl", 5, seed=8))
    alone = measured(base, path, held_out)
    torch.multiprocessing.spawn(
        measure_on, args=(find_free_network_port(), str(folder), base, path, held_out), nprocs=2
    )
    for rank in range(2):
        values = json.loads((folder / f"{rank}.json").read_text())
        assert values.keys() == alone.keys()
        assert "rm/val/acc_labeler/ann" in values
        assert_close([values[name] for name in alone], list(alone.values()))


def test_the_calibration_is_drawn_in_tensorboard(base: str, folder: Path) -> None:
    trained = RewardModule(base, learning_rate=0.1, optimizer=sgd)
    train, held_out = comparisons(folder / "c.jsonl", 16), comparisons(folder / "v.jsonl", 6, seed=9)
    data = ComparisonDataModule(train, trained.tokenizer, batch_size=8, val=held_out, test=held_out)
    logger = TensorBoardLogger(folder, name="", version="logs")
    run = fit(trained, data, max_steps=-1, max_epochs=2, logger=logger, num_sanity_val_steps=1)
    run.test(trained, datamodule=data, verbose=False)
    logger.experiment.flush()
    events = EventAccumulator(str(folder / "logs")).Reload()
    assert [image.step for image in events.Images("rm/val/reliability")] == [2, 4]  # and none of the sanity check
    assert len(events.Images("rm/test/reliability")) == 1
    assert events.Images("rm/val/reliability")[0].encoded_image_string.startswith(b"\x89PNG")


def test_two_validations_in_one_fit_do_not_mix(base: str, folder: Path) -> None:
    """Each validation sees its own weights only: the last one equals a validation of the final weights alone."""
    names = ("log_loss", "acc", "margin", "score_mean", "score_std")

    def values(trainer: pl.Trainer, _: Any = None) -> list[float]:
        return [float(trainer.callback_metrics[f"rm/val/{name}"]) for name in names]

    trained = RewardModule(base, learning_rate=0.5, optimizer=sgd)
    held_out = comparisons(folder / "v.jsonl", 6, seed=9)
    data = ComparisonDataModule(comparisons(folder / "c.jsonl", 16), trained.tokenizer, batch_size=8, val=held_out)
    record = Record(on_validation_end=values)
    fit(trained, data, max_steps=-1, max_epochs=2, callbacks=[record], num_sanity_val_steps=1)
    _, first, second = record.seen["on_validation_end"]
    assert abs(first[0] - second[0]) > 1e-4
    run = quiet_trainer()
    run.validate(RewardModule.load_from_checkpoint(save_stage(trained, folder / "rm.ckpt")), datamodule=data)
    assert_close(second, values(run))


def test_data_that_teach_nothing_are_refused(module: RewardModule, folder: Path) -> None:
    row = {"prompt": "w1", "responses": ["w2", "w3"], "ranks": [1, 1]}
    data = ComparisonDataModule(write_jsonl(folder / "c.jsonl", [row] * 4), module.tokenizer, batch_size=2, val=0.0)
    with pytest.raises(DataError, match="tied"):
        fit(module, data)
