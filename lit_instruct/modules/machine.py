"""Threads and the precision of fp32 matrix products: decided once from what the machine is, and said in the log.

Torch takes a thread for each core that it sees. In a container that may use two of 64 cores that is far too many, and
under a launcher of several processes it is one, whatever the machine has. What may be used is read here from the
process's affinity and its control groups, and shared between the processes of the machine.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from lit_instruct.types import ConfigError

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
EXACT_ERROR = 1e-5
"""Relative error above which a matrix product was not computed in fp32, whose own is 3e-7 (bf16: 2e-3)."""

_GIVEN = {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ}  # before a run here sets one
_EDGE = 256  # smaller products stay in fp32 whatever is asked


@dataclass(frozen=True)
class Machine:
    """How a stage uses the processor.

    Args:
        threads: of a matrix product, in each process. By default the usable cores, shared between the processes of the
            machine, or what ``OMP_NUM_THREADS`` says.
        float32_matmul: how products of fp32 matrices are computed. ``highest``: in fp32. ``high``: in TF32 on GPUs that
            have it. ``medium``: in bf16 where that is faster; on processors without bf16 units other kernels, still in
            fp32. The log tells how exact the products turn out to be.

    Raises:
        ConfigError: fewer than one thread.
    """

    threads: int | None = None
    float32_matmul: Literal["highest", "high", "medium"] = "highest"

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise ConfigError(
                f"machine.threads: got {self.threads}; need 1 or more. Do: leave it out to use every core."
            )

    def apply(self, processes: int) -> Threads:
        """Set both for this process.

        Args:
            processes: that train on this machine, this one included.

        Returns:
            What was decided about threads.
        """
        threads = decide_threads(self.threads, usable_cores(), processes, _GIVEN, os.environ)
        torch.set_num_threads(threads.number)
        os.environ["OMP_NUM_THREADS"] = str(threads.number)  # else Lightning's launchers decide on their own
        torch.set_float32_matmul_precision(self.float32_matmul)
        return threads


class Threads(NamedTuple):
    """How many threads, and why.

    Attributes:
        number: for this process.
        cores: that may be used.
        reason: in words, or empty where every usable core has its thread.
    """

    number: int
    cores: int
    reason: str


def decide_threads(
    asked: int | None, cores: int, processes: int, given: Mapping[str, str], environment: Mapping[str, str]
) -> Threads:
    """Decide on the threads of one process; nothing is set.

    Args:
        asked: by the user's settings.
        cores: that may be used on this machine.
        processes: that train on it.
        given: variables about threads (``THREAD_VARIABLES``) as the process was started with them.
        environment: the other variables.

    Returns:
        The decision.
    """
    if asked is not None:
        return Threads(asked, cores, "machine.threads")
    # Of several processes torchrun gives each one thread, on any machine, unless the variable is set.
    by_torchrun = "TORCHELASTIC_RUN_ID" in environment and processes > 1
    for name in THREAD_VARIABLES:
        first = given.get(name, "").split(",")[0].strip()
        if first.isdecimal() and int(first) > 0 and not (by_torchrun and name == "OMP_NUM_THREADS" and first == "1"):
            return Threads(int(first), cores, name)
    return Threads(max(1, cores // processes), cores, f"{processes} processes" if processes > 1 else "")


def usable_cores() -> int:
    """Cores that this process may use: those of its affinity, no more than its control groups grant; 1 or more.

    Two hardware threads of a core count once: they share the units that multiply matrices.
    """
    processors = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = physical_cores(processors)
    return max(1, int(min(cores, granted_cores())))


def physical_cores(processors: Iterable[int], system: Path = Path("/sys/devices/system/cpu")) -> int:
    """How many cores a set of logical processors belongs to.

    Args:
        processors: numbers of logical processors.
        system: the folder in which Linux describes them; a processor that is not described counts as a core.

    Returns:
        The number of different cores.
    """
    cores = set()
    for processor in processors:
        siblings = system / f"cpu{processor}" / "topology" / "thread_siblings_list"
        try:
            cores.add(siblings.read_text(encoding="ascii").strip())
        except OSError:
            cores.add(f"processor {processor}")
    return len(cores)


def granted_cores(membership: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float:
    """How many cores' worth of time the control groups of this process grant (versions 1 and 2).

    Args:
        membership: the file with the process's groups.
        root: where their folders are mounted.

    Returns:
        The least grant of the group and those it is in; infinite where there is no limit.
    """
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:  # not on Linux
        return inf
    granted = inf
    for line in lines:
        number, controllers, group = line.split(":", 2)
        if number == "0":
            hierarchies = [root, root / "unified"]
        elif "cpu" in controllers.split(","):
            hierarchies = [root / controllers, root / "cpu"]
        else:
            continue
        for hierarchy in hierarchies:  # inside a container a group may be named as outside, and lies at the top
            place = Path(group.lstrip("/"))
            for folder in {
                hierarchy,
                *(hierarchy / part for part in (place, *place.parents) if ".." not in part.parts),
            }:
                granted = min(granted, _grant(folder))
    return granted


def _grant(folder: Path) -> float:
    """What one group's folder says: microseconds of processor for each period."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text(encoding="ascii").strip()
            period = (folder / "cpu.cfs_period_us").read_text(encoding="ascii").strip()
    except OSError:
        return inf
    return inf if quota in ("max", "-1") else int(quota) / int(period)


def local_processes(devices: Any, accelerator: str, environment: Mapping[str, str], gpus: int) -> int:
    """How many processes a Trainer has on this machine: one for each device.

    Args:
        devices: as given to the Trainer: a number, ``auto``, a list, or one of these as text.
        accelerator: as given to the Trainer, by name.
        environment: variables; torchrun says it there.
        gpus: GPUs that are seen.

    Returns:
        1 or more.
    """
    launched = environment.get("LOCAL_WORLD_SIZE", "")
    if launched.isdecimal():
        return max(1, int(launched))
    if isinstance(devices, str) and "," in devices:
        devices = [one for one in devices.split(",") if one.strip()]
    if isinstance(devices, list | tuple):
        return max(1, len(devices))
    if str(devices).isdecimal():
        return max(1, int(devices))
    return max(1, gpus) if accelerator in ("auto", "gpu", "cuda") else 1  # auto, -1


def matmul_error(device: torch.device | str = "cpu") -> float:
    """How far a product of two fp32 matrices lies from the one in fp64, relative to its size, under today's settings.

    Args:
        device: where to multiply.

    Returns:
        The error in the Frobenius norm.
    """
    stream = torch.Generator().manual_seed(0)
    left_NN, right_NN = torch.randn(2, _EDGE, _EDGE, generator=stream)
    exact_NN = left_NN.double() @ right_NN.double()
    product_NN = (left_NN.to(device) @ right_NN.to(device)).cpu().double()
    return float((product_NN - exact_NN).norm() / exact_NN.norm())


def describe(threads: Threads, float32_matmul: str, error: float, device: str) -> tuple[str, str]:
    """Put the settings into words.

    Args:
        threads: of this process.
        float32_matmul: the precision that is set.
        error: of an fp32 product under it, see :func:`matmul_error`.
        device: kind of device on which it was measured.

    Returns:
        The line for the log; and a warning, or an empty text, where products are not fp32.
    """
    reason = f" ({threads.reason})" if threads.reason else ""
    cores = "core" if threads.cores == 1 else "cores"
    line = (
        f"threads {threads.number} of {threads.cores} {cores}{reason}; "
        f"fp32 matrix products: {float32_matmul} (error {error:.0e} on {device})"
    )
    if error <= EXACT_ERROR:
        return line, ""
    return line, (
        f"machine.float32_matmul: {float32_matmul!r} makes products of fp32 matrices on this {device} less exact than "
        f"fp32: relative error {error:.0e}, which fp32 keeps below {EXACT_ERROR:.0e}. Do: set it to highest where the "
        "numbers must be those of fp32."
    )
