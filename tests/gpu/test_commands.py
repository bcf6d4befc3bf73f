"""The command line on one GPU, with the overlays that are shipped: all stages, then what one does with them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_instruct.cli import main, run_stage
from lit_instruct.models.backbone import load_language_model
from tests.helpers.numbers import assert_close
from tests.helpers.tiny import comparisons, demonstrations, prompts, save_model, texts

LIMIT_S = 300
GPU = ["--trainer.accelerator", "gpu"]
PTX = ["--config", "ppo/ptx.yaml", "--trainer.callbacks.text", "t.jsonl", "--trainer.callbacks.ratio", "1"]
PTX += ["--trainer.callbacks.micro_batch_size", "4"]
ADAPTER = ["--model.adapter.r", "4", "--model.adapter.lora_alpha", "8"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "base", num_hidden_layers=2, hidden_size=64)
    demonstrations(tmp_path / "d.jsonl", 24)
    comparisons(tmp_path / "c.jsonl", 24)
    prompts(tmp_path / "p.jsonl", 24)
    prompts(tmp_path / "held.jsonl", 8, seed=3)
    texts(tmp_path / "t.jsonl", 40)
    return tmp_path


def words(name: str, given: list[Any], overlay: str) -> list[str]:
    """What follows ``lit-instruct STAGE``."""
    first = ["fit", "--config", f"{name}/default.yaml", "--config", f"strategy/{overlay}.yaml"]
    quiet = ["--trainer.enable_progress_bar", "false", "--data.batch_size", "8", "--model.learning_rate", "0.003"]
    return [*first, *quiet, *map(str, given)]


def stages(ppo: Sequence[Any] = ()) -> dict[str, list[Any]]:
    """SFT, a reward model and PPO, each from what the one before has written."""
    limits = ["--model.episodes", 16, "--model.minibatch_size", 4, "--model.max_response_tokens", 5]
    models = ["--model.policy", "runs/sft/last.ckpt", "--model.reward_model", "runs/rm/last.ckpt"]
    epoch = ["--trainer.max_epochs", 1]
    return {
        "sft": ["--model.base", "base", "--data.demonstrations", "d.jsonl", *epoch],
        "rm": ["--model.base", "runs/sft/last.ckpt", "--data.comparisons", "c.jsonl", *epoch],
        "ppo": [*ppo, *models, *limits, "--data.prompts", "p.jsonl"],
    }


def all_stages(*ppo: Any, every: Sequence[Any] = ()) -> dict[str, Any]:
    """Run them."""
    return {name: run_stage(name, words(name, [*given, *every], "single")) for name, given in stages(ppo).items()}


def assert_trained(clis: dict[str, Any]) -> None:
    for name, cli in clis.items():
        assert cli.trainer.strategy.root_device.type == "cuda", name  # from which all has been brought back
        checkpoint = torch.load(f"runs/{name}/last.ckpt", weights_only=True, map_location="cpu")
        assert all(tensor.isfinite().all() for tensor in checkpoint["state_dict"].values()), name
    assert clis["ppo"].model.episodes_done == 16


CASES: dict[str, tuple[list[str], list[str]]] = {
    "bf16-mixed": ([], []),
    "fp32": (["--trainer.precision", "32-true"], []),
    "fp16, for older GPUs": (["--trainer.precision", "16-mixed"], []),
    "bf16-true": (["--trainer.precision", "bf16-true"], []),
    "recomputed": (["--model.gradient_checkpointing", "true"], []),
    "a sampler in bf16": ([], ["--model.rollout_dtype", "bfloat16"]),
    "offloaded": ([], ["--model.offload_frozen", "true"]),
    "shared trunk": ([], ["--model.memory", "shared_trunk"]),
    "frozen in 8 bits": ([], ["--model.frozen_dtype", "8bit"]),
    "frozen in 4 bits": ([], ["--model.frozen_dtype", "4bit"]),
    "8-bit Adam": (["--model.optimizer", "bitsandbytes.optim.AdamW8bit"], []),
    "adapters": (ADAPTER, []),
    "shared base": (ADAPTER, ["--model.memory", "shared_base"]),
    "QLoRA": ([*ADAPTER, "--model.quantization", "4bit"], ["--model.memory", "shared_base"]),
    "8-bit LoRA": ([*ADAPTER, "--model.quantization", "8bit"], ["--model.memory", "shared_base"]),
}


@pytest.mark.parametrize("case", CASES)
def test_all_stages(here: Path, case: str) -> None:
    given, of_ppo = CASES[case]
    assert_trained(all_stages(*of_ppo, every=given))


@pytest.mark.parametrize("overlay", ["ddp", "fsdp", "fsdp_offload"])
def test_every_overlay(here: Path, overlay: str) -> None:
    """On one device, each run in a process of its own; then the reward model and the policy are read as ever."""
    for name, given in stages(PTX).items():
        done = subprocess.run(
            [sys.executable, "-m", "lit_instruct", name, *words(name, given, overlay)],
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
            check=False,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
        assert done.returncode == 0, f"{name}:\n{done.stderr[-3000:]}"
        assert "returned a view" not in done.stderr  # of FSDP2, about layers that change their input in place
    main(["export", "runs/ppo/last.ckpt", "exported"])
    ids = torch.arange(9)[None] + 3
    trained, before = (load_language_model(x).eval()(ids).logits for x in ("exported", "runs/sft/last.ckpt"))
    assert trained.isfinite().all()
    assert not torch.equal(trained, before)


def test_what_one_does_with_them(here: Path) -> None:
    """Go on, on the GPU and on the CPU; export; evaluate; sample for labelers; report."""
    assert_trained(all_stages(*PTX))
    policy, reward = "runs/ppo/last.ckpt", "runs/rm/last.ckpt"
    for episodes, where in ((24, GPU), (32, ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true"])):
        more = ["--ckpt_path", policy, *stages(PTX)["ppo"], "--model.episodes", episodes, *where]
        assert run_stage("ppo", words("ppo", more, "single")).model.episodes_done == episodes
    main(["export", policy, "exported"])
    ids = torch.arange(9)[None] + 3
    mine = load_language_model(policy).eval()(ids).logits
    assert_close(AutoModelForCausalLM.from_pretrained("exported").eval()(ids).logits, mine)
    models = ["sft=runs/sft/last.ckpt", f"ppo={policy}"]
    asked = ["--prompts", "held.jsonl", "--max_response_tokens", "6"]
    scorer = ["--scorer", "RewardModelScorer", "--scorer.model", reward, "--pretraining_text", "t.jsonl"]
    found = {}
    for device in ("cuda", "cpu"):
        main(
            ["evaluate", "--models", *models, *asked, *scorer, "--baseline", "sft", "--out", device, "--device", device]
        )
        found[device] = json.loads(Path(device, "results.json").read_text())["models"]["ppo"]
    for key in ("kl", "pretraining_loss"):
        assert_close(found["cuda"][key], found["cpu"][key], scale=10.0)
    pick = ["--select", "uncertain", "--reward_model", reward, "--num_prompts", "4"]
    main(["sample", "--models", *models, *asked, *pick, "--out", "tasks.jsonl"])
    assert len(Path("tasks.jsonl").read_text().splitlines()) == 4
    main(["report", "runs/sft", "runs/rm", "runs/ppo", "cuda", "--out", "report"])
    assert Path("report/report.html").stat().st_size > 10_000
