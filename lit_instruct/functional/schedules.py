"""Step in, multiplier of the peak learning rate out. Plain numbers; ``torch.optim.LambdaLR`` takes them."""

from __future__ import annotations

import math


def cosine_to_floor(step: int, total_steps: int, *, floor: float = 0.1, warmup_steps: int = 0) -> float:
    """Half a cosine from 1 down to ``floor``, after an optional linear rise.

    InstructGPT (arXiv 2203.02155), appendix C.1 and C.2: SFT and the reward model decay to 10 % of the peak;
    without warm-up this equals ``CosineAnnealingLR(T_max=total_steps, eta_min=floor * peak)``.

    ::

        step         0 ....... warmup_steps ........... total_steps ....
        multiplier   1/(w+1)        1       half a cosine   floor   floor

    Args:
        step: optimizer steps already taken; beyond ``total_steps`` the floor stays.
        total_steps: length of the run.
        floor: multiplier at the end.
        warmup_steps: length of the rise, ``(step + 1) / (warmup_steps + 1)``: no step is taken with a rate of 0.

    Returns:
        The multiplier.

    Raises:
        ValueError: the arguments describe no schedule.
    """
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"cosine_to_floor: got total_steps={total_steps} and warmup_steps={warmup_steps}, "
            "need 0 <= warmup_steps < total_steps"
        )
    if not 0.0 <= floor <= 1.0:
        raise ValueError(f"cosine_to_floor: got floor={floor}, need a share of the peak between 0 and 1")
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = min((step - warmup_steps) / (total_steps - warmup_steps), 1.0)
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def linear_warmup(iteration: int, warmup_iterations: int, *, start: float = 0.1) -> float:
    """Straight line from ``start`` to 1, then 1.

    InstructGPT (arXiv 2203.02155), appendix C.4: PPO warms up over the first 10 iterations from a tenth of the peak.
    All minibatches of an iteration share the multiplier. Equals ``LinearLR(start, total_iters=warmup_iterations)``.

    Args:
        iteration: iterations already finished.
        warmup_iterations: the first iteration with the full rate; 0 means no warm-up.
        start: multiplier of iteration 0.

    Returns:
        The multiplier.

    Raises:
        ValueError: the length is negative or the start not between 0 and 1.
    """
    if warmup_iterations < 0 or not 0.0 <= start <= 1.0:
        raise ValueError(
            f"linear_warmup: got warmup_iterations={warmup_iterations} and start={start}, "
            "need at least 0 iterations and a start between 0 and 1"
        )
    if iteration >= warmup_iterations:
        return 1.0
    return start + (1.0 - start) * iteration / warmup_iterations
