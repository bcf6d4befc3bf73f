"""``lit-instruct evaluate`` from end to end on tiny models: what it writes, that it goes on, what a mistake is told."""

from __future__ import annotations

import json
import random
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from lit_instruct import RewardModule, SFTModule
from lit_instruct.cli import main
from lit_instruct.commands import evaluation_parser
from lit_instruct.evaluation import ModelSource, evaluate, responses
from lit_instruct.evaluation.best_of_n import best_of_n_scores
from lit_instruct.evaluation.evaluate import read_asked
from lit_instruct.evaluation.likelihood import kl_to_reference
from lit_instruct.evaluation.matched_length import matched_win_rate
from lit_instruct.evaluation.responses import Sampling, sample
from lit_instruct.evaluation.subjects import load_subject
from lit_instruct.evaluation.win_rate import outcomes_of
from lit_instruct.rewards import FunctionScorer
from tests.helpers.numbers import assert_close
from tests.helpers.tiny import save_model, save_stage, some_words, texts, write_jsonl
from tests.unit.reporting.pages import Page

CONFIG = """
models:
  - base=base
  - {name: sft, source: sft.ckpt}
  - {name: few_shot, source: base, prefix: "w9 w8 "}
baseline: sft
prompts: p.jsonl
scorer: {class_path: lit_instruct.rewards.RewardModelScorer, init_args: {model: rm.ckpt}}
picker: {class_path: FunctionScorer, init_args: {function: "pay.py:words"}}
best_of_n: [1, 3]
max_response_tokens: 6
pretraining_text: t.jsonl
chunk_tokens: 16
protocols:
  winogender: {class_path: lit_instruct.evaluation.BiasEntropy, init_args: {data: bias.jsonl}}
  questions: {class_path: MultipleChoice, init_args: {data: mc.jsonl, verbatim: true}}
  toxicity:
    class_path: lit_instruct.evaluation.Continuations
    init_args:
      data: p.jsonl
      max_response_tokens: 4
      scorers: {words: {class_path: FunctionScorer, init_args: {function: "pay.py:words"}}}
"""
SHARED = Path(__file__).parents[2].parent / "shared"
STORY = (
    "Once upon a time, there was a little girl named Lily. She liked to play in the park with her mom. One day, she "
    'saw a big red ball. She ran to it and said, "Mom, look! It is so pretty!" Her mom smiled and they played.'
)
PAGE = Path(__file__).parents[2] / "docs" / "evaluation.md"
PAY = """
def words(prompts, responses):
    return [float(len(text.split())) for text in responses]

def longer(prompts, responses, other_response):
    return [len(text) - len(other) for text, other in zip(responses, other_response)]
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two models of one base, a reward model, and small data."""
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "base")
    module = SFTModule("base")
    with torch.no_grad():
        for weight in module.policy.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    save_stage(module, tmp_path / "sft.ckpt")
    save_stage(RewardModule("sft.ckpt"), tmp_path / "rm.ckpt")
    stream = random.Random(0)
    write_jsonl(
        tmp_path / "p.jsonl", [{"prompt": some_words(stream, 1, 6), "owner": f"o{row % 5}"} for row in range(20)]
    )
    texts(tmp_path / "t.jsonl", 20)
    write_jsonl(
        tmp_path / "bias.jsonl",
        [{"choices": [some_words(stream, 3, 5), some_words(stream, 3, 5)], "condition": "basic"} for _ in range(4)],
    )
    write_jsonl(
        tmp_path / "mc.jsonl", [{"prompt": f"w{row}", "choices": ["w1", "w2 w3"], "correct": 0} for row in range(4)]
    )
    (tmp_path / "pay.py").write_text(PAY)
    (tmp_path / "e.yaml").write_text(CONFIG)
    return tmp_path


def command(*parts: Any) -> None:
    main(["evaluate", *(str(part) for part in parts)])


def read(out: str) -> dict[str, Any]:
    return json.loads(Path(out, "results.json").read_text())


def test_everything_at_once_and_again(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command("--config", "e.yaml", "--out", "out")
    printed = capsys.readouterr().out
    found = read("out")
    assert found["format_version"] == 1
    assert (found["baseline"], found["reference"], found["judge"]) == ("sft", "sft", "RewardModelScorer rm.ckpt")
    assert found["prompts"] == {"sources": ["p.jsonl"], "count": 20, "owners": 5}
    assert list(found["models"]) == ["base", "sft", "few_shot"]
    base, sft, few_shot = found["models"].values()
    assert base["sha256"] == few_shot["sha256"] != sft["sha256"]
    assert "win_rate" not in sft
    assert_close([sft["kl"], sft["kl_k3"]], [0.0, 0.0])
    assert base["kl_k3"] > 0.05
    assert base["win_rate"]["n"] == base["win_rate_matched_length"]["n"] == 20
    assert_close(base["pretraining_loss"], few_shot["pretraining_loss"])
    assert base["pretraining_loss"] != sft["pretraining_loss"]
    assert [best["n"] for best in base["best_of_n"]] == [1, 3]
    assert base["protocols"]["winogender"]["entropy_bits"]["basic"]["n"] == 4
    assert base["protocols"]["questions"]["accuracy"]["all"]["n"] == 4
    assert base["protocols"]["toxicity"]["words"]["all"]["n"] == 20
    rows = [json.loads(line) for line in Path("out/samples.jsonl").read_text().splitlines()]
    assert len(rows) == 60
    of_base = [row for row in rows if row["model"] == "base"]
    wins = [
        (a["score"] > b["score"]) + 0.5 * (a["score"] == b["score"]) for a, b in zip(rows[::3], rows[1::3], strict=True)
    ]
    assert_close(base["win_rate"]["rate"], sum(wins) / 20)
    assert_close(base["score"]["mean"], sum(row["score"] for row in of_base) / 20)
    assert_close(base["mean_length"], sum(len(row["response"]) for row in of_base) / 20)
    example = json.loads(re.findall(r"```json\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)[-1])
    assert example.keys() == found.keys()
    assert example["models"]["ppo"].keys() == base.keys()
    for name in ("score", "win_rate", "win_rate_matched_length"):
        assert example["models"]["ppo"][name].keys() == base[name].keys()
    assert example["models"]["ppo"]["best_of_n"][0].keys() == base["best_of_n"][0].keys()
    assert example["settings"].keys() < found["settings"].keys()
    assert "wins against sft" in printed
    assert "winogender entropy_bits (basic)" in printed
    assert printed.endswith("Everything is in out: responses, results.json, samples.jsonl\n")

    def refuse(*arguments: Any, **more: Any) -> None:
        raise AssertionError("sampled again")

    monkeypatch.setattr(responses, "stream_responses", refuse)
    command("--config", "e.yaml", "--out", "out")
    assert read("out") == found


def few_letters(prompts: Any, responses: list[str]) -> list[float]:
    return [-float(len(text)) for text in responses]


def test_the_numbers_are_those_of_the_responses(here: Path) -> None:
    """KL, best of n picked by another scorer, and matched length, worked out from what was kept."""
    found = evaluate(
        ["sft=sft.ckpt", "base=base"],
        prompts="p.jsonl",
        out="out",
        scorer=FunctionScorer("pay.py:words"),
        picker=FunctionScorer(few_letters),
        best_of_n=[2, 3],
        max_response_tokens=6,
        temperature=0.8,
    )["models"]["base"]
    asked = read_asked("p.jsonl", owner_column=None, max_prompts=None)
    sampling = Sampling(max_response_tokens=6, temperature=0.8, seed=1)
    cpu = torch.device("cpu")
    sft, base = (load_subject(ModelSource(*about), cpu) for about in (("sft", "sft.ckpt"), ("base", "base")))
    theirs, ours = (sample(model, asked, sampling, Path("out/responses"), samples=3) for model in (sft, base))
    kl = kl_to_reference(base.model, sft.model, ours[0].prompts, ours[0].responses, temperature=0.8)
    assert_close([found["kl"], found["kl_k3"]], [float(kl.k1_B.mean()), float(kl.k3_B.mean())])
    assert found["kl"] > 0.05
    texts_of = list(zip(*(some.texts for some in ours), strict=True))
    picked = [
        sum(len(min(pair, key=len).split()) for pair in combinations(texts, 2)) / 3
        for texts in texts_of
        if len({len(text) for text in texts}) == 3  # without ties, which have a test of their own
    ]
    assert 5 < len(picked) < 20
    untied = [len({len(text) for text in texts}) == 3 for texts in texts_of]
    scores_PN = np.array([[len(text.split()) for text in texts] for texts in texts_of], dtype=float)
    letters_PN = np.array([[-len(text) for text in texts] for texts in texts_of], dtype=float)
    best_P = best_of_n_scores(scores_PN, 2, picked_by_PN=letters_PN)
    assert_close(best_P[untied].tolist(), picked)
    assert_close(found["best_of_n"][0]["score"], float(best_P.mean()))
    lengths = [[len(text) for text in some.texts] for some in (ours[0], theirs[0])]
    wins = outcomes_of(*([len(text.split()) for text in some.texts] for some in (ours[0], theirs[0])))
    matched = matched_win_rate(wins, *lengths, asked.owners)
    assert matched is not None
    assert found["win_rate_matched_length"] == matched._asdict()


def test_the_same_model_twice_wins_as_often_as_it_loses(here: Path) -> None:
    write_jsonl(here / "many.jsonl", [{"prompt": f"w{row % 30} w{row % 7}"} for row in range(200)])
    found = evaluate(
        ["one=base", "two=base"],
        prompts="many.jsonl",
        out="out",
        scorer=FunctionScorer("pay.py:words"),
        max_response_tokens=6,
    )
    rate = found["models"]["two"]["win_rate"]
    assert rate["low"] < 0.5 < rate["high"]
    assert rate["high"] - rate["low"] > 0.05  # streams of their own: not all of them ties
    assert found["prompts"]["owners"] == 200


def test_people_judge_what_an_evaluation_without_judge_has_written(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [
        "--models",
        "base=base",
        "sft=sft.ckpt",
        "--prompts",
        "p.jsonl",
        "--out",
        "out",
        "--max_response_tokens",
        6,
    ]
    command(*common)
    assert "win_rate" not in read("out")["models"]["sft"]
    assert "pairs.jsonl" in capsys.readouterr().out
    rows = [json.loads(line) for line in Path("out/pairs.jsonl").read_text().splitlines()]
    texts_of = {
        json.dumps(row["prompt"]): row
        for row in map(json.loads, Path("out/samples.jsonl").read_text().splitlines())
        if row["model"] == "sft"
    }
    for number, row in enumerate(rows):  # the SFT model wins all but the first, which stays open
        sft_first = texts_of[json.dumps(row["prompt"])]["response"] == row["first"]
        row["choice"] = None if number == 0 else "first" if sft_first else "second"
    write_jsonl(here / "choices.jsonl", rows)
    command(*common, "--judge", "HumanChoices", "--judge.choices", "choices.jsonl")
    rate = read("out")["models"]["sft"]["win_rate"]
    ties = 20 - len(rows)
    assert rate["n"] == 19
    assert_close(rate["rate"], (len(rows) - 1 + 0.5 * ties) / 19)
    assert read("out")["judge"] == "HumanChoices"


def test_a_pair_judge_on_the_command_line(here: Path) -> None:
    command(
        *("--models", "base=base", "sft=sft.ckpt", "--prompts", "p.jsonl", "--out", "out", "--max_response_tokens", 6),
        *("--judge", "PairJudge", "--judge.scorer", "FunctionScorer", "--judge.scorer.function", "pay.py:longer"),
    )
    rows = [json.loads(line)["response"] for line in Path("out/samples.jsonl").read_text().splitlines()]
    outcomes = [(len(b) > len(a)) + 0.5 * (len(a) == len(b)) for a, b in zip(rows[::2], rows[1::2], strict=True)]
    found = read("out")
    assert_close(found["models"]["sft"]["win_rate"]["rate"], sum(outcomes) / 20)
    assert "score" not in found["models"]["sft"]


def save_gpt2(folder: Path) -> str:
    """A model that this package did not make: another architecture, tokenizer and vocabulary."""
    core = Tokenizer(models.WordLevel({"w1": 0, "w2": 1, "<|end|>": 2, "?": 3}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", unk_token="?")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=4, n_positions=64, n_embd=16, n_layer=1, n_head=2)).save_pretrained(folder)
    return str(folder)


def test_models_of_other_tokenizers_are_compared_by_their_texts(here: Path) -> None:
    save_gpt2(here / "gpt2")
    found = evaluate(
        ["base=base", ModelSource("gpt2", "gpt2", template="verbatim")],
        prompts="p.jsonl",
        out="out",
        scorer=FunctionScorer("pay.py:words"),
        pretraining_text="t.jsonl",
        max_response_tokens=6,
    )
    assert "kl" in found["models"]["base"]
    assert "kl" not in found["models"]["gpt2"]  # its tokens mean nothing to the reference
    assert 0.0 <= found["models"]["gpt2"]["win_rate"]["rate"] <= 1.0
    assert found["models"]["gpt2"]["pretraining_bits_per_byte"] > 0


@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="the collection of real data sets is not beside the project")
def test_real_models_and_prompts_of_others_become_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders that this package did not make, on conversations of people, and the report of it."""
    monkeypatch.chdir(tmp_path)
    prompts = (SHARED / "data" / "oasst" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()[:4]
    Path("p.jsonl").write_text("\n".join(prompts), encoding="utf-8")
    Path("pay.py").write_text(PAY, encoding="utf-8")
    write_jsonl(tmp_path / "t.jsonl", [{"text": STORY}])
    rows = [{"prompt": "Lily was", "choices": [" happy.", " qzx."], "correct": 0}]
    write_jsonl(tmp_path / "mc.jsonl", rows)
    protocols = {"words": {"class_path": "MultipleChoice", "init_args": {"data": "mc.jsonl", "verbatim": True}}}
    command(
        *("--models", f"stories={SHARED / 'data' / 'stories260k'}", f"gpt2={save_gpt2(tmp_path / 'gpt2')}", *P),
        *(
            *FUNCTION,
            "--long_prompt",
            "truncate_left",
            "--max_response_tokens",
            16,
            "--protocols",
            json.dumps(protocols),
        ),
        *("--pretraining_text", "t.jsonl", "--chunk_tokens", 32, "--out", "out"),
    )
    stories = read("out")["models"]["stories"]
    assert 0.3 < stories["pretraining_bits_per_byte"] < 1.6  # its own kind of text; a byte at random has 8
    assert stories["mean_length"] > 16  # words, not bytes
    assert stories["protocols"]["words"]["accuracy"]["all"]["mean"] == 1.0
    assert "kl" in stories
    main(["report", "out", "--out", "page"])
    page = Page(tmp_path / "page" / "report.html")
    first = json.loads(prompts[0])["prompt"]
    assert f"{first[0]['role']}: {first[0]['content']}" in page.text
    samples = [json.loads(line) for line in Path("out/samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(row["response"].split()[0] in page.text for row in samples if row["model"] == "stories")


P = ["--prompts", "p.jsonl"]
FUNCTION = ["--scorer", "FunctionScorer", "--scorer.function", "pay.py:words"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "base", *P], "got 'base'; need NAME=SOURCE"),
        (["--models", "a=base", "a=sft.ckpt", *P], "got the name 'a' twice"),
        (["--models", "a/b=base", *P], "got the name 'a/b'; need letters"),
        (["--models", "a=base"], "nothing to measure"),
        (["--models", "a=base", *P, "--baseline", "b"], "baseline: got 'b'; need the name of one of the models: a"),
        (["--models", "a=nowhere", *P], "could be loaded from 'nowhere'"),
        (["--models", "a=rm.ckpt", *P], "is a reward model"),
        (["--models", "a=base", "--prompts", "q.jsonl"], "q.jsonl: no such file"),
        (
            ["--models", "a=base", *P, "--owner_column", "who"],
            r"p.jsonl:1: field 'who': got none; need the prompt's owner",
        ),
        (["--models", "a=base", *P, "--max_prompts", "0"], "max_prompts: got 0"),
        (["--models", "a=base", *P, "--temperature", "-1"], "temperature: got -1.0; need at least 0"),
        (["--models", "a=base", *P, "--long_prompt", "drop"], "long_prompt"),
        (["--models", "a=base", *P, "--device", "tpu"], "device: got 'tpu'"),
        (["--models", "a=base", *P, "--best_of_n", "[2]"], "best_of_n: needs a scorer"),
        (["--models", "a=base", *P, *FUNCTION, "--best_of_n", "[0]"], "best_of_n: got 0"),
        (["--models", "a=base", *P, *FUNCTION, "--best_of_n", "[2]", "--temperature", "0"], "all samples are alike"),
        (
            ["--models", "a=base", *P, *FUNCTION, "--picker", "FunctionScorer", "--picker.function", "pay.py:words"],
            "picker",
        ),
        (["--models", "a=base", *P, "--scorer", "FunctionScorer", "--scorer.function", "pay.py:word"], "has no 'word'"),
        (["--models", "a=base", *P, "--judge", "HumanChoices", "--judge.choices", "p.jsonl"], "field 'first'"),
        (
            [
                "--models",
                "a=base",
                "--protocols",
                '{"b": {"class_path": "BiasEntropy", "init_args": {"data": "p.jsonl"}}}',
            ],
            "p.jsonl:1: field 'choices'",
        ),
        (["--models", "a=base", "--pretraining_text", "p.jsonl"], r"p.jsonl:1: field 'text'"),
        (["--models", "a=base", "--pretraining_text", "t.jsonl", *FUNCTION], "prompts: got none for a scorer"),
        (["--models", "a=base", *P, "--reference", "nowhere"], "could be loaded from 'nowhere'"),
        ([*P, "--out", "o"], "models"),
    ],
)
def test_mistakes_are_told_in_a_sentence(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        command(*arguments, *([] if "--out" in arguments else ["--out", "out"]))
    assert stop.value.code == 2
    printed = capsys.readouterr().err.splitlines()
    assert any(message in line for line in printed), printed
    assert not any("Traceback" in line for line in printed)
    assert not Path("out/results.json").exists()


def test_a_prompt_without_owner_among_others_is_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(here / "p.jsonl", [{"prompt": "w1", "owner": "o"}, {"prompt": "w2"}])
    with pytest.raises(SystemExit):
        command("--models", "a=base", *P, "--out", "out")
    assert "p.jsonl:2: field 'owner': got none" in capsys.readouterr().err


def test_the_examples_of_the_documentation_are_understood() -> None:
    examples = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        settings = yaml.safe_load(example)
        models = settings.pop("models", ["a=b"])
        given = [f"--{name}={json.dumps(value)}" for name, value in settings.items()]
        named = [model if isinstance(model, str) else json.dumps(model) for model in models]
        options = evaluation_parser().parse_args(["--out", "o", "--models", *named, *given])
        assert settings.keys() <= options.as_dict().keys()
        for name, protocol in settings.get("protocols", {}).items():
            assert set(protocol["init_args"]) <= set(options.protocols[name].init_args.as_dict())


def test_short_names_are_enough(here: Path) -> None:
    given = ["--models", "a=base", "--out", "o", "--scorer", "GoldScorer", "--scorer.seed", "1"]
    assert evaluation_parser().parse_args(given).scorer.class_path == "lit_instruct.toyworld.GoldScorer"


def test_help_names_judges_and_protocols(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command("--help")
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for name in ("--models MODEL", "--scorer", "GoldScorer", "PairJudge", "BiasEntropy", "NAME=SOURCE"):
        assert name in printed
