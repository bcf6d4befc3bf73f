"""The command line from end to end on a tiny model, and what a mistake is told."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_instruct import PPOModule, RewardModule, SFTModule
from lit_instruct.cli import main, resolve_configs, run_stage
from lit_instruct.models.backbone import load_language_model
from lit_instruct.models.scalar_head import ScalarModel
from tests.helpers.numbers import assert_close
from tests.helpers.tiny import (
    comparisons,
    demonstrations,
    prompts,
    save_model,
    save_stage,
    texts,
    weights,
    write_jsonl,
)

CONFIGS = Path(__file__).parents[2] / "configs"
SFT = ["sft", "fit", "--config", "sft/default.yaml", "--data.batch_size", "8", "--trainer.max_epochs", "1"]
RM = ["rm", "fit", "--config", "rm/default.yaml", "--data.batch_size", "8"]
PPO = ["ppo", "fit", "--config", "ppo/default.yaml", "--data.batch_size", "8", "--model.minibatch_size", "4"]
PPO_SIZES = ["--model.max_response_tokens", "5", "--model.episodes", "16"]
CPU = ["--trainer.accelerator", "cpu", "--trainer.devices", "1"]

Run = Callable[..., None]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like a user's: model, data, and nothing else."""
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "base")
    demonstrations(tmp_path / "d.jsonl", 24)
    comparisons(tmp_path / "c.jsonl", 24)
    prompts(tmp_path / "p.jsonl", 24)
    texts(tmp_path / "t.jsonl", 20)
    return tmp_path


def command(*parts: Any) -> None:
    main([str(part) for part in parts])


def checkpoint_in(printed: str) -> str:
    """The path of the last lines."""
    *_, line, following = printed.rstrip().splitlines()
    assert line.startswith("Checkpoint: ")
    assert following.startswith("Next: ")
    path = line.removeprefix("Checkpoint: ")
    assert Path(path).is_file()
    assert path in following
    return path


def test_sft_then_rm_then_ppo_ptx(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command(*SFT, *CPU, "--model.base", "base", "--data.demonstrations", "d.jsonl")
    printed = capsys.readouterr().out
    sft = checkpoint_in(printed)
    assert "lit-instruct rm fit --config rm/default.yaml --model.base" in printed
    command(*RM, *CPU, "--model.base", sft, "--data.comparisons", "c.jsonl", "--data.demonstrations", "d.jsonl")
    printed = capsys.readouterr().out
    rm = checkpoint_in(printed)
    assert "lit-instruct ppo fit --config ppo/default.yaml" in printed
    assert float(ScalarModel.from_base(rm).score_bias) != 0
    ptx = ["--config", "ppo/ptx.yaml", "--trainer.callbacks.text", "t.jsonl", "--trainer.callbacks.micro_batch_size", 4]
    models = ["--model.policy", sft, "--model.reward_model", rm, "--data.prompts", "p.jsonl"]
    command(*PPO, *ptx, *CPU, *models, *PPO_SIZES, "--model.learning_rate", 0.01)
    printed = capsys.readouterr().out
    ppo = checkpoint_in(printed)
    assert "sampling" in printed
    trained, averaged, start = load_language_model(ppo), load_language_model(ppo, ema=True), load_language_model(sft)
    assert not torch.equal(weights(trained), weights(start))
    assert not torch.equal(weights(trained), weights(averaged))
    assert f"lit-instruct export {ppo} FOLDER" in printed
    for model, more in ((trained, []), (averaged, ["--ema"])):
        command("export", ppo, "exported", *more)
        assert capsys.readouterr().out == "Exported: exported\n"
        assert torch.equal(weights(load_language_model("exported")), weights(model))
    saved = torch.load(ppo, weights_only=True)
    assert any("PtxMixing" in name for name in saved["callbacks"])
    assert saved["ppo"]["episodes_done"] == 16
    command(
        "ppo", *PPO[1:], *CPU, *models, "--model.max_response_tokens", 5, "--model.episodes", 32, "--ckpt_path", ppo
    )
    assert torch.load(checkpoint_in(capsys.readouterr().out), weights_only=True)["ppo"]["episodes_done"] == 32


def test_sft_is_chosen_by_score(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The recipe of PPO's initialisation with the overlay: what is printed is the best by score and not the last."""
    save_stage(SFTModule("base"), here / "sft.ckpt")
    save_stage(RewardModule("sft.ckpt"), here / "rm.ckpt")
    text = ["--trainer.callbacks.text", "t.jsonl", "--trainer.callbacks.micro_batch_size", 1]
    chosen = ["--trainer.callbacks.reward_model", "rm.ckpt", "--trainer.callbacks.max_response_tokens", 6]
    more = [*CPU, "--model.base", "base", "--data.demonstrations", "d.jsonl", "--data.val", 0.2, "--data.batch_size", 8]
    files = ["--config", "sft/ppo_init.yaml", *text, "--config", "sft/select_by_score.yaml", *chosen]
    command("sft", "fit", *files, *more, "--trainer.max_epochs", 3, "--model.learning_rate", 0.05)
    path = Path(checkpoint_in(capsys.readouterr().out))
    assert re.fullmatch(r"best-epoch=\d-step=\d\.ckpt", path.name)
    saved = torch.load(path, weights_only=True)
    (best,) = [state for name, state in saved["callbacks"].items() if "rm_score" in name]
    assert Path(best["best_model_path"]).resolve() == path.resolve()
    assert any("PtxMixing" in name for name in saved["callbacks"])
    assert Path("runs/ppo_init/last.ckpt").is_file()


def test_the_bars_can_be_switched_off(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Although the shipped file lists one among its callbacks."""
    save_stage(SFTModule("base"), here / "sft.ckpt")
    save_stage(RewardModule("sft.ckpt"), here / "rm.ckpt")
    models = ["--model.policy", "sft.ckpt", "--model.reward_model", "rm.ckpt", "--data.prompts", "p.jsonl"]
    command(*PPO, *CPU, *models, *PPO_SIZES, "--trainer.enable_progress_bar", "false")
    printed = capsys.readouterr().out
    checkpoint_in(printed)
    assert "sampling" not in printed


def test_pretraining_from_a_bare_configuration(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama = "{model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2}"
    command(
        *["pretrain", "fit", "--config", "pretrain/default.yaml", "--model.base", llama, "--model.tokenizer", "base"],
        *["--data.text", "t.jsonl", "--data.chunk_tokens", 16, "--data.batch_size", 4, *CPU],
        *["--model.warmup_steps", 1],
    )
    printed = capsys.readouterr().out
    assert "lit-instruct sft fit" in printed
    checkpoint_in(printed)


def test_validation_of_a_checkpoint(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model.base", "base", "--data.demonstrations", "d.jsonl", *CPU]
    command(*SFT, *arguments)
    path = checkpoint_in(capsys.readouterr().out)
    command("sft", "validate", *SFT[2:], *arguments, "--ckpt_path", path)
    assert "sft/val/loss" in capsys.readouterr().out


def test_a_test_of_every_stage(here: Path) -> None:
    """From the checkpoint as the model, or as --ckpt_path beside the model it came from: the same numbers."""
    demonstrations(here / "dt.jsonl", 9, seed=7)
    comparisons(here / "ct.jsonl", 9, seed=7)
    prompts(here / "pt.jsonl", 9, seed=7)
    texts(here / "tt.jsonl", 9, seed=7)
    sft = ["--data.demonstrations", "d.jsonl", "--data.test", "dt.jsonl"]
    rm = ["--data.comparisons", "c.jsonl", "--data.test", "ct.jsonl"]
    text = ["--data.text", "t.jsonl", "--data.test", "tt.jsonl", "--data.chunk_tokens", "16"]
    ppo = ["--data.prompts", "p.jsonl", "--data.test", "pt.jsonl", "--data.batch_size", "8", *PPO_SIZES]
    trained = {}
    for stage, base, data in (("pretrain", "base", text), ("sft", "base", sft), ("rm", "sft.ckpt", rm)):
        rate = ["--model.learning_rate", "0.01", *(["--model.warmup_steps", "1"] if stage == "pretrain" else [])]
        more = ["--config", f"{stage}/default.yaml", *CPU, *data, "--data.batch_size", "4", *rate]
        fitted = run_stage(stage, ["fit", *more, "--trainer.max_epochs", "1", "--model.base", base])
        trained[stage] = here / f"{stage}.ckpt"
        Path(fitted.trainer.checkpoint_callback.last_model_path).rename(trained[stage])
        prefix = "rm" if stage == "rm" else "sft"
        own, other, start = (
            run_stage(stage, ["test", *more, *model]).trainer.callback_metrics
            for model in (
                ["--model.base", str(trained[stage])],
                ["--model.base", base, "--ckpt_path", str(trained[stage])],
                ["--model.base", base],
            )
        )
        assert own.keys() == other.keys()
        assert all(name.startswith(f"{prefix}/test/") for name in own)
        assert_close([float(own[name]) for name in own], [float(other[name]) for name in own])
        name = {"rm": "log_loss", "sft": "loss"}[prefix]
        assert abs(float(own[f"{prefix}/test/{name}"]) - float(start[f"{prefix}/test/{name}"])) > 1e-3
    models = ["--model.policy", "sft.ckpt", "--model.reward_model", "rm.ckpt", "--model.learning_rate", "0.01"]
    more = [*PPO[2:], *CPU, *models, *ppo]
    fitted = run_stage("ppo", ["fit", *more])
    path = fitted.trainer.checkpoint_callback.last_model_path
    tested, start = (run_stage("ppo", ["test", *more, *ckpt]) for ckpt in (["--ckpt_path", path], []))
    metrics = tested.trainer.callback_metrics
    assert abs(float(start.trainer.callback_metrics["ppo/test/objective/kl"])) < 1e-4
    assert abs(float(metrics["ppo/test/objective/kl"])) > 1e-3
    assert float(metrics["step"]) == tested.model.iterations_done == 2


def test_ppo_saves_inside_epochs_and_at_its_end(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """23 prompts: two iterations an epoch; the run ends by its episodes inside the second one, off the interval."""
    save_stage(SFTModule("base"), here / "sft.ckpt")
    save_stage(RewardModule("sft.ckpt"), here / "rm.ckpt")
    models = ["--model.policy", "sft.ckpt", "--model.reward_model", "rm.ckpt", "--data.prompts", "p.jsonl"]
    run = [*PPO, *CPU, *models, "--model.max_response_tokens", 5, "--model.learning_rate", 0.01]
    every = ["--trainer.callbacks.every_n_train_steps", 2, "--trainer.callbacks.save_top_k", -1]  # each iteration
    for number, more in enumerate(([], ["--trainer.check_val_every_n_epoch", 3])):
        folder = here / f"run{number}"
        folder.mkdir()
        with contextlib.chdir(folder):
            for name in ("sft.ckpt", "rm.ckpt", "p.jsonl"):
                Path(name).symlink_to(here / name)
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)  # Lightning's page on manual optimization is not shown
                warnings.filterwarnings("ignore", message="(?!.*ModelCheckpoint with manual)")
                command(*run, "--model.episodes", 24, "--trainer.callbacks.every_n_train_steps", 4, *more)
            printed = checkpoint_in(capsys.readouterr().out)
            files = {path.name for path in Path("runs/ppo").glob("*.ckpt")}
            assert files == {"step=2.ckpt", "epoch=1-step=3.ckpt", "last.ckpt"}
            for path in (printed, "runs/ppo/last.ckpt"):
                saved = torch.load(path, weights_only=True)
                assert (saved["ppo"]["iterations_done"], saved["global_step"]) == (3, 6)
            assert torch.load("runs/ppo/step=2.ckpt", weights_only=True)["ppo"]["iterations_done"] == 2
    command(*run, *every, "--model.episodes", 40)
    whole = load_language_model(checkpoint_in(capsys.readouterr().out))
    (here / "runs/ppo").rename(here / "whole")
    for stop in (1, 3):  # inside the first and the second epoch
        command(*run, *every, "--model.episodes", 40, "--ckpt_path", f"whole/step={stop}.ckpt")
        resumed = load_language_model(checkpoint_in(capsys.readouterr().out))
        assert torch.equal(weights(resumed), weights(whole))


def test_out_is_where_all_of_a_run_is_written(
    here: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Two ModelCheckpoints and a logger with folders of their own; and it goes on from there."""
    save_stage(SFTModule("base"), here / "sft.ckpt")
    save_stage(RewardModule("sft.ckpt"), here / "rm.ckpt")
    models = ["--model.policy", "sft.ckpt", "--model.reward_model", "rm.ckpt", "--data.prompts", "p.jsonl"]
    logger = ["--trainer.logger", "lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir", "elsewhere"]
    run = [*PPO, *PPO_SIZES, *CPU, *models, *logger, "--trainer.callbacks.every_n_train_steps", 2]
    command(*run, "--auto_resume", "true", "--out", "mine")
    assert Path(checkpoint_in(capsys.readouterr().out)).parent == here / "mine"
    assert {"last.ckpt", "step=2.ckpt"} <= {path.name for path in (here / "mine").iterdir()}
    assert list((here / "mine").rglob("metrics.csv"))
    assert not (here / "elsewhere").exists()
    assert not (here / "runs").exists()
    command(*run, "--auto_resume", "true", "--out", "mine")
    assert "auto_resume: going on from mine/" in caplog.text


def test_help_comes_without_torch() -> None:
    script = """
import sys
from lit_instruct.cli import main
main(["--help"])
heavy = {"torch", "lightning", "transformers", "datasets", "jsonargparse", "numpy"}
print("heavy:", *sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert "usage: lit-instruct STAGE COMMAND" in done.stdout
    assert done.stdout.rstrip().endswith("heavy:")
    for stage in ("pretrain", "sft", "rm", "ppo", "export", "plan", "quickstart"):
        assert re.search(rf"^  {stage} ", done.stdout, flags=re.MULTILINE)


def test_help_and_version_in_process(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    assert "usage: lit-instruct" in capsys.readouterr().out
    main(["--version"])
    assert capsys.readouterr().out.startswith("lit-instruct 0")


def test_the_help_of_a_stage_tells_what_its_arguments_mean(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        command("ppo", "fit", "--help")
    assert exit_.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "usage: lit-instruct ppo" in printed
    for sentence in (
        "reward lost for one nat of KL to the reference",
        "Prompts per iteration, over all devices",
        "minibatch_size",
    ):
        assert sentence in printed


def test_configurations_of_the_user_come_before_shipped_ones(here: Path) -> None:
    assert resolve_configs(["fit", "-c", "sft/default.yaml"])[2] == str(CONFIGS / "sft/default.yaml") or Path(
        resolve_configs(["fit", "-c", "sft/default.yaml"])[2]
    ).samefile(CONFIGS / "sft/default.yaml")
    (here / "sft").mkdir()
    (here / "sft/default.yaml").write_text("model: {learning_rate: 0.125}\n")
    assert resolve_configs(["fit", "--config", "sft/default.yaml"]) == ["fit", "--config", "sft/default.yaml"]
    assert resolve_configs(["fit", "--config=sft/default.yaml"]) == ["fit", "--config=sft/default.yaml"]


def test_run_stage_is_the_command_line_for_programs(here: Path) -> None:
    arguments = [*SFT[1:], "--model.base", "base", "--data.demonstrations", "d.jsonl", *CPU]
    cli = run_stage("sft", [str(x) for x in arguments])
    assert isinstance(cli.model, SFTModule)
    assert cli.trainer.global_step == 2
    assert cli.datamodule.tokenizer.get_vocab() == cli.model.tokenizer.get_vocab()


@pytest.fixture
def refused(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run a command that must fail before training; gives what the user reads."""
    for module in (SFTModule, RewardModule, PPOModule):
        monkeypatch.setattr(module, "training_step", lambda *_: pytest.fail("training has started"))

    def run(*parts: Any) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            command(*parts)
        assert exit_.value.code == 2
        message = capsys.readouterr().err
        assert "error: " in message
        assert "Traceback" not in message
        assert not list(here.rglob("runs/**/*.ckpt"))
        return message[message.index("lit-instruct") :]

    return run


_SFT = [*SFT, *CPU, "--model.base", "base"]
_DATA = ["--data.demonstrations", "d.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            [*_SFT, *_DATA, "--model.learningrate", 1],
            ["--model.learningrate", "mean --model.learning_rate?", "lit-instruct sft fit --help"],
        ),
        ([*_SFT, *_DATA, "--model.learning_rate", "abc"], ["--model.learning_rate: got 'abc'; need a number"]),
        ([*SFT, *CPU, *_DATA], ["--model.base is missing"]),
        (_SFT, ["required", "data.demonstrations"]),
        ([*_SFT, *_DATA, "--data.tokenizer", "base"], ["--data.tokenizer cannot be set", "--model.tokenizer"]),
        ([*_SFT, *_DATA, "--model.base", "{model_type: llama}"], ["error: tokenizer: got none", "name one"]),
        (
            ["sfft", "fit"],
            [
                "'sfft'",
                "pretrain, sft, rm, ppo, data, agreement, evaluate, export, label, labels, plan, quickstart",
                ", report, round, sample.",
                "Did you mean sft?",
            ],
        ),
        (["export", "no.ckpt", "out"], ["export: checkpoint 'no.ckpt' does not exist"]),
        (["export", "no.ckpt"], ["export: the following arguments are required: out", "lit-instruct export --help"]),
        (["export", "no.ckpt", "out", "--dtype", "int8"], ["export: ", "'float32', 'bfloat16'", "int8"]),
        (["sft", "train"], ["need a command: fit, validate", "lit-instruct sft fit --help"]),
        (["sft", "fit", "--config", "sft/defualt.yaml"], ["'sft/defualt.yaml'", "sft/default.yaml"]),
        ([*_SFT, "--data.demonstrations", "dd.jsonl"], ["dd.jsonl: no such file", "did you mean d.jsonl"]),
        ([*_SFT, *_DATA, "--data.batch_size", 100], ["batch_size", "100", "lower batch_size"]),
        ([*_SFT, *_DATA, "--model.base", "elsewhere"], ["'elsewhere'", "checkpoint of an earlier stage"]),
        (["sft", "test", *_SFT[2:], *_DATA], ["got no test data", "Do: set data.test (--data.test FILE)"]),
        (
            [*_SFT, *_DATA, "--model.base", "{model_type: llama, hiden_size: 3}", "--model.tokenizer", "base"],
            ["'hiden_size'", "did you mean hidden_size?"],
        ),
        ([*_SFT, *_DATA, "--model.template", "no.jinja"], ["template: got 'no.jinja'", "auto, plain, verbatim"]),
        ([*_SFT, *_DATA, "--ckpt_path", "best"], ["ckpt_path: got 'best'; need a path", "Do: give the file"]),
        ([*_SFT, *_DATA, "--seed_everything", -1], ["seed_everything: got -1; need at least 0", "Do: change it"]),
        (["sft", "validate", *_SFT[2:], *_DATA, "--data.val", 0], ["data.val: got 0", "Do: give a fraction"]),
        (
            ["quickstart", "--out", "d.jsonl"],
            ["got 'd.jsonl', which cannot be made or is no folder", "Do: "],
        ),
        ([*_SFT, *_DATA, "--ckpt_path", "no.ckpt"], ["checkpoint 'no.ckpt' does not exist"]),
        ([*_SFT, *_DATA, "--model.warmup_steps", 50], ["warmup_steps: got 50 for a run of 2", "Lower it"]),
        ([*_SFT, *_DATA, "--trainer.max_epochs", -1], ["max_epochs -1", "set max_epochs or max_steps"]),
        ([*_SFT, *_DATA, "--trainer.callbacks+=lit_instruct.callbacks.SampleTable"], ["need a PPOModule", "Remove it"]),
        ([*_SFT, *_DATA, "--trainer.callbacks+=lit_instruct.callbacks.Nope"], ["lit_instruct.callbacks.Nope"]),
    ],
)
def test_a_mistake_is_told_in_a_line(refused: Callable[..., str], arguments: list[Any], expected: list[str]) -> None:
    message = refused(*arguments)
    for part in expected:
        assert part in message


def test_a_wrong_key_in_a_file(refused: Callable[..., str], here: Path) -> None:
    (here / "mine.yaml").write_text("model: {learningrate: 0.1}\n")
    message = refused(*_SFT, *_DATA, "--config", "mine.yaml")
    assert "there is no option --model.learningrate. Do: did you mean --model.learning_rate?" in message
    (here / "mine.yaml").write_text("model: [\n")
    assert "line 2" in refused(*_SFT, *_DATA, "--config", "mine.yaml")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "w1", "response": ""}, ["bad.jsonl:1", "field 'response'", "empty"]),
        ({"prompt": "w1 " * 40, "response": "w2"}, ["bad.jsonl:1", "limit 32", "43 tokens", "truncate_left"]),
        ({"prompt": "w1"}, ["bad.jsonl:1", '{"prompt", "response"}']),
    ],
    ids=["empty", "long", "no response"],
)
def test_bad_demonstrations(refused: Callable[..., str], here: Path, row: dict[str, str], expected: list[str]) -> None:
    write_jsonl(here / "bad.jsonl", [row] * 9)
    message = refused(*_SFT, "--data.demonstrations", "bad.jsonl")
    for part in [*expected, "Do: "]:
        assert part in message


def test_five_responses_and_four_ranks(refused: Callable[..., str], here: Path) -> None:
    row = {"prompt": "w1", "responses": ["w1"] * 5, "ranks": [1, 2, 3, 4]}
    write_jsonl(here / "bad.jsonl", [row])
    message = refused(*RM, *CPU, "--model.base", "base", "--data.comparisons", "bad.jsonl")
    for part in ("bad.jsonl:1", "field 'ranks'", "4 ranks for 5 responses", "one rank per response", "Do: "):
        assert part in message


class TestPPO:
    """Mistakes of the third stage; its two checkpoints are made by hand."""

    @pytest.fixture
    def ppo(self, refused: Callable[..., str], here: Path) -> Callable[..., str]:
        save_stage(SFTModule("base"), here / "sft.ckpt")
        save_stage(RewardModule("sft.ckpt"), here / "rm.ckpt")
        (here / "cut.ckpt").write_bytes((here / "sft.ckpt").read_bytes()[:2000])
        models = ["--model.policy", "sft.ckpt", "--model.reward_model", "rm.ckpt", "--data.prompts", "p.jsonl"]
        return lambda *more: refused(*PPO, *CPU, *models, *PPO_SIZES, *more)

    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            (["--model.policy", "rm.ckpt"], ["'rm.ckpt' is a reward model", "SFT or PPO checkpoint"]),
            (["--model.reward_model", "sft.ckpt"], ["reward_model", "stage 'sft'", "lit-instruct rm fit"]),
            (["--model.reward_model", "base"], ["reward_model: got 'base'", "lit-instruct rm fit"]),
            (["--model.policy", "no.ckpt"], ["'no.ckpt' does not exist"]),
            (["--model.minibatch_size", 3], ["minibatch_size: got 3 for 8 prompts", "data.batch_size"]),
            (["--model.max_response_tokens", 1024], ["max_response_tokens: got 1024", "32 tokens", "lower it"]),
            (["--model.max_response_tokens", 28], ["limit 4", "long_prompt"]),
            (["--model.missing_eos", "punish"], ["missing_eos: got 'punish'", "none, replace, subtract"]),
            (["--ckpt_path", "sft.ckpt"], ["ckpt_path: 'sft.ckpt' comes from the stage 'sft'", "--model.policy"]),
            (["--ckpt_path", "cut.ckpt"], ["checkpoint 'cut.ckpt' cannot be read", "cut off"]),
            (["--config", "ppo/ptx.yaml"], ["pretraining.jsonl: no such file"]),
            (["--trainer.gradient_clip_val", 1], ["gradient clipping is not supported"]),
        ],
    )
    def test_a_mistake_is_told_in_a_line(
        self, ppo: Callable[..., str], arguments: list[Any], expected: list[str]
    ) -> None:
        message = ppo(*arguments)
        for part in expected:
            assert part in message

    def test_a_prompt_that_is_too_long(self, ppo: Callable[..., str], here: Path) -> None:
        write_jsonl(here / "long.jsonl", [{"prompt": "w1"}] * 8 + [{"prompt": "w1 " * 30}])
        message = ppo("--data.prompts", "long.jsonl")
        for part in ("1 of 9 samples", "long.jsonl:9", "got 31 tokens; limit 27", "Do: "):
            assert part in message

    def test_text_chunks_that_do_not_divide(self, ppo: Callable[..., str]) -> None:
        text = ["--config", "ppo/ptx.yaml", "--trainer.callbacks.text", "t.jsonl"]  # 8 x 4 rows = 32 chunks
        message = ppo(*text, "--trainer.callbacks.micro_batch_size", 5)
        assert "Change ratio or micro_batch_size" in message


def test_a_callback_that_is_given_again_replaces_the_shipped_one(here: Path) -> None:
    """Lightning takes one stateful callback of a kind; in an overlay the later one must win."""
    save_stage(SFTModule("base"), here / "sft.ckpt")
    save_stage(RewardModule("sft.ckpt"), here / "rm.ckpt")
    (here / "over.yaml").write_text(
        "trainer:\n  callbacks+:\n"
        "    - {class_path: lit_instruct.callbacks.Health, init_args: {action: stop, ignore: [few_prompts]}}\n"
        "    - {class_path: lit_instruct.callbacks.KLMonitor, init_args: {target: 0.5}}\n"
    )
    models = ["--model.policy", "sft.ckpt", "--model.reward_model", "rm.ckpt", "--data.prompts", "p.jsonl"]
    arguments = [*PPO[1:], "--config", "over.yaml", *CPU, *models, *PPO_SIZES]
    callbacks = run_stage("ppo", [str(argument) for argument in arguments]).trainer.callbacks
    (health,) = (callback for callback in callbacks if type(callback).__name__ == "Health")
    (monitor,) = (callback for callback in callbacks if type(callback).__name__ == "KLMonitor")
    assert (health.action, health.ignore, monitor.target) == ("stop", {"few_prompts"}, 0.5)
    assert sum(type(callback).__name__ == "ModelCheckpoint" for callback in callbacks) == 2  # Lightning's stay


def test_one_callback_may_stand_without_a_list(here: Path) -> None:
    """As Lightning's own argument allows."""
    (here / "mine.yaml").write_text("trainer:\n  callbacks: {class_path: lit_instruct.callbacks.WeightEMA}\n")
    arguments = [*_SFT[1:], "--config", "mine.yaml", *_DATA, *CPU, "--trainer.max_epochs", 1]
    callbacks = run_stage("sft", [str(argument) for argument in arguments]).trainer.callbacks
    assert sum(type(callback).__name__ == "WeightEMA" for callback in callbacks) == 1


def test_an_option_of_no_callback_says_where_it_belongs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command("ppo", "fit", "--config", "ppo/default.yaml", "--trainer.callbacks.text", "t.jsonl")
    printed = capsys.readouterr().err
    assert "Option 'text' is not accepted: --trainer.callbacks.text reaches the last callback named so far" in printed
