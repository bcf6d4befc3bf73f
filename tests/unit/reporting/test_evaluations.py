"""The output of ``lit-instruct evaluate`` is read as it is documented, each part optional."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from lit_instruct.reporting.build import build
from lit_instruct.reporting.charts import Bar, BarChart, Chart, Line, LineChart
from lit_instruct.reporting.evaluation_charts import evaluation_charts, protocol_charts
from lit_instruct.reporting.evaluations import (
    BestOfN,
    Estimate,
    Evaluation,
    is_evaluation,
    read_evaluation,
    read_samples,
)
from lit_instruct.reporting.runs import find
from lit_instruct.types import DataError
from tests.unit.reporting.places import ppo_curves, write_evaluation, write_events

SFT = {
    "source": "runs/sft/last.ckpt",
    "sha256": "0" * 64,
    "win_rate": {"rate": 0.5, "low": 0.5, "high": 0.5, "n": 100},
    "score": {"mean": 0.1, "low": 0.0, "high": 0.2},
    "kl": 0.0,
    "best_of_n": [
        {"n": 4, "kl": 0.64, "score": 0.3, "low": 0.2, "high": 0.4},
        {"n": 1, "kl": 0.0, "score": 0.1, "low": 0.0, "high": 0.2},
    ],
    "protocols": {
        "bias": {"entropy": {"all": {"mean": 0.75, "low": 0.5, "high": 1.0}}},
        "toxicity": {"toxic": {"plain": {"mean": 0.25}, "respectful": {"mean": 0.125}}, "kind": "pairs"},
    },
    "finished": 1,
}
PPO = {
    "win_rate": {"rate": 0.7, "low": 0.6, "high": 0.8, "n": 100},
    "win_rate_matched_length": {"rate": 0.65, "low": 0.5, "high": 0.75, "n": 50},
    "score": {"mean": 0.4},
    "kl": 9.0,
    "mean_length": 40.5,
    "best_of_n": [{"n": 2, "kl": 0.2, "score": 0.9}],
    "pretraining_loss": 1.25,
}


def evaluation(folder: Path, **models: Any) -> Evaluation:
    return read_evaluation(write_evaluation(folder, models), "judged")


def charts(read: Evaluation) -> dict[str, Chart]:
    places = {name: place for place, name in enumerate(read.models)}
    return {chart.slug: chart for chart in evaluation_charts(read, places, "e")}


def test_every_part_is_read(tmp_path: Path) -> None:
    more = {
        "prompts": "held_out.jsonl",
        "scorer": "reward model",  # gives the scores, where a judge decides who wins
        "judge": "gold",
        "settings": {"seed": 1, "reward": {"url": None}},
    }
    read = read_evaluation(write_evaluation(tmp_path, {"sft": SFT, "ppo": PPO}, **more), "judged")
    assert (read.name, read.baseline, list(read.models)) == ("judged", "sft", ["sft", "ppo"])
    sft, ppo = read.models.values()
    assert sft.source == "runs/sft/last.ckpt"
    assert sft.win_rate == Estimate(0.5, 0.5, 0.5)
    assert sft.best_of_n == [BestOfN(1, 0.0, 0.1), BestOfN(4, 0.64, 0.3)]
    assert sft.protocols == {
        "bias entropy": Estimate(0.75, 0.5, 1.0),
        "toxicity toxic plain": Estimate(0.25),
        "toxicity toxic respectful": Estimate(0.125),
    }
    assert (sft.finished, ppo.finished) == (1.0, None)
    assert ppo.win_rate_matched_length == Estimate(0.65, 0.5, 0.75)
    assert ppo.score == Estimate(0.4)
    assert (ppo.kl, ppo.mean_length, ppo.pretraining_loss) == (9.0, 40.5, 1.25)
    assert read.settings == {
        "prompts": "held_out.jsonl",
        "scorer": "reward model",
        "judge": "gold",
        "seed": "1",
        "reward.url": "null",
    }


def test_charts_have_its_numbers(tmp_path: Path) -> None:
    drawn = charts(evaluation(tmp_path, sft=SFT, ppo=PPO))
    win, matched = drawn["e-win-rate"], drawn["e-win-rate-matched-length"]
    assert isinstance(win, BarChart)
    assert win.bars == [Bar(1, "ppo", 0.7, 0.6, 0.8)]  # the baseline against itself says nothing
    assert (win.reference, win.percent, win.x_label) == (0.5, True, "preferred to sft")
    assert matched.bars == [Bar(1, "ppo", 0.65, 0.5, 0.75)]  # type: ignore[union-attr]
    plain, rooted = drawn["e-frontier"], drawn["e-frontier-root"]
    assert isinstance(plain, LineChart)
    assert isinstance(rooted, LineChart)
    assert plain.lines == [
        Line(0, "sft", [0.0, 0.64], [0.1, 0.3]),
        Line(0, "sft", [0.0], [0.1], marked=True),
        Line(1, "ppo", [9.0], [0.4], marked=True),
    ]
    assert [line.x for line in rooted.lines] == [[0.0, 0.8], [0.0], [3.0]]
    assert drawn["e-score"].bars == [Bar(0, "sft", 0.1, 0.0, 0.2), Bar(1, "ppo", 0.4)]  # type: ignore[union-attr]
    assert drawn["e-pretraining-loss"].bars == [Bar(1, "ppo", 1.25)]  # type: ignore[union-attr]
    assert drawn["e-length"].bars == [Bar(1, "ppo", 40.5)]  # type: ignore[union-attr]


def test_a_frontier_needs_something_that_has_moved(tmp_path: Path) -> None:
    """A model of another vocabulary has no KL, and that of the reference to itself is 0."""
    own = {"score": {"mean": 0.5}, "kl": 0.0}
    foreign = {"score": {"mean": 0.25}}
    assert "e-frontier" not in charts(evaluation(tmp_path, sft=own, foreign=foreign))
    assert "e-frontier" in charts(evaluation(tmp_path, sft=own, ppo=own))
    assert "e-frontier" in charts(evaluation(tmp_path, sft=own | {"best_of_n": [{"n": 2, "kl": 0.2, "score": 0.9}]}))


def test_models_of_several_tokenizers_are_compared_by_bytes(tmp_path: Path) -> None:
    few = {"pretraining_loss": 4.0, "pretraining_bits_per_byte": 1.25}
    many = {"pretraining_loss": 2.0, "pretraining_bits_per_byte": 1.5}
    loss = charts(evaluation(tmp_path, few=few, many=many, neither={}))["e-pretraining-loss"]
    assert isinstance(loss, BarChart)
    assert loss.bars == [Bar(0, "few", 1.25), Bar(1, "many", 1.5)]
    assert loss.x_label == "bits a byte"
    some = charts(evaluation(tmp_path, few=few, old={"pretraining_loss": 2.0}))["e-pretraining-loss"]
    assert isinstance(some, BarChart)
    assert (some.x_label, [bar.value for bar in some.bars]) == ("nats a token", [4.0, 2.0])


def test_each_measure_of_a_protocol_has_a_chart(tmp_path: Path) -> None:
    ppo = {"protocols": {"bias": {"entropy": {"all": {"mean": 0.5}}}}}
    bias, *toxicity = protocol_charts(evaluation(tmp_path, sft=SFT, ppo=ppo), {"sft": 0, "ppo": 1}, "e")
    assert isinstance(bias, BarChart)
    assert (bias.title, bias.bars) == ("bias entropy", [Bar(0, "sft", 0.75, 0.5, 1.0), Bar(1, "ppo", 0.5)])
    assert [chart.title for chart in toxicity] == ["toxicity toxic plain", "toxicity toxic respectful"]


def test_best_of_n_is_drawn_where_kl_begins(tmp_path: Path) -> None:
    read = read_evaluation(write_evaluation(tmp_path, {"sft": SFT, "ppo": PPO}, reference="ppo"), "judged")
    plain = charts(read)["e-frontier"]
    assert isinstance(plain, LineChart)
    assert [line for line in plain.lines if not line.marked] == [Line(1, "ppo", [0.2], [0.9])]
    assert plain.caption.endswith("The curve is the best of n responses of ppo.")


def test_what_was_not_measured_is_not_drawn(tmp_path: Path) -> None:
    assert charts(evaluation(tmp_path / "a", sft={}, ppo={"win_rate": None, "score": {"mean": math.nan}})) == {}
    assert list(charts(evaluation(tmp_path / "b", ppo={"kl": 1.0}))) == []
    point = charts(evaluation(tmp_path / "c", ppo={"kl": 1.0, "score": {"mean": 1.0}}))["e-frontier"]
    assert point.caption == "Higher at the same distance is better."


def test_models_that_are_runs_have_the_colour_of_the_run(tmp_path: Path) -> None:
    write_events(tmp_path / "other" / "logs", ppo_curves())
    write_events(tmp_path / "ppo" / "logs", ppo_curves())
    rows = [{"model": name, "prompt": "p", "response": "r"} for name in ("ppo", "sft")]
    write_evaluation(tmp_path / "judged", {"sft": SFT, "ppo": PPO}, rows)
    _, section = build(find([tmp_path]), prompts=5).sections
    assert [(cell.text, cell.run) for cell in section.table.head] == [("sft", 2), ("ppo", 1)]
    assert [(sample.author, sample.run) for sample in section.samples[0].rows[0]] == [("sft", 2), ("ppo", 1)]
    assert dict(section.table.rows)["Preferred to sft"][1] == "70.0\u00a0% [60.0\u00a0%, 80.0\u00a0%]"


def test_samples_of_the_first_prompts_side_by_side(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}]
    rows = [
        {"model": "ppo", "prompt": "p", "response": "b1", "owner": "o", "score": 2},
        {"model": "ppo", "prompt": chat, "response": "b2", "score": None},
        {"model": "ppo", "prompt": "beyond", "response": "b3"},
        {"model": "sft", "prompt": chat, "response": "a2"},
        {"model": "sft", "prompt": "p", "response": "a1", "score": 0.5},
        {"model": "sft", "prompt": "p", "response": "second of n", "score": 0.5},
    ]
    read = read_evaluation(write_evaluation(tmp_path, {"sft": {}, "ppo": {}}, rows), "judged")
    shown = read_samples(read, {"sft": 5, "ppo": 3}, most=2)
    assert [sampled.prompt for sampled in shown] == ["p", "user: hi"]
    assert [[(s.author, s.run, s.response, s.score) for s in row] for row in shown[0].rows] == [
        [("sft", 5, "a1", 0.5), ("ppo", 3, "b1", 2.0)]
    ]
    assert [s.response for s in shown[1].rows[0]] == ["a2", "b2"]


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ([], r"results\.json, models: got \[\]; need an object"),
        ({"a": 1}, r"models\.a: got 1; need an object"),
        ({"a": {"kl": "1"}}, r"models\.a\.kl: got '1'; need a number"),
        ({"a": {"kl": True}}, r"models\.a\.kl: got True; need a number"),
        ({"a": {"win_rate": 0.5}}, r"models\.a\.win_rate: got 0\.5; need an object"),
        ({"a": {"win_rate": {"rate": 0.5, "low": "x"}}}, r"models\.a\.win_rate\.low: got 'x'; need a number"),
        ({"a": {"protocols": 1}}, r"models\.a\.protocols: got 1; need an object"),
        ({"a": {"protocols": {"b": {"mean": "x"}}}}, r"models\.a\.protocols\.b\.mean: got 'x'; need a number"),
        ({"a": {"best_of_n": {"n": 1}}}, r"models\.a\.best_of_n: got .*; need a list"),
        ({"a": {"best_of_n": [{"n": 1, "kl": 0}]}}, r"models\.a\.best_of_n\[0\]\.score: got None; need a number"),
    ],
)
def test_damaged_results_are_named(models: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read_evaluation(write_evaluation(tmp_path, models), "judged")


def test_other_versions_and_broken_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"format_version: got 2; need 1\. Do: "):
        read_evaluation(write_evaluation(tmp_path, {}, format_version=2), "judged")
    (tmp_path / "results.json").write_text('{"format_version": 1, "mod', encoding="utf-8")
    with pytest.raises(DataError, match=r"results\.json: is no JSON"):
        is_evaluation(tmp_path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"model": "a"', r"samples\.jsonl, line 2: is no JSON"),
        ('{"model": "a", "prompt": "p"}', r"line 2, response: is missing"),
        ("[]", r"line 2, model: is missing"),
        (
            '{"model": "b", "prompt": "p", "response": "r"}',
            r"line 2, model: got 'b', which results\.json has no results of",
        ),
        ('{"model": "a", "prompt": "p", "response": "r", "score": "x"}', r"line 2, score: got 'x'; need a number"),
    ],
)
def test_damaged_samples_are_named(row: str, message: str, tmp_path: Path) -> None:
    folder = write_evaluation(tmp_path, {"a": {}})
    good = '{"model": "a", "prompt": "q", "response": "r"}'
    (folder / "samples.jsonl").write_text(f"{good}\n{row}\n", encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_samples(read_evaluation(folder, "judged"), {"a": 0}, most=5)
