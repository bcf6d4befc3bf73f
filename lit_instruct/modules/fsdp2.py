"""Lightning's strategy for FSDP2, over all devices, with checkpoints that any other strategy reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from lit_instruct.models.handover import first_line
from lit_instruct.models.sharded_checkpoint import names_in_shards, read_shards, write_shards
from lit_instruct.models.sharding import RolloutWeights, buffers_to, shard_network
from lit_instruct.modules.checkpoint_files import (
    begin_part,
    mark_as_whole,
    part_of,
    readable,
    save_error,
    swap_in,
    write_flushed,
)
from lit_instruct.modules.strategies import gather_objects
from lit_instruct.types import ConfigError, SaveError

_META = "meta.pt"  # Lightning's name for what is no tensor of the model in a sharded checkpoint


class Fsdp2Strategy(ModelParallelStrategy):
    """Weights, gradients and optimizer state cut over all devices (FSDP2, ``fully_shard``).

    The networks of a module are cut in its ``configure_model``, from outside; see
    :mod:`lit_instruct.models.sharding`. A checkpoint is one file like that of any other strategy, so a run may go on
    with another strategy or another number of processes; or a folder of shards, which fsdp2 alone goes on from.
    """

    strategy_name = "fsdp2"

    def __init__(
        self,
        rollout_weights: RolloutWeights = "gathered",
        cpu_offload: bool = False,
        save_distributed_checkpoint: bool = False,
        process_group_backend: str | None = None,
    ):
        """Say how to shard.

        Args:
            rollout_weights: gathered: each device holds the whole policy while it samples; synced: it stays sharded,
                and all devices decode until the last response of all has ended. Slower, for policies that do not fit.
            cpu_offload: keep the shards in the memory of the CPU and bring them to the device only while needed.
            save_distributed_checkpoint: each process writes its shard into a folder, instead of one file for all.
            process_group_backend: default: nccl on GPUs, gloo on CPUs; both where shards lie in the memory of the CPU.
        """
        if cpu_offload and process_group_backend is None:
            process_group_backend = "cpu:gloo,cuda:nccl"
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
        )
        self.rollout_weights = rollout_weights
        self.cpu_offload = cpu_offload

    def setup_environment(self) -> None:
        """Shard over all processes: Lightning's default shards over none."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: pl.Trainer) -> None:
        """As Lightning's, and evaluate without gradients, but not in inference mode.

        What a sharded network gathers there it keeps, and can neither train with it nor take the averaged weights.
        (Where gloo is the backend Lightning does without the mode by itself.)
        """
        for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
            loop.inference_mode = False
        super().setup(trainer)

    def shard(self, networks: Iterable[nn.Module]) -> None:
        """Cut networks over all processes.

        Args:
            networks: each is called by itself.

        Raises:
            ConfigError: they are to be offloaded from a CPU.
        """
        if self.cpu_offload and self.root_device.type == "cpu":
            raise ConfigError(
                "trainer.strategy: got cpu_offload on a CPU, in whose memory shards lie anyway; need GPUs. Do: leave "
                "it out, or --config strategy/fsdp.yaml."
            )
        mesh = self.device_mesh["data_parallel"]
        for network in networks:
            shard_network(network, mesh, offload=self.cpu_offload)

    def model_to_device(self) -> None:
        """Offloaded shards stay where they are; buffers, which are not sharded, go to the device."""
        if not self.cpu_offload:
            super().model_to_device()
            return
        assert self.model is not None
        buffers_to(self.model, self.root_device)
        assert self.lightning_module is not None
        self.lightning_module._device = self.root_device  # what moving the module would have set

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What is trained: frozen weights are not gathered only to be thrown away."""
        assert self.model is not None
        return get_model_state_dict(self.model, options=self._options())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state as a single process has it: parameters are numbered through the optimizer's groups."""
        assert self.model is not None
        inner = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        state: dict[str, Any] = get_optimizer_state_dict(self.model, inner, options=self._options())
        if self._save_distributed_checkpoint or not state:
            return state
        return _renamed(state, {name: number for number, name in enumerate(_parameters(state))})

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        """Write a checkpoint beside its place and rename it; every process must call it.

        Args:
            checkpoint: what to write.
            filepath: where.
            storage_options: not taken: shards are written into a folder of this machine's file system.

        Raises:
            SaveError: one of the processes could not write; all raise it, and what was there before still is.
        """
        if storage_options is not None:
            raise ConfigError("storage_options: got some with fsdp2; need none. Do: save without them.")
        target = Path(self.broadcast(filepath))
        if not self._save_distributed_checkpoint:
            self._together(target, partial(self._save_file, checkpoint, target))
            return
        state = {"state_dict": checkpoint.pop("state_dict")}
        state |= {f"optimizer_{number}": it for number, it in enumerate(checkpoint.pop("optimizer_states", []))}
        self._together(target, partial(self._alone, begin_part, target))
        self._together(target, partial(write_shards, state, part_of(target)))
        self._together(target, partial(self._alone, _complete, checkpoint, target))

    def _save_file(self, checkpoint: dict[str, Any], target: Path) -> None:
        if self.global_rank == 0:
            self.checkpoint_io.save_checkpoint(checkpoint, target)

    def _alone(self, action: Callable[..., Any], *arguments: Any) -> None:
        """One process does it for all."""
        if self.global_rank == 0:
            action(*arguments)

    def _together(self, target: Path, action: Callable[[], None]) -> None:
        """Do a part of saving on all processes; if it fails on one of them, all of them raise, and none waits."""
        cause: Exception | None = None
        try:
            action()
        except (OSError, RuntimeError) as error:
            cause = error
        failures = gather_objects(None if cause is None else first_line(cause))
        if not any(failures):
            return
        said = ""
        if self.global_rank == 0:  # which alone removes what was written
            reason = next(filter(None, failures))
            said = str(cause if isinstance(cause, SaveError) else save_error(target, reason))
        raise SaveError(self.broadcast(said)) from cause

    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a file of any strategy, or a folder of shards of any number of processes.

        Args:
            checkpoint_path: file or folder.
            weights_only: not read: nothing but tensors, numbers and text is ever taken from a checkpoint.

        Returns:
            The checkpoint without model and optimizer.
        """
        path = Path(self.broadcast(checkpoint_path))
        return self._load_shards(path) if path.is_dir() else self._load_file(path)

    def _load_file(self, path: Path) -> dict[str, Any]:
        assert self.model is not None
        with readable(path):
            checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        weights = checkpoint.pop("state_dict")
        missing = sorted(self._saved_names() - weights.keys())
        if missing:
            raise ConfigError(
                f"checkpoint {str(path)!r}: got no {missing[0]} ({len(missing)} weights are missing); need those of "
                "the same networks. Do: go on with the settings that it was written with."
            )
        set_model_state_dict(self.model, weights, options=StateDictOptions(full_state_dict=True, strict=False))
        for optimizer, state in zip(self.optimizers, checkpoint.pop("optimizer_states", []), strict=False):
            own: dict[str, Any] = get_optimizer_state_dict(self.model, optimizer)
            self._set_state(optimizer, _renamed(state, dict(enumerate(_parameters(own)))), full=True)
        return checkpoint

    def _load_shards(self, path: Path) -> dict[str, Any]:
        assert self.model is not None
        saved = self._saved_names()
        weights = {name: tensor for name, tensor in get_model_state_dict(self.model).items() if name in saved}
        read_shards({"state_dict": weights}, path)
        set_model_state_dict(self.model, weights, options=StateDictOptions(strict=False))
        for number, optimizer in enumerate(self.optimizers):
            key = f"optimizer_{number}"
            state: dict[str, Any] = get_optimizer_state_dict(self.model, optimizer)
            there = names_in_shards(path, f"{key}.state.")
            state["state"] = {
                name: values
                for name, values in state["state"].items()
                if any(held.startswith(f"{name}.") for held in there)
            }
            read_shards({key: state}, path)
            self._set_state(optimizer, state, full=False)
        with readable(path / _META):
            checkpoint: dict[str, Any] = torch.load(path / _META, map_location="cpu", weights_only=True)
        return checkpoint

    def _set_state(self, optimizer: Optimizer, state: dict[str, Any], *, full: bool) -> None:
        """Not strict: a parameter that has had no step (the policy, while only the value model learns) has no state."""
        assert self.model is not None
        options = StateDictOptions(full_state_dict=full, strict=False)
        set_optimizer_state_dict(self.model, optimizer, state, options=options)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for name, parameter in zip(_parameters(state), parameters, strict=True):
            if name not in state["state"]:
                optimizer.state.pop(parameter, None)  # torch has made one up, with a step that was never taken

    def _saved_names(self) -> set[str]:
        assert self.model is not None
        left_out: set[str] = getattr(self.lightning_module, "left_out", set)()
        return get_model_state_dict(self.model, options=StateDictOptions(ignore_frozen_params=True)).keys() - left_out

    def _options(self) -> StateDictOptions:
        return StateDictOptions(
            full_state_dict=not self._save_distributed_checkpoint, cpu_offload=True, ignore_frozen_params=True
        )


def _complete(checkpoint: dict[str, Any], target: Path) -> None:
    """All shards are written: add the rest and the mark, and let the folder take its place."""
    part = part_of(target)
    write_flushed(checkpoint, part / _META)
    mark_as_whole(part)
    swap_in(part, target)


def _parameters(state: dict[str, Any]) -> list[Any]:
    """Names or numbers of an optimizer's parameters, group by group."""
    return [name for group in state["param_groups"] for name in group["params"]]


def _renamed(state: dict[str, Any], names: dict[Any, Any]) -> dict[str, Any]:
    """The state of an optimizer with other names, or numbers, of its parameters."""
    return {
        "state": {names[old]: values for old, values in state["state"].items()},
        "param_groups": [
            group | {"params": [names[old] for old in group["params"]]} for group in state["param_groups"]
        ],
    }


if Fsdp2Strategy.strategy_name not in StrategyRegistry:
    StrategyRegistry.register(
        Fsdp2Strategy.strategy_name, Fsdp2Strategy, description=(Fsdp2Strategy.__doc__ or "").splitlines()[0]
    )
