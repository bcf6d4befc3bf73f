"""Multiple choice by likelihood: a model chooses the option whose tokens it finds likeliest on average."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def choice_credit(logprobs: Sequence[float], tokens: Sequence[int], correct: int) -> float:
    """What a choice by mean log-probability a token counts (Ouyang et al. 2022, appendix D).

    Args:
        logprobs: total log-probability of each option given the prompt, nats.
        tokens: of each option.
        correct: index of the right option.

    Returns:
        1 if the right option has the highest mean, 0 if another one has; 1 / k where k options share it, the right one
        among them.
    """
    means = np.asarray(logprobs, dtype=float) / np.asarray(tokens, dtype=float)
    best = means == means.max()
    return float(best[correct] / best.sum())
