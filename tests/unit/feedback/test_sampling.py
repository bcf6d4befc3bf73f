"""Sampling responses to rank: provenance, turns, restarts, and which prompts are chosen."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest
import torch

from lit_instruct import RewardModule
from lit_instruct.evaluation import responses
from lit_instruct.feedback import sample_command
from lit_instruct.feedback.agreement import agreement_figures, judged_tasks
from lit_instruct.feedback.agreement_report import main as agreement
from lit_instruct.feedback.sample_command import main
from lit_instruct.feedback.sampling import Drawn, by_uncertainty
from lit_instruct.feedback.scoring import score_texts
from lit_instruct.feedback.tasks import read_tasks
from lit_instruct.models.backbone import load_language_model
from lit_instruct.models.generation import sample_responses, stream_responses
from lit_instruct.models.tokenizer import load_tokenizer, padding_id
from lit_instruct.rewards.reward_model import RewardModelScorer
from lit_instruct.types import ConfigError, DataError, PromptBatch, Responses
from tests.helpers.labelling import ROOT, write_rows
from tests.helpers.numbers import assert_close
from tests.helpers.tiny import prompts, save_model, save_stage

OPTIONS = ["--max_response_tokens", "8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two models and twenty prompts."""
    path = tmp_path_factory.mktemp("sampling")
    save_model(path / "a", seed=1)
    save_model(path / "b", seed=2)
    prompts(path / "prompts.jsonl", 20)
    return path


def sample(folder: Path, out: Path, *options: str, models: tuple[str, ...] = ("a", "b")) -> list[dict]:
    named = [f"{name}={folder / name}" for name in models]
    source = str(folder / "prompts.jsonl")
    main(["--prompts", source, "--models", *named, "--out", str(out), *OPTIONS, *options])
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def shown_ids(tokenizer, prompt: str) -> torch.Tensor:
    """What a model reads of a prompt, as the tokenizer itself makes it."""
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return torch.tensor([tokenizer(text)["input_ids"]])


def test_a_file_of_tasks_with_where_each_response_came_from(folder, tmp_path):
    rows = sample(folder, tmp_path / "tasks.jsonl", "--responses", "6", "--temperatures", "1", "0.5")
    assert len(rows) == 20
    for row in rows:
        assert len(row["responses"]) == len(row["sources"]) == 6
        turns = Counter((source["model"], source["temperature"]) for source in row["sources"])
        assert set(turns.values()) == {1, 2}
        assert len(turns) == 4
        assert sorted(source["sample"] for source in row["sources"]) == list(range(6))
    weights = {(source["model"], source["weights_sha256"]) for row in rows for source in row["sources"]}
    assert len(weights) == len({digest for _, digest in weights}) == 2
    orders = Counter(tuple(source["sample"] for source in row["sources"]) for row in rows)
    assert len(orders) > 15  # shuffled, each prompt in its own way
    firsts = Counter(row["sources"][0]["model"] for row in rows)
    assert min(firsts["a"], firsts["b"]) > 3


def test_a_response_is_what_its_source_says(folder, tmp_path):
    """Drawn again, one alone, from the model, temperature, seed and number that stand in the file."""
    rows = sample(folder, tmp_path / "tasks.jsonl", "--seed", "5")
    number, place = 7, 2
    source = rows[number]["sources"][place]
    model, tokenizer = load_language_model(source["source"]), load_tokenizer(source["source"])
    assert rows[number]["prompt"] == json.loads((folder / "prompts.jsonl").read_text().splitlines()[number])["prompt"]
    ids = shown_ids(tokenizer, rows[number]["prompt"])
    drawn = sample_responses(
        model,
        PromptBatch(ids, torch.ones_like(ids, dtype=torch.bool)),
        max_tokens=source["max_response_tokens"],
        eos_ids=[tokenizer.eos_token_id],
        pad_id=padding_id(tokenizer),
        temperature=source["temperature"],
        rows=[number],
        seed=source["seed"],
        iteration=source["sample"],
    )
    text = tokenizer.decode(drawn.response_ids_BR[0][drawn.response_mask_BR[0]], skip_special_tokens=True)
    assert rows[number]["responses"][place] == text
    assert source["finished"] == bool(drawn.finished_B[0])
    assert {source["finished"] for row in rows for source in row["sources"]} == {False, True}


def test_label_reads_the_file_and_merges_what_is_the_same(folder, tmp_path, capsys):
    """At a temperature near 0 all draws of a model are the same text."""
    rows = sample(folder, tmp_path / "tasks.jsonl", "--temperatures", "0.001")
    tasks = read_tasks([str(tmp_path / "tasks.jsonl")]).tasks
    assert {len(task.responses) for task in tasks} == {2}
    assert {len(sources) for task in tasks for sources in task.sources} == {2}
    assert all("sources" not in task.shown and "model" not in json.dumps(task.shown) for task in tasks)
    assert f"{2 * len(rows)}; labelers see them once" in capsys.readouterr().out


def test_prompts_whose_responses_are_all_the_same_are_left_out(folder, tmp_path, capsys):
    assert sample(folder, tmp_path / "tasks.jsonl", "--temperatures", "0.001", models=("a",)) == []
    assert "same text: 20 prompts" in capsys.readouterr().out


def test_owners_go_along_and_other_labels_do_not(folder, tmp_path):
    row = {"prompt": "w1", "owner": "o", "topic": 3, "responses": ["x", "y"], "ranks": [1, 2], "labeler": "ann"}
    source = write_rows(tmp_path / "rows.jsonl", [row, {"prompt": "w1", "owner": "another"}])
    out = tmp_path / "tasks.jsonl"
    main(["--prompts", str(source), "--models", f"a={folder / 'a'}", "--out", str(out), *OPTIONS])
    (found,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert found.keys() == {"task", "prompt", "responses", "sources", "owner", "topic"}
    assert found["owner"] == "o"


def test_another_batch_size_gives_the_same_file(folder, tmp_path):
    sample(folder, tmp_path / "one.jsonl")
    sample(folder, tmp_path / "two.jsonl", "--batch_rows", "3")
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
    sample(folder, tmp_path / "three.jsonl", "--seed", "2")
    assert (tmp_path / "one.jsonl").read_bytes() != (tmp_path / "three.jsonl").read_bytes()


def test_what_was_written_down_is_not_sampled_again(folder, tmp_path, monkeypatch):
    """A cut last line is sampled anew, whole lines are taken as they are."""
    sample(folder, tmp_path / "whole.jsonl")
    kept = sorted((tmp_path / "whole.jsonl.samples").iterdir())
    cut = tmp_path / "cut.jsonl.samples"
    cut.mkdir()
    for path, part in zip(kept, (0.3, 0.6), strict=True):
        content = path.read_bytes()
        (cut / path.name).write_bytes(content[: int(len(content) * part)])
    drawn = []

    def counted(*arguments, rows, **more):
        drawn.append(len(rows))
        return stream_responses(*arguments, rows=rows, **more)

    monkeypatch.setattr(responses, "stream_responses", counted)
    sample(folder, tmp_path / "cut.jsonl")
    assert (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert 20 * 4 * 0.4 < sum(drawn) < 20 * 4 * 0.7
    for path in kept:
        again = (cut / path.name).read_text().splitlines()
        assert sorted(again) == sorted(path.read_text().splitlines())


def test_other_settings_take_nothing_that_was_written_down(folder, tmp_path):
    out = tmp_path / "tasks.jsonl"
    for options in (["--temperatures", "0.5"], ["--seed", "2"], ["--max_response_tokens", "5"]):
        fresh = sample(folder, tmp_path / f"{options[0]}.jsonl", *options)
        sample(folder, out)
        out.unlink()
        assert sample(folder, out, *options) == fresh
        out.unlink()


def test_killed_in_the_middle_it_ends_with_the_same_file(folder, tmp_path):
    """SIGKILL as soon as something has been written down, then the same command again."""
    sample(folder, tmp_path / "whole.jsonl")
    out = tmp_path / "killed.jsonl"
    words = ["--prompts", str(folder / "prompts.jsonl"), "--models", f"a={folder / 'a'}", f"b={folder / 'b'}"]
    slow = "import time; from lit_instruct.evaluation.responses import ResponseFile as R; add = R._add\n"
    slow += "R._add = lambda *a: (add(*a), time.sleep(30))\n"
    slow += "from lit_instruct.feedback.sample_command import main; import sys; main(sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", slow, *words, "--out", str(out), *OPTIONS], env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    kept = tmp_path / "killed.jsonl.samples"
    until = time.monotonic() + 60
    while not (kept.is_dir() and any(path.read_bytes().count(b"\n") > 1 for path in kept.iterdir())):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    sample(folder, out)
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


# -- reward models


@pytest.fixture(scope="module")
def reward_model(folder):
    torch.manual_seed(3)
    module = RewardModule(str(folder / "a"))
    with torch.no_grad():
        module.reward_model.head.weight.normal_(std=2.0)
    return save_stage(module, folder / "rm.ckpt")


def score_alone(reward_model: str, prompt: str, response: str) -> float:
    """One response, without padding."""
    tokenizer = load_tokenizer(reward_model)
    prompt_ids = shown_ids(tokenizer, prompt)
    response_ids = torch.tensor([[*tokenizer(response)["input_ids"], tokenizer.eos_token_id]])
    whole = torch.ones_like(prompt_ids, dtype=torch.bool), torch.ones_like(response_ids, dtype=torch.bool)
    batch = PromptBatch(prompt_ids, whole[0]), Responses(response_ids, whole[1], torch.tensor([True]))
    return RewardModelScorer(reward_model)(*batch).item()


def test_scores_of_texts_are_those_of_each_alone(reward_model):
    asked = {"w9": ["w1", "w2 w3 w4 w5", ""], "w10 w11 w12": ["w6 w7", "w8"]}
    scores = score_texts(reward_model, list(asked), list(asked.values()))
    for found, (prompt, texts) in zip(scores, asked.items(), strict=True):
        assert_close(found, [score_alone(reward_model, prompt, text) for text in texts])
    with pytest.raises(DataError, match="at most 32"):
        score_texts(reward_model, ["w1 " * 40], [["w2"]])
    assert score_texts(reward_model, [], []) == []


def test_uncertain_prompts_come_first(folder, tmp_path, reward_model):
    rows = sample(folder, tmp_path / "all.jsonl", "--select", "uncertain", "--reward_model", reward_model)
    sure = []
    for row in rows:
        scores = [score_alone(reward_model, row["prompt"], text) for text in dict.fromkeys(row["responses"])]
        chances = [1 / (1 + math.exp(b - a)) for a, b in combinations(scores, 2)]
        sure.append(sum(abs(chance - 0.5) for chance in chances) / len(chances))
    assert sure == sorted(sure)
    assert sure[0] < 0.8 * sure[-1]
    options = ["--select", "uncertain", "--reward_model", reward_model, "--num_prompts", "5"]
    assert sample(folder, tmp_path / "some.jsonl", *options) == rows[:5]


def test_prompts_with_one_text_come_last():
    drawn = [[Drawn(text, {}) for text in texts] for texts in (["a", "a"], ["a", "b"], ["c", "d", "c"])]
    assert by_uncertainty(drawn, lambda numbers, texts: [[0.0, 5.0], [0.0, 1.0]]) == [2, 1, 0]


def test_random_prompts_are_drawn_by_the_seed(folder, tmp_path):
    chosen = [
        [row["prompt"] for row in sample(folder, tmp_path / f"{name}.jsonl", "--num_prompts", "6", "--seed", seed)]
        for name, seed in (("x", "1"), ("y", "1"), ("z", "2"))
    ]
    assert len(chosen[0]) == 6
    assert chosen[0] == chosen[1] != chosen[2]


def test_agreement_with_a_reward_model(reward_model, tmp_path, capsys):
    row = {"prompt": "w1", "responses": ["w2", "w3 w4", "w5"], "labeler": "ann"}
    source = write_rows(tmp_path / "comparisons.jsonl", [{**row, "ranks": [1, 3, 2]}])
    agreement([str(source), "--reward_model", reward_model])
    scores = [score_alone(reward_model, "w1", text) for text in row["responses"]]
    right = (scores[0] > scores[1]) + (scores[0] > scores[2]) + (scores[2] > scores[1])
    assert f"Reward model  {right / 3:.1%}" in capsys.readouterr().out
    tasks, _ = judged_tasks([{**row, "ranks": [1, 3, 2]}])
    assert agreement_figures(tasks, scores=[scores]).labelers["ann"].reward_model.share == right / 3


@pytest.mark.parametrize(
    ("options", "about"),
    [
        (["--responses", "3"], "--responses"),
        (["--responses", "10"], "--responses"),
        (["--temperatures", "-1"], "--temperatures"),
        (["--temperatures", "nan"], "--temperatures"),
        (["--temperatures", "1", "1"], "--temperatures"),
        (["--temperatures", "0"], "--temperatures"),
        (["--models", "a=x", "a=y"], "twice"),
        (["--models", "../a=x"], "NAME=SOURCE"),
        (["--models", "a"], "NAME=SOURCE"),
        (["--num_prompts", "0"], "--num_prompts"),
        (["--seed", "-1"], "--seed"),
        (["--max_response_tokens", "0"], "--max_response_tokens"),
        (["--select", "uncertain"], "--reward_model"),
        (["--reward_model", "x"], "--select"),
        (["--out", "tasks.json"], "--out"),
        (["--made_up"], "made_up"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_read(options, about, monkeypatch):
    monkeypatch.setattr(sample_command, "_read", lambda sources: pytest.fail("read"))
    with pytest.raises(ConfigError, match=about):
        main(["--prompts", "none.jsonl", "--models", "a=none", "--out", "none.jsonl", *options])


def test_a_prompt_that_is_too_long_and_bad_rows_are_told_by_line(folder, tmp_path):
    words = ["--models", f"a={folder / 'a'}", "--out", str(tmp_path / "tasks.jsonl"), *OPTIONS]
    source = write_rows(tmp_path / "long.jsonl", [{"prompt": "w1"}, {"prompt": "w2 " * 30}])
    with pytest.raises(DataError, match=r"long.jsonl:2: field 'prompt'"):
        main(["--prompts", str(source), *words])
    source = write_rows(tmp_path / "bad.jsonl", [{"prompt": "w1"}, {"prompt": 3}])
    with pytest.raises(DataError, match=r"bad.jsonl:2: field 'prompt'"):
        main(["--prompts", str(source), *words])
    assert not (tmp_path / "tasks.jsonl").exists()
