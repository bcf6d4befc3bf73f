"""LightningCLI for one stage: short errors, links between model and data, a last line that says how to go on."""

from __future__ import annotations

import os
import sys
import warnings
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import lightning.pytorch as pl
import torch
from jsonargparse import Namespace
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_instruct.models.handover import read_handover
from lit_instruct.modules.checkpoint_files import WholeCheckpointIO, newest_whole
from lit_instruct.modules.fsdp2 import Fsdp2Strategy
from lit_instruct.modules.guards import check_not_null, tokenizer_source
from lit_instruct.modules.interrupts import SaveOnSignal
from lit_instruct.modules.machine import Machine, Threads, describe, local_processes, matmul_error
from lit_instruct.modules.parser_errors import plainly, why_not_made
from lit_instruct.modules.run_logs import OutlastFullDisk
from lit_instruct.modules.trainer_checks import ValidationInterval, check_trainer, made_by_lightning
from lit_instruct.types import ConfigError

_EXPECTED_WARNINGS = (
    r"LightningCLI's args parameter",  # the dispatcher took the stage off
    r"Using ModelCheckpoint with manual optimization",  # after the step is right: a run goes on from there
    r"Found \d+ module\(s\) in eval mode",  # the frozen networks of PPO
    r"FSDP2-wrapped module \((FSDPScalarHead|FSDP\w+Model)\) returned a view",  # which nothing here changes in place
    r"'set_vital' is deprecated",  # torch and torchdata among themselves
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # torch and Lightning among themselves
)


class _Parser(LightningArgumentParser):
    """Reports an error in a few lines: the page of usage that argparse prints before it pushes it off the screen.

    jsonargparse makes parsers of the same class for the arguments of classes, so what they share stands here.

    Attributes:
        command: that runs, as ``lit-instruct sft fit``.
        given: what the user wrote behind the stage.
    """

    command: ClassVar[str]
    given: ClassVar[Sequence[str]]

    def error(self, message: str, *arguments: Any, **more: Any) -> NoReturn:
        of_class = not self.prog.startswith("lit-instruct ")  # the name of the program alone, then
        told = plainly(message, _options(self), self.given, of_class=of_class)
        print(f"{self.command}: error: {told}\nAll options: {self.command} --help", file=sys.stderr)
        raise SystemExit(2)


def _options(parser: ArgumentParser) -> set[str]:
    """Of a parser and its subcommands."""
    nested = [action.choices for action in parser._actions if isinstance(action.choices, Mapping)]
    known = {name for names in nested for sub in names.values() for name in _options(sub)}
    return known | {name for name in parser._option_string_actions if name.startswith("--")}


@contextmanager
def _told_of_classes() -> Iterator[None]:
    """An error over a class of the configuration, without the list of types that were tried in vain."""
    try:
        yield
    except ValueError as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from None
        if not str(error).startswith(("Does not validate", "Problem with given class_path")):
            raise
        raise ConfigError(why_not_made(str(error))) from error


def _write_into(folder: str, trainer: Namespace) -> None:
    """Let all checkpoints and logs of a run be written to one folder."""
    trainer.default_root_dir = folder
    loggers = trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]
    for part in [*(trainer.callbacks or []), *loggers]:
        settings = part.get("init_args") if isinstance(part, Namespace) else None
        for name in ("dirpath", "save_dir"):  # of ModelCheckpoint; of loggers
            if settings is not None and name in settings:
                settings[name] = folder


class _MachineReport(pl.Callback):
    """One line in the log, from the process that trains: its threads, and how exact its fp32 products are."""

    def __init__(self, threads: Threads):
        self.threads = threads

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """After the processes are launched and the device is known."""
        device = trainer.strategy.root_device
        threads = self.threads._replace(number=torch.get_num_threads())
        line, warning = describe(threads, torch.get_float32_matmul_precision(), matmul_error(device), device.type)
        rank_zero_info(line)
        if warning:
            rank_zero_warn(warning)


class StageCLI(LightningCLI):
    """The command line of one stage."""

    def __init__(
        self,
        module: type[pl.LightningModule],
        data: type[pl.LightningDataModule],
        *,
        stage: str,
        base_argument: str,
        following: str,
        args: Sequence[str],
    ):
        """Parse and run.

        Args:
            module: the stage's LightningModule.
            data: its LightningDataModule.
            stage: its name on the command line.
            base_argument: the module's argument that names the model; the data take their tokenizer from there.
            following: how to go on after ``fit``; ``{ckpt}`` stands for the checkpoint.
            args: what follows the stage on the command line.
        """
        self.stage, self.base_argument, self.following = stage, base_argument, following
        known = next((word for word in args if word in self.subcommands()), "fit")
        _Parser.command, _Parser.given = f"lit-instruct {stage} {known}", args
        for message in _EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        super().__init__(
            module,
            data,
            args=list(args),
            seed_everything_default=1,
            auto_configure_optimizers=False,
            save_config_kwargs={"overwrite": True},  # a resumed run writes into the same folder
            parser_kwargs={"prog": f"lit-instruct {stage}"},
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Only what the stages implement."""
        every = LightningCLI.subcommands()
        return {name: every[name] for name in ("fit", "validate", "test")}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """As LightningCLI's, with short errors."""
        parser = _Parser(**kwargs, allow_abbrev=False)  # a misspelt option is an error, not a guess
        parser.add_argument(
            "-c", "--config", action="config", help="YAML file; several are merged, the later one wins."
        )
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Settings of the machine; and the data are encoded with the model's tokenizer and template."""
        parser.add_class_arguments(Machine, "machine")
        parser.add_argument(
            "--auto_resume",
            type=bool,
            default=False,
            help="fit: go on from the newest whole checkpoint in the folders of this run's ModelCheckpoints; begin if "
            "there is none",
        )
        parser.add_argument(
            "--out",
            type=str | None,
            default=None,
            help="folder for checkpoints and logs, in place of those that the configuration names",
        )
        parser.link_arguments(
            (f"model.{self.base_argument}", "model.tokenizer"), "data.tokenizer", compute_fn=tokenizer_source
        )
        parser.link_arguments("model.template", "data.template")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """What the parser trips over while it prints or completes a configuration is a mistake in it, too."""
        with _told_of_classes():
            super().parse_arguments(parser, args)
        seed = self.config[self.config.subcommand].seed_everything
        if type(seed) is int and not 0 <= seed < 2**32:  # what numpy takes
            raise ConfigError(f"seed_everything: got {seed}; need at least 0 and at most {2**32 - 1}. Do: change it.")

    def before_instantiate_classes(self) -> None:
        """Before any model is loaded: the machine is set, and the checkpoint to go on from looked at."""
        given = self.config[self.subcommand]
        for name in ("trainer", "model", "data", "machine"):
            if not isinstance(given[name], Namespace):
                raise ConfigError(
                    f"{name}: got {given[name]!r}; need a section with settings below it. Do: write {name}: and the "
                    "settings indented below, or leave it out."
                )
        for name, kind in (("trainer", pl.Trainer), ("model", self._model_class), ("data", self._datamodule_class)):
            check_not_null(name, kind, given[name])
        if not isinstance(given.trainer.callbacks, list | None):  # one callback, which Lightning takes too
            given.trainer.callbacks = [given.trainer.callbacks]
        if given.out is not None:
            _write_into(given.out, given.trainer)
        processes = local_processes(
            given.trainer.devices, str(given.trainer.accelerator), os.environ, torch.cuda.device_count()
        )
        self.threads = Machine(**given.machine).apply(processes)
        if self.subcommand == "fit" and given.auto_resume and given.ckpt_path is None:
            given.ckpt_path = self._newest_checkpoint(given.trainer)
        self._check_checkpoint(given.get("ckpt_path"))

    @staticmethod
    def _newest_checkpoint(trainer: Any) -> str | None:
        """Where an interrupted run goes on, and what was passed over."""
        given = [callback.get("init_args", {}).get("dirpath") for callback in trainer.callbacks or []]
        folders = list(dict.fromkeys(Path(folder) for folder in given if folder))
        if not folders:
            raise ConfigError(
                "auto_resume: got true, but no ModelCheckpoint of this run has a dirpath; need one, to know where its "
                "checkpoints lie. Do: set dirpath, or give --ckpt_path."
            )
        newest, damaged = newest_whole(folders)
        for path in damaged:
            rank_zero_warn(
                f"auto_resume: {str(path)!r} is not whole (cut off, or of another program) and is passed over"
            )
        there = ", ".join(map(str, folders))
        rank_zero_info(
            f"auto_resume: {'no checkpoint in ' + there if newest is None else 'going on from ' + str(newest)}"
        )
        return None if newest is None else str(newest)

    def _check_checkpoint(self, path: str | None) -> None:
        """It must be there, and of this stage."""
        if path == "best":  # Lightning knows it of a Trainer that has fitted, which none has here
            raise ConfigError("ckpt_path: got 'best'; need a path, or last. Do: give the file that fit has printed.")
        if path is None or path in ("last", "hpc") or "://" in path:
            return
        found, wanted = read_handover(path).stage, getattr(self.model_class, "stage", None)
        if found != wanted:
            raise ConfigError(
                f"ckpt_path: {path!r} comes from the stage {found!r}, and only one of {wanted!r} can be gone on with "
                f"here. To start from its model give it as --model.{self.base_argument}."
            )

    def _parse_ckpt_path(self) -> None:
        """Lightning would let the checkpoint's hyperparameters win over the command line without a word."""

    def instantiate_classes(self) -> None:
        """What a class says about its settings counts, not the list of types that jsonargparse then tries in vain."""
        with _told_of_classes():
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """``--trainer.enable_progress_bar false`` holds for a bar that a shipped file lists among its callbacks too."""
        trainer = self.config_init[self.subcommand].trainer
        if trainer.callbacks:
            # Lightning takes one callback of a kind: one of ours that an overlay gives again replaces the first.
            ours = {type(one): one for one in trainer.callbacks if "lit_instruct.callbacks." in type(one).__module__}
            trainer.callbacks = [one for one in trainer.callbacks if ours.get(type(one), one) is one]
        if trainer.enable_progress_bar is False:
            trainer.callbacks = [bar for bar in trainer.callbacks or [] if not isinstance(bar, ProgressBar)]
        always = [_MachineReport(self.threads), ValidationInterval(), SaveOnSignal(), OutlastFullDisk()]
        trainer.callbacks = [*(trainer.callbacks or []), *always]
        plugins = trainer.plugins if isinstance(trainer.plugins, list) else [trainer.plugins] if trainer.plugins else []
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            trainer.plugins = [*plugins, WholeCheckpointIO()]
        with made_by_lightning("trainer"):
            made = super().instantiate_trainer(**kwargs)
        path = self.config[self.subcommand].get("ckpt_path")
        if path is not None and Path(path).is_dir() and not isinstance(made.strategy, Fsdp2Strategy | FSDPStrategy):
            raise ConfigError(
                f"ckpt_path: got {path!r}, a folder of shards, with {type(made.strategy).__name__}; need fsdp2, which "
                "alone puts them together. Do: --trainer.strategy fsdp2; or, to start from its model, give it as "
                f"--model.{self.base_argument}."
            )
        return made

    def before_fit(self) -> None:
        """What the Trainer would find out between two steps, or on all processes, is found out now."""
        check_trainer(self.trainer)
        self.datamodule.trainer = self.trainer
        self.datamodule.check_sizes()

    def before_validate(self) -> None:
        """Without validation data Lightning would measure nothing, and say nothing.

        Raises:
            ConfigError: there are none.
        """
        if self.datamodule.val == 0:
            raise ConfigError("data.val: got 0, and there is nothing to validate on. Do: give a fraction or a source.")

    def after_fit(self) -> None:
        """Say where the checkpoint lies and how to go on."""
        path = None
        saved = [callback for callback in self.trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
        for callback in sorted(saved, key=lambda callback: callback.monitor is None):  # chosen by a metric comes first
            path = path or callback.best_model_path or callback.last_model_path
        if not path or not self.trainer.is_global_zero:
            return
        print(f"\nCheckpoint: {path}\nNext: {self.following.format(ckpt=path)}")
