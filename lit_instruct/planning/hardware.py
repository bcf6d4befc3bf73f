"""What a device does in a second: figures of the vendors' data sheets, dense bf16, one direction of each link."""

from __future__ import annotations

import re
from typing import NamedTuple

from lit_instruct.planning.refusal import refuse

GIB = 2**30


class Device(NamedTuple):
    """One device.

    Attributes:
        flops: operations a second of matrix products in bf16 (fp16 where there is no bf16).
        flops_fp32: of those in fp32, as fast as they may be shortened (TF32).
        bandwidth: bytes a second out of its memory.
        memory: bytes; what is sold as 80 GB are about 80 GiB.
        link: bytes a second to another device of the same node, one way.
        network: bytes a second to a device of another node, one way, each device for itself.
        reserved: bytes that the driver's context, kernels and the allocator's rounding take.
    """

    flops: float
    flops_fp32: float
    bandwidth: float
    memory: float
    link: float
    network: float
    reserved: float


_RESERVED = 2 * GIB

DEVICES = {
    "H200-141GB": Device(989e12, 495e12, 4.8e12, 141 * GIB, 450e9, 50e9, _RESERVED),
    "H100-80GB": Device(989e12, 495e12, 3.35e12, 80 * GIB, 450e9, 50e9, _RESERVED),
    "A100-80GB": Device(312e12, 156e12, 2.04e12, 80 * GIB, 300e9, 25e9, _RESERVED),
    "A100-40GB": Device(312e12, 156e12, 1.555e12, 40 * GIB, 300e9, 25e9, _RESERVED),
    "V100-32GB": Device(125e12, 15.7e12, 0.9e12, 32 * GIB, 150e9, 12.5e9, _RESERVED),
    "RTX4090-24GB": Device(165e12, 82.6e12, 1.008e12, 24 * GIB, 32e9, 3.1e9, _RESERVED),
}
"""Links: NVLink 4, 3 and 2, PCIe 4; networks: 400, 400, 200, 200, 100 and 25 Gbit/s a device, which are assumptions."""

_PATTERN = re.compile(r"(?:(?:(\d+)x)?(\d+)x)?([A-Za-z][\w-]*)")
_CPU = re.compile(r"cpu:([\d.]+),([\d.]+),([\d.]+)")


class Hardware(NamedTuple):
    """Equal devices in equal nodes.

    Attributes:
        name: as it was asked for.
        nodes: how many.
        per_node: devices of each.
        device: one of them.
    """

    name: str
    nodes: int
    per_node: int
    device: Device

    @property
    def devices(self) -> int:
        """All of them."""
        return self.nodes * self.per_node

    @property
    def on_cpu(self) -> bool:
        """Whether it is this kind of machine, with the kernels that the project has for it."""
        return self.name.startswith("cpu")

    @property
    def ring(self) -> float:
        """Bytes a second that a device sends in a ring over all devices: as fast as its slowest link."""
        return self.device.network if self.nodes > 1 else self.device.link

    @property
    def usable(self) -> float:
        """Bytes of a device that a run can have."""
        return self.device.memory - self.device.reserved


def parse_hardware(text: str) -> Hardware:
    """Read what the command line names.

    Args:
        text: ``H100-80GB``, ``8xH100-80GB``, ``2x8xH100-80GB`` (nodes x devices), or
            ``cpu:TFLOPS,GB/S,GIB`` with what one has measured on a machine without accelerators, in a run's precision.

    Returns:
        The hardware.

    Raises:
        ConfigError: nothing that is known.
    """
    measured = _CPU.fullmatch(text)
    if measured:
        tera, giga, size = (float(part) for part in measured.groups())
        return Hardware(
            text, 1, 1, Device(tera * 1e12, tera * 1e12, giga * 1e9, size * GIB, giga * 1e9, giga * 1e9, 0.0)
        )
    found = _PATTERN.fullmatch(text)
    names = {name.lower(): name for name in DEVICES}
    if not found or found[3].lower() not in names or "0" in (found[1], found[2]):
        refuse(
            "hardware",
            repr(text),
            f"DEVICE, 8xDEVICE or 2x8xDEVICE (nodes x devices) with one of {', '.join(DEVICES)}, or "
            "cpu:TFLOPS,GB/S,GIB",
            "name one of these, for example --hardware 8xH100-80GB or cpu:0.4,30,16",
        )
    return Hardware(text, int(found[1] or 1), int(found[2] or 1), DEVICES[names[found[3].lower()]])
