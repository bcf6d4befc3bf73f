"""Responses are sampled once, whatever they are sampled with, and a run that was killed goes on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lit_instruct import SFTModule
from lit_instruct.evaluation import responses
from lit_instruct.evaluation.responses import Sampled, Sampling, sample
from lit_instruct.evaluation.subjects import Subject
from lit_instruct.types import DataError
from tests.helpers.tiny import CONTEXT, EOS, ids, save_model, save_stage
from tests.unit.evaluation.models import asked, subject

PROMPTS = [f"w{number} w{number + 1}" for number in range(12)]
SAMPLING = Sampling(max_response_tokens=6, temperature=1.0, seed=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return subject(tmp_path_factory.mktemp("models"))


def texts(sets: list[Sampled]) -> list[list[str]]:
    return [some.texts for some in sets]


def refuse(*arguments: Any, **more: Any) -> Any:
    raise AssertionError("sampled again")


def test_each_response_is_text_of_its_ids(model: Subject, tmp_path: Path) -> None:
    (some,) = sample(model, asked(PROMPTS), SAMPLING, tmp_path)
    ended = 0
    for text, row, mask, finished in zip(some.texts, *some.responses, strict=True):
        tokens = row[mask].tolist()
        assert finished == (tokens[-1] == EOS)
        ended += bool(finished)
        words = model.tokenizer.convert_ids_to_tokens(tokens)
        assert text.split() == [word for word in words if word not in ("<eos>", "<pad>")]
    assert 0 < ended < 12
    assert [row["prompt"] for row in some.prompts.rows] == PROMPTS


def test_nothing_depends_on_the_batch(model: Subject, tmp_path: Path) -> None:
    one = sample(model, asked(PROMPTS), SAMPLING, tmp_path / "one")
    other = sample(model, asked(PROMPTS), SAMPLING._replace(batch_rows=3), tmp_path / "other")
    assert texts(one) == texts(other)
    few = sample(model, asked(PROMPTS[:4]), SAMPLING, tmp_path / "few")
    assert few[0].texts == one[0].texts[:4]


def test_sets_differ_and_the_first_is_the_same_whatever_their_number(model: Subject, tmp_path: Path) -> None:
    three = texts(sample(model, asked(PROMPTS), SAMPLING, tmp_path / "three", samples=3))
    assert three[0] != three[1] != three[2]
    assert texts(sample(model, asked(PROMPTS), SAMPLING, tmp_path / "one")) == three[:1]


def test_a_second_run_samples_nothing(model: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = texts(sample(model, asked(PROMPTS), SAMPLING, tmp_path))
    monkeypatch.setattr(responses, "stream_responses", refuse)
    again = sample(model, asked(PROMPTS), SAMPLING, tmp_path)
    assert texts(again) == first
    assert again[0].responses.finished_B.any()


def test_more_sets_sample_only_what_is_new(model: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample(model, asked(PROMPTS), SAMPLING, tmp_path)
    seen = []
    real = responses.stream_responses
    monkeypatch.setattr(responses, "stream_responses", lambda *a, **k: (seen.append(k["iteration"]), real(*a, **k))[1])
    sample(model, asked(PROMPTS), SAMPLING, tmp_path, samples=2)
    assert seen == [1]


def test_a_run_that_was_killed_goes_on(model: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stops after some blocks, and its last line is cut off; the end is that of a run that was left alone."""
    monkeypatch.setattr(responses, "_BLOCK_ROWS", 3)
    whole = sample(model, asked(PROMPTS), SAMPLING, tmp_path / "whole")
    real = responses.stream_responses

    def killed(*arguments: Any, **more: Any) -> Any:
        for number, block in enumerate(real(*arguments, **more)):
            if number == 2:
                raise KeyboardInterrupt
            yield block

    monkeypatch.setattr(responses, "stream_responses", killed)
    with pytest.raises(KeyboardInterrupt):
        sample(model, asked(PROMPTS), SAMPLING._replace(batch_rows=4), tmp_path / "killed")
    (path,) = (tmp_path / "killed").iterdir()
    lines = path.read_bytes()
    assert 6 <= lines.count(b"\n") - 1 < 12
    path.write_bytes(lines[:-9])
    asked_again = []

    def counted(*arguments: Any, **more: Any) -> Any:
        asked_again.extend(more["rows"])
        return real(*arguments, **more)

    monkeypatch.setattr(responses, "stream_responses", counted)
    rest = sample(model, asked(PROMPTS), SAMPLING, tmp_path / "killed")
    assert texts(rest) == texts(whole)
    assert len(asked_again) == 12 - (lines.count(b"\n") - 2)
    records = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    assert sorted(record["row"] for record in records) == list(range(12))


@pytest.mark.parametrize(
    "change", ["seed", "temperature", "max_response_tokens", "prompts", "weights", "prefix", "eos_ids"]
)
def test_what_decides_the_responses_is_another_file(model: Subject, tmp_path: Path, change: str) -> None:
    first = texts(sample(model, asked(PROMPTS), SAMPLING, tmp_path))
    source = model.about.source
    who = {
        "weights": lambda: subject(tmp_path, seed=1),
        "prefix": lambda: subject(tmp_path, source=source, prefix="w9 "),
        "eos_ids": lambda: replace(model, eos_ids=(*model.eos_ids, *ids("w3 w5 w7"))),
    }.get(change, lambda: model)()
    settings = {"seed": {"seed": 2}, "temperature": {"temperature": 0.5}, "max_response_tokens": {change: 5}}
    prompts = PROMPTS[::-1] if change == "prompts" else PROMPTS
    other = texts(sample(who, asked(prompts), SAMPLING._replace(**settings.get(change, {})), tmp_path))
    assert other != first
    assert len(list(tmp_path.glob("*.jsonl"))) == 2
    assert texts(sample(model, asked(PROMPTS), SAMPLING, tmp_path)) == first


def test_models_of_the_same_weights_draw_from_streams_of_their_own(model: Subject, tmp_path: Path) -> None:
    """Else a model that has hardly moved would tie with the one it comes from."""
    twin = subject(tmp_path, "twin", source=model.about.source)
    assert twin.sha256 == model.sha256
    assert texts(sample(twin, asked(PROMPTS), SAMPLING, tmp_path)) != texts(
        sample(model, asked(PROMPTS), SAMPLING, tmp_path)
    )


def test_a_prefix_comes_before_what_the_user_says_first(model: Subject, tmp_path: Path) -> None:
    few_shot = subject(tmp_path, source=model.about.source, prefix="w9 w8 ")
    chat = [{"role": "system", "content": "w5"}, {"role": "user", "content": "w1"}]
    encoded = few_shot.encode(["w1", chat], ["a", "b"], response_tokens=1)
    assert [few_shot.tokenizer.decode(row) for row in encoded] == ["w9 w8 w1 :", "w5 w9 w8 w1 :"]
    (verbatim,) = few_shot.encode(["w1"], ["a"], response_tokens=1, verbatim=True)
    assert few_shot.tokenizer.decode(verbatim) == "w9 w8 w1"
    assert few_shot.encode(["w1"], ["a"], response_tokens=1) == encoded[:1]  # its own template has stayed


def test_prompts_without_room_are_named(model: Subject, tmp_path: Path) -> None:
    long = " ".join(["w1"] * CONTEXT)
    with pytest.raises(DataError, match=r"p.jsonl:2: field 'prompt': got 34 tokens"):
        sample(model, asked(["w1", long]), SAMPLING._replace(max_response_tokens=1), tmp_path)
    (cut,) = sample(model, asked(["w1", long]), SAMPLING._replace(long_prompt="truncate_left"), tmp_path)
    assert cut.prompts.prompt_mask_BP.sum(dim=1).tolist() == [2, CONTEXT - 6]


def test_ends_that_a_foreign_model_configures_end_its_responses(tmp_path: Path) -> None:
    source = save_model(tmp_path / "foreign")
    (tmp_path / "foreign" / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, 7, 8]}))
    assert subject(tmp_path, source=source).eos_ids == (EOS, 7, 8)


def test_what_a_stage_has_trained_ends_as_it_was_trained(tmp_path: Path) -> None:
    source = Path(save_model(tmp_path / "base"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"eos_token_id": [EOS, 7]}))
    (source / "generation_config.json").unlink()
    assert subject(tmp_path, source=str(source)).eos_ids == (EOS, 7)
    checkpoint = save_stage(SFTModule(str(source)), tmp_path / "sft.ckpt")
    assert subject(tmp_path, source=checkpoint).eos_ids == (EOS,)
