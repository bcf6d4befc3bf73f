"""Threads and matrix products: what is decided, from made-up machines; and that it is done, on this one."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lit_instruct.modules import machine
from lit_instruct.modules.machine import (
    EXACT_ERROR,
    Machine,
    Threads,
    decide_threads,
    describe,
    granted_cores,
    local_processes,
    matmul_error,
    physical_cores,
    usable_cores,
)
from lit_instruct.types import ConfigError
from tests.helpers.numbers import assert_close


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    monkeypatch.setattr(machine, "_GIVEN", {})
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # whatever a test sets is taken back
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


# -- threads


@pytest.mark.parametrize(
    ("asked", "cores", "processes", "given", "environment", "decision"),
    [
        (None, 8, 1, {}, {}, Threads(8, 8, "")),
        (None, 8, 2, {}, {}, Threads(4, 8, "2 processes")),
        (None, 8, 3, {}, {}, Threads(2, 8, "3 processes")),
        (None, 2, 4, {}, {}, Threads(1, 2, "4 processes")),
        (3, 8, 2, {"OMP_NUM_THREADS": "5"}, {}, Threads(3, 8, "machine.threads")),
        (None, 8, 2, {"OMP_NUM_THREADS": "5"}, {}, Threads(5, 8, "OMP_NUM_THREADS")),
        (None, 8, 1, {"OMP_NUM_THREADS": "1"}, {}, Threads(1, 8, "OMP_NUM_THREADS")),
        (None, 8, 1, {"OMP_NUM_THREADS": "6,2"}, {}, Threads(6, 8, "OMP_NUM_THREADS")),  # the outer level counts
        (None, 8, 1, {"MKL_NUM_THREADS": "6"}, {}, Threads(6, 8, "MKL_NUM_THREADS")),
        (None, 8, 1, {"MKL_NUM_THREADS": "6", "OMP_NUM_THREADS": "5"}, {}, Threads(5, 8, "OMP_NUM_THREADS")),
        (None, 8, 1, {"OMP_NUM_THREADS": "all"}, {}, Threads(8, 8, "")),
        (None, 8, 1, {"OMP_NUM_THREADS": "0"}, {}, Threads(8, 8, "")),
        # torchrun's own 1 is nobody's wish; another number is, and so is a 1 for a single process
        (None, 8, 2, {"OMP_NUM_THREADS": "1"}, {"TORCHELASTIC_RUN_ID": "x"}, Threads(4, 8, "2 processes")),
        (None, 8, 2, {"OMP_NUM_THREADS": "3"}, {"TORCHELASTIC_RUN_ID": "x"}, Threads(3, 8, "OMP_NUM_THREADS")),
        (None, 8, 1, {"OMP_NUM_THREADS": "1"}, {"TORCHELASTIC_RUN_ID": "x"}, Threads(1, 8, "OMP_NUM_THREADS")),
    ],
)
def test_the_decision(asked, cores, processes, given, environment, decision):
    assert decide_threads(asked, cores, processes, given, environment) == decision


@pytest.mark.parametrize(
    ("devices", "accelerator", "environment", "gpus", "processes"),
    [
        ("auto", "auto", {}, 0, 1),
        ("auto", "auto", {}, 4, 4),
        ("auto", "cpu", {}, 4, 1),
        (-1, "gpu", {}, 4, 4),
        ("-1", "cuda", {}, 4, 4),
        (2, "cpu", {}, 0, 2),
        ("2", "auto", {}, 4, 2),
        ([0, 3], "gpu", {}, 4, 2),
        ("0,3", "gpu", {}, 4, 2),
        ("3,", "gpu", {}, 4, 1),
        ("auto", "cpu", {"LOCAL_WORLD_SIZE": "3"}, 0, 3),
    ],
)
def test_processes_of_a_trainer(devices, accelerator, environment, gpus, processes):
    assert local_processes(devices, accelerator, environment, gpus) == processes


# -- cores


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="ascii")


def test_hardware_threads_of_a_core_count_once(tmp_path):
    pairs = {0: "0,4", 1: "1,5", 2: "2,6", 3: "3,7"}
    write(tmp_path, {f"cpu{cpu}/topology/thread_siblings_list": pairs[cpu % 4] for cpu in range(8)})
    assert physical_cores(range(8), tmp_path) == 4
    assert physical_cores([0, 1, 4], tmp_path) == 2
    assert physical_cores([0, 8, 9], tmp_path) == 3  # the system says nothing of 8 and 9


V1 = {"cpu.cfs_quota_us": "150000", "cpu.cfs_period_us": "100000"}


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        ("0::/", {"cpu.max": "250000 100000"}, 2.5),
        ("0::/", {"cpu.max": "max 100000"}, math.inf),
        ("0::/", {}, math.inf),
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "300000 100000", "cpu.max": "400000 100000"}, 3.0),
        ("0::/not/here", {"cpu.max": "200000 100000"}, 2.0),  # a name from outside the container
        ("0::/../../x", {"cpu.max": "200000 100000"}, 2.0),
        ("5:devices:/\n3:cpu,cpuacct:/a", {f"cpu,cpuacct/a/{name}": text for name, text in V1.items()}, 1.5),
        ("3:cpu:/\n0::/", {f"cpu/{name}": text for name, text in V1.items()}, 1.5),
        ("3:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, math.inf),
        ("3:cpuset:/", {f"cpu/{name}": text for name, text in V1.items()}, math.inf),  # another hierarchy's
    ],
)
def test_what_control_groups_grant(tmp_path, groups, files, cores):
    write(tmp_path, {"cgroup": groups} | {f"fs/{name}": text for name, text in files.items()})
    assert granted_cores(tmp_path / "cgroup", tmp_path / "fs") == cores


def test_no_control_groups(tmp_path):
    assert granted_cores(tmp_path / "none", tmp_path) == math.inf


@pytest.mark.parametrize(
    ("cores", "granted", "usable"), [(4, math.inf, 4), (4, 2.9, 2), (4, 0.5, 1), (1, 8.0, 1), (4, 4.0, 4)]
)
def test_usable_cores(monkeypatch, cores, granted, usable):
    monkeypatch.setattr(machine, "physical_cores", lambda _: cores)
    monkeypatch.setattr(machine, "granted_cores", lambda: granted)
    assert usable_cores() == usable


def test_usable_cores_of_this_machine():
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)


# -- done


def test_it_is_set():
    decided = Machine(threads=1, float32_matmul="high").apply(1)
    assert (decided.number, torch.get_num_threads(), torch.get_float32_matmul_precision()) == (1, 1, "high")
    more = usable_cores() + 1  # what nobody would take by himself
    decided = Machine(threads=more).apply(1)
    assert (decided.number, torch.get_num_threads(), torch.get_float32_matmul_precision()) == (more, more, "highest")
    assert os.environ["OMP_NUM_THREADS"] == str(more)
    assert Machine().apply(1).number == torch.get_num_threads() == usable_cores()  # what it set itself is nobody's wish


def test_what_was_given_before_holds(monkeypatch):
    monkeypatch.setattr(machine, "_GIVEN", {"OMP_NUM_THREADS": "3"})
    assert Machine().apply(2) == Threads(3, usable_cores(), "OMP_NUM_THREADS")
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("threads", [0, -1])
def test_no_threads(threads):
    with pytest.raises(ConfigError, match=rf"machine.threads: got {threads}; need 1 or more\. Do: "):
        Machine(threads=threads)


# -- matrix products


def test_the_error_of_fp32_products():
    """A sum of n rounded products is off by some roundings of 2^-24 each, fewer than n."""
    torch.set_float32_matmul_precision("highest")
    assert 2**-26 < matmul_error() < EXACT_ERROR


def test_the_error_of_products_in_bfloat16(monkeypatch):
    """Factors rounded as a processor with bf16 units does: the roundings of both add up in squares."""
    real = torch.Tensor.__matmul__

    def rounded(left, right):
        exact = left.dtype == torch.float64
        return real(left, right) if exact else real(left.bfloat16().float(), right.bfloat16().float())

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    numbers = torch.randn(100_000, generator=torch.Generator().manual_seed(1))
    of_a_factor = float((numbers.bfloat16().float() - numbers).norm() / numbers.norm())
    assert_close(matmul_error() / (math.sqrt(2) * of_a_factor), 1.0, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("threads", "error", "line"),
    [
        (Threads(2, 2, ""), 2.1e-7, "threads 2 of 2 cores; fp32 matrix products: medium (error 2e-07 on cpu)"),
        (
            Threads(1, 1, "machine.threads"),
            9e-6,
            "threads 1 of 1 core (machine.threads); fp32 matrix products: medium (error 9e-06 on cpu)",
        ),
    ],
)
def test_the_line(threads, error, line):
    assert describe(threads, "medium", error, "cpu") == (line, "")


def test_the_warning():
    line, warning = describe(Threads(2, 2, ""), "medium", 2.3e-3, "cpu")
    assert "medium (error 2e-03 on cpu)" in line
    assert re.match(r"machine.float32_matmul: 'medium' makes .* less exact .* error 2e-03, .* Do: set it to", warning)
