"""Stage three: reinforcement learning against the reward model. One training step is one iteration."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from lit_instruct.functional import (
    clipped_policy_loss,
    clipped_value_loss,
    linear_warmup,
)
from lit_instruct.models.backbone import Base, context_length, fit_to_tokenizer, load_language_model
from lit_instruct.models.forward import response_logprobs, response_values
from lit_instruct.models.generation import sample_responses
from lit_instruct.models.scalar_head import ScalarModel
from lit_instruct.models.tokenizer import load_tokenizer, padding_id
from lit_instruct.modules.checkpoints import StageCheckpoint
from lit_instruct.modules.guards import check_choice, check_ranges, check_reward_model, digest_of, tokenizer_source
from lit_instruct.modules.optimizers import OptimizerFactory, paper_adam, per_group_schedule
from lit_instruct.modules.strategies import (
    exact_share,
    moments_over_ranks,
    rank,
    rows_before,
    sum_over_ranks,
    world_size,
)
from lit_instruct.rewards import RewardModelScorer, Scorer
from lit_instruct.rollouts import assess, collect, describe, minibatches, select
from lit_instruct.types import ConfigError, Experience, Metrics, PromptBatch, Responses, Rollout

Backward = Callable[[Tensor], Any]
Step = Callable[[], Any]

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
    frozen_networks = ("reference", "reward_model")

    def __init__(
        self,
        policy: Base,
        reward_model: str,
        reference: Base | None = None,
        tokenizer: str | None = None,
        template: str = "auto",
        episodes: int = 256_000,
        minibatch_size: int = 64,
        micro_batch_size: int = 32,
        rollout_batch_size: int = 256,
        inner_epochs: int = 1,
        max_response_tokens: int = 1024,
        temperature: float = 1.0,
        kl_coef: float = 0.02,
        discount: float = 1.0,
        gae_lambda: float = 0.95,
        clip_range: float = 0.2,
        value_clip_range: float | None = 0.2,
        value_coef: float = 1.0,
        whiten_advantages: bool = True,
        whiten_rewards: bool = False,
        missing_eos: Literal["none", "replace", "subtract"] = "replace",
        missing_eos_value: float = -1.0,
        learning_rate: float = 5e-6,
        value_learning_rate: float = 9e-6,
        warmup_iterations: int = 10,
        max_grad_norm: float = 1.0,
        optimizer: OptimizerFactory = paper_adam,
        seed: int = 1,
    ):
        """Load the four networks: policy and reference from one model, value model and reward model from the other.

        Args:
            policy: the model to improve: checkpoint of the SFT stage, hub name, folder, GGUF file or configuration.
            reward_model: checkpoint of the reward stage; the value model starts as its copy, with head and bias.
            reference: the frozen model that the KL penalty holds on to; default: the policy as it starts.
            tokenizer: hub name, folder or checkpoint; default: from beside the policy.
            template: how prompts become text: auto, plain, verbatim or the path of a Jinja file.
            episodes: the run ends with the iteration that reaches this number of responses.
            minibatch_size: responses an optimizer step, over all ranks.
            micro_batch_size: rows a forward and backward pass, on each device; changes memory, not numbers.
            rollout_batch_size: rows decoded together, on each device; changes memory, not responses.
            inner_epochs: passes over each rollout.
            max_response_tokens: the most tokens that a response may have.
            temperature: of sampling; logits are divided by it in all networks and passes alike.
            kl_coef: reward lost for one nat of KL to the reference.
            discount: of later rewards.
            gae_lambda: 1 uses the whole return, less trusts the value model more.
            clip_range: the probability ratio earns nothing beyond 1 plus or minus this.
            value_clip_range: how far a value may move from its old one, in units of reward; null: no clipping.
            value_coef: weight of the value loss.
            whiten_advantages: mean 0 and variance 1 over the tokens of the whole rollout, all ranks.
            whiten_rewards: variance 1 with the mean kept, before the advantages.
            missing_eos: rule for responses cut off at the limit: none, replace (the score becomes missing_eos_value)
                or subtract (its size is taken off the score).
            missing_eos_value: see missing_eos.
            learning_rate: the policy's peak rate, after the warm-up.
            value_learning_rate: the value model's rate, constant.
            warmup_iterations: iterations over which the policy's rate rises from a tenth of its peak.
            max_grad_norm: each network's gradient is clipped to this norm by itself.
            optimizer: makes the optimizer from parameter groups.
            seed: key of every random stream (responses, minibatches).
        """
        super().__init__()
        check_choice("missing_eos", missing_eos, ("none", "replace", "subtract"))
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
            max_grad_norm=(max_grad_norm, 0, None),
            seed=(seed, 0, None),
        )
        for name, value in (
            ("episodes", episodes),
            ("minibatch_size", minibatch_size),
            ("micro_batch_size", micro_batch_size),
            ("rollout_batch_size", rollout_batch_size),
            ("inner_epochs", inner_epochs),
            ("max_response_tokens", max_response_tokens),
            ("temperature", temperature),
        ):
            if value <= 0:
                raise ConfigError(f"{name}: got {value}; need more than 0.")
        self.save_hyperparameters(ignore=["optimizer"])
        self.automatic_optimization = False
        self.tokenizer = load_tokenizer(tokenizer_source(policy, tokenizer), template=template)
        check_reward_model(self.tokenizer, reward_model)
        self.policy = load_language_model(fit_to_tokenizer(policy, self.tokenizer))
        self.reference = (
            load_language_model(fit_to_tokenizer(policy if reference is None else reference, self.tokenizer))
            .eval()
            .requires_grad_(False)
        )
        if reference is None:
            self.reference.load_state_dict(self.policy.state_dict())  # a bare configuration draws new weights each time
        self.reward_model = ScalarModel.from_base(reward_model).eval().requires_grad_(False)
        self.value_model = ScalarModel.from_base(reward_model)
        self.value_model.load_state_dict(self.reward_model.state_dict())
        self._check_room(max_response_tokens)
        self.scorer: Scorer = RewardModelScorer(self.reward_model, batch_rows=micro_batch_size)
        self.make_optimizer = optimizer
        self.kl_coef = kl_coef
        self.minibatch_size = minibatch_size
        self.iterations_done = 0
        self.episodes_done = 0
        self._frozen_digests: dict[str, str] = {}
        self._grad_norms: Metrics = {}

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
        networks = {"policy": self.policy, "reference": self.reference, "reward_model": self.reward_model}
        limits = [(limit, name) for name, net in networks.items() if (limit := context_length(net.config)) is not None]
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
        optimizer = self.make_optimizer(
            [
                {"params": list(self.policy.parameters()), "lr": self.hparams["learning_rate"]},
                {"params": list(self.value_model.parameters()), "lr": self.hparams["value_learning_rate"]},
            ]
        )
        warmup = self.hparams["warmup_iterations"]
        schedule = per_group_schedule(optimizer, [lambda done: linear_warmup(done, warmup), lambda done: 1.0])
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def rollout(
        self,
        batch: PromptBatch,
        *,
        iteration: int | None = None,
        hooks: Sequence[Any] = (),
        temperature: float | None = None,
    ) -> Rollout:
        """Sample a response for each prompt and let all networks read it.

        Args:
            batch: this rank's prompts.
            iteration: key of the random streams; default: the current iteration.
            hooks: those with ``on_rollout_progress(module, finished, wanted)`` are told how sampling gets on.
            temperature: default: the module's.

        Returns:
            The rollout, without gradients.
        """
        rows = len(batch.prompt_ids_BP)
        first_row = rows_before(rows, batch.prompt_ids_BP.device)
        temperature = self.hparams["temperature"] if temperature is None else temperature

        def progress(finished: int, wanted: int) -> None:
            _tell(hooks, "on_rollout_progress", self, finished, wanted)

        responses = sample_responses(
            self.policy,
            batch,
            max_tokens=self.hparams["max_response_tokens"],
            eos_ids=[self.tokenizer.eos_token_id],
            pad_id=padding_id(self.tokenizer),
            temperature=temperature,
            rows=range(first_row, first_row + rows),
            seed=self.hparams["seed"],
            iteration=self.iterations_done if iteration is None else iteration,
            batch_rows=self.hparams["rollout_batch_size"],
            progress=progress,
        )
        return collect(
            batch,
            responses,
            policy=self.policy,
            reference=self.reference,
            value_model=self.value_model,
            scorer=self.scorer,
            temperature=temperature,
            missing_eos=self.hparams["missing_eos"],
            missing_eos_value=self.hparams["missing_eos_value"],
            micro_batch_size=self.hparams["micro_batch_size"],
        )

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
        logprobs_BR, entropy_BR = response_logprobs(
            self.policy, prompts, responses, temperature=self.hparams["temperature"], entropy=True
        )
        assert entropy_BR is not None
        values_BR = response_values(self.value_model, prompts, responses)
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
        metrics = {
            **{f"policy/{name}": value for name, value in policy_metrics.items()},
            **{f"value/{name}": value for name, value in value_metrics.items()},
            "policy/loss": policy_loss.detach(),
            "policy/entropy": entropy_BR.sum() / (mask_BR.sum() if denominator is None else denominator),
            "value/loss": value_loss.detach(),
        }
        return policy_loss + self.hparams["value_coef"] * value_loss, metrics

    def iteration(
        self,
        batch: PromptBatch,
        *,
        hooks: Sequence[Any] = (),
        backward: Backward | None = None,
        step: Step | None = None,
        no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> Metrics:
        """One iteration: rollout, experience, updates. Works without a Trainer.

        Args:
            batch: this rank's prompts.
            hooks: callbacks with any of ``on_experience``, ``auxiliary_losses``, ``after_update``, ``after_iteration``,
                ``on_rollout_progress``.
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
        _tell(hooks, "on_experience", self, rollout, experience)
        metrics = describe(experience, kl_coef=self.kl_coef)
        updates: list[Metrics] = []
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
                updates.append(self._update(minibatch, hooks, backward, step, no_sync))
                _tell(hooks, "after_update", self, updates[-1])
        self.iterations_done += 1
        self.episodes_done += rows * world_size()
        for name in updates[0]:
            values = [float(update[name]) for update in updates]
            metrics[name] = max(values) if name.endswith("ratio_max") else sum(values) / len(values)
        metrics |= {f"first_minibatch/{name}": updates[0][f"policy/{name}"] for name in ("approx_kl", "ratio_mean")}
        metrics |= {"time/rollout": sampled - started, "time/update": time.perf_counter() - sampled}
        metrics |= {"episodes": self.episodes_done, "iteration": self.iterations_done}
        _tell(hooks, "after_iteration", self, metrics)
        return metrics

    def clip_each_network(self) -> Metrics:
        """Clip policy and value model, each by its own norm.

        Returns:
            Their norms before clipping, ``policy/grad_norm`` and ``value/grad_norm``.
        """
        limit = self.hparams["max_grad_norm"]
        self._grad_norms = {
            "policy/grad_norm": nn.utils.clip_grad_norm_(self.policy.parameters(), limit),
            "value/grad_norm": nn.utils.clip_grad_norm_(self.value_model.parameters(), limit),
        }
        return self._grad_norms

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
        """Refuse sizes that do not divide before anything is sampled; leave a finished run as it is."""
        batch_size = getattr(getattr(self.trainer, "datamodule", None), "batch_size", None)
        if batch_size is not None:
            self._minibatch_count(batch_size)
        if self.episodes_done >= self.hparams["episodes"]:
            self.trainer.should_stop = True

    def validation_rollout(self, batch: PromptBatch, batch_idx: int) -> Rollout:
        """Samples for held-out prompts, validation or test, from the same random streams every time.

        Args:
            batch: prompts.
            batch_idx: number of the batch, part of the streams' key.

        Returns:
            The rollout.
        """
        return self.rollout(batch, iteration=_VALIDATION + batch_idx)

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Score and KL on held-out prompts."""
        self._evaluate(batch, batch_idx, "val")

    def test_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """As validation, on the test prompts; from the same random streams."""
        self._evaluate(batch, batch_idx, "test")

    def on_validation_epoch_end(self) -> None:
        """The x-axis of training: without it Lightning takes its own count, which is one behind."""
        self._log_x()

    def on_test_epoch_end(self) -> None:
        """As after validation."""
        self._log_x()

    def _log_x(self) -> None:
        # Once an epoch: a mean over batches would be rounded, and checkpoints are named after this number.
        self.log("step", float(self.iterations_done), sync_dist=True)

    def _evaluate(self, batch: PromptBatch, batch_idx: int, split: str) -> None:
        rollout = self.validation_rollout(batch, batch_idx)
        described = describe(
            assess(rollout, kl_coef=self.kl_coef, discount=1.0, gae_lambda=1.0, whiten_advantages=False),
            kl_coef=self.kl_coef,
        )
        for name in ("objective/score", "objective/kl", "rollout/len_mean", "rollout/eos_rate"):
            self.log(
                f"ppo/{split}/{name}", described[name], batch_size=len(rollout.scores_B), on_epoch=True, sync_dist=True
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the counters, the KL coefficient, and which frozen networks the run used (not their weights)."""
        super().on_save_checkpoint(checkpoint)
        for name in self.frozen_networks:
            if name not in self._frozen_digests:
                self._frozen_digests[name] = digest_of(getattr(self, name))
        checkpoint["ppo"] = {
            "iterations_done": self.iterations_done,
            "episodes_done": self.episodes_done,
            "kl_coef": self.kl_coef,
            "frozen": {name: {"sha256": digest} for name, digest in self._frozen_digests.items()},
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the counters up again; refuse to go on with another reference or reward model.

        Raises:
            ConfigError: a frozen network is not the one that the run began with.
        """
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint["ppo"]
        for name, known in saved["frozen"].items():
            if digest_of(getattr(self, name)) != known["sha256"]:
                raise ConfigError(
                    f"{name}: the weights are not those that this run began with, so it would go on towards another "
                    "goal. Give the same reward_model, policy and reference, or start a new run."
                )
        self.iterations_done = saved["iterations_done"]
        self.episodes_done = saved["episodes_done"]
        self.kl_coef = saved["kl_coef"]

    def _update(
        self,
        minibatch: Experience,
        hooks: Sequence[Any],
        backward: Backward,
        step: Step,
        no_sync: Callable[[], AbstractContextManager[Any]],
    ) -> Metrics:
        """Accumulate all gradients of one minibatch, then one step of the one optimizer."""
        own_weight, mixed = 1.0, False
        with no_sync():
            for hook in hooks:
                if hasattr(hook, "auxiliary_losses"):
                    own_weight *= getattr(hook, "own_weight", 1.0)
                    for auxiliary in hook.auxiliary_losses(self, minibatch):
                        backward(auxiliary)
                        mixed = True
        # What the auxiliary losses alone ask for, on this rank: if it dwarfs the rest, clipping leaves PPO nothing.
        gradients = [parameter.grad for parameter in self.policy.parameters() if parameter.grad is not None]
        mixed_norm = {"ptx/grad_norm": nn.utils.get_total_norm(gradients)} if mixed else {}
        rows = len(minibatch.rollout.scores_B)
        tokens = minibatch.rollout.response_mask_BR.sum().to(torch.float32)
        denominator = sum_over_ranks(tokens) / world_size()  # DDP averages gradients: sums over ranks / this = the mean
        size = self.hparams["micro_batch_size"]
        parts = []
        for start in range(0, rows, size):
            last = start + size >= rows
            with nullcontext() if last else no_sync():
                loss, metrics = self.loss(select(minibatch, slice(start, start + size)), denominator=denominator)
                backward(loss * own_weight)
            parts.append(metrics)
        step()
        joined = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
        summed = {name: values.max() if name.endswith("ratio_max") else values.sum() for name, values in joined.items()}
        return summed | self._grad_norms | mixed_norm

    def _minibatch_count(self, rows: int) -> int:
        exact_share(self.minibatch_size, "minibatch_size")
        if rows % self.minibatch_size:
            raise ConfigError(
                f"minibatch_size: got {self.minibatch_size} for {rows} prompts an iteration; the prompts "
                "(data.batch_size) must be a multiple of it."
            )
        return rows // self.minibatch_size

    def _optimizer_step(self) -> None:
        optimizer = self.optimizers()
        optimizer.step()  # type: ignore[union-attr]
        optimizer.zero_grad()  # type: ignore[union-attr]

    def _no_sync(self) -> AbstractContextManager[Any]:
        no_sync = getattr(self.trainer.strategy.model, "no_sync", None)
        return nullcontext() if no_sync is None else no_sync()


def _tell(hooks: Iterable[Any], name: str, *arguments: Any) -> None:
    for hook in hooks:
        method = getattr(hook, name, None)
        if method is not None:
            method(*arguments)
