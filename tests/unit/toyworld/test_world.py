import os
import random
import subprocess
import sys
from itertools import islice

import pytest

from lit_instruct.toyworld import ToyWorld, split_of_owner, tasks, write_documents, write_world
from lit_instruct.toyworld.grammar import SENTENCES, SLOT_WORDS, read_sentence, split_sentences
from lit_instruct.toyworld.tasks import FORMS, KINDS, sample_task, task_of
from lit_instruct.toyworld.writing import read_jsonl

FILES = {"pretraining.jsonl", "demonstrations.jsonl", "prompts.jsonl", "heldout_prompts.jsonl"}
HELDOUT_OWNERS = ["customer-006", "customer-013", "customer-020", "customer-025"]

HASHING = """
import hashlib, sys
from pathlib import Path
from lit_instruct.toyworld import ToyWorld, make_labelers, write_world
world = ToyWorld(5)
paths = write_world(world, sys.argv[1], documents=50, demonstrations=80, prompts=40, heldout=40)
labeler = make_labelers(world, 1, noise=0.2)[0]
prompt = "where does ben live ?"
print(labeler.rank(world, prompt, ["ben .", "no .", "you fool .", world.statement("lives", "ben")]))
for name in sorted(paths):
    print(name, hashlib.sha256(paths[name].read_bytes()).hexdigest())
"""


def output_under_hash_seed(hash_seed, folder):
    environment = os.environ | {"PYTHONHASHSEED": hash_seed}
    command = [sys.executable, "-c", HASHING, str(folder)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def test_files_are_the_same_in_every_process(tmp_path):
    one = output_under_hash_seed("1", tmp_path / "one")
    assert one == output_under_hash_seed("2", tmp_path / "two")
    assert len(one.splitlines()) == 5


def test_facts_follow_the_seed():
    assert ToyWorld(1).facts == ToyWorld(1).facts
    assert ToyWorld(1).facts != ToyWorld(2).facts


def test_streams_do_not_disturb_each_other():
    world = ToyWorld(0)
    first = world.stream("a").random()
    world.stream("b").random()
    assert world.stream("a").random() == first
    assert world.stream("b").random() != first


def test_more_documents_keep_the_first_ones(world):
    assert write_documents(world, 30)[:10] == write_documents(world, 10)


def test_documents_state_mostly_true_and_some_false_facts(world):
    truths = [
        world.is_true(sentence.form, sentence.slots)
        for text in write_documents(world, 400)
        for sentence in map(read_sentence, split_sentences(text))
        if sentence is not None and sentence.form in world.facts
    ]
    assert 0.8 < sum(truths) / len(truths) < 0.95


def test_false_statements_are_false(world, rng):
    for subject in ("ben", "fox"):
        for form in world.forms_about(subject):
            true, false = world.statement(form, subject), world.statement(form, subject, true=False, rng=rng)
            assert world.is_true(form, read_sentence(true).slots) is True
            assert world.is_true(form, read_sentence(false).slots) is False


def test_every_prompt_is_read_back(rng):
    forms = set()
    for _ in range(2000):
        task = sample_task(rng)
        forms.add(task.form)
        task_of.cache_clear()
        assert task_of(task.prompt) == task
        assert task.kind == FORMS[task.form][0]
    assert forms == set(FORMS)
    assert {kind for kind, _ in FORMS.values()} == set(KINDS)


def test_a_text_that_is_no_prompt_is_refused(world):
    with pytest.raises(ValueError, match="Not a prompt"):
        world.task_of("where is the moon ?")


def test_a_question_about_somebody_else_makes_no_sense():
    with pytest.raises(ValueError, match="Not a prompt"):
        task_of("ben is in the city . anna is in the forest . where is leo ?")


def test_owners_and_prompts_of_the_splits_are_disjoint(world):
    train = list(islice(world.tasks("train"), 3000))
    heldout = list(islice(world.tasks("heldout"), 1000))
    assert {split_of_owner(task.owner) for task in train} == {"train"}
    assert not {task.owner for task in train} & {task.owner for task in heldout}
    assert not {task.prompt for task in train} & {task.prompt for task in heldout}
    assert len({task.prompt for task in train}) == 3000
    assert len({task.owner for task in heldout}) > 20


def test_excluded_prompts_do_not_come_again(world):
    seen = set()
    first = list(islice(world.tasks("train", exclude=seen), 50))
    assert seen == {task.prompt for task in first}
    again = list(islice(world.tasks("train", exclude=seen), 50))
    assert not {task.prompt for task in first} & {task.prompt for task in again}


def test_an_unknown_split_is_refused(world):
    with pytest.raises(ValueError, match="split is 'test'"):
        next(world.tasks("test"))


def test_enough_distinct_prompts():
    rng = random.Random(1)
    assert len({sample_task(rng).prompt for _ in range(40_000)}) > 20_000


def test_every_sentence_form_reads_what_it_writes(rng):
    for form, template in SENTENCES.items():
        slots = {name: rng.choice(words) for name, words in SLOT_WORDS.items()} | {"items": "bread , soup and rice"}
        assert read_sentence(template.fill(slots)).form == form


def test_written_rows_fit_and_carry_their_fields(world, tmp_path):
    paths = write_world(world, tmp_path / "new", documents=20, demonstrations=300, prompts=100, heldout=100)
    assert {path.name for path in paths.values()} == FILES
    rows = {name: read_jsonl(path) for name, path in paths.items()}
    assert {name: len(of) for name, of in rows.items()} == {
        "pretraining": 20,
        "demonstrations": 300,
        "prompts": 100,
        "heldout_prompts": 100,
    }
    assert all(
        len(f"user : {row['prompt']} answer : {row['response']} .".split()) <= 72 for row in rows["demonstrations"]
    )
    assert {split_of_owner(row["owner"]) for row in rows["heldout_prompts"]} == {"heldout"}
    texts = [row["prompt"] for name in rows if name != "pretraining" for row in rows[name]]
    assert len(texts) == len(set(texts))


def test_heldout_documents_go_on_where_the_others_end(world, tmp_path):
    sizes = {"demonstrations": 5, "prompts": 5, "heldout": 5}
    whole = write_world(world, tmp_path / "whole", documents=30, **sizes)
    cut = write_world(world, tmp_path / "cut", documents=20, heldout_documents=10, **sizes)
    assert cut.keys() - whole.keys() == {"pretraining_heldout"}
    texts = [read_jsonl(path) for path in (cut["pretraining"], cut["pretraining_heldout"])]
    assert [len(each) for each in texts] == [20, 10]
    assert texts[0] + texts[1] == read_jsonl(whole["pretraining"])


def test_an_owner_never_moves_between_splits():
    owners = [f"customer-{number:03d}" for number in range(1000)]
    heldout = [owner for owner in owners if split_of_owner(owner) == "heldout"]
    assert 0.2 < len(heldout) / len(owners) < 0.3
    assert heldout[:4] == HELDOUT_OWNERS


def test_running_out_of_prompts_is_an_error(monkeypatch):
    only = sample_task(random.Random(0))
    monkeypatch.setattr(tasks, "sample_task", lambda rng: only)
    monkeypatch.setattr(tasks, "MAX_MISSES", 50)
    drawn = tasks.sample_tasks(random.Random(0), split_of_owner(only.owner))
    assert next(drawn) is only
    with pytest.raises(ValueError, match="ask for fewer prompts"):
        next(drawn)
