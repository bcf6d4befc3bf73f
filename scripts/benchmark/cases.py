"""What is measured: models, cases and the settings of both sides. No imports beyond the standard library."""

from __future__ import annotations

from typing import Any, NamedTuple

EOS, PAD = 0, 1
LEARNING_RATE = 3e-4  # so that losses fall and can be compared between the two sides
SEED = 1


class Shape(NamedTuple):
    """Sizes of a Llama decoder with tied embeddings."""

    vocabulary: int
    width: int
    inner: int
    layers: int
    heads: int
    kv_heads: int


MODELS = {
    "micro": Shape(64, 16, 32, layers=1, heads=2, kv_heads=2),
    "tiny": Shape(4096, 192, 512, layers=4, heads=3, kv_heads=3),
    "m30": Shape(8192, 512, 1408, layers=8, heads=8, kv_heads=8),
    "smol": Shape(49152, 576, 1536, layers=30, heads=9, kv_heads=3),
}
"""2.6, 29.9 and 134.5 million parameters (``smol`` is the shape of SmolLM2-135M), and one with next to none."""


def llama(size: str) -> dict[str, Any]:
    """The configuration of one of the models, as ``AutoConfig.for_model`` takes it."""
    shape = MODELS[size]
    return {
        "model_type": "llama",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }


Goal = tuple[float, float]
"""The ratio that is aimed at, and the one that would be better still."""


class Case(NamedTuple):
    """One comparison.

    Attributes:
        name: ``stage:rest``, for ``--only``.
        stage: ``sft``, ``rm`` or ``ppo``.
        unit: what is counted.
        size: of the model.
        batch_size: rows an optimizer step: demonstrations, prompts with K responses, or prompts of an iteration.
        steps: optimizer steps (PPO: iterations) of one measurement.
        warmup: the same, before the first measurement.
        ours: worker of this project and its settings.
        peer: worker of the other side and its settings; ``rows`` of a micro-batch are those that were fastest.
        environment: where the other side runs: ``own``, ``trl`` or ``trl-ppo``.
        data: lengths in tokens and the like.
        goal: of the ratio, if there is one.
    """

    name: str
    stage: str
    unit: str
    size: str
    batch_size: int
    steps: int
    warmup: int
    ours: dict[str, Any]
    peer: dict[str, Any]
    environment: str
    data: dict[str, Any]
    goal: Goal | None = None


# Lengths of demonstrations: lognormal, these means, sigma 0.5; end of text included in the response.
_DEMONSTRATIONS = {"prompt_mean": 48, "response_mean": 64, "sigma": 0.5, "longest": 256}


def _sft(size: str, batch_size: int, steps: int, peer_rows: int, goal: Goal) -> Case:
    return Case(
        f"sft:{size}",
        "sft",
        "tokens",
        size,
        batch_size,
        steps,
        warmup=max(steps, 2),
        ours={"worker": "ours", "precision": "bf16-mixed", "module": {}},
        peer={"worker": "trl", "bf16": True, "rows": peer_rows},
        environment="trl",
        data=_DEMONSTRATIONS,
        goal=goal,
    )


def _rm(
    size: str, lengths: tuple[int, int], k: int, precision: str, prompts: int, steps: int, goal: Goal | None = None
) -> Case:
    """K = 4 against TRL's trainer; more responses against a plain loop over the same rows of pairs."""
    against_trl = k <= 4
    bf16 = precision == "bf16-mixed"
    return Case(
        f"rm:{size}:{lengths[0]}-{lengths[1]}:k{k}:{'bf16' if bf16 else 'fp32'}",
        "rm",
        "comparisons",
        size,
        prompts,
        steps,
        warmup=1 if steps < 4 else 2,
        ours={"worker": "ours", "precision": precision, "module": {}},
        peer={"worker": "trl" if against_trl else "pairs", "bf16": bf16, "rows": 6 if size == "m30" else 12},
        environment="trl" if against_trl else "own",
        data={"prompt": lengths[0], "response": lengths[1], "k": k},
        goal=goal,
    )


def _ppo(size: str, lengths: str, epochs: int, batch_size: int, steps: int, goal: Goal) -> Case:
    return Case(
        f"ppo:{size}:{lengths}",
        "ppo",
        "episodes",
        size,
        batch_size,
        steps,
        warmup=1,
        ours={
            "worker": "ours",
            "precision": "bf16-mixed",
            # The peer's frozen models are in bf16 too. Sampling from a bf16 copy pays from m30 on.
            "module": {"frozen_dtype": "bfloat16", "rollout_dtype": None if size == "tiny" else "bfloat16"},
        },
        # Mixed precision reaches this trainer by the variable that `accelerate launch` sets, not by its own bf16=True.
        peer={
            "worker": "trl_ppo",
            "bf16": True,
            "rows": 16,
            "environment": {"ACCELERATE_MIXED_PRECISION": "bf16"},
        },
        environment="trl-ppo",
        data={
            "prompt": 64,
            "inner_epochs": epochs,
            "mean_response": 24 if lengths == "geometric" else None,
            "max_response": 128 if lengths == "geometric" else 64,
        },
        goal=goal,
    )


CASES = [
    _sft("tiny", 32, 10, 16, (3.0, 4.5)),
    _sft("m30", 32, 2, 8, (1.7, 2.5)),
    _sft("smol", 16, 1, 4, (2.0, 3.0)),
    _rm("tiny", (256, 64), 4, "32-true", 4, 2, (5.0, 7.0)),
    _rm("tiny", (256, 64), 4, "bf16-mixed", 4, 4, (5.0, 7.0)),
    _rm("m30", (256, 64), 4, "32-true", 2, 1, (5.0, 7.0)),
    _rm("m30", (256, 64), 4, "bf16-mixed", 2, 2, (5.0, 7.0)),
    _rm("tiny", (64, 64), 4, "32-true", 8, 2),
    _rm("tiny", (256, 64), 9, "32-true", 1, 1, (20.0, 27.0)),
    _rm("m30", (256, 64), 9, "32-true", 1, 1, (20.0, 27.0)),
    _rm("tiny", (64, 64), 9, "32-true", 2, 1),
    _ppo("tiny", "geometric", 4, 32, 4, (2.5, 3.5)),
    _ppo("tiny", "fixed", 4, 32, 2, (1.6, 2.0)),
    _ppo("m30", "fixed", 1, 16, 1, (2.3, 3.0)),
]


class RolloutCase(NamedTuple):
    """Sampling alone: a model of some architecture, geometric lengths (mean 24, at most 128)."""

    name: str
    config: dict[str, Any]
    precision: str
    peer_precision: str = "fp32"
    prompts: int = 128
    rows: int = 32
    prompt_length: int = 64
    mean_response: int = 24
    max_response: int = 128
    goal: Goal | None = None


_SMALL: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
_GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "vocab_size": 4096,
    "n_embd": 192,
    "n_layer": 4,
    "n_head": 3,
    "n_positions": 2048,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}


def _rollouts(name: str, config: dict[str, Any], **sizes: int) -> list[RolloutCase]:
    """In fp32; in bf16 against fp32, which is what the lower precision brings in all; and bf16 against bf16."""
    return [
        RolloutCase(f"rollout:{name}:fp32", config, "fp32", goal=(2.2, 3.5), **sizes),
        RolloutCase(f"rollout:{name}:bf16-fp32", config, "bf16", goal=(2.8, 4.5), **sizes),
        RolloutCase(f"rollout:{name}:bf16", config, "bf16", peer_precision="bf16", **sizes),
    ]


ROLLOUTS = [
    case
    for name, config, sizes in (
        ("llama-tiny", llama("tiny"), {}),
        ("llama-m30", llama("m30"), {"prompts": 64, "rows": 16}),
        ("gpt2", _GPT2, {}),
        ("qwen2", {"model_type": "qwen2", **_SMALL}, {}),
        ("mistral-window", {"model_type": "mistral", "sliding_window": 96, **_SMALL}, {}),
        ("gemma3", {"model_type": "gemma3_text", "head_dim": 64, "sliding_window": 96, **_SMALL}, {}),
    )
    for case in _rollouts(name, config, **sizes)
]


def chosen(names: list[str], patterns: list[str]) -> list[str]:
    """Those names that a pattern is or begins, up to a colon; all of them if there are no patterns.

    Raises:
        ValueError: a pattern fits nothing.
    """
    if not patterns:
        return names
    fits = {pattern: [n for n in names if n == pattern or n.startswith(f"{pattern}:")] for pattern in patterns}
    missing = [pattern for pattern, found in fits.items() if not found]
    if missing:
        raise ValueError(f"--only: got {', '.join(missing)}; need one of {', '.join(names)}, or how one begins.")
    return [name for name in names if any(name in found for found in fits.values())]
