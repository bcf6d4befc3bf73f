"""Time and memory of ``lit-instruct data prepare`` on a million made-up prompts, and whether it keeps its word.

    python scripts/benchmark/data_prepare.py                  # a million prompts of 2,000 owners: some minutes
    python scripts/benchmark/data_prepare.py --rows 20000     # the same in seconds

Makes the prompts and a small byte-level BPE tokenizer (nothing is downloaded), runs the command in a process of its
own, once on 1,000 rows (what Python, torch and transformers need by themselves) and once on all, and prints time and
peak memory of both. Then it reads the files that were written and checks, without the code under test: owners of the
splits are disjoint, no owner is above the cap, no two prompts begin with the same 64 tokens, none is too long, the
training split holds none of the planted e-mail addresses, and the counts of the report add up. Exit status 1 if one
fails.

Left out: reading other formats than JSON lines, Presidio, several processes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SYLLABLES = [first + second for first in "bdfgklmnprstvz" for second in ("a", "e", "i", "o", "u", "an", "er", "is")]
CAP, MAX_TOKENS, PREFIX = 200, 1024, 64
OPENINGS = 5_000


class Usage(NamedTuple):
    """What a process needed: seconds by the clock, seconds of processor, peak of resident memory."""

    seconds: float
    cpu_seconds: float
    peak_mib: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--owners", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="keep everything here (default: a temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        failures = benchmark(folder, options.rows, options.owners, options.seed)
    raise SystemExit(1 if failures else 0)


def benchmark(folder: Path, rows: int, owners: int, seed: int) -> list[str]:
    begun = time.perf_counter()
    world = World(owners, seed)
    world.write(folder / "few.jsonl", min(rows, 1_000))
    world.write(folder / "prompts.jsonl", rows)
    build_tokenizer(folder / "few.jsonl").save_pretrained(folder / "tokenizer")
    size = (folder / "prompts.jsonl").stat().st_size / 2**20
    print(f"made {rows:,} prompts of {owners:,} owners, {size:,.0f} MiB, in {time.perf_counter() - begun:.0f} s\n")
    few = prepare(folder, "few")
    many = prepare(folder, "prompts")
    for name, usage in ((f"{min(rows, 1_000):,} rows", few), (f"{rows:,} rows", many)):
        print(
            f"{name:>16}: {usage.seconds:.1f} s ({usage.cpu_seconds:.1f} s CPU), peak memory {usage.peak_mib:,.0f} MiB"
        )
    print(f"{rows / (many.seconds - few.seconds):,.0f} prompts a second\n" if many.seconds > few.seconds else "")
    failures = check(folder, rows)
    print("\n".join(failures) or "all checks passed")
    return failures


class World:
    """Prompts of owners of very different size; some share their opening, some are too long, some name an address."""

    def __init__(self, owners: int, seed: int) -> None:
        self.stream = random.Random(seed)
        self.words = ["".join(self.stream.choices(SYLLABLES, k=self.stream.randint(1, 4))) for _ in range(3_000)]
        self.owners = [f"owner-{number}" for number in range(owners)]
        self.weights = [1 / (number + 10) for number in range(owners)]
        self.openings = [self.text(PREFIX + 6) for _ in range(OPENINGS)]  # a word is a token or more

    def text(self, words: int) -> str:
        return " ".join(self.stream.choices(self.words, k=words))

    def prompt(self) -> str:
        chance = self.stream.random()
        if chance < 0.005:
            return self.text(self.stream.randint(1_025, 1_300))
        if chance < 0.155:
            return f"{self.stream.choice(self.openings)}\n\n{self.text(self.stream.randint(1, 40))}"
        if chance < 0.165:
            name, host = self.stream.choices(self.words, k=2)
            return f"{self.text(20)} {name}@{host}.example {self.text(5)}"
        return self.text(min(round(self.stream.lognormvariate(3.3, 0.8)) + 2, 900))

    def write(self, path: Path, rows: int) -> None:
        owners = self.stream.choices(self.owners, self.weights, k=rows)
        with path.open("w", encoding="utf-8") as handle:
            for number, owner in enumerate(owners):
                handle.write(json.dumps({"prompt": self.prompt(), "owner": owner, "number": number}) + "\n")


def build_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=4_000, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator((json.loads(line)["prompt"] for line in path.open(encoding="utf-8")), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")


def prepare(folder: Path, name: str) -> Usage:
    """Run the command in a process of its own."""
    command = [sys.executable, "-c", "from lit_instruct.cli import main; main()", "data", "prepare"]
    command += ["--prompts", str(folder / f"{name}.jsonl"), "--tokenizer", str(folder / "tokenizer")]
    command += ["--out", str(folder / name), "--overwrite", "true", "--template", "verbatim"]
    command += ["--max_prompt_tokens", str(MAX_TOKENS), "--prefix_tokens", str(PREFIX), "--max_per_owner", str(CAP)]
    begun = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"the command failed with exit status {process.returncode}")
    print()
    in_mib = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return Usage(time.perf_counter() - begun, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / in_mib)


def check(folder: Path, rows: int) -> list[str]:
    """What is wrong with the files; the tokenizer is asked directly, not through the package."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    report = json.loads((folder / "prompts" / "report.json").read_text(encoding="utf-8"))
    failures: list[str] = []
    owners: dict[str, Counter[str]] = {}
    beginnings: set[int] = set()
    for split in ("train", "val", "test"):
        owners[split] = Counter()
        for line in (folder / "prompts" / f"{split}.jsonl").open(encoding="utf-8"):
            row = json.loads(line)
            owners[split][row["owner"]] += 1
            ids = tokenizer.encode(row["prompt"]).ids
            if len(ids) > MAX_TOKENS:
                failures.append(f"{split}: row {row['number']} has {len(ids)} tokens")
            if split == "train" and "@" in row["prompt"]:
                failures.append(f"{split}: row {row['number']} holds an e-mail address")
            beginning = hash(tuple(tokenizer.encode(" ".join(row["prompt"].split())).ids[:PREFIX]))
            if beginning in beginnings:
                failures.append(f"{split}: row {row['number']} begins like another one")
            beginnings.add(beginning)
        if owners[split].total() != report["splits"][split]["prompts"]:
            failures.append(f"{split}: {owners[split].total()} rows, the report says otherwise")
        failures += [f"{split}: {n} prompts of {owner}" for owner, n in owners[split].items() if n > CAP]
        print(f"{split}: {owners[split].total():,} prompts of {len(owners[split]):,} owners")
    for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
        if owners[first].keys() & owners[second].keys():
            failures.append(f"{first} and {second} share owners")
    written = sum(count.total() for count in owners.values())
    if report["steps"][0]["left"] != rows or sum(step["removed"] for step in report["steps"]) != rows - written:
        failures.append("the counts of the steps do not add up")
    return failures


if __name__ == "__main__":
    main()
