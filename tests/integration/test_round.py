"""A round of feedback from end to end: people's part is done by a simulated team over HTTP."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest

from lit_instruct import SFTModule
from lit_instruct.cli import main
from lit_instruct.feedback.store import Store
from lit_instruct.toyworld import ToyWorld
from lit_instruct.toyworld.labelers import calibrate_noise, make_labelers, ranks_of
from lit_instruct.toyworld.tokenizer import build_tokenizer
from lit_instruct.toyworld.writing import read_jsonl, write_world
from tests.helpers.forked import ForkedRound
from tests.helpers.labelling import ROOT
from tests.helpers.numbers import assert_close
from tests.helpers.team import Team
from tests.helpers.tiny import save_model, save_stage, some_words, texts, write_jsonl

SERVED = "tasks are done; answers"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def links_in(said: str) -> dict[str, str]:
    return dict(re.findall(r"^  (\S+)  (http\S+#\S+)$", said, re.MULTILINE))


def keys_of(*databases: Path) -> Counter[str]:
    """Keys of everything that was saved."""
    keys: Counter[str] = Counter()
    for path in databases:
        with Store(path) as store:
            keys.update(event.key for event in store.events())
    return keys


def trainable(store: Store) -> int:
    """Rankings of at least two responses that have text: the export leaves the others out."""
    return sum(sum(bool(text.strip()) for text in label.task.responses) >= 2 for label in store.labels())


def win_rate_by_hand(out: Path) -> float:
    """From what the labelers said and the two policies wrote: mean over prompts, ties one half."""
    said: dict[tuple[str, str, str], list[float]] = {}
    with Store(out / "comparison.sqlite") as store:
        for label in store.labels():
            (first, second), ranks = label.task.responses, [one["rank"] for one in label.content["responses"]]
            outcome = 0.5 if ranks[0] == ranks[1] else float(ranks[0] < ranks[1])
            said.setdefault((str(label.task.prompt), first, second), []).append(outcome)
            said.setdefault((str(label.task.prompt), second, first), []).append(1.0 - outcome)
    rows = read_jsonl(out / "evaluation" / "samples.jsonl")
    outcomes = []
    for old, new in zip(rows[::2], rows[1::2], strict=True):
        assert (old["model"], new["model"], old["prompt"]) == ("old", "new", new["prompt"])
        key = (old["prompt"], new["response"], old["response"])
        judged = [0.5] if old["response"] == new["response"] else said[key]
        outcomes.append(sum(judged) / len(judged))
    return sum(outcomes) / len(outcomes)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    with chdir(tmp_path):
        save_model(tmp_path / "base")
        save_stage(SFTModule("base"), tmp_path / "sft.ckpt")
    stream = random.Random(0)
    prompts = [{"prompt": some_words(stream, 2, 6), "owner": f"o{row % 7}"} for row in range(48)]
    heldout = [{"prompt": some_words(stream, 2, 6), "owner": f"h{row % 5}"} for row in range(12)]
    write_jsonl(tmp_path / "prompts.jsonl", prompts)
    write_jsonl(tmp_path / "heldout.jsonl", heldout)
    texts(tmp_path / "text.jsonl", 60)
    return tmp_path


def words_of(policy: str, out: str, port: int) -> list[Any]:
    data = ["--prompts", "prompts.jsonl", "--heldout_prompts", "heldout.jsonl", "--text", "text.jsonl"]
    labelling = ["--labelers", "ann,bob", "--label.port", port, "--label.until_done", 0.3, "--label.overlap", 0.5]
    small = ["--sample.num_prompts", 24, "--max_response_tokens", 6, "--rm.data.batch_size", 4, "--ppo.data.val", 0]
    small += ["--ppo.data.batch_size", 16, "--ppo.model.minibatch_size", 4, "--ppo.trainer.callbacks.chunk_tokens", 16]
    small += ["--ppo.trainer.callbacks.micro_batch_size", 4, "--ppo.trainer.callbacks.ratio", 1]
    small += ["--ppo.model.episodes", 208, "--ppo.model.learning_rate", 0.01]  # 52 updates; it saves at the 40th
    few = ("accelerator=cpu", "enable_progress_bar=false")
    quiet = [f"--{stage}.trainer.{setting}" for stage in ("rm", "ppo") for setting in few]
    return ["--policy", policy, *data, *labelling, *small, *quiet, "--out", out]


def longest_first(labeler: str, prompt: str, responses: list[str]) -> list[int]:
    lengths = sorted({len(text) for text in responses}, reverse=True)
    return [lengths.index(len(text)) + 1 for text in responses]


def test_a_round_that_is_killed_twice_and_the_next_one(here: Path) -> None:
    words = words_of("sft.ckpt", "one", free_port())
    out = here / "one"
    run = ForkedRound(words, here)
    run.until(lambda: SERVED in run.said)
    count = len(read_jsonl(out / "tasks.jsonl"))  # but for prompts whose responses are all the same text
    assert 20 <= count <= 24
    with Team(links_in(run.said), longest_first, pause_s=0.01) as team:
        run.until(lambda: len(team.acknowledged) >= 10)
        run.kill()
        assert not (out / "labels").exists()

        run = ForkedRound(words, here)
        run.until(lambda: list((out / "ppo").glob("step=*.ckpt")))
        run.kill()
        assert "1 of 9. sample: done before" in run.said
        assert f"Tasks: 0 added, {count} known already." in run.said
        assert not (out / "evaluation").exists()

        run = ForkedRound(words, here)
        assert run.wait() == 0, run.said
        assert "5 of 9. rm: done before" in run.said
        assert re.search(r"auto_resume: going on from one/ppo/step=\d+.ckpt", run.said)
        assert links_in(run.said) == {}  # those of the first labelling open the second one
    assert all(shown.keys() == {"prompt", "instruction", "responses"} for shown in team.shown)
    heldout = {row["prompt"] for row in read_jsonl(here / "heldout.jsonl")}
    compared = [shown for shown in team.shown if shown["prompt"] in heldout]
    assert len(compared) > 8
    assert all(len(shown["responses"]) == 2 for shown in compared)

    saved = keys_of(out / "labels.sqlite", out / "comparison.sqlite")
    assert set(team.acknowledged) <= saved.keys()
    assert set(saved.values()) == {1}
    trained = read_jsonl(out / "labels" / "comparisons.jsonl")
    with Store(out / "labels.sqlite") as store:
        assert store.totals() == (count, count)
        assert len(store.labels()) == count + round(count / 2)
        assert len(trained) == trainable(store)
    assert not heldout & {row["prompt"] for row in trained}
    results = json.loads((out / "evaluation" / "results.json").read_text())
    found, rate = results["models"]["new"]["win_rate"], win_rate_by_hand(out)
    assert (results["judge"], results["prompts"]["owners"], found["n"]) == ("HumanChoices", 5, 12)
    assert_close(found["rate"], rate)
    assert f"prefer the new policy on {rate:.1%} [{found['low']:.1%}, {found['high']:.1%}] of 12 held-out" in run.said
    assert results["models"]["old"]["sha256"] != results["models"]["new"]["sha256"]

    # once more, with nothing left to do; then with another option
    run = ForkedRound(words, here)
    assert run.wait() == 0, run.said
    assert run.said.count("done before") == 9
    assert f"prefer the new policy on {rate:.1%}" in run.said
    run = ForkedRound([*words, "--rm.model.learning_rate", 0.1], here)
    assert run.wait() == 2
    assert "the step 'rm' was done with other options" in run.said

    # the next round: its policy, its labels, its links
    more = ["--add_labels", "one/labels.sqlite", "--label.labelers_from", "one/comparison.sqlite"]
    run = ForkedRound([*words_of("one/ppo/last.ckpt", "two", free_port()), *more], here)
    run.until(lambda: SERVED in run.said)
    page = re.findall(r"Labelling at (\S+)", run.said)[0]
    links = {name: page + "#" + link.partition("#")[2] for name, link in team.links.items()}
    with Team(links, longest_first):
        assert run.wait() == 0, run.said
    second = read_jsonl(here / "two" / "labels" / "comparisons.jsonl")
    with Store(here / "two" / "labels.sqlite") as store:
        assert len(second) == trainable(store) + len(trained)
    assert {json.dumps(row) for row in trained} <= {json.dumps(row) for row in second}
    again = json.loads((here / "two" / "evaluation" / "results.json").read_text())["models"]
    assert again["old"]["sha256"] == results["models"]["new"]["sha256"]


def test_a_labelling_that_is_stopped_goes_on_or_is_enough(here: Path) -> None:
    words = words_of("sft.ckpt", "one", free_port())
    run = ForkedRound(words, here)
    run.until(lambda: SERVED in run.said)
    with Team(links_in(run.said), longest_first, pause_s=0.05) as team:
        run.until(lambda: len(team.acknowledged) >= 4)
        run.tell(signal.SIGINT, group=True)
        assert run.wait() == 130, run.said
        assert "The round stopped in the step 'label' (SIGINT). The same command goes on from here." in run.said
        run = ForkedRound(words, here)
        run.until(lambda: SERVED in run.said)
        held = ForkedRound(words, here)
        assert held.wait() == 2
        assert "where another round, or a step of one that was killed, is still at work" in held.said
        run.tell(signal.SIGTERM, group=False)
        assert run.wait() == 143, run.said
        assert "(SIGTERM)" in run.said
    run = ForkedRound([*words, "--enough"], here)
    run.until(lambda: SERVED in run.said)  # the other labelling, of which nothing is there yet
    run.kill()
    with Store(here / "one" / "labels.sqlite") as store:
        count, trained = len(store.labels()), trainable(store)
    assert 4 <= count < 36
    assert f"Going on with the {count} answers that there are." in run.said
    assert len(read_jsonl(here / "one" / "labels" / "comparisons.jsonl")) == trained


# -- on the toy world, whose labelers mean something

SEED = 1
DOCUMENTS, DEMONSTRATIONS, PROMPTS, HELDOUT = 10_000, 1_500, 2_000, 1_200
RANKED, LABELERS = 500, 4
SMALL = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.08,
    "tie_word_embeddings": True,
}


def make_sft(where: Path, world: ToyWorld) -> None:
    """A base model and SFT by the quickstart's configurations, smaller and on less data."""
    with chdir(where):
        sizes = {"documents": DOCUMENTS, "demonstrations": DEMONSTRATIONS, "prompts": PROMPTS, "heldout": HELDOUT}
        write_world(world, "data", **sizes)
        build_tokenizer().save_pretrained("tokenizer")
        common = ["--seed_everything", str(SEED), "--trainer.enable_progress_bar", "false"]
        main(["pretrain", "fit", "--config", "quickstart/base.yaml", *common, "--model.base", json.dumps(SMALL)])
        main(["sft", "fit", "--config", "quickstart/sft.yaml", *common])


class ToyTeam:
    """Labelers who agree as often as the paper's on responses such as these."""

    def __init__(self, world: ToyWorld, tasks: Path) -> None:
        sets = [(row["prompt"], row["responses"]) for row in read_jsonl(tasks)]
        noise = calibrate_noise(world, sets, seed=SEED)
        self.world, self.labelers = world, {one.id: one for one in make_labelers(world, LABELERS, noise)}

    def rank(self, labeler: str, prompt: str, responses: Sequence[str]) -> list[int]:
        one = self.labelers[labeler]
        return ranks_of(one.utilities(self.world, prompt, responses), one.tie_width)


def test_the_toy_world_s_labelers_contradict_nothing_that_they_said() -> None:
    """What the slow test below rests on, on one pair: the same texts get the same order, in whatever order shown."""
    world = ToyWorld(SEED)
    prompt, one, other = next(world.tasks("train")).prompt, "i do not know .", "you fool ."
    labeler = make_labelers(world, 1, 0.1)[0]
    forth = ranks_of(labeler.utilities(world, prompt, [one, other]), labeler.tie_width)
    assert forth == ranks_of(labeler.utilities(world, prompt, [other, one]), labeler.tie_width)[::-1]


@pytest.mark.slow  # some minutes: a base model, SFT, then the round
def test_labelers_prefer_blind_what_they_have_taught(tmp_path: Path) -> None:
    """Real processes from end to end, killed in the middle of PPO; the new policy's interval lies above one half."""
    world = ToyWorld(SEED)
    make_sft(tmp_path, world)
    names = [one.id for one in make_labelers(world, LABELERS, 0.0)]
    words = ["--policy", "sft/last.ckpt", "--prompts", "data/prompts.jsonl", "--text", "data/pretraining.jsonl"]
    words += ["--heldout_prompts", "data/heldout_prompts.jsonl", "--labelers", ",".join(names), "--out", "round"]
    words += ["--max_response_tokens", "40", "--sample.num_prompts", str(RANKED), "--label.port", str(free_port())]
    words += ["--label.until_done", "1", "--rm.model.learning_rate", "1e-3"]
    words += [f"--{stage}.trainer.enable_progress_bar=false" for stage in ("rm", "ppo")]
    words += ["--ppo.model.episodes", "4096", "--ppo.model.kl_coef", "0.2", "--ppo.model.learning_rate", "1e-4"]
    words += ["--ppo.model.value_learning_rate", "2e-4", "--ppo.trainer.callbacks.coef", "0.3"]
    words += ["--ppo.trainer.callbacks.ratio", "1", "--ppo.trainer.callbacks.chunk_tokens", "64"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "lit_instruct", "round", *words]
    output = tmp_path / "output.txt"

    def begin() -> subprocess.Popen[bytes]:
        with output.open("ab") as file:
            return subprocess.Popen(
                command, cwd=tmp_path, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    def until(process: subprocess.Popen[bytes], holds: Callable[[], object]) -> None:
        while not holds():
            assert process.poll() is None, output.read_text(encoding="utf-8")[-3000:]
            time.sleep(0.2)

    process = begin()
    until(process, lambda: SERVED in output.read_text(encoding="utf-8"))
    team = ToyTeam(world, tmp_path / "round" / "tasks.jsonl")
    with Team(links_in(output.read_text(encoding="utf-8")), team.rank):
        until(process, lambda: list((tmp_path / "round" / "ppo").glob("step=*.ckpt")))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process = begin()
        assert process.wait() == 0, output.read_text(encoding="utf-8")[-3000:]
    said = output.read_text(encoding="utf-8")
    assert "auto_resume: going on from round/ppo/step=" in said
    results = json.loads((tmp_path / "round" / "evaluation" / "results.json").read_text(encoding="utf-8"))
    rate = results["models"]["new"]["win_rate"]
    print(said[-600:])
    assert rate["n"] == HELDOUT
    assert rate["low"] > 0.5, rate
    assert "It is better." in said
