"""The benchmark's own arithmetic: ratios, tables, the data of both sides, the gate between them."""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lit_instruct.types import ComparisonBatch
from scripts.benchmark import limit, table
from scripts.benchmark.cases import CASES, EOS, MODELS, PAD, ROLLOUTS, Case, chosen, llama
from scripts.benchmark.plain import generated_lengths, padded, pairs_backward
from scripts.benchmark.race import ROOT, Result, Spread, Turn, compare, environment, race, spread
from scripts.benchmark.run import all_names, same_work
from scripts.benchmark.world import NEVER, data_module, language_model, pair_rows, write_case
from tests.helpers.numbers import assert_close


def turn(units: float, cpu: float, wall: float = 1.0, mib: float = 100.0) -> Turn:
    return Turn(units, cpu, wall, mib, {})


# -- ratios


def test_the_median_is_that_of_the_ratios_and_not_the_ratio_of_the_medians():
    ours = [turn(10, 1.0), turn(10, 4.0), turn(10, 5.0)]  # 10, 2.5, 2 a second
    theirs = [turn(10, 5.0), turn(10, 8.0), turn(10, 20.0)]  # 2, 1.25, 0.5
    result = compare(ours, theirs, "cpu")
    assert_close(result.ratio, [4.0, 2.0, 5.0])  # of 5, 2 and 4; the medians' ratio is 2
    assert_close(result.ours, [2.5, 2.0, 10.0])
    assert_close(result.theirs, [1.25, 0.5, 2.0])


def test_the_clock_is_another_measure():
    result = compare([turn(6, cpu=3.0, wall=1.0)], [turn(6, cpu=3.0, wall=2.0)], "wall")
    assert_close(result.ratio.median, 2.0)


def test_the_peak_is_the_last_one():
    result = compare([turn(1, 1, mib=5), turn(1, 1, mib=9)], [turn(1, 1, mib=7), turn(1, 1, mib=8)], "cpu")
    assert (result.ours_mib, result.theirs_mib) == (9, 8)


def test_turns_without_a_partner_are_an_error():
    with pytest.raises(ValueError, match="shorter"):
        compare([turn(1, 1)], [], "cpu")
    with pytest.raises(ValueError, match="no values"):
        spread([])


class Scripted:
    """A worker whose steps take 2 CPU seconds each."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def go(self, steps: int) -> dict[str, Any]:
        self.asked.append(steps)
        return {"cpu_seconds": 2.0 * steps, "wall_seconds": 1.0, "peak_mib": 1.0, "facts": {}}


def test_a_race_counts_the_units_of_the_steps_that_were_taken():
    workers = Scripted(), Scripted()
    result = race(*workers, [100.0, 1.0, 2.0, 3.0, 4.0, 50.0], warmup=1, steps=2, measure="cpu")
    assert [worker.asked for worker in workers] == [[1, 2, 2]] * 2
    assert_close(result.ours, [statistics.median([3 / 4, 7 / 4]), 3 / 4, 7 / 4])


# -- what both sides report of their work


def result_of(ours: dict[str, Any], theirs: dict[str, Any]) -> Result:
    one = Spread(1.0, 1.0, 1.0)
    return Result(one, one, one, 1.0, 1.0, ours, theirs)


def test_losses_are_compared_over_the_steps_that_the_peer_averages():
    ours = {"losses": {str(step): float(step) for step in range(1, 31)}}
    assert same_work(result_of(ours, {"losses": {"1": 1.0, "10": 6.0}})).startswith("loss 6.0000 and 6.0000")
    assert same_work(result_of(ours, {"losses": {"1": 1.0, "10": 6.04}})).startswith("NOT THE SAME")
    assert same_work(result_of(ours, {"losses": {"1": 1.0}})).endswith("steps 1 to 1")


def test_losses_that_are_means_already_are_weighted_by_their_steps():
    ours = {"losses": {"10": 9.0, "12": 4.0, "20": 8.0}}  # of steps 1 to 10, 11 and 12, 13 to 20
    assert same_work(result_of(ours, {"losses": {"1": 3.0, "10": 9.0, "20": 7.2}})).endswith("steps 11 to 20")
    both_means = {"losses": {"1": 18.0, "10": 8.0}}  # (18 + 9 x 8) / 10 = 9
    assert same_work(result_of(ours, both_means)) == "loss 9.0000 and 9.0000 over steps 1 to 10"
    assert same_work(result_of(ours, {"losses": {"15": 9.0}})) == "not compared"


def test_mean_lengths_are_compared():
    assert same_work(result_of({"mean_response": 24.0}, {"mean_response": 22.0})).startswith("mean")
    assert same_work(result_of({"mean_response": 24.0}, {"mean_response": 20.0})).startswith("NOT THE SAME")


# -- names and tables


def test_every_case_has_a_name_of_its_own_and_a_model():
    assert len(set(all_names())) == len(all_names())
    assert {case.size for case in CASES} <= MODELS.keys()


def test_cases_are_chosen_by_how_their_names_begin():
    names = ["sft:tiny", "sft:m30", "rm:tiny:k4", "rm:tiny:k9"]
    assert chosen(names, []) == names
    assert chosen(names, ["rm", "sft:m30"]) == ["sft:m30", "rm:tiny:k4", "rm:tiny:k9"]
    assert chosen(names, ["rm:tiny:k4"]) == ["rm:tiny:k4"]
    with pytest.raises(ValueError, match="sft:t"):
        chosen(names, ["sft:t"])


RESULTS: dict[str, Any] = {
    "machine": {
        "processor": "A processor",
        "cores": 2,
        "threads": 1,
        "measure": "cpu",
        "date": "2026-01-02",
        "ours": {"torch": "1.0"},
        "peers": {"trl": {"trl": "2.0"}},
    },
    "comparisons": [
        {
            "case": "sft:tiny",
            "unit": "tokens",
            "goal": [3, 4.5],
            "ratio": [3.456, 3.1, 4.0],
            "ours": [12345.6, 1, 2],
            "theirs": [3.14159, 1, 2],
            "ours_mib": 1234.4,
            "theirs_mib": 99.6,
        }
    ],
    "figures": [{"what": "a step", "value": 0.00123, "unit": "ms"}],
}


def test_the_markdown_has_every_number():
    text = table.as_markdown(RESULTS)
    row = "| sft:tiny | 12,346 tokens/s | 3.14 tokens/s | 3.46x (3.10 to 4.00) | 3 / 4.5 | 1,234 / 100 |"
    assert row in text.splitlines()
    assert "| a step | 0.0012 ms |" in text.splitlines()
    assert "A processor, 2 cores; 1 thread(s), CPU seconds of the process; 2026-01-02. Ours: torch 1.0." in text
    assert "Peers: trl 2.0." in text
    assert "limit" not in text  # nothing was measured of it


def test_the_printed_columns_are_straight():
    first = table.as_text(RESULTS).split("\n\n")[0].splitlines()
    assert first[1].index("ratio") == first[2].index("3.46x")


def test_a_document_keeps_what_is_around_the_markers():
    page = f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n"
    once = table.between_markers(page, "new")
    assert once == f"before\n{table.BEGIN}\n\nnew\n\n{table.END}\nafter\n"
    assert table.between_markers(once, "new") == once
    for broken in ("no markers", f"{table.END}{table.BEGIN}", page + page):
        with pytest.raises(ValueError, match="each once"):
            table.between_markers(broken, "new")


def test_the_page_of_the_documentation_has_the_markers():
    table.between_markers((ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8"), "new")


def test_later_results_replace_earlier_ones_in_place():
    old, new = [{"case": "a", "x": 1}, {"case": "b", "x": 2}], [{"case": "c", "x": 3}, {"case": "a", "x": 4}]
    assert [(row["case"], row["x"]) for row in table.merged(old, new, "case")] == [("a", 4), ("b", 2), ("c", 3)]


# -- data and models


def test_all_pairs_of_a_ranking_are_rows_without_padding():
    batch = ComparisonBatch(
        prompt_ids_BP=torch.tensor([[PAD, 5], [6, 7]]),
        prompt_mask_BP=torch.tensor([[False, True], [True, True]]),
        response_ids_NR=torch.tensor([[11, EOS, PAD], [12, 13, EOS], [14, EOS, PAD], [15, EOS, PAD], [16, EOS, PAD]]),
        response_mask_NR=torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 0], [1, 1, 0], [1, 1, 0]]).bool(),
        ranks_N=torch.tensor([2, 1, 3, 2, 1]),
        group_N=torch.tensor([0, 0, 0, 1, 1]),
    )
    first, second, third = [5, 11, EOS], [5, 12, 13, EOS], [5, 14, EOS]
    found = [(pair["chosen_ids"], pair["rejected_ids"]) for pair in pair_rows(batch)]
    assert found == [(second, first), (first, third), (second, third), ([6, 7, 16, EOS], [6, 7, 15, EOS])]


def test_both_sides_get_the_same_tokens(tmp_path):
    case = Case("t", "sft", "tokens", "micro", 4, 1, 1, {}, {}, "own", dict(CASES[0].data))
    units = write_case(case, tmp_path, pairs=2)
    peer = json.loads((tmp_path / "peer.json").read_text(encoding="utf-8"))
    data = data_module("sft", tmp_path, 4)
    data.setup()
    for step, batch, count in itertools.zip_longest(peer, data.train_dataloader(), units):
        for row, ids, mask, loss_mask in zip(step, *batch[:3], strict=True):
            length = int(mask.sum())
            assert row["input_ids"] == ids[:length].tolist()
            assert row["completion_mask"] == loss_mask[:length].int().tolist()
            assert row["input_ids"][-1] == EOS
        assert_close(count, int(batch.attention_mask_BT.sum()))
    prompts = [json.loads(line)["prompt"].split() for line in (tmp_path / "rows.jsonl").open(encoding="utf-8")]
    assert sum(map(len, prompts)) == sum(row["completion_mask"].count(0) for step in peer for row in step)


@pytest.mark.parametrize("config", [llama("tiny"), *(case.config for case in ROLLOUTS if ":gpt2" in case.name)])
@pytest.mark.parametrize("wanted", [1 / 24, NEVER])
def test_the_end_of_text_has_the_probability_that_was_asked_for(config, wanted):
    model = language_model(config, end_probability=wanted).eval()
    torch.manual_seed(0)  # other texts than those that the weights were set on
    with torch.no_grad():
        everything = model(torch.randint(2, config["vocab_size"], (16, 40))).logits.softmax(dim=-1)
    probabilities = everything[..., EOS]
    assert everything[..., PAD].max() < 1e-8
    if wanted == NEVER:
        assert probabilities.max() < 1e-8
    else:
        assert_close(probabilities.mean() / wanted, 1.0, scale=1000)  # 2 % in all: these are other texts
        assert probabilities.std() < 0.2 * wanted


@pytest.mark.parametrize("size", MODELS)
def test_the_limit_counts_every_linear_layer(size):
    with torch.device("meta"):
        model = language_model(llama(size))
    layers = [m for m in model.model.modules() if isinstance(m, torch.nn.Linear)]
    expected = sorted((layer.in_features, layer.out_features) for layer in layers)
    counted = [(inputs, outputs) for inputs, outputs, count in limit.linear_layers(size) for _ in range(count)]
    assert sorted(counted) == expected
    assert limit.unembedding(size) == (model.lm_head.in_features, model.lm_head.out_features)


def test_the_ideal_time_is_that_of_the_products(monkeypatch):
    monkeypatch.setattr(limit, "product_seconds", lambda inputs, outputs: inputs * outputs * 1e-9)
    seconds, _ = limit.ideal_seconds("tiny", tokens=4 * limit.ROWS, predicted=limit.ROWS)
    weights = 4 * (4 * 192 * 192 + 3 * 192 * 512)
    assert_close(1e3 * seconds, 1e3 * (4 * weights + 192 * 4096) * 1e-9)


# -- the plain ways


def test_generated_lengths_count_up_to_the_end_of_text():
    made = torch.tensor([[5, EOS, PAD, PAD], [5, 6, 7, 8], [5, 6, 7, EOS], [EOS, PAD, PAD, PAD]])
    model = SimpleNamespace(generate=lambda input_ids, **_: torch.cat([input_ids, made[: len(input_ids)]], dim=1))
    assert generated_lengths(model, torch.ones(4, 3, dtype=torch.long), rows=4, max_tokens=4).tolist() == [2, 4, 4, 1]


def test_micro_batches_of_pairs_add_up_to_the_mean():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(20))

    def classifier(input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=(weight[input_ids] * attention_mask).sum(dim=1, keepdim=True))

    pairs = [{"chosen_ids": [2, 3], "rejected_ids": [4]}, {"chosen_ids": [5], "rejected_ids": [6, 7, 8]}]
    pairs.append({"chosen_ids": [9, 10], "rejected_ids": [11, 12]})
    loss = pairs_backward(classifier, pairs, rows=2, bf16=False)
    margins = [weight[pair["chosen_ids"]].sum() - weight[pair["rejected_ids"]].sum() for pair in pairs]
    expected = torch.stack([torch.log1p(torch.exp(-margin)) for margin in margins]).mean()
    assert_close(loss, expected)
    assert_close(weight.grad, torch.autograd.grad(expected, weight)[0])


def test_rows_are_padded_on_the_right():
    ids, mask = padded([[3, 4, 5], [6]])
    assert ids.tolist() == [[3, 4, 5], [6, PAD, PAD]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


# -- the gate


def test_a_worker_stops_at_each_boundary_and_keeps_libraries_off_its_channel():
    source = (
        "from scripts.benchmark.gate import Gate\n"
        "gate = Gate()\nprint('a library says hello')\ngate.begin()\n"
        "for step in range(1, 100):\n    gate.facts['step'] = step\n    gate.step()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", source],
        cwd=ROOT,
        env=environment(1),
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    said, errors = process.communicate("go 3\ngo 2\nstop\n", timeout=60)
    lines = [json.loads(line) for line in said.splitlines()]
    assert lines[0]["ready"]
    assert [(line["steps"], line["facts"]["step"]) for line in lines[1:]] == [(3, 3), (2, 5)]
    assert all(line["cpu_seconds"] >= 0 for line in lines[1:])
    # The peak is the worker's own, and not that of the much larger process that started it.
    assert all(1 < line["peak_mib"] < 50 for line in lines[1:])
    assert process.returncode == 0
    assert "a library says hello" in errors
