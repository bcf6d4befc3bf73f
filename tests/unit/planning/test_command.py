"""``lit-instruct plan``: what it reads, what it prints, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lit_instruct.cli import main
from lit_instruct.planning.config_files import merged, shape_of
from lit_instruct.planning.hardware import parse_hardware
from lit_instruct.planning.settings import Reader, read_settings
from tests.unit.planning.runs import LLAMA

CONFIGS = Path(__file__).parents[3] / "configs"
MODEL = ["--model", json.dumps(LLAMA | {"max_position_embeddings": 2048})]


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    main(["plan", *words])
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(["plan", *words])
    assert exit_.value.code == 2
    return capsys.readouterr().err


def settings_of(*names: str, overrides: tuple[str, ...] = ()):
    reader = Reader(merged([str(CONFIGS / name) for name in names], overrides))
    shape = shape_of(LLAMA | {"max_position_embeddings": 2048})
    return read_settings(reader, "ppo", shape, shape), reader


def test_ppo_is_planned_from_its_own_files(capsys):
    out = printed(capsys, "--config", "ppo/default.yaml", "--hardware", "8xH100-80GB", *MODEL)
    assert "model.minibatch_size = 64; data.batch_size = 512" in out
    assert "model.frozen_dtype = float32 (default)" in out
    assert "trainer.callbacks: WeightEMA" in out
    assert "== memory: separate, sharded over 8 devices" in out
    assert "== memory: shared_trunk" in out
    assert "shared_base" not in out.split("== memory", 1)[1]  # without adapters it is no plan
    for model in ("policy", "value model", "reference", "reward model", "average"):
        assert f"| {model} " in out
    for phase in ("rollout", "scoring", "update"):
        assert f"| {phase} " in out
    assert out.count("Fits: ") == 2


def test_options_of_the_stage_win_over_its_files(capsys):
    words = ["--model.adapter.r", "8", "--model.frozen_dtype=bfloat16", "--data.batch_size", "128"]
    out = printed(capsys, "--config", "ppo/default.yaml", "--hardware", "H100-80GB", *MODEL, *words)
    assert "model.adapter.r = 8; " in out
    assert "model.frozen_dtype = bfloat16; " in out
    assert "128 rows of" in out
    assert "== memory: shared_base, on one device" in out


def test_overlays_add_text_and_the_last_callback_is_told():
    plain, _ = settings_of("ppo/default.yaml")
    mixed, _ = settings_of("ppo/default.yaml", "ppo/ptx.yaml")
    told, _ = settings_of("ppo/default.yaml", "ppo/ptx.yaml", overrides=("--trainer.callbacks.micro_batch_size", "4"))
    off, _ = settings_of("ppo/default.yaml", "ppo/ptx.yaml", overrides=("--trainer.callbacks.coef", "0"))
    assert (plain.work.text, off.work.text) == (None, None)
    assert mixed.work.text == (8.0, 32, 2048, True)
    assert told.work.text == (8.0, 4, 2048, True)
    assert mixed.averages


def test_each_shipped_configuration_can_be_planned(capsys):
    for path in sorted(CONFIGS.rglob("*.yaml")):
        name = path.relative_to(CONFIGS).as_posix()
        if name not in ("ppo/ptx.yaml", "sft/select_by_score.yaml") and not name.startswith("strategy/"):  # overlays
            stage = ["--stage", "sft"] if name == "quickstart/base.yaml" else []
            out = printed(capsys, "--config", name, "--hardware", "cpu:0.4,30,64", *MODEL, *stage)
            assert "MALLOC_MMAP_THRESHOLD_" in out
            assert "Fits: " in out or "Does not fit: " in out


@pytest.mark.parametrize(("overlay", "spread"), [("ddp", "replicated"), ("fsdp", "sharded"), ("cpu", "sharded")])
def test_the_strategy_is_the_configured_one(capsys, overlay, spread):
    files = ["--config", "ppo/default.yaml", "--config", f"strategy/{overlay}.yaml"]
    assert f"{spread} over 8 devices" in printed(capsys, *files, "--hardware", "8xH100-80GB", *MODEL)


@pytest.mark.parametrize("how", ["{}", "{{class_path: {}, init_args: {{eps: 1e-7}}}}"], ids=["name", "arguments"])
def test_an_optimizer_of_8_bits_is_seen(how):
    found = [
        settings_of("ppo/default.yaml", overrides=("--model.optimizer", how.format(name)))[0].optimizer_bytes
        for name in ("bitsandbytes.optim.AdamW8bit", "torch.optim.AdamW")
    ]
    assert found == [2.03125, 8.0]


def test_a_synced_rollout_gathers_less(capsys):
    files = ["--config", "ppo/default.yaml", "--config", "strategy/fsdp.yaml", "--hardware", "8xH100-80GB", *MODEL]
    peaks = []
    for how in ("gathered", "synced"):
        out = printed(capsys, *files, "--trainer.strategy.init_args.rollout_weights", how)
        assert f"rollout_weights = {how}" in out
        peaks.append(next(line for line in out.splitlines() if line.startswith("| rollout")))
    assert peaks[0] != peaks[1]


def test_it_costs_no_import_of_torch():
    words = ["plan", "--config", "ppo/default.yaml", "--hardware", "8xH100-80GB", "--model", "6b"]
    source = f"import sys\nfrom lit_instruct.cli import main\nmain({words})\n"
    source += "assert not {'torch', 'transformers', 'lightning', 'numpy'} & set(sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(CONFIGS.parent)}
    done = subprocess.run([sys.executable, "-c", source], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]


def test_help_and_a_missing_stage_say_what_there_is(capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    out = capsys.readouterr().out
    assert "--hardware" in out
    assert "plan --paper" in out
    with pytest.raises(SystemExit):
        main(["plam"])
    assert "Did you mean plan?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--config", "ppo/default.yaml"], "--hardware"),
        (["--hardware", "H100-80GB"], "--config"),
        (["--config", "ppo/default.yaml", "--hardware", "8xH99"], "H100-80GB"),
        (["--config", "ppo/default.yaml", "--hardware", "0xH100-80GB"], "8xDEVICE"),
        (["--config", "ppo/default.yaml", "--hardware", "H100-80GB"], "model.policy"),
        (["--config", "nowhere.yaml", "--hardware", "H100-80GB"], "no file 'nowhere.yaml'"),
        (["--config", "ppo/default.yaml", "--hardware", "H100-80GB", "--model", "x.ckpt"], "a shape"),
        (["--config", "ppo/default.yaml", "--hardware", "H100-80GB", "--model", "no/such-model"], "no folder here"),
        (["--config", "ppo/default.yaml", "--hardware", "H100-80GB", *MODEL, "--bogus", "3"], "'--bogus'"),
        (
            ["--config", "ppo/default.yaml", "--hardware", "H100-80GB", *MODEL, "--model.inner_epochs"],
            "without a value",
        ),
        (["--config", "ppo/default.yaml", "--hardware", "H100-80GB", *MODEL, "--model.inner_epochs", "x"], "a number"),
        (
            ["--config", "ppo/default.yaml", "--hardware", "H100-80GB", *MODEL, "--model.memory", "shared"],
            "shared_trunk",
        ),
        (
            ["--config", "ppo/default.yaml", "--hardware", "H100-80GB", *MODEL, "--model.memory", "shared_base"],
            "adapter.r",
        ),
        (
            ["--config", "ppo/default.yaml", "--hardware", "H100-80GB", *MODEL, "--model.quantization", "4bit"],
            "adapter.r",
        ),
        (
            ["--config", "ppo/default.yaml", "--hardware", "H100-80GB", *MODEL, "--prompt-tokens", "3000"],
            "at most 1024",
        ),
        (["--config", "ppo/default.yaml", "--hardware", "H100-80GB", "--model", json.dumps(LLAMA)], "context of 64"),
    ],
)
def test_a_mistake_is_told_in_a_sentence(capsys, monkeypatch, words, said):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    error = refused(capsys, *words)
    assert said in error
    assert "Traceback" not in error


def test_a_file_that_is_no_configuration_is_refused(capsys, tmp_path):
    for name, text in (("list.yaml", "- 1"), ("broken.yaml", "a: [")):
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert name in refused(capsys, "--config", str(tmp_path / name), "--hardware", "H100-80GB", "--stage", "ppo")


def test_shapes_come_from_folders_files_and_mappings(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    need = shape_of(LLAMA)
    assert shape_of(str(tmp_path)) == shape_of(str(tmp_path / "config.json")) == shape_of(json.dumps(LLAMA)) == need


@pytest.mark.parametrize(
    ("text", "nodes", "per_node"), [("H100-80GB", 1, 1), ("8xh100-80gb", 1, 8), ("4x8xRTX4090-24GB", 4, 8)]
)
def test_hardware_is_nodes_times_devices(text, nodes, per_node):
    found = parse_hardware(text)
    assert (found.nodes, found.per_node, found.devices) == (nodes, per_node, nodes * per_node)
    assert found.ring == (found.device.network if nodes > 1 else found.device.link)
    assert not found.on_cpu


def test_a_cpu_has_what_was_measured():
    found = parse_hardware("cpu:0.4,30,16")
    assert found.on_cpu
    assert (found.device.flops, found.device.bandwidth, found.usable) == (0.4e12, 30e9, 16 * 2**30)
