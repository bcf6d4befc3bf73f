"""The table of ``Health``: each check with its likely cause and the setting to change. docs/health.md shows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from lit_instruct.callbacks import health_checks as checks
from lit_instruct.callbacks.health_checks import Evidence, Observation


class Rule(NamedTuple):
    """One row of the table.

    Attributes:
        name: of the finding.
        symptom: what is looked for.
        cause: what it likely comes from.
        setting: what to change.
        check: None, or the evidence.
    """

    name: str
    symptom: str
    cause: str
    setting: str
    check: Callable[[Observation], Evidence | None]


class Finding(NamedTuple):
    """What is reported.

    Attributes:
        iteration: of the run, from 1.
        name: of the rule.
        seen: with numbers.
        cause: likely.
        setting: to change.
    """

    iteration: int
    name: str
    seen: str
    cause: str
    setting: str

    def __str__(self) -> str:
        return f"{self.name} in iteration {self.iteration}: {self.seen}. Likely: {self.cause}. Do: {self.setting}."


RULES = (
    Rule(
        "first_minibatch_differs",
        "ratio not 1 or approx_kl not 0 in the first minibatch",
        "the update reads responses in another way than the rollout: dropout, a temperature on one side, other "
        "position ids, dtype or kernel",
        "dropout off, `model.temperature` in every pass alike; compare the two forward passes",
        checks.first_minibatch,
    ),
    Rule(
        "dropout_on",
        "dropout modules at work during the update",
        "a network was built or switched to drop in training, so its ratios are noise",
        "set the dropout rates of the model's configuration to 0 (`model.policy` as loaded has none)",
        checks.dropout_on,
    ),
    Rule(
        "reference_is_another_model",
        "KL not 0 at the start, weights differ",
        "the reference is another checkpoint than the policy starts from, or loaded in another precision",
        "leave `model.reference` out, or give it the same checkpoint as `model.policy`",
        checks.other_reference,
    ),
    Rule(
        "reference_reads_differently",
        "KL not 0 at the start, weights are the same",
        "the reference is read with another temperature, with dropout, or with other positions than the policy",
        "`model.temperature` in every pass alike, the reference in eval mode",
        checks.other_reading,
    ),
    Rule(
        "kl_negative",
        "KL to the reference below 0 beyond chance",
        "responses come from another distribution than the one that is scored (top-k, top-p, a minimum length, a "
        "forbidden end of text), or padding counts in the KL; the policy then earns from it",
        "sample the whole distribution at `model.temperature`; mask before summing",
        checks.negative_kl,
    ),
    Rule(
        "sampler_differs",
        "-logprob of the samples is not the entropy of the scored distribution beyond chance",
        "the sampler uses another temperature or a truncated distribution",
        "`model.temperature` in sampling and scoring alike; no top-k, top-p or penalties in the sampler",
        checks.other_sampler,
    ),
    Rule(
        "tokens_after_end",
        "response mask counts tokens behind the end of text",
        "padding counts as response: the mask was not built from lengths, or sampling went on after the end",
        "build the mask up to and with the first end of text, for KL and scores too",
        checks.tokens_after_end,
    ),
    Rule(
        "end_not_counted",
        "finished responses whose last counted token is no end of text",
        "the mask stops before the end of text, or the sampler ends responses at another token than the tokenizer's",
        "count the end of text; the tokenizer's end of text must be the one that the demonstrations end with "
        "(`model.tokenizer`)",
        checks.end_not_counted,
    ),
    Rule(
        "never_stops",
        "hardly any response ends by itself",
        "demonstrations without end of text, or its loss masked since it is the padding token too; or the limit is "
        "too short",
        "train the SFT stage with the end of text in the loss; raise `model.max_response_tokens`; "
        "`model.missing_eos` replace",
        checks.never_stops,
    ),
    Rule(
        "few_prompts",
        "prompts repeat within an iteration",
        "duplicates in the prompt file, or fewer prompts than an iteration needs",
        "remove duplicates from `data.prompts`, or lower `data.batch_size`",
        checks.few_prompts,
    ),
    Rule(
        "score_misplaced",
        "the score is not paid at the last token",
        "paid in the last column instead of the last token, or one column off: short responses learn nothing",
        "pay it at the last column whose mask is True (`lit_instruct.functional.token_rewards`)",
        checks.score_misplaced,
    ),
    Rule(
        "padding_paid",
        "rewards, advantages or returns at padding",
        "a sum or a whitening without the mask",
        "mask rewards, advantages and returns by the response mask",
        checks.padding_paid,
    ),
    Rule(
        "scores_equal",
        "all scores equal",
        "a reward that tells no response from another, or all of them replaced by the rule for a missing end of text",
        "check `model.reward_model` or `model.reward` on two different responses; `model.missing_eos` none to compare",
        checks.scores_equal,
    ),
    Rule(
        "scores_too_wide",
        "spread of the scores against kl_coef",
        "scores in another unit than the paper's (standard deviation near 1): the KL penalty is next to nothing",
        "scale the reward down, or raise `model.kl_coef` (and `model.value_clip_range`) in proportion",
        checks.scores_too_wide,
    ),
    Rule(
        "score_follows_length",
        "correlation of score and length",
        "the reward pays for length, and the policy learns to be long",
        "reward model: compare its accuracy with the length baseline, balance lengths in the rankings; "
        "raise `model.kl_coef`",
        checks.score_follows_length,
    ),
    Rule(
        "score_falls",
        "score below that of the first iterations",
        "the sign of advantages or reward is flipped, rewards are whitened with their mean, or steps are too large",
        "check the sign of the reward; `model.whiten_rewards` off; lower `model.learning_rate`",
        checks.score_falls,
    ),
    Rule(
        "nothing_learned",
        "score flat and KL near 0 long after the warm-up",
        "KL too dear, a learning rate too low (the paper's suit billions of parameters), or one that never rises",
        "lower `model.kl_coef`, raise `model.learning_rate`, check `model.warmup_iterations`",
        checks.nothing_learned,
    ),
    Rule(
        "steps_too_large",
        "approx_kl or clip fraction high",
        "learning rate too high, too many passes over one rollout, or stale log-probabilities",
        "lower `model.learning_rate`, `model.inner_epochs` 1, larger `model.minibatch_size`",
        checks.steps_too_large,
    ),
    Rule(
        "kl_runs_away",
        "KL to the reference a token",
        "the policy has left what the reward model was trained on and exploits it",
        "raise `model.kl_coef`, lower `model.learning_rate` or `model.episodes`; use an earlier checkpoint",
        checks.kl_runs_away,
    ),
    Rule(
        "entropy_collapsed",
        "entropy falls to almost nothing",
        "learning rate too high, KL too cheap, or noise in the advantages (whitening rewards, flipped sign)",
        "lower `model.learning_rate`, raise `model.kl_coef`; `model.whiten_rewards` off",
        checks.entropy_collapsed,
    ),
    Rule(
        "text_repeats",
        "repeated 4-grams",
        "reward hacking by repetition, or a policy that collapsed",
        "read samples (SampleTable); raise `model.kl_coef`, lower `model.learning_rate`, `model.inner_epochs` 1",
        checks.text_repeats,
    ),
    Rule(
        "length_drifts",
        "mean length far from that of the first iterations",
        "the score pays for longer or shorter responses, or the end of text is unlearned",
        "look at rollout/score_length_corr and rollout/eos_rate; raise `model.kl_coef`, add PtxMixing",
        checks.length_drifts,
    ),
    Rule(
        "not_finite",
        "NaN or infinity in losses or gradients, steps left out",
        "overflow (fp16), a score that is no number, or a learning rate that blew the weights up",
        "train in bf16 or fp32 (`trainer.precision`), lower `model.learning_rate`, look at the scores; "
        "`model.max_nonfinite_steps` says how many are borne",
        checks.not_finite,
    ),
    Rule(
        "values_equal",
        "all values equal",
        "the value model does not learn or is not read: rate 0, a head of zeros, gradients cut off",
        "raise `model.value_learning_rate`, `model.value_coef`; start from the reward model (`model.value_model` null)",
        checks.values_equal,
    ),
    Rule(
        "value_clip_tight",
        "spread of the returns against value_clip_range",
        "the value clip is in units of reward and holds the value model back where scores are large",
        "scale the reward down, raise `model.value_clip_range` or set it to null",
        checks.value_clip_tight,
    ),
    Rule(
        "values_explain_nothing",
        "explained variance clearly below 0 after 30 iterations",
        "values read one position off, a value model without the reward model's bias, a rate too low, a clip too tight",
        "raise `model.value_learning_rate`, `model.value_clip_range` null, `model.value_warmup_iterations`",
        checks.values_explain_nothing,
    ),
    Rule(
        "ptx_loss_rises",
        "pretraining loss above that of the first iterations",
        "the sign of the text's loss is flipped, the text is not what the base model was trained on, or there is too "
        "little of it",
        "PtxMixing: check `text`, raise `coef` and `ratio` (the paper: 27.8 and 8); lower `model.learning_rate`",
        checks.ptx_rises,
    ),
    Rule(
        "ptx_drowns_ppo",
        "score flat while the text's gradient is more than ten times PPO's and both are clipped together",
        "the text's loss is summed instead of averaged, or its coefficient is too large for the clip",
        "PtxMixing: lower `coef`; raise `model.max_grad_norm`",
        checks.ptx_drowns_ppo,
    ),
)
"""Ouyang et al. 2022 (4.3, E.6, E.9) and what practitioners report of PPO on language models."""


def check_all(obs: Observation) -> dict[str, Evidence]:
    """Every rule that has something to say, in the order of the table."""
    found = {rule.name: rule.check(obs) for rule in RULES}
    return {name: evidence for name, evidence in found.items() if evidence is not None}


def table() -> str:
    """The rules as a Markdown table."""
    lines = ["| finding | what is seen | likely cause | what to change |", "|---|---|---|---|"]
    return "\n".join(lines + [f"| `{r.name}` | {r.symptom} | {r.cause} | {r.setting} |" for r in RULES])
