"""What ``Health`` looks for: pure functions of numbers.

A check looks at an :class:`Observation` and gives None or what it has seen. It knows neither models nor loggers; causes
and settings stand beside it in ``health_rules``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

from lit_instruct.types import ConfigError

FIRST, RECENT, TREND = 5, 10, 5
"""Iterations kept from the start of a run, kept as the recent ones, and averaged as "now" where a trend is wanted."""

_FEWEST_EPISODES = 64  # below that the spread itself is too uncertain for a z-score


@dataclass(frozen=True)
class Limits:
    """Where findings begin. The defaults leave healthy runs alone; a limit belongs to what it is compared with.

    Attributes:
        z: standard errors that a deviation must exceed where chance alone makes one. 5 raises a false alarm in less
            than one of 100,000 checks.
        max_approx_kl: KL (k3, nats a token) between the policies before and after updates, mean of 5 iterations; ten
            times as much is reported at once.
        max_clip_fraction: share of tokens whose ratio is clipped, mean of 5 iterations.
        max_kl_per_token: nats of KL to the reference a token.
        min_eos_rate: share of responses that end by themselves.
        max_length_factor: mean response length against that of the first iterations, either way.
        max_length_correlation: of raw score and length; half of it where responses have grown longer too.
        min_kl_price: kl_coef over the standard deviation of the scores; the paper has about 0.02.
        min_value_clip: value_clip_range over the standard deviation of the returns.
        min_explained_variance: of the returns by the values, mean of 10 iterations, after the patience; noise alone
            gives a little less than 0.
        min_entropy: share of the first iteration's entropy.
        max_repetition: share of 4-grams that occurred in the response before.
        max_score_drop: below the first iterations, in standard deviations of the scores.
        max_ptx_rise: of the pretraining loss over its first iterations, as a share of it.
        min_distinct_prompts: share of the iteration's prompts that differ.
        patience: iterations (of the policy after its warm-up) in which something should have been learned.
    """

    z: float = 5.0
    max_approx_kl: float = 0.1
    max_clip_fraction: float = 0.3
    max_kl_per_token: float = 1.0
    min_eos_rate: float = 0.1
    max_length_factor: float = 2.0
    max_length_correlation: float = 0.9
    min_kl_price: float = 0.003
    min_value_clip: float = 0.05
    min_explained_variance: float = -0.25
    min_entropy: float = 0.2
    max_repetition: float = 0.3
    max_score_drop: float = 0.5
    max_ptx_rise: float = 0.1
    min_distinct_prompts: float = 0.5
    patience: int = 30

    def __post_init__(self) -> None:
        """Refuse numbers that are none.

        Raises:
            ConfigError: names the limit.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            if not math.isfinite(value) or (value < 0 and field.name != "min_explained_variance"):
                raise ConfigError(f"Health limits.{field.name}: got {value}; need a finite number of 0 or more.")


Row = Mapping[str, float]
"""The metrics of one iteration, and under ``fact/`` what the metrics do not hold."""


class Observation(NamedTuple):
    """All that a check looks at.

    Attributes:
        now: of the iteration just finished.
        recent: of the last iterations, ``now`` included and last.
        first: of the first iterations of the run in which the policy learned.
        settings: of the module: ``clip_range``, ``value_clip_range``, ``max_grad_norm``, ``warmup_iterations`` and
            ``value_warmup_iterations``.
        limits: where findings begin.
        dropouts: names of modules that dropped something during the updates.
    """

    now: Row
    recent: Sequence[Row]
    first: Sequence[Row]
    settings: Mapping[str, float | None]
    limits: Limits
    dropouts: Sequence[str] = ()

    def fact(self, name: str) -> float:
        """A fact of this iteration, 0 if it was not measured."""
        return self.now.get(f"fact/{name}", 0.0)

    def mean(self, name: str, last: int = RECENT) -> float:
        """Mean over recent iterations that have the metric; NaN if none has."""
        return mean([row[name] for row in self.recent[-last:] if name in row])

    def episodes(self, last: int = RECENT) -> float:
        """Episodes in the recent iterations."""
        return sum(row["fact/episodes"] for row in self.recent[-last:])

    def trend(self, name: str) -> Trend | None:
        """The recent iterations against the first, None while the two overlap or the metric is not there."""
        before = [row[name] for row in self.first if name in row]
        after = [row[name] for row in self.recent[-TREND:] if name in row]
        learned = self.now["iteration"] - (self.settings["value_warmup_iterations"] or 0)
        if min(len(self.recent), learned) < FIRST + TREND or len(before) < FIRST or len(after) < TREND:
            return None
        error = math.sqrt(_variance(before) / len(before) + _variance(after) / len(after))
        change = mean(after) - mean(before)
        return Trend(mean(before), mean(after), change / error if error > 0 else math.copysign(math.inf, change))


class Trend(NamedTuple):
    """Mean before, mean now, and the change in standard errors."""

    before: float
    after: float
    z: float


class Evidence(NamedTuple):
    """What a check has seen.

    Attributes:
        seen: a clause with the numbers.
        size: how bad, in any unit: twice as much counts as worse.
    """

    seen: str
    size: float


def mean(values: Sequence[float]) -> float:
    """The mean; NaN of nothing."""
    return sum(values) / len(values) if values else math.nan


def _variance(values: Sequence[float]) -> float:
    middle = mean(values)
    return sum((value - middle) ** 2 for value in values) / max(len(values) - 1, 1)


def enough_z(z: float, samples: float) -> float:
    """The quantile of Student's t that is as rare as ``z`` of the normal distribution (first term of its expansion)."""
    return z + (z**3 + z) / (4.0 * samples)


# -- rollout and log-probabilities


def first_minibatch(obs: Observation) -> Evidence | None:
    """Before any update the policy is the one that sampled."""
    kl, ratio = obs.now["first_minibatch/approx_kl"], obs.now["first_minibatch/ratio_mean"]
    room_kl, room_ratio = (1e-4, 1e-4) if obs.fact("fp32") else (5e-3, 2e-2)
    size = max(abs(kl) / room_kl, abs(ratio - 1.0) / room_ratio)
    if not size > 1.0:
        return None
    z = obs.now.get("first_minibatch/surprise_z", 0.0)
    return Evidence(
        f"before any update approx_kl is {kl:.2g} and the mean ratio {ratio:.4g} (surprise_z {z:.1f})", size
    )


def dropout_on(obs: Observation) -> Evidence | None:
    """Networks of PPO run without dropout, in rollout and update."""
    if not obs.dropouts:
        return None
    return Evidence(f"{len(obs.dropouts)} modules drop during the update, {obs.dropouts[0]} first", len(obs.dropouts))


def _starts_away(obs: Observation) -> float | None:
    kl = obs.fact("kl_per_token")
    return kl if obs.fact("fresh") and kl > (1e-4 if obs.fact("fp32") else 1e-2) else None


def other_reference(obs: Observation) -> Evidence | None:
    """At the start the policy is its reference: the same weights."""
    kl = _starts_away(obs)
    if kl is None or obs.fact("reference_is_policy") > 0.5:
        return None
    return Evidence(f"at the start policy and reference differ by {kl:.2g} nats a token, and so do their weights", kl)


def other_reading(obs: Observation) -> Evidence | None:
    """At the start the policy is its reference: the same function."""
    kl = _starts_away(obs)
    if kl is None or obs.fact("reference_is_policy") <= 0.5:
        return None
    return Evidence(f"at the start policy and reference differ by {kl:.2g} nats a token with the same weights", kl)


def negative_kl(obs: Observation) -> Evidence | None:
    """A KL is not negative; its estimate is so by chance alone."""
    episodes = obs.episodes()
    total = sum(row["fact/episodes"] * row["objective/kl"] for row in obs.recent)
    error = math.sqrt(sum(row["fact/episodes"] * row["objective/kl_std"] ** 2 for row in obs.recent))
    # Rounding makes a KL of 1e-7 that is the same in all episodes.
    if episodes < _FEWEST_EPISODES or not total / episodes < -1e-4:
        return None
    z = total / error if error > 0 else -math.inf
    if not z < -enough_z(obs.limits.z, episodes):
        return None
    return Evidence(
        f"KL to the reference is {total / episodes:.3g} nats a sequence, {-z:.1f} standard errors below 0", -z
    )


def other_sampler(obs: Observation) -> Evidence | None:
    """Samples must be as surprising as their distribution's entropy says."""
    z = sum(row["first_minibatch/surprise_z"] for row in obs.recent) / math.sqrt(len(obs.recent))
    if first_minibatch(obs) or obs.episodes() < _FEWEST_EPISODES:
        return None
    if not abs(z) > enough_z(obs.limits.z, obs.episodes()):
        return None
    word = "less" if z < 0 else "more"
    return Evidence(
        f"samples are {word} surprising than the scored distribution's entropy by {abs(z):.1f} errors", abs(z)
    )


def tokens_after_end(obs: Observation) -> Evidence | None:
    """The mask ends with the first end of text."""
    return _share(obs.fact("tokens_after_end"), "count tokens behind their end of text")


def end_not_counted(obs: Observation) -> Evidence | None:
    """The end of text belongs to the response."""
    return _share(obs.fact("end_not_counted"), "do not end where their mask and their finished flag say")


def never_stops(obs: Observation) -> Evidence | None:
    """Some responses should end by themselves."""
    rate = obs.mean("rollout/eos_rate", TREND)
    if obs.episodes(TREND) < _FEWEST_EPISODES or not rate < obs.limits.min_eos_rate:
        return None
    return Evidence(f"{rate:.1%} of the responses end by themselves", 1.0 - rate)


def few_prompts(obs: Observation) -> Evidence | None:
    """An iteration draws its prompts without repeating them."""
    share = obs.mean("rollout/distinct_prompts", TREND)
    return (
        Evidence(f"{share:.0%} of the prompts differ", 1 / share) if share < obs.limits.min_distinct_prompts else None
    )


# -- scores and rewards


def score_misplaced(obs: Observation) -> Evidence | None:
    """Rewards are -kl_coef * KL at each token, and the score on top at the last one."""
    return _share(
        obs.fact("score_misplaced"), "have rewards that are not -kl_coef * KL plus the score at the last token"
    )


def padding_paid(obs: Observation) -> Evidence | None:
    """Padding earns nothing."""
    return _share(obs.fact("padding_paid"), "have rewards, advantages or returns at padding")


def scores_equal(obs: Observation) -> Evidence | None:
    """Where all scores are equal there is nothing to learn."""
    equal = all(row["fact/scores_equal"] == 1.0 for row in obs.recent[-3:])
    if len(obs.recent) < 3 or obs.episodes(3) < _FEWEST_EPISODES or not equal:
        return None
    return Evidence(f"all responses of an iteration have the score {obs.now['objective/score']:.3g}", 1.0)


def scores_too_wide(obs: Observation) -> Evidence | None:
    """The KL coefficient is a price in units of the score's spread."""
    spread, price = obs.mean("objective/score_std", TREND), obs.now["objective/kl_coef"]
    if not 0 < price < obs.limits.min_kl_price * spread:
        return None
    return Evidence(f"scores have a standard deviation of {spread:.3g}, and kl_coef is {price:.3g}", spread / price)


def score_follows_length(obs: Observation) -> Evidence | None:
    """A score that is nearly a function of length pays for length."""
    weights = [max(row["fact/episodes"] - 3.0, 0.0) for row in obs.recent]
    total = sum(weights)
    if total < _FEWEST_EPISODES:
        return None
    bound = [min(max(row["rollout/score_length_corr"], -0.999999), 0.999999) for row in obs.recent]
    average = sum(w * math.atanh(r) for w, r in zip(weights, bound, strict=True)) / total  # Fisher's transformation
    lowest = math.tanh(average - obs.limits.z / math.sqrt(total))
    trend = obs.trend("rollout/len_mean")
    grown = trend is not None and trend.after > 1.2 * trend.before and trend.z > obs.limits.z
    if not lowest > obs.limits.max_length_correlation * (0.5 if grown else 1.0):
        return None
    longer = f", and responses grew from {trend.before:.1f} to {trend.after:.1f} tokens" if trend and grown else ""
    return Evidence(f"score and length correlate with {math.tanh(average):.2f}{longer}", obs.now["rollout/len_mean"])


def score_falls(obs: Observation) -> Evidence | None:
    """What is maximised should not fall."""
    trend = obs.trend("objective/score")
    spread = mean([row["objective/score_std"] for row in obs.first])
    if trend is None or not (
        trend.z < -obs.limits.z and trend.before - trend.after > obs.limits.max_score_drop * spread
    ):
        return None
    return Evidence(
        f"the score fell from {trend.before:.3g} to {trend.after:.3g}", (trend.before - trend.after) / spread
    )


def _stands_still(obs: Observation) -> str | None:
    """The score has not risen, and the policy has hardly moved, long after the warm-up."""
    warmups = (obs.settings["warmup_iterations"] or 0) + (obs.settings["value_warmup_iterations"] or 0)
    trend = obs.trend("objective/score")
    if trend is None or obs.now["iteration"] < warmups + obs.limits.patience:
        return None
    spread, kl = obs.mean("objective/score_std"), obs.mean("objective/kl")
    if trend.after - trend.before > 0.1 * spread or not kl < 0.05:
        return None
    return f"the score went from {trend.before:.3g} to {trend.after:.3g} and KL to the reference is {kl:.2g} nats"


def nothing_learned(obs: Observation) -> Evidence | None:
    """Long after the warm-up something should have moved."""
    seen = _stands_still(obs)
    return None if seen is None or _ptx_drowns(obs) else Evidence(seen, 1.0)


# -- updates


def steps_too_large(obs: Observation) -> Evidence | None:
    """An update should stay where its samples say something."""
    limits, kl = obs.limits, obs.mean("policy/approx_kl", TREND)
    clipped = obs.mean("policy/clip_fraction", TREND)
    at_once = obs.now["policy/approx_kl"] / (10 * limits.max_approx_kl)
    steadily = max(kl / limits.max_approx_kl, clipped / limits.max_clip_fraction) if len(obs.recent) >= 3 else 0.0
    size = max(at_once, steadily)
    if not size > 1.0:
        return None
    return Evidence(f"approx_kl is {kl:.2g} nats a token and {clipped:.0%} of the ratios are clipped", size)


def kl_runs_away(obs: Observation) -> Evidence | None:
    """Far from the reference a reward model knows nothing."""
    per_token = obs.mean("objective/kl", 3) / obs.mean("rollout/len_mean", 3)
    if not per_token > obs.limits.max_kl_per_token:
        return None
    return Evidence(f"KL to the reference is {per_token:.2g} nats a token", per_token)


def entropy_collapsed(obs: Observation) -> Evidence | None:
    """A policy without entropy explores nothing."""
    if len(obs.recent) < 3 or not obs.first:
        return None
    before, after = obs.first[0]["policy/entropy"], obs.mean("policy/entropy", 3)
    if not after < obs.limits.min_entropy * before:
        return None
    return Evidence(f"entropy fell from {before:.2g} to {after:.2g} nats a token", before / max(after, 1e-6))


def text_repeats(obs: Observation) -> Evidence | None:
    """Healthy text repeats few 4-grams."""
    share, before = obs.mean("rollout/repeat_4gram", TREND), mean([row["rollout/repeat_4gram"] for row in obs.first])
    # Code and tables repeat by nature: what the model did from the start counts only if it is nearly everything.
    limit = max(obs.limits.max_repetition, min(2 * before, 0.7))
    if obs.episodes(TREND) < _FEWEST_EPISODES or not share > limit:
        return None
    return Evidence(f"{share:.0%} of the 4-grams occurred in the response before (at first {before:.0%})", share)


def length_drifts(obs: Observation) -> Evidence | None:
    """Length should not change by itself."""
    trend = obs.trend("rollout/len_mean")
    if trend is None or not abs(trend.z) > obs.limits.z:
        return None
    factor = max(trend.after / max(trend.before, 1e-6), trend.before / max(trend.after, 1e-6))
    if not factor > obs.limits.max_length_factor:
        return None
    return Evidence(f"mean response length went from {trend.before:.1f} to {trend.after:.1f} tokens", factor)


def not_finite(obs: Observation) -> Evidence | None:
    """NaN and infinity."""
    names = ("policy/grad_norm", "value/grad_norm", "ptx/grad_norm", "policy/loss", "value/loss")
    bad = [f"{name} is {obs.now[name]}" for name in names if name in obs.now and not math.isfinite(obs.now[name])]
    skipped = obs.now.get("skipped_steps", 0.0)
    if not (bad or skipped):
        return None
    return Evidence(
        "; ".join([f"{skipped:.0f} optimizer steps of the iteration were left out", *bad]), max(skipped, 1.0)
    )


# -- value model


def values_equal(obs: Observation) -> Evidence | None:
    """Values that learn differ from state to state."""
    if len(obs.recent) < 3 or not all(row["fact/values_equal"] == 1.0 for row in obs.recent[-3:]):
        return None
    return Evidence("for three iterations all states had the same value", 1.0)


def value_clip_tight(obs: Observation) -> Evidence | None:
    """The value clip is in units of the return."""
    clip, spread = obs.settings["value_clip_range"], obs.mean("returns/std", TREND)
    if clip is None or not clip < obs.limits.min_value_clip * spread:
        return None
    return Evidence(f"returns have a standard deviation of {spread:.3g}, and value_clip_range is {clip:.3g}", spread)


def values_explain_nothing(obs: Observation) -> Evidence | None:
    """After a while values should foresee returns better than their mean does."""
    share = obs.mean("value/explained_var")
    if obs.now["iteration"] < obs.limits.patience or not share < obs.limits.min_explained_variance:
        return None
    gap = obs.mean("advantage/mean")
    return Evidence(
        f"explained variance is {share:.2f}, and returns lie {gap:+.2g} off the values on average", 1.0 - share
    )


# -- pretraining gradients


def ptx_rises(obs: Observation) -> Evidence | None:
    """Pretraining gradients are there to keep this loss."""
    if (now := obs.now.get("ptx/nll", 0.0)) < 0:
        return Evidence(f"the pretraining loss is {now:.3g}, and minus a log-probability cannot be negative", -now)
    trend = obs.trend("ptx/nll")
    if trend is None or not (trend.z > obs.limits.z and trend.after > trend.before * (1.0 + obs.limits.max_ptx_rise)):
        return None
    return Evidence(
        f"the pretraining loss rose from {trend.before:.3g} to {trend.after:.3g}", trend.after - trend.before
    )


def _ptx_drowns(obs: Observation) -> bool:
    text, own, both = (obs.mean(name) for name in ("ptx/grad_norm", "policy/own_grad_norm", "policy/grad_norm"))
    return both > (obs.settings["max_grad_norm"] or math.inf) and text > 10 * own


def ptx_drowns_ppo(obs: Observation) -> Evidence | None:
    """Both parts are clipped together."""
    seen = _stands_still(obs)
    if seen is None or not _ptx_drowns(obs):
        return None
    text, own = obs.mean("ptx/grad_norm"), obs.mean("policy/own_grad_norm")
    return Evidence(
        f"the gradient of the text is {text:.2g}, that of PPO {own:.2g}, clipped together; {seen}", text / own
    )


def _share(share: float, clause: str) -> Evidence | None:
    return Evidence(f"{share:.0%} of the responses {clause}", share) if share > 0 else None
