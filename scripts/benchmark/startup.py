"""Seconds of processor from the start of a process until it answers, or has trained its first step.

    python scripts/benchmark/startup.py               # the median of five processes each: about two minutes
    python scripts/benchmark/startup.py --runs 1

Three figures with their goals, each from fresh processes, user and system time together, so that a busy machine counts
little: ``import lit_instruct``, ``lit-instruct --help``, and ``lit-instruct sft fit`` on a model of a few thousand
parameters up to the end of its first optimizer step, less what ``import lightning, transformers, datasets`` takes by
itself. The fit runs with the shipped ``sft/default.yaml`` and its defaults: logger, bar and checkpoints. Exit status 1
if a figure is above its goal.

Left out: the first process after an installation, which also reads the files from the disk and compiles them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import lightning.pytorch as pl

IMPORT_GOAL, HELP_GOAL, STEP_GOAL = 0.3, 0.5, 5.0  # seconds
WORDS = [f"w{number}" for number in range(30)]
REPORT = "STARTUP_REPORT"  # names the file that the trained process writes its time into


class ReportFirstStep(pl.Callback):
    """Writes what the process has needed so far when its first optimizer step is over."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        path = Path(os.environ[REPORT])
        if trainer.global_step == 1 and not path.exists():
            path.write_text(str(time.process_time()), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="processes for each figure")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(folder)
        command = ["-c", "from lit_instruct.cli import main; main()"]
        python(["-c", "import lightning, transformers, datasets, lit_instruct"])  # warm the disk's cache
        imports, helps, heavy, steps = [], [], [], []
        for _ in range(options.runs):  # in turn, so that a change of the machine's speed touches all of them
            imports.append(python(["-c", "import lit_instruct"]))
            helps.append(python([*command, "--help"]))
            heavy.append(python(["-c", "import lightning, transformers, datasets"]))
            steps.append(first_step(folder, command))
    figures = [
        ("import lit_instruct", median(imports), IMPORT_GOAL),
        ("lit-instruct --help", median(helps), HELP_GOAL),
        ("first step, less the import of lightning, transformers, datasets", median(steps) - median(heavy), STEP_GOAL),
    ]
    for name, seconds, goal in figures:
        print(f"{name}: {seconds:.2f} s (goal {goal} s{'' if seconds <= goal else ', MISSED'})")
    print(
        f"  of which: first step {spread(steps)}, import {spread(heavy)}; processor seconds, {options.runs} processes"
    )
    raise SystemExit(any(seconds > goal for _, seconds, goal in figures))


def prepare(folder: Path) -> None:
    """A word-level tokenizer and a few demonstrations."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({word: at for at, word in enumerate(["<eos>", "<unk>", *WORDS])}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<unk>").save_pretrained(folder)
    rows = [{"prompt": " ".join(WORDS[at : at + 4]), "response": " ".join(WORDS[at + 4 : at + 9])} for at in range(20)]
    (folder / "demonstrations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def python(arguments: list[str], **more: Any) -> float:
    """Run a Python process to its end.

    Args:
        arguments: behind ``python``.
        more: for ``subprocess.Popen``.

    Returns:
        Its seconds of processor, those of its threads included.

    Raises:
        RuntimeError: it failed; with the end of what it printed.
    """
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen([sys.executable, *arguments], stdout=output, stderr=output, **more)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            raise RuntimeError(f"{arguments} failed:\n{output.read().decode(errors='replace')[-2000:]}")
    return used.ru_utime + used.ru_stime


def first_step(folder: Path, command: list[str]) -> float:
    """Seconds of processor of a process of ``sft fit`` up to the end of its first step."""
    report = folder / "seconds"
    report.unlink(missing_ok=True)
    llama = "{model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2}"
    arguments = [
        *["sft", "fit", "--config", "sft/default.yaml", "--model.base", llama, "--model.tokenizer", str(folder)],
        *["--data.demonstrations", str(folder / "demonstrations.jsonl"), "--data.batch_size", "8"],
        *["--trainer.max_epochs", "1", "--trainer.accelerator", "cpu", "--trainer.devices", "1"],
        *["--trainer.callbacks+", "startup.ReportFirstStep"],
    ]
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, REPORT: str(report), "PYTHONPATH": os.pathsep.join(paths)}
    python([*command, *arguments], env=environment, cwd=folder)
    return float(report.read_text(encoding="utf-8"))


def spread(seconds: list[float]) -> str:
    """Median with the least and the most."""
    return f"{median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"


if __name__ == "__main__":
    main()
