"""Checkpoints that a sharding strategy wrote as folders: read whole by one process, and nothing in them is run."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from torch.distributed.checkpoint import metadata as records
from transformers import AutoModelForCausalLM

from lit_instruct import RewardModule, SFTModule
from lit_instruct.cli import main
from lit_instruct.models.backbone import load_language_model
from lit_instruct.models.handover import read_handover
from lit_instruct.models.scalar_head import ScalarModel
from lit_instruct.models.sharded_checkpoint import _DataUnpickler, read_shards
from lit_instruct.types import ConfigError
from tests.helpers.tiny import demonstrations, weights

TOPS = {"ModelParallelStrategy": "state_dict", "FSDPStrategy": "model"}


def shard(file: str, folder: Path, *, top: str = "state_dict", **more: Any) -> str:
    """A whole checkpoint as Lightning's strategies write it when they save in shards."""
    checkpoint = torch.load(file, weights_only=True) | more
    state = {top: checkpoint.pop("state_dict")}
    state |= {f"optimizer_{number}": it for number, it in enumerate(checkpoint.pop("optimizer_states", []))}
    state.setdefault("optimizer_0", {"state": {"step": 3, "moment": torch.ones(2)}})
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    torch.save(checkpoint, folder / "meta.pt")
    return str(folder)


@pytest.mark.filterwarnings("error:torch.distributed is disabled.*intent is to load")  # that is what we mean
@pytest.mark.parametrize("strategy", TOPS)
def test_the_folder_is_as_good_as_the_file(strategy: str, sft_ckpt: str, rm_ckpt: str, tmp_path: Path) -> None:
    folder = shard(sft_ckpt, tmp_path / "sft.ckpt", top=TOPS[strategy])
    whole, sharded = read_handover(sft_ckpt), read_handover(folder)
    assert sharded.stage == "sft"
    assert sharded.config.to_dict() == whole.config.to_dict()
    assert sharded.tokenizer_files == whole.tokenizer_files
    assert sharded.weights.keys() == whole.weights.keys()
    assert all(torch.equal(sharded.weights[name], tensor) for name, tensor in whole.weights.items())
    assert torch.equal(weights(load_language_model(folder)), weights(load_language_model(sft_ckpt)))
    again, need = ScalarModel.from_base(shard(rm_ckpt, tmp_path / "rm.ckpt")), ScalarModel.from_base(rm_ckpt)
    assert torch.equal(weights(again), weights(need))
    assert torch.equal(again.score_bias, need.score_bias)
    assert need.score_bias != 0


def test_only_the_network_that_is_handed_over_is_read(
    sft_ckpt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A policy beside a value model of its size, and the moments of both, would not fit."""
    state = torch.load(sft_ckpt, weights_only=True)["state_dict"]
    other = {f"value_model.{name}": tensor for name, tensor in state.items()}
    folder = shard(sft_ckpt, tmp_path / "x.ckpt", state_dict=state | other)
    loads: list[Any] = []
    real = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: loads.append(k) or real(*a, **k))
    handed = read_handover(folder)
    assert len(loads) == 1  # for stage, configuration and tokenizer no tensor is needed
    assert handed.weights is handed.weights
    assert handed.weights.keys() == load_language_model(sft_ckpt).state_dict().keys()
    assert sum("mmap" not in settings for settings in loads) == len(handed.weights)  # the others are whole files
    assert all(settings["weights_only"] is True for settings in loads)


def test_the_average_and_the_next_stages(sft_ckpt: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = torch.load(sft_ckpt, weights_only=True)["state_dict"]
    model = load_language_model(sft_ckpt)
    averaged = {f"policy.{name}": tensor + 1 for name, tensor in model.named_parameters()}
    folder = shard(sft_ckpt, tmp_path / "x.ckpt", state_dict=state, ema_state_dict=averaged)
    assert torch.equal(weights(load_language_model(folder, ema=True)), weights(model) + 1)
    assert torch.equal(weights(RewardModule(folder).reward_model.trunk), weights(model.base_model))
    main(["export", folder, str(tmp_path / "out"), "--ema"])
    assert torch.equal(weights(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), weights(model) + 1)
    assert capsys.readouterr().out == f"Exported: {tmp_path / 'out'}\n"


def test_the_stage_of_a_folder_is_looked_at_before_a_run(
    base: str, rm_ckpt: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demonstrations(folder / "d.jsonl", 24)
    path = shard(rm_ckpt, folder / "rm.ckpt")
    command = ["sft", "fit", "--config", "sft/default.yaml", "--model.base", base, "--data.demonstrations", "d.jsonl"]
    with pytest.raises(SystemExit):
        main([*command, "--ckpt_path", path])
    assert f"ckpt_path: {path!r} comes from the stage 'rm'" in capsys.readouterr().err


def test_only_a_strategy_that_shards_goes_on_from_a_folder(
    base: str, sft_ckpt: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demonstrations(folder / "d.jsonl", 24)
    path = shard(sft_ckpt, folder / "sft.ckpt")
    command = ["sft", "fit", "--config", "sft/default.yaml", "--model.base", base, "--data.demonstrations", "d.jsonl"]
    with pytest.raises(SystemExit):
        main([*command, "--trainer.accelerator", "cpu", "--ckpt_path", path])
    assert f"ckpt_path: got {path!r}, a folder of shards, with SingleDeviceStrategy" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"got a folder of shards; need a file.*load_language_model"):
        SFTModule.load_from_checkpoint(path)


WRITE = """
import os, sys, torch
import torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
rank, port, file, folder = int(sys.argv[1]), *sys.argv[2:]
dist.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
state = torch.load(file, weights_only=True)["state_dict"]
dcp.save(
    {"state_dict": {name: distribute_tensor(x, mesh, [Shard(0)]) if x.dim() else x for name, x in state.items()}},
    checkpoint_id=folder,
)
dist.destroy_process_group()
os._exit(0)  # threads of torch that are still there may abort an orderly end
"""


def test_tensors_of_two_processes_are_joined(sft_ckpt: str, tmp_path: Path) -> None:
    """Uneven shards too: the norms' and the embedding's first dimensions are cut as FSDP2 cuts them."""
    port, folder = str(find_free_network_port()), tmp_path / "x.ckpt"
    processes = [
        subprocess.Popen([sys.executable, "-c", WRITE, str(rank), port, sft_ckpt, str(folder)]) for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert len(list(folder.glob("*.distcp"))) == 2
    checkpoint = torch.load(sft_ckpt, weights_only=True)
    torch.save({name: value for name, value in checkpoint.items() if name != "state_dict"}, folder / "meta.pt")
    handed = read_handover(folder)
    need = read_handover(sft_ckpt).weights
    assert handed.weights.keys() == need.keys()
    assert all(torch.equal(handed.weights[name], tensor) for name, tensor in need.items())


# -- what is refused

RAN: list[int] = []


def run(*_: Any) -> None:
    RAN.append(1)


class Evil:
    def __init__(self, function: Any = run, arguments: tuple[Any, ...] = ()):
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


def refusal(folder: str) -> str:
    with pytest.raises(ConfigError) as error:
        load_language_model(folder)
    message = str(error.value)
    assert folder in message
    assert len(message) < 900
    return message


@pytest.mark.parametrize(
    "evil",
    [
        Evil(),
        Evil(os.system, ("true",)),
        Evil(getattr, (Path, "home")),
        Evil(getattr, (records.Metadata, "__init__")),
        Evil(torch.serialization._get_layout, ("torch.hub",)),
        Evil(torch.load, ("x",)),
    ],
    ids=["function", "os.system", "getattr", "getattr of a record", "layout", "torch.load"],
)
def test_code_in_the_metadata_is_not_run(evil: Evil, sft_ckpt: str, tmp_path: Path) -> None:
    folder = shard(sft_ckpt, tmp_path / "x.ckpt")
    described = dcp.FileSystemReader(folder).read_metadata()
    described.planner_data = evil
    Path(folder, ".metadata").write_bytes(pickle.dumps(described))
    assert "since anything else could run code" in refusal(folder)
    assert not RAN


def test_code_in_the_shards_is_not_run(sft_ckpt: str, tmp_path: Path) -> None:
    folder = shard(sft_ckpt, tmp_path / "x.ckpt")
    (shards,) = Path(folder).glob("*.distcp")
    torch.save(Evil(), tmp_path / "evil")
    shards.write_bytes((tmp_path / "evil").read_bytes() + bytes(shards.stat().st_size))
    assert "cannot be read" in refusal(folder)
    assert not RAN
    torch.save({"x": Evil()}, Path(folder) / "meta.pt")
    assert "it holds Python objects" in refusal(folder)
    assert not RAN


def test_code_in_what_is_no_tensor_is_not_run(tmp_path: Path) -> None:
    """Learning rates and the like lie in the shards as pickles."""
    dcp.save({"optimizer_0": {"lr": 0.25, "names": ["a"], "evil": Evil()}}, checkpoint_id=tmp_path, no_dist=True)
    state = {"optimizer_0": {"lr": 1.0, "names": ["b"]}}
    read_shards(state, tmp_path)
    assert state == {"optimizer_0": {"lr": 0.25, "names": ["a"]}}
    with pytest.raises(ConfigError, match=r"cannot be read: .*anything else could run code"):
        read_shards({"optimizer_0": {"evil": 0}}, tmp_path)
    assert not RAN


def test_a_member_of_an_enum_however_it_was_pickled() -> None:
    """Some versions of Python write its class and value, some its class and name."""
    member = records._MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT
    kinds: list[Any] = [member, Evil(getattr, (type(member), member.name))]
    for kind in kinds:
        found = _DataUnpickler(io.BytesIO(pickle.dumps(kind))).load()
        assert isinstance(found, Enum)
        assert found is member


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        ("no metadata", "cannot be read"),
        ("metadata cut off", "cannot be read"),
        ("metadata of something else", ".metadata holds a dict"),
        ("no shards", "cannot be read"),
        ("shards cut off", "cannot be read"),
        ("no meta.pt", "is a folder, but not of a sharded checkpoint: meta.pt is missing"),
        ("another network", "is missing"),
        ("foreign", "was not written by a stage of lit_instruct"),
    ],
)
def test_damaged_folders(damage: str, text: str, sft_ckpt: str, tmp_path: Path) -> None:
    state = torch.load(sft_ckpt, weights_only=True)["state_dict"]
    if damage == "another network":
        state = {f"other.{name}": tensor for name, tensor in state.items()}
    folder = Path(shard(sft_ckpt, tmp_path / "x.ckpt", state_dict=state))
    (shards,) = folder.glob("*.distcp")
    metadata = folder / ".metadata"
    if damage == "no metadata":
        metadata.unlink()
    elif damage == "metadata cut off":
        metadata.write_bytes(metadata.read_bytes()[:200])
    elif damage == "metadata of something else":
        metadata.write_bytes(pickle.dumps({"a": 1}))
    elif damage == "no shards":
        shards.unlink()
    elif damage == "shards cut off":
        shards.write_bytes(shards.read_bytes()[:1000])
    elif damage == "no meta.pt":
        (folder / "meta.pt").unlink()
    elif damage == "foreign":
        torch.save({"epoch": 1}, folder / "meta.pt")
    assert text in refusal(str(folder))
