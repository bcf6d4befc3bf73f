"""Does a reward model learn the taste of its labelers, or of people? Cross-validation over labelers.

As in Ouyang et al. 2022, 4.1 and E.2 (5 folds, 3 seeds: 72.4 +- 0.4 % and 69.6 +- 0.9 %): the labelers, not the
prompts, are split into groups of similar data volume. For each group and seed a reward model is trained on the other
groups and its accuracy is taken twice: on prompts of its own labelers that were kept from training, and on the prompts
of the group that was left out. No prompt that was trained on, by whomever it was ranked, is in either set.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lit_instruct.cli import run_stage
from lit_instruct.data.bad_rows import write_skipped
from lit_instruct.data.records import ComparisonRecord, read_comparisons
from lit_instruct.evaluation.labeler_figures import Figure, difference, figure
from lit_instruct.evaluation.labeler_folds import Fold, make_folds
from lit_instruct.modules.reward_metrics import RankingReport
from lit_instruct.types import ConfigError


def main(arguments: Sequence[str]) -> None:
    """Run ``lit-instruct rm cross-validate``.

    Args:
        arguments: what follows on the command line.

    Raises:
        ConfigError: settings that cannot work.
        DataError: data that cannot be split.
    """
    options, rest = _parser().parse_known_args(arguments)
    for name, value, least in (("folds", options.folds, 2), ("seeds", options.seeds, 1)):
        if value < least:
            raise ConfigError(f"--{name}: got {value}; need at least {least}.")
    if not 0 < options.own_share <= 0.5:
        raise ConfigError(f"--own_share: got {options.own_share:g}; need more than 0 and at most 0.5.")
    config = read_config(rest)
    loaded = read_comparisons(config["data"]["comparisons"], on_bad_row=config["data"]["on_bad_row"])
    loaded.check(config["data"]["on_bad_row"])
    records = loaded.records
    if loaded.problems:
        listed = write_skipped(options.out, loaded.problems)
        print(f"{len(loaded.problems)} rows cannot be used and are left out: {listed} lists them.")
    first = config["seed_everything"] if type(config["seed_everything"]) is int else 1
    folds = make_folds(records, folds=options.folds, own_share=options.own_share, seed=first)
    unknown = sum(record.labeler is None for record in records)
    if unknown:
        print(f"{unknown} of {len(records)} rankings have no labeler and are left out.")
    runs = []
    with _quiet():
        for number, fold in enumerate(folds, start=1):
            for seed in range(first, first + options.seeds):
                runs.append(run_fold(config, fold, number, seed, options.out))
                print(_run_line(runs[-1]), flush=True)
    own, heldout = ([(run["fold"], run[kind]["labelers"]) for run in runs] for kind in ("own", "heldout"))
    summary = {
        "folds": options.folds,
        "seeds": options.seeds,
        "own_share": options.own_share,
        "rankings": len(records) - unknown,
        "own": figure(own)._asdict(),
        "heldout": figure(heldout)._asdict(),
        "own_minus_heldout": difference(own, heldout),
        "runs": runs,
    }
    _write(options.out / "cross_validation.json", json.dumps(summary, indent=2) + "\n")
    print_summary(summary, options.out)


def read_config(arguments: Sequence[str]) -> dict[str, Any]:
    """All settings of ``lit-instruct rm fit`` with these arguments, read as that command reads them.

    Args:
        arguments: without the command.

    Returns:
        The settings, as in a configuration file.

    Raises:
        ConfigError: there is no model or there are no data.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            run_stage("rm", ["fit", *arguments, "--print_config"])
    except SystemExit as stop:
        if stop.code:
            raise
    config: dict[str, Any] = yaml.safe_load(printed.getvalue())
    for section, name in (("model", "base"), ("data", "comparisons")):
        if config[section].get(name) is None:
            raise ConfigError(f"--{section}.{name} is missing; it has no default.")
    return config


def run_fold(config: Mapping[str, Any], fold: Fold, number: int, seed: int, out: Path) -> dict[str, Any]:
    """Train one reward model and measure it, or read what an earlier call with the same data and settings found.

    Args:
        config: settings of ``lit-instruct rm fit``.
        fold: the data.
        number: of the fold.
        seed: of the run.
        out: folder of all runs.

    Returns:
        One of the ``runs`` in the results.
    """
    folder = out / f"fold{number}" / f"seed{seed}"
    texts = {f"{name}.jsonl": _lines(getattr(fold, name)) for name in ("train", "own", "heldout")}
    texts[f"seed{seed}/config.yaml"] = yaml.safe_dump(_config_of_run(config, folder, seed), sort_keys=False)
    said = "\0".join([*texts.values(), *_file_marks([config["model"], config["data"]])])
    digest = hashlib.sha256(said.encode()).hexdigest()
    result = folder / "result.json"
    if result.is_file() and (found := json.loads(result.read_text(encoding="utf-8")))["digest"] == digest:
        return found
    for name, text in texts.items():
        _write(folder.parent / name, text)
    cli = run_stage("rm", ["fit", "--config", str(folder / "config.yaml")])
    # Measured anew, since the last validation of a fit need not be one of its last weights.
    cli.trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False)
    cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
    run = {
        "fold": number,
        "seed": seed,
        "heldout_labelers": fold.labelers,
        "train_rankings": len(fold.train),
        "heldout_rankings_left_out": fold.left_out,
        "own": _measured(cli.model.reports["val"], cli.datamodule.labelers),
        "heldout": _measured(cli.model.reports["test"], cli.datamodule.labelers),
        "digest": digest,
    }
    if cli.trainer.is_global_zero:
        _write(result, json.dumps(run, indent=2) + "\n")
    return run


def _file_marks(value: Any) -> list[str]:
    """Size and time of every file that the settings name, or of a folder's: a base trained anew is another one."""
    if isinstance(value, Mapping):
        return [mark for part in value.values() for mark in _file_marks(part)]
    if isinstance(value, list):
        return [mark for part in value for mark in _file_marks(part)]
    if not isinstance(value, str):
        return []
    named = Path(value)
    files = sorted(named.iterdir()) if named.is_dir() else [named]
    found = [(path, path.stat()) for path in files if path.is_file()]
    return [f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in found]


def print_summary(summary: Mapping[str, Any], out: Path) -> None:
    """Print the table that a cross-validation ends with.

    Args:
        summary: of all runs.
        out: where everything lies.
    """
    title = f"{summary['folds']} folds x {summary['seeds']} seeds"
    print(f"\n{title:<19}{'accuracy':>10}{'[95 %]':>19}{'+-':>8}{'longer wins':>14}{'pairs':>10}")
    for title, kind in (("own labelers", "own"), ("held-out labelers", "heldout")):
        row = Figure(**summary[kind])
        interval = f"[{row.low:.1%}, {row.high:.1%}]"
        print(
            f"{title:<19}{row.accuracy:>10.1%}{interval:>19}{row.standard_error:>8.1%}{row.length_baseline:>14.1%}"
            f"{row.pairs:>10}"
        )
    gap = summary["own_minus_heldout"]
    interval = f"[{gap['low']:.1%}, {gap['high']:.1%}]"
    print(
        f"{'difference':<19}{gap['difference']:>10.1%}{interval:>19}\n\n"
        f"[95 %]: bootstrap over {summary['heldout']['labelers']} labelers. +-: standard error over folds. longer "
        "wins: what length alone gets on the same pairs.\n"
        f"Every run: {out / 'cross_validation.json'}   Curves: tensorboard --logdir {out}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lit-instruct rm cross-validate",
        usage="%(prog)s [--folds N] [--seeds N] [--own_share X] [--out DIR] [options of lit-instruct rm fit]",
        description="Train reward models on groups of labelers; measure them on their own labelers and on unseen ones.",
        epilog="All other options are those of lit-instruct rm fit (see its --help) and hold for every run, except "
        "that data.val, data.test and the logger are set here, and that no checkpoints are written. Runs that are done "
        "are not done again while data and settings stay the same.",
        allow_abbrev=False,
    )
    parser.add_argument("--folds", type=int, default=5, help="groups of labelers (default 5)")
    parser.add_argument("--seeds", type=int, default=3, help="runs a fold, from seed_everything on (default 3)")
    parser.add_argument(
        "--own_share",
        type=float,
        default=0.1,
        help="share of the prompts that is kept from training, for own labelers (default 0.1)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/rm_cross_validation"), help="folder for data and results"
    )
    return parser


def _config_of_run(config: Mapping[str, Any], folder: Path, seed: int) -> dict[str, Any]:
    """The settings of one run: its data, its seed, curves into its folder, no checkpoints (that would be many)."""
    data = {name: str(folder.parent / f"{name}.jsonl") for name in ("train", "own", "heldout")}
    logger = {
        "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
        "init_args": {"save_dir": str(folder), "name": "", "version": "logs", "default_hp_metric": False},
    }
    given = config["trainer"]
    trainer = {
        "callbacks": [c for c in given["callbacks"] or [] if not c["class_path"].endswith("ModelCheckpoint")] or None,
        "logger": False if given["logger"] is False else logger,
        "default_root_dir": str(folder),
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": None,
        "limit_test_batches": None,
    }
    return {
        **config,
        "seed_everything": seed,
        "ckpt_path": None,
        "trainer": {**given, **trainer},
        "data": {
            **config["data"],
            "comparisons": data["train"],
            "val": data["own"],
            "test": data["heldout"],
            "seed": seed,
        },
    }


def _measured(report: RankingReport, names: Sequence[str]) -> dict[str, Any]:
    return {
        "accuracy": report.overall.accuracy,
        "length_baseline": report.overall.length_baseline,
        "log_loss": report.values["log_loss"],
        "rankings": report.rankings,
        "pairs": report.overall.pairs,
        "labelers": {names[number]: list(counts) for number, counts in report.by_labeler.items()},
    }


def _run_line(run: Mapping[str, Any]) -> str:
    own, heldout = run["own"], run["heldout"]
    return (
        f"fold {run['fold']}, seed {run['seed']}: {own['accuracy']:.1%} of {own['pairs']} pairs by own labelers, "
        f"{heldout['accuracy']:.1%} of {heldout['pairs']} by held-out ones; {run['train_rankings']} rankings trained on"
    )


def _lines(records: Iterable[ComparisonRecord]) -> str:
    return "".join(json.dumps(record._asdict()) + "\n" for record in records)


def _write(path: Path, text: str) -> None:
    """At one stroke: with several processes each writes the same, and none may read half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what every run would say again: Lightning's greeting, and the same advice of the module."""
    seen: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        new = message not in seen
        seen.add(message)
        return new

    levels = {logger: logger.level for logger in map(logging.getLogger, ("lightning.pytorch", "lightning.fabric"))}
    module = logging.getLogger("lit_instruct.modules.reward")
    module.addFilter(is_new)
    for logger in levels:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
        module.removeFilter(is_new)
