"""The round's bookkeeping: whose option it is, what is held out, what is done, what a changed option is told.

From end to end: ``tests/integration/test_round.py``.
"""

from __future__ import annotations

import copy
import json
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from lit_instruct.feedback import round as feedback_round
from lit_instruct.feedback.round import main
from lit_instruct.feedback.round_checks import check_heldout, check_text
from lit_instruct.feedback.round_options import split_options
from lit_instruct.feedback.store import Store
from lit_instruct.types import ConfigError, DataError
from tests.helpers.labelling import key, rank_tasks, ranking, write_rows

Words = list[str]


class Steps:
    """In place of the commands: leaves what each one would, and keeps its words."""

    def __init__(self) -> None:
        self.began: list[Words] = []
        self.checked: list[Words] = []
        self.status: dict[str, int] = {}
        self.told = ""
        self.pairs = '{"prompt": "h", "first": "a", "second": "b", "choice": null}\n'
        self.answered = True
        self.rate = {"rate": 0.6, "low": 0.55, "high": 0.65, "n": 40}

    def __call__(self, words: Sequence[str], **streams: Any) -> Steps:
        self.words = list(words)
        self.returncode = self.status.get(words[0], 0)
        if words[-1] == "--print_config":
            self.checked.append(self.words)
        else:
            self.began.append(self.words)
            if not self.returncode:
                self._leave()
        return copy.copy(self)

    def wait(self) -> int:
        return self.returncode

    def communicate(self) -> tuple[None, str]:
        return None, self.told

    def _after(self, name: str) -> Path:
        return Path(self.words[self.words.index(name) + 1])

    def _leave(self) -> None:
        if self.words[0] == "label":
            self._label(Path(self.words[1]))
            return
        out = self._after("--out")
        if self.words[0] == "sample":
            out.write_text("{}\n")
            return
        out.mkdir(exist_ok=True)
        if self.words[0] == "agreement":
            (out / "agreement.png").touch()
        elif self.words[0] in ("rm", "ppo"):
            (out / "last.ckpt").touch()
        elif self.words[0] == "evaluate":
            if "--judge" not in self.words:
                (out / "pairs.jsonl").write_text(self.pairs)
            (out / "results.json").write_text(json.dumps({"models": {"new": {"win_rate": self.rate}}}))

    def _label(self, path: Path) -> None:
        with Store(path) as store:
            store.add_labelers(["ann"])
            store.add_tasks(rank_tasks(2))
            while (given := store.give_next("ann")) and (self.answered or not store.labels()):
                store.save("ann", given.number, "answer", ranking([1, 2, 3, 4]), key=key(), seconds=0)

    @property
    def names(self) -> Words:
        return [words[0] for words in self.began]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    found = Steps()
    monkeypatch.setattr(feedback_round, "start", found)
    return found


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: Steps) -> Callable[..., None]:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "p.jsonl", [{"prompt": f"p{n}", "owner": f"o{n}"} for n in range(4)])
    write_rows(tmp_path / "h.jsonl", [{"prompt": f"h{n}", "owner": f"q{n}"} for n in range(4)])
    write_rows(tmp_path / "t.jsonl", [{"text": "t"}])

    def call(*more: str, labelers: str = "ann,bob") -> None:
        given = ["--policy", "sft.ckpt", "--prompts", "p.jsonl", "--heldout_prompts", "h.jsonl", "--out", "out"]
        main([*given, "--labelers", labelers, *more])

    return call


ALL = ["sample", "label", "agreement", "labels", "rm", "ppo", "evaluate", "label", "evaluate"]


def test_options_of_steps_are_told_from_the_round_s() -> None:
    own, passed = split_options(
        shlex.split(
            "--policy a --rm.model.learning_rate 1e-3 --rm.data.val=-0.1 --sample.temperatures 0.5 1 --out o.x "
            "--ppo.config mine.yaml --labelers=a.b --foo.bar 1 --label.port 1"
        )
    )
    assert own == ["--policy", "a", "--out", "o.x", "--labelers=a.b", "--foo.bar", "1"]
    assert passed == {
        "sample": ["--temperatures", "0.5", "1"],
        "label": ["--port", "1"],
        "rm": ["--model.learning_rate", "1e-3", "--data.val=-0.1"],
        "ppo": ["--config", "mine.yaml"],
        "evaluate": [],
    }


def test_every_step_once_and_what_came_out(
    run: Callable[..., None], steps: Steps, capsys: pytest.CaptureFixture[str]
) -> None:
    run("--text", "t.jsonl", "--ppo.config", "mine.yaml", "--ppo.model.kl_coef", "0.1", "--rm.model.base", "b.ckpt")
    assert steps.names == ALL
    assert [words[0] for words in steps.checked] == ["rm", "ppo", "evaluate"]
    rm, ppo = steps.began[4], shlex.join(steps.began[5])
    assert rm.index("sft.ckpt") < rm.index("b.ckpt")  # the last one counts
    assert ppo.startswith("ppo fit --config round/ppo.yaml --config ppo/ptx.yaml --trainer.callbacks.text t.jsonl")
    assert ppo.index("mine.yaml") < ppo.index("--model.policy sft.ckpt") < ppo.index("--model.kl_coef 0.1")
    assert steps.began[7][-2:] == ["--labelers_from", "out/labels.sqlite"]
    assert steps.began[8][-4:] == ["--judge", "HumanChoices", "--judge.choices", "out/comparison.sqlite"]
    said = capsys.readouterr().out
    assert "train on: 4. To label: responses to 4 of them, then pairs of responses to 4 held-out" in said
    assert "on 60.0% [55.0%, 65.0%] of 40 held-out prompts, ties counted half. It is better." in said
    assert (
        "--policy out/ppo/last.ckpt --add_labels out/labels.sqlite --label.labelers_from out/comparison.sqlite" in said
    )
    run("--text", "t.jsonl", "--ppo.config", "mine.yaml", "--ppo.model.kl_coef", "0.1", "--rm.model.base", "b.ckpt")
    assert steps.names == ALL
    assert len(steps.checked) == 3
    assert capsys.readouterr().out.count("done before") == 9


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(0.55, 0.65, "better"), (0.35, 0.45, "worse"), (0.5, 0.6, "chance")]
)
def test_the_verdict_is_that_of_the_interval(
    low: float, high: float, verdict: str, run: Callable[..., None], steps: Steps, capsys: pytest.CaptureFixture[str]
) -> None:
    steps.rate |= {"low": low, "high": high}
    run()
    assert "PPO-ptx" not in (said := capsys.readouterr().out)  # without text it is PPO
    assert verdict in said.splitlines()[-3]


def test_a_step_is_done_again_when_it_and_what_came_after_it_are_removed(
    run: Callable[..., None], steps: Steps
) -> None:
    run("--rm.data.val", "0.2")
    steps.began.clear()
    with pytest.raises(ConfigError, match=r"the step 'rm' was done with other options(?s:.*)remove out/rm and what"):
        run("--rm.data.val", "0.3")
    shutil.rmtree("out/rm")
    with pytest.raises(ConfigError, match=r"Do: remove out/ppo, out/evaluation, out/comparison.sqlite$"):
        run("--rm.data.val", "0.3")
    shutil.rmtree("out/ppo")
    shutil.rmtree("out/evaluation")
    Path("out/comparison.sqlite").unlink()
    assert not steps.began
    run("--rm.data.val", "0.3")
    assert steps.names == ["rm", "ppo", "evaluate", "label", "evaluate"]


@pytest.mark.parametrize(("status", "expected", "why"), [(3, 3, "what is wrong"), (-9, 137, "killed by SIGKILL")])
def test_a_step_that_ends_early_ends_the_round(
    status: int, expected: int, why: str, run: Callable[..., None], steps: Steps, capsys: pytest.CaptureFixture[str]
) -> None:
    steps.status = {"agreement": status}
    with pytest.raises(SystemExit) as stop:
        run()
    assert stop.value.code == expected
    said = capsys.readouterr().out
    assert f"stopped in the step 'agreement' ({why}" in said
    steps.status = {}
    run()
    assert steps.names == [*ALL[:3], *ALL[2:]]


def test_labels_that_are_missing_end_the_round_unless_they_are_enough(
    run: Callable[..., None], steps: Steps, capsys: pytest.CaptureFixture[str]
) -> None:
    steps.answered = False
    with pytest.raises(SystemExit) as stop:
        run()
    assert stop.value.code == 1
    assert "1 of 2 tasks are done; --enough goes on without the others." in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run("--enough")
    assert "Going on with the 1 answers that there are." in capsys.readouterr().out
    assert steps.names == ["sample", "label", *ALL[2:7], "label"]  # what is not begun is served
    run("--enough")
    assert steps.names[-1] == "evaluate"


def test_a_new_link_is_made_once_in_a_run(run: Callable[..., None], steps: Steps) -> None:
    run("--new_links", "ann")
    labelling = [words for words in steps.began if words[0] == "label"]
    assert ["--new_links" in words for words in labelling] == [True, False]
    run()  # it decides nothing, so all is still done
    assert len(steps.began) == 9


def test_a_step_without_what_it_should_leave_is_told(
    run: Callable[..., None], steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "touch", lambda path: None)
    with pytest.raises(ConfigError, match=r"agreement: ended without out/agreement/agreement.png"):
        run()


def test_policies_that_write_the_same_have_nothing_to_compare(
    run: Callable[..., None], steps: Steps, capsys: pytest.CaptureFixture[str]
) -> None:
    steps.pairs = ""
    run()
    assert steps.names == ALL[:7]
    assert "to every held-out prompt both policies wrote the same text" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--rm.out", "x"], r"--rm.out: got an option that belongs to the round"),
        (["--sample.max_response_tokens", "5"], r"--sample.max_response_tokens: got"),
        (["--ppo.model.max_response_tokens=5"], r"--ppo.model.max_response_tokens: got"),
        (["--label.tasks", "x"], r"--label.tasks: got"),
        (["--label.new_links", "ann"], r"--label.new_links: got"),
        (["--evaluate.judge", "x"], r"--evaluate.judge: got"),
        (["--evaluate.scorer", "x"], r"--evaluate.scorer: got"),
        (["--label.port", "x"], r"invalid int value"),
        (["--label.overlap", "3"], r"need a share from 0 to 1"),
        (["--max_response_tokens", "0"], r"--max_response_tokens: got 0; need at least 1"),
        (["--agreement.seed", "1"], r"unrecognized arguments: --agreement.seed"),
        (["--text", "p.jsonl"], r"--text: got p.jsonl with the columns prompt, owner"),
        (["--add_labels", "no.sqlite"], r"no.sqlite: no such file"),
        (["--heldout_prompts", "p.jsonl"], r"8 held-out prompts are not held out"),
    ],
)
def test_what_cannot_work_is_told_before_anything_is_done(
    more: Words, words: str, run: Callable[..., None], steps: Steps
) -> None:
    with pytest.raises((ConfigError, DataError), match=words):
        run(*more)
    assert not steps.began


def test_a_step_s_own_error_is_passed_on_before_anything_is_done(run: Callable[..., None], steps: Steps) -> None:
    steps.status, steps.told = {"ppo": 2}, "lit-instruct ppo fit: error: there is no option --model.episods."
    with pytest.raises(ConfigError, match=r"(?s)--ppo.OPTION: got options .*no option --model.episods"):
        run("--ppo.model.episods", "4")
    assert not steps.began
    steps.status = {}
    run()  # looked at again, and now done
    assert steps.names == ALL


def test_missing_packages_are_named(run: Callable[..., None], steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"(?s)starlette.*pip install 'lit-instruct\[label\]'"):
        run()
    assert not steps.began


def test_the_work_is_told_at_the_start(run: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    run("--sample.num_prompts", "9", "--sample.num_prompts=3", "--evaluate.max_prompts", "2")
    assert "responses to 3 of them, then pairs of responses to 2 held-out" in capsys.readouterr().out


def test_one_labeler_alone_is_told(run: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    run(labelers="ann")
    assert "one labeler alone" in capsys.readouterr().out


# -- what is held out


def test_owners_and_prompts_that_are_trained_on_are_named(tmp_path: Path) -> None:
    prompts = write_rows(tmp_path / "p.jsonl", [{"prompt": "a", "owner": "o1"}, {"prompt": "b", "owner": "o2"}] * 2)
    rows = [{"prompt": "c", "owner": "o1"}, {"prompt": "b", "owner": "o3"}, {"prompt": "d", "owner": "o4"}]
    heldout = write_rows(tmp_path / "h.jsonl", rows)
    with pytest.raises(DataError) as told:
        check_heldout([str(prompts)], [str(heldout)])
    lines = str(told.value).splitlines()
    assert "2 held-out prompts" in lines[0]
    assert f"{heldout}:1: field 'owner': got 'o1', which is trained on" in lines[1]
    assert f"{heldout}:2: field 'prompt': got a prompt, which is trained on" in lines[2]
    write_rows(tmp_path / "h.jsonl", rows[2:])
    assert check_heldout([str(prompts)], [str(heldout)]) == (2, 1)


def test_labels_of_earlier_rounds_are_trained_on_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = write_rows(tmp_path / "p.jsonl", [{"prompt": "a"}])
    heldout = write_rows(tmp_path / "h.jsonl", [{"prompt": "prompt 1"}])
    assert check_heldout([str(prompts)], [str(heldout)]) == (1, 1)
    assert "held-out prompts name no owners" in capsys.readouterr().out
    with Store(tmp_path / "l.sqlite") as store:
        store.add_labelers(["ann"])
        store.add_tasks(rank_tasks(2, owner="o1"))
        while given := store.give_next("ann"):
            store.save("ann", given.number, "answer", ranking([1, 2, 3, 4]), key=key(), seconds=0)
    with pytest.raises(DataError, match="field 'prompt': got a prompt"):
        check_heldout([str(prompts)], [str(heldout)], [str(tmp_path / "l.sqlite")])
    write_rows(heldout, [{"prompt": "x", "owner": "o1"}])
    with pytest.raises(DataError, match="field 'owner': got 'o1'"):
        check_heldout([str(prompts)], [str(heldout)], [str(tmp_path / "l.sqlite")])


def test_bad_rows_are_named(tmp_path: Path) -> None:
    good = write_rows(tmp_path / "p.jsonl", [{"prompt": "a"}])
    bad = write_rows(tmp_path / "h.jsonl", [{"prompt": "b"}, {"text": "c"}])
    with pytest.raises(DataError, match=r"h.jsonl:2: field 'prompt'"):
        check_heldout([str(good)], [str(bad)])


@pytest.mark.parametrize("row", [{"prompt": "a"}, {"text": 5}, "text"])
def test_text_that_is_none(tmp_path: Path, row: Any) -> None:
    with pytest.raises(DataError, match=r"--text: got .*t.jsonl with .*need rows"):
        check_text(str(write_rows(tmp_path / "t.jsonl", [row])))
