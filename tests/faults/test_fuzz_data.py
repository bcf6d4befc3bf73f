"""Random data: files and rows are read or refused in our own words, and what is read comes out of the collators whole.

Each property has a short run here and a long one, marked slow: together 60,000 inputs, other random ones every time.
``LIT_INSTRUCT_FUZZ=0.1`` makes the long ones shorter, ``10`` longer.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lit_instruct.data.bad_rows import write_skipped
from lit_instruct.data.modules import ComparisonDataModule, DemonstrationDataModule, PromptDataModule
from lit_instruct.data.records import Loaded, read_comparisons, read_demonstrations, read_prompts, read_texts
from lit_instruct.types import DataError
from tests.helpers.tiny import write_jsonl

SHORT, ROUND = 150, 1000
LONG = float(os.environ.get("LIT_INSTRUCT_FUZZ", "1"))
HANGS = 60
"""Seconds for one small input; a hundred times what the slowest takes."""

READ = {
    "demonstrations": read_demonstrations,
    "comparisons": read_comparisons,
    "prompts": read_prompts,
    "text": read_texts,
}


@contextmanager
def time_limit() -> Iterator[None]:
    def stop(*arguments: object) -> None:
        raise TimeoutError(f"took more than {HANGS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(HANGS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fuzz(check: Callable[[Any, Path], None], inputs: st.SearchStrategy[Any], count: int, *, fixed: bool) -> None:
    """Run ``check`` on so many inputs, each with a folder; ``fixed``: the same ones every time."""
    done = 0
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # thousands of files that are flushed to the disk
    with tempfile.TemporaryDirectory(dir=memory) as folder:

        def run(value: Any) -> None:
            nonlocal done
            done += 1
            with time_limit():
                check(value, Path(folder))

        while done < count:  # in rounds: hypothesis remembers what it tried, and takes ever more memory
            settings(
                max_examples=min(ROUND, count - done),
                deadline=None,
                database=None,
                derandomize=fixed,
                suppress_health_check=list(HealthCheck),
                print_blob=True,
            )(given(inputs)(run))()
    print(f"{done} inputs")


# -- files


class File(NamedTuple):
    name: str
    content: bytes


WORDS = ["w1", " ", "\n", "\r", "\0", "é", "\ufeff", "\u2028", "\ud800", "😀", "<eos>", '"', "\\", "x" * 300]
CHARACTERS = st.characters(codec=None, exclude_categories=())  # half surrogate pairs too: JSON can write them
TEXTS = st.one_of(
    st.sampled_from(["w1", "w2 w3", "", " "]),
    st.lists(st.sampled_from(WORDS), max_size=4).map("".join),
    st.text(CHARACTERS, max_size=8),
)
NUMBERS = st.one_of(
    st.integers(),
    st.integers(-3, 12),
    st.floats(),
    st.sampled_from([10**18, 2**31, 2**63, 10**400, 1.0, float("nan"), float("inf")]),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=8
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {},
        optional={"role": st.sampled_from(["user", "assistant", "system", "bot", None, 3]), "content": TEXTS | SCALARS},
    )
    | SCALARS,
    max_size=4,
)
COLUMNS = {
    "prompt": TEXTS | MESSAGES | VALUES,
    "response": TEXTS | MESSAGES | VALUES,
    "completion": TEXTS | VALUES,
    "responses": st.lists(TEXTS, min_size=2, max_size=4) | st.lists(TEXTS | SCALARS, max_size=5) | VALUES,
    "ranks": st.lists(st.integers(1, 4), min_size=2, max_size=4) | st.lists(NUMBERS | SCALARS, max_size=5) | VALUES,
    "chosen": TEXTS | MESSAGES | VALUES,
    "rejected": TEXTS | MESSAGES | VALUES,
    "messages": MESSAGES | VALUES,
    "text": TEXTS | VALUES,
    "labeler": SCALARS | VALUES,
    "id": st.integers(0, 2) | TEXTS | VALUES,
}
ROWS = st.lists(
    st.one_of(st.fixed_dictionaries({}, optional=COLUMNS), st.dictionaries(TEXTS, VALUES, max_size=3), VALUES),
    max_size=5,
)


def packed(name: str, content: bytes) -> bytes:
    """Compressed as the file's name says."""
    if name.endswith(".gz"):
        return gzip.compress(content, 1)
    if name.endswith(".zst"):
        sink = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(content)
        return sink.getvalue().to_pybytes()
    return content


def as_csv(rows: list[Any]) -> bytes:
    table = [row for row in rows if isinstance(row, dict)]
    text = io.StringIO()
    writer = csv.writer(text)
    names = list(dict.fromkeys(name for row in table for name in row))
    writer.writerow(names)
    for row in table:
        cells = [row.get(name) for name in names]
        writer.writerow([cell if isinstance(cell, str) else json.dumps(cell) for cell in cells])
    return text.getvalue().encode("utf-8", "surrogatepass")  # bytes that are not UTF-8


def written(name: str, rows: list[Any]) -> File:
    if ".csv" in name:
        content = as_csv(rows)
    elif ".jsonl" in name:
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    else:
        content = json.dumps(rows).encode()
    return File(name, packed(name, content))


@cache
def whole_files() -> list[File]:
    """Good files of every format, to be damaged."""
    rows = [
        {
            "prompt": f"w{n} é",
            "response": "w1",
            "responses": ["w1", "w2", "w3"],
            "ranks": [1, 2, 2],
            "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
            "text": "w1 w2",
            "labeler": "ann",
            "id": n,
        }
        for n in range(6)
    ]
    names = ["a.jsonl", "a.json", "a.csv", "a.jsonl.gz", "a.jsonl.zst", "a.csv.gz", "a.json.zst"]
    files = [written(name, rows) for name in names]
    for compression in ("none", "snappy", "zstd"):
        sink = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink, compression=compression, row_group_size=4)
        files.append(File("a.parquet", sink.getvalue().to_pybytes()))
    return files


FRAGMENTS = [
    *(json.dumps(name).encode() for name in COLUMNS),
    *[
        b"{",
        b"}",
        b"[",
        b"]",
        b":",
        b",",
        b'"',
        b"\\u0000",
        b"\\ud800",
        b"\n",
        b"\r\n",
        b"\0",
        b"null",
        b"true",
        b"NaN",
    ],
    *[
        b"1e999",
        b"-Infinity",
        b"9" * 4400,
        b"[" * 80,
        b'{"a":' * 70,
        b"\xff",
        b"\xfe\xff",
        b"\xef\xbb\xbf",
        b"prompt,response\n",
    ],
    *[
        b'"prompt": "w1"',
        b'"response": "w2"',
        b'{"prompt": "w1", "response": "w2"}\n',
        b"w1,w2\n",
        b'"w1"',
        b"PAR1",
        b"\x1f\x8b\x08",
    ],
]
NAMES = ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz", "a.jsonl.zst", "a.csv.gz", "a.json.gz", "a.json.zst"]
SOUP = st.builds(
    File,
    st.sampled_from(NAMES),
    st.binary(max_size=200) | st.lists(st.sampled_from(FRAGMENTS) | st.binary(max_size=4), max_size=20).map(b"".join),
)


@st.composite
def damaged(draw: Any) -> File:
    """A good file in which some bytes were changed, taken out, put in or repeated, or that was cut off."""
    name, content = draw(st.sampled_from(whole_files()))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, max(len(content) - 1, 0)))
        end = min(start + draw(st.integers(0, 40)), len(content))
        middle = draw(
            st.sampled_from([b"", content[start:end] * 2, b"\0" * (end - start)])
            | st.binary(max_size=4)
            | st.sampled_from(FRAGMENTS)
        )
        content = content[:start] + middle + content[end:]
        if draw(st.integers(0, 5)) == 0:
            content = content[: draw(st.integers(0, len(content)))]
    return File(name, content)


def as_file(file: File) -> File:
    """Half of the soups are packed as their name says, and get beyond the reader's front door."""
    return File(file.name, packed(file.name, file.content)) if len(file.content) % 2 else file


STRUCTURED = st.builds(written, st.sampled_from([name for name in NAMES if "parquet" not in name]), ROWS)
FILES = st.tuples(st.sampled_from(list(READ)), st.one_of(SOUP.map(as_file), damaged(), STRUCTURED))


def check_file(read_file: tuple[str, File], folder: Path) -> None:
    """A reader gives records that later steps can rely on, and problems that can be written down; or a DataError."""
    kind, file = read_file
    path = folder / file.name
    path.write_bytes(file.content)
    try:
        loaded = READ[kind](str(path), on_bad_row="skip")
        check_records(kind, loaded)
        listed = write_skipped(folder, loaded.problems).read_bytes().splitlines()
        assert [json.loads(line)["source"] for line in listed] == [str(path)] * len(loaded.problems)
        loaded.check("error")
    except DataError as error:
        check_message(str(error), path)


def check_records(kind: str, loaded: Loaded[Any]) -> None:
    assert len(loaded.records) == len(loaded.places)
    for record in loaded.records:
        texts = [record.text] if kind == "text" else texts_of(record.prompt)
        texts += [record.response] if kind == "demonstrations" else []
        if kind == "comparisons":
            texts += record.responses
            assert 2 <= len(record.responses) == len(record.ranks) <= 1000
            assert all(type(rank) is int and 1 <= rank < 2**31 for rank in record.ranks)
            assert record.labeler is None or record.labeler.strip()
        for text in texts:
            assert text.strip()
            text.encode("utf-8")


def texts_of(prompt: Any) -> list[str]:
    if isinstance(prompt, str):
        return [prompt]
    assert prompt[-1]["role"] == "user"
    return [message["content"] for message in prompt]


def check_message(message: str, path: Path) -> None:
    """It names the file, fits on a screen and can be printed."""
    assert str(path) in message
    assert "\nDo: " in message
    assert len(message) < 30_000
    message.encode("utf-8")


def test_any_file_is_read_or_refused() -> None:
    fuzz(check_file, FILES, 2 * SHORT, fixed=True)


@pytest.mark.slow  # 40,000 files
def test_forty_thousand_files_are_read_or_refused() -> None:
    fuzz(check_file, FILES, round(40_000 * LONG), fixed=False)


# -- from rows to batches


TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@cache
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE as real models have: whatever the text, its ids can be decoded to it."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(["user: w1 w2 w3\nassistant: w2", "the w1 of w3 and the w1"] * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tokens(text: str) -> list[int]:
    """Ids by the tokenizer's own core, without what transformers and lit_instruct put around it."""
    return byte_tokenizer().backend_tokenizer.encode(text, add_special_tokens=False).ids


def decoded(ids: Any) -> str:
    return byte_tokenizer().backend_tokenizer.decode(list(map(int, ids)), skip_special_tokens=False)


class Plan(NamedTuple):
    """Rows that have the right shape, with any texts, and how they are read."""

    rows: list[dict[str, Any]]
    limit: int | None
    long_prompt: str
    loss_on_prompt: bool


USABLE = st.sampled_from(["w1", "w2 w3", "w1\nw2 ", "w1<eos>", "é\u2028", "😀"]) | st.text(min_size=1, max_size=8)
LIKELY = st.one_of(*[USABLE] * 6, TEXTS)  # else hardly a row of five texts could be used
TURNS = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": LIKELY}), max_size=2
)
PROMPTS = LIKELY | st.builds(lambda turns, last: [*turns, {"role": "user", "content": last}], TURNS, LIKELY)


@st.composite
def row(draw: Any) -> dict[str, Any]:
    responses = draw(st.lists(LIKELY, min_size=2, max_size=4))
    ranks = draw(st.lists(st.integers(1, 2**31 - 1), min_size=len(responses), max_size=len(responses), unique=True))
    return {"prompt": draw(PROMPTS), "response": responses[0], "responses": responses, "ranks": ranks}


PLANS = st.builds(
    Plan,
    st.lists(row(), min_size=1, max_size=4),
    st.none() | st.integers(12, 60),
    st.sampled_from(["drop", "truncate_left"]),
    st.booleans(),
)


def usable(text: str) -> bool:
    return bool(text.strip()) and not any(0xD800 <= ord(character) < 0xE000 for character in text)


def shown(prompt: Any) -> str:
    """What the template makes of a prompt."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return "".join(f"{turn['role']}: {turn['content']}\n" for turn in turns) + "assistant:"


def ended(response: str) -> str | None:
    """The response with one end of text; None if one stands inside."""
    while response.endswith("<eos>"):
        response = response.removesuffix("<eos>")
    return None if "<eos>" in response else response + "<eos>"


class Expected(NamedTuple):
    prompt: list[int]
    responses: list[str]
    ranks: list[int]


def expected(plan: Plan, *, responses_of: Callable[[dict[str, Any]], list[str]]) -> list[Expected]:
    """What should be left of the rows, worked out one by one."""
    kept = []
    for row in plan.rows:
        contents = [row["prompt"]] if isinstance(row["prompt"], str) else [turn["content"] for turn in row["prompt"]]
        responses = responses_of(row)
        if not all(map(usable, [*contents, *responses])):
            continue
        whole = [ended(response) for response in responses]
        if None in whole:
            continue
        prompt = tokens(shown(row["prompt"]))
        room = None if plan.limit is None else plan.limit - max((len(tokens(text)) for text in whole), default=0)
        if room is not None and len(prompt) > room:
            if plan.long_prompt == "drop":
                continue
            prompt = prompt[-room:]
        kept.append(Expected(prompt, whole, row["ranks"]))
    return kept


def batch_of(kind: Any, source: str, plan: Plan, **more: Any) -> Any:
    """All rows in one batch; None if nothing is left, or responses do not fit (only prompts are ever cut)."""
    limit = {"max_prompt_tokens" if kind is PromptDataModule else "max_length": plan.limit}
    module = kind(
        source,
        byte_tokenizer(),
        val=0.0,
        batch_size=1,
        long_prompt=plan.long_prompt,
        on_bad_row="skip",
        **limit,
        **more,
    )
    try:
        module.setup("fit")
    except DataError:
        return None
    return module._collate()(module.samples.train)


def too_long(plan: Plan, rows: list[Expected]) -> bool:
    """A response leaves no room for a single token of its prompt, which is an error where prompts are cut."""
    return (
        plan.limit is not None
        and plan.long_prompt == "truncate_left"
        and any(plan.limit <= max(len(tokens(text)) for text in row.responses) for row in rows if row.responses)
    )


def check_batches(plan: Plan, folder: Path) -> None:
    """Decoded batches are the usable rows of the file, in order, whichever module reads it."""
    source = write_jsonl(folder / "rows.jsonl", plan.rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        check_prompts(plan, batch_of(PromptDataModule, source, plan))
        check_demonstrations(plan, batch_of(DemonstrationDataModule, source, plan, loss_on_prompt=plan.loss_on_prompt))
        check_comparisons(plan, batch_of(ComparisonDataModule, source, plan))


def check_prompts(plan: Plan, batch: Any) -> None:
    rows = expected(plan, responses_of=lambda row: [])
    if batch is None:
        assert not rows
        return
    masked = zip(batch.prompt_ids_BP, batch.prompt_mask_BP, strict=True)
    assert [ids[mask].tolist() for ids, mask in masked] == [row.prompt for row in rows]
    assert batch.prompt_mask_BP[:, -1].all()  # padded on the left
    assert (batch.prompt_ids_BP[~batch.prompt_mask_BP] == byte_tokenizer().pad_token_id).all()


def check_demonstrations(plan: Plan, batch: Any) -> None:
    rows = expected(plan, responses_of=lambda row: [row["response"]])
    if batch is None:
        assert not rows or too_long(plan, rows)
        return
    parts = zip(*batch, rows, strict=True)
    for ids, mask, loss_mask, row in parts:
        length = int(mask.sum())
        assert mask[:length].all()  # padded on the right
        assert ids[: len(row.prompt)].tolist() == row.prompt
        assert decoded(ids[len(row.prompt) : length]) == row.responses[0]
        assert (ids[length:] == byte_tokenizer().pad_token_id).all()
        learnt = [plan.loss_on_prompt] * len(row.prompt) + [True] * (length - len(row.prompt))
        assert loss_mask.tolist() == learnt + [False] * (len(ids) - length)


def check_comparisons(plan: Plan, batch: Any) -> None:
    rows = expected(plan, responses_of=lambda row: row["responses"])
    if batch is None:
        assert not rows or too_long(plan, rows)
        return
    prompts = zip(batch.prompt_ids_BP, batch.prompt_mask_BP, strict=True)
    assert [ids[mask].tolist() for ids, mask in prompts] == [row.prompt for row in rows]
    responses = zip(batch.response_ids_NR, batch.response_mask_NR, strict=True)
    assert [decoded(ids[mask]) for ids, mask in responses] == [text for row in rows for text in row.responses]
    assert batch.response_mask_NR[:, 0].all()  # padded on the right
    assert batch.ranks_N.tolist() == [rank for row in rows for rank in row.ranks]
    assert batch.group_N.tolist() == [number for number, row in enumerate(rows) for _ in row.responses]


def test_rows_come_out_of_the_collators_whole() -> None:
    fuzz(check_batches, PLANS, SHORT, fixed=True)


@pytest.mark.slow  # 20,000 small data sets
def test_twenty_thousand_data_sets_come_out_of_the_collators_whole() -> None:
    fuzz(check_batches, PLANS, round(20_000 * LONG), fixed=False)
