"""Peak memory of one PPO iteration under each memory plan, with a model of SmolLM2-135M's shape and random weights.

    python scripts/benchmark/memory.py                # all plans, a table: about four minutes on two cores
    python scripts/benchmark/memory.py --plan "LoRA, shared base"

Each plan is ``lit-instruct ppo fit`` in a process of its own: 8 prompts of 32 tokens, responses of 32, one optimizer
step, after which Adam's moments are there; one row a pass, so that the networks are seen and not the activations. What
counts is the most memory that the process ever held (``ru_maxrss``) above what it held when everything was imported:
loading, rollout and update, weights, gradients, moments, activations and what the allocator keeps. Exit status 1 if a
plan needs more than its goal, a share of the four fp32 models.

Left out: GPUs, and runs long enough for the allocator's free memory to grow.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # as a script, this file's folder stands there instead

from scripts.benchmark.stage_files import write_base, write_reward_model  # noqa: E402

PROMPTS, TOKENS = 8, 32
SMOLLM2_135M = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
LORA = ["--model.adapter.r", "16", "--model.reward_model", "rm_adapter.ckpt"]
# plan -> options of ppo fit, and the goal
PLANS: dict[str, tuple[list[str], float]] = {
    "four fp32 models": (["--model.memory", "separate"], 1.0),
    "frozen ones in bf16": (["--model.frozen_dtype", "bfloat16"], 1.0),
    "shared trunk, frozen ones in bf16": (["--model.memory", "shared_trunk", "--model.frozen_dtype", "bfloat16"], 0.6),
    "LoRA, shared base": (["--model.memory", "shared_base", *LORA], 0.35),
    "QLoRA (nf4), shared base": (
        [
            "--model.memory",
            "shared_base",
            "--model.quantization",
            "4bit",
            *LORA,
            "--model.reward_model",
            "rm_4bit.ckpt",
        ],
        0.35,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", choices=list(PLANS), action="append", help="only this one (may be repeated)")
    parser.add_argument("--rows", type=int, default=1, help="rows a pass (default 1)")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside is not None:
        prepare() if options.inside == "prepare" else measure(PLANS[options.inside][0], options.rows)
        return
    with tempfile.TemporaryDirectory() as folder:
        inside("prepare", folder, options.rows)
        found = {
            plan: json.loads(inside(plan, folder, options.rows).splitlines()[-1]) for plan in options.plan or PLANS
        }
    largest = found.get("four fp32 models")
    print("| plan | MiB above the imports | share | weights MiB | seconds |\n|---|---|---|---|---|")
    missed = []
    for plan, (peak, weights, seconds) in found.items():
        share = peak / largest[0] if largest else float("nan")
        print(f"| {plan} | {peak:.0f} | {share:.2f} | {weights:.0f} | {seconds:.0f} |")
        missed += [plan] if share > PLANS[plan][1] else []
    raise SystemExit(f"above the goal: {', '.join(missed)}" if missed else 0)


def inside(work: str, folder: str, rows: int) -> str:
    """Run one part in a process of its own; what it printed."""
    command = [sys.executable, str(Path(__file__).resolve()), "--inside", work, "--rows", str(rows)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{work} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def prepare() -> None:
    """A model folder and the reward models of each plan, untrained, in the working directory."""
    write_base(Path("base"), SMOLLM2_135M)
    words = [f"w{number}" for number in range(2, 32)]
    rows = [{"prompt": " ".join(words[(at + word) % len(words)] for word in range(TOKENS))} for at in range(PROMPTS)]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, rank, quantization in (("rm", 0, None), ("rm_adapter", 16, None), ("rm_4bit", 16, "4bit")):
        write_reward_model(Path(f"{name}.ckpt"), Path("base"), rank=rank, quantization=quantization)


def measure(plan: list[str], rows: int) -> None:
    """One iteration; prints the peak above the imports and the size of all weights in MiB, and the seconds."""
    import time

    import bitsandbytes  # noqa: F401 - a part of the imports, and not of the plan
    import peft  # noqa: F401

    from lit_instruct import PPOModule, PromptDataModule  # noqa: F401
    from lit_instruct.cli import run_stage
    from lit_instruct.modules import stage_cli  # noqa: F401

    before, started = peak(), time.perf_counter()
    arguments = [
        *["fit", "--model.policy", "base", "--model.template", "verbatim", "--data.prompts", "prompts.jsonl"],
        *["--model.reward_model", "rm.ckpt", "--model.episodes", str(PROMPTS), "--data.batch_size", str(PROMPTS)],
        *["--data.val", "0.0", "--model.minibatch_size", str(PROMPTS), "--model.micro_batch_size", str(rows)],
        *["--model.max_response_tokens", str(TOKENS), "--trainer.accelerator", "cpu", "--trainer.devices", "1"],
        *["--trainer.max_epochs", "-1", "--trainer.logger", "false", "--trainer.enable_checkpointing", "false"],
        *["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false", *plan],
    ]
    module = run_stage("ppo", arguments).model
    assert module.iterations_done == 1
    weights = {parameter.data_ptr(): parameter.nbytes for parameter in module.parameters()}
    print()
    print(json.dumps([peak() - before, sum(weights.values()) / 2**20, time.perf_counter() - started]))


def peak() -> float:
    """The most memory that this process ever held, in MiB."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / 2**20 if sys.platform == "darwin" else used / 2**10


if __name__ == "__main__":
    main()
