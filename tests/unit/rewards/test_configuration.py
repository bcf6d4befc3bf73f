"""Rewards named on the command line and in YAML, and PPO that runs on them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

from lit_instruct import PPOModule
from lit_instruct.cli import main, run_stage
from lit_instruct.rewards import FunctionScorer, HttpScorer, RewardModelScorer, Scorer, WeightedSum
from tests.helpers.tiny import prompts, write_jsonl
from tests.unit.rewards.test_http import Server, server  # noqa: F401  (a fixture)

SOURCE = """
def words(prompts, responses, key):
    with open("seen.txt", "a") as file:
        for prompt, response, number in zip(prompts, responses, key):
            print(prompt, "|", number, "|", len(response.split()), file=file)
    return [float(len(response.split())) for response in responses]
"""
SUM = """
class_path: lit_instruct.rewards.WeightedSum
init_args:
  weights: [1.0, -0.5]
  scorers:
    - class_path: lit_instruct.rewards.FunctionScorer
      init_args: {function: "pay.py:words"}
    - class_path: lit_instruct.rewards.WeightedSum
      init_args:
        weights: [2]
        scorers:
          - class_path: lit_instruct.rewards.RewardModelScorer
            init_args: {model: CHECKPOINT, batch_rows: 3}
"""


@pytest.fixture
def here(folder: Path) -> Path:
    """A file of reward functions, and prompts with a column, in the current folder."""
    (folder / "pay.py").write_text(SOURCE)
    write_jsonl(folder / "p.jsonl", [{"prompt": f"w{row}", "key": row} for row in range(16)])
    return folder


def reward_parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--reward", type=Scorer | None)
    return parser


def parsed(*arguments: str) -> Any:
    parser = reward_parser()
    return parser.instantiate_classes(parser.parse_args(list(arguments))).reward


def test_a_function_on_the_command_line(here: Path) -> None:
    made = parsed("--reward", "lit_instruct.rewards.FunctionScorer", "--reward.function", "pay.py:words")
    assert isinstance(made, FunctionScorer)
    assert made.function.__name__ == "words"


def test_a_short_name_is_enough(here: Path) -> None:
    assert isinstance(parsed("--reward", "FunctionScorer", "--reward.function", "pay.py:words"), FunctionScorer)


def test_a_server_in_yaml(here: Path) -> None:
    (here / "c.yaml").write_text(
        "reward: {class_path: lit_instruct.rewards.HttpScorer, init_args: {url: 'http://127.0.0.1:9', columns: [key]}}"
    )
    made = parsed("--config", "c.yaml", "--reward.timeout", "3")
    assert isinstance(made, HttpScorer)
    assert (made.url, made.columns, made.timeout) == ("http://127.0.0.1:9", ["key"], 3.0)


def test_nested_sums_in_yaml(here: Path, rm_ckpt: str) -> None:
    (here / "c.yaml").write_text(yaml.safe_dump({"reward": yaml.safe_load(SUM.replace("CHECKPOINT", rm_ckpt))}))
    made = parsed("--config", "c.yaml")
    assert isinstance(made, WeightedSum)
    function, inner = made.scorers
    assert isinstance(function, FunctionScorer)
    assert isinstance(inner, WeightedSum)
    assert isinstance(inner.scorers[0], RewardModelScorer)
    assert (made.weights, inner.weights, inner.scorers[0].batch_rows) == ([1.0, -0.5], [2], 3)


def test_the_examples_of_the_page_are_what_the_classes_take() -> None:
    page = (Path(__file__).parents[3] / "docs" / "rewards.md").read_text(encoding="utf-8")
    examples = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    assert len(examples) == 3
    for example in examples:
        reward = yaml.safe_load(example)["model"]["reward"]
        found = reward_parser().parse_args(["--reward", json.dumps(reward)]).reward
        assert found.class_path == reward["class_path"]
        assert set(reward["init_args"]) <= set(found.init_args.as_dict())
        assert f"`{found.class_path}`" in page


def ppo(sft_ckpt: str, *reward: str) -> list[str]:
    return [
        *["fit", "--config", "ppo/default.yaml", "--data.batch_size", "8", "--data.val", "0", "--model.episodes", "16"],
        *["--model.minibatch_size", "4", "--model.max_response_tokens", "5", "--model.missing_eos", "none"],
        *["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.enable_progress_bar", "false"],
        *["--model.policy", sft_ckpt, "--data.prompts", "p.jsonl", *reward],
    ]


def test_ppo_with_a_function(here: Path, sft_ckpt: str, recwarn: pytest.WarningsRecorder) -> None:
    reward = ["--model.reward", "lit_instruct.rewards.FunctionScorer", "--model.reward.function", "pay.py:words"]
    cli = run_stage("ppo", ppo(sft_ckpt, *reward))
    assert cli.model.iterations_done == 2
    seen = [line.split(" | ") for line in (here / "seen.txt").read_text().splitlines()]
    assert len(seen) == 16
    assert all(prompt == f"w{number}" for prompt, number, _ in seen)
    assert len({length for _, _, length in seen}) > 1
    saved = torch.load(here / "runs" / "ppo" / "last.ckpt", weights_only=True)
    assert saved["ppo"]["episodes_done"] == 16
    assert not [warning for warning in recwarn if "infer the `batch_size`" in str(warning.message)]  # rows in the batch


def test_ppo_with_a_sum_of_a_function_and_a_reward_model(here: Path, sft_ckpt: str, rm_ckpt: str) -> None:
    (here / "r.yaml").write_text(
        yaml.safe_dump({"model": {"reward": yaml.safe_load(SUM.replace("CHECKPOINT", rm_ckpt))}})
    )
    module = run_stage("ppo", ppo(sft_ckpt, "--config", "r.yaml")).model
    assert isinstance(module, PPOModule)
    saved = torch.load(here / "runs" / "ppo" / "last.ckpt", weights_only=True)
    assert not [name for name in saved["state_dict"] if name.startswith("scorer")]
    assert any(name.startswith("scorer.scorers.1.scorers.0.model.trunk") for name in module.state_dict())
    more = ["--model.episodes", "24", "--ckpt_path", str(here / "runs" / "ppo" / "last.ckpt")]
    assert run_stage("ppo", [*ppo(sft_ckpt, "--config", "r.yaml"), *more]).model.iterations_done == 3


def test_ppo_with_a_server(here: Path, sft_ckpt: str, server: Server) -> None:  # noqa: F811
    reward = ["--model.reward", "lit_instruct.rewards.HttpScorer", "--model.reward.url", server.url]
    run_stage("ppo", ppo(sft_ckpt, *reward))
    probe, *asked = server.bodies
    assert probe["prompts"] == []
    assert [len(body["responses"]) for body in asked] == [8, 8]
    assert sorted(number for body in asked for number in body["columns"]["key"]) == list(range(16))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["FunctionScorer", "--model.reward.function", "pay.py:play"], "has no 'play'; functions there: words"),
        (
            ["HttpScorer", "--model.reward.url", "http://127.0.0.1:9", "--model.reward.retries", "0"],
            "got no answer in 1",
        ),
        (["ClassifierScorer", "--model.reward.model", "./nothing_here"], "no sequence classifier"),
    ],
)
def test_what_cannot_work_is_said_in_a_line_before_training(
    here: Path, sft_ckpt: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *settings = arguments
    with pytest.raises(SystemExit):
        main(["ppo", *ppo(sft_ckpt, "--model.reward", f"lit_instruct.rewards.{name}", *settings)])
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert "Union" not in error


def test_a_missing_column_ends_the_run_with_its_name(
    here: Path, sft_ckpt: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PPOModule, "training_step", lambda *_: pytest.fail("sampled"))
    prompts(here / "p.jsonl", 16)
    reward = ["--model.reward", "lit_instruct.rewards.FunctionScorer", "--model.reward.function", "pay.py:words"]
    with pytest.raises(SystemExit):
        main(["ppo", *ppo(sft_ckpt, *reward)])
    assert "reward function pay.py:words: needs 'key', and the data have no such column" in capsys.readouterr().err
    assert json.loads((here / "p.jsonl").read_text().splitlines()[0]).keys() == {"prompt"}
