"""Lightning's own FSDP strategy (FSDP1): SFT and reward models train under it, PPO is refused.

It wants a GPU. A subclass that tells torch to use the CPU passes its checks. There torch crashes over whole
checkpoints, so those of this test are shards.
"""

from __future__ import annotations

import faulthandler
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch.strategies import FSDPStrategy
from torch.distributed.fsdp import FullyShardedDataParallel

from lit_instruct.types import ConfigError
from tests.distributed.stages import enter_process, fit, half_way, write_inputs
from tests.helpers.numbers import assert_close


class CpuFsdp(FSDPStrategy):
    """FSDP1 on a CPU."""

    def _setup_model(self, model: torch.nn.Module) -> torch.nn.Module:
        kwargs = {name: value for name, value in self.kwargs.items() if name != "device_id"}
        return FullyShardedDataParallel(module=model, device_id=torch.device("cpu"), **kwargs)


def process(rank: int, port: int, inputs: str, out: str) -> None:
    faulthandler.dump_traceback_later(300, exit=True)
    enter_process(rank, port)
    found: dict[str, Any] = {}
    for stage in ("sft", "rm"):
        folder = Path(out) / stage

        def run(stage: str = stage, folder: Path = folder, resume: Path | None = None) -> dict[str, Any]:
            strategy = CpuFsdp(state_dict_type="sharded", use_orig_params=True)
            return fit(stage, "plain", Path(inputs), folder, resume=resume, bare=True, devices=2, strategy=strategy)

        found[stage] = run()
        found[f"{stage} again"] = run(resume=half_way(folder))
    with pytest.raises(ConfigError, match=r"trainer.strategy: got fsdp .*need fsdp2"):
        fit("ppo", "plain", Path(inputs), Path(out), bare=True, devices=2, strategy=CpuFsdp())
    with pytest.raises(ConfigError, match=r"WeightEMA: got the strategy fsdp .*need"):
        fit("sft", "plain", Path(inputs), Path(out), devices=2, strategy=CpuFsdp())
    torch.save(found, Path(out) / f"{rank}.pt")


def test_fsdp1(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path)
    torch.multiprocessing.spawn(process, args=(find_free_network_port(), str(inputs), str(tmp_path)), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for stage in ("sft", "rm"):
        need = fit(stage, "plain", inputs, tmp_path / "alone", bare=True)
        for name, value in need["metrics"].items():
            assert_close(found[0][stage]["metrics"][name], value, scale=10.0)
        assert need["metrics"]
        assert (
            found[0][f"{stage} again"]["metrics"].items()
            >= {name: value for name, value in found[0][stage]["metrics"].items() if "/val/" in name}.items()
        )
