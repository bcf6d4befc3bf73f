"""Cross-validation over labelers: who is left out, what is kept from training, the figures, the command."""

from __future__ import annotations

import json
import math
import os
from itertools import combinations
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_instruct import RewardModule
from lit_instruct.cli import main
from lit_instruct.data.records import ComparisonRecord
from lit_instruct.evaluation import cross_validation
from lit_instruct.evaluation.labeler_figures import difference, figure
from lit_instruct.evaluation.labeler_folds import Fold, labeler_groups, make_folds
from lit_instruct.types import DataError
from tests.helpers.numbers import assert_close
from tests.helpers.tiny import save_model, write_jsonl

LABELERS = ["ann", "bob", "cem", "dan", "eva", "fay"]


def record(prompt: Any, labeler: str | None, ranks: list[int] | None = None) -> ComparisonRecord:
    return ComparisonRecord(prompt, ["w1", "w2 w3", "w4"], ranks or [2, 1, 3], labeler)


def prompts_of(records: list[ComparisonRecord]) -> set[Any]:
    return {str(record.prompt) for record in records}


# Groups of labelers.


def test_the_largest_go_first_into_the_emptiest_group() -> None:
    assert labeler_groups({"a": 1, "b": 9, "c": 4, "d": 5, "e": 1}, 2) == [["b", "a"], ["d", "c", "e"]]


@given(st.lists(st.integers(1, 50), min_size=3, max_size=40), st.integers(2, 3))
def test_groups_are_of_similar_volume_and_none_is_empty(volumes: list[int], folds: int) -> None:
    named = {f"l{number}": volume for number, volume in enumerate(volumes)}
    groups = labeler_groups(named, folds)
    assert sorted(name for group in groups for name in group) == sorted(named)
    sums = [sum(named[name] for name in group) for group in groups]
    assert min(map(len, groups)) >= 1
    # The last one put into a group found it to be the emptiest, so no group is ahead by more than one labeler.
    assert max(sums) - min(sums) <= max(volumes)


# Folds.


def folds_of(records: list[ComparisonRecord], folds: int = 3, share: float = 0.25) -> list[Fold]:
    return make_folds(records, folds=folds, own_share=share, seed=1)


def test_every_labeler_is_left_out_once_and_no_prompt_is_on_two_sides() -> None:
    records = [record(f"w{n}", LABELERS[n % 6]) for n in range(60)]
    folds = folds_of(records)
    assert sorted(name for fold in folds for name in fold.labelers) == LABELERS
    measured = set()
    for fold in folds:
        assert {r.labeler for r in fold.heldout} == set(fold.labelers)
        assert not {r.labeler for r in fold.train + fold.own} & set(fold.labelers)
        assert len(fold.heldout) == 20  # each prompt was ranked once: nothing of the group is lost
        assert len(fold.train) + len(fold.own) == 40
        assert fold.left_out == 0
        assert not prompts_of(fold.train) & prompts_of(fold.own + fold.heldout)
        assert not prompts_of(fold.own) & measured  # another part in each fold
        measured |= prompts_of(fold.own)
    assert len(measured) == pytest.approx(0.75 * 60 * 2 / 3, abs=8)
    assert folds_of(records) == folds
    assert make_folds(records, folds=3, own_share=0.25, seed=2) != folds


def test_a_prompt_that_others_train_on_is_in_no_set_to_measure_on() -> None:
    """Every prompt is ranked by all six; two of them write it with other white space, or as a message."""
    shapes = ["w{} w1", " w{}  w1 ", [{"role": "user", "content": "w{} w1"}]]

    def shaped(n: int, who: int) -> Any:
        shape = shapes[who % 3]
        return shape.format(n) if isinstance(shape, str) else [{"role": "user", "content": f"w{n} w1"}]

    records = [record(shaped(n, who), LABELERS[who]) for n in range(20) for who in range(6)]

    def numbers(rows: list[ComparisonRecord]) -> set[str]:
        texts = (r.prompt if isinstance(r.prompt, str) else r.prompt[0]["content"] for r in rows)
        return {text.split()[0] for text in texts}

    for fold in folds_of(records):
        assert len(numbers(fold.train)) == 15
        assert len(numbers(fold.own)) == 5
        assert numbers(fold.heldout) == numbers(fold.own)
        assert not numbers(fold.train) & numbers(fold.own + fold.heldout)
        assert (len(fold.train), len(fold.own), len(fold.heldout), fold.left_out) == (15 * 4, 5 * 4, 5 * 2, 15 * 2)


def test_rankings_by_nobody_are_in_no_fold() -> None:
    records = [record(f"w{n}", LABELERS[n % 6] if n % 4 else None) for n in range(48)]
    for fold in folds_of(records):
        assert len(fold.train + fold.own + fold.heldout) == 36
        assert all(r.labeler is not None for r in fold.train + fold.own + fold.heldout)


def test_groups_hold_similar_numbers_of_pairs_and_not_of_rankings() -> None:
    """Ann has few rankings with three pairs each, the others many with one."""
    records = [record(f"w{n}", "ann") for n in range(10)]
    records += [record(f"v{n}", LABELERS[1 + n % 3], [1, 1, 2] if n % 2 else [1, 2, 2]) for n in range(15)]
    groups = [fold.labelers for fold in folds_of(records, folds=2, share=0.2)]
    assert groups == [["ann"], ["bob", "cem", "dan"]]


TIES = [1, 1, 1]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([record("w1", None)] * 9, r"got 9 rankings without a labeler(.|\n)*Do: .*column \"labeler\""),
        ([record(f"w{n}", LABELERS[n % 2]) for n in range(9)], r"got 2 labelers; need at least 3(.|\n)*--folds"),
        (
            [record(f"w{n}", LABELERS[n % 3], TIES if n % 3 == 1 else None) for n in range(30)],
            r"held-out labelers bob: got 10 rankings for the held-out group and no pair(.|\n)*lower --folds",
        ),
        (  # of the 40 prompts of a fold to measure on, none of the two by the others
            [*(record(f"w{n}", "ann") for n in range(400)), record("v1", "bob"), record("v2", "cem")],
            r"held-out labelers ann: got 0 rankings for .* kept for measuring and no pair(.|\n)*raise --own_share",
        ),
        (
            [*(record("w2", name) for name in LABELERS), *(record("w1", name, TIES) for name in LABELERS)],
            r"got 4 rankings for training and no pair(.|\n)*lower --own_share",
        ),
        ([record("w1", name) for name in LABELERS], r"rankings of one prompt; need several(.|\n)*Do: give .* more"),
    ],
    ids=["nobody", "few", "ties", "nothing to measure", "nothing to train", "one prompt"],
)
def test_data_that_cannot_be_split(records: list[ComparisonRecord], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make_folds(records, folds=3, own_share=0.1, seed=1)


# Figures.

OWN = [(1, {"a": [8, 5, 10], "b": [3, 2, 4]}), (1, {"a": [6, 5, 10], "b": [4, 2, 4]}), (2, {"c": [9, 9, 12]})]
HELD_OUT = [(1, {"c": [5, 6, 10]}), (1, {"c": [7, 6, 10]}), (2, {"a": [20, 1, 30], "b": [3, 1, 5]})]


def test_a_figure_pools_pairs_over_all_runs() -> None:
    got = figure(OWN)
    assert_close(got.accuracy, 30 / 40)
    assert_close(got.length_baseline, 23 / 40)
    assert (got.pairs, got.labelers) == (40, 3)
    assert_close(got.standard_error, stdev([21 / 28, 9 / 12]) / math.sqrt(2))
    assert_close(figure(HELD_OUT).standard_error, stdev([12 / 20, 23 / 35]) / math.sqrt(2))
    assert figure(HELD_OUT).standard_error > 0.01
    assert got.low <= got.accuracy <= got.high


def test_the_interval_is_over_labelers_and_not_over_pairs() -> None:
    """Ten labelers, half of them always right: their number decides the width, however many pairs they have."""
    for pairs in (10, 1000):
        runs = [(1, {f"l{n}": [pairs * (n % 2), 0, pairs] for n in range(10)}), (2, {"l0": [0, 0, 0]})]
        got = figure([*runs[:1], (2, runs[0][1])])
        # Normal interval of a share of 10 independent labelers: 0.5 +- 1.96 sqrt(0.25 / 10).
        assert (got.high - got.low) / 2 == pytest.approx(1.96 * math.sqrt(0.025), abs=0.06)
    alike = figure([(1, {"a": [7, 0, 10], "b": [70, 0, 100]}), (2, {"a": [7, 0, 10]})])
    assert_close([alike.low, alike.high], [0.7, 0.7])


def test_the_difference_pairs_each_labeler_with_itself() -> None:
    """Labelers differ much, the difference of each is the same: its interval is a point."""
    rates = {f"l{n}": n for n in range(1, 9)}
    own = [(1, {name: [10 * rate + 5, 0, 100] for name, rate in rates.items()})]
    heldout = [(2, {name: [10 * rate, 0, 100] for name, rate in rates.items()})]
    got = difference(own, heldout)
    assert_close([got["difference"], got["low"], got["high"]], [0.05, 0.05, 0.05])
    swapped = difference(HELD_OUT, OWN)
    straight = difference(OWN, HELD_OUT)
    assert_close(straight["difference"], 30 / 40 - 35 / 55)
    assert_close([swapped["low"], swapped["high"]], [-straight["high"], -straight["low"]])


# The command.


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "base")
    rows = [
        {
            "prompt": f"w{n} w{n % 7}",
            "responses": [f"w{n % 5}", "w9 w8 w7"],
            "ranks": [1, 2],
            "labeler": LABELERS[n % 4],
        }
        for n in range(28)
    ]
    write_jsonl(tmp_path / "c.jsonl", rows)
    return tmp_path


COMMAND = [
    "rm",
    "cross-validate",
    "--folds",
    "2",
    "--seeds",
    "2",
    "--config",
    "rm/default.yaml",
    "--data.batch_size",
    "4",
]
MODEL = ["--model.base", "base", "--data.comparisons", "c.jsonl", "--model.learning_rate", "0.01"]
CPU = ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.enable_progress_bar", "false"]


def test_the_command_trains_a_model_a_fold_and_seed(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[set[int]] = []
    fit = RewardModule.on_fit_start
    monkeypatch.setattr(RewardModule, "on_fit_start", lambda self: trained.append(set()) or fit(self))
    step = RewardModule.training_step
    monkeypatch.setattr(
        RewardModule, "training_step", lambda self, b, i: trained[-1].update(b.labeler_B.tolist()) or step(self, b, i)
    )
    arguments = [*COMMAND, *MODEL, *CPU, "--own_share", "0.25", "--out", "cv"]
    main([*arguments, "--seeds", "1"])
    assert "2 folds x 1 seeds" in capsys.readouterr().out
    first = json.loads((here / "cv/cross_validation.json").read_text())["runs"]
    (here / "cv/fold2/seed1/result.json").unlink()  # as if the call had been cut off
    main(arguments)
    printed = capsys.readouterr().out
    results = json.loads((here / "cv/cross_validation.json").read_text())
    assert [(run["fold"], run["seed"]) for run in results["runs"]] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert [run for run in results["runs"] if run["seed"] == 1] == first
    assert [len(labelers) for labelers in trained] == [2] * 5  # fold 1, seed 1 was there already
    for run in results["runs"]:
        assert sorted(run["heldout"]["labelers"]) == sorted(run["heldout_labelers"])
        assert set(run["own"]["labelers"]) == set(LABELERS[:4]) - set(run["heldout_labelers"])
        assert run["heldout"]["pairs"] == 14
        assert run["train_rankings"] + run["own"]["pairs"] == 14
        assert run["heldout"]["length_baseline"] == 0.0  # the better response is always the shorter one
    figures = {kind: results[kind]["accuracy"] for kind in ("own", "heldout")}
    for kind, accuracy in figures.items():
        counts = [(run[kind]["accuracy"] * run[kind]["pairs"], run[kind]["pairs"]) for run in results["runs"]]
        assert_close(accuracy, sum(correct for correct, _ in counts) / sum(pairs for _, pairs in counts))
        assert f"{accuracy:.1%}" in printed
    assert "own labelers" in printed
    assert "held-out labelers" in printed
    assert not list(here.rglob("*.ckpt"))
    assert not (here / "runs").exists()
    assert list(here.glob("cv/fold1/seed2/logs/events*"))
    runs = {json.dumps(run["own"]) for run in results["runs"]}
    assert len({run["own"]["log_loss"] for run in results["runs"]}) == len(runs) == 4  # seeds differ too


def test_the_run_is_trained_on_its_own_part_and_measured_on_the_others(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = cross_validation.read_config([*COMMAND[6:], *MODEL, *CPU, "--data.val", "0.5"])
    records = cross_validation.read_comparisons("c.jsonl").records
    fold = make_folds(records, folds=2, own_share=0.25, seed=1)[0]
    run = cross_validation.run_fold(config, fold, 1, 5, here / "cv")
    read = {
        name: cross_validation.read_comparisons(str(here / f"cv/fold1/{name}.jsonl")).records
        for name in Fold._fields[1:4]
    }
    assert read == {"train": fold.train, "own": fold.own, "heldout": fold.heldout}
    assert (run["own"]["rankings"], run["heldout"]["rankings"]) == (len(fold.own), len(fold.heldout))
    saved = cross_validation.yaml.safe_load((here / "cv/fold1/seed5/config.yaml").read_text())
    assert saved["seed_everything"] == saved["data"]["seed"] == 5
    assert saved["trainer"]["callbacks"] is None  # the shipped file lists only a ModelCheckpoint

    def train(*_: Any) -> None:
        raise RuntimeError("trained again")

    monkeypatch.setattr(RewardModule, "training_step", train)
    assert cross_validation.run_fold(config, fold, 1, 5, here / "cv") == run
    other = {**config, "model": {**config["model"], "learning_rate": 0.02}}
    for settings, data in ((other, fold), (config, fold._replace(train=fold.train[1:]))):
        with pytest.raises(RuntimeError, match="trained again"):
            cross_validation.run_fold(settings, data, 1, 5, here / "cv")
    named = Path(config["model"]["base"])
    file = named if named.is_file() else next(named.glob("*.safetensors"))
    os.utime(file, ns=(1, 1))  # the base was trained anew
    with pytest.raises(RuntimeError, match="trained again"):
        cross_validation.run_fold(config, fold, 1, 5, here / "cv")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([*COMMAND, *MODEL, *CPU, "--folds", "1"], ["--folds: got 1; need at least 2"]),
        ([*COMMAND, *MODEL, *CPU, "--seeds", "0"], ["--seeds: got 0"]),
        ([*COMMAND, *MODEL, *CPU, "--own_share", "0.7"], ["--own_share: got 0.7"]),
        ([*COMMAND, *MODEL, *CPU, "--folds", "5"], ["got 4 labelers; need at least 5", "Do: lower --folds"]),
        ([*COMMAND, *MODEL[2:], *CPU], ["--model.base is missing"]),
        ([*COMMAND, *MODEL[:2], *CPU], ["--data.comparisons is missing"]),
        ([*COMMAND, *MODEL, *CPU, "--data.comparisons", "d.jsonl"], ["d.jsonl: no such file"]),
        ([*COMMAND, *MODEL, *CPU, "--model.lerning_rate", "1"], ["model.lerning_rate"]),
        ([*COMMAND, *MODEL, *CPU, "--fold", "3"], ["--fold"]),
    ],
)
def test_a_mistake_is_told_before_any_training(
    here: Path,
    arguments: list[str],
    expected: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(RewardModule, "training_step", lambda *_: pytest.fail("training has started"))
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    message = capsys.readouterr().err
    assert "error: " in message
    assert all(part in message for part in expected), message
    assert not (here / "runs").exists()


def test_rankings_without_labelers_are_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": f"w{n}", "chosen": "w1", "rejected": "w2"} for n in range(9)]
    write_jsonl(here / "c.jsonl", rows)
    with pytest.raises(SystemExit):
        main([*COMMAND, *MODEL, *CPU])
    message = capsys.readouterr().err
    assert "rm cross-validate: got 9 rankings without a labeler" in message
    assert 'column "labeler"' in message


def test_pairs_are_counted_without_ties() -> None:
    from lit_instruct.evaluation.labeler_folds import _pairs

    for ranks in ([1, 2, 3], [1, 1, 2], [1, 1, 1], [1, 2, 2, 1]):
        assert _pairs(record("w1", "ann", ranks)) == sum(a != b for a, b in combinations(ranks, 2))


def test_the_help_tells_its_own_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["rm", "cross-validate", "--help"])
    printed = capsys.readouterr().out
    assert "--folds" in printed
    assert "lit-instruct rm fit" in printed
