"""The whole of InstructGPT on the toy world: one command, a few minutes on two cores, nothing downloaded.

Each stage is an ordinary ``lit-instruct`` command with a shipped configuration, run inside the output folder; the
command is printed, so that a stage can be run again by hand.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from lit_instruct.cli import run_stage
from lit_instruct.evaluation.likelihood import kl_to_reference, pretraining_loss
from lit_instruct.evaluation.win_rate import win_rate
from lit_instruct.models.backbone import load_language_model
from lit_instruct.models.scalar_head import ScalarModel
from lit_instruct.models.tokenizer import load_tokenizer
from lit_instruct.rewards import RewardModelScorer
from lit_instruct.toyworld.gold import Assessment
from lit_instruct.toyworld.labelers import (
    MAX_RESPONSES,
    MIN_RESPONSES,
    PAPER_AGREEMENT,
    calibrate_noise,
    make_labelers,
    measure_agreement,
)
from lit_instruct.toyworld.measure import Samples, accuracy_against_gold, judge, sample
from lit_instruct.toyworld.tokenizer import build_tokenizer
from lit_instruct.toyworld.world import ToyWorld
from lit_instruct.toyworld.writing import read_jsonl, write_jsonl, write_world
from lit_instruct.types import ConfigError

DOCUMENTS, HELDOUT_DOCUMENTS = 22_000, 600
DEMONSTRATIONS, PROMPTS, HELDOUT_PROMPTS = 3_000, 3_000, 1_500
RANKINGS = 1_000
LABELERS = 20
CHUNK_TOKENS = 64
CHECKED_PROMPTS, CHECKED_RESPONSES = 300, 5

LAST = "last.ckpt"


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the options of ``lit-instruct quickstart`` and run it.

    Args:
        arguments: what follows ``quickstart`` on the command line.
    """
    parser = argparse.ArgumentParser(
        prog="lit-instruct quickstart", description="Train SFT, reward model and PPO-ptx on a small made-up world."
    )
    parser.add_argument("--seed", type=int, default=1, help="decides the world and every random choice (default 1)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/quickstart"), help="folder for data, checkpoints, results"
    )
    options = parser.parse_args(arguments)
    with _inside(options.out):
        _quiet()
        Quickstart(options.seed).run()
    print(f"\nEverything is in {options.out}: summary.json, samples.md, data/, a folder for each stage.")
    print(f"Curves and samples:  tensorboard --logdir {options.out}")


class Quickstart:
    """Runs the stages in the current folder and keeps what they report."""

    def __init__(self, seed: int):
        """Prepare a run.

        Args:
            seed: decides the world and every random choice.
        """
        self.seed = seed
        self.world = ToyWorld(seed)
        self.seconds: dict[str, float] = {}

    def run(self) -> None:
        """All stages, then the evaluation and the summary."""
        with self._timed("data"):
            self.write_data()
        self._stage("base", "pretrain", "a base language model on plain text")
        self._stage("sft", "sft", "imitate demonstrations, 10 % pretraining text mixed in")
        tokenizer = load_tokenizer(f"sft/{LAST}")
        with self._timed("rankings"):
            agreement = self.write_rankings(load_language_model(f"sft/{LAST}"), tokenizer)
        self._stage("rm", "rm", f"a reward model from {RANKINGS} rankings by simulated labelers")
        self._stage("ppo_ptx", "ppo", "PPO-ptx against the reward model")
        self._stage("ppo", "ppo", "the same without pretraining gradients, for comparison")
        with self._timed("evaluation"):
            summary = self.evaluate(tokenizer, agreement)
        summary["seconds"] = {name: round(seconds, 1) for name, seconds in self.seconds.items()}
        Path("summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        print_summary(summary)

    def write_data(self) -> None:
        """Write the world's texts and its tokenizer."""
        write_world(
            self.world,
            "data",
            documents=DOCUMENTS,
            demonstrations=DEMONSTRATIONS,
            prompts=PROMPTS,
            heldout=HELDOUT_PROMPTS,
            heldout_documents=HELDOUT_DOCUMENTS,
        )
        build_tokenizer().save_pretrained("tokenizer")

    def write_rankings(self, sft: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
        """Sample K = 4 to 9 responses for each prompt and let simulated labelers rank them.

        Args:
            sft: writes the responses.
            tokenizer: its tokenizer.

        Returns:
            The labelers' agreement on these very responses.
        """
        rng = self.world.stream("rankings")
        prompts = [row["prompt"] for row in read_jsonl("data/prompts.jsonl")[:RANKINGS]]
        sizes = [rng.randint(MIN_RESPONSES, MAX_RESPONSES) for _ in prompts]
        flat = [prompt for prompt, size in zip(prompts, sizes, strict=True) for _ in range(size)]
        texts = iter(sample(sft, tokenizer, flat, seed=self.seed).texts)
        sets = [(prompt, [next(texts) for _ in range(size)]) for prompt, size in zip(prompts, sizes, strict=True)]
        # A response may be empty when the model ends at once; nothing can be read of it, so nobody ranks it.
        sets = [
            (prompt, kept) for prompt, responses in sets if len(kept := [r for r in responses if r]) >= MIN_RESPONSES
        ]
        noise = calibrate_noise(self.world, sets, PAPER_AGREEMENT, seed=self.seed)
        labelers = make_labelers(self.world, LABELERS, noise)
        rows = []
        for prompt, responses in sets:
            labeler = rng.choice(labelers)
            ranks = labeler.rank(self.world, prompt, responses)
            rows.append({"prompt": prompt, "responses": responses, "ranks": ranks, "labeler": labeler.id})
        write_jsonl(Path("data/comparisons.jsonl"), rows)
        return measure_agreement(self.world, labelers, sets[:200])

    def evaluate(self, tokenizer: PreTrainedTokenizerBase, agreement: float) -> dict[str, Any]:
        """Compare the models on held-out prompts of held-out owners by the gold score.

        Args:
            tokenizer: of all models.
            agreement: of the labelers, for the summary.

        Returns:
            The summary, without the times.
        """
        heldout = read_jsonl("data/heldout_prompts.jsonl")
        prompts, owners = [row["prompt"] for row in heldout], [row["owner"] for row in heldout]
        models = {name: load_language_model(f"{name}/{LAST}").eval() for name in ("base", "sft", "ppo", "ppo_ptx")}
        # Every model draws from streams of its own: with shared ones, unchanged responses would all be ties.
        samples = {
            name: sample(model, tokenizer, prompts, seed=1000 * self.seed + number)
            for number, (name, model) in enumerate(models.items())
        }
        judged = {name: judge(self.world, drawn) for name, drawn in samples.items()}
        table = {
            name: self._row(judged[name], judged["sft"], owners)
            | {
                "kl": float(kl_to_reference(model, models["sft"], *samples[name][2:], rows=256).k1_B.mean()),
                "pretraining_loss": pretraining_loss(
                    model, tokenizer, "data/pretraining_heldout.jsonl", chunk_tokens=CHUNK_TOKENS, rows=64
                ).nats_per_token,
            }
            for name, model in models.items()
        }
        scorer = RewardModelScorer(ScalarModel.from_base(f"rm/{LAST}"))
        few = prompts[:CHECKED_PROMPTS]
        sets = [sample(models["sft"], tokenizer, few, seed=2000 * self.seed + n) for n in range(CHECKED_RESPONSES)]
        write_samples(samples, judged)
        best = table["ppo_ptx"]
        return {
            "seed": self.seed,
            "win_rate_ppo_ptx_vs_sft": best["win_rate_vs_sft"],
            "win_rate_ci95": best["win_rate_ci95"],
            "reward_model_accuracy": accuracy_against_gold(self.world, scorer, sets),
            "labeler_agreement": agreement,
            "kl": best["kl"],
            "pretraining_loss": {name: row["pretraining_loss"] for name, row in table.items()},
            "heldout_prompts": len(prompts),
            "models": table,
        }

    @staticmethod
    def _row(ours: list[Assessment], sft: list[Assessment], owners: list[str]) -> dict[str, Any]:
        rate = win_rate([a.total for a in ours], [a.total for a in sft], owners)
        count = len(ours)
        return {
            "gold": sum(a.total for a in ours) / count,
            "faultless": sum(a.faultless for a in ours) / count,
            "rude": sum(a.rude for a in ours) / count,
            "words": sum(a.length for a in ours) / count,
            "win_rate_vs_sft": rate.rate,
            "win_rate_ci95": [rate.low, rate.high],
        }

    def _stage(self, name: str, stage: str, what: str) -> None:
        """Run one shipped configuration as a user would by hand."""
        arguments = ["fit", "--config", f"quickstart/{name}.yaml", "--seed_everything", str(self.seed)]
        arguments += ["--data.seed", str(self.seed)]
        if stage != "ppo" and fast_bf16():  # the policy keeps 32 bit: its ratios are compared at the fourth decimal
            arguments += ["--trainer.precision", "bf16-mixed"]
        if stage == "ppo":
            arguments += ["--model.seed", str(self.seed)]
        print(f"\n=== {name}: {what}\n$ lit-instruct {stage} {' '.join(arguments)}", flush=True)
        shutil.rmtree(f"{name}/logs", ignore_errors=True)  # curves of an earlier run would lie over these
        with self._timed(name):
            run_stage(stage, arguments)

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


def write_samples(samples: dict[str, Samples], judged: dict[str, list[Assessment]], *, count: int = 20) -> None:
    """Write the models' responses side by side to ``samples.md``.

    Args:
        samples: of each model, for the same prompts.
        judged: their gold scores.
        count: how many prompts.
    """
    lines = ["# Held-out prompts and what each model wrote (gold score)", ""]
    for row, prompt in enumerate(next(iter(samples.values())).prompts[:count]):
        lines += [f"**{prompt}**", ""]
        lines += [f"- {name} ({judged[name][row].total:.2f}): {samples[name].texts[row]}" for name in samples]
        lines.append("")
    Path("samples.md").write_text("\n".join(lines), encoding="utf-8")


def print_summary(summary: dict[str, Any]) -> None:
    """Print the table that a run ends with.

    Args:
        summary: as in ``summary.json``.
    """
    titles = {"base": "base", "sft": "SFT", "ppo": "PPO", "ppo_ptx": "PPO-ptx"}
    print("\n           gold  faultless   wins against SFT [95 %]    KL  pretraining loss   rude  words")
    for name, title in titles.items():
        row = summary["models"][name]
        low, high = row["win_rate_ci95"]
        print(
            f"{title:<9}{row['gold']:6.3f}{row['faultless']:10.1%}     {row['win_rate_vs_sft']:.3f} "
            f"[{low:.3f}, {high:.3f}]{row['kl']:9.2f}{row['pretraining_loss']:14.3f}{row['rude']:10.1%}"
            f"{row['words']:7.1f}"
        )
    rate, (low, high) = summary["win_rate_ppo_ptx_vs_sft"], summary["win_rate_ci95"]
    print(
        f"\nOn {summary['heldout_prompts']} held-out prompts PPO-ptx is preferred to SFT in {rate:.1%} "
        f"[{low:.1%}, {high:.1%}]."
        f"\nReward model: {summary['reward_model_accuracy']:.1%} of pairs as the gold score has them; "
        f"labelers agree on {summary['labeler_agreement']:.1%}."
        f"\nSeconds: {', '.join(f'{name} {seconds:.0f}' for name, seconds in summary['seconds'].items())}; "
        f"together {sum(summary['seconds'].values()):.0f}."
    )


def fast_bf16() -> bool:
    """Whether this machine multiplies bf16 matrices faster than fp32 ones."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--out: got {str(folder)!r}, which cannot be made or is no folder ({error.strerror}); need a folder that "
            "this user may write to. Do: give another one."
        ) from error
    with contextlib.chdir(folder):
        yield


def _quiet() -> None:
    """Leave the screen to the progress bars."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
