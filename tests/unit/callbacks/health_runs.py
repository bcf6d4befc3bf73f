"""Made-up iterations for the checks of ``Health``: healthy ones, which a test then spoils."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from lit_instruct.callbacks.health_checks import FIRST, RECENT, Limits, Observation, Row

SETTINGS = {"value_clip_range": 0.2, "max_grad_norm": 1.0, "warmup_iterations": 10, "value_warmup_iterations": 0}


def row(iteration: int, stream: random.Random, **changes: float) -> dict[str, float]:
    """Iteration ``iteration`` (from 1) of a healthy run of 512 episodes an iteration, with its noise."""
    healthy = {
        "iteration": float(iteration),
        "objective/score": 0.01 * iteration + stream.gauss(0, 0.04),
        "objective/score_std": 1.0,
        "objective/kl": 0.02 * (iteration - 1) * (1 + stream.gauss(0, 0.02)),
        "objective/kl_std": 0.5,
        "objective/kl_coef": 0.02,
        "rollout/len_mean": 50 + stream.gauss(0, 1),
        "rollout/eos_rate": 0.95,
        "rollout/score_length_corr": 0.2 + stream.gauss(0, 0.05),
        "rollout/repeat_4gram": 0.05,
        "rollout/distinct_prompts": 1.0,
        "returns/std": 1.0,
        "advantage/mean": stream.gauss(0, 0.1),
        "value/explained_var": min(-1 + 0.2 * iteration, 0.6),
        "policy/approx_kl": 0.01,
        "policy/clip_fraction": 0.05,
        "policy/entropy": 1.0 - 0.01 * min(iteration, 40),
        "policy/loss": 0.0,
        "value/loss": 0.1,
        "policy/grad_norm": 2.0,
        "value/grad_norm": 1.0,
        "ptx/nll": 2.0 + stream.gauss(0, 0.02),
        "ptx/grad_norm": 1.5,
        "policy/own_grad_norm": 1.0,
        "first_minibatch/approx_kl": 1e-9,
        "first_minibatch/ratio_mean": 1.0,
        "first_minibatch/surprise_z": stream.gauss(0, 1),
        "skipped_steps": 0.0,
        "fact/episodes": 512.0,
        "fact/fresh": float(iteration == 1),
        "fact/reference_is_policy": float(iteration == 1),
        "fact/kl_per_token": 0.0 if iteration == 1 else 0.01,
        "fact/fp32": 1.0,
        "fact/warms_up": 0.0,
        **{f"fact/{name}": 0.0 for name in ("tokens_after_end", "end_not_counted", "score_misplaced", "padding_paid")},
        "fact/scores_equal": 0.0,
        "fact/values_equal": 0.0,
    }
    unknown = changes.keys() - healthy.keys()
    assert not unknown, unknown
    return healthy | changes


def rows(iterations: int, *, since: int = 1, seed: int = 0, **changes: float) -> list[Row]:
    """A run of some iterations; from iteration ``since`` on the changes hold."""
    stream = random.Random(seed)
    return [row(i, stream, **(changes if i >= since else {})) for i in range(1, iterations + 1)]


def observe(run: Sequence[Row], *, limits: Limits | None = None, **settings: Any) -> Observation:
    """What the checks see after the last iteration."""
    chosen: Mapping[str, float | None] = SETTINGS | settings
    return Observation(run[-1], run[-RECENT:], run[:FIRST], chosen, limits or Limits())
