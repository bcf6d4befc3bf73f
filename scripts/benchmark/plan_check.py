"""Peak memory as ``lit_instruct.planning`` works it out, against what a run really takes.

    python scripts/benchmark/plan_check.py                 # all cases: some five minutes on two cores
    python scripts/benchmark/plan_check.py --only ppo:m30  # those whose name begins so

Each case is a process of its own. It trains a model of a few thousand parameters first, so that what torch loads and
sets up at its first step counts as baseline, then builds the case's networks (random weights) and takes two PPO
iterations, or two SFT steps, by the module's own methods: in the second one optimizer state is there all the time.
*Measured* is the process' largest resident set above that baseline, ``ru_maxrss``. glibc is told to hand every block of
64 KiB and more back at once (``MALLOC_MMAP_THRESHOLD_``), since what lies free in its heap is no need of the run's;
``--malloc`` leaves it as it is. Exit status 1 if a case is more than 15 % off.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

LIMIT = 0.15
SIZES: dict[str, dict[str, Any]] = {
    "m5": {"hidden_size": 192, "intermediate_size": 576, "num_hidden_layers": 8, "vocab_size": 4096, "heads": (6, 3)},
    "m30": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "vocab_size": 8192, "heads": (8, 4)},
    "smol": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "vocab_size": 49152,
        "heads": (9, 3),
    },
}
"""5, 30 and 135 million parameters; the last is SmolLM2-135M's shape."""


class Case(NamedTuple):
    """One run.

    Attributes:
        stage: sft or ppo.
        size: of SIZES.
        rows: of an optimizer step; PPO: of an iteration too.
        prompt: tokens of each prompt.
        response: tokens of each response.
        options: of the module.
        precision: Lightning's name.
        family: llama or gpt2.
    """

    stage: str
    size: str
    rows: int
    prompt: int
    response: int
    options: dict[str, Any]
    precision: str = "32-true"
    family: str = "llama"

    @property
    def name(self) -> str:
        settings = [f"{key}={value}" for key, value in self.options.items()]
        kind = [] if self.family == "llama" else [self.family]
        return ":".join(
            [self.stage, self.size, *kind, f"{self.rows}x{self.prompt}+{self.response}", self.precision, *settings]
        )


CASES = [
    Case("sft", "m5", 32, 96, 64, {}),
    Case("sft", "m30", 16, 96, 64, {}),
    Case("sft", "m30", 16, 96, 64, {}, "bf16-mixed"),
    Case("sft", "m30", 16, 96, 64, {"gradient_checkpointing": True}),
    Case("sft", "m30", 16, 96, 64, {}, family="gpt2"),
    Case("sft", "smol", 4, 64, 64, {}),
    Case("ppo", "m5", 32, 96, 64, {}),
    Case("ppo", "m5", 32, 96, 64, {"micro_batch_size": 8}),
    Case("ppo", "m5", 64, 192, 64, {"memory": "shared_trunk"}),
    Case("ppo", "m5", 64, 64, 512, {"memory": "shared_trunk", "micro_batch_size": 2}),
    Case("ppo", "m30", 16, 64, 64, {}),
    Case("ppo", "m30", 16, 64, 64, {}, "bf16-mixed"),
    Case("ppo", "m30", 16, 64, 64, {"gradient_checkpointing": True, "micro_batch_size": 4}),
    Case("ppo", "m30", 16, 64, 64, {"memory": "shared_trunk", "frozen_dtype": "bfloat16"}),
    Case("ppo", "m30", 16, 64, 64, {"rollout_dtype": "bfloat16"}),
    Case("ppo", "m30", 16, 64, 64, {}, family="gpt2"),
    Case("ppo", "smol", 8, 32, 32, {}),
    Case("ppo", "smol", 8, 32, 32, {"memory": "shared_trunk", "frozen_dtype": "bfloat16"}),
]


def model_fields(size: dict[str, Any], family: str) -> dict[str, Any]:
    """A bare configuration."""
    heads, key_heads = size["heads"]
    if family == "gpt2":
        fields = {
            "n_embd": size["hidden_size"],
            "n_layer": size["num_hidden_layers"],
            "n_head": heads,
            "n_positions": 1024,
        }
        return {"model_type": "gpt2", "vocab_size": size["vocab_size"], **fields}
    rest = {key: value for key, value in size.items() if key != "heads"}
    shape = {"num_attention_heads": heads, "num_key_value_heads": key_heads, "tie_word_embeddings": True}
    return {"model_type": "llama", "max_position_embeddings": 1024, **shape, **rest}


def planned(case: Case) -> dict[str, float]:
    """What the plan says, in bytes: the peak and the phase it comes in."""
    from lit_instruct.planning.activations import Numerics
    from lit_instruct.planning.architecture import architecture
    from lit_instruct.planning.memory import peaks
    from lit_instruct.planning.networks import Adapter, ppo_networks, trained_network
    from lit_instruct.planning.setup import Lengths, Setup, Work

    shape = architecture(model_fields(SIZES[case.size], case.family))
    options = case.options
    numerics = Numerics(case.precision, True, bool(options.get("gradient_checkpointing")))  # type: ignore[arg-type]
    lengths = Lengths(case.prompt, case.response, case.prompt, case.response)
    micro = options.get("micro_batch_size", case.rows)
    work = Work(case.rows, case.rows, micro, None, case.rows, 1, lengths)
    plan = options.get("memory", "separate")
    networks = (trained_network("policy", shape, unembeds=True, adapter=Adapter(), parameter=4),)
    if case.stage == "ppo":
        networks = ppo_networks(
            shape,
            shape,
            plan=plan,
            adapter=Adapter(),
            frozen_dtype=options.get("frozen_dtype", "float32"),
            parameter=4,
        )
    copy = 2 if options.get("rollout_dtype") == "bfloat16" else None
    setup = Setup(case.stage, plan, networks, numerics, work, rollout_bytes=copy)  # type: ignore[arg-type]
    return {moment.phase: moment.total for moment in peaks(setup)}


def measured(case: Case) -> float:
    """Bytes of the case's peak above the baseline; in this process."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "heads": (2, 1)}
        warm = case._replace(
            rows=4, options={key: value for key, value in case.options.items() if key != "micro_batch_size"}
        )
        train(warm, {**small, "vocab_size": SIZES[case.size]["vocab_size"] // 16}, Path(folder))
        baseline = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()
        train(case, SIZES[case.size], Path(folder))
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - baseline)


def train(case: Case, size: dict[str, Any], folder: Path) -> None:
    """Two iterations, or two steps."""
    import torch

    from lit_instruct import SFTModule
    from lit_instruct.modules.optimizers import paper_adam

    fields, tokenizer = model_fields(size, case.family), save_tokenizer(folder, size["vocab_size"])
    mixed = case.precision == "bf16-mixed"
    # As Lightning does it: casts of weights are not remembered from one pass to the next.
    autocast = torch.autocast("cpu", torch.bfloat16, cache_enabled=False) if mixed else contextlib.nullcontext()
    stream = torch.Generator().manual_seed(1)
    if case.stage == "ppo":
        iterate(case, fields, tokenizer, stream, autocast)
        return
    from lit_instruct.types import DemonstrationBatch

    module = SFTModule(fields, tokenizer=tokenizer, **case.options)
    optimizer = paper_adam(module.policy.parameters())
    width = case.prompt + case.response
    whole_BT = torch.ones(case.rows, width, dtype=torch.bool)
    for _ in range(2):
        ids_BT = torch.randint(2, size["vocab_size"], (case.rows, width), generator=stream)
        batch = DemonstrationBatch(ids_BT, whole_BT, whole_BT & (torch.arange(width) >= case.prompt))
        with autocast:
            loss, _ = module.loss(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def iterate(case: Case, fields: dict[str, Any], tokenizer: str, stream: Any, autocast: Any) -> None:
    """Two PPO iterations without a Trainer."""
    import torch

    from lit_instruct import PPOModule
    from lit_instruct.models.scalar_head import ScalarModel
    from lit_instruct.modules.optimizers import paper_adam
    from lit_instruct.rewards import RewardModelScorer
    from lit_instruct.types import PromptBatch

    sizes = {"micro_batch_size": case.rows, "rollout_batch_size": case.rows, **case.options}
    with_ends = {**fields, "eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 1}
    module = PPOModule(
        with_ends,
        reward=RewardModelScorer(ScalarModel.from_base(with_ends), batch_rows=sizes["micro_batch_size"]),
        tokenizer=tokenizer,
        minibatch_size=case.rows,
        max_response_tokens=case.response,
        **sizes,
    )
    module.train()
    module.policy.get_output_embeddings().weight.data[0] = 0.0
    optimizer = paper_adam([*module.policy.parameters(), *module.value_model.parameters()])

    def step() -> None:
        module.clip_each_network()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):
        ids_BP = torch.randint(2, fields["vocab_size"], (case.rows, case.prompt), generator=stream)
        with autocast:
            batch = PromptBatch(ids_BP, torch.ones_like(ids_BP, dtype=torch.bool))
            module.iteration(batch, backward=lambda loss: loss.backward(), step=step)


def save_tokenizer(folder: Path, vocabulary: int) -> str:
    """One token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<eos>", "<pad>", "<unk>", *(f"w{number}" for number in range(3, vocabulary))]
    core = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    where = folder / str(vocabulary)
    kinds = {"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=core, **kinds).save_pretrained(where)
    return str(where)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="beginnings of names of cases")
    parser.add_argument("--malloc", action="store_true", help="leave glibc's settings as they are")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case is not None:
        print(json.dumps(measured(CASES[options.case])))
        return
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if not options.malloc:
        environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    print("| run | planned MiB | in | measured MiB | planned / measured |\n|---|---:|---|---:|---:|")
    missed = False
    for number, case in enumerate(CASES):
        if not case.name.startswith(tuple(options.only)):
            continue
        told = [sys.executable, __file__, "--case", str(number)]
        done = subprocess.run(told, env=environment, check=True, capture_output=True, text=True, timeout=600)
        real, plan = float(done.stdout.splitlines()[-1]), planned(case)
        phase = max(plan, key=plan.__getitem__)
        ratio = plan[phase] / real
        missed |= abs(ratio - 1.0) > LIMIT
        print(f"| {case.name} | {plan[phase] / 2**20:,.0f} | {phase} | {real / 2**20:,.0f} | {ratio:.2f} |", flush=True)
    raise SystemExit(missed)


if __name__ == "__main__":
    main()
