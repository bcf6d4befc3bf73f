"""The way from collected prompts to train, val and test (Ouyang et al. 2022, section 3.2 and appendices A.2, C).

Five steps, in this order: too long, shared prefix, too many of one owner, split by owner, personal data in the training
split. Rows stream through a file on disk, so that memory does not grow with their number.

What is kept depends on the rows, the settings and the tokenizer. The order of rows decides two things: which of several
prompts with a shared prefix is kept (the first), and the order within the files (the same as in the sources).
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from lit_instruct.data.bad_rows import (
    SKIPPED_FILE,
    Flaw,
    OnBadRow,
    Place,
    Problem,
    check_on_bad_row,
    data_error,
    write_skipped,
)
from lit_instruct.data.encoding import Tokenizer, try_encode_prompts
from lit_instruct.data.formats import Columns, short
from lit_instruct.data.personal_data import Finder, PersonalData, load_finder, mask_row
from lit_instruct.data.preparation_report import SPLITS, Report, Step
from lit_instruct.data.prompt_rows import (
    Entry,
    as_json,
    as_option,
    digest,
    plain_text,
    prefix_keys,
    read_entry,
    split_of,
)
from lit_instruct.data.prompt_store import PromptStore, StoredPrompt
from lit_instruct.data.records import PromptRecord, prompt_of, stream_prompts
from lit_instruct.data.sources import Row
from lit_instruct.models.tokenizer import load_tokenizer
from lit_instruct.types import ConfigError

log = logging.getLogger(__name__)

Action = Literal["drop", "mask"]
T = TypeVar("T")

_BLOCK = 1024
_SHOW_EVERY = 100_000
_MOST_PROBLEMS = 1000
_SHOWN_VALUES = 10
_FILES = (*(f"{split}.jsonl" for split in SPLITS), SKIPPED_FILE, "report.json")


class _Options(NamedTuple):
    """The arguments of ``prepare`` that say what is done; they stand in the report."""

    prompts: list[str]
    tokenizer: str
    template: str
    max_prompt_tokens: int
    prefix_tokens: int
    owner: str | None
    max_per_owner: int
    val: float
    test: float
    personal_data: PersonalData
    personal_data_model: str | None
    personal_data_action: Action
    only: str | None
    seed: int
    on_bad_row: OnBadRow


def prepare(
    prompts: str | list[str],
    tokenizer: str | Any,
    out: str,
    *,
    template: str = "auto",
    max_prompt_tokens: int = 1024,
    prefix_tokens: int = 64,
    owner: str | None = "owner",
    max_per_owner: int = 200,
    val: float = 0.1,
    test: float = 0.1,
    personal_data: PersonalData = "regex",
    personal_data_model: str | None = None,
    personal_data_action: Action = "drop",
    only: str | None = None,
    seed: int = 1,
    on_bad_row: OnBadRow = "error",
    overwrite: bool = False,
) -> Report:
    """Clean prompts and split them by owner into train, val and test, as InstructGPT's were (section 3.2, A.2, C).

    The steps, in this order: (1) prompts that are too long are dropped; (2) of prompts that begin alike the first is
    kept; (3) each owner keeps at most so many, chosen at random; (4) owners are split by a hash of their id, so that
    no owner is in two splits and new data never move one; (5) personal data are taken out of the training split only.

    Args:
        prompts: Files of rows with a prompt (.jsonl, .json, .csv, .parquet), dataset folders or names of data sets on
            the Hugging Face hub; rows with responses or messages too. Every column is kept.
        tokenizer: Hub name, folder, GGUF file or checkpoint that holds the tokenizer which counts the tokens.
        out: Folder for train.jsonl, val.jsonl, test.jsonl and, written last, report.json.
        template: How prompts become text when they are measured, the same as in training: "auto" (the tokenizer's own
            chat template, else plain), "plain", "verbatim", or the path of a Jinja file.
        max_prompt_tokens: Most tokens of a prompt, template included.
        prefix_tokens: Prompts share a prefix if that many tokens at their beginning are the same, whitespace and the
            template apart; shorter ones if they are the same as a whole.
        owner: Column that says who wrote the prompt, the coarsest that there is (an organisation rather than a user).
            Null: every prompt is its own owner, and neither the cap nor the split can hold owners together.
        max_per_owner: Most prompts of one owner.
        val: Share of the owners whose prompts go to val.jsonl.
        test: Share of the owners whose prompts go to test.jsonl.
        personal_data: What looks for personal data: "regex" (built-in patterns), "presidio" (these and the Presidio
            library, pip install "lit-instruct[pii]") or "off".
        personal_data_model: With presidio: installed spaCy model that finds names too. Null: formats only.
        personal_data_action: "drop" removes a row with personal data, "mask" puts [EMAIL], [PHONE], ... in its place.
        only: COLUMN=VALUE: of what is left only such rows are written, for example source=customer for PPO.
        seed: Decides which prompts of an owner are kept; it does not move an owner.
        on_bad_row: What to do with rows that cannot be used: "error" lists them and stops, "skip" leaves them out and
            lists them in skipped_rows.jsonl, in the folder out.
        overwrite: Replace files that an earlier run left in the folder.

    Returns:
        What every step did.

    Raises:
        ConfigError: a setting cannot work, or the folder cannot be written.
        DataError: rows cannot be used (file, line and field are named) and are not to be left out, or no prompt is
            left to train on.
    """
    sources = [prompts] if isinstance(prompts, str) else list(prompts)
    options = _Options(
        prompts=sources,
        tokenizer=tokenizer if isinstance(tokenizer, str) else type(tokenizer).__name__,
        template=template,
        max_prompt_tokens=max_prompt_tokens,
        prefix_tokens=prefix_tokens,
        owner=owner,
        max_per_owner=max_per_owner,
        val=val,
        test=test,
        personal_data=personal_data,
        personal_data_model=personal_data_model,
        personal_data_action=personal_data_action,
        only=only,
        seed=seed,
        on_bad_row=on_bad_row,
    )
    _check(options)
    finder = load_finder(personal_data, personal_data_model)
    ruler = load_tokenizer(tokenizer, template=template)
    folder = _open_folder(out, overwrite=overwrite)
    try:
        with tempfile.TemporaryDirectory(prefix=".preparing-", dir=folder) as scratch:
            with closing(PromptStore(Path(scratch) / "prompts.sqlite")) as store:
                report = _Pipeline(options, ruler, finder, store).run(Path(scratch))
            _publish(Path(scratch), folder, report)
    except (OSError, sqlite3.Error) as error:
        raise ConfigError(
            f"out: writing to {out!r} failed ({error}); need a folder that can be written, with room for two to three "
            "times the data. Do: make room, or name another folder."
        ) from error
    return report


class _Pipeline:
    """The steps over one store."""

    def __init__(self, options: _Options, tokenizer: Tokenizer, finder: Finder | None, store: PromptStore) -> None:
        self.options, self.tokenizer, self.finder, self.store = options, tokenizer, finder, store
        self.report = Report({**options._asdict()})
        self.found: dict[str, None] = {}  # the first values of the column of ``only``
        self.wanted = False  # any row at all

    def run(self, folder: Path) -> Report:
        """All steps; the three files of prompts lie in ``folder`` afterwards."""
        options, report = self.options, self.report
        read, skipped, too_long, shared = self._gather(folder)
        self._check_only(read)
        report.steps.append(Step("prompts", "read", 0, read))
        if options.on_bad_row == "skip":
            report.add("on_bad_row", "0 cannot be used", removed=skipped)
            if skipped:
                report.notes.append(f"{skipped:,} rows were left out; {SKIPPED_FILE} lists them.")
        about = f"1 longer than {options.max_prompt_tokens:,} tokens"
        report.add("max_prompt_tokens", about, removed=too_long)
        report.add("prefix_tokens", f"2 first {options.prefix_tokens} tokens shared", removed=shared)
        log.info("counting prompts per owner")
        about = f"3 more than {options.max_per_owner:,} of one owner"
        report.add("max_per_owner", about, removed=self.store.cap(options.max_per_owner))
        log.info("writing")
        self._write(folder)
        if not report.splits["train"]["prompts"]:
            raise data_error(
                f"got no prompts to train on, of {read:,} read:\n{report.table()}",
                [],
                "give more data or owners, or change the step that took the last ones.",
            )
        return report

    def _gather(self, folder: Path) -> tuple[int, int, int, int]:
        """Steps 1 and 2: count rows read, those left out, prompts too long, prompts that begin like an earlier one."""
        read = too_long = shared = 0
        skip = self.options.on_bad_row == "skip"
        problems: list[Problem] = []
        for block in _blocks(stream_prompts(self.options.prompts)):
            read += len(block)
            usable, found = self._usable(block)
            problems += found
            if problems and not skip:  # the rest is only read to tell what else is wrong
                if len(problems) >= _MOST_PROBLEMS:
                    break
                continue
            stored = self._measured(usable)
            kept = self.store.add(stored)
            too_long += len(usable) - len(stored)
            shared += len(stored) - kept
            if read // _SHOW_EVERY > (read - len(block)) // _SHOW_EVERY:
                log.info("%d prompts read", read)
        if problems and (not skip or len(problems) == read):
            leave_out = "; --on_bad_row skip leaves them out" if len(problems) < read else ""
            raise data_error(
                f"{len(problems)} of the {read} rows read cannot be used:",
                problems,
                f"mend or remove these rows{leave_out}. --owner names the column with the owner (null: there is none).",
            )
        if not read:
            raise data_error("got no sources of prompts.", [], "name at least one file or data set.")
        if skip:
            write_skipped(folder, problems)
        return read, len(problems), too_long, shared

    def _usable(
        self, block: Sequence[tuple[Row, PromptRecord] | Problem]
    ) -> tuple[list[tuple[Entry, list[int]]], list[Problem]]:
        """The rows that can be used, with the ids of their prompts, and what is wrong with the others."""
        items = [item if isinstance(item, Problem) else self._entry(*item) for item in block]
        prompts = [item.prompt for item in items if isinstance(item, Entry)]
        encoded = iter(try_encode_prompts(self.tokenizer, prompts))
        usable: list[tuple[Entry, list[int]]] = []
        problems: list[Problem] = []
        for item in items:
            ids = next(encoded) if isinstance(item, Entry) else []
            if isinstance(item, Problem):
                problems.append(item)
            elif isinstance(ids, Flaw):
                problems.append(Problem(item.place, ids))
            else:
                usable.append((item, ids))
        return usable, problems

    def _entry(self, row: Row, record: PromptRecord) -> Entry | Problem:
        entry = read_entry(row, record.prompt, owner_column=self.options.owner, only=self.options.only)
        if isinstance(entry, Flaw):
            return Problem(row.place, entry)
        self.wanted |= entry.wanted
        if self.options.only is not None and len(self.found) <= _SHOWN_VALUES:
            self.found[as_option(row.columns[self.options.only.partition("=")[0]])] = None
        return entry

    def _check_only(self, read: int) -> None:
        only = self.options.only
        if only is None or self.wanted:
            return
        values = [short(value) for value in self.found][:_SHOWN_VALUES]
        more = ", ..." if len(self.found) > _SHOWN_VALUES else ""
        raise ConfigError(
            f"only: got {only!r}, and none of {read:,} rows is like that; need a value that the column "
            f"{only.partition('=')[0]!r} has (found: {', '.join(values)}{more}). Do: check the value."
        )

    def _measured(self, encoded: Sequence[tuple[Entry, list[int]]]) -> list[StoredPrompt]:
        """The entries that are short enough, with their keys."""
        options = self.options
        fitting = [(entry, len(ids)) for entry, ids in encoded if len(ids) <= options.max_prompt_tokens]
        texts = [plain_text(entry.prompt) for entry, _ in fitting]
        keys = prefix_keys(self.tokenizer, texts, options.prefix_tokens) if texts else []
        stored = []
        for (entry, tokens), text, key in zip(fitting, texts, keys, strict=True):
            owner = digest("prompt", text).hex() if entry.owner is None else entry.owner
            priority = digest("cap", str(options.seed), owner, text)
            stored.append(StoredPrompt(key, owner, priority, tokens, entry.wanted, entry.line))
        return stored

    def _write(self, folder: Path) -> None:
        """Steps 4, 5 and the choice of rows to write."""
        options, report = self.options, self.report
        split_into: Counter[str] = Counter()
        clean: Counter[str] = Counter()
        prompts: Counter[str] = Counter()
        tokens: Counter[str] = Counter()
        kinds: Counter[str] = Counter()
        found_in = 0
        with ExitStack() as stack:
            files = {
                split: stack.enter_context((folder / f"{split}.jsonl").open("w", encoding="utf-8", newline="\n"))
                for split in SPLITS
            }
            for number, stored in self.store:
                split = split_of(stored.owner, val=options.val, test=options.test)
                split_into[split] += 1
                if split == "train" and self.finder is not None:
                    row, found = mask_row(json.loads(stored.line), self.finder)
                    kinds.update(found)
                    found_in += bool(found)
                    masked = self._masked(number, stored, row) if found else stored
                    if masked is None:
                        continue
                    stored = masked
                clean[split] += 1
                if stored.wanted:
                    files[split].write(stored.line + "\n")
                    self.store.note(split, stored.owner)
                    prompts[split] += 1
                    tokens[split] += stored.tokens
        report.add("split", "4 split by owner", splits=split_into)
        about = f"5 personal data in train ({options.personal_data}, {options.personal_data_action})"
        report.add("personal_data", about, removed=split_into.total() - clean.total(), splits=clean)
        if options.only is not None:
            removed = clean.total() - prompts.total()
            report.add("only", f"6 not {options.only}", removed=removed, splits=prompts)
        report.personal_data = {"prompts": found_in, "kinds": dict(sorted(kinds.items()))}
        for split in SPLITS:
            self._summarise(split, prompts[split], tokens[split])

    def _masked(self, number: int, stored: StoredPrompt, row: Columns) -> StoredPrompt | None:
        """The prompt without its personal data; None if it is to go, or no longer passes the steps before."""
        if self.options.personal_data_action == "drop":
            return None
        entry = Entry(Place("", "a masked row"), prompt_of(row), stored.owner, stored.wanted, as_json(row))
        (ids,) = try_encode_prompts(self.tokenizer, [entry.prompt])
        measured = [] if isinstance(ids, Flaw) else self._measured([(entry, ids)])
        if not measured or not self.store.rekey(number, measured[0].key):
            return None
        return measured[0]

    def _summarise(self, split: str, prompts: int, tokens: int) -> None:
        options = self.options
        owners = None if options.owner is None else self.store.owners(split)
        self.report.splits[split] = {
            "prompts": prompts,
            "owners": owners,
            "prompts_per_owner": round(prompts / owners, 2) if owners else None,
            "mean_tokens": round(tokens / prompts, 1) if prompts else None,
        }
        if not prompts and (split == "train" or getattr(options, split)):
            self.report.notes.append(f"{split}.jsonl is empty: no prompt is left of an owner whose hash falls there.")


def _check(options: _Options) -> None:
    """Settings that no data could make work."""
    check_on_bad_row(options.on_bad_row)
    for name in ("max_prompt_tokens", "prefix_tokens", "max_per_owner"):
        if getattr(options, name) < 1:
            raise ConfigError(f"{name}: got {getattr(options, name)}; need at least 1. Do: change {name}.")
    if min(options.val, options.test) < 0 or not options.val + options.test < 1:
        raise ConfigError(
            f"val, test: got {options.val} and {options.test}; need shares of the owners, from 0 on and together below "
            "1, so that some are left to train on. Do: change val or test."
        )
    if options.only is not None and not all(options.only.partition("=")):
        raise ConfigError(f"only: got {options.only!r}; need COLUMN=VALUE. Do: write for example source=customer.")


def _blocks(items: Iterable[T]) -> Iterator[list[T]]:
    iterator = iter(items)
    while block := list(islice(iterator, _BLOCK)):
        yield block


def _open_folder(out: str, *, overwrite: bool) -> Path:
    """The output folder, made if need be, without files of an earlier run."""
    folder = Path(out).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"out: got {out!r}, which cannot be made or is no folder ({error}); need a folder that can be written. Do: "
            "name another one."
        ) from error
    here = [name for name in _FILES if (folder / name).exists()]
    if here and not overwrite:
        raise ConfigError(
            f"out: got {out!r}, which already holds {', '.join(here)}. Do: name another folder, or set overwrite=true."
        )
    return folder


def _publish(scratch: Path, folder: Path, report: Report) -> None:
    """Move the finished files to their place; the report goes last, so that where it stands everything does."""
    (scratch / "report.json").write_text(report.to_json(), encoding="utf-8")
    (folder / "report.json").unlink(missing_ok=True)
    if not (scratch / SKIPPED_FILE).exists():
        (folder / SKIPPED_FILE).unlink(missing_ok=True)  # an old list does not speak of the new files
    for name in [name for name in _FILES if (scratch / name).exists()]:
        with (scratch / name).open("rb") as handle:
            os.fsync(handle.fileno())
        (scratch / name).replace(folder / name)
