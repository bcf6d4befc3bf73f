"""Watch a PPO run and say what is wrong with it: finding, likely cause, the setting to change."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import lightning.pytorch as pl

from lit_instruct.callbacks.health_checks import FIRST, RECENT, Evidence, Limits, Observation, Row
from lit_instruct.callbacks.health_facts import active_dropouts, computes_in_fp32, experience_facts, same_weights
from lit_instruct.callbacks.health_rules import RULES, Finding, check_all
from lit_instruct.modules.ppo import PPOModule
from lit_instruct.modules.run_logs import to_tensorboard
from lit_instruct.modules.strategies import numbers_over_ranks, rank, world_size
from lit_instruct.types import ConfigError, Experience, Metrics, Rollout

log = logging.getLogger(__name__)

_SETTINGS = ("value_clip_range", "max_grad_norm", "warmup_iterations", "value_warmup_iterations")
_RULES = {rule.name: rule for rule in RULES}


class Health(pl.Callback):
    """Checks each PPO iteration against the table in ``health_rules`` and reports what it finds, once.

    A finding is logged as a warning, written to TensorBoard's text tab and kept in ``findings``; it is told again when
    it has become twice as bad or after ``repeat_every`` iterations. ``health/findings`` counts the rules that have
    something to say in an iteration, told or not. In a custom loop pass it as a hook. docs/health.md lists the rules.

    Attributes:
        findings: all reported ones, in order.
    """

    def __init__(
        self,
        action: Literal["warn", "stop"] = "warn",
        ignore: Sequence[str] = (),
        repeat_every: int = 50,
        limits: Limits = Limits(),  # noqa: B008 - frozen
    ):
        """Set what to do about findings.

        Args:
            action: warn, or stop the run after the iteration that has a finding.
            ignore: names of rules to leave out, such as reference_is_another_model where that is wanted.
            repeat_every: iterations after which a finding that persists is told again.
            limits: where findings begin.
        """
        super().__init__()
        if action not in ("warn", "stop"):
            raise ConfigError(f"Health action: got {action!r}; need warn or stop.")
        if unknown := sorted(set(ignore) - _RULES.keys()):
            raise ConfigError(f"Health ignore: got {', '.join(unknown)}; need names of rules: {', '.join(_RULES)}.")
        if repeat_every < 1:
            raise ConfigError(f"Health repeat_every: got {repeat_every}; need at least 1.")
        self.action, self.ignore, self.repeat_every, self.limits = action, frozenset(ignore), repeat_every, limits
        self.findings: list[Finding] = []
        self._first: list[Row] = []
        self._recent: deque[Row] = deque(maxlen=RECENT)
        self._told: dict[str, tuple[int, float]] = {}  # rule -> iteration and size when it was last told
        self._facts: dict[str, float] = {}
        self._dropouts: list[str] = []
        self._trainer: pl.Trainer | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse modules that have no rollouts; remember whom to stop (a custom loop can only be warned)."""
        if not isinstance(pl_module, PPOModule):
            raise ConfigError(f"Health: got a {type(pl_module).__name__}; need a PPOModule. Remove it.")
        self._trainer = trainer

    def on_experience(self, module: PPOModule, rollout: Rollout, experience: Experience) -> None:
        """Measure what must hold before any update."""
        facts = experience_facts(
            experience,
            kl_coef=module.kl_coef,
            whiten_rewards=bool(module.hparams["whiten_rewards"]),
            eos_ids=[int(module.tokenizer.eos_token_id)],
        )
        fresh = module.iterations_done == 0
        self._facts = {name: float(value) for name, value in facts.items()}
        self._facts |= {
            "episodes": float(len(rollout.scores_B) * world_size()),
            "fresh": float(fresh),
            "reference_is_policy": float(fresh and same_weights(module.policy, module.reference)),
            "warms_up": float(module.warms_up_value_model),
        }
        self._dropouts = []

    def after_update(self, module: PPOModule, minibatch_metrics: Metrics) -> None:
        """See in which state the networks are when they are updated."""
        if "fp32" in self._facts:
            return  # the first update of an iteration speaks for all
        self._facts["fp32"] = float(computes_in_fp32(module.policy, module.device))
        networks = {"policy": module.policy, "value_model": module.value_model}
        self._dropouts = [f"{name}.{part}" for name, net in networks.items() for part in active_dropouts(net)]

    def after_iteration(self, module: PPOModule, metrics: Metrics) -> None:
        """Check all rules, report, count, and stop if asked to."""
        row = self._row(module, metrics)
        self._recent.append(row)
        if len(self._first) < FIRST and not row["fact/warms_up"]:
            self._first.append(row)
        settings = {name: module.hparams[name] for name in _SETTINGS}
        seen = check_all(Observation(row, list(self._recent), self._first, settings, self.limits, self._dropouts))
        seen = {name: evidence for name, evidence in seen.items() if name not in self.ignore}
        metrics["health/findings"] = float(len(seen))
        if new := self._news(seen, module.iterations_done):
            self._report(new)
        if seen and self.action == "stop" and self._trainer is not None:
            log.warning("Health stops the run after iteration %d", module.iterations_done)
            self._trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        """What later iterations are compared with, and what has been told."""
        return {
            "first": [dict(row) for row in self._first],
            "recent": [dict(row) for row in self._recent],
            "told": dict(self._told),
            "findings": [tuple(finding) for finding in self.findings],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on comparing."""
        self._first = list(state_dict["first"])
        self._recent = deque(state_dict["recent"], maxlen=RECENT)
        self._told = {name: (told[0], told[1]) for name, told in state_dict["told"].items()}
        self.findings = [Finding(*finding) for finding in state_dict["findings"]]

    def _row(self, module: PPOModule, metrics: Metrics) -> Row:
        """This iteration's numbers, averaged over ranks, so that all ranks decide alike."""
        numbers = {name: float(value) for name, value in metrics.items()}
        numbers |= {f"fact/{name}": value for name, value in self._facts.items()}
        names = sorted(numbers)
        sums = numbers_over_ranks(*(numbers[name] for name in names), device=module.device)
        return {name: total / world_size() for name, total in zip(names, sums, strict=True)}

    def _news(self, seen: Mapping[str, Evidence], iteration: int) -> list[Finding]:
        new = []
        for name, (clause, size) in seen.items():
            told = self._told.get(name)
            if told is None or size >= 2 * told[1] or iteration >= told[0] + self.repeat_every:
                self._told[name] = (iteration, size)
                new.append(Finding(iteration, name, clause, _RULES[name].cause, _RULES[name].setting))
        return new

    def _report(self, new: Sequence[Finding]) -> None:
        self.findings += new
        if rank() != 0:
            return
        for finding in new:
            log.warning("%s", finding)
        text = "\n".join(f"- **{f.name}**: {f.seen}. Likely: {f.cause}. Do: {f.setting}." for f in new)
        if self._trainer is not None:
            to_tensorboard(self._trainer, lambda log: log.add_text("health", text, new[0].iteration))
