"""``data prepare``: the paper's own rules on what is kept, in which order, in which split (sections 3.2, A.2, C)."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lit_instruct import PromptDataModule
from lit_instruct.data.preparation import prepare
from lit_instruct.data.preparation_report import SPLITS, Report
from lit_instruct.data.prompt_rows import split_of
from tests.unit.data.worlds import slow_tokenizer, write_jsonl

WORDS = 3000
EMAIL, OTHER_EMAIL = "jane@example.com", "joe@example.com"
Rows = list[dict[str, Any]]
ALL_IN_TRAIN = {"val": 0.0, "test": 0.0}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word: w0, w1, ...; no beginning of text."""
    names = ["<unk>", "</s>", EMAIL, OTHER_EMAIL, *(f"w{n}" for n in range(WORDS))]
    vocabulary = {word: number for number, word in enumerate(names)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>")


TOKENIZER = tokenizer()


def words(first: int, count: int) -> str:
    return " ".join(f"w{n % WORDS}" for n in range(first, first + count))


def rows(*texts: str, owner: str = "a") -> Rows:
    return [{"prompt": text, "owner": owner} for text in texts]


def run(folder: Path, table: Rows, **changes: Any) -> tuple[Report, dict[str, Rows]]:
    """Prepare one file of rows into ``folder/out``."""
    source = write_jsonl(folder / "rows.jsonl", table)
    arguments = {"prompts": source, "tokenizer": TOKENIZER, "out": str(folder / "out"), "template": "verbatim"}
    report = prepare(**(arguments | {"overwrite": True} | changes))
    return report, read(folder / "out")


def read(out: Path) -> dict[str, Rows]:
    return {s: [json.loads(line) for line in (out / f"{s}.jsonl").read_text("utf-8").splitlines()] for s in SPLITS}


def kept(folder: Path, table: Rows, **changes: Any) -> list[str]:
    """The prompts that are left of rows that all go to train."""
    return [row["prompt"] for row in run(folder, table, **(ALL_IN_TRAIN | changes))[1]["train"]]


def owner_in(split: str) -> str:
    return next(name for name in map(str, range(1000)) if split_of(name, val=0.1, test=0.1) == split)


def some_world(seed: int, count: int) -> Rows:
    """Rows of 30 owners in which every step finds something to do."""
    stream = random.Random(seed)
    table = []
    for number in range(count):
        first, length = stream.randrange(WORDS), stream.choice([1, 2, 5, 20])
        text = words(first, length) + (f" {EMAIL}" if stream.random() < 0.1 else "")
        table.append({"prompt": text, "owner": f"o{stream.randrange(30)}", "number": number})
    return table


# -- the steps


def test_1_a_prompt_of_1025_tokens_is_gone(tmp_path: Path) -> None:
    table = rows(words(0, 1024), words(1, 1025))
    report, splits = run(tmp_path, table, **ALL_IN_TRAIN)
    assert splits["train"] == table[:1]
    assert report.steps[1].removed == 1


def test_1_the_template_counts(tmp_path: Path) -> None:
    """The limit is that of PromptDataModule, which sees prompts through their template."""
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}w7 {{ m.content }} w8{% endfor %}")
    table = rows(words(0, 8), words(100, 9))
    assert kept(tmp_path, table, max_prompt_tokens=10, template=str(template)) == [words(0, 8)]
    data = PromptDataModule(
        str(tmp_path / "out/train.jsonl"),
        TOKENIZER,
        max_prompt_tokens=10,
        batch_size=1,
        val=0.0,
        template=str(template),
    )
    data.setup()
    assert [len(sample.prompt_ids) for sample in data.samples.train] == [10]


def test_2_the_first_of_those_with_one_beginning_stays(tmp_path: Path) -> None:
    first = words(0, 70)
    same_64, same_63 = f"{words(0, 64)} w900", f"{words(0, 63)} w900"
    table = rows(first, same_64, same_63, words(0, 64), words(0, 63), words(0, 10), words(0, 11), words(0, 10))
    # 64 tokens are shared: gone; 63 are not enough; a shorter text is compared as a whole
    assert kept(tmp_path, table) == [first, same_63, words(0, 63), words(0, 10), words(0, 11)]
    assert kept(tmp_path, list(reversed(table))) == [words(0, 10), words(0, 11), words(0, 63), words(0, 64), same_63]
    assert kept(tmp_path, table, prefix_tokens=10) == [first]
    assert kept(tmp_path, table, prefix_tokens=11) == [first, words(0, 10)]


@pytest.mark.parametrize("ruler", [TOKENIZER, slow_tokenizer()], ids=["words", "bytes"])
def test_2_whitespace_owners_and_forms_do_not_matter(tmp_path: Path, ruler: Any) -> None:
    messages = [{"role": "user", "content": " w1\n w2"}]
    dialogue = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}, messages[0]]
    table: Rows = [
        {"prompt": "w1 w2", "owner": "a"},
        {"prompt": "\tw1 \u2003 w2\n", "owner": "b"},
        {"prompt": messages, "owner": "c"},
        {"prompt": dialogue, "owner": "d"},
    ]
    _, splits = run(tmp_path, table, tokenizer=ruler, **ALL_IN_TRAIN)
    assert splits["train"] == [table[0], table[3]]
    assert kept(tmp_path, table[1:2], tokenizer=ruler) == [
        "\tw1 \u2003 w2\n"
    ]  # compared without, written with its whitespace


def test_2_also_far_apart(tmp_path: Path) -> None:
    """Rows are worked on in blocks; the same prompt may come in another one."""
    table = rows(*(words(n, 3) for n in range(2500))) + rows(words(5, 3), words(2400, 3))
    report, splits = run(tmp_path, table, **ALL_IN_TRAIN, max_per_owner=10_000)
    assert (report.steps[2].removed, report.steps[2].left) == (2, 2500)
    assert splits["train"] == table[:2500]


def test_3_an_owner_keeps_200(tmp_path: Path) -> None:
    table = rows(*(words(n, 3) for n in range(1500))) + rows(*(words(n, 4) for n in range(150)), owner="b")
    report, splits = run(tmp_path, table, **ALL_IN_TRAIN)
    assert Counter(row["owner"] for row in splits["train"]) == {"a": 200, "b": 150}
    assert (report.steps[3].removed, report.steps[3].left) == (1300, 350)
    places = [table.index(row) for row in splits["train"]]
    assert places == sorted(places), "the order of the sources is kept"
    assert 600 < sum(places[:200]) / 200 < 900, "chosen from all over, and not the first ones"


def test_3_the_choice_depends_on_the_seed_and_not_on_the_order(tmp_path: Path) -> None:
    table = some_world(3, 400)
    distinct = {row["prompt"]: row for row in table}.values()  # which duplicate stays does depend on the order
    shuffled = list(distinct)
    random.Random(1).shuffle(shuffled)
    chosen = kept(tmp_path, list(distinct), max_per_owner=4)
    assert 20 < len(chosen) <= 30 * 4
    assert sorted(kept(tmp_path, shuffled, max_per_owner=4)) == sorted(chosen)
    other = kept(tmp_path, list(distinct), max_per_owner=4, seed=2)
    assert sorted(other) != sorted(chosen)


def test_3_the_choice_is_the_same_on_every_machine(tmp_path: Path) -> None:
    """Worked out with hashlib alone and written down: a change would give everybody other data for the same seed."""
    assert kept(tmp_path, rows(*(words(n, 1) for n in range(12))), max_per_owner=3) == ["w4", "w5", "w9"]


def test_4_no_owner_is_in_two_splits(tmp_path: Path) -> None:
    table = some_world(0, 600)
    _, splits = run(tmp_path, table, val=0.3, test=0.2)
    owners = {split: {row["owner"] for row in splits[split]} for split in SPLITS}
    assert all(owners.values())
    assert sum(map(len, owners.values())) == len(set.union(*owners.values())) == 30


def test_4_more_rows_never_move_an_owner(tmp_path: Path) -> None:
    table = some_world(0, 600)
    _, few = run(tmp_path, table[:300])
    newcomers = rows(*(words(n, 7) for n in range(50)), owner="newcomer")
    _, many = run(tmp_path, [*newcomers, *table])
    split = {row["owner"]: name for name in SPLITS for row in many[name]}
    assert "newcomer" in split
    assert all(split[row["owner"]] == name for name in SPLITS for row in few[name])


def test_4_neither_does_the_seed(tmp_path: Path) -> None:
    splits = [run(tmp_path, some_world(0, 300), seed=seed)[1] for seed in (1, 2)]
    owners = [{row["owner"]: name for name in SPLITS for row in split[name]} for split in splits]
    assert owners[0] == owners[1]


def test_4_the_hash_is_the_same_on_every_machine() -> None:
    """Worked out with hashlib alone and written down: a change would move owners from test to train."""
    found = [split_of(f"owner-{n}", val=0.2, test=0.2) for n in range(12)]
    expected = "test test val test train train train val train train train train"
    assert found == expected.split()


def test_4_shares_of_the_owners() -> None:
    names = [f"user {n}" for n in range(10_000)]
    before = {name: split_of(name, val=0.1, test=0.05) for name in names}
    shares = Counter(before.values())
    assert 900 < shares["val"] < 1100
    assert 430 < shares["test"] < 570
    for change in ({"val": 0.3, "test": 0.05}, {"val": 0.1, "test": 0.3}):
        grown = next(split for split in ("val", "test") if change[split] == 0.3)
        moves = {(before[name], split_of(name, **change)) for name in names}
        assert {(a, b) for a, b in moves if a != b} == {("train", grown)}, "a larger share takes from train only"
    assert {split_of(name, val=0.0, test=0.0) for name in names} == {"train"}


def test_5_personal_data_are_filtered_in_train_only(tmp_path: Path) -> None:
    table = [
        row
        for number, split in enumerate(SPLITS)
        for row in rows(f"w{number} w8", f"w{number} w9 mail {EMAIL}", owner=owner_in(split))
    ]
    report, splits = run(tmp_path, table)
    assert splits == {"train": table[:1], "val": table[2:4], "test": table[4:]}
    assert report.personal_data == {"prompts": 1, "kinds": {"email": 1}}
    assert report.steps[5].splits == {"train": 1, "val": 2, "test": 2}
    _, unfiltered = run(tmp_path, table, personal_data="off")
    assert unfiltered["train"] == table[:2]


def test_5_every_text_that_a_model_reads_is_looked_at(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": f"ask {EMAIL}"}]
    table: Rows = [
        {"prompt": "w2", "response": f"ask {EMAIL}"},
        {"prompt": "w3", "responses": ["w1", f"ask {EMAIL}"]},
        {"messages": [*chat, {"role": "user", "content": "w4"}]},
        {"chosen": chat, "rejected": [*chat[:1], {"role": "assistant", "content": "w5"}]},
        {"prompt": "w5", "website": EMAIL},  # no model reads this column
    ]
    table = [{**row, "owner": EMAIL} for row in table]
    _, splits = run(tmp_path, table, **ALL_IN_TRAIN)
    assert splits["train"] == table[-1:]
    _, splits = run(tmp_path, table, **ALL_IN_TRAIN, personal_data_action="mask")
    assert len(splits["train"]) == 5
    for before, after in zip(table, splits["train"], strict=True):
        expected = {k: json.loads(json.dumps(v).replace(EMAIL, "[EMAIL]")) for k, v in before.items()}
        assert after == expected | {name: before[name] for name in ("owner", "website") if name in before}


def test_5_masked_prompts_still_keep_the_rules_before(tmp_path: Path) -> None:
    """Two prompts that differ in the address alone are one when it is masked; a mask may make a prompt longer."""
    table = rows(f"w1 {EMAIL}", f"w1 {OTHER_EMAIL}", "w1 w2", "w3 (212) 555-0198 w4", "w5 212-555-0198")
    report, splits = run(tmp_path, table, **ALL_IN_TRAIN, personal_data_action="mask", max_prompt_tokens=3)
    # "w3 (212) 555-0198 w4" has 4 tokens: gone before it could be masked
    assert [row["prompt"] for row in splits["train"]] == ["w1 [EMAIL]", "w1 w2", "w5 [PHONE]"]
    assert report.steps[5].removed == 1
    assert report.personal_data == {"prompts": 3, "kinds": {"email": 2, "phone": 1}}
    far = rows(f"{words(0, 64)} {EMAIL}", f"{words(1, 64)} {EMAIL}")  # behind what is compared: nothing changes there
    assert kept(tmp_path, far, personal_data_action="mask") == [f"{words(n, 64)} [EMAIL]" for n in (0, 1)]
    template = tmp_path / "longer.jinja"
    template.write_text("{{ messages[0].content | replace('[', '[ ') }}")
    table = rows(f"w1 w2 {EMAIL}", "w1 w2 w3")
    assert kept(tmp_path, table, personal_data_action="mask", max_prompt_tokens=3, template=str(template)) == [
        "w1 w2 w3"
    ]


def test_6_only_customers(tmp_path: Path) -> None:
    table = [
        {**row, "source": ["customer", "labeler"][n % 2], "paid": n % 4 == 0}
        for n, row in enumerate(some_world(1, 200))
    ]
    everything, all_splits = run(tmp_path, table)
    report, splits = run(tmp_path, table, only="source=customer")
    for split in SPLITS:
        assert splits[split] == [row for row in all_splits[split] if row["source"] == "customer"]
    assert report.steps[:-1] == everything.steps
    assert report.steps[-1].removed == sum(row["source"] == "labeler" for s in SPLITS for row in all_splits[s])
    _, paid = run(tmp_path, table, only="paid=true")
    assert [row for s in SPLITS for row in paid[s]] == [row for s in SPLITS for row in all_splits[s] if row["paid"]]


# -- their order


def test_what_is_too_long_takes_nothing_with_it(tmp_path: Path) -> None:
    assert kept(tmp_path, rows(words(0, 80), words(0, 70)), max_prompt_tokens=75) == [words(0, 70)]


def test_duplicates_do_not_count_for_the_cap(tmp_path: Path) -> None:
    table = rows(*["w1", "w1", "w1", "w1", "w2", "w3"] * 5)
    assert kept(tmp_path, table, max_per_owner=3) == ["w1", "w2", "w3"]


def test_the_cap_does_not_look_at_personal_data(tmp_path: Path) -> None:
    table = rows(*(f"w{n} {EMAIL}" if n % 2 else f"w{n}" for n in range(100)))
    report, splits = run(tmp_path, table, **ALL_IN_TRAIN, max_per_owner=40)
    assert report.steps[3].left == 40
    assert 10 <= len(splits["train"]) <= 30


def test_the_report_names_the_steps_in_order(tmp_path: Path) -> None:
    report, _ = run(tmp_path, some_world(0, 100), only="owner=o1", val=0.0, test=0.0)
    assert [step.name for step in report.steps] == [
        *("prompts", "max_prompt_tokens", "prefix_tokens", "max_per_owner", "split", "personal_data", "only")
    ]


# -- the whole


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6), count=st.integers(30, 150), cap=st.integers(1, 6), mask=st.booleans())
def test_all_rules_hold_and_counts_add_up(tmp_path: Path, seed: int, count: int, cap: int, mask: bool) -> None:
    action = "mask" if mask else "drop"
    report, splits = run(
        tmp_path,
        some_world(seed, count),
        max_prompt_tokens=19,
        prefix_tokens=4,
        max_per_owner=cap,
        val=0.2,
        test=0.2,
        personal_data_action=action,
    )
    everything = [row for split in SPLITS for row in splits[split]]
    assert max(Counter(row["owner"] for row in everything).values()) <= cap
    assert max(len(row["prompt"].split()) for row in everything) <= 19
    beginnings = [tuple(TOKENIZER(row["prompt"])["input_ids"][:4]) for row in everything]
    assert len(beginnings) == len(set(beginnings))
    assert all(EMAIL not in row["prompt"] for row in splits["train"])
    assert report.steps[0].left == count
    for before, after in zip(report.steps, report.steps[1:], strict=False):
        assert after.left == before.left - after.removed
    assert report.steps[-1].splits == {split: len(splits[split]) for split in SPLITS}
    assert report.steps[-1].left == len(everything)
    for split, found in report.splits.items():
        assert found["prompts"] == len(splits[split])
        assert found["owners"] == len({row["owner"] for row in splits[split]})
        lengths = [len(row["prompt"].split()) for row in splits[split]]
        assert found["mean_tokens"] == (round(sum(lengths) / len(lengths), 1) if lengths else None)
    assert json.loads((tmp_path / "out/report.json").read_text())["steps"][-1]["left"] == len(everything)


def test_a_second_run_writes_the_same_bytes(tmp_path: Path) -> None:
    files = []
    for out in ("first", "second"):
        run_into(tmp_path, some_world(0, 300), out)
        files.append({path.name: path.read_bytes() for path in (tmp_path / out).iterdir()})
    assert files[0].keys() == {"train.jsonl", "val.jsonl", "test.jsonl", "report.json"}
    assert files[0] == files[1]


def run_into(folder: Path, table: Rows, out: str) -> None:
    source = write_jsonl(folder / "rows.jsonl", table)
    prepare(source, TOKENIZER, str(folder / out), template="verbatim", max_per_owner=8, val=0.2)


def test_one_source_or_several_in_other_formats(tmp_path: Path) -> None:
    import datasets

    table = some_world(0, 300)
    _, whole = run(tmp_path, table)
    first = write_jsonl(tmp_path / "first.jsonl", table[:120])
    second = str(tmp_path / "second.parquet")
    datasets.Dataset.from_list(table[120:]).to_parquet(second)
    _, parts = run(tmp_path, table, prompts=[first, second])
    assert parts == whole


def test_every_column_is_kept(tmp_path: Path) -> None:
    row = {
        "prompt": "w1 é 中 \u2028\u2029\x85",
        "owner": 7,
        "score": 0.5,
        "none": None,
        "deep": {"list": [1, [2]]},
        "text": "w",
    }
    _, splits = run(tmp_path, [row], **ALL_IN_TRAIN)
    assert splits["train"] == [row]
    assert "é 中" in (tmp_path / "out/train.jsonl").read_text("utf-8")


def test_numbers_and_texts_name_one_owner(tmp_path: Path) -> None:
    table = [*rows("w1", owner="7"), {"prompt": "w2", "owner": 7}]
    report, _ = run(tmp_path, table, **ALL_IN_TRAIN, max_per_owner=1)
    assert report.steps[3].left == 1


def test_what_json_has_no_word_for(tmp_path: Path) -> None:
    import datetime

    import pyarrow
    import pyarrow.parquet

    source = str(tmp_path / "rows.parquet")
    day = datetime.date(2022, 3, 4)
    table = {"prompt": ["w1"], "owner": ["a"], "day": [day], "score": [float("nan")], "many": [[float("inf"), 1.0]]}
    pyarrow.parquet.write_table(pyarrow.table(table), source)
    _, splits = run(tmp_path, [{}], prompts=source, **ALL_IN_TRAIN)
    assert splits["train"] == [{"prompt": "w1", "owner": "a", "day": "2022-03-04", "score": None, "many": [None, 1.0]}]


def test_without_owners_each_prompt_is_one(tmp_path: Path) -> None:
    table = [*({"prompt": words(n, 3)} for n in range(1000)), {"prompt": words(0, 3)}]
    report, splits = run(tmp_path, table, owner=None, max_per_owner=1)
    assert report.steps[-1].left == 1000
    assert 60 < len(splits["val"]) < 140
    assert report.splits["train"]["owners"] is None
    assert [line.split() for line in report.table().splitlines() if line.startswith("owners")] == [["owners", *"---"]]
    _, fewer = run(tmp_path, table[500:], owner=None)
    assert all(row in splits[split] for split in SPLITS for row in fewer[split] if row != table[-1])


def test_the_table(tmp_path: Path) -> None:
    report, splits = run(tmp_path, some_world(0, 300), val=0.2)
    lines = report.table().splitlines()
    assert lines[0].split() == ["step", "removed", "left", "train", "val", "test"]
    assert lines[1].split() == ["read", "0", "300"]
    assert lines[6].split()[-3:] == [str(len(splits[split])) for split in SPLITS]
    assert any(line.startswith("Personal data found in train: email ") for line in lines)


def test_an_empty_split_is_told(tmp_path: Path) -> None:
    report, splits = run(tmp_path, rows("w1", owner=owner_in("train")))
    assert not splits["val"]
    assert [note.split()[0] for note in report.notes] == ["val.jsonl", "test.jsonl"]
    assert "Note: val.jsonl is empty" in report.table()
    assert not run(tmp_path, rows("w1"), **ALL_IN_TRAIN)[0].notes
