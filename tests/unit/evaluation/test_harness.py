"""The lm-evaluation-harness on a checkpoint and on its exported folder, with task files that lie here."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_instruct.evaluation import Harness
from lit_instruct.evaluation.subjects import ModelSource, Subject, load_subject
from lit_instruct.models.export import export_checkpoint
from lit_instruct.types import ConfigError
from tests.helpers.numbers import assert_close
from tests.helpers.tiny import ids, write_jsonl

lm_eval = pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")

PROMPTS = ["w1 w2", "w3", "w4 w5 w6", "w7", "w8 w9", "w10"]
CHOICES = ["w11", "w12 w13", "w14 w15 w16"]
TASK = """\
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{options}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
---
task: tiny_text
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{gold}}"
generation_kwargs: {until: ["w20"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = write_jsonl(
        tmp_path / "questions.jsonl",
        [{"question": p, "options": CHOICES, "answer": row % 3, "gold": "w1 w1"} for row, p in enumerate(PROMPTS)],
    )
    folder = tmp_path / "tasks"
    folder.mkdir()
    for number, text in enumerate(TASK.replace("DATA", data).split("---\n")):
        (folder / f"task{number}.yaml").write_text(text)
    return str(folder)


def loaded(source: str) -> Subject:
    return load_subject(ModelSource("model", source), torch.device("cpu"))


def total(subject: Subject, prompt: str, choice: str) -> float:
    before, tokens = ids(prompt), ids(choice)
    logprobs = subject.model(torch.tensor([before + tokens])).logits[0].detach().log_softmax(-1)
    return sum(float(logprobs[len(before) - 1 + place, token]) for place, token in enumerate(tokens))


def test_a_checkpoint_and_its_export_give_the_same_numbers(sft_ckpt: str, tasks: str, tmp_path: Path) -> None:
    """As the harness itself finds them in the folder, with its own loading; and accuracy as a loop counts it."""
    harness = Harness(["tiny_choice", "tiny_text"], include_path=tasks, batch_size=4)
    subject = loaded(sft_ckpt)
    found = harness.measure(subject, tmp_path)
    totals = [[total(subject, prompt, choice) for choice in CHOICES] for prompt in PROMPTS]
    hits = [row.index(max(row)) == place % 3 for place, row in enumerate(totals)]
    accuracy = found["tiny_choice/acc,none"]["all"]
    assert_close(accuracy.mean, sum(hits) / 6)
    assert accuracy.n == 6
    assert accuracy.low < accuracy.mean < accuracy.high or sum(hits) in (0, 6)
    folder = export_checkpoint(sft_ckpt, str(tmp_path / "exported"))
    assert harness.measure(loaded(str(folder)), tmp_path) == found
    alone = asked(harness, model="hf", model_args={"pretrained": str(folder), "dtype": "float32"}, device="cpu")
    for task, metric in (("tiny_choice", "acc,none"), ("tiny_text", "exact_match,none")):
        assert_close(alone["results"][task][metric], found[f"{task}/{metric}"]["all"].mean)
    ours = asked(harness, model=harness.model(subject))
    assert_close(likelihoods(ours), likelihoods(alone))
    assert_close(likelihoods(ours), [value for row in totals for value in row], scale=10)  # sums of up to three
    assert texts(ours) == texts(alone)


def asked(harness: Harness, **model: Any) -> dict[str, Any]:
    """What the harness says when it is called as its users call it."""
    return lm_eval.simple_evaluate(
        **model, tasks=harness.tasks, task_manager=harness.manager, log_samples=True, bootstrap_iters=0
    )


def likelihoods(found: dict[str, Any]) -> list[float]:
    docs = sorted(found["samples"]["tiny_choice"], key=lambda doc: doc["doc_id"])
    return [value for doc in docs for value, _ in doc["filtered_resps"]]


def texts(found: dict[str, Any]) -> list[str]:
    docs = sorted(found["samples"]["tiny_text"], key=lambda doc: doc["doc_id"])
    return [doc["filtered_resps"][0] for doc in docs]


def test_what_cannot_work_is_said_at_once(tasks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = partial(lm_eval.tasks.TaskManager, include_defaults=False)  # reading the others takes a minute
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda include_path, **more: own(include_path=include_path))
    with pytest.raises(ConfigError, match="got 'tiny_chioce', which the harness does not know"):
        Harness(["tiny_chioce"], include_path=tasks)
    with pytest.raises(ConfigError, match="there is no folder"):
        Harness(["tiny_choice"], include_path=str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="tasks: got none"):
        Harness([], include_path=tasks)
