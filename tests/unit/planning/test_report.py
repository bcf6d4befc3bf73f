"""What tables and sentences say, against the numbers that they are made of."""

from __future__ import annotations

import pytest

from lit_instruct.planning.architecture import architecture
from lit_instruct.planning.cost import costs
from lit_instruct.planning.hardware import GIB, parse_hardware
from lit_instruct.planning.memory import peak
from lit_instruct.planning.report import duration, parameters, plan_text, size, table, tokens_a_second, verdict
from lit_instruct.planning.settings import Settings
from lit_instruct.planning.setup import Lengths, Text, Work
from tests.helpers.numbers import assert_close
from tests.unit.planning.runs import LLAMA

SHAPE = architecture(LLAMA)
WORK = Work(8, 8, 8, None, 8, 1, Lengths(20.0, 30.0, 20, 30))
H100 = parse_hardware("H100-80GB")


@pytest.mark.parametrize(
    ("found", "need"),
    [
        (size(0), "-"),
        (size(1.5 * GIB), "1.50 GiB"),
        (size(3 * 2**20), "3.0 MiB"),
        (duration(0.0123), "12 ms"),
        (duration(90), "90.0 s"),
        (duration(3 * 3600), "3.0 h"),
        (duration(49 * 3600), "2.0 d"),
        (parameters(1_320_000_000), "1.32B"),
        (parameters(999), "999"),
    ],
)
def test_units_leave_few_digits(found, need):
    assert found == need


def test_words_stand_left_and_numbers_right():
    lines = table(["run", "in", "GiB"], [["a", "update", "1"], ["bcde", "x", "100"]]).splitlines()
    need = ["| run  | in     | GiB |", "| ---- | ------ | --: |", "| a    | update |   1 |", "| bcde | x      | 100 |"]
    assert lines == need


def test_the_verdict_has_the_peak_and_what_helps():
    settings = Settings("ppo", SHAPE, SHAPE, WORK)
    worst = peak(settings.setup(H100)).total
    assert verdict(settings, H100, "sharded") == [f"Fits: {size(worst)} of 78.00 GiB in the phase update."]
    small = H100._replace(device=H100.device._replace(memory=H100.device.reserved + 0.9 * worst))
    (said,) = verdict(settings, small, "sharded")
    assert said.startswith(f"Does not fit: {size(worst)}")
    assert "Fits with model.micro_batch_size 4" in said


def test_tokens_a_second_are_rows_and_text_over_all_phases():
    work = WORK._replace(text=Text(2.0, 4, 60, False))
    settings = Settings("ppo", SHAPE, SHAPE, work)
    taken = costs(settings.setup(H100), H100)
    seconds = sum(one.seconds for one in taken)
    own, text = (float(word.replace(",", "")) for word in tokens_a_second(settings, taken).split() if word[0].isdigit())
    assert_close([own * seconds, text * seconds], [8 * 50, 2 * 8 * 60], scale=100)  # printed without a fraction


def test_a_run_of_known_length_is_summed_up():
    said = plan_text(Settings("ppo", SHAPE, SHAPE, WORK, run_rows=800), H100, "sharded")
    flops = sum(one.flops for one in costs(Settings("ppo", SHAPE, SHAPE, WORK).setup(H100), H100))
    assert f"{100 * flops / 8.64e19:,.3g} petaflop/s-days" in said
    assert "The run of 800 rows" in said
    assert "optimizer step" in plan_text(Settings("sft", SHAPE, SHAPE, WORK), H100, "sharded")
