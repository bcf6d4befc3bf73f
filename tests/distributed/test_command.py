"""The command line starts processes by itself, or is started by torchrun; the overlay is the one that is shipped."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.fabric.plugins.environments.lightning import find_free_network_port

from lit_instruct.models.backbone import load_language_model
from tests.helpers.tiny import demonstrations, save_model

_LAUNCHED = {"by itself": [], "by torchrun": ["-m", "torch.distributed.run", "--nproc_per_node=2"]}


@pytest.mark.parametrize("launched", _LAUNCHED)
def test_sharded_over_two_processes(launched: str, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base")
    data = demonstrations(tmp_path / "d.jsonl", 24)
    launcher = _LAUNCHED[launched] and [*_LAUNCHED[launched], f"--master_port={find_free_network_port()}"]
    words = [sys.executable, *launcher, "-m", "lit_instruct", "sft", "fit"]
    words += ["--config", "sft/default.yaml", "--config", "strategy/fsdp.yaml", "--trainer.accelerator", "cpu"]
    words += ["--trainer.devices", "2", "--trainer.max_epochs", "1", "--model.base", base]
    words += ["--data.demonstrations", data, "--data.batch_size", "8", "--data.max_length", "32", "--data.val", "0.2"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "returned a view" not in done.stderr
    assert done.stdout.count("Checkpoint: ") == 1  # one process speaks for all
    policy = load_language_model(tmp_path / "runs" / "sft" / "last.ckpt")
    assert not policy.get_input_embeddings().weight.equal(load_language_model(base).get_input_embeddings().weight)
