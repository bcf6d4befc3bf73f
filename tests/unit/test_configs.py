"""Every shipped configuration against the signatures that read it, by the real parser; no model is loaded.

An overlay is parsed after the file that it belongs to.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lit_instruct.cli import main
from lit_instruct.modules.optimizers import paper_adam

CONFIGS = Path(__file__).parents[2] / "configs"

# What a stage cannot do without; the shipped files leave it to the user.
_NEEDED = {
    "pretrain": ["--model.base", "x", "--data.text", "x"],
    "sft": ["--model.base", "x", "--data.demonstrations", "x"],
    "rm": ["--model.base", "x", "--data.comparisons", "x"],
    "ppo": ["--model.policy", "x", "--model.reward_model", "x", "--data.prompts", "x"],
}
# Files whose folder does not name their stage, by the first part of their name.
_STAGE_OF = {"base": "pretrain", "sft": "sft", "ppo_init": "sft", "rm": "rm", "ppo": "ppo", "ppo_ptx": "ppo"}
_UNDER = {
    "ppo/ptx.yaml": "ppo/default.yaml",
    "sft/select_by_score.yaml": "sft/default.yaml",
    "paper/sft_175b.yaml": "paper/sft.yaml",
    "paper/ppo_init_6b.yaml": "paper/ppo_init.yaml",
    "paper/ppo_init_175b.yaml": "paper/ppo_init.yaml",
    "paper/ppo_ptx_175b.yaml": "paper/ppo_ptx.yaml",
}
_WHOLE = "quickstart"  # needs nothing from the user


def shipped() -> list[str]:
    return sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))


def stage_of(name: str) -> str:
    folder, stem = name.removesuffix(".yaml").split("/")
    for size in ("_6b", "_175b"):
        stem = stem.removesuffix(size)
    stage = folder if folder in _NEEDED else _STAGE_OF.get(stem)
    assert stage is not None, f"{name}: whose configuration is it? Say so in the tables of this test."
    return stage


def parse(*names: str, capsys: pytest.CaptureFixture[str], last: Path | None = None) -> dict[str, Any]:
    """What the command line makes of these files, one after the other; ``last`` in place of the last one."""
    stage = stage_of(names[0])
    files = [str(CONFIGS / name) for name in names[:-1]] + [str(last or CONFIGS / names[-1])]
    needed = [] if names[0].startswith(_WHOLE) else _NEEDED[stage]
    with pytest.raises(SystemExit) as exit_:
        main([stage, "fit", *(part for file in files for part in ("--config", file)), *needed, "--print_config"])
    captured = capsys.readouterr()
    assert exit_.value.code == 0, captured.err
    return yaml.safe_load(captured.out)


def chain(name: str) -> list[str]:
    return [_UNDER[name], name] if name in _UNDER else [name]


def callbacks(config: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [
        entry["init_args"] for entry in config["trainer"]["callbacks"] if entry["class_path"].rpartition(".")[2] == kind
    ]


@pytest.mark.parametrize("name", [name for name in shipped() if not name.startswith("strategy/")])
def test_every_key_arrives_where_it_is_read(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert_arrives(parse(*chain(name), capsys=capsys), name)


@pytest.mark.parametrize("name", [name for name in shipped() if name.startswith("strategy/")])
@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_a_strategy_fits_every_stage(name: str, stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert_arrives(parse(f"{stage}/default.yaml", name, capsys=capsys), name)
    heading = (CONFIGS / name).read_text().partition("\ntrainer:")[0]
    assert f"--config {name}" in heading
    assert all(line.startswith("#") for line in heading.splitlines())


def assert_arrives(config: dict[str, Any], name: str) -> None:
    """All that a file says stands in what was parsed."""
    written = yaml.safe_load((CONFIGS / name).read_text())
    assert written, "an empty file"
    for key, value in written.items():
        if not isinstance(value, dict):
            assert config[key] == value
    for section in ("model", "data", "trainer"):
        for key, value in written.get(section, {}).items():
            if key not in ("callbacks", "callbacks+", "logger"):
                found = config[section][key]
                if key == "strategy" and isinstance(value, dict):  # with the defaults of what was left out
                    assert found["init_args"].items() >= value["init_args"].items()
                    found = {**found, "init_args": value["init_args"]}
                assert found == value
    trainer = written.get("trainer", {})
    for callback in trainer.get("callbacks", trainer.get("callbacks+", [])):
        kind = callback["class_path"].rpartition(".")[2]
        asked = callback.get("init_args", {}).items()
        assert any(given.items() >= asked for given in callbacks(config, kind)), f"{kind} {dict(asked)}"


@pytest.mark.parametrize("name", [name for name in shipped() if name in _UNDER])
def test_an_overlay_says_what_it_belongs_to(name: str) -> None:
    heading = (CONFIGS / name).read_text().partition("\n\n")[0]
    assert _UNDER[name] in heading


@pytest.mark.parametrize("section", ["model", "data", "trainer", "callback", "top"])
@pytest.mark.parametrize(
    "name", ["paper/ppo_ptx.yaml", "paper/sft_175b.yaml", "sft/select_by_score.yaml", "rm/default.yaml"]
)
def test_a_key_that_nothing_reads_is_noticed(
    name: str, section: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = yaml.safe_load((CONFIGS / name).read_text())
    if section == "callback":
        (key,) = {"callbacks", "callbacks+"} & written.get("trainer", {"callbacks": None}).keys()
        written.setdefault("trainer", {}).setdefault(key, None)
        written["trainer"][key] = [
            *(written["trainer"][key] or []),
            {"class_path": "lit_instruct.callbacks.WeightEMA", "init_args": {"nobody_reads_this": 1}},
        ]
    else:
        place = written if section == "top" else written.setdefault(section, {})
        place["nobody_reads_this"] = 1
    path = tmp_path / "planted.yaml"
    path.write_text(yaml.safe_dump(written))
    with pytest.raises(AssertionError, match="nobody_reads_this"):
        parse(*chain(name), capsys=capsys, last=path)


@pytest.mark.parametrize(
    ("old", "new"), [("kl_coef", "kl_coeff"), ("decay", "dekay"), ("batch_size: 512", "batch_size: many")]
)
def test_a_misspelt_key_or_a_wrong_type_is_noticed(
    old: str, new: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "default.yaml"
    path.write_text((CONFIGS / "ppo/default.yaml").read_text().replace(old, new))
    with pytest.raises(AssertionError, match=new.partition(":")[0]):
        parse("ppo/default.yaml", capsys=capsys, last=path)


# -- the paper's numbers, typed from the paper (Ouyang et al. 2022, C.1 to C.4), not from the files

_SFT = {
    "1.3b": (["paper/sft.yaml"], 9.65e-6, 32),
    "6b": (["paper/sft.yaml"], 9.65e-6, 32),
    "175b": (["paper/sft.yaml", "paper/sft_175b.yaml"], 5.03e-6, 8),
}
_PPO_INIT = {
    "1.3b": (["paper/ppo_init.yaml"], 5e-6, 32),
    "6b": (["paper/ppo_init.yaml", "paper/ppo_init_6b.yaml"], 1.04e-5, 32),
    "175b": (["paper/ppo_init.yaml", "paper/ppo_init_175b.yaml"], 2.45e-6, 8),
}
_PPO = {
    "1.3b": (["paper/ppo_ptx.yaml"], 9e-6),
    "6b": (["paper/ppo_ptx.yaml"], 9e-6),
    "175b": (["paper/ppo_ptx.yaml", "paper/ppo_ptx_175b.yaml"], 5e-6),
}


def has(config: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        section, _, key = name.partition(".")
        assert config[section][key] == value, f"{name}: got {config[section][key]}"
    assert "paper_adam" in str(config["model"]["optimizer"])


@pytest.mark.parametrize("size", _SFT)
def test_the_paper_s_sft(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    files, rate, batch = _SFT[size]
    config = parse(*files, capsys=capsys)
    has(
        config,
        {
            "trainer.max_epochs": 16,
            "model.learning_rate": rate,
            "model.final_lr_ratio": 0.1,
            "model.warmup_steps": 0,
            "model.residual_dropout": 0.2,
            "data.batch_size": batch,
            "data.max_length": 2048,
        },
    )
    if batch == 32:  # the default recipe is this one, too
        recipe = parse("sft/default.yaml", capsys=capsys)
        for key in ("learning_rate", "final_lr_ratio", "warmup_steps", "residual_dropout", "optimizer"):
            assert recipe["model"][key] == config["model"][key]
        assert (recipe["trainer"]["max_epochs"], recipe["data"]["batch_size"]) == (16, 32)


@pytest.mark.parametrize("size", _PPO_INIT)
def test_the_paper_s_ppo_initialisation(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    files, rate, batch = _PPO_INIT[size]
    config = parse(*files, capsys=capsys)
    expected = {"trainer.max_epochs": 2, "model.learning_rate": rate, "model.final_lr_ratio": 0.1}
    has(config, expected | {"model.residual_dropout": 0.2, "data.batch_size": batch})
    recipe = parse("sft/ppo_init.yaml", capsys=capsys)
    has(recipe, {"trainer.max_epochs": 2, "model.learning_rate": 5e-6, "model.residual_dropout": 0.2})
    for found, rows in ((config, batch), (recipe, 32)):
        (mixing,) = callbacks(found, "PtxMixing")
        assert (mixing["mode"], mixing["coef"]) == ("fraction", 0.1)
        chunks = round(mixing["ratio"] * rows)
        assert abs(chunks / (chunks + rows) - 0.1) < 0.02
        assert chunks % mixing["micro_batch_size"] == 0


def test_the_paper_s_reward_model(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("paper/rm.yaml", "rm/default.yaml"):
        config = parse(name, capsys=capsys)
        expected = {"trainer.max_epochs": 1, "model.learning_rate": 9e-6, "model.final_lr_ratio": 0.1}
        has(config, expected | {"data.batch_size": 64, "model.normalize": "retained"})


@pytest.mark.parametrize("size", [*_PPO, "default"])
def test_the_paper_s_ppo_ptx(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    files, value_rate = _PPO.get(size, (["ppo/default.yaml", "ppo/ptx.yaml"], 9e-6))
    config = parse(*files, capsys=capsys)
    expected = {
        "episodes": 256_000,
        "minibatch_size": 64,
        "inner_epochs": 1,
        "max_response_tokens": 1024,
        "temperature": 1.0,
        "kl_coef": 0.02,
        "discount": 1.0,
        "gae_lambda": 0.95,
        "clip_range": 0.2,
        "value_clip_range": 0.2,
        "whiten_advantages": True,
        "whiten_rewards": False,
        "missing_eos": "replace",
        "missing_eos_value": -1.0,
        "warmup_iterations": 10,
        "value_learning_rate": value_rate,
        "max_grad_norm": 1.0,
    }
    has(config, {f"model.{name}": value for name, value in expected.items()} | {"data.batch_size": 512})
    assert config["data"]["max_prompt_tokens"] == 1024
    rate = config["model"]["learning_rate"]
    assert rate in ((2.55e-6, 3.74e-6) if size == "175b" else (5e-6,))  # not printed: our choice among what was tried
    (mixing,) = callbacks(config, "PtxMixing")
    assert (mixing["coef"], mixing["ratio"], mixing["mode"]) == (27.8, 8, "add")
    (average,) = callbacks(config, "WeightEMA")
    assert (average["decay"], average["unit"]) == (0.992, "step")
    updates = config["data"]["batch_size"] // config["model"]["minibatch_size"]
    assert updates * config["model"]["episodes"] // config["data"]["batch_size"] == 4000
    (interval,) = filter(None, (entry["every_n_train_steps"] for entry in callbacks(config, "ModelCheckpoint")))
    assert interval % updates == 0  # at whole iterations


def test_the_paper_s_optimizer() -> None:
    (group,) = paper_adam([torch.nn.Parameter(torch.zeros(1))]).param_groups
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.95), 1e-8, 0.0)


@pytest.mark.parametrize("recipe", ["sft/default.yaml", "sft/ppo_init.yaml", "paper/sft.yaml", "paper/ppo_init.yaml"])
def test_selection_by_score_goes_over_every_recipe(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = parse(recipe, capsys=capsys), parse(recipe, "sft/select_by_score.yaml", capsys=capsys)
    (chosen,) = [entry for entry in callbacks(after, "ModelCheckpoint") if entry["monitor"]]
    assert (chosen["monitor"], chosen["mode"]) == ("sft/val/rm_score", "max")
    (selection,) = callbacks(after, "RewardScoreSelection")
    assert selection["temperature"] == 1.0
    assert after["trainer"]["callbacks"][: len(before["trainer"]["callbacks"])] == before["trainer"]["callbacks"]
    assert after["model"] == before["model"]


def test_quickstart_ppo_differs_from_ppo_ptx_in_the_callback_alone() -> None:
    plain, mixed = (yaml.safe_load((CONFIGS / f"quickstart/{name}.yaml").read_text()) for name in ("ppo", "ppo_ptx"))
    kept = [entry for entry in mixed["trainer"]["callbacks"] if not entry["class_path"].endswith("PtxMixing")]
    assert len(kept) == len(mixed["trainer"]["callbacks"]) - 1
    mixed["trainer"]["callbacks"] = kept
    assert yaml.safe_load(yaml.safe_dump(mixed).replace("ppo_ptx", "ppo")) == plain
