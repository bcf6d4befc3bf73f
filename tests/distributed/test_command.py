"""The command line starts processes by itself, or is started by torchrun; the overlay is the one that is shipped."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import pytest
from lightning.fabric.plugins.environments.lightning import find_free_network_port

from lit_instruct.models.backbone import load_language_model
from tests.helpers.tiny import demonstrations, save_model

_TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def launched(how: str) -> list[tuple[list[str], list[str]]]:
    """Of each node: the words before ``-m lit_instruct``, and what is added at the end."""
    port = find_free_network_port()
    if how == "by itself":
        return [([sys.executable], ["--trainer.devices", "2"])]
    if how == "by torchrun":
        return [([*_TORCHRUN, "--nproc_per_node=2", f"--master_port={port}"], ["--trainer.devices", "2"])]
    # Not --rdzv_backend c10d: its store lies with the first node, and whoever ends later then may find it gone.
    meeting = ["--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={port}"]
    sizes = ["--trainer.devices", "1", "--trainer.num_nodes", "2"]
    return [([*_TORCHRUN, *meeting, f"--node_rank={node}"], sizes) for node in range(2)]


@pytest.mark.parametrize("how", ["by itself", "by torchrun", "as two nodes by torchrun"])
def test_sharded_over_two_processes(how: str, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base")
    data = demonstrations(tmp_path / "d.jsonl", 24)
    words = ["-m", "lit_instruct", "sft", "fit", "--config", "sft/default.yaml", "--config", "strategy/fsdp.yaml"]
    words += ["--trainer.accelerator", "cpu", "--trainer.max_epochs", "1", "--model.base", base]
    words += ["--data.demonstrations", data, "--data.batch_size", "8", "--data.max_length", "32", "--data.val", "0.2"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen([*before, *words, *after], cwd=tmp_path, env=environment, stdout=PIPE, stderr=PIPE, text=True)
        for before, after in launched(how)
    ]
    try:
        said = [process.communicate(timeout=240) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, errors) in zip(started, said, strict=True):
        assert process.returncode == 0, errors[-3000:]
        assert "returned a view" not in errors
    assert sum(out.count("Checkpoint: ") for out, _ in said) == 1  # one process speaks for all
    policy = load_language_model(tmp_path / "runs" / "sft" / "last.ckpt")
    assert not policy.get_input_embeddings().weight.equal(load_language_model(base).get_input_embeddings().weight)
