"""Measures the limit in a process of its own, with the same number of threads as the race: one step of the gate."""

from __future__ import annotations

import torch

from scripts.benchmark.gate import Gate, spec
from scripts.benchmark.limit import ideal_seconds


def main() -> None:
    told = spec()
    gate = Gate()
    torch.set_num_threads(told["threads"])
    gate.begin()
    while True:
        seconds, rates = ideal_seconds(told["size"], told["tokens"], told["predicted"])
        gate.facts = {"ideal_seconds": seconds, "rates": rates}
        gate.step()


if __name__ == "__main__":
    main()
