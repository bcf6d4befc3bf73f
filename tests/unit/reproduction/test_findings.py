"""The rules that decide what came out: right on numbers made for it, and wrong when these are turned round."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from lit_instruct.toyworld.tasks import Task
from lit_instruct.toyworld.world import ToyWorld
from scripts.reproduce_paper import work
from scripts.reproduce_paper.findings import FINDINGS, Found
from scripts.reproduce_paper.jobs import Job, with_needs
from scripts.reproduce_paper.page import write_page
from scripts.reproduce_paper.parts import PARTS
from scripts.reproduce_paper.plan import FAST, MIDDLE, SIZES, Scale, World
from scripts.reproduce_paper.results import core_seconds, own_jobs, print_findings, summarise
from scripts.reproduce_paper.tax_tasks import TASKS
from tests.helpers.numbers import assert_close

SCALE = replace(FAST, seeds=(1, 2), ptx_coefs=(3.0,), kl_coefs=(3.2,), long_kl_coefs=(0.0, 0.2))

QUALITY = {"base": 0.2, "prompted": 0.3, "sft": 0.5, "ppo": 0.7, "ppo_ptx": 0.72}
LOSS = {"base": 0.80, "sft": 0.90, "ppo": 0.95, "ppo_ptx": 0.85, "ptx3": 0.81, "kl3.2": 0.91}
ACCURACY = {"base": 0.8, "sft": 0.75, "ppo": 0.7, "ppo_ptx": 0.78, "ptx3": 0.79, "kl3.2": 0.74}


@cache
def toy_world(seed: int) -> ToyWorld:
    """A world."""
    return ToyWorld(seed)


@cache
def heldout_tasks(world: ToyWorld) -> list[Task]:
    """A few prompts."""
    return list(islice(world.tasks("heldout"), 100))


class Fake:
    """What the jobs of a small run would have left behind; each part of it can be replaced.

    Args:
        root: folder of all jobs.
        scale: of the run.
    """

    def __init__(self, root: Path, scale: Scale = SCALE) -> None:
        self.root = root
        self.worlds = [World(seed, scale) for seed in scale.seeds]
        for world in self.worlds:
            world.__dict__["world"] = toy_world(world.seed)  # made once: its texts are read again and again
        self.quality = {**QUALITY, "ptx3": 0.7, "kl3.2": 0.52, "sft_without": 0.4, "ppo_ptx_without": 0.6}
        self.loss = dict(LOSS)
        self.accuracy = dict(ACCURACY)
        self.reward = dict.fromkeys(("rm", "grouped", "completions_k9"), (0.72, 0.55))
        self.gold_course = [0.05, 0.12, 0.15, 0.1, 0.02]
        self.rude = {"base": 0.3, "sft": 0.2, "ppo": 0.02, "ppo_ptx": 0.02}

    def write(self, part: str) -> Found:
        """Write all jobs of a part and read what they found."""
        for world in self.worlds:
            for job in with_needs(PARTS[part](world)):
                folder = self.root / job.name
                folder.mkdir(parents=True, exist_ok=True)
                result = self.result(world, job)
                done = {"key": job.key, "seconds": 60.0, "result": result}
                (folder / "done.json").write_text(json.dumps(done), encoding="utf-8")
                if job.work is work.measure:
                    self.write_samples(world, job)
        return FINDINGS[part](self.root, self.worlds)

    def result(self, world: World, job: Job) -> dict[str, Any]:
        """What a job returned."""
        name, size = job.name.split("/")[-1], job.name.split("/")[1]
        if job.work is work.rank:
            return {"agreement": 0.73, "noise": 0.1, "rankings": 100}
        if job.work is work.choose_prefix:
            return {"prefix": "hello", "scores": [1.0]}
        if job.work is work.measure:
            few = self.accuracy.get(name, 0.7)
            tasks = {t: {"accuracy": {"zero": {"mean": 0.4}, "few": {"mean": few}}} for t in TASKS}
            shift = 0.001 * world.seed
            return {"kl": 1.0, "pretraining_loss": self.loss.get(name, 0.9) + shift, "protocols": tasks}
        if job.work is work.fold_labelers:
            run = {
                "own": {"labelers": {"a": [73, 50, 100], "b": [72, 50, 100]}},
                "heldout": {"labelers": {"a": [72, 50, 100], "b": [71, 50, 100]}},
            }
            return {"own": {"accuracy": 0.725}, "heldout": {"accuracy": 0.715}, "runs": [run]}
        if job.work is work.measure_course:
            return {
                "steps": [40, 80, 120, 160, 200],
                "kl": [0.5, 1.0, 2.0, 4.0, 8.0],
                "gold": [{"mean": 0.5 + gain} for gain in self.gold_course],
                "proxy": [{"mean": float(n)} for n in range(1, 6)],
            }
        if job.work is work.best_of_n:
            gold = [0.5, 0.56, 0.61, 0.64]
            return {
                "gold": [
                    {"n": n, "kl": kl, "score": s}
                    for n, kl, s in zip((1, 2, 4, 8), (0, 0.2, 0.64, 1.2), gold, strict=True)
                ],
                "proxy": [{"score": float(n)} for n in range(4)],
            }
        if job.work is work.rudeness:
            return {m: {c: {"mean": r} for c in ("plain", "respectful", "insulted")} for m, r in self.rude.items()}
        accuracy, log_loss = self.reward_of(name, size)
        return {"metrics": {"rm/val/acc": accuracy, "rm/val/log_loss": log_loss}, "parameters": 10 ** len(size)}

    def reward_of(self, name: str, size: str) -> tuple[float, float]:
        """Accuracy and log loss of a reward model."""
        known = {
            "rm_pairs": (0.70, 0.58),
            "rm_pairs_2epochs": (0.68, 0.70),
            "rm_grouped": (0.72, 0.55),
            "rm_grouped_2epochs": (0.72, 0.57),
            "rm_completions_k2": (0.66, 0.62),
            "rm_completions_k9": (0.70, 0.57),
        }
        return known.get(name, (0.60 if size == SIZES[0].name else 0.70, 0.56))

    def write_samples(self, world: World, job: Job) -> None:
        """Responses whose gold scores are the model's quality and some noise."""
        name = str(job.arguments["name"])
        rng = random.Random(f"{job.name}")
        tasks = heldout_tasks(world.world)
        # Larger models are a little better.
        quality = self.quality.get(name, 0.5) + (0.06 if job.name.split("/")[1] == MIDDLE.name else 0.0)
        good, bad = "sure .", "the the the ."
        rows = [
            {
                "prompt": task.prompt,
                "response": good if rng.random() < quality else bad,
                "owner": task.owner,
                "score": quality + rng.gauss(0, 0.1),
            }
            for task in tasks
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (self.root / job.name / "samples.jsonl").write_text(text, encoding="utf-8")


def verdicts(found: Found) -> dict[str, bool]:
    return {finding.claim: finding.reproduced for finding in found.findings}


def verdict(found: Found, claim: str) -> bool:
    """Of the one finding whose claim begins so."""
    (value,) = (reproduced for said, reproduced in verdicts(found).items() if said.startswith(claim))
    return value


def swap(first: str, second: str) -> Callable[[Fake], None]:
    """Two models' qualities change places."""

    def turn(fake: Fake) -> None:
        fake.quality[first], fake.quality[second] = fake.quality[second], fake.quality[first]

    return turn


@pytest.mark.parametrize(
    ("claim", "turn"),
    [
        ("A small aligned model", swap("ppo_ptx", "base")),
        ("SFT is preferred to the base", swap("sft", "base")),
        ("Examples in the prompt", swap("prompted", "base")),
        ("SFT is preferred to the prompted", swap("sft", "prompted")),
        ("PPO is preferred to SFT", swap("ppo", "sft")),
        ("PPO-ptx is preferred to SFT", swap("ppo_ptx", "sft")),
        ("Pretraining gradients cost no preference", swap("ppo_ptx", "sft")),
        ("PPO-ptx is preferred to the base", swap("ppo_ptx", "base")),
    ],
)
def test_figure_1_is_read_off_the_responses(claim: str, turn: Callable[[Fake], None], tmp_path: Path) -> None:
    assert verdict(Fake(tmp_path / "as told").write("figure1"), claim)
    turned = Fake(tmp_path / "turned")
    turn(turned)
    assert not verdict(turned.write("figure1"), claim)


def test_a_finding_at_every_size_fails_with_one_size(tmp_path: Path) -> None:
    fake = Fake(tmp_path)
    fake.write("figure1")
    # At the smallest size PPO-ptx and SFT change places.
    for world in fake.worlds:
        ours, theirs = (tmp_path / world.figure1(m, SIZES[0]).name / "samples.jsonl" for m in ("ppo_ptx", "sft"))
        first, second = ours.read_text(encoding="utf-8"), theirs.read_text(encoding="utf-8")
        ours.write_text(second, encoding="utf-8")
        theirs.write_text(first, encoding="utf-8")
    found = FINDINGS["figure1"](tmp_path, fake.worlds)
    assert not verdict(found, "PPO-ptx is preferred to SFT")
    assert not verdict(found, "PPO is preferred to SFT")  # SFT has PPO-ptx's responses, which are better
    assert verdict(found, "SFT is preferred to the base")


def test_the_rise_is_shared_out_between_base_and_ppo(tmp_path: Path) -> None:
    found = Fake(tmp_path).write("alignment_tax")
    row = found.results["sizes"][MIDDLE.name]
    assert_close(row["rise_removed"]["mean"], (0.95 - 0.85) / (0.95 - 0.80), scale=10)  # stored with four digits
    assert_close(found.results["ptx_coef"]["3"]["rise_removed"]["mean"], 0.14 / 0.15, scale=10)
    assert_close(found.results["kl_coef"]["3.2"]["rise_removed"]["mean"], 0.04 / 0.15, scale=10)
    assert found.results["ptx_coef"]["0"] == found.results["kl_coef"]["0.2"] == found.results["models"]["ppo"]
    assert all(verdicts(found).values())


@pytest.mark.parametrize(
    ("claim", "losses", "accuracies"),
    [
        ("Alignment raises", {"base": 0.96}, {}),
        ("Pretraining gradients take away", {"ppo_ptx": 0.89}, {}),
        ("A stronger KL penalty", {"kl3.2": 0.82}, {}),
        ("More pretraining gradients", {"ptx3": 0.9}, {}),
        ("On few-shot tasks", {}, {"ppo": 0.82}),
        ("On few-shot tasks", {}, {"ppo_ptx": 0.6}),
    ],
)
def test_the_tax_is_read_off_losses_and_tasks(
    claim: str, losses: dict[str, float], accuracies: dict[str, float], tmp_path: Path
) -> None:
    fake = Fake(tmp_path)
    fake.loss |= losses
    fake.accuracy |= accuracies
    assert not verdict(fake.write("alignment_tax"), claim)


def test_a_penalty_that_costs_no_preference_is_told(tmp_path: Path) -> None:
    fake = Fake(tmp_path)
    fake.quality["kl3.2"] = 0.75
    assert not verdict(fake.write("alignment_tax"), "A stronger KL penalty")


def test_reward_models(tmp_path: Path) -> None:
    found = Fake(tmp_path).write("reward_model")
    assert all(verdicts(found).values())
    assert_close(found.results["own_minus_heldout"]["mean"], 0.01)
    assert found.results["grid"]["pairs_k2"] == found.results["grid"]["completions_k2"]


@pytest.mark.parametrize(
    ("claim", "name", "value"),
    [
        ("Larger reward models", "rm", (0.5, 0.7)),
        ("For the same number", "rm_completions_k9", (0.6, 0.7)),
        ("Pairs shuffled", "rm_grouped", (0.7, 0.6)),
        ("A second epoch", "rm_grouped_2epochs", (0.7, 0.5)),
    ],
)
def test_reward_models_turned_round(
    claim: str, name: str, value: tuple[float, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Fake.reward_of

    def turned(self: Fake, job: str, size: str) -> tuple[float, float]:
        hit = job == name and (name != "rm" or size == MIDDLE.name)
        return value if hit else before(self, job, size)

    monkeypatch.setattr(Fake, "reward_of", turned)
    assert not verdict(Fake(tmp_path).write("reward_model"), claim)


def test_over_optimisation_is_a_gold_score_that_turns(tmp_path: Path) -> None:
    found = Fake(tmp_path / "turns").write("over_optimisation")
    assert verdict(found, "Without a KL penalty")
    assert verdict(found, "Best of n follows")
    rises = Fake(tmp_path / "rises")
    rises.gold_course = [0.05, 0.1, 0.12, 0.14, 0.15]
    found = rises.write("over_optimisation")
    assert not verdict(found, "Without a KL penalty")
    jumps = Fake(tmp_path / "jumps")
    jumps.gold_course = [0.1, -0.1, 0.1, -0.1, 0.1]
    assert not verdict(jumps.write("over_optimisation"), "Gold score against root KL")


def test_generalisation(tmp_path: Path) -> None:
    found = Fake(tmp_path / "as told").write("generalisation")
    assert verdict(found, "The preference holds")
    assert verdict(found, "Alignment carries over")
    assert verdict(found, "To a respectful user")
    assert not verdict(found, "Led on to be toxic")
    turned = Fake(tmp_path / "turned")
    turned.quality["ppo_ptx"], turned.quality["ppo_ptx_without"] = 0.3, 0.3
    turned.rude = {"base": 0.1, "sft": 0.1, "ppo": 0.2, "ppo_ptx": 0.3}
    found = turned.write("generalisation")
    assert not verdict(found, "The preference holds")
    assert not verdict(found, "Alignment carries over")
    assert not verdict(found, "To a respectful user")
    assert verdict(found, "Led on to be toxic")


def test_the_page_has_every_finding_and_says_no(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake = Fake(tmp_path / "runs")
    fake.quality["prompted"] = 0.1
    out = tmp_path / "results"
    out.mkdir()
    claims = []
    for part in PARTS:
        claims += [finding.claim for finding in fake.write(part).findings]
        found = summarise(part, fake.worlds, fake.root)
        assert found["core_seconds"] == {str(w.seed): 60 * len(own_jobs(part, w)) for w in fake.worlds}
        (out / f"{part}.json").write_text(json.dumps(found), encoding="utf-8")
        print_findings(found)
    said = capsys.readouterr().out
    assert said.count("reproduced: ") == len(claims)
    assert "reproduced: NO" in said
    write_page(out, tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    for claim in claims:
        assert f"| {claim} |" in page
    assert page.count("**NO**") == said.count("reproduced: NO")
    for picture in ("figure1", "alignment_tax", "over_optimisation"):
        assert f"(results/{picture}.svg)" in page
        assert (out / f"{picture}.svg").read_text(encoding="utf-8").startswith("<?xml")
    # Drawn again from the same numbers it is the same page and the same pictures.
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    write_page(out, tmp_path / "again.md")
    assert (tmp_path / "again.md").read_text(encoding="utf-8") == page
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_job_is_counted_in_the_first_part_that_does_it(tmp_path: Path) -> None:
    world = World(1, SCALE)
    counted = [name for part in PARTS for name in own_jobs(part, world)]
    assert len(counted) == len(set(counted)) == len(with_needs([j for part in PARTS.values() for j in part(world)]))
    assert core_seconds("figure1", world, tmp_path) == 0  # nothing is done
