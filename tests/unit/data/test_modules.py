"""The DataModules from files to batches: limits, splits, sizes, and what they say when something cannot work."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_instruct.data.modules import (
    ComparisonDataModule,
    DemonstrationDataModule,
    PretrainingDataModule,
    PromptDataModule,
)
from lit_instruct.types import ComparisonBatch, ConfigError, DataError, DemonstrationBatch, PromptBatch
from tests.unit.data.worlds import EOS, demonstrations, ids, trainer_stub, word_tokenizer, words, write_jsonl

PROMPT = ids("<s> <user> w1 w2 <assistant>")


def rankings(path: Path, count: int, *, responses: int = 3) -> str:
    """Row n: prompt ``wn``, its k-th response is k+1 words long, ranked in reverse with a tie at the end."""
    rows = [
        {
            "prompt": words(n),
            "responses": [words(*[n] * (k + 1)) for k in range(responses + n % 2)],
            "ranks": [max(responses - k, 1) for k in range(responses + n % 2)],
        }
        for n in range(count)
    ]
    return write_jsonl(path, rows)


def ready(module: Any, **trainer: int | None) -> Any:
    if trainer:
        module.trainer = trainer_stub(**trainer)
    module.setup("fit")
    return module


def first_column(batches: Any) -> list[int]:
    """The word of each demonstration of ``worlds.demonstrations``, which stands at column 2."""
    return [int(row[2]) for batch in batches for row in batch.input_ids_BT]


def test_the_boundary_is_the_same_in_all_modules(tmp_path: Path) -> None:
    demos = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "w1 w2", "response": "w3 w4"}])
    row = {"prompt": "w1 w2", "responses": ["w3 w4", "w5"], "ranks": [1, 2]}
    tokenizer = word_tokenizer()
    kwargs = {"batch_size": 1, "val": 0.0}
    sft = next(iter(ready(DemonstrationDataModule(demos, tokenizer, **kwargs)).train_dataloader()))
    comparisons = write_jsonl(tmp_path / "c.jsonl", [row])
    rm = next(iter(ready(ComparisonDataModule(comparisons, tokenizer, **kwargs)).train_dataloader()))
    ppo = next(iter(ready(PromptDataModule([demos, comparisons], tokenizer, **kwargs)).train_dataloader()))
    assert isinstance(sft, DemonstrationBatch)
    assert isinstance(rm, ComparisonBatch)
    assert isinstance(ppo, PromptBatch)
    assert ppo.prompt_ids_BP.tolist() == rm.prompt_ids_BP.tolist() == [PROMPT]
    assert rm.response_ids_NR[0].tolist() == [*ids("w3 w4"), EOS]
    assert sft.input_ids_BT[0].tolist() == PROMPT + rm.response_ids_NR[0].tolist()
    assert sft.loss_mask_BT[0].tolist() == [False] * len(PROMPT) + [True] * 3


@pytest.mark.parametrize("num_workers", [0, 1])
def test_prompts_carry_the_rows_that_they_came_from(tmp_path: Path, num_workers: int) -> None:
    chat = [{"role": "user", "content": "w1 w2"}]
    rows = [
        {"prompt": "w1 w2 w3 w4", "answer": "w5", "tests": [{"in": 1}, {"in": [2.5, None]}]},
        {"prompt": chat, "source": 3},
        {"messages": [*chat, {"role": "assistant", "content": "w6"}], "answer": "w7"},
    ]
    path = write_jsonl(tmp_path / "p.jsonl", rows)
    val = write_jsonl(tmp_path / "v.jsonl", [{"prompt": "w1", "other": 1}])
    kwargs = {"batch_size": 3, "max_prompt_tokens": 4, "long_prompt": "truncate_left", "num_workers": num_workers}
    data = ready(PromptDataModule(path, word_tokenizer(), val=val, val_batch_size=1, **kwargs))
    expected = [  # every row has every column of the data, and the whole prompt though its tokens were cut
        {"prompt": "w1 w2 w3 w4", "answer": "w5", "tests": [{"in": 1}, {"in": [2.5, None]}], "source": None},
        {"prompt": chat, "answer": None, "tests": None, "source": 3},
        {"prompt": chat, "answer": "w7", "tests": None, "source": None},
    ]
    batch = next(iter(data.train_dataloader()))
    assert batch.prompt_mask_BP.sum(dim=1).tolist() == [4, 4, 4]
    assert sorted(map(str, batch.rows)) == sorted(map(str, expected))
    ends = {"w5": "w4 <assistant>", None: "w2 <assistant>", "w7": "w2 <assistant>"}
    for row, tokens in zip(batch.rows, batch.prompt_ids_BP, strict=True):
        assert tokens[-2:].tolist() == ids(ends[row["answer"]])  # ids and rows are in the same order
    assert next(iter(data.val_dataloader())).rows == [{"prompt": "w1", "other": 1}]


def test_rows_survive_the_way_to_the_device_and_cost_little(tmp_path: Path) -> None:
    """Lightning walks through every list and dictionary of a batch."""
    column = {"words": ["w1"] * 100, "nested": {"of": [None, 1, "two", [3.5]]}}
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "w1", "key": row, **column} for row in range(512)])
    data = ready(PromptDataModule(path, word_tokenizer(), batch_size=512, val=0.0))
    batch = next(iter(data.train_dataloader()))
    started = time.perf_counter()
    moved = data.transfer_batch_to_device(batch, torch.device("meta"), 0)
    assert time.perf_counter() - started < 2.0
    assert moved.prompt_ids_BP.device.type == "meta"
    assert type(moved) is PromptBatch
    assert moved.rows == batch.rows
    assert moved.rows[3]["nested"] == column["nested"]


def test_pad_may_be_the_end_of_text(tmp_path: Path) -> None:
    """The end of text of a short row is real and learnt, the padding behind it has the same id and is not."""
    rows = [{"prompt": "w1", "response": "w2"}, {"prompt": "w1", "response": "w2 w3 w4"}]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    module = ready(DemonstrationDataModule(path, word_tokenizer(), batch_size=2, val=0.0, loss_on_prompt=False))
    batch = next(iter(module.train_dataloader()))
    assert module.pad_id == EOS
    short = int(batch.attention_mask_BT.sum(dim=1).argmin())
    assert batch.input_ids_BT[short].tolist() == [*ids("<s> <user> w1 <assistant> w2"), EOS, EOS, EOS]
    assert batch.loss_mask_BT[short].tolist() == [False] * 4 + [True] * 2 + [False] * 2


def test_rankings_are_ragged_and_keep_ties(tmp_path: Path) -> None:
    module = ComparisonDataModule(rankings(tmp_path / "c.jsonl", 4), word_tokenizer(), batch_size=4, val=0.0)
    batch = next(iter(ready(module).train_dataloader()))
    prompts = [int(row[mask][2]) for row, mask in zip(batch.prompt_ids_BP, batch.prompt_mask_BP, strict=True)]
    for group, prompt in enumerate(prompts):
        number = prompt - ids("w0")[0]
        own = batch.group_N == group
        assert batch.ranks_N[own].tolist() == [3, 2, 1, 1][: 3 + number % 2]
        assert batch.response_mask_NR[own].sum(dim=1).tolist() == [2, 3, 4, 5][: 3 + number % 2]
        assert set(batch.response_ids_NR[own][:, 0].tolist()) == {prompt}


def ranked_by(path: Path, *labelers: Any) -> str:
    """Row n: prompt ``wn``, ranked by the n-th of these; None: the row does not say."""
    rows = [{"prompt": words(n), "chosen": "w1", "rejected": "w2"} for n in range(len(labelers))]
    named = zip(rows, labelers, strict=True)
    return write_jsonl(path, [row if who is None else row | {"labeler": who} for row, who in named])


def labelers_of(module: ComparisonDataModule, batches: Any) -> dict[int, str | None]:
    """Word of the prompt -> name of the labeler."""
    first = ids("w0")[0]
    return {
        int(row[mask][2]) - first: None if number == -1 else module.labelers[number]
        for batch in batches
        for row, mask, number in zip(batch.prompt_ids_BP, batch.prompt_mask_BP, batch.labeler_B.tolist(), strict=True)
    }


def test_labelers_are_numbered_over_all_sources(tmp_path: Path) -> None:
    """Training, validation and test data share the numbers; a number in the data is a name like any other."""
    train, val = ranked_by(tmp_path / "c.jsonl", "ann", "bob", None, "ann"), ranked_by(tmp_path / "v.jsonl", 7, "bob")
    test = ranked_by(tmp_path / "t.jsonl", None, "zoe")
    for rank in range(2):
        module = ComparisonDataModule(train, word_tokenizer(), batch_size=4, val=val, test=test)
        ready(module, world_size=2, rank=rank)
        assert sorted(module.labelers) == ["7", "ann", "bob", "zoe"]
    module = ready(ComparisonDataModule(train, word_tokenizer(), batch_size=4, val=val, test=test))
    assert labelers_of(module, module.train_dataloader()) == {0: "ann", 1: "bob", 2: None, 3: "ann"}
    assert labelers_of(module, module.val_dataloader()) == {0: "7", 1: "bob"}
    assert labelers_of(module, module.test_dataloader()) == {0: None, 1: "zoe"}
    before = list(module.labelers)
    ready(module, limit=30)  # read again
    assert module.labelers == before


def test_a_row_that_is_dropped_takes_its_labeler_with_it(tmp_path: Path) -> None:
    rows = [
        {"prompt": words(*[n] * (9 if n == 1 else 1)), "chosen": "w1", "rejected": "w2", "labeler": f"l{n}"}
        for n in range(4)
    ]
    path = write_jsonl(tmp_path / "c.jsonl", rows)
    module = ready(
        ComparisonDataModule(path, word_tokenizer(), batch_size=1, val=0.0, max_length=8, long_prompt="drop")
    )
    assert labelers_of(module, module.train_dataloader()) == {0: "l0", 2: "l2", 3: "l3"}


def test_without_labelers_nobody_is_known(tmp_path: Path) -> None:
    module = ready(ComparisonDataModule(rankings(tmp_path / "c.jsonl", 4), word_tokenizer(), batch_size=4, val=0.0))
    assert module.labelers == []
    assert next(iter(module.train_dataloader())).labeler_B.tolist() == [-1] * 4


@pytest.mark.parametrize("layout", [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)])
def test_a_step_has_the_same_rows_whatever_the_layout(tmp_path: Path, layout: tuple[int, int]) -> None:
    world_size, accumulate = layout
    path = demonstrations(tmp_path / "d.jsonl", 26)
    alone = first_column(
        ready(DemonstrationDataModule(path, word_tokenizer(), batch_size=4, val=0.2)).train_dataloader()
    )
    assert len(alone) == 20  # of 21
    of_ranks = []
    for rank in range(world_size):
        module = DemonstrationDataModule(path, word_tokenizer(), batch_size=4, val=0.2)
        ready(module, world_size=world_size, rank=rank, accumulate=accumulate)
        of_ranks.append(first_column(module.train_dataloader()))
    share = 4 // world_size
    for step in range(5):
        together = [row for rows in of_ranks for row in rows[step * share : (step + 1) * share]]
        assert sorted(together) == sorted(alone[step * 4 : (step + 1) * 4])


def test_validation_keeps_order_and_all_rows(tmp_path: Path) -> None:
    train, val = demonstrations(tmp_path / "d.jsonl", 8), demonstrations(tmp_path / "v.jsonl", 11)
    seen = []
    for rank in range(2):
        module = DemonstrationDataModule(train, word_tokenizer(), batch_size=4, val=val, val_batch_size=4)
        seen.append(list(ready(module, world_size=2, rank=rank).val_dataloader()))
    assert len(seen[0]) == len(seen[1])
    together = [row for round_ in zip(*seen, strict=True) for row in first_column(round_)]
    assert together == [ids(words(n))[0] for n in range(11)]


def test_splits_are_the_same_every_time_and_disjoint(tmp_path: Path) -> None:
    path = demonstrations(tmp_path / "d.jsonl", 40)
    one, two = (ready(DemonstrationDataModule(path, word_tokenizer(), val=0.1)) for _ in range(2))
    assert one.samples == two.samples
    assert len(one.samples.val) == 4
    assert not {s.prompt_ids[2] for s in one.samples.train} & {s.prompt_ids[2] for s in one.samples.val}
    other = ready(DemonstrationDataModule(path, word_tokenizer(), val=0.1, seed=2))
    assert other.samples.val != one.samples.val
    assert ready(DemonstrationDataModule(path, word_tokenizer(), val=0)).val_dataloader() == []


def test_loaders_leave_the_global_random_stream_alone(tmp_path: Path) -> None:
    module = ready(DemonstrationDataModule(demonstrations(tmp_path / "d.jsonl", 40), word_tokenizer(), batch_size=4))
    before = torch.get_rng_state()
    list(module.train_dataloader())
    list(module.val_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


def test_setup_reads_once_and_again_for_another_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = DemonstrationDataModule(demonstrations(tmp_path / "d.jsonl", 40), word_tokenizer())
    calls = []
    load = module._load
    monkeypatch.setattr(module, "_load", lambda limit: calls.append(limit.tokens) or load(limit))
    module.setup("fit")
    module.setup("validate")
    assert calls == [None]
    ready(module, limit=50)
    assert calls == [None, 50]


def test_demonstrations_for_the_score_bias(tmp_path: Path) -> None:
    comparisons, demos = rankings(tmp_path / "c.jsonl", 8), demonstrations(tmp_path / "d.jsonl", 5)
    kwargs = {"batch_size": 4, "val": 0.0}
    without = ready(ComparisonDataModule(comparisons, word_tokenizer(), **kwargs))
    assert without.demonstration_dataloader() is None
    of_ranks = []
    for rank in range(2):
        module = ComparisonDataModule(comparisons, word_tokenizer(), demonstrations=demos, **kwargs)
        of_ranks.append(list(ready(module, world_size=2, rank=rank).demonstration_dataloader()))
    together = [row for round_ in zip(*of_ranks, strict=True) for row in first_column(round_)]
    assert together == [ids(words(n))[0] for n in range(5)]
    few = ComparisonDataModule(comparisons, word_tokenizer(), demonstrations=demos, batch_size=8, val=0.0)
    with pytest.raises(ConfigError, match=r"got 5 rows .* for 8 ranks"):
        ready(few, world_size=8)


# Test data.


def of_each_kind(folder: Path, test: Any) -> list[Any]:
    demos, text = demonstrations(folder / "d.jsonl", 8), folder / "t.jsonl"
    write_jsonl(text, [{"text": words(*[n] * 9)} for n in range(8)])
    common = {"test": test, "val": 0.0, "batch_size": 2, "val_batch_size": 2}
    return [
        DemonstrationDataModule(demos, word_tokenizer(), **common),
        ComparisonDataModule(rankings(folder / "c.jsonl", 8), word_tokenizer(), **common),
        PromptDataModule(demos, word_tokenizer(), **common),
        PretrainingDataModule(str(text), word_tokenizer(), chunk_tokens=10, **common),
    ]


@pytest.mark.parametrize("world_size", [1, 2])
def test_test_data_keep_order_and_all_rows(tmp_path: Path, world_size: int) -> None:
    """From two sources; every row once over all ranks; training sees none of them."""
    sources = [demonstrations(tmp_path / f"{name}.jsonl", rows) for name, rows in (("x", 3), ("y", 4))]
    train = write_jsonl(tmp_path / "d.jsonl", [{"prompt": words(99), "response": words(99)}] * 8)
    seen = []
    for rank in range(world_size):
        module = DemonstrationDataModule(train, word_tokenizer(), batch_size=4, val=0.0, val_batch_size=2, test=sources)
        ready(module, world_size=world_size, rank=rank)
        seen.append(list(module.test_dataloader()))
    together = [row for round_ in zip(*seen, strict=True) for row in first_column(round_)]
    assert together == [ids(words(n))[0] for n in (0, 1, 2, 0, 1, 2, 3)]
    assert set(first_column(module.train_dataloader())) == set(ids(words(99)))
    assert module.val_dataloader() == []


def test_every_module_has_test_data(tmp_path: Path) -> None:
    held_out = write_jsonl(
        tmp_path / "h.jsonl",
        [{"prompt": "w7", "response": "w8", "responses": ["w1", "w2"], "ranks": [1, 2], "text": words(*[7] * 30)}] * 3,
    )
    for module in of_each_kind(tmp_path, held_out):
        module.setup("test")
        (first, *_) = batches = list(module.test_dataloader())
        rows = sum(len(batch[0]) for batch in batches)
        assert rows == (len(module.samples.test) if isinstance(module, PretrainingDataModule) else 3)
        assert len(module.samples.test) >= 3
        assert ids("w7")[0] in first[0]


def test_a_test_without_data_says_which_argument_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in of_each_kind(tmp_path, None):
        ready(module)  # a run that is no test does without
        assert len(module.samples.test) == 0
        with pytest.raises(ConfigError, match=r"got no test data; need a source.*Do: set data\.test \(--data\.test"):
            module.test_dataloader()
    for module in of_each_kind(tmp_path, None):
        monkeypatch.setattr(module, "_load", lambda limit: pytest.fail("said before anything is read"))
        with pytest.raises(ConfigError, match=r"data\.test"):
            module.setup("test")


def test_test_data_are_checked_like_the_others(tmp_path: Path) -> None:
    path, bad = demonstrations(tmp_path / "d.jsonl", 8), write_jsonl(tmp_path / "bad.jsonl", [{"prompt": "w1"}])
    with pytest.raises(DataError, match=r"bad\.jsonl:1"):
        ready(DemonstrationDataModule(path, word_tokenizer(), batch_size=4, test=bad))
    long = write_jsonl(tmp_path / "long.jsonl", [{"prompt": words(*[1] * 9), "response": "w1"}])
    with pytest.raises(DataError, match=r"long\.jsonl:1: .*limit 8"):
        ready(DemonstrationDataModule(path, word_tokenizer(), batch_size=4, max_length=8, test=long))
    one_row = DemonstrationDataModule(path, word_tokenizer(), batch_size=4, val=0.0, test=long)
    with pytest.raises(ConfigError, match=r"got 1 rows \(validation, test, .* for 2 ranks"):
        ready(one_row, world_size=2)
    short, text = (
        write_jsonl(tmp_path / "s.jsonl", [{"text": "w1"}]),
        write_jsonl(tmp_path / "t.jsonl", [{"text": words(*[1] * 99)}]),
    )
    with pytest.raises(DataError, match="test text: got 2 tokens; need at least 8"):
        ready(PretrainingDataModule(text, word_tokenizer(), chunk_tokens=8, batch_size=1, val=0.0, test=short))


def test_a_test_needs_no_whole_training_batch(tmp_path: Path) -> None:
    path = demonstrations(tmp_path / "d.jsonl", 8)
    module = DemonstrationDataModule(path, word_tokenizer(), batch_size=32, val=0.0, test=path)
    module.setup("test")
    assert len(first_column(module.test_dataloader())) == 8
    with pytest.raises(ConfigError, match="got 8 training rows for batch_size=32"):
        module.setup("fit")


# What is too long. Row n has 4 + n % 2 prompt tokens and 2 response tokens; a limit of 6 excludes odd rows.


def test_long_rows_are_listed(tmp_path: Path) -> None:
    path = demonstrations(tmp_path / "d.jsonl", 60)
    with pytest.raises(DataError) as error:
        ready(DemonstrationDataModule(path, word_tokenizer(), max_length=6, val=0.0), limit=99)
    lines = str(error.value).splitlines()
    assert lines[0] == (
        "30 of 60 samples have more tokens than allowed (max_length=6 of DemonstrationDataModule; SFTStub allows 99):"
    )
    assert lines[1].strip() == f"{path}:2: field 'prompt': got 7 tokens (prompt 5 + response 2); limit 6"
    assert lines[-2].strip() == "... and 10 more"
    assert "long_prompt" in lines[-1]


@pytest.mark.parametrize(
    ("own", "model", "reason"),
    [
        (None, 6, "SFTStub allows 6"),
        (9, 6, "SFTStub allows 6; max_length=9 of DemonstrationDataModule"),
        (6, None, "max_length=6 of DemonstrationDataModule"),
    ],
)
def test_the_smaller_limit_counts_and_is_named(tmp_path: Path, own: int | None, model: int | None, reason: str) -> None:
    module = DemonstrationDataModule(demonstrations(tmp_path / "d.jsonl", 4), word_tokenizer(), max_length=own)
    with pytest.raises(DataError) as error:
        ready(module, limit=model)
    assert f"({reason}):" in str(error.value)
    assert "limit 6" in str(error.value)


def test_long_rows_are_dropped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = demonstrations(tmp_path / "d.jsonl", 8)
    module = DemonstrationDataModule(path, word_tokenizer(), max_length=6, long_prompt="drop", val=0.0, batch_size=4)
    with caplog.at_level(logging.WARNING):
        ready(module)
    assert [sample.prompt_ids[2] for sample in module.samples.train] == [ids(words(n))[0] for n in (0, 2, 4, 6)]
    assert [record.getMessage() for record in caplog.records] == [
        "long_prompt=drop: dropped 4 of 8 samples (max_length=6 of DemonstrationDataModule)"
    ]
    some = DemonstrationDataModule(path, word_tokenizer(), max_length=6, long_prompt="drop", val=0.25, batch_size=1)
    assert [len(part) for part in ready(some).samples] == [3, 1, 0], "the fraction is one of what is left"
    with pytest.raises(DataError, match="would leave nothing"):
        ready(DemonstrationDataModule(path, word_tokenizer(), max_length=5, long_prompt="drop", val=0.0))


def test_long_prompts_are_cut_from_the_left_and_responses_never(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [{"prompt": words(1, 2, 3), "response": words(4)}])
    kwargs = {"long_prompt": "truncate_left", "val": 0.0, "batch_size": 1}
    module = ready(DemonstrationDataModule(path, word_tokenizer(), max_length=4, **kwargs))
    assert module.samples.train[0] == (ids("w3 <assistant>"), [*ids("w4"), EOS])
    with pytest.raises(DataError, match=rf"{path}:1: .*prompt 6 \+ response 2\); limit 2(.|\n)*only prompts are cut"):
        ready(DemonstrationDataModule(path, word_tokenizer(), max_length=2, **kwargs))


def test_the_longest_response_of_a_ranking_counts(tmp_path: Path) -> None:
    path = rankings(tmp_path / "c.jsonl", 4)  # prompt 4 tokens, longest response 4 or (odd rows) 5
    kwargs = {"val": 0.0, "batch_size": 2}
    assert len(ready(ComparisonDataModule(path, word_tokenizer(), max_length=9, **kwargs)).samples.train) == 4
    dropping = ready(ComparisonDataModule(path, word_tokenizer(), max_length=8, long_prompt="drop", **kwargs))
    assert [len(sample.ranks) for sample in dropping.samples.train] == [3, 3]


def test_prompts_have_a_limit_of_their_own(tmp_path: Path) -> None:
    path = demonstrations(tmp_path / "d.jsonl", 4)
    with pytest.raises(DataError, match=r"max_prompt_tokens=4 of PromptDataModule(.|\n)*:2: .*got 5 tokens; limit 4"):
        ready(PromptDataModule(path, word_tokenizer(), max_prompt_tokens=4, batch_size=1, val=0.0))


# Pretraining text.


def test_text_is_cut_into_full_chunks(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", [{"text": words(*range(n + 1))} for n in range(8)])
    module = ready(PretrainingDataModule(path, word_tokenizer(), chunk_tokens=5, val=0.0, batch_size=2))
    flat = module.samples.train.reshape(-1).tolist()
    documents = sum((word == EOS) for word in flat)
    assert len(flat) == (8 * 9 // 2 + 8) // 5 * 5
    assert documents in (7, 8)  # the last may have lost its end to the cut
    pieces: list[list[int]] = [[]]
    for token in flat:
        pieces[-1].append(token)
        if token == EOS:
            pieces.append([])
    whole = [len(piece) - 1 for piece in pieces if piece and piece[-1] == EOS]
    assert whole != sorted(whole), "documents are shuffled"
    assert all(piece[:-1] == ids(words(*range(len(piece) - 1))) for piece in pieces if piece and piece[-1] == EOS)
    batch = next(iter(module.train_dataloader()))
    assert batch.input_ids_BT.shape == (2, 5)
    assert batch.loss_mask_BT.all()


def test_text_is_split_by_document(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", [{"text": words(*[n] * 9)} for n in range(50)])
    module = ready(PretrainingDataModule(path, word_tokenizer(), chunk_tokens=10, val=0.1, batch_size=2))
    train, val = (set(part.reshape(-1).tolist()) - {EOS} for part in module.samples[:2])
    assert (len(train), len(val)) == (45, 5)
    assert not train & val


def test_the_chunk_length_comes_from_the_model(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", [{"text": words(*[1] * 5000)}])
    assert ready(PretrainingDataModule(path, word_tokenizer(), batch_size=1)).samples.train.shape == (2, 2048)
    by_model = PretrainingDataModule(path, word_tokenizer(), batch_size=1)
    assert ready(by_model, limit=100).samples.train.shape == (50, 100)
    with pytest.raises(ConfigError, match="chunk_tokens: got 128, but SFTStub allows 100"):
        ready(PretrainingDataModule(path, word_tokenizer(), chunk_tokens=128, batch_size=1), limit=100)


def test_too_little_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    short = write_jsonl(tmp_path / "s.jsonl", [{"text": "w1"}])
    path = write_jsonl(tmp_path / "t.jsonl", [{"text": words(*[n] * 9)} for n in range(50)])
    with pytest.raises(DataError, match="training text: got 2 tokens; need at least 8"):
        ready(PretrainingDataModule(short, word_tokenizer(), chunk_tokens=8))
    with pytest.raises(DataError, match="validation text: got 2 tokens"):
        ready(PretrainingDataModule(path, word_tokenizer(), chunk_tokens=8, val=short))
    with caplog.at_level(logging.WARNING):
        module = ready(PretrainingDataModule(path, word_tokenizer(), chunk_tokens=16, val=0.01, batch_size=2))
    assert module.val_dataloader() == []
    assert "no validation on text" in caplog.text


# Settings that cannot work.


@pytest.mark.parametrize(
    ("kwargs", "problem"),
    [
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"batch_size": 2.5}, r"batch_size: got 2\.5"),
        ({"val_batch_size": -1}, "val_batch_size: got -1"),
        ({"max_length": 0}, "max_length: got 0"),
        ({"val": 1.0}, r"val: got 1\.0"),
        ({"val": -0.1}, r"val: got -0\.1"),
        ({"seed": -1}, "seed: got -1"),
        ({"num_workers": -1}, "num_workers: got -1"),
        ({"long_prompt": "cut"}, "long_prompt: got 'cut'; need one of error, drop, truncate_left"),
    ],
)
def test_arguments_are_checked_at_construction(kwargs: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        DemonstrationDataModule("d.jsonl", word_tokenizer(), **kwargs)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"batch_size": 3}, "^batch_size: got 3, .* need a multiple of 2"),
        ({"batch_size": 2, "val_batch_size": 3}, "^val_batch_size: got 3, .* need a multiple of 2"),
    ],
)
def test_sizes_can_be_checked_before_any_data_are_read(sizes: dict[str, int], message: str) -> None:
    module = DemonstrationDataModule("not_there.jsonl", word_tokenizer(), **sizes)
    module.trainer = trainer_stub(world_size=2)
    with pytest.raises(ConfigError, match=message):
        module.check_sizes()


def test_sizes_that_do_not_divide(tmp_path: Path) -> None:
    path = demonstrations(tmp_path / "d.jsonl", 8)
    with pytest.raises(ConfigError, match=r"got 6, which counts rows over 2 ranks x 2 accumulation .* multiple of 4"):
        ready(DemonstrationDataModule(path, word_tokenizer(), batch_size=6), world_size=2, accumulate=2)
    with pytest.raises(ConfigError, match=r"val_batch_size: got 3, .* need a multiple of 2"):
        ready(DemonstrationDataModule(path, word_tokenizer(), batch_size=2, val_batch_size=3, val=0.5), world_size=2)
    with pytest.raises(ConfigError, match="got 7 training rows for batch_size=8"):
        ready(DemonstrationDataModule(path, word_tokenizer(), batch_size=8))
    with pytest.raises(ConfigError, match=r"need setup\(\) first"):
        DemonstrationDataModule(path, word_tokenizer()).train_dataloader()


def test_the_command_line_takes_plain_strings(tmp_path: Path) -> None:
    from jsonargparse import ArgumentParser

    for cls, first in [
        (DemonstrationDataModule, "demonstrations"),
        (ComparisonDataModule, "comparisons"),
        (PromptDataModule, "prompts"),
        (PretrainingDataModule, "text"),
    ]:
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(cls, "data")
        config = tmp_path / "config.yaml"
        config.write_text(
            f"data:\n  {first}: [a.jsonl, b.jsonl]\n  tokenizer: some/model\n  val: v.jsonl\n  test: [e.jsonl]\n"
        )
        parsed = parser.parse_args(["--data.val=0.25", f"--data.{first}=c.jsonl", "--data.tokenizer=x"])
        assert (parsed.data.val, parsed.data[first]) == (0.25, "c.jsonl")
        parsed = parser.parse_path(str(config))
        module = parser.instantiate_classes(parsed).data
        assert module.val == "v.jsonl"
        assert module.test == ["e.jsonl"]
        assert getattr(module, first) == ["a.jsonl", "b.jsonl"]
        assert "None" in parser.format_help() or "null" in parser.format_help()
        undocumented = [a.dest for a in parser._actions if a.dest.startswith("data.") and not a.help]
        assert undocumented == []
