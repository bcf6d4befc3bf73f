"""All stages on several processes, replicated (DDP) and sharded (FSDP2): the numbers and checkpoints of one."""

from __future__ import annotations

import faulthandler
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch.loops.utilities as loops
import pytest
import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lit_instruct.models.export import export_checkpoint
from lit_instruct.modules.fsdp2 import Fsdp2Strategy
from lit_instruct.types import ConfigError
from tests.distributed.stages import (
    CASES,
    REPLICATED,
    STAGES,
    STEPS,
    compare,
    enter_process,
    fit,
    half_way,
    measure,
    prompts_with_a_pair,
    write_inputs,
)
from tests.helpers.numbers import assert_close
from tests.helpers.tiny import weights

LIMIT_S = 300  # a rank that waits for ever ends the test
STRATEGIES = ("ddp", "fsdp2")
processes = pytest.mark.parametrize(
    "count",
    [2, pytest.param(4, marks=[pytest.mark.slow])],  # four processes on two cores take minutes
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@cache
def alone(stage: str, case: str, inputs: Path) -> dict[str, Any]:
    """The run of one process; its checkpoint lies in ``inputs/alone/STAGE/CASE``."""
    return fit(stage, case, inputs, inputs / "alone" / stage / case)


def runs(stage: str, strategy: str) -> dict[str, dict[str, Any]]:
    """Name of each run -> its case and strategy; and those that go on from another's checkpoint."""
    cases = [case for case in CASES[stage] if strategy == "ddp" or case not in REPLICATED]
    found: dict[str, dict[str, Any]] = {case: {"case": case, "strategy": strategy} for case in cases}
    found["from one process"] = {"case": "plain", "strategy": strategy, "resume": f"alone/{stage}/plain"}
    if strategy == "fsdp2":
        found["shards"] = {"case": "plain", "sharded": True}
        found["from shards"] = {"case": "plain", "sharded": True, "resume": "shards"}
        if stage == "ppo":
            found["from value warm-up"] = {"case": "value warm-up", "strategy": strategy, "resume": "value warm-up"}
            found["shards, value warm-up"] = {"case": "value warm-up", "sharded": True}
            found["from shards, value warm-up"] = found["shards, value warm-up"] | {"resume": "shards, value warm-up"}
            found["synced"] = {"case": "plain", "rollout_weights": "synced"}
    return found


def process(rank: int, count: int, port: int, stage: str, strategy: str, inputs: str, out: str) -> None:
    """One process: all runs in sequence, in one process group."""
    faulthandler.dump_traceback_later(LIMIT_S * count // 2, exit=True)
    enter_process(rank, port)
    results = {}
    for name, run in runs(stage, strategy).items():
        made: Any = run.get("strategy")
        if made is None:
            made = Fsdp2Strategy(
                rollout_weights=run.get("rollout_weights", "gathered"),
                save_distributed_checkpoint=run.get("sharded", False),
            )
        resume = run.get("resume")
        if resume is not None:
            resume = half_way((Path(inputs) if resume.startswith("alone") else Path(out)) / resume)
        results[name] = fit(
            stage, run["case"], Path(inputs), Path(out) / name, resume=resume, devices=count, strategy=made
        )
    torch.save(results, Path(out) / f"{rank}.pt")


def test_the_data_have_steps_in_which_a_rank_has_no_pair(inputs: Path) -> None:
    assert any(0 in step and sum(step) for step in prompts_with_a_pair(inputs, 2))


def refused(rank: int, port: int, inputs: str, out: str) -> None:
    """Networks that share their tensors; a decoder that is called by itself; weights that two settings would move."""
    faulthandler.dump_traceback_later(LIMIT_S, exit=True)
    enter_process(rank, port)
    for case in REPLICATED:
        with pytest.raises(ConfigError, match=r"Fsdp2Strategy, but .* (share the tensors|are quantised).*need.*ddp"):
            fit("ppo", case, Path(inputs), Path(out), devices=1, strategy=Fsdp2Strategy())

    with pytest.raises(
        ConfigError, match=r"offload_frozen: got true with the strategy's cpu_offload.*need one of them"
    ):
        fit("ppo", "frozen on the CPU", Path(inputs), Path(out), devices=1, strategy=Fsdp2Strategy(cpu_offload=True))
    with pytest.raises(ConfigError, match=r"trainer.strategy: got cpu_offload on a CPU.*need GPUs"):
        fit("sft", "plain", Path(inputs), Path(out), devices=1, strategy=Fsdp2Strategy(cpu_offload=True))
    CASES["sft"]["chunks"] = {"loss_chunk_tokens": 4}
    with pytest.raises(ConfigError, match=r"loss_chunk_tokens: got 4 with Fsdp2Strategy, .*need null.*ddp"):
        fit("sft", "chunks", Path(inputs), Path(out), devices=1, strategy=Fsdp2Strategy())


def test_what_cannot_be_cut_is_refused(inputs: Path, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(refused, args=(find_free_network_port(), str(inputs), str(tmp_path)))


def measured(rank: int, port: int, inputs: str, out: str) -> None:
    """Validates what one process has written, as on GPUs: where gloo is not the backend, Lightning's way is another."""
    faulthandler.dump_traceback_later(LIMIT_S, exit=True)
    enter_process(rank, port)
    loops.dist = SimpleNamespace(get_backend=lambda: "nccl")  # type: ignore[attr-defined]
    found = {
        stage: measure(
            stage, Path(inputs), half_way(Path(inputs) / "alone" / stage / "plain"), strategy=Fsdp2Strategy()
        )
        for stage in STAGES
    }
    torch.save(found, Path(out) / "measured.pt")


def test_what_is_sharded_is_validated_too(inputs: Path, tmp_path: Path) -> None:
    for stage in STAGES:
        alone(stage, "plain", inputs)
    torch.multiprocessing.spawn(measured, args=(find_free_network_port(), str(inputs), str(tmp_path)))
    found = torch.load(tmp_path / "measured.pt", weights_only=True)
    for stage in STAGES:
        need = measure(stage, inputs, half_way(inputs / "alone" / stage / "plain"))
        assert need.keys() == found[stage].keys()
        for name, value in need.items():
            assert_close(found[stage][name], value, scale=10.0)


def one_process(rank: int, port: int, stage: str, inputs: str, out: str) -> None:
    """Goes on from the shards that several processes have written."""
    faulthandler.dump_traceback_later(LIMIT_S, exit=True)
    enter_process(rank, port)
    folder = Path(out)
    shards, strategy = half_way(folder / "shards"), Fsdp2Strategy(save_distributed_checkpoint=True)
    result = fit(stage, "plain", Path(inputs), folder / "one", resume=shards, devices=1, strategy=strategy)
    torch.save(result, folder / "one.pt")


@processes
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("stage", STAGES)
def test_several_processes_do_what_one_does(
    inputs: Path, tmp_path: Path, stage: str, strategy: str, count: int
) -> None:
    alone(stage, "plain", inputs)  # whose checkpoint the others go on from
    arguments = (count, find_free_network_port(), stage, strategy, str(inputs), str(tmp_path))
    torch.multiprocessing.spawn(process, args=arguments, nprocs=count)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(count)]
    for name, run in runs(stage, strategy).items():
        compare(name, [one[name] for one in found], alone(stage, run["case"], inputs), resumed="resume" in run)
    if strategy == "fsdp2":  # shards of that many processes, gone on from by one
        torch.multiprocessing.spawn(one_process, args=(find_free_network_port(), stage, str(inputs), str(tmp_path)))
        gone_on = torch.load(tmp_path / "one.pt", weights_only=True)
        compare("shards in one process", [gone_on], alone(stage, "plain", inputs), resumed=True)
        exported(stage, half_way(tmp_path / "shards"), tmp_path / "exported shards", alone(stage, "plain", inputs))
    exported(stage, half_way(tmp_path / "plain"), tmp_path / "exported", alone(stage, "plain", inputs))
    again = fit(stage, "plain", inputs, tmp_path / "again", resume=half_way(tmp_path / "plain"))
    compare("again in one process", [again], alone(stage, "plain", inputs), resumed=True)


def exported(stage: str, checkpoint: Path, out: Path, need: dict[str, Any]) -> None:
    """What transformers loads from an exported folder are the weights after half of the steps."""
    export_checkpoint(checkpoint, out)
    kind: Any = AutoModelForSequenceClassification if stage == "rm" else AutoModelForCausalLM
    base = weights(kind.from_pretrained(out).base_model)
    assert_close(base, need["weights"][STEPS // 2 - 1][: len(base)])
