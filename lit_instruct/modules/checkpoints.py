"""What every stage puts into its checkpoints and takes out of them: the base of the three modules."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Self

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from lit_instruct.models.adapter_checkpoints import record_of, settings_of
from lit_instruct.models.adapters import left_out, sharding_refusal
from lit_instruct.models.backbone import context_length
from lit_instruct.models.handover import read_handover, write_handover
from lit_instruct.models.sharding import is_sharded, sampling_weights
from lit_instruct.modules.fsdp2 import Fsdp2Strategy
from lit_instruct.modules.guards import refuse_other_tokenizer
from lit_instruct.modules.optimizers import optimizer_names
from lit_instruct.modules.resuming import (
    Limits,
    LogLine,
    finish_step,
    is_finished,
    lift_limits,
    line_to_come,
    set_limits,
    write_line,
)
from lit_instruct.modules.step_guard import StepGuard
from lit_instruct.modules.strategies import gather_objects, rank, world_size
from lit_instruct.types import ConfigError

log = logging.getLogger(__name__)

RandomState = dict[str, Tensor]
"""Kind of device -> state of torch's generator on it."""


class StageCheckpoint(pl.LightningModule):
    """Writes the handover (see :mod:`lit_instruct.models.handover`) and keeps frozen networks out of checkpoints.

    Lightning resumes weights, optimizer, loops and loaders, but not torch's random numbers; these are saved here, of
    every rank, so that a run with dropout goes on exactly too.

    Attributes:
        stage: ``sft``, ``rm`` or ``ppo``.
        handed_over: name of the attribute whose network the next stage takes.
        base_argument: name of the ``__init__`` argument that says where that network comes from, if the checkpoint
            itself can take that place; None for PPO, which needs its reference and reward model again anyway.
        frozen_networks: attributes whose weights are not saved.
        tokenizer: with its template settled.
        step_guard: keeps gradients that are not finite from the weights.
    """

    stage: ClassVar[str]
    handed_over: ClassVar[str]
    base_argument: ClassVar[str | None]
    frozen_networks: ClassVar[tuple[str, ...]] = ()
    tokenizer: PreTrainedTokenizerBase
    step_guard: StepGuard
    _random_states: list[RandomState] | None = None  # of a resumed run, until its first batch
    _line: LogLine | None = None  # of a resumed run, until it is written
    _optimizers: list[str] | None = None  # whose state a resumed run has, until there are its own
    _finished: bool = False  # the checkpoint that is gone on with is of the last step
    _limits: Limits | None = None  # of such a run, while they are lifted

    @property
    def network_config(self) -> PretrainedConfig:
        """Configuration of the network that is handed over."""
        return getattr(self, self.handed_over).config

    @property
    def sample_token_limit(self) -> int | None:
        """How many tokens one sample of the data may have; None where the model sets no limit."""
        return context_length(self.network_config)

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_post_hook(_forgive_what_is_left_out)

    def networks(self) -> list[nn.Module]:
        """Those that are called as a whole: a strategy may cut each of them over the processes."""
        return [getattr(self, self.handed_over)]

    def configure_model(self) -> None:
        """Called by the Trainer before each run: sharded is once.

        Raises:
            ConfigError: the strategy shards and is not ours, which alone knows what to cut; or it would cut weights
                that are quantised or shared.
        """
        strategy = self._strategy()
        shards = isinstance(strategy, Fsdp2Strategy | FSDPStrategy)
        if shards and (reason := sharding_refusal(self)) is not None:
            raise ConfigError(
                f"trainer.strategy: got {type(strategy).__name__}, but {reason}; need whole, separate weights. Do: "
                "--trainer.strategy ddp, or leave out quantization, a frozen_dtype of bits and shared_base."
            )
        if isinstance(strategy, Fsdp2Strategy):
            strategy.shard(network for network in self.networks() if not is_sharded(network))
        elif isinstance(strategy, ModelParallelStrategy):
            raise ConfigError(
                f"trainer.strategy: got {type(strategy).__name__}, which leaves it to the model what to shard; need "
                "fsdp2, which knows these networks. Do: --trainer.strategy fsdp2 or --config strategy/fsdp.yaml."
            )

    def sampling_weights(self) -> AbstractContextManager[Any]:
        """The network that is handed over, able to run here alone: to sample, whatever the other processes do.

        Returns:
            A context; every process must enter and leave it.
        """
        strategy = self._strategy()
        if isinstance(strategy, FSDPStrategy):
            return FullyShardedDataParallel.summon_full_params(strategy.model, writeback=False)  # type: ignore[arg-type]
        how = strategy.rollout_weights if isinstance(strategy, Fsdp2Strategy) else "gathered"
        return sampling_weights(getattr(self, self.handed_over), how)

    def _strategy(self) -> Any:
        """The Trainer's; None without one, as while a checkpoint is loaded."""
        return None if self._trainer is None else self._trainer.strategy

    def left_out(self) -> set[str]:
        """Names of the weights that checkpoints leave out: those of frozen networks, and of the bases of adapters."""
        frozen = tuple(f"{name}." for name in self.frozen_networks)
        return {*left_out(self), *(name for name in self.state_dict() if name.startswith(frozen))}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave what is frozen out; add the handover and, of all ranks, the state of the random numbers."""
        absent = self.left_out()
        checkpoint["state_dict"] = {
            name: tensor for name, tensor in checkpoint["state_dict"].items() if name not in absent
        }
        checkpoint["bases"] = self._bases()
        checkpoint["step_guard"] = self.step_guard.state_dict()
        # A run that was resumed and is saved before its first batch has the states that it was resumed with.
        checkpoint["random_states"] = self._random_states or gather_objects(random_state(self.device))
        checkpoint["optimizers"] = [] if self._trainer is None else optimizer_names(self.trainer)
        checkpoint["line_to_come"] = None if self._trainer is None else line_to_come(self.trainer)
        write_handover(
            checkpoint,
            stage=self.stage,
            network=f"{self.handed_over}.",
            config=self.network_config,
            tokenizer=self.tokenizer,
            adapter=record_of(getattr(self, self.handed_over)),
        )

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's.

        Raises:
            ConfigError: the weights are of another network.
        """
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except RuntimeError as error:
            if not str(error).startswith("Error(s) in loading state_dict"):
                raise
            problems = [line.strip().rstrip(".") for line in str(error).splitlines()[1:]]
            more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
            raise ConfigError(
                f"the checkpoint has the weights of another network: {problems[0]}{more}. Need "
                "one of the same model. Do: give model and adapter as in the run that wrote it, or start a new run "
                "from the checkpoint's model."
            ) from error

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse an adapter that was trained on another base, or a whole network where there is an adapter now.

        Raises:
            ConfigError: so it is.
        """
        if self._trainer is not None:  # else whoever loads it names the tokenizer
            refuse_other_tokenizer(self.tokenizer, checkpoint)
        found, saved = self._bases(), checkpoint.get("bases", {})  # not in those of earlier versions
        if found != saved:
            raise ConfigError(
                f"adapter: the checkpoint to go on from has adapters on {_described(saved)}, and this run on "
                f"{_described(found)}; need the same. Do: give base model, adapter and quantization as then, or start "
                "a new run from the checkpoint's model."
            )
        if "step_guard" in checkpoint:  # not in those of earlier versions
            self.step_guard.load_state_dict(checkpoint["step_guard"])
        if self.resumes:
            self._random_states = checkpoint.get("random_states")
            self._line = checkpoint.get("line_to_come")
            self._optimizers = checkpoint.get("optimizers")  # not in those of earlier versions
            self._finished = is_finished(self.trainer, checkpoint)
            self._optimizers_are_there()  # fsdp2 loads after on_fit_start

    @property
    def resumes(self) -> bool:
        """Whether a checkpoint is gone on with, and not only loaded: whoever trains a loaded model anew has a seed."""
        return self._trainer is not None and self.trainer.training

    def on_fit_start(self) -> None:
        """A run whose steps are all done begins too: it may still have to do something after the last of them.

        Raises:
            ConfigError: it goes on from the state of another optimizer.
        """
        self._optimizers_are_there()

    def _optimizers_are_there(self) -> None:
        found = optimizer_names(self.trainer)
        if not found:
            return
        saved, self._optimizers = self._optimizers, None
        if saved and saved != found:  # torch would take what has the same shape
            raise ConfigError(
                f"optimizer: the checkpoint to go on from has the state of {', '.join(saved)}, and this run has "
                f"{', '.join(found)}; need the same. Do: give model.optimizer as then, or start a new run from the "
                "checkpoint's model."
            )
        if self._finished:  # their schedules follow from the limits
            self._limits, self._finished = lift_limits(self.trainer), False

    def on_train_start(self) -> None:
        """Do what the step still had to do, after which the checkpoint was written: its line of the log first."""
        if self._limits is not None:
            set_limits(self.trainer, self._limits)
            self._limits = None
        if self._line is not None:
            write_line(self.trainer, self._line)
            self._line = None
        if self.trainer.ckpt_path is not None:
            finish_step(self.trainer)

    def _bases(self) -> dict[str, dict[str, str | None]]:
        """Networks with an adapter that trains -> what it stands on."""
        records = {name: record_of(part) for name, part in self.named_children() if name not in self.frozen_networks}
        return {
            name: {"sha256": record.sha256, "quantization": record.quantization}
            for name, record in records.items()
            if record is not None
        }

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """A resumed run draws on from where it was interrupted. Not before: making the first batch may draw too."""
        if self._random_states is not None:
            if len(self._random_states) == world_size():
                set_random_state(self._random_states[rank()], self.device)
            else:
                log.warning(
                    "the checkpoint is of a run with %d processes and this one has %d: dropout will draw other "
                    "numbers than it would have drawn there",
                    len(self._random_states),
                    world_size(),
                )
            self._random_states = None

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, **arguments: Any) -> Self:  # type: ignore[override]
        """Build the module from its own checkpoint; the model folder it once came from is not needed.

        An adapter is the exception: its checkpoint holds it alone, and the base must be where it was, or be given.

        Args:
            checkpoint_path: a ``.ckpt`` of this stage.
            **arguments: as Lightning's; also constructor arguments that replace the saved ones.

        Returns:
            The module with its weights.

        Raises:
            ConfigError: it is a folder of shards.
        """
        if Path(checkpoint_path).is_dir():
            raise ConfigError(
                f"checkpoint {str(checkpoint_path)!r}: got a folder of shards; need a file. Do: take its network by "
                "load_language_model or ScalarModel.from_base, or go on from it with --trainer.strategy fsdp2 and "
                "--ckpt_path."
            )
        adapter = read_handover(checkpoint_path).adapter
        if adapter is not None:
            arguments.setdefault("adapter", settings_of(adapter))
        if cls.base_argument is not None:
            sources = [str(checkpoint_path)] if adapter is None else adapter.sources
            there = next((source for source in sources if Path(source).exists()), sources[0])
            arguments.setdefault(cls.base_argument, there)
        arguments.setdefault("tokenizer", str(checkpoint_path))
        return super().load_from_checkpoint(checkpoint_path, **arguments)


def _forgive_what_is_left_out(module: Any, keys: Any) -> None:
    """Loading stays strict about all the rest."""
    absent = module.left_out()
    keys.missing_keys[:] = [name for name in keys.missing_keys if name not in absent]


def _described(bases: dict[str, dict[str, str | None]]) -> str:
    parts = [f"{name} ({base['quantization'] or 'fp32'} {str(base['sha256'])[:8]})" for name, base in bases.items()]
    return ", ".join(parts) or "nothing"


def random_state(device: torch.device) -> RandomState:
    """The states of torch's own generators, from which dropout draws.

    Args:
        device: on which this process trains.

    Returns:
        That of the CPU, and that of the device if it is another.
    """
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device.type).get_rng_state().cpu()
    return states


def set_random_state(states: RandomState, device: torch.device) -> None:
    """Draw from there on.

    Args:
        states: of :func:`random_state`.
        device: on which this process trains. The state of another kind of device is left: its numbers differ anyway.
    """
    torch.set_rng_state(states["cpu"].cpu())
    if device.type != "cpu" and device.type in states:
        torch.get_device_module(device.type).set_rng_state(states[device.type].cpu())
