"""Speed and memory of the three stages against their peers, on this machine: see docs/benchmarks.md.

    python scripts/benchmark/run.py                       # everything, hours
    python scripts/benchmark/run.py --only sft:tiny rm    # some cases; --list names them
    python scripts/benchmark/run.py --quick               # under two minutes, without peers: exit status 1 if slower
    python scripts/benchmark/run.py --report --update-docs   # no measuring: the tables of earlier runs

Results are added to those of earlier runs in --out, case by case.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # as a script, this file's folder stands there instead

from scripts.benchmark import scaling  # noqa: E402
from scripts.benchmark.cases import CASES, ROLLOUTS, Case, RolloutCase, chosen  # noqa: E402
from scripts.benchmark.environments import python_of, versions  # noqa: E402
from scripts.benchmark.race import Result, Turn, Worker, compare, environment, race  # noqa: E402
from scripts.benchmark.table import as_markdown, as_text, between_markers, merged  # noqa: E402

OVERHEAD, START = "overhead:lightning", "overhead:start"
LOG_EVERY = {"sft": 10, "rm": 1, "ppo": 1}  # as our shipped configurations
PEERS_ONLY = ("trl", "accelerate")  # though the tests of this project use them too
PEER_LOG_EVERY = 10  # as TRL's; its PPO trainer logs every iteration whatever it is told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="CASE", help="cases, or how their names begin")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    parser.add_argument("--pairs", type=int, default=5, help="turns of each side")
    parser.add_argument("--threads", type=int, default=1, help="1 measures CPU time, more measure time by the clock")
    parser.add_argument("--envs", type=Path, default=ROOT / "build" / "benchmark", help="the peers' environments")
    parser.add_argument("--out", type=Path, help="folder of the results (default: build/benchmark/results-THREADS)")
    parser.add_argument("--report", action="store_true", help="measure nothing, show what --out holds")
    parser.add_argument("--update-docs", action="store_true", help="write the tables into docs/benchmarks.md")
    parser.add_argument("--quick", action="store_true", help="ratios to our own plain paths, against stored floors")
    options = parser.parse_args()
    if options.quick:
        from scripts.benchmark.quick import check

        warnings.filterwarnings("ignore")
        raise SystemExit(check())
    if options.pairs < 1 or options.threads < 1:
        raise SystemExit(f"--pairs, --threads: got {options.pairs} and {options.threads}; need at least 1.")
    try:
        names = chosen(all_names(), options.only)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    if options.list:
        raise SystemExit("\n".join(names))
    out = options.out or ROOT / "build" / "benchmark" / f"results-{options.threads}"
    bench = Bench(options.envs, out, pairs=options.pairs, threads=options.threads)
    if not options.report:
        bench.measure(names)
    bench.show(update_docs=options.update_docs)


def all_names() -> list[str]:
    """Names of all cases, in the order in which they run."""
    return [*by_name(), OVERHEAD, START]


def by_name() -> dict[str, Case | RolloutCase]:
    """All cases but the overheads."""
    every: list[Case | RolloutCase] = [*CASES, *ROLLOUTS, *scaling.cases()]
    return {case.name: case for case in every}


class Bench:
    """Runs cases and keeps their results."""

    def __init__(self, envs: Path, out: Path, *, pairs: int, threads: int) -> None:
        self.envs, self.out, self.pairs, self.threads = envs, out, pairs, threads
        self.measure_by = "cpu" if threads == 1 else "wall"
        self.own = Path(sys.executable)
        self.file = out / "results.json"
        self.results: dict[str, Any] = {}
        if self.file.is_file():
            self.results = json.loads(self.file.read_text(encoding="utf-8"))

    def measure(self, names: list[str]) -> None:
        """Run the cases of these names, and write the results after each."""
        warnings.filterwarnings("ignore")
        needed = {case.environment for case in CASES if case.name in names} - {"own"}
        pythons = {name: python_of(name, self.envs) for name in sorted(needed)}
        self.results["machine"] = self._machine(pythons)
        for name in names:
            print(f"{name} ...", flush=True)
            with tempfile.TemporaryDirectory() as scratch:
                self._case(name, Path(scratch), pythons)
            self.out.mkdir(parents=True, exist_ok=True)
            self.file.write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")

    def show(self, *, update_docs: bool) -> None:
        """Print the tables, and write them to a file, and into the documentation if that is wanted."""
        if not self.results:
            raise SystemExit(f"no results in {self.out}; run without --report first.")
        print("\n" + as_text(self.results))
        fragment = as_markdown(self.results)
        (self.out / "table.md").write_text(fragment + "\n", encoding="utf-8")
        if update_docs:
            page = ROOT / "docs" / "benchmarks.md"
            page.write_text(between_markers(page.read_text(encoding="utf-8"), fragment), encoding="utf-8")
        print(f"\n{self.file}\n{self.out / 'table.md'}")

    def _case(self, name: str, folder: Path, pythons: dict[str, Path]) -> None:
        case = by_name().get(name)
        if name == OVERHEAD:
            self._add("figures", self._lightning(folder), "what")
        elif case is None:
            self._add("figures", self._start(), "what")
        elif isinstance(case, RolloutCase):
            self._add("comparisons", [self._rollout(case, folder)], "case")
        elif name.startswith("scaling:"):
            self._add("scaling", [self._alone(case, folder)], "case")
        else:
            self._against(case, folder, pythons)

    def _add(self, kind: str, rows: list[dict[str, Any]], key: str) -> None:
        self.results[kind] = merged(self.results.get(kind, []), rows, key)
        if key == "case":
            order = {name: number for number, name in enumerate(all_names())}
            # A case that is no longer there goes to the end.
            self.results[kind].sort(key=lambda row: order.get(row["case"], len(order)))
        for row in rows:
            print("  " + json.dumps({name: value for name, value in row.items() if name != "facts"}), flush=True)

    def _worker(self, python: Path, module: str, told: dict[str, Any], folder: Path, name: str) -> Worker:
        return Worker(python, module, told, threads=self.threads, log=folder / f"{name}.log")

    def _specs(self, case: Case, folder: Path, units: list[float]) -> tuple[dict[str, Any], dict[str, Any]]:
        shared = {"stage": case.stage, "folder": str(folder), "batch_size": case.batch_size, "data": case.data}
        rows = int(units[0]) if case.stage == "rm" else case.batch_size
        ours = {**shared, "log_every": LOG_EVERY[case.stage], **case.ours}
        return ours, {**shared, "log_every": PEER_LOG_EVERY, "rows_a_step": rows, **case.peer}

    def _against(self, case: Case, folder: Path, pythons: dict[str, Path]) -> None:
        from scripts.benchmark.world import write_case

        units = write_case(case, folder, pairs=self.pairs)
        specs = self._specs(case, folder, units)
        workers: list[Worker] = []
        try:
            workers.append(self._worker(self.own, specs[0]["worker"], specs[0], folder, "ours"))
            workers.append(
                self._worker(pythons.get(case.environment, self.own), specs[1]["worker"], specs[1], folder, "peer")
            )
            result = race(workers[0], workers[1], units, warmup=case.warmup, steps=case.steps, measure=self.measure_by)
        finally:
            for worker in workers:
                worker.stop()
        row = self._row(case.name, case.unit, case.goal, result)
        row["same_work"] = same_work(result)
        self._add("comparisons", [row], "case")
        if case.stage == "sft":
            self._add("limits", [self._limit(case, folder, result)], "case")

    def _rollout(self, case: RolloutCase, folder: Path) -> dict[str, Any]:
        workers: list[Worker] = []
        turns: list[list[Turn]] = [[], []]
        try:
            for side in ("ours", "generate"):
                told = {**case._asdict(), "side": side}
                workers.append(self._worker(self.own, "rollout", told, folder, side))
                workers[-1].go(1)
            for _ in range(self.pairs):
                for worker, seen in zip(workers, turns, strict=True):
                    used = worker.go(1)
                    seen.append(turn_of(used, used["facts"]["tokens"]))
        finally:
            for worker in workers:
                worker.stop()
        return self._row(case.name, "tokens", case.goal, compare(turns[0], turns[1], self.measure_by))

    def _limit(self, case: Case, folder: Path, result: Result) -> dict[str, Any]:
        """Our seconds for the useful tokens of a turn, against those of the matrix products alone."""
        steps = json.loads((folder / "peer.json").read_text(encoding="utf-8"))
        rows = [row for step in steps for row in step]
        tokens = sum(len(row["input_ids"]) for row in rows)
        predicted = sum(sum(row["completion_mask"]) for row in rows)
        told = {"size": case.size, "tokens": tokens, "predicted": predicted}
        worker = self._worker(self.own, "limit", told, folder, "limit")
        try:
            facts = worker.go(1)["facts"]
        finally:
            worker.stop()
        seconds = tokens / result.ours.median
        ideal = facts["ideal_seconds"]
        return {"case": case.name, **facts, "seconds": seconds, "share": ideal / seconds}

    def _alone(self, case: Case, folder: Path) -> dict[str, Any]:
        from scripts.benchmark.world import write_case

        units = write_case(case, folder, pairs=self.pairs)
        worker = self._worker(self.own, "ours", self._specs(case, folder, units)[0], folder, "ours")
        try:
            worker.go(case.warmup)
            rates = []
            for start in range(case.warmup, len(units) - case.steps + 1, case.steps):
                used = worker.go(case.steps)
                rates.append(turn_of(used, sum(units[start : start + case.steps])).rate(self.measure_by))
        finally:
            worker.stop()
        return {"case": case.name, "unit": case.unit, "rate": statistics.median(rates), "peak_mib": used["peak_mib"]}

    def _lightning(self, folder: Path) -> list[dict[str, Any]]:
        """What the Trainer adds to a step, in ms: a micro model under it, and in a plain loop."""
        steps = 200
        workers: list[Worker] = []
        seen: list[list[float]] = [[], []]
        try:
            for side in ("trainer", "loop"):
                told = {"side": side, "folder": str(folder), "steps": steps * (self.pairs + 2), "log_every": 50}
                workers.append(self._worker(self.own, "overhead", told, folder, side))
                workers[-1].go(steps)
            for _ in range(self.pairs):
                for worker, taken in zip(workers, seen, strict=True):
                    used = worker.go(steps)
                    taken.append(1e3 * used[f"{self.measure_by}_seconds"] / steps)
        finally:
            for worker in workers:
                worker.stop()
        added = statistics.median([mine - plain for mine, plain in zip(*seen, strict=True)])
        return [
            {"what": "SFTModule under the Trainer, beyond a plain loop", "value": added, "unit": "ms a step"},
            {"what": "that plain loop (micro model)", "value": statistics.median(seen[1]), "unit": "ms a step"},
        ]

    def _start(self) -> list[dict[str, Any]]:
        """CPU seconds of processes that do next to nothing."""
        commands = {
            "`python -c 'import lit_instruct'`": ["-c", "import lit_instruct"],
            "`lit-instruct --help`": ["-c", "from lit_instruct.cli import main; main(['--help'])"],
            "`python -c pass`, for comparison": ["-c", "pass"],
        }
        rows = []
        for what, arguments in commands.items():
            seconds = [cpu_seconds([str(self.own), *arguments]) for _ in range(self.pairs + 1)][1:]
            rows.append({"what": what, "value": statistics.median(seconds), "unit": "CPU s"})
        return rows

    def _row(self, name: str, unit: str, goal: tuple[float, float] | None, result: Result) -> dict[str, Any]:
        facts = {"ours": result.ours_facts, "theirs": result.theirs_facts}
        numbers = result._asdict() | {"facts": facts}
        del numbers["ours_facts"], numbers["theirs_facts"]
        return {"case": name, "unit": unit, "goal": goal, "pairs": self.pairs, "date": today(), **numbers}

    def _machine(self, pythons: dict[str, Path]) -> dict[str, Any]:
        known = self.results.get("machine", {}).get("peers", {})
        return {
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": self.threads,
            "measure": self.measure_by,
            "date": today(),
            "ours": {name: release for name, release in versions(self.own).items() if name not in PEERS_ONLY},
            "peers": known | {name: versions(python) for name, python in pythons.items()},
        }


def same_work(result: Result) -> str:
    """Whether both sides did the same, as far as their own reports tell.

    Losses of the same optimizer steps must agree to 0.5 %; mean lengths of sampled responses to 15 %.
    """
    ours, theirs = result.ours_facts, result.theirs_facts
    if "mean_response" in ours and "mean_response" in theirs:
        mine, other = ours["mean_response"], theirs["mean_response"]
        said = f"mean response {mine:.1f} and {other:.1f} tokens"
        return said if abs(mine - other) <= 0.15 * other else f"NOT THE SAME: {said}"
    mine, others = (by_step(facts.get("losses", {})) for facts in (ours, theirs))
    for last in sorted(mine.keys() & others.keys(), reverse=True):
        for before in sorted({0} | {step for step in mine.keys() & others.keys() if step < last}, reverse=True):
            pair = mean_over(mine, before + 1, last), mean_over(others, before + 1, last)
            if pair[0] is not None and pair[1] is not None:
                said = f"loss {pair[0]:.4f} and {pair[1]:.4f} over steps {before + 1} to {last}"
                return said if abs(pair[0] - pair[1]) <= 0.005 * pair[1] else f"NOT THE SAME: {said}"
    return "not compared"


def by_step(losses: dict[str, float]) -> dict[int, float]:
    """Logged means by the step that they end with; as JSON, steps are texts."""
    return {int(step): loss for step, loss in losses.items()}


def mean_over(losses: dict[int, float], first: int, last: int) -> float | None:
    """The mean loss of some steps.

    Args:
        losses: means since the log before, by the step that they end with.
        first: step of the window.
        last: step of the window, included.

    Returns:
        None where the logs do not begin and end with the window.
    """
    if last not in losses or (first > 1 and first - 1 not in losses):
        return None
    total, before = 0.0, first - 1
    for step in sorted(step for step in losses if first <= step <= last):
        total += (step - before) * losses[step]
        before = step
    return total / (last - first + 1)


def turn_of(used: dict[str, Any], units: float) -> Turn:
    """A worker's report as a turn."""
    return Turn(units, used["cpu_seconds"], used["wall_seconds"], used["peak_mib"], used["facts"])


def cpu_seconds(command: list[str]) -> float:
    """CPU seconds of a process, its output thrown away."""
    process = subprocess.Popen(command, cwd=ROOT, env=environment(1), stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with exit status {process.returncode}")
    return usage.ru_utime + usage.ru_stime


def processor() -> str:
    """Name of the processor as the system gives it."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def today() -> str:
    return datetime.date.today().isoformat()


if __name__ == "__main__":
    main()
