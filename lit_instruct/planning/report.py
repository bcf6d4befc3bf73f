"""Plans as tables that people read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lit_instruct.planning.cost import PETAFLOP_DAY, PhaseCost, costs
from lit_instruct.planning.fit import fewest_devices, fit
from lit_instruct.planning.hardware import GIB, Hardware
from lit_instruct.planning.memory import peak, peaks, standing
from lit_instruct.planning.networks import PLANS
from lit_instruct.planning.settings import Settings
from lit_instruct.planning.setup import Setup, Strategy

_WORDS = {"device", "in", "with", "on", "limit"}  # columns that hold no numbers


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table with columns that line up: words to the left, numbers to the right.

    Args:
        head: names of columns.
        rows: cells.

    Returns:
        Lines without a line break at the end.
    """
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    words = [number == 0 or name in _WORDS for number, name in enumerate(head)]
    rule = ["-" * width if left else "-" * (width - 1) + ":" for width, left in zip(widths, words, strict=True)]

    def laid(cells: Sequence[str]) -> str:
        parts = zip(cells, widths, words, strict=True)
        return f"| {' | '.join(cell.ljust(width) if left else cell.rjust(width) for cell, width, left in parts)} |"

    return "\n".join([laid(lines[0]), f"| {' | '.join(rule)} |", *map(laid, lines[1:])])


def size(number: float) -> str:
    """Bytes in GiB, or in MiB where that is nothing."""
    if number == 0:
        return "-"
    return f"{number / GIB:,.2f} GiB" if number >= GIB / 10 else f"{number / 2**20:,.1f} MiB"


def duration(seconds: float) -> str:
    """Seconds in a unit that leaves few digits."""
    for unit, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:,.1f} s" if seconds >= 0.1 else f"{1000 * seconds:,.2g} ms"


def parameters(count: float) -> str:
    """Thousands, millions or billions."""
    for unit, many in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= many:
            return f"{count / many:,.2f}{unit}"
    return f"{count:,.0f}"


def model_table(setup: Setup) -> str:
    """What each network keeps on a device, all the time."""
    named = {network.name: network for network in setup.networks}
    rows = []
    for one in standing(setup):
        network = named.get(one.name)
        through = parameters(network.passes_through) if network else "-"
        trained = parameters(network.trained) if network and network.trained else "-"
        rows.append([one.name, through, trained, size(one.weights), size(one.gradients), size(one.optimizer)])
    return table(["model", "parameters", "trained", "weights", "gradients", "optimizer state"], rows)


def phase_table(setup: Setup, hardware: Hardware) -> str:
    """The worst moment of each phase on a device, what is sent, and how long it takes."""
    taken = {cost.phase: cost for cost in costs(setup, hardware)}
    rows = []
    for moment in peaks(setup):
        cost = taken[moment.phase]
        parts = (moment.weights + moment.optimizer, moment.gradients, moment.gathered, moment.activations)
        sizes = [size(part) for part in (*parts, moment.logits, moment.cache, moment.total)]
        rows.append([moment.phase, *sizes, size(cost.sent), duration(cost.seconds), cost.limit])
    head = ["phase", "weights, state", "gradients", "gathered", "activations", "logits", "KV cache", "peak"]
    return table([*head, "sent", "time", "limit"], rows)


def plan_text(settings: Settings, hardware: Hardware, strategy: Strategy) -> str:
    """All that is said about one memory plan.

    Args:
        settings: the run.
        hardware: where.
        strategy: what is spread over devices.

    Returns:
        Two tables and what they come to.
    """
    setup = settings.setup(hardware, strategy)
    spread = f"{strategy} over {hardware.devices} devices" if hardware.devices > 1 else "on one device"
    name = f"memory: {settings.memory}, {spread}" if settings.stage == "ppo" else spread
    lines = [f"== {name}", "", model_table(setup), "", phase_table(setup, hardware), ""]
    return "\n".join([*lines, *summary(settings, setup, hardware), *verdict(settings, hardware, strategy)])


def summary(settings: Settings, setup: Setup, hardware: Hardware) -> list[str]:
    """Seconds and operations of an iteration, and of the run where its length is known."""
    taken = costs(setup, hardware)
    seconds, flops = sum(one.seconds for one in taken), sum(one.flops for one in taken)
    unit = "iteration" if settings.stage == "ppo" else "optimizer step"
    said = [
        f"One {unit}: at least {duration(seconds)}, {flops / 1e15:,.4g} petaflop; {tokens_a_second(settings, taken)}."
    ]
    if settings.run_rows:
        count = settings.run_rows / settings.work.rows
        days = f"{count * flops / PETAFLOP_DAY:,.3g} petaflop/s-days"
        said.append(f"The run of {settings.run_rows:,} rows: at least {duration(count * seconds)}, {days}.")
    return said


def tokens_a_second(settings: Settings, taken: Sequence[PhaseCost]) -> str:
    """Tokens of the rows, and those of the text where there is one, over the seconds of an iteration."""
    seconds = sum(one.seconds for one in taken)
    work = settings.work
    own = work.rows * (work.lengths.prompt + work.responses * work.lengths.response)
    if work.text is None:
        return f"{own / seconds:,.0f} tokens a second"
    text = work.text.ratio * work.rows * work.text.chunk_tokens
    return f"{own / seconds:,.0f} tokens a second of its own and {text / seconds:,.0f} of text"


def verdict(settings: Settings, hardware: Hardware, strategy: Strategy) -> list[str]:
    """Whether it fits, and else what to change."""
    worst = peak(settings.setup(hardware, strategy))
    room = f"{size(worst.total)} of {size(hardware.usable)} in the phase {worst.phase}"
    if worst.total <= hardware.usable:
        return [f"Fits: {room}."]
    found = fit(settings, hardware, strategy)
    if found.fits:
        return [f"Does not fit: {room}. Fits with {', '.join(found.changes)} ({size(found.worst.total)})."]
    if hardware.on_cpu:
        return [f"Does not fit: {room}. No setting makes it fit here: a smaller model, or memory: shared_base, may."]
    enough = fewest_devices(settings, hardware, "sharded")
    if enough is None:
        return [f"Does not fit: {room}, on any number of these devices that its rows can be dealt to."]
    there, changed = enough
    told = f" with {', '.join(changed.changes)}" if changed.changes else ""
    return [f"Does not fit: {room}. Fits sharded over {there.devices} devices{told} ({size(changed.worst.total)})."]


def plans(settings: Settings) -> list[Settings]:
    """The run under each memory plan that it can have: PPO has three, shared_base of them with adapters only."""
    if settings.stage != "ppo":
        return [settings]
    found = [settings._replace(memory=plan) for plan in PLANS if plan != "shared_base"]
    if settings.adapter.rank:  # there the frozen networks are the base itself
        found.append(settings._replace(memory="shared_base", frozen_dtype="float32", offload_frozen=False))
    return found
