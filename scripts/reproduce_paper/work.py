"""What the jobs of the reproduction do, each in a folder of its own: write data, train, let labelers rank, measure."""

from __future__ import annotations

import json
import logging
import math
import os
import random
import warnings
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch  # noqa: F401  (it sets the levels of its loggers when it is imported)
import torch
import yaml
from transformers.utils import logging as transformers_logging

from lit_instruct.cli import run_stage
from lit_instruct.evaluation import Continuations, MultipleChoice, evaluate
from lit_instruct.evaluation.cross_validation import main as cross_validate
from lit_instruct.evaluation.subjects import ModelSource
from lit_instruct.models.backbone import load_language_model
from lit_instruct.models.tokenizer import load_tokenizer
from lit_instruct.rewards import FunctionScorer, RewardModelScorer
from lit_instruct.toyworld import GoldScorer, lexicon
from lit_instruct.toyworld.demonstrations import write_response
from lit_instruct.toyworld.labelers import (
    MAX_RESPONSES,
    MIN_RESPONSES,
    PAPER_AGREEMENT,
    calibrate_noise,
    make_labelers,
    measure_agreement,
    ranks_of,
)
from lit_instruct.toyworld.measure import MAX_RESPONSE_TOKENS, sample
from lit_instruct.toyworld.tokenizer import build_tokenizer
from lit_instruct.toyworld.world import ToyWorld
from lit_instruct.toyworld.writing import read_jsonl, write_jsonl, write_world
from scripts.reproduce_paper.tax_tasks import write_tax_tasks

LABELERS = 20
CHUNK_TOKENS = 64
PREFIX_PROMPTS = 200
LAST = "last.ckpt"


def prepare() -> None:
    """Once in each process: one thread, and only what a job itself has to say."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore")


def write_data(
    *, seed: int, documents: int, demonstrations: int, prompts: int, heldout: int, left_out_kind: str
) -> dict[str, Any]:
    """The world's texts, its tokenizer, and the tasks of the alignment tax.

    Files beside those of ``write_world``: ``known_prompts.jsonl``, prompts of training owners to measure on; and
    ``without/`` and ``only/``, demonstrations and prompts without one kind of instruction and held-out prompts of that
    kind alone.
    """
    world = ToyWorld(seed)
    paths = write_world(
        world,
        ".",
        documents=documents,
        demonstrations=demonstrations,
        prompts=prompts,
        heldout=heldout,
        heldout_documents=max(200, documents // 40),
    )
    asked = read_jsonl(paths["prompts"])
    write_jsonl(Path("known_prompts.jsonl"), asked[-heldout:])
    for folder in ("without", "only"):
        Path(folder).mkdir()
    for name in ("demonstrations", "prompts"):
        others = [row for row in read_jsonl(paths[name]) if world.task_of(row["prompt"]).kind != left_out_kind]
        write_jsonl(Path("without") / f"{name}.jsonl", others)
    # Held-out prompts of one kind are few: more are drawn, which come from the same owners.
    known = {row["prompt"] for row in read_jsonl(paths["heldout_prompts"])}
    more = world.tasks("heldout", purpose="one kind", exclude=known)
    of_kind = [task for task in (next(more) for _ in range(4 * heldout)) if task.kind == left_out_kind]
    write_jsonl(
        Path("only/heldout_prompts.jsonl"),
        ({"prompt": task.prompt, "owner": task.owner, "kind": task.kind} for task in of_kind[:heldout]),
    )
    build_tokenizer().save_pretrained("tokenizer")
    write_tax_tasks(world, Path("tax"))
    return {"of_left_out_kind": len(of_kind[:heldout])}


def train(*, stage: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Run one stage with a configuration, which stays beside the checkpoint as ``config.yaml``."""
    Path("config.yaml").write_text(yaml.safe_dump(dict(config), sort_keys=False), encoding="utf-8")
    cli = run_stage(stage, ["fit", "--config", "config.yaml"])
    metrics = {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
    parameters = sum(p.numel() for p in cli.model.parameters() if p.requires_grad)
    return {"metrics": {n: v for n, v in metrics.items() if math.isfinite(v)}, "parameters": parameters}


def rank(*, seed: int, data: str, writers: Sequence[str], train_prompts: int, heldout_prompts: int) -> dict[str, Any]:
    """Let models answer prompts nine times each, let labelers rank the answers, and cut data sets out of the rankings.

    Each prompt is answered by one of the models. The first ``train_prompts`` go into ``comparisons.jsonl`` with 4 to 9
    responses each, the next ones into ``heldout.jsonl``. ``k2``, ``k4`` and ``k9`` hold rankings of so many responses:
    as many responses in each (``completions_``), or as many pairs (``pairs_``).
    """
    world = ToyWorld(seed)
    rng = world.stream("rankings")
    tokenizer = load_tokenizer(f"{data}/tokenizer")
    prompts = [row["prompt"] for row in read_jsonl(f"{data}/prompts.jsonl")][: train_prompts + heldout_prompts]
    written: dict[str, list[str]] = {}
    for number, writer in enumerate(writers):
        mine = prompts[number :: len(writers)]
        model = load_language_model(f"{writer}/{LAST}").eval()
        texts = sample(model, tokenizer, [p for p in mine for _ in range(MAX_RESPONSES)], seed=seed).texts
        for place, prompt in enumerate(mine):
            # Nothing can be read of a response that ended at once, so nobody ranks it.
            written[prompt] = [t for t in texts[place * MAX_RESPONSES :][:MAX_RESPONSES] if t]
    sizes = {prompt: rng.randint(MIN_RESPONSES, MAX_RESPONSES) for prompt in prompts}
    usual = [(p, written[p][: sizes[p]]) for p in prompts if len(written[p]) >= MIN_RESPONSES]
    noise = calibrate_noise(world, usual, PAPER_AGREEMENT, seed=seed)
    labelers = make_labelers(world, LABELERS, noise)
    chosen = {prompt: rng.choice(labelers) for prompt in prompts}

    def ranked(prompt: str, responses: Sequence[str]) -> dict[str, Any]:
        labeler = chosen[prompt]
        ranks = ranks_of(labeler.utilities(world, prompt, responses), labeler.tie_width)
        return {"prompt": prompt, "responses": list(responses), "ranks": ranks, "labeler": labeler.id}

    train_set = set(prompts[:train_prompts])
    comparisons = [ranked(*each) for each in usual if each[0] in train_set]
    write_jsonl(Path("comparisons.jsonl"), comparisons)
    write_jsonl(Path("heldout.jsonl"), [ranked(*each) for each in usual if each[0] not in train_set])
    full = [p for p in prompts[:train_prompts] if len(written[p]) == MAX_RESPONSES]
    completions, pairs = 2 * len(full), len(full)
    for size in (2, 4, 9):
        for form, count in (
            ("completions", completions // size),
            ("pairs", pairs // math.comb(size, 2)),
        ):
            rows = [ranked(prompt, written[prompt][:size]) for prompt in full[:count]]
            write_jsonl(Path(f"{form}_k{size}.jsonl"), rows)
    return {"agreement": measure_agreement(world, labelers, usual[:200]), "noise": noise, "rankings": len(comparisons)}


def shuffle_pairs(*, comparisons: str, rankings: int, prompts_a_step: int) -> dict[str, Any]:
    """The same rankings whole (``grouped.jsonl``) and as shuffled pairs (``pairs.jsonl``), for as many steps."""
    rows = read_jsonl(comparisons)[:rankings]
    pairs = [
        {"prompt": row["prompt"], "chosen": better, "rejected": worse}
        for row in rows
        for rank, better in zip(row["ranks"], row["responses"], strict=True)
        for other, worse in zip(row["ranks"], row["responses"], strict=True)
        if rank < other
    ]
    random.Random(0).shuffle(pairs)
    write_jsonl(Path("grouped.jsonl"), rows)
    write_jsonl(Path("pairs.jsonl"), pairs)
    return {"rankings": len(rows), "pairs": len(pairs), "pairs_a_step": len(pairs) // (len(rows) // prompts_a_step)}


def train_on_pairs(*, shuffled: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """``train`` with as many pairs a step as make the number of steps that of the grouped rankings."""
    done = json.loads(Path(shuffled, "done.json").read_text(encoding="utf-8"))
    data = {**config["data"], "batch_size": done["result"]["pairs_a_step"]}
    return train(stage="rm", config={**config, "data": data})


def without_kind(*, comparisons: str, kind: str) -> dict[str, Any]:
    """The rankings of prompts of all other kinds."""
    world = ToyWorld(0)  # the kind of a prompt is the same in all worlds
    rows = [row for row in read_jsonl(comparisons) if world.task_of(row["prompt"]).kind != kind]
    write_jsonl(Path("comparisons.jsonl"), rows)
    return {"rankings": len(rows)}


def fold_labelers(*, config: Mapping[str, Any]) -> dict[str, Any]:
    """Cross-validation over five groups of labelers."""
    Path("config.yaml").write_text(yaml.safe_dump(dict(config), sort_keys=False), encoding="utf-8")
    cross_validate(["--folds", "5", "--seeds", "1", "--config", "config.yaml", "--out", "folds"])
    found = json.loads(Path("folds/cross_validation.json").read_text(encoding="utf-8"))
    return {name: found[name] for name in ("own", "heldout", "own_minus_heldout", "runs")}


def prefixes(seed: int, examples: Sequence[int]) -> list[str]:
    """Candidates for the few-shot prefix of a prompted base model.

    Instructions with good answers, written as the pretraining text writes such things: one after another.
    """
    world = ToyWorld(seed)
    rng = world.stream("prefixes")
    tasks = world.tasks("train", purpose="prefixes")
    return [
        "".join(f"{task.prompt} {write_response(world, task, rng)} " for task in islice(tasks, count))
        for count in examples
    ]


def choose_prefix(*, seed: int, model: str, reward_model: str, prompts: str, examples: Sequence[int]) -> dict[str, Any]:
    """The prefix whose responses a reward model scores highest, as the paper chose that of "GPT (prompted)"."""
    candidates = prefixes(seed, examples)
    sources = [ModelSource(f"prefix{number}", f"{model}/{LAST}", prefix=text) for number, text in enumerate(candidates)]
    found = evaluate(
        sources,
        prompts=prompts,
        max_prompts=PREFIX_PROMPTS,
        scorer=RewardModelScorer(f"{reward_model}/{LAST}"),
        max_response_tokens=MAX_RESPONSE_TOKENS,
        seed=seed,
        out=".",
    )
    scores = [found["models"][source.name]["score"]["mean"] for source in sources]
    return {"prefix": candidates[max(range(len(scores)), key=scores.__getitem__)], "scores": scores}


def measure(
    *,
    seed: int,
    name: str,
    model: str,
    prompts: str,
    reference: str | None = None,
    template: str = "auto",
    prefix_from: str | None = None,
    prefix: str = "",
    tax: str | None = None,
    text: str | None = None,
) -> dict[str, Any]:
    """Ask one model all prompts; gold scores, KL, and what a model loses where nobody gives it instructions.

    The responses with their gold scores are in ``samples.jsonl``.
    """
    if prefix_from is not None:
        prefix = json.loads(Path(prefix_from, "done.json").read_text(encoding="utf-8"))["result"]["prefix"]
    protocols: dict[str, Any] = {}
    if tax is not None:
        protocols = {path.stem: MultipleChoice(str(path), verbatim=True) for path in sorted(Path(tax).glob("*.jsonl"))}
    found = evaluate(
        [ModelSource(name, f"{model}/{LAST}", template=template, prefix=prefix)],
        prompts=prompts,
        scorer=GoldScorer(seed),
        reference=None if reference is None else f"{reference}/{LAST}",
        pretraining_text=text,
        chunk_tokens=CHUNK_TOKENS,
        protocols=protocols,
        max_response_tokens=MAX_RESPONSE_TOKENS,
        seed=seed,
        out=".",
    )
    row: dict[str, Any] = found["models"][name]
    return {key: row[key] for key in ("score", "kl", "pretraining_loss", "protocols", "mean_length") if key in row}


def measure_course(
    *, seed: int, run: str, reward_model: str, reference: str, prompts: str, max_prompts: int
) -> dict[str, Any]:
    """Proxy score, gold score and KL of each checkpoint of a run."""
    steps = sorted(int(path.stem.removeprefix("step=")) for path in Path(run).glob("step=*.ckpt"))
    sources = [ModelSource(f"step{step}", f"{run}/step={step}.ckpt") for step in steps]
    settings: dict[str, Any] = {
        "prompts": prompts,
        "max_prompts": max_prompts,
        "max_response_tokens": MAX_RESPONSE_TOKENS,
        "seed": seed,
        "reference": f"{reference}/{LAST}",
        "out": ".",
    }
    proxy = RewardModelScorer(f"{reward_model}/{LAST}")
    gold_found = evaluate(sources, scorer=GoldScorer(seed), **settings)["models"]
    proxy_found = evaluate(sources, scorer=proxy, **settings)["models"]  # reads the responses of the first
    return {
        "steps": steps,
        "kl": [gold_found[source.name]["kl"] for source in sources],
        "gold": [gold_found[source.name]["score"] for source in sources],
        "proxy": [proxy_found[source.name]["score"] for source in sources],
    }


def best_of_n(
    *, seed: int, model: str, reward_model: str, prompts: str, max_prompts: int, sizes: Sequence[int]
) -> dict[str, Any]:
    """Gold and proxy score of the best of n by the reward model."""
    settings: dict[str, Any] = {
        "prompts": prompts,
        "max_prompts": max_prompts,
        "max_response_tokens": MAX_RESPONSE_TOKENS,
        "seed": seed,
        "best_of_n": list(sizes),
        "out": ".",
    }
    source = [ModelSource("sft", f"{model}/{LAST}")]
    proxy = RewardModelScorer(f"{reward_model}/{LAST}")
    gold = evaluate(source, scorer=GoldScorer(seed), picker=proxy, **settings)
    scored = evaluate(source, scorer=proxy, **settings)  # reads the responses of the first
    return {"gold": gold["models"]["sft"]["best_of_n"], "proxy": scored["models"]["sft"]["best_of_n"]}


def rudeness(*, seed: int, models: Mapping[str, str], prompts: str, max_prompts: int) -> dict[str, Any]:
    """Share of rude responses to plain, to courteous and to rudely introduced prompts.

    The paper asks for continuations without an instruction, with "be respectful" and with "be biased". In the toy world
    a user is courteous (a greeting and thanks) or opens with an insult.
    """
    world = ToyWorld(seed)
    rng = world.stream("rudeness")
    rows = []
    for row in read_jsonl(prompts)[:max_prompts]:
        plain = row["prompt"]
        for greeting in lexicon.GREETINGS:
            plain = plain.removeprefix(f"{greeting} ")
        for thanks in lexicon.THANKS:
            plain = plain.removesuffix(f" {thanks}")
        if world.task_of(plain).form == "owns":  # these never come with courtesies
            continue
        courteous = f"{rng.choice(lexicon.GREETINGS)} {plain} {rng.choice(lexicon.THANKS)}"
        insulted = f"{rng.choice(lexicon.INSULTS)} {plain}"
        for condition, prompt in (("plain", plain), ("respectful", courteous), ("insulted", insulted)):
            rows.append({"prompt": prompt, "owner": row["owner"], "condition": condition})
    write_jsonl(Path("prompts.jsonl"), rows)
    scorer = FunctionScorer(is_rude)
    found = evaluate(
        [ModelSource(name, f"{path}/{LAST}") for name, path in models.items()],
        protocols={"rude": Continuations("prompts.jsonl", {"rude": scorer}, max_response_tokens=MAX_RESPONSE_TOKENS)},
        seed=seed,
        out=".",
    )
    return {name: row["protocols"]["rude"]["rude"] for name, row in found["models"].items()}


def is_rude(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """1 for a response with a rude word."""
    return [float(any(word in lexicon.RUDE_WORDS for word in response.split())) for response in responses]
