"""Writes docs/reproduction.md, with its pictures, from the results of the parts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from scripts.reproduce_paper.parts import GRID_SIZES, PARTS
from scripts.reproduce_paper.pooled import shown
from scripts.reproduce_paper.tax_tasks import TASKS

TITLES = {"base": "GPT", "prompted": "GPT (prompted)", "sft": "SFT", "ppo": "PPO", "ppo_ptx": "PPO-ptx"}
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")

INTRODUCTION = """\
# The paper's findings, in miniature

Written by `python scripts/reproduce_paper`, from the files in [reproduction/](reproduction/). Everything happens in
the world of the quickstart, where a gold score that no model is trained on judges every response, so that hundreds of
models can be trained and compared on two cores without a download. What cannot be shown there is what people think.

**How to read it.** Each seed is another world: other facts, texts, prompts, labelers and weights. Win rates and
shares are over all prompts of all worlds, on prompts of owners that no model was trained on, ties one half, with 95 %
intervals from a bootstrap over owners. Numbers a model (losses, accuracies of reward models) are means with the
smallest and the largest of the seeds. "Reproduced" is decided by a rule in `scripts/reproduce_paper/findings.py` that
was written before the numbers were there; what did not come out says NO.
"""

DIFFERENCES = """\
## What differs from the paper

- **People.** Labelers are simulated: the gold score seen through noise of their own, as much of it as makes two of
  them agree as often as the paper's (72.6 %). Their tastes differ at random and not in kind, so held-out labelers are
  easier here.
- **Size.** 18 thousand to 2.2 million parameters and a vocabulary of some 150 words instead of 1.3 to 175 billion.
  The language is made of templates. Facts can be known, sentences can be well-formed, rude or beside the point;
  nothing subtler can be seen.
- **Base models** have read answered questions in their texts, as real ones have, so they can do the tasks; they lack
  the manner. GPT gets the instruction as plain text, GPT (prompted) one to four examples before it, of which a reward
  model chose the best prefix. Examples as a chat did not help these models; the form in which their texts ask and
  answer was found by trying on training prompts of seed 1. Nothing stops a base model after its answer.
- **The baseline** is the largest SFT model, three epochs with 10 % pretraining text (the paper's recipe for the start
  of PPO), and not another one trained for 16 epochs.
- **Coefficients.** The KL coefficient is 0.2 a nat of a sequence of a dozen tokens instead of 0.02; pretraining
  gradients weigh 1 instead of 27.8, one chunk of 64 tokens an episode. The learning rates of the quickstart are
  scaled by 128 / width.
- **One reward model** of the middle size serves policies of all sizes, as in the paper. Its rankings are of responses
  that the SFT models of all sizes wrote; the paper's came from earlier policies too.
- **The alignment tax** is the loss on held-out pretraining text, and four small tasks of plain text: complete a fact,
  put a sentence into the past, look up a colour, repeat what was said.
- **Toxicity** is a rude word. Nobody can tell these models to be biased; instead the user opens with an insult.
"""


def write_page(folder: Path, page: Path) -> None:
    """Write the page.

    Args:
        folder: holds PART.json; pictures are written there.
        page: the file.
    """
    found = {part: _read(folder / f"{part}.json") for part in PARTS if (folder / f"{part}.json").exists()}
    if not found:
        return
    lines = [INTRODUCTION, _times(found), "", "## Findings", "", "| finding | the paper | here | reproduced |"]
    lines += ["|---|---|---|---|"]
    for part in found.values():
        for finding in part["findings"]:
            cells = [finding["claim"], finding["paper"], finding["ours"], "yes" if finding["reproduced"] else "**NO**"]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    link = folder.name
    writers = {
        "figure1": _figure1,
        "reward_model": _reward_model,
        "alignment_tax": _alignment_tax,
        "over_optimisation": _over_optimisation,
        "generalisation": _generalisation,
    }
    for name, part in found.items():
        lines += ["", *writers[name](part["results"], folder, link)]
    lines += ["", DIFFERENCES]
    page.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _times(found: dict[str, dict[str, Any]]) -> str:
    """How long everything took, and where."""
    rows = ["| part | jobs | minutes of one core, by seed | commit | date |", "|---|---|---|---|---|"]
    total = 0.0
    for name, part in found.items():
        seconds = part["core_seconds"].values()
        total += sum(seconds)
        minutes = ", ".join(f"{second / 60:.0f}" for second in seconds)
        rows.append(f"| `--parts {name}` | {part['jobs']} | {minutes} | {part['commit']} | {part['date']} |")
    machine = next(iter(found.values()))["machine"]
    last = (
        f"Together {total / 60:.0f} minutes of one core on {machine}; two jobs run side by side, one thread each, so "
        "by the clock half of that on two idle cores. Each part can be stopped and goes on where it stood; `--seeds 1` "
        "runs one seed of it. Minutes are by the clock, with other work on the machine. A plus behind a commit: with "
        "files that had not been committed."
    )
    return "\n".join([*rows, "", last])


def _figure1(results: dict[str, Any], folder: Path, link: str) -> list[str]:
    sizes = results["sizes"]
    figure = _figure()
    axes = figure.add_subplot()
    for color, (model, title) in zip(COLORS, TITLES.items(), strict=False):
        rates = [row["models"][model]["preferred_to_largest_sft"] for row in sizes.values()]
        _line(axes, [row["parameters"] for row in sizes.values()], rates, title, color)
    axes.axhline(0.5, color="#999999", linewidth=0.8)
    axes.set(xscale="log", xlabel="parameters", ylabel=f"preferred to {results['anchor'].upper()}")
    axes.legend(fontsize=8)
    _save(figure, folder / "figure1.svg")
    lines = [
        "## Figure 1: who is preferred, by size",
        "",
        f"![Win rate against the largest SFT model by parameters]({link}/figure1.svg)",
        "",
        "Preferred to the largest SFT model:",
        "",
        "| size | parameters | " + " | ".join(TITLES.values()) + " |",
        "|---|---|" + "---|" * len(TITLES),
    ]
    for name, row in sizes.items():
        cells = [shown(row["models"][model]["preferred_to_largest_sft"]) for model in TITLES]
        lines.append(f"| {name} | {row['parameters']:,} | " + " | ".join(cells) + " |")
    lines += ["", "Side by side at each size:", ""]
    pairs = list(next(iter(sizes.values()))["preferred"])
    lines += ["| size | " + " | ".join(pair.replace("_", "-") for pair in pairs) + " |", "|---|" + "---|" * len(pairs)]
    for name, row in sizes.items():
        lines.append(f"| {name} | " + " | ".join(shown(row["preferred"][pair]) for pair in pairs) + " |")
    lines += [
        "",
        "What the responses are like. Truthful, and truthful with the right answer, politely (informative): to open"
        " questions and requests to tell something; makes up: to instructions whose input holds the answer.",
        "",
        "| size | model | gold score | truthful | and informative | makes up | rude | words | KL to SFT | text loss |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in sizes.items():
        for model, title in TITLES.items():
            each = row["models"][model]
            loss = each.get("pretraining_loss")
            lines.append(
                f"| {name} | {title} | {each['gold']['mean']:.3f} | {each['truthful']['mean']:.1%} | "
                f"{each['truthful_and_informative']['mean']:.1%} | {each['hallucinates']['mean']:.1%} | "
                f"{each['rude']['mean']:.1%} | {each['words']:.1f} | {each['kl']['mean']:.2f} | "
                f"{'' if loss is None else format(loss['mean'], '.3f')} |"
            )
    lines += ["", f"Labelers agree on {shown(results['agreement'])} of pairs that both order strictly."]
    return lines


def _reward_model(results: dict[str, Any], folder: Path, link: str) -> list[str]:
    del folder, link

    def table(heading: str, rows: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
        lines = [f"| {heading} | accuracy | log loss | seconds of one core |", "|---|---|---|---|"]
        for title, row in rows:
            seconds = row["seconds"]["mean"]
            lines.append(f"| {title} | {shown(row['acc'])} | {shown(row['log_loss'], '.4f')} | {seconds:.0f} |")
        return lines

    grid, forms, gap = results["grid"], results["forms"], results["own_minus_heldout"]
    return [
        "## Reward models",
        "",
        "On held-out rankings by all labelers, one epoch unless said otherwise. A perfect one would reach about 83 %"
        " (the labelers' own noise).",
        "",
        *table("size", list(results["sizes"].items())),
        "",
        *table(
            "rankings of the middle size",
            [
                (f"K = {size}, {what}", grid[f"{form}_k{size}"])
                for form, what in (
                    ("completions", "the same number of responses"),
                    ("pairs", "the same number of pairs"),
                )
                for size in GRID_SIZES
            ],
        ),
        "",
        *table(
            "the same rankings",
            [
                (f"{title}, {epochs} epoch{'s' if epochs > 1 else ''}", forms[f"{form}_{epochs}"])
                for form, title in (("grouped", "whole"), ("pairs", "as shuffled pairs"))
                for epochs in (1, 2)
            ],
        ),
        "",
        f"Five-fold over labelers: own {shown(results['own'])}, held-out {shown(results['heldout'])}; difference "
        f"{gap['mean']:+.1%} [{gap['low']:+.1%}, {gap['high']:+.1%}], from a bootstrap over labelers.",
    ]


def _alignment_tax(results: dict[str, Any], folder: Path, link: str) -> list[str]:
    figure = _figure()
    axes = figure.add_subplot()
    for color, key, title in ((COLORS[0], "ptx_coef", "pretraining gradients"), (COLORS[1], "kl_coef", "KL penalty")):
        rows = results[key].values()
        xs, ys = [[row[name]["mean"] for row in rows] for name in ("pretraining_loss", "gold")]
        axes.plot(xs, ys, "o-", color=color, label=f"{title}, coefficient", markersize=4)
        for coef, x, y in zip(results[key], xs, ys, strict=True):
            axes.annotate(coef, (x, y), fontsize=7, textcoords="offset points", xytext=(4, 3))
    for color, model in ((COLORS[2], "base"), (COLORS[3], "sft")):
        row = results["models"][model]
        axes.plot(row["pretraining_loss"]["mean"], row["gold"]["mean"], "s", color=color, label=TITLES[model])
    axes.set(xlabel="loss on pretraining text", ylabel="gold score")
    axes.legend(fontsize=8)
    _save(figure, folder / "alignment_tax.svg")
    shots = [f"{task}, {each}" for task in TASKS for each in ("zero", "few")]
    lines = [
        "## The alignment tax",
        "",
        f"![Gold score against the loss on pretraining text, for both sweeps]({link}/alignment_tax.svg)",
        "",
        "Loss on held-out pretraining text; the share of the rise from base to PPO that PPO-ptx takes away:",
        "",
        "| size | base | SFT | PPO | PPO-ptx | taken away |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in results["sizes"].items():
        losses = " | ".join(shown(row[model], ".3f") for model in ("base", "sft", "ppo", "ppo_ptx"))
        lines.append(f"| {name} | {losses} | {shown(row['rise_removed'], '.0%')} |")
    lines += [
        "",
        "Sweeps at the middle size. Without pretraining gradients where the KL coefficient is varied.",
        "",
        "| | text loss | taken away | gold score | preferred to SFT | KL | few-shot tasks |",
        "|---|---|---|---|---|---|---|",
    ]
    for key, title in (("ptx_coef", "ptx coefficient"), ("kl_coef", "KL coefficient")):
        for coef, row in results[key].items():
            lines.append(
                f"| {title} {coef} | {shown(row['pretraining_loss'], '.3f')} | {shown(row['rise_removed'], '.0%')} | "
                f"{shown(row['gold'], '.3f')} | {shown(row['preferred_to_sft'])} | {row['kl']['mean']:.2f} | "
                f"{shown(row['few_shot_mean'])} |"
            )
    lines += [
        "",
        "Accuracy on tasks of plain text (25 % is chance), without and with two examples, means of the seeds:",
        "",
        "| | " + " | ".join(shots) + " |",
        "|---|" + "---|" * len(shots),
    ]
    for model, row in results["models"].items():
        cells = [f"{row['tasks'][each][task]['mean']:.1%}" for task in TASKS for each in ("zero", "few")]
        lines.append(f"| {TITLES[model]} | " + " | ".join(cells) + " |")
    return lines


def _over_optimisation(results: dict[str, Any], folder: Path, link: str) -> list[str]:
    figure = _figure(columns=2)
    gold, proxy = figure.subplots(1, 2)
    for color, (coef, run) in zip(COLORS, results["runs"].items(), strict=False):
        roots = [point["mean"] ** 0.5 for point in run["kl"]]
        _line(gold, roots, run["gold_gain"], f"KL coefficient {coef}", color)
        _line(proxy, roots, run["proxy_gain"], f"KL coefficient {coef}", color)
    best = results["best_of_n"]
    roots = [kl**0.5 for kl in best["kl"]]
    _line(gold, roots, best["gold_gain"], "best of n", "#000000")
    _line(proxy, roots, best["proxy_gain"], "best of n", "#000000")
    gold.set(xlabel="root of KL to SFT", ylabel="gain of the gold score")
    proxy.set(xlabel="root of KL to SFT", ylabel="gain of the reward model's score")
    proxy.legend(fontsize=7)
    _save(figure, folder / "over_optimisation.svg")
    lines = [
        "## Over-optimisation",
        "",
        f"![Gain of gold score and of reward model's score against root KL]({link}/over_optimisation.svg)",
        "",
        "Runs of the middle size without pretraining gradients, measured every few iterations; lines are means of the"
        " seeds, bands their range. R = d (alpha - beta log d) for runs and d (alpha - beta d) for best of n, d = root"
        " of KL, fitted to the means:",
        "",
        "| | alpha | beta | R2 | last KL | last gold gain | best gold gain | at KL |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for title, run in [(f"KL coefficient {coef}", run) for coef, run in results["runs"].items()]:
        gains = [point["mean"] for point in run["gold_gain"]]
        top = max(range(len(gains)), key=gains.__getitem__)
        lines.append(
            f"| {title} | {run['form']['alpha']:.3f} | {run['form']['beta']:.3f} | {run['form']['r2']:.2f} | "
            f"{run['kl'][-1]['mean']:.1f} | {gains[-1]:.3f} | {gains[top]:.3f} | {run['kl'][top]['mean']:.1f} |"
        )
    gains = [point["mean"] for point in best["gold_gain"]]
    top = max(range(len(gains)), key=gains.__getitem__)
    form = best["form"]
    lines.append(
        f"| best of n, to {best['n'][-1]} | {form['alpha']:.3f} | {form['beta']:.3f} | {form['r2']:.2f} | "
        f"{best['kl'][-1]:.2f} | {gains[-1]:.3f} | {gains[top]:.3f} | {best['kl'][top]:.2f} |"
    )
    return lines


def _generalisation(results: dict[str, Any], folder: Path, link: str) -> list[str]:
    del folder, link
    titles = {
        "base": "GPT",
        "sft": "SFT",
        "ppo_ptx": "PPO-ptx",
        "sft_without": "SFT, never saw the kind",
        "ppo_ptx_without": "PPO-ptx, never saw the kind",
    }
    lines = [
        "## Generalisation, and manners",
        "",
        f"Held-out prompts of the kind *{results['kind']}*, which stood in no demonstration, ranking or prompt of some"
        " models (it does stand in the pretraining text):",
        "",
        "| model | gold score |",
        "|---|---|",
    ]
    lines += [f"| {titles[name]} | {shown(gold, '.3f')} |" for name, gold in results["gold"].items()]
    lines += ["", "| preferred | |", "|---|---|"]
    for pair, rate in results["left_out"].items():
        ours, theirs = (titles[name] for name in pair.split(" to "))
        lines.append(f"| {ours} to {theirs} | {shown(rate)} |")
    owners = results["owners"]
    lines += [
        "",
        f"PPO-ptx is preferred to SFT in {shown(owners['known'])} on prompts that PPO trained on and in "
        f"{shown(owners['heldout'])} on those of held-out owners.",
        "",
        "Rude responses, by how the user speaks:",
        "",
        "| model | plain | greeting and thanks | opens with an insult |",
        "|---|---|---|---|",
    ]
    for model, row in results["rude"].items():
        lines.append(
            f"| {titles.get(model, TITLES[model])} | " + " | ".join(shown(each) for each in row.values()) + " |"
        )
    return lines


def _figure(columns: int = 1) -> Figure:
    return Figure(figsize=(5.2 if columns == 1 else 8.4, 3.6), layout="constrained")


def _line(axes: Any, xs: Sequence[float], points: Sequence[dict[str, Any]], title: str, color: str) -> None:
    axes.plot(xs, [point["mean"] for point in points], "o-", color=color, label=title, markersize=4)
    axes.fill_between(
        xs,
        [point["low"] for point in points],
        [point["high"] for point in points],
        color=color,
        alpha=0.15,
        linewidth=0,
    )


def _save(figure: Figure, path: Path) -> None:
    """As SVG that is the same whenever it is drawn from the same numbers."""
    from matplotlib import rc_context

    for axes in figure.axes:
        axes.grid(color="#e0e0e0", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    with rc_context({"svg.hashsalt": path.stem, "svg.fonttype": "none"}):
        FigureCanvasSVG(figure).print_svg(path, metadata={"Date": None})
