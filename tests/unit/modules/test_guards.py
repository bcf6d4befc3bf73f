"""The tokenizer of a stage against that of the stage before, and of a run against that of its checkpoint."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from lit_instruct import PPOModule, RewardModule, SFTModule
from lit_instruct.types import ConfigError
from tests.helpers.tiny import TEMPLATE, WORDS, quiet_trainer, save_model, save_stage, save_tokenizer, tiny_tokenizer


@pytest.fixture
def other(folder: Path) -> str:
    """As many tokens, one of them another."""
    path = Path(save_tokenizer(folder / "other")) / "tokenizer.json"
    path.write_text(path.read_text().replace('"w1"', '"x1"'))
    return "other"


def test_a_stage_keeps_the_tokens_of_the_one_before(sft_ckpt: str, other: str) -> None:
    with pytest.raises(
        ConfigError, match=r"tokenizer: got 'other', whose tokens are not those of .* Do: leave tokenizer out"
    ):
        RewardModule(sft_ckpt, tokenizer=other)


def test_another_template_than_before_is_said_aloud(sft_ckpt: str, base: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        RewardModule(sft_ckpt)
        RewardModule(base, template="plain")  # of no stage: nothing was learnt in other words
    assert "template" not in caplog.text
    with caplog.at_level(logging.WARNING):
        assert RewardModule(sft_ckpt, template="plain").tokenizer.chat_template != TEMPLATE
    assert "was trained with another template than this run has (plain)" in caplog.text


def test_a_model_must_know_every_token(base: str, folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["one more"])
    tokenizer.save_pretrained(folder / "larger")
    for module in (SFTModule, RewardModule):
        with pytest.raises(ConfigError, match=r"base: got a model with embeddings for 34 tokens .* ids go up to 34"):
            module(base, tokenizer="larger")


def test_the_policy_of_ppo_must_know_every_token(base: str, rm_ckpt: str, folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["one more"])
    tokenizer.save_pretrained(folder / "larger")
    with pytest.raises(ConfigError, match=r"policy: got a model with embeddings for 34 tokens .* ids go up to 34"):
        PPOModule(base, reward_model=rm_ckpt, tokenizer="larger", max_response_tokens=5)


@pytest.mark.parametrize("more_words", ["checkpoint", "run"])
def test_a_run_goes_on_with_no_word_more_or_less(base: str, folder: Path, more_words: str) -> None:
    """Whichever of the two has it, and were it the padding token, which a reward model may have for itself."""
    larger, smaller = (tiny_tokenizer() for _ in range(2))
    larger.pad_token = WORDS[-1]
    larger.save_pretrained(folder / "larger")
    smaller.save_pretrained(folder / "smaller")
    path = folder / "smaller/tokenizer.json"
    content = json.loads(path.read_text())
    del content["model"]["vocab"][WORDS[-1]]
    path.write_text(json.dumps(content))
    then, now = ("smaller", "larger") if more_words == "run" else ("larger", "smaller")
    save_stage(SFTModule(base, tokenizer=then), folder / "run.ckpt")
    module = SFTModule(base, tokenizer=now)
    with pytest.raises(ConfigError, match="ckpt_path: got a checkpoint of a run with another tokenizer"):
        quiet_trainer(max_epochs=1).validate(module, [], ckpt_path="run.ckpt", verbose=False)


def test_a_run_goes_on_with_its_own_network(base: str, folder: Path) -> None:
    save_stage(SFTModule(base), folder / "run.ckpt")
    module = SFTModule(save_model(folder / "wide", hidden_size=32))
    with pytest.raises(ConfigError, match=r"weights of another network: size mismatch for .* and \d+ more.* Do: give"):
        quiet_trainer(max_epochs=1).validate(module, [], ckpt_path="run.ckpt", verbose=False)


@pytest.mark.parametrize(
    ("settings", "what"), [({"template": "plain"}, "template"), ({"tokenizer": "other"}, "tokenizer")]
)
def test_a_run_goes_on_with_its_own_tokenizer_alone(
    base: str, folder: Path, other: str, settings: dict[str, str], what: str
) -> None:
    save_stage(SFTModule(base), folder / "run.ckpt")
    module = SFTModule(base, **settings)
    with pytest.raises(
        ConfigError, match=rf"ckpt_path: got a checkpoint of a run with another {what}; .*model\.{what}"
    ):
        quiet_trainer(max_epochs=1).validate(module, [], ckpt_path="run.ckpt", verbose=False)
    if what == "template":
        SFTModule.load_from_checkpoint("run.ckpt", **settings)  # loaded to begin anew
