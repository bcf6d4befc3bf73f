"""Stage three: reinforcement learning against the reward model. One training step is one iteration."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from lit_instruct.functional import (
    clipped_policy_loss,
    clipped_value_loss,
    linear_warmup,
)
from lit_instruct.models.adapters import (
    LoraSettings,
    add_adapter,
    digest_of,
    make_base,
)
from lit_instruct.models.backbone import (
    Base,
    check_vocabulary,
    context_length,
    fit_to_tokenizer,
    load_language_model,
)
from lit_instruct.models.frozen import FrozenDtype, make_reference, narrow
from lit_instruct.models.generation import stream_responses
from lit_instruct.models.recompute import recompute_activations
from lit_instruct.models.rollout_copy import refresh, rollout_copy
from lit_instruct.models.sampling import Finished
from lit_instruct.models.scalar_head import ScalarModel
from lit_instruct.models.sharding import buffers_to, is_sharded, sampling_weights, whole
from lit_instruct.models.tokenizer import padding_id
from lit_instruct.models.value_model import Memory, make_value_model, policy_and_values
from lit_instruct.modules.checkpoints import StageCheckpoint
from lit_instruct.modules.fsdp2 import Fsdp2Strategy
from lit_instruct.modules.guards import check_adapter, check_choice, check_memory, check_ranges, settle_tokenizer
from lit_instruct.modules.optimizers import OptimizerFactory, make_optimizer, paper_adam, per_group_schedule
from lit_instruct.modules.step_guard import StepGuard
from lit_instruct.modules.strategies import (
    exact_share,
    gather_rows,
    max_over_ranks,
    moments_over_ranks,
    numbers_over_ranks,
    rank,
    rows_before,
    sum_over_ranks,
    world_size,
)
from lit_instruct.modules.train_log import RunningMetrics
from lit_instruct.modules.updates import Backward, NoSync, Step, summarise, tell, update
from lit_instruct.rewards import RewardModelScorer, Scorer
from lit_instruct.rollouts import BehaviourGap, assess, collect, describe, minibatches
from lit_instruct.types import ConfigError, Experience, Metrics, PromptBatch, Responses, Rollout

_VALIDATION = 1 << 40  # validation draws from streams that no training iteration reaches, the same ones every time


class PPOModule(StageCheckpoint):
    """PPO with a KL penalty against a frozen reference (Ouyang et al. 2022, equation 2 without its last term).

    The last term, pretraining gradients, is added by the callback ``PtxMixing``. One ``training_step`` gets prompts and
    is one iteration: sample, score, advantages, then ``inner_epochs`` passes of minibatch updates. Nothing of a rollout
    survives the step.
    """

    stage = "ppo"
    handed_over = "policy"
    base_argument = None
    frozen_networks = ("reference", "scorer")

    def __init__(
        self,
        policy: Base,
        reward_model: str | None = None,
        reference: Base | None = None,
        value_model: str | None = None,
        reward: Scorer | None = None,
        tokenizer: str | None = None,
        template: str = "auto",
        episodes: int = 256_000,
        minibatch_size: int = 64,
        micro_batch_size: int = 32,
        micro_batch_tokens: int | None = None,
        rollout_batch_size: int = 256,
        rollout_dtype: Literal["bfloat16", "int8"] | None = None,
        recompute_logprobs: bool = True,
        memory: Memory = "separate",
        adapter: LoraSettings | None = None,
        quantization: Literal["8bit", "4bit"] | None = None,
        frozen_dtype: FrozenDtype = "float32",
        offload_frozen: bool = False,
        gradient_checkpointing: bool = False,
        inner_epochs: int = 1,
        max_response_tokens: int = 1024,
        temperature: float = 1.0,
        kl_coef: float = 0.02,
        discount: float = 1.0,
        gae_lambda: float = 0.95,
        clip_range: float = 0.2,
        value_clip_range: float | None = 0.2,
        value_coef: float | None = None,
        whiten_advantages: bool = True,
        whiten_rewards: bool = False,
        missing_eos: Literal["none", "replace", "subtract"] = "replace",
        missing_eos_value: float = -1.0,
        learning_rate: float = 5e-6,
        value_learning_rate: float = 9e-6,
        warmup_iterations: int = 10,
        value_warmup_iterations: int = 0,
        max_grad_norm: float = 1.0,
        max_nonfinite_steps: int = 10,
        optimizer: OptimizerFactory = paper_adam,
        seed: int = 1,
    ):
        """Load the networks: policy and reference from one model, value model and reward model from the other.

        Args:
            policy: the model to improve: checkpoint of the SFT stage, hub name, folder, GGUF file or configuration.
            reward_model: checkpoint of the reward stage, which scores responses, or the folder into which it was
                exported.
            reference: the frozen model that the KL penalty holds on to; default: the policy as it starts.
            value_model: null: starts as a copy of the reward model, with head and bias, or, without a reward_model, as
                a copy of the policy with a fresh head; else a model to start from.
            reward: where scores come from instead of a reward_model: a class of lit_instruct.rewards (a foreign
                classifier, a Python function, an HTTP endpoint, a weighted sum).
            tokenizer: hub name, folder or checkpoint; default: from beside the policy.
            template: how prompts become text: auto, plain, verbatim or the path of a Jinja file.
            episodes: the run ends with the iteration that reaches this number of responses.
            minibatch_size: responses an optimizer step, over all ranks.
            micro_batch_size: most rows of a forward and backward pass, on each device; changes memory, not numbers.
            micro_batch_tokens: most tokens of such a pass (prompts and responses, with the padding of models that need
                it), on each device; null: any number. Changes memory, not numbers.
            rollout_batch_size: rows decoded together, on each device; as one finishes the next prompt takes its place.
                Changes memory, not responses. Where there are more prompts than that, finished responses are scored
                while the others wait.
            rollout_dtype: sample with a copy of the policy in lower precision: bfloat16, or int8 (CPU only); null: with
                the policy itself. How far the copy is off is logged as rollout/behaviour_gap.
            recompute_logprobs: the policy reads its responses anew for the log-probabilities that PPO's ratio starts
                from. False saves that pass and takes the sampler's, which are rounded otherwise: the ratio is not quite
                1 at first.
            memory: separate: four networks. shared_trunk: the value model is a head on the policy's trunk (one network
                and one pass less, but the value loss moves the policy). shared_base: one frozen base serves all four:
                it is the reference, and policy, value and reward model are adapters on it; needs adapter, and a reward
                model that was trained with one on the model that policy names.
            adapter: train LoRA adapters (and the value head) instead of all weights, for example --model.adapter.r 16
                (extra peft). They want about 10 times the learning rate. Checkpoints hold them alone. Null: all
                weights.
            quantization: of the frozen bases below the adapters: 8bit or 4bit (QLoRA); extra quant. Null: fp32. A
                reference that is not named is the policy's base and quantised with it.
            frozen_dtype: of a reference and of reward models with weights of their own; bfloat16 takes half the memory,
                8bit and 4bit (extra quant) a quarter and less; the KL is then not exactly 0 before the first update.
            offload_frozen: keep reference and reward models on the CPU while policy and value model are updated.
            gradient_checkpointing: keep only the input of each block for the backward pass and work out the rest again:
                less memory, about a third more time.
            inner_epochs: passes over each rollout.
            max_response_tokens: the most tokens that a response may have.
            temperature: of sampling; logits are divided by it in all networks and passes alike.
            kl_coef: reward lost for one nat of KL to the reference.
            discount: of later rewards.
            gae_lambda: 1 uses the whole return, less trusts the value model more.
            clip_range: the probability ratio earns nothing beyond 1 plus or minus this.
            value_clip_range: how far a value may move from its old one, in units of reward; null: no clipping.
            value_coef: weight of the value loss; default: 1, and 0.1 where the trunk is shared.
            whiten_advantages: mean 0 and variance 1 over the tokens of the whole rollout, all ranks.
            whiten_rewards: variance 1 with the mean kept, before the advantages.
            missing_eos: rule for responses cut off at the limit: none, replace (the score becomes missing_eos_value)
                or subtract (its size is taken off the score).
            missing_eos_value: see missing_eos.
            learning_rate: the policy's peak rate, after the warm-up.
            value_learning_rate: the value model's rate, constant.
            warmup_iterations: iterations over which the policy's rate rises from a tenth of its peak.
            value_warmup_iterations: at first, for so many iterations, only the value model learns (with a shared trunk
                its head); useful where it does not start from the reward model. They count as episodes.
            max_grad_norm: each network's gradient is clipped to this norm by itself.
            max_nonfinite_steps: an optimizer step whose gradients hold NaN or infinity is left out; that many in a
                row end the run.
            optimizer: makes the optimizer from parameter groups.
            seed: key of every random stream (responses, minibatches).
        """
        super().__init__()
        check_choice("missing_eos", missing_eos, ("none", "replace", "subtract"))
        check_adapter(adapter, quantization, policy=policy)
        check_memory(memory, adapter, quantization, frozen_dtype, value_model, reference, rollout_dtype, offload_frozen)
        if rollout_dtype is not None:
            check_choice("rollout_dtype", rollout_dtype, ("bfloat16", "int8"))
        check_ranges(
            kl_coef=(kl_coef, 0, None),
            discount=(discount, 0, 1),
            gae_lambda=(gae_lambda, 0, 1),
            clip_range=(clip_range, 0, None),
            value_clip_range=(value_clip_range, 0, None),
            value_coef=(value_coef, 0, None),
            learning_rate=(learning_rate, 0, None),
            value_learning_rate=(value_learning_rate, 0, None),
            warmup_iterations=(warmup_iterations, 0, None),
            value_warmup_iterations=(value_warmup_iterations, 0, None),
            max_nonfinite_steps=(max_nonfinite_steps, 1, None),
            max_grad_norm=(max_grad_norm, 0, None),
            seed=(seed, 0, None),
        )
        for name, value in (
            ("episodes", episodes),
            ("minibatch_size", minibatch_size),
            ("micro_batch_size", micro_batch_size),
            ("micro_batch_tokens", 1 if micro_batch_tokens is None else micro_batch_tokens),
            ("rollout_batch_size", rollout_batch_size),
            ("inner_epochs", inner_epochs),
            ("max_response_tokens", max_response_tokens),
            ("temperature", temperature),
        ):
            if not 0 < value < float("inf"):
                raise ConfigError(f"{name}: got {value}; need more than 0.")
        if (reward_model is None) == (reward is None):
            got = "neither" if reward is None else "both"
            raise ConfigError(
                f"reward_model, reward: got {got}; need one of them. Give reward_model the .ckpt of a reward stage, or "
                "reward a class of lit_instruct.rewards."
            )
        self.save_hyperparameters(ignore=["optimizer", "reward", "adapter"])
        self.automatic_optimization = False
        self.tokenizer = settle_tokenizer(policy, tokenizer, template)
        self.policy = load_language_model(fit_to_tokenizer(policy, self.tokenizer))
        check_vocabulary("policy", self.policy, self.tokenizer)
        if adapter is not None:
            self.policy = make_base(self.policy, source=str(policy), quantization=quantization)
        self.scorer: Scorer = reward or RewardModelScorer(
            str(reward_model), batch_rows=micro_batch_size, policy=self.policy if memory == "shared_base" else None
        )
        self.scorer.check(self.tokenizer)
        self.scorer.eval().requires_grad_(False)
        source = None if reference is None else fit_to_tokenizer(reference, self.tokenizer)
        self.reference = narrow(make_reference(source, policy=self.policy, memory=memory), frozen_dtype)
        self.value_model = make_value_model(
            value_model,
            policy=self.policy,
            reward_model=self.reward_model,
            tokenizer=self.tokenizer,
            memory=memory,
            adapter=adapter,
            quantization=quantization,
        )
        if adapter is not None:
            add_adapter(self.policy, adapter)
        for part in self.scorer.modules():
            if isinstance(part, ScalarModel):
                part.trunk = narrow(part.trunk, frozen_dtype)  # not the head: scores are compared at the third decimal
        if gradient_checkpointing:
            recompute_activations(self.policy)
            if isinstance(self.value_model, ScalarModel):
                recompute_activations(self.value_model.trunk)
        self._held_out = RunningMetrics()
        self._held_out_rows = 0  # measured so far, on all ranks
        self._gap = BehaviourGap()
        self._rounded: tuple[nn.Module, ...] = ()  # the copy that samples; in a tuple it is no part of this module
        self.value_coef = value_coef if value_coef is not None else 0.1 if memory == "shared_trunk" else 1.0
        self._check_room(max_response_tokens)
        self.make_optimizer = optimizer
        self.step_guard = StepGuard(max_nonfinite_steps)
        self.kl_coef = kl_coef
        self.minibatch_size = minibatch_size
        self.iterations_done = 0
        self.episodes_done = 0
        self._frozen_digests: dict[str, str] = {}
        self.last_grad_norms: Metrics = {}

    @property
    def reward_model(self) -> ScalarModel | None:
        """The frozen reward model, if scores come from one alone."""
        return self.scorer.model if isinstance(self.scorer, RewardModelScorer) else None

    @property
    def warms_up_value_model(self) -> bool:
        """Whether only the value model learns in this iteration."""
        return self.iterations_done < self.hparams["value_warmup_iterations"]

    @property
    def update_rows(self) -> int:
        """Episodes of one optimizer step, over all ranks."""
        return self.minibatch_size

    @property
    def sample_token_limit(self) -> int | None:
        """How many tokens a prompt may have, so that the longest response still fits into the context."""
        shortest = self._shortest_context()
        return None if shortest is None else shortest[0] - self.hparams["max_response_tokens"]

    def _shortest_context(self) -> tuple[int, str] | None:
        """The context that all networks share, and whose it is; each of them reads prompt and response."""
        networks = [("policy", self.policy), ("reference", self.reference)]
        networks += [("reward_model", part) for part in self.scorer.modules() if isinstance(part, ScalarModel)]
        networks += [("value_model", self.value_model)] if isinstance(self.value_model, ScalarModel) else []
        limits = [(limit, name) for name, net in networks if (limit := context_length(net.config)) is not None]
        return min(limits, default=None)

    def _check_room(self, max_response_tokens: int) -> None:
        shortest = self._shortest_context()
        if shortest is not None and max_response_tokens >= shortest[0]:
            raise ConfigError(
                f"max_response_tokens: got {max_response_tokens}, but prompt and response together must fit into the "
                f"{shortest[1]}'s context of {shortest[0]} tokens; lower it."
            )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """One optimizer, two groups: the policy warms up over iterations, the value model's rate is constant."""
        optimizer = make_optimizer(
            self.make_optimizer,
            [
                (self.policy, self.hparams["learning_rate"]),
                (self.value_model, self.hparams["value_learning_rate"]),
            ],
            self._trainer,
        )
        warmup, standing = self.hparams["warmup_iterations"], self.hparams["value_warmup_iterations"]
        schedule = per_group_schedule(
            optimizer, [lambda done: linear_warmup(max(done - standing, 0), warmup), lambda done: 1.0]
        )
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def rollout(
        self,
        batch: PromptBatch,
        *,
        iteration: int | None = None,
        first_row: int = 0,
        hooks: Sequence[Any] = (),
        temperature: float | None = None,
    ) -> Rollout:
        """Sample a response for each prompt and let all networks read it.

        Args:
            batch: this rank's prompts.
            iteration: key of the random streams; default: the current iteration.
            first_row: number of the first prompt of all ranks, the other key.
            hooks: those with ``on_rollout_progress(module, finished, wanted)`` are told how sampling gets on.
            temperature: default: the module's.

        Returns:
            The rollout, without gradients.
        """
        rows = len(batch.prompt_ids_BP)
        first_row += rows_before(rows, batch.prompt_ids_BP.device)
        temperature = self.hparams["temperature"] if temperature is None else temperature

        def progress(finished: int, wanted: int) -> None:
            tell(hooks, "on_rollout_progress", self, finished, wanted)

        slots = self.hparams["rollout_batch_size"]
        sharded = is_sharded(self.policy)
        self._gap = BehaviourGap()
        blocks: Iterable[Finished] = stream_responses(
            self.policy if self.hparams["rollout_dtype"] is None else self._refreshed_copy(),
            batch,
            max_tokens=self.hparams["max_response_tokens"],
            eos_ids=[self.tokenizer.eos_token_id],
            pad_id=padding_id(self.tokenizer),
            temperature=temperature,
            rows=range(first_row, first_row + rows),
            seed=self.hparams["seed"],
            iteration=self.iterations_done if iteration is None else iteration,
            batch_rows=slots,
            block_rows=slots if rows > slots and not sharded else None,
            keep_logprobs=self.hparams["rollout_dtype"] is not None or not self.hparams["recompute_logprobs"],
            progress=progress,
        )
        if sharded:  # the networks that score run on all ranks together, so none may begin before all have sampled
            copied = self.hparams["rollout_dtype"] is not None
            with nullcontext() if copied else self.sampling_weights():
                blocks = list(blocks)
        with self._frozen_at_work():
            return collect(
                batch,
                blocks,
                policy=self.policy,
                reference=self.reference,
                value_model=self.value_model,
                scorer=partial(self.scorer, tokenizer=self.tokenizer),
                temperature=temperature,
                missing_eos=self.hparams["missing_eos"],
                missing_eos_value=self.hparams["missing_eos_value"],
                micro_batch_size=self.hparams["micro_batch_size"],
                micro_batch_tokens=self.hparams["micro_batch_tokens"],
                recompute_logprobs=self.hparams["recompute_logprobs"],
                gap=self._gap,
            )

    @contextmanager
    def _frozen_at_work(self) -> Iterator[None]:
        """Reference and reward models lie on the device while they read, and with ``offload_frozen`` only then."""
        if not self.hparams["offload_frozen"]:
            yield
            return
        networks: tuple[nn.Module, ...] = (self.reference, self.scorer)
        with torch.inference_mode(False):  # what is moved in a validation serves a training too
            for network in networks:
                network.to(self.device)
        try:
            yield
        finally:
            with torch.inference_mode(False):
                for network in networks:
                    network.to("cpu")
                    buffers_to(network, self.device)  # DDP sends the buffers of all networks before each step

    @torch.inference_mode(False)  # a validation may be the first to need it, and a training brings it up to date
    def _refreshed_copy(self) -> nn.Module:
        """The rounded copy of the policy, as it is now."""
        if self._rounded:
            with sampling_weights(self.policy, "gathered"):
                refresh(self._rounded[0].to(self.device), self.policy)
        else:
            strategy = self._strategy()  # before the policy is sharded it has not been moved yet
            device = self.device if strategy is None else strategy.root_device
            self._rounded = (rollout_copy(self.policy, self.hparams["rollout_dtype"], device),)
        return self._rounded[0]

    def networks(self) -> list[nn.Module]:
        """The two that learn and the two that are frozen; a foreign source of scores stays whole on each process."""
        own = [part for part in self.scorer.modules() if isinstance(part, ScalarModel)]
        return [self.policy, self.value_model, self.reference, *own]

    def configure_model(self) -> None:
        """Before the networks are cut: what needs them whole.

        Raises:
            ConfigError: the strategy is fsdp, which allows no backward pass inside ``training_step``; or fsdp2 with an
                offload of its own beside ``offload_frozen``.
        """
        if isinstance(self._strategy(), FSDPStrategy):
            raise ConfigError(
                "trainer.strategy: got fsdp (FSDP1), under which no backward pass can be made inside a training step, "
                "and PPO's iteration is one; need fsdp2, which shards as well. Do: --trainer.strategy fsdp2 or "
                "--config strategy/fsdp.yaml."
            )
        if isinstance(strategy := self._strategy(), Fsdp2Strategy) and not is_sharded(self.policy):
            if strategy.cpu_offload and self.hparams["offload_frozen"]:
                raise ConfigError(
                    "offload_frozen: got true with the strategy's cpu_offload, which keeps the shards of all networks "
                    "on the CPU already; need one of them. Do: leave offload_frozen out."
                )
            for name in self.frozen_networks:
                self._frozen_digest(name)
            if self.hparams["rollout_dtype"] is not None:
                self._refreshed_copy()
        super().configure_model()

    def loss(self, minibatch: Experience, *, denominator: Tensor | float | None = None) -> tuple[Tensor, Metrics]:
        """Clipped policy loss plus weighted value loss of some rows.

        Args:
            minibatch: rows of an experience.
            denominator: None = these rows' response tokens; else the response tokens of the whole minibatch.

        Returns:
            The loss (fp32) and metrics ``policy/...`` and ``value/...``.
        """
        rollout, mask_BR = minibatch.rollout, minibatch.rollout.response_mask_BR
        prompts, responses = PromptBatch(*rollout[:2]), Responses(*rollout[2:5])
        logprobs_BR, moments, values_BR = policy_and_values(
            self.policy,
            self.value_model,
            prompts,
            responses,
            temperature=self.hparams["temperature"],
            surprise=True,
            train_policy=not self.warms_up_value_model,
        )
        assert moments is not None
        policy_loss, policy_metrics = clipped_policy_loss(
            logprobs_BR,
            rollout.old_logprobs_BR,
            minibatch.advantages_BR,
            mask_BR,
            clip_range=self.hparams["clip_range"],
            denominator=denominator,
        )
        value_loss, value_metrics = clipped_value_loss(
            values_BR,
            rollout.old_values_BR,
            minibatch.returns_BR,
            mask_BR,
            clip_range=self.hparams["value_clip_range"],
            denominator=denominator,
        )
        count = mask_BR.sum() if denominator is None else denominator
        gap_BR = -rollout.old_logprobs_BR - moments.entropy  # zero at padding, as both are
        metrics = {
            **{f"policy/{name}": value for name, value in policy_metrics.items()},
            **{f"value/{name}": value for name, value in value_metrics.items()},
            "policy/loss": policy_loss.detach(),
            "policy/entropy": moments.entropy.sum() / count,
            "policy/surprise_gap": gap_BR.sum() / count,
            "policy/surprise_variation": (gap_BR.square() + 2.0 * moments.variance).sum() / (3.0 * count),
            "value/loss": value_loss.detach(),
        }
        weighted = self.value_coef * value_loss
        return weighted if self.warms_up_value_model else policy_loss + weighted, metrics

    def iteration(
        self,
        batch: PromptBatch,
        *,
        hooks: Sequence[Any] = (),
        backward: Backward | None = None,
        step: Step | None = None,
        no_sync: NoSync = nullcontext,
    ) -> Metrics:
        """One iteration: rollout, experience, updates. Works without a Trainer.

        Args:
            batch: this rank's prompts.
            hooks: callbacks with any of ``on_experience``, ``auxiliary_losses``, ``measures_gradients``,
                ``after_update``, ``after_iteration``, ``on_rollout_progress``.
            backward: takes a loss; default: Lightning's ``manual_backward``.
            step: clips (:meth:`clip_each_network`), steps the optimizer and clears the gradients; default: Lightning's.
            no_sync: context in which gradients are only accumulated on this rank.

        Returns:
            Metrics of the iteration, names without ``ppo/train/``.

        Raises:
            ConfigError: the number of prompts over all ranks is no multiple of ``minibatch_size``.
        """
        backward, step = backward or self.manual_backward, step or self._optimizer_step
        rows = len(batch.prompt_ids_BP)
        count = self._minibatch_count(rows * world_size())
        started = time.perf_counter()
        rollout = self.rollout(batch, hooks=hooks)
        sampled = time.perf_counter()
        experience = assess(
            rollout,
            kl_coef=self.kl_coef,
            discount=self.hparams["discount"],
            gae_lambda=self.hparams["gae_lambda"],
            whiten_advantages=self.hparams["whiten_advantages"],
            whiten_rewards=self.hparams["whiten_rewards"],
            reduce=moments_over_ranks,
        )
        tell(hooks, "on_experience", self, rollout, experience)
        metrics = describe(_of_all_ranks(experience), kl_coef=self.kl_coef) | self._behaviour_gap()
        updates: list[Metrics] = []
        first_tokens = torch.zeros((), device=batch.prompt_ids_BP.device)
        skipped = self.step_guard.skipped
        for epoch in range(self.hparams["inner_epochs"]):
            dealt = minibatches(
                experience,
                count=count,
                seed=self.hparams["seed"],
                iteration=self.iterations_done,
                epoch=epoch,
                first_row=rank() * rows,
            )
            for minibatch in dealt:
                if not updates:
                    first_tokens = sum_over_ranks(minibatch.rollout.response_mask_BR.sum())
                updates.append(update(self, minibatch, hooks, backward, step, no_sync))
                tell(hooks, "after_update", self, updates[-1])
        self.iterations_done += 1
        self.episodes_done += rows * world_size()
        metrics |= summarise(updates, first_tokens)
        metrics["skipped_steps"] = self.step_guard.skipped - skipped
        metrics |= {"time/rollout": sampled - started, "time/update": time.perf_counter() - sampled}
        metrics |= {"episodes": self.episodes_done, "iteration": self.iterations_done}
        tell(hooks, "after_iteration", self, metrics)
        return metrics

    def _behaviour_gap(self) -> Metrics:
        """Of the last rollout, over all ranks; nothing where it was not measured."""
        tokens, total = numbers_over_ranks(self._gap.tokens, self._gap.total, device=self.device)
        if not tokens:
            return {}
        largest = max_over_ranks(self._gap.largest, self.device)
        return {"rollout/behaviour_gap": total / tokens, "rollout/behaviour_gap_max": largest}

    def clip_each_network(self) -> Metrics:
        """Clip policy and value model, each by its own norm; leave the step out if one of them is not finite.

        Returns:
            Their norms before clipping, ``policy/grad_norm`` and ``value/grad_norm``.

        Raises:
            NonFiniteError: too many steps in a row had no finite gradient.
        """
        limit, networks = self.hparams["max_grad_norm"], [self.policy, self.value_model]
        # To one device: without gradients (the policy, while only the value model learns) a norm is a 0 on the CPU.
        norms = [whole(nn.utils.clip_grad_norm_(network.parameters(), limit)).to(self.device) for network in networks]
        self.last_grad_norms = dict(zip(("policy/grad_norm", "value/grad_norm"), norms, strict=True))
        self.step_guard.check(networks, norms)
        return self.last_grad_norms

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """One iteration under the Trainer."""
        rates = [group["lr"] for group in self.optimizers().param_groups]  # type: ignore[union-attr]
        hooks = list(getattr(self.trainer, "callbacks", []))
        metrics = self.iteration(batch, hooks=hooks, no_sync=self._no_sync)
        self.lr_schedulers().step()  # type: ignore[union-attr]
        metrics |= {"lr/policy": rates[0], "lr/value": rates[1]}
        for name, value in metrics.items():
            shown = name in ("objective/score", "objective/kl")
            self.log(f"ppo/train/{name}", float(value), prog_bar=shown, sync_dist=world_size() > 1)
        self.log("step", float(self.iterations_done))  # the x-axis of the logger: iterations, not batches of an epoch
        if self.episodes_done >= self.hparams["episodes"]:
            self.trainer.should_stop = True

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip here and not after the backward pass: in fp16 gradients are unscaled only now."""
        self.clip_each_network()

    def on_fit_start(self) -> None:
        """Refuse sizes that do not divide, and columns that are missing, before anything is sampled."""
        super().on_fit_start()
        data = getattr(self.trainer, "datamodule", None)
        batch_size, columns = getattr(data, "batch_size", None), getattr(data, "columns", None)
        if columns is not None:
            self.scorer.check_columns(columns)
        if batch_size is not None:
            self._minibatch_count(batch_size)

    def on_train_start(self) -> None:
        """Leave a finished run as it is."""
        if self.episodes_done >= self.hparams["episodes"]:
            self.trainer.should_stop = True
        super().on_train_start()

    def validation_rollout(self, batch: PromptBatch, first_row: int = 0) -> Rollout:
        """Samples for held-out prompts, validation or test, from the same random streams every time.

        Args:
            batch: prompts.
            first_row: which of the held-out prompts the first of all ranks is. Streams go by prompt and not by batch:
                how many prompts a batch has depends on the number of processes.

        Returns:
            The rollout.
        """
        return self.rollout(batch, iteration=_VALIDATION, first_row=first_row)

    def on_validation_epoch_start(self) -> None:
        """Begin with nothing, also after a validation that was broken off."""
        self._held_out.clear()
        self._held_out_rows = 0

    def on_test_epoch_start(self) -> None:
        """As before a validation."""
        self.on_validation_epoch_start()

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Score and KL on held-out prompts."""
        self._measure(batch)

    def test_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """As validation, on the test prompts; from the same random streams."""
        self._measure(batch)

    def on_validation_epoch_end(self) -> None:
        """Log them over all prompts of all batches and ranks."""
        self._log_held_out("val")

    def on_test_epoch_end(self) -> None:
        """As after validation."""
        self._log_held_out("test")

    def _measure(self, batch: PromptBatch) -> None:
        rollout = self.validation_rollout(batch, self._held_out_rows)
        described = describe(
            assess(rollout, kl_coef=self.kl_coef, discount=1.0, gae_lambda=1.0, whiten_advantages=False),
            kl_coef=self.kl_coef,
        )
        names = ("objective/score", "objective/kl", "rollout/len_mean", "rollout/eos_rate")
        rows = torch.tensor(len(rollout.scores_B), device=rollout.scores_B.device)
        self._held_out_rows += int(sum_over_ranks(rows))
        self._held_out.add(rows, {name: torch.as_tensor(described[name], device=rows.device) for name in names})

    def _log_held_out(self, split: str) -> None:
        # The x-axis of training: without it Lightning takes its own count, which is one behind.
        numbers = {"step": float(self.iterations_done)}
        numbers |= {f"ppo/{split}/{name}": value for name, value in self._held_out.means().items()}
        for name, value in numbers.items():
            # Every rank has the number of all ranks; sync_dist only tells Lightning that this was thought of.
            self.log(name, value, sync_dist=world_size() > 1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the counters, the KL coefficient, and which frozen networks the run used (not their weights)."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["ppo"] = {
            "iterations_done": self.iterations_done,
            "episodes_done": self.episodes_done,
            "kl_coef": self.kl_coef,
            "frozen": {name: {"sha256": self._frozen_digest(name)} for name in self.frozen_networks},
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the counters up again; refuse to go on with another reference or reward model.

        Raises:
            ConfigError: a frozen network is not the one that the run began with.
        """
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint["ppo"]
        for name, known in saved["frozen"].items():
            if self._frozen_digest(name) != known["sha256"]:
                said = ("reward" if self.reward_model is None else "reward_model") if name == "scorer" else name
                raise ConfigError(
                    f"{said}: it is not the one that this run began with, so it would go on towards another "
                    "goal. Give the same one as then, or start a new run."
                )
        self.iterations_done = saved["iterations_done"]
        self.episodes_done = saved["episodes_done"]
        self.kl_coef = saved["kl_coef"]

    def _frozen_digest(self, name: str) -> str:
        if name not in self._frozen_digests:
            network = getattr(self, name)
            also = network.identity() if isinstance(network, Scorer) else ""
            self._frozen_digests[name] = digest_of(network, also)
        return self._frozen_digests[name]

    def _minibatch_count(self, rows: int) -> int:
        exact_share(self.minibatch_size, "minibatch_size")
        if rows % self.minibatch_size:
            raise ConfigError(
                f"minibatch_size: got {self.minibatch_size} for {rows} prompts an iteration; the prompts "
                "(data.batch_size) must be a multiple of it. Do: change one of the two."
            )
        return rows // self.minibatch_size

    def _optimizer_step(self) -> None:
        optimizer = self.optimizers()
        optimizer.step()  # type: ignore[union-attr]
        optimizer.zero_grad()  # type: ignore[union-attr]

    def _no_sync(self) -> AbstractContextManager[Any]:
        no_sync = getattr(self.trainer.strategy.model, "no_sync", None)
        return nullcontext() if no_sync is None else no_sync()


def _of_all_ranks(experience: Experience) -> Experience:
    """All rows, so that what is said about them does not depend on the number of processes."""
    rollout, *rest = experience
    fields = zip(rollout, Rollout._fields, strict=True)
    gathered = Rollout(*(gather_rows(x, left=name.startswith("prompt")) for x, name in fields))
    return Experience(gathered, *(gather_rows(x) for x in rest))
