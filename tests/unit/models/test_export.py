"""Checkpoints as Hugging Face folders: read by transformers alone in a process of its own, and by our own loaders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from lit_instruct import PPOModule, RewardModule, SFTModule
from lit_instruct.models import export
from lit_instruct.models.backbone import load_language_model
from lit_instruct.models.export import MARK, export_checkpoint
from lit_instruct.models.handover import write_handover
from lit_instruct.models.scalar_head import ScalarModel
from lit_instruct.models.tokenizer import load_tokenizer
from lit_instruct.rewards import ClassifierScorer, RewardModelScorer
from lit_instruct.types import ConfigError
from tests.helpers.numbers import assert_close
from tests.helpers.tiny import EOS, ids, save_stage, tiny_tokenizer, weights
from tests.unit.models.networks import logits_alone, scalars_alone, tiny_model
from tests.unit.models.packing_families import build
from tests.unit.rewards.batches import batch_of

PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10"]
RESPONSES = ["w11", "w12 w13 w14 w15", "w16 w17"]
LIMIT = 8
READ_BACK = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

root, prompts, responses, limit = Path(sys.argv[1]), *json.loads(sys.argv[2])
numbers, texts = {}, {}
for folder in sorted(root.iterdir()):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    said = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
    if folder.name.endswith("rm"):
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        whole = [f"{text} {response} {tokenizer.eos_token}" for text, response in zip(said, responses)]
        batch = tokenizer(whole, padding=True, add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            numbers[folder.name] = model(**batch).logits[:, 0] + model.config.score_bias
        continue
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        numbers[folder.name] = model(**tokenizer(said[0], add_special_tokens=False, return_tensors="pt")).logits[0]
    batch = tokenizer(said, padding=True, add_special_tokens=False, return_tensors="pt")
    made = model.generate(**batch, max_new_tokens=limit)
    texts[folder.name] = [
        tokenizer.decode(row, skip_special_tokens=True) for row in made[:, batch["input_ids"].shape[1] :]
    ]
assert not [name for name in sys.modules if name.startswith("lit_instruct")]
save_file({name: tensor.contiguous() for name, tensor in numbers.items()}, sys.argv[3])
print(json.dumps(texts))
"""


class Case(NamedTuple):
    """A family, changes of its configuration, and what the tokenizer pads with."""

    family: str
    changes: Mapping[str, Any] = MappingProxyType({})
    pad: str | None = "<pad>"
    rows: int = 41  # of the vocabulary; the tokenizer has 34 tokens


CASES = {
    "llama": Case("llama"),
    "llama tied, pads with its end of text": Case("llama", {"tie_word_embeddings": True}, "<eos>"),
    "llama without room for padding": Case("llama", {}, None, 34),
    "mistral": Case("mistral"),
    "gemma2": Case("gemma2"),
    "gpt_neox": Case("gpt_neox"),
    "gpt2": Case("gpt2"),
    "gpt2 tied, without room for padding": Case("gpt2", {}, "<eos>", 34),
    "opt": Case("opt"),
    "opt as 350m": Case("opt", {"hidden_size": 32, "do_layer_norm_before": False}),
    "opt as 350m, without room": Case("opt", {"hidden_size": 32, "do_layer_norm_before": False}, None, 34),
}
cases = pytest.mark.parametrize("name", CASES)


def tokenizer_of(pad: str | None) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = pad
    return tokenizer


def language_model(case: Case) -> Any:
    model = tiny_model(case.family, vocab_size=case.rows, **case.changes)
    with torch.no_grad():
        model.get_output_embeddings().weight[EOS] *= 4.0  # some responses end by themselves
    return model


def scalar_model(case: Case) -> ScalarModel:
    model = ScalarModel.on_language_model(tiny_model(case.family, seed=1, vocab_size=case.rows, **case.changes))
    with torch.no_grad():
        model.head.bias.fill_(0.5)
    model.score_bias.fill_(-1.75)
    return model.eval()


def save(path: Path, stage: str, network: Any, config: Any, pad: str | None = "<pad>", **more: Any) -> str:
    prefix = "reward_model." if stage == "rm" else "policy."
    checkpoint = {"state_dict": {prefix + key: tensor for key, tensor in network.state_dict().items()}, **more}
    write_handover(checkpoint, stage=stage, network=prefix, config=config, tokenizer=tokenizer_of(pad))
    torch.save(checkpoint, path)
    return str(path)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases, policy and reward model."""
    root, source = tmp_path_factory.mktemp("exported"), tmp_path_factory.mktemp("checkpoints")
    for name, case in CASES.items():
        for stage, network in (("ppo", language_model(case)), ("rm", scalar_model(case))):
            path = save(source / f"{name} {stage}.ckpt", stage, network, network.config, case.pad)
            export_checkpoint(path, str(root / f"{name} {stage}"))
    return root


@pytest.fixture(scope="module")
def plainly_read(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """Logits and scores, and greedy texts, of a process that knows transformers only."""
    out = tmp_path_factory.mktemp("read") / "numbers.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", READ_BACK, str(exported), json.dumps([PROMPTS, RESPONSES, LIMIT]), str(out)],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(out), json.loads(done.stdout.splitlines()[-1])


def greedy(model: Any, row: list[int]) -> list[int]:
    """The most likely token after another, the whole row anew for each."""
    made: list[int] = []
    while len(made) < LIMIT and made[-1:] != [EOS]:
        made.append(int(logits_alone(model, [*row, *made])[-1].argmax()))
    return made


@cases
def test_a_policy_in_plain_transformers(name: str, plainly_read: tuple[dict[str, Any], dict[str, Any]]) -> None:
    numbers, texts = plainly_read
    model = language_model(CASES[name])
    rows = [ids(f"{prompt} :") for prompt in PROMPTS]
    assert_close(numbers[f"{name} ppo"], logits_alone(model, rows[0]))
    made = [greedy(model, row) for row in rows]
    assert texts[f"{name} ppo"] == [tiny_tokenizer().decode(row, skip_special_tokens=True) for row in made]


def test_some_greedy_texts_end_and_some_do_not() -> None:
    """Else the test above would not see a wrong end of text."""
    lengths = {len(greedy(language_model(case), ids(f"{p} :"))) for case in CASES.values() for p in PROMPTS}
    assert LIMIT in lengths
    assert len(lengths) > 3


@cases
def test_a_reward_model_in_plain_transformers(name: str, plainly_read: tuple[dict[str, Any], Any]) -> None:
    """Padded rows of several lengths, and the end of text, which is the padding of some tokenizers, is what is read."""
    model = scalar_model(CASES[name])
    rows = [ids(f"{prompt} : {response} <eos>") for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
    assert_close(plainly_read[0][f"{name} rm"], [scalars_alone(model, row)[-1].item() for row in rows])


@cases
def test_our_own_loaders_read_them_back(name: str, exported: Path) -> None:
    policy, reward = language_model(CASES[name]), scalar_model(CASES[name])
    row = ids("w1 w2 w3 : w4 <eos>")
    assert_close(logits_alone(load_language_model(exported / f"{name} ppo").eval(), row), logits_alone(policy, row))
    again = ScalarModel.from_base(exported / f"{name} rm").eval()
    assert_close(scalars_alone(again, row), scalars_alone(reward, row))
    batch = batch_of(PROMPTS, RESPONSES)
    assert_close(RewardModelScorer(again)(*batch), RewardModelScorer(reward)(*batch))
    assert not {"score_bias", "num_labels"} & set(again.config.to_diff_dict())  # the next stage hands on a decoder


@cases
@pytest.mark.parametrize("stage", ["ppo", "rm"])
def test_what_lies_in_a_folder(name: str, stage: str, exported: Path) -> None:
    folder = exported / f"{name} {stage}"
    files = {path.name for path in folder.iterdir()}
    plain = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert files == plain | {MARK} | ({"generation_config.json"} if stage == "ppo" else set())
    config, text = AutoConfig.from_pretrained(folder), (folder / "config.json").read_text()
    assert "lit_segments" not in text
    assert str(exported.parent) not in text
    tokenizer = load_tokenizer(folder)
    assert tokenizer.chat_template == tiny_tokenizer().chat_template
    assert config.eos_token_id == tokenizer.eos_token_id == EOS
    assert tokenizer.padding_side == ("left" if stage == "ppo" else "right")
    if stage == "rm":
        assert config.num_labels == 1
        assert config.score_bias == 2.25  # the head's bias 0.5 less -1.75
        assert config.pad_token_id == tokenizer.pad_token_id != EOS
        assert config.pad_token_id < config.vocab_size
    else:
        made = json.loads((folder / "generation_config.json").read_text())
        assert (made["eos_token_id"], made["pad_token_id"]) == (EOS, tokenizer.pad_token_id)


def test_the_average_and_half_precision(tmp_path: Path) -> None:
    model = tiny_model("llama")
    average = {f"policy.{name}": tensor + 0.125 for name, tensor in model.named_parameters()}
    path = save(tmp_path / "x.ckpt", "sft", model, model.config, ema_state_dict=average)
    last = AutoModelForCausalLM.from_pretrained(export_checkpoint(path, str(tmp_path / "last")))
    mean = AutoModelForCausalLM.from_pretrained(export_checkpoint(path, str(tmp_path / "mean"), ema=True))
    assert torch.equal(weights(last), weights(model))
    assert torch.equal(weights(mean), weights(model) + 0.125)
    half = AutoModelForCausalLM.from_pretrained(export_checkpoint(path, str(tmp_path / "half"), dtype="bfloat16"))
    assert half.dtype == torch.bfloat16
    assert torch.equal(weights(half), weights(model).bfloat16())
    assert json.loads((tmp_path / "mean" / MARK).read_text())["weights"] == "average"


def test_a_tokenizer_that_transformers_takes_for_another(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where the model's type has a tokenizer class of its own, AutoTokenizer does not believe the folder."""
    for family, warnings in (("llama", 0), ("qwen2", 1)):
        model = tiny_model(family)
        folder = export_checkpoint(save(tmp_path / "x.ckpt", "sft", model, model.config), str(tmp_path / family))
        assert caplog.text.count("that reads other tokens: load it as transformers.PreTrainedTokenizerFast") == warnings
        own = PreTrainedTokenizerFast.from_pretrained(folder)
        assert own("w1 w2")["input_ids"] == ids("w1 w2")


def test_residual_dropout_and_its_kin_stay_behind(tmp_path: Path, base: str) -> None:
    """What a stage does to its network while it trains is no part of the model."""
    module = SFTModule(base, residual_dropout=0.2, gradient_checkpointing=True)
    folder = export_checkpoint(save_stage(module, tmp_path / "x.ckpt"), str(tmp_path / "out"))
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert plain.config.to_dict().keys() == AutoConfig.from_pretrained(base).to_dict().keys()
    row = ids("w1 w2 w3")
    assert_close(logits_alone(plain.train(), row), logits_alone(module.policy.eval(), row))


class TestFurther:
    """What the exported reward model is good for here."""

    @pytest.fixture(params=["<pad>", None], ids=["pad token", "no pad token"])
    def folders(self, request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str, ScalarModel]:
        """Policy folder, reward model folder, and that reward model; of one tokenizer."""
        case = Case("llama", {}, request.param, 34)
        model, reward = language_model(case), scalar_model(case)
        policy = export_checkpoint(
            save(tmp_path / "p.ckpt", "sft", model, model.config, case.pad), str(tmp_path / "policy")
        )
        path = save(tmp_path / "r.ckpt", "rm", reward, reward.config, case.pad)
        return str(policy), str(export_checkpoint(path, str(tmp_path / "reward"))), reward

    def test_it_scores_in_ppo_and_starts_the_value_model(self, folders: tuple[str, str, ScalarModel]) -> None:
        policy, folder, reward = folders
        module = PPOModule(policy, folder, max_response_tokens=4)
        batch = batch_of(PROMPTS, RESPONSES)
        need = RewardModelScorer(reward)(*batch)
        assert_close(module.scorer(*batch, tokenizer=module.tokenizer), need)
        assert_close(RewardModelScorer(module.value_model)(*batch), need)
        another = PPOModule(policy, folder, value_model=folder, max_response_tokens=4)
        assert_close(RewardModelScorer(another.value_model)(*batch), need)

    def test_reward_training_goes_on_from_it(self, folders: tuple[str, str, ScalarModel]) -> None:
        _, folder, reward = folders
        batch = batch_of(PROMPTS, RESPONSES)
        assert_close(RewardModelScorer(RewardModule(folder).reward_model)(*batch), RewardModelScorer(reward)(*batch))

    def test_as_a_judge_of_text_it_gets_its_constant(self, folders: tuple[str, str, ScalarModel]) -> None:
        _, folder, reward = folders
        scorer = ClassifierScorer(folder, form="joined", separator=" : ")
        scores = scorer(*batch_of(PROMPTS, RESPONSES), tokenizer=tiny_tokenizer())
        rows = [ids(f"{prompt} : {response}") for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
        assert_close(scores, [scalars_alone(reward, row)[-1].item() for row in rows])
        assert scorer.identity().endswith(" 2.25")  # no weight: a run goes on only with the same

    def test_it_is_no_language_model(self, folders: tuple[str, str, ScalarModel]) -> None:
        with pytest.raises(ConfigError, match="is a reward model; a language model is needed"):
            load_language_model(folders[1])


class TestOut:
    """What may be overwritten."""

    @pytest.fixture
    def path(self, tmp_path: Path) -> str:
        model = tiny_model("llama")
        return save(tmp_path / "x.ckpt", "sft", model, model.config)

    def test_an_earlier_export_is_replaced_and_what_else_lies_there_stays(self, tmp_path: Path, path: str) -> None:
        out = tmp_path / "a" / "out"
        export_checkpoint(path, str(out))
        (out / "README.md").write_text("mine")
        reward = scalar_model(CASES["llama"])
        export_checkpoint(save(tmp_path / "r.ckpt", "rm", reward, reward.config), str(out))
        assert (out / "README.md").read_text() == "mine"
        assert not (out / "generation_config.json").exists()  # of the policy
        assert AutoModelForSequenceClassification.from_pretrained(out).config.score_bias == 2.25
        assert [entry.name for entry in out.parent.iterdir()] == ["out"]

    def test_an_export_that_fails_leaves_what_was_there(
        self, tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = export_checkpoint(path, str(tmp_path / "out"))
        before = {file.name: file.read_bytes() for file in out.iterdir()}
        monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            export_checkpoint(path, str(out), dtype="bfloat16")
        assert {file.name: file.read_bytes() for file in out.iterdir()} == before
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "x.ckpt"]

    def test_an_empty_folder_will_do(self, tmp_path: Path, path: str) -> None:
        (tmp_path / "out").mkdir()
        export_checkpoint(path, str(tmp_path / "out"))
        assert (tmp_path / "out" / "config.json").is_file()

    def test_files_named_elsewhere_are_not_touched(self, tmp_path: Path, path: str) -> None:
        out = tmp_path / "out"
        out.mkdir()
        (out / MARK).write_text(json.dumps({"files": ["../x.ckpt", "/etc/hostname"]}))
        export_checkpoint(path, str(out))
        assert Path(path).is_file()

    @pytest.mark.parametrize(
        ("name", "content", "text"),
        [
            ("mine.txt", "mine", "holds files that no export has written"),
            (MARK, "[", "cannot be read"),
            (MARK, "[]", "cannot be read"),
        ],
    )
    def test_refused_folders(self, tmp_path: Path, path: str, name: str, content: str, text: str) -> None:
        out = tmp_path / "out"
        out.mkdir()
        (out / name).write_text(content)
        with pytest.raises(ConfigError, match=text):
            export_checkpoint(path, str(out))
        assert [file.name for file in out.iterdir()] == [name]


def refusal(*arguments: Any, **more: Any) -> str:
    with pytest.raises(ConfigError) as error:
        export_checkpoint(*map(str, arguments), **more)
    return str(error.value)


def test_what_cannot_be_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reward, out = scalar_model(CASES["llama"]), tmp_path / "out"
    path = save(tmp_path / "r.ckpt", "rm", reward, reward.config)
    assert "ema: got true for the reward model" in refusal(path, out, ema=True)
    assert "dtype: got 'int8'; need one of float32, bfloat16" in refusal(path, out, dtype="int8")
    assert "need the .ckpt of a stage" in refusal(tmp_path, out)
    assert "does not exist" in refusal(tmp_path / "no.ckpt", out)
    assert "need a folder whose name does not end in .ckpt" in refusal(path, tmp_path / "new.ckpt")
    assert "need a folder" in refusal(path, path)
    policy = tiny_model("llama")
    plain = save(tmp_path / "p.ckpt", "sft", policy, policy.config)
    assert "holds no averaged weights" in refusal(plain, out, ema=True)
    convolutions = ScalarModel.on_language_model(build("lfm2"))
    other = save(tmp_path / "o.ckpt", "rm", convolutions, convolutions.config)
    assert "of type 'lfm2', for which transformers has no sequence classifier" in refusal(other, out)
    made = export.AutoModelForSequenceClassification.from_config

    def other_head(*arguments: Any, **more: Any) -> Any:
        model = made(*arguments, **more)
        model.score = torch.nn.Linear(16, 1)
        return model

    def other_reading(*arguments: Any, **more: Any) -> Any:
        model = made(*arguments, **more)
        model.score.register_forward_hook(lambda _, __, logits: logits * 1.01)
        return model

    for change, text in ((other_head, "its head is not one linear map"), (other_reading, "it gives other scores")):
        monkeypatch.setattr(export.AutoModelForSequenceClassification, "from_config", change)
        assert text in refusal(path, out)
    assert not out.exists()
