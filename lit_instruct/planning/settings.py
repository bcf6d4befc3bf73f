"""What a stage's configuration says that matters for memory and time, and the run that comes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from lit_instruct.planning.activations import Numerics, Precision
from lit_instruct.planning.architecture import Architecture
from lit_instruct.planning.hardware import Hardware
from lit_instruct.planning.networks import (
    Adapter,
    FrozenDtype,
    Plan,
    ppo_networks,
    trained_network,
)
from lit_instruct.planning.refusal import refuse
from lit_instruct.planning.setup import Lengths, Setup, Stage, Strategy, Text, Work

_RANK = 16  # the default of adapters
_STATE_8BIT = 2 * (1.0 + 4.0 / 256)  # bitsandbytes: both moments, with an fp32 scale for 256 numbers
_RESPONSES = 6.5  # of one prompt in the paper's comparisons, 4 to 9


class Settings(NamedTuple):
    """All that planning reads, in the words of the configuration files.

    Attributes:
        stage: of training (pretrain counts as sft).
        policy: what is trained; the policy of PPO.
        reward_model: PPO's, and its value model's.
        work: of an iteration.
        memory: the plan of PPO's networks.
        adapter: how they learn.
        frozen_dtype: of reference and reward model.
        precision: Lightning's.
        gradient_checkpointing: only inputs of blocks are kept.
        optimizer_bytes: of state a weight of a trained matrix.
        averages: ``WeightEMA`` is among the callbacks.
        rollout_dtype: of the copy that samples, or None.
        rollout: how a sharded policy samples.
        recompute_logprobs: as PPO's option.
        offload_frozen: as PPO's option.
        run_rows: rows of the whole run (PPO: episodes); 0: not known.
    """

    stage: Stage
    policy: Architecture
    reward_model: Architecture
    work: Work
    memory: Plan = "separate"
    adapter: Adapter = Adapter()
    frozen_dtype: FrozenDtype = "float32"
    precision: Precision = "32-true"
    gradient_checkpointing: bool = False
    optimizer_bytes: float = 8.0
    averages: bool = False
    rollout_dtype: str | None = None
    rollout: Literal["gathered", "synced"] = "gathered"
    recompute_logprobs: bool = True
    offload_frozen: bool = False
    run_rows: int = 0

    def setup(self, hardware: Hardware, strategy: Strategy = "sharded") -> Setup:
        """The run on some hardware.

        Args:
            hardware: where.
            strategy: what is spread over devices.

        Returns:
            The setup.
        """
        numerics = Numerics(self.precision, hardware.on_cpu, self.gradient_checkpointing)
        if self.stage == "ppo":
            networks = ppo_networks(
                self.policy,
                self.reward_model,
                plan=self.memory,
                adapter=self.adapter,
                frozen_dtype=self.frozen_dtype,
                parameter=numerics.parameter,
            )
        else:
            name, unembeds = ("policy", True) if self.stage == "sft" else ("reward model", False)
            networks = (
                trained_network(
                    name, self.policy, unembeds=unembeds, adapter=self.adapter, parameter=numerics.parameter
                ),
            )
        return Setup(
            stage=self.stage,
            plan=self.memory,
            networks=networks,
            numerics=numerics,
            work=self.work,
            devices=hardware.devices,
            strategy=strategy,
            optimizer_bytes=self.optimizer_bytes,
            averages=self.averages,
            rollout_bytes=None if self.rollout_dtype is None else {"bfloat16": 2, "int8": 1}[self.rollout_dtype],
            rollout=self.rollout,
            recompute_logprobs=self.recompute_logprobs,
            offload_frozen=self.offload_frozen,
        )


_ROLLOUT_WEIGHTS = "trainer.strategy.init_args.rollout_weights"


class Reader:
    """Takes values out of a configuration and notes which keys it looked at.

    Attributes:
        read: ``key = value`` of each, in order; a default is said to be one.
    """

    def __init__(self, config: Mapping[str, Any]):
        """Read from it.

        Args:
            config: sections ``model``, ``data`` and ``trainer``, as the stage's files have them.
        """
        self._config = config
        self.read: list[str] = []

    def take(self, key: str, default: Any, convert: Callable[[Any], Any] | None = None) -> Any:
        """The value of a dotted key.

        Args:
            key: such as ``model.minibatch_size``.
            default: the stage's own.
            convert: to int or float.

        Raises:
            ConfigError: the value is no number where one is needed.
        """
        value: Any = self._config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        self.read.append(f"{key} = {default if value is None else value}{' (default)' if value is None else ''}")
        if value is None or convert is None:
            return default if value is None else value
        try:
            return convert(value)
        except (TypeError, ValueError):
            return refuse(key, repr(value), "a number", "mend it in the configuration")

    def callback(self, name: str) -> Mapping[str, Any] | None:
        """The arguments of a callback, or None where there is none of that class."""
        trainer = self._config.get("trainer") or {}
        for entry in trainer.get("callbacks") or []:
            if str(entry.get("class_path", "")).endswith(f".{name}"):
                self.read.append(f"trainer.callbacks: {name}")
                found: Mapping[str, Any] = entry.get("init_args") or {}
                return found
        return None


def read_strategy(reader: Reader) -> Strategy:
    """What the configured strategy spreads over devices.

    Args:
        reader: of the configuration.

    Returns:
        ``replicated`` for ddp; ``sharded`` for all others, and where none is named.
    """
    name = _class_name(reader.take("trainer.strategy", "fsdp2"))
    return "replicated" if "ddp" in name.lower() else "sharded"


def _class_name(named: Any) -> str:
    """Of a class that is named by itself, or with its arguments."""
    return str(named.get("class_path", "") if isinstance(named, Mapping) else named)


def read_settings(
    reader: Reader,
    stage: Stage,
    policy: Architecture,
    reward_model: Architecture,
    *,
    prompt_tokens: float | None = None,
    response_tokens: float | None = None,
) -> Settings:
    """What a stage's configuration means for planning.

    Args:
        reader: of the configuration.
        stage: whose it is.
        policy: shape of what is trained.
        reward_model: of PPO's.
        prompt_tokens: mean of the data; None: as long as they may be.
        response_tokens: likewise.

    Returns:
        The settings.

    Raises:
        ConfigError: a value cannot be.
    """
    take = reader.take
    work = (_ppo_work if stage == "ppo" else _supervised_work)(reader, stage, policy, prompt_tokens, response_tokens)
    rank = take("model.adapter.r", _RANK if take("model.adapter", None) else 0, int)
    settings = Settings(
        stage=stage,
        policy=policy,
        reward_model=reward_model,
        work=work,
        adapter=Adapter(rank, _choice(reader, "model.quantization", None, (None, "8bit", "4bit"))),
        precision=_choice(reader, "trainer.precision", "32-true", ("32-true", "bf16-mixed", "bf16-true"), _precision),
        gradient_checkpointing=take("model.gradient_checkpointing", False),
        optimizer_bytes=_STATE_8BIT if _class_name(take("model.optimizer", "Adam")).endswith("8bit") else 8.0,
        averages=reader.callback("WeightEMA") is not None,
    )
    if settings.adapter.quantization and not rank:
        refuse("quantization", "no adapters", "model.adapter.r", "set it, for example --model.adapter.r 16")
    if stage != "ppo":
        return settings
    plans = ("separate", "shared_trunk", "shared_base")
    settings = settings._replace(
        memory=_choice(reader, "model.memory", "separate", plans),
        frozen_dtype=_choice(reader, "model.frozen_dtype", "float32", ("float32", "bfloat16", "8bit", "4bit")),
        rollout_dtype=_choice(reader, "model.rollout_dtype", None, (None, "bfloat16", "int8")),
        recompute_logprobs=take("model.recompute_logprobs", True),
        offload_frozen=take("model.offload_frozen", False),
        run_rows=take("model.episodes", 256_000, int),
        rollout=_choice(reader, _ROLLOUT_WEIGHTS, "gathered", ("gathered", "synced")),
    )
    if settings.memory == "shared_base" and not rank:
        refuse("memory", "shared_base without adapters", "model.adapter.r", "set it, for example --model.adapter.r 16")
    return settings


def _ppo_work(
    reader: Reader, stage: Stage, policy: Architecture, prompt_tokens: float | None, response_tokens: float | None
) -> Work:
    take = reader.take
    response = take("model.max_response_tokens", 1024, int)
    prompt = take("data.max_prompt_tokens", 1024, int)
    room = policy.context - response
    if room <= 0:
        refuse("max_response_tokens", str(response), f"less than the context of {policy.context}", "lower it")
    lengths = _lengths(min(prompt, room), response, prompt_tokens, response_tokens)
    step_rows = take("model.minibatch_size", 64, int)
    return Work(
        rows=take("data.batch_size", 512, int),
        step_rows=step_rows,
        micro_rows=take("model.micro_batch_size", 32, int),
        micro_tokens=take("model.micro_batch_tokens", None, int),
        rollout_rows=take("model.rollout_batch_size", 256, int),
        inner_epochs=take("model.inner_epochs", 1, int),
        lengths=lengths,
        text=_text(reader, policy),
    )


def _supervised_work(
    reader: Reader, stage: Stage, policy: Architecture, prompt_tokens: float | None, response_tokens: float | None
) -> Work:
    take = reader.take
    longest = min(take("data.max_length", None, int) or policy.context, policy.context)
    rows = take("data.batch_size", 64 if stage == "rm" else 32, int)
    # Nothing says where the response begins: half of the longest row is as good as any.
    lengths = _lengths(longest // 2, longest - longest // 2, prompt_tokens, response_tokens)
    return Work(
        rows=rows,
        step_rows=rows,
        micro_rows=max(rows // take("trainer.accumulate_grad_batches", 1, int), 1),
        micro_tokens=take("model.micro_batch_tokens", None, int),
        rollout_rows=0,
        inner_epochs=1,
        lengths=lengths,
        responses=_RESPONSES if stage == "rm" else 1.0,
        text=_text(reader, policy) if stage == "sft" else None,
        logit_tokens=take("model.loss_chunk_tokens", None, int) if stage == "sft" else None,
    )


def _lengths(prompt: int, response: int, prompt_mean: float | None, response_mean: float | None) -> Lengths:
    for name, mean, longest in (
        ("prompt-tokens", prompt_mean, prompt),
        ("response-tokens", response_mean, response),
    ):
        if mean is not None and not 0 < mean <= longest:
            refuse(name, str(mean), f"a mean above 0 and at most {longest}, the longest", "lower it")
    return Lengths(prompt_mean or float(prompt), response_mean or float(response), prompt, response)


def _text(reader: Reader, policy: Architecture) -> Text | None:
    given = reader.callback("PtxMixing")
    if given is None or given.get("coef", 27.8) == 0:
        return None
    chunk = given.get("chunk_tokens") or min(policy.context, 2048)
    adds = given.get("mode", "add") == "add"
    measured = adds and given.get("grad_norms_every", 10) is not None
    return Text(float(given.get("ratio", 8.0)), int(given.get("micro_batch_size", 32)), int(chunk), measured)


def _choice(
    reader: Reader,
    key: str,
    default: Any,
    known: tuple[Any, ...],
    translate: Callable[[Any], Any] = lambda value: value,
) -> Any:
    value = translate(reader.take(key, default))
    if value not in known:
        refuse(key, repr(value), f"one of {', '.join(map(str, known))}", "plan with one of these")
    return value


def _precision(value: Any) -> Any:
    """Other spellings that Lightning knows; fp16 takes the bytes of bf16."""
    names = {
        "32": "32-true",
        "bf16": "bf16-mixed",
        "16": "bf16-mixed",
        "16-mixed": "bf16-mixed",
        "16-true": "bf16-true",
    }
    return names.get(str(value), value)
