"""The runs of Ouyang et al. 2022 on paper: what docs/scaling.md shows, from the shipped configurations."""

from __future__ import annotations

from importlib.resources import files
from typing import NamedTuple

from lit_instruct.planning.architecture import GPT3
from lit_instruct.planning.config_files import merged
from lit_instruct.planning.cost import PETAFLOP_DAY, PhaseCost, costs
from lit_instruct.planning.fit import device_counts, fewest_devices, fit
from lit_instruct.planning.hardware import Hardware, parse_hardware
from lit_instruct.planning.memory import peak, standing
from lit_instruct.planning.report import duration, size, table
from lit_instruct.planning.settings import Reader, Settings, read_settings
from lit_instruct.planning.setup import Lengths, Stage

_SIZES = tuple(GPT3)
_MEMORIES = ("8xH100-80GB", "8xH200-141GB")
_MACHINES = ("8xH100-80GB", "8xA100-80GB", "8x8xH200-141GB")
_RESPONSE = 200.0  # mean tokens of a sampled response, and of a ranked one: not printed, and ours


class Run(NamedTuple):
    """One run of the paper.

    Attributes:
        name: of the stage.
        size: of the model.
        stage: whose configuration it is.
        configs: under lit_instruct/configs.
        prompt: mean tokens (tables 8 and 9 of the paper).
        response: mean tokens; demonstrations 38 of labelers and 88 of customers.
        rows: of the whole run.
        printed: petaflop/s-days, where the paper says.
    """

    name: str
    size: str
    stage: Stage
    configs: tuple[str, ...]
    prompt: float
    response: float
    rows: int
    printed: str = "-"


def _runs() -> list[Run]:
    demonstrations, demonstration = 12_725, (11_295 * 38 + 1_430 * 88) / 12_725
    found = []
    for name in _SIZES:
        sft = ("paper/sft.yaml", *(["paper/sft_175b.yaml"] if name == "175b" else []))
        printed = "4.9" if name == "175b" else "-"
        found.append(Run("SFT", name, "sft", sft, 408.0, demonstration, 16 * demonstrations, printed))
    found.append(Run("reward model", "6b", "rm", ("paper/rm.yaml",), 199.0, _RESPONSE, 33_207))
    for name in _SIZES:
        ppo = ("paper/ppo_ptx.yaml", *(["paper/ppo_ptx_175b.yaml"] if name == "175b" else []))
        printed = "60" if name == "175b" else "-"
        found.append(Run("PPO-ptx", name, "ppo", ppo, 166.0, _RESPONSE, 256_000, printed))
    return found


def run_settings(run: Run) -> Settings:
    """What the shipped configuration of a run says."""
    folder = files("lit_instruct") / "configs"
    reader = Reader(merged([str(folder / name) for name in run.configs], []))
    settings = read_settings(
        reader, run.stage, GPT3[run.size], GPT3["6b"], prompt_tokens=run.prompt, response_tokens=run.response
    )
    return settings._replace(run_rows=run.rows)


def paper_tables() -> str:
    """The three tables, as Markdown.

    Returns:
        Operations against the paper's; devices and memory; time.
    """
    return "\n\n".join([_operations(), _devices(), _times()])


def _operations() -> str:
    """Petaflop/s-days of each run, by part, at the mean lengths; and with every row as long as the context."""
    anywhere = parse_hardware("H100-80GB")
    rows = []
    for run in _runs():
        settings = run_settings(run)
        parts = {cost.phase: _days(settings, cost) for cost in costs(settings.setup(anywhere), anywhere)}
        whole = sum(_days(settings, cost) for cost in costs(_whole_contexts(settings).setup(anywhere), anywhere))
        cells = [_number(parts[part]) if part in parts else "-" for part in ("rollout", "scoring", "update", "text")]
        rows.append([f"{run.name} {run.size}", *cells, _number(sum(parts.values())), _number(whole), run.printed])
    head = ["run", "rollout", "scoring", "update", "text", "all", "whole contexts", "the paper"]
    return f"Petaflop/s-days\n\n{table(head, rows)}"


def _devices() -> str:
    """The fewest devices on which each run fits, and what it takes; by memory, for that alone counts."""
    rows = []
    for run in _runs():
        settings = run_settings(run)
        for device in _MEMORIES:
            hardware = parse_hardware(device)
            start = [f"{run.name} {run.size}", device.removeprefix("8x"), _by_state(settings, hardware)]
            found = fewest_devices(settings, hardware, "sharded")
            if found is None:
                most = max(device_counts(settings))
                rows.append([*start, f"none of {most}", "-", "-", "its rows cannot be dealt to more"])
                continue
            there, how = found
            worst = peak(how.settings.setup(there))
            changes = ", ".join(how.changes) or "as it is"
            rows.append([*start, str(there.devices), size(worst.total), worst.phase, changes])
    head = ["run", "device", "state alone fills", "fewest", "peak of each", "in", "with"]
    return f"Devices\n\n{table(head, rows)}"


def _by_state(settings: Settings, hardware: Hardware) -> str:
    """Devices that weights, gradients and optimizer state fill, spread without a gap."""
    alone = settings.setup(hardware._replace(nodes=1, per_node=1))
    return f"{sum(sum(one[1:]) for one in standing(alone)) / hardware.usable:,.1f}"


def _times() -> str:
    """Seconds of an iteration by phase with its limit, tokens a second and the whole run."""
    rows = []
    for run in _runs():
        for name in _MACHINES:
            settings, hardware = run_settings(run), parse_hardware(name)
            if hardware.devices not in device_counts(settings) or (hardware.nodes > 1) != (run.size == "175b"):
                continue
            how = fit(settings, hardware, "sharded")
            if how.fits:
                rows.append([f"{run.name} {run.size}", name, *_time(how.settings, hardware)])
    head = ["run", "on", "rollout", "scoring", "text", "update", "tokens/s", "run takes"]
    return f"Time, at least\n\n{table(head, rows)}"


def _time(settings: Settings, hardware: Hardware) -> list[str]:
    taken = {cost.phase: cost for cost in costs(settings.setup(hardware), hardware)}
    phases = [_phase(taken.get(name)) for name in ("rollout", "scoring", "text", "update")]
    seconds = sum(cost.seconds for cost in taken.values())
    work = settings.work
    tokens = work.rows * (work.lengths.prompt + work.responses * work.lengths.response)
    tokens += 0.0 if work.text is None else work.text.ratio * work.rows * work.text.chunk_tokens
    return [*phases, f"{tokens / seconds:,.0f}", duration(settings.run_rows / work.rows * seconds)]


def _phase(cost: PhaseCost | None) -> str:
    if cost is None:
        return "-"
    short = {"compute": "compute", "memory bandwidth": "memory", "communication": "network"}
    return f"{duration(cost.seconds)}, {short[cost.limit]}"


def _days(settings: Settings, cost: PhaseCost) -> float:
    return settings.run_rows / settings.work.rows * cost.flops / PETAFLOP_DAY


def _whole_contexts(settings: Settings) -> Settings:
    """Every row padded to the context, and the padding counted: prompt and response take half each."""
    lengths, context = settings.work.lengths, settings.policy.context
    if settings.work.responses > 1:
        response = context - lengths.prompt
        longest = Lengths(lengths.prompt, response, lengths.longest_prompt, lengths.longest_response)
    else:
        longest = Lengths(context / 2, context / 2, context // 2, context // 2)
    return settings._replace(work=settings.work._replace(lengths=longest))


def _number(value: float) -> str:
    return f"{value:,.3g}"
