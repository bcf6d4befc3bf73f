"""Small runs to plan."""

from __future__ import annotations

from typing import Any

from lit_instruct.planning.activations import Numerics
from lit_instruct.planning.architecture import architecture
from lit_instruct.planning.networks import Adapter, Network, Plan, ppo_networks
from lit_instruct.planning.setup import Lengths, Setup, Text, Work

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


def ppo(
    *,
    rows: int,
    prompt: int,
    response: int,
    devices: int = 1,
    step_rows: int | None = None,
    micro_rows: int = 64,
    rank: int = 0,
) -> Setup:
    """PPO in fp32, four models of one shape, all rows of one length."""
    shape = architecture(LLAMA)
    networks = ppo_networks(shape, shape, plan="separate", adapter=Adapter(rank), frozen_dtype="float32", parameter=4)
    lengths = Lengths(float(prompt), float(response), prompt, response)
    work = Work(rows, step_rows or rows, micro_rows, None, 256, 1, lengths)
    return Setup("ppo", "separate", networks, Numerics("32-true", False), work, devices=devices)


def text(setup: Setup, *, ratio: float, micro_rows: int, chunk_tokens: int, measured: bool = False) -> Setup:
    """With pretraining text."""
    return setup._replace(work=setup.work._replace(text=Text(ratio, micro_rows, chunk_tokens, measured)))


def with_networks(setup: Setup, plan: Plan, networks: tuple[Network, ...]) -> Setup:
    """Under another memory plan."""
    return setup._replace(plan=plan, networks=networks)
