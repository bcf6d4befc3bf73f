"""What is shown of each stage: which metrics, under which titles, and how to read them."""

from __future__ import annotations

from typing import NamedTuple


class Plot(NamedTuple):
    """A metric over the course of a run.

    Attributes:
        title: of the figure.
        y_label: with the unit.
        metric: as logged, without ``stage/split/``.
        caption: how to read it.
        percent: it is a share.
        main: it belongs to what everybody looks at; the others are folded.
    """

    title: str
    y_label: str
    metric: str
    caption: str
    percent: bool = False
    main: bool = False


class Row(NamedTuple):
    """A line of the table of last values.

    Attributes:
        label: with the unit.
        metric: as logged, without the stage.
        percent: it is a share.
    """

    label: str
    metric: str
    percent: bool = False


TITLES = {
    "pretrain": "Base model",
    "sft": "Supervised fine-tuning",
    "rm": "Reward model",
    "ppo": "Reinforcement learning",
}

_SFT_PLOTS = (
    Plot("Loss", "nats a token", "loss", "Next-token loss. Held-out loss that rises is overfitting.", main=True),
    Plot("Token accuracy", "share of tokens", "token_acc", "Tokens that the model would choose itself.", True, True),
    Plot("Score of samples", "score", "rm_score", "Mean reward-model score, on held-out prompts.", main=True),
    Plot("Pretraining loss", "nats a token", "ptx/nll", "Loss on the pretraining text that is mixed in.", main=True),
    Plot("Response length", "tokens", "response_len", "Mean length of sampled responses."),
    Plot("Finished responses", "share", "eos_rate", "Responses that end by themselves.", percent=True),
    Plot("Learning rate", "learning rate", "lr", "Of the last step before each point."),
    Plot("Gradient norm", "norm", "grad_norm", "Before clipping."),
    Plot("Tokens a step", "tokens", "tokens", "That a step's loss is a mean over."),
    Plot("Skipped steps", "steps", "skipped_steps", "Left out since their gradients were not finite."),
)

_RM_PLOTS = (
    Plot("Accuracy", "share of pairs", "acc", "Pairs that are scored in the labeler's order.", True, True),
    Plot("Loss", "nats", "loss", "Ranking loss. Held-out loss that rises is overfitting.", main=True),
    Plot(
        "Longer response wins",
        "share of pairs",
        "acc_len_baseline",
        "The accuracy of always choosing the longer response. A reward model that is not better has learned length.",
        percent=True,
    ),
    Plot("Log loss", "nats a pair", "log_loss", "Of the preferred response's probability; ln 2 = 0.693 is a coin."),
    Plot("Calibration error", "ECE", "ece", "Mean gap of confidence and accuracy.", percent=True),
    Plot("Margin", "score", "margin", "Score of the preferred response less that of the other."),
    Plot("Spread of scores", "score", "score_std", "Standard deviation over all responses."),
    Plot("Score and length", "rank correlation", "len_corr_within_prompts", "Of responses to the same prompt."),
    Plot("Learning rate", "learning rate", "lr", "Of the last step before each point."),
    Plot("Skipped steps", "steps", "skipped_steps", "Left out since their gradients were not finite."),
)

_PPO_PLOTS = (
    Plot("Score", "score", "objective/score", "Mean reward-model score of sampled responses.", main=True),
    Plot("KL to the reference", "nats a response", "objective/kl", "How far the policy has moved.", main=True),
    Plot("Response length", "tokens", "rollout/len_mean", "A drift to long ones often is reward hacking.", main=True),
    Plot(
        "Pretraining loss",
        "nats a token",
        "ptx/nll",
        "On text that PPO-ptx mixes in; a rise is alignment tax.",
        main=True,
    ),
    Plot("Reward", "score less KL penalty", "objective/rlhf_reward", "What PPO maximises, without pretraining."),
    Plot("Finished responses", "share", "rollout/eos_rate", "Responses that end before the limit.", percent=True),
    Plot("Score and length", "correlation", "rollout/score_length_corr", "Near 1, the reward pays for length."),
    Plot(
        "Repetition",
        "share of 4-grams",
        "rollout/repeat_4gram",
        "4-grams that the response has before already.",
        percent=True,
    ),
    Plot("Entropy", "nats a token", "policy/entropy", "A sudden fall means that the policy collapsed."),
    Plot("Policy loss", "loss", "policy/loss", "Clipped surrogate; only its trend says something."),
    Plot("Policy change", "approximate KL", "policy/approx_kl", "Within an iteration, nats a token."),
    Plot("Clipped ratios", "share", "policy/clip_fraction", "Many mean that steps are too large.", percent=True),
    Plot("Value loss", "loss", "value/loss", "Of the value model."),
    Plot("Explained variance", "share", "value/explained_var", "Of the returns, by the value model; 1 is best."),
    Plot("KL coefficient", "coefficient", "objective/kl_coef", "Constant unless KLMonitor has a target."),
    Plot("Policy gradient norm", "norm", "policy/grad_norm", "Before clipping."),
    Plot("Value gradient norm", "norm", "value/grad_norm", "Before clipping."),
    Plot("Learning rate", "policy's learning rate", "lr/policy", "In each iteration."),
    Plot("Value learning rate", "value model's learning rate", "lr/value", "In each iteration."),
    Plot("Health findings", "findings", "health/findings", "Rules that have something to say; see Health."),
    Plot("Time for sampling", "s an iteration", "time/rollout", "Sampling and scoring."),
    Plot("Time for updates", "s an iteration", "time/update", "Forward and backward passes."),
)

PLOTS: dict[str, tuple[Plot, ...]] = {"pretrain": _SFT_PLOTS, "sft": _SFT_PLOTS, "rm": _RM_PLOTS, "ppo": _PPO_PLOTS}

_SFT_ROWS = (
    Row("Loss, training (nats a token)", "train/loss"),
    Row("Loss, held out", "val/loss"),
    Row("Loss, test", "test/loss"),
    Row("Token accuracy, held out", "val/token_acc", percent=True),
    Row("Score of samples, held out", "val/rm_score"),
    Row("Pretraining loss (nats a token)", "train/ptx/nll"),
)

ROWS: dict[str, tuple[Row, ...]] = {
    "pretrain": _SFT_ROWS,
    "sft": _SFT_ROWS,
    "rm": (
        Row("Accuracy, training", "train/acc", percent=True),
        Row("Accuracy, held out", "val/acc", percent=True),
        Row("Accuracy, test", "test/acc", percent=True),
        Row("Longer response wins, held out", "val/acc_len_baseline", percent=True),
        Row("Lowest accuracy of a labeler, held out", "val/acc_labeler_min", percent=True),
        Row("Log loss, held out (nats a pair)", "val/log_loss"),
        Row("Calibration error (ECE), held out", "val/ece", percent=True),
        Row("Score and length, correlation held out", "val/len_corr_within_prompts"),
    ),
    "ppo": (
        Row("Score, training", "train/objective/score"),
        Row("Score, held out", "val/objective/score"),
        Row("Score, test", "test/objective/score"),
        Row("KL to the reference, training (nats a response)", "train/objective/kl"),
        Row("KL to the reference, held out", "val/objective/kl"),
        Row("Response length (tokens)", "train/rollout/len_mean"),
        Row("Finished responses", "train/rollout/eos_rate", percent=True),
        Row("Pretraining loss (nats a token)", "train/ptx/nll"),
        Row("Episodes", "train/episodes"),
    ),
}
