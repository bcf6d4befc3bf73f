"""Our side alone, one size changed at a time: does the cost grow as it should?"""

from __future__ import annotations

from typing import Any

from scripts.benchmark.cases import Case


def cases() -> list[Case]:
    """Variations of one case a stage; the peer's settings are not used."""
    made = []
    for size in ("tiny", "m30"):
        made.append(_case(f"scaling:sft:{size}:batch-32", "sft", size, 32, _text(48, 64), "tokens"))
    for mean in (64, 128, 256):
        made.append(_case(f"scaling:sft:tiny:responses-{mean}", "sft", "tiny", 16, _text(48, mean), "tokens"))
    for k in (2, 4, 9):
        data = {"prompt": 256, "response": 64, "k": k}
        made.append(_case(f"scaling:rm:tiny:256-64:k{k}", "rm", "tiny", 4, data, "comparisons"))
    for prompts in (16, 32, 64, 128):
        data = {"prompt": 64, "inner_epochs": 1, "mean_response": 24, "max_response": 128}
        made.append(_case(f"scaling:ppo:tiny:geometric:prompts-{prompts}", "ppo", "tiny", prompts, data, "episodes"))
    return made


def _text(prompt: int, response: int) -> dict[str, Any]:
    return {"prompt_mean": prompt, "response_mean": response, "sigma": 0.5, "longest": 1024}


def _case(name: str, stage: str, size: str, batch_size: int, data: dict[str, Any], unit: str) -> Case:
    return Case(
        name,
        stage,
        unit,
        size,
        batch_size,
        steps=2,
        warmup=1,
        ours={"worker": "ours", "precision": "bf16-mixed", "module": {}},
        peer={},
        environment="own",
        data=data,
    )
