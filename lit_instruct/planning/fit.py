"""Whether a run fits, and what to change where it does not: settings that keep the numbers first, then the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from lit_instruct.planning.hardware import Hardware
from lit_instruct.planning.memory import Moment, peak
from lit_instruct.planning.settings import Settings
from lit_instruct.planning.setup import Strategy


class Change(NamedTuple):
    """One thing to set differently.

    Attributes:
        said: as the command line has it.
        settings: with it.
    """

    said: str
    settings: Settings


class Fit(NamedTuple):
    """What fitting took.

    Attributes:
        fits: whether anything helped.
        changes: what was set differently, in order; none where it fits as it is.
        settings: with all of them.
        worst: the peak then.
    """

    fits: bool
    changes: tuple[str, ...]
    settings: Settings
    worst: Moment


def fits(settings: Settings, hardware: Hardware, strategy: Strategy) -> bool:
    """Whether the peak is below what a device has."""
    return peak(settings.setup(hardware, strategy)).total <= hardware.usable


def fit(settings: Settings, hardware: Hardware, strategy: Strategy) -> Fit:
    """Change a run until it fits.

    Args:
        settings: as the user wants it.
        hardware: where.
        strategy: what is spread.

    Returns:
        Changes with which it fits: again and again the first one that lowers the peak.
    """
    said: dict[str, str] = {}
    worst = peak(settings.setup(hardware, strategy))
    while worst.total > hardware.usable:
        for step in _CHANGES:
            change = step(settings, hardware)
            smaller = worst if change is None else peak(change.settings.setup(hardware, strategy))
            if change is not None and smaller.total < worst.total:
                break
        else:
            break
        settings, worst = change.settings, smaller
        key, _, _ = change.said.partition(" ")
        said[key] = change.said
    return Fit(worst.total <= hardware.usable, tuple(said.values()), settings, worst)


def device_counts(settings: Settings) -> Iterator[int]:
    """How many devices a run can be spread over: rows of an optimizer step, and chunks of text, must divide."""
    chunks = 0
    if settings.work.text is not None:
        chunks = max(round(settings.work.text.ratio * settings.work.step_rows), 1)
    for count in range(1, settings.work.step_rows + 1):
        if settings.work.step_rows % count == 0 and settings.work.rows % count == 0 and chunks % count == 0:
            yield count


def fewest_devices(settings: Settings, hardware: Hardware, strategy: Strategy) -> tuple[Hardware, Fit] | None:
    """The smallest number of devices on which a run fits, with whatever changes that takes.

    Args:
        settings: as the user wants it.
        hardware: its device, and how many of them a node has.
        strategy: what is spread.

    Returns:
        That hardware and the fit; None where no number that divides is enough.
    """
    for count in device_counts(settings):
        nodes = max(count // hardware.per_node, 1)
        if count > hardware.per_node and count % hardware.per_node:
            continue
        name = f"{nodes}x" * (nodes > 1) + f"{count // nodes}x{hardware.name.split('x')[-1]}"
        there = Hardware(name, nodes, count // nodes, hardware.device)
        found = fit(settings, there, strategy)
        if found.fits:
            return there, found
    return None


def _text_rows(settings: Settings, hardware: Hardware) -> Change | None:
    text = settings.work.text
    if text is None:
        return None
    rows = min(text.micro_rows, round(text.ratio * settings.work.step_rows) // hardware.devices)
    if rows <= 1:
        return None
    fewer = rows // 2
    work = settings.work._replace(text=text._replace(micro_rows=fewer))
    return Change(f"PtxMixing.micro_batch_size {fewer}", settings._replace(work=work))


def _checkpointing(settings: Settings, hardware: Hardware) -> Change | None:
    if settings.gradient_checkpointing:
        return None
    return Change("model.gradient_checkpointing true", settings._replace(gradient_checkpointing=True))


def _micro_rows(settings: Settings, hardware: Hardware) -> Change | None:
    """Fewer rows of a pass: rows in PPO, tokens elsewhere."""
    work = settings.work
    row = work.lengths.longest_prompt + round(work.lengths.longest_response * work.responses)
    if settings.stage == "ppo":
        rows = max(min(work.micro_rows, work.step_rows // hardware.devices), 1)
        if rows == 1:
            return None
        return Change(
            f"model.micro_batch_size {rows // 2}", settings._replace(work=work._replace(micro_rows=rows // 2))
        )
    tokens = work.micro_tokens or row * max(work.micro_rows // hardware.devices, 1)
    if tokens <= row:
        return None
    fewer = max(tokens // 2, row)
    return Change(f"model.micro_batch_tokens {fewer}", settings._replace(work=work._replace(micro_tokens=fewer)))


def _slots(settings: Settings, hardware: Hardware) -> Change | None:
    slots = min(settings.work.rollout_rows, settings.work.rows // hardware.devices)
    if settings.stage != "ppo" or slots <= 1:
        return None
    fewer = slots // 2
    return Change(
        f"model.rollout_batch_size {fewer}", settings._replace(work=settings.work._replace(rollout_rows=fewer))
    )


def _unmeasured(settings: Settings, hardware: Hardware) -> Change | None:
    text = settings.work.text
    if text is None or not text.measured:
        return None
    work = settings.work._replace(text=text._replace(measured=False))
    return Change("PtxMixing.grad_norms_every null", settings._replace(work=work))


def _too_large_to_gather(settings: Settings, hardware: Hardware) -> Change | None:
    """Where the gathered weights would fill half of a device, fewer slots are no way out."""
    return _synced(settings, hardware) if 4.0 * settings.policy.parameters > hardware.usable / 2 else None


def _synced(settings: Settings, hardware: Hardware) -> Change | None:
    if settings.stage != "ppo" or settings.rollout == "synced" or hardware.devices == 1:
        return None
    return Change("trainer.strategy.rollout_weights synced", settings._replace(rollout="synced"))


def _offload(settings: Settings, hardware: Hardware) -> Change | None:
    if settings.stage != "ppo" or settings.offload_frozen or hardware.devices > 1 or hardware.on_cpu:
        return None
    if settings.memory == "shared_base" or settings.frozen_dtype in ("8bit", "4bit"):
        return None
    return Change("model.offload_frozen true", settings._replace(offload_frozen=True))


def _frozen(settings: Settings, hardware: Hardware) -> Change | None:
    if settings.stage != "ppo" or settings.frozen_dtype != "float32" or settings.memory == "shared_base":
        return None
    return Change("model.frozen_dtype bfloat16", settings._replace(frozen_dtype="bfloat16"))


_CHANGES: tuple[Callable[[Settings, Hardware], Change | None], ...] = (
    _text_rows,
    _micro_rows,
    _checkpointing,
    _unmeasured,
    _too_large_to_gather,
    _slots,
    _offload,
    _frozen,
    _synced,
)
"""Cheapest first: smaller passes cost nothing much, checkpointing a third of the time, a synced rollout most of it."""
