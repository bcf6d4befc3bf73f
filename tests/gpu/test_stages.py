"""Every stage on one GPU has the numbers of the CPU, under each strategy; a checkpoint of one goes on in the other."""

from __future__ import annotations

import faulthandler
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port

from lit_instruct.modules.fsdp2 import Fsdp2Strategy
from tests.distributed.stages import CASES, STAGES, STEPS, compare, enter_process, fit, half_way, write_inputs

LIMIT_S = 300
GPU: dict[str, Any] = {"accelerator": "gpu", "devices": 1}
ROUNDED = {"bf16 sampler", "frozen in 8 bits"}  # cases that a GPU rounds otherwise
SCALE = 10.0  # of the tolerance: kernels of two makers add in another order
_SHARED = {
    "sft": ["plain"],
    "rm": ["plain"],
    "ppo": ["plain", "passes, recomputed", "ptx", "shared trunk, value warm-up", "frozen on the CPU"],
}
_EVERY = [(stage, case) for stage in STAGES for case in CASES[stage]]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads as wide as the kernels want them."""
    return write_inputs(tmp_path_factory.mktemp("inputs"), hidden_size=64)


@cache
def on_cpu(stage: str, case: str, inputs: Path) -> dict[str, Any]:
    """The run on the CPU; its checkpoint lies in ``inputs/cpu/STAGE/CASE``."""
    return fit(stage, case, inputs, inputs / "cpu" / stage / case)


@pytest.mark.parametrize(("stage", "case"), _EVERY)
def test_numbers_of_the_cpu(inputs: Path, tmp_path: Path, stage: str, case: str) -> None:
    got = fit(stage, case, inputs, tmp_path, **GPU)
    need = on_cpu(stage, case, inputs)
    if case not in ROUNDED:
        compare(case, [got], need, resumed=False, scale=SCALE)
        return
    # It samples or is scored otherwise, so that it goes its own way: it trains, and says the same things.
    first, last = got["weights"][0], got["weights"][-1]
    assert len(got["weights"]) == len(need["weights"])
    assert last.isfinite().all()
    assert not torch.equal(first, last)
    assert got["metrics"].keys() == need["metrics"].keys()
    if case == "bf16 sampler":
        assert all(0.0 < metrics["rollout/behaviour_gap_max"] < 1.0 for metrics in got["iterations"])


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("case", ["plain", "adapter", "ptx"])
def test_a_checkpoint_goes_on_where_it_likes(inputs: Path, tmp_path: Path, stage: str, case: str) -> None:
    """On the GPU with the same weights, bit by bit; from the GPU to the CPU and back within rounding."""
    if case not in CASES[stage]:
        pytest.skip(f"{stage} has no such case")
    whole = fit(stage, case, inputs, tmp_path / "gpu", **GPU)
    again = fit(stage, case, inputs, tmp_path / "again", resume=half_way(tmp_path / "gpu"), **GPU)
    for mine, theirs in zip(again["weights"], whole["weights"][STEPS // 2 :], strict=True):
        assert torch.equal(mine, theirs)
    need = on_cpu(stage, case, inputs)
    to_cpu = fit(stage, case, inputs, tmp_path / "cpu", resume=half_way(tmp_path / "gpu"))
    compare("to the CPU", [to_cpu], need, resumed=True, scale=SCALE)
    start = half_way(inputs / "cpu" / stage / case)
    to_gpu = fit(stage, case, inputs, tmp_path / "back", resume=start, **GPU)
    compare("to the GPU", [to_gpu], need, resumed=True, scale=SCALE)


STRATEGIES: dict[str, dict[str, Any]] = {
    "gathered": {},
    "synced": {"rollout_weights": "synced"},
    "shards": {"save_distributed_checkpoint": True},
    "offloaded": {"cpu_offload": True, "rollout_weights": "synced"},
    "offloaded shards": {"cpu_offload": True, "save_distributed_checkpoint": True},
}


def process(rank: int, port: int, stage: str, inputs: str, out: str) -> None:
    """All strategies in one process group, over NCCL; FSDP2's go on from their own checkpoints too."""
    enter_process(rank, port)
    found = {}

    def run(name: str, case: str, strategy: Any, resume: Path | None = None) -> None:
        faulthandler.dump_traceback_later(LIMIT_S, exit=True)  # anew for each
        folder = Path(out) / name / case
        found[f"{name}, {case}"] = fit(stage, case, Path(inputs), folder, resume=resume, **GPU, strategy=strategy)

    for case in _SHARED[stage]:
        run("ddp", case, "ddp")
        for name, settings in STRATEGIES.items():
            if case == "frozen on the CPU" and "cpu_offload" in settings:
                continue  # refused: the strategy keeps all networks there
            run(name, case, Fsdp2Strategy(**settings))
            if case == "plain":
                run(f"resumed {name}", case, Fsdp2Strategy(**settings), half_way(Path(out) / name / case))
    torch.save(found, Path(out) / "found.pt")


@pytest.mark.parametrize("stage", STAGES)
def test_strategies(inputs: Path, tmp_path: Path, stage: str) -> None:
    torch.multiprocessing.spawn(process, args=(find_free_network_port(), stage, str(inputs), str(tmp_path)))
    found = torch.load(tmp_path / "found.pt", weights_only=True, map_location="cpu")
    for name, result in found.items():
        case = name.split(", ", 1)[1]
        need = on_cpu(stage, case, inputs)
        compare(name, [result], need, resumed=name.startswith("resumed"), scale=SCALE)
