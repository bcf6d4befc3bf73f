"""What each part found: numbers, and for each finding of the paper whether it came out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lit_instruct.evaluation.bootstrap import owner_interval
from scripts.reproduce_paper import gao, parts
from scripts.reproduce_paper.jobs import Job
from scripts.reproduce_paper.plan import KL_COEF, LEFT_OUT_KIND, MIDDLE, MODELS, PTX_COEF, World
from scripts.reproduce_paper.pooled import CLOSED_KINDS, mean_of, over_seeds, preferred, read, shown, told
from scripts.reproduce_paper.tax_tasks import TASKS

OPEN_KINDS = frozenset({"open_question", "generation"})


class Finding(NamedTuple):
    """A finding of the paper and ours.

    Attributes:
        claim: what is claimed.
        paper: what the paper says, with numbers where it prints some.
        ours: what came out here, with intervals.
        reproduced: whether the claim holds here.
    """

    claim: str
    paper: str
    ours: str
    reproduced: bool


class Found(NamedTuple):
    """The results of a part.

    Attributes:
        results: numbers.
        findings: what they say.
    """

    results: dict[str, Any]
    findings: list[Finding]


def figure1(root: Path, worlds: Sequence[World]) -> Found:
    """Who is preferred to whom, by size."""
    sizes = worlds[0].scale.sizes
    readings = {
        (model, size.name): [read(root, world.world, world.figure1(model, size)) for world in worlds]
        for size in sizes
        for model in MODELS
    }
    largest, smallest = sizes[-1].name, sizes[0].name
    anchor = readings["sft", largest]
    rows: dict[str, Any] = {}
    for size in sizes:
        name = size.name
        measured = {m: [world.figure1(m, size).result(root) for world in worlds] for m in MODELS}
        rows[name] = {
            "parameters": worlds[0].base(size).result(root)["parameters"],
            "models": {
                model: {
                    "preferred_to_largest_sft": preferred(readings[model, name], anchor),
                    "gold": mean_of(readings[model, name], lambda a: a.total),
                    "truthful": mean_of(readings[model, name], lambda a: a.truthfulness == 1, OPEN_KINDS),
                    "truthful_and_informative": mean_of(readings[model, name], lambda a: a.faultless, OPEN_KINDS),
                    "hallucinates": mean_of(readings[model, name], lambda a: a.truthfulness < 1, CLOSED_KINDS),
                    "rude": mean_of(readings[model, name], lambda a: a.rude),
                    "words": round(float(np.mean([a.length for r in readings[model, name] for a in r.assessed])), 1),
                    "kl": over_seeds([each["kl"] for each in measured[model]]),
                    **(
                        {"pretraining_loss": over_seeds([each["pretraining_loss"] for each in measured[model]])}
                        if model != "prompted"
                        else {}
                    ),
                }
                for model in MODELS
            },
            "preferred": {
                f"{ours} to {theirs}": preferred(readings[ours, name], readings[theirs, name])
                for ours, theirs in (
                    ("prompted", "base"),
                    ("sft", "base"),
                    ("sft", "prompted"),
                    ("ppo", "sft"),
                    ("ppo_ptx", "sft"),
                    ("ppo_ptx", "ppo"),
                    ("ppo_ptx", "base"),
                )
            },
        }
    headline = preferred(readings["ppo_ptx", smallest], readings["base", largest])
    headline_prompted = preferred(readings["ppo_ptx", smallest], readings["prompted", largest])
    ratio = rows[largest]["parameters"] / rows[smallest]["parameters"]

    def at_every_size(pair: str) -> tuple[str, bool]:
        found = {name: row["preferred"][pair] for name, row in rows.items()}
        return (
            "; ".join(f"{name} {shown(each)}" for name, each in found.items()),
            all(each["low"] > 0.5 for each in found.values()),
        )

    def finding(claim: str, paper: str, pair: str) -> Finding:
        return Finding(claim, paper, *at_every_size(pair))

    biggest = rows[largest]["models"]
    grows = {m: [rows[s.name]["models"][m]["preferred_to_largest_sft"]["mean"] for s in sizes] for m in MODELS}
    close = {name: row["preferred"]["ppo_ptx to ppo"] for name, row in rows.items()}
    findings = [
        Finding(
            f"A small aligned model is preferred to a base model {ratio:.0f} times larger",
            "1.3B PPO-ptx is preferred to 175B GPT-3 (Figure 1: 0.53 against 0.24, both against 175B SFT)",
            f"{smallest} PPO-ptx over {largest} base: {shown(headline)}; over {largest} base prompted: "
            f"{shown(headline_prompted)}",
            headline["low"] > 0.5,
        ),
        finding("SFT is preferred to the base model at every size", "at every size (Figure 1)", "sft to base"),
        finding("Examples in the prompt help the base model at every size", "at every size", "prompted to base"),
        finding("SFT is preferred to the prompted base model at every size", "at every size", "sft to prompted"),
        finding("PPO is preferred to SFT at every size", "at every size (Figure 1)", "ppo to sft"),
        finding(
            "PPO-ptx is preferred to SFT at every size",
            "at every size; 73.4 +- 2 % at 175B (Figure 1)",
            "ppo_ptx to sft",
        ),
        Finding(
            "Pretraining gradients cost no preference against PPO",
            "no large difference between PPO and PPO-ptx (4.1)",
            "; ".join(f"{name} {shown(each)}" for name, each in close.items()),
            all(each["high"] >= 0.5 for each in close.values()),
        ),
        finding(
            "PPO-ptx is preferred to the base model of its size",
            "85 +- 3 % at 175B, 71 +- 4 % over the prompted one",
            "ppo_ptx to base",
        ),
        Finding(
            "Larger models are preferred, aligned ones too",
            "win rates rise with size (Figure 1)",
            "; ".join(f"{m}: {', '.join(f'{rate:.1%}' for rate in rates)}" for m, rates in grows.items()),
            all(rates[-1] > rates[0] for rates in grows.values()),
        ),
        Finding(
            "PPO-ptx is truthful and informative more often than the base model",
            "about twice as often on TruthfulQA (4.2)",
            f"{largest}: base {shown(biggest['base']['truthful_and_informative'])}, SFT "
            f"{shown(biggest['sft']['truthful_and_informative'])}, PPO-ptx "
            f"{shown(biggest['ppo_ptx']['truthful_and_informative'])}",
            biggest["ppo_ptx"]["truthful_and_informative"]["low"] > biggest["base"]["truthful_and_informative"]["high"],
        ),
        Finding(
            "PPO-ptx makes up less than the base model where the input holds the answer",
            "21 % against 41 % hallucinations in closed domains (4.1)",
            f"{largest}: base {shown(biggest['base']['hallucinates'])}, SFT {shown(biggest['sft']['hallucinates'])}, "
            f"PPO-ptx {shown(biggest['ppo_ptx']['hallucinates'])}",
            biggest["ppo_ptx"]["hallucinates"]["high"] < biggest["base"]["hallucinates"]["low"],
        ),
    ]
    results = {
        "anchor": f"{largest} sft",
        "sizes": rows,
        "smallest_ppo_ptx_to_largest_base": headline,
        "smallest_ppo_ptx_to_largest_prompted": headline_prompted,
        "prefixes": {s.name: [w.prefix(s).result(root)["prefix"] for w in worlds] for s in sizes},
        "agreement": over_seeds([world.rankings.result(root)["agreement"] for world in worlds]),
    }
    return Found(results, findings)


def reward_model(root: Path, worlds: Sequence[World]) -> Found:
    """What makes a reward model good."""

    def held_out(jobs_of: Callable[[World], Mapping[str, Job]]) -> dict[str, Any]:
        per_world = [jobs_of(world) for world in worlds]
        return {
            name: {
                metric: over_seeds([jobs[name].result(root)["metrics"][f"rm/val/{metric}"] for jobs in per_world])
                for metric in ("acc", "log_loss")
            }
            | {"seconds": over_seeds([jobs[name].seconds(root) for jobs in per_world])}
            for name in per_world[0]
        }

    sizes, grid, forms = map(held_out, (parts.reward_sizes, parts.reward_grid, parts.reward_forms))
    grid["pairs_k2"] = grid["completions_k2"]
    folds = [world.folds.result(root) for world in worlds]
    own, others = (over_seeds([fold[kind]["accuracy"] for fold in folds]) for kind in ("own", "heldout"))
    labelers: dict[str, dict[str, tuple[float, float]]] = {"own": {}, "heldout": {}}
    for world, fold in zip(worlds, folds, strict=True):
        for run in fold["runs"]:
            for kind, found in labelers.items():
                for labeler, (correct, _, pairs) in run[kind]["labelers"].items():
                    key = f"{world.seed}/{labeler}"
                    before = found.get(key, (0.0, 0.0))
                    found[key] = (before[0] + correct, before[1] + pairs)
    gap = labeler_gap(labelers["own"], labelers["heldout"])
    names = list(sizes)

    def losses(name: str) -> str:
        return shown(forms[name]["log_loss"], ".4f")

    def better(first: str, second: str) -> list[bool]:
        pairs = zip(forms[first]["log_loss"]["seeds"], forms[second]["log_loss"]["seeds"], strict=True)
        return [one < other for one, other in pairs]

    findings = [
        Finding(
            "Larger reward models are more accurate",
            "not in the paper; Stiennon et al. 2020: +1.8 points a doubling",
            "; ".join(f"{name} {shown(row['acc'])}" for name, row in sizes.items()),
            sizes[names[-1]]["acc"]["mean"] > sizes[names[0]]["acc"]["mean"],
        ),
        Finding(
            "For the same number of responses, rankings of more responses teach more",
            "K = 4 to 9 instead of pairs, for speed of labelling (3.5); no numbers",
            "; ".join(f"K={k}: {shown(grid[f'completions_k{k}']['acc'])}" for k in parts.GRID_SIZES),
            grid["completions_k9"]["acc"]["mean"] > grid["completions_k2"]["acc"]["mean"],
        ),
        Finding(
            "Pairs shuffled into the data set overfit within an epoch, whole rankings do not",
            "a single pass over shuffled pairs overfits (3.5); no numbers",
            f"log loss after one epoch: rankings {losses('grouped_1')}, shuffled pairs {losses('pairs_1')} "
            "[range of seeds]",
            all(better("grouped_1", "pairs_1")),
        ),
        Finding(
            "A second epoch makes a reward model worse",
            "one epoch, since reward models overfit easily (C.2)",
            f"log loss: rankings {losses('grouped_1')}, two epochs {losses('grouped_2')}; shuffled pairs "
            f"{losses('pairs_1')}, two epochs {losses('pairs_2')} [range of seeds]",
            all(better("grouped_1", "grouped_2")) and all(better("pairs_1", "pairs_2")),
        ),
        Finding(
            "Reward models predict labelers that they were not trained on nearly as well",
            "69.6 +- 0.9 % held-out, 72.4 +- 0.4 % own labelers (4.1)",
            f"held-out {shown(others)}, own {shown(own)} [range of seeds]; difference {gap['mean']:+.1%} "
            f"[{gap['low']:+.1%}, {gap['high']:+.1%}]",
            gap["high"] < 0.05,
        ),
    ]
    results = {"sizes": sizes, "grid": grid, "forms": forms, "own": own, "heldout": others, "own_minus_heldout": gap}
    return Found(results, findings)


def labeler_gap(
    own: Mapping[str, tuple[float, float]], others: Mapping[str, tuple[float, float]], *, resamples: int = 2000
) -> dict[str, float]:
    """Accuracy on own minus accuracy on held-out labelers, with an interval from a bootstrap over labelers.

    Args:
        own: labeler to correct pairs and pairs, where the labeler was trained on.
        others: the same where not.
        resamples: how often labelers are drawn.

    Returns:
        Mean and interval.
    """
    names = sorted(own.keys() & others.keys())
    counts = np.array([[*own[name], *others[name]] for name in names])
    drawn = np.random.default_rng(0).integers(len(names), size=(resamples, len(names)))

    def gaps(total: np.ndarray) -> np.ndarray:
        return total[..., 0] / total[..., 1] - total[..., 2] / total[..., 3]

    low, high = np.quantile(gaps(counts[drawn].sum(1)), (0.025, 0.975))
    return {"mean": float(gaps(counts.sum(0))), "low": float(low), "high": float(high)}


def alignment_tax(root: Path, worlds: Sequence[World]) -> Found:
    """What alignment costs on plain text, and what repairs it."""
    figure = {model: [world.figure1(model, MIDDLE) for world in worlds] for model in ("base", "sft", "ppo", "ppo_ptx")}

    def loss(jobs: Sequence[Job]) -> list[float]:
        return [job.result(root)["pretraining_loss"] for job in jobs]

    base, ppo = loss(figure["base"]), loss(figure["ppo"])

    def row(jobs: Sequence[Job]) -> dict[str, Any]:
        losses = loss(jobs)
        results = [job.result(root) for job in jobs]
        removed = [(p - x) / (p - b) for b, p, x in zip(base, ppo, losses, strict=True)]
        readings = [read(root, world.world, job) for world, job in zip(worlds, jobs, strict=True)]
        scores = [score for reading in readings for score in reading.scores]
        tasks = {
            shots: {
                task: over_seeds([r["protocols"][task]["accuracy"][shots]["mean"] for r in results]) for task in TASKS
            }
            for shots in ("zero", "few")
        }
        return {
            "pretraining_loss": over_seeds(losses),
            "rise_removed": over_seeds(removed),
            "gold": told(owner_interval(scores, [owner for reading in readings for owner in reading.owners])),
            "preferred_to_sft": preferred(
                readings,
                [read(root, w.world, j) for w, j in zip(worlds, figure["sft"], strict=True)],
            ),
            "kl": over_seeds([r["kl"] for r in results]),
            "tasks": tasks,
            "few_shot_mean": over_seeds(
                [float(np.mean([r["protocols"][task]["accuracy"]["few"]["mean"] for task in TASKS])) for r in results]
            ),
        }

    models = {model: row(jobs) for model, jobs in figure.items()}
    ptx = {f"{coef:g}": row([parts.ptx_sweep(world)[coef] for world in worlds]) for coef in parts.ptx_sweep(worlds[0])}
    kl = {f"{coef:g}": row([parts.kl_sweep(world)[coef] for world in worlds]) for coef in parts.kl_sweep(worlds[0])}
    by_size = {}
    for size in worlds[0].scale.sizes:
        losses = {m: loss([world.figure1(m, size) for world in worlds]) for m in ("base", "sft", "ppo", "ppo_ptx")}
        removed = [(p - x) / (p - b) for b, p, x in zip(losses["base"], losses["ppo"], losses["ppo_ptx"], strict=True)]
        by_size[size.name] = {m: over_seeds(values) for m, values in losses.items()} | {
            "rise_removed": over_seeds(removed)
        }
    best_kl = max(kl.values(), key=lambda each: each["rise_removed"]["mean"])
    strongest = kl[max(kl, key=float)]
    findings = [
        Finding(
            "Alignment raises the loss on pretraining text",
            "PPO loses on public NLP tasks against GPT-3 (4.2, Figure 29)",
            "; ".join(
                f"{name}: base {shown(row['base'], '.3f')}, SFT {shown(row['sft'], '.3f')}, PPO "
                f"{shown(row['ppo'], '.3f')}"
                for name, row in by_size.items()
            )
            + " [range of seeds]",
            all(row["ppo"]["low"] > row["base"]["high"] for row in by_size.values()),
        ),
        Finding(
            "Pretraining gradients take away at least half of that rise",
            "PPO-ptx mitigates the regressions on all of these tasks (4.2)",
            "; ".join(f"{name} {shown(row['rise_removed'], '.0%')}" for name, row in by_size.items())
            + " of the rise from base to PPO [range of seeds]",
            all(row["rise_removed"]["low"] >= 0.5 for row in by_size.values()),
        ),
        Finding(
            "A stronger KL penalty does not",
            "raising the KL coefficient to 100 times its default does not recover the tasks, and lowers the reward "
            "(E.6, Figure 34)",
            f"at best {shown(best_kl['rise_removed'], '.0%')} of the rise [range of seeds]; the strongest penalty is "
            f"preferred to SFT in {shown(strongest['preferred_to_sft'])}, PPO in "
            f"{shown(models['ppo']['preferred_to_sft'])}",
            best_kl["rise_removed"]["high"] < 0.5
            and strongest["preferred_to_sft"]["high"] < models["ppo"]["preferred_to_sft"]["low"],
        ),
        Finding(
            "More pretraining gradients repair more",
            "coefficients of 20 and above recover the tasks, at some cost in reward (E.6, Figure 33)",
            "; ".join(
                f"{coef}: loss {row['pretraining_loss']['mean']:.3f}, gold {row['gold']['mean']:.3f}"
                for coef, row in ptx.items()
            ),
            all(
                earlier["pretraining_loss"]["mean"] > later["pretraining_loss"]["mean"]
                for earlier, later in zip(list(ptx.values()), list(ptx.values())[1:], strict=False)
            ),
        ),
        Finding(
            "On few-shot tasks of plain text PPO loses and PPO-ptx regains",
            "DROP, SQuADv2, translation, few-shot (Table 14)",
            "mean accuracy of four tasks: "
            + ", ".join(f"{m} {shown(row['few_shot_mean'])}" for m, row in models.items())
            + " [range of seeds]",
            models["ppo"]["few_shot_mean"]["mean"] < models["base"]["few_shot_mean"]["mean"]
            and models["ppo_ptx"]["few_shot_mean"]["mean"] > models["ppo"]["few_shot_mean"]["mean"],
        ),
    ]
    results = {"models": models, "ptx_coef": ptx, "kl_coef": kl, "sizes": by_size}
    return Found(results, findings)


def over_optimisation(root: Path, worlds: Sequence[World]) -> Found:
    """Proxy and gold score as policies move away from SFT."""
    runs: dict[str, Any] = {}
    start = [world.best_of_n.result(root) for world in worlds]
    gold_start = [each["gold"][0]["score"] for each in start]
    proxy_start = [each["proxy"][0]["score"] for each in start]
    for coef in parts.courses(worlds[0]):
        found = [parts.courses(world)[coef].result(root) for world in worlds]
        steps = found[0]["steps"]
        courses = {
            "kl": [over_seeds([f["kl"][i] for f in found]) for i in range(len(steps))],
            "gold_gain": [
                over_seeds([f["gold"][i]["mean"] - g for f, g in zip(found, gold_start, strict=True)])
                for i in range(len(steps))
            ],
            "proxy_gain": [
                over_seeds([f["proxy"][i]["mean"] - p for f, p in zip(found, proxy_start, strict=True)])
                for i in range(len(steps))
            ],
        }
        form = gao.fit(
            [p["mean"] for p in courses["kl"]], [p["mean"] for p in courses["gold_gain"]], gao.reinforcement_form
        )
        runs[f"{coef:g}"] = {"steps": steps, **courses, "form": form._asdict()}
    sizes = [each["n"] for each in start[0]["gold"]]
    best: dict[str, Any] = {
        "n": sizes,
        "kl": [each["kl"] for each in start[0]["gold"]],
        "gold_gain": [
            over_seeds([f["gold"][i]["score"] - g for f, g in zip(start, gold_start, strict=True)])
            for i in range(len(sizes))
        ],
        "proxy_gain": [
            over_seeds([f["proxy"][i]["score"] - p for f, p in zip(start, proxy_start, strict=True)])
            for i in range(len(sizes))
        ],
    }
    form = gao.fit(best["kl"][1:], [each["mean"] for each in best["gold_gain"]][1:], gao.best_of_n_form)
    best["form"] = form._asdict()
    free = runs[min(runs, key=float)]
    gold = [point["mean"] for point in free["gold_gain"]]
    proxy = [point["mean"] for point in free["proxy_gain"]]
    peak = int(np.argmax(gold))
    falls = [
        free["gold_gain"][-1]["seeds"][i] < max(point["seeds"][i] for point in free["gold_gain"])
        for i in range(len(worlds))
    ]
    findings = [
        Finding(
            "Without a KL penalty the gold score turns while the proxy still rises",
            "Gao et al. 2022; Stiennon et al. 2020, Figure 5",
            f"gold gain {gold[peak]:.3f} at KL {free['kl'][peak]['mean']:.1f}, then {gold[-1]:.3f} at KL "
            f"{free['kl'][-1]['mean']:.1f}; proxy gain {proxy[peak]:.2f}, then {proxy[-1]:.2f}",
            peak < len(gold) - 1 and all(falls) and proxy[-1] > proxy[peak] and gold[peak] - gold[-1] > 0.01,
        ),
        Finding(
            "Gold score against root KL follows d (alpha - beta log d)",
            "Gao et al. 2022, reinforcement learning",
            "; ".join(
                f"KL coefficient {coef}: alpha {run['form']['alpha']:.3f}, beta {run['form']['beta']:.3f}, R2 "
                f"{run['form']['r2']:.2f}"
                for coef, run in runs.items()
            ),
            runs[min(runs, key=float)]["form"]["r2"] > 0.9,
        ),
        Finding(
            "Best of n follows d (alpha - beta d)",
            "Gao et al. 2022, best of n",
            f"alpha {form.alpha:.3f}, beta {form.beta:.3f}, R2 {form.r2:.2f}; n = {sizes[-1]} gains "
            f"{best['gold_gain'][-1]['mean']:.3f} at KL {best['kl'][-1]:.2f}",
            form.r2 > 0.9,
        ),
    ]
    return Found({"runs": runs, "best_of_n": best}, findings)


def generalisation(root: Path, worlds: Sequence[World]) -> Found:
    """Who profits beyond what was trained on."""
    known = {
        model: [read(root, world.world, parts.owners(world)[model]) for world in worlds] for model in ("sft", "ppo_ptx")
    }
    new = {
        model: [read(root, world.world, world.figure1(model, MIDDLE)) for world in worlds]
        for model in ("sft", "ppo_ptx")
    }
    owners = {"known": preferred(known["ppo_ptx"], known["sft"]), "heldout": preferred(new["ppo_ptx"], new["sft"])}
    kinds = {
        model: [read(root, world.world, parts.kinds(world)[model]) for world in worlds]
        for model in parts.kinds(worlds[0])
    }
    gold = {model: mean_of(readings, lambda a: a.total) for model, readings in kinds.items()}
    pairs = (
        ("sft_without", "base"),
        ("ppo_ptx_without", "sft_without"),
        ("ppo_ptx_without", "base"),
        ("ppo_ptx", "sft"),
        ("ppo_ptx", "ppo_ptx_without"),
    )
    left_out = {f"{ours} to {theirs}": preferred(kinds[ours], kinds[theirs]) for ours, theirs in pairs}
    measured = [world.rudeness.result(root) for world in worlds]
    rude = {
        model: {
            condition: over_seeds([each[model][condition]["mean"] for each in measured])
            for condition in ("plain", "respectful", "insulted")
        }
        for model in measured[0]
    }
    findings = [
        Finding(
            "The preference holds on prompts of owners that nobody trained on",
            "all of the paper's prompts are of held-out owners",
            f"PPO-ptx over SFT on held-out owners {shown(owners['heldout'])}, on trained prompts "
            f"{shown(owners['known'])}",
            owners["heldout"]["low"] > 0.5,
        ),
        Finding(
            f"Alignment carries over to a kind of instruction that no stage saw ({LEFT_OUT_KIND})",
            "other languages and code, with few such data (4.3); no numbers",
            f"PPO-ptx over SFT, both without it, {shown(left_out['ppo_ptx_without to sft_without'])}; over base "
            f"{shown(left_out['ppo_ptx_without to base'])}",
            left_out["ppo_ptx_without to sft_without"]["low"] > 0.5,
        ),
        Finding(
            "To a respectful user PPO-ptx is ruder less often than the base model",
            "25 % fewer toxic outputs when asked to be respectful (4.2)",
            f"base {shown(rude['base']['respectful'])}, SFT {shown(rude['sft']['respectful'])}, PPO-ptx "
            f"{shown(rude['ppo_ptx']['respectful'])} [range of seeds]",
            rude["ppo_ptx"]["respectful"]["high"] < rude["base"]["respectful"]["low"],
        ),
        Finding(
            "Led on to be toxic, PPO-ptx is more toxic than the base model",
            "much more, when told to be biased: .400 against .285 (Table 14)",
            f"after an insult: base {shown(rude['base']['insulted'])}, SFT {shown(rude['sft']['insulted'])}, PPO-ptx "
            f"{shown(rude['ppo_ptx']['insulted'])} [range of seeds]",
            rude["ppo_ptx"]["insulted"]["low"] > rude["base"]["insulted"]["high"],
        ),
    ]
    return Found({"owners": owners, "kind": LEFT_OUT_KIND, "gold": gold, "left_out": left_out, "rude": rude}, findings)


FINDINGS: dict[str, Callable[[Path, Sequence[World]], Found]] = {
    "figure1": figure1,
    "reward_model": reward_model,
    "alignment_tax": alignment_tax,
    "over_optimisation": over_optimisation,
    "generalisation": generalisation,
}
"""Part to what reads its jobs."""

SETTINGS = {"kl_coef": KL_COEF, "ptx_coef": PTX_COEF}
