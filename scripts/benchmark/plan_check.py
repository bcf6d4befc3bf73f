"""Peak memory as ``lit_instruct.planning`` works it out, against what a run really takes.

    python scripts/benchmark/plan_check.py                 # all cases: some five minutes on two cores
    python scripts/benchmark/plan_check.py --only ppo:m30  # those whose name begins so
    python scripts/benchmark/plan_check.py --gpu H100-80GB # on a GPU, named as for lit-instruct plan

Each case is a process of its own, and what it starts from is written by another one: a model folder with random weights
and the checkpoint of a reward model. It trains a model of a few thousand parameters first, so that what torch loads and
sets up at its first step counts as baseline, then loads the case's networks and takes two PPO iterations, or two SFT
steps, by the module's own methods: in the second one optimizer state is there all the time.
*Measured* is the process' largest resident set above that baseline, ``ru_maxrss``. glibc is told to hand every block of
64 KiB and more back at once (``MALLOC_MMAP_THRESHOLD_``), since what lies free in its heap is no need of the run's;
``--malloc`` leaves it as it is. On a GPU it is the most that torch's allocator has given away, above the same baseline,
and the seconds of the second iteration (as PPO itself logs them, or of the whole SFT step) stand beside the least that
the plan allows: rollout with scoring, and update.
Exit status 1 if a case's memory is more than 15 % off, or one did not run.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # as a script, this file's folder stands there instead

from scripts.benchmark.stage_files import write_base, write_reward_model  # noqa: E402

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
    "m340": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 24,
        "vocab_size": 32000,
        "heads": (16, 16),
    },
}
"""5, 30, 135 and 340 million parameters; the third is SmolLM2-135M's shape."""


class Case(NamedTuple):
    """One run.

    Attributes:
        stage: sft or ppo.
        size: of SIZES.
        rows: of an optimizer step; PPO: of an iteration too.
        prompt: tokens of each prompt.
        response: tokens of each response.
        options: of the module; ``adapter`` is the rank of LoRA.
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
    Case("sft", "m30", 16, 96, 64, {"adapter": 16}),
    Case("sft", "m30", 16, 96, 64, {"adapter": 16, "quantization": "4bit"}),
    Case("ppo", "m30", 16, 64, 64, {"frozen_dtype": "8bit"}),
    Case("ppo", "m30", 16, 64, 64, {"frozen_dtype": "4bit"}),
    Case("ppo", "m30", 16, 64, 64, {"adapter": 16}),
    Case("ppo", "m30", 16, 64, 64, {"adapter": 16, "memory": "shared_base"}),
    Case("ppo", "m30", 16, 64, 64, {"adapter": 16, "memory": "shared_base"}, "bf16-mixed"),
    Case("ppo", "m30", 16, 64, 64, {"adapter": 16, "memory": "shared_base", "quantization": "8bit"}),
    Case("ppo", "m30", 16, 64, 64, {"adapter": 16, "memory": "shared_base", "quantization": "4bit"}),
    Case("ppo", "m30", 16, 64, 64, {"adapter": 16, "memory": "shared_base", "quantization": "4bit"}, "bf16-mixed"),
    Case("ppo", "smol", 8, 32, 32, {"adapter": 16, "memory": "shared_base"}),
    Case("ppo", "smol", 8, 32, 32, {"adapter": 16, "memory": "shared_base", "quantization": "4bit"}),
]

ON_GPU = [
    Case("sft", "smol", 16, 192, 64, {}),
    Case("sft", "smol", 16, 192, 64, {}, "bf16-mixed"),
    Case("sft", "smol", 16, 192, 64, {"gradient_checkpointing": True}, "bf16-mixed"),
    Case("sft", "m340", 16, 384, 128, {}, "bf16-mixed", "gpt2"),
    Case("sft", "m340", 16, 384, 128, {"adapter": 16}, "bf16-mixed"),
    Case("sft", "m340", 16, 384, 128, {"adapter": 16, "quantization": "4bit"}, "bf16-mixed"),
    Case("ppo", "smol", 64, 128, 128, {"micro_batch_size": 16}),
    Case("ppo", "m340", 64, 128, 128, {"micro_batch_size": 16}, "bf16-mixed"),
    Case("ppo", "m340", 64, 128, 128, {"micro_batch_size": 16, "rollout_dtype": "bfloat16"}, "bf16-mixed"),
    Case("ppo", "m340", 64, 128, 128, {"micro_batch_size": 16, "gradient_checkpointing": True}, "bf16-mixed"),
    Case("ppo", "m340", 64, 128, 128, {"micro_batch_size": 16, "memory": "shared_trunk"}, "bf16-mixed"),
    Case("ppo", "m340", 64, 128, 128, {"micro_batch_size": 16, "frozen_dtype": "4bit"}, "bf16-mixed"),
    Case("ppo", "m340", 64, 128, 128, {"micro_batch_size": 16, "adapter": 16, "memory": "shared_base"}, "bf16-mixed"),
]
"""Enough for a GPU to do."""


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


def planned(case: Case, gpu: str | None) -> tuple[dict[str, float], dict[str, float]]:
    """What the plan says of each phase: bytes, and on a GPU the least seconds."""
    from lit_instruct.planning.activations import Numerics
    from lit_instruct.planning.architecture import architecture
    from lit_instruct.planning.cost import costs
    from lit_instruct.planning.hardware import parse_hardware
    from lit_instruct.planning.memory import peaks
    from lit_instruct.planning.networks import Adapter, ppo_networks, trained_network
    from lit_instruct.planning.setup import Lengths, Setup, Work

    shape = architecture(model_fields(SIZES[case.size], case.family))
    options = case.options
    numerics = Numerics(case.precision, gpu is None, bool(options.get("gradient_checkpointing")))  # type: ignore[arg-type]
    lengths = Lengths(case.prompt, case.response, case.prompt, case.response)
    micro = options.get("micro_batch_size", case.rows)
    work = Work(case.rows, case.rows, micro, None, case.rows, 1, lengths)
    plan = options.get("memory", "separate")
    adapter = Adapter(options.get("adapter", 0), options.get("quantization"))
    networks = (trained_network("policy", shape, unembeds=True, adapter=adapter, parameter=4),)
    if case.stage == "ppo":
        networks = ppo_networks(
            shape,
            shape,
            plan=plan,
            adapter=adapter,
            frozen_dtype=options.get("frozen_dtype", "float32"),
            parameter=4,
        )
    copy = 2 if options.get("rollout_dtype") == "bfloat16" else None
    setup = Setup(case.stage, plan, networks, numerics, work, rollout_bytes=copy)  # type: ignore[arg-type]
    least = {cost.phase: cost.seconds for cost in costs(setup, parse_hardware(gpu))} if gpu else {}
    return {moment.phase: moment.total for moment in peaks(setup)}, least


def prepare(case: Case, folder: Path) -> None:
    """Write what the case and its warm-up start from: ``warm`` and ``real``, each a folder and a reward model."""
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "heads": (2, 1)}
    sizes = {"warm": {**small, "vocab_size": SIZES[case.size]["vocab_size"] // 16}, "real": SIZES[case.size]}
    for name, size in sizes.items():
        write_base(folder / name, model_fields(size, case.family))
        settings = {"rank": case.options.get("adapter", 0), "quantization": case.options.get("quantization")}
        write_reward_model(folder / f"{name}.ckpt", folder / name, **settings)


def measured(case: Case, folder: Path, device: str) -> tuple[float, dict[str, float]]:
    """Bytes of the case's peak above the baseline, and seconds; in this process."""
    import torch

    on_gpu = device != "cpu"
    if not on_gpu:
        torch.set_num_threads(1)
    warm = case._replace(
        rows=4, options={key: value for key, value in case.options.items() if key != "micro_batch_size"}
    )
    train(warm, folder / "warm", device)
    if on_gpu:
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        baseline = torch.cuda.memory_allocated()
    else:
        baseline = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()
    seconds = train(case, folder / "real", device)
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return float(peak - baseline), seconds


def train(case: Case, base: Path, device: str) -> dict[str, float]:
    """Two iterations, or two steps; the seconds of the second one's phases."""
    import torch

    mixed = case.precision == "bf16-mixed"
    # As Lightning does it: casts of weights are not remembered from one pass to the next.
    autocast = torch.autocast(device, torch.bfloat16, cache_enabled=False) if mixed else contextlib.nullcontext()
    stage = iterate if case.stage == "ppo" else imitate
    return stage(case, base, torch.Generator().manual_seed(1), autocast, device)


def module_options(case: Case) -> dict[str, Any]:
    """The case's options as a module takes them."""
    from lit_instruct.models.adapters import LoraSettings

    rank = case.options.get("adapter")
    return {"template": "verbatim", **case.options, "adapter": LoraSettings(r=rank) if rank else None}


def imitate(case: Case, base: Path, stream: Any, autocast: Any, device: str) -> dict[str, float]:
    """Two SFT steps without a Trainer."""
    import torch

    from lit_instruct import SFTModule
    from lit_instruct.models.adapters import trained_parameters
    from lit_instruct.modules.optimizers import paper_adam
    from lit_instruct.types import DemonstrationBatch

    module = SFTModule(str(base), **module_options(case)).to(device)
    optimizer = paper_adam(trained_parameters(module))
    width = case.prompt + case.response
    whole_BT = torch.ones(case.rows, width, dtype=torch.bool, device=device)
    responses_BT = whole_BT & (torch.arange(width, device=device) >= case.prompt)
    for _ in range(2):
        ids_BT = torch.randint(2, module.policy.config.vocab_size, (case.rows, width), generator=stream)
        batch = DemonstrationBatch(ids_BT.to(device), whole_BT, responses_BT)
        started = now(device)
        with autocast:
            loss, _ = module.loss(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"update": now(device) - started}


def now(device: str) -> float:
    """Seconds, when all that was asked of the device is done."""
    import torch

    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def iterate(case: Case, base: Path, stream: Any, autocast: Any, device: str) -> dict[str, float]:
    """Two PPO iterations without a Trainer."""
    import torch

    from lit_instruct import PPOModule
    from lit_instruct.models.adapters import trained_parameters
    from lit_instruct.modules.optimizers import paper_adam
    from lit_instruct.types import PromptBatch

    module = PPOModule(
        str(base),
        reward_model=f"{base}.ckpt",
        minibatch_size=case.rows,
        max_response_tokens=case.response,
        **{"micro_batch_size": case.rows, "rollout_batch_size": case.rows, **module_options(case)},
    ).to(device)
    module.train()
    optimizer = paper_adam([*trained_parameters(module.policy), *trained_parameters(module.value_model)])

    def step() -> None:
        module.clip_each_network()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):
        ids_BP = torch.randint(2, module.policy.config.vocab_size, (case.rows, case.prompt), generator=stream)
        with autocast:
            batch = PromptBatch(ids_BP.to(device), torch.ones_like(ids_BP, dtype=torch.bool, device=device))
            metrics = module.iteration(batch, backward=lambda loss: loss.backward(), step=step)
    return {name: float(metrics[f"time/{name}"]) for name in ("rollout", "update")}


def result_of(number: int, environment: dict[str, str], told: list[str]) -> tuple[float, dict[str, float]]:
    """Bytes that the case of this number takes, and seconds, measured in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        for work in ("--prepare", "--measure"):
            command = [sys.executable, __file__, work, str(number), "--folder", folder, *told]
            done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=600)
            if done.returncode:
                raise RuntimeError(f"{work} failed:\n{done.stderr[-3000:]}")
    peak, seconds = json.loads(done.stdout.splitlines()[-1])
    return peak, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="beginnings of names of cases")
    parser.add_argument("--gpu", metavar="DEVICE", help="measure on a GPU; what it is, as for lit-instruct plan")
    parser.add_argument("--malloc", action="store_true", help="leave glibc's settings as they are")
    for hidden, kind in (("--prepare", int), ("--measure", int), ("--folder", Path)):
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    cases = ON_GPU if options.gpu else CASES
    if options.prepare is not None:
        prepare(cases[options.prepare], options.folder)
        return
    if options.measure is not None:
        print(json.dumps(measured(cases[options.measure], options.folder, "cuda" if options.gpu else "cpu")))
        return
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if not options.malloc:
        environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    took = " rollout s | least | update s | least |" if options.gpu else ""
    print(f"| run | planned MiB | in | measured MiB | planned / measured |{took}")
    print("|---|---:|---|---:|---:|" + "---:|" * took.count("|"))
    missed = False
    for number, case in enumerate(cases):
        if not case.name.startswith(tuple(options.only)):
            continue
        try:
            real, seconds = result_of(number, environment, ["--gpu", options.gpu] if options.gpu else [])
        except (RuntimeError, subprocess.TimeoutExpired) as error:  # the others may run
            print(f"{case.name}: {error}", file=sys.stderr)
            missed = True
            continue
        plan, least = planned(case, options.gpu)
        phase = max(plan, key=plan.__getitem__)
        ratio = plan[phase] / real
        missed |= abs(ratio - 1.0) > LIMIT
        line = f"| {case.name} | {plan[phase] / 2**20:,.0f} | {phase} | {real / 2**20:,.0f} | {ratio:.2f} |"
        for name, parts in (("rollout", ("rollout", "scoring")), ("update", ("update",))):
            if options.gpu and name in seconds:
                line += f" {seconds[name]:.2f} | {sum(least[part] for part in parts):.3f} |"
            elif options.gpu:
                line += " - | - |"
        print(line, flush=True)
    raise SystemExit(missed)


if __name__ == "__main__":
    main()
